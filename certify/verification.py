"""Proving the bounds of a certificate again, by other means than those that found them.

Norms were proven by branch and bound over frequencies and by certified eigenvalues; here they are
by `certify.grid_proofs`. What follows from them, the constants of margins and the radii, is derived
anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from certify.bounding import Norms
from certify.certified_model import CertifiedModel, exact_copy
from certify.data import ImageData, pixels
from certify.grid_proofs import norm_at_most
from certify.operators import Convolution, Weighted
from certify.records import RecordError, hash_of_images, hash_of_model


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
