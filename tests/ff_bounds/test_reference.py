"""The dense references, against autograd through `torch.nn`'s layers, which share no code."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ff_bounds import conv2d_matrix, conv_matrix, conv_transpose_matrix, spectral_norm
from ff_bounds.padding import PADDING_MODES

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def random_weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def jacobian(module: nn.Module, weight: Tensor, c_in: int, size: tuple[int, ...]) -> Tensor:
    """The Jacobian of a layer with this weight, by autograd."""
    parameter = module.weight
    assert isinstance(parameter, Tensor)
    with torch.no_grad():
        parameter.copy_(weight)
    point = torch.zeros(1, c_in, *size, dtype=weight.dtype)
    rows = torch.autograd.functional.jacobian(module, point)
    assert isinstance(rows, Tensor)
    return rows.reshape(-1, point.numel())


def conv_jacobian(weight: Tensor, size: tuple[int, ...], **layer: Any) -> Tensor:
    c_in = weight.shape[1] * layer.get("groups", 1)
    module = LAYERS[len(size)](
        c_in, weight.shape[0], tuple(weight.shape[2:]), bias=False, dtype=weight.dtype, **layer
    )
    return jacobian(module, weight, c_in, size)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize(
    ("shape", "size", "layer"),
    [
        ((2, 3, 3, 3), (4, 5), {"padding": 1}),
        ((2, 2, 1, 1), (2, 3), {}),
        ((2, 2, 1, 1), (2, 3), {"padding": 1}),  # padding without reach: rows come twice
        ((2, 1, 2, 3), (5, 4), {"stride": (2, 1), "padding": (0, 2)}),
        ((4, 2, 3, 2), (5, 6), {"groups": 2, "padding": (2, 1), "stride": 2}),
        ((3, 1, 3, 3), (4, 4), {"groups": 3, "padding": "valid"}),
        ((1, 2, 3, 2), (6, 5), {"dilation": (2, 3), "padding": (2, 1)}),
        ((1, 1, 3, 3), (4, 5), {"padding": "same"}),
        ((1, 1, 3, 3), (6, 5), {"padding": "same", "dilation": (2, 1)}),
        ((1, 2, 2, 4), (4, 5), {"padding": "same"}),  # even: PyTorch pads one more behind
        ((1, 1, 4, 2), (6, 7), {"padding": "same", "dilation": (1, 3)}),
        ((1, 1, 5, 5), (3, 3), {"padding": 2}),  # kernel larger than the input
        ((2, 3, 3), (5,), {"padding": 1}),
        ((4, 1, 2), (6,), {"groups": 2, "stride": 2, "dilation": 3, "padding": 2}),
        ((2, 2, 4), (7,), {"padding": "same", "dilation": 2}),
        ((2, 1, 3, 2, 1), (3, 4, 5), {"padding": (1, 0, 2), "stride": (1, 2, 3)}),
        ((2, 1, 2, 1, 2), (4, 3, 4), {"groups": 2, "padding": 1, "dilation": (3, 1, 2)}),
        ((1, 2, 2, 3, 4), (3, 4, 5), {"padding": "same"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_matrix_is_the_jacobian(
    mode: str, shape: tuple[int, ...], size: tuple[int, ...], layer: dict[str, Any]
) -> None:
    weight = random_weight(shape)
    found = conv_matrix(weight, size, padding_mode=mode, **layer)
    expected = conv_jacobian(weight, size, padding_mode=mode, **layer)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    if len(size) == 2:
        assert torch.equal(conv2d_matrix(weight, size, padding_mode=mode, **layer), found)


TRANSPOSED_CASES = [
    ((2, 3, 3), (4,), {}),
    ((3, 1, 1), (3,), {"stride": 3, "output_padding": 2}),  # rows that nothing reaches
    ((4, 3, 2), (4,), {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 1, 3), (5,), {"dilation": 4, "output_padding": 3, "padding": 2}),
    ((2, 3, 3, 2), (3, 4), {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)}),
    (
        (6, 1, 2, 3),
        (3, 2),
        {"groups": 3, "stride": 2, "dilation": (1, 3), "output_padding": (1, 2)},
    ),
    ((1, 2, 1, 2), (4, 3), {"stride": 3, "padding": (2, 0)}),
    ((2, 1, 2, 3, 1), (2, 3, 2), {"stride": (1, 2, 3), "output_padding": (0, 1, 2)}),
    ((2, 2, 2, 1, 3), (2, 2, 3), {"groups": 2, "dilation": (2, 1, 2), "padding": (1, 0, 3)}),
]


@pytest.mark.parametrize(("shape", "size", "layer"), TRANSPOSED_CASES)
def test_the_transposed_matrix_is_the_jacobian(
    shape: tuple[int, ...], size: tuple[int, ...], layer: dict[str, Any]
) -> None:
    weight = random_weight(shape)
    module = TRANSPOSED[len(size)](
        shape[0],
        shape[1] * layer.get("groups", 1),
        shape[2:],
        bias=False,
        dtype=weight.dtype,
        **layer,
    )
    found = conv_transpose_matrix(weight, size, **layer)
    expected = jacobian(module, weight, shape[0], size)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("shape", "size", "layer"), TRANSPOSED_CASES)
def test_the_transposed_matrix_is_written_out(
    shape: tuple[int, ...], size: tuple[int, ...], layer: dict[str, Any]
) -> None:
    # The formula that the bound is derived from, entry by entry.
    axes = len(size)

    def each(name: str, default: int) -> tuple[int, ...]:
        value = layer.get(name, default)
        return (value,) * axes if isinstance(value, int) else value

    stride, dilation = each("stride", 1), each("dilation", 1)
    padding, added = each("padding", 0), each("output_padding", 0)
    groups = layer.get("groups", 1)
    c_in, per_group, *taps = shape
    weight = random_weight(shape)
    lengths = [
        (n - 1) * s - 2 * p + d * (t - 1) + a + 1
        for n, s, p, d, t, a in zip(size, stride, padding, dilation, taps, added, strict=True)
    ]
    expected = torch.zeros(per_group * groups, *lengths, c_in, *size, dtype=torch.float64)
    for i, o in itertools.product(range(c_in), range(per_group)):
        group = i // (c_in // groups)
        for m in itertools.product(*map(range, size)):
            for a in itertools.product(*map(range, taps)):
                n = [
                    s * at + d * tap - p
                    for s, at, d, tap, p in zip(stride, m, dilation, a, padding, strict=True)
                ]
                if all(0 <= at < length for at, length in zip(n, lengths, strict=True)):
                    row = (group * per_group + o, *n)
                    expected[(*row, i, *m)] += weight[(i, o, *a)]
    found = conv_transpose_matrix(weight, size, **layer)
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-14, atol=1e-14)
    assert found.shape[1] == c_in * math.prod(size)


def test_the_reference_is_in_float64_whatever_the_weight() -> None:
    weight = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float16, requires_grad=True)
    for matrix in (conv2d_matrix(weight, (1, 1)), conv_transpose_matrix(weight, (1, 1))):
        assert matrix.dtype == torch.float64
        assert not matrix.requires_grad
        assert matrix.item() == float(torch.tensor(0.1, dtype=torch.float16))


def test_spectral_norm_of_known_matrices() -> None:
    assert spectral_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).item() == pytest.approx(4.0)
    assert spectral_norm(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).item() == pytest.approx(2.0)
    assert spectral_norm(torch.zeros(2, 3)).item() == 0.0
    assert spectral_norm(torch.ones(2, 8)).dtype == torch.float64
