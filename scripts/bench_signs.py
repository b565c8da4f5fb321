"""Measures the speed of packing and unpacking signs, relative to copies of the same tensor.

    python -m scripts.bench_signs
    python -m scripts.bench_signs --entries 4194304 --dtypes bfloat16 --threads 1 --repeats 21
    python -m scripts.bench_signs --json signs.json

Every round runs each operation once, so that other load on the machine slows all of them equally. GB/s count the bytes
read and written, of the tensor and of its packed form. `clone` allocates its result, like packing and unpacking;
`copy_` writes to allocated memory. The last columns are times relative to `clone`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import tyro

from common import BadValue
from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    """Measures the speed of packing and unpacking signs, relative to copies of the same tensor."""

    entries: tuple[int, ...] = (2**24, 2**26)
    """Numbers of entries of the tensors."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16", "float64"], ...] = ("float32", "bfloat16")
    """Dtypes of the unpacked signs."""
    repeats: int = 9
    """Timed rounds."""
    threads: int | None = None
    """Number of torch's threads on a CPU. Default: torch's choice."""
    device: str = "auto"
    """Device to compute on, by torch's name; auto takes a GPU if there is one."""
    record: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Also write the numbers here."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.bench_signs", __doc__))

import torch

from common.runlog import machine
from common.whole import write_json
from optimizers.codec import SignCodec, negatives, unpack

COLUMNS = ("clone", "copy_", "pack", "unpack", "write", "read")


def operations(entries: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Callable, int]]:
    """Return (operation, bytes read and written) by column."""
    signs = torch.where(torch.rand(entries, device=device) < 0.5, -1.0, 1.0).to(dtype)
    target, packed = torch.ones_like(signs), negatives(signs)
    whole, bits = signs.nbytes, packed.nbytes
    codec, pieces, norms = SignCodec(), signs.view(1, 1, -1), torch.ones(1, 1, dtype=torch.float64, device=device)
    rows, _ = codec.write(pieces, norms)  # the planes of both kinds, and the positions of zeros
    return {
        "clone": (signs.clone, 2 * whole),
        "copy_": (lambda: target.copy_(signs), 2 * whole),
        "pack": (lambda: negatives(signs), whole + bits),
        "unpack": (lambda: unpack(packed, entries, dtype), whole + bits),
        "write": (lambda: codec.write(pieces, norms), whole + bits),
        "read": (lambda: codec.read(rows[0], entries, 1, dtype), whole + bits),
    }


def measure(timed: dict[str, tuple[Callable, int]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Return the median milliseconds and the GB/s of each operation over `repeats` rounds."""
    milliseconds = {name: [] for name in timed}
    for round_ in range(repeats + 1):
        for name, (operation, _) in timed.items():
            _finish(device)
            start = time.perf_counter()
            result = operation()
            _finish(device)
            taken = 1000 * (time.perf_counter() - start)
            del result  # every operation then finds the same free memory
            if round_:  # the first is a warm-up
                milliseconds[name].append(taken)
    return {
        name: {"median_ms": median(milliseconds[name]), "gb_s": size / median(milliseconds[name]) / 1e6}
        for name, (_, size) in timed.items()
    }


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    heads = [f"{name} GB/s" for name in COLUMNS] + [f"{name} / clone" for name in COLUMNS[2:]]
    lines = [f"| entries | dtype | {' | '.join(heads)} |", "|---:|---" + "|---:" * len(heads) + "|"]
    for row in rows:
        speeds = [f"{row[name]['gb_s']:.1f}" for name in COLUMNS]
        times = [f"{row[name]['median_ms'] / row['clone']['median_ms']:.2f}" for name in COLUMNS[2:]]
        lines.append(f"| {row['entries']:,} | {row['dtype']} | {' | '.join(speeds + times)} |")
    return "\n".join(lines)


def main() -> None:
    options = parse_options(Options, "python -m scripts.bench_signs", __doc__)
    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
    if options.repeats < 1 or min(options.entries) < 1:
        raise BadValue(f"repeats and entries must be 1 or more; got {options.repeats} and {options.entries}")
    if options.threads is not None:
        if options.threads < 1:
            raise BadValue(f"--threads must be 1 or more; got {options.threads}")
        torch.set_num_threads(options.threads)
    here, threads = machine(), torch.get_num_threads()
    where = here["machine"]["gpus"][0] if options.device.startswith("cuda") else here["machine"]["cpu"]
    print(f"{where}, {threads} threads, torch {torch.__version__}, median of {options.repeats} rounds\n")
    rows = []
    for entries in options.entries:
        for dtype in options.dtypes:
            timed = operations(entries, getattr(torch, dtype), options.device)
            rows.append({"entries": entries, "dtype": dtype, **measure(timed, options.repeats, options.device)})
    print(table(rows))
    if options.record:
        record = {**here, "device": options.device, "threads": threads, "repeats": options.repeats, "rows": rows}
        write_json(options.record, record, indent=2)


if __name__ == "__main__":
    main_guard(main)
