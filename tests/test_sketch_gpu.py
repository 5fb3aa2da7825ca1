"""The Triton kernels against the reference: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hedgerow.sketch import BASES, reference

pytest.importorskip("triton")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hedgerow.sketch import gpu  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DENSE = [basis for basis in BASES if basis != "hadamard"]
SIZES = {3: 5, 1000: 2**31, 4096: 2**64 - 1, 4096 + 1000: 2**32 + 7}
"""A seed for each; of all widths that Triton tells apart."""

dense = pytest.mark.parametrize("kind", DENSE)
sizes = pytest.mark.parametrize(("size", "seed"), SIZES.items())


def vector(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)


def assert_same_products(x: Tensor, seed: int, k: int, kind: str) -> None:
    """Of a vector and the same bases, but for the order of the sums."""
    product = gpu.project_dense(x, seed, k, kind)
    assert product.dtype == torch.float64
    exact = reference.project_dense(x, seed, k, kind)
    torch.testing.assert_close(product, exact, rtol=0, atol=1e-5 * float(x.double().norm()))


@dense
@sizes
def test_bases_are_the_same_bits(kind, size, seed):
    for base in range(3):
        one = torch.eye(3, device=DEVICE)[base]
        entries = reference.entries(kind, seed, base, 0, size, DEVICE)
        assert torch.equal(gpu.reconstruct_dense(one, seed, size, kind), entries)


@dense
def test_dense_projections_are_the_reference_s(kind):
    assert_same_products(vector(4096 + 1000), 2**40 + 1, 3, kind)


def test_more_bases_than_a_program_takes():
    assert_same_products(vector(1000), 3, 9, "rademacher")


def test_more_of_the_vector_than_a_program_takes(monkeypatch):
    """Five groups of tiles for two programs."""
    monkeypatch.setattr(gpu, "_CHUNKS", 2)
    assert_same_products(vector(4 * 16384 + 5000), 3, 2, "rademacher")


@dense
def test_dense_reconstructions_are_the_reference_s(kind):
    gamma = vector(7)
    estimate = gpu.reconstruct_dense(gamma, 11, 4096 + 1000, kind)
    exact = reference.reconstruct_dense(gamma, 11, 4096 + 1000, kind)
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-5)


@sizes
def test_hadamard_is_the_same_bits(size, seed):
    x, offset = vector(size), size // 3
    for k in (size // 3, size):
        gamma = gpu.project_hadamard(x, seed, k, offset)
        assert torch.equal(gamma, reference.project_hadamard(x, seed, k, offset))
    estimate = gpu.reconstruct_hadamard(gamma, seed, size, offset)
    assert torch.equal(estimate, reference.reconstruct_hadamard(gamma, seed, size, offset))


def test_hadamard_of_every_length_of_segments():
    """4095 = 2048 + 1024 + … + 1."""
    gamma = vector(1500)
    estimate = gpu.reconstruct_hadamard(gamma, 99, 4095, 17)
    assert torch.equal(estimate, reference.reconstruct_hadamard(gamma, 99, 4095, 17))


def test_hadamard_bases_are_the_same_bits():
    for base in (0, 700, 1499):
        one = torch.zeros(1500, device=DEVICE)
        one[base] = 1
        row = gpu.reconstruct_hadamard(one, 99, 4096 + 32, 0)
        assert torch.equal(row, reference.reconstruct_hadamard(one, 99, 4096 + 32, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype):
    x = vector(4096 + 3, dtype)
    gamma = gpu.project_hadamard(x, 1, 1000, 0)
    assert gamma.dtype == torch.float32
    assert torch.equal(gamma, reference.project_hadamard(x.float(), 1, 1000, 0))
    assert_same_products(x, 1, 2, "uniform")


def test_vectors_need_not_be_contiguous():
    x = vector(2000)[::2]
    assert torch.equal(gpu.project_hadamard(x, 1, 10, 0), reference.project_hadamard(x, 1, 10, 0))
    assert_same_products(x, 1, 1, "rademacher")


def test_results_are_the_same_again():
    x = vector(20000)
    first, second = (gpu.project_dense(x, 5, 2, "rademacher") for _ in range(2))
    assert torch.equal(first, second)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(BASES), st.integers(1, 9000), st.integers(0, 2**64 - 1), st.data())
def test_any_size_and_seed(basis, size, seed, data):
    x = vector(size)
    if basis == "hadamard":
        k, offset = data.draw(st.integers(1, size)), data.draw(st.integers(0, size - 1))
        gamma = gpu.project_hadamard(x, seed, k, offset)
        assert torch.equal(gamma, reference.project_hadamard(x, seed, k, offset))
    else:
        base = data.draw(st.integers(0, 4))
        one = torch.eye(5, device=DEVICE)[base]
        entries = reference.entries(basis, seed, base, 0, size, DEVICE)
        assert torch.equal(gpu.reconstruct_dense(one, seed, size, basis), entries)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hedgerow.sketch import gpu

def check(kernel, **sizes):
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict(x="*bf16", partial="*fp64", coordinates="*fp32", out="*fp32", seed="u64")
    types = {name: "constexpr" if name in sizes else types[name] for name in kernel.arg_names}
    options = dict(num_warps=4, enable_fp_fusion=False)
    compile(ASTSource(kernel, types, sizes), target=GPUTarget("cuda", 90, 32), options=options)

for kind, (purpose, parts, bases, columns) in gpu._KINDS.items():
    what = dict(KIND=kind, PURPOSE=purpose, PARTS=parts)
    check(gpu._project_dense, **what, BASES=bases, GROUP=gpu._GROUP, COLUMNS=128)
    check(gpu._reconstruct_dense, **what, COLUMNS=columns)
for whole in (True, False):
    check(gpu._project_hadamard, WHOLE=whole)
    check(gpu._reconstruct_hadamard, WHOLE=whole)
"""


@pytest.mark.skipif(HAS_GPU, reason="the other tests compile the kernels")
def test_kernels_compile_for_an_h100(tmp_path):
    """The interpreter takes much that the compiler refuses, and the compiler needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
