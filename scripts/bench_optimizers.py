"""Times a step of each optimizer on the same matrices, in one process and in interleaved rounds.

    python -m scripts.bench_optimizers
    python -m scripts.bench_optimizers --shapes gpt2_small --layers 12 --repeats 15 --dtype bfloat16
    python -m scripts.bench_optimizers --json bench.json

Every round steps each optimizer once, so that other load on the machine slows all of them equally. The ratio is to
torch.optim.Muon. Optimizers of pytorch_optimizer, heavyball and dion are timed if installed.
"""

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import tyro

from common import BadValue
from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    """Times a step of each optimizer on the same matrices, in one process and in interleaved rounds."""

    shapes: tuple[Literal["gpt2_small", "embedded", "llama_7b"], ...] = ("embedded", "gpt2_small")
    """Models of the matrices: the embedded nanoGPT config, GPT-2 small, or Llama-2-7B."""
    layers: int | None = None
    """Number of blocks. Default: the embedded config's, 2 of GPT-2 small's 12, 1 of Llama-2-7B's 32."""
    repeats: int = 7
    """Timed rounds."""
    dtype: Literal["float32", "bfloat16", "both"] = "both"
    """Precision of our orthogonalizations; torch.optim.Muon's is always bfloat16."""
    device: str = "auto"
    """Device to compute on, by torch's name; auto takes a GPU if there is one."""
    record: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Also write the numbers here."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.bench_optimizers", __doc__))

import torch
from torch import Tensor, nn

from common.runlog import machine
from common.whole import write_json
from optimizers import AdaMuon, AdamW, Curvature, Lion, LionMuon, Muon, NorMuon, OLion, PolarGrad, Signum

BASELINE = "torch.optim.Muon"
EMBEDDED_CONFIG = Path("nanoGPT/configs/stdlib.toml")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def matrix_shapes(name: str, layers: int | None) -> list[tuple[int, int]]:
    """Return the shapes (rows, columns) of a model's hidden matrices, of `layers` blocks.

    GPT: fused QKV, attention output, MLP in and out. Llama: q, k, v, o; gate, up and down.
    """
    if name == "llama_7b":
        return ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * (layers or 1)
    if name == "gpt2_small":
        width, layers = 768, layers or 2
    else:
        model = tomllib.loads(EMBEDDED_CONFIG.read_text(encoding="utf-8"))["model"]
        width, layers = model["n_embd"], layers or model["n_layer"]
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers


def contestants(dtype: str) -> dict[str, Build]:
    """Return the constructor of each row of the table, ours first."""
    rows: dict[str, Build] = {}
    for constructor in (OLion, Muon, AdaMuon, NorMuon, LionMuon):
        for name in DTYPES if dtype == "both" else [dtype]:
            rows[f"{constructor.__name__} {name}"] = partial(constructor, ns_dtype=DTYPES[name])
    rows |= {
        "Curvature": Curvature,
        "PolarGrad qdwh": PolarGrad,
        "PolarGrad Newton-Schulz": partial(PolarGrad, ns_form="auto"),
        "Lion": Lion,
        "Signum": Signum,
        "AdamW": AdamW,
        BASELINE: torch.optim.Muon,
        "torch.optim.AdamW fused": partial(torch.optim.AdamW, fused=True),
        "torch.optim.AdamW foreach": partial(torch.optim.AdamW, foreach=True),
    }
    return rows


def guests() -> dict[str, Build]:
    """Return the constructors of other packages that are installed."""
    rows: dict[str, Build] = {}
    if package := _installed("pytorch_optimizer"):
        for name in ("Muon", "AdaMuon"):
            rows[f"pytorch_optimizer.{name}"] = partial(_with_use_muon, getattr(package, name))
        rows["pytorch_optimizer.Lion"] = package.Lion
    if package := _installed("heavyball"):
        rows["heavyball.Muon"] = package.Muon
    if package := _installed("dion"):
        rows["dion.Muon"] = package.Muon
    return rows


def _installed(name: str):
    try:
        return import_module(name)
    except ImportError:
        return None


def _with_use_muon(optimizer: Callable, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build an optimizer of pytorch_optimizer, which needs `use_muon` in a group of matrices."""
    return optimizer([{"params": params, "use_muon": True}])


class Contestant:
    """An optimizer with its own parameters, and the milliseconds of its steps."""

    def __init__(self, build: Build, gradients: list[Tensor]):
        self.params = [nn.Parameter(torch.randn_like(gradient)) for gradient in gradients]
        self.optimizer = build(self.params)
        self.gradients = gradients
        self.milliseconds: list[float] = []

    def step(self) -> float:
        """Step once on copies of the gradients (some packages modify them); returns the milliseconds it took."""
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient.clone()
        _finish(self.gradients[0].device)
        start = time.perf_counter()
        self.optimizer.step()
        _finish(self.gradients[0].device)
        taken = 1000 * (time.perf_counter() - start)
        self.optimizer.zero_grad()  # frees the copies
        return taken


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(options: Options, shapes: list[tuple[int, int]]) -> dict[str, Contestant]:
    """Warm up every optimizer with two steps, then time `repeats` rounds over all of them."""
    torch.manual_seed(0)
    gradients = [torch.randn(shape, device=options.device) for shape in shapes]
    found = {name: Contestant(build, gradients) for name, build in contestants(options.dtype).items()}
    for contestant in found.values():
        for _ in range(2):
            contestant.step()
    for name, build in guests().items():
        try:  # foreign packages of unknown versions: a failure must not end the benchmark
            contestant = Contestant(build, gradients)
            for _ in range(2):
                contestant.step()  # some compile in their first step
            found[name] = contestant
        except Exception as error:
            print(f"{name} skipped: {' '.join(str(error).split())[:200]}")
    names = list(found)
    for round_ in range(options.repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:  # rotate the order
            found[name].milliseconds.append(found[name].step())
    return found


def summary(found: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    """Return each row's median and minimum in milliseconds, and its median divided by the baseline's."""
    baseline = median(found[BASELINE].milliseconds)
    return {
        name: {
            "median_ms": median(each.milliseconds),
            "fastest_ms": min(each.milliseconds),
            "ratio": median(each.milliseconds) / baseline,
        }
        for name, each in found.items()
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [f"| {'optimizer':<26} | median ms | fastest ms | / {BASELINE} |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        lines.append(f"| {name:<26} | {row['median_ms']:.2f} | {row['fastest_ms']:.2f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    options = parse_options(Options, "python -m scripts.bench_optimizers", __doc__)
    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
    if options.repeats < 1:
        raise BadValue(f"repeats must be 1 or more; got {options.repeats}")
    here = machine()
    where = here["machine"]["gpus"][0] if options.device.startswith("cuda") else here["machine"]["cpu"]
    threads = torch.get_num_threads()
    print(f"{where}, {threads} threads, torch {torch.__version__}, median of {options.repeats} rounds")
    record = {**here, "device": options.device, "threads": threads, "repeats": options.repeats, "shapes": {}}
    for name in options.shapes:
        shapes = matrix_shapes(name, options.layers)
        rows = summary(measure(options, shapes))
        kinds = ", ".join(f"{m}x{n}" for m, n in dict.fromkeys(shapes))
        print(f"\n{name}: {len(shapes) // 4} x ({kinds})\n{table(rows)}", flush=True)
        record["shapes"][name] = {"matrices": shapes, "optimizers": rows}
    if options.record:
        write_json(options.record, record, indent=2)


if __name__ == "__main__":
    main_guard(main)
