"""The dense reference, against autograd through `torch.nn.Conv2d`, which shares no code with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ff_bounds import conv2d_matrix, spectral_norm
from ff_bounds.padding import PADDING_MODES


def jacobian(weight: Tensor, size: tuple[int, int], **layer: Any) -> Tensor:
    """The Jacobian of ``nn.Conv2d``, by autograd."""
    c_in = weight.shape[1] * layer.get("groups", 1)
    module = nn.Conv2d(
        c_in, weight.shape[0], tuple(weight.shape[2:]), bias=False, dtype=weight.dtype, **layer
    )
    with torch.no_grad():
        module.weight.copy_(weight)
    point = torch.zeros(1, c_in, *size, dtype=weight.dtype)
    rows = torch.autograd.functional.jacobian(module, point)
    assert isinstance(rows, Tensor)
    return rows.reshape(-1, point.numel())


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
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_matrix_is_the_jacobian(
    mode: str, shape: tuple[int, int, int, int], size: tuple[int, int], layer: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = conv2d_matrix(weight, size, padding_mode=mode, **layer)
    expected = jacobian(weight, size, padding_mode=mode, **layer)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_the_reference_is_in_float64_whatever_the_weight() -> None:
    weight = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float16, requires_grad=True)
    matrix = conv2d_matrix(weight, (1, 1))
    assert matrix.dtype == torch.float64
    assert not matrix.requires_grad
    assert matrix.item() == float(torch.tensor(0.1, dtype=torch.float16))


def test_spectral_norm_of_known_matrices() -> None:
    assert spectral_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).item() == pytest.approx(4.0)
    assert spectral_norm(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).item() == pytest.approx(2.0)
    assert spectral_norm(torch.zeros(2, 3)).item() == 0.0
    assert spectral_norm(torch.ones(2, 8)).dtype == torch.float64
