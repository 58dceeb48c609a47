"""Gram iteration (Delattre et al., ICML 2023) at the frequencies of a grid: convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ff_bounds.gram_iteration import UNDERFLOW, check_iterations, norm_bound, norm_gradient
from ff_bounds.matrix import attach_gradient, check_finite_real
from ff_bounds.rounding import (
    UNIT_ROUNDOFF,
    gamma,
    round_up,
    scale_by_power_of_two,
    undo_scaling,
)

_CHUNK_BYTES = 2**27  # matrices held at once


def gram_iteration_supremum_bound(
    kernel: Tensor, *, grid: int | Sequence[int] | None = None, iterations: int = 8
) -> Tensor:
    r"""Proven upper bound of ``sigma* = sup_w ||K(w)||`` by Gram iteration on a grid.

    Claim: ``sigma* <= prod_i 1 / cos(r_i pi / N_i) * max_grid ||K(w)||`` for a grid of
    ``N_i > 2 r_i`` points per axis, ``r_i = (taps_i - 1) / 2``, the largest over the groups; hence
    a bound of the layer's norm for any input size and any amount of zero padding.

    Proof: let ``sigma*`` be attained at ``w*``, with singular vectors ``x, y``, and let ``w_1``
    alone move. With the taps centred (a phase factor, which changes no norm),
    ``f(s) = Re(x^H K(w*_1 + s, w*_2, ...) y)`` is a real function of exponential type ``r_1`` with
    ``|f| <= sigma* = f(0)``, so ``f(s) >= sigma* cos(r_1 s)`` for ``|r_1 s| <= pi``. The next of
    the grid's ``w_1`` is at most ``pi / N_1`` away: fixed there, the norm still reaches
    ``sigma* cos(r_1 pi / N_1)`` for some values of the other frequencies. The same for each axis
    in turn.

    At most that factor times ``min(c_out, c_in)^(1/2^(t+1))`` above ``sigma*``. By default
    ``N_i = 16 (taps_i - 1)``, a factor of 1.0049 per axis, and ``t = 8``.

    The symbol is evaluated by products with tables of cosines and sines, of known rounding; half
    of the grid is enough, as ``K(-w)`` is the conjugate of ``K(w)``. Differentiable: the gradient
    is that of the formula at the frequency and group of the largest value, scaled so that
    ``<gradient, kernel>`` equals the bound; zero for a zero kernel.

    Args:
        kernel: ``(groups, c_out, c_in, *taps)`` real, as from `unit_stride_kernel`; one to three
            axes of taps.
        grid: number of points, for every axis or one for each (ignored where there is one tap).
        iterations: number of squarings ``t``, at least one.

    Returns:
        A float64 scalar on the kernel's device.

    Raises:
        ValueError: a kernel of another shape or dtype, NaN or infinite entries, fewer points than
            taps, or fewer than one iteration.

    References:
        B. Delattre, Q. Barthélemy, A. Araujo, A. Allauzen, Efficient Bound of Lipschitz Constant
        for Convolutional Layers by Gram Iteration, ICML 2023, for the method.
        H. Ehlich, K. Zeller, Schwankung von Polynomen zwischen Gitterpunkten, Mathematische
        Zeitschrift 86 (1964), for the factor (there for polynomials of one variable).

    Example:
        >>> kernel = torch.tensor([1.0, -2.0, 1.0]).reshape(1, 1, 1, 3)
        >>> 4.0 <= gram_iteration_supremum_bound(kernel).item() <= 4.0 * 1.0049
        True
    """
    taps = _check_kernel(kernel)
    sizes = [16 * (t - 1) for t in taps] if grid is None else _sizes(grid, len(taps), "grid")
    if any(size < t for size, t in zip(sizes, taps, strict=True)) and grid is not None:
        raise ValueError(f"expected a grid of at least {taps} points, got {tuple(sizes)}")
    sizes = [size if t > 1 else 1 for size, t in zip(sizes, taps, strict=True)]
    factor = 1.0 + 1e-15
    for size, t in zip(sizes, taps, strict=True):
        # The angle is off by 2u relative, the cosine by 2u: less than 1e-15 together.
        factor /= math.cos((t - 1) / 2 * math.pi / size) - 1e-15
    return _largest(kernel, sizes, iterations, factor)


def gram_iteration_circular_bound(
    kernel: Tensor, input_size: int | Sequence[int], iterations: int = 8
) -> Tensor:
    r"""Proven upper bound of the norm under circular padding, by Gram iteration.

    Claim: a bound of ``max_j ||K(2 pi j / n)||``, the norm of the convolution of unit stride on
    inputs of size ``n`` with circular padding, which the Fourier basis makes block-diagonal; the
    largest over the groups. At most ``min(c_out, c_in)^(1/2^(t+1))`` times that norm. Taps may
    exceed the input: they then wrap around, as the phases do.

    **Not** a bound under zero padding: a grid can miss the peak. A strided layer is covered through
    its `unit_stride_kernel` if the stride divides the input, whose size is to be divided by it.

    Args:
        kernel: ``(groups, c_out, c_in, *taps)`` real; one to three axes of taps.
        input_size: length of the input, the same for every axis or one for each.
        iterations: number of squarings ``t``, at least one.

    Returns:
        A float64 scalar, differentiable as `gram_iteration_supremum_bound` is.

    Raises:
        ValueError: a kernel of another shape or dtype, NaN or infinite entries, a size below one,
            or fewer than one iteration.

    References:
        H. Sedghi, V. Gupta, P. M. Long, The Singular Values of Convolutional Layers, ICLR 2019.
        B. Delattre et al., ICML 2023, as above.

    Example:
        >>> kernel = torch.tensor([1.0, -2.0, 1.0]).reshape(1, 1, 1, 3)
        >>> round(gram_iteration_circular_bound(kernel, 3).item(), 6)  # pi is not on the grid
        3.0
    """
    taps = _check_kernel(kernel)
    return _largest(kernel, _sizes(input_size, len(taps), "input_size"), iterations, 1.0)


def _largest(kernel: Tensor, sizes: Sequence[int], iterations: int, factor: float) -> Tensor:
    """Bound ``factor * max ||K(w)||`` over the groups and the frequencies ``2 pi j / sizes``."""
    check_iterations(iterations)
    with torch.no_grad():
        taps = tuple(kernel.shape[3:])
        plain = kernel.detach().to(torch.float64)
        exponent = torch.frexp(plain.abs().amax()).exponent
        plain = scale_by_power_of_two(plain, -exponent)
        tall = plain.shape[1] > plain.shape[2]
        plain = plain.transpose(1, 2) if tall else plain
        groups, rows, columns = plain.shape[:3]
        flat = plain.reshape(groups * rows * columns, -1).mT  # (taps, entries)

        halves = [*sizes[:-1], sizes[-1] // 2 + 1]
        digits = torch.cartesian_prod(*(torch.arange(n, device=plain.device) for n in halves))
        chunk = max(1, _CHUNK_BYTES // (64 * flat.shape[1]))
        best, place = plain.new_zeros(()), torch.zeros((), dtype=torch.int64, device=plain.device)
        error = _symbol_error(plain)
        for start in range(0, len(digits), chunk):
            table = _phases(digits[start : start + chunk].reshape(-1, len(taps)), taps, sizes)
            parts = (table @ flat).reshape(-1, 2, groups, rows, columns)
            parts = parts.permute(0, 2, 3, 1, 4).flatten(3)  # (frequencies, groups, m, 2 n)
            bounds = round_up(norm_bound(parts, True, iterations) + error, 1).flatten()
            value, index = bounds.max(dim=0)
            place = torch.where(value > best, index + start * groups, place)
            best = torch.maximum(best, value)
        proven = round_up(best * factor, 1)
        bound = torch.where((plain == 0).all(), 0.0, undo_scaling(proven, exponent))
    if not (torch.is_grad_enabled() and kernel.requires_grad):
        return bound
    with torch.no_grad():
        frequency, group = divmod(int(place), groups)
        table = _phases(digits[frequency].reshape(1, -1), taps, sizes)[0]  # (2, taps)
        symbol = torch.complex(*(plain[group].flatten(2) @ table.mT).unbind(dim=-1))
        chosen = norm_gradient(symbol, proven, iterations)
        folded = torch.stack((chosen.real, chosen.imag), dim=-1) @ table
        gradient = torch.zeros_like(plain)
        gradient[group] = folded.reshape(plain.shape[1:])
    return attach_gradient(
        kernel.to(torch.float64), bound, gradient.transpose(1, 2) if tall else gradient
    )


def _phases(digits: Tensor, taps: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Real and imaginary part of ``exp(-i <a, w>)``: ``(frequencies, 2, prod(taps))``.

    Args:
        digits: ``(frequencies, d)`` integers ``j``, for ``w = 2 pi j / sizes``.
        taps: the numbers of taps ``a``.
        sizes: the numbers of points.
    """
    places = torch.cartesian_prod(*(torch.arange(t, device=digits.device) for t in taps))
    points = torch.tensor(sizes, device=digits.device)
    # Whole turns are dropped in integers, where nothing is rounded.
    steps = (digits[:, None] * places.reshape(-1, len(taps))).remainder(points)
    angle = 2.0 * math.pi * (steps.to(torch.float64) / points).sum(dim=-1)
    return torch.stack((angle.cos(), -angle.sin()), dim=1)


def _symbol_error(kernel: Tensor) -> Tensor:
    """Bound ``(groups,)`` of ``||computed K(w) - K(w)||_F`` for all frequencies of the grid.

    With ``d`` axes an angle is at most ``2 pi d`` and off by ``gamma_{d+2}`` of that, a cosine or
    sine by ``4u`` more (generously); together ``e``. The sum of ``T`` products is off by
    ``gamma_T`` relative to ``(1 + e) sum_a |K_a|``, whose Frobenius norm is at most
    ``sqrt(T) ||K||_F``; real and imaginary parts give a factor ``sqrt(2)``, and 2 covers the rest.
    """
    dimension, count = kernel.ndim - 3, math.prod(kernel.shape[3:])
    off = (2.0 * math.pi * dimension * (dimension + 3) + 8.0) * UNIT_ROUNDOFF
    frobenius = torch.linalg.vector_norm(kernel.flatten(1), dim=1)
    error: Tensor = 2.0 * (gamma(count) + off) * math.sqrt(count) * frobenius + UNDERFLOW
    return error


def _check_kernel(kernel: Tensor) -> tuple[int, ...]:
    """Return the numbers of taps of a kernel that can be used."""
    check_finite_real(kernel, "kernel")
    if not 4 <= kernel.ndim <= 6 or kernel.numel() == 0:
        raise ValueError(
            "expected a non-empty kernel (groups, c_out, c_in, *taps) with one to three axes of "
            f"taps, got shape {tuple(kernel.shape)}"
        )
    return tuple(kernel.shape[3:])


def _sizes(value: int | Sequence[int], axes: int, name: str) -> list[int]:
    """Return one positive integer per axis."""
    sizes = [value] * axes if isinstance(value, int) else list(value)
    if len(sizes) != axes or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"expected {name} as one or {axes} positive integers, got {value!r}")
    return sizes
