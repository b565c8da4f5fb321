"""Checkpoints of model, optimizer, step and random states, which are complete or absent.

    save(run / "checkpoints", step, model, optimizer, extra={"config": to_dict(config)})
    state = load(run / "checkpoints", model, optimizer)    # {"step": ..., "config": ...}, or None

The tensors are written by torch.distributed.checkpoint under the model's own names, each rank its shards, so a run may
go on with another number of ranks and another layout (one process, DDP, FSDP2, HSDP). Under a process group every rank
must call `save` and `load`, and all must see one file system. Folders are kept whole by checkpoint_folder.py, and
compared with their checksums by manifest.py. Nothing is executed on reading: tensors are read as such, everything else
is JSON in the manifest.
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

from common import UserError, one_line, warn
from common.checkpoint_folder import finish, free_space, prepare, remove_old, survey
from common.group_options import decode, encode
from common.launch import on_main, process_rank
from common.manifest import verify_manifest
from common.random_states import random_states, set_random_states
from common.tensor_reader import TensorReader, refuse_objects, refuse_unlisted

FAILURES = (Exception, CheckpointException)  # torch's CheckpointException is no Exception
Groups = list[dict[str, Any]]  # an optimizer's param groups, with names as "params"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that was not written, or that does not fit the model or optimizer; its message is one line."""


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

    `extra` is anything that JSON can hold. Checkpoints of later steps are removed too: they belong to a run that was
    left behind when this one started over, or resumed from before them. `checksums`: hash every file, which rank 0
    does for all, at about 1 GB/s per core.

    Raises CheckpointError when it cannot be written (a full disk); nothing saved before is touched then. Raises
    ValueError for keep < 1, TypeError for an `extra` or an option of the optimizer that JSON cannot hold.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    folder = Path(folder)
    tensors, groups = _collect(model, optimizer)
    contents = {"tensors": _shapes(tensors), "groups": encode(groups), "extra": extra}
    try:
        json.dumps(contents)
    except (TypeError, ValueError) as error:  # before anything is written
        raise type(error)(f"extra and the optimizer's options must be what JSON can hold: {error}") from None
    state = {**tensors, **_random_tensors()}
    partial = None
    try:
        partial = on_main(lambda: prepare(folder, step))
        with _no_warning():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(partial), no_dist=not dist.is_initialized())
        on_main(lambda: _refuse_missing(partial))
        final = on_main(lambda: finish(partial, step, contents, checksums))
    except FAILURES as error:
        reason = f"{_cause(error)} ({free_space(folder)})"
        if partial is not None:
            on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(
            f"the checkpoint of step {step} was not saved in {folder}: {reason}; "
            f"the ones before are untouched: {_remedy(error)}, and resume"
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
    """Restore the newest whole checkpoint and the random states; returns {"step": step, **extra}, or None without one.

    A damaged checkpoint is passed over with a warning. Everything is checked, and read into copies, before the first
    tensor is changed. The optimizer's hyperparameters become those of the checkpoint, as in torch; its state
    keeps the dtype it was built with. A rank that the saving run did not have keeps its own random state. `checksums`:
    hash every file before it is read, and compare. `step`: take the checkpoint of this step alone.

    Raises CheckpointError, and changes nothing, when the checkpoint is of another model or optimizer (naming the
    first three differences), or when there are checkpoints but none can be read.
    """
    whole, damaged = on_main(lambda: survey(Path(folder)))
    had_state = optimizer is None or bool(optimizer.state)
    whole = [(path, manifest) for path, manifest in whole if step in (None, manifest["step"])]
    for path, manifest in whole:
        live, groups = _collect(model, optimizer, make_state=any(map(_is_optimizer_key, manifest["tensors"])))
        try:
            on_main(lambda path=path: verify_manifest(path, checksums) and None)  # the manifest need not be sent
            _refuse_mismatch(path, manifest, live, groups)
            saved_groups = decode(manifest["groups"])
            staged, random_tensors = _read(path, manifest, live)
        except FAILURES as error:
            if optimizer is not None and not had_state:
                optimizer.state.clear()
            if isinstance(error, CheckpointError):
                raise
            reason = _cause(error)
            damaged.append(f"{path}: {reason}")
            on_main(lambda path=path, reason=reason: warn(f"checkpoint {path} is damaged and passed over: {reason}"))
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
    """Return {"step": step, **extra} of the newest whole checkpoint without reading a tensor, or None without one."""
    whole, _ = survey(Path(folder))
    return {"step": whole[0][1]["step"], **whole[0][1]["extra"]} if whole else None


# --- contents: tensors "model.<name>", "optimizer.<name>.<buffer>", "random.<rank>.<generator>"; groups in the manifest


def _collect(
    model: nn.Module, optimizer: Optimizer | None, make_state: bool = False
) -> tuple[dict[str, Tensor], Groups]:
    """Return the live tensors by key, and the optimizer's groups.

    torch makes the state of an optimizer that has none by a step that leaves the weights alone, but that AdamW
    counts. That state is kept only where a checkpoint is about to overwrite it (`make_state`).
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
            raise CheckpointError(f"only tensors can be saved, and {key} is a {type(tensor).__name__}")
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
    """Raise CheckpointError where the checkpoint differs from the live model, or from the optimizer if there is one."""
    saved, here = manifest["tensors"], _shapes(live)
    _refuse_difference(path, "model", _without_optimizer(saved), _without_optimizer(here))
    if groups:
        # The rules first: another rule says more than the other state that follows from it.
        _refuse_difference(path, "optimizer", _rules(manifest["groups"]), _rules(groups))
        _refuse_difference(path, "optimizer", saved, here)
        if _layout(manifest["groups"]) != _layout(groups):
            raise CheckpointError(f"checkpoint {path} has other param groups; build those that it was saved with")


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
    # Read once for all: a failure on one rank alone would leave the others waiting for it.
    metadata = on_main(reader.read_metadata)
    refuse_objects(metadata.state_dict_metadata, metadata)
    refuse_unlisted(metadata, manifest["files"])
    random_tensors = {key: state for key, state in _random_tensors().items() if key in metadata.state_dict_metadata}
    with _no_warning():
        dcp.load(staged | random_tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return staged, {key.removeprefix(_random_prefix()): state for key, state in random_tensors.items()}


def _refuse_missing(partial: Path) -> None:
    """Raise OSError where a rank on another machine wrote its part to a disk of its own."""
    for item in TensorReader(partial).read_metadata().storage_data.values():
        if not (partial / item.relative_path).is_file():
            raise OSError(f"another rank's {item.relative_path} is not there: all ranks must share one file system")


def _copy(tensor: Tensor) -> Tensor:
    """Copy into host memory, which is larger; a shard, which is small, stays on the device that its mesh is of."""
    return tensor.clone() if isinstance(tensor, DTensor) else tensor.to("cpu", copy=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cause(error: BaseException) -> str:
    return one_line(_first_error(error))


def _first_error(error: BaseException) -> BaseException:
    """Return the first failure: torch hides a full disk behind an assertion about positions in its file."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while error.__context__ is not None and not isinstance(error, OSError | UserError):
        error = error.__context__
    return error


def _remedy(error: BaseException) -> str:
    full = getattr(_first_error(error), "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "make room, or name another folder" if full else "mend that, or name another folder"


@contextlib.contextmanager
def _no_warning() -> Iterator[None]:
    """Silence torch's remark that there is no process group, which is how a single process runs here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
