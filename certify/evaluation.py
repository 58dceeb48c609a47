"""Certify a data set and report what was found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from certify.attack import Effort
from certify.attacked import attack_all
from certify.certificates import Certificate, check_certificate, in_a_row, largest_of
from certify.certified_model import CertifiedModel, check_floating
from certify.data import ImageData, pixels
from certify.ranks import ALONE, Ranks
from certify.report import Report
from certify.signal import UnknownRounding

_Result = TypeVar("_Result")

Batches = Iterable[Sequence[Tensor]]
"""Such as a `DataLoader`: inputs ``(N, *input_shape)``, floats, and labels ``(N,)``, in turn."""


def evaluate(
    certified: CertifiedModel,
    data: ImageData | Batches,
    epsilons: float | Sequence[float] = (),
    *,
    batch_size: int = 500,
    certificate: str = "lipschitz",
    attack: Effort | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_attacked: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Certify every image of ``data``.

    Args:
        certified: the network and its bounds.
        data: images and labels; or batches of both, as a `DataLoader` gives them.
        epsilons: L2 budget or budgets, in the units of the inputs (of pixels in [0, 1]).
        batch_size: images per forward pass; a `DataLoader` has its own.
        certificate: as in `CertifiedModel.certify`.
        attack: how hard to attack every image as well; see `certify.attack`. A radius that is
            broken raises `certify.attacked.BrokenCertificate`. Batches are kept in memory for it.
        on_batch: called with the number of images done, after each batch.
        on_attacked: likewise, when they have been attacked.
        ranks: processes that share the batches; each returns the report of all.

    Raises:
        ValueError: no images, images of another shape than the network's input, labels that
            it has no logit for, a negative budget, or an unknown certificate.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = TensorDataset(torch.rand(10, 3, 2, 2), torch.arange(10) % 3)
        >>> report = evaluate(
        ...     CertifiedModel(model, (3, 2, 2)), DataLoader(images, batch_size=4), [0.1]
        ... )
        >>> report.n, 0 <= report.certified_accuracy[0.1] <= report.clean_accuracy
        (10, True)
    """
    check_certificate(certificate)
    epsilons = [epsilons] if isinstance(epsilons, int | float) else epsilons
    check_budgets(epsilons)
    start = time.perf_counter()
    lipschitz = certified.lipschitz().item()
    kinds = certified.applicable() if certificate == "best" else (certificate,)
    kinds = tuple(dict.fromkeys(("lipschitz", *kinds)))
    times = dict.fromkeys(("logits", *kinds), 0.0)
    done: list[tuple[Tensor, dict[str, Certificate]]] = []
    kept: list[Tensor] = []
    passes = 0
    for number, (images, labels) in enumerate(_batches(data, batch_size)):
        check_batch(images, labels, certified.input_shape, certified.num_classes)
        if attack is not None:
            kept.append(images)
        if number == 0 and certificate != "lipschitz":
            certified.certify(pixels(images[:1]), certificate)  # what is once for all inputs
        if number % ranks.count != ranks.rank:
            continue
        x = pixels(images)
        if certificate != "lipschitz":  # to compare with
            times["logits"] += _timed(certified.logits, x)[1]
        found_by: dict[str, Certificate] = {}
        for kind in kinds:
            if kind == "dual":
                bounds, seconds = _timed(certified.dual, x)
                passes += bounds.passes
                one = bounds.certificate()
            else:
                one, seconds = _timed(certified.certify, x, kind)
            found_by[kind] = one.cpu()
            times[kind] += seconds
        done.append((labels.cpu(), found_by))
        if on_batch is not None:
            on_batch(len(images))
    done, passes = ranks.joined(done), sum(ranks.joined([passes]))
    if not any(len(labels) for labels, _ in done):
        raise ValueError("there are no images to evaluate")
    labels = torch.cat([labels for labels, _ in done])
    index = data.places if isinstance(data, ImageData) else None
    whole = {kind: in_a_row([found_by[kind] for _, found_by in done]) for kind in kinds}
    chosen = [whole[kind] for kind in kinds] if certificate == "best" else [whole[certificate]]
    found, _ = largest_of(chosen)
    seconds = time.perf_counter() - start
    asked = kinds if certificate == "best" else (certificate,)
    attacked = None
    if attack is not None:
        attacked = attack_all(
            certified.adversary.with_effort(attack),
            torch.cat(kept),
            epsilons,
            batch_size,
            radius=found.radius,
            confirm=certified.surely_differs,
            index=index,
            on_batch=on_attacked,
            ranks=ranks,
        )
    return Report(
        labels,
        found,
        tuple(epsilons),
        lipschitz,
        certificate,
        seconds,
        radii={kind: one.radius for kind, one in whole.items()},
        costs={kind: times[kind] / times["logits"] for kind in asked if times["logits"]},
        passes=passes / len(labels) if "dual" in kinds else None,
        attack=attacked,
        precision=_arithmetic(certified, kinds),
        index=index,
    )


def _batches(data: ImageData | Batches, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, Dataset):
        raise ValueError(f"expected a DataLoader: DataLoader(data, batch_size={size})")
    if isinstance(data, ImageData):
        if len(data):
            yield from zip(data.images.split(size), data.labels.split(size), strict=True)
        return
    for batch in data:
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise ValueError("expected batches of two, inputs and labels, as a DataLoader gives")
        inputs, labels = batch
        check_floating(inputs)
        if (
            not isinstance(labels, Tensor)
            or labels.is_floating_point()
            or labels.dtype == torch.bool
        ):
            raise ValueError("expected labels as a tensor of integers")
        yield inputs, labels


def _arithmetic(certified: CertifiedModel, kinds: Sequence[str]) -> str:
    """What the radii are about."""
    if certified.precision is not None:
        return certified.precision.name
    try:
        for kind in kinds:
            certified.check_rounding(kind)
    except UnknownRounding:
        return "exact beyond the logits"
    return "exact"


def check_batch(
    images: Tensor, labels: Tensor, input_shape: Sequence[int], num_classes: int
) -> None:
    """Refuse images that a network does not take, and labels that it has no logit for.

    Raises:
        ValueError: see `evaluate`.
    """
    if labels.ndim != 1 or images.ndim == 0 or len(labels) != len(images):
        shapes = f"{tuple(labels.shape)} and {tuple(images.shape)}"
        raise ValueError(f"expected as many labels as images, got shapes {shapes}")
    if tuple(images.shape[1:]) != tuple(input_shape):
        raise ValueError(
            f"the model takes images of shape {tuple(input_shape)}, the data has "
            f"{tuple(images.shape[1:])}"
        )
    for label in (int(labels.max()), int(labels.min())) if len(labels) else ():
        if not 0 <= label < num_classes:
            raise ValueError(f"the model has {num_classes} classes, the data has a label {label}")


def check_budgets(epsilons: Sequence[float]) -> None:
    """Refuse what is no L2 budget, with a ``ValueError``."""
    if any(not 0 <= epsilon < math.inf for epsilon in epsilons):
        raise ValueError(f"expected eps >= 0, got {list(epsilons)}")


def _timed(call: Callable[..., _Result], *arguments: Any) -> tuple[_Result, float]:
    start = time.perf_counter()
    result = call(*arguments)
    return result, time.perf_counter() - start
