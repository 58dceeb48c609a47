from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import models
from models import ACTIVATIONS, MODELS, BasicBlock, MaxMin, Normalize, build, make_activation


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mlp", 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("3x1024", 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10),
        ("2c2f", 166406),  # as in the papers that use it
        ("4c3f", 1974762),
        (
            "liresnet",  # 3x3, two blocks; 1x1, five blocks; dense, classes
            (12 * 9 + 1) * 48
            + 2 * (48 * 9 + 1) * 48
            + (192 + 1) * 96
            + 5 * (96 * 9 + 1) * 96
            + (96 * 64 + 1) * 256
            + 257 * 10,
        ),
        ("resnet18", 11689512),  # as torchvision's
        ("resnet20", 269722),  # He et al.: 0.27 M
        ("resnet32", 464154),  # 0.46 M
        ("resnet56", 853018),  # 0.85 M
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    assert count(build(name)) == parameters


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 9, 12)])
def test_output_shapes(name: str, activation: str, shape: tuple[int, int, int]) -> None:
    small: dict[str, Any] = {"width": 2}
    if name == "mlp" or "1024" in name:
        small = {"hidden": (8, 6)}
    elif name == "liresnet":
        small = {"width": 2, "dense": (6,)}
        shape = (shape[0], 8, shape[2])  # it halves both sides, twice
    statistics = {"mean": (0.5,) * shape[0], "std": (0.25,) * shape[0]}
    model = build(
        name, input_shape=shape, num_classes=7, activation=activation, **small, **statistics
    )
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], Normalize)
    logits = model.eval()(torch.rand(4, *shape))
    assert logits.shape == (4, 7)
    assert bool(logits.isfinite().all())
    if name != "liresnet":  # nn.PixelUnshuffle returns an empty batch as it is
        assert model(torch.rand(0, *shape)).shape == (0, 7)
    model.train()(torch.rand(4, *shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_same_seed_same_model() -> None:
    torch.manual_seed(3)
    first = build("2c2f", width=2)
    torch.manual_seed(3)
    second = build("2c2f", width=2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "reason"),
    [
        ("resnet17", {}, "one of mlp, 2x1024, .*, 4c3f, liresnet, resnet18, .* got 'resnet17'"),
        (
            "mlp",
            {"width": 3, "depth": 2},
            "'mlp' has no hyperparameter depth, width; it has .*hidden",
        ),
        ("2c2f", {"activation": "gelu"}, "one of relu, .* got 'gelu'"),
        ("2c2f", {"input_shape": (1, 1, 1)}, r"input_shape \(1, 1, 1\) does not fit"),
        ("4c3f", {"input_shape": (1, 2, 2)}, "does not fit"),
        ("liresnet", {"input_shape": (3, 30, 32)}, r"\(3, 30, 32\) does not fit: .* by 4"),
        ("mlp", {"mean": (0.0, 0.0)}, "one mean and one positive std"),
        ("mlp", {"std": (0.0,)}, "one mean and one positive std"),
    ],
)
def test_build_refuses(name: str, hyperparameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(name, **hyperparameters)


@pytest.mark.parametrize("depth", [2, 7, 18, 21, -4])
def test_resnet_depths(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        models.resnet(depth=depth)


def test_every_model_takes_the_common_hyperparameters() -> None:
    common = {"input_shape", "num_classes", "activation", "mean", "std"}
    for name, function in MODELS.items():
        assert common <= set(inspect.signature(function).parameters), name


@pytest.mark.parametrize("shape", [(3, 4), (2, 6, 3), (2, 2, 3, 5), (0, 4)])
def test_maxmin_sorts_pairs_of_channels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = MaxMin()(x)
    assert y.shape == x.shape
    assert torch.equal(y[:, 0::2], torch.maximum(x[:, 0::2], x[:, 1::2]))
    assert torch.equal(y[:, 1::2], torch.minimum(x[:, 0::2], x[:, 1::2]))


def test_maxmin_preserves_norms_of_values_and_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 3, requires_grad=True)
    y = MaxMin()(x)
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient.flatten().sort().values, upstream.flatten().sort().values)


def test_maxmin_needs_pairs() -> None:
    with pytest.raises(ValueError, match="even number of channels for MaxMin, got 3"):
        MaxMin()(torch.zeros(2, 3))


def test_normalize() -> None:
    layer = Normalize([0.5, 0.25], [0.5, 2.0])
    x = torch.rand(4, 2, 3, 5)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.5, (x[:, 1] - 0.25) / 2.0], dim=1)
    assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {"mean", "std"}  # saved with the model
    assert not list(layer.parameters())  # and not trained
    assert torch.equal(Normalize([0.0], [1.0])(x), x)


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.0], [0.0]), ([0.0], [-1.0]), ([0.0], [float("nan")]), ([0.0], [float("inf")]),
     ([0.0, 0.0], [1.0])],
)  # fmt: skip
def test_normalize_refuses(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match="one mean and one positive std per channel"):
        Normalize(mean, std)


def test_softplus_does_not_jump() -> None:
    """Unlike torch's default, whose value drops by 2e-9 at 20."""
    layer = make_activation("softplus")
    x = torch.linspace(15.0, 45.0, 10_001, dtype=torch.float64)
    assert bool((layer(x).diff() >= 0.99 * x.diff()).all())
    below = torch.tensor([20.0, 20.0 + 1e-12], dtype=torch.float64)
    assert nn.Softplus()(below).diff().item() < 0
    assert layer(below).diff().item() >= 0


def test_shortcut_of_a_block() -> None:
    """Every other pixel, and zeros on both sides in the new channels."""
    block = BasicBlock(2, 4, stride=2, activation="relu").eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(3, 2, 5, 6)
    y = block(x)
    assert y.shape == (3, 4, 3, 3)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, 0].any()
    assert not y[:, 3].any()
