"""What an evaluation found, as a table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from certify.attacked import Attacked
from certify.certificates import Certificate
from certify.curves import Curve


@dataclass(frozen=True)
class Report:
    """Certificates of a data set.

    Attributes:
        labels: ``(N,)`` true classes.
        found: predictions and radii, ``(N,)`` each.
        epsilons: budgets at which certified accuracy is reported.
        lipschitz: proven Lipschitz bound of the network, input to logits.
        certificate: kind of certificate.
        seconds: time for all logits, bounds and radii.
        radii: ``(N,)`` by each kind that was asked for, and by Lipschitz constants.
        costs: seconds that each kind took, bounds of the network left out, over those of logits.
        passes: forward-backward passes for each image of the dual certificate.
        attack: what attacks found, if they were tried.
        precision: the arithmetic that the radii are about, or ``"exact"``; ``"exact beyond the
            logits"`` where it is not known how much the pass that computes these rounds.
        index: ``(N,)``, places of the images in their source.
    """

    labels: Tensor
    found: Certificate
    epsilons: tuple[float, ...]
    lipschitz: float
    certificate: str
    seconds: float
    radii: Mapping[str, Tensor] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    passes: float | None = None
    attack: Attacked | None = None
    precision: str = "exact"
    index: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def clean_accuracy(self) -> float:
        """Fraction of right predictions."""
        return _mean(self.found.prediction == self.labels)

    @property
    def certified_accuracy(self) -> dict[float, float]:
        """Fraction of images that are right and proven to stay so, at each budget."""
        return {e: _mean(self.found.certified(self.labels, e)) for e in self.epsilons}

    @property
    def median_radius(self) -> float:
        """Median of the radii, a wrong prediction counting as zero."""
        right = self.found.prediction == self.labels
        return self.found.radius.where(right, 0.0).median().item()

    @property
    def rounding_cost(self) -> float | None:
        """By how much rounding shrinks the median radius of right predictions, relatively."""
        if self.found.exact is None:
            return None
        right = self.found.prediction == self.labels
        exact = _median(self.found.exact[right])
        return 1.0 - _median(self.found.radius[right]) / exact if exact else 0.0

    @property
    def gains(self) -> Tensor | None:
        """What each right prediction with a radius gained over the global bounds, relatively."""
        if self.certificate == "lipschitz" or "lipschitz" not in self.radii:
            return None
        before = self.radii["lipschitz"]
        counts = (self.found.prediction == self.labels) & (before > 0) & torch.isfinite(before)
        return self.found.radius[counts] / before[counts] - 1.0

    def certified_by(self, certificate: str) -> dict[float, float]:
        """As `certified_accuracy`, by one kind of certificate."""
        found = Certificate(self.found.prediction, self.radii[certificate])
        return {e: _mean(found.certified(self.labels, e)) for e in self.epsilons}

    @property
    def won(self) -> dict[str, int]:
        """How many images have their largest radius by each kind, the cheapest of equal ones."""
        names = list(self.radii)
        best = torch.stack([self.radii[name] for name in names]).argmax(dim=0)
        positive = self.found.radius > 0
        return {name: int(((best == i) & positive).sum()) for i, name in enumerate(names)}

    @property
    def attacked_accuracy(self) -> dict[float, float]:
        """Fraction of images that are right and that no attack within each budget changed."""
        if self.attack is None:
            return {}
        right = self.found.prediction == self.labels
        return {e: _mean(right & self.attack.withstood[e]) for e in self.epsilons}

    @property
    def certified_curve(self) -> Curve:
        """Certified accuracy over the radius."""
        return Curve.of(self.found.radius[self.found.prediction == self.labels], self.n)

    @property
    def attacked_curve(self) -> Curve | None:
        """Fraction of right predictions that no attack within the radius changed."""
        if self.attack is None:
            return None
        return Curve.of(self.attack.distance[self.found.prediction == self.labels], self.n)

    def to_json(self) -> str:
        """Return the summary as JSON; budgets are keys, an infinite number is null."""
        summary: dict[str, Any] = {
            "n": self.n,
            "clean_accuracy": self.clean_accuracy,
            "certified_accuracy": {repr(e): a for e, a in self.certified_accuracy.items()},
            "median_radius": finite(self.median_radius),
            "lipschitz": finite(self.lipschitz),
            "certificate": self.certificate,
            "precision": self.precision,
            "seconds": self.seconds,
        }
        if self.rounding_cost is not None:
            summary["rounding_cost"] = finite(self.rounding_cost)
        if self.gains is not None:
            summary["gained"] = int((self.gains > 0).sum())
            summary["median_gain"] = _median(self.gains)
            by_lipschitz = self.certified_by("lipschitz")
            summary["certified_by_lipschitz"] = {repr(e): a for e, a in by_lipschitz.items()}
        if self.certificate == "best":
            summary["won"] = self.won
        if self.costs:
            summary["cost_over_logits"] = dict(self.costs)
        if self.passes is not None:
            summary["passes_per_image"] = self.passes
        if self.attack is not None:
            summary["attacked_accuracy"] = {repr(e): a for e, a in self.attacked_accuracy.items()}
            summary["solved_exactly"] = self.attack.solved(self.found.radius)
            summary["median_gap"] = finite(self.attack.median_gap(self.found.radius))
            summary["nearest_by"] = self.attack.won
            summary["broken_within_radius"] = 0  # or there would be no report
        summary["curve"] = self.certified_curve.to_json()
        if self.attacked_curve is not None:
            summary["attacked_curve"] = self.attacked_curve.to_json()
        return json.dumps(summary, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return a row per image: ``idx,label,predict,radius,correct``.

        After attacks also ``attacked``, the distance at which another class was seen: the radius
        of that image is between the two.
        """
        right = (self.found.prediction == self.labels).int()
        columns = {
            "label": self.labels,
            "predict": self.found.prediction,
            "radius": self.found.radius,
            "correct": right,
        }
        if self.attack is not None:
            columns["attacked"] = self.attack.distance
        return csv_by_index(self.index, columns)

    def to_table(self) -> str:
        """Return the summary for people."""
        accuracies = [self.certified_accuracy]
        head = ["", self.certificate]
        if self.gains is not None:
            accuracies.append(self.certified_by("lipschitz"))
            head.append("lipschitz")
        if self.attack is not None:
            accuracies.append(self.attacked_accuracy)
            head.append("attacked")
        rows: list[Sequence[str]] = [
            ("images", f"{self.n:,}"),
            ("clean accuracy", percent(self.clean_accuracy)),
        ]
        if len(head) > 2:
            rows.append(head)
        rows += [
            (f"certified at {epsilon_name(e)}", *(percent(column[e]) for column in accuracies))
            for e in self.epsilons
        ]
        rows += [
            ("median radius", f"{self.median_radius:.3f}"),
            ("Lipschitz constant", f"{self.lipschitz:.4g}"),
            ("certificate", self.certificate),
            ("arithmetic", self.precision),
        ]
        if self.rounding_cost is not None:
            rows.append(("rounding costs", _short_percent(self.rounding_cost)))
        if self.certificate == "best":
            rows += [(f"largest by {name}", f"{n:,}") for name, n in self.won.items()]
        if self.gains is not None:
            rows += [
                ("images that gained", f"{int((self.gains > 0).sum()):,}"),
                ("median gain", percent(_median(self.gains))),
            ]
        if self.attack is not None:
            radius = self.found.radius
            rows += [
                ("solved exactly", percent(self.attack.solved(radius))),
                ("median gap to attack", percent(self.attack.median_gap(radius))),
                ("broken within radius", "0"),
                *((f"nearest by {name}", f"{n:,}") for name, n in self.attack.won.items() if n),
            ]
        rows += [(f"{name} / logits", f"{cost:,.1f} x") for name, cost in self.costs.items()]
        if self.passes is not None:
            rows.append(("passes per image", f"{self.passes:.1f}"))
        rows.append(("images/s", f"{self.n / max(self.seconds, 1e-9):,.0f}"))
        return "\n".join(
            f"{name:<22}" + "".join(f"{value:>12}" for value in values) for name, *values in rows
        )


def csv_by_index(index: Tensor | None, columns: Mapping[str, Tensor]) -> str:
    """Return a row per image, with its place in the source, in the order of these."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["idx", *columns])
    count = len(next(iter(columns.values())))
    index = torch.arange(count) if index is None else index
    order = index.argsort()
    values = [index[order].tolist(), *(column[order].tolist() for column in columns.values())]
    for row in zip(*values, strict=True):
        rows.writerow([repr(value) for value in row])
    return text.getvalue()


def epsilon_name(epsilon: float) -> str:
    """Return a budget as people write it.

    Example:
        >>> epsilon_name(0.5), epsilon_name(36 / 255)
        ('0.5', '36/255')
    """
    levels = round(epsilon * 255)
    if float(f"{epsilon:.4g}") != epsilon and levels / 255 == epsilon:
        return f"{levels}/255"
    return f"{epsilon:.6g}"


def _mean(flags: Tensor) -> float:
    return flags.double().mean().item()


def _median(values: Tensor) -> float:
    return values.median().item() if len(values) else 0.0


def _short_percent(fraction: float) -> str:
    """Two digits, of what is usually tiny.

    Example:
        >>> _short_percent(1e-11), _short_percent(0.996)
        ('1e-09 %', '100 %')
    """
    return f"{100 * fraction:.2g} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


def percent(fraction: float) -> str:
    """Return a fraction as people read it."""
    return f"{100 * fraction:.2f} %"


def finite(number: float) -> float | None:
    """Return a number, or ``None`` for JSON if it is infinite or NaN."""
    return number if math.isfinite(number) else None
