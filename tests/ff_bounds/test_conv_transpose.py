"""The bounds of transposed convolutions against the dense Jacobian, and against the adjoint."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import (
    conv_matrix,
    conv_transpose1d_bound,
    conv_transpose2d_bound,
    conv_transpose3d_bound,
    conv_transpose_matrix,
    spectral_norm,
)
from ff_bounds.conv import METHODS
from ff_bounds.conv_transpose import conv_transpose_bound

BOUNDS: dict[int, Callable[..., Tensor]] = {
    1: conv_transpose1d_bound,
    2: conv_transpose2d_bound,
    3: conv_transpose3d_bound,
}
LARGEST_TAPS = {1: 5, 2: 4, 3: 3}
LARGEST_SIZES = {1: (12,), 2: (6, 7), 3: (4, 3, 5)}


class Layer(NamedTuple):
    """A weight, an input size that PyTorch accepts for it, and the other arguments."""

    weight: Tensor
    size: tuple[int, ...]
    arguments: dict[str, Any]


def random_weight(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def layers(draw: st.DrawFn, axes: int) -> Layer:
    groups = draw(st.integers(1, 3))
    c_in, per_group = groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))
    small = 2 if axes == 3 else 3
    taps, stride, dilation, padding, added, size = [], [], [], [], [], []
    for largest in LARGEST_SIZES[axes]:
        t, s = draw(st.integers(1, LARGEST_TAPS[axes])), draw(st.integers(1, small))
        d = draw(st.integers(1, small))
        a = draw(st.integers(0, max(s, d) - 1))
        n = draw(st.integers(1, largest if axes < 3 else 3))
        outputs = (n - 1) * s + d * (t - 1) + a + 1
        taps.append(t)
        stride.append(s)
        dilation.append(d)
        added.append(a)
        size.append(n)
        padding.append(draw(st.integers(0, min(3, (outputs - 1) // 2))))
    arguments = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "output_padding": tuple(added),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    weight = random_weight((c_in, per_group, *taps), draw(st.integers(0, 10**6)))
    if draw(st.booleans()):  # constant over the taps: near what the bound allows
        weight = weight.flatten(2)[:, :, :1].reshape(c_in, per_group, *[1] * axes)
        weight = weight.expand(c_in, per_group, *taps)
    dtype = draw(st.sampled_from([torch.float16, torch.float32, torch.float64]))
    return Layer(weight.to(dtype), tuple(size), arguments)


def grid_norm(weight: Tensor, groups: int, points: int) -> float:
    """Largest norm of the symbol, stride and dilation dropped, on a grid: at least ``||T||``."""
    kernel = weight.to(torch.float64).reshape(groups, -1, *weight.shape[1:])
    axes = tuple(range(3, kernel.ndim))
    symbols = torch.fft.fftn(kernel, s=[points] * len(axes), dim=axes)
    return float(torch.linalg.matrix_norm(symbols.flatten(3).movedim(3, 0), ord=2).amax())


@pytest.mark.parametrize("axes", [1, 2, 3])
@given(data=st.data())
def test_bound_exceeds_the_dense_jacobian(axes: int, data: st.DataObject) -> None:
    layer = data.draw(layers(axes))
    norm = spectral_norm(conv_transpose_matrix(layer.weight, layer.size, **layer.arguments))
    bound = BOUNDS[axes](layer.weight, **layer.arguments)
    # No tolerance; so that inf fails, the second inequality.
    assert bound >= norm
    taps = math.prod(layer.weight.shape[2:])
    below = grid_norm(layer.weight, layer.arguments["groups"], 8)
    assert bound <= math.sqrt(taps) * below * (1 + 1e-8)
    tol = data.draw(st.sampled_from([1e-3, 0.1]))
    close = BOUNDS[axes](layer.weight, method="supremum", tol=tol, **layer.arguments)
    assert close >= norm
    # Flat symbols in three dimensions may end with a larger gap.
    assert close <= (1.3 if axes == 3 else 1 + tol) * bound * (1 + 1e-8)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_long_signals_come_close_to_the_bound(stride: int, dilation: int, groups: int) -> None:
    # ||J|| tends to sigma* as the input grows, so the bound has to be that of this very layer:
    # with unequal channels, groups read across the wrong axis would show on either side.
    weight = random_weight((2 * groups, 3, 4), 11 * stride + dilation)
    arguments: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    added = max(stride, dilation) - 1
    matrix = conv_transpose_matrix(weight, 40, padding=2, output_padding=added, **arguments)
    bound = conv_transpose1d_bound(weight, method="supremum", tol=1e-5, **arguments)
    assert spectral_norm(matrix) <= bound <= 1.05 * spectral_norm(matrix)


@pytest.mark.parametrize("axes", [2, 3])
def test_larger_inputs_come_close_to_the_bound(axes: int) -> None:
    weight = random_weight((2, 1, *(2, 3, 1)[:axes]), 5)
    arguments: dict[str, Any] = {
        "stride": (3, 1, 2)[:axes],
        "dilation": (2, 2, 1)[:axes],
        "output_padding": (2, 1, 1)[:axes],
    }
    size = (9, 12, 2)[:axes]
    norm = spectral_norm(conv_transpose_matrix(weight, size, **arguments))
    bound = BOUNDS[axes](weight, method="supremum", tol=1e-3, **arguments)
    assert norm <= bound <= 1.05 * norm


@given(data=st.data())
def test_the_layer_is_rows_of_the_adjoint(data: st.DataObject) -> None:
    # The derivation, by matrices: the convolution that reads the whole output of the layer without
    # padding is its adjoint, and padding and output padding move a window over the rows.
    axes = data.draw(st.integers(1, 3))
    weight, size, arguments = data.draw(layers(axes))
    padding, added = arguments.pop("padding"), arguments.pop("output_padding")
    full = [
        (n - 1) * s + d * (t - 1) + 1
        for n, s, d, t in zip(
            size, arguments["stride"], arguments["dilation"], weight.shape[2:], strict=True
        )
    ]
    adjoint = conv_matrix(weight, tuple(full), **arguments).T
    assert torch.equal(conv_transpose_matrix(weight, size, **arguments), adjoint)

    rows = adjoint.reshape(-1, *full, adjoint.shape[1])
    for axis, (p, a, n) in enumerate(zip(padding, added, full, strict=True)):
        extra = torch.zeros_like(rows.narrow(1 + axis, 0, 1)).repeat_interleave(a, dim=1 + axis)
        rows = torch.cat((rows, extra), dim=1 + axis).narrow(1 + axis, p, n + a - 2 * p)
    found = conv_transpose_matrix(weight, size, padding=padding, output_padding=added, **arguments)
    assert torch.equal(found, rows.reshape(found.shape))


def test_groups_are_maximised() -> None:
    weight = torch.tensor([0.1, 0.5, 0.2]).reshape(3, 1, 1, 1)
    bound = conv_transpose2d_bound(weight, groups=3)
    assert bound.item() == pytest.approx(0.5)  # neither 0.01 (product) nor 0.8 (sum)
    assert bound >= spectral_norm(conv_transpose_matrix(weight, (4, 4), groups=3))


def test_upsampling_is_exact() -> None:
    # Outputs of a stride that covers the taps do not overlap: sqrt(taps) is the norm, while the
    # same weight without a stride has the norm taps.
    weight = torch.ones(1, 1, 3)
    root = math.sqrt(3)
    for method in METHODS:
        assert root <= conv_transpose1d_bound(weight, stride=3, method=method) <= 1.001 * root
        loosest = 3.02 if method == "gram_iteration" else 3.01  # a grid of 32 frequencies
        assert 3 <= conv_transpose1d_bound(weight, method=method) <= loosest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_gradient(axes: int, method: str) -> None:
    weight = random_weight((4, 2, *(3, 2, 2)[:axes]), 1).requires_grad_()
    arguments: dict[str, Any] = {"stride": 2, "groups": 2, "method": method, "tol": 1e-5}
    bound = BOUNDS[axes](weight, **arguments)
    (gradient,) = torch.autograd.grad(bound, weight)
    assert (gradient * weight).sum().item() == pytest.approx(bound.item(), rel=1e-12)
    # Downhill the bound falls, by as much as the gradient says.
    step = 1e-3 / gradient.norm()
    lower = BOUNDS[axes](weight - step * gradient, **arguments)
    slope = (bound - lower) / step
    assert slope.item() == pytest.approx(gradient.square().sum().item(), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_zero_weight(method: str) -> None:
    weight = torch.zeros(2, 2, 3, requires_grad=True)
    bound = conv_transpose1d_bound(weight, stride=2, method=method)
    bound.backward()
    assert bound.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_three_functions_are_one(axes: int) -> None:
    assert inspect.signature(BOUNDS[axes]) == inspect.signature(conv_transpose_bound)
    weight = random_weight((4, 2, *[2] * axes), axes)
    arguments: dict[str, Any] = {
        "stride": (3, 2, 1)[:axes],
        "padding": (2, 1, 3)[:axes],
        "output_padding": (2, 0, 1)[:axes],
        "dilation": (1, 3, 2)[:axes],
        "groups": 2,
        "method": "supremum",
        "tol": 0.05,
    }
    expected = conv_transpose_bound(weight, **arguments)
    assert BOUNDS[axes](weight, **arguments) == expected
    for other in {1, 2, 3} - {axes}:
        with pytest.raises(ValueError, match=f"two axes of channels and {other} of taps"):
            BOUNDS[other](weight)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_refuses_what_the_layer_refuses(axes: int) -> None:
    # Exhaustive for small numbers, and both ways. The input is long enough for all these paddings.
    others = axes - 1
    weight = torch.ones(1, 1, *[1] * others, 2)
    for stride in range(3):
        for dilation in range(4):
            for padding in (-1, 0, 2):
                for added in range(-1, 4):
                    arguments: dict[str, Any] = {
                        "stride": (*[1] * others, stride),
                        "dilation": (*[1] * others, dilation),
                        "padding": (*[0] * others, padding),
                        "output_padding": (*[0] * others, added),
                    }
                    try:
                        conv_transpose_matrix(weight, (*[1] * others, 8), **arguments)
                    except RuntimeError:
                        with pytest.raises(ValueError, match=r"^expected .*, got"):
                            BOUNDS[axes](weight, **arguments)
                    else:
                        assert BOUNDS[axes](weight, **arguments).item() < math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "power_iteration"}, "expected method to be one of"),
        ({"padding": "same"}, "expected padding as one or two integers"),
        ({"stride": (1, 2, 3)}, "expected stride as one or two integers"),
        ({"output_padding": (1,)}, "expected output_padding as one or two integers"),
        ({"output_padding": 1}, r"expected output_padding below .*, got output_padding \(1, 1\)"),
        ({"stride": (2, 1), "output_padding": (1, 1)}, "expected output_padding below"),
        ({"dilation": 1.5}, "expected dilation as one or two integers"),
        ({"groups": 0}, "expected groups to divide c_in=4, got 0"),
        ({"groups": 3}, "expected groups to divide c_in=4, got 3"),
    ],
    ids=str,
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_transpose2d_bound(torch.ones(4, 2, 3, 3), **arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "weight",
    [
        torch.full((1, 1, 2), math.nan),
        torch.full((1, 1, 2), math.inf),
        torch.ones(1, 1, 2, dtype=torch.int64),
        torch.ones(1, 1, 2, dtype=torch.complex64),
        torch.ones(1, 2),
        torch.ones(0, 1, 2),
        torch.ones(1, 0, 2),
        torch.ones(1, 1, 0),
    ],
)
def test_refused_weights(weight: Tensor, method: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        conv_transpose1d_bound(weight, method=method)
