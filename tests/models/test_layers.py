"""Layers that are contractions or isometries by construction, and networks of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from models import (
    AlmostOrthogonal,
    BlockReflectorConv2d,
    IdentityPlus,
    MaxMin,
    Normalize,
    Orthonormal,
    SLLConv2d,
    UnitRows,
    build,
    liresnet,
)
from models.liresnet import BLOCKS


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def jacobian(layer: nn.Module, x: Tensor) -> Tensor:
    """``(outputs, inputs)`` at one sample ``(1, ...)``."""
    found = torch.autograd.functional.jacobian(lambda z: layer(z[None])[0].flatten(), x[0])
    assert isinstance(found, Tensor)
    return found.flatten(1)


def norm(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, ord=2).item()


# --- MaxMin's own gradient --------------------------------------------------------------------

# What torch says of itself where it first makes a forward derivative.
torchs_own = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


def sorted_by_torch(x: Tensor) -> Tensor:
    first, second = x[:, 0::2], x[:, 1::2]
    both = torch.maximum(first, second), torch.minimum(first, second)
    return torch.stack(both, dim=2).flatten(1, 2)


def distinct(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers of which no two are near each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(math.prod(shape), generator=generator).double().reshape(shape) / 3.0


@torchs_own
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")  # torch 2.6
@pytest.mark.parametrize("shape", [(3, 4), (2, 6, 3), (2, 2, 3, 2)])
def test_maxmin_passes_gradcheck(shape: tuple[int, ...]) -> None:
    x = distinct(*shape).requires_grad_()
    assert torch.autograd.gradcheck(MaxMin(), x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(MaxMin(), x, check_fwd_over_rev=True)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_maxmin_is_what_torch_computes_with_its_gradient(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> None:
    batch, pairs, places = shape
    x = distinct(batch, 2 * pairs, places, seed=seed).to(dtype).requires_grad_()
    upstream = distinct(batch, 2 * pairs, places, seed=seed + 1).to(dtype)
    found, expected = MaxMin()(x), sorted_by_torch(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    (slope,) = torch.autograd.grad(found, x, upstream)
    (known,) = torch.autograd.grad(expected, x, upstream)
    assert torch.equal(slope, known)


@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (2, 2, 1, 3)])
def test_maxmin_leaves_channels_last(shape: tuple[int, ...]) -> None:
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    last = plain.detach().to(memory_format=torch.channels_last).requires_grad_()
    results = MaxMin()(plain), MaxMin()(last)
    assert torch.equal(*results)
    assert results[1].stride() == last.stride()
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for result in results:
        result.backward(gradient)
    assert torch.equal(plain.grad, last.grad)  # type: ignore[arg-type]


def test_maxmin_at_ties_still_permutes_gradients() -> None:
    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    (slope,) = torch.autograd.grad(MaxMin()(x), x, upstream)
    assert slope.tolist() == [[2.0, 1.0, 4.0, 3.0]]


@torchs_own
def test_maxmin_under_function_transforms() -> None:
    layer = MaxMin()

    def alone(x: Tensor) -> Tensor:
        result: Tensor = layer(x[None])[0]
        return result

    x = distinct(5, 6, 2)
    expected = torch.stack(
        [torch.autograd.functional.jacobian(alone, one) for one in x]  # type: ignore[misc]
    )
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = torch.func.vmap(transform(alone))(x)
        assert torch.equal(found, expected)
    assert torch.equal(torch.func.vmap(alone)(x), layer(x))
    moved = torch.func.vmap(layer, in_dims=2, out_dims=2)(distinct(5, 4, 3))
    assert torch.equal(moved, torch.stack([layer(y) for y in distinct(5, 4, 3).unbind(2)], 2))
    tangent = distinct(5, 6, 2, seed=1)
    _, pushed = torch.func.jvp(layer, (x,), (tangent,))
    assert torch.equal(
        pushed.flatten(), (expected.reshape(5, 12, 12) @ tangent.reshape(5, 12, 1)).flatten()
    )


@torchs_own
def test_maxmin_has_second_derivatives_through_what_follows() -> None:
    x = distinct(6)

    def cubes(z: Tensor) -> Tensor:
        result: Tensor = MaxMin()(z[None]).pow(3).sum()
        return result

    hessian = torch.func.hessian(cubes)(x)
    torch.testing.assert_close(hessian, torch.diag(6.0 * x), rtol=1e-14, atol=0.0)


def test_maxmin_of_infinities() -> None:
    inf = math.inf
    x = torch.tensor([[1.0, inf, -inf, 2.0, inf, -inf, inf, inf]], requires_grad=True)
    y = MaxMin()(x)
    assert y.tolist() == [[inf, 1.0, 2.0, -inf, inf, -inf, inf, inf]]
    upstream = torch.arange(1.0, 9.0)[None]
    (slope,) = torch.autograd.grad(y, x, upstream)
    assert slope.tolist() == [[2.0, 1.0, 4.0, 3.0, 5.0, 6.0, 8.0, 7.0]]


# --- SDP-based layers -------------------------------------------------------------------------


def sll(channels: int, inner: int, kernel_size: int, seed: int) -> SLLConv2d:
    torch.manual_seed(seed)
    layer = SLLConv2d(channels, inner, kernel_size).double()
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.log_q)
    return layer


@settings(max_examples=40)
@given(
    channels=st.integers(1, 3),
    inner=st.integers(1, 4),
    kernel_size=st.sampled_from([1, 3]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 10_000),
)
def test_sll_is_a_contraction(
    channels: int, inner: int, kernel_size: int, scale: float, seed: int
) -> None:
    layer = sll(channels, inner, kernel_size, seed)
    with torch.no_grad():
        layer.weight.mul_(scale)
    x = torch.randn(2, 10, channels, 4, 3, dtype=torch.float64)
    near, far = (layer(z) for z in x)
    distance = (x[0] - x[1]).flatten(1).norm(dim=1)
    assert bool(((near - far).flatten(1).norm(dim=1) <= distance * (1 + 1e-12)).all())
    assert norm(jacobian(layer, x[0, :1])) <= 1.0 + 1e-12


def test_sll_by_hand() -> None:
    """``x - 2 V^T T^{-1} relu(V x + b)`` with the dense matrix of ``V``."""
    layer = sll(2, 3, 3, 0)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    basis = torch.eye(40, dtype=torch.float64).reshape(40, 2, 4, 5)
    dense = F.conv2d(basis, layer.weight, padding=1).flatten(1).T  # (3 * 20, 2 * 20)
    bias, divisors = (t.repeat_interleave(20) for t in (layer.bias, layer.divisors()))
    hidden = (dense @ x.flatten() + bias).relu() / divisors
    expected = x.flatten() - 2.0 * dense.T @ hidden
    torch.testing.assert_close(layer(x).flatten(), expected, rtol=0.0, atol=1e-12)


def test_sll_divisors_by_hand() -> None:
    """``t_i = sum_j sum_s |(V V^T)_{ij, s}| q_j / q_i``."""
    layer = sll(2, 3, 3, 1)
    v, q = layer.weight.detach(), layer.log_q.detach().exp()
    sums = torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.product(range(-2, 3), repeat=2):
        overlap = torch.zeros(3, 3, dtype=torch.float64)
        for i, j in itertools.product(range(3), repeat=2):
            if 0 <= i + a < 3 and 0 <= j + b < 3:
                overlap += v[:, :, i + a, j + b] @ v[:, :, i, j].T
        sums += overlap.abs() @ q / q
    torch.testing.assert_close(layer.divisors(), sums, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(layer.q, q, rtol=0.0, atol=0.0)


def test_sll_depends_on_ratios_of_q_and_not_on_the_weights_scale() -> None:
    layer, x = sll(2, 3, 3, 2), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.log_q += 1.5
    torch.testing.assert_close(layer(x), before, rtol=0.0, atol=1e-12)
    with torch.no_grad():
        layer.weight *= 7.0
        layer.bias *= 7.0
    torch.testing.assert_close(layer(x), before, rtol=0.0, atol=1e-12)


def test_sll_without_weights_is_the_identity() -> None:
    layer, x = SLLConv2d(2, 3), torch.rand(2, 2, 4, 4)
    nn.init.zeros_(layer.weight)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.weight[1] = torch.rand(2, 3, 3)  # some rows without
    y = layer(x)
    y.sum().backward()
    assert bool(y.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def test_sll_gradients() -> None:
    layer = sll(2, 2, 3, 3)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    assert set(names) == {"weight", "bias", "log_q"}

    def call(z: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        result: Tensor = torch.func.functional_call(layer, values, (z,))
        return result

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("kernel_size", [0, 2, 4])
def test_sll_needs_an_odd_kernel(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=f"expected an odd kernel size, got {kernel_size}"):
        SLLConv2d(2, kernel_size=kernel_size)


def test_sll_under_autocast() -> None:
    layer, x = SLLConv2d(3), torch.rand(2, 3, 5, 5)
    divisors, y = layer.divisors(), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.divisors(), divisors)
        torch.testing.assert_close(layer(x).float(), y, rtol=0.0, atol=0.05)


# --- block reflectors -------------------------------------------------------------------------


def reflector(channels: int, rank: int | None, seed: int, **options: Any) -> BlockReflectorConv2d:
    torch.manual_seed(seed)
    return BlockReflectorConv2d(channels, rank, **options).double()


def allowance(layer: BlockReflectorConv2d, size: tuple[int, int]) -> float:
    """How far from -1 what ``d`` makes of the weakest direction of any frequency may be."""
    spectrum = torch.fft.rfft2(layer.weight.detach(), s=size).flatten(2).permute(2, 0, 1)
    gains = torch.linalg.svdvals(spectrum).square()
    return 1e-9 + 3e-4 * (gains.mean() / gains.min()).item()


sizes = st.tuples(st.integers(3, 5), st.integers(3, 5))


@settings(max_examples=30)
@given(
    channels=st.integers(1, 4),
    rank=st.integers(1, 4),
    size=sizes,
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 10_000),
)
def test_reflectors_are_nearly_orthogonal_and_their_own_inverse(
    channels: int, rank: int, size: tuple[int, int], scale: float, seed: int
) -> None:
    layer = reflector(channels, min(rank, channels), seed, bias=False)
    with torch.no_grad():
        layer.weight.mul_(scale)
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    y = layer(x)
    before, after = (z.flatten(1).norm(dim=1) for z in (x, y))
    assert bool((after <= before * (1 + 1e-12)).all())
    off = allowance(layer, size)
    assert bool((after >= before * (1.0 - off)).all())
    twice = layer(y) - x
    assert bool((twice.flatten(1).norm(dim=1) <= 2.0 * off * before).all())
    rows = jacobian(layer, x[:1])
    assert norm(rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)) <= 2.0 * off


def test_a_reflector_is_a_periodic_convolution() -> None:
    layer = reflector(4, 2, 0)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for shift in ((1, 0), (0, 1), (3, 4)):
        torch.testing.assert_close(
            layer(x.roll(shift, (2, 3))), layer(x).roll(shift, (2, 3)), rtol=0.0, atol=1e-12
        )
    zero = layer(torch.zeros_like(x))
    torch.testing.assert_close(
        zero, layer.bias[:, None, None].expand_as(x).detach(), rtol=0.0, atol=1e-14
    )


def test_a_reflector_negates_the_range_of_its_kernel() -> None:
    """What the kernel makes of an image of ``rank`` channels comes back negated."""
    layer = reflector(5, 2, 1, bias=False)
    z = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    spectrum = torch.fft.rfft2(layer.weight.detach(), s=(6, 4))
    image = torch.einsum("crhw,nrhw->nchw", spectrum, torch.fft.rfft2(z))
    inside = torch.fft.irfft2(image, s=(6, 4))
    off = allowance(layer, (6, 4))
    assert off < 0.1
    assert (layer(inside) + inside).norm().item() <= off * inside.norm().item()
    # It is symmetric: of anything else the part along that is negated, too.
    y = torch.randn(1, 5, 6, 4, dtype=torch.float64)
    product = (layer(y) * inside).sum() + (y * inside).sum()
    assert abs(product.item()) <= off * y.norm().item() * inside.norm().item()


def test_a_reflector_of_weights_that_are_zero_is_the_identity() -> None:
    layer = reflector(3, 2, 0)
    nn.init.zeros_(layer.weight)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x, rtol=0.0, atol=1e-12)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())


def test_ranks_of_reflectors() -> None:
    assert BlockReflectorConv2d(8).weight.shape == (8, 2, 3, 3)
    assert BlockReflectorConv2d(2).weight.shape == (2, 1, 3, 3)
    assert BlockReflectorConv2d(4, 3, 5, bias=False).bias is None
    for rank in (0, -1, 5):
        with pytest.raises(ValueError, match=f"expected a rank between 1 and 4, got {rank}"):
            BlockReflectorConv2d(4, rank)


@pytest.mark.parametrize("size", [(2, 4), (4, 2)])
def test_images_smaller_than_a_reflectors_kernel(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected images of at least 3 x 3, got"):
        BlockReflectorConv2d(2)(torch.zeros(1, 2, *size))


def test_reflector_gradients() -> None:
    layer = reflector(2, 1, 3)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values = {"weight": weight, "bias": bias}
        result: Tensor = torch.func.functional_call(layer, values, (z,))
        return result

    assert layer.bias is not None
    # Within what the gradient leaves out: that of the mean square, which is behind ``d``.
    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias), atol=3e-3)


def test_columns_that_depend_on_each_other_make_no_expansion() -> None:
    layer = reflector(4, 3, 4, bias=False)
    with torch.no_grad():
        layer.weight[:, 1] = 2.0 * layer.weight[:, 0]
        layer.weight[:, 2] = 0.0
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    assert norm(jacobian(layer, x)) <= 1.0 + 1e-12
    single = layer.float()
    assert single(x.float()).norm().item() <= x.norm().item() * (1 + 1e-4)


def test_reflectors_under_autocast() -> None:
    layer, x = BlockReflectorConv2d(4), torch.rand(2, 4, 5, 5)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.reflectors(5, 5), layer.reflectors(5, 5))
        assert layer.reflectors(5, 5).dtype == torch.complex64
        assert torch.equal(layer(x), plain)
        assert layer(x.bfloat16()).dtype == torch.float32


# --- networks of them -------------------------------------------------------------------------


def small(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return liresnet(**{
        "input_shape": (2, 12, 16), "num_classes": 5, "width": 4, "depth": (1, 2), "dense": (6,),
        **settings,
    })  # fmt: skip


def kinds_of_weights(model: nn.Module) -> list[type]:
    return [
        type(module.parametrizations.weight[0])  # type: ignore[index, union-attr]
        for module in model.modules()
        if parametrize.is_parametrized(module, "weight")
    ]


@pytest.mark.parametrize("block", BLOCKS)
def test_liresnet_is_made_of_what_it_says(block: str) -> None:
    model = small(block=block)
    kinds = kinds_of_weights(model)
    assert kinds[-2:] == [Orthonormal, UnitRows]
    assert kinds.count(Orthonormal) == 2  # between stages, and the dense layer
    expected = {"residual": IdentityPlus, "aol": AlmostOrthogonal}.get(block)
    assert len(kinds) == 3 + 3 * (expected is not None)
    if expected is not None:
        assert kinds.count(expected) == 3
    own = {"sll": SLLConv2d, "reflector": BlockReflectorConv2d}.get(block)
    if own is not None:
        assert sum(isinstance(module, own) for module in model.modules()) == 3
    activations = sum(isinstance(module, MaxMin) for module in model.modules())
    assert activations == (3 if block == "sll" else 6)  # sll has its own
    assert sum(isinstance(module, nn.PixelUnshuffle) for module in model.modules()) == 2
    assert model(torch.rand(3, 2, 12, 16)).shape == (3, 5)


def test_normalisation_of_liresnet_keeps_distances_by_default() -> None:
    first = small()[0]
    assert isinstance(first, Normalize)
    assert first.mean.flatten().tolist() == [0.5, 0.5]
    assert first.std.flatten().tolist() == [1.0, 1.0]
    first = small(mean=(0.25, 0.5), std=(0.5, 2.0))[0]
    assert isinstance(first, Normalize)
    assert first.mean.flatten().tolist() == [0.25, 0.5]
    assert first.std.flatten().tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match="one mean and one positive std"):
        small(mean=(0.5,), std=(1.0, 1.0))


def test_layers_of_liresnet_start_as_they_should() -> None:
    model = small()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            assert not module.bias.any()
            weight = module.weight.detach()
            if kinds_of_weights(module) == [Orthonormal]:
                gram = weight.flatten(1) @ weight.flatten(1).T
                rows, columns = weight.flatten(1).shape
                gram = gram if rows <= columns else weight.flatten(1).T @ weight.flatten(1)
                torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0.0, atol=1e-4)
    lengths = model[-1].weight.detach().norm(dim=1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(lengths, torch.ones(5), rtol=0.0, atol=1e-6)


def test_a_head_of_another_activation() -> None:
    model = small(head="softplus")
    assert isinstance(model[-2], nn.Softplus)
    assert sum(isinstance(module, nn.Softplus) for module in model.modules()) == 1
    with pytest.raises(ValueError, match="expected activation to be one of"):
        small(head="gelu")


@pytest.mark.parametrize(
    ("depth", "dense", "expected"),
    [
        # 3x3 from 4 * 2 channels; blocks; 1x1 from 4 * 4 to 8; blocks; dense; classes
        ((1, 2), (6,), (72 + 1) * 4 + 37 * 4 + 17 * 8 + 2 * 73 * 8 + (8 * 12 + 1) * 6 + 7 * 5),
        ((0,), (), (72 + 1) * 4 + (4 * 6 * 8 + 1) * 5),
        ((2,), (6, 4), (72 + 1) * 4 + 2 * 37 * 4 + (4 * 48 + 1) * 6 + 7 * 4 + 5 * 5),
    ],
)
def test_parameters_of_liresnet(
    depth: tuple[int, ...], dense: tuple[int, ...], expected: int
) -> None:
    model = small(depth=depth, dense=dense)
    assert count(model) == expected
    assert model(torch.rand(2, 2, 12, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block": "dense"}, "expected block to be one of residual, aol, .* got 'dense'"),
        ({"depth": ()}, r"does not fit: expected height and width divisible by 1 for 0 stages"),
        ({"depth": (1, 1, 1)}, r"input_shape \(2, 12, 16\) does not fit: .* divisible by 8"),
        ({"input_shape": (2, 16, 10)}, "divisible by 4 for 2 stages"),
        ({"activation": "swish"}, "expected activation to be one of"),
        ({"width": 3}, "even number of channels"),
        ({"dense": (5,)}, "even number of channels"),
    ],
    ids=str,
)
def test_liresnets_that_do_not_fit(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        small(**settings)(torch.rand(1, *settings.get("input_shape", (2, 12, 16))))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_of_a_liresnet_is_trained(block: str) -> None:
    model = small(block=block)
    model(torch.rand(6, 2, 12, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_liresnet_by_name() -> None:
    model = build("liresnet", width=4, depth=[1], dense=[], block="aol", input_shape=[1, 8, 8])
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
