from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from certify import LOSSES, certificate, cross_entropy, margin_loss
from certify.losses import (
    annealing_loss,
    emma_loss,
    gloro_loss,
    gloro_trades_loss,
    radius_loss,
)
from certify.training_config import FIRST_ORDER_LOSSES


def setting(seed: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(6, classes, dtype=torch.float64)
    bounds = torch.rand(classes, classes, dtype=torch.float64)
    bounds.fill_diagonal_(0.0)  # not symmetric, so that rows and columns are told apart
    return logits, torch.randint(classes, (6,)), bounds


def test_names() -> None:
    assert {
        "margin": margin_loss,
        "emma": emma_loss,
        "gloro": gloro_loss,
        "gloro-trades": gloro_trades_loss,
        "annealing": annealing_loss,
        "crm": radius_loss,
        "cross-entropy": cross_entropy,
    } == LOSSES
    assert tuple(LOSSES) == FIRST_ORDER_LOSSES


def test_margin_loss_by_hand() -> None:
    """``log sum_j exp(f_j + eps K[y, j] - f_y)``, averaged."""
    logits, labels, bounds = setting(0)
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        terms = [f + 0.3 * bounds[label, j].item() - row[label] for j, f in enumerate(row)]
        expected += math.log(sum(math.exp(term) for term in terms)) / len(logits)
    assert margin_loss(logits, labels, bounds, 0.3).item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_ignores_the_bounds() -> None:
    logits, labels, bounds = setting(0)
    plain = F.cross_entropy(logits, labels)
    assert torch.equal(cross_entropy(logits, labels, bounds, 0.3), plain)
    assert torch.equal(margin_loss(logits, labels, bounds, 0.0), plain)


@given(seed=st.integers(0, 10_000), epsilon=st.floats(0.0, 2.0))
def test_raised_logits_favour_the_label_just_where_it_is_certified(
    seed: int, epsilon: float
) -> None:
    logits, labels, bounds = setting(seed)
    raised = logits + epsilon * bounds[labels]
    others = raised.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    gap = raised.gather(1, labels[:, None])[:, 0] - others
    certified = certificate(logits, bounds).certified(labels, epsilon)
    clear = gap.abs() > 1e-12  # rounding decides ties
    assert torch.equal(certified[clear], (gap > 0)[clear])


def test_loss_grows_with_the_budget_and_with_the_bounds() -> None:
    logits, labels, bounds = setting(1)
    losses = [margin_loss(logits, labels, bounds, e).item() for e in (0.0, 0.1, 0.5, 2.0)]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
    assert margin_loss(logits, labels, 2 * bounds, 0.5) > margin_loss(logits, labels, bounds, 0.5)


def test_gradients() -> None:
    logits, labels, bounds = setting(2)
    logits.requires_grad_()
    bounds.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, k: margin_loss(f, labels, k, 0.3), (logits, bounds), raise_exception=True
    )
    loss = margin_loss(logits, labels, bounds, 0.3)
    (slope,) = torch.autograd.grad(loss, bounds)
    used = slope[labels.unique()]
    assert bool(
        (used.sum(dim=1) - slope.diagonal()[labels.unique()] > 0).all()
    )  # smaller is better


def test_float64_bounds_with_float32_logits() -> None:
    logits, labels, bounds = setting(3)
    loss = margin_loss(logits.float(), labels, bounds, 0.3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(margin_loss(logits, labels, bounds, 0.3).item(), rel=1e-5)


# --- each loss by another formula -------------------------------------------------------------


def log_sum(terms: list[float]) -> float:
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


def surprise(logits: list[float], label: int) -> float:
    return log_sum(logits) - logits[label]


def worst(row: list[float], label: int, bounds: list[list[float]], epsilon: float) -> list[float]:
    return [f + epsilon * bounds[label][j] for j, f in enumerate(row)]


def margin_by_hand(
    row: list[float], y: int, k: list[list[float]], e: float, t: float, _: float
) -> float:
    return surprise([f / t for f in worst(row, y, k, e)], y)


def emma_by_hand(
    row: list[float], y: int, k: list[list[float]], e: float, t: float, _: float
) -> float:
    raised = []
    for j, f in enumerate(row):
        radius = (row[y] - f) / k[y][j] if j != y else 0.0
        raised.append(f + min(max(radius, 0.0), e) * k[y][j])
    return surprise([f / t for f in raised], y)


def bottom(row: list[float], k: list[list[float]], e: float) -> float:
    top = row.index(max(row))
    return max(f for j, f in enumerate(worst(row, top, k, e)) if j != top)


def gloro_by_hand(
    row: list[float], y: int, k: list[list[float]], e: float, _: float, __: float
) -> float:
    return surprise([*row, bottom(row, k, e)], y)


def gloro_trades_by_hand(
    row: list[float], y: int, k: list[list[float]], e: float, _: float, weight: float
) -> float:
    """With the divergence as a sum over classes."""
    more = [*row, bottom(row, k, e)]
    p, q = ([math.exp(f - log_sum(logits)) for f in row] for logits in (row, more))
    divergence = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return surprise(row, y) + weight * divergence


def annealing_by_hand(
    row: list[float], y: int, k: list[list[float]], e: float, t: float, _: float
) -> float:
    p = math.exp(-margin_by_hand(row, y, k, e, t, 0.0))
    return -t * (1.0 - p) ** 5 * math.log(p)


def radius_by_hand(
    row: list[float], y: int, k: list[list[float]], e: float, t: float, weight: float
) -> float:
    radii = [(row[y] - f) / k[y][j] for j, f in enumerate(row) if j != y]
    s = t * e / 10.0
    smooth = -s * log_sum([-r / s for r in radii]) if s else 0.0
    assert smooth <= min(radii) + 1e-12 * (1.0 + abs(min(radii))) or not s
    return surprise(row, y) - weight * min(max(smooth, 0.0), e)


BY_HAND = {
    "margin": margin_by_hand,
    "emma": emma_by_hand,
    "gloro": gloro_by_hand,
    "gloro-trades": gloro_trades_by_hand,
    "annealing": annealing_by_hand,
    "crm": radius_by_hand,
    "cross-entropy": lambda row, y, *_: surprise(row, y),
}


@given(
    name=st.sampled_from(sorted(BY_HAND)),
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 5),
    epsilon=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    trade_off=st.sampled_from([0.0, 1.0, 2.5]),
)
def test_values_by_other_formulas(
    name: str, seed: int, classes: int, epsilon: float, temperature: float, trade_off: float
) -> None:
    logits, labels, bounds = setting(seed, classes)
    settings = {"temperature": temperature, "trade_off": trade_off}
    taken = LOSSES[name].__kwdefaults__ or {}
    loss = LOSSES[name](
        logits, labels, bounds, epsilon, **{n: v for n, v in settings.items() if n in taken}
    )
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    by_hand = [
        BY_HAND[name](row, label, bounds.tolist(), epsilon, temperature, trade_off)
        for row, label in rows
    ]
    expected = math.fsum(by_hand) / len(by_hand)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_which_losses_have_a_temperature_or_a_trade_off() -> None:
    taken = {name: set(loss.__kwdefaults__ or {}) for name, loss in LOSSES.items()}
    assert {name for name in taken if "temperature" in taken[name]} == {
        "margin",
        "emma",
        "annealing",
        "crm",
    }
    assert {name for name in taken if "trade_off" in taken[name]} == {"gloro-trades", "crm"}
    assert all(default == 1.0 for loss in LOSSES.values() for name, default in (
        (loss.__kwdefaults__ or {}).items()
    ) if name != "focus")  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_budget_it_is_about_the_logits(name: str) -> None:
    logits, labels, bounds = setting(4)
    loss = LOSSES[name](logits, labels, bounds, 0.0)
    plain = F.cross_entropy(logits, labels)
    if name in ("margin", "emma", "crm", "cross-entropy"):
        assert torch.equal(loss, plain)
    elif name.startswith("gloro"):
        assert loss > plain  # the second logit counts once more
    else:
        assert loss < plain


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"emma"}))
def test_gradients_of_each_loss(name: str) -> None:
    logits, labels, bounds = setting(5)
    bounds = (bounds + 0.1).requires_grad_()  # no constant is zero
    loss = LOSSES[name]
    assert torch.autograd.gradcheck(
        lambda f, k: loss(f, labels, k, 0.3), (logits.requires_grad_(), bounds)
    )


def test_the_budgets_of_emma_are_constants() -> None:
    logits, labels, bounds = setting(5)
    own = F.one_hot(labels, 4).bool()
    budget = (logits.gather(1, labels[:, None]) - logits) / bounds[labels]
    budget = budget.masked_fill(own, 0.0).clamp(0.0, 0.3)
    logits.requires_grad_()
    bounds.requires_grad_()
    losses = (
        emma_loss(logits, labels, bounds, 0.3),
        F.cross_entropy(logits + budget * bounds[labels], labels),
    )
    found, known = (torch.autograd.grad(loss, (logits, bounds)) for loss in losses)
    for slope, expected in zip(found, known, strict=True):
        torch.testing.assert_close(slope, expected, rtol=0.0, atol=1e-14)


ONE_HOT = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
SITUATIONS: dict[str, tuple[torch.Tensor, float]] = {
    "equal logits": (torch.zeros(6, 4, dtype=torch.float64), 0.3),
    "certain": (1000.0 * ONE_HOT, 0.3),  # the label's probability is one
    "certain and wrong": (1000.0 * ONE_HOT.roll(1, 1), 0.3),
    "no budget": (setting(6)[0], 0.0),
    "equal logits and no budget": (torch.zeros(6, 4, dtype=torch.float64), 0.0),
    "large budget": (setting(6)[0], 1e6),
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("zero", [False, True], ids=["", "K = 0"])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite(
    name: str, situation: str, zero: bool, single: bool
) -> None:
    logits, epsilon = SITUATIONS[situation]
    _, _, bounds = setting(7)
    bounds = torch.zeros_like(bounds) if zero else bounds
    logits = (logits.float() if single else logits).clone().requires_grad_()
    bounds.requires_grad_()
    loss = LOSSES[name](logits, torch.tensor([0, 1, 2, 3, 0, 1]), bounds, epsilon)
    assert bool(loss.isfinite())
    for gradient in torch.autograd.grad(loss, (logits, bounds), allow_unused=True):
        assert gradient is None or bool(gradient.isfinite().all())


@given(
    seed=st.integers(0, 10_000),
    epsilon=st.floats(0.0, 3.0),
    temperature=st.sampled_from([0.25, 1.0, 4.0]),
)
def test_emma_never_raises_a_class_above_the_label(
    seed: int, epsilon: float, temperature: float
) -> None:
    """Its gradient by the logits shows the probabilities of what is compared."""
    logits, labels, bounds = setting(seed)
    logits.requires_grad_()
    loss = emma_loss(logits, labels, bounds, epsilon, temperature=temperature)
    (slope,) = torch.autograd.grad(loss, logits)
    own = F.one_hot(labels, 4)
    p = slope * len(logits) * temperature + own
    below = logits <= logits.gather(1, labels[:, None])
    label = p.gather(1, labels[:, None]).expand_as(p)
    assert bool((p <= label + 1e-12)[below].all())
    assert bool((p >= label - 1e-12)[~below].all())  # and those above stay where they are
    ties = (logits.gather(1, labels[:, None]) - logits) / bounds[labels] < epsilon
    tied = below & ties & (own == 0)
    torch.testing.assert_close(p[tied], label[tied], rtol=0.0, atol=1e-12)


@given(seed=st.integers(0, 10_000), epsilon=st.floats(0.0, 2.0))
def test_emma_asks_for_no_more_than_the_margin_loss(seed: int, epsilon: float) -> None:
    logits, labels, bounds = setting(seed)
    plain, emma, margin = (
        loss(logits, labels, bounds, epsilon).item()
        for loss in (cross_entropy, emma_loss, margin_loss)
    )
    assert plain - 1e-12 <= emma <= margin + 1e-12
    right = logits.argmax(dim=1)
    assert emma_loss(logits, right, bounds, epsilon).item() <= math.log(4) + 1e-12
    certified = certificate(logits, bounds).certified(right, epsilon)
    if bool(certified.all()):
        same = margin_loss(logits, right, bounds, epsilon).item()
        assert emma_loss(logits, right, bounds, epsilon).item() == pytest.approx(same, abs=1e-12)


@given(seed=st.integers(0, 10_000), epsilon=st.floats(0.0, 2.0))
def test_the_additional_class_wins_exactly_where_nothing_is_certified(
    seed: int, epsilon: float
) -> None:
    logits, _, bounds = setting(seed)
    predicted = logits.argmax(dim=1)
    certified = certificate(logits, bounds).certified(predicted, epsilon)
    for row, label, safe in zip(logits, predicted, certified.tolist(), strict=True):
        loss = gloro_loss(row[None], label[None], bounds, epsilon)
        # exp(loss) sums, over all classes and the additional one, exp(logit - logit of the label).
        added = loss.exp() - (row - row[label]).exp().sum()
        if abs(added.item() - 1.0) > 1e-9:  # rounding decides ties
            assert (added.item() < 1.0) == safe


def test_the_additional_class_is_about_the_prediction_and_not_the_label() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)
    bounds = torch.tensor([[0.0, 8.0, 2.0], [1.0, 0.0, 9.0], [1.0, 9.0, 0.0]], dtype=torch.float64)
    for label in range(3):
        loss = gloro_loss(logits, torch.tensor([label]), bounds, 0.5)
        more = torch.tensor([[3.0, 0.0, 1.0, 4.0]], dtype=torch.float64)  # 0 + 0.5 * 8
        torch.testing.assert_close(
            loss, F.cross_entropy(more, torch.tensor([label])), rtol=0.0, atol=1e-14
        )


def test_annealing_stops_pulling_at_what_is_safe() -> None:
    labels, bounds = torch.tensor([0]), torch.zeros(2, 2, dtype=torch.float64)
    slopes = []
    for gap in (0.0, 2.0, 4.0, 8.0):
        logits = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(annealing_loss(logits, labels, bounds, 0.3), logits)
        (plain,) = torch.autograd.grad(cross_entropy(logits, labels, bounds, 0.3), logits)
        slopes.append((slope / plain)[0, 0].item())
    assert slopes == sorted(slopes, reverse=True)
    assert slopes[-1] < 1e-10 < 0.1 < slopes[0]


def test_radii_of_what_is_wrong_or_safe_are_left_alone() -> None:
    bounds = 1.0 - torch.eye(3, dtype=torch.float64)
    rows = torch.tensor([[-1.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.2, 0.0, 0.0]], dtype=torch.float64)
    for row, free in zip(rows, (False, False, True), strict=True):
        logits = row[None].clone().requires_grad_()
        radius = radius_loss(logits, torch.tensor([0]), bounds, 0.5) - cross_entropy(
            logits, torch.tensor([0]), bounds, 0.5
        )
        (slope,) = torch.autograd.grad(radius, logits)
        assert bool((slope.abs() > 1e-6).any()) == free


@pytest.mark.parametrize("focus", [0.0, 0.5, -1.0])
def test_a_focus_below_one_has_no_finite_slope(focus: float) -> None:
    logits, labels, bounds = setting(8)
    with pytest.raises(ValueError, match="expected focus >= 1"):
        annealing_loss(logits, labels, bounds, 0.3, focus=focus)


def test_classes_that_no_perturbation_moves_have_no_radius() -> None:
    """With a constant of zero for one class the radius is that of the others."""
    logits = torch.tensor([[0.2, 0.0, 0.19]], dtype=torch.float64)
    bounds = 1.0 - torch.eye(3, dtype=torch.float64)
    bounds[0, 2] = 0.0
    label = torch.tensor([0])
    both = radius_loss(logits, label, bounds, 0.5) - cross_entropy(logits, label, bounds, 0.5)
    assert both.item() == pytest.approx(-0.2, rel=1e-9, abs=0.0)


def test_arguments_are_refused_where_a_loss_has_none() -> None:
    logits, labels, bounds = setting(8)
    with pytest.raises(TypeError):
        gloro_loss(logits, labels, bounds, 0.3, temperature=2.0)  # type: ignore[call-arg]
