"""Rules of linear layers, convolutions and normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from certify import CertifiedModel, UnsupportedModel
from models import Normalize
from tests.certify.rules.harness import NOISE, Apply, Case, certify, check, gain, on, trained

ONES = torch.ones(3, dtype=torch.float64)
MATRIX = torch.tensor([[0.5, 2.0, 1.0], [-3.0, 1.0, 0.0]], dtype=torch.float64)
NINE = torch.ones(1, 1, 3, 3, dtype=torch.float64)
KERNELS = {
    axes: torch.linspace(-1, 2, 6 * 2**axes, dtype=torch.float64).reshape(3, 2, *[2] * axes)
    for axes in (1, 2, 3)
}


def joined(equation: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """With a constant of the sizes that an equation asks for; ``d`` and ``t`` are new axes."""
    own, other = equation.partition("->")[0].split(",")
    sizes = dict(zip(own[1:], shape, strict=True)) | {"d": 4, "t": 2}
    wanted = [sizes[name] for name in other]
    constant = torch.linspace(-1.0, 2.0, math.prod(wanted), dtype=torch.float64).reshape(wanted)

    def function(x: Tensor) -> Tensor:
        found: Tensor = torch.einsum(equation, x, constant)
        return found[:, None] if equation.endswith("->n") else found

    return function


CASES = [
    Case("linear", (nn.Linear,), lambda: nn.Linear(5, 4), (5,)),
    Case("linear at each position", (nn.Linear,), lambda: nn.Linear(3, 4), (2, 3)),
    Case("conv", (nn.Conv2d,), lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5), 3.0),
    Case("conv 1x1", (nn.Conv2d,), lambda: nn.Conv2d(3, 4, 1), (3, 2, 2)),
    Case("strided conv", (nn.Conv2d,), lambda: nn.Conv2d(2, 3, 2, stride=2), (2, 4, 6)),
    Case("conv same", (nn.Conv2d,), lambda: nn.Conv2d(1, 2, (1, 3), padding="same"), (1, 5, 4), 3),
    Case(
        "grouped conv",
        (nn.Conv2d,),
        lambda: nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2),
        (4, 6, 6),
        4.0,
    ),
    Case("norm 1d", (nn.BatchNorm1d,), lambda: trained(nn.BatchNorm1d(4)), (4,)),
    Case("norm 1d of series", (nn.BatchNorm1d,), lambda: trained(nn.BatchNorm1d(3)), (3, 4)),
    Case(
        "norm after linear",
        (nn.Linear, nn.BatchNorm1d),
        lambda: nn.Sequential(nn.Linear(5, 4), trained(nn.BatchNorm1d(4))),
        (5,),
    ),
    Case(
        "norm over positions after linear",  # the channels are not the rows: not merged
        (nn.Linear, nn.BatchNorm1d),
        lambda: nn.Sequential(nn.Linear(3, 4), trained(nn.BatchNorm1d(2))),
        (2, 3),
        2.0,
    ),
    Case(
        "two norms after linear",
        (nn.Linear, nn.BatchNorm1d),
        lambda: nn.Sequential(
            nn.Linear(5, 4), trained(nn.BatchNorm1d(4)), trained(nn.BatchNorm1d(4))
        ),
        (5,),
        20.0,
    ),
    Case("norm 2d", (nn.BatchNorm2d,), lambda: trained(nn.BatchNorm2d(3)), (3, 2, 2)),
    Case(
        "norm without factors",
        (nn.BatchNorm2d,),
        lambda: trained(nn.BatchNorm2d(3, affine=False)),
        (3, 2, 2),
    ),
    Case(
        "norm after conv",
        (nn.Conv2d, nn.BatchNorm2d),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), trained(nn.BatchNorm2d(3))),
        (2, 4, 4),
    ),
    Case(
        "norm after average pooling",
        (nn.AvgPool2d, nn.BatchNorm2d),
        lambda: nn.Sequential(nn.AvgPool2d(2), trained(nn.BatchNorm2d(2))),
        (2, 4, 4),
    ),
    Case("normalise", (Normalize,), lambda: Normalize([0.1, 0.2], [0.5, 0.2]), (2, 3, 3)),
    Case("normalise all", (Normalize,), lambda: Normalize([0.1], [0.25]), (3, 2, 2)),
    *[
        Case(f"einsum {equation}", (torch.einsum,), on(joined(equation, shape)), shape)
        for equation, shape in (
            ("nc,dc->nd", (3,)),
            ("nsc,dc->nsd", (2, 3)),
            ("nsc,ts->ntc", (3, 2)),
            ("nhc,hdc->nhd", (2, 3)),
            ("nc,c->n", (3,)),
            ("nc,c->nc", (3,)),
            ("nc,d->ncd", (3,)),
            ("nsc,dsc->nd", (2, 3)),
        )
    ],
    Case(
        "einsum, constant first",
        (torch.einsum,),
        on(lambda x: torch.einsum("dc, nc -> nd", MATRIX, x)),
        (3,),
    ),
    Case("F.linear", (F.linear,), on(lambda x: F.linear(x, MATRIX)), (3,)),
    Case("conv 1d", (nn.Conv1d,), lambda: nn.Conv1d(2, 3, 3, 2, 1), (2, 7), 1.5),
    Case("conv 3d", (nn.Conv3d,), lambda: nn.Conv3d(1, 2, 2, 2), (1, 4, 4, 4)),
    Case("F.conv1d", (F.conv1d,), on(lambda x: F.conv1d(x, KERNELS[1], stride=2)), (2, 4)),
    Case("F.conv2d", (F.conv2d,), on(lambda x: F.conv2d(x, KERNELS[2], stride=2)), (2, 4, 4)),
    Case(
        "conv behind circular padding",  # one circulant map, not two factors
        (F.conv2d, F.pad),
        on(lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), NINE)),
        (1, 4, 4),
        1.01,
    ),
    Case("F.conv3d", (F.conv3d,), on(lambda x: F.conv3d(x, KERNELS[3], stride=2)), (2, 4, 4, 2)),
    *[
        Case(
            kind.__name__,
            (kind,),
            lambda kind=kind: kind(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
            (4, *(3,) * axes),
            3.0,
        )
        for axes, kind in enumerate(
            (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), start=1
        )
    ],
    *[
        Case(
            f"F.{function.__name__}",
            (function,),
            on(lambda x, function=function, axes=axes: function(x, KERNELS[axes], stride=2)),
            (3, *(2,) * axes),
        )
        for axes, function in enumerate(
            (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), start=1
        )
    ],
    Case("norm 3d", (nn.BatchNorm3d,), lambda: trained(nn.BatchNorm3d(2)), (2, 2, 1, 2)),
    Case(
        "norm after transposed conv",
        (nn.ConvTranspose2d, nn.BatchNorm2d),
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, 2), trained(nn.BatchNorm2d(3))),
        (2, 2, 2),
    ),
    Case(
        "normalise before grouped conv",
        (Normalize, nn.Conv2d),
        lambda: nn.Sequential(
            Normalize([0.1, 0.2, 0.3, 0.4], [0.5, 0.2, 0.1, 0.3]),
            nn.Conv2d(4, 2, 2, 2, groups=2),
        ),
        (4, 4, 4),
    ),
    Case(
        "normalise before transposed conv",
        (Normalize, nn.ConvTranspose2d),
        lambda: nn.Sequential(
            Normalize([0.1, 0.2], [0.5, 0.2]), nn.ConvTranspose2d(2, 2, 2, 2, groups=2)
        ),
        (2, 2, 2),
    ),
    Case(
        "F.batch_norm",
        (F.batch_norm,),
        on(lambda x: F.batch_norm(x, ONES, 0.3 * ONES, -2.0 * ONES)),
        (3, 2),
    ),
    Case(
        "linear after linear",  # one matrix
        (nn.Linear,),
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(6, 2)),
        (6,),
    ),
    Case(
        "conv after conv without padding",
        (nn.Conv2d,),
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2, 2), nn.Conv2d(3, 2, 2, 2)),
        (1, 4, 4),
        1.8,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e30])
def test_bound_grows_with_the_weights(scale: float) -> None:
    torch.manual_seed(0)
    norm = trained(nn.BatchNorm2d(2))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.Flatten(), nn.Linear(8, 3)).double()
    _, bound = certify(model, (1, 4, 4))
    with torch.no_grad():
        model[0].weight *= scale
        model[3].weight *= scale
    assert certify(model, (1, 4, 4))[1] == pytest.approx(bound * scale**2, rel=1e-9)


small = st.integers(1, 3)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch, of even kernels
@given(
    channels=st.tuples(small, small),
    groups=st.integers(1, 2),
    kernel=st.tuples(small, small),
    stride=st.tuples(small, small),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])
    ),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolution_with_any_arguments(
    channels: tuple[int, int],
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int] | str,
    mode: str,
    size: tuple[int, int],
    norm: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    c_in, c_out = channels[0] * groups, channels[1] * groups
    if padding == "same":
        stride = (1, 1)
    conv = nn.Conv2d(
        c_in,
        c_out,
        kernel,
        stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
    )
    layer = nn.Sequential(conv, trained(nn.BatchNorm2d(c_out))) if norm else conv
    try:
        layer.eval()(torch.zeros(1, c_in, *size))
    except RuntimeError:
        assume(False)
    model, bound = certify(layer, (c_in, *size))
    exact = gain(model, torch.zeros(1, c_in, *size, dtype=torch.float64))
    assert exact <= bound * NOISE
    # The worst the method can do: sqrt(h w) <= 3, and pixels repeated at most 7 times an axis.
    # (Not a multiple of `exact`, which is zero where a strided kernel meets nothing but padding.)
    largest = (
        (layer[1].weight / (layer[1].running_var + 1e-5).sqrt()).abs().max().item() if norm else 1
    )
    assert bound <= 21.0 * conv.weight.norm().item() * largest * (1 + 1e-6)


def test_padding_changed_after_construction_is_refused() -> None:
    """Torch keeps the padded amounts of the other modes from when the layer was made."""
    conv = nn.Conv2d(1, 1, 3, padding=3, padding_mode="replicate")
    conv.padding = (0, 0)
    with pytest.raises(UnsupportedModel, match="padding was changed"):
        certify(conv, (1, 4, 4))
    conv.padding = (3, 3)
    certify(conv, (1, 4, 4))


def test_normalize_must_not_make_channels() -> None:
    layer = Normalize([0.0], [1.0])
    layer.mean = torch.zeros(3, 1, 1)
    with pytest.raises(UnsupportedModel, match="channels to normalise"):
        certify(layer, (1, 2, 2))


def test_norms_after_each_other_with_factors_that_underflow() -> None:
    first, second = nn.BatchNorm1d(1, affine=True), nn.BatchNorm1d(1, affine=True)
    model = nn.Sequential(first, second).double().eval()
    with torch.no_grad():
        first.weight.fill_(1e-310)
        first.running_var.fill_(1e40)
        second.weight.fill_(1e29)
    assert certify(model, (1,))[1] >= 1e-310 / 1e20 * 1e29 * (1 - 1e-4)


def test_matrices_that_cancel_and_whose_squares_underflow() -> None:
    """The rounding of a product of weights of 1e-200 counts when 1e200 follows."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a = torch.rand(2, 1, generator=generator, dtype=torch.float64)
        b = torch.stack([a[1, 0], -a[0, 0]]).reshape(1, 2) * (1e-200 / 3)
        model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1), nn.Linear(1, 1)).double()
        with torch.no_grad():
            model[0].weight.copy_(a)
            model[1].weight.copy_(b)
            model[2].weight.fill_(1e200)
        exact = sum(
            Fraction(x) * Fraction(y) for x, y in zip(b[0].tolist(), a[:, 0].tolist(), strict=True)
        )
        for tighten in ("none", "merge", "join"):
            bound = CertifiedModel(model, (1,), tighten=tighten).lipschitz().item()
            assert Fraction(bound) >= abs(exact) * Fraction(1e200)


@pytest.mark.parametrize("tighten", ["none", "merge", "join", "balance"])
def test_weights_that_overflow_together_have_no_bound(tighten: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
            for layer in (self.a, self.b):
                nn.init.constant_(layer.weight, 1e308)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.a(x) + self.b(x)
            return result

    assert CertifiedModel(Sum(), (2,), tighten=tighten).lipschitz().item() == math.inf
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double().eval()
    with torch.no_grad():
        normed[0].weight.fill_(1e300)
        normed[1].weight.fill_(1e20)
    assert CertifiedModel(normed, (2,), tighten=tighten).lipschitz().item() == math.inf


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: torch.einsum("nc,nc->nc", x, x), "depend on the input"),
        (lambda x: torch.einsum("nc,dc->dn", x, torch.ones(5, 3).to(x)), "batch axis|batch"),
        (lambda x: torch.einsum("nc,d->nd", x, torch.ones(2).to(x)), "one tensor alone"),
        (lambda x: torch.einsum("nc,cd->nc", x, torch.ones(3, 2).to(x)), "one tensor alone"),
        (lambda x: torch.einsum("nc,cc->nc", x, torch.ones(3, 3).to(x)), "diagonal"),
        (lambda x: torch.einsum("...c,dc->...d", x, torch.ones(2, 3).to(x)), "dots"),
        (lambda x: torch.einsum("nc,dc", x, torch.ones(2, 3).to(x)), "without a result|batch"),
    ],
)
def test_einsum_refuses(function: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        CertifiedModel(Apply(function), (3,))
