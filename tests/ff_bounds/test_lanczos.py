from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds.lanczos import top_eigenpair

SPECTRA = ("normal", "rank one", "flat", "tie", "cluster", "zero", "one entry")


def with_spectrum(kind: str, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A positive semidefinite matrix whose largest eigenvalue is easy to find, or hard."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, size, generator=generator, dtype=dtype)
    if kind == "normal":
        return normal @ normal.mH
    values = torch.zeros(size, dtype=torch.float64)
    values[0] = 3.0
    if kind == "zero":
        values[0] = 0.0
    if kind == "flat":
        values[:] = 3.0
    if kind == "tie":
        values[: size // 2 + 1] = 3.0
    if kind == "cluster":
        values = 3.0 + 1e-9 * torch.rand(size, generator=generator, dtype=torch.float64)
    if kind == "one entry":
        return torch.diag(values.roll(seed)).to(dtype)
    basis, _ = torch.linalg.qr(normal)
    return basis * values @ basis.mH


def start(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(99), dtype=dtype)


@given(
    kind=st.sampled_from(SPECTRA),
    size=st.integers(1, 20),
    dtype=st.sampled_from((torch.float64, torch.complex128)),
    seed=st.integers(0, 10**6),
)
def test_as_many_steps_as_rows_find_the_largest(
    kind: str, size: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = with_spectrum(kind, size, dtype, seed)
    vector, value = top_eigenpair(matrix, start(size, dtype), steps=size)
    exact = torch.linalg.eigvalsh(matrix)[-1]
    rounding = 1e-13 * max(1.0, exact.item())
    # The start may have next to no part along the sought vector: 1e-6 was never seen.
    assert (1 - 1e-6) * exact - rounding <= value <= exact + rounding
    if kind != "zero":
        assert torch.linalg.vector_norm(vector).item() == pytest.approx(1.0)
    quotient = (vector.conj() @ matrix @ vector).real
    assert quotient.item() == pytest.approx(value.item(), abs=rounding)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_few_steps_maximise_over_the_krylov_space(steps: int) -> None:
    matrix = with_spectrum("normal", 12, torch.complex128, 0)
    vector, value = top_eigenpair(matrix, start(12, torch.complex128), steps)
    space = [start(12, torch.complex128)]
    for _ in range(steps - 1):
        space.append(matrix @ space[-1] / space[-1].norm())
    basis, _ = torch.linalg.qr(torch.stack(space, dim=1))
    best = torch.linalg.eigvalsh(basis.mH @ matrix @ basis)[-1]
    assert value.item() == pytest.approx(best.item(), rel=1e-10)
    assert torch.linalg.vector_norm(vector).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_a_batch_is_its_members(dtype: torch.dtype) -> None:
    members = torch.stack([with_spectrum(kind, 9, torch.complex128, 3) for kind in SPECTRA[:6]])
    members = (members if dtype.is_complex else members.real @ members.real.mT).to(dtype)
    batch = members.reshape(2, 3, 9, 9)
    vectors, values = top_eigenpair(batch, start(9, dtype).expand(2, 3, 9), steps=9)
    assert vectors.shape == (2, 3, 9)
    assert vectors.dtype == dtype
    assert values.dtype == members.real.dtype
    for member, vector, value in zip(members, vectors.flatten(0, 1), values.flatten(), strict=True):
        alone = top_eigenpair(member, start(9, dtype), steps=9)
        torch.testing.assert_close(alone[1], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(member @ vector, value * vector, rtol=1e-3, atol=1e-3)


def test_tolerance_stops_early_and_is_kept() -> None:
    matrix = with_spectrum("normal", 200, torch.float64, 0)
    calls = 0

    def apply(vector: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return matrix @ vector

    vector, value = top_eigenpair(apply, start(200, torch.float64), 200, tolerance=1e-8)
    assert calls < 60
    residual = torch.linalg.vector_norm(matrix @ vector - value * vector)
    assert residual <= 1.001e-8 * value
    assert value.item() == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-12)


def test_never_stuck_where_ones_would_be() -> None:
    matrix = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    _, value = top_eigenpair(matrix, start(2, torch.float64), steps=2, tolerance=1e-10)
    assert value.item() == pytest.approx(2.0)


def test_zero_start_gives_zero() -> None:
    vector, value = top_eigenpair(torch.eye(3), torch.zeros(3), steps=3, tolerance=1e-10)
    assert value == 0.0
    assert torch.equal(vector, torch.zeros(3))
