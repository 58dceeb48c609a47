"""A cheap, warm-started stand-in for the supremum over all frequencies, for training losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ff_bounds.kernel_estimates import KernelEstimates


class SupremumPenalty(KernelEstimates):
    r"""Estimates of `supremum_bound` for all kernels of a network at once.

    **Not a bound.** On a circular grid a convolution acts on each frequency ``f`` alone, by the
    matrix ``W(f) = sum_t W_t exp(2 pi i f.t)``. Each call makes a step or two of power iteration
    for every frequency of the grid together: one convolution of an image as large as the grid, one
    with the adjoint, and a unit vector at each frequency, kept for the next call. The result is
    ``Re(u^H W(f) v)`` with unit vectors at the frequency where it is largest, hence above the norm
    by no more than rounding. What lies between the frequencies of the grid, eight for each degree,
    is missed: a factor of at most ``1 / cos(pi / 16)`` an axis, 2 % (Ehlich & Zeller 1964), and
    nothing where the peak is on the grid (as at frequency zero).

    Its gradient with respect to tap ``t`` is ``Re(conj(u) v^T exp(2 pi i f.t))``, and zero for a
    zero kernel.

    Kernels of equal shape are measured together. The vectors are buffers.

    Args:
        shapes: for each kernel ``(groups, c_out, c_in, *taps)`` with one to three axes of taps,
            as `unit_stride_kernel` returns them; a matrix ``(m, n)`` is ``(1, m, n, 1)``.
        seed: seed of the random start.

    References:
        H. Sedghi, V. Gupta, P. Long, The Singular Values of Convolutional Layers, ICLR 2019 (the
        norm by frequencies).
        T. Miyato et al., Spectral Normalization for GANs, ICLR 2018 (the warm start).

    Example:
        >>> penalty = SupremumPenalty([(1, 1, 1, 3, 3)])
        >>> round(penalty([torch.ones(1, 1, 1, 3, 3)]).item(), 4)
        9.0
    """

    def _start(
        self, bucket: int, layers: int, shape: tuple[int, ...], generator: torch.Generator
    ) -> None:
        groups, _, c_in, *taps = shape
        image = torch.randn(layers * groups, c_in, *_grid(taps), generator=generator)
        self.register_buffer(f"right_{bucket}", _unit_at_each_frequency(image)[0])
        # Where a step ends in zero, go on from (cos 0, cos 1, cos 2, ...), which no matrix of
        # floating-point numbers but zero sends to zero; see `PowerIterationPenalty`.
        fresh = torch.arange(image[0].numel(), dtype=torch.float64).cos()
        restart = fresh.to(image).reshape(image[:1].shape).expand_as(image)
        self.register_buffer(f"restart_{bucket}", restart, persistent=False)

    def _values(self, kernels: Tensor, bucket: int, iterations: int) -> Tensor:
        with torch.no_grad():
            group, left, right, phases = self._peak(kernels.detach(), bucket, iterations)
        every = torch.arange(len(kernels), device=group.device)
        chosen = kernels[:, 0] if kernels.shape[1] == 1 else kernels[every, group]
        return _gains(chosen.flatten(3), left, right, phases).to(kernels.dtype)

    def _peak(
        self, kernels: Tensor, bucket: int, iterations: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make steps of power iteration; return where each kernel's gain is largest.

        Args:
            kernels: ``(layers, groups, c_out, c_in, *taps)``.
            bucket: index of these layers' buffers.
            iterations: steps of power iteration.

        Returns:
            ``(group, u, v, phases)``: its group ``(layers,)``, the complex unit vectors ``u
            (layers, c_out)`` and ``v (layers, c_in)``, and ``exp(2 pi i f.t)`` of its frequency for
            each tap.
        """
        buffer = cast(Tensor, getattr(self, f"right_{bucket}"))
        layers, groups = kernels.shape[:2]
        precision = torch.promote_types(kernels.dtype, torch.float32)  # squares overflow in float16
        weight = kernels.to(precision).flatten(0, 1)
        # Squares of tiny or huge entries would underflow or overflow.
        largest = torch.linalg.vector_norm(weight.flatten(1), math.inf, dim=1)
        scale = torch.where(largest > 0, largest, 1.0)
        weight = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
        right = buffer.to(precision)
        for _ in range(iterations):
            left, u, _ = _unit_at_each_frequency(_circular(weight, right))
            image, v, gains = _unit_at_each_frequency(_circular(weight, left, adjoint=True))
            restart = cast(Tensor, getattr(self, f"restart_{bucket}")).to(precision)
            alive = gains.flatten(1).amin(dim=1) > 0  # asked of no device: that would wait for it
            right = torch.where(alive.reshape(-1, *[1] * (image.ndim - 1)), image, restart)
        buffer.copy_(right)

        frequencies = gains.shape[1:]
        gains = gains.reshape(layers, groups, -1) * scale.reshape(layers, groups, 1)
        best, place = gains.max(dim=2)
        group = best.argmax(dim=1)
        layer = torch.arange(layers, device=group.device)
        frequency = place[layer, group]
        chosen = layer * groups + group
        u, v = (x.flatten(2)[chosen, :, frequency] for x in (u, v))
        phases = _phases(frequency, frequencies, right.shape[2:], kernels.shape[4:]).to(u)
        return group, u, v, phases


def _gains(kernels: Tensor, left: Tensor, right: Tensor, phases: Tensor) -> Tensor:
    """``Re(u^H W(f) v)`` of kernels ``(layers, c_out, c_in, taps)``."""
    if kernels.shape[3] == 1:  # a matrix, and all is real
        u, v = left.real.to(kernels.dtype), right.real.to(kernels.dtype)
        return (u[:, None] @ kernels[..., 0] @ v[..., None]).flatten()
    pairs = left.conj()[:, :, None] * right[:, None, :]
    gradient = (pairs[..., None] * phases[:, None, None]).real
    products: Tensor = kernels * gradient.to(kernels.dtype)
    return products.flatten(1).sum(dim=1)


def _grid(taps: Sequence[int]) -> list[int]:
    """Eight frequencies for each degree of a polynomial with so many terms an axis."""
    return [max(1, 8 * (count - 1)) for count in taps]


def _circular(weight: Tensor, images: Tensor, *, adjoint: bool = False) -> Tensor:
    """Correlate with periodic images, ``y[p] = sum_t W_t x[p + t]``, or apply the adjoint.

    Args:
        weight: ``(kernels, c_out, c_in, *taps)``.
        images: ``(kernels, c_in, *size)``; ``c_out`` channels for the adjoint.
        adjoint: which of both.
    """
    taps = weight.shape[3:]
    if max(taps) == 1:  # a matrix
        matrix, vector = weight.flatten(2), images.flatten(2)
        product = matrix.mT @ vector if adjoint else matrix @ vector
        return product.reshape(*product.shape[:2], *taps)
    if adjoint:
        weight = weight.transpose(1, 2).flip(list(range(3, weight.ndim)))
    padding = [
        p for count in reversed(taps) for p in ((count - 1, 0) if adjoint else (0, count - 1))
    ]
    x = F.pad(images, padding, mode="circular").flatten(0, 1)[None]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]
    result: Tensor = convolve(x, weight.flatten(0, 1), groups=len(weight))
    return result.reshape(len(weight), -1, *images.shape[2:])


def _unit_at_each_frequency(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the vector at each frequency to length one; what is zero stays zero.

    Returns:
        The images, their spectra ``(kernels, channels, *frequencies)`` (half of all frequencies,
        the others being conjugates), and the lengths ``(kernels, *frequencies)`` before.
    """
    axes = list(range(2, images.ndim))
    spectrum = torch.fft.rfftn(images, dim=axes, norm="ortho")
    lengths = torch.view_as_real(spectrum).square().sum(dim=(1, -1)).sqrt()
    spectrum = spectrum / torch.where(lengths > 0, lengths, 1.0)[:, None]
    return torch.fft.irfftn(spectrum, s=images.shape[2:], dim=axes, norm="ortho"), spectrum, lengths


def _phases(
    chosen: Tensor, frequencies: Sequence[int], size: Sequence[int], taps: Sequence[int]
) -> Tensor:
    """``exp(2 pi i f.t)`` for each tap, at places ``(layers,)`` of a flattened spectrum."""
    indices = []
    for count in reversed(frequencies):  # not unravel_index, which makes a device wait for sizes
        indices.append(chosen % count)
        chosen = chosen // count
    angle = torch.zeros(len(chosen), 1, dtype=torch.float64, device=chosen.device)
    for index, points, length in zip(reversed(indices), size, taps, strict=True):
        steps = torch.arange(length, dtype=torch.float64, device=chosen.device) / points
        angle = angle[:, :, None] + 2.0 * math.pi * index[:, None, None] * steps
        angle = angle.flatten(1)
    return torch.polar(torch.ones_like(angle), angle)
