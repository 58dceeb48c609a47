"""The unfoldings and the polyphase kernel are what their names say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ff_bounds import spectral_norm, unfoldings, unit_stride_kernel
from ff_bounds.unfoldings import per_axis, spatial_axes, unfolding

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def numbered(*shape: int) -> Tensor:
    """A kernel whose entries are all different, so that a misplaced one is seen."""
    return torch.arange(1.0, 1.0 + math.prod(shape), dtype=torch.float64).reshape(shape)


def unit_phase(angle: float) -> Tensor:
    return torch.tensor(-1j * angle, dtype=torch.complex128).exp()


def symbol(kernel: Tensor, *frequency: float) -> Tensor:
    """``K(w) = sum_a kernel[..., a] exp(-i <w, a>)``, straight from the definition."""
    axes = len(frequency)
    total = torch.zeros(kernel.shape[:-axes], dtype=torch.complex128)
    for place in itertools.product(*map(range, kernel.shape[-axes:])):
        angle = sum(w * a for w, a in zip(frequency, place, strict=True))
        total = total + kernel[(..., *place)] * unit_phase(angle)
    return total


def test_rows_and_columns_are_indexed_as_documented() -> None:
    c_out, c_in, height, width = 2, 3, 4, 5
    kernel = numbered(c_out, c_in, height, width)
    four = unfoldings(kernel)
    for o in range(c_out):
        for i in range(c_in):
            for a in range(height):
                for b in range(width):
                    entry = kernel[o, i, a, b]
                    assert four.R[o * height + a, i * width + b] == entry
                    assert four.S[o * width + b, i * height + a] == entry
                    assert four.T[o, (i * height + a) * width + b] == entry
                    assert four.U[(o * height + a) * width + b, i] == entry


def test_with_one_axis_there_are_two() -> None:
    kernel = numbered(2, 3, 4)
    rows, columns = unfolding(kernel, (True,)), unfolding(kernel, (False,))
    for o, i, a in itertools.product(range(2), range(3), range(4)):
        assert rows[o * 4 + a, i] == kernel[o, i, a]
        assert columns[o, i * 4 + a] == kernel[o, i, a]


def test_with_three_axes_there_are_eight() -> None:
    sizes = (2, 3, 4)
    kernel = numbered(2, 3, *sizes)
    for in_rows in itertools.product((False, True), repeat=3):
        matrix = unfolding(kernel, in_rows)
        for o, i, *place in itertools.product(range(2), range(3), *map(range, sizes)):
            row, column = o, i
            for kept, at, size in zip(in_rows, place, sizes, strict=True):
                if kept:
                    row = row * size + at
                else:
                    column = column * size + at
            assert matrix[row, column] == kernel[(o, i, *place)]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_batch_is_unfolded_member_by_member(axes: int) -> None:
    kernels = numbered(2, 3, 4, 2, *(3, 5, 2)[:axes])
    for in_rows in itertools.product((False, True), repeat=axes):
        batched = unfolding(kernels, in_rows)
        assert torch.equal(batched[1, 2], unfolding(kernels[1, 2], in_rows))
    if axes == 2:
        for batched, single in zip(unfoldings(kernels), unfoldings(kernels[1, 2]), strict=True):
            assert torch.equal(batched[1, 2], single)


def test_the_identity_behind_the_bounds() -> None:
    # K(w) = T (p kron I) with p the unit phases in the order of T's columns: the bound of T.
    kernel = numbered(2, 3, 3, 4)
    vertical, horizontal = 0.7, -1.9
    phases = [
        torch.tensor(-1j * (vertical * a + horizontal * b)).exp().item()
        for a in range(3)
        for b in range(4)
    ]
    stack = torch.kron(
        torch.eye(3, dtype=torch.complex128),
        torch.tensor(phases, dtype=torch.complex128)[:, None],
    )
    assert spectral_norm_of_complex(stack) == pytest.approx(math.sqrt(12))
    unfolded = unfoldings(kernel).T.to(torch.complex128) @ stack
    torch.testing.assert_close(unfolded, symbol(kernel, vertical, horizontal), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_identity_behind_every_unfolding(axes: int) -> None:
    # K(w) = (I kron p)^T A (I kron q), with outer factors of norms ||p|| and ||q||.
    sizes, frequency = (3, 2, 4)[:axes], (0.7, -1.9, 2.6)[:axes]
    kernel = numbered(2, 3, *sizes)
    for in_rows in itertools.product((False, True), repeat=axes):
        outer = {}
        for kept, channels in ((True, 2), (False, 3)):
            phases = torch.ones(1, 1, dtype=torch.complex128)
            for w, size, in_row in zip(frequency, sizes, in_rows, strict=True):
                if in_row == kept:
                    own = torch.stack([unit_phase(w * a) for a in range(size)])[:, None]
                    phases = torch.kron(phases, own)
            outer[kept] = torch.kron(torch.eye(channels, dtype=torch.complex128), phases)
        found = outer[True].mT @ unfolding(kernel, in_rows).to(torch.complex128) @ outer[False]
        torch.testing.assert_close(found, symbol(kernel, *frequency))
        product = spectral_norm_of_complex(outer[True]) * spectral_norm_of_complex(outer[False])
        assert product == pytest.approx(math.sqrt(math.prod(sizes)))


def spectral_norm_of_complex(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2).item())


def tuples(axes: int, largest: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, largest)] * axes)


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Taps, stride and dilation for one, two or three axes."""
    axes = draw(st.integers(1, 3))
    return draw(tuples(axes, 4)), draw(tuples(axes, 3)), draw(tuples(axes, 3))


@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    layer=strided(),
)
def test_shape_and_content(
    groups: int,
    channels: tuple[int, int],
    layer: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    c_out, c_in = channels
    taps, stride, dilation = layer
    weight = numbered(groups * c_out, c_in, *taps)
    kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation, groups=groups)
    assert kernel.shape[:2] == (groups, c_out)
    # A rearrangement: every entry once, and zeros.
    for group in range(groups):
        own = weight[group * c_out : (group + 1) * c_out].flatten()
        assert torch.equal(kernel[group][kernel[group] != 0].sort().values, own.sort().values)
    if set(dilation) == {1}:
        places = [math.ceil(t / s) for t, s in zip(taps, stride, strict=True)]
        assert kernel.shape[2:] == (math.prod(stride) * c_in, *places)


@given(
    layer=strided(),
    frequency=st.tuples(*[st.floats(-math.pi, math.pi)] * 3),
)
def test_strided_symbol_is_the_aliases_side_by_side(
    layer: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    frequency: tuple[float, float, float],
) -> None:
    # Decimation folds the s1*s2 aliases of a frequency onto it: the strided operator's symbol at w
    # is the row of K at (w + 2 pi j) / s, divided by sqrt(s1*s2). An independent road to its norm.
    taps, stride, dilation = layer
    weight = numbered(2, 2, *taps)
    at = frequency[: len(taps)]
    aliases = [
        symbol(
            weight,
            *(
                d * (w + 2 * math.pi * j) / s
                for d, w, j, s in zip(dilation, at, shifts, stride, strict=True)
            ),
        )
        for shifts in itertools.product(*map(range, stride))
    ]
    expected = spectral_norm_of_complex(torch.cat(aliases, dim=1)) / math.sqrt(math.prod(stride))
    # Dilation only stretches the frequency axis, by what it does not share with the stride.
    stretch = [d // math.gcd(d, s) for d, s in zip(dilation, stride, strict=True)]
    kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation)[0]
    found = symbol(kernel, *(d * w for d, w in zip(stretch, at, strict=True)))
    assert spectral_norm_of_complex(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "stride", [(1, 1), (2, 1), (2, 3), (3, 2), (1,), (2,), (3,), (2, 1, 1), (1, 3, 2), (2, 2, 3)]
)
def test_a_strided_convolution_is_an_unstrided_one_of_the_phases(stride: tuple[int, ...]) -> None:
    axes = len(stride)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, *(4, 5, 3)[:axes], generator=generator, dtype=torch.float64)
    image = torch.randn(1, 3, *[24] * axes, generator=generator, dtype=torch.float64)
    phases = torch.stack(
        [
            image[(..., *(slice(p, None, s) for p, s in zip(starts, stride, strict=True)))]
            for starts in itertools.product(*map(range, stride))
        ],
        dim=2,
    )
    kernel = unit_stride_kernel(weight, stride=stride)[0]
    # Channels in the documented order (i, p, q).
    found = CONVOLUTIONS[axes](phases.flatten(1, 2), kernel)
    expected = CONVOLUTIONS[axes](image, weight, stride=stride)
    # The taps that were filled up with zeros may cost the unstrided one a last row or column.
    assert min(found.shape[2:]) >= 6
    torch.testing.assert_close(found, expected[(..., *map(slice, found.shape[2:]))])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_dilation_needs_no_zeros_at_unit_stride(axes: int) -> None:
    weight = numbered(2, 3, *[3] * axes)
    assert torch.equal(unit_stride_kernel(weight, dilation=(2, 5, 3)[:axes])[0], weight)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_groups_are_separated(axes: int) -> None:
    taps = [3] * axes
    weight = numbered(6, 2, *taps)
    assert torch.equal(unit_stride_kernel(weight, groups=3), weight.reshape(3, 2, 2, *taps))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_gradient_flows_back_to_the_weight(axes: int) -> None:
    weight = numbered(4, 2, *[3] * axes).requires_grad_()
    unit_stride_kernel(weight, stride=2, dilation=3, groups=2).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize(
    "shape", [(2, 2), (2, 2, 3, 3, 3, 3), (0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 0)]
)
def test_weights_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a non-empty weight"):
        unit_stride_kernel(torch.ones(shape))


def test_the_number_of_axes_is_that_of_the_weight_if_it_is_allowed() -> None:
    for axes in (1, 2, 3):
        weight = torch.ones(1, 1, *[1] * axes)
        assert spatial_axes(weight) == spatial_axes(weight, allowed=(axes,)) == axes
        for other in {1, 2, 3} - {axes}:
            with pytest.raises(ValueError, match=f"two axes of channels and {other} of taps"):
                spatial_axes(weight, allowed=(other,))


@pytest.mark.parametrize("groups", [0, -1, 3, 5])
def test_groups_that_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match="expected groups to divide"):
        unit_stride_kernel(torch.ones(4, 2, 3, 3), groups=groups)


@pytest.mark.parametrize("value", [0, -1, (1, 0), (1, 2, 3), (1,), (1.5, 2), 2.0])
def test_strides_and_dilations_that_are_refused(value: object) -> None:
    for name in ("stride", "dilation"):
        with pytest.raises(ValueError, match=f"expected {name} as one or two integers"):
            unit_stride_kernel(torch.ones(4, 2, 3, 3), **{name: value})  # type: ignore[arg-type]


def test_one_number_per_axis() -> None:
    assert per_axis(3, "stride", 1, axes=2) == (3, 3)
    assert per_axis((1, 2), "stride", 1, axes=2) == (1, 2)
    assert per_axis(0, "padding", 0, axes=2) == (0, 0)
    with pytest.raises(ValueError, match="expected stride as one or two integers >= 1, got 0"):
        per_axis(0, "stride", 1, axes=2)
    for axes, count in ((1, "one integer"), (2, "one or two integers"), (3, "one or three")):
        assert per_axis(5, "stride", 1, axes) == (5,) * axes
        assert per_axis((5,) * axes, "stride", 1, axes) == (5,) * axes
        refused: tuple[Any, ...] = ((5,) * (axes + 1), (), 0, (0,) * axes, 1.5, "same", None)
        for value in refused:
            with pytest.raises(ValueError, match=f"expected stride as {count}"):
                per_axis(value, "stride", 1, axes)


def test_norm_of_an_unfolding_is_that_of_its_matrix() -> None:
    # A 1x1 kernel has four equal unfoldings, up to the order of rows.
    weight = numbered(3, 4, 1, 1)
    norms = [spectral_norm(matrix).item() for matrix in unfoldings(weight)]
    assert norms == pytest.approx([norms[0]] * 4)
