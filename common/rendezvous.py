"""Rendezvous of a run's processes: checks the launcher's variables and the port, before anything waits for them."""

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
    """Return rank, local rank, world size and local world size from torchrun's environment variables.

    Raises UserError for variables that are absent, not whole numbers, or out of range.
    """
    world_size = _whole_number("WORLD_SIZE", 1, least=1)
    absent = [name for name in NEEDED if name not in os.environ]
    if absent and (world_size > 1 or "RANK" in os.environ):
        raise UserError(
            f"WORLD_SIZE={world_size} also needs {', '.join(absent)} in the environment, got none: start through "
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
    """Raise UserError, on every rank, if another program listens on the ranks' port.

    torch would wait for that program's answer forever. Rank 0 must find the port free, since it is about to listen; any
    other rank must get a store's answer within `answer_s` seconds after someone listens.
    """
    address, port = os.environ["MASTER_ADDR"], _whole_number("MASTER_PORT", 0)
    if port == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # torchrun chooses a free port, or listens there and has checked it
    if rank == 0:
        if _someone_listens(address, port):
            raise _taken(address, port)
        return
    _wait_for_store(address, port, timeout_s, answer_s)


def refuse_foreign_listener(address: str, port: int, answer_s: float = ANSWER_S) -> None:
    """Raise UserError if a program other than a store listens on a port."""
    if _someone_listens(address, port):
        _wait_for_store(address, port, answer_s, answer_s)


def _wait_for_store(address: str, port: int, timeout_s: float, answer_s: float) -> None:
    """Return when a store answers, or after `timeout_s` seconds without a listener; raises UserError otherwise."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # init_process_group reports the cause
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
        f"the ranks' port, {address}:{port}, must be free; another program listens on it: choose another, the same for "
        "all ranks (MASTER_PORT; torchrun --master-port; RDZV_ENDPOINT)"
    )


def _someone_listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True
