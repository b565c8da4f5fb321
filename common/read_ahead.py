"""Batches read by a thread while the network computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def read_ahead(
    function: Callable[[Any], Any],
    arguments: Iterable[Any],
    depth: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Any]:
    """Yield function(argument) for each argument in order, while a thread computes the next `depth` of them.

    device: the network's. For a GPU the thread pins its results, a tensor or a dict of tensors, so that `non_blocking`
    copies do not wait.

    `function` should use numpy or a single thread: called from another thread, torch's OpenMP starts a second pool of
    threads that competes with the first; on two cores each training step took 1.6 times as long.

    Example: `for fetched in read_ahead(lambda step: batch(items, step=step, ...), range(start, steps)): ...`
    """
    device = torch.device(device)

    def read(argument: Any) -> Any:
        result = function(argument)
        return pinned(result) if device.type == "cuda" else result

    # A new thread's current GPU is the first one, on every rank, and pinning would create a context there.
    set_device = torch.cuda.set_device if device.type == "cuda" else (lambda _: None)
    pool, pending = ThreadPoolExecutor(1, "read ahead", set_device, (device,)), deque()
    try:
        for argument in arguments:
            pending.append(pool.submit(read, argument))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def pinned(result: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """Return a tensor, or a dict of tensors, in pinned memory."""
    if isinstance(result, dict):
        return {name: tensor.pin_memory() for name, tensor in result.items()}
    return result.pin_memory()
