"""Bounds from sums of absolute entries: of scaled kernels, and of what is nearly orthogonal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ff_bounds.rounding import SMALLEST_NORMAL, gamma, round_up


def scaled_square_bound(weight: Tensor, divisors: Tensor, scale: Tensor) -> Tensor:
    r"""Proven upper bound of ``||diag(t)^{-1/2} V||^2`` for a convolution ``V`` of stride one.

    Claim: with ``G = V V^T``, whose kernel is ``G_s = sum_t V_{t+s} V_t^T``, for any positive ``q``

        ``||diag(t)^{-1/2} V||^2 <= max_i sum_j sum_s |G_{ij, s}| q_j / (q_i t_i)``

    on the infinite lattice and under zero padding of any input size. At each frequency the left
    side is the largest eigenvalue of ``diag(t)^{-1/2} G(f) diag(t)^{-1/2}``, hence of the similar
    ``diag(q t)^{-1} G(f) diag(q)``, hence at most the largest sum of a row's absolute values, and
    ``|G_{ij}(f)| <= sum_s |G_{ij, s}|``; zero padding restricts the lattice.

    Rounding is paid for: an entry ``G_{ij, s}`` is off by at most ``gamma_k`` times the same sum
    of absolute products, with ``k`` of them; added over ``s`` these sums are at most
    ``(B B^T)_{ij}`` with ``B`` the sums of ``|V|`` over the taps.

    Args:
        weight: ``(m, n, *taps)``, ungrouped.
        divisors: ``t (m,)``, positive.
        scale: ``q (m,)``, positive.

    Returns:
        Float64 scalar without gradient, infinite where an argument is not finite and positive.

    References:
        A. Araujo et al., A Unified Algebraic Perspective on Lipschitz Neural Networks, ICLR 2023,
        theorem 3 (the choice of ``t`` for which this is one).

    Example:
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> bound = scaled_square_bound(weight, torch.tensor([4.0, 1.0]), torch.ones(2))
        >>> 1.0 <= bound.item() < 1.0 + 1e-12
        True
    """
    v = weight.detach().to(torch.float64)
    t, q = (tensor.detach().to(torch.float64) for tensor in (divisors, scale))
    sums = torch.zeros(len(v), len(v), dtype=torch.float64, device=v.device)
    for here, there, twice in _overlaps(tuple(v.shape[2:])):
        product = v[here].flatten(1) @ v[there].flatten(1).mT
        sums += product.abs()
        if twice:
            sums += product.mT.abs()
    taps = math.prod(v.shape[2:])
    terms = v.shape[1] * taps
    sizes = v.abs().flatten(2).sum(dim=2) if taps > 1 else v.abs().flatten(1)
    # What was rounded and what underflowed in products that were added.
    sums = sums + gamma(terms + 1) * (1.0 + gamma(2 * terms + 8)) * (sizes @ sizes.mT)
    sums = sums + 8.0 * terms * taps * SMALLEST_NORMAL
    rows = (sums @ q + len(v) * SMALLEST_NORMAL) / (q * t) + SMALLEST_NORMAL
    bound = round_up(rows.amax(), len(v) + 2 * 2 ** len(v.shape[2:]) * taps + 9)
    usable = (t * q > 1e-200) & (t < 1e100) & (q < 1e100) & (q > 1e-100)
    return torch.where(usable.all() & bound.isfinite(), bound, torch.inf)


def _overlaps(taps: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], bool]]:
    """Slices of a kernel and of its shifted copy, for one of each pair of opposite shifts."""
    whole = (slice(None), slice(None))
    for shift in itertools.product(*(range(1 - count, count) for count in taps)):
        if shift < tuple(-s for s in shift):
            continue
        here = [slice(max(0, s), count + min(0, s)) for s, count in zip(shift, taps, strict=True)]
        there = [slice(max(0, -s), count - max(0, s)) for s, count in zip(shift, taps, strict=True)]
        yield (*whole, *here), (*whole, *there), any(shift)


def near_isometry_bound(matrices: Tensor) -> Tensor:
    r"""Proven upper bound of the spectral norm of each matrix, tight for those near isometries.

    Claim: ``||M||^2 = ||M^H M|| <= 1 + ||M^H M - I||_F``. With ``k`` rows an entry of the computed
    ``M^H M`` is off by at most ``gamma_{4k}`` times the lengths of its two columns, which is added
    to the Frobenius norm as ``gamma_{4k} ||M||_F^2``.

    Args:
        matrices: ``(..., m, n)``, real or complex.

    Returns:
        ``(...)`` float64 without gradient; infinite or NaN where an entry is not finite.

    Example:
        >>> bound = near_isometry_bound(torch.eye(3))
        >>> 1.0 <= bound.item() < 1.0 + 1e-12
        True
    """
    kind = torch.complex128 if matrices.is_complex() else torch.float64
    exact = matrices.detach().resolve_conj().to(kind)
    rows, columns = exact.shape[-2:]
    identity = torch.eye(columns, dtype=kind, device=exact.device)
    defect = _frobenius(exact.mH @ exact - identity)
    size = _frobenius(exact)
    defect = defect + gamma(4 * rows + 8) * size * size + rows * columns * 2.0**-500
    return round_up((1.0 + round_up(defect, 4 * columns * max(rows, columns) + 8)).sqrt(), 4)


def _frobenius(matrices: Tensor) -> Tensor:
    """Norms of complex matrices too, over twice as many real entries."""
    parts = torch.view_as_real(matrices) if matrices.is_complex() else matrices[..., None]
    norms: Tensor = torch.linalg.vector_norm(parts.flatten(-3), dim=-1)
    return norms
