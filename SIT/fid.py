"""FID of sampled images by torch-fidelity: `python -m SIT.evaluate samples.npz --reference images/`."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import UserError, one_line
from SIT.latents import IMAGE_SUFFIXES


def fid(samples: Path, reference: Path | None) -> float:
    """Return the FID of the images of a .npz by torch-fidelity."""
    if reference is None or not reference.exists():
        raise UserError(f"FID needs --reference, an existing folder of images or .npz; got {reference}")
    if not (reference.is_dir() or reference.suffix == ".npz"):
        raise UserError(f"--reference must be a folder of images or a .npz, {reference} is neither: name another")
    try:
        from torch_fidelity import calculate_metrics
    except ImportError as error:
        raise UserError(f"FID needs torch-fidelity ({error}): pip install torch-fidelity torchvision") from error
    inputs = [ImagesOf(path) if path.suffix == ".npz" else str(path) for path in (samples, reference)]
    deep = {"samples_find_deep": True, "samples_find_ext": ",".join(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))}
    try:  # samples_find_deep: a folder has one per class
        metrics = calculate_metrics(
            input1=inputs[0], input2=inputs[1], fid=True, cuda=torch.cuda.is_available(), **deep
        )
    except ValueError as error:
        raise UserError(f"FID needs images that torch-fidelity can read, got none: {one_line(error)}") from error
    return metrics["frechet_inception_distance"]


class ImagesOf(Dataset):
    """The images of a .npz (n, side, side, 3) as a data set for torch-fidelity: uint8 (3, side, side) each."""

    def __init__(self, path: Path):
        try:
            content = np.load(path, allow_pickle=False)
            names, self.images = set(content), content["arr_0"]
        except Exception as error:  # numpy and zipfile can raise anything for a damaged file
            raise UserError(
                f"{path} must be a .npz of images, as SIT.sample --npz writes, is not ({one_line(error)[:200]}): name "
                "another file"
            ) from error
        if "mu" in names:
            raise UserError(
                f"{path} is ADM's reference, whose images are a tenth of those of its statistics, so that their FID "
                "differs; give a folder of images, or measure with ADM's evaluator"
            )
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            got = f"{self.images.shape} {self.images.dtype}"
            raise UserError(f"{path} must hold images (n, side, side, 3) uint8 as arr_0, got {got}: name another file")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index]).permute(2, 0, 1).contiguous()
