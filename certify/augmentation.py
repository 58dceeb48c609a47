"""Changes of training images that leave their labels as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""From a float batch ``(N, C, H, W)`` to one of the same shape, on the batch's device."""


def shift(amount: int) -> Augmentation:
    """Shift each image by up to ``amount`` pixels along both axes, filling with zeros."""

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (amount,) * 4)
        offsets = torch.randint(0, 2 * amount + 1, (2, count), generator=generator)
        top, left = offsets.to(images.device)
        rows = top[:, None] + torch.arange(height, device=images.device)
        columns = left[:, None] + torch.arange(width, device=images.device)
        sample = torch.arange(count, device=images.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()

    return apply


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


def randaugment(operations: int = 2, magnitude: int = 9) -> Augmentation:
    """Change images by torchvision's RandAugment, sixteenths of a batch alike.

    Its draws come from torch's global generator.

    Args:
        operations: changes in a row.
        magnitude: their strength, up to 30.

    References:
        E. Cubuk, B. Zoph, J. Shlens, Q. Le, RandAugment, NeurIPS 2020.
    """
    from torchvision.transforms.v2 import RandAugment

    change = RandAugment(operations, magnitude)

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        parts = (images * 255.0).round().to(torch.uint8).chunk(16)
        changed: Tensor = torch.cat([change(part) for part in parts])
        return changed.to(images.dtype) / 255.0

    return apply


def augmentations(described: str, dataset: str) -> list[Augmentation]:
    """Augmentations by their names, in this order.

    Args:
        described: names with numbers, separated by commas: ``"shift:4,flip"`` (up to 4 pixels,
            left to right), ``"randaugment:2:9"`` (operations, magnitude); ``"none"``; or
            ``"auto"`` for what suits the data set, if that is known.
        dataset: name of the data set.

    Raises:
        ValueError: an unknown name, or numbers that it does not take.

    Example:
        >>> len(augmentations("shift:2,flip", "folder:images"))
        2
    """
    if described == "auto":
        described = _suited(dataset)
    if described == "none":
        return []
    return [_named(one) for one in described.split(",")]


def _suited(dataset: str) -> str:
    known = {"fashion-mnist": "shift:1,flip", "cifar10": "shift:4,flip", "cifar100": "shift:4,flip"}
    digits = ("mnist", "mnist-5k", "kmnist")
    return "shift:1" if dataset in digits else known.get(dataset, "none")


def _named(described: str) -> Augmentation:
    name, *numbers = described.strip().split(":")
    try:
        values = [int(number) for number in numbers]
        if min(values, default=0) >= 0:
            if name == "shift" and len(values) == 1:
                return shift(values[0])
            if name == "flip" and not values:
                return flip
            if name == "randaugment" and len(values) <= 2 and max(values[1:], default=0) <= 30:
                return randaugment(*values)
    except ValueError:
        pass
    raise ValueError(
        "expected augmentations such as shift:4,flip,randaugment:2:9 or none or auto, "
        f"got {described!r}"
    )
