"""Counts the bytes that a step of each optimizer sends between local ranks, and times it, over gloo.

    python -m scripts.bench_communication
    python -m scripts.bench_communication --ranks 4 --layers 12 --repeats 3
    python -m scripts.bench_communication --dtype bfloat16 --record communication.json
    python -m scripts.bench_communication --ranks 4 --layers 4 --link-mbs 10 --throttled

The parameters are GPT-2 small's hidden matrices. Under ddp every rank holds all of them, and each matrix has an owner
that computes its direction for all; under owners, gradients are reduced to the owners (gradients="to_owners"); under
fsdp every rank holds FSDP2's rows. Bytes are the busiest rank's, counted as they are sent (`optimizers.count_bytes`),
without those of averaging the gradient, which have their own column: under ddp and owners counted in a backward pass
of DistributedDataParallel, under fsdp those of a reduce-scatter. `bits` are per entry of the returned directions; an
OLion matrix with a zero, which rounding makes of one entry in tens of millions, takes more. Shards are sent in the
precision of the orthogonalization: --dtype bfloat16 sends as many bytes as GPUs would, and is slower on most CPUs.

`s at N MB/s` is the time that the bytes of gradient and step take through a link of this rate into each rank and out of
it, if nothing else takes time. `s measured` are those of averaging the gradient, and of that and the step, with
--throttled, where ranks are connected by such links. gloo's reduce to one rank sends up to 1 / ranks more than the
chain that is counted.

A round steps every optimizer on every layout once, with ranks starting together; the time is the slowest rank's. For
`local ms` rank 0 steps whole matrices alone while the others wait. All processes have equally many threads and share
this machine's cores: on 2 cores, ranks of one thread can at best halve the local time. The links are the machine's
memory; for networks see scripts.plan.
"""

import json
import tempfile
import time
from contextlib import nullcontext
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
    link_mbs: float = 125
    """MB/s of the link for which times are computed: 1 Gb/s Ethernet."""
    throttled: bool = False
    """Connect ranks by links of that rate (scripts/link.py; needs root); time gradient and step of ddp and owners."""
    record: Path | None = None
    """Also write the numbers here, as JSON."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.bench_communication", __doc__))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from common.config import to_dict
from common.runlog import machine
from common.whole import write_json
from optimizers import RULES, AdamW, Muon, OLion, RuleOptimizer, count_bytes, wire
from optimizers.layout import local_of
from optimizers.to_owners import send_to_owners
from scripts.bench_optimizers import matrix_shapes
from scripts.link import enter, links
from scripts.plan import Mesh, gradient_traffic

CONSTRUCTORS = {"AdamW": AdamW, "Muon": Muon, "OLion": OLion}
LAYOUTS = ("ddp", "owners", "fsdp", "local")


class Held(nn.Module):
    """Matrices whose gradients are given."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        products = [(param * gradient).sum() for param, gradient in zip(self.params, gradients, strict=True)]
        return torch.stack(products).sum()


def all_reduce(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average a bucket as DistributedDataParallel does without a hook, counted."""
    work = wire.start_all_reduce(bucket.buffer().div_(dist.get_world_size(group)), group, "gradients")
    return work.get_future().then(lambda future: future.value()[0])


class Contestant:
    """An optimizer with its own parameters in one layout; `local` ones step on rank 0 only."""

    def __init__(self, layout: str, name: str, gradients: list[Tensor], dtype: torch.dtype):
        lay_out = _shard if layout == "fsdp" else torch.clone
        self.layout, self.name = layout, name
        self.params = [nn.Parameter(lay_out(torch.zeros_like(gradient))) for gradient in gradients]
        options = {} if name == "AdamW" else {"ns_dtype": dtype}
        replicated = layout in ("ddp", "owners")
        options |= {"process_group": dist.group.WORLD} if replicated else {}
        self.optimizer: RuleOptimizer = CONSTRUCTORS[name](self.params, **options)
        network = DistributedDataParallel(Held(self.params), init_sync=False) if replicated else None
        if network and layout == "owners":
            send_to_owners(self.optimizer, network)
        elif network:
            network.register_comm_hook(dist.group.WORLD, all_reduce)
        self._network, self._gradients = network, gradients
        with count_bytes() as self._averaging:
            self.average()
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = param.grad if network else lay_out(gradient)

    def average(self) -> None:
        """Average the gradient over the ranks, as a backward pass does."""
        if self._network:
            self.optimizer.zero_grad()
            self._network(self._gradients).backward()

    def average_and_step(self) -> tuple[float, float]:
        """Return the seconds that the average takes, and that both take."""
        dist.barrier()
        start = time.perf_counter()
        self.average()
        averaged = time.perf_counter() - start
        self.optimizer.step()
        return averaged, time.perf_counter() - start

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
            "gradient": max(self._averaging.total_sent, self._averaging.total_received),
        }


def _shard(whole: Tensor) -> Tensor:
    """Return this rank's rows, as FSDP2 shards them."""
    return distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)], src_data_rank=None)


def measure(rank: int, ranks: int, options: Options, folder: str, namespaces: list[str]) -> None:
    """Run one rank: step every optimizer on every layout in turn, and write the numbers to the folder."""
    torch.set_num_threads(options.threads)
    if namespaces:
        enter(namespaces[rank])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)  # the same gradients on all ranks, as after averaging
    gradients = [torch.randn(shape) for shape in matrix_shapes("gpt2_small", options.layers)]
    dtype = getattr(torch, options.dtype)
    pairs = [(layout, name) for name in CONSTRUCTORS for layout in LAYOUTS[: 2 if options.throttled else 4]]
    directed = [name for name in CONSTRUCTORS if RULES[name.lower()].direct]  # the others have no owners
    pairs = [(layout, name) for layout, name in pairs if layout != "owners" or name in directed]
    contestants = [Contestant(layout, name, gradients, dtype) for layout, name in pairs]
    rows = [{"layout": each.layout, "optimizer": each.name, **each.warm_up()} for each in contestants]
    rounds = [[each.step() for each in contestants] for _ in range(options.repeats)]
    for row, milliseconds in zip(rows, zip(*rounds, strict=True), strict=True):
        row["milliseconds"] = milliseconds
    for row, contestant in zip(rows, contestants, strict=True):
        row["seconds"] = [contestant.average_and_step() for _ in range(options.repeats if options.throttled else 0)]
    write_json(Path(folder, f"{rank}.json"), rows)
    dist.destroy_process_group()


def summary(of_ranks: list[list[dict]], link_mbs: float) -> list[dict]:
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
        row["gradient"] = max(each["gradient"] for each in same)
        if layout == "fsdp":
            row["gradient"] = gradient_traffic(max(each["held"] for each in same), Mesh("fsdp", shard=len(of_ranks)))
        row["link_s"] = (row["gradient"] + max(row["sent"], row["received"])) / (1e6 * link_mbs)
        # (rounds, ranks, 2), the slowest rank's of each round
        seconds = [
            [max(both) for both in zip(*each, strict=True)] for each in zip(*(r["seconds"] for r in same), strict=True)
        ]
        row["throttled_s"] = [median(each) for each in zip(*seconds, strict=True)]
        row |= {"median_ms": taken, "kinds": [each["kinds"] for each in same]}
        rows.append(row)
    for row in rows:
        row |= {"to_muon": row["received"] / muon[row["layout"]], "local_ms": local_ms.get(row["optimizer"])}
    return sorted(rows, key=lambda row: row["layout"])


def table(rows: list[dict], link_mbs: float) -> str:
    """Return the rows as a Markdown table."""
    heads = "sent MB | received MB | zeros MB of it | bits | received / Muon's | gradient MB | "
    heads += f"s at {link_mbs:g} MB/s | s measured: gradient | and step | ms | local ms"
    lines = [f"| layout | optimizer | {heads} |", "|---|---" + "|---:" * 11 + "|"]
    for row in rows:
        sizes = " | ".join(f"{row[key] / 1e6:.3f}" for key in ("sent", "received", "zeros"))
        sizes += f" | {row['bits']:.3f} | {row['to_muon']:.4f}"
        took = " | ".join(f"{each:.3f}" for each in row["throttled_s"] or ()) or " | "
        rest = f"{row['gradient'] / 1e6:.3f} | {row['link_s']:.3f} | {took} | {row['median_ms']:.0f} | "
        rest += f"{row['local_ms']:.0f}" if row["local_ms"] else ""
        lines.append(f"| {row['layout']} | {row['optimizer']} | {sizes} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    options = parse_options(Options, "python -m scripts.bench_communication", __doc__)
    if min(options.ranks) < 2 or min(options.layers, options.repeats, options.threads) < 1:
        got = ", ".join(f"{name} {getattr(options, name)}" for name in ("ranks", "layers", "repeats", "threads"))
        raise UserError(f"ranks must be 2 or more, layers, repeats and threads 1 or more; got {got}")
    if not 0 < options.link_mbs < float("inf"):
        raise UserError(f"--link-mbs must be above 0 and finite; got {options.link_mbs}")
    here = machine()
    print(f"{here['machine']['cpu']}, {here['machine']['cores']} cores, torch {torch.__version__}")
    print(f"{options.layers} of GPT-2 small's 12 blocks, orthogonalized in {options.dtype}, {options.repeats} rounds")
    record = {**here, "options": to_dict(options), "ranks": {}}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            with links(ranks, options.link_mbs) if options.throttled else nullcontext([]) as namespaces:
                torch.multiprocessing.spawn(measure, (ranks, options, folder, namespaces), nprocs=ranks)
            found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
        record["ranks"][ranks] = summary(found, options.link_mbs)
        print(f"\n{ranks} ranks\n{table(record['ranks'][ranks], options.link_mbs)}", flush=True)
    if options.record:
        write_json(options.record, record, indent=2)


if __name__ == "__main__":
    main_guard(main)
