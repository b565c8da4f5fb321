"""common/read_ahead.py: results in order, read ahead to the given depth, by one thread that ends."""

import threading
import time

import pytest
import torch

from common.read_ahead import read_ahead


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_results_come_in_order_with_the_next_ones_begun(depth):
    begun = [threading.Event() for _ in range(6)]

    def note(number):
        begun[number].set()
        return number * 10

    results = read_ahead(note, range(6), depth)
    assert next(results) == 0
    assert begun[depth].wait(10) and not begun[depth + 1].is_set()
    assert list(results) == [10, 20, 30, 40, 50]
    assert list(read_ahead(note, [], depth)) == []


def test_a_failure_passes_on():
    results = read_ahead(lambda number: 1 // number, [1, 0])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_ends_the_thread_and_drops_calls_not_begun():
    begun = []

    def slow(number):
        begun.append(number)
        time.sleep(0.05)

    results = read_ahead(slow, range(100), depth=50)
    next(results)
    results.close()
    assert len(begun) < 50 and not any("read ahead" in thread.name for thread in threading.enumerate())


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned_by_the_ranks_own_gpu():
    def fetch(_):
        return {"x": torch.ones(3), "device": torch.tensor(torch.cuda.current_device())}

    (read,) = read_ahead(fetch, [0], 1, "cuda:0")
    assert read["x"].is_pinned() and read["device"] == 0
