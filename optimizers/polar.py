"""Orthogonalization: the polar factor U Vᵀ of each matrix of a stack, by Newton-Schulz iteration or by SVD.

One Newton-Schulz step maps every singular value s to a s + b s³ + c s⁵ and leaves the singular vectors alone.
With X (m, n), m <= n (a tall matrix is transposed), G = X Xᵀ and p(G) = a I + b G + c G², two forms do the same:

    plain   X <- p(G) X                                  two products with X per step
    gram    G <- p(G) G p(G),  Q <- Q p(G);  X <- Q X    m x m products only, X touched once at the end

Every m x m product here is of commuting symmetric matrices, so it is symmetric too and only its upper blocks are
computed (`symmetric.py`). The cheaper form is chosen by counting multiplications (`flops`).

Sources: Jordan et al., "Muon" (2024), for the iteration and its coefficients; Amsel et al., "The Polar Express",
arXiv 2505.16932, for one triple per step; Zhang, Amsel, Chen and Dao, "Gram Newton-Schulz" (2026), for the Gram form
and its restart. Blocked symmetric products and the restart lengths below are ours, measured.
"""

import math
from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .checks import BadValue, closest
from .qdwh import qdwh
from .symmetric import computed_share, symmetric_product

Triple = tuple[float, float, float]

JORDAN: Triple = (3.4445, -4.7750, 2.0315)

# Polar Express, lower bound 1e-3 on the singular values (Amsel et al., their published table). Every triple but the
# last is evaluated at s / 1.01, their margin against rounding above 1.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

CONVERGENT: Triple = (15 / 8, -10 / 8, 3 / 8)  # the Taylor quintic: fixed point 1, convergent from (0, 1]

COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": (JORDAN,),
    "convergent": (CONVERGENT,),
    "polar_express": (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS), CONVERGENT),
}
"""Coefficient sets by name; when there are more steps than triples, the last triple repeats."""

Form = Literal["auto", "plain", "gram", "qdwh", "svd"]
FORMS = get_args(Form)
_EXACT_FORMS = ("qdwh", "svd")  # computed in float32 or float64

# The Gram form restarts (forms G anew from X) before G's rounding error, the precision's eps grown by up to a² a
# step, reaches a limit; the first run bears more, as the spectrum of G is still small. Over nine spectra (Gaussian,
# decaying to 1e-6, low rank, rank one plus noise, all positive) these limits give bf16 runs of 3, 2 for Jordan's
# coefficients, which flip as many signs as the plain form, and 2, 1, 2 for Polar Express. Runs of 2, 3 flip up to
# twenty times more for Jordan's, and runs of 5 (Jordan) and 3, 2 (Polar Express) diverge.
_FIRST_LIMIT, _LATER_LIMIT = 1.2, 0.1


def orthogonalize(
    matrices: Tensor,
    ns_steps: int = 5,
    ns_coefficients: str | Sequence = "jordan",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    form: str = "auto",
) -> Tensor:
    """Return the (approximate) polar factor of each matrix of a stack.

    Args:
        matrices: (..., m, n), not written to.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: a name in `COEFFICIENTS`, one triple (a, b, c), or one triple per step.
        eps: floor of the Frobenius norm that each matrix is divided by, as in torch.optim.Muon (the paper adds it
            instead; the two differ by 1e-7 of the norm). A zero matrix stays zero.
        dtype: precision of the iteration and of the result; None is `default_dtype`.
        form: "plain", "gram", "auto" (the cheaper of the two), "qdwh" (accurate for ill-conditioned matrices, in
            float32 or float64; see `qdwh.py`) or "svd" (exact, slow: the oracle; rank-deficient directions stay zero).
            The last two take no steps or coefficients.

    Returns: (..., m, n) in `dtype`. Raises ValueError for an unknown name or form, or a wrong number of triples.

    Example:
        >>> q = orthogonalize(torch.randn(12, 768, 3072))
    """
    if not isinstance(matrices, Tensor):
        raise BadValue(f"matrices must be a tensor (..., m, n), got {type(matrices).__name__}")
    if not 0 <= eps < math.inf:
        raise BadValue(f"eps must be finite and 0 or more, got {eps!r}")
    if matrices.ndim < 2:
        raise BadValue(f"orthogonalize needs (..., m, n), got shape {tuple(matrices.shape)}; pass matrices")
    triples = steps_of(ns_coefficients, ns_steps)
    _check_form(form)
    dtype = dtype or default_dtype(matrices)
    *_, m, n = matrices.shape
    if form == "svd":
        return _svd(matrices).to(dtype)
    if form == "qdwh":
        return qdwh(matrices.reshape(-1, m, n), eps).reshape(matrices.shape).to(dtype)
    if form == "auto":
        plain, gram = (flops(m, n, ns_steps, each, triples, dtype, matrices.device) for each in ("plain", "gram"))
        form = "plain" if plain <= gram else "gram"

    wide = matrices.reshape(-1, m, n)  # (batch, m, n)
    wide = wide.mT if m > n else wide
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True, dtype=_at_least_float32(wide.dtype))
    x = torch.div(wide, norm.clamp(min=eps), out=wide.new_empty(wide.shape, dtype=dtype))  # rounded once, to `dtype`
    x = _plain(x, triples) if form == "plain" else _gram(x, triples)
    return (x.mT if m > n else x).reshape(matrices.shape)


def default_dtype(tensor: Tensor) -> torch.dtype:
    """bfloat16 on an accelerator that has it; elsewhere float32, or the tensor's float64.

    CPUs are mostly slower in bfloat16. float16 has too few exponents for the squares of small entries.
    """
    if tensor.device.type == "cpu" or not _has_bfloat16(tensor.device):
        return _at_least_float32(tensor.dtype)
    return torch.bfloat16


def _has_bfloat16(device: torch.device) -> bool:
    # "cuda" is also the device of dry runs, in builds without CUDA. A T4 only emulates bfloat16.
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_properties(device).major >= 8


def steps_of(ns_coefficients: str | Sequence, ns_steps: int) -> list[Triple]:
    """Return the triple (a, b, c) of each of `ns_steps` steps; raise ValueError if the two do not fit."""
    if not isinstance(ns_steps, int) or not 0 < ns_steps < 100:
        raise BadValue(f"ns_steps must be a whole number from 1 to 99, got {ns_steps!r}; 5 is usual")
    if isinstance(ns_coefficients, str):
        if ns_coefficients not in COEFFICIENTS:
            hint = closest(ns_coefficients, COEFFICIENTS)
            raise BadValue(f"ns_coefficients must be one of {', '.join(COEFFICIENTS)}; got {ns_coefficients!r}{hint}")
        triples = COEFFICIENTS[ns_coefficients]
        return [triples[min(i, len(triples) - 1)] for i in range(ns_steps)]
    rows = ns_coefficients if isinstance(ns_coefficients, tuple | list) else ()
    rows = [rows] if all(isinstance(entry, int | float) for entry in rows) else rows
    whole = all(
        isinstance(row, tuple | list) and len(row) == 3 and all(isinstance(c, Real) and isfinite(c) for c in row)
        for row in rows
    )
    if not whole or len(rows) not in (1, ns_steps):
        raise BadValue(
            f"ns_coefficients must be a name, one triple (a, b, c) or {ns_steps} triples (one per step), all finite; "
            f"got {ns_coefficients!r}"
        )
    custom: list[Any] = [tuple(row) for row in rows]
    return custom * (ns_steps if len(custom) == 1 else 1)


def flops(
    m: int,
    n: int,
    ns_steps: int = 5,
    form: str = "auto",
    ns_coefficients: str | Sequence = "jordan",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Return the floating-point operations of orthogonalizing one (m, n) matrix: two per multiplication."""
    triples = steps_of(ns_coefficients, ns_steps)
    if form not in ("auto", "plain", "gram"):
        raise BadValue(f"operations are counted for the forms auto, plain and gram; got {form!r}")
    if form == "auto":
        return min(flops(m, n, ns_steps, each, triples, dtype, device) for each in ("plain", "gram"))
    m, n = min(m, n), max(m, n)
    share = computed_share(m, dtype, torch.device(device))  # of a symmetric product
    small, gram, apply = 2 * m**3 * share, 2 * m * m * n * share, 2 * m * m * n
    runs = [1] * ns_steps if form == "plain" else [len(run) for run in _runs(triples, dtype)]
    # A run of k steps: k squares of G, k - 1 updates of Q, 2 (k - 1) of G.
    return sum(gram + (4 * k - 3) * small + apply for k in runs)


def _plain(x: Tensor, triples: list[Triple]) -> Tensor:
    for a, b, c in triples:
        g = symmetric_product(x, x.mT)  # (batch, m, m)
        u = symmetric_product(g, g, add=g, beta=b, alpha=c)
        x = torch.baddbmm(x, u, x, beta=a)  # (batch, m, n)
    return x


def _gram(x: Tensor, triples: list[Triple]) -> Tensor:
    for run in _runs(triples, x.dtype):
        if len(run) == 1:
            x = _plain(x, run)
        else:
            x = _gram_factor(symmetric_product(x, x.mT), run) @ x  # (batch, m, n)
    return x


def _gram_factor(g: Tensor, triples: list[Triple]) -> Tensor:
    """Return the Q (batch, m, m) by which the steps multiply X, from G = X Xᵀ (batch, m, m).

    a stays outside the products (a Q + u Q, not (a I + u) Q): the small u then keeps its bits in half precision.
    """
    q = None
    for step, (a, b, c) in enumerate(triples):
        u = symmetric_product(g, g, add=g, beta=b, alpha=c)  # b G + c G²
        if step < len(triples) - 1:
            half = symmetric_product(g, u, add=g, beta=a)  # G p(G)
            g = symmetric_product(half, u, add=half, beta=a)  # G p(G)²
        if q is None:
            u.diagonal(dim1=-2, dim2=-1).add_(a)
            q = u
        else:
            q = symmetric_product(q, u, add=q, beta=a)
    return g if q is None else q  # there is a step


def _runs(triples: list[Triple], dtype: torch.dtype) -> list[list[Triple]]:
    """Split the steps into runs between restarts of the Gram form."""
    runs, limit = [], _FIRST_LIMIT
    while triples:
        length, error = 1, torch.finfo(dtype).eps * triples[0][0] ** 2
        while length < len(triples) and error <= limit:
            error *= triples[length][0] ** 2
            length += 1
        runs.append(triples[:length])
        triples, limit = triples[length:], _LATER_LIMIT
    return runs


def _svd(matrices: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrices.to(torch.float64), full_matrices=False)
    rank = s > s[..., :1] * max(matrices.shape[-2:]) * torch.finfo(_at_least_float32(matrices.dtype)).eps
    return (u * rank.unsqueeze(-2)) @ vh


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise BadValue(f"the form must be one of {', '.join(FORMS)}; got {form!r}{closest(form, FORMS)}")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def orthogonalize_group(stack: Tensor, group: dict) -> Tensor:
    """Orthogonalize (batch, m, n) by a param group's options."""
    return orthogonalize(
        stack, group["ns_steps"], group["ns_coefficients"], group["eps"], group["ns_dtype"], group["ns_form"]
    )


def _group_flops(m: int, n: int, group: dict, param: Tensor) -> float:
    form = "plain" if group["ns_form"] in _EXACT_FORMS else group["ns_form"]  # an estimate: owners need only the order
    dtype = group["ns_dtype"] or default_dtype(param)
    return flops(m, n, group["ns_steps"], form, group["ns_coefficients"], dtype, param.device)


def _group_rounds_to(group: dict, param: Tensor) -> torch.dtype | None:
    dtype = group["ns_dtype"] or default_dtype(param)
    return dtype if dtype == torch.bfloat16 and group["ns_form"] not in _EXACT_FORMS else None


def _check_options(group: dict) -> None:
    steps_of(group["ns_coefficients"], group["ns_steps"])
    _check_form(group["ns_form"])


POLAR: dict[str, Any] = {"check": _check_options, "flops": _group_flops, "rounds_to": _group_rounds_to}
"""The fields of an `UpdateRule` that follow from orthogonalizing by a param group's options."""
