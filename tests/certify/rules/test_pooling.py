"""Rules of pooling and interpolation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from certify import UnsupportedModel
from tests.certify.rules.harness import NOISE, Case, certify, check, gain

CASES = [
    Case("max pooling", (nn.MaxPool2d,), lambda: nn.MaxPool2d(2), (2, 4, 4)),
    Case("overlapping max pooling", (nn.MaxPool2d,), lambda: nn.MaxPool2d(3, 1), (1, 5, 5)),
    Case("padded max pooling", (nn.MaxPool2d,), lambda: nn.MaxPool2d(3, 2, 1), (1, 5, 5), 2.1),
    Case("average pooling", (nn.AvgPool2d,), lambda: nn.AvgPool2d(2), (2, 4, 4)),
    Case("padded average", (nn.AvgPool2d,), lambda: nn.AvgPool2d(3, 2, 1), (1, 6, 6), 2.0),
    Case(
        "average with divisor",
        (nn.AvgPool2d,),
        lambda: nn.AvgPool2d(2, divisor_override=-3),
        (1, 4, 4),
    ),
    Case(
        "average of rows",
        (nn.AdaptiveAvgPool2d,),
        lambda: nn.AdaptiveAvgPool2d((None, 1)),
        (2, 3, 4),
    ),
    Case("global average", (nn.AdaptiveAvgPool2d,), lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


small = st.integers(1, 3)


@given(
    kernel=st.tuples(small, small),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(small, small),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    ceil_mode=st.booleans(),
)
def test_max_pooling_counts_windows(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
) -> None:
    assume(all(p <= k // 2 for p, k in zip(padding, kernel, strict=True)))
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    size = (19, 19)  # large enough for a pixel in as many windows as any can be in
    _, bound = certify(pool, (1, *size))
    # One bright pixel at a time: it is the maximum of every window that it is in.
    images = torch.eye(361, dtype=torch.float64).reshape(361, 1, *size)
    windows = pool(images).flatten(1).sum(dim=1)
    assert windows.max().sqrt().item() <= bound
    assert bound <= windows.max().sqrt().item() * (1 + 1e-9)


@given(
    kernel=st.tuples(small, small),
    stride=st.tuples(small, small),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    divisor=st.sampled_from([None, 1, 5, -2]),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
)
def test_average_pooling_is_bounded(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    divisor: int | None,
    size: tuple[int, int],
) -> None:
    assume(all(p <= k // 2 for p, k in zip(padding, kernel, strict=True)))
    assume(all(k <= s for k, s in zip(kernel, size, strict=True)))
    pool = nn.AvgPool2d(kernel, stride, padding, divisor_override=divisor)
    model, bound = certify(pool, (2, *size))
    exact = gain(model, torch.zeros(1, 2, *size, dtype=torch.float64))
    assert exact <= bound * NOISE
    assert bound <= 3.0 * exact * (1 + 1e-9)


@given(size=st.tuples(st.integers(1, 8), st.integers(1, 8)), wanted=st.tuples(small, small))
def test_adaptive_pooling_is_exact_or_refused(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    pool = nn.AdaptiveAvgPool2d(wanted)
    if any(s % w for s, w in zip(size, wanted, strict=True)):
        with pytest.raises(UnsupportedModel, match="windows overlap"):
            certify(pool, (1, *size))
        return
    model, bound = certify(pool, (1, *size))
    exact = gain(model, torch.zeros(1, 1, *size, dtype=torch.float64))
    assert exact <= bound * NOISE
    assert bound <= exact * (1 + 1e-12)


def test_max_pooling_with_indices_is_refused() -> None:
    pool = nn.MaxPool2d(2, return_indices=True)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x)[0]

    with pytest.raises(UnsupportedModel, match="return_indices"):
        certify(First(), (1, 4, 4))
