from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import (
    conv2d_bound,
    conv2d_matrix,
    fantastic_four_bound,
    spectral_norm,
    supremum_bound,
    supremum_bounds,
    supremum_bracket,
    supremum_brackets,
    tensor_norm_bound,
    unit_stride_kernel,
)
from ff_bounds.branch_and_bound import branch_and_bound
from ff_bounds.cells import first_cells
from ff_bounds.peak import Peak
from ff_bounds.symbol import GramPolynomial, Symbol, normalized_kernels

KINDS = ("normal", "rank one", "separable", "delta", "alternating", "one entry", "rotation")


def make_kernel(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Kernels ``(groups, c_out, c_in, *taps)`` whose symbols are flat, peaked or in between."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    groups, c_out, c_in, *taps = shape
    if kind == "normal":
        return normal(*shape)
    if kind == "rank one":
        return (normal(groups, c_out, 1, 1) * normal(groups, 1, c_in, 1)).reshape(
            groups, c_out, c_in, *[1] * len(taps)
        ) * normal(*taps)
    kernel = torch.zeros(shape, dtype=torch.float64)
    if kind == "separable":
        kernel = normal(groups, c_out, c_in).reshape(groups, c_out, c_in, *[1] * len(taps)).clone()
        for axis, size in enumerate(taps):
            kernel = kernel * normal(*[size if i == axis else 1 for i in range(len(taps))])
    elif kind == "delta":  # the flattest symbol
        kernel[(..., *(t // 2 for t in taps))] = normal(groups, c_out, c_in)
    elif kind == "alternating":  # its peak lies in a corner of the torus
        signs = torch.ones(taps, dtype=torch.float64)
        for place in itertools.product(*map(range, taps)):
            signs[place] = (-1.0) ** sum(place)
        kernel = normal(groups, c_out, c_in).reshape(groups, c_out, c_in, *[1] * len(taps)) * signs
    elif kind == "one entry":
        kernel.view(-1)[seed % kernel.numel()] = 3.0
    else:  # rotations by multiples of an angle: a peak anywhere on the torus
        angles = normal(len(taps))
        for place in itertools.product(*map(range, taps)):
            angle = sum(p * a for p, a in zip(place, angles, strict=True))
            kernel[(slice(None), 0, 0, *place)] = angle.cos()
            if c_out > 1 and c_in > 1:
                kernel[(slice(None), 1, 1, *place)] = angle.cos()
                kernel[(slice(None), 0, 1, *place)] = -angle.sin()
                kernel[(slice(None), 1, 0, *place)] = angle.sin()
    return kernel


def grid_norm(kernel: Tensor, size: int) -> float:
    """Largest norm of the symbol on a grid of ``size`` points per axis: at most ``sigma*``."""
    taps = kernel.shape[3:]
    axes = tuple(range(3, 3 + len(taps)))
    symbol = torch.fft.fftn(kernel, s=(size,) * len(taps), dim=axes)
    matrices = symbol.movedim((1, 2), (-2, -1)).reshape(-1, *kernel.shape[1:3])
    return float(torch.linalg.matrix_norm(matrices, ord=2).max())


def off_grid(taps: tuple[int, ...], size: int) -> float:
    """Most that ``sigma*`` exceeds the grid's norm by (Ehlich and Zeller 1964, axis by axis)."""
    return math.prod(1.0 / math.cos((t - 1) / 2 * math.pi / size) for t in taps)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    dimension = draw(st.integers(1, 3))
    largest = {1: 9, 2: 5, 3: 3}[dimension]
    taps = draw(st.lists(st.integers(1, largest), min_size=dimension, max_size=dimension))
    return draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), *taps


@given(shapes(), st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from([1e-3, 0.05]))
def test_bracket_holds_the_norm(shape: tuple[int, ...], kind: str, seed: int, tol: float) -> None:
    kernel = make_kernel(kind, shape, seed)
    found = supremum_bracket(kernel, tol)
    assert found.upper <= (1 + tol) * found.lower
    size = {1: 256, 2: 32, 3: 12}[len(shape) - 3]
    on_grid = grid_norm(kernel, size)
    assert found.upper >= on_grid
    # The grid's norm may carry rounding of 1e-12; the lower bound is rounded down by less.
    assert found.lower <= on_grid * off_grid(shape[3:], size) * (1 + 1e-11)


@given(
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    st.integers(0, 2),
)
def test_bound_covers_the_dense_jacobian(
    kind: str,
    seed: int,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding_mode: str,
    padding: int,
) -> None:
    weight = make_kernel(kind, (1, 2, 3, 3, 2), seed)[0]
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "padding_mode": padding_mode,
    }
    exact = spectral_norm(conv2d_matrix(weight, (6, 7), **options))  # type: ignore[arg-type]
    bound = conv2d_bound(weight, input_size=(6, 7), method="supremum", **options)  # type: ignore[arg-type]
    assert bound >= exact


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_scales(scale: float) -> None:
    kernel = make_kernel("normal", (2, 3, 4, 3, 3), 0)
    plain, scaled = supremum_bracket(kernel), supremum_bracket(kernel * scale)
    assert scaled.upper.item() == pytest.approx(plain.upper.item() * scale, rel=1e-6)
    assert scaled.lower <= scaled.upper <= 1.001 * scaled.lower


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_weights_of_any_dtype(dtype: torch.dtype) -> None:
    kernel = make_kernel("normal", (1, 4, 4, 3, 3), 0).to(dtype)
    assert supremum_bound(kernel) >= grid_norm(kernel.double(), 32)


def test_overflow_and_underflow_keep_the_bracket() -> None:
    huge = supremum_bracket(torch.full((1, 1, 1, 3), 1.7e308, dtype=torch.float64))
    assert huge.upper == math.inf
    assert huge.lower < math.inf
    tiny = supremum_bracket(torch.full((1, 1, 1, 2), 1e-310, dtype=torch.float64))
    assert tiny.lower <= 2e-310 <= tiny.upper


def test_flat_symbols_end_with_a_larger_gap() -> None:
    """One shift per channel: every frequency has the same norm, 1, and no cell closes early."""
    flat = torch.zeros(1, 27, 27, 3, 3, 3)
    for index, place in enumerate(itertools.product(range(3), repeat=3)):
        flat[(0, index, index, *place)] = 1.0
    found = supremum_bracket(flat)
    assert found.lower <= 1.0 <= found.upper
    assert found.upper <= 1.3
    assert found.matrices < 200_000  # the same cells are tried at each doubling
    planar = torch.zeros(1, 9, 9, 3, 3)
    for index, place in enumerate(itertools.product(range(3), repeat=2)):
        planar[(0, index, index, *place)] = 1.0
    assert supremum_bracket(planar).upper <= 1.001


def test_a_zero_group_beside_another() -> None:
    kernel = make_kernel("normal", (2, 30, 30, 3, 3), 0)
    kernel[0] = 0.0
    found = supremum_bracket(kernel)
    assert found.group == 1
    assert grid_norm(kernel, 32) <= found.upper <= 1.001 * found.lower


def test_zero_kernel() -> None:
    kernel = torch.zeros(2, 3, 3, 3, 3, requires_grad=True)
    bound = supremum_bound(kernel)
    bound.backward()
    assert bound == 0.0
    assert kernel.grad is not None
    assert not kernel.grad.any()


def test_tolerance_is_reached_and_beats_the_four_bounds() -> None:
    weight = make_kernel("normal", (1, 24, 24, 3, 3), 0)[0]
    bounds = [conv2d_bound(weight, method="supremum", tol=tol) for tol in (1e-5, 1e-3, 0.1)]
    assert bounds[0] <= bounds[1] * (1 + 1e-3)
    assert bounds[1] <= 1.001 * bounds[0]
    assert bounds[2] <= 1.1 * bounds[0]
    assert bounds[1] < 0.8 * fantastic_four_bound(weight)


def test_the_cost_does_not_depend_on_how_many_channels_are_grouped() -> None:
    """Depthwise: one scalar symbol per channel, all in one batch; only the largest is refined."""
    kernel = make_kernel("normal", (256, 1, 1, 3, 3), 0)
    found = supremum_bracket(kernel)
    assert found.group == int(max(range(256), key=lambda g: grid_norm(kernel[g : g + 1], 64)))
    assert found.upper <= 1.001 * found.lower


def test_gradient_is_that_of_the_norm_at_the_peak() -> None:
    kernel = make_kernel("normal", (2, 3, 2, 3, 2), 1).requires_grad_(True)
    bound = supremum_bound(kernel, 1e-5)
    (gradient,) = torch.autograd.grad(bound, kernel)
    assert (gradient * kernel).sum().item() == pytest.approx(bound.item(), rel=1e-9)
    step = 1e-4
    for index in range(0, kernel.numel(), 5):
        moved = []
        for sign in (-1, 1):
            other = kernel.detach().clone()
            other.view(-1)[index] += sign * step
            moved.append(grid_norm(other, 256))
        slope = (moved[1] - moved[0]) / (2 * step)
        assert gradient.view(-1)[index].item() == pytest.approx(slope, abs=2e-2)


@pytest.mark.parametrize("taps", [(3,), (2,), (7,), (3, 3), (2, 5), (11, 2), (3, 2, 2)])
def test_cells_and_their_parts_cover_the_torus(taps: tuple[int, ...]) -> None:
    radii = torch.tensor([(t - 1) / 2 for t in taps], dtype=torch.float64)
    centres, offsets, angle = first_cells(taps, 0.6, torch.device("cpu"))
    assert angle <= 0.6
    parts = (centres[:, None] + offsets).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    points = 2 * math.pi * torch.rand(2000, len(taps), generator=generator, dtype=torch.float64)
    for places, reach in ((centres, angle), (parts, angle / 2)):
        nearest = torch.full((len(points),), math.inf, dtype=torch.float64)
        for mirror in (1, -1):  # K(-w) is the conjugate of K(w)
            difference = (mirror * points[:, None] - places + math.pi).remainder(2 * math.pi)
            distance = ((difference - math.pi).abs() * radii).sum(dim=-1)
            nearest = torch.minimum(nearest, distance.amin(dim=1))
        assert nearest.max() <= reach * (1 + 1e-12)


@pytest.mark.parametrize(
    "shape", [(3, 2, 5, 3, 3), (2, 30, 31, 2, 3), (1, 4, 4, 5), (5, 1, 1, 3, 3)]
)
def test_gram_polynomial_is_within_its_error(shape: tuple[int, ...]) -> None:
    owner = torch.zeros(shape[0], dtype=torch.int64)
    kernels, _ = normalized_kernels(make_kernel("normal", shape, 0), owner)
    gram = GramPolynomial(Symbol(kernels))
    problem = torch.arange(shape[0]).repeat_interleave(20)
    generator = torch.Generator().manual_seed(1)
    frequency = torch.rand(len(problem), len(gram.taps), generator=generator, dtype=torch.float64)
    frequency = 2 * math.pi * (2 * frequency - 1)
    places = torch.tensor(list(itertools.product(*map(range, gram.taps))), dtype=torch.float64)
    phase = torch.exp(-1j * (frequency @ places.mT))
    symbol = (kernels.flatten(3)[problem] * phase[:, None, None]).sum(dim=-1)
    exact = symbol @ symbol.mH
    found = gram(problem, frequency)
    difference = torch.linalg.matrix_norm(found - exact)
    assert (difference <= gram.error[problem]).all()
    largest = torch.linalg.eigvalsh(exact)[:, -1]
    assert gram.proves(problem, found.clone(), largest * (1 + 1e-8)).all()
    # Never for a limit below the norm, however little.
    assert not gram.proves(problem, found.clone(), largest * (1 - 1e-12)).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refusals(value: float) -> None:
    kernel = torch.full((1, 2, 2, 3, 3), value)
    with pytest.raises(ValueError, match="expected finite weight"):
        supremum_bracket(kernel)
    with pytest.raises(ValueError, match="expected tol between"):
        supremum_bracket(torch.ones(1, 1, 1, 3, 3), 0.0)


@pytest.mark.parametrize("taps", range(1, 12))
@pytest.mark.parametrize("stride", range(1, 5))
def test_the_tolerance_is_reached_for_every_layer(taps: int, stride: int) -> None:
    weight = make_kernel("normal", (1, 6, 2, taps, taps), taps)[0]
    for groups, dilation in ((1, 1), (2, 1), (3, 2)):
        kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation, groups=groups)
        found = supremum_bracket(kernel)
        assert found.upper <= (1 + 1e-3) * found.lower
        size = 4 * taps
        assert grid_norm(kernel, size) <= found.upper


@pytest.mark.parametrize(("c_out", "c_in", "taps", "groups"), [(64, 1, 3, 64), (96, 24, 1, 1)])
def test_layers_of_mobilenet(c_out: int, c_in: int, taps: int, groups: int) -> None:
    weight = make_kernel("normal", (1, c_out, c_in, taps, taps), 0)[0]
    found = supremum_bracket(unit_stride_kernel(weight, groups=groups))
    assert found.upper <= (1 + 1e-3) * found.lower
    assert found.matrices <= 64 * 60


def test_kernels_searched_together_are_as_one_by_one() -> None:
    shapes = [(1, 3, 4, 3, 3), (2, 2, 5, 3), (1, 3, 4, 3, 3), (1, 3, 4, 5, 3), (1, 100, 99, 3)]
    kernels = [make_kernel("normal", shape, seed) for seed, shape in enumerate(shapes)]
    kernels[3][..., 0, :] = kernels[3][..., -1, :] = 0.0  # of the same shape as the first, trimmed
    kernels.append(torch.zeros(1, 3, 4, 3, 3))
    kernels.append(1e-30 * kernels[0])
    for kernel, found in zip(kernels, supremum_brackets(kernels), strict=True):
        alone = supremum_bracket(kernel)
        assert found.group == alone.group
        assert found.frequency.shape == (kernel.ndim - 3,)
        assert found.lower <= alone.upper
        assert alone.lower <= found.upper
        assert found.upper <= 1.001 * found.lower
    ends = supremum_bounds([kernel.requires_grad_(True) for kernel in kernels])
    torch.stack(ends).sum().backward()
    for kernel, bound in zip(kernels, ends, strict=True):
        assert kernel.grad is not None
        assert (kernel.grad * kernel).sum().item() == pytest.approx(bound.item(), rel=1e-9)


def test_orthogonal_convolutions_close_at_once() -> None:
    """``G`` is constant: the first cells suffice."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 36, 36, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(normal).Q
    kernel = torch.zeros(1, 36, 36, 3, 3, dtype=torch.float64)
    for index, place in enumerate(itertools.product(range(3), repeat=2)):
        part = slice(4 * index, 4 * index + 4)
        kernel[0, :, :, place[0], place[1]] = left[:, part] @ right[part]
    found = supremum_bracket(kernel, 1e-5)
    assert found.lower <= 1.0 <= found.upper * (1 + 1e-12)
    assert found.upper <= (1 + 1e-5) * found.lower
    assert found.matrices < 60


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-161, 1.0, 1e170, 1e300])
def test_gradients_at_all_scales(scale: float) -> None:
    kernel = (make_kernel("normal", (1, 2, 2, 3), 0) * scale).requires_grad_(True)
    bound = supremum_bound(kernel)
    (gradient,) = torch.autograd.grad(bound, kernel)
    assert (gradient * (kernel / scale)).sum().item() == pytest.approx(bound.item() / scale)


def test_an_overflowing_bound_is_infinite() -> None:
    kernel = torch.full((1, 1, 1, 3, 3), 1e308, dtype=torch.float64, requires_grad=True)
    for bound in (supremum_bound(kernel), tensor_norm_bound(kernel)):
        assert bound == math.inf
        (gradient,) = torch.autograd.grad(bound, kernel)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("taps", [(3,), (2, 3), (3, 3), (2, 2, 2)])
def test_variation_of_the_gram_matrix_in_a_cell(taps: tuple[int, ...]) -> None:
    kernels, _ = normalized_kernels(make_kernel("normal", (2, 3, 4, *taps), 0), torch.arange(2))
    gram = GramPolynomial(Symbol(kernels))
    generator = torch.Generator().manual_seed(0)
    problem = torch.arange(2).repeat_interleave(200)
    shape = (len(problem), len(taps))
    centre = 6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    moved = 0.1 * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)
    radii = torch.tensor([(t - 1) / 2 for t in taps], dtype=torch.float64)
    angle = (moved.abs() * radii).sum(dim=1)
    change = torch.linalg.matrix_norm(gram(problem, centre + moved) - gram(problem, centre), ord=2)
    bound = gram.variation(problem, angle)
    assert (change <= bound).all()
    assert (bound <= 100 * change.max()).all()


def test_a_narrow_peak_between_centres_is_not_closed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no ascent finds it: cells have to be split until a centre sees it.

    A broad peak of height one gives the lower bound. The narrow one, 0.6 % higher, lies half-way
    between two centres of first cells, which see 94 % of it.
    """
    for name in ("search", "ascend"):
        monkeypatch.setattr(Peak, name, lambda *arguments: None)
    taps = 31
    centres = first_cells((taps,), 0.6, torch.device("cpu"))[0].flatten().sort().values
    middle = len(centres) // 2
    between = (centres[middle - 1] + centres[middle]) / 2.0
    places = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2.0
    narrow = torch.cos(between * places)
    frequencies = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    heights = (torch.exp(-1j * frequencies[:, None] * places) @ narrow.to(torch.complex128)).abs()
    kernel = torch.zeros(1, 2, 2, taps, dtype=torch.float64)
    kernel[0, 0, 0, 14:17] = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    kernel[0, 1, 1] = 1.006 * narrow / heights.max()
    found = branch_and_bound(kernel, torch.zeros(1, dtype=torch.int64), 1e-3, 10**6, deflates=False)
    assert found.upper.item() >= 1.006 * (1 - 1e-6)
    assert found.lower.item() <= 1.006 * (1 + 1e-6)
