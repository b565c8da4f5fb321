"""Checkpoints of model, optimizer, step and random states; each is complete or absent.

    save(run / "checkpoints", step, model, optimizer, extra={"config": to_dict(config)})
    state = load(run / "checkpoints", model, optimizer)    # {"step": ..., "config": ...}, or None

torch.distributed.checkpoint writes the tensors under their names in the model, each rank its shards, so a run can be
resumed on another number of ranks and in another layout (one process, DDP, FSDP2, HSDP). Under a process group every
rank must call `save` and `load`, and all must share one file system. checkpoint_folder.py writes the folders
atomically, manifest.py verifies checksums. Reading executes no code: all but the tensors is JSON in the manifest.
"""

import contextlib
import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common import BadValue, UserError, one_line, warn
from common.checkpoint_folder import finish, free_space, prepare, remove_old, survey
from common.group_options import decode, encode
from common.launch import on_main, process_rank
from common.manifest import verify_manifest
from common.random_states import random_states, set_random_states
from common.tensor_reader import TensorReader, refuse_objects, refuse_unlisted

FAILURES = (Exception, CheckpointException)  # torch's CheckpointException is a BaseException
Groups = list[dict[str, Any]]  # an optimizer's param groups, with names as "params"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written, or does not match the model or optimizer; the message is one line."""


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    extra: dict[str, Any],
    keep: int = 2,
    checksums: bool = True,
) -> Path:
    """Write folder/step-<step>, then remove all but the last `keep` checkpoints; returns the new folder.

    `extra` must be JSON-serializable. Checkpoints of later steps are removed too: they are of an abandoned run, since
    this one restarted, or resumed before them. `checksums`: hash every file, on rank 0, at about 1 GB/s per core.

    Raises CheckpointError when it cannot be written (a full disk); earlier checkpoints are then untouched. Raises
    ValueError for keep < 1, TypeError for an `extra` or an optimizer's option that is not JSON-serializable.
    """
    if keep < 1:
        raise BadValue(f"keep must be at least 1 checkpoint, got {keep}")
    folder = Path(folder)
    tensors, groups = _collect(model, optimizer)
    contents = {"tensors": _shapes(tensors), "groups": encode(groups), "extra": extra}
    try:
        json.dumps(contents)
    except (TypeError, ValueError) as error:  # before anything is written
        raise type(error)(f"extra and the optimizer's options must be JSON-serializable: {error}") from None
    state = {**tensors, **_random_tensors()}
    partial = None
    try:
        partial = on_main(lambda: prepare(folder, step))
        with _no_warning():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(partial), no_dist=not dist.is_initialized())
        on_main(lambda: _refuse_missing(partial))
        final = on_main(lambda: finish(partial, step, contents, checksums))
    except FAILURES as error:
        reason = f"{cause(error)} ({free_space(folder)})"
        if partial is not None:
            on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(
            f"the checkpoint of step {step} was not saved in {folder}: {reason}; "
            f"earlier ones are untouched: {_remedy(error)}, and resume"
        ) from error
    on_main(lambda: remove_old(folder, step, keep))
    return final


@torch.no_grad()
def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    checksums: bool = True,
    step: int | None = None,
) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint with its random states; returns {"step": step, **extra}, None without one.

    A damaged checkpoint is skipped with a warning. Everything is checked and read into copies before the first tensor
    changes. The optimizer's hyperparameters are restored, as in torch; its state keeps the dtype it was built with. A
    rank that the saving run did not have keeps its random state. `checksums`: verify every file before it is read.
    `step`: load only the checkpoint of this step.

    Raises CheckpointError, and changes nothing, when the checkpoint is of another model or optimizer (naming the
    first three differences), or when there are checkpoints but none can be read.
    """
    whole, damaged = on_main(lambda: survey(Path(folder)))
    had_state = optimizer is None or bool(optimizer.state)
    whole = [(path, manifest) for path, manifest in whole if step in (None, manifest["step"])]
    for path, manifest in whole:
        live, groups = _collect(model, optimizer, make_state=any(map(_is_optimizer_key, manifest["tensors"])))
        try:
            on_main(lambda path=path: verify_manifest(path, checksums) and None)  # no broadcast of the manifest
            _refuse_mismatch(path, manifest, live, groups)
            saved_groups = decode(manifest["groups"])
            staged, random_tensors = _read(path, manifest, live)
        except FAILURES as error:
            if optimizer is not None and not had_state:
                optimizer.state.clear()
            if isinstance(error, CheckpointError):
                raise
            reason = cause(error)
            damaged.append(f"{path}: {reason}")
            on_main(lambda path=path, reason=reason: warn(f"checkpoint {path} is damaged and skipped: {reason}"))
            continue
        for key, tensor in live.items():
            _local(tensor).copy_(_local(staged[key]))
        if optimizer is not None:
            _restore_groups(optimizer, saved_groups)
        set_random_states(random_tensors)
        return {"step": manifest["step"], **manifest["extra"]}
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read ({damaged[0]}); restore one, or start without resuming"
        )
    return None


def read_extra(folder: str | Path) -> dict[str, Any] | None:
    """Return {"step": step, **extra} of the newest complete checkpoint, reading no tensor; None without one."""
    whole, _ = survey(Path(folder))
    return {"step": whole[0][1]["step"], **whole[0][1]["extra"]} if whole else None


# --- contents: tensors "model.<name>", "optimizer.<name>.<buffer>", "random.<rank>.<generator>"; groups in the manifest


def _collect(
    model: nn.Module, optimizer: Optimizer | None, make_state: bool = False
) -> tuple[dict[str, Tensor], Groups]:
    """Return the live tensors by key, and the optimizer's groups.

    torch creates missing optimizer state by a step that leaves the weights unchanged, but that AdamW counts. That
    state is kept only if a checkpoint is about to overwrite it (`make_state`).
    """
    tensors: dict[str, Any] = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    groups = []
    if optimizer is not None:
        had_state = bool(optimizer.state)
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
        if not had_state and not make_state:
            optimizer.state.clear()
            state["state"] = {}
        for name, buffers in state["state"].items():
            tensors |= {f"optimizer.{name}.{buffer}": tensor for buffer, tensor in buffers.items()}
        groups = [{"rule": type(optimizer).__name__, **group} for group in state["param_groups"]]
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{key} must be a tensor to be saved, got {type(tensor).__name__}")
    return tensors, groups


def _is_optimizer_key(key: str) -> bool:
    return key.startswith("optimizer.")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _layout(groups: Groups) -> Groups:
    return [{"rule": group["rule"], "params": group["params"]} for group in groups]


def _restore_groups(optimizer: Optimizer, saved_groups: Groups) -> None:
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key not in ("params", "rule")})


def _random_tensors() -> dict[str, Tensor]:
    return {f"{_random_prefix()}{generator}": state for generator, state in random_states().items()}


def _random_prefix() -> str:
    return f"random.{process_rank()}."


# --- checking and reading


def _refuse_mismatch(path: Path, manifest: dict[str, Any], live: dict[str, Tensor], groups: Groups) -> None:
    """Raise CheckpointError if the checkpoint differs from the live model, or from the optimizer if there is one."""
    saved, here = manifest["tensors"], _shapes(live)
    _refuse_difference(path, "model", _without_optimizer(saved), _without_optimizer(here))
    if groups:
        # Rules first: a different rule explains the differences of state.
        _refuse_difference(path, "optimizer", _rules(manifest["groups"]), _rules(groups))
        _refuse_difference(path, "optimizer", saved, here)
        if _layout(manifest["groups"]) != _layout(groups):
            raise CheckpointError(f"checkpoint {path} has other param groups; build those it was saved with")


def _without_optimizer(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    return {key: shape for key, shape in shapes.items() if not _is_optimizer_key(key)}


def _rules(groups: Groups) -> dict[str, str]:
    return {name: group["rule"] for group in groups for name in group["params"]}


def _refuse_difference(path: Path, part: str, saved: dict[str, Any], here: dict[str, Any]) -> None:
    different = [key for key in sorted(saved.keys() | here.keys()) if saved.get(key) != here.get(key)]
    if different:
        first = [f"{key} is {saved.get(key, 'absent')}, here {here.get(key, 'absent')}" for key in different[:3]]
        raise CheckpointError(
            f"checkpoint {path} is of another {part} ({len(different)} differences: {'; '.join(first)}); "
            f"build the {part} it was saved with, or use another folder"
        )


def _read(path: Path, manifest: dict[str, Any], live: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a checkpoint into copies of the live tensors, and this rank's random states by generator."""
    reader = TensorReader(path)
    staged = {key: _copy(tensor.detach()) for key, tensor in live.items()}
    # Read on rank 0 for all: a failure on one rank alone would leave the others waiting.
    metadata = on_main(reader.read_metadata)
    refuse_objects(metadata.state_dict_metadata, metadata)
    refuse_unlisted(metadata, manifest["files"])
    random_tensors = {key: state for key, state in _random_tensors().items() if key in metadata.state_dict_metadata}
    with _no_warning():
        dcp.load(staged | random_tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return staged, {key.removeprefix(_random_prefix()): state for key, state in random_tensors.items()}


def _refuse_missing(partial: Path) -> None:
    """Raise OSError if a rank on another machine wrote its shards to a local disk."""
    for item in TensorReader(partial).read_metadata().storage_data.values():
        if not (partial / item.relative_path).is_file():
            raise OSError(f"another rank's {item.relative_path} is missing: all ranks must share one file system")


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, which is larger; a DTensor, whose shard is small, stays on its mesh's device."""
    return tensor.clone() if isinstance(tensor, DTensor) else tensor.to("cpu", copy=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cause(error: BaseException) -> str:
    """Return the root cause of a failed save or load, in one line: torch's message has the tracebacks of all ranks."""
    return one_line(_first_error(error))


def _first_error(error: BaseException) -> BaseException:
    """Return the root cause: torch hides a full disk behind an assertion about file positions."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while error.__context__ is not None and not isinstance(error, OSError | UserError):
        error = error.__context__
    return error


def _remedy(error: BaseException) -> str:
    full = getattr(_first_error(error), "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free some space, or name another folder" if full else "fix that, or name another folder"


@contextlib.contextmanager
def _no_warning() -> Iterator[None]:
    """Silence torch's warning about a missing process group: a single process has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
