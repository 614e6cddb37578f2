"""svd_factors: the best approximation of a rank, from orthonormal rows, of any shape and rank."""

import pytest
import torch

from lowrank_ext.methods.recursive.relaxed_linear import svd_factors

RANK = 3
EPS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7), (3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_best_approximation(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    residual = (scale * torch.randn(shape, dtype=torch.float64)).to(wide)
    lora_a, lora_b = svd_factors(residual, RANK, dtype)
    assert lora_a.dtype == lora_b.dtype == dtype
    assert lora_a.is_contiguous() and lora_b.is_contiguous()
    u, sig, v_t = torch.linalg.svd(residual.double(), full_matrices=False)
    best = u[:, :RANK] * sig[:RANK] @ v_t[:RANK]
    product = lora_b.double() @ lora_a.double()
    torch.testing.assert_close(product, best, rtol=0, atol=4 * EPS[dtype] * float(sig[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=str)
@pytest.mark.parametrize("rank_of_residual", [1, 2, 3, 6])
def test_every_row_of_lora_a_can_train(
    shape: tuple[int, int], dtype: torch.dtype, rank_of_residual: int
) -> None:
    """Rows of a residual of lower rank are orthonormal too, and lora_b's are U S."""
    left = torch.randn(shape[0], rank_of_residual, dtype=dtype)
    residual = left @ torch.randn(rank_of_residual, shape[1], dtype=dtype)
    lora_a, lora_b = svd_factors(residual, RANK, dtype)
    eye = torch.eye(RANK, dtype=dtype)
    torch.testing.assert_close(lora_a @ lora_a.mT, eye, rtol=0, atol=1e-5)
    sig = torch.linalg.svdvals(residual.double())[:RANK]
    squares = lora_b.double().mT @ lora_b.double()
    torch.testing.assert_close(squares, sig.square().diag(), rtol=1e-5, atol=1e-5 * sig[0] ** 2)
