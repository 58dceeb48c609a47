"""Layers of deel-torchlip, orthogonium and torchvision, where these are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certify import CertifiedModel, UnsupportedModel
from tests.certify.rules.harness import NOISE, ascend, gain, quotients


def largest_gain(model: nn.Module, shape: tuple[int, ...]) -> float:
    # Not at ties, where autograd's result is no derivative.
    found = [gain(model, torch.randn(1, *shape, dtype=torch.float64)) for _ in range(5)]
    for distance in (1.0, 1e-2):
        x = torch.randn(20, *shape, dtype=torch.float64)
        y = x + distance * torch.randn_like(x)
        found += [quotients(model, x, y).max().item()]
        found += [quotients(model, *ascend(model, x, y)).max().item()]
    return max(found)


def check(layer: nn.Module, shape: tuple[int, ...], factor: float) -> float:
    """Bound a layer after a few steps of training; compare with gains."""
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Flatten()).train()
    for _ in range(3):
        model(torch.rand(4, *shape))
    certified = CertifiedModel(model.eval(), shape, method="supremum")
    bound = certified.lipschitz().item()
    found = largest_gain(certified.model, shape)
    assert found <= bound * NOISE
    assert bound <= factor * found
    return bound


TORCHLIP: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...], float]] = {
    "SpectralLinear": (lambda lib: lib.SpectralLinear(8, 6), (8,), 1.01),
    "FrobeniusLinear": (lambda lib: lib.FrobeniusLinear(8, 1), (8,), 1.01),
    "SpectralConv2d": (lambda lib: lib.SpectralConv2d(2, 4, 3, padding=1), (2, 6, 6), 1.4),
    "FrobeniusConv2d": (lambda lib: lib.FrobeniusConv2d(2, 4, 3, padding=1), (2, 6, 6), 1.4),
    "MaxMin": (lambda lib: lib.MaxMin(), (4,), 1.01),
    "GroupSort2": (lambda lib: lib.GroupSort2(), (4,), 1.01),
    "GroupSort": (lambda lib: lib.GroupSort(4, k_coef_lip=2.0), (8,), 1.01),
    "FullSort": (lambda lib: lib.FullSort(), (5,), 1.01),
    "HouseHolder": (lambda lib: lib.HouseHolder(4), (4, 2, 2), 1.01),
    "LPReLU": (lambda lib: lib.LPReLU(init=-0.5), (4,), 1.01),
    "ScaledAvgPool2d": (lambda lib: lib.ScaledAvgPool2d(2), (2, 4, 4), 1.01),
    "ScaledL2NormPool2d": (lambda lib: lib.ScaledL2NormPool2d(2), (2, 4, 4), 1.01),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCHLIP)
def test_torchlip(name: str) -> None:
    library = pytest.importorskip("deel.torchlip")
    make, shape, factor = TORCHLIP[name]
    check(make(library), shape, factor)


@pytest.mark.filterwarnings("ignore")
def test_the_padding_of_a_1_lipschitz_layer_is_looked_at() -> None:
    """Its name says 1; with the padding mode that it is given, its norm is above."""
    library = pytest.importorskip("deel.torchlip")
    torch.manual_seed(0)
    layer = library.SpectralConv2d(3, 6, 3, padding=1, padding_mode="replicate")
    assert check(layer, (3, 8, 8), 2.0) > 1.0


ORTHOGONIUM: dict[str, tuple[str, Callable[[Any], nn.Module], tuple[int, ...], float]] = {
    "AdaptiveOrthoConv2d": (
        "layers",
        lambda lib: lib.AdaptiveOrthoConv2d(4, 8, 3, padding=1, padding_mode="circular"),
        (4, 6, 6),
        1.4,
    ),
    "AdaptiveOrthoConvTranspose2d": (
        "layers",
        lambda lib: lib.AdaptiveOrthoConvTranspose2d(8, 4, 2, stride=2),
        (8, 3, 3),
        1.4,
    ),
    "OrthoLinear": ("layers", lambda lib: lib.OrthoLinear(8, 4), (8,), 1.01),
    "UnitNormLinear": ("layers", lambda lib: lib.UnitNormLinear(8, 4), (8,), 1.01),
    "MaxMin": ("layers", lambda lib: lib.MaxMin(), (4, 2, 2), 1.01),
    "HouseHolder": ("layers", lambda lib: lib.HouseHolder(4), (4, 2, 2), 1.01),
    "Abs": ("layers", lambda lib: lib.Abs(), (4,), 1.01),
    "LayerCentering2D": ("layers", lambda lib: lib.LayerCentering2D(2), (2, 3, 3), 2.1),
    "BatchCentering2D": ("layers", lambda lib: lib.BatchCentering2D(2), (2, 3, 3), 1.01),
    "ChannelShuffle": ("layers", lambda lib: lib.ChannelShuffle(2, 2), (4, 2, 2), 1.5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ORTHOGONIUM)
def test_orthogonium(name: str) -> None:
    part, make, shape, factor = ORTHOGONIUM[name]
    check(make(pytest.importorskip(f"orthogonium.{part}")), shape, factor)


def test_stochastic_depth() -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Residual(nn.Module):
        def __init__(self, training: bool) -> None:
            super().__init__()
            self.drop = ops.StochasticDepth(0.5, "row")
            self.random = training

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = ops.stochastic_depth(x + self.drop(x), 0.5, "row", self.random)
            return result

    assert check(Residual(False), (3,), 1.01) == pytest.approx(2.0)
    with pytest.raises(
        UnsupportedModel,
        match=r"random|other samples|does not compute|modified in place|cannot be traced",
    ):
        CertifiedModel(Residual(True), (3,))
