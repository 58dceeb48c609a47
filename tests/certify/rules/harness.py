"""What the tests of rules share: cases, exact Jacobians, pairs moved uphill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certify import CertifiedModel
from certify.rules import RULES

BUILT_IN = set(RULES)  # read on import, before a doctest or a test registers more

# The bounds carry no tolerance. What is compared with them does: the SVD of a Jacobian, or a
# quotient of differences, is itself off by a few dozen roundings in float64.
NOISE = 1.0 + 1e-13


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def added_in_place(x: Tensor) -> Tensor:
    y = x[:, 1:]
    y += x[:, :-1] + 1.0
    return y


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Exact Jacobian ``(outputs, inputs)`` at one sample ``(1, ...)``, by a batch of copies."""
    outputs = model(x).shape[1]
    copies = x.expand(outputs, *x.shape[1:]).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(copies.clone()).diagonal().sum(), copies)
    return gradient.flatten(1)


def gain(model: nn.Module, x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(jacobian(model, x), ord=2))


def quotients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``|f(x) - f(y)| / |x - y|`` of pairs of samples."""
    distance = (x - y).flatten(1).norm(dim=1)
    return (model(x.clone()) - model(y.clone())).norm(dim=1) / distance


def ascend(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Move pairs uphill on their quotient, keeping their distance."""
    distance = (x - y).flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    for _ in range(12):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        for point, slope in zip(
            (x, y), torch.autograd.grad(quotients(model, x, y).log().sum(), (x, y)), strict=True
        ):
            size = slope.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(distance.shape)
            point.data += 0.2 * distance * slope / size
        middle, half = (x + y).detach() / 2, (x - y).detach() / 2
        half = half * distance / 2 / half.flatten(1).norm(dim=1).reshape(distance.shape)
        x, y = middle + half, middle - half
    return x, y


def points(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Where to look at the Jacobian: the origin, random places, one bright pixel."""
    yield torch.zeros(1, *shape, dtype=torch.float64)
    for scale in (0.3, 1.0, 30.0):
        yield scale * torch.randn(1, *shape, dtype=torch.float64)
    bright = torch.zeros(math.prod(shape), dtype=torch.float64)
    bright[bright.numel() // 2] = 1.0
    yield bright.reshape(1, *shape)


def certify(module: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, float]:
    """The float64 model with flat output, and its proven bound."""
    certified = CertifiedModel(nn.Sequential(module, nn.Flatten()), shape)
    return certified.model, certified.lipschitz().item()


def trained(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """Give a BatchNorm statistics and factors that are not zero and one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.05, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@dataclass(frozen=True)
class Case:
    """A model that uses operations.

    Attributes:
        operations: keys of ``RULES`` that the walk must look up.
        make: builds the model.
        shape: of one sample.
        factor: the bound is at most this many times the largest gain found.
    """

    name: str
    operations: tuple[object, ...]
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    factor: float = 1.0 + 1e-6


def on(function: Callable[[Any], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Apply(function)


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a case's bound with gains found by Jacobians, sampled and ascended pairs."""
    used = set()

    def noting(key: object, rule: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            used.add(key)
            return rule(*args, **kwargs)

        return call

    for key, rule in list(RULES.items()):
        monkeypatch.setitem(RULES, key, noting(key, rule))

    largest = 0.0
    for seed in range(2):
        torch.manual_seed(seed)
        model, bound = certify(case.make(), case.shape)
        for x in points(case.shape):
            largest = max(largest, gain(model, x) / bound)
        for scale, distance in [(1.0, 1.0), (0.3, 1e-2), (10.0, 3.0)]:
            x = scale * torch.randn(20, *case.shape, dtype=torch.float64)
            y = x + distance * torch.randn_like(x)
            largest = max(largest, quotients(model, x, y).max().item() / bound)
            largest = max(largest, quotients(model, *ascend(model, x, y)).max().item() / bound)
    assert largest <= NOISE
    assert largest >= 1.0 / case.factor
    assert set(case.operations) <= used
