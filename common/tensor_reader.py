"""A reader of torch.distributed.checkpoint that executes no code: it reads tensors and their metadata only.

    dcp.load(tensors, storage_reader=TensorReader(folder))

torch unpickles a checkpoint's `.metadata` and its non-tensor entries (`planner.load_bytes`) without restriction, and a
pickle can call any function. Tensors are read with `weights_only`.
"""

import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from common import one_line
from common.manifest import Damaged

# The classes and functions of torch's metadata of tensors.
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"},  # Python 3.13's
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (dtype or name in _ALLOWED.get(module, ())):
            raise Damaged(f".metadata must be of torch.distributed.checkpoint, got {module}.{name}")
        return super().find_class(module, name)


class TensorReader(FileSystemReader):
    """Reads a checkpoint's tensors; raises Damaged for other or invalid metadata, before any tensor is read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, with plain file names inside the folder."""
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (Damaged, OSError):
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise Damaged(f".metadata cannot be read: {one_line(error)}") from error
        _refuse_misshapen(metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def refuse_objects(keys: Iterable[str], metadata: Metadata) -> None:
    """Raise Damaged if one of these keys holds anything but a tensor."""
    saved = metadata.state_dict_metadata
    if objects := [key for key in keys if isinstance(saved.get(key), BytesStorageMetadata)]:
        raise Damaged(f"{objects[0]} must be a tensor, and is a pickled object, which is not read")


def refuse_unlisted(metadata: Metadata, files: Iterable[str]) -> None:
    """Raise Damaged if tensors are in files other than these, which the manifest has not verified."""
    if unlisted := {each.relative_path for each in metadata.storage_data.values()} - set(files):
        raise Damaged(f".metadata reads {min(unlisted)}, which the manifest does not list")


def _refuse_misshapen(metadata: Any) -> None:
    storage = getattr(metadata, "storage_data", None)
    if not (
        isinstance(metadata, Metadata)
        and isinstance(metadata.state_dict_metadata, dict)
        and isinstance(storage, dict)
        and isinstance(metadata.storage_meta, StorageMeta | None)
        and all(isinstance(getattr(each, "relative_path", None), str) for each in storage.values())
    ):
        raise Damaged(f".metadata must hold a checkpoint's Metadata, got {type(metadata).__name__}")
    for each in storage.values():
        if "/" in each.relative_path or each.relative_path in ("", ".", ".."):
            raise Damaged(f".metadata must name files of its folder, got {each.relative_path!r}")
