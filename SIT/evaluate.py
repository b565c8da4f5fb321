"""Measure how good a run's samples are.

    python -m SIT.evaluate runs/sit/digits                       # every run of digits below: a table and a picture
    python -m SIT.evaluate samples.npz --reference images/       # FID, by torch-fidelity (pip install torch-fidelity)

Digits: 1,000 are drawn from each run, without guidance. A judge, a network that was trained apart, says which share is
recognised as the class asked for, and gives the features in which the Frechet distance to the training digits is
taken. The same measures of the validation digits stand beside them: no model needs to be better.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from common import UserError, launch
from common.figure import markdown, style_of
from SIT.data import Pixels, digits
from SIT.digits import FOLDER, JUDGE_FILE, DigitsCNN, load_digits_cnn
from SIT.sample import Sampler, draw, labels_of, load_run, open_decoder, picture

MEASURES = "evaluation.json"


@dataclass(frozen=True)
class Options:
    samples: tyro.conf.Positional[tuple[Path, ...]]
    """Runs, or folders of runs, of digits; or one .npz that SIT.sample wrote."""
    reference: Path | None = None
    """Of a .npz: a folder of images, or another .npz, that FID compares with."""
    count: int = 1000
    """Digits that are drawn."""
    steps: int = 50
    """Steps of Heun's method."""
    out: Path = Path("images/sit_digits_samples.png")
    """Picture of each run's first digits."""


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two sets of features (n, D) and (m, D), seen as Gaussians, in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al., arXiv 1706.08500.
    """
    first, second = first.double(), second.double()
    covariances = first.T.cov(), second.T.cov()
    # The eigenvalues of C1 C2 are those of a positive semi-definite matrix; rounding may leave them below zero.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    traces = covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()
    return ((first.mean(0) - second.mean(0)).square().sum() + traces).item()


@torch.no_grad()
def measure(images: Tensor, labels: Tensor, judge: DigitsCNN, reference: Pixels) -> dict[str, float]:
    """Return the share of images (n, 1, 8, 8) recognised as their labels (n,), and the Frechet distance."""
    recognised = (judge(images).argmax(1) == labels).double().mean().item()
    return {"recognised": recognised, "frechet": frechet(judge.features(images), judge.features(reference.images))}


def draw_digits(run: Path, options: Options) -> tuple[Tensor, Tensor, dict]:
    """Draw a run's digits; returns images (n, 1, 8, 8), the labels asked for (n,) and the run's config."""
    device = torch.device("cpu")  # they are small
    model, settings = load_run(run, device)
    if settings["data"]["kind"] != "digits":
        raise UserError(f"{run} is no run of digits; draw its images with SIT.sample --npz, and give that file")
    decode = open_decoder("digits", "", device)
    parts = []
    for start in range(0, options.count, 250):
        numbers = list(range(start, min(start + 250, options.count)))
        parts.append(decode(draw(model, numbers, Sampler(options.steps), settings["objective"], 0, device)))
    return torch.cat(parts), labels_of(list(range(options.count)), model.config.n_class), settings


def evaluate_digits(options: Options) -> str:
    """Measure all runs; writes each one's evaluation.json and the picture, and returns the table."""
    runs = sorted({path.parent for folder in options.samples for path in folder.rglob("config.json")})
    runs = [run for run in runs if (run / "checkpoints").is_dir() and not run.parent.name.endswith(".old")]
    if not runs:
        raise UserError(f"need the folders of runs with checkpoints; {options.samples[0]} holds none")
    splits, judge = digits(), load_digits_cnn(FOLDER / JUDGE_FILE)
    rows, tiles = [], []
    for run in tqdm(runs, desc="evaluating", unit="run"):
        images, labels, settings = draw_digits(run, options)
        measures = measure(images, labels, judge, splits["train"])
        (run / MEASURES).write_text(json.dumps({**measures, "count": options.count, "steps": options.steps}) + "\n")
        name = style_of(settings["optimizer"]["name"]).label
        rows.append(
            (measures["frechet"], [name, run.name, f"{100 * measures['recognised']:.1f}", f"{measures['frechet']:.2f}"])
        )
        tiles.append(images[:30])
    real = measure(splits["val"].images, splits["val"].labels, judge, splits["train"])
    rows.append((-1, ["validation digits", "", f"{100 * real['recognised']:.1f}", f"{real['frechet']:.2f}"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture(torch.cat(tiles), 30).save(options.out)
    header = ["optimizer", "run", "recognised, %", "Frechet distance"]
    return (
        markdown(header, [row for _, row in sorted(rows)])
        + f"\n\na row of digits for each of {', '.join(run.name for run in runs)}: {options.out}"
    )


def fid(samples: Path, reference: Path | None) -> float:
    """Return the FID of the images of a .npz by torch-fidelity."""
    if reference is None or not reference.exists():
        raise UserError(f"FID needs --reference, a folder of images or a .npz that exists; got {reference}")
    try:
        from torch_fidelity import calculate_metrics
    except ImportError as error:
        raise UserError(f"FID needs torch-fidelity ({error}): pip install torch-fidelity torchvision") from error
    inputs = [images_of(path) if path.suffix == ".npz" else str(path) for path in (samples, reference)]
    metrics = calculate_metrics(input1=inputs[0], input2=inputs[1], fid=True, cuda=torch.cuda.is_available())
    return metrics["frechet_inception_distance"]


def images_of(path: Path) -> torch.utils.data.Dataset:
    """Read a .npz (n, side, side, 3) as the data set of uint8 images (3, side, side) that torch-fidelity takes."""
    images = np.load(path)["arr_0"]
    return [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]


def main() -> None:
    options = tyro.cli(Options, prog="python -m SIT.evaluate", description=__doc__)
    if options.samples[0].suffix == ".npz":
        print(f"FID of {options.samples[0]}: {fid(options.samples[0], options.reference):.3f}")
    else:
        print(evaluate_digits(options))


if __name__ == "__main__":
    launch.main_guard(main)
