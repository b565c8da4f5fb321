"""Where the processes of a run meet: the launcher's variables and the port, checked before anything waits for them."""

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from common import UserError

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
ANSWER_S = 30.0  # a store answers a client within milliseconds, on a loaded machine within seconds


def read_environment() -> tuple[int, int, int, int]:
    """Return rank, rank on this machine, number of ranks and of this machine's ranks, from torchrun's variables.

    Raises UserError for variables that are absent, not whole numbers, or out of range.
    """
    world_size = _whole_number("WORLD_SIZE", 1, least=1)
    absent = [name for name in NEEDED if name not in os.environ]
    if absent and (world_size > 1 or "RANK" in os.environ):
        raise UserError(
            f"WORLD_SIZE={world_size} needs {', '.join(absent)} too, and the environment has none: start through "
            "torchrun, or unset WORLD_SIZE and RANK"
        )
    rank, local_rank = _whole_number("RANK", 0), _whole_number("LOCAL_RANK", 0)
    if rank >= world_size:
        raise UserError(f"RANK must be below WORLD_SIZE={world_size}; got {rank}: start through torchrun")
    return rank, local_rank, world_size, _whole_number("LOCAL_WORLD_SIZE", world_size, least=1)


def _whole_number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) >= least):
        raise UserError(f"{name} must be a whole number, {least} or more; got {text!r}: start through torchrun")
    return int(text)


def refuse_taken_port(rank: int, timeout_s: float, answer_s: float = ANSWER_S) -> None:
    """Raise UserError, on every rank, where another program listens on the port of the ranks.

    torch itself would wait for that program's answer, without end. Rank 0 must find nobody there, for it is about to
    listen; any other rank must get a store's answer within `answer_s` seconds after someone listens.
    """
    address, port = os.environ["MASTER_ADDR"], _whole_number("MASTER_PORT", 0)
    if port == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # a free port is taken, or torchrun listens there, and has checked it
    if rank == 0:
        if _someone_listens(address, port):
            raise _taken(address, port)
        return
    _wait_for_store(address, port, timeout_s, answer_s)


def refuse_foreign_listener(address: str, port: int, answer_s: float = ANSWER_S) -> None:
    """Raise UserError where a program that is no store listens on a port; nobody there, or a store, is well."""
    if _someone_listens(address, port):
        _wait_for_store(address, port, answer_s, answer_s)


def _wait_for_store(address: str, port: int, timeout_s: float, answer_s: float) -> None:
    """Return once a store answers, or after `timeout_s` seconds in which nobody listens; raises UserError otherwise."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the group's own attempt names what it is
            dist.TCPStore(address, port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False).num_keys()
            answered.set()

    threading.Thread(target=ask, daemon=True).start()  # it cannot be stopped while it waits
    deadline, heard = time.monotonic() + timeout_s, None
    while not answered.wait(0.5):
        if _someone_listens(address, port):
            heard = heard or time.monotonic()
            if time.monotonic() - heard >= answer_s - 0.5:
                raise _taken(address, port)
        elif time.monotonic() > deadline:
            return


def _taken(address: str, port: int) -> UserError:
    return UserError(
        f"the ranks' port, {address}:{port}, must be free for them; another program listens on it: choose another, for "
        "all ranks alike (MASTER_PORT; torchrun --master-port; RDZV_ENDPOINT)"
    )


def _someone_listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True
