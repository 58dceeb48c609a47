from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import models
from certify import Certificate, CertifiedModel, Report, evaluate, load_model
from certify.attack import Effort
from certify.data import ImageData, load_data, pixels
from certify.plots import plot_certified_accuracy
from certify.report import epsilon_name


def example() -> Report:
    """Two right predictions of three; one radius unbounded."""
    found = Certificate(
        torch.tensor([0, 1, 1]), torch.tensor([0.25, math.inf, 3.0], dtype=torch.float64)
    )
    return Report(torch.tensor([0, 1, 0]), found, (0.0, 0.25, 0.1), 2.0, "lipschitz", 0.5)


def test_accuracies_count_right_and_certified_images() -> None:
    report = example()
    assert report.clean_accuracy == pytest.approx(2 / 3)
    # The ball is open: a radius of 0.25 does not certify a budget of 0.25.
    assert report.certified_accuracy == pytest.approx({0.0: 2 / 3, 0.25: 1 / 3, 0.1: 2 / 3})
    assert report.median_radius == 0.25  # a wrong prediction counts as zero


def test_json_is_standard_and_complete() -> None:
    summary = json.loads(example().to_json(), parse_constant=pytest.fail)
    assert list(summary) == [
        "n",
        "clean_accuracy",
        "certified_accuracy",
        "median_radius",
        "lipschitz",
        "certificate",
        "precision",
        "seconds",
        "curve",
    ]
    assert summary["certified_accuracy"]["0.25"] == pytest.approx(1 / 3)


def test_gains_are_about_right_predictions_with_a_radius() -> None:
    globally = torch.tensor([0.2, math.inf, 1.0], dtype=torch.float64)
    report = dataclasses.replace(example(), certificate="local", radii={"lipschitz": globally})
    summary = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert summary["certificate"] == "local"
    assert (summary["gained"], summary["median_gain"]) == (1, pytest.approx(0.25))
    assert "median gain" in report.to_table()
    assert "25.00 %" in report.to_table()
    assert "gain" not in example().to_table()
    nothing = dataclasses.replace(report, radii={"lipschitz": torch.zeros(3, dtype=torch.float64)})
    assert json.loads(nothing.to_json())["median_gain"] == 0.0


def test_csv_has_a_row_per_image_at_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(example().to_csv())))
    assert [row["radius"] for row in rows] == ["0.25", "inf", "3.0"]
    assert [row["correct"] for row in rows] == ["1", "1", "0"]
    assert list(rows[0]) == ["idx", "label", "predict", "radius", "correct"]


def test_epsilons_are_named_as_people_write_them() -> None:
    names = [epsilon_name(e) for e in (0.5, 1.58, 36 / 255, 72 / 255, 1.0, 1 / 7)]
    assert names == ["0.5", "1.58", "36/255", "72/255", "1", "0.142857"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot(tmp_path: Path, ending: str) -> None:
    plot_certified_accuracy(example(), tmp_path / f"curve.{ending}")
    assert (tmp_path / f"curve.{ending}").stat().st_size > 1000


def test_plot_of_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        plot_certified_accuracy(example(), tmp_path / "curve.xyz")
    assert list(tmp_path.iterdir()) == []


def test_evaluate_equals_certifying_one_by_one(run_folder: Path) -> None:
    certified = CertifiedModel(load_model(run_folder / "ckpt.pt"), (1, 28, 28))
    data = load_data("mnist-5k", train=False).head(30)
    report = evaluate(certified, data, [0.1], batch_size=7)
    for index in range(30):
        single = certified.certify(pixels(data.images[index : index + 1]))
        assert single.prediction.item() == report.found.prediction[index]
        assert single.radius.item() == pytest.approx(report.found.radius[index].item(), rel=1e-9)


def test_evaluate_refuses_what_does_not_fit() -> None:
    model = models.build("mlp", hidden=(4,), input_shape=(1, 4, 4), num_classes=2)
    certified = CertifiedModel(model, (1, 4, 4))

    def data(*shape: int, label: int = 0) -> ImageData:
        labels = torch.full((shape[0],), label)
        return ImageData(torch.zeros(shape, dtype=torch.uint8), labels, ("a", "b"))

    with pytest.raises(ValueError, match="the data has"):
        evaluate(certified, data(2, 1, 5, 5))
    with pytest.raises(ValueError, match="the model has 2 classes"):
        evaluate(certified, data(2, 1, 4, 4, label=2))
    with pytest.raises(ValueError, match="no images"):
        evaluate(certified, data(0, 1, 4, 4))
    with pytest.raises(ValueError, match="expected eps >= 0"):
        evaluate(certified, data(2, 1, 4, 4), [-0.5])


def test_no_attack_succeeds_inside_a_certified_radius(run_folder: Path) -> None:
    """Projected gradient ascent on every margin, at 0.999 of each proven radius."""
    certified = CertifiedModel(load_model(run_folder / "ckpt.pt"), (1, 28, 28))
    data = load_data("mnist-5k", train=False)
    x = pixels(data.images).double()
    found = certified.certify(x)
    assert (found.radius > 0).double().mean() > 0.95
    budget = (0.999 * found.radius)[:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    closest = torch.full((len(x),), math.inf, dtype=torch.float64)
    for _restart in range(3):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        delta = budget * step / step.flatten(1).norm(dim=1)[:, None, None, None]
        for _ in range(20):
            delta.requires_grad_(True)
            logits = certified.logits(x + delta)
            assert torch.equal(logits.argmax(dim=1), found.prediction)
            top = logits.gather(1, found.prediction[:, None])
            margin = top - logits.scatter(1, found.prediction[:, None], -math.inf)
            closest = torch.minimum(closest, margin.detach().amin(dim=1))
            (gradient,) = torch.autograd.grad(margin.amin(dim=1).sum(), delta)
            length = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
            moved = delta.detach() - 0.3 * budget * gradient / length
            scale = moved.flatten(1).norm(dim=1)[:, None, None, None] / budget.clamp_min(1e-30)
            delta = moved / scale.clamp_min(1.0)
    assert (closest > 0).all()


def test_best_says_which_certificate_won_and_what_attacks_leave() -> None:
    torch.manual_seed(0)
    model = models.build("mlp", hidden=(12,), activation="softplus")
    data = load_data("mnist-5k", train=False).head(40)
    certified = CertifiedModel(model, (1, 28, 28))
    report = evaluate(certified, data, (0.0, 0.1, 0.5), certificate="best", attack=Effort())
    assert list(report.radii) == ["lipschitz", "curvature", "dual"]
    assert sum(report.won.values()) == int((report.found.radius > 0).sum())
    assert report.won["dual"] + report.won["curvature"] > 30
    assert report.attack is not None
    for epsilon, attacked in report.attacked_accuracy.items():
        assert report.certified_accuracy[epsilon] <= attacked <= report.clean_accuracy
    assert report.attacked_accuracy[0.0] == report.clean_accuracy
    assert report.attack.solved(report.found.radius) > 0.5
    summary = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert summary["won"] == report.won
    assert set(summary["cost_over_logits"]) == {"lipschitz", "curvature", "dual"}
    assert 9 <= summary["passes_per_image"] <= 99
    assert summary["broken_within_radius"] == 0
    table = report.to_table()
    for text in ("lipschitz    attacked", "largest by dual", "solved exactly", "passes per image"):
        assert text in table


def test_a_loader_gives_what_the_images_give() -> None:
    """Certificates and attacks of the same images, as bytes and as batches of floats."""
    model = models.build("mlp", hidden=(8,), input_shape=(1, 4, 4), num_classes=3)
    certified = CertifiedModel(model, (1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (11, 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.arange(11) % 3
    loader = DataLoader(TensorDataset(pixels(images), labels), batch_size=4)
    data = ImageData(images, labels, ("a", "b", "c"))
    for certificate in ("lipschitz", "best"):
        asked = {"certificate": certificate, "attack": Effort(steps=5), "batch_size": 4}
        one, other = (evaluate(certified, each, [0.1], **asked) for each in (data, loader))
        assert one.to_csv() == other.to_csv()
        assert one.certified_accuracy == other.certified_accuracy
    found = certified.certify(loader)
    assert torch.equal(found.radius, certified.certify(pixels(images)).radius)
    assert torch.equal(
        found.prediction, certified.certify(list(pixels(images).split(2))).prediction
    )


def test_loaders_that_do_not_fit_are_refused() -> None:
    model = models.build("mlp", hidden=(8,), input_shape=(1, 4, 4), num_classes=3)
    certified = CertifiedModel(model, (1, 4, 4))
    images = torch.rand(5, 1, 4, 4)
    for batches, message in (
        ([], "no images"),
        ([images], "inputs and labels"),
        ([(images, torch.arange(4) % 3)], "as many labels as images"),
        ([(images, torch.full((5,), 3))], "has a label 3"),
        ([(images, torch.full((5,), -1))], "has a label -1"),
        ([(images, torch.zeros(5))], "labels as a tensor of integers"),
        ([(images, [0, 1, 2, 0, 1])], "labels as a tensor of integers"),
        ([(images[0, 0, 0, 0], torch.tensor(0))], "as many labels as images"),
        ([(images[..., 1:], torch.arange(5) % 3)], "the data has"),
        ([((255 * images).byte(), torch.arange(5) % 3)], "floating point"),
        ([(images.numpy(), torch.arange(5) % 3)], "as tensors"),
        ([(images[:0], torch.zeros(0, dtype=torch.int64))], "no images"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(certified, batches)
    for batches, message in (
        ([], "no inputs"),
        ({"x": images}, "expected batches of tensors, got str"),
        ([{"x": images}], "got dict"),
        ([[]], "got list"),
        (images.numpy(), "got ndarray"),
        ([images, torch.arange(5) % 3], "these are labels"),
    ):
        with pytest.raises(ValueError, match=message):
            certified.certify(batches)
    with pytest.raises(ValueError, match=r"x\[None\] is a batch of one"):
        certified.certify(images[0])
    with pytest.raises(ValueError, match="x / 255"):
        certified.certify((255 * images).byte())
