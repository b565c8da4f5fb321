"""Draw the spectrum and size of the step of each update rule for one gradient.

    python -m scripts.spectra --out images/spectra.png

One gradient of 96 x 64 entries, with random singular vectors and singular values that fall as 1 / i; each rule takes
one step from it, without momentum, at a learning rate of 1. Top: the singular values of the steps, over their root
mean square. Bottom: the Frobenius norm of the step against the scale of the gradient.
"""

from dataclasses import dataclass
from pathlib import Path

from common.guard import main_guard
from common.options import parse_options


@dataclass(frozen=True)
class Options:
    """Draws the spectra and sizes of the rules' steps."""

    out: Path = Path("images/spectra.png")
    """The figure; a JSON with its numbers is written beside it."""


if __name__ == "__main__":  # --help and errors before the imports below, which take seconds
    main_guard(lambda: parse_options(Options, "python -m scripts.spectra", __doc__))

import torch
from torch import Tensor

from common.figure import INK, label_ends, new_figure, save, style_of
from common.whole import write_json
from optimizers import Curvature, Muon, NorMuon, OLion, PolarGrad, Signum

SHAPE = (96, 64)
SCALES = [10.0**power for power in range(-4, 3)]
RULES = {
    "Curvature, p = 2.5": (Curvature, {"power": 2.5, "iterations": 0, "momentum": 0.0}),
    "Curvature, p = 4": (Curvature, {"power": 4.0, "iterations": 0, "momentum": 0.0}),
    "PolarGrad": (PolarGrad, {"momentum": 0.0, "inner_steps": 0}),
    "Muon": (Muon, {"momentum": 0.0, "adjust_lr_fn": "match_rms_adamw"}),
    "NorMuon": (NorMuon, {"betas": (0.0, 0.95)}),
    "OLion": (OLion, {"betas": (0.0, 0.0)}),
    "Signum": (Signum, {"momentum": 0.0, "scale": 0.2}),
}
DASHES = {"Curvature, p = 2.5": (0, (2, 1)), "PolarGrad": (0, (6, 2))}


def gradient() -> Tensor:
    """Return the gradient, of Frobenius norm 1."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, SHAPE[1], generator=generator, dtype=torch.float64) for size in SHAPE)
    sigma = 1 / torch.arange(1, SHAPE[1] + 1, dtype=torch.float64)
    return (torch.linalg.qr(left).Q * sigma / sigma.norm()) @ torch.linalg.qr(right).Q.T


def step_of(name: str, grad: Tensor) -> Tensor:
    """Return the step of a rule from zero, at a learning rate of 1 without decay."""
    constructor, options = RULES[name]
    weight = torch.zeros_like(grad, requires_grad=True)
    weight.grad = grad
    constructor([weight], lr=1.0, weight_decay=0.0, **options).step()
    return weight.detach()


def measured() -> dict[str, dict[str, list[float]]]:
    """Return, by rule, the singular values of its step over their root mean square, and its norms over `SCALES`."""
    grad = gradient()
    found = {"gradient": {"spectrum": _relative(grad), "norms": SCALES}}
    for name in RULES:
        norms = [step_of(name, scale * grad).norm().item() for scale in SCALES]
        found[name] = {"spectrum": _relative(step_of(name, grad)), "norms": norms}
    return found


def _relative(step: Tensor) -> list[float]:
    values = torch.linalg.svdvals(step)
    return (values / values.square().mean().sqrt()).tolist()


def draw(record: dict[str, dict[str, list[float]]], out: Path) -> None:
    figure, (above, below) = new_figure(
        "What each rule makes of a gradient: spectrum and size", "one step of each rule, no momentum", rows=2
    )
    ends_above, ends_below = [], []
    for name, found in record.items():
        style = style_of(name.split(",")[0])
        line = {
            "color": style.color,
            "linewidth": style.width,
            "linestyle": DASHES.get(name, "-" if name in RULES else ":"),
        }
        index = range(1, len(found["spectrum"]) + 1)
        above.plot(index, found["spectrum"], **line, marker=style.marker, markevery=9, markersize=4)
        below.plot(SCALES, found["norms"], **line, marker=style.marker, markersize=4)
        ends_above.append((index[-1], found["spectrum"][-1], name, name.split(",")[0]))
        if name in ("gradient", "PolarGrad", "Muon"):
            label = "Muon and the others" if name == "Muon" else name
            ends_below.append((SCALES[-1], found["norms"][-1], label, name))
    above.set(
        yscale="log", xlabel="singular value, from the largest", ylabel="singular value over its RMS", ylim=(0.02, 10)
    )
    below.set(xscale="log", yscale="log", xlabel="norm of the gradient", ylabel="norm of the step")
    figure.subplots_adjust(left=0.11)
    for panel, ends in ((above, ends_above), (below, ends_below)):
        panel.xaxis.label.set_color(INK)
        label_ends(panel, ends)
    save(figure, out)


def rounded(record: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Round to six digits."""
    return {name: {key: [float(f"{x:.6g}") for x in xs] for key, xs in found.items()} for name, found in record.items()}


def main() -> None:
    out = parse_options(Options, "python -m scripts.spectra", __doc__).out.with_suffix(".png")
    record = measured()
    draw(record, out)
    write_json(out.with_suffix(".json"), rounded(record))
    print(f"the spectra: {out}, its numbers: {out.with_suffix('.json')}")


if __name__ == "__main__":
    main_guard(main)
