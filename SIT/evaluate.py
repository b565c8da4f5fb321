"""Measure how good a run's samples are.

    python -m SIT.evaluate runs/sit/digits                       # every run of digits below: a table and a picture
    python -m SIT.evaluate samples.npz --reference images/       # FID, by torch-fidelity (pip install torch-fidelity)

Digits: 1,000 are drawn from each run, without guidance. A judge, a network trained separately, gives the share that is
recognised as the class asked for, and gives the features in which the Frechet distance to the training digits is
taken. Beside these stand the losses of the run's last validation, and above them the validation digits' own measures:
no model needs to be better.
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
    """Of a .npz: a folder of images, or another .npz, that FID compares with."""
    count: int = 1000
    """Digits that are drawn."""
    steps: int = 50
    """Steps of Heun's method."""
    skip_latents: bool = False
    """Leave out runs that are not of digits, and do nothing where there are no others."""
    out: Path | None = None
    """Picture of each method's first digits; beside it, as JSON, the measures of every run. Default: samples.png in the
    first folder."""


def main() -> None:
    options = parse_options(Options, "python -m SIT.evaluate", __doc__)
    files = [path for path in options.samples if path.suffix == ".npz"]
    if not options.samples or (files and len(options.samples) > 1):
        named = ", ".join(map(str, options.samples)) or "nothing"
        raise UserError(f"need runs of digits, or one .npz, to measure; got {named}")
    if files:
        from SIT.fid import fid  # here: --help goes without torch and matplotlib, which take seconds to import

        print(f"FID of {files[0]}: {fid(files[0], options.reference):.3f}")
    else:
        from SIT.measures import evaluate_digits

        print(evaluate_digits(options))


if __name__ == "__main__":
    main_guard(main)
