r"""Proving the bounds of a certificate again, by other means than those that found them.

Norms were proven by branch and bound over frequencies and by certified eigenvalues. Here a matrix
is given to LAPACK's SVD, with its error, and a convolution to a grid of frequencies:

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from certify.bounding import Norms
from certify.certified_model import CertifiedModel, exact_copy
from certify.data import ImageData, pixels
from certify.operators import Convolution, Matrix, Weighted
from certify.records import RecordError, hash_of_images, hash_of_model

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


class Verifier:
    """Gives an operator the bound that a certificate claims, once that is proven again.

    Args:
        layers: the certificate's.
        on_layer: called with the number of layers done.
    """

    def __init__(
        self, layers: Sequence[dict[str, Any]], on_layer: Callable[[int], None] | None = None
    ) -> None:
        self._layers = list(layers)
        self._place = 0
        self._on_layer = on_layer

    def __call__(
        self, operators: Sequence[Weighted], method: str, *, any_size: bool = False
    ) -> Norms:
        """See `certify.norms.Prove`."""
        found: dict[Weighted, torch.Tensor] = {}
        for operator in operators:
            if self._place >= len(self._layers):
                raise RecordError("the certificate has fewer bounds than the network needs")
            entry = self._layers[self._place]
            self._place += 1
            label = f"bound {self._place} ({entry.get('kind')} {entry.get('shape')})"
            kind = type(operator).__name__.lower()
            if (entry.get("kind"), entry.get("shape")) != (kind, list(operator.weight.shape)):
                raise RecordError(f"{label} is not of the network's {kind} {operator.weight.shape}")
            bound = _number(entry, "bound")
            if not norm_at_most(operator, bound):
                raise RecordError(f"{label} is not proven: {bound!r}")
            if isinstance(operator, Convolution) and "reached" in entry:
                _check_witness(operator, entry, bound, label)
            like = operator.norm_error()
            found[operator] = torch.full_like(like, bound)
            if self._on_layer is not None:
                self._on_layer(self._place)
        return found.__getitem__

    def check_all_used(self) -> None:
        """Refuse a certificate with more bounds than the network has."""
        if self._place != len(self._layers):
            raise RecordError("the certificate has more bounds than the network needs")


def _check_witness(operator: Convolution, entry: dict[str, Any], bound: float, label: str) -> None:
    """The gain at the frequency that is named, by an SVD."""
    kernel = operator.exact_kernel().detach().cpu().double().numpy()
    group, frequency = entry.get("group"), entry.get("frequency")
    taps = kernel.shape[3:]
    if not isinstance(group, int) or not 0 <= group < len(kernel):
        raise RecordError(f"{label} names the group {group!r}")
    if not isinstance(frequency, list) or len(frequency) != len(taps):
        raise RecordError(f"{label} names the frequency {frequency!r}")
    phase: Any = np.ones(())
    for axis, (count, angle) in enumerate(zip(taps, frequency, strict=True)):
        shape = [1] * len(taps)
        shape[axis] = count
        phase = phase * np.exp(-1j * float(angle) * np.arange(count)).reshape(shape)
    symbol = (kernel[group] * phase).reshape(*kernel.shape[1:3], -1).sum(axis=2)
    reached = float(np.linalg.svd(symbol, compute_uv=False)[0]) * operator.gain()
    claimed = _number(entry, "reached")
    if not (1.0 - 1e-4) * reached <= claimed <= min(reached * (1.0 + 1e-9), bound):
        raise RecordError(f"{label} is said to be reached up to {claimed!r}, found {reached!r}")


def _number(entry: dict[str, Any], name: str) -> float:
    value = entry.get(name)
    if not isinstance(value, float) or not 0.0 <= value < math.inf:
        raise RecordError(f"expected a number as {name}, got {value!r}")
    return value


def verify(
    record: dict[str, Any],
    model: torch.nn.Module,
    data: ImageData,
    *,
    on_layer: Callable[[int], None] | None = None,
) -> int:
    """Prove a certificate again.

    Args:
        record: as `certify.records.read_record` returns it.
        model: the network.
        data: what it was certified on.
        on_layer: called with the number of bounds that are proven.

    Returns:
        The number of radii.

    Raises:
        RecordError: anything does not fit, or could not be proven.
    """
    try:
        prover = Verifier(record["layers"], on_layer)
        indices = torch.tensor(record["images"]["indices"], dtype=torch.int64)
        claimed = torch.tensor(record["radii"], dtype=torch.float64)
        predictions = torch.tensor(record["predictions"], dtype=torch.int64)
        margins = torch.tensor(record["margin_lipschitz"], dtype=torch.float64)
        lipschitz = float(record["lipschitz"])
        hashes = record["images"]["sha256"], record["model"]["sha256"]
        shape = tuple(record["input_shape"])
        settings = {name: record[name] for name in ("method", "tighten", "domain", "precision")}
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the certificate is not complete: {error}") from error
    if not len(indices) == len(claimed) == len(predictions):
        raise RecordError("the certificate has not as many radii and predictions as images")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(data):
        raise RecordError(f"the certificate names images that {len(data)} images do not have")
    images, labels = data.images[indices], data.labels[indices]
    if hashes[0] != hash_of_images(images, labels):
        raise RecordError("the images are not those of the certificate")
    if hashes[1] != hash_of_model(exact_copy(model, shape)):
        raise RecordError("the model is not that of the certificate")
    certified = CertifiedModel(model, shape, prove=prover, **settings)
    prover.check_all_used()
    own = certified.margin_lipschitz().cpu()
    if not math.isclose(lipschitz, certified.lipschitz().item(), rel_tol=1e-12):
        raise RecordError("the Lipschitz bound does not follow from the layers'")
    if own.shape != margins.shape or not torch.allclose(own, margins, rtol=1e-12, atol=0.0):
        raise RecordError("the Lipschitz bounds of the margins do not follow from the layers'")
    for part in torch.arange(len(images)).split(500):
        found = certified.certify(pixels(images[part]))
        if not torch.equal(found.prediction.cpu(), predictions[part]):
            raise RecordError("the network predicts other classes than the certificate says")
        # What another machine may compute in float64.
        radius = found.radius.cpu()
        high, low = radius * (1.0 + 1e-12), radius * (1.0 - 1e-9)
        if not bool(((low <= claimed[part]) & (claimed[part] <= high)).all()):
            raise RecordError("the radii do not follow from the bounds")
    return len(indices)
