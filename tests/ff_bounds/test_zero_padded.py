from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import conv_bound, conv_matrix, spectral_norm, zero_padded, zero_padded_bound
from ff_bounds.rounding import UNIT_ROUNDOFF
from tests.ff_bounds.test_supremum import KINDS, make_kernel


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, dict[str, object]]:
    axes = draw(st.integers(1, 2))
    taps = [draw(st.integers(1, 4)) for _ in range(axes)]
    groups, inputs, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    shape = (groups, outputs, inputs, *taps)
    weight = make_kernel(draw(st.sampled_from(KINDS)), shape, draw(st.integers(0, 10**6)))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(axes))
    least = [
        max(1, d * (t - 1) + 1 - 2 * p) for d, t, p in zip(dilation, taps, padding, strict=True)
    ]
    options = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(axes)),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    size = tuple(draw(st.integers(n, n + 6)) for n in least)
    return weight.flatten(0, 1), {**options, "input_size": size}


def dense_norm(weight: Tensor, options: dict[str, object]) -> tuple[float, float]:
    """Norm of the dense Jacobian, and the rounding of that."""
    rest = {name: value for name, value in options.items() if name != "input_size"}
    matrix = conv_matrix(weight, options["input_size"], **rest)  # type: ignore[arg-type]
    return float(spectral_norm(matrix)), 8.0 * UNIT_ROUNDOFF * float(matrix.norm()) * len(matrix)


@given(layers())
def test_covers_the_dense_jacobian(case: tuple[Tensor, dict[str, object]]) -> None:
    weight, options = case
    norm, rounding = dense_norm(weight, options)
    bound = float(zero_padded_bound(weight, **options))  # type: ignore[arg-type]
    assert bound >= norm - rounding
    assert bound <= norm * (1 + 2.1e-3) + rounding + 1e-300
    best = float(conv_bound(weight, method="best", **options))  # type: ignore[arg-type]
    assert norm - rounding <= best <= bound


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 6, 3, 3), (5, 5, 5, 3)])
def test_is_tight_and_below_the_norm_on_the_lattice(shape: tuple[int, ...]) -> None:
    weight = make_kernel("normal", (1, *shape), 3)[0]
    options: dict[str, object] = {"padding": 1, "input_size": (9, 7)}
    norm, _ = dense_norm(weight, options)
    bound = float(zero_padded_bound(weight, padding=1, input_size=(9, 7)))
    assert norm < bound < norm * (1 + 2e-5)
    assert bound < 0.995 * float(conv_bound(weight, padding=1, method="supremum"))


@pytest.mark.parametrize("by_outputs", [True, False])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_blocks_are_those_of_the_gram_matrix(by_outputs: bool, stride: int, dilation: int) -> None:
    channels = (2, 3) if by_outputs else (6, 2)
    weight = torch.randn(*channels, 3, 2, dtype=torch.float64)
    layer = zero_padded._Layer(weight, (stride, 1), ((1, 1), (0, 1)), (dilation, 1), (11, 4))
    matrix = torch.stack(
        [
            layer.push(row.reshape(1, channels[1], 11, 4))[0].permute(1, 2, 0).flatten()
            for row in torch.eye(channels[1] * 44, dtype=torch.float64)
        ],
        dim=1,
    )
    order = torch.arange(channels[1] * 44).reshape(channels[1], 11, 4).permute(1, 2, 0).flatten()
    matrix = matrix[:, order]  # rows of the image outermost, channels innermost
    assert layer.by_outputs == (len(matrix) <= matrix.shape[1])
    gram = matrix @ matrix.mT if layer.by_outputs else matrix.mT @ matrix
    diagonal, beside = zero_padded._gram(layer)
    found = torch.block_diag(*diagonal)
    starts = torch.tensor([0, *map(len, diagonal)]).cumsum(0).tolist()
    for index, block in enumerate(beside):
        rows = slice(starts[index], starts[index + 1])
        columns = slice(starts[index + 1], starts[index + 2])
        found[rows, columns], found[columns, rows] = block, block.mT
    torch.testing.assert_close(found, gram, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300, 5e-324])
def test_any_scale(scale: float) -> None:
    weight = torch.full((1, 1, 1), scale, dtype=torch.float64)
    bound = float(zero_padded_bound(weight, input_size=3))
    assert scale <= bound <= max(scale * (1 + 1e-4), 1e-307)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_are_taken_exactly(dtype: torch.dtype) -> None:
    weight = torch.randn(2, 3, 3, 3).to(dtype)
    found = zero_padded_bound(weight, padding=1, input_size=5)
    assert found.dtype == torch.float64
    assert found == zero_padded_bound(weight.double(), padding=1, input_size=5)


def test_zero_weights() -> None:
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    bound = zero_padded_bound(weight, input_size=5)
    bound.backward()
    assert bound == 0.0
    assert weight.grad is not None
    assert bool((weight.grad == 0.0).all())


def test_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    options = {"stride": (1, 2), "padding": (1, 0), "input_size": (6, 7), "groups": 1}
    bound = zero_padded_bound(weight, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(bound, weight)
    assert (gradient * weight).sum().item() == pytest.approx(bound.item(), rel=3e-5, abs=0.0)
    other = torch.randn_like(weight)

    def norm(step: float) -> float:
        return dense_norm((weight + step * other).detach(), options)[0]

    difference = (norm(1e-6) - norm(-1e-6)) / 2e-6
    assert (gradient * other).sum().item() == pytest.approx(difference, rel=0.0, abs=1e-4)


def test_the_group_with_the_largest_norm_has_the_gradient() -> None:
    weight = torch.ones(4, 1, 3, 3)
    weight[2:] *= 2.0
    weight.requires_grad_()
    zero_padded_bound(weight, groups=2, input_size=4).backward()
    assert weight.grad is not None
    assert bool((weight.grad[:2] == 0.0).all())
    assert bool((weight.grad[2:] > 0.0).all())


def test_same_and_valid() -> None:
    weight = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    for padding in ("same", "valid"):
        norm, rounding = dense_norm(weight, {"padding": padding, "input_size": (6, 5)})
        bound = float(zero_padded_bound(weight, padding=padding, input_size=(6, 5)))
        assert norm - rounding <= bound <= norm * (1 + 1e-3)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(1, 1, 3, 3)
    with pytest.raises(ValueError, match="that the kernel fits in"):
        zero_padded_bound(weight, input_size=2)
    with pytest.raises(ValueError, match="finite weight"):
        zero_padded_bound(weight * math.nan, input_size=4)
    with pytest.raises(ValueError, match="axes"):
        zero_padded_bound(weight[..., None], input_size=4)
    with pytest.raises(ValueError, match="needs padding_mode='zeros' and an input_size"):
        conv_bound(weight, method="zero_padded")
    monkeypatch.setattr(zero_padded, "MAX_WORK", 10.0)
    with pytest.raises(zero_padded.TooLarge, match="operations"):
        zero_padded_bound(weight, input_size=40)
    lattice = conv_bound(weight, method="supremum")
    assert conv_bound(weight, method="best", input_size=40) <= lattice  # goes on without


@pytest.mark.parametrize(
    "taps", [[1e30, 1e-300, 1e30], [1e200, 1e-140, 1e200], [1.0, 1e-9, 1.0], [0.0, 1e-300, 0.0]]
)
def test_taps_that_meet_nothing_do_not_matter(taps: list[float]) -> None:
    weight = torch.tensor([[taps]], dtype=torch.float64, requires_grad=True)
    bound = zero_padded_bound(weight, padding=1, input_size=1)  # only the middle one counts
    assert taps[1] <= bound.item() <= taps[1] * (1 + 1e-4)
    (gradient,) = torch.autograd.grad(bound, weight)
    assert gradient.flatten().tolist() == pytest.approx([0.0, 1.0, 0.0], rel=0.0, abs=1e-3)


def test_without_watching() -> None:
    weight = torch.randn(3, 2, 3, 3)
    expected = zero_padded_bound(weight, padding=1, input_size=5)
    with torch.inference_mode():
        assert zero_padded_bound(weight.clone(), padding=1, input_size=5) == expected


@pytest.mark.parametrize(("outputs", "groups"), [(5, 2), (4, 3), (5, 9), (4, 0), (4, -1)])
def test_groups_that_do_not_divide(outputs: int, groups: int) -> None:
    for weight in (torch.randn(outputs, 1, 3, 3), torch.zeros(outputs, 1, 3, 3)):
        with pytest.raises(ValueError, match="groups"):
            zero_padded_bound(weight, groups=groups, input_size=5)


def test_zero_weights_are_checked_too() -> None:
    with pytest.raises(ValueError, match="that the kernel fits in"):
        zero_padded_bound(torch.zeros(1, 1, 3, 3), input_size=2)


def test_long_signals() -> None:
    weight = torch.randn(3, 3, 5, dtype=torch.float64)
    bound = zero_padded_bound(weight, padding=2, input_size=2000)
    lattice = conv_bound(weight, method="supremum", tol=1e-6)
    assert 0.999 * lattice < bound <= lattice * (1 + 1e-4)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e300, 1.7e308])
def test_gradients_at_any_scale(scale: float) -> None:
    weight = torch.full((1, 1, 3, 3), scale, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(zero_padded_bound(weight, padding=1, input_size=3), weight)
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(zero_padded_bound(ones, padding=1, input_size=3), ones)
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-4)


def test_large_taps_that_meet_nothing() -> None:
    weight = torch.tensor([[[1.7e308, 0.0, 1.7e308]]], dtype=torch.float64)
    assert zero_padded_bound(weight, padding=1, input_size=1) == 0.0
