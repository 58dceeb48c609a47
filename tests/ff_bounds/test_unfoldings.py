"""The unfoldings and the polyphase kernel are what their names say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ff_bounds import spectral_norm, unfoldings, unit_stride_kernel
from ff_bounds.unfoldings import pair


def numbered(*shape: int) -> Tensor:
    """A kernel whose entries are all different, so that a misplaced one is seen."""
    return torch.arange(1.0, 1.0 + math.prod(shape), dtype=torch.float64).reshape(shape)


def symbol(kernel: Tensor, vertical: float, horizontal: float) -> Tensor:
    """``K(w) = sum_ab K[..., a, b] exp(-i (w1 a + w2 b))``, straight from the definition."""
    total = torch.zeros(kernel.shape[:-2], dtype=torch.complex128)
    for a in range(kernel.shape[-2]):
        for b in range(kernel.shape[-1]):
            phase = torch.tensor(-1j * (vertical * a + horizontal * b), dtype=torch.complex128)
            total = total + kernel[..., a, b] * torch.exp(phase)
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


def test_a_batch_is_unfolded_member_by_member() -> None:
    kernels = numbered(2, 3, 4, 2, 3, 5)
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


def spectral_norm_of_complex(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2).item())


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    taps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=PAIRS,
    dilation=PAIRS,
)
def test_shape_and_content(
    groups: int,
    channels: tuple[int, int],
    taps: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    c_out, c_in = channels
    weight = numbered(groups * c_out, c_in, *taps)
    kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation, groups=groups)
    assert kernel.shape[:2] == (groups, c_out)
    # A rearrangement: every entry once, and zeros.
    for group in range(groups):
        own = weight[group * c_out : (group + 1) * c_out].flatten()
        assert torch.equal(kernel[group][kernel[group] != 0].sort().values, own.sort().values)
    if dilation == (1, 1):
        expected = (
            stride[0] * stride[1] * c_in,
            math.ceil(taps[0] / stride[0]),
            math.ceil(taps[1] / stride[1]),
        )
        assert kernel.shape[2:] == expected


@given(
    taps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=PAIRS,
    dilation=PAIRS,
    frequency=st.tuples(st.floats(-math.pi, math.pi), st.floats(-math.pi, math.pi)),
)
def test_strided_symbol_is_the_aliases_side_by_side(
    taps: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    frequency: tuple[float, float],
) -> None:
    # Decimation folds the s1*s2 aliases of a frequency onto it: the strided operator's symbol at w
    # is the row of K at (w + 2 pi j) / s, divided by sqrt(s1*s2). An independent road to its norm.
    weight = numbered(2, 2, *taps)
    aliases = [
        symbol(
            weight,
            dilation[0] * (frequency[0] + 2 * math.pi * j) / stride[0],
            dilation[1] * (frequency[1] + 2 * math.pi * k) / stride[1],
        )
        for j in range(stride[0])
        for k in range(stride[1])
    ]
    expected = spectral_norm_of_complex(torch.cat(aliases, dim=1)) / math.sqrt(math.prod(stride))
    # Dilation only stretches the frequency axis, by what it does not share with the stride.
    stretch = [d // math.gcd(d, s) for d, s in zip(dilation, stride, strict=True)]
    kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation)[0]
    found = symbol(kernel, stretch[0] * frequency[0], stretch[1] * frequency[1])
    assert spectral_norm_of_complex(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_a_strided_convolution_is_an_unstrided_one_of_the_phases(stride: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    image = torch.randn(1, 3, 24, 24, generator=generator, dtype=torch.float64)
    phases = torch.stack(
        [
            image[:, :, p :: stride[0], q :: stride[1]]
            for p in range(stride[0])
            for q in range(stride[1])
        ],
        dim=2,
    )
    kernel = unit_stride_kernel(weight, stride=stride)[0]
    found = F.conv2d(phases.flatten(1, 2), kernel)  # channels in the documented order (i, p, q)
    expected = F.conv2d(image, weight, stride=stride)
    # The taps that were filled up with zeros may cost the unstrided one a last row or column.
    rows, columns = found.shape[-2:]
    assert min(rows, columns) >= 6
    torch.testing.assert_close(found, expected[..., :rows, :columns])


def test_dilation_needs_no_zeros_at_unit_stride() -> None:
    weight = numbered(2, 3, 3, 3)
    assert torch.equal(unit_stride_kernel(weight, dilation=(2, 5))[0], weight)


def test_groups_are_separated() -> None:
    weight = numbered(6, 2, 3, 3)
    assert torch.equal(unit_stride_kernel(weight, groups=3), weight.reshape(3, 2, 2, 3, 3))


def test_gradient_flows_back_to_the_weight() -> None:
    weight = numbered(4, 2, 3, 3).requires_grad_()
    unit_stride_kernel(weight, stride=2, dilation=3, groups=2).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 2), (0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3)])
def test_weights_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a non-empty weight"):
        unit_stride_kernel(torch.ones(shape))


@pytest.mark.parametrize("groups", [0, -1, 3, 5])
def test_groups_that_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match="expected groups to divide"):
        unit_stride_kernel(torch.ones(4, 2, 3, 3), groups=groups)


@pytest.mark.parametrize("value", [0, -1, (1, 0), (1, 2, 3), (1,), (1.5, 2), 2.0])
def test_strides_and_dilations_that_are_refused(value: object) -> None:
    for name in ("stride", "dilation"):
        with pytest.raises((ValueError, TypeError)):
            unit_stride_kernel(torch.ones(4, 2, 3, 3), **{name: value})  # type: ignore[arg-type]


def test_pairs() -> None:
    assert pair(3, "stride", 1) == (3, 3)
    assert pair((1, 2), "stride", 1) == (1, 2)
    assert pair(0, "padding", 0) == (0, 0)
    with pytest.raises(ValueError, match="expected stride as one or two integers >= 1, got 0"):
        pair(0, "stride", 1)


def test_norm_of_an_unfolding_is_that_of_its_matrix() -> None:
    # A 1x1 kernel has four equal unfoldings, up to the order of rows.
    weight = numbered(3, 4, 1, 1)
    norms = [spectral_norm(matrix).item() for matrix in unfoldings(weight)]
    assert norms == pytest.approx([norms[0]] * 4)
