"""Proving the bounds of a certificate again, by other means than those that found them.

Norms were proven by branch and bound over frequencies and by certified eigenvalues; here they are
by `certify.grid_proofs`, which shares no code with that. What both have in common: from a layer to
its kernel, what padding adds, and the arithmetic that rounds upwards. What follows from the norms,
the constants of margins and the radii, is derived anew by the rules of this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certify.bounding import Norms
from certify.certified_model import CertifiedModel
from certify.data import ImageData, pixels
from certify.grid_proofs import norm_at_most, symbol_norm
from certify.hashes import hash_of_images, hash_of_model
from certify.operators import Convolution, Weighted
from certify.precision import PRECISIONS
from certify.records import RecordError, check_recordable
from certify.snapshot import exact_copy

_KEYS = {
    "format", "sha256", "model", "input_shape", "data", "images", "method", "tighten", "domain",
    "precision", "layers", "lipschitz", "margin_lipschitz", "predictions", "radii", "versions",
}  # fmt: skip
_LAYER = {"kind", "shape", "method", "bound"}
_WITNESS = {"group", "frequency", "reached"}


@dataclass(frozen=True)
class _Claims:
    """What a certificate claims, with everything of the type that it must have."""

    model: str
    input_shape: tuple[int, ...]
    images: str
    indices: Tensor
    method: str
    tighten: str
    domain: tuple[float, ...] | None
    precision: str | None
    layers: list[dict[str, Any]]
    lipschitz: float
    margins: Tensor
    predictions: Tensor
    radii: Tensor


def _claims(record: dict[str, Any]) -> _Claims:
    """Check the form of a certificate.

    Raises:
        RecordError: anything that is not as `certify.records.record_of` writes it.
    """
    _expect(set(record) == _KEYS, "its entries")
    for name, keys in (
        ("model", {"sha256", "described"}),
        ("images", {"indices", "sha256"}),
        ("data", {"dataset", "held_out"}),
        ("versions", {"python", "torch"}),
    ):
        _expect(isinstance(record[name], dict) and set(record[name]) == keys, name)
    held_out = record["data"]["held_out"]
    _expect(held_out is None or (type(held_out) is int and held_out > 0), "data")
    names = [record["model"]["described"], record["data"]["dataset"], *record["versions"].values()]
    _expect(all(isinstance(name, str) and name.isprintable() for name in names), "names")
    indices = _list(record["images"]["indices"], int, "indices")
    count, low = len(indices), -1
    for index in indices:
        _expect(low < index < 2**40, "indices, which have to ascend")
        low = index
    shape = _list(record["input_shape"], int, "input_shape")
    domain = record["domain"]
    if domain is not None:
        domain = tuple(_list(domain, float, "domain"))
        _expect(len(domain) == 2 and -math.inf < domain[0] < domain[1] < math.inf, "domain")
    texts = {name: record[name] for name in ("method", "tighten")}
    texts |= {name: record[name]["sha256"] for name in ("model", "images")}
    _expect(all(isinstance(text, str) for text in texts.values()), "texts")
    check_recordable(texts["method"], texts["tighten"], "lipschitz")
    precision = record["precision"]
    _expect(precision is None or precision in list(PRECISIONS), "precision")
    layers = _list(record["layers"], dict, "layers")
    for layer in layers:
        _expect(layer.get("kind") in ("matrix", "convolution"), "a layer's kind")
        keys = _LAYER | (_WITNESS if layer["kind"] == "convolution" else set())
        _expect(set(layer) == keys and layer["method"] == texts["method"], "layers")
        _list(layer["shape"], int, "a layer's shape")
        _number(layer["bound"], "a layer's bound")
        if layer["kind"] == "convolution":
            _number(layer["reached"], "a layer's gain")
            frequency = _list(layer["frequency"], float, "a layer's frequency")
            _expect(all(-7.0 <= angle <= 7.0 for angle in frequency), "a layer's frequency")
            _expect(type(layer["group"]) is int, "a layer's group")
    rows = _list(record["margin_lipschitz"], list, "margin_lipschitz")
    margins = [_list(row, float, "margin_lipschitz") for row in rows]
    _expect(all(len(row) == len(rows) for row in margins), "margin_lipschitz")
    radii = _list(record["radii"], float, "radii")
    predictions = _list(record["predictions"], int, "predictions")
    _expect(len(radii) == len(predictions) == count > 0, "a radius for each image")
    _expect(all(0.0 <= radius < math.inf for radius in radii), "radii")
    _expect(all(0 <= prediction < len(rows) for prediction in predictions), "predictions")
    return _Claims(
        texts["model"],
        tuple(shape),
        texts["images"],
        torch.tensor(indices, dtype=torch.int64),
        texts["method"],
        texts["tighten"],
        domain,
        precision,
        layers,
        _number(record["lipschitz"], "lipschitz"),
        torch.tensor(margins, dtype=torch.float64).reshape(len(rows), len(rows)),
        torch.tensor(predictions, dtype=torch.int64),
        torch.tensor(radii, dtype=torch.float64),
    )


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise RecordError(f"the certificate is not as one is written: {what}")


def _list(value: Any, kind: type, name: str) -> list[Any]:
    _expect(isinstance(value, list) and all(type(entry) is kind for entry in value), name)
    found: list[Any] = value
    return found


def _number(value: Any, name: str) -> float:
    _expect(type(value) is float and 0.0 <= value < math.inf, name)
    found: float = value
    return found


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
            label = f"bound {self._place} ({entry['kind']} {entry['shape']})"
            kind = type(operator).__name__.lower()
            if (entry["kind"], entry["shape"]) != (kind, list(operator.weight.shape)):
                raise RecordError(f"{label} is not of the network's {kind} {operator.weight.shape}")
            bound = entry["bound"]
            if isinstance(operator, Convolution):
                _check_witness(operator, entry, label)
            if not norm_at_most(operator, bound):
                raise RecordError(f"{label} is not proven: {bound!r}")
            like = operator.norm_error()
            found[operator] = torch.full_like(like, bound)
            if self._on_layer is not None:
                self._on_layer(self._place)
        return found.__getitem__

    def check_all_used(self) -> None:
        """Refuse a certificate with more bounds than the network has."""
        if self._place != len(self._layers):
            raise RecordError("the certificate has more bounds than the network needs")


def _check_witness(operator: Convolution, entry: dict[str, Any], label: str) -> None:
    """The gain at the frequency that is named."""
    kernel = operator.exact_kernel()
    group, frequency = entry["group"], entry["frequency"]
    if not 0 <= group < len(kernel) or len(frequency) != kernel.ndim - 3:
        raise RecordError(f"{label} names the group {group} and the frequency {frequency}")
    reached = symbol_norm(kernel[group], frequency) * operator.gain()
    if not math.isclose(entry["reached"], reached, rel_tol=1e-9):
        raise RecordError(f"{label} reaches {reached!r} there, not {entry['reached']!r}")
    if reached > entry["bound"] * (1.0 + 1e-9):  # it takes long to find no proof
        raise RecordError(f"{label} is not proven: {entry['bound']!r} is below {reached!r}")


def verify(
    record: dict[str, Any],
    model: nn.Module,
    data: ImageData,
    *,
    on_layer: Callable[[int], None] | None = None,
) -> int:
    """Prove a certificate again.

    What is not proven: the names in it (of data set, model, versions).

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
        claims = _claims(record)
        return _verify(claims, model, data, on_layer)
    except RecordError:
        raise
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise RecordError(f"the certificate cannot be checked: {error}") from error


def _verify(
    claims: _Claims,
    model: nn.Module,
    data: ImageData,
    on_layer: Callable[[int], None] | None,
) -> int:
    if claims.input_shape != tuple(data.input_shape):
        raise RecordError(f"the certificate is about inputs {claims.input_shape}")
    if int(claims.indices[-1]) >= len(data):
        raise RecordError(f"the certificate names images that {len(data)} images do not have")
    images = data.images[claims.indices]
    if claims.images != hash_of_images(images, data.labels[claims.indices]):
        raise RecordError("the images are not those of the certificate")
    if claims.model != hash_of_model(exact_copy(model, claims.input_shape)):
        raise RecordError(
            "the model is not that of the certificate (weights that are computed, by weight_norm "
            "say, can differ between machines)"
        )
    prover = Verifier(claims.layers, on_layer)
    certified = CertifiedModel(
        model,
        claims.input_shape,
        method=claims.method,
        tighten=claims.tighten,
        domain=claims.domain,
        precision=claims.precision,
        prove=prover,
    )
    certified.check_rounding()
    prover.check_all_used()
    constant, margins = certified.lipschitz().cpu(), certified.margin_lipschitz().cpu()
    if not _just_above(torch.tensor(claims.lipschitz, dtype=torch.float64), constant):
        raise RecordError("the Lipschitz bound does not follow from the layers'")
    if claims.margins.shape != margins.shape or not _just_above(claims.margins, margins):
        raise RecordError("the Lipschitz bounds of the margins do not follow from the layers'")
    for part in torch.arange(len(images)).split(500):
        found = certified.certify(pixels(images[part]))
        if not torch.equal(found.prediction.cpu(), claims.predictions[part]):
            raise RecordError("the network predicts other classes than the certificate says")
        radius, claimed = found.radius.cpu(), claims.radii[part]
        low = (radius.clamp_max(1e300) * (1.0 - 1e-5) - 1e-6).clamp_min(0.0)
        if not bool(((claimed <= radius) & (low <= claimed)).all()):
            raise RecordError("the radii do not follow from the bounds")
    return len(images)


def _just_above(claimed: Tensor, own: Tensor) -> bool:
    """Whether numbers are at least others, and hardly more."""
    return bool(((own <= claimed) & (claimed <= own * (1.0 + 1e-9))).all())
