"""Certificates on file: accepted as they were written, refused after any change."""

from __future__ import annotations

import copy
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from certify import CertifiedModel
from certify.bounding import Norms
from certify.data import ImageData
from certify.evaluation import evaluate
from certify.graph import LipschitzGraph
from certify.grid_proofs import _below, _first, lattice_norm_at_most, norm_at_most
from certify.operators import Convolution, Matrix, Weighted
from certify.records import (
    Recorder,
    RecordError,
    check_recordable,
    digest_of,
    read_record,
    record_of,
    write_record,
)
from certify.verification import verify
from ff_bounds import supremum_bracket

SHAPE = (2, 6, 6)
DATA = {"dataset": "none", "held_out": None}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).eval()


def images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (12, *SHAPE), generator=generator).to(torch.uint8)
    return ImageData(values, torch.arange(12) % 3, ("a", "b", "c"))


def recorded(
    path: Path, method: str = "supremum", tighten: str = "join", precision: str | None = "float32"
) -> Path:
    recorder, data = Recorder(), images()
    certified = CertifiedModel(
        network(), SHAPE, method=method, tighten=tighten, precision=precision, prove=recorder
    )
    report = evaluate(certified, data, (0.1,))
    write_record(path, record_of(certified, recorder, report, data, DATA, "a net"))
    return path


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read_record(recorded(tmp_path_factory.mktemp("record") / "cert.json"))


@pytest.mark.parametrize("precision", [None, "float64", "float32"])
@pytest.mark.parametrize("tighten", ["none", "merge", "join"])
@pytest.mark.parametrize("method", ["fantastic_four", "supremum", "gram_iteration"])
def test_what_was_written_is_proven_again(
    tmp_path: Path, method: str, tighten: str, precision: str | None
) -> None:
    found = read_record(recorded(tmp_path / "cert.json", method, tighten, precision))
    assert verify(found, network(), images()) == 12
    assert any(radius > 0 for radius in found["radii"])


def test_any_digit_that_is_changed_is_found(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "cert.json"
    text = json.dumps(record, indent=1)
    path.write_text(text + "\n")
    assert read_record(path) == record
    places = [i for i, letter in enumerate(text) if letter.isdigit()]
    choice = random.Random(0)
    for place in choice.sample(places, 150):
        digit = choice.choice([d for d in "0123456789" if d != text[place]])
        path.write_text(text[:place] + digit + text[place + 1 :] + "\n")
        with pytest.raises(RecordError):
            read_record(path)


EXACT = [1.0] * 12


def edits(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Changes of what is claimed, each in a copy."""
    found = []

    def edit(name: str, *path: Any, value: Any) -> None:
        changed = copy.deepcopy(record)
        place = changed
        for key in path[:-1]:
            place = place[key]
        before = place.get(path[-1]) if isinstance(place, dict) else place[path[-1]]
        place[path[-1]] = value(before) if callable(value) else value
        assert place[path[-1]] != before
        found.append((name, changed))

    for index, layer in enumerate(record["layers"]):
        for factor in (0.5, 0.9, 0.998):
            name = f"bound {index} times {factor}"
            edit(name, "layers", index, "bound", value=lambda b, f=factor: b * f)
        edit(f"bound {index} infinite", "layers", index, "bound", value=math.inf)
        edit(f"bound {index} no number", "layers", index, "bound", value="1")
        edit(f"kind {index}", "layers", index, "kind", value="scale")
        edit(f"shape {index}", "layers", index, "shape", value=[1, 1])
        if "reached" in layer:
            edit(f"reached {index}", "layers", index, "reached", value=lambda b: b * 1.01)
            edit(f"group {index}", "layers", index, "group", value=7)
            edit(f"axes {index}", "layers", index, "frequency", value=[0.0])
    for row in range(3):
        for column in range(3):
            if row != column:
                path = ("margin_lipschitz", row, column)
                edit(f"margin {row} {column}", *path, value=lambda b: b * 0.999)
    for index in range(12):
        edit(f"radius {index}", "radii", index, value=lambda r: r * (1 + 2e-6) + 2e-9)
        edit(f"prediction {index}", "predictions", index, value=lambda p: (p + 1) % 3)
        edit(f"index {index}", "images", "indices", index, value=lambda i: (i + 1) % 12)
    edit("index beyond", "images", "indices", 0, value=99)
    edit("fewer radii", "radii", value=lambda radii: radii[:-1])
    edit("fewer layers", "layers", value=lambda layers: layers[:-1])
    edit("more layers", "layers", value=lambda layers: [*layers, layers[-1]])
    edit("no layers", "layers", value=None)
    edit("another model", "model", "sha256", value="0" * 64)
    edit("other images", "images", "sha256", value="0" * 64)
    edit("the constant", "lipschitz", value=lambda b: b * 0.999)
    edit("finer arithmetic", "precision", value="float64")
    edit("coarser arithmetic", "precision", value="bfloat16")
    edit("more tightening", "tighten", value="none")
    edit("another method", "method", value="tensor_norm")
    edit("an exact radius", "radii", value=EXACT)
    for place in ("layers", "radii", "predictions", "method", "precision", "domain", "lipschitz"):
        for value in ({}, [], "x", [[1]], True, 10**400, [None], 1e300):
            edit(f"{place} {value}"[:40], place, value=value)
    for place in ("indices", "sha256"):
        for value in ([], [0.5] * 12, [True] * 12, [3] * 12, list(range(-1, 11)), None):
            edit(f"{place} {value}", "images", place, value=value)
    for key, value in (("bound", 1e155), ("bound", 10**400), ("frequency", [[1], 0])):
        edit(f"{key} {value}"[:40], "layers", 0, key, value=value)
    for angle in (math.nan, math.inf, 1e308, 7.5):
        edit(f"angle {angle}", "layers", 0, "frequency", 0, value=angle)
    for held_out in ("5", 5.0, True, [5], 0, -1):
        edit(f"held out {held_out}", "data", "held_out", value=held_out)
    for place, key in (("model", "described"), ("data", "dataset"), ("versions", "torch")):
        for value in (1, None, ["x"], "\x1b[2K"):
            edit(f"{key} {value!r}", place, key, value=value)
    edit("a note", "versions", "note", value="certified everywhere")
    edit("a note on the data", "data", "note", value="certified everywhere")
    edit("something else", "certified", value=1.0)
    return found


def test_what_is_claimed_otherwise_is_refused_even_with_a_hash_that_fits(
    record: dict[str, Any],
) -> None:
    changed = edits(record)
    assert len(changed) >= 150
    for name, claim in changed:
        claim["sha256"] = digest_of(claim)
        try:
            verify(claim, network(), images())
        except RecordError:
            continue
        pytest.fail(f"accepted: {name}")


@pytest.mark.parametrize("kind", [Matrix, Convolution])
def test_bounds_that_are_too_small_with_all_that_follows_from_them(
    tmp_path: Path, kind: type[Weighted]
) -> None:
    class Liar(Recorder):
        def __call__(self, operators: Any, method: str, *, any_size: bool = False) -> Norms:
            before = len(self.layers)
            norms = super().__call__(operators, method, any_size=any_size)
            found = {o: norms(o) * (0.99 if isinstance(o, kind) else 1.0) for o in operators}
            for entry, operator in zip(self.layers[before:], operators, strict=True):
                entry["bound"] = found[operator].item()
            return found.__getitem__

    recorder, data = Liar(), images()
    certified = CertifiedModel(network(), SHAPE, method="supremum", tighten="none", prove=recorder)
    report = evaluate(certified, data, (0.1,))
    path = tmp_path / "cert.json"
    write_record(path, record_of(certified, recorder, report, data, DATA, "a net"))
    with pytest.raises(RecordError, match="is not proven"):
        verify(read_record(path), network(), data)


def test_other_weights_or_images_are_refused(record: dict[str, Any]) -> None:
    model = network()
    with torch.no_grad():
        model[0].bias[0] += 1e-3  # type: ignore[index, operator]
    with pytest.raises(RecordError, match="the model is not that of the certificate"):
        verify(record, model, images())
    data = images()
    data.images[0, 0, 0, 0] ^= 1
    with pytest.raises(RecordError, match="the images are not those of the certificate"):
        verify(record, network(), data)


@pytest.mark.parametrize("depth", [80, 900, 990, 1000, 10_000])
def test_certificates_that_are_nested(depth: int, tmp_path: Path, record: dict[str, Any]) -> None:
    """One level less than what json refuses is enough for what follows it."""
    path = tmp_path / "cert.json"
    text = json.dumps({**record, "versions": "here"}, indent=1)
    path.write_text(text.replace('"here"', "[" * depth + "]" * depth))
    with pytest.raises(RecordError):
        read_record(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "certify certificate 1"}'])
def test_files_that_are_no_certificates(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cert.json"
    path.write_text(text)
    with pytest.raises(RecordError):
        read_record(path)
    with pytest.raises(RecordError, match="cannot read"):
        read_record(tmp_path / "none.json")


def test_what_cannot_be_proven_again_is_not_recorded() -> None:
    check_recordable("supremum", "join", "lipschitz")
    for settings in (
        ("best", "join", "lipschitz"),
        ("supremum", "balance", "lipschitz"),
        ("supremum", "join", "dual"),
    ):
        with pytest.raises(ValueError, match="a certificate that can be checked needs"):
            check_recordable(*settings)


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 4, 3), (2, 2, 2, 3, 3), (1, 2, 3, 2, 2, 3), (1, 5, 4, 1), (1, 3, 2), (3, 1, 1, 9, 9)],
)
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_norms_on_a_grid(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    kernel = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    bracket = supremum_bracket(kernel if kernel.ndim > 3 else kernel[..., None], tol=1e-5)
    upper, lower = bracket.upper.item(), bracket.lower.item()
    assert lattice_norm_at_most(kernel, upper * (1 + 1e-6))
    assert not lattice_norm_at_most(kernel, lower * (1 - 1e-9))
    assert not lattice_norm_at_most(kernel, 0.0)
    assert not lattice_norm_at_most(kernel, math.inf)
    assert not lattice_norm_at_most(kernel, math.nan)
    assert not lattice_norm_at_most(kernel * math.inf, 2.0**200)
    assert lattice_norm_at_most(torch.zeros(shape), 0.0)


@pytest.mark.parametrize("taps", [2, 3, 4, 7])
def test_peaks_between_the_frequencies_of_a_grid_are_not_missed(taps: int) -> None:
    """A rotation whose trace peaks in the middle of a first cell, or anywhere else."""
    for turn in torch.linspace(0, 1, 23, dtype=torch.float64).tolist():
        angle = turn * math.pi / (8 * (taps - 1))
        places = torch.arange(taps, dtype=torch.float64) * angle
        blocks = [torch.cos(places), -torch.sin(places), torch.sin(places), torch.cos(places)]
        kernel = torch.stack(blocks).reshape(1, 2, 2, taps)
        assert not lattice_norm_at_most(kernel, taps * (1 - 1e-9))
        assert lattice_norm_at_most(kernel, taps * (1 + 1e-9))


def test_rounded_angles_of_long_kernels_are_paid_for() -> None:
    """At places where the angle is rounded most, in the direction that lowers the norm."""
    taps = 700
    centres, _ = _first((1, taps))
    for centre in centres[-40:]:
        angles = torch.arange(taps, dtype=torch.float64) * centre[1]
        exact = [Fraction(centre[1].item()) * place for place in range(taps)]
        off = [float(Fraction(a) - e) for a, e in zip(angles.tolist(), exact, strict=True)]
        slopes = torch.sin(angles) * torch.tensor(off, dtype=torch.float64)
        up, down = int(slopes.argmax()), int(slopes.argmin())
        kernel = torch.zeros(1, 1, 1, taps, dtype=torch.float64)
        kernel[..., up] = 1.0
        kernel[..., down] = -torch.sin(angles[up]) / torch.sin(angles[down])
        flat = kernel.flatten().tolist()
        kernel[..., 0] += 0.05 - sum(k * math.cos(a) for k, a in zip(flat, angles, strict=True))
        size = kernel.abs().sum().item()
        # By cosines alone the norm is 0.05; what is computed of it may be less than it really is.
        real = sum(
            k * (math.cos(a) + math.sin(a) * o)
            for k, a, o in zip(kernel.flatten().tolist(), angles.tolist(), off, strict=True)
        )
        assert not _below(kernel, centre[None], abs(real) - 1e-14 * size)[0]


def test_operators_with_padding_by_copies() -> None:
    """An edge that is read twice adds to the norm."""
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="replicate").double()
    graph = LipschitzGraph(conv, (1, 5))
    (operator,) = [s.step.operator for s in [graph.walk()] if hasattr(s.step, "operator")]
    bound = operator.bound("supremum").item()
    assert norm_at_most(operator, bound)
    assert not norm_at_most(operator, 0.7 * bound)
