from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import circular_bound, circular_bracket, conv_matrix, spectral_norm, supremum_bracket
from ff_bounds.conv import conv_bound
from tests.ff_bounds.test_supremum import KINDS, make_kernel


def exact(kernel: Tensor, sizes: list[int]) -> float:
    """Largest norm on the grid, every frequency by SVD."""
    taps = kernel.shape[3:]
    digits = torch.tensor(list(itertools.product(*map(range, sizes))), dtype=torch.float64)
    frequency = digits * 2 * math.pi / torch.tensor(sizes, dtype=torch.float64)
    places = torch.tensor(list(itertools.product(*map(range, taps))), dtype=torch.float64)
    phase = torch.exp(-1j * (frequency @ places.reshape(-1, len(taps)).mT))
    symbols = torch.einsum("ft,goit->fgoi", phase, kernel.flatten(3).to(phase.dtype))
    return float(torch.linalg.matrix_norm(symbols, ord=2).max())


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int]]:
    dimension = draw(st.integers(1, 3))
    taps, size = {1: (9, 40), 2: (5, 12), 3: (3, 6)}[dimension]
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    shape += [draw(st.integers(1, taps)) for _ in range(dimension)]
    return tuple(shape), [draw(st.integers(1, size)) for _ in range(dimension)]


@given(cases(), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_bracket_holds_the_norm(
    case: tuple[tuple[int, ...], list[int]], kind: str, seed: int
) -> None:
    shape, sizes = case
    kernel = make_kernel(kind, shape, seed)
    norm, found = exact(kernel, sizes), circular_bracket(kernel, sizes)
    rounding = 1e-13 * float(kernel.abs().sum())  # of the reference
    assert found.upper >= norm - rounding
    assert found.lower <= norm + rounding
    # Where the symbol vanishes on the grid, rounding leaves 1e-5 of its supremum.
    assert found.upper <= (1 + 1e-6) * norm + 1e-5 * supremum_bracket(kernel).upper


@given(
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.integers(3, 8), st.integers(4, 7)),
)
def test_method_circular_covers_the_dense_jacobian(
    kind: str,
    seed: int,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
) -> None:
    weight = make_kernel(kind, (1, 2, 2, 3, 2), seed)[0]
    reach = [d * (t - 1) for d, t in zip(dilation, (3, 2), strict=True)]
    if any(p > n or n + 2 * p <= r for p, n, r in zip(padding, size, reach, strict=True)):
        return
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    matrix = conv_matrix(weight, size, padding_mode="circular", **options)  # type: ignore[arg-type]
    for method in ("circular", "best"):
        bound = conv_bound(
            weight, padding_mode="circular", input_size=size, method=method, **options
        )  # type: ignore[arg-type]
        assert bound >= spectral_norm(matrix)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_method_circular_is_exact(stride: int, dilation: int) -> None:
    weight = make_kernel("normal", (1, 3, 2, 3, 3), 5)[0]
    options = {"stride": stride, "dilation": dilation, "padding": dilation}
    matrix = conv_matrix(weight, (6, 6), padding_mode="circular", **options)
    bound = conv_bound(weight, padding_mode="circular", input_size=6, method="circular", **options)
    assert spectral_norm(matrix) <= bound <= spectral_norm(matrix) * (1 + 2e-6)


def test_few_frequencies_are_visited() -> None:
    kernel = make_kernel("separable", (1, 8, 8, 3, 3), 1)
    found = circular_bracket(kernel, (200, 200))
    assert found.matrices < 2000
    assert found.upper <= (1 + 1e-6) * found.lower


def test_gradient() -> None:
    kernel = make_kernel("normal", (2, 3, 4, 3, 3), 0).requires_grad_(True)
    bound = circular_bound(kernel, (5, 7))
    (gradient,) = torch.autograd.grad(bound, kernel)
    assert (gradient * kernel).sum().item() == pytest.approx(bound.item(), rel=1e-9)
    assert circular_bound(torch.zeros_like(kernel), 5) == 0.0


def test_refusals() -> None:
    kernel = torch.ones(1, 1, 1, 3, 3)
    with pytest.raises(ValueError, match="expected input_size as one or 2 positive"):
        circular_bracket(kernel, (3, 0))
    with pytest.raises(ValueError, match="expected tol between"):
        circular_bracket(kernel, 3, tol=0.0)
    with pytest.raises(ValueError, match="expected finite weight"):
        circular_bracket(kernel * math.nan, 3)
    with pytest.raises(ValueError, match="needs padding_mode='circular' and an input_size"):
        conv_bound(kernel[0], method="circular")


def test_symbols_that_vanish_on_the_grid() -> None:
    kernel = torch.tensor([7.0, 7.0, -14.0]).reshape(1, 1, 3)
    options = {"padding_mode": "circular", "input_size": 3, "dilation": 3, "padding": 3}
    for method in ("circular", "best"):
        assert conv_bound(kernel, method=method, **options) <= 1e-4  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        mean_free = torch.randn(2, 3, 1, 3, 1, 1, generator=generator, dtype=torch.float64)
        mean_free -= mean_free.mean(dim=3, keepdim=True)
        assert circular_bracket(mean_free, (1, 6, 3)).upper <= 1e-4


def test_best_knows_the_stride_where_the_grid_does_not() -> None:
    options = {"stride": 2, "padding_mode": "circular", "input_size": 7}
    best = conv_bound(torch.ones(1, 1, 2), method="best", **options)  # type: ignore[arg-type]
    assert best <= math.sqrt(2) * 1.002


def test_nothing_is_closed_for_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any ascent, and a supremum next to the target, the bracket still holds."""
    monkeypatch.setattr("ff_bounds.norm_tests.NormTests._climb", lambda self: False)
    tol = 1e-3
    flat = 1 / (1 + 0.9995 * tol)
    kernel = torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    kernel[0, 0, 0, 1] = flat
    kernel[0, 1, 1] = torch.tensor([0.5, 0.0, 0.5])  # |cos|
    found = circular_bracket(kernel, 64, tol)
    assert found.upper >= exact(kernel, [64]) * (1 - 1e-14)
