from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import models
from certify import CertifiedModel
from certify.curvature import SecondOrder, largest_row
from certify.curvature_estimate import CurvatureEstimator
from certify.norms import NetworkEstimator
from certify.operators import Convolution, Matrix
from certify.sensitivity import pulled_back, seeds
from certify.signal import UnsupportedModel

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "softplus": lambda: nn.Softplus(threshold=40.0),
    "softplus, beta 5": lambda: nn.Softplus(beta=5.0, threshold=40.0),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
}

NOISE = 1.0 + 1e-10  # of the Hessians that the bounds are compared with


class Residual(nn.Module):
    """A block with a skip, an average pool, a shared layer and a smooth activation behind all."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.activation = activation()
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        x = x + self.shared(self.activation(self.shared(x)))
        x = torch.cat([self.pool(self.activation(x)), 0.5 * self.pool(x)], dim=1)[:, 1:4]
        result: Tensor = self.last(torch.flatten(x, 1))
        return result


def networks(activation: Callable[[], nn.Module]) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    mlp = [nn.Linear(6, 7), activation(), nn.Linear(7, 5), activation(), nn.Linear(5, 4)]
    return {
        "2 layers": (nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)), (5,)),
        "3 layers": (nn.Sequential(*mlp), (6,)),
        "4 layers": (nn.Sequential(nn.Linear(5, 6), activation(), *mlp), (5,)),
        "no last matrix": (nn.Sequential(nn.Linear(4, 5), activation()), (4,)),
        "convolutions": (
            nn.Sequential(
                nn.Conv2d(1, 3, 3, stride=2, padding=1),
                activation(),
                nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular", bias=False),
                activation(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(8, 3),
            ),
            (1, 5, 4),
        ),
        "transposed": (
            nn.Sequential(
                nn.ConvTranspose2d(2, 2, 3, stride=2),
                activation(),
                nn.Flatten(),
                nn.Linear(50, 3),
            ),
            (2, 2, 2),
        ),
        "residual": (Residual(activation), (1, 4, 4)),
    }


def hessian(model: nn.Module, x: Tensor, first: int, second: int) -> Tensor:
    def difference(flat: Tensor) -> Tensor:
        logits = model(flat.reshape(1, *x.shape))[0]
        return logits[first] - logits[second]

    found = torch.autograd.functional.hessian(difference, x.flatten())
    assert isinstance(found, Tensor)
    return found


def extremes(model: nn.Module, x: Tensor, first: int, second: int) -> tuple[float, float]:
    """Smallest and largest eigenvalue, less the rounding of the eigenvalues."""
    exact = hessian(model, x, first, second)
    size = exact.abs().max()
    if not size > 1e-280:  # or NaN, as torch's second derivative of Mish far from zero
        return 0.0, 0.0
    values = torch.linalg.eigvalsh(exact / size)
    noise = 1e-12 * values.abs().max()
    return ((values[0] + noise) * size).item(), ((values[-1] - noise) * size).item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("network", networks(nn.Tanh))
def test_no_hessian_has_larger_eigenvalues(activation: str, network: str) -> None:
    """63 networks, 24 Hessians each: on both ends, where activations bend most and elsewhere."""
    for seed in range(2):
        torch.manual_seed(seed)
        model, shape = networks(ACTIVATIONS[activation])[network]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + 3.0 * seed)
        certified = CertifiedModel(model, shape)
        bounds = certified.curvature()
        assert bounds.diagonal().abs().max() == 0
        for scale in (0.0, 0.1, 1.0, 10.0):
            x = scale * torch.randn(shape, dtype=torch.float64)
            for first, second in ((0, 1), (1, 2), (2, 0)):
                low, high = extremes(certified.model, x, first, second)
                assert -low <= bounds[first, second] * NOISE
                assert high <= bounds[second, first] * NOISE


@pytest.mark.parametrize("tighten", ["none", "merge", "join", "balance"])
@pytest.mark.parametrize("method", ["fantastic_four", "supremum"])
def test_every_method_and_tightening(tighten: str, method: str) -> None:
    torch.manual_seed(0)
    model, shape = networks(nn.Sigmoid)["residual"]
    certified = CertifiedModel(model, shape, method=method, tighten=tighten)
    bounds = certified.curvature()
    for _ in range(5):
        low, high = extremes(certified.model, torch.randn(shape, dtype=torch.float64), 0, 1)
        assert -low <= bounds[0, 1] * NOISE
        assert high <= bounds[1, 0] * NOISE


@given(
    width=st.integers(1, 9),
    inputs=st.integers(1, 6),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    depth=st.integers(1, 3),
    scale=st.sampled_from([1e-6, 0.3, 3.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_hessians_of_any_perceptron(
    width: int, inputs: int, activation: str, depth: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    size = inputs
    for _ in range(depth):
        layers += [nn.Linear(size, width), ACTIVATIONS[activation]()]
        size = width
    model = nn.Sequential(*layers, nn.Linear(size, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    certified = CertifiedModel(model, (inputs,))
    bounds = certified.curvature()
    for _ in range(4):
        x = torch.randn(inputs, dtype=torch.float64) / scale
        low, high = extremes(certified.model, x, 0, 1)
        assert -low <= bounds[0, 1] * NOISE + 1e-250
        assert high <= bounds[1, 0] * NOISE + 1e-250


def test_one_hidden_layer_is_the_matrix_inequality() -> None:
    """Singla and Feizi 2020: the largest eigenvalue of ``W^T diag(h d-) W``, on each end."""
    torch.manual_seed(0)
    first, last = nn.Linear(6, 9), nn.Linear(9, 4)
    model = nn.Sequential(first, nn.Softplus(beta=2.0, threshold=40.0), last)
    bounds = CertifiedModel(model, (6,)).curvature()
    rows, outer = first.weight.double(), last.weight.double()
    for y in range(4):
        for t in range(4):
            weights = (outer[t] - outer[y]).clamp_min(0.0) * 0.5
            exact = torch.linalg.eigvalsh(rows.mT @ (weights[:, None] * rows))[-1].item()
            assert exact <= bounds[y, t] <= exact * (1 + 1e-6)


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
def test_never_above_the_bound_of_singla_and_feizi(activation: str) -> None:
    """``h sum r_I^2 max |s_I|`` with an absolute backward pass, for a three-layer network."""
    torch.manual_seed(0)
    model, shape = networks(ACTIVATIONS[activation])["3 layers"]
    slope, bend = (1.0, 0.25) if activation == "softplus" else (1.0, 4 / (3 * math.sqrt(3)))
    one, two, last = (m.weight.detach().double() for m in model if isinstance(m, nn.Linear))
    bounds = CertifiedModel(model, shape).curvature()
    norms = [torch.linalg.matrix_norm(w, 2).item() for w in (one, two)]
    for y in range(4):
        for t in range(4):
            outer = (last[y] - last[t]).abs()
            inner = slope * outer @ two.abs()
            theirs = bend * (
                norms[0] ** 2 * inner.max() + (slope * norms[0] * norms[1]) ** 2 * outer.max()
            )
            assert bounds[y, t] <= theirs * (1 + 1e-6)


def test_scaling_the_input_scales_curvature() -> None:
    torch.manual_seed(0)
    model, shape = networks(nn.Tanh)["3 layers"]
    once = CertifiedModel(model, shape).curvature()

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = 3.0 * self.inner(2.0 * x)
            return result

    assert torch.allclose(CertifiedModel(Doubled(), shape).curvature(), 12.0 * once, rtol=1e-9)


def test_affine_networks_do_not_bend() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 2))
    certified = CertifiedModel(model, (4,))
    with pytest.raises(UnsupportedModel, match="have to be smooth"):
        certified.curvature()


@pytest.mark.parametrize("last", [nn.ReLU(), nn.ELU(alpha=0.5), nn.Hardswish(), models.MaxMin()])
def test_refuses_kinks_in_the_last_layers(last: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), last, nn.Linear(6, 2))
    certified = CertifiedModel(model, (4,))
    with pytest.raises(UnsupportedModel, match="have to be smooth"):
        certified.curvature()
    assert "dual" not in certified.applicable()
    bound = certified._bound
    with pytest.raises(UnsupportedModel, match="no bound of its second derivative"):
        SecondOrder(bound.bounding, bound.norms, bound.values)


def test_sensitivities_hold_all_gradients() -> None:
    torch.manual_seed(0)
    for name in ("3 layers", "convolutions", "transposed"):
        model, shape = networks(nn.GELU)[name]
        certified = CertifiedModel(model, shape)
        bound = certified._bound
        second = SecondOrder(bound.bounding, bound.norms, bound.values)
        start = seeds(torch.tensor([0, 1]), torch.tensor([1, 2]), second.classes)
        found = pulled_back(bound.bounding.order, start, second._maps, second._operator_norms)
        for signal, sensitivity in found.items():
            before, after = certified._graph.split(signal.node)
            low, high = sensitivity.ends()
            for _ in range(5):
                at = before(torch.randn(1, *shape, dtype=torch.float64)).requires_grad_()
                logits = after(at)
                for pair, (y, t) in enumerate(((0, 1), (1, 2))):
                    (gradient,) = torch.autograd.grad(
                        logits[0, y] - logits[0, t], at, retain_graph=True
                    )
                    assert bool((gradient[0] >= low[pair] - 1e-12).all())
                    assert bool((gradient[0] <= high[pair] + 1e-12).all())
                    assert gradient.norm() <= sensitivity.norm[pair] * NOISE


def test_largest_row() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2)
    options = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "input_size": (5, 5)}
    rows = largest_row(Convolution(weight, **options)).item()
    assert rows == pytest.approx(weight.flatten(1).norm(dim=1).max().item())
    adjoint = largest_row(Convolution(weight, adjoint=True, **options)).item()
    assert adjoint == pytest.approx(weight.transpose(0, 1).flatten(1).norm(dim=1).max().item())
    matrix = largest_row(Matrix(weight.flatten(1))).item()
    assert matrix == rows
    copies = Convolution(weight, padding_mode="reflect", **options)
    assert largest_row(copies) == torch.inf


def test_many_classes_share_their_weights() -> None:
    """Above a number of pairs the largest weights of all stand for each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 20))
    certified = CertifiedModel(model, (5,))
    bounds = certified.curvature()
    assert bounds.shape == (20, 20)
    x = torch.randn(5, dtype=torch.float64)
    for y, t in ((0, 1), (7, 19), (19, 7)):
        low, _ = extremes(certified.model, x, y, t)
        assert -low <= bounds[y, t]


@pytest.mark.parametrize("network", ["3 layers", "convolutions", "transposed", "residual"])
def test_estimates_approach_the_bounds(network: str) -> None:
    torch.manual_seed(0)
    model, shape = networks(nn.Tanh)[network]
    model = model.double().eval()
    estimator, curvature = NetworkEstimator(model, shape), CurvatureEstimator()
    found = curvature(estimator(iterations=200), iterations=200)
    largest = CertifiedModel(model, shape, tighten="merge").curvature()
    assert bool((found <= 1.0001 * largest).all())
    smallest = CertifiedModel(model, shape, method="best", tighten="merge").curvature()
    assert bool((found >= 0.5 * smallest).all())
    found.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.ndim > 1]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    again = CurvatureEstimator()
    again.set_extra_state(curvature.get_extra_state())
    estimate = estimator(iterations=1)
    assert torch.equal(again(estimate), curvature(estimate))


def test_gradient_of_the_estimate() -> None:
    """``K`` is homogeneous of degree two in the first layer, of degree one in the last."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 6), nn.Linear(6, 2)
    model = nn.Sequential(first, nn.Softplus(threshold=40.0), last).double()
    curvature = CurvatureEstimator()(NetworkEstimator(model, (5,))(iterations=200), iterations=200)
    curvature[0, 1].backward()
    for layer, degree in ((first, 2), (last, 1)):
        assert layer.weight.grad is not None
        product = (layer.weight.grad * layer.weight).sum().item()
        assert product == pytest.approx(degree * curvature[0, 1].item(), rel=1e-6)


def test_linear_results_of_a_functional_network() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))
            self.offset = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addmm(self.offset, torch.tanh(x), self.weight, alpha=0.5)
            z = F.softplus(y, threshold=40.0) - torch.sigmoid(y).mean(1, keepdim=True)
            return z.flip(1) + y

    torch.manual_seed(0)
    certified = CertifiedModel(Sums(), (6,))
    bounds = certified.curvature()
    for _ in range(20):
        low, high = extremes(certified.model, torch.randn(6, dtype=torch.float64), 0, 1)
        assert -low <= bounds[0, 1] * NOISE
        assert high <= bounds[1, 0] * NOISE


class Rotated(nn.Module):
    """Sines, then a rotation whose action on tensors of this shape is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2, bias=False).double()
        root = 2.0**-0.5
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[root, root], [-root, root]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.sin(x).unsqueeze(1)).reshape(-1, 2)
        return result


def test_constants_are_not_rounded_to_single_precision() -> None:
    certified = CertifiedModel(Rotated(), (2,))
    bounds = certified.curvature()
    low, _ = extremes(certified.model, torch.tensor([math.pi / 2, 0.0], dtype=torch.float64), 0, 1)
    assert -low == pytest.approx(2.0**0.5, rel=1e-9)
    assert bounds[0, 1] >= 2.0**0.5
    assert bounds[1, 0] >= 2.0**0.5


def test_products_that_underflow_are_not_zero() -> None:
    model = nn.Sequential(
        nn.Linear(1, 1, bias=False), nn.Softplus(1e-20, 40.0), nn.Linear(1, 2, bias=False)
    ).double()
    with torch.no_grad():
        model[0].weight.fill_(1e150)
        model[2].weight.copy_(torch.tensor([[1e-305], [0.0]], dtype=torch.float64))
    assert CertifiedModel(model, (1,)).curvature()[1, 0] >= 2.5e-26


def test_one_logit_has_no_differences() -> None:
    certified = CertifiedModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (3,))
    with pytest.raises(ValueError, match="two logits"):
        certified.curvature()


def test_sums_over_all_axes_of_a_sample() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            return torch.stack([y.sum(1) * 2.0, -y.mean(1), y[:, 0]], dim=1)

    torch.manual_seed(0)
    certified = CertifiedModel(Summed(), (4,))
    bounds = certified.curvature()
    for pair in ((0, 1), (1, 2), (2, 0)):
        low, high = extremes(certified.model, torch.randn(4, dtype=torch.float64), *pair)
        assert -low <= bounds[pair] * NOISE
        assert high <= bounds[pair[::-1]] * NOISE
