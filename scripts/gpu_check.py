"""Checks and measures this repository on the GPUs of this machine, for scripts/gpu_check.sh.

Sections: the tests that need a GPU; every rule on every layout that the number of GPUs allows, against one device; the
step of each optimizer and of torch.optim.Muon; symmetric products with and without the Triton kernel; tokens per second
of nanoGPT.train and of a plain loop; images per second of a SiT. Times are medians. Without a GPU each section runs at
toy size on the CPU, and its times mean nothing.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

from common.guard import main_guard
from common.options import parse_options

Section = Literal["tests", "layouts", "optimizers", "products", "gpt2", "sit"]


@dataclass(frozen=True)
class Options:
    """Checks and measures this repository on the GPUs of this machine."""

    only: tuple[Section, ...] = ("tests", "layouts", "optimizers", "products", "gpt2", "sit")
    """Sections to run."""
    record: Path = Path("runs/gpu_check.json")
    """The JSON to write."""
    worker: str = ""
    """Internal: folder for the result of a rank of the section `layouts`."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "bash scripts/gpu_check.sh", __doc__))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import UserError, launch
from common.parallel import autocast
from common.runlog import machine
from common.whole import write_json

Rows = Iterator[tuple[str, str, float | int | None]]  # what, unit, number


def main() -> None:
    """Run the sections and print their table; exit status 1 if one failed."""
    options = parse_options(Options, "bash scripts/gpu_check.sh", __doc__)
    if options.worker:
        check_layouts(Path(options.worker))
        launch.stop()
        return
    device = launch.start().device
    if device.type != "cuda":
        print("No GPU here: each section runs at toy size on the CPU, to show that it runs; its times mean nothing.")
    found, failed = [], []
    for section in options.only:
        started = time.perf_counter()
        print(f"{section}: {' '.join((SECTIONS[section].__doc__ or '').split())}", flush=True)
        try:
            rows = [(section, *row) for row in SECTIONS[section](device)]
        except (subprocess.CalledProcessError, UserError, ValueError, RuntimeError) as error:
            failed.append(section)
            rows = [(section, f"failed: {str(error)[:300]}", "", None)]
        found += [*rows, (section, "took", "s", round(time.perf_counter() - started, 1))]
    described = machine()
    name = described["machine"]["gpus"][0] if described["machine"]["gpus"] else described["machine"]["cpu"]
    print(f"\n{name}, {max(1, torch.cuda.device_count())} device(s), torch {torch.__version__}\n{table(found)}")
    keys = ("section", "what", "unit", "number")
    record = {**described, "toy": device.type != "cuda", "rows": [dict(zip(keys, row, strict=True)) for row in found]}
    write_json(options.record, record, indent=2)
    print(f"\nwritten to {options.record}")
    if failed:
        raise UserError(f"every section must pass; failed: {', '.join(failed)} (the table has the reasons)")


def table(rows: list[tuple]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| section | what | number | unit |", "|---|---|---:|---|"]
    for section, what, unit, number in rows:
        shown = "" if number is None else f"{number:,.4g}" if isinstance(number, float) else f"{number:,}"
        lines.append(f"| {section} | {what} | {shown} | {unit} |")
    return "\n".join(lines)


def tests(device: torch.device) -> Rows:
    """Runs the tests marked gpu."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], capture_output=True, text=True)
    yield done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:], "", None
    if done.returncode not in (0, 5):  # 5: none was collected
        raise RuntimeError(done.stdout[-2000:])


def layouts(device: torch.device) -> Rows:
    """Takes three steps of every rule on every layout, in float64, and compares the weights with one device's."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        _checked([*command, "-m", "scripts.gpu_check", "--worker", folder])
        for name, difference in json.loads((Path(folder) / "layouts.json").read_text()).items():
            yield f"{name} on {ranks}: largest difference of a weight", "", difference


def check_layouts(folder: Path) -> None:
    """Run one rank: write the largest difference from one device for each rule and layout."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    from optimizers import RULES, build_optimizer

    process = launch.start()

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(48, 96, bias=False), nn.Tanh(), nn.Linear(96, 40, bias=False)]
        return nn.Sequential(*layers).to(process.device, torch.float64)

    def trained(network: nn.Module, rule: str) -> list[Tensor]:
        # In the precision of the weights: in bfloat16 layouts differ by its rounding.
        exact = {name: torch.float64 for name in ("ns_dtype", "wire_dtype") if name in RULES[rule].defaults}
        optimizer = build_optimizer(network, rule, lr=0.05, roles={"*": "matrix"}, **exact)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            data = torch.randn(32, 48, generator=generator, dtype=torch.float64).to(process.device)
            network(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        wholes = (param.detach() for param in network.parameters())
        return [whole.full_tensor() if isinstance(whole, DTensor) else whole for whole in wholes]

    count = process.world_size
    differences = {}
    for rule in RULES:
        alone = trained(model(), rule)
        ddp = DistributedDataParallel(model(), device_ids=[process.device] if process.device.type == "cuda" else None)
        networks = {"ddp": ddp}
        for replicas in [1] + [2] * (count >= 4 and count % 2 == 0):
            mesh = launch.device_mesh(process, replicas, count // replicas)
            networks["fsdp" if replicas == 1 else "hsdp"] = fully_shard(model(), mesh=mesh)
        for layout, network in networks.items():
            pairs = zip(trained(network, rule), alone, strict=True)
            differences[f"{rule}, {layout}"] = max((a - b).abs().max().item() for a, b in pairs)
    if wrong := {name: each for name, each in differences.items() if not each < 1e-9}:
        raise RuntimeError(f"weights differ from one device's by more than 1e-9: {wrong}")
    if process.is_main:
        write_json(folder / "layouts.json", differences)
    dist.barrier()


def optimizers(device: torch.device) -> Rows:
    """Times one step of each optimizer on GPT-2 small's matrices and one block of Llama-2-7B's."""
    shapes = {"gpt2_small": 12, "llama_7b": 1} if device.type == "cuda" else {"embedded": 1}
    for name, layers in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "bench.json"
            command = [sys.executable, "-m", "scripts.bench_optimizers", "--shapes", name, "--layers", str(layers)]
            _checked([*command, "--device", device.type, "--dtype", "bfloat16", "--json", str(record)])
            for each, numbers in _rows_of(json.loads(record.read_text())):
                yield f"{name}: {each}", "ms", float(numbers["median_ms"])


def _rows_of(record: object) -> Iterator[tuple[str, dict]]:
    """Yield each optimizer's numbers in a nested record."""
    if isinstance(record, dict):
        for key, value in record.items():
            if isinstance(value, dict) and "median_ms" in value:
                yield key, value
            else:
                yield from _rows_of(value)


def products(device: torch.device) -> Rows:
    """Times X X' by torch and by the Triton kernel."""
    from optimizers import symmetric

    for m in (1024, 2048, 4096, 8192) if device.type == "cuda" else (128,):
        x = torch.randn(1, m, m, device=device, dtype=torch.bfloat16)
        yield f"{m}: torch", "ms", _milliseconds(lambda x=x: x @ x.mT, device)
        kernel = symmetric._launcher(device)
        if kernel:
            halved = partial(kernel, x, x.mT, None, 0.0, 1.0)
            yield f"{m}: kernel", "ms", _milliseconds(halved, device)


def gpt2(device: torch.device) -> Rows:
    """Trains GPT-2 small for 40 steps with nanoGPT.train and with a plain loop, on one device."""
    from nanoGPT import data
    from nanoGPT.model import GPT, GPTConfig

    toy = device.type != "cuda"
    flags = "--model.n-layer 1 --model.n-embd 64 --model.n-head 2 --model.context 64 --data.batch-size 4".split()
    flags += "--data.micro-batch 2 --no-compile --dtype float32".split()
    shape = GPTConfig(n_layer=1, n_embd=64, n_head=2, context=64, vocab_size=50304) if toy else GPTConfig()
    steps, batch = (4, 2) if toy else (40, 40)
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder) / "corpus", Path(folder) / "runs"
        text = bytes(torch.randint(32, 127, (400_000,), dtype=torch.uint8).tolist()).decode()
        tokens = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        splits = {split: [data.Encoded(tokens, len(text))] for split in ("train", "val")}
        data.write_corpus(corpus, splits, {"tokenizer": "bytes", "source": "random"})
        command = [sys.executable, "-m", "nanoGPT.train", "nanoGPT/configs/gpt2_small.toml", "--data.folder", corpus]
        command += ["--out", out, "--steps", str(steps), "--log-every", str(steps // 2), "--eval.windows", "2"]
        command += [] if toy else ["--data.batch-size", str(batch)]
        _checked([*command, "--checkpoint.every", "0", *(flags if toy else [])])
        lines = [json.loads(line) for line in next(out.rglob("metrics.jsonl")).read_text().splitlines()]
        measured = [each["tokens_per_second"] for each in lines if "tokens_per_second" in each]
        yield "nanoGPT.train, olion", "tokens/s", measured[-1]  # the first half compiles
    model = GPT(shape).to(device)
    network = model if toy else torch.compile(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    tokens = torch.randint(50257, (batch, shape.context + 1), device=device)

    def step() -> None:
        with autocast(torch.float32 if toy else torch.bfloat16, launch.start()):
            _, loss = network(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    yield "plain loop, fused AdamW", "tokens/s", batch * shape.context / _milliseconds(step, device) * 1000


def sit(device: torch.device) -> Rows:
    """Trains SiT-B/2 on random latents, without REPA's encoder, eager and compiled."""
    from optimizers import build_optimizer
    from SIT.model import ModelConfig, SiT, tensor_roles

    toy = device.type != "cuda"
    batch = 2 if toy else 64
    model = SiT(ModelConfig(size="SiT-S/2" if toy else "SiT-B/2")).to(device)
    optimizer = build_optimizer(model, "olion", lr=1e-4, roles=tensor_roles(model))
    x = torch.randn(batch, model.config.channels, *[model.config.grid * model.config.patch_size] * 2, device=device)
    t, y = torch.rand(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def step(network: nn.Module) -> None:
        with autocast(torch.float32 if toy else torch.bfloat16, launch.start()):
            prediction, projected = network(x, t, y)
            loss = prediction.square().mean() + 0 * projected.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    networks = {"eager": model} if toy else {"eager": model, "compiled": torch.compile(model)}
    for name, network in networks.items():
        taken = _milliseconds(lambda network=network: step(network), device, rounds=3 if toy else 20)
        yield f"{model.config.size}, {name}, olion", "images/s", batch / taken * 1000


SECTIONS: dict[str, Callable[[torch.device], Rows]] = {
    "tests": tests,
    "layouts": layouts,
    "optimizers": optimizers,
    "products": products,
    "gpt2": gpt2,
    "sit": sit,
}


def _milliseconds(work: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Return the median time of a call, after three warm-up calls."""
    taken = []
    for number in range(rounds + 3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 3:
            taken.append(1000 * (time.perf_counter() - started))
    return median(taken)


def _checked(command: list) -> None:
    """Run a command; raises RuntimeError with the end of its output if it fails."""
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[2:5]))}: {(done.stderr or done.stdout).strip()[-600:]}")


if __name__ == "__main__":
    main_guard(main)
