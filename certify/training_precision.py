"""In which precision a network's products are computed in training."""

from __future__ import annotations

import time

import torch

_SIZE = 256
_GAIN = 1.2
"""How much faster ``bfloat16`` has to be."""


def chosen_precision(precision: str, device: torch.device) -> str:
    """``"float32"`` or ``"bfloat16"``; for ``"auto"`` the latter where it is faster.

    GPUs have had instructions for it since compute capability 8; on a CPU both are tried, since
    without instructions ``bfloat16`` can be a hundred times slower.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = _seconds(torch.float32) > _GAIN * _seconds(torch.bfloat16)
    else:
        fast = False
    return "bfloat16" if fast else "float32"


def _seconds(dtype: torch.dtype) -> float:
    """Shortest time that a product of matrices takes."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        taken.append(time.perf_counter() - start)
    return min(taken)
