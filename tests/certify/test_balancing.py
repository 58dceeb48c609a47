"""Factors of channels: they change no function, and make products of norms smaller."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from certify.balancing import balancing_scales, free_parts, scale_layouts, signal_scales
from certify.bounding import Bounding, merged
from certify.graph import LipschitzGraph
from certify.norms import proven_norms
from certify.signal import Signal
from tests.certify.rules.harness import NOISE, jacobian, points, trained
from tests.certify.rules.test_registry import random_network


def steps(model: nn.Module, shape: tuple[int, ...]) -> Signal:
    return merged(LipschitzGraph(model.double().eval(), shape).walk())


def bound(output: Signal, scales: dict[Signal, Tensor], *, join: bool = False) -> float:
    bounding = Bounding(output, join=join, scales=scales)
    norms = proven_norms(bounding.operators(), "supremum")
    return bounding.evaluate(norms)[output].item()


def random_scales(output: Signal) -> dict[Signal, Tensor]:
    layouts = scale_layouts(output)
    logs = {id(part): torch.randn(part.size).double() for part in free_parts(layouts)}
    return signal_scales(layouts, logs) if logs else {}


class Branches(nn.Module):
    """Concatenation, pooling, flattening, chunks and sums of scaled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 2, 1)
        self.right = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), trained(nn.BatchNorm2d(4)))
        self.pool = nn.MaxPool2d(2)
        self.act = nn.GELU()
        self.last = nn.Linear(10 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        y = torch.cat([self.left(x), self.right(x) + x, x], 1)
        result: Tensor = self.last(torch.flatten(self.pool(self.act(y)), 1))
        return result


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.PReLU(4),
        nn.Conv2d(4, 6, 3, 2, 1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, 2, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        models.MaxMin(),
        nn.Conv2d(4, 3, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
    )


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("make", [Branches, grouped, *range(15)], ids=str)
def test_any_factors_give_a_bound(make: object, join: bool) -> None:
    torch.manual_seed(0)
    if isinstance(make, int):
        model, shape = random_network(make)
    else:
        assert callable(make)
        model, shape = make(), (2, 4, 4)
    output = steps(model, shape)
    scales = random_scales(output)
    found = bound(output, scales, join=join)
    for x in points(shape):
        gain = torch.linalg.matrix_norm(jacobian(model, x), ord=2).item()
        assert gain <= found * NOISE


def test_unbalanced_layers_are_balanced() -> None:
    """Channels of 100 and 1/100 between layers: the product of norms falls from 1e4 to 1."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[100.0, 0.0], [0.0, 1.0]]))
        model[2].weight.copy_(torch.tensor([[0.01, 0.0], [0.0, 1.0]]))
    output = steps(model, (2,))
    assert bound(output, {}) == pytest.approx(100.0)
    scales = balancing_scales(output, steps=300)
    assert bound(output, scales) < 1.2


def test_factors_are_found_for_convolutions_and_residual_streams() -> None:
    torch.manual_seed(0)
    model = models.build("resnet20", width=4, input_shape=(3, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            trained(module)
    output = steps(model, (3, 8, 8))
    assert bound(output, balancing_scales(output)) < 0.7 * bound(output, {})


def test_branches_that_are_added_share_their_factors() -> None:
    output = steps(Branches(), (2, 4, 4))
    layouts = scale_layouts(output)
    sizes = sorted(part.size for part in free_parts(layouts))
    assert sizes == [2, 4]  # the left branch; the first layer with the right branch
    by_name = {signal.name: signal for signal in layouts}
    scales = random_scales(output)
    shared = [scales[by_name[name]] for name in ("first", "right.0 + right.1", "act")]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(scales[by_name["flatten"]], scales[by_name["cat"]].repeat_interleave(4))


def test_nothing_to_choose() -> None:
    assert balancing_scales(steps(nn.Linear(3, 2), (3,))) == {}
    mixed = nn.Sequential(nn.Linear(4, 4), models.MaxMin(), nn.Linear(4, 2))
    assert balancing_scales(steps(mixed, (4,))) == {}


def test_input_and_output_keep_their_units() -> None:
    output = steps(grouped(), (2, 4, 4))
    scales = random_scales(output)
    assert output not in scales
    assert all(signal.parents for signal in scales)
