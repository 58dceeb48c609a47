"""Certificates on file: what was proven, of what, and by what."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certify.bounding import Norms
from certify.certified_model import CertifiedModel
from certify.data import ImageData
from certify.files import write_text
from certify.grid_proofs import MOST, norm_at_most, symbol_norm
from certify.hashes import hash_of_images, hash_of_model
from certify.norms import proven_norms
from certify.operators import Convolution, Weighted
from certify.ranks import ALONE, Ranks
from certify.report import Report
from ff_bounds import supremum_bracket

FORMAT = "certify certificate 1"


class RecordError(ValueError):
    """The file is not a certificate, or not of what it is said to be of; the message says why."""


@dataclass
class Recorder:
    """Proves norms as `proven_norms` does, and keeps what was proven.

    Attributes:
        ranks: processes that share the operators; each keeps all.
        layers: an entry for each operator, in the order in which they were asked for.
    """

    ranks: Ranks = ALONE
    layers: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self, operators: Sequence[Weighted], method: str, *, any_size: bool = False
    ) -> Norms:
        """See `certify.norms.Prove`."""
        norms = proven_norms(operators, method, any_size=any_size, ranks=self.ranks)
        own = [_entry(o, norms(o), method) for o in self.ranks.share(operators)]
        entries = self.ranks.joined(own)
        self.layers += entries
        raised = [
            torch.full_like(norms(o), e["bound"]) for o, e in zip(operators, entries, strict=True)
        ]
        return dict(zip(operators, raised, strict=True)).__getitem__


_SPARE = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2)
"""What a bound is raised by, over what is reached, until `certify.grid_proofs` proves it."""


def _entry(operator: Weighted, bound: Tensor, method: str) -> dict[str, Any]:
    """A bound, raised until it can be proven again, with its witness: where how much is reached."""
    found: dict[str, Any] = {
        "kind": type(operator).__name__.lower(),
        "shape": list(operator.weight.shape),
        "method": method,
    }
    reached = bound.item()
    if isinstance(operator, Convolution):
        kernel = operator.exact_kernel()
        bracket = supremum_bracket(kernel)
        frequency = bracket.frequency.tolist()
        reached = symbol_norm(kernel[bracket.group], frequency) * operator.gain()
        found |= {"group": bracket.group, "frequency": frequency, "reached": reached}
    for spare in _SPARE:
        raised = max(bound.item(), reached * (1.0 + spare))
        if norm_at_most(operator, raised, MOST if spare == _SPARE[-1] else MOST // 4):
            return {**found, "bound": raised}
    raise RecordError(f"the bound of {found['kind']} {found['shape']} cannot be proven again")


_RECORDED = ("fantastic_four", "tensor_norm", "gram_iteration", "supremum")


def check_recordable(method: str, tighten: str, certificate: str) -> None:
    """Refuse what could not be proven again.

    Raises:
        ValueError: settings for which there is no such record; the message says which there are.
    """
    if method not in _RECORDED or tighten == "balance" or certificate != "lipschitz":
        raise ValueError(
            "a certificate that can be checked needs --certificate lipschitz, --tighten none, "
            f"merge or join, and --method {', '.join(_RECORDED)}"
        )


def record_of(
    certified: CertifiedModel,
    recorder: Recorder,
    report: Report,
    data: ImageData,
    where: Mapping[str, Any],
    described: str,
) -> dict[str, Any]:
    """The content of a certificate, for `write_record`.

    Args:
        certified: the network, whose norms ``recorder`` proved.
        recorder: what it was given as ``prove``.
        report: of its radii.
        data: what that is about: the first images of a data set.
        where: names of data set and split.
        described: the model, for people.
    """
    precision = certified.precision
    # What another machine may compute in float64 is off by less than this from what this one does.
    radii = (report.found.radius * (1.0 - 1e-6) - 1e-9).clamp_min(0.0)
    margins = certified.margin_lipschitz() * (1.0 + 1e-12)
    return {
        "model": {"sha256": hash_of_model(certified.model), "described": described},
        "input_shape": list(certified.input_shape),
        "data": dict(where),
        "images": {
            "indices": list(range(len(data))),
            "sha256": hash_of_images(data.images, data.labels),
        },
        "method": certified.method,
        "tighten": certified.tighten,
        "domain": None if certified.domain is None else list(certified.domain),
        "precision": None if precision is None else precision.name,
        "layers": recorder.layers,
        "lipschitz": report.lipschitz * (1.0 + 1e-12),
        "margin_lipschitz": margins.tolist(),
        "predictions": report.found.prediction.tolist(),
        "radii": radii.clamp_max(1e300).tolist(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What computed the certificate."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def write_record(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a certificate, with a SHA-256 of all that is in it."""
    whole = {"format": FORMAT, **content}
    whole["sha256"] = digest_of(whole)
    write_text(path, _text(whole))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a certificate.

    Raises:
        RecordError: no such file, another kind of file, or one that was changed since.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise RecordError(f"{path} is not a certificate of this project")
        # Digits of a number that make no difference to its value are looked at as well.
        same = content.get("sha256") == digest_of(content) and text == _text(content)
    except RecordError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"cannot read the certificate {path}: {error}") from error
    if not same:
        raise RecordError(f"{path} was changed after it was written: its SHA-256 does not fit")
    return content


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a certificate's content, its own left out."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
