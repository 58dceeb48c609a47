"""Training losses, pure functions of ``(logits, labels, margin_lipschitz, epsilon)``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def cross_entropy(
    logits: Tensor, labels: Tensor, margin_lipschitz: Tensor, epsilon: float
) -> Tensor:
    """Cross-entropy of the logits, for use beside a penalty; the last two arguments are ignored."""
    return F.cross_entropy(logits, labels)


def margin_loss(logits: Tensor, labels: Tensor, margin_lipschitz: Tensor, epsilon: float) -> Tensor:
    r"""Cross-entropy of the worst logits that a perturbation of size ``epsilon`` could cause.

    Every other class ``j`` is raised by ``epsilon K[y, j]``, the most that the difference to the
    label's logit can lose, so a sample whose raised logits still favour the label is certified
    at ``epsilon``.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``.
        margin_lipschitz: ``(C, C)``; in training an estimate with a gradient.
        epsilon: perturbation budget in units of the input.

    Returns:
        Scalar, the mean over the batch.

    References:
        Y. Tsuzuku, I. Sato, M. Sugiyama, Lipschitz-Margin Training, NeurIPS 2018, section 4, with
        a constant for each pair of classes instead of ``sqrt(2) L``.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> bounds = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
        >>> round(margin_loss(logits, labels, bounds, 0.5).item(), 4)  # two equal logits: log 2
        0.6931
    """
    return F.cross_entropy(logits + epsilon * margin_lipschitz.to(logits.dtype)[labels], labels)


LOSSES: dict[str, Loss] = {"margin": margin_loss, "cross-entropy": cross_entropy}
