"""Certify a data set and report what was found."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certify.certificates import Certificate, check_certificate
from certify.certified_model import CertifiedModel
from certify.data import ImageData, pixels


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
        globally: ``(N,)`` radii by global bounds, where ``certificate`` is another.
    """

    labels: Tensor
    found: Certificate
    epsilons: tuple[float, ...]
    lipschitz: float
    certificate: str
    seconds: float
    globally: Tensor | None = None

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
    def gains(self) -> Tensor | None:
        """What each right prediction with a radius gained over the global bounds, relatively."""
        if self.globally is None:
            return None
        counts = (self.found.prediction == self.labels) & (self.globally > 0)
        counts &= torch.isfinite(self.globally)
        return self.found.radius[counts] / self.globally[counts] - 1.0

    def to_json(self) -> str:
        """Return the summary as JSON; budgets are keys, an infinite number is null."""
        summary: dict[str, Any] = {
            "n": self.n,
            "clean_accuracy": self.clean_accuracy,
            "certified_accuracy": {repr(e): a for e, a in self.certified_accuracy.items()},
            "median_radius": finite(self.median_radius),
            "lipschitz": finite(self.lipschitz),
            "certificate": self.certificate,
            "seconds": self.seconds,
        }
        if self.gains is not None:
            summary["gained"] = int((self.gains > 0).sum())
            summary["median_gain"] = _median(self.gains)
        return json.dumps(summary, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return a row per image: ``idx,label,predict,radius,correct``."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["idx", "label", "predict", "radius", "correct"])
        columns = (self.labels, self.found.prediction, self.found.radius)
        for index, (label, predict, radius) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            rows.writerow([index, label, predict, repr(radius), int(label == predict)])
        return text.getvalue()

    def to_table(self) -> str:
        """Return the summary for people."""
        rows = [("images", f"{self.n:,}"), ("clean accuracy", _percent(self.clean_accuracy))]
        rows += [
            (f"certified at {epsilon_name(e)}", _percent(a))
            for e, a in self.certified_accuracy.items()
        ]
        rows += [
            ("median radius", f"{self.median_radius:.3f}"),
            ("Lipschitz constant", f"{self.lipschitz:.4g}"),
            ("certificate", self.certificate),
        ]
        if self.gains is not None:
            rows += [
                ("images that gained", f"{int((self.gains > 0).sum()):,}"),
                ("median gain", _percent(_median(self.gains))),
            ]
        rows.append(("images/s", f"{self.n / max(self.seconds, 1e-9):,.0f}"))
        return "\n".join(f"{name:<22}{value:>12}" for name, value in rows)


def evaluate(
    certified: CertifiedModel,
    data: ImageData,
    epsilons: Sequence[float] = (),
    *,
    batch_size: int = 500,
    certificate: str = "lipschitz",
    on_batch: Callable[[int], None] | None = None,
) -> Report:
    """Certify every image of ``data``.

    Args:
        certified: the network and its bounds.
        data: images and labels.
        epsilons: L2 budgets, in units of pixels in [0, 1].
        batch_size: images per forward pass.
        certificate: as in `CertifiedModel.certify`.
        on_batch: called with the number of images done, after each batch.

    Raises:
        ValueError: no images, images of another shape than the network's input, labels that
            it has no logit for, a negative budget, or an unknown certificate.
    """
    if len(data) == 0:
        raise ValueError("there are no images to evaluate")
    if data.input_shape != certified.input_shape:
        raise ValueError(
            f"the model takes images of shape {certified.input_shape}, "
            f"the data has {data.input_shape}"
        )
    if int(data.labels.max()) >= certified.num_classes:
        raise ValueError(
            f"the model has {certified.num_classes} classes, "
            f"the data has a label {int(data.labels.max())}"
        )
    if any(not 0 <= epsilon < math.inf for epsilon in epsilons):
        raise ValueError(f"expected eps >= 0, got {list(epsilons)}")
    check_certificate(certificate)
    start = time.perf_counter()
    lipschitz = certified.lipschitz().item()
    parts: list[Certificate] = []
    globally: list[Tensor] = []
    for batch in data.images.split(batch_size):
        parts.append(certified.certify(pixels(batch), certificate))
        if certificate != "lipschitz":
            globally.append(certified.certify(pixels(batch)).radius)
        if on_batch is not None:
            on_batch(len(batch))
    found = Certificate(
        torch.cat([part.prediction for part in parts]).cpu(),
        torch.cat([part.radius for part in parts]).cpu(),
    )
    seconds = time.perf_counter() - start
    before = torch.cat(globally).cpu() if globally else None
    return Report(
        data.labels, found, tuple(epsilons), lipschitz, certificate, seconds, globally=before
    )


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


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def finite(number: float) -> float | None:
    """Return a number, or ``None`` for JSON if it is infinite or NaN."""
    return number if math.isfinite(number) else None
