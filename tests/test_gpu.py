"""Start-up on NVIDIA's GPUs, with stand-ins for the GPUs."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common import UserError, gpu, launch, parallel
from common.launch import Process
from Llama.checks import fit_precision
from Llama.config import JobConfig
from optimizers import polar

GPU = torch.device("cuda", 0)
A_GPU = Process(0, 0, 1, GPU)
A_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture
def card(monkeypatch):
    """Give this process a GPU of a name and a compute capability."""

    def give(name: str, major: int) -> None:
        gpu.warn_without_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))

    return give


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_start_refuses_a_driver_too_old_for_torch_in_one_line(device, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError, match=r"of the 8 GPUs .* too old \(found version 11040\)") as refusal:
        launch.start(device)
    assert "\n" not in str(refusal.value)
    assert launch.start("cpu").device.type == "cpu"


def test_process_group_is_given_its_gpu(card, monkeypatch):
    given = {}
    card("NVIDIA H100 80GB HBM3", 9)
    monkeypatch.setattr(os, "environ", {**os.environ, **A_RANK})
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    assert launch.start().device == GPU
    assert (given["backend"], given["device_id"]) == ("nccl", GPU)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_start_sets_the_allocator_and_keeps_a_users_settings(name, monkeypatch):
    alloc_conf = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for own in ({}, {name: "max_split_size_mb:128"}):
        others = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
        monkeypatch.setattr(os, "environ", {**others, **own})
        launch.start("cpu")
        assert {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key} == (own or alloc_conf)


@pytest.mark.parametrize(("name", "major"), [("Tesla T4", 7), ("NVIDIA A10", 8)])
def test_bfloat16_is_taken_where_the_gpu_has_it(name, major, card, capsys):
    card(name, major)
    has = major >= 8
    for word in ("auto", "bfloat16", "auto"):
        assert parallel.precision(word, A_GPU) == (torch.bfloat16 if has else torch.float16)
    assert parallel.precision("float32", A_GPU) == torch.float32
    printed = capsys.readouterr().err
    assert printed == ("" if has else "warning: Tesla T4 has no bfloat16: computing in float16\n")
    assert polar.default_dtype(SimpleNamespace(device=GPU, dtype=torch.float32)) == (
        torch.bfloat16 if has else torch.float32
    )
    settings = fit_precision(JobConfig())
    assert settings.training.mixed_precision_param == ("bfloat16" if has else "float32")


@pytest.mark.parametrize(
    ("name", "tera"),  # of NVIDIA's data sheets, dense
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GB200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops_match_the_data_sheets(name, tera, caplog):
    assert gpu.peak_flops(name) == (tera and tera * 1e12)
    assert not caplog.records  # torchtitan's warning of a guess that is not taken
