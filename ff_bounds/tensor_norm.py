r"""The tensor norm that bounds a convolution (Grishina, Gorbunov & Rakhuba, ECCV 2024), estimated.

The spectral norm of a kernel as a tensor with ``2 + d`` axes is the maximum of

    ``|K(x, y, z_1, ..., z_d)|``, ``K(x, y, z, ...) = sum K[o, i, a, ...] x_o y_i z_a ...``,

over *complex* unit vectors. **It bounds the convolution:** with the taps' number
``T = prod(taps)``,

    ``sigma* = sup_w ||K(w)|| <= sqrt(T) ||K||_tensor``.

Proof: let ``sigma*`` be attained at ``w`` with singular vectors ``u, v``, so that
``sigma* = u^H K(w) v = K(conj(u), v, p_1, ..., p_d)`` with the phases ``p_j = (e^{-i w_j a})_a``,
whose norms are ``sqrt(taps_j)``.

Also ``||K||_tensor <= ||A||`` for each unfolding ``A`` of the kernel, whose norm is the same
maximum over more vectors: this bound is never above the four of Singla & Feizi (2021), and within
``sqrt(T)`` of ``sigma*``. But the tensor norm itself is hard to compute: what ascent finds is a
*lower* bound of it, so no proof. It is a good guess of a bound, to be proven by other means.

References:
    E. Grishina, M. Gorbunov, M. Rakhuba, Tight and Efficient Upper Bound on Spectral Norm of
    Convolutional Layers, ECCV 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ff_bounds.matrix import attach_gradient, check_finite_real
from ff_bounds.rounding import scale_by_power_of_two
from ff_bounds.supremum import supremum_bracket

_BETWEEN_HALVINGS = 10  # sweeps after which the worse half of the ascents is given up
_CONVERGED = 1e-10  # relative gain of a sweep


def tensor_norm_estimate(kernel: Tensor, *, starts: int = 16, iterations: int = 200) -> Tensor:
    r"""Estimate the tensor norm ``||K||_tensor`` of a kernel, the largest over its groups.

    **Not a bound**: a lower bound of the tensor norm (up to rounding), by the higher-order power
    method: all vectors but one fixed, the best for that one is the conjugate of the contraction,
    in turn; no step loses. Times ``sqrt(prod(taps))`` it is usually, not always, above ``sigma*``.

    Ascents start at the phases of all frequencies of the discrete Fourier transform of the taps
    (one of them is not orthogonal to the kernel, so that only a zero kernel gives zero), at the
    leading singular vectors of the unfoldings along each axis of taps, and at some random vectors.
    Every few sweeps the worse half of each group's ascents is given up.

    Differentiable: the gradient is the real part of the best product of vectors, so that
    ``<gradient, kernel>`` equals the value; zero for a zero kernel.

    Args:
        kernel: ``(groups, c_out, c_in, *taps)`` real, as from `unit_stride_kernel`; one to three
            axes of taps.
        starts: number of random starts, beside the others.
        iterations: most sweeps over all vectors; usually some tens are enough.

    Returns:
        A float64 scalar on the kernel's device.

    Raises:
        ValueError: a kernel of another shape or dtype, NaN or infinite entries, no
            iteration or fewer than no random start.

    References:
        L. De Lathauwer, B. De Moor, J. Vandewalle, On the best rank-1 and rank-(R1, ..., RN)
        approximation of higher-order tensors, SIAM J. Matrix Anal. Appl. 21 (2000), for the method.

    Example:
        >>> kernel = torch.tensor([1.0, -2.0, 1.0]).reshape(1, 1, 1, 3)
        >>> round(tensor_norm_estimate(kernel).item() ** 2, 6)  # a vector's norm is its length
        6.0
    """
    check_finite_real(kernel, "kernel")
    if not 4 <= kernel.ndim <= 6 or kernel.numel() == 0:
        raise ValueError(
            "expected a non-empty kernel (groups, c_out, c_in, *taps) with one to three axes of "
            f"taps, got shape {tuple(kernel.shape)}"
        )
    if starts < 0 or iterations < 1:
        raise ValueError(f"expected starts >= 0 and iterations >= 1, got {starts}, {iterations}")
    with torch.no_grad():
        wide = kernel.detach().to(torch.float64)
        exponent = torch.frexp(wide.abs().amax()).exponent
        scaled = scale_by_power_of_two(wide, -exponent)
        value, direction = _ascend(scaled, starts, iterations)
        value = scale_by_power_of_two(value, exponent)
    if not (torch.is_grad_enabled() and kernel.requires_grad):
        return value
    return attach_gradient(kernel.to(torch.float64), value, direction)


def tensor_norm_bound(kernel: Tensor) -> Tensor:
    """Proven upper bound of ``sigma*``, about ``sqrt(T)`` times the tensor norm.

    Claim: ``sigma* <= tensor_norm_bound(kernel)``, rounding included. The candidate
    ``sqrt(T) tensor_norm_estimate(kernel)`` proves nothing by itself; branch and bound
    (`supremum_bracket`) with the gap that the candidate leaves above ``sigma*``, so with few
    frequencies, proves it. Where that fails, because the estimate was too low or the gap is below
    0.1 %, the result is the upper end of the bracket.

    Args:
        kernel: ``(groups, c_out, c_in, *taps)``, as from `unit_stride_kernel`.

    Returns:
        A float64 scalar, differentiable: the estimate's gradient, scaled so that
        ``<gradient, kernel>`` equals the bound.

    Raises:
        ValueError: as `tensor_norm_estimate`.

    References:
        E. Grishina, M. Gorbunov, M. Rakhuba, ECCV 2024, theorem 1 (the inequality).

    Example:
        >>> kernel = torch.tensor([1.0, -2.0, 1.0]).reshape(1, 1, 1, 3)
        >>> round(tensor_norm_bound(kernel).item(), 3)  # sigma* is 4
        4.243
    """
    candidate = tensor_norm_estimate(kernel) * math.sqrt(math.prod(kernel.shape[3:]))
    value = candidate.detach()
    lower = supremum_bracket(kernel, 1.0).lower
    gap = float((value / lower - 1.0).nan_to_num(nan=1.0, posinf=1.0)) * (1.0 - 1e-9)
    upper = supremum_bracket(kernel, min(max(gap, 1e-3), 1.0)).upper
    proven = torch.maximum(value, upper)
    usable = (value > 0) & torch.isfinite(proven)
    scaled = candidate * torch.where(usable, proven / value, 0.0)
    exact = proven + (scaled - scaled.detach())  # the very value, with a gradient
    return torch.where(torch.isfinite(proven), exact, proven)


def _ascend(kernel: Tensor, starts: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the largest value found, and the real part of its product of vectors."""
    groups, c_out, c_in, *taps = kernel.shape
    flat = kernel.flatten(1, 2).flatten(2)  # (groups, c_out * c_in, T)
    phases = _starting_phases(kernel, starts)
    generator = torch.Generator().manual_seed(1)
    shape = (groups, phases[0].shape[1], c_in)
    right = _complex_normal(shape, generator).to(kernel.device)

    value = flat.new_zeros(shape[:2])
    for sweep in range(iterations):
        before = value
        matrix = _times(_outer(phases), flat.mT).unflatten(-1, (c_out, c_in))
        for _ in range(2):
            left = _conjugate_unit((matrix @ right[..., None])[..., 0])[0]
            right = _conjugate_unit((left[..., None, :] @ matrix)[..., 0, :])[0]
        tensor = _times(_outer([left, right]), flat).unflatten(-1, taps)
        for _ in range(2 if len(taps) > 1 else 1):
            for axis in range(len(taps)):
                phases[axis], value = _conjugate_unit(_contract(tensor, phases, axis))
        if bool((value <= before * (1.0 + _CONVERGED)).all()):
            break
        if (sweep + 1) % _BETWEEN_HALVINGS == 0 and value.shape[1] > 1:
            value, best = value.topk((value.shape[1] + 1) // 2, dim=1)
            left, right, *phases = (
                vector.gather(1, best[..., None].expand(-1, -1, vector.shape[-1]))
                for vector in (left, right, *phases)
            )

    group, start = divmod(int(value.argmax()), value.shape[1])
    vectors = [vector[group, start] for vector in (left, right, *phases)]
    direction = torch.zeros_like(kernel)
    direction[group] = _outer(vectors).real.reshape(kernel.shape[1:])
    value = value[group, start]
    # Exactly homogeneous, whatever rounding left of it.
    inner = (direction * kernel).sum()
    return value, direction * torch.where(inner > 0, value / inner, 0.0)


def _starting_phases(kernel: Tensor, starts: int) -> list[Tensor]:
    """Unit vectors ``(groups, starts, taps_j)`` for each axis of taps."""
    groups, taps = len(kernel), kernel.shape[3:]
    halves = [*taps[:-1], taps[-1] // 2 + 1]  # the rest are conjugates
    digits = torch.cartesian_prod(*(torch.arange(t) for t in halves)).reshape(-1, len(taps))
    generator = torch.Generator().manual_seed(0)
    phases = []
    for axis, (digit, size) in enumerate(zip(digits.unbind(dim=1), taps, strict=True)):
        angle = (2.0 * math.pi / size) * (digit[:, None] * torch.arange(size)).to(torch.float64)
        fourier = torch.polar(torch.ones_like(angle), -angle)
        random = _complex_normal((starts, size), generator)
        fixed = torch.cat((fourier, random)).to(kernel.device).expand(groups, -1, -1)
        unfolded = kernel.movedim(3 + axis, 1).flatten(2)
        _, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)
        leading = vectors[..., -1].to(fixed.dtype)[:, None]
        phases.append(_conjugate_unit(torch.cat((fixed, leading), dim=1))[0])
    return phases


def _complex_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    parts = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    return torch.view_as_complex(parts)


def _times(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Complex rows ``(groups, k, n)`` times real matrices ``(groups, n, p)``."""
    product = torch.cat((vectors.real, vectors.imag), dim=1) @ matrix
    return torch.complex(*product.chunk(2, dim=1))


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    """Flattened products of vectors ``(..., n_1)``, ``(..., n_2)``, and so on."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = (product[..., :, None] * vector[..., None, :]).flatten(-2)
    return product


def _contract(tensor: Tensor, vectors: Sequence[Tensor], kept: int) -> Tensor:
    """Contract tensors ``(groups, starts, *sizes)`` with all vectors but the one of axis `kept`."""
    for axis in reversed(range(len(vectors))):
        if axis != kept:
            tensor = tensor.movedim(2 + axis, -1)
            vector = vectors[axis].reshape(*tensor.shape[:2], *[1] * (tensor.ndim - 3), -1)
            tensor = (tensor * vector).sum(dim=-1)
    return tensor


def _conjugate_unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Conjugates of vectors ``(..., n)`` scaled to length one, and the lengths ``(...)``."""
    length = torch.linalg.vector_norm(vector, dim=-1)
    return vector.conj() / torch.where(length > 0, length, 1.0)[..., None], length
