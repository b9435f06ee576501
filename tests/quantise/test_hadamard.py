"""Hadamard matrices of every order, and the bases that make variances equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linescan.quantise.hadamard import ORDERS, basis, factors, hadamard, klt, rotate, rotate_back

WIDTHS = (1, 6, 12, 16, 24, 48, 96, 128, 192, 384, 768, 1024, 1536)  # of published models, and their ranks and states


@pytest.mark.parametrize("n", sorted({*ORDERS, *WIDTHS}))
def test_matrices_are_orthogonal_with_equal_entries(n):
    matrix, blocks = hadamard(n), factors(n)[0]
    assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 1e-12
    used = matrix[matrix != 0]
    assert used.numel() == n * n // blocks  # one matrix, or as many equal blocks
    assert torch.allclose(used.abs(), used.new_tensor((n // blocks) ** -0.5), rtol=1e-12)
    assert blocks == (3 if n == 6 else 1)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 99))
def test_rotations_go_back_and_keep_lengths(n, seed):
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = rotate(x)
    assert torch.allclose(y, x @ hadamard(n), atol=1e-12)
    assert torch.allclose(rotate_back(y), x, atol=1e-12)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("n", [12, 48, 192])
def test_variances_are_equal_after_both_bases_and_after_neither_alone(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3 * n, n, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(n, n, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, n)
    covariance = x.T.cov()
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    spread = lambda y: y.var(0).std() / y.var(0).mean()  # noqa: E731
    for R in (basis(n, covariance), basis(n, covariance, signs)):
        assert spread(x @ R) < 1e-10
    assert min(spread(x), spread(x @ klt(covariance)), spread(rotate(x))) > 0.05


def test_the_basis_of_no_variance_is_the_identity():
    found = klt(torch.stack([torch.zeros(4, 4), torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))]))
    assert torch.equal(found[0], torch.eye(4, dtype=torch.float64))
    assert torch.equal(found[1].abs(), torch.eye(4, dtype=torch.float64).flip(0))
