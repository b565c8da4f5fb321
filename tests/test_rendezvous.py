"""The rendezvous of ranks: the launcher's variables, and a port that no other program has."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from common import UserError, launch
from common.rendezvous import read_environment, refuse_taken_port
from tests import warm

ROOT = Path(__file__).parents[1]


@pytest.fixture
def variables(monkeypatch):
    """Set the launcher's variables and no others."""

    def set_all(**values: str) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return set_all


@pytest.fixture
def taken_port():
    """A port of a program other than a store: it accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, (0, 0, 1, 1)),
        ({"WORLD_SIZE": "1"}, (0, 0, 1, 1)),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "host", "MASTER_PORT": "29500"},
            (3, 1, 4, 2),
        ),
    ],
)
def test_environment_matches_the_launchers_variables(variables, values, found):
    variables(**values)
    assert read_environment() == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 also needs RANK, MASTER_ADDR, MASTER_PORT in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 also needs MASTER_ADDR, MASTER_PORT in the environment"),
        ({"RANK": "0"}, "WORLD_SIZE=1 also needs MASTER_ADDR, MASTER_PORT in the environment"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, 1 or more; got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number, 1 or more; got '0'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number, 0 or more; got '-1'"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"},
            "RANK must be below WORLD_SIZE=2; got 2",
        ),
    ],
)
def test_environment_refuses_incomplete_or_impossible_variables(variables, values, message):
    variables(**values)
    with pytest.raises(UserError, match=message):
        launch.start("cpu")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_a_port_that_another_program_has(variables, taken_port, rank):
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken_port))
    with pytest.raises(UserError, match=f"port, 127.0.0.1:{taken_port}, must be free; another program"):
        refuse_taken_port(rank, timeout_s=60, answer_s=1)


def test_a_rank_takes_the_port_of_a_store_that_answers(variables):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    refuse_taken_port(1, timeout_s=60)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_port_0_for_a_free_one(variables, rank):
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    refuse_taken_port(rank, timeout_s=60)


@pytest.mark.slow
def test_torchrun_refuses_a_port_that_another_program_has_in_one_line(taken_port):
    torchrun = [warm.python(), "-m", "common.torchrun", "--nproc-per-node", "2", "--master-port", str(taken_port)]
    command = [*torchrun, "--no-python", "true"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and str(taken_port) in done.stderr
    assert "Traceback" not in done.stderr
