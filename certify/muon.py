"""Muon: steps along the orthogonal factor of the momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic that brings all singular values near one in a few iterations (Jordan 2024)."""


class Muon(torch.optim.Optimizer):
    r"""Momentum made orthogonal, for matrices and kernels.

    The momentum ``M (m, n)`` of a weight (a kernel's taps are taken as columns) is replaced by
    nearly ``U V^T`` of its singular value decomposition, so that a step changes all directions
    alike. Its entries are scaled to a root of mean squares of 0.1, about that of Adam's steps, so
    that learning rates are alike.

    The Newton-Schulz iteration ``X <- (a I + b X X^T + c (X X^T)^2) X`` is made on the smaller Gram
    matrix alone, as all its factors commute: two products with the weight's shape instead of ten.

    Args:
        params: tensors of two or more axes.
        lr: learning rate.
        momentum: of Nesterov's kind.
        weight_decay: decoupled from the gradient.

    References:
        K. Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024;
        J. Liu et al., Muon is Scalable for LLM Training, 2025 (the scale of the steps).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change the weights by their gradients."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1.0 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                step = _orthogonal(ahead.flatten(1))
                size = 0.1 * max(step.shape) ** 0.5
                parameter.sub_(step.reshape(parameter.shape), alpha=group["lr"] * size)
        return result


def _orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the orthogonal factor of the polar decomposition."""
    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonal(matrix.mT, iterations).mT
    largest = matrix.abs().amax()  # squares could under- or overflow
    matrix = matrix / torch.where(largest == 0, 1.0, largest)
    norm = matrix.norm()
    matrix = matrix / torch.where(norm == 0, 1.0, norm)
    gram = matrix @ matrix.mT
    a, b, c = _COEFFICIENTS
    factor = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(iterations):
        step = b * gram + c * gram @ gram
        step.diagonal().add_(a)
        factor = step @ factor
        gram = step @ gram @ step
    return factor @ matrix
