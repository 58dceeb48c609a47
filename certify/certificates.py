"""From logits and Lipschitz bounds to certified radii. Never sees weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CERTIFICATES = ("lipschitz", "local", "curvature", "dual", "best")
"""By Lipschitz constants; by local bounds about each input; by gradients and bounds of second
derivatives; by duality; the largest radius of those that apply."""


def check_certificate(name: str) -> None:
    """Refuse an unknown kind of certificate."""
    if name not in CERTIFICATES:
        known = ", ".join(CERTIFICATES)
        raise ValueError(f"expected certificate to be one of {known}, got {name!r}")


@dataclass(frozen=True)
class Certificate:
    """What is proven about a batch of inputs.

    Attributes:
        prediction: ``(N,)`` int64, the predicted classes.
        radius: ``(N,)`` float64; no input closer than this in L2 has another prediction. Zero
            where nothing is proven.
        exact: ``(N,)``, what it would be in exact arithmetic, where the radius is about a machine
            that rounds.
    """

    prediction: Tensor
    radius: Tensor
    exact: Tensor | None = None

    def cpu(self) -> Certificate:
        """The same, in the CPU's memory."""
        exact = None if self.exact is None else self.exact.cpu()
        return Certificate(self.prediction.cpu(), self.radius.cpu(), exact)

    def certified(self, labels: Tensor, epsilon: float) -> Tensor:
        """Whether each input is right and stays right at every L2 distance up to ``epsilon``.

        The one definition of "certified" in this project: the prediction equals the label and
        ``radius > epsilon``, or ``epsilon`` is zero and the prediction is right. On a machine that
        rounds a radius of zero says nothing of its prediction: it has to be larger.

        Args:
            labels: ``(N,)`` true classes.
            epsilon: perturbation budget, in units of the input, at least zero.

        Returns:
            ``(N,)`` bool.

        Raises:
            ValueError: an ``epsilon`` that is negative or NaN, or another number of labels.
        """
        if labels.shape != self.prediction.shape:
            raise ValueError(
                f"expected {len(self.prediction)} labels, got shape {tuple(labels.shape)}"
            )
        if not epsilon >= 0:
            raise ValueError(f"expected epsilon >= 0, got {epsilon}")
        right = self.prediction == labels
        known = epsilon > 0 or self.exact is not None
        return right & (self.radius > epsilon) if known else right


def certificate(logits: Tensor, margin_lipschitz: Tensor) -> Certificate:
    r"""Certify predictions by Lipschitz bounds of all class differences.

    Claim: with ``y`` the prediction at ``x`` and ``K[y, j]`` at least the Lipschitz constant of
    ``f_y - f_j``, the prediction is ``y`` on the open ball of radius
    ``min_{j != y} (f_y(x) - f_j(x)) / K[y, j]``, because no difference can shrink to zero inside
    it. The division is rounded down. The claim is about the given logits: the rounding of the
    network that computed them is not included.

    Args:
        logits: ``(N, C)``, ``C >= 2``.
        margin_lipschitz: ``(C, C)``; the diagonal is ignored.

    Returns:
        Prediction and radius. A NaN or infinite logit, a tie, or a NaN bound gives radius zero.

    Raises:
        ValueError: shapes that do not fit, or a negative bound.

    References:
        Y. Tsuzuku, I. Sato, M. Sugiyama, Lipschitz-Margin Training, NeurIPS 2018, proposition 1,
        with a constant for each pair of classes.

    Example:
        >>> found = certificate(torch.tensor([[3.0, 1.0]]), torch.full((2, 2), 4.0))
        >>> found.prediction.item(), round(found.radius.item(), 9)
        (0, 0.5)
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"expected logits (N, C) with C >= 2, got {tuple(logits.shape)}")
    classes = logits.shape[1]
    if margin_lipschitz.shape != (classes, classes):
        raise ValueError(
            f"expected margin_lipschitz ({classes}, {classes}), got {tuple(margin_lipschitz.shape)}"
        )
    if bool((margin_lipschitz < 0).any()):
        raise ValueError("expected margin_lipschitz >= 0")
    logits = logits.detach().to(torch.float64)
    bounds = margin_lipschitz.detach().to(logits)

    prediction = logits.argmax(dim=1)
    return Certificate(prediction, margin_radius(logits, prediction, bounds[prediction]))


def in_a_row(parts: Sequence[Certificate]) -> Certificate:
    """The certificates of batches that follow each other, as one; in the CPU's memory."""
    parts = [part.cpu() for part in parts]
    exact = [part.exact for part in parts if part.exact is not None]
    return Certificate(
        torch.cat([part.prediction for part in parts]),
        torch.cat([part.radius for part in parts]),
        torch.cat(exact) if exact else None,
    )


def largest_of(found: Sequence[Certificate]) -> tuple[Certificate, Tensor]:
    """Combine certificates of the same predictions.

    Args:
        found: at least one.

    Returns:
        The largest radii, and ``(N,)`` which certificate each is from, the first of equal ones.
    """
    radius, which = torch.stack([one.radius for one in found]).max(dim=0)
    exact = [one.exact for one in found if one.exact is not None]
    largest = torch.stack(exact).amax(dim=0) if len(exact) == len(found) else None
    return Certificate(found[0].prediction, radius, largest), which


def margin_radius(logits: Tensor, prediction: Tensor, constants: Tensor) -> Tensor:
    """Smallest quotient of a margin and its Lipschitz bound, rounded down.

    Args:
        logits: ``(N, C)`` float64.
        prediction: ``(N,)`` classes with the largest logits.
        constants: ``(N, C)``, at least zero or NaN, of the differences to the predicted class.

    Returns:
        ``(N,)``; zero where `certificate` says so.
    """
    top = logits.gather(1, prediction[:, None])
    # Two roundings (difference, quotient) lie behind each entry, and one more in this product.
    # What overflows is rounded down: a radius is infinite only where the difference is constant.
    largest = torch.finfo(torch.float64).max
    margins = (top - logits).clamp_max(largest)
    radii = torch.nan_to_num(margins / constants * (1.0 - 2.0**-50), nan=0.0, posinf=largest)
    radii = radii.where((constants != 0) | (margins <= 0), torch.inf)
    radii = radii.where(radii > 2.0**-1000, 0.0)  # a quotient that underflows may be rounded up
    radii.scatter_(1, prediction[:, None], torch.inf)
    sound = torch.isfinite(logits).all(dim=1)
    return torch.where(sound, radii.amin(dim=1), torch.zeros_like(top[:, 0]))
