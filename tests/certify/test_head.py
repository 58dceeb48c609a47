from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import models
from certify import CertifiedModel
from certify.signal import UnsupportedModel


def test_a_smooth_network_is_all_head() -> None:
    certified = CertifiedModel(models.build("mlp", hidden=(5,), activation="tanh"), (1, 28, 28))
    head = certified.smooth.head
    assert head.backbone is None
    assert head.lipschitz == 1.0


class Branches(nn.Module):
    """A ReLU network, then two smooth branches that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left = nn.Linear(9, 8), nn.Linear(8, 6)
        self.right, self.last = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1))).view(x.size(0), -1).reshape(x.shape[0], 8)
        result: Tensor = self.last(torch.tanh(self.left(x)) + torch.sigmoid(self.right(x)))
        return result


@pytest.mark.parametrize("name", ["branches", "2c2f"])
def test_certificates_in_the_space_of_features(name: str) -> None:
    torch.manual_seed(0)
    shape = (1, 3, 3) if name == "branches" else (1, 8, 8)
    model = (
        Branches()
        if name == "branches"
        else models.build("2c2f", width=4, input_shape=shape, head="softplus")
    )
    certified = CertifiedModel(model, shape)
    assert certified.applicable()[-2:] == ("curvature", "dual")
    head = certified.smooth.head
    assert head.backbone is not None
    x = torch.rand(20, *shape)
    features = head.backbone(x.double())
    logits = certified.logits(x)
    assert logits.std(dim=0).min() > 1e-4  # they do depend on the input
    assert torch.allclose(head.model(features), logits, rtol=1e-12, atol=1e-14)
    for kind in ("curvature", "dual"):
        found = certified.certify(x, kind)
        assert bool((found.radius > 0).all())
        assert bool((found.radius <= certified.attack(x)).all())
        assert not certified.broken(x, found.radius).any()
        inner = CertifiedModel(head.model, tuple(features.shape[1:])).certify(features, kind)
        expected = inner.radius / head.lipschitz
        assert torch.allclose(found.radius, expected, rtol=1e-6, atol=0.0)
    assert bool((certified.dual(x).upper == math.inf).all())


class Around(nn.Module):
    """The input goes around the layer with a kink."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(torch.relu(self.first(x)) + x))
        return result


def test_the_cut_is_where_all_paths_meet() -> None:
    torch.manual_seed(0)
    certified = CertifiedModel(Around(), (4,))
    x = torch.randn(10, 4)
    assert not certified.broken(x, certified.certify(x, "dual").radius).any()

    class Late(Around):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(torch.tanh(self.first(x))) + torch.relu(x)[:, :3]
            return result

    with pytest.raises(UnsupportedModel, match="no curvature bound"):
        CertifiedModel(Late(), (4,)).curvature()
