"""Random architectures: pairs of inputs, moved to where the gain is largest, against the bounds.

``HYPOTHESIS_PROFILE=thorough pytest tests/certify/test_fuzz.py`` tries ten thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from certify import CertifiedModel

Draw = Callable[[st.SearchStrategy[Any]], Any]

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardtanh,
    partial(nn.Softplus, threshold=40.0),
    nn.Hardswish, nn.Mish, nn.Softsign, nn.CELU, nn.PReLU, nn.LogSigmoid, nn.ReLU6, nn.SELU,
]  # fmt: skip


class Residual(nn.Module):
    """``a x + f(x)``."""

    def __init__(self, branch: nn.Module, scale: float) -> None:
        super().__init__()
        self.branch, self.scale = branch, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.branch(x)


class Branches(nn.Module):
    """``[f(x), g(x)]`` along the channels."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], dim=1)


class Largest(nn.Module):
    """``max(f(x), g(x))``, entry by entry."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.first(x), self.second(x))


def _convolution(draw: Draw, channels: int, out: int, size: int, *, same: bool) -> nn.Conv2d:
    kernel = draw(st.sampled_from([k for k in (1, 2, 3, 5) if k <= size and (k % 2 or not same)]))
    dilation = draw(st.integers(1, 2)) if 2 * (kernel - 1) < size else 1
    reach = dilation * (kernel - 1)
    padding = reach // 2 if same else draw(st.integers(0, min(reach, size - 1)))
    stride = 1 if same else draw(st.integers(1, 2))
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0 and out % g == 0]))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    return nn.Conv2d(
        channels, out, kernel, stride, padding, dilation, groups, padding_mode=mode,
        bias=draw(st.booleans()),
    )  # fmt: skip


def _layer(draw: Draw, channels: int, size: int, depth: int) -> tuple[nn.Module, int, int]:
    """A random layer, with the channels and the size of its result."""
    kinds = ["conv", "conv", "norm", "activation", "activation", "pool", "shuffle", "up", "maxmin"]
    kind = draw(st.sampled_from(kinds + ["residual", "branches", "largest"] * (depth < 2)))
    if kind == "conv":
        out = draw(st.integers(1, 4))
        conv = _convolution(draw, channels, out, size, same=False)
        return conv, out, conv(torch.zeros(1, channels, size, size)).shape[-1]
    if kind == "norm":
        norm = nn.BatchNorm2d(channels)
        nn.init.uniform_(norm.weight, -2.0, 2.0)
        nn.init.uniform_(norm.running_var, 0.1, 2.0)
        nn.init.normal_(norm.running_mean)
        return norm, channels, size
    if kind == "activation":
        return draw(st.sampled_from(ACTIVATIONS))(), channels, size
    if kind == "pool" and size > 1:
        pool = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d]))
        if pool is nn.AdaptiveAvgPool2d:
            target = draw(st.integers(1, size))
            return pool(target), channels, target
        window, stride = draw(st.integers(2, min(3, size))), draw(st.integers(1, 2))
        layer = pool(window, stride, padding=draw(st.integers(0, window // 2)))
        return layer, channels, layer(torch.zeros(1, 1, size, size)).shape[-1]
    if kind == "shuffle" and size % 2 == 0:
        return nn.PixelUnshuffle(2), 4 * channels, size // 2
    if kind == "up" and size < 8:
        return nn.Upsample(scale_factor=2, mode="nearest"), channels, 2 * size
    if kind == "maxmin" and channels % 2 == 0:
        return models.MaxMin(), channels, size
    if kind == "residual":
        branch = nn.Sequential(
            _convolution(draw, channels, channels, size, same=True),
            draw(st.sampled_from(ACTIVATIONS))(),
            _convolution(draw, channels, channels, size, same=True),
        )
        return Residual(branch, draw(st.sampled_from([1.0, -0.5, 2.0]))), channels, size
    if kind in ("branches", "largest"):
        whole = Branches if kind == "branches" else Largest
        parts = [
            nn.Sequential(_convolution(draw, channels, channels, size, same=True), nn.Tanh()),
            _convolution(draw, channels, channels, size, same=True),
        ]
        return whole(*parts), channels * (2 if kind == "branches" else 1), size
    return nn.Identity(), channels, size


@st.composite
def networks(draw: Draw) -> tuple[nn.Module, tuple[int, ...]]:
    """A random classifier in float64 and the shape of its inputs."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    channels, size = draw(st.integers(1, 3)), draw(st.integers(4, 7))
    shape = (channels, size, size)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 6))):
        layer, channels, size = _layer(draw, channels, size, 0)
        layers.append(layer)
        if channels * size * size > 400:
            break
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 3))
    scale = draw(st.sampled_from([1.0, 1.0, 3.0, 30.0]))
    with torch.no_grad():
        network[-1].weight.mul_(scale)
    return network.double().eval().requires_grad_(False), shape


def ascended(network: nn.Module, x: Tensor, y: Tensor, rows: Tensor, steps: int = 25) -> Tensor:
    """Ratios ``|rows (f(x) - f(y))| / |x - y|`` of pairs that are moved to raise them."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    moved = torch.optim.Adam([x, y], lr=0.05)
    best = x.new_zeros(len(x))
    for _ in range(steps):
        change = ((network(x) - network(y)) @ rows.mT).norm(dim=1)
        distance = (x - y).flatten(1).norm(dim=1)
        best = torch.where(distance > 1e-4, torch.maximum(best, (change / distance).detach()), best)
        moved.zero_grad()
        (distance.log() - change.clamp_min(1e-30).log()).sum().backward()
        moved.step()
    return best


@given(networks(), st.sampled_from(["none", "merge", "join", "balance"]))
def test_no_pair_of_inputs_exceeds_the_bounds(
    drawn: tuple[nn.Module, tuple[int, ...]], tighten: str
) -> None:
    network, shape = drawn
    certified = CertifiedModel(network, shape, tighten=tighten, method="supremum")
    x = torch.randn(8, *shape, dtype=torch.float64)
    y = x + 0.3 * torch.randn_like(x)
    slack = 1.0 + 1e-7
    every = torch.eye(3, dtype=torch.float64)
    assert bool((ascended(network, x, y, every) <= certified.lipschitz() * slack).all())
    margins = certified.margin_lipschitz()
    for i, j in ((0, 1), (1, 2), (2, 0)):
        rows = (every[i] - every[j])[None]
        assert bool((ascended(network, x, y, rows, steps=10) <= margins[i, j] * slack).all())


@given(networks(), st.sampled_from([None, "float32"]))
def test_no_attack_succeeds_within_a_radius(
    drawn: tuple[nn.Module, tuple[int, ...]], precision: str | None
) -> None:
    network, shape = drawn
    certified = CertifiedModel(network, shape, precision=precision)
    x = torch.rand(4, *shape, dtype=torch.float64)
    radius = certified.certify(x, "best").radius
    assert bool((certified.attack(x) >= radius).all())
    assert not bool(certified.broken(x, radius * (1.0 - 1e-6)).any())
