"""Where a run executes: processes, device, seeds, signals; the same with torchrun and without it."""

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common import UserError, one_line

Result = TypeVar("Result")
OURS = {"SIT", "common", "optimizers", "nanoGPT", "Llama", "scripts"}  # packages; another that is missing is installed
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Launch:
    """This process among all processes of the run, and the device that it computes on."""

    rank: int
    local_rank: int  # the rank on this machine, which is also the index of the GPU
    world_size: int
    device: torch.device
    local_world_size: int = 1  # ranks on this machine

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes for all."""
        return self.rank == 0


def start(device: str = "auto", timeout_s: float = 600) -> Launch:
    """Join the process group that torchrun prepared, or run as a single process without one.

    `device` "auto" takes CUDA, then MPS, then the CPU. The backend is NCCL on CUDA and gloo on CPUs. A collective
    that takes longer than `timeout_s` seconds ends the run instead of hanging it.

    Raises ValueError when the device is unknown or not on this machine.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    chosen = _choose_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # NCCL sends Python objects through the current device
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Launch(rank, local_rank, world_size, chosen, local_world_size)


def _choose_device(name: str, local_rank: int, world_size: int) -> torch.device:
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got {name!r}")
    if name == "auto":
        several = world_size > 1  # MPS has no collectives
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch sees no GPU here; use device cpu or auto")
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} needs a GPU of its own, but torch sees {torch.cuda.device_count()}; "
                "start fewer processes (NGPU)"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and (world_size > 1 or not torch.backends.mps.is_available()):
        raise ValueError("device 'mps' needs an Apple GPU and a single process; use device cpu or auto")
    return torch.device(name)


def device_mesh(launch: Launch, replicate: int, shard: int) -> DeviceMesh:
    """Arrange all ranks as `replicate` copies of a model, each in the hands of `shard` neighbouring ranks.

    A single copy is a mesh of one dimension, "shard"; several are ("replicate", "shard"), as FSDP2 takes them. Every
    rank must call it. Raises ValueError where the two do not make up the number of ranks.
    """
    if replicate * shard != launch.world_size:
        raise ValueError(
            f"a mesh of {replicate} copies on {shard} ranks each needs {replicate * shard} ranks; got "
            f"{launch.world_size}: start as many, or change the mesh"
        )
    shape, names = (replicate, shard), ("replicate", "shard")
    if replicate == 1:
        shape, names = shape[1:], names[1:]
    return init_device_mesh(launch.device.type, shape, mesh_dim_names=names)


_left_a_group = False  # whether this process has been in a process group that `stop` destroyed


def stop() -> None:
    """Leave the process group, if there is one."""
    global _left_a_group
    if dist.is_initialized():
        dist.destroy_process_group()
        _left_a_group = True


def leave(status: int = 0) -> NoReturn:
    """End this process with `status` once its output is written, without the interpreter's own shutdown.

    A DeviceMesh in DTensor's caches keeps gloo threads alive after the group is destroyed; a thread that frees a
    tensor during the shutdown aborts the process (6 of 115 runs of one test on a loaded machine).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, those of all devices included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def all_reduce_sum(values: list[float], launch: Launch) -> list[float]:
    """Sum each value over the ranks in float64; every rank must call it with as many values."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=launch.device)  # (len(values),)
    dist.all_reduce(total)
    return total.tolist()


def on_main(function: Callable[[], Result]) -> Result:
    """Run `function` on rank 0 alone, and give its result, or raise its failure, on every rank."""
    result, failure = None, None
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


class StopRequest:
    """Turn the first Ctrl-C or SIGTERM into a question that the training loop asks between two steps.

    A second signal acts as usual. torchrun passes Ctrl-C on to its workers and kills them after 30 seconds, so
    save at once.

    Example:
        with StopRequest() as stop_request:
            while step < steps and not stop_request.agreed(launch):
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

    def agreed(self, launch: Launch) -> bool:
        """Whether any rank was asked to stop; every rank must call it, and all get the same answer."""
        return all_reduce_sum([float(self.requested)], launch)[0] > 0


def main_guard(main: Callable[[], None]) -> None:
    """Run a program; an error that the user can act on becomes one `error: ...` line and its exit_status, or 1.

    Such errors are UserError, OSError (files, network), a ValueError that this repository raised itself, a package that
    is not installed, and a rank that no longer answers. Any other exception is a bug and keeps its traceback;
    `python -X dev` shows the traceback of every one. Ctrl-C becomes one line too, and status 130, as shells have it.
    A process that has been in a process group ends by `leave`.
    """
    try:
        _with_plain_errors(main)
    except BaseException as error:
        if not (_left_a_group or dist.is_initialized()):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
        leave(code if isinstance(code, int) else int(code is not None))
    if _left_a_group or dist.is_initialized():
        leave()


def _with_plain_errors(main: Callable[[], None]) -> None:
    try:
        main()
    except KeyboardInterrupt:
        if sys.flags.dev_mode:
            raise
        _end("stopped; the same command does what is left (training: with --resume; Llama: --job.resume)", 130)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if sys.flags.dev_mode or not package or package in OURS:
            raise
        _end(
            f"error: need the package {package}, as requirements.txt has it ({one_line(error)}): "
            "pip install -r requirements.txt"
        )
    except (UserError, OSError, ValueError) as error:
        for_the_user = isinstance(error, UserError | OSError) or _raised_here(error)
        if sys.flags.dev_mode or not for_the_user:
            raise
        _end(f"error: {one_line(error)}", getattr(error, "exit_status", 1))
    except RuntimeError as error:
        if sys.flags.dev_mode or not _lost_rank(error):
            raise
        _end(
            f"error: rank {process_rank()} lost another rank, which ended or hangs: see that rank's own error, then "
            "the same command with --resume (Llama: --job.resume) goes on from the last checkpoint, on any number of "
            f"ranks ({one_line(error)})"
        )


def _end(line: str, status: int = 1) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def _lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed: NCCL's and the store's errors are DistErrors; gloo's only name its source files."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _raised_here(error: Exception) -> bool:
    """Whether the statement that raised `error` stands in this repository, not in a library."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    repository = Path(__file__).resolve().parents[1]
    return raised_in.is_relative_to(repository) and "site-packages" not in raised_in.parts


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory this process has used, in MiB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
