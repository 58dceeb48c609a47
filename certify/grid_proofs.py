r"""Proofs of norms by LAPACK: on grids of frequencies, where others search.

A matrix is given to LAPACK's SVD, with its error, and a convolution to a grid of frequencies:

    ``||K(w)|| <= max over the grid ||K(w_j)|| prod_i 1 / cos(pi (T_i - 1) / (2 N_i))``

for ``T_i`` taps and ``N_i`` frequencies along axis ``i`` (Ehlich & Zeller 1964; Pfister & Bresler
2018 for the product). On each frequency a Cholesky factorisation of ``s^2 I - K K^H`` proves that
the norm is at most ``s``: where LAPACK's succeeds, no eigenvalue is below ``-gamma_{n+1}`` times
the trace (Rump 2006). The grid is made finer until what a bound leaves to spare covers the factor.

References:
    H. Ehlich, K. Zeller, Schwankung von Polynomen zwischen Gitterpunkten, Math. Zeitschrift 86
    (1964).
    S. M. Rump, Verification of positive definiteness, BIT 46 (2006).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from certify.operators import Convolution, Matrix, Weighted

_FINEST = 2**20
"""Most frequencies of a grid, in all axes together."""

_UNIT = 2.0**-53
_CHUNK = 2**22  # entries of the matrices that are factorised together

Complex = npt.NDArray[np.complex128]


def matrix_norm_at_most(matrix: npt.NDArray[np.float64], bound: float) -> bool:
    """Whether LAPACK's SVD proves that a norm is at most ``bound``.

    Its largest singular value is off by ``p u`` relative with a polynomial ``p`` of low degree in
    the sizes, for which ``4 max(m, n) + 100`` is generous.
    """
    largest = np.abs(matrix).max(initial=0.0)
    if largest == 0.0:
        return bound >= 0.0
    norm = float(np.linalg.svd(matrix / largest, compute_uv=False)[0]) * largest
    return bool(norm * (1.0 + (4 * max(matrix.shape) + 100) * _UNIT) <= bound)


def lattice_norm_at_most(kernel: npt.NDArray[np.float64], bound: float) -> bool:
    """Whether a grid proves that the norm on the infinite lattice is at most ``bound``.

    Args:
        kernel: ``(groups, m, n, *taps)``.
        bound: what is claimed.
    """
    largest = float(np.abs(kernel).max(initial=0.0))
    if largest == 0.0:
        return bound >= 0.0
    kernel, bound = kernel / largest, bound / largest * (1.0 - 4.0 * _UNIT)
    taps = kernel.shape[3:]
    for fineness in itertools.count(3):
        sizes = [1 if count == 1 else 2**fineness * (count - 1) for count in taps]
        if math.prod(sizes) > _FINEST:
            return False
        factor = 1.0
        for count, size in zip(taps, sizes, strict=True):
            if count > 1:
                factor /= math.cos(math.pi * (count - 1) / (2.0 * size)) - 1e-15
        limit = bound / factor * (1.0 - 1e-13)
        if all(_all_below(group, sizes, limit) for group in kernel):
            return True
        if not all(_all_below(group, sizes, bound) for group in kernel):
            return False  # it is exceeded on the grid itself, or by less than rounding is
    raise AssertionError


def _all_below(kernel: npt.NDArray[np.float64], sizes: Sequence[int], limit: float) -> bool:
    """Whether the norms at all frequencies of a grid are proven to be below a limit."""
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.swapaxes(0, 1)
    rows, columns, *taps = kernel.shape
    flat = kernel.reshape(rows * columns, -1)
    # A computed symbol is off by gamma_k sum |K_t| in each entry; a phase by some thirty roundings.
    size = float(np.linalg.norm(np.abs(flat).sum(axis=1)))
    symbol_error = 2.0 * (flat.shape[1] + 64) * _UNIT * size
    shift = limit - symbol_error
    if not shift > 0:
        return False
    identity = np.eye(rows)
    for phases in _phases(taps, sizes, max(1, _CHUNK // (rows * columns))):
        symbols = (flat @ phases).T.reshape(-1, rows, columns)
        gram = symbols @ symbols.conj().swapaxes(1, 2)
        trace = float(np.abs(np.einsum("kii->ki", gram)).sum(axis=1).max())
        slack = 4.0 * (columns + rows + 8) * _UNIT * (trace + rows * shift**2)
        try:
            np.linalg.cholesky((shift**2 - slack) * identity - gram)
        except np.linalg.LinAlgError:
            return False
    return True


def _phases(taps: Sequence[int], sizes: Sequence[int], chunk: int) -> Iterator[Complex]:
    """``exp(-2 pi i f.t)``, ``(taps, frequencies)``, for one of each two conjugate frequencies."""
    grids = np.meshgrid(*(np.arange(count) for count in taps), indexing="ij")
    places = np.stack(grids, axis=-1).reshape(-1, len(taps))
    counts = [size // 2 + 1 if axis == 0 else size for axis, size in enumerate(sizes)]
    total = math.prod(counts)
    for start in range(0, total, chunk):
        index = np.unravel_index(np.arange(start, min(total, start + chunk)), counts)
        turns = np.zeros((len(places), len(index[0])))
        for axis, size in enumerate(sizes):
            turns += (places[:, axis, None] * index[axis][None] % size) / size
        yield np.exp(-2j * math.pi * turns)


def norm_at_most(operator: Weighted, bound: float) -> bool:
    """Whether a bound of an operator's norm is proven by the means of this module.

    A bound that a finite input makes smaller than that on the lattice is not.
    """
    error = operator.norm_error().item()
    if isinstance(operator, Matrix):
        matrix = operator.effective_weight().detach().cpu().double().numpy()
        return matrix_norm_at_most(matrix, (bound - error) * (1.0 - 4.0 * _UNIT))
    assert isinstance(operator, Convolution)
    gain = operator.gain() * (1.0 + 4.0 * _UNIT)
    kernel = operator.exact_kernel().detach().cpu().double().numpy()
    return lattice_norm_at_most(kernel, (bound / gain - error) * (1.0 - 8.0 * _UNIT))
