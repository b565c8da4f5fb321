"""nanoGPT on one process, under DDP, FSDP and HSDP: equal losses, interchangeable checkpoints, a lost rank."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_gpt import ROOT, write_config, write_corpus

from common import UserError, launch
from common.config import parse_config
from common.launch import Process
from common.parallel import ParallelConfig, autocast, distribute
from common.runlog import read_metrics
from nanoGPT import train as training
from nanoGPT.model import GPT, GPTConfig
from nanoGPT.sample import Sample, sample
from nanoGPT.train import Config
from tests.ranks import Ranks, spawn
from tests.tiny_sit_run import random_model

# Nothing divides: of 5 sequences in micro-batches of 1, some of 2 or 4 ranks have none in the last round, as in
# the last round of the 10 validation windows.
UNEVEN = """
steps = 9
[data]
batch_size = 5
micro_batch = 1
[eval]
every = 3
[checkpoint]
keep = 9
"""
LAYOUTS = {
    "one process": (1, ()),
    "2 ddp": (2, ("--parallel.mode", "ddp")),
    "2 owners": (2, ("--parallel.mode", "owners")),
    "2 fsdp": (2, ("--parallel.mode", "fsdp")),
    "4 fsdp": (4, ("--parallel.mode", "fsdp")),
    "2x2 hsdp": (4, ("--parallel.mode", "hsdp", "--parallel.shard", "2")),
}
OPTIMIZERS = ("adamw", "olion")
RUNS = [pair for pair in itertools.product(OPTIMIZERS, LAYOUTS) if pair != ("adamw", "2 owners")]  # AdamW has no owners
# Layouts sum in different orders. In float32 that flips signs of OLion's entries next to zero, more of them on one CPU
# than on another; in float64 nothing is that close to zero, so one tolerance serves every optimizer and machine.
EXACT = ("--dtype", "float64")
TOLERANCE = 1e-9
RESUMED = "olion"  # its embeddings, head and norms are AdamW's, so its checkpoints hold the state of both
# To 2 shards and back is in hsdp, at half the time; to and from owners is in test_reshard.py.
RESUMABLE = [layout for layout in LAYOUTS if layout not in ("2 fsdp", "2 owners")]
# Each layout resumes its own checkpoint and the next one's; test_reshard.py tests more pairs.
PAIRS = [(layout, other) for i, layout in enumerate(RESUMABLE) for other in (layout, RESUMABLE[i - 1])]
SAVED = 4  # the step whose checkpoint another layout resumes
HALF = ("bfloat16", "float16")  # float16 with its loss scale


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    return write_config(folder, write_corpus(folder), UNEVEN)


def train(rank: int, config: Path, layout: str, out: Path, *arguments: str) -> None:
    """Train on this layout, in a group of its size of the processes that run already: starting some takes seconds."""
    size, flags = LAYOUTS[layout]
    if rank >= size:
        return
    if size > 1:
        out.mkdir(parents=True, exist_ok=True)
        store = f"file://{out}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    settings = parse_config(Config, [str(config), "--out", str(out), *flags, *arguments])
    training.train(training.fit_vocabulary(settings), Process(rank, rank, size, torch.device("cpu"), size))
    launch.stop()


def train_on_all_layouts(rank: int, config: Path) -> None:
    runs = config.parent
    for optimizer, layout in RUNS:
        train(rank, config, layout, runs / optimizer / layout, *EXACT, "--optimizer.name", optimizer)
    for dtype in HALF:
        train(rank, config, "2 fsdp", runs / dtype, "--optimizer.name", "adamw", "--dtype", dtype)
    for saved, resumed in PAIRS:
        out = runs / RESUMED / f"{saved}, then {resumed}"
        if rank == 0:
            source = run_folder(runs / RESUMED / saved)
            step = f"checkpoints/step-{SAVED:08d}"
            shutil.copytree(source / step, out / "default" / source.name / step)
        train(rank, config, resumed, out, *EXACT, "--optimizer.name", RESUMED, "--resume", "--checkpoint.every", "0")


@pytest.fixture(scope="module")
def runs(tiny) -> Path:
    """The folder of runs/OPTIMIZER/LAYOUT, all trained by one set of processes."""
    spawn(train_on_all_layouts, (tiny,), 4)
    return tiny.parent


def run_folder(out: Path) -> Path:
    (folder,) = (out / "default").iterdir()
    return folder


def losses(out: Path, after: int = -1) -> dict[str, float]:
    """The metrics that a layout must not change, by name and step."""
    lines = [line for line in read_metrics(run_folder(out)) if line["step"] > after]
    names = ("train/loss", "val/loss", "grad_norm", "lr")
    return {f"{name} {line['step']}": line[name] for line in lines for name in names if name in line}


def gradients_in_bfloat16(kind: str, mode: str) -> tuple[set[str], float, dict[str, torch.Tensor]]:
    """The dtypes of the blocks' inputs, a loss, and gradients, of a model with random weights on this rank's batch."""
    process = Process(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu"), dist.get_world_size())
    torch.manual_seed(1)
    if kind == "gpt":
        model, inputs = GPT(GPTConfig(4, 2, 32, 16, 64)), (torch.randint(64, (3, 16)),) * 2
    else:
        model, inputs = random_model(depth=4, z_dim=4, encoder_depth=2, projector_width=8), sit_inputs()
    for name, weight in model.named_parameters():  # norms' weights stay at one: of them alone FSDP rounds the use
        if "ln_" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    network, dtypes = distribute(model.train(), ParallelConfig(mode), process, torch.bfloat16), set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: dtypes.add(str(given[0].dtype)))
    with autocast(torch.bfloat16, process):
        outputs = network(*inputs)
    loss = outputs[1] if kind == "gpt" else outputs[0].float().square().mean() + outputs[1].float().square().mean()
    loss.backward()
    names = {param: name for name, param in model.named_parameters()}
    gradients = {name: param.grad for param, name in names.items() if param.grad is not None}
    whole = {name: grad.full_tensor() if mode == "fsdp" else grad for name, grad in gradients.items()}
    return dtypes, loss.item(), {name: grad.clone() for name, grad in whole.items()}


def sit_inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, 8, 8), torch.rand(3), torch.randint(10, (3,))


@pytest.mark.parametrize("kind", ["gpt", "sit"])
def test_half_precision_of_fsdp_matches_ddp(two_ranks, kind):
    (ddp, *_), (fsdp, *_) = (two_ranks(gradients_in_bfloat16, kind, mode) for mode in ("ddp", "fsdp"))
    assert ddp[0] == fsdp[0] == {"torch.float32"}  # the residual stream
    # The same kernels on the same numbers; a stream in bf16 differs by its rounding, 2^-9, each block.
    assert fsdp[1] == pytest.approx(ddp[1], rel=1e-5)
    assert ddp[2].keys() == fsdp[2].keys()
    for name, gradient in ddp[2].items():
        # DDP rounds to bf16 before it sums over the ranks in fp32, FSDP likewise: what is left is the order of sums.
        torch.testing.assert_close(fsdp[2][name], gradient, rtol=2e-2, atol=2e-2 * gradient.abs().max().item())


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize(("optimizer", "layout"), [pair for pair in RUNS if pair[1] != "one process"])
def test_losses_of_a_layout_match_one_process(runs, optimizer, layout):
    one = losses(runs / optimizer / "one process")
    assert len(one) == 3 * 9 + 4  # a step's three, and validations at 0, 3, 6 and 9
    assert losses(runs / optimizer / layout) == pytest.approx(one, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_checkpoint_resumed_on_another_layout_matches_the_uninterrupted_run(runs, saved, resumed):
    whole = losses(runs / RESUMED / saved, after=SAVED)
    assert len(whole) == 3 * 5 + 2
    tolerance = TOLERANCE if resumed != saved else 0.0
    assert losses(runs / RESUMED / f"{saved}, then {resumed}") == pytest.approx(whole, rel=0, abs=tolerance)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_of_fsdp_s_policy_matches_float64(runs, dtype):
    one, half = losses(runs / "adamw" / "one process"), losses(runs / dtype)
    names = [name for name in one if "loss" in name]
    # Losses near 5, of weights and activations with 8 bits: bf16's rounding, 2^-9, on each of them.
    assert [half[name] for name in names] == pytest.approx([one[name] for name in names], rel=0, abs=0.01)
    assert half != pytest.approx(one, abs=1e-6), "the policy was not in effect"
    assert all(line.get("skipped", 0) == 0 for line in read_metrics(run_folder(runs / dtype)))


def test_manifest_of_every_layout_matches_that_of_one_process(runs):
    manifests = {}
    for layout in LAYOUTS:
        manifest = run_folder(runs / RESUMED / layout) / f"checkpoints/step-{SAVED:08d}/manifest.json"
        manifests[layout] = {key: json.loads(manifest.read_text())["manifest"][key] for key in ("tensors", "groups")}
    assert all(manifest == manifests["one process"] for manifest in manifests.values())


def test_optimizer_state_and_traffic_of_a_layout_match_a_ranks_shard(runs):
    first = {layout: read_metrics(run_folder(runs / RESUMED / layout))[:2] for layout in LAYOUTS}
    state = {layout: lines[0]["optimizer_state_mb"] for layout, lines in first.items()}
    assert state["2 ddp"] == state["one process"] > state["2 owners"]
    # Each dimension 0 here is a multiple of 4: exact shares, but for AdamW's counts of steps, 4 bytes a tensor.
    for layout, shards in (("2 fsdp", 2), ("4 fsdp", 4), ("2x2 hsdp", 2)):
        assert state[layout] == pytest.approx(state["one process"] / shards, abs=1e-4)
    assert "optimizer_mb_received" not in first["one process"][1]
    for layout in list(LAYOUTS)[1:]:
        assert first[layout][1]["optimizer_mb_received"] > 0


def test_sample_of_an_fsdp_checkpoint_matches_that_of_one_process(runs):
    texts = [
        sample(Sample(run_folder(runs / RESUMED / layout), "def f", tokens=20, temperature=0, device="cpu"))
        for layout in ("one process", "2 fsdp", "2x2 hsdp")
    ]
    assert len(texts[0]) > 5 and texts[1:] == [texts[0]] * 2


def test_killed_rank_ends_the_job_and_resume_goes_on_with_fewer(tiny):
    out = tiny.parent / "killed"
    arguments = [str(tiny), "--out", str(out), "--steps", "5000", "--parallel.mode", "fsdp"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nanoGPT.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *arguments]  # whose children are the ranks
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not list(out.glob("default/*/checkpoints/step-*")):
        time.sleep(0.02)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    printed = job.communicate()[1]
    assert job.returncode != 0
    assert printed.count("error: rank ") == 1 and "Traceback" not in printed.partition("error: rank ")[0]
    assert "the same command with --resume continues from the last checkpoint" in printed

    reached = max(int(path.name[5:]) for path in (run_folder(out) / "checkpoints").glob("step-*"))
    train(0, tiny, "one process", out, "--steps", str(reached + 2), "--resume")
    lines = read_metrics(run_folder(out))
    assert [line["step"] for line in lines] == list(range(reached + 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "hsdp", "shard": 3}, "parallel.shard must divide the number of ranks, 4; got 3"),
        ({"mode": "fsdp", "shard": 2}, "parallel.shard needs mode hsdp; got 2 with fsdp"),
        ({"mode": "hsdp", "shard": -1}, "shard must be 0 or more; got -1"),
    ],
)
def test_impossible_layout_refuses_in_one_line(arguments, message):
    process = Process(0, 0, 4, torch.device("cpu"), local_world_size=4)
    with pytest.raises(UserError) as refusal:
        distribute(GPT(GPTConfig(1, 1, 8, 8, 64)), ParallelConfig(**arguments), process, torch.float32)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_hsdp_on_machines_of_unequal_size_refuses_their_rank_count():
    process = Process(0, 0, 6, torch.device("cpu"), local_world_size=4)
    with pytest.raises(UserError, match="must divide the number of ranks, 6; got 4"):
        distribute(GPT(GPTConfig(1, 1, 8, 8, 64)), ParallelConfig("hsdp"), process, torch.float32)


@pytest.mark.parametrize("mode", ["owners", "fsdp", "hsdp"])
def test_single_process_of_any_mode_matches_the_plain_model(mode):
    model = GPT(GPTConfig(1, 1, 8, 8, 64))
    process = Process(0, 0, 1, torch.device("cpu"))
    assert distribute(model, ParallelConfig(mode), process, torch.float32) is model
    assert type(model) is GPT
