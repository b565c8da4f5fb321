"""Gloo ranks for tests, started once per test module; each call runs one function on all of them.

Example, with `total` at module level, since it reaches the ranks by its name:

    with Ranks(4) as ranks:  # in a fixture of scope "module"
        assert ranks(total, 1) == [10] * 4  # one result per rank
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.launch import leave

TIMEOUT_S = 150  # of one call, with imports; longer than a collective's timeout, whose error names the collective
COLLECTIVE_TIMEOUT_S = 120
GRACE_S = 3  # for the other ranks to answer once one has failed: they may be waiting for it forever

# Every rank is a fork of one clean process that has imported torch, so that torch is imported once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo", "Llama.train"]
)

_WAITED = "did not answer; it was at"


class RankError(AssertionError):
    """The failure of each rank."""


class Ranks:
    """`size` processes in one gloo group; a call runs a function on each and returns the list of its results.

    If a rank raises, dies or does not answer in time, RankError names the failure of each, and the next call starts
    fresh ranks. Arguments and results are pickled: plain tensors are allowed, DTensors are not.
    """

    def __init__(self, size: int):
        self.size = size
        self._processes, self._connections = [], []

    def __enter__(self) -> "Ranks":
        return self

    def __call__(self, function: Callable, *arguments: Any) -> list:
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((function, arguments)))
        answers = self._answers()
        failures = defaultdict(list)
        for rank, (done, answer) in enumerate(answers):
            if not done:
                failures[answer].append(rank)
        if failures:
            self.__exit__()
            causes_first = sorted(failures.items(), key=lambda failure: _WAITED in failure[0])
            raise RankError("\n".join(f"ranks {ranks} {answer}" for answer, ranks in causes_first))
        return [answer for _, answer in answers]

    def _answers(self) -> list[tuple[bool, Any]]:
        answers: list = [None] * self.size
        deadline = time.monotonic() + TIMEOUT_S
        while None in answers and time.monotonic() < deadline:
            waiting = {self._connections[rank]: rank for rank in range(self.size) if answers[rank] is None}
            for connection in wait(list(waiting), timeout=deadline - time.monotonic()):
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    answer = (False, "died")
                answers[waiting[connection]] = answer
                if not answer[0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return [answer or (False, self._stack(rank)) for rank, answer in enumerate(answers)]

    def _stack(self, rank: int) -> str:
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        return f"{_WAITED}\n{(Path(self._folder.name) / str(rank)).read_text()}"

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            here, there = _context.Pipe()
            arguments = (rank, self.size, self._folder.name, there)
            self._processes.append(_context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            self._connections.append(here)
            there.close()  # or the death of the rank would not be seen

    def __exit__(self, *_) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._connections = [], []


def spawn(function: Callable, arguments: tuple, size: int) -> None:
    """Run function(rank, *arguments) once in each of `size` new processes; raises what the first failing one raised."""
    torch.multiprocessing.start_processes(
        _run_and_leave, (function, arguments), nprocs=size, start_method=_context.get_start_method()
    )


def _run_and_leave(rank: int, function: Callable, arguments: tuple) -> None:
    function(rank, *arguments)
    leave()  # the interpreter's shutdown may abort a process whose gloo threads are alive


def _serve(rank: int, size: int, folder: str, connection: Connection) -> None:
    faulthandler.register(signal.SIGUSR1, file=open(Path(folder) / str(rank), "w"))
    torch.set_num_threads(1)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, world_size=size, rank=rank)
    with suppress(EOFError):
        while True:
            request = connection.recv_bytes()
            try:
                function, arguments = pickle.loads(request)
                answer = pickle.dumps((True, function(*arguments)))
            except BaseException:  # also pytest.fail, which is no Exception
                answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
            connection.send_bytes(answer)
    leave()
