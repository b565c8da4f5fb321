"""The Triton kernel of `symmetric_product`: tiles on and below the diagonal, each also written mirrored.

Imported only if Triton is installed. One program per tile and matrix; products are accumulated in float32.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton is optional, and pyright does not know that a kernel takes its grid in brackets.
import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH = 128, 64


@triton.jit
def lower_tiles(
    left, right, add, out,
    m, k,
    left_b, left_m, left_k,
    right_b, right_k, right_m,
    add_b, add_m, add_n,
    out_b,
    beta, alpha,
    HAS_ADD: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute tile `program_id(0)` of the lower triangle, counted row by row, of matrix `program_id(1)`."""
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)  # the root is rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2

    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    row_in, column_in = rows < m, columns < m
    lefts = left + batch * left_b + rows.to(tl.int64)[:, None] * left_m + depth[None, :] * left_k
    rights = right + batch * right_b + depth[:, None] * right_k + columns.to(tl.int64)[None, :] * right_m
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        inside = depth < k - start
        a = tl.load(lefts, mask=row_in[:, None] & inside[None, :], other=0.0)
        b = tl.load(rights, mask=inside[:, None] & column_in[None, :], other=0.0)
        total = tl.dot(a, b, total)
        lefts += DEPTH * left_k
        rights += DEPTH * right_k
    total *= alpha
    mask = row_in[:, None] & column_in[None, :]
    if HAS_ADD:
        adds = add + batch * add_b + rows.to(tl.int64)[:, None] * add_m + columns[None, :] * add_n
        total += beta * tl.load(adds, mask=mask, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    into = out + batch * out_b
    tl.store(into + rows.to(tl.int64)[:, None] * m + columns[None, :], result, mask=mask)
    if i != j:
        mirrored = into + columns.to(tl.int64)[:, None] * m + rows[None, :]
        tl.store(mirrored, tl.trans(result), mask=column_in[:, None] & row_in[None, :])


def launch(left: Tensor, right: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    """Return beta add + alpha left @ right for left (batch, m, k), right (batch, k, m), add (batch, m, m)."""
    batch, m, k = left.shape
    out = torch.empty(batch, m, m, dtype=left.dtype, device=left.device)
    tiles = triton.cdiv(m, TILE)
    added = out if add is None else add
    lower_tiles[tiles * (tiles + 1) // 2, batch](
        left, right, added, out, m, k, *left.stride(), *right.stride(), *added.stride(), out.stride(0), beta, alpha,
        HAS_ADD=add is not None, TILE=TILE, DEPTH=DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
