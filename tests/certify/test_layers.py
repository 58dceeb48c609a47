"""The report of layers: what is seen stays below what is proven, and shares add up."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import models
from certify import CertifiedModel
from certify.layers import report_layers
from tests.certify.rules.harness import trained


def network() -> nn.Module:
    torch.manual_seed(0)
    model = models.build("resnet20", width=4, input_shape=(3, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            trained(module)
    return model


def test_layers_and_steps() -> None:
    model = network()
    report = report_layers(model, torch.rand(4, 3, 8, 8), method="fantastic_four")
    assert list(report.lipschitz) == ["none", "merge", "join", "balance"]
    values = list(report.lipschitz.values())
    assert values == sorted(values, reverse=True)
    assert set(report.seconds) == {"tracing", "looking", *report.lipschitz}
    for level, value in report.lipschitz.items():
        certified = CertifiedModel(model, (3, 8, 8), tighten=level)
        assert certified.lipschitz().item() == pytest.approx(value, rel=1e-3)
    assert 0 < report.seen <= values[-1]
    assert len(report.layers) == 20
    for layer in report.layers:
        assert 0 < layer.seen <= layer.bound * (1 + 1e-6)
        assert 0 < layer.seen_so_far <= layer.bound_so_far * (1 + 1e-6)
    first, last = report.layers[0], report.layers[-1]
    assert first.name == "0 + 1 + 2"
    assert first.kind == "conv 3 -> 4, 3x3"
    assert first.shape == (4, 8, 8)
    assert last.kind == "linear 16 -> 10"
    assert last.shape == (10,)
    assert last.seen_so_far == pytest.approx(report.seen)
    assert last.bound_so_far == pytest.approx(report.lipschitz["merge"])


def test_shares_of_a_chain_add_up_to_one() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3.0
    report = report_layers(model, torch.rand(4, 4), tighten="merge")
    assert sum(layer.share for layer in report.layers) == pytest.approx(1.0)
    assert all(layer.share > 0 for layer in report.layers)


def test_the_gain_that_is_seen_is_that_of_the_jacobian() -> None:
    """On a linear map all images and directions agree, and bound and gain meet."""
    report = report_layers(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), torch.rand(3, 6))
    assert report.seen == pytest.approx(report.lipschitz["balance"], rel=1e-3)


def test_products_and_other_kinds_of_layers() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3, 2, groups=1), nn.ConvTranspose1d(2, 2, 2, groups=2), nn.Flatten()
    )
    report = report_layers(model, torch.rand(2, 1, 7), tighten="merge")
    kinds = [layer.kind for layer in report.layers]
    assert kinds == ["conv 1 -> 2, 3 / 2", "transposed conv 2 -> 2, 2, 2 groups"]
    table = report.to_table()
    assert "product of all norms" in table
    content = json.loads(report.to_json())
    assert content["layers"][0]["kind"] == kinds[0]
    assert content["lipschitz"]["merge"] == report.lipschitz["merge"]
