"""Attack a data set and report what was found. Nothing is proven by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.attack import Adversary, Effort
from certify.attacked import Attacked, attack_all
from certify.data import ImageData, pixels
from certify.evaluation import check_batch, check_budgets
from certify.folding import copy_with_plain_weights
from certify.ranks import ALONE, Ranks
from certify.report import csv_by_index, epsilon_name, finite, percent


@dataclass(frozen=True)
class AttackReport:
    """What attacks found on a data set.

    Attributes:
        labels: ``(N,)`` true classes.
        prediction: ``(N,)`` predicted ones.
        attacked: what attacks found.
        epsilons: budgets.
        index: ``(N,)``, places of the images in their source.
    """

    labels: Tensor
    prediction: Tensor
    attacked: Attacked
    epsilons: tuple[float, ...]
    index: Tensor | None = None

    @property
    def clean_accuracy(self) -> float:
        """Fraction of right predictions."""
        return (self.prediction == self.labels).double().mean().item()

    @property
    def attacked_accuracy(self) -> dict[float, float]:
        """Fraction of images that are right and that no attack within each budget changed."""
        right = self.prediction == self.labels
        return {
            e: (right & self.attacked.withstood[e]).double().mean().item() for e in self.epsilons
        }

    @property
    def median_distance(self) -> float:
        """Median of the distances at which predictions changed; wrong ones count as zero."""
        right = self.prediction == self.labels
        return self.attacked.distance.where(right, 0.0).median().item()

    def to_table(self) -> str:
        """Return the summary for people."""
        rows = [
            ("images", f"{len(self.labels):,}"),
            ("clean accuracy", percent(self.clean_accuracy)),
            *(
                (f"withstood at {epsilon_name(e)}", percent(found))
                for e, found in self.attacked_accuracy.items()
            ),
            ("median distance", f"{self.median_distance:.3f}"),
            *((f"nearest by {name}", f"{n:,}") for name, n in self.attacked.won.items() if n),
        ]
        return "\n".join(f"{name:<22}{value:>12}" for name, value in rows)

    def to_json(self) -> str:
        """Return the summary as JSON; budgets are keys, an infinite number is null."""
        summary = {
            "n": len(self.labels),
            "clean_accuracy": self.clean_accuracy,
            "attacked_accuracy": {repr(e): found for e, found in self.attacked_accuracy.items()},
            "median_distance": finite(self.median_distance),
            "nearest_by": self.attacked.won,
        }
        return json.dumps(summary, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return a row per image: ``idx,label,predict,attacked,correct``."""
        columns = {
            "label": self.labels,
            "predict": self.prediction,
            "attacked": self.attacked.distance,
            "correct": (self.prediction == self.labels).int(),
        }
        return csv_by_index(self.index, columns)


def attack_data(
    model: nn.Module,
    input_shape: Sequence[int],
    data: ImageData,
    epsilons: Sequence[float] = (),
    *,
    domain: Sequence[float] | None = None,
    effort: Effort | None = None,
    batch_size: int = 500,
    on_batch: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> AttackReport:
    """Attack every image of ``data``; any network will do, whether it can be certified or not.

    Args:
        model: a classifier. A copy in float64 and in evaluation mode is attacked.
        input_shape: of one image.
        data: images and labels.
        epsilons: L2 budgets, in units of pixels in [0, 1].
        domain: smallest and largest entry that a perturbed image may have, or ``None`` for any.
        effort: how hard to try.
        batch_size: images at a time.
        on_batch: called with the number of images done, after each batch.
        ranks: processes that share the batches; each returns the report of all.

    Raises:
        ValueError: data that do not fit, a negative budget, or a network that cannot be computed in
            float64.
        UnsupportedModel: a network that cannot be copied.
    """
    exact = copy_with_plain_weights(model).to(torch.float64).requires_grad_(False)
    adversary = Adversary(exact, input_shape, domain=domain, effort=effort)
    try:
        predicted = [
            adversary.target.values(pixels(batch).to(adversary.device, torch.float64))
            for batch in data.images.split(batch_size)
        ]
    except Exception as error:  # whatever the forward raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"the network cannot be computed in float64 on images of shape {tuple(input_shape)}: "
            f"{reason}"
        ) from error
    if not len(data):
        raise ValueError("there are no images to attack")
    logits = torch.cat(predicted)
    check_batch(data.images, data.labels, input_shape, logits.shape[1])
    check_budgets(epsilons)
    attacked = attack_all(
        adversary, data.images, epsilons, batch_size, on_batch=on_batch, ranks=ranks
    )
    predicted_classes = logits.argmax(dim=1).cpu()
    return AttackReport(data.labels, predicted_classes, attacked, tuple(epsilons), data.places)
