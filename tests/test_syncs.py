"""Synchronizations of a training step with the device, counted by their calls on a CPU."""

from itertools import count
from pathlib import Path

import pytest
import tiny_gpt
import tiny_sit_run
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.config import parse_config
from common.launch import Process
from common.timer import Timer
from nanoGPT import train as gpt
from SIT import train as sit
from tests.ranks import Ranks

QUIET = ("--log_every", "1000", "--eval.every", "1000", "--checkpoint.every", "0")
WAITS = (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero)
WAITS += (Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__)
WAITS += (torch.equal, torch.tensor, torch.as_tensor)


class Waits(TorchFunctionMode):
    """Counts calls that read a tensor on the host, or copy a number from it."""

    count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.count += function in WAITS
        return function(*arguments, **(options or {}))


def waits_of_a_step(experiment: str, config: Path, *arguments: str) -> float:
    """Return the waits per step, without the first and the last: those of 6 steps less those of 3, by 3."""
    program, counts = {"gpt": gpt, "sit": sit}[experiment], []
    device = torch.device("cpu")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for steps in ("3", "6"):
        command = [str(config), "--out", str(config.parent / "runs"), "--steps", steps, *QUIET, *arguments]
        settings = parse_config(program.Config, command)
        settings = program.fit_vocabulary(settings) if program is gpt else settings
        with Waits() as waits:
            program.train(settings, Process(rank, rank, size, device))
        counts.append(waits.count)
    return (counts[1] - counts[0]) / 3


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("gpt")
    batches = "steps = 9\n[data]\nbatch_size = 4\nmicro_batch = 1\n"
    return {
        "gpt": tiny_gpt.write_config(folder, tiny_gpt.write_corpus(folder), batches),
        "sit": tiny_sit_run.write_config(tmp_path_factory.mktemp("sit"), batches),
    }


@pytest.mark.parametrize("experiment", ["gpt", "sit"])
def test_waits_of_a_step_on_one_device_match_one(experiment, configs):
    assert waits_of_a_step(experiment, configs[experiment]) == 1


@pytest.mark.slow
def test_waits_of_a_step_on_two_ranks_match_two(configs):
    with Ranks(2) as ranks:
        for mode in ("ddp", "fsdp"):
            assert ranks(waits_of_a_step, "gpt", configs["gpt"], "--parallel.mode", mode) == [2, 2]


def test_timer_waits_for_a_gpu_once_per_reading_and_matches_its_events(monkeypatch):
    """The stand-in's clock: ms that pass between one event and the next."""
    clock, waits = count(step=10), []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, later) -> int:
            return later.at - self.at

        def synchronize(self) -> None:
            waits.append(self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = Timer(torch.device("cuda"))
    for _ in range(3):
        timer.start()
        timer.optimizer()
        timer.stop()
    assert not waits
    assert timer.medians() == (20, 10)
    assert waits == [80]  # the last event
