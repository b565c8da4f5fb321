"""torchtitan's checkpoints: finite values only, verified by a manifest, and read without executing code.

A run's folder has checkpoint/step-N/: torchtitan's files, and manifest.json with their SHA-256, written last. A resumed
run loads the newest undamaged checkpoint, and warns about those it skips.
"""

import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.tensor import DTensor
from torchtitan.components import checkpoint as titan
from torchtitan.config import Checkpoint

from common import Diverged, UserError, one_line, warn
from common.checkpoint import cause
from common.launch import on_main, process_rank
from common.manifest import MANIFEST, Damaged, read_manifest, verify_manifest, write_manifest
from common.runlog import write_end
from common.tensor_reader import TensorReader, refuse_unlisted

FOLDER = "checkpoint"  # torchtitan's name, below a run's folder


class Checkpointer(titan.CheckpointManager):
    """torchtitan's manager, except that it saves only finite tensors and loads only undamaged checkpoints."""

    def __init__(self, *, checkpoint_config: Checkpoint, **parts: Any):
        self._checksums, self._proof = checkpoint_config.checksums, Future()
        self._proof.set_result(None)
        self._thread, self._keep = ThreadPoolExecutor(1, "manifest"), checkpoint_config.keep_latest_k
        # torchtitan would remove older ones before the new one is on disk, and would count later, skipped ones.
        super().__init__(checkpoint_config=replace(checkpoint_config, keep_latest_k=0), **parts)

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save if due; raises Diverged, on all ranks, if weights or optimizer state are not finite."""
        if not self._should_save(curr_step, last_step):
            return
        self._refuse_not_finite(curr_step)
        folder = Path(self._create_checkpoint_id(curr_step))
        self._async_wait()
        on_main(lambda: shutil.rmtree(folder, ignore_errors=True))  # a damaged one, or of a layout with more files
        super().save(curr_step, last_step)
        pending = None if last_step else self.save_future
        if process_rank() == 0:
            self._proof = self._thread.submit(self._prove, folder, curr_step, pending)
        if pending is None:
            self._proof.result()

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """Save as torchtitan does; raises OSError with the cause if that fails."""
        try:
            return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)
        except CheckpointException as error:
            raise OSError(_not_saved(checkpoint_id, error)) from error

    def _prove(self, folder: Path, step: int, pending: Future | None) -> None:
        if pending is not None:
            pending.result()  # an asynchronous save is on disk only now
        write_manifest(folder, {"step": step}, self._checksums)
        remove_others(folder.parent, step, self._keep)

    def _async_wait(self) -> None:
        try:
            super()._async_wait()
            self._proof.result()
        except CheckpointException as error:
            raise OSError(_not_saved(self.folder, error)) from error

    def _refuse_not_finite(self, step: int) -> None:
        tensors = [param for part in self.states[titan.MODEL].model for param in part.parameters()]
        for optimizer in self.states[titan.OPTIMIZER]:
            tensors += [value for state in optimizer.state.values() for value in state.values()]
        wrong = sum(not is_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor))
        count = torch.tensor(float(wrong), device=tensors[0].device)
        dist.all_reduce(count)
        if not count:
            return
        run = Path(self.folder).parent
        if process_rank() == 0:
            write_end(run, step, {})
        raise Diverged(
            f"training needs finite weights and momentum, and after step {step} they are not: nothing was saved, "
            "earlier checkpoints are untouched; start over with a lower learning rate, or from earlier weights: "
            f"--checkpoint.initial_load_path {run}/{FOLDER}/step-N"
        )

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Load the checkpoint of `step`, or the newest complete one (-1); without any, the initial weights."""
        if not self.enable:
            return False
        found = on_main(lambda: find_step(Path(self.folder), step))
        if found is None:  # torchtitan loads no initial weights if the folder exists
            on_main(lambda: shutil.rmtree(self.folder, ignore_errors=True))
        return super().load(-1 if found is None else found)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Read a checkpoint into `state_dict`, as torchtitan does, but without executing code."""
        if from_hf:
            return super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        try:
            dcp.load(state_dict, storage_reader=TensorReader(checkpoint_id), planner=PlainPlanner())
        except CheckpointException as error:  # of torch, on all ranks
            raise UserError(
                f"checkpoint {checkpoint_id} must be of this model and optimizer, and of plain values; it cannot be "
                f"loaded: {cause(error)[:300]}"
            ) from error
        self.states[titan.MODEL].load_state_dict(state_dict)

    def close(self) -> None:
        """Wait until the last checkpoint is on disk, and stop the threads."""
        try:
            if getattr(self, "save_future", None):
                self._async_wait()
            self._proof.result()
        finally:
            self._thread.shutdown()
            super().close()


def _not_saved(path: str, error: CheckpointException) -> str:
    return (
        f"a checkpoint cannot be written to {path}: {cause(error)[:300]}; earlier ones are untouched: fix that, and "
        "the same command with --job.resume continues from them"
    )


class PlainPlanner(DefaultLoadPlanner):
    """torch's planner, except that entries other than tensors may only be numbers, strings and collections of them."""

    def load_bytes(self, read_item: dcp.ReadItem, value: BytesIO) -> None:
        """Read an entry with weights_only; torch would unpickle it without restriction."""
        checked = BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def is_finite(tensor: Tensor) -> bool:
    """Return whether this rank's shard of a tensor has neither inf nor NaN."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


# ---- Finding


def find_step(folder: Path, step: int = -1) -> int | None:
    """Return the newest step (or `step`) with an undamaged checkpoint; None if no checkpoint was finished.

    Damaged ones are skipped with a warning. Raises UserError if all are damaged, or `step` is damaged or missing.
    """
    wanted = {number: path for number, path in numbered(folder).items() if step in (-1, number)}
    if step != -1 and step not in wanted:
        raise UserError(f"--checkpoint.load_step {step} must be a checkpoint of this run; {folder} has no step-{step}")
    damaged = []
    for number, path in sorted(wanted.items(), reverse=True):
        try:
            verify(path)
        except Damaged as error:
            damaged.append(f"{path}: {error}")
            warn(f"checkpoint {path} is damaged and skipped: {error}")
        else:
            return number
    if damaged:
        raise UserError(
            f"a checkpoint must be undamaged; none in {folder} is ({'; '.join(damaged)[:300]}): restore one, or start "
            "without --job.resume"
        )
    return None


def numbered(folder: Path) -> dict[int, Path]:
    """Return a folder's checkpoints by step, without those that a killed run did not finish."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    ended = (".metadata", MANIFEST)  # written last; normally both exist, but one may be lost
    return {int(match[1]): path for match, path in matches if match and any((path / name).is_file() for name in ended)}


def remove_others(folder: Path, step: int, keep: int) -> None:
    """Remove all checkpoints after `step`, and all but the last `keep` up to it; 0 keeps those."""
    paths = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    earlier = sorted(number for number in paths if number <= step)
    for number in [number for number in paths if number > step] + (earlier[:-keep] if keep else []):
        shutil.rmtree(paths[number], ignore_errors=True)


def newest_checkpoint(run: Path) -> Path | None:
    """Return a run's newest checkpoint whose files have the recorded sizes; None without any."""
    for _, path in sorted(numbered(run / FOLDER).items(), reverse=True):
        try:
            verify(path, contents=False)
            return path
        except Damaged as error:
            warn(f"checkpoint {path} is damaged and skipped: {error}")
    return None


def verify(path: Path, contents: bool = True) -> None:
    """Compare a checkpoint's files with its manifest, by SHA-256 or (`contents` false) by size; raises Damaged.

    One without a manifest (of another program, or of a killed run) must have the bytes that its metadata names.
    """
    try:
        if (path / MANIFEST).is_file():
            manifest = verify_manifest(path) if contents else read_manifest(path)
            if path.name.startswith("step-") and path.name != f"step-{manifest.get('step')}":  # a renamed copy
                raise Damaged(f"its {MANIFEST} is of step {manifest.get('step')}")
            refuse_unlisted(TensorReader(path).read_metadata(), manifest["files"])
            return
        for each in TensorReader(path).read_metadata().storage_data.values():
            found, needed = (path / each.relative_path).stat().st_size, each.offset + each.length
            if found < needed:
                raise Damaged(f"{each.relative_path} has {found} bytes, and its metadata needs {needed}")
    except OSError as error:
        raise Damaged(f"a file cannot be read: {one_line(error)}") from error
    if contents:
        warn(f"checkpoint {path} has no {MANIFEST}: only its sizes were compared")
