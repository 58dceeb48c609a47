"""Learning rates, budgets, optimizers, and the clock that they follow."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from certify import TrainingConfig, optimisation
from certify.muon import Muon
from certify.optimisation import Clock, budget, learning_rate, make_optimizers
from certify.training_config import OPTIMIZERS, SCHEDULES

fractions = st.floats(0.0, 1.0)


@given(
    warm_up=fractions,
    schedule=st.sampled_from(SCHEDULES),
    first=st.floats(0.0, 1.5),
    second=st.floats(0.0, 1.5),
)
def test_learning_rates_rise_and_then_fall(
    warm_up: float, schedule: str, first: float, second: float
) -> None:
    config = TrainingConfig(lr=0.5, warm_up=warm_up, schedule=schedule)
    low, high = sorted((first, second))
    before, after = learning_rate(config, low), learning_rate(config, high)
    assert 0.0 <= min(before, after) <= max(before, after) <= 0.5
    if high < warm_up:
        assert 0.0 < before <= after
    if low >= warm_up:
        assert before >= after
        assert schedule != "constant" or before == after == 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warm_up", [0.0, 0.25])
def test_peaks_and_ends_of_learning_rates(schedule: str, warm_up: float) -> None:
    config = TrainingConfig(lr=3.0, warm_up=warm_up, schedule=schedule)
    assert learning_rate(config, warm_up) == 3.0
    last = 3.0 if schedule == "constant" else 0.0
    for done in (1.0, 1.1, 5.0):
        assert learning_rate(config, done) == pytest.approx(last, rel=0.0, abs=1e-15)
    if warm_up:
        assert 0.0 < learning_rate(config, 0.0) < 0.2
        just_before = learning_rate(config, warm_up - 1e-9)
        assert just_before == pytest.approx(3.0, rel=1e-6, abs=0.0)  # no jump
        middle = learning_rate(config, warm_up / 2)
        ends = learning_rate(config, 0.0) + 3.0
        assert 2.0 * middle == pytest.approx(ends, rel=1e-12, abs=0.0)  # a straight line


def test_learning_rates_by_hand() -> None:
    config = TrainingConfig(lr=2.0, warm_up=0.2, schedule="cosine")
    assert learning_rate(config, 0.6) == pytest.approx(1.0, rel=1e-12, abs=0.0)
    expected = 1.0 + math.cos(math.pi / 4)
    assert learning_rate(config, 0.4) == pytest.approx(expected, rel=1e-12, abs=0.0)
    linear = dataclasses.replace(config, schedule="linear")
    assert learning_rate(linear, 0.4) == pytest.approx(1.5, rel=1e-12, abs=0.0)


def test_a_training_that_is_all_warm_up() -> None:
    config = TrainingConfig(lr=2.0, warm_up=1.0)
    rates = [learning_rate(config, done / 10) for done in range(10)]
    assert rates == sorted(rates)
    assert 1.5 < rates[-1] < 2.0
    assert learning_rate(config, 1.0) == pytest.approx(0.0, rel=0.0, abs=1e-15)


@given(
    start=st.floats(0.0, 2.0),
    end=st.floats(0.0, 2.0),
    ramp=fractions,
    first=st.floats(0.0, 1.5),
    second=st.floats(0.0, 1.5),
)
def test_budgets_go_from_one_to_the_other(
    start: float, end: float, ramp: float, first: float, second: float
) -> None:
    config = TrainingConfig(epsilon=end, epsilon_start=start, ramp=ramp)
    low, high = sorted((first, second))
    before, after = budget(config, low), budget(config, high)
    rounding = 1e-15
    assert abs(before - start) <= abs(after - start) + rounding
    for value in (before, after):
        assert min(start, end) - rounding <= value <= max(start, end) + rounding
    if low >= ramp:
        assert before == pytest.approx(end, rel=0.0, abs=rounding)


def test_budgets_by_hand() -> None:
    config = TrainingConfig(epsilon=0.5, epsilon_start=0.1, ramp=0.4)
    assert budget(config, 0.0) == 0.1
    assert budget(config, 0.1) == pytest.approx(0.2, rel=1e-12, abs=0.0)
    assert budget(config, 0.4) == 0.5
    at_once = dataclasses.replace(config, ramp=0.0)
    assert budget(at_once, 0.0) == 0.5


# --- the clock --------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the clock takes for the time, in ``now.seconds``."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(optimisation, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_without_a_limit_steps_count(now: SimpleNamespace) -> None:
    clock = Clock(40)
    now.seconds += 1e9
    assert [clock.done(step) for step in (0, 10, 40, 50)] == [0.0, 0.25, 1.0, 1.25]


def test_whichever_ends_first_counts(now: SimpleNamespace) -> None:
    clock = Clock(100, minutes=2.0)
    assert clock.done(0) == 0.0
    now.seconds += 30.0
    assert clock.seconds == 30.0
    assert clock.done(0) == 0.25
    assert clock.done(50) == 0.5
    now.seconds += 90.0
    assert clock.done(50) == 1.0
    assert clock.done(100) == 1.0
    now.seconds += 60.0
    assert clock.done(50) == 1.5


def test_time_before_a_resumption_counts(now: SimpleNamespace) -> None:
    first = Clock(100, minutes=1.0)
    now.seconds += 15.0
    spent = first.seconds
    now.seconds = 7.0  # another machine, or after it was off
    second = Clock(100, minutes=1.0)
    now.seconds += 20.0  # loading
    second.restart(spent)
    assert second.done(0) == 0.25
    now.seconds += 30.0
    assert second.seconds == 45.0
    assert second.done(0) == 0.75


# --- optimizers -------------------------------------------------------------------------------


KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", KINDS)
def test_optimizers_by_name(name: str) -> None:
    config = TrainingConfig(optimizer=name, lr=0.01, momentum=0.8, weight_decay=0.3)
    parameters = [parameter(2), parameter(3, 2)]
    (optimizer,) = make_optimizers(config, parameters)
    assert type(optimizer) is KINDS[name]
    (group,) = optimizer.param_groups
    assert group["params"] == parameters
    assert group["lr"] == 0.01
    assert group["weight_decay"] == 0.3
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.8, True)
    else:
        assert group["betas"] == (0.8, 0.999)


def test_muon_is_for_kernels() -> None:
    config = TrainingConfig(optimizer="muon", lr=0.01, momentum=0.8)
    kernels, others = [parameter(3, 2, 3), parameter(3, 2, 3, 3)], [parameter(3), parameter(3, 2)]
    for given_, kinds in (
        ([*kernels, *others], [Muon, torch.optim.NAdam]),
        (kernels, [Muon]),
        (others, [torch.optim.NAdam]),
    ):
        found = make_optimizers(config, given_)
        assert [type(optimizer) for optimizer in found] == kinds
        in_use = [
            p for optimizer in found for group in optimizer.param_groups for p in group["params"]
        ]
        assert {id(p) for p in in_use} == {id(p) for p in given_}
        assert all(group["lr"] == 0.01 for o in found for group in o.param_groups)


def test_every_optimizer_is_tested() -> None:
    assert {*KINDS, "muon"} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizers_go_downhill(name: str, momentum: float) -> None:
    parameters = [parameter(2, 2, 3), parameter(2, 2), parameter(3)]
    config = TrainingConfig(optimizer=name, lr=0.05, momentum=momentum)
    optimizers = make_optimizers(config, parameters)
    for _ in range(1000 if name == "muon" else 200):  # whose steps do not grow with the gradient
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.stack([p.square().sum() for p in parameters]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert max(p.abs().max().item() for p in parameters) < 0.3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_decoupled_where_it_says_so(name: str) -> None:
    """Without a gradient a decoupled decay shrinks by a factor, others go through the optimizer."""
    kernel = nn.Parameter(torch.tensor([[[1.0, 100.0]]], dtype=torch.float64))
    config = TrainingConfig(optimizer=name, lr=0.1, momentum=0.9, weight_decay=0.5)
    (optimizer,) = make_optimizers(config, [kernel])
    kernel.grad = torch.zeros_like(kernel)
    optimizer.step()
    left = kernel.flatten().tolist()
    if name in ("nadam", "adamw", "muon"):
        assert left == pytest.approx([0.95, 95.0], rel=1e-12, abs=0.0)
    elif name == "sgd":  # and Nesterov's momentum of that
        factor = 1.0 - 0.1 * 0.5 * 1.9
        assert left == pytest.approx([factor, 100.0 * factor], rel=1e-12, abs=0.0)
    else:
        assert left == pytest.approx([0.9, 99.9], rel=1e-6, abs=0.0)


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (9, 1, 2, 2), (3, 3, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_steps_of_muon_are_nearly_orthogonal(shape: tuple[int, ...], scale: float) -> None:
    weight, gradient = parameter(*shape), parameter(*shape, seed=1).detach()
    weight.grad = scale * gradient
    before = weight.detach().clone()
    Muon([weight], lr=0.1, momentum=0.0).step()
    step = ((before - weight.detach()) / 0.1).flatten(1)
    singular = torch.linalg.svdvals(step)
    # The iteration ends anywhere between, for directions that are not too weak.
    assert singular.min().item() > 0.2 * singular.max().item()
    assert 0.05 < step.square().mean().sqrt().item() < 0.3
    assert (step * gradient.flatten(1)).sum().item() > 0.0
    left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    inner = (step * (left @ right)).sum() / (step.norm() * (left @ right).norm())
    assert inner.item() > 0.9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_of_muon(momentum: float) -> None:
    """After ten gradients ``g`` a single ``-g`` turns it round only without momentum."""
    gradient = parameter(2, 2, 2, seed=2).detach()
    weight = nn.Parameter(torch.zeros_like(gradient))
    optimizer = Muon([weight], lr=0.1, momentum=momentum)
    for _ in range(10):
        weight.grad = gradient.clone()
        optimizer.step()
    before, twin = weight.detach().clone(), nn.Parameter(weight.detach().clone())
    resumed = Muon([twin], lr=0.1, momentum=momentum)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((optimizer, weight), (resumed, twin)):
        other.grad = -gradient
        one.step()
    along = ((before - weight.detach()) * gradient).sum().item()
    assert (along > 0.0) == (momentum > 0.0)
    assert torch.equal(weight, twin)


def test_muon_without_a_gradient() -> None:
    first, second = parameter(2, 2, 2), parameter(2, 2, 2, seed=1)
    kept = second.detach().clone()
    first.grad = torch.zeros_like(first)
    before = first.detach().clone()
    Muon([first, second], lr=0.1).step()
    assert torch.equal(first, before)
    assert torch.equal(second, kept)


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e25, 1e37])
def test_muon_with_gradients_whose_squares_leave_the_range(scale: float) -> None:
    weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    generator = torch.Generator().manual_seed(0)
    weight.grad = scale * torch.randn(4, 3, 3, 3, generator=generator)
    Muon([weight], lr=0.1).step()
    assert 0.005 < weight.detach().square().mean().sqrt().item() < 0.03
