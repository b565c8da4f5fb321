"""Measure the quality of a run's samples.

    python -m SIT.evaluate runs/sit/digits                       # every run of digits below: a table and a figure
    python -m SIT.evaluate samples.npz --reference images/       # FID, by torch-fidelity (pip install torch-fidelity)

Digits: 1,000 are drawn from each run, without guidance. A separately trained classifier, the judge, gives the fraction
that it recognises as the requested class, and the features of the Frechet distance to the training digits. The table
also has the losses of each run's last validation, and in its first row the measures of the validation digits
themselves: a model can hardly do better.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError
from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    samples: tyro.conf.Positional[tuple[Path, ...]]
    """Runs, or folders of runs, of digits; or one .npz that SIT.sample wrote."""
    reference: Path | None = None
    """Reference of a .npz for FID: a folder of images, or another .npz."""
    count: int = 1000
    """Digits to draw per run."""
    steps: int = 50
    """Steps of Heun's method."""
    skip_latents: bool = False
    """Ignore runs that are not of digits, also if there are no others."""
    out: Path | None = None
    """Figure of each method's first digits, with the measures of every run as JSON beside it. Default: samples.png in
    the first folder."""


def main() -> None:
    options = parse_options(Options, "python -m SIT.evaluate", __doc__)
    files = [path for path in options.samples if path.suffix == ".npz"]
    if not options.samples or (files and len(options.samples) > 1):
        named = ", ".join(map(str, options.samples)) or "nothing"
        raise UserError(f"need runs of digits, or one .npz, to measure; got {named}")
    if files:
        from SIT.fid import fid  # here: torch and matplotlib take seconds to import, and --help does not need them

        print(f"FID of {files[0]}: {fid(files[0], options.reference):.3f}")
    else:
        from SIT.measures import evaluate_digits

        print(evaluate_digits(options))


if __name__ == "__main__":
    main_guard(main)
