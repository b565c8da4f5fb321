"""Processes, devices, seeds and signals of a run, with torchrun or without."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common import UserError, gpu, guard
from common.guard import leave as leave
from common.guard import main_guard as main_guard
from common.rendezvous import read_environment, refuse_taken_port

Result = TypeVar("Result")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Process:
    """This process's rank, the number of ranks, and its device."""

    rank: int
    local_rank: int  # rank on this machine, and index of the GPU
    world_size: int
    device: torch.device
    local_world_size: int = 1  # ranks on this machine

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes for all."""
        return self.rank == 0


def start(device: str = "auto", timeout_s: float = 600) -> Process:
    """Join torchrun's process group, or run as a single process without one.

    `device` "auto" takes CUDA, then MPS, then the CPU. The backend is NCCL on CUDA and gloo on CPUs. A collective
    that takes longer than `timeout_s` seconds ends the run instead of hanging it.

    Raises UserError for a device that is unknown, missing or unusable, for invalid launcher variables, and for a port
    that another program uses.
    """
    gpu.set_allocator()
    rank, local_rank, world_size, local_world_size = read_environment()
    chosen = _choose_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # NCCL sends Python objects through the current device
    if "RANK" in os.environ and not dist.is_initialized():
        refuse_taken_port(rank, timeout_s)
        on_gpu = chosen.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if on_gpu else None,  # NCCL connects now, and barriers know their GPU
        )
    return Process(rank, local_rank, world_size, chosen, local_world_size)


def _choose_device(name: str, local_rank: int, world_size: int) -> torch.device:
    if name not in DEVICES:
        raise UserError(f"device must be one of {', '.join(DEVICES)}; got {name!r}")
    gpus = gpu.count() if name in ("auto", "cuda") else 0
    if name == "auto":
        several = world_size > 1  # MPS has no collectives
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if gpus else "mps" if mps else "cpu"
    if name == "cuda":
        if not gpus:
            raise UserError("device 'cuda' needs a GPU, but torch sees none; use device cpu or auto")
        if local_rank >= gpus:
            raise UserError(
                f"local rank {local_rank} needs a GPU of its own, but torch sees {gpus}; start fewer processes (NGPU)"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and (world_size > 1 or not torch.backends.mps.is_available()):
        raise UserError("device 'mps' needs an Apple GPU and a single process; use device cpu or auto")
    return torch.device(name)


def device_mesh(process: Process, replicate: int, shard: int) -> DeviceMesh:
    """Arrange all ranks as `replicate` replicas of a model, each sharded over `shard` neighbouring ranks.

    A single replica is a mesh of one dimension, "shard"; several are ("replicate", "shard"), as FSDP2 takes them. Every
    rank must call it. Raises UserError unless replicate * shard is the number of ranks.
    """
    if replicate * shard != process.world_size:
        raise UserError(
            f"a mesh of {replicate} replicas on {shard} ranks each needs {replicate * shard} ranks; got "
            f"{process.world_size}: start as many, or change the mesh"
        )
    shape, names = (replicate, shard), ("replicate", "shard")
    if replicate == 1:
        shape, names = shape[1:], names[1:]
    return init_device_mesh(process.device.type, shape, mesh_dim_names=names)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        guard.group_was_left()


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, those of all devices included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def all_reduce_sum(values: list[float], process: Process) -> list[float]:
    """Sum each value over the ranks in float64; every rank must call it with as many values."""
    if not dist.is_initialized():
        return list(values)
    return sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=process.device)).tolist()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in float64 where the device has it; the host does not wait for the result."""
    values = values if values.device.type == "mps" else values.double()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def on_main(function: Callable[[], Result]) -> Result:
    """Run `function` on rank 0 only; return its result, or raise its exception, on every rank."""
    result: Any = None
    failure: Exception | None = None
    if process_rank() == 0:
        try:
            result = function()
        except Exception as error:
            failure = error
    if dist.is_initialized():
        outcome = [result, failure]
        dist.broadcast_object_list(outcome)
        result, failure = outcome
    if failure is not None:
        raise failure
    return result


def process_rank() -> int:
    """Return this process's rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def refuse_differences(facts: dict[str, Any], process: Process) -> None:
    """Compare facts (of JSON's types) and library versions across ranks; a collective call.

    Raises UserError, on all ranks, naming the first fact that differs, its values and their ranks.
    """
    if process.world_size == 1 or not dist.is_initialized():
        return
    versions = {"python": sys.version.split()[0], "numpy": np.__version__, "torch": torch.__version__}
    mine = dict(_flatten({**facts, **versions}))
    of_ranks: list[dict[str, Any]] = [{}] * process.world_size
    dist.all_gather_object(of_ranks, mine)
    for key in dict.fromkeys(key for each in of_ranks for key in each):
        values = [repr(each.get(key, "absent")) for each in of_ranks]
        if len(set(values)) > 1:
            ranks = {
                value: [rank for rank, other in enumerate(values) if other == value] for value in dict.fromkeys(values)
            }
            found = "; ".join(f"{value} on rank {', '.join(map(str, theirs))}" for value, theirs in ranks.items())
            raise UserError(
                f"all ranks must have the same {key}; got {found}: start them with the same command and files"
            )


def _flatten(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class StopRequest:
    """Record the first Ctrl-C or SIGTERM, for the training loop to ask about between steps.

    A second signal acts as usual. torchrun forwards Ctrl-C to its workers and kills them after 30 seconds, so save at
    once.

    Example:
        with StopRequest() as stop_request:
            while step < steps and not stop_request.agreed(process):
                ...
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    # One Ctrl-C can arrive twice, from the terminal and from torchrun or Slurm; a person is slower.
    REPEAT_SECONDS = 1.0

    def __init__(self) -> None:
        self.requested = False
        self._first_time = 0.0
        self._previous_handlers = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.requested:
            self.requested, self._first_time = True, time.monotonic()
        elif time.monotonic() - self._first_time > self.REPEAT_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def agreed(self, process: Process) -> bool:
        """Return, on all ranks alike, whether any rank was signalled to stop; a collective call."""
        if not dist.is_initialized():
            return self.requested
        return sum_over_ranks(self.as_tensor(process.device)).item() > 0

    def as_tensor(self, device: torch.device) -> Tensor:
        """Return 1 if this rank was signalled to stop, else 0, (1,), without a copy from the host."""
        return torch.full((1,), float(self.requested), device=device)


def peak_memory_mb(device: torch.device) -> float:
    """Return this process's peak memory in MiB: allocated on the GPU, or resident on a CPU.

    On Linux without pages of files: those of a memory-mapped corpus are page cache, which the kernel can reclaim.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            status = dict(line.split(":", 1) for line in file)
        return (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) / 1024  # both in KiB
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
