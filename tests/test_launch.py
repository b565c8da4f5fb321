"""Processes, seeds, signals, and the lines that a user sees: errors, warnings and progress."""

import importlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from common import UserError, launch, progress, warn
from common.launch import (
    Process,
    StopRequest,
    all_reduce_sum,
    device_mesh,
    on_main,
    refuse_differences,
    seed_all,
    start,
    stop,
)
from optimizers import OLion
from tests.ranks import spawn

ROOT = Path(__file__).parents[1]
SINGLE = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def test_start_without_torchrun_is_one_process_without_a_group():
    assert start("cpu") == SINGLE
    assert not dist.is_initialized() and SINGLE.is_main
    stop()


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "device must be one of auto, cpu, cuda, mps; got 'gpu'"), ("mps", "needs an Apple GPU")],
)
def test_start_refuses_a_device_that_is_not_here(device, message, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        start(device)


def test_start_refuses_cuda_without_a_gpu_and_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees none"):
        start("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2 needs a GPU of its own, but torch sees 2"):
        start("auto")


def test_device_mesh_refuses_sizes_that_do_not_make_up_the_ranks():
    with pytest.raises(UserError, match="a mesh of 2 replicas on 3 ranks each needs 6 ranks; got 4"):
        device_mesh(Process(0, 0, 4, torch.device("cpu")), replicate=2, shard=3)


def test_seed_all_repeats_every_generator():
    seed_all(5)
    first = random.random(), np.random.rand(), torch.rand(1).item()
    seed_all(5)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
    seed_all(6)
    assert random.random() != first[0]


def test_single_process_sum_is_the_identity():
    assert all_reduce_sum([1.5, 2.0], SINGLE) == [1.5, 2.0]


def test_peak_memory_of_a_cpu_process_matches_what_it_has_allocated_without_pages_of_files(tmp_path):
    """In a new process: this one may be past its peak."""
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(2**27))
    code = f"""
import numpy, torch
from common.launch import peak_memory_mb
cpu = torch.device("cpu")
before = peak_memory_mb(cpu)
mapped = numpy.memmap({str(path)!r}, dtype=numpy.uint8)
mapped.sum()
after_file = peak_memory_mb(cpu)
torch.ones(2**27, dtype=torch.uint8)
print(after_file - before, peak_memory_mb(cpu) - after_file)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    file, allocated = map(float, ran.stdout.split())
    assert file == pytest.approx(0, abs=16) and allocated == pytest.approx(128, abs=16), ran.stderr  # MiB


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop_request:
        assert not stop_request.agreed(SINGLE)
        signal.raise_signal(number)
        assert stop_request.agreed(SINGLE)
        signal.raise_signal(number)  # the echo of one Ctrl-C through torchrun
        assert stop_request.agreed(SINGLE)
    assert signal.getsignal(number) == before


def test_second_ctrl_c_interrupts_as_usual(monkeypatch):
    monkeypatch.setattr(StopRequest, "REPEAT_SECONDS", -1.0)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), StopRequest():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def fail(*_):
    raise OSError("rank 0 failed")


def on_each_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start("cpu", timeout_s=60)
    results = {
        "process": [process.rank, process.local_rank, process.world_size, process.is_main, process.local_world_size]
    }
    meshes = [device_mesh(process, replicate=1, shard=2), device_mesh(process, replicate=2, shard=1)]
    results["meshes"] = [[list(mesh.mesh_dim_names), list(mesh.shape), mesh.mesh.flatten().tolist()] for mesh in meshes]
    del meshes  # with them go the threads of their groups, which might abort the end of this process
    # 1 is lost beside 1e9 in float32, not in float64.
    results["sum"] = all_reduce_sum([1e9 if rank else 1.0, 2.0], process)
    results["on_main"] = on_main(lambda: f"from {rank}")
    with pytest.raises(OSError, match="rank 0 failed"):
        on_main(fail)
    refuse_differences({"config": {"lr": 1.0, "eval": {"every": 2}}}, process)
    with pytest.raises(UserError) as refusal:
        refuse_differences({"config": {"lr": 1.0, "eval": {"every": 2 + rank}}, "corpus": rank}, process)
    results["refused"] = str(refusal.value)
    with StopRequest() as stop_request:
        results["agreed"] = [stop_request.agreed(process)]
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        results["agreed"].append(stop_request.agreed(process))
    stop()
    assert not dist.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps(results))


def test_two_ranks_agree_on_sums_results_failures_and_stopping(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(on_each_rank, (port, tmp_path), 2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "process": [rank, rank, 2, rank == 0, 1],
            "meshes": [[["shard"], [2], [0, 1]], [["replicate", "shard"], [2, 1], [0, 1]]],
            "sum": [1e9 + 1, 4.0],
            "on_main": "from 0",
            "agreed": [False, True],
            "refused": "all ranks must have the same config.eval.every; got 2 on rank 0; 3 on rank 1: start them with "
            "the same command and files",
        }


def test_main_guard_turns_errors_for_the_user_into_one_line(capsys):
    def missing_file():
        open("/absent/file")

    def bad_device():
        start("gpu")

    def bad_rate():
        OLion([torch.zeros(4, 6)], lr=-1.0)

    absent = "No such file or directory: '/absent/file'"
    for main, message in [(missing_file, absent), (bad_device, "got 'gpu'"), (bad_rate, "lr must be ")]:
        with pytest.raises(SystemExit) as exit_request:
            launch.main_guard(main)
        line = capsys.readouterr().err
        assert exit_request.value.code == 1
        assert line.startswith("error: ") and line.count("\n") == 1 and message in line


def test_main_guard_turns_a_lost_rank_into_one_line(capsys):
    def gloo():  # as torch 2.13 words it
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    def nccl():
        raise dist.DistBackendError("NCCL error:\nncclRemoteError: connection closed by a remote peer")

    for main in (gloo, nccl):
        with pytest.raises(SystemExit) as exit_request:
            launch.main_guard(main)
        line = capsys.readouterr().err
        assert exit_request.value.code == 1
        assert line.startswith("error: rank 0 lost another rank") and "--resume" in line and line.count("\n") == 1
        assert "onnection closed" in line


@pytest.mark.parametrize("code", ["import absent_package.part", "from json import absent"])
def test_main_guard_names_a_package_to_install_in_one_line(code, capsys):
    with pytest.raises(SystemExit) as exit_request:
        launch.main_guard(lambda: exec(code))
    line = capsys.readouterr().err
    assert exit_request.value.code == 1
    assert line.startswith("error: need the package ") and "pip install -r requirements.txt" in line
    assert line.count("\n") == 1 and "absent" in line


@pytest.mark.parametrize("package", ["SIT", "common", "optimizers", "nanoGPT", "Llama", "scripts"])
def test_main_guard_leaves_a_missing_part_of_this_repository_its_traceback(package):
    with pytest.raises(ImportError):
        launch.main_guard(lambda: importlib.import_module(f"{package}.absent"))


def test_main_guard_turns_ctrl_c_into_one_line_and_the_status_of_shells():
    code = "import time; from common.launch import main_guard; main_guard(lambda: (print(flush=True), time.sleep(60)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 130
    assert printed.startswith("stopped; ") and printed.count("\n") == 1


def test_main_guard_turns_too_little_memory_into_one_line(capsys):
    for main in (
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**62, 2**62),
        lambda: torch.nn.Linear(10**9, 3 * 10**9, device="cpu"),
        lambda: np.empty(2**50),
    ):
        with pytest.raises(SystemExit) as exit_request:
            launch.main_guard(main)
        line = capsys.readouterr().err
        assert exit_request.value.code == 1
        assert line.startswith("error: out of memory (") and line.count("\n") == 1


def test_main_guard_leaves_bugs_their_traceback():
    def raises():
        raise ValueError("of a line of this repository")

    for main, kind in [
        (raises, ValueError),
        (lambda: np.zeros(3).reshape(2), ValueError),  # of builtins that this repository calls
        (lambda: list(zip([1], [], strict=True)), ValueError),
        (lambda: int("many"), ValueError),
        (lambda: {}["key"], KeyError),
        (lambda: json.loads("{"), ValueError),
        (lambda: torch.ones(2) @ torch.ones(3), RuntimeError),
    ]:
        with pytest.raises(kind):
            launch.main_guard(main)


def test_dev_mode_shows_the_traceback_of_every_error():
    code = "from common.launch import main_guard, start; main_guard(lambda: start('gpu'))"
    ran = subprocess.run([sys.executable, "-X", "dev", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "Traceback" in ran.stderr


@pytest.mark.parametrize(("terminal", "pace_s"), [(True, 1.0), (False, 30.0)])
def test_progress_is_drawn_each_second_on_a_terminal_and_rarely_in_a_log(terminal, pace_s, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress(total=3, desc="steps") as bar:
        assert bar.mininterval == pace_s <= bar.maxinterval
    assert list(progress("abc")) == ["a", "b", "c"]


def test_progress_is_drawn_by_the_main_process_alone(capsys):
    for is_main in (False, True):
        assert list(progress(range(3), is_main=is_main, desc="steps")) == [0, 1, 2]
        assert ("steps: 100%" in capsys.readouterr().err) == is_main


def test_warning_has_a_line_of_its_own_beside_a_progress_bar(capsys):
    with progress(total=3, desc="steps"):
        warn("the disk is nearly full")
    assert "warning: the disk is nearly full" in re.split("[\r\n]", capsys.readouterr().err)
