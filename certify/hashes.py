"""Hashes by which weights and images are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def hash_of_model(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of all parameters and buffers, as float64."""
    digest = hashlib.sha256()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor.to(torch.float64) if tensor.is_floating_point() else tensor))
    return digest.hexdigest()


def hash_of_images(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of images and labels, in their order."""
    digest = hashlib.sha256(f"{tuple(images.shape)}\n".encode())
    digest.update(_bytes(images))
    digest.update(_bytes(labels))
    return digest.hexdigest()


def hash_of_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor.to(torch.float64)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
