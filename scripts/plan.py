"""Plans the optimizer of a large model on many GPUs: memory, work and bytes per rank, computed on one CPU.

    python -m scripts.plan --model gpt2_xl --mesh ddp=8
    python -m scripts.plan --model llama2_7b --mesh fsdp=64 --state-dtype bfloat16 --gpu-tflops 989 --link-gbs 50
    python -m scripts.plan --model llama2_70b --mesh hsdp=16x64 --record plan.json

    ddp=W         W replicas
    owners=W      W replicas, gradients reduced to the owners of the matrices (gradients="to_owners")
    fsdp=W        W shards (FSDP2)
    hsdp=RxS      R replicas of S shards
    tp=T          tensor parallelism: Linears sharded by rows or columns, embedding and head by rows
    fsdp_tp=SxT   S shards of each of T parts

The model is built on the meta device, without memory, and sharded by torch's fully_shard over a fake process group; the
plan is that of training on GPUs, with orthogonalizations in bfloat16. Memory is that of --rank, the one rank that this
process simulates; rank 0 has the longest shards. Work and bytes are those of all ranks.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import mean
from typing import Literal

from common.guard import main_guard
from common.optimizer_help import rule_names
from common.options import parse_options

GPT2 = {  # layers, heads, width: Radford et al. 2019, table 2
    "gpt2_small": (12, 12, 768),
    "gpt2_medium": (24, 16, 1024),
    "gpt2_large": (36, 20, 1280),
    "gpt2_xl": (48, 25, 1600),
}
LLAMA2 = {  # layers, heads, key/value heads, width, FFN: Touvron et al. 2023, and Meta's released params.json
    "llama2_7b": (32, 32, 32, 4096, 11008),
    "llama2_13b": (40, 40, 40, 5120, 13824),
    "llama2_70b": (80, 64, 8, 8192, 28672),
}
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Options:
    """Plans the optimizer of a large model on many GPUs: memory, work and bytes per rank, computed on one CPU."""

    model: Literal[(*GPT2, *LLAMA2)]
    """The model: GPT-2 without biases and with a tied head, or Llama 2 as published."""
    mesh: str
    """The layout, such as ddp=8, owners=8, fsdp=64, hsdp=16x8, tp=8 or fsdp_tp=8x4; at most 1,024 ranks."""
    optimizers: tuple[Literal[rule_names()], ...] = ("adamw", "muon", "olion")
    """The columns: rules of the matrices; AdamW trains the rest."""
    rank: int = 0
    """The rank whose memory is shown."""
    param_dtype: Dtype = "float32"
    """Dtype of the weights that the optimizer updates."""
    grad_dtype: Dtype = "float32"
    """Dtype of the gradients."""
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of the matrices' optimizer state, for rules that support it. Default: the weights'."""
    to_owner_dtype: Literal["int8"] | None = None
    """int8: shards travel to their owners at one byte per entry."""
    gpu_tflops: float = 989
    """Dense bf16 TFLOP/s of a GPU: an H100 SXM's, from its data sheet."""
    efficiency: float = 0.5
    """Fraction of them that orthogonalizations reach."""
    link_gbs: float = 50
    """GB/s into a rank, and as much out of it: 400 Gb/s InfiniBand, one port per GPU."""
    print_plan: bool = False
    """Also print each optimizer's full plan: route and owner of every parameter."""
    record: Path | None = None
    """Also write the numbers here, as JSON."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.plan", __doc__))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

from common import UserError
from common.config import to_dict
from common.runlog import machine
from common.whole import write_json
from nanoGPT.model import GPT, GPTConfig
from optimizers import RULES, RuleOptimizer, build_optimizer
from optimizers.layout import local_of
from optimizers.to_owners import add_traffic
from optimizers.wire import KINDS, Traffic, ring_bytes

MAX_RANKS = 1024  # the largest tried: Llama-2-70B on 16x64 takes seconds
WAYS = ("received", "sent")
AXES = {  # word of --mesh -> meaning of the numbers after it
    "ddp": ("replicate",),
    "owners": ("replicate",),
    "fsdp": ("shard",),
    "hsdp": ("replicate", "shard"),
    "tp": ("tensor",),
    "fsdp_tp": ("shard", "tensor"),
}
EXAMPLES = "ddp=8, owners=8, fsdp=64, hsdp=16x8 (replicas x shards), tp=8 or fsdp_tp=8x4 (shards x parts)"


@dataclass(frozen=True)
class Mesh:
    """Number of ranks along each axis of a layout; 1 without that axis."""

    word: str
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        """Total number of ranks."""
        return self.replicate * self.shard * self.tensor


def parse_mesh(text: str) -> Mesh:
    """Parse a mesh such as "hsdp=16x8"; raises UserError for an unknown layout, an invalid number or too many ranks."""
    word, _, numbers = text.partition("=")
    axes = AXES.get(word, ())
    sizes = [int(number) if number.isdecimal() else 0 for number in numbers.split("x")]
    if len(sizes) != len(axes) or min(sizes) < 1:
        raise UserError(f"--mesh must be like {EXAMPLES}, in numbers of ranks; got {text!r}")
    mesh = Mesh(word, **dict(zip(axes, sizes, strict=True)))
    if mesh.ranks > MAX_RANKS:
        raise UserError(f"--mesh may have {MAX_RANKS:,} ranks; got {mesh.ranks:,} with {text!r}: plan a smaller one")
    return mesh


@contextlib.contextmanager
def fake_group(ranks: int, rank: int) -> Iterator[None]:
    """Simulate one rank of a process group whose collectives do nothing.

    One rank per process: torch caches device meshes by shape, and with them the rank's groups.
    """
    if not 0 <= rank < ranks:
        raise UserError(f"--rank must be from 0 to {ranks - 1}, a rank of the mesh; got {rank}")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_model(name: str, mesh: Mesh) -> nn.Module:
    """Return the model on the meta device; raises UserError if tensor parallelism does not divide its heads."""
    heads = LLAMA2[name][2] if name in LLAMA2 else GPT2[name][1]
    if heads % mesh.tensor:
        raise UserError(f"tensor parallelism must divide the {heads} heads of {name}; got {mesh.tensor}: use a divisor")
    with torch.device("meta"):
        if name in GPT2:
            layers, heads, width = GPT2[name]
            return GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width))
        from transformers import LlamaConfig, LlamaForCausalLM  # here: takes seconds

        layers, heads, shared, width, ffn = LLAMA2[name]
        config = {"num_attention_heads": heads, "num_key_value_heads": shared, "intermediate_size": ffn}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, hidden_size=width, vocab_size=32000, **config))


def distribute(model: nn.Module, mesh: Mesh) -> dist.ProcessGroup | None:
    """Distribute the model over the mesh; returns the group of replicas of plain tensors (DDP), if any.

    The mesh must consist of all ranks of the default group, and all of them must call it.
    """
    if mesh.word in ("ddp", "owners"):
        return dist.group.WORLD
    axes = AXES[mesh.word]
    devices = init_device_mesh("cpu", tuple(getattr(mesh, axis) for axis in axes), mesh_dim_names=axes)
    if "tensor" in axes:
        _cut_tensors(model, devices["tensor"])
    if "shard" in axes:
        data = devices if mesh.word == "hsdp" else devices["shard"]
        for block in model.blocks if isinstance(model, GPT) else model.model.layers:
            fully_shard(block, mesh=data)
        fully_shard(model, mesh=data)
    return None


def _cut_tensors(model: nn.Module, devices: DeviceMesh) -> None:
    """Shard like Megatron: output projections of blocks by columns, other matrices and the vocabulary by rows.

    Norms and positions are replicated.
    """
    cut: dict[Tensor, nn.Parameter] = {}  # keeps a tied head tied
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and name != "wpe":
            dim = 1 if name.endswith(("c_proj", "o_proj", "down_proj")) else 0
            if module.weight not in cut:
                cut[module.weight] = nn.Parameter(distribute_tensor(module.weight, devices, [Shard(dim)]))
            module.weight = cut[module.weight]


def planned(optimizer: RuleOptimizer, mesh: Mesh, grad_dtype: torch.dtype) -> dict:
    """Return the numbers of one column: bytes and floating-point operations per step."""
    plan = optimizer.plan
    shards = [local_of(param) for group in optimizer.param_groups for param in group["params"]]
    gradients = sum(shard.numel() for shard in shards) * grad_dtype.itemsize
    on_each = sum(entry.flops for entry in plan.entries if entry.owner is None)
    loads = [load for of_ranks in plan.loads().values() for load in of_ranks]
    everyone = [plan.traffic(rank) for rank in range(mesh.ranks)]
    return {
        "weights": sum(shard.nbytes for shard in shards),
        "gradients": gradients,
        "state": optimizer.state_size(),
        "busiest_flops": on_each + max(loads, default=0.0),
        "balance": plan.balance() if loads else None,
        "received": _by_kind([each.received for each in everyone]),
        "sent": _by_kind([each.sent for each in everyone]),
        "gradient_traffic": _to_owners(optimizer, grad_dtype, mesh) or gradient_traffic(gradients, mesh),
    }


def _to_owners(optimizer: RuleOptimizer, grad_dtype: torch.dtype, mesh: Mesh) -> int:
    """Return the bytes that the busiest rank sends or receives to reduce gradients to owners; 0 if none are."""
    entries = optimizer.plan.entries
    if not any(entry.owner_only for entry in entries):
        return 0
    sizes = [prod(entry.shape) * grad_dtype.itemsize for entry in entries]
    everyone = [Traffic() for _ in range(mesh.ranks)]
    for rank, traffic in enumerate(everyone):
        add_traffic(traffic, sizes, entries, mesh.ranks, rank)
    return max(max(each.total_sent, each.total_received) for each in everyone)


def _by_kind(everyone: list[Counter]) -> dict[str, dict[str, float]]:
    """Return maximum and mean over ranks, of each kind of bytes and of their sum."""
    ranks = {kind: [each[kind] for each in everyone] for kind in KINDS}
    ranks = {kind: each for kind, each in ranks.items() if any(each)} | {"all": [each.total() for each in everyone]}
    return {kind: {"busiest": max(each), "mean": mean(each)} for kind, each in ranks.items()}


def gradient_traffic(held: int, mesh: Mesh) -> int:
    """Return the bytes that a rank receives, and sends, to average its gradients (`held` bytes) over the ranks.

    A reduce-scatter over S shards takes (S - 1) held, a ring all-reduce over R replicas 2 (R - 1) / R held.
    """
    return (mesh.shard - 1) * held + ring_bytes(held, mesh.replicate)


def seconds(column: dict, options: Options) -> dict[str, float]:
    """Return the times of the busiest rank's orthogonalizations and of its communication, in and out at once."""
    moved = max(column[way]["all"]["busiest"] for way in WAYS)
    return {
        "orthogonalization": column["busiest_flops"] / (1e12 * options.gpu_tflops * options.efficiency),
        "exchange": moved / (1e9 * options.link_gbs),
    }


def cells(column: dict, kinds: list[str]) -> dict[str, str]:
    """Return the table's cells of one optimizer, by row."""
    rows = {f"{name}, GB": f"{column[name] / 1e9:.3f}" for name in ("weights", "gradients", "state")}
    rows["orthogonalization, busiest rank, TFLOP"] = f"{column['busiest_flops'] / 1e12:.3f}"
    rows["owners' work, largest / mean"] = f"{column['balance']:.2f}" if column["balance"] else ""
    for way in WAYS:
        for kind in kinds:
            found = column[way].get(kind, {"busiest": 0, "mean": 0})
            rows[f"{way}, {kind}, MB"] = f"{found['busiest'] / 1e6:.3f} ({found['mean'] / 1e6:.3f})"
    rows["gradient averaging, each way, MB"] = f"{column['gradient_traffic'] / 1e6:.3f}"
    return rows | {f"{name}, ms": f"{1000 * taken:.1f}" for name, taken in column["seconds"].items()}


def table(columns: dict[str, dict]) -> str:
    """Return a Markdown table with a column per optimizer."""
    used = {kind for column in columns.values() for way in WAYS for kind in column[way]}
    rows = [cells(column, [kind for kind in (*KINDS, "all") if kind in used]) for column in columns.values()]
    lines = [f"| one rank, one step | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    return "\n".join(lines + [f"| {title} | {' | '.join(row[title] for row in rows)} |" for title in rows[0]])


def plan(options: Options) -> dict:
    """Build the model and each optimizer on one rank of the mesh; returns the record, with a column per optimizer."""
    mesh = parse_mesh(options.mesh)
    for name in ("gpu_tflops", "efficiency", "link_gbs"):
        most = 1 if name == "efficiency" else sys.float_info.max
        if not 0 < getattr(options, name) <= most:
            wanted = "above 0 and at most 1" if most == 1 else "above 0 and finite"
            raise UserError(f"--{name.replace('_', '-')} must be {wanted}; got {getattr(options, name)}")
    columns = {}
    with fake_group(mesh.ranks, options.rank):
        model = build_model(options.model, mesh).to(getattr(torch, options.param_dtype))
        parameters = sum(param.numel() for param in model.parameters())
        process_group = distribute(model, mesh)
        for name in options.optimizers:
            extra = {}
            # AdamW's kernel takes states of the weights' dtype; int8 is decoded for it.
            takes = "state_dtype" in RULES[name].defaults and (name != "adamw" or options.state_dtype == "int8")
            if options.state_dtype and takes:
                extra["state_dtype"] = options.state_dtype
            if options.to_owner_dtype and "to_owner_dtype" in RULES[name].defaults:
                extra["to_owner_dtype"] = options.to_owner_dtype
            optimizer = build_optimizer(model, name, lr=1e-3, process_group=process_group, **extra)
            if mesh.word == "owners" and RULES[name].direct and mesh.ranks > 1:
                optimizer.keep_at_owners()  # the others' gradients are all-reduced
            if options.print_plan:
                print(f"{name}\n{optimizer.plan}\n")
            columns[name] = planned(optimizer, mesh, getattr(torch, options.grad_dtype))
            columns[name]["seconds"] = seconds(columns[name], options)
    return {"parameters": parameters, "ranks": mesh.ranks, "columns": columns}


NOTES = """
GB = 1e9 bytes, held by rank {rank}, without temporary tensors.
MB = 1e6 bytes of the busiest rank and, in brackets, the mean over ranks, without averaging the gradient. That takes
(S - 1) x a rank's gradients over S shards, and 2 (R - 1) / R x over R replicas; to owners half of that, a chain of the
ranks, of which the busiest counts. FSDP's gathering of weights and tensor
parallelism's of activations are not included.
ms of the busiest rank at {efficiency:.0%} of {gpu_tflops:g} TFLOP/s, and {link_gbs:g} GB/s into a rank and out of it.
A step takes between the maximum of the two, if they overlap, and their sum, plus the elementwise work."""


def main() -> None:
    options = parse_options(Options, "python -m scripts.plan", __doc__)
    found = plan(options)
    print(f"{options.model}, {found['parameters']:,} parameters on {options.mesh}\n")
    print(table(found["columns"]))
    print(NOTES.format(**asdict(options)))
    if options.record:
        write_json(options.record, {**machine(), "options": to_dict(options), **found}, indent=2)


if __name__ == "__main__":
    main_guard(main)
