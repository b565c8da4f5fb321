"""Converts a folder of classes to images of one size: `python -m SIT.prepare convert`."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from common import UserError, progress, warn
from common.config import at_least
from SIT.files import check_space, claim, map_in_groups, write_json, write_whole
from SIT.latents import IMAGE_SUFFIXES, IMAGES, LABELS, Corrupt, list_files, read_image, visible_files

if TYPE_CHECKING:
    from SIT.prepare import Convert


def convert(config: "Convert") -> Path:
    """Write DIR/images; returns it. Raises UserError for a source without class folders or with a corrupt image."""
    at_least(1, config, "size", "workers")
    folder = config.out / IMAGES
    if folder.resolve().is_relative_to(config.source.resolve()):  # the next run would read images/ as a class
        raise UserError(f"--out must be outside the source, {config.source}, got {config.out}: choose another")
    sources = list_files(config.source, IMAGE_SUFFIXES, "name a folder that exists")
    outside = sorted(file for file in sources.values() if "/" not in file)
    if outside or not sources:
        found = f"{outside[0]} outside of one" if outside else "none"
        raise UserError(f"{config.source} must hold a folder of images per class, got {found}: sort them into folders")
    classes = class_names(config.source, set(sources.values()))
    claim(folder, {"source": str(config.source.resolve()), "size": config.size})
    targets = {file: file.rpartition(".")[0] + ".png" for file in sorted(sources.values())}
    todo = [file for file in targets if not (folder / targets[file]).is_file()]
    check_space(folder, len(todo), 3 * config.size**2)

    def convert_one(file: str) -> str | None:
        try:
            image = centre_crop(read_image(config.source / file), config.size)
        except Corrupt as error:
            if config.on_corrupt == "fail":
                raise
            warn(f"{error}; skipped")
            return file
        write_whole(folder / targets[file], partial(save_png, image=image))
        return None

    outcomes = map_in_groups(convert_one, todo, config.workers)
    skipped = {file for file in progress(outcomes, desc="images", total=len(todo), unit=" images") if file}
    number_of = {name: number for number, name in enumerate(classes)}
    labels = [[targets[file], number_of[file.split("/")[0]]] for file in targets if file not in skipped]
    refuse_empty_classes(config.source, classes, [file for file, _ in labels])
    write_json(folder / LABELS, {"labels": labels, "classes": classes, "size": config.size})
    print(f"{folder}: {len(labels):,} images in {len(classes):,} classes, {len(skipped)} skipped")
    return folder


def class_names(source: Path, images: set[str]) -> list[str]:
    """Return the class folders of a source, in the order of their numbers; warn about files that are not images.

    Raises UserError for a folder without images: skipping it would change the numbers of later classes.
    """
    classes = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    others = sorted(set(visible_files(source)) - images)
    if others:
        kinds = Counter(Path(file).suffix.lower() or "no suffix" for file in others)
        counted = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common())
        warn(f"{source}: {len(others):,} files that are not images skipped ({counted}); the first is {others[0]}")
    refuse_empty_classes(source, classes, images)
    return classes


def refuse_empty_classes(source: Path, classes: list[str], images: Iterable[str]) -> None:
    """Raise UserError if a class has no image (a path below the source)."""
    empty = sorted(set(classes) - {file.split("/")[0] for file in images})
    if empty:
        raise UserError(
            f"each class folder of {source} must hold a readable image ({', '.join(sorted(IMAGE_SUFFIXES))}), "
            f"{len(empty)} of {len(classes)} hold none, the first is {empty[0]}: convert its files, or move it away"
        )


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side of (3, H, W) uint8 to `size` and crop the centre: (3, size, size).

    As in ADM (Dhariwal and Nichol 2021), SiT and REPA: halved by averaging while it stays large enough, then bicubic.
    """
    from PIL import Image

    picture = Image.fromarray(image.transpose(1, 2, 0))
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def save_png(opened: BinaryIO, image: np.ndarray) -> None:
    """Write (3, H, W) uint8 as an uncompressed PNG: read in a quarter of the time, with 1.5 times the disk space."""
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(opened, "png", compress_level=0)
