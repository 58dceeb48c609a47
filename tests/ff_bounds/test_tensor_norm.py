from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import spectral_norm, tensor_norm_estimate

KINDS = ("normal", "rank one", "delta", "alternating", "one entry", "zero mean", "zero")


def make_kernel(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    taps = shape[3:]
    first = normal[(..., *[slice(1)] * len(taps))]
    kept = torch.zeros(shape, dtype=torch.float64)
    if kind == "normal":
        return normal
    if kind == "rank one":
        return first * normal[:, :1, :1]
    if kind == "zero mean":
        return normal - normal.mean(dim=tuple(range(3, len(shape))), keepdim=True)
    if kind == "delta":
        kept[(..., *(t // 2 for t in taps))] = 1.0
    elif kind == "alternating":
        for place in itertools.product(*map(range, taps)):
            kept[(..., *place)] = (-1.0) ** sum(place)
        normal = first
    elif kind == "one entry":
        kept.view(-1)[seed % kept.numel()] = 1.0
    return normal * kept


def least_unfolding(kernel: Tensor) -> float:
    """Smallest norm of all ways to write the axes of a kernel as rows and columns of a matrix."""
    axes = range(1, kernel.ndim)
    largest = 0.0
    for group in kernel:
        norms = []
        for count in range(1, kernel.ndim - 1):
            for rows in itertools.combinations(axes, count):
                order = [*rows, *(axis for axis in axes if axis not in rows)]
                matrix = group.permute([axis - 1 for axis in order]).flatten(count)
                matrix = matrix.reshape(math.prod(group.shape[axis - 1] for axis in rows), -1)
                norms.append(spectral_norm(matrix).item())
        largest = max(largest, min(norms))
    return largest


def grid_norm(kernel: Tensor, size: int) -> float:
    """Largest norm of the symbol on a grid of ``size`` points per axis: at most ``sigma*``."""
    axes = tuple(range(3, kernel.ndim))
    symbol = torch.fft.fftn(kernel, s=(size,) * len(axes), dim=axes)
    matrices = symbol.movedim((1, 2), (-2, -1)).reshape(-1, *kernel.shape[1:3])
    return float(torch.linalg.matrix_norm(matrices, ord=2).max())


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    dimension = draw(st.integers(1, 3))
    largest = {1: 9, 2: 4, 3: 3}[dimension]
    taps = draw(st.lists(st.integers(1, largest), min_size=dimension, max_size=dimension))
    return draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), *taps


@given(shape=shapes(), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_between_the_symbol_and_the_unfoldings(
    shape: tuple[int, ...], kind: str, seed: int
) -> None:
    kernel = make_kernel(kind, shape, seed)
    value = tensor_norm_estimate(kernel).item()
    assert value <= least_unfolding(kernel) * (1 + 1e-13)  # more would be more than rounding
    # The theorem is about the norm. The ascents find it for kernels this small.
    root = math.sqrt(math.prod(shape[3:]))
    size = {1: 128, 2: 24, 3: 8}[len(shape) - 3]
    assert root * value >= grid_norm(kernel, size) * (1 - 1e-7)


@given(
    vectors=st.tuples(*[st.lists(st.integers(-9, 9), min_size=1, max_size=5)] * 4),
    exponent=st.integers(-100, 100),
)
def test_products_of_vectors_of_integers(vectors: tuple[list[int], ...], exponent: int) -> None:
    kernel = torch.ones((), dtype=torch.float64)
    for vector in vectors:
        kernel = kernel[..., None] * torch.tensor(vector, dtype=torch.float64)
    value = tensor_norm_estimate(kernel[None] * 2.0**exponent).item() / 2.0**exponent
    squared = math.prod(sum(entry * entry for entry in vector) for vector in vectors)
    assert value**2 == pytest.approx(squared, rel=1e-12)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_diagonal_tensors(axes: int) -> None:
    # sum_k l_k e_k x ... x e_k with orthonormal e_k: the norm is the largest l_k.
    kernel = torch.zeros([1] + [5] * (2 + axes), dtype=torch.float64)
    for k, entry in enumerate([2.0, -4.0, 1.0, 3.5, 3.9]):
        kernel[(0, *[k] * (2 + axes))] = entry
    assert tensor_norm_estimate(kernel).item() == pytest.approx(4.0, rel=1e-12)


def test_complex_vectors_find_more_than_real_ones() -> None:
    # Re (a x a x a) with a = (1, i): 1 is the most that real vectors give, sqrt(2) what a* gives.
    phases = torch.tensor([1.0, 1j], dtype=torch.complex128)
    kernel = torch.einsum("o,i,a->oia", phases, phases, phases).real[None]
    assert tensor_norm_estimate(kernel).item() == pytest.approx(math.sqrt(2.0), rel=1e-9)


def test_one_tap_gives_the_matrix_and_one_channel_that_of_the_taps() -> None:
    matrix = make_kernel("normal", (1, 6, 4, 1), 0)
    exact = spectral_norm(matrix[0, :, :, 0]).item()
    assert tensor_norm_estimate(matrix).item() == pytest.approx(exact, rel=1e-9)
    assert tensor_norm_estimate(matrix[..., None]).item() == pytest.approx(exact, rel=1e-9)
    taps = matrix.reshape(1, 1, 1, 6, 4)
    assert tensor_norm_estimate(taps).item() == pytest.approx(exact, rel=1e-9)
    flat = matrix.reshape(1, 1, 1, 24)
    assert tensor_norm_estimate(flat).item() == pytest.approx(flat.norm().item(), rel=1e-12)


def test_the_largest_over_the_groups() -> None:
    kernel = make_kernel("normal", (4, 3, 5, 3, 3), 0)
    alone = [tensor_norm_estimate(kernel[g : g + 1]).item() for g in range(4)]
    kernel.requires_grad_()
    value = tensor_norm_estimate(kernel)
    assert value.item() == pytest.approx(max(alone), rel=1e-9)
    (gradient,) = torch.autograd.grad(value, kernel)
    used = gradient.flatten(1).any(dim=1)
    assert used.tolist() == [g == alone.index(max(alone)) for g in range(4)]


def test_more_starts_find_more() -> None:
    kernel = make_kernel("normal", (1, 24, 24, 3, 3), 2)
    values = [tensor_norm_estimate(kernel, starts=n).item() for n in (0, 16, 200)]
    assert values[1] >= 0.95 * values[2]
    assert values[2] >= values[0]


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("kind", ["normal", "rank one", "one entry"])
def test_scales(scale: float, kind: str) -> None:
    kernel = make_kernel(kind, (2, 3, 4, 3, 3), 0)
    plain = tensor_norm_estimate(kernel).item()
    scaled = (kernel * scale).requires_grad_()
    value = tensor_norm_estimate(scaled)
    assert value.item() == pytest.approx(plain * scale, rel=1e-9)
    (gradient,) = torch.autograd.grad(value, scaled)
    assert (gradient * scaled).sum().item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_weights_of_any_dtype(dtype: torch.dtype) -> None:
    kernel = make_kernel("normal", (1, 4, 4, 3, 3), 0).to(dtype).requires_grad_()
    value = tensor_norm_estimate(kernel)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(tensor_norm_estimate(kernel.detach().double()).item())
    value.backward()
    assert kernel.grad is not None
    assert kernel.grad.dtype == dtype


def test_zero_kernel() -> None:
    kernel = torch.zeros(2, 3, 3, 3, 3, requires_grad=True)
    value = tensor_norm_estimate(kernel)
    (gradient,) = torch.autograd.grad(value, kernel)
    assert value == 0.0
    assert not gradient.any()  # zero, not NaN


@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 2), (1, 2, 4, 3), (1, 2, 2, 2, 2, 2)])
def test_gradient_is_the_derivative(shape: tuple[int, ...]) -> None:
    kernel = make_kernel("normal", shape, 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda k: tensor_norm_estimate(k, iterations=2000), (kernel,), atol=1e-4
    )


@given(shape=shapes(), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_gradient_obeys_eulers_identity(shape: tuple[int, ...], kind: str, seed: int) -> None:
    kernel = make_kernel(kind, shape, seed).requires_grad_()
    value = tensor_norm_estimate(kernel, starts=2, iterations=30)
    (gradient,) = torch.autograd.grad(value, kernel)
    assert (gradient * kernel).sum().item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize(
    "kernel",
    [
        torch.full((1, 2, 2, 3, 3), math.nan),
        torch.full((1, 2, 2, 3), math.inf),
        torch.ones(1, 2, 2, 3, dtype=torch.int64),
        torch.ones(1, 2, 2),
        torch.ones(1, 2, 2, 3, 3, 3, 3),
        torch.ones(1, 0, 2, 3),
    ],
)
def test_refused_kernels(kernel: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, got"):
        tensor_norm_estimate(kernel)


def test_refused_counts() -> None:
    with pytest.raises(ValueError, match=r"^expected .*, got -1, 5"):
        tensor_norm_estimate(torch.ones(1, 1, 1, 3), starts=-1, iterations=5)
    with pytest.raises(ValueError, match=r"^expected .*, got 2, 0"):
        tensor_norm_estimate(torch.ones(1, 1, 1, 3), starts=2, iterations=0)
