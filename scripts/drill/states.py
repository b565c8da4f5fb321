"""Digests of the checkpoints of any experiment's run."""

import hashlib
from pathlib import Path

from scripts.drill.harness import forked
from scripts.drill.runs import checkpoints


def newest_whole(run: Path) -> int:
    """Return the step of the newest undamaged checkpoint, 0 without any."""
    from common.manifest import Damaged, verify_manifest

    for step, path in sorted(numbered(run).items(), reverse=True):
        try:
            verify_manifest(path)
            return step
        except Damaged:
            continue
    return 0


def numbered(run: Path) -> dict[int, Path]:
    """Return a run's checkpoints by step."""
    return {int(path.name[5:]): path for path in checkpoints(run).glob("step-*")}


def digest(run: Path, step: int) -> str:
    """Return the SHA-256 of all tensors of a run's checkpoint, and of their names."""
    outcome = forked(lambda: print(digest_of(numbered(run)[step])))
    if outcome.status != 0:
        raise RuntimeError(f"{run}, step {step} cannot be read: {outcome.err[-500:]}")
    return outcome.out.strip()


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of all tensors in a folder of torch.distributed.checkpoint, and of their names."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from common.tensor_reader import TensorReader

    saved = TensorReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata) and "random" not in name
    }
    dcp.load(tensors, storage_reader=TensorReader(folder), no_dist=True)
    return tensors_digest(tensors)


def tensors_digest(tensors: dict) -> str:
    """Return the SHA-256 of tensors by name."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
