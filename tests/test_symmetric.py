"""Symmetric products, in blocks on a CPU and by Triton's kernel, equal the whole product in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimizers import symmetric
from optimizers.symmetric import symmetric_product

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("m", [1, 100, 300, 500])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_product_with_its_transpose_matches_the_whole_one(m, alpha):
    x = torch.randn(2, m, 70, dtype=torch.float64)
    torch.testing.assert_close(symmetric_product(x, x.mT, alpha=alpha), alpha * (x @ x.mT), rtol=0, atol=1e-11)


@pytest.mark.parametrize("m", [1, 100, 300, 500])
def test_product_of_commuting_matrices_with_a_term_matches_the_whole_one(m):
    x = torch.randn(2, m, m, dtype=torch.float64)
    g = x @ x.mT / m
    expected = 2 * g - 3 * g @ g
    torch.testing.assert_close(symmetric_product(g, g, g, beta=2.0, alpha=-3.0), expected, rtol=0, atol=1e-11)


# In Triton's interpreter, which reads TRITON_INTERPRET when the kernel is defined. It has no bfloat16 products.
INTERPRETED = """
import torch
from optimizers.symmetric_kernel import launch
for m, k, batch in ((128, 64, 1), (300, 70, 2), (40, 130, 3)):
    x = torch.randn(batch, m, k)
    wide = torch.randn(batch, k, m).mT  # strides of a transposed stack
    for left in (x, wide, x.half()):
        tolerance = 3e-6 if left.dtype == torch.float32 else 1e-3  # the result is rounded to 24 or 11 bits
        whole = left.double() @ left.double().mT
        got = launch(left, left.mT, None, 0.0, 1.0)
        assert (got.double() - whole).abs().max() < tolerance * whole.abs().max(), (m, k, left.dtype)
        g = (whole / whole.abs().max()).to(left.dtype)
        g = torch.tril(g) + torch.tril(g, -1).mT
        wanted = -2.5 * g.double() + 1.5 * g.double() @ g.double()
        got = launch(g, g, g, -2.5, 1.5)
        assert (got.double() - wanted).abs().max() < tolerance * wanted.abs().max(), (m, k, left.dtype)
print("held")
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimizers.symmetric_kernel import DEPTH, TILE, lower_tiles
for dtype in ("bf16", "fp16"):
    for added in (True, False):
        constants = {"HAS_ADD": added, "TILE": TILE, "DEPTH": DEPTH}
        kinds = dict.fromkeys(lower_tiles.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        kinds |= dict.fromkeys(("left", "right", "add", "out"), f"*{dtype}") | dict.fromkeys(("beta", "alpha"), "fp32")
        source = ASTSource(fn=lower_tiles, signature=kinds, constexprs=constants)
        for capability in (80, 90):
            target = GPUTarget("cuda", capability, 32)
            kernel = triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 3})
            assert "mma" in kernel.asm["ptx"] and kernel.asm["cubin"]
            assert ("wgmma" in kernel.asm["ptx"]) == (capability == 90)
print("held")
"""


@pytest.mark.parametrize("script, interpret", [(INTERPRETED, "1"), (COMPILED, "0")], ids=["interpreted", "compiled"])
def test_kernel_matches_float64_in_the_interpreter_and_compiles_for_two_generations(script, interpret, tmp_path):
    pytest.importorskip("triton", reason="pip install --no-deps triton; CUDA builds of torch bring it")
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    path = tmp_path / "script.py"  # Triton reads the source of its kernels
    path.write_text(script)
    environment["PYTHONPATH"] = str(REPOSITORY)
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert run.stdout == "held\n", run.stderr


def test_without_a_gpu_no_kernel_is_compiled():
    for device in ("cpu", "cuda"):  # "cuda" in a dry run with FakeTensors
        if device == "cpu" or not torch.cuda.is_available():
            assert symmetric._kernel_for(4096, torch.bfloat16, torch.device(device)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("m, k", [(2048, 2048), (2050, 4100)])
def test_kernel_on_a_gpu_matches_float64(m, k):
    kernel = symmetric._kernel_for(m, torch.bfloat16, torch.device("cuda"))
    if kernel is None:
        pytest.skip("no Triton, or a GPU older than sm_80")
    x = torch.randn(2, m, k, device="cuda", dtype=torch.bfloat16)
    whole = x.double() @ x.double().mT
    assert (kernel(x, x.mT, None, 0.0, 1.0).double() - whole).abs().max() < 0.01 * whole.abs().max()
