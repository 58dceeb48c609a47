r"""Training losses, pure functions of ``(logits, labels, margin_lipschitz, epsilon)``.

All take ``logits (N, C)``, ``labels (N,)``, constants ``K (C, C)`` of the differences of logits (in
training an estimate with a gradient) and a budget ``epsilon`` in units of the input, and return the
mean over the batch. What a perturbation can do to class ``j`` of a sample with label ``y`` is to
bring it closer by ``epsilon K[y, j]``: the *worst logits* are ``f_j + epsilon K[y, j]``, with
``K[y, y] = 0``, and a sample is certified at ``epsilon`` where they still favour the label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor, float | Tensor], Tensor]


def cross_entropy(
    logits: Tensor, labels: Tensor, margin_lipschitz: Tensor, epsilon: float | Tensor
) -> Tensor:
    """Cross-entropy of the logits, for use beside a penalty; the last two arguments are ignored."""
    return F.cross_entropy(logits, labels)


def margin_loss(
    logits: Tensor,
    labels: Tensor,
    margin_lipschitz: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Cross-entropy of the worst logits that a perturbation of size ``epsilon`` could cause.

    For networks of constant one this is the cross-entropy with an offset of the label's logit and
    a temperature that such networks are trained with.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``.
        margin_lipschitz: ``(C, C)``.
        epsilon: perturbation budget.
        temperature: what the logits are divided by.

    References:
        Y. Tsuzuku, I. Sato, M. Sugiyama, Lipschitz-Margin Training, NeurIPS 2018, section 4, with
        a constant for each pair of classes instead of ``sqrt(2) L``; B. Prach, C. Lampert, Almost-
        Orthogonal Layers, ECCV 2022, section 5 (offset and temperature).

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> bounds = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
        >>> round(margin_loss(logits, labels, bounds, 0.5).item(), 4)  # two equal logits: log 2
        0.6931
    """
    worst = logits + epsilon * _of_labels(margin_lipschitz, labels, logits)
    return F.cross_entropy(worst / temperature, labels)


def emma_loss(
    logits: Tensor,
    labels: Tensor,
    margin_lipschitz: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Cross-entropy against a budget that is no larger, for each class, than what it has to be.

    Class ``j`` is raised by ``epsilon_j K[y, j]`` with ``epsilon_j`` the radius up to which the
    sample is already certified against it, between zero and ``epsilon``, seen as a constant: a
    class within reach is raised to a tie, so that no sample is asked for more than it can give.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``.
        margin_lipschitz: ``(C, C)``.
        epsilon: perturbation budget.
        temperature: what the logits are divided by.

    References:
        K. Hu, A. Zou, Z. Wang, K. Leino, M. Fredrikson, Unlocking Deterministic Robustness
        Certification on ImageNet, NeurIPS 2023, section 4 (Efficient Margin MAximization).

    Example:
        >>> logits, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> bounds = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
        >>> round(emma_loss(logits, labels, bounds, 0.5).item(), 4)  # radius 0.25: a tie, log 2
        0.6931
    """
    reach = _of_labels(margin_lipschitz, labels, logits)
    with torch.no_grad():
        margins = logits.gather(1, labels[:, None]) - logits
        largest = margins / reach.clamp_min(torch.finfo(reach.dtype).tiny)
        budget = largest.clamp_min(0.0).clamp_max(epsilon)
    return F.cross_entropy((logits + budget * reach) / temperature, labels)


def gloro_loss(
    logits: Tensor, labels: Tensor, margin_lipschitz: Tensor, epsilon: float | Tensor
) -> Tensor:
    """Cross-entropy with one more class, for what is not certified.

    Its logit is the largest that another class than the predicted one can reach, so that it wins
    exactly where the prediction is not certified at ``epsilon``.

    References:
        K. Leino, Z. Wang, M. Fredrikson, Globally-Robust Neural Networks, ICML 2021, section 2.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> bounds = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
        >>> round(gloro_loss(logits, labels, bounds, 0.5).item(), 4)  # log(1 + 1 + exp(-2))
        0.7586
    """
    bottom = _bottom(logits, margin_lipschitz, epsilon)
    return F.cross_entropy(torch.cat((logits, bottom[:, None]), dim=1), labels)


def gloro_trades_loss(
    logits: Tensor,
    labels: Tensor,
    margin_lipschitz: Tensor,
    epsilon: float | Tensor,
    *,
    trade_off: float = 1.0,
) -> Tensor:
    r"""Cross-entropy of the logits, and ``trade_off`` times what the additional class takes away.

    The second term is the divergence ``KL(p || q)`` from the probabilities ``p`` of the logits to
    those ``q`` with the additional class of `gloro_loss`, which is ``-log(1 - q_bottom)``.

    References:
        K. Leino, Z. Wang, M. Fredrikson, Globally-Robust Neural Networks, ICML 2021, section 4
        (after H. Zhang et al., TRADES, ICML 2019).
    """
    bottom = _bottom(logits, margin_lipschitz, epsilon)
    lost = F.softplus(bottom - logits.logsumexp(dim=1))
    return F.cross_entropy(logits, labels) + trade_off * lost.mean()


def annealing_loss(
    logits: Tensor,
    labels: Tensor,
    margin_lipschitz: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
    focus: float = 5.0,
) -> Tensor:
    r"""Cross-entropy of the worst logits that stops pulling at what is safe.

    ``-temperature (1 - p)^focus log(p)`` with ``p`` the label's probability by the worst logits
    over the temperature.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``.
        margin_lipschitz: ``(C, C)``.
        epsilon: perturbation budget.
        temperature: what the logits are divided by.
        focus: power of the factor that vanishes at ``p = 1``, at least one.

    Raises:
        ValueError: a smaller power, whose slope is infinite there.

    References:
        B. Lai, P.-H. Huang, B.-H. Kung, S.-T. Chen, Enhancing Certified Robustness via Block
        Reflector Orthogonal Layers and Logit Annealing Loss, ICML 2025, section 5.
    """
    if focus < 1.0:
        raise ValueError(f"expected focus >= 1, got {focus}")
    worst = logits + epsilon * _of_labels(margin_lipschitz, labels, logits)
    log_p = F.log_softmax(worst / temperature, dim=1).gather(1, labels[:, None])
    # One minus p from the other classes; log_p is at most zero, where the power has no slope.
    missing = -torch.expm1(log_p)
    return -temperature * (missing.pow(focus) * log_p).mean()


def radius_loss(
    logits: Tensor,
    labels: Tensor,
    margin_lipschitz: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
    trade_off: float = 1.0,
) -> Tensor:
    r"""Cross-entropy of the logits less ``trade_off`` times certified radii up to ``epsilon``.

    The radius of a sample is the smallest of ``(f_y - f_j) / K[y, j]``, smoothed: ``-s log sum_j
    exp(-r_j / s)``, at most the smallest, with ``s = temperature epsilon / 10``. What is
    misclassified (a radius below zero) and what has reached ``epsilon`` are left alone.

    References:
        M. Fazlyab, T. Entesari, A. Roy, R. Chellappa, Certified Robustness via Dynamic Margin
        Maximization and Improved Lipschitz Regularization, NeurIPS 2023, section 3 (certified
        radius maximisation, CRM).
    """
    reach = _of_labels(margin_lipschitz, labels, logits)
    smoothing = temperature * epsilon / 10.0
    tiny = torch.finfo(reach.dtype).tiny ** 0.5
    left_out = own_class(labels, logits) | (reach < tiny)  # the latter never move
    if smoothing < tiny or bool(left_out.all()):
        return F.cross_entropy(logits, labels)
    radii = (logits.gather(1, labels[:, None]) - logits) / torch.where(left_out, 1.0, reach)
    never = torch.full_like(radii, torch.finfo(reach.dtype).max ** 0.5)
    radii = torch.where(left_out, torch.where(radii < 0, -never, never), radii)
    radius = -smoothing * (-radii / smoothing).logsumexp(dim=1)
    radius = radius.clamp_min(0.0).clamp_max(epsilon)
    return F.cross_entropy(logits, labels) - trade_off * radius.mean()


def own_class(labels: Tensor, logits: Tensor) -> Tensor:
    """Where logits ``(N, C)`` are those of the labels ``(N,)``; no device is waited for."""
    return labels[:, None] == torch.arange(logits.shape[1], device=labels.device)


def _of_labels(margin_lipschitz: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    """``K[y, j]``, ``(N, C)``, in the logits' dtype."""
    return margin_lipschitz.to(logits.dtype)[labels]


def _bottom(logits: Tensor, margin_lipschitz: Tensor, epsilon: float | Tensor) -> Tensor:
    """The largest logit ``(N,)`` that another class than the predicted one can reach."""
    predicted = logits.argmax(dim=1)
    reached = logits + epsilon * _of_labels(margin_lipschitz, predicted, logits)
    own = own_class(predicted, logits)
    return reached.masked_fill(own, -torch.inf).amax(dim=1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "margin": margin_loss,
    "emma": emma_loss,
    "gloro": gloro_loss,
    "gloro-trades": gloro_trades_loss,
    "annealing": annealing_loss,
    "crm": radius_loss,
    "cross-entropy": cross_entropy,
}
"""By the names that ``--loss`` takes; some have arguments ``temperature``, ``trade_off``."""
