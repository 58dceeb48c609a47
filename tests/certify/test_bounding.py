"""Neighbours bounded together: never below any diagonal of slopes, never above the product."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from certify import CertifiedModel
from certify.bounding import Bounding, in_order, merged
from certify.composition import compose
from certify.graph import LipschitzGraph
from certify.joining import root_of_squares
from certify.norms import proven_norms
from certify.operators import Convolution, Matrix, Operator
from certify.signal import Flatten, Input, Signal, total
from ff_bounds import conv_matrix, spectral_norm
from models import Normalize

NOISE = 1.0 + 1e-12


def source(*shape: int) -> Signal:
    return Signal((5, *shape), Input(torch.device("cpu")), name="x")


def bound(output: Signal, *, join: bool, method: str = "supremum") -> float:
    bounding = Bounding(output, join=join)
    norms = proven_norms(bounding.operators(), method)
    return bounding.evaluate(norms)[output].item()


def random_convolution(
    outputs: int, inputs: int, size: tuple[int, int], draw: torch.Generator
) -> Convolution:
    """Any zero-padded convolution that fits on an input of this size."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    groups = pick(1, 2)
    taps = (pick(1, 3), pick(1, 3))
    dilation = (pick(1, 2), pick(1, 2))
    stride = (pick(1, 2), pick(1, 2))
    padding: tuple[int, int] | str = (pick(0, 2), pick(0, 2))
    if pick(0, 3) == 0:
        padding, stride = "same", (1, 1)
    weight = torch.randn(outputs, inputs // groups, *taps, generator=draw, dtype=torch.float64)
    return Convolution(
        weight, stride=stride, padding=padding, dilation=dilation, groups=groups, input_size=size
    )


def dense(operator: Operator, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Dense matrix of a convolution, and the size of its output."""
    assert isinstance(operator, Convolution)
    x = torch.zeros(1, operator.inputs, *size, dtype=torch.float64)
    y = nn.functional.conv2d(
        x,
        operator.effective_weight(),
        stride=operator.stride,  # type: ignore[arg-type]
        padding=operator.padding,  # type: ignore[arg-type]
        dilation=operator.dilation,  # type: ignore[arg-type]
        groups=operator.groups,
    )
    matrix = conv_matrix(
        operator.effective_weight(),
        size,
        stride=operator.stride,
        padding=operator.padding,
        dilation=operator.dilation,
        groups=operator.groups,
    )
    return matrix, (y.shape[2], y.shape[3])


def worst_slopes(second: Tensor, first: Tensor, skip: Tensor, low: float, high: float) -> float:
    """A large norm of ``skip + second D first`` with slopes at either end."""
    largest = 0.0
    for start in range(3):
        generator = torch.Generator().manual_seed(start)
        slopes = torch.where(torch.rand(first.shape[0], generator=generator) > 0.5, high, low)
        slopes = slopes.to(torch.float64)
        for _ in range(6):
            u, s, v = torch.linalg.svd(skip + second * slopes @ first)
            largest = max(largest, s[0].item())
            uphill = (second.T @ u[:, 0]) * (first @ v[0])
            slopes = torch.where(uphill > 0, high, low).to(torch.float64)
    return largest


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    slopes=st.sampled_from([(0.0, 1.0), (0.1, 1.0), (-0.13, 1.13), (1.0, 1.0), (0.5, 0.7)]),
    skip=st.sampled_from(["none", "identity", "conv"]),
)
def test_convolutions_with_slopes_between_them(
    seed: int, size: tuple[int, int], slopes: tuple[float, float], skip: str
) -> None:
    draw = torch.Generator().manual_seed(seed)
    first = random_convolution(2, 2, size, draw)
    try:
        one, middle = dense(first, size)
        second = random_convolution(2, 2, middle, draw)
        other, end = dense(second, middle)
    except (RuntimeError, ValueError):
        assume(False)
    x = source(2, *size)
    branch = x.through(first).elementwise(*slopes).through(second)
    matrix = torch.zeros(other.shape[0], one.shape[1], dtype=torch.float64)
    output = branch
    if skip == "identity":
        assume(end == size)
        matrix = torch.eye(matrix.shape[0], dtype=torch.float64)
        output = total([branch, x])
    elif skip == "conv":
        shortcut = random_convolution(2, 2, size, draw)
        try:
            matrix, place = dense(shortcut, size)
        except (RuntimeError, ValueError):
            assume(False)
        assume(place == end)
        output = total([x.through(shortcut), branch])
    joint, plain = bound(output, join=True), bound(output, join=False)
    assert worst_slopes(other, one, matrix, *slopes) <= joint * NOISE
    assert joint <= plain


def random_matrix(rows: int, columns: int, seed: int) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    return Matrix(torch.randn(rows, columns, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("skip", ["none", "identity", "matrix"])
@pytest.mark.parametrize("seed", range(10))
def test_matrices_with_slopes_between_them(seed: int, skip: str) -> None:
    first, second = random_matrix(6, 4, seed), random_matrix(4, 6, seed + 50)
    x = source(4)
    branch = x.through(first).elementwise(0.0, 1.0).through(second)
    shortcut = {
        "none": torch.zeros(4, 4, dtype=torch.float64),
        "identity": torch.eye(4, dtype=torch.float64),
        "matrix": random_matrix(4, 4, seed + 99).weight,
    }[skip]
    output = branch
    if skip == "identity":
        output = total([x, branch])
    if skip == "matrix":
        output = total([branch, x.through(Matrix(shortcut))])
    found = bound(output, join=True)
    assert worst_slopes(second.weight, first.weight, shortcut, 0.0, 1.0) <= found * NOISE
    middle = spectral_norm(shortcut + second.weight @ first.weight / 2).item()
    rest = spectral_norm(first.weight).item() * spectral_norm(second.weight).item() / 2
    assert found == pytest.approx(middle + rest, rel=1e-6)


def test_a_branch_that_opposes_its_skip() -> None:
    """``x - relu(x)`` has slopes in [0, 1]: the joint bound is 1, the sum of norms 2."""
    x = source(4)
    eye = Matrix(torch.eye(4, dtype=torch.float64))
    minus = Matrix(-torch.eye(4, dtype=torch.float64))
    output = total([x, x.through(eye).elementwise(0.0, 1.0).through(minus)])
    assert bound(output, join=True) == pytest.approx(1.0)
    assert bound(output, join=False) == pytest.approx(2.0)


def test_bottlenecks_are_expanded_down_to_their_skip() -> None:
    """Two functions between three matrices: all combinations of slopes stay below."""
    torch.manual_seed(0)
    matrices = [random_matrix(3, 4, 1), random_matrix(3, 3, 2), random_matrix(4, 3, 3)]
    x = source(4)
    branch = x
    for matrix in matrices[:2]:
        branch = branch.through(matrix).elementwise(0.0, 1.0)
    output = total([branch.through(matrices[2]), x])
    found = bound(output, join=True)
    assert found < bound(output, join=False)
    for code in range(64):
        bits = torch.tensor([(code >> k) & 1 for k in range(6)], dtype=torch.float64)
        product = (matrices[2].weight * bits[:3]) @ (matrices[1].weight * bits[3:])
        jacobian = torch.eye(4, dtype=torch.float64) + product @ matrices[0].weight
        assert spectral_norm(jacobian).item() <= found * NOISE


def test_a_branch_that_is_added_twice() -> None:
    """Both skips and the branch count: ``x + x + relu(x)`` is 3."""
    x = source(3)
    eye = Matrix(torch.eye(3, dtype=torch.float64))
    output = total([x, total([x.through(eye).elementwise(0.0, 1.0).through(eye), x])])
    assert 3.0 <= bound(output, join=True) <= 3.0 * (1 + 1e-9)


def test_composition_refuses_what_it_cannot_represent() -> None:
    conv = Convolution(
        torch.ones(1, 1, 3, 3).double(),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        padding_mode="reflect",
        input_size=(4, 4),
    )
    plain = Convolution(
        torch.ones(1, 1, 3, 3).double(),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        input_size=(4, 4),
    )
    adjoint = Convolution(
        torch.ones(1, 1, 3, 3).double(),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        adjoint=True,
    )
    assert compose(plain, plain) is not None
    for other in (conv, adjoint):
        assert compose(plain, other) is None
        assert compose(other, plain) is None
    assert compose(Matrix(torch.ones(2, 3).double()), plain) is None
    huge = Matrix(1e200 * torch.eye(2, dtype=torch.float64))
    assert compose(huge, huge) is None


def test_a_layer_read_beyond_its_outputs() -> None:
    """The first layer has no output where the second pads, though the lattice has: see P.

    One pixel, taps that only meet padding: the composition on the lattice is larger than the true
    map, and smaller for other weights; the joint bound must not rely on either.
    """
    for signs in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0)):
        first = Convolution(
            torch.tensor([1.0, 0.0, signs[0]]).double().reshape(1, 1, 1, 3),
            stride=(1, 1),
            padding=(0, 1),
            dilation=(1, 1),
            input_size=(1, 2),
        )
        second = Convolution(
            torch.tensor([1.0, signs[1], 1.0]).double().reshape(1, 1, 1, 3),
            stride=(1, 1),
            padding=(0, 1),
            dilation=(1, 1),
            input_size=(1, 2),
        )
        output = source(1, 1, 2).through(first).through(second)
        exact = spectral_norm(dense(second, (1, 2))[0] @ dense(first, (1, 2))[0]).item()
        assert exact <= bound(output, join=True) * NOISE


def test_long_networks_do_not_recurse() -> None:
    x = source(2)
    for _ in range(5000):
        x = x.elementwise(0.0, 1.0)
    assert len(in_order(x)) == 5001
    assert bound(x, join=True) == 1.0


def test_merging_is_what_normalisation_does() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU())
    model.double().eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 0.0, 2.0]))
        model[2].running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    output = LipschitzGraph(model, (2, 3, 3)).walk()
    layers = Bounding(merged(output)).layers()
    assert len(layers) == 1
    scale = torch.tensor([0.5, 0.0, 4.0]).double()
    exact = spectral_norm(scale[:, None] * model[0].weight[:, :, 0, 0]).item()
    assert bound(merged(output), join=False) == pytest.approx(exact, rel=1e-3)
    assert bound(output, join=False) > 1.5 * exact


@pytest.mark.parametrize("values", [[3.0, 4.0], [0.0, 0.0], [1e200, 1e200], [1e-200, 1e-200]])
def test_root_of_squares(values: list[float]) -> None:
    found = root_of_squares([torch.tensor(value, dtype=torch.float64) for value in values]).item()
    assert math.hypot(*values) <= found <= math.hypot(*values) * (1 + 1e-13) + 1e-290


def test_root_of_an_infinite_square() -> None:
    pair = [torch.tensor(value, dtype=torch.float64) for value in (math.inf, 1.0)]
    assert root_of_squares(pair).item() == math.inf


@pytest.mark.parametrize("flatten_first", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_matrix_after_a_convolution(seed: int, flatten_first: bool) -> None:
    """Composed exactly, for the size of the input; slopes in either order with the flattening."""
    draw = torch.Generator().manual_seed(seed)
    first = random_convolution(2, 2, (4, 5), draw)
    one, (height, width) = dense(first, (4, 5))
    matrix = random_matrix(3, 2 * height * width, seed)
    layers: list[nn.Module] = [nn.ReLU(), nn.Flatten()]
    found = source(2, 4, 5).through(first)
    found = Signal((5, 2, height, width), found.step, found.parents)
    for layer in reversed(layers) if flatten_first else layers:
        if isinstance(layer, nn.ReLU):
            found = found.elementwise(0.0, 1.0)
        else:
            found = Signal((5, 2 * height * width), Flatten(), (found,))
    output = found.through(matrix)
    joint, plain = bound(output, join=True), bound(output, join=False)
    assert joint <= plain
    zero = torch.zeros(3, 40, dtype=torch.float64)
    assert worst_slopes(matrix.weight, one, zero, 0.0, 1.0) <= joint * NOISE
    if first.padding != "same":
        product = spectral_norm(matrix.weight @ one).item()
        norms = [proven_norms([o], "supremum")(o).item() for o in (matrix, first)]
        assert joint == pytest.approx(min(product / 2 + norms[0] * norms[1] / 2, plain), rel=1e-6)


def test_a_matrix_at_each_position_is_not_one_on_all_entries() -> None:
    """Linear on the last axis of images is not composed with the convolution before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(3, 3), nn.Flatten()).double()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    output = LipschitzGraph(model, (1, 3, 3)).walk()
    exact = 2.0 * spectral_norm(model[1].weight).item()
    assert exact <= bound(output, join=True) <= exact * (1 + 1e-6)


def difference() -> nn.Module:
    conv = nn.Conv1d(1, 1, 2, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1.0, -1.0]]]))
    return conv


def opposed() -> nn.Module:
    """Two matrices of norm 3 whose product has norm 1."""
    first, second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1 / 3]]))
        second.weight.copy_(torch.tensor([[1 / 3, 0.0], [0.0, 3.0]]))
    return nn.Sequential(first, second)


def normalised() -> nn.Module:
    conv = nn.Conv2d(2, 1, 1, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([0.1, 3.0]).reshape(1, 2, 1, 1))
    return nn.Sequential(Normalize([0.0, 0.0], [0.1, 3.0]), conv)


@pytest.mark.parametrize(
    ("make", "shape", "exact"),
    [
        (lambda: nn.Sequential(difference(), nn.AvgPool1d(2, 1)), (1, 40), 1.0),
        (lambda: nn.Sequential(nn.AvgPool1d(2, 1), difference()), (1, 40), 1.0),
        (lambda: nn.Sequential(difference(), difference(), nn.AvgPool1d(2, 1)), (1, 40), 1.54),
        (opposed, (2,), 1.0),
        (normalised, (2, 3, 3), 2.0**0.5),
        (
            lambda: nn.Sequential(nn.CircularPad1d(1), nn.Conv1d(1, 1, 3, bias=False)),
            (1, 8),
            None,
        ),
    ],
)
def test_pairs_that_are_one_map(
    make: Callable[[], nn.Module], shape: tuple[int, ...], exact: float | None
) -> None:
    """Convolution and pooling, matrices, normalisation, padding: not the product of the norms."""
    torch.manual_seed(0)
    model = make().double().eval()
    output = merged(LipschitzGraph(model, shape).walk())
    found = bound(output, join=True)
    x = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    matrix = (model(x) - model(torch.zeros_like(x))).flatten(1)
    true = spectral_norm(matrix).item()
    assert true <= found * NOISE
    assert found <= 1.02 * true
    if exact is not None:
        assert found == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("taps", [8, 16, 24])
def test_a_padded_skip_beside_a_branch_of_an_unpadded_layer(taps: int, activation: bool) -> None:
    """The middle of the branch is bounded on the lattice: its restriction is smaller."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = {
                "first": (torch.ones(taps), 0),
                "second": (torch.tensor([1.0, -1.0]), 0),
                "third": (torch.ones(2), 1),
                "skip": (torch.tensor([-0.5, 0.0, 0.5]), 1),
            }
            for name, (row, padding) in rows.items():
                conv = nn.Conv1d(1, 1, len(row), padding=padding).double()
                with torch.no_grad():
                    conv.weight.copy_(row)
                    conv.bias.fill_(100.0)
                self.add_module(name, conv)

        def forward(self, x: Tensor) -> Tensor:
            z = self.first(x)
            y = self.second(z)
            y = self.third(torch.relu(y) if activation else y)
            return torch.flatten(self.skip(z) + y, 1)

    model = Model()
    size = taps + 12
    x = torch.randn(1, 1, size, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(model, x).flatten(2)[0]
    true = spectral_norm(matrix.reshape(matrix.shape[0], -1)).item()
    found = bound(merged(LipschitzGraph(model, (1, size)).walk()), join=True)
    assert true <= found * NOISE


def test_zeros_between_convolutions_are_not_composed_away() -> None:
    """On the lattice the second undoes the first; at the border it reads zeros in their place."""
    first, second = nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(2, 1, 3, padding=1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]]))
        second.weight.copy_(torch.tensor([[[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]]))
    model = nn.Sequential(first, second, nn.Flatten())
    certified = CertifiedModel(model, (1, 4))
    at_border, zero = torch.eye(4)[:1, None], torch.zeros(1, 1, 4)
    assert (certified.logits(at_border) - certified.logits(zero)).norm().item() == 1.0
    assert certified.lipschitz().item() >= 1.0
