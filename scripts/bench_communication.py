"""Counts the bytes that a step of each optimizer sends between local ranks, and times it, over gloo.

    python -m scripts.bench_communication
    python -m scripts.bench_communication --ranks 4 --layers 12 --repeats 3
    python -m scripts.bench_communication --dtype bfloat16 --record communication.json

The parameters are GPT-2 small's hidden matrices. Under ddp every rank holds all of them, and each matrix has an owner
that computes its direction for all; under fsdp every rank holds FSDP2's rows. Bytes are the busiest rank's, counted as
they are sent (`optimizers.count_bytes`), without those of averaging the gradient, which have their own column. `bits`
are per entry of the returned directions; an OLion matrix with a zero, which rounding makes of one entry in tens of
millions, takes more. Shards are sent in the precision of the orthogonalization: --dtype bfloat16 sends as many
bytes as GPUs would, and is slower on most CPUs.

A round steps every optimizer on every layout once, with ranks starting together; the time is the slowest rank's. For
`local ms` rank 0 steps whole matrices alone while the others wait. All processes have equally many threads and share
this machine's cores: on 2 cores, ranks of one thread can at best halve the local time. The links are the machine's
memory; for networks see scripts.plan.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    """Counts the bytes that a step of each optimizer sends between local ranks, and times it, over gloo."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of ranks to measure."""
    layers: int = 2
    """Blocks of GPT-2 small, which has 12: 4 matrices and 7.1 million entries each."""
    repeats: int = 5
    """Timed rounds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the orthogonalizations, and of shards sent to owners."""
    threads: int = 1
    """Threads per process."""
    record: Path | None = None
    """Also write the numbers here, as JSON."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.bench_communication", __doc__))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from common import UserError
from common.config import to_dict
from common.runlog import machine
from common.whole import write_json
from optimizers import AdamW, Muon, OLion, RuleOptimizer, count_bytes
from optimizers.layout import local_of
from scripts.bench_optimizers import matrix_shapes
from scripts.plan import Mesh, gradient_traffic

CONSTRUCTORS = {"AdamW": AdamW, "Muon": Muon, "OLion": OLion}
AXES = {"ddp": "replicate", "fsdp": "shard"}  # layout -> dimension of scripts.plan's Mesh


class Contestant:
    """An optimizer with its own parameters in one layout; `local` ones step on rank 0 only."""

    def __init__(self, layout: str, name: str, gradients: list[Tensor], dtype: torch.dtype):
        lay_out = _shard if layout == "fsdp" else torch.clone
        self.layout, self.name = layout, name
        self.params = [nn.Parameter(lay_out(torch.zeros_like(gradient))) for gradient in gradients]
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = lay_out(gradient)
        group = dist.group.WORLD if layout == "ddp" else None
        options = {} if name == "AdamW" else {"ns_dtype": dtype}
        self.optimizer: RuleOptimizer = CONSTRUCTORS[name](self.params, process_group=group, **options)

    def step(self) -> float:
        """Step once, together with the other ranks; returns the milliseconds it took."""
        dist.barrier()
        start = time.perf_counter()
        if self.layout != "local" or dist.get_rank() == 0:
            self.optimizer.step()
        return 1000 * (time.perf_counter() - start)

    def warm_up(self) -> dict:
        """Step once; returns its bytes, and the bits per entry of the received directions."""
        with count_bytes() as counted:
            self.step()
        pairs = zip(self.optimizer.plan.entries, self.params, strict=True)
        came = sum(local_of(param).numel() for entry, param in pairs if entry.owner not in (None, dist.get_rank()))
        zeros = counted.received["zeros"]
        return {
            "sent": counted.total_sent,
            "received": counted.total_received,
            "kinds": {"sent": dict(counted.sent), "received": dict(counted.received)},
            "zeros": zeros,
            "bits": 8 * (counted.received["directions"] + zeros) / came if came else 0.0,
            "held": sum(local_of(param).nbytes for param in self.params),
        }


def _shard(whole: Tensor) -> Tensor:
    """Return this rank's rows, as FSDP2 shards them."""
    return distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)], src_data_rank=None)


def measure(rank: int, ranks: int, options: Options, folder: str) -> None:
    """Run one rank: step every optimizer on every layout in turn, and write the numbers to the folder."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)  # the same gradients on all ranks, as after averaging
    gradients = [torch.randn(shape) for shape in matrix_shapes("gpt2_small", options.layers)]
    dtype = getattr(torch, options.dtype)
    contestants = [Contestant(layout, name, gradients, dtype) for name in CONSTRUCTORS for layout in (*AXES, "local")]
    rows = [{"layout": each.layout, "optimizer": each.name, **each.warm_up()} for each in contestants]
    rounds = [[each.step() for each in contestants] for _ in range(options.repeats)]
    for row, milliseconds in zip(rows, zip(*rounds, strict=True), strict=True):
        row["milliseconds"] = milliseconds
    write_json(Path(folder, f"{rank}.json"), rows)
    dist.destroy_process_group()


def summary(of_ranks: list[list[dict]]) -> list[dict]:
    """Return a row per layout and optimizer: the busiest rank's bytes, the slowest rank's time."""
    rows, local_ms, muon = [], {}, {}
    for same in zip(*of_ranks, strict=True):
        layout, name = (same[0][key] for key in ("layout", "optimizer"))
        taken = median(map(max, zip(*(each["milliseconds"] for each in same), strict=True)))
        if layout == "local":
            local_ms[name] = taken
            continue
        row = {"layout": layout, "optimizer": name}
        row |= {key: max(each[key] for each in same) for key in ("sent", "received", "zeros", "bits")}
        if name == "Muon":
            muon[layout] = row["received"]
        mesh = Mesh(layout, **{AXES[layout]: len(of_ranks)})
        row["gradient"] = gradient_traffic(max(each["held"] for each in same), mesh)
        row |= {"median_ms": taken, "kinds": [each["kinds"] for each in same]}
        rows.append(row)
    for row in rows:
        row |= {"to_muon": row["received"] / muon[row["layout"]], "local_ms": local_ms[row["optimizer"]]}
    return sorted(rows, key=lambda row: row["layout"])


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    heads = "sent MB | received MB | zeros MB of it | bits | received / Muon's | gradient MB | ms | local ms"
    lines = [f"| layout | optimizer | {heads} |", "|---|---" + "|---:" * 8 + "|"]
    for row in rows:
        sizes = " | ".join(f"{row[key] / 1e6:.3f}" for key in ("sent", "received", "zeros"))
        sizes += f" | {row['bits']:.3f} | {row['to_muon']:.4f}"
        rest = f"{row['gradient'] / 1e6:.3f} | {row['median_ms']:.0f} | {row['local_ms']:.0f}"
        lines.append(f"| {row['layout']} | {row['optimizer']} | {sizes} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    options = parse_options(Options, "python -m scripts.bench_communication", __doc__)
    if min(options.ranks) < 2 or min(options.layers, options.repeats, options.threads) < 1:
        got = ", ".join(f"{name} {getattr(options, name)}" for name in ("ranks", "layers", "repeats", "threads"))
        raise UserError(f"ranks must be 2 or more, layers, repeats and threads 1 or more; got {got}")
    here = machine()
    print(f"{here['machine']['cpu']}, {here['machine']['cores']} cores, torch {torch.__version__}")
    print(f"{options.layers} of GPT-2 small's 12 blocks, orthogonalized in {options.dtype}, {options.repeats} rounds")
    record = {**here, "options": to_dict(options), "ranks": {}}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (ranks, options, folder), nprocs=ranks)
            found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
        record["ranks"][ranks] = summary(found)
        print(f"\n{ranks} ranks\n{table(record['ranks'][ranks])}", flush=True)
    if options.record:
        write_json(options.record, record, indent=2)


if __name__ == "__main__":
    main_guard(main)
