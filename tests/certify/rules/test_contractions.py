"""Rules of layers that are contractions as a whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from certify import CertifiedModel, UnsupportedModel
from models import BlockReflectorConv2d, SLLConv2d, build
from tests.certify.rules.harness import (
    NOISE,
    Case,
    ascend,
    certify,
    check,
    gain,
    jacobian,
    points,
    quotients,
)


def sll(
    channels: int, inner: int | None = None, kernel_size: int = 3, *, scale: float = 1.0
) -> SLLConv2d:
    """With random ``q`` and offsets, from torch's global generator."""
    layer = SLLConv2d(channels, inner, kernel_size)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.normal_(std=0.3 * scale)
        layer.log_q.normal_(std=2.0)
    return layer


def reflector(channels: int, rank: int | None = None, kernel_size: int = 3) -> BlockReflectorConv2d:
    layer = BlockReflectorConv2d(channels, rank, kernel_size)
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    return layer


CASES = [
    Case("sll", (SLLConv2d,), lambda: SLLConv2d(2, 3), (2, 4, 4)),
    Case("sll of other q", (SLLConv2d,), lambda: sll(3, 2), (3, 3, 5)),
    Case("sll of one tap", (SLLConv2d,), lambda: sll(3, 4, 1), (3, 2, 2)),
    Case("block reflector", (BlockReflectorConv2d,), lambda: reflector(4), (4, 4, 5), 1.01),
    Case("reflected as a whole", (BlockReflectorConv2d,), lambda: reflector(2, 2), (2, 3, 4), 1.1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def largest_gain(model: nn.Module, shape: tuple[int, ...], spread: float = 1.0) -> float:
    """The largest norm of Jacobians, and quotient of sampled and of ascended pairs."""
    found = [gain(model, spread * x) for x in points(shape)]
    for distance in (1.0, 1e-2):
        x = spread * torch.randn(20, *shape, dtype=torch.float64)
        y = x + spread * distance * torch.randn_like(x)
        found += [quotients(model, *pair).max().item() for pair in ((x, y), ascend(model, x, y))]
    return max(found)


@settings(max_examples=30)
@given(
    channels=st.integers(1, 3),
    inner=st.integers(1, 4),
    kernel_size=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 10_000),
)
def test_sll_never_exceeds_its_constant(
    channels: int, inner: int, kernel_size: int, size: tuple[int, int], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model, bound = certify(sll(channels, inner, kernel_size, scale=scale), (channels, *size))
    for x in points((channels, *size)):
        assert gain(model, x) <= bound * NOISE
    assert 1.0 <= bound <= 1.0 + 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_the_constant_of_sll_does_not_depend_on_the_weights_scale(scale: float) -> None:
    torch.manual_seed(0)
    layer = sll(2, 3).double()
    with torch.no_grad():
        layer.weight.mul_(scale)
    model, bound = certify(layer, (2, 4, 4))
    assert largest_gain(model, (2, 4, 4)) <= bound * NOISE
    assert bound <= 1.0 + 1e-5


@pytest.mark.parametrize("factor", [0.999, 0.5, 0.1, 1e-3])
def test_sll_with_divisors_that_are_too_small(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is what the layer computes with: ``sqrt(1 + 4 (s - 1) s)`` with ``s > 1``."""
    divisors = SLLConv2d.divisors
    monkeypatch.setattr(SLLConv2d, "divisors", lambda layer: factor * divisors(layer))
    largest = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        layer = SLLConv2d(1, 1, 1)  # x - 2 / factor relu(x), where all is tight
        model, bound = certify(layer, (1, 1, 1))
        assert max(gain(model, x) for x in points((1, 1, 1))) <= bound * NOISE
        assert abs(1.0 - 2.0 / factor) <= bound * NOISE
        assert bound <= abs(1.0 - 2.0 / factor) * (1 + 1e-9)
        model, bound = certify(sll(2, 3), (2, 4, 4))
        found = largest_gain(model, (2, 4, 4))
        assert found <= bound * NOISE
        assert bound <= math.sqrt(1.0 + 4.0 * (1.0 / factor - 1.0) / factor) * (1 + 1e-9)
        largest = max(largest, found)
    assert largest > 1.0 or factor > 0.9


def test_sll_with_larger_divisors_is_a_contraction_too(monkeypatch: pytest.MonkeyPatch) -> None:
    divisors = SLLConv2d.divisors
    monkeypatch.setattr(SLLConv2d, "divisors", lambda layer: 3.0 * divisors(layer))
    torch.manual_seed(0)
    model, bound = certify(sll(2, 3), (2, 4, 4))
    assert largest_gain(model, (2, 4, 4)) <= bound * NOISE
    assert 1.0 <= bound <= 1.0 + 1e-12


class Careless(SLLConv2d):
    """Takes one for each divisor."""

    def divisors(self) -> Tensor:
        return torch.ones_like(self.bias)


def test_a_subclass_does_not_inherit_the_rule() -> None:
    torch.manual_seed(0)
    layer = Careless(2, 3)
    with torch.no_grad():
        layer.weight.mul_(5.0)
    model, bound = certify(layer, (2, 4, 4))
    found = largest_gain(model, (2, 4, 4))
    assert 2.0 < found <= bound * NOISE


def test_divisors_replaced_on_an_instance_are_refused() -> None:
    layer = SLLConv2d(2, 3)
    layer.divisors = lambda: torch.ones(3)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModel, match="method 'divisors' replaced on the instance"):
        certify(layer, (2, 4, 4))


def test_sll_without_weights() -> None:
    layer = SLLConv2d(2, 3)
    nn.init.zeros_(layer.weight)
    assert 1.0 <= certify(layer, (2, 4, 4))[1] <= 1.0 + 1e-12
    with torch.no_grad():
        layer.weight[1] = torch.rand(2, 3, 3)
    model, bound = certify(layer, (2, 4, 4))
    assert largest_gain(model, (2, 4, 4)) <= bound * NOISE
    assert bound <= 1.0 + 1e-5


@pytest.mark.parametrize("log_q", [-300.0, 300.0, 800.0])
def test_q_beyond_what_is_proven(log_q: float) -> None:
    """No constant below the gain, whatever happens to ``q``."""
    torch.manual_seed(0)
    layer = sll(2, 3).double()
    with torch.no_grad():
        layer.log_q[0] = log_q
    model, bound = certify(layer, (2, 4, 4))
    assert bound == math.inf or largest_gain(model, (2, 4, 4)) <= bound * NOISE


@settings(max_examples=25)
@given(
    channels=st.integers(1, 4),
    rank=st.integers(1, 4),
    kernel_size=st.integers(1, 3),
    size=st.tuples(st.integers(3, 4), st.integers(3, 4)),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 10_000),
)
def test_reflectors_are_nearly_orthogonal_and_never_exceed_their_constant(
    channels: int, rank: int, kernel_size: int, size: tuple[int, int], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = reflector(channels, min(rank, channels), kernel_size)
    with torch.no_grad():
        layer.weight.mul_(scale)
    model, bound = certify(layer, (channels, *size))
    rows = jacobian(model, torch.randn(1, channels, *size, dtype=torch.float64))
    assert torch.linalg.matrix_norm(rows, ord=2).item() <= bound * NOISE
    # Orthogonal, but for what ``d`` makes of the weakest direction of any frequency.
    spectrum = torch.fft.rfft2(layer.weight.detach().double(), s=size).flatten(2).permute(2, 0, 1)
    gains = torch.linalg.svdvals(spectrum).square()
    off = 1e-9 + 5e-4 * (gains.mean() / gains.min()).item()
    defect = rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)
    assert torch.linalg.matrix_norm(defect, ord=2).item() <= off
    assert bound <= 1.0 + 2.0 * off


@pytest.mark.parametrize("channels", [4, 16, 64])
def test_constants_of_reflectors_are_nearly_one(channels: int) -> None:
    torch.manual_seed(0)
    assert 1.0 <= certify(BlockReflectorConv2d(channels), (channels, 8, 8))[1] <= 1.003


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 4, 4), (2, 3, 6), (2, 5, 4)])
def test_reflectors_by_other_matrices_never_exceed_their_constant(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever multiplies the frequencies, also where an inverse transform drops some of it."""

    def anything(layer: nn.Module, height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(height * width)
        count = height * (width // 2 + 1)
        return torch.randn(count, 2, 2, generator=generator, dtype=torch.complex128)

    monkeypatch.setattr(BlockReflectorConv2d, "reflectors", anything)
    model, bound = certify(BlockReflectorConv2d(2), shape)
    assert 1.0 < largest_gain(model, shape) <= bound * NOISE
    assert bound < 50.0


def test_reflectors_of_dependent_columns_never_exceed_their_constant() -> None:
    torch.manual_seed(0)
    layer = reflector(4, 3)
    with torch.no_grad():
        layer.weight[:, 1] = 2.0 * layer.weight[:, 0]
        layer.weight[:, 2] *= 1e-7
    model, bound = certify(layer, (4, 3, 4))
    assert largest_gain(model, (4, 3, 4)) <= bound * NOISE
    assert bound < 4.0


@pytest.mark.parametrize("layer", [SLLConv2d(2), BlockReflectorConv2d(2)], ids=["sll", "reflector"])
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 4), (2,)])
def test_other_shapes_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises((UnsupportedModel, ValueError), match=r"expected|does not fit"):
        certify(layer, shape)


def test_what_would_be_broadcast_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BlockReflectorConv2d(2)
    layer.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedModel, match=r"bias has shape \(1,\)"):
        certify(layer, (2, 4, 4))
    monkeypatch.setattr(SLLConv2d, "divisors", lambda layer: torch.ones(1, dtype=torch.float64))
    with pytest.raises(UnsupportedModel, match=r"t has shape \(1,\)"):
        certify(SLLConv2d(2, 3), (2, 4, 4))


def test_images_smaller_than_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="expected images of at least 3 x 3"):
        certify(BlockReflectorConv2d(2), (2, 2, 4))


@pytest.mark.parametrize("block", ["sll", "reflector"])
def test_networks_of_them(block: str) -> None:
    torch.manual_seed(0)
    model = build(
        "liresnet", input_shape=(1, 12, 12), width=4, depth=(1, 1), dense=(6,), block=block
    )
    certified = CertifiedModel(model, (1, 12, 12), method="supremum")
    bound, margins = certified.lipschitz().item(), certified.margin_lipschitz()
    for x in points((1, 12, 12)):
        rows = jacobian(certified.model, x)
        assert torch.linalg.matrix_norm(rows, ord=2).item() <= bound * NOISE
        assert bool((torch.cdist(rows, rows) <= margins * NOISE + 1e-12).all())
    assert bound < 10.0
