from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from certify import CertifiedModel
from certify.graph import LipschitzGraph
from certify.norms import proven_norms
from certify.operators import Convolution
from certify.tightening import TIGHTENINGS, bound_network
from ff_bounds import conv2d_bound, zero_padded_bound
from models import make_activation


def convnet(activation: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, stride in ((2, 1), (4, 1), (4, 2)):
        layers += [nn.Conv2d(channels, 4, 3, stride, padding=1), make_activation(activation)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 3 * 3, 3)).double().eval()


def largest_gain(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Largest norm of the Jacobian at points of several scales."""
    generator = torch.Generator().manual_seed(1)
    points = [
        scale * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        for scale in (0.1, 1.0, 10.0)
        for _ in range(3)
    ]
    jacobians = [torch.autograd.functional.jacobian(model, x).flatten(2)[0] for x in points]
    return torch.stack([torch.linalg.matrix_norm(j, ord=2) for j in jacobians]).max()


@pytest.mark.parametrize("tighten", TIGHTENINGS)
@pytest.mark.parametrize("activation", ["relu", "softplus", "maxmin"])
def test_norms_on_the_own_input_are_never_worse(activation: str, tighten: str) -> None:
    model, shape = convnet(activation), (2, 6, 6)
    supremum, best = (
        CertifiedModel(model, shape, method=method, tighten=tighten).lipschitz()
        for method in ("supremum", "best")
    )
    assert best <= supremum * (1 + 1e-9)
    if tighten == "merge" or activation == "maxmin":  # no more than 6 x 6 places
        assert best < 0.98 * supremum
    assert best >= largest_gain(model, shape)


def test_composed_layers_are_measured_on_the_lattice() -> None:
    """The norm on the own input is not one of what a composition sees beyond it."""
    output = LipschitzGraph(convnet("relu").requires_grad_(False), (2, 6, 6)).walk()
    bound = bound_network(output, "best", "join")
    alone = bound_network(output, "best", "merge")
    joined = bound_network(output, "supremum", "join")
    assert bound.lipschitz == min(alone.lipschitz, bound.lipschitz)
    for layer in joined.bounding.layers():
        operator = joined.bounding.operator(layer)
        if isinstance(operator, Convolution):
            lattice = conv2d_bound(operator.weight, stride=operator.stride, method="supremum")
            own = zero_padded_bound(
                operator.weight, stride=operator.stride, padding=1, input_size=operator.input_size
            )
            for_any = proven_norms([operator], "best", any_size=True)(operator)
            assert own < 0.99 * lattice
            assert for_any == pytest.approx(lattice.item(), rel=2e-3, abs=0.0)
            assert proven_norms([operator], "best")(operator) <= own * (1 + 1e-12)
