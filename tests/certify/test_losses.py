from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from certify import LOSSES, certificate, cross_entropy, margin_loss


def setting(seed: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(6, classes, dtype=torch.float64)
    bounds = torch.rand(classes, classes, dtype=torch.float64)
    bounds.fill_diagonal_(0.0)  # not symmetric, so that rows and columns are told apart
    return logits, torch.randint(classes, (6,)), bounds


def test_names() -> None:
    assert {"margin": margin_loss, "cross-entropy": cross_entropy} == LOSSES


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
