"""Rules of pooling, reductions and interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from certify import UnsupportedModel
from certify.rules.resampling import axis_norm
from tests.certify.rules.harness import NOISE, Apply, Case, certify, check, gain, on

SHAPES = ((2, 5), (1, 4, 5), (1, 3, 3, 4))
EXACT = 1.0 + 1e-8


def of_axes(names: str, *arguments: Any, factor: float = EXACT, **options: Any) -> list[Case]:
    """Cases of the module and of the function with one to three spatial axes.

    Args:
        names: of the module and of the function, without the number of axes.
        *arguments: of both.
        factor: of `Case`.
        **options: of both.
    """
    module, function = names.split()
    cases = []
    for axes, shape in enumerate(SHAPES, 1):
        kind, call = getattr(nn, f"{module}{axes}d"), getattr(F, f"{function}{axes}d")

        def make(kind: Any = kind) -> nn.Module:
            built: nn.Module = kind(*arguments, **options)
            return built

        def apply(x: Tensor, call: Any = call) -> Tensor:
            result: Tensor = call(x, *arguments, **options)
            return result

        label = f"{arguments} {options}"
        cases.append(Case(f"{module}{axes}d {label}", (kind,), make, shape, factor))
        cases.append(Case(f"{function}{axes}d {label}", (call,), on(apply), shape, factor))
    return cases


def functions(
    shape: tuple[int, ...], factor: float = EXACT, **of: tuple[object, Callable[[Any], Any]]
) -> list[Case]:
    return [Case(name, (key,), on(function), shape, factor) for name, (key, function) in of.items()]


CASES = [
    *of_axes("MaxPool max_pool", 2),
    *of_axes("MaxPool max_pool", 3, 2, 1, factor=3.0),
    *of_axes("MaxPool max_pool", 2, 1, ceil_mode=True),
    *of_axes("AvgPool avg_pool", 2),
    *of_axes("AvgPool avg_pool", 2, 1, factor=1.5),
    *of_axes("AvgPool avg_pool", 3, 2, 1, factor=2.5),
    *of_axes("AvgPool avg_pool", 2, ceil_mode=True),
    *of_axes("AvgPool avg_pool", 3, 2, 1, count_include_pad=False),
    *of_axes("AdaptiveAvgPool adaptive_avg_pool", 1),
    *of_axes("AdaptiveAvgPool adaptive_avg_pool", 3),
    *of_axes("AdaptiveMaxPool adaptive_max_pool", 1),
    *of_axes("AdaptiveMaxPool adaptive_max_pool", 3),
    *of_axes("LPPool lp_pool", 1, 2, ceil_mode=True),
    *of_axes("LPPool lp_pool", 2, 2, factor=1.01),
    *of_axes("LPPool lp_pool", 2.0, 3, 2, ceil_mode=True, factor=2.5),
    *of_axes("LPPool lp_pool", 4, 2, 1, factor=1.01),
    *functions(
        (2, 4),
        max_pool1d=(torch.max_pool1d, lambda x: torch.max_pool1d(x, 2)),
    ),
    *functions((1, 4, 4), max_pool2d=(torch.max_pool2d, lambda x: torch.max_pool2d(x, 2))),
    *functions((1, 2, 2, 4), max_pool3d=(torch.max_pool3d, lambda x: torch.max_pool3d(x, 2))),
    Case("max pooling with no stride", (F.max_pool2d,), on(lambda x: F.max_pool2d(x, 2, [])),
         (1, 4, 4)),
    Case("average with divisor", (nn.AvgPool2d,), lambda: nn.AvgPool2d(2, divisor_override=-3),
         (1, 4, 4)),
    Case("uneven average with divisor", (nn.AvgPool2d,),
         lambda: nn.AvgPool2d(2, ceil_mode=True, divisor_override=-3), (1, 3, 5)),
    Case("average of all with stride one", (nn.AvgPool2d,), lambda: nn.AvgPool2d((3, 4), 1),
         (2, 3, 4)),
    Case("average of rows", (nn.AdaptiveAvgPool2d,), lambda: nn.AdaptiveAvgPool2d((None, 1)),
         (2, 3, 4)),
    Case("maximum of rows", (nn.AdaptiveMaxPool2d,), lambda: nn.AdaptiveMaxPool2d((None, 1)),
         (2, 3, 4)),
    Case("upsample", (nn.Upsample,), lambda: nn.Upsample(scale_factor=2), (2, 3, 2)),
    Case("upsample by factors", (nn.Upsample,),
         lambda: nn.Upsample(scale_factor=(1.5, 0.7), mode="bilinear"), (1, 4, 5)),
    Case("upsample nearest", (nn.UpsamplingNearest2d,),
         lambda: nn.UpsamplingNearest2d(scale_factor=2), (1, 3, 2)),
    Case("upsample bilinear", (nn.UpsamplingBilinear2d,), lambda: nn.UpsamplingBilinear2d((5, 3)),
         (1, 3, 2)),
    *functions(
        (1, 4, 3),
        nearest=(F.interpolate, lambda x: F.interpolate(x, (5, 7))),
        area=(F.interpolate, lambda x: F.interpolate(x, scale_factor=0.7, mode="area")),
        bicubic=(F.interpolate, lambda x: F.interpolate(x, size=6, mode="bicubic")),
        like=(F.interpolate, lambda x: F.interpolate(x, size=x.shape[2:])),
        unfold=(F.unfold, lambda x: F.unfold(x, 2, dilation=(2, 1), padding=1)),
    ),
    Case("unfold windows", (nn.Unfold,), lambda: nn.Unfold((3, 2), stride=2), (2, 4, 5), EXACT),
    Case("fold windows", (nn.Fold,), lambda: nn.Fold((3, 4), 2, padding=1, stride=2), (4, 6),
         EXACT),
    *functions(
        (2, 3, 2),
        mean=("mean", lambda x: x.mean((2, 3), keepdim=True)),
        mean_axis=("mean", lambda x: x.mean(axis=-1)),
        torch_mean=(torch.mean, lambda x: torch.mean(x, dim=[1, -1])),
        sum=("sum", lambda x: x.sum(1)),
        torch_sum=(torch.sum, lambda x: torch.sum(x, (1, 2, 3), True)),
        amax=("amax", lambda x: x.amax((2, 3))),
        torch_amax=(torch.amax, lambda x: torch.amax(x, 1)),
        amin=("amin", lambda x: x.amin(dim=(1, 2), keepdim=True)),
        torch_amin=(torch.amin, lambda x: torch.amin(x, -1)),
        max=("max", lambda x: x.max(2)[0]),
        max_values=("max", lambda x: x.max(dim=2, keepdim=True).values),
        torch_max=(torch.max, lambda x: torch.max(x, 1)[0]),
        min=("min", lambda x: x.min(2)[0]),
        torch_min=(torch.min, lambda x: torch.min(x, 1).values),
    ),
    *functions(
        (2, 3),
        fold=(F.fold, lambda x: F.fold(x, (2, 4), (1, 2), stride=(2, 1))),
    ),
    *functions(
        (2, 3),
        1.5,
        larger=(torch.max, lambda x: torch.max(x, -x)),
        smaller=("min", lambda x: x.min(other=-x)),
    ),
    *functions(
        (2, 3),
        norm=("norm", lambda x: x.norm(dim=1)),
        norm_of_both=("norm", lambda x: x.norm(2, (1, 2), True)[:, 0]),
        torch_norm=(torch.norm, lambda x: torch.norm(x, dim=2)),
        vector_norm=(torch.linalg.vector_norm, lambda x: torch.linalg.vector_norm(x, dim=-1)),
    ),
    *functions(
        (2, 3),
        1.1,  # the gradient is one only where one entry is far above the others
        logsumexp=("logsumexp", lambda x: x.logsumexp(1)),
        torch_logsumexp=(torch.logsumexp, lambda x: torch.logsumexp(x, (1, 2), keepdim=True)),
        special_logsumexp=(torch.special.logsumexp, lambda x: torch.special.logsumexp(x, -1)),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def assert_norm(module: nn.Module, shape: tuple[int, ...], factor: float = 1.0 + 1e-9) -> None:
    """The bound of a linear function is not below its norm, and at most a factor above it.

    Its matrix is what it makes of the identity. (Some of torch's gradients are of another
    function: that of pooling |x| with norm_type=1 at zero, that of interpolation to width one.)
    """
    model, bound = certify(module, shape)
    matrix = model(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape))
    exact = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert exact <= bound * NOISE
    assert bound <= exact * factor
    slope = gain(model, torch.ones(1, *shape, dtype=torch.float64))
    assert slope <= bound * NOISE


small = st.integers(1, 3)


def per_axis(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    return st.tuples(values, values)


def fit(kernel: tuple[int, ...], padding: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether torch pools so."""
    return all(
        p <= k // 2 and k <= s + 2 * p for k, p, s in zip(kernel, padding, size, strict=True)
    )


@given(
    kernel=per_axis(small),
    stride=per_axis(st.integers(1, 4)),
    dilation=per_axis(small),
    padding=per_axis(st.integers(0, 1)),
    ceil_mode=st.booleans(),
    size=per_axis(st.integers(1, 9)),
)
def test_max_pooling_counts_windows(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
    size: tuple[int, int],
) -> None:
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    assume(fit(kernel, padding, size))
    assume(all(r < s for r, s in zip(reach, size, strict=True)))
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    _, bound = certify(pool, (1, *size))
    # One bright pixel at a time: it is the maximum of every window that it is in.
    images = torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, 1, *size)
    windows = (pool(images) == 1).flatten(1).sum(dim=1).to(torch.float64)
    assert windows.max().sqrt().item() <= bound
    assert bound <= windows.max().sqrt().item() * (1 + 1e-9)
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    anywhere = math.prod(math.ceil(k / s) for k, s in zip(kernel, steps, strict=True))
    assert bound <= math.sqrt(anywhere) * (1 + 1e-12)


@given(size=per_axis(st.integers(1, 9)), wanted=per_axis(st.integers(1, 9)))
def test_adaptive_max_pooling_counts_windows(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    pool = nn.AdaptiveMaxPool2d(wanted)
    _, bound = certify(pool, (1, *size))
    images = torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, 1, *size)
    windows = pool(images).flatten(1).sum(dim=1)
    assert windows.max().sqrt().item() <= bound
    assert bound <= windows.max().sqrt().item() * (1 + 1e-9)


@given(
    kernel=per_axis(small),
    stride=per_axis(small),
    padding=per_axis(st.integers(0, 1)),
    ceil_mode=st.booleans(),
    include=st.booleans(),
    divisor=st.sampled_from([None, 1, 5, -2]),
    size=per_axis(st.integers(1, 6)),
)
def test_average_pooling_is_bounded(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
    include: bool,
    divisor: int | None,
    size: tuple[int, int],
) -> None:
    assume(fit(kernel, padding, size))
    pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode, include, divisor)
    convolution = not ceil_mode and (include or divisor is not None or not any(padding))
    # The convolution is that of an infinite image, here one may see a single pixel of a window.
    assert_norm(pool, (2, *size), 1.01 * math.prod(kernel) if convolution else 1 + 1e-9)


@given(
    kernel=st.tuples(small, small, small),
    stride=st.integers(1, 3),
    include=st.booleans(),
    divisor=st.sampled_from([None, -2]),
    size=st.tuples(small, st.integers(1, 4), small),
)
def test_average_pooling_of_volumes_is_exact_at_the_border(
    kernel: tuple[int, ...],
    stride: int,
    include: bool,
    divisor: int | None,
    size: tuple[int, ...],
) -> None:
    assume(fit(kernel, (0, 0, 0), size))
    padding = tuple(k // 2 for k in kernel)
    assert_norm(nn.AvgPool3d(kernel, stride, padding, True, include, divisor), (1, *size))


@given(size=per_axis(st.integers(1, 8)), wanted=per_axis(st.integers(1, 8)))
def test_adaptive_pooling_is_exact(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert_norm(nn.AdaptiveAvgPool2d(wanted), (1, *size))


MODES = {
    1: ("nearest", "nearest-exact", "area", "linear"),
    2: ("nearest", "nearest-exact", "area", "bilinear", "bicubic"),
    3: ("nearest", "nearest-exact", "area", "trilinear"),
}


@given(data=st.data(), axes=st.integers(1, 3))
def test_interpolation_is_exact(data: st.DataObject, axes: int) -> None:
    size = data.draw(st.tuples(*[st.integers(1, 6 - axes)] * axes))
    mode = data.draw(st.sampled_from(MODES[axes]))
    smooth = mode in ("linear", "bilinear", "bicubic", "trilinear")
    options: dict[str, Any] = {"mode": mode}
    if smooth:
        options["align_corners"] = data.draw(st.booleans())
    if mode in ("bilinear", "bicubic"):
        options["antialias"] = data.draw(st.booleans())
    antialias = options.get("antialias", False)
    if data.draw(st.booleans()):
        options["size"] = data.draw(st.tuples(*[st.integers(1, 8 - axes)] * axes))
        assume(not antialias or options["size"][-1] > 1)
    else:
        factors = st.sampled_from([0.5, 0.7, 1.0, 1.3, 1.6, 2.0, 2.3, 3.1])
        options["scale_factor"] = data.draw(st.tuples(*[factors] * axes))
        options["recompute_scale_factor"] = data.draw(st.sampled_from([None, True]))
        results = [
            (s, f, math.floor(s * f)) for s, f in zip(size, options["scale_factor"], strict=True)
        ]
        assume(all(result > 0 for _, _, result in results))
        assume(not antialias or results[-1][-1] > 1)
        if not options["recompute_scale_factor"] and mode != "area":
            assume(not any(r in (s, 2 * s) and f != r / s for s, f, r in results))
    assert_norm(Apply(lambda x: F.interpolate(x, **options)), (1, *size))


@given(
    kernel=per_axis(small),
    stride=per_axis(small),
    dilation=per_axis(small),
    padding=per_axis(st.integers(0, 2)),
    size=per_axis(st.integers(1, 5)),
)
def test_unfold_and_fold_count_copies(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
) -> None:
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    assume(all(r < s + 2 * p for r, s, p in zip(reach, size, padding, strict=True)))
    options = (kernel, dilation, padding, stride)
    windows = F.unfold(torch.ones(1, 1, *size, dtype=torch.float64), *options)
    copies = F.fold(torch.ones_like(windows), size, *options).max().item()
    for module, shape in (
        (nn.Unfold(*options), (1, *size)),
        (nn.Fold(size, *options), tuple(windows.shape[1:])),
    ):
        model, bound = certify(module, shape)
        assert copies <= bound**2 * NOISE
        assert bound**2 <= copies * (1 + 1e-9)
        assert gain(model, torch.zeros(1, *shape, dtype=torch.float64)) <= bound * NOISE


@given(
    power=st.sampled_from([1, 2, 4, 6]),
    kernel=per_axis(small),
    stride=st.none() | per_axis(small),
    ceil_mode=st.booleans(),
    size=per_axis(st.integers(1, 6)),
)
def test_power_pooling_is_exact_at_the_border(
    power: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] | None,
    ceil_mode: bool,
    size: tuple[int, int],
) -> None:
    assume(fit(kernel, (0, 0), size))
    pool = nn.LPPool2d(power, kernel, stride, ceil_mode)
    model, bound = certify(pool, (1, *size))
    if power == 1:
        assert_norm(pool, (1, *size))
        return
    # One bright pixel at a time, against a dark image.
    images = torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, 1, *size)
    largest = model(images).norm(dim=1).max().item()
    assert largest <= bound * NOISE
    assert bound <= largest * (1 + 1e-9)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1, 1, *size, dtype=torch.float64, generator=generator)
    assert gain(model, random) <= bound * NOISE


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (F.interpolate, {"mode": "linear", "size": (501,)}),
        (F.interpolate, {"mode": "nearest", "size": (501,)}),
        (F.adaptive_avg_pool1d, {"output_size": (7,)}),
        (F.avg_pool1d, {"kernel_size": (5,), "stride": (3,), "ceil_mode": True}),
    ],
    ids=str,
)
def test_long_axes_are_bounded(
    function: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_matrix = axis_norm(function, 203, 0, 1, **options)
    axis_norm.cache_clear()
    monkeypatch.setattr("certify.rules.resampling._LONGEST", 202)
    with torch.inference_mode():
        by_sums = axis_norm(function, 203, 0, 1, **options)
    axis_norm.cache_clear()
    assert by_matrix / (1 + 1e-7) <= by_sums <= 1.1 * by_matrix


def test_long_lines_cost_no_matrix() -> None:
    _, bound = certify(nn.AdaptiveAvgPool1d(7), (1, 100_000))
    assert 0 < bound <= 1.001 * math.sqrt(7 / 100_000)
    assert certify(nn.MaxPool1d(4), (1, 100_000))[1] == 1.0


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (nn.MaxPool2d(2), (4, 4), r"\(N, C, H, W\)"),
        (nn.MaxPool1d(2), (4,), r"\(N, C, W\)"),
        (nn.AvgPool1d(2), (4,), r"\(N, C, W\)"),
        (nn.AvgPool3d(2), (2, 4, 4), r"\(N, C, D, H, W\)"),
        (nn.AdaptiveAvgPool2d(2), (4, 4), r"\(N, C, H, W\)"),
        (nn.AdaptiveMaxPool2d(2), (4, 4), r"\(N, C, H, W\)"),
        (nn.LPPool2d(2, 2), (4, 4), r"\(N, C, H, W\)"),
        (nn.AdaptiveAvgPool2d(0), (1, 4, 4), "without any windows"),
        (nn.LPPool2d(3, 2), (1, 4, 4), "norm_type=3"),
        (nn.LPPool2d(2.5, 2), (1, 4, 4), "norm_type=2.5"),
        (nn.LPPool2d(math.inf, 2), (1, 4, 4), "norm_type=inf"),
        (nn.LPPool2d(400, 2), (1, 4, 4), "overflow"),
        (nn.Upsample(scale_factor=1.05), (1, 10), "kernels differ"),
        (nn.Upsample(scale_factor=2.05, mode="linear"), (1, 10), "kernels differ"),
        (
            lambda x: F.interpolate(x, (3, 3), mode="bicubic"),
            (1, 2050, 1),
            "bicubic interpolation of an axis longer",
        ),
        (
            lambda x: F.interpolate(x, (5, 1), mode="bilinear", antialias=True),
            (1, 3, 2),
            "width one",
        ),
        (lambda x: x + 1.0 - 1e-30 * x.mean(), (2, 3), "without dim"),
        (lambda x: x + 1.0 - 1e-30 * x.sum(()), (2, 3), "without dim"),
        (lambda x: x + 1.0 - 1e-30 * x.max(), (2, 3), "without dim"),
        (lambda x: x - x.mean(0), (2, 3), "batch axis|other samples"),
        (lambda x: x + 1.0 - 1e-30 * x.mean((1, -3), keepdim=True), (2, 3), "batch axis"),
        (lambda x: x + 1.0 - 1e-30 * torch.logsumexp(x, 0), (2, 3), "batch axis"),
        (lambda x: x.sum(1, dtype=torch.float32).double(), (2, 3), "dtype"),
    ],
    ids=str,
)
def test_what_is_refused(function: Any, shape: tuple[int, ...], reason: str) -> None:
    module = function if isinstance(function, nn.Module) else Apply(function)
    with pytest.raises(UnsupportedModel, match=reason):
        certify(module, shape)


@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AdaptiveMaxPool2d])
def test_max_pooling_with_indices_is_refused(pool: Any) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool(2, return_indices=True)

        def forward(self, x: Tensor) -> Any:
            return self.pool(x)[0]

    with pytest.raises(UnsupportedModel, match="return_indices"):
        certify(First(), (1, 4, 4))


def test_what_uses_indices_has_no_finite_bound() -> None:
    def shifted(x: Tensor) -> Tensor:
        values, indices = x.max(1)
        return values + indices

    assert certify(Apply(shifted), (3, 2))[1] == math.inf
