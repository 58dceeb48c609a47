"""A certified snapshot of a network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import models
from certify import CertifiedModel, Effort, UnsupportedModel, report_layers


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Exact Jacobian ``(outputs, inputs)`` at one sample."""
    outputs = model(x).shape[1]
    copies = x.expand(outputs, *x.shape[1:]).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(copies).diagonal().sum(), copies)
    return gradient.flatten(1)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def test_later_changes_of_the_model_do_not_matter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    certified = CertifiedModel(model, (4,))
    x = torch.randn(5, 4)
    logits, other = certified.logits(x), CertifiedModel(copy.deepcopy(model), (4,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000.0)
    model.train()
    model(torch.randn(8, 4))
    # Bounds are computed on first use, from the copy.
    assert torch.equal(certified.margin_lipschitz(), other.margin_lipschitz())
    assert torch.equal(certified.lipschitz(), other.lipschitz())
    assert torch.equal(certified.logits(x), logits)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert model.training


def test_what_is_handed_out_can_be_changed_without_harm() -> None:
    certified = CertifiedModel(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (4,))
    x = torch.randn(5, 4)
    certified.lipschitz().zero_()
    certified.margin_lipschitz().zero_()
    assert certified.lipschitz().item() > 0
    assert bool((certified.margin_lipschitz()[0, 1:] > 0).all())
    assert bool(certified.certify(x).radius.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_those_of_the_stored_weights_in_float64(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    certified = CertifiedModel(model, (4,))
    assert certified.num_classes == 3
    x = torch.randn(6, 4)
    logits = certified.logits(x)
    assert logits.dtype == torch.float64
    first, last = model[0], model[2]
    hidden = (x.double() @ first.weight.double().T + first.bias.double()).relu()
    expected = hidden @ last.weight.double().T + last.bias.double()
    torch.testing.assert_close(logits, expected)


def test_evaluation_mode_is_certified() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    certified = CertifiedModel(model, (4,))
    x = torch.randn(6, 4)
    assert torch.equal(certified.logits(x), certified.logits(x))
    torch.testing.assert_close(certified.logits(x), model.eval()(x).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_batch_norm_is_merged_into_the_layer_before(stride: int) -> None:
    """Tighter than the product of the norms: nearly the norm of the dense composition."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 4, 2, stride=stride), nn.BatchNorm2d(4)
    with torch.no_grad():  # a channel of large weights that BatchNorm scales down
        conv.weight[0] *= 50.0
    with_statistics(bn)
    with torch.no_grad():
        bn.weight[0] = 0.01
    certified = CertifiedModel(nn.Sequential(conv, bn, nn.Flatten()), (3, 6, 6))
    exact = norm(jacobian(certified.model, torch.zeros(1, 3, 6, 6, dtype=torch.float64)))
    product = (
        CertifiedModel(nn.Sequential(conv, nn.Flatten()), (3, 6, 6)).lipschitz().item()
        * CertifiedModel(nn.Sequential(bn, nn.Flatten()), (4, 3, 3)).lipschitz().item()
    )
    bound = certified.lipschitz().item()
    assert exact <= bound <= 3.0 * exact
    assert bound < product / 5.0


def test_margins_of_a_linear_network_are_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    certified = CertifiedModel(model, (3, 2, 2))
    weight = model[1].weight.detach().double()
    exact = (weight[:, None] - weight[None, :]).norm(dim=-1)
    found = certified.margin_lipschitz()
    assert bool((found >= exact).all())
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0.0)
    assert torch.equal(found, found.T)
    # Never worse than what follows from the Lipschitz constant alone.
    assert bool((found <= 2.0**0.5 * certified.lipschitz()).all())


def test_resnet20() -> None:
    torch.manual_seed(0)
    model = with_statistics(models.build("resnet20", input_shape=(3, 8, 8), width=4))
    certified = CertifiedModel(model, (3, 8, 8))
    bound, margins = certified.lipschitz().item(), certified.margin_lipschitz()
    assert math.isfinite(bound)
    for _ in range(3):
        rows = jacobian(certified.model, torch.rand(1, 3, 8, 8, dtype=torch.float64))
        assert norm(rows) <= bound
        assert bool(((rows[:, None] - rows[None, :]).norm(dim=-1) <= margins).all())
    x = torch.rand(20, 3, 8, 8, dtype=torch.float64)
    y = x + 0.01 * torch.randn_like(x)
    change = (certified.logits(x) - certified.logits(y)).norm(dim=1)
    assert bool((change <= bound * (x - y).flatten(1).norm(dim=1)).all())


def test_the_layers_that_others_ignored() -> None:
    """A BatchNorm net whose gain is above 10, and weights times 1000."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    before = CertifiedModel(model, (4,)).lipschitz().item()
    assert model[1].running_var is not None
    model[1].running_var.fill_(1e-4)
    after = CertifiedModel(model, (4,)).lipschitz().item()
    assert after == pytest.approx(before * ((1 + 1e-5) / (1e-4 + 1e-5)) ** 0.5, rel=1e-4)
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.mul_(1000.0)
    assert CertifiedModel(model, (4,)).lipschitz().item() == pytest.approx(1e6 * after, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["0.weight", "0.bias", "1.running_var", "1.running_mean", "1.bias"]
)
def test_weights_that_are_not_finite(name: str, bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.state_dict()[name].flatten()[0] = bad
    with pytest.raises(ValueError, match=f"finite parameters.*'{name}'"):
        CertifiedModel(model, (3,))


def test_negative_variance_has_no_bound() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert model[0].running_var is not None
    model[0].running_var[1] = -1.0
    with pytest.raises(ValueError, match="NaN"):
        CertifiedModel(model, (3,)).lipschitz()


def test_bounds_that_overflow_certify_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(1e200 * torch.eye(3, dtype=torch.float64))
            layer.bias.zero_()
    certified = CertifiedModel(model, (3,))
    assert certified.lipschitz().item() == math.inf
    assert certified.certify(torch.rand(4, 3)).radius.tolist() == [0.0] * 4


def test_tiny_gains_are_not_taken_for_zero() -> None:
    """Down by 1e-350, which float64 cannot hold, and up again: the gain is 1."""
    model = nn.Sequential(
        nn.Linear(1, 1, bias=False),
        nn.Linear(1, 1, bias=False),
        nn.BatchNorm1d(1, eps=0.0),
        nn.Linear(1, 2, bias=False),
    ).double()
    with torch.no_grad():
        for layer, value in zip(model, (1e200, 1e-200, 1e-150, 1e150), strict=True):
            layer.weight.fill_(value)
    assert CertifiedModel(model, (1,)).lipschitz().item() >= 2.0**0.5


def test_inputs() -> None:
    certified = CertifiedModel(models.build("mlp", hidden=(4,), input_shape=(1, 2, 2)), (1, 2, 2))
    assert certified.certify(torch.rand(0, 1, 2, 2)).radius.shape == (0,)
    for shape in [(5, 4), (1, 2, 2), (5, 1, 2, 3)]:
        with pytest.raises(ValueError, match=r"expected inputs \(N, 1, 2, 2\)"):
            certified.logits(torch.rand(shape))
    x = torch.rand(3, 1, 2, 2)
    x[1, 0, 0, 0] = math.nan
    assert certified.certify(x).radius[1].item() == 0.0
    alone = certified.certify(x[2:])
    assert alone.radius.item() == pytest.approx(certified.certify(x).radius[2].item(), rel=1e-9)


def test_one_logit_is_not_a_classifier() -> None:
    certified = CertifiedModel(nn.Linear(3, 1), (3,))
    with pytest.raises(ValueError, match="C >= 2"):
        certified.certify(torch.rand(2, 3))


def test_outputs_that_are_not_logits() -> None:
    with pytest.raises(UnsupportedModel, match=r"expected logits \(N, C\)"):
        CertifiedModel(nn.Conv2d(1, 2, 1), (1, 3, 3))


def test_inference_mode_does_not_matter() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        certified = CertifiedModel(model, (4,))
        radius = certified.certify(torch.rand(2, 4)).radius
    assert bool(radius.isfinite().all())
    assert certified.certify(torch.rand(2, 4)).radius.shape == (2,)


def test_radii_are_in_the_units_of_the_input() -> None:
    """Normalisation is a layer: twice the contrast, half the radius."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    sharp = nn.Sequential(models.Normalize([0.5], [0.25]), nn.Flatten(), linear)
    plain = nn.Sequential(models.Normalize([0.0], [1.0]), nn.Flatten(), linear)
    x = torch.rand(10, 1, 2, 2, dtype=torch.float64)
    inside = CertifiedModel(sharp, (1, 2, 2)).certify(x)
    outside = CertifiedModel(plain, (1, 2, 2)).certify((x - 0.5) / 0.25)
    torch.testing.assert_close(inside.radius, outside.radius * 0.25)


@pytest.mark.parametrize("name", ["mlp", "2c2f", "4c3f"])
@pytest.mark.parametrize("activation", sorted(models.ACTIVATIONS))
def test_no_attack_inside_the_radius(name: str, activation: str) -> None:
    """Steepest descent on every margin, kept inside 0.999 of the radius."""
    torch.manual_seed(0)
    sizes = {"hidden": (16,)} if name == "mlp" else {"width": 2}
    model = models.build(name, activation=activation, input_shape=(1, 8, 8), **sizes)
    certified = CertifiedModel(model, (1, 8, 8))
    x = torch.rand(16, 1, 8, 8, dtype=torch.float64)
    found = certified.certify(x)
    assert bool((found.radius > 0).all())
    limit = 0.999 * found.radius.reshape(-1, 1, 1, 1)
    rows = torch.arange(16)
    for target in range(certified.num_classes):
        step = torch.zeros_like(x)
        for _ in range(8):
            step.requires_grad_()
            logits = certified.logits(x + step)
            margin = logits[rows, found.prediction] - logits[:, target]
            (slope,) = torch.autograd.grad(margin.sum(), step)
            size = slope.flatten(1).norm(dim=1).clamp_min(1e-300).reshape(-1, 1, 1, 1)
            step = (step - limit * slope / size).detach()
            step = step * (limit / step.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)).clamp(max=1)
        assert torch.equal(certified.logits(x + step).argmax(dim=1), found.prediction)


class Unpacks(nn.Module):
    """Sizes and parts that a forward unpacks, by which a graph has items that are no tensors."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.activation = activation
        self.linear = nn.Linear(2 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.conv(x))
        n, channels, height, width = x.shape
        first, second = x.chunk(2, 1)
        x = torch.maximum(first, second).reshape(n, channels // 2 * height * width)
        return self.linear(x)


def test_networks_that_unpack_sizes_and_parts_can_be_attacked() -> None:
    torch.manual_seed(0)
    certified = CertifiedModel(Unpacks(nn.ReLU()), (1, 4, 4))
    x = torch.rand(5, 1, 4, 4)
    assert bool((certified.attack(x) >= certified.certify(x).radius).all())
    found = CertifiedModel(Unpacks(nn.SiLU()), (1, 4, 4)).applicable()
    assert found[0] == "lipschitz"


def test_what_users_try_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    certified = CertifiedModel(model, (1, 2, 2), precision="exact")
    assert certified.precision is None
    assert "3 classes" in repr(certified)
    x = torch.rand(5, 1, 2, 2)
    one = certified.attack(x, Effort(steps=3))
    assert one.shape == (5,)
    assert certified.adversary.nearest(x).points.shape == x.shape
    assert certified.broken(x, 0.0).tolist() == [False] * 5
    assert certified.broken(x, 100.0).shape == (5,)
    with pytest.raises(ValueError, match=r"torch\.as_tensor"):
        certified.logits(x.numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 5 labels"):
        certified.certify(x).certified(torch.zeros(4), 0.1)
    report = report_layers(certified, x, tighten="join")
    assert report.lipschitz["join"] >= 0.999 * report.seen
    with pytest.raises(UnsupportedModel, match=r"certify its \.module"):
        CertifiedModel(nn.DataParallel(model), (1, 2, 2))
    with pytest.raises(UnsupportedModel, match="certify the module that was compiled"):
        CertifiedModel(torch.compile(model), (1, 2, 2))
