"""Attacks: what they must find, what they must not count, and the command."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import models
from certify import CertifiedModel
from certify.attack import Adversary, Effort
from certify.attack_report import attack_data
from certify.attacked import BrokenCertificate, attack_all
from certify.cli import main
from certify.data import ImageData

F64 = torch.float64


def _linear() -> tuple[Adversary, torch.Tensor, torch.Tensor]:
    """A linear network, inputs and their distances to the nearest other class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4, dtype=F64))
    x = torch.randn(30, 1, 3, 3, dtype=F64)
    logits = model(x).detach()
    own = logits.argmax(dim=1)
    normals = model[1].weight[own][:, None] - model[1].weight
    distance = (logits.gather(1, own[:, None]) - logits) / normals.norm(dim=2)
    distance.scatter_(1, own[:, None], torch.inf)
    return Adversary(model.requires_grad_(False), (1, 3, 3)), x, distance.amin(dim=1).detach()


def _another(adversary: Adversary, x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    classes = adversary.target.values(x).argmax(dim=1, keepdim=True)
    logits = adversary.target.values(points)
    others = logits.scatter(1, classes, -torch.inf).amax(dim=1)
    return others >= logits.gather(1, classes)[:, 0]


@pytest.mark.parametrize(("name", "part"), [("deepfool", 1.0), ("ddn", 0.8)])
def test_the_nearest_points_of_a_linear_network_are_found(name: str, part: float) -> None:
    """DDN knows one class, that of the smallest margin, which need not be the nearest."""
    adversary, x, expected = _linear()
    found = adversary.nearest_by(x)[name]
    assert bool((found.distance >= expected * (1 - 1e-12)).all())
    assert (found.distance <= 1.01 * expected).double().mean() >= part
    assert bool((found.distance <= 1.2 * expected).all())
    assert bool(_another(adversary, x, found.points).all())
    measured = (found.points - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(measured, found.distance, rtol=1e-12, atol=0.0)


def test_projected_gradient_descent_stays_within_the_radius() -> None:
    adversary, x, expected = _linear()
    assert bool(torch.isinf(adversary.within(x, 0.999 * expected).distance).all())
    found = adversary.within(x, 1.001 * expected)
    assert bool((found.distance <= 1.001 * expected).all())
    assert bool(_another(adversary, x, found.points).all())


def test_restarts_find_what_one_start_misses() -> None:
    """A network that is flat around the input: only random starts see a slope."""

    class Pits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pit = torch.relu(1.0 - 4.0 * (x - x.new_tensor([0.9, 0.0])).square().sum(dim=1))
            return torch.stack([torch.full_like(pit, 0.5), pit], dim=1)

    adversary = Adversary(Pits(), (2,))
    x = torch.zeros(1, 2, dtype=F64)
    radius = torch.ones(1, dtype=F64)
    none = adversary.with_effort(Effort(restarts=0)).within(x, radius)
    many = adversary.with_effort(Effort(restarts=100)).within(x, radius)
    assert torch.isinf(none.distance).all()
    assert torch.isfinite(many.distance).all()


def test_attacks_stay_within_the_domain() -> None:
    """The nearest point of the other class is outside; what is found costs more."""
    model = nn.Sequential(nn.Linear(2, 2, dtype=F64)).requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[0.0, 0.0], [2.0, 1.0]]))
    model[0].bias.copy_(torch.tensor([0.0, -2.2]))
    x = torch.tensor([[0.9, 0.1]], dtype=F64)
    free = Adversary(model, (2,)).nearest(x)
    found = Adversary(model, (2,), domain=(0, 1)).nearest(x)
    assert free.points.max() > 1.0
    assert free.distance[0] == pytest.approx(0.3 / 5**0.5, rel=0.01)
    assert 0.0 <= found.points.min() <= found.points.max() <= 1.0
    assert found.distance[0] == pytest.approx(0.02**0.5, rel=0.05)  # the nearest is (1, 0.2)
    within = Adversary(model, (2,), domain=(0, 1)).within(x, torch.full((1,), 0.2, dtype=F64))
    assert within.points.max() <= 1.0


def test_a_broken_radius_comes_with_its_point() -> None:
    adversary, x, _ = _linear()
    images = (x * 0).to(torch.uint8)
    origin = adversary.nearest(x * 0).distance[0].item()
    with pytest.raises(BrokenCertificate, match="image 0 is predicted") as caught:
        attack_all(adversary, images, (), 8, radius=torch.full((30,), 1.01 * origin, dtype=F64))
    content = caught.value.content
    moved = (content["point"] - content["image"]).norm().item()
    assert moved <= 1.01 * origin
    honest = torch.full((30,), 0.99 * origin, dtype=F64)
    report = attack_all(adversary, images, (0.0, 2.0 * origin), 8, radius=honest)
    assert report.withstood[0.0].all()
    assert not report.withstood[2.0 * origin].any()
    assert sum(report.won.values()) == 30


def test_what_only_rounding_shows_breaks_no_radius() -> None:
    """Logits with a large common part: the boundary is at the bias, and not seen well."""
    for exponent in (28, 32):
        model = nn.Linear(1, 2, dtype=F64)
        with torch.no_grad():
            common = 2.0**exponent
            model.weight.copy_(torch.tensor([[common + 1], [common - 1]], dtype=F64))
            model.bias.copy_(torch.tensor([1e-3, -1e-3], dtype=F64))
        certified = CertifiedModel(model, (1,))
        images, x = torch.zeros(8, 1, dtype=torch.uint8), torch.zeros(8, 1, dtype=F64)
        report = attack_all(
            certified.adversary.with_effort(Effort(restarts=4)),
            images,
            (),
            8,
            radius=certified.certify(x).radius,
            confirm=certified.surely_differs,
        )
        assert bool((report.distance >= certified.certify(x).radius).all())
        assert certified.surely_differs(x - 1.0, torch.zeros(8, dtype=torch.long)).all()
        assert not certified.surely_differs(x, torch.zeros(8, dtype=torch.long)).any()


def test_foolbox_agrees() -> None:
    pytest.importorskip("foolbox")
    torch.manual_seed(0)
    model = models.build("mlp", hidden=(16,), input_shape=(1, 3, 3), num_classes=4)
    certified = CertifiedModel(model, (1, 3, 3))
    x = torch.rand(6, 1, 3, 3, dtype=F64)
    found = certified.adversary.with_effort(Effort(foolbox=True)).nearest_by(x)
    assert list(found) == ["deepfool", "ddn", "foolbox-fmn", "foolbox-cw"]
    radius = certified.certify(x).radius
    own = found["deepfool"].distance
    for name in ("foolbox-fmn", "foolbox-cw"):
        seen = torch.isfinite(found[name].distance)
        assert bool((found[name].distance >= radius).all())
        assert bool(_another(certified.adversary, x[seen], found[name].points[seen]).all())
        assert bool((own[seen] <= 1.05 * found[name].distance[seen]).all())


def test_the_command_attacks_what_cannot_be_certified(run_folder: Path, tmp_path: Path) -> None:
    model = ("--model", str(run_folder / "ckpt.pt"), "--dataset", "mnist-5k", "--limit", "20")
    files = ("--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json"))
    result = CliRunner().invoke(main, ["attack", *model, "--eps", "0.5", "--eps", "0", *files])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "a.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert summary["n"] == len(rows) == 20
    assert summary["attacked_accuracy"]["0.0"] == summary["clean_accuracy"]
    kept = [row["correct"] == "1" and float(row["attacked"]) > 0.5 for row in rows]
    assert summary["attacked_accuracy"]["0.5"] == sum(kept) / 20
    assert "withstood at 0.5" in result.output
    assert CliRunner().invoke(main, ["attack", *model, "--domain", "1,0"]).exit_code == 2


def test_a_network_for_other_images_is_one_line() -> None:
    class Fussy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == 224, "Wrong image height!"
            return x.flatten(1)

    data = ImageData(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(ValueError, match=r"of shape \(1, 2, 2\): Wrong image height!"):
        attack_data(Fussy(), (1, 2, 2), data)
