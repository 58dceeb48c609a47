"""What padding does, against the padding that PyTorch carries out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from ff_bounds.padding import (
    PADDING_MODES,
    duplication,
    padding_amounts,
    padding_effect,
    wrapped_rows,
)

SIZES = range(1, 8)


def padded_positions(mode: str, before: int, after: int, size: int) -> list[int]:
    """Which entry of the input each entry of the padded axis shows."""
    axis = torch.arange(size, dtype=torch.float64).reshape(1, 1, size)
    return [int(v) for v in F.pad(axis, (before, after), mode=mode).flatten()]


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_duplication_is_the_largest_count(mode: str) -> None:
    for before in range(7):
        for after in range(7):
            worst = 0
            for size in range(1, 20):
                if mode == "reflect" and max(before, after) >= size:
                    continue
                counts = Counter(padded_positions(mode, before, after, size))
                exact = max(counts.values())
                assert duplication(mode, before, after, size) == exact
                worst = max(worst, exact)
            # Without a size: the worst one, neither less nor more.
            assert duplication(mode, before, after, None) == worst


def test_reflection_that_pytorch_refuses_is_refused() -> None:
    for size in SIZES:
        with pytest.raises(ValueError, match="expected reflect padding below the input size"):
            duplication("reflect", 0, size, size)


@pytest.mark.parametrize("reach", [0, 1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_wrapped_rows_are_the_rows_of_the_layer(reach: int, stride: int) -> None:
    for size in range(1, 9):
        for before in range(min(size, 4) + 1):
            for after in range(min(size, 4) + 1):
                length = before + size + after
                if length <= reach:
                    continue
                starts = padded_positions("circular", before, after, size)[: length - reach]
                rows = starts[::stride]  # the circulant's row that each output is
                kept, repeats = wrapped_rows(before, after, reach, stride, size)
                if before == after == 0:
                    assert (kept, repeats) == (stride, 1)  # an unpadded layer
                    continue
                assert repeats >= max(Counter(rows).values())
                assert kept in (1, stride)
                if kept > 1:
                    # The polyphase bound asks for distinct rows of one coset of the stride.
                    assert len(set(rows)) == len(rows)
                    assert size % stride == 0
                    assert len({row % stride for row in rows}) == 1
                everywhere, most = wrapped_rows(before, after, reach, stride, None)
                assert everywhere == 1
                assert most >= max(Counter(starts).values())


def test_wrapped_rows_are_tight_at_unit_stride() -> None:
    for size in SIZES:
        for amount in range(size + 1):
            starts = padded_positions("circular", amount, amount, size)
            assert wrapped_rows(amount, amount, 0, 1, size) == (1, max(Counter(starts).values()))


def test_the_usual_strided_circular_layer_keeps_its_stride() -> None:
    # 3 taps, padding 1, stride 2, even size. Dropping the stride would cost a factor of up to 2.
    assert wrapped_rows(1, 1, 2, 2, 32) == (2, 1)
    assert wrapped_rows(1, 1, 2, 2, 33) == (1, 1)


def test_circular_padding_that_pytorch_refuses_is_refused() -> None:
    for size in SIZES:
        with pytest.raises(ValueError, match="expected circular padding up to the input size"):
            wrapped_rows(size + 1, 0, 0, 1, size)


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "expected"),
    [
        ("valid", (3, 5), (1, 1), ((0, 0), (0, 0))),
        ("same", (3, 5), (1, 1), ((1, 1), (2, 2))),
        ("same", (2, 4), (1, 1), ((0, 1), (1, 2))),  # the odd one goes behind
        ("same", (2, 4), (2, 3), ((1, 1), (4, 5))),
        ("same", (1, 1), (7, 7), ((0, 0), (0, 0))),
        (2, (3, 3), (1, 1), ((2, 2), (2, 2))),
        ((0, 3), (3, 3), (1, 1), ((0, 0), (3, 3))),
        ("valid", (3,), (1,), ((0, 0),)),
        ("same", (4,), (3,), ((4, 5),)),
        ((2,), (3,), (1,), ((2, 2),)),
        ("valid", (3, 5, 7), (1, 1, 1), ((0, 0), (0, 0), (0, 0))),
        ("same", (2, 4, 3), (1, 1, 2), ((0, 1), (1, 2), (2, 2))),
        (1, (3, 3, 3), (1, 1, 1), ((1, 1), (1, 1), (1, 1))),
        ((0, 3, 1), (3, 3, 3), (1, 1, 1), ((0, 0), (3, 3), (1, 1))),
    ],
)
def test_amounts(
    padding: int | tuple[int, ...] | str,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    expected: tuple[tuple[int, int], ...],
) -> None:
    assert padding_amounts(padding, kernel, (1,) * len(kernel), dilation) == expected


@pytest.mark.parametrize("padding", ["full", "SAME", "", -1, (0, -1), (1, 1, 1), 1.5])
def test_paddings_that_are_refused(padding: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        padding_amounts(padding, (3, 3), (1, 1), (1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [(2,), (1, 2), (1, 2, 1)])
def test_same_with_a_stride_is_refused_as_by_pytorch(stride: tuple[int, ...]) -> None:
    axes = len(stride)
    with pytest.raises(ValueError, match="padding='same'"):
        padding_amounts("same", (3,) * axes, stride, (1,) * axes)


def test_zero_padding_costs_nothing() -> None:
    for padding in (0, 1, 50, (3, 0)):
        effect = padding_effect(
            (3, 3),
            stride=(2, 3),
            padding=padding,
            dilation=1,
            padding_mode="zeros",
            input_size=None,
        )
        assert effect == ((2, 3), 1)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    ("mode", "repeats"), [("zeros", 1), ("circular", 3), ("reflect", 3), ("replicate", 3)]
)
def test_the_axes_multiply(mode: str, repeats: int, axes: int) -> None:
    # Kernels of one tap, padding 1, sizes at which each axis shows some entry three times.
    size = {"zeros": 1, "circular": 1, "reflect": 3, "replicate": 1}[mode]
    _, found = padding_effect(
        (1,) * axes, stride=1, padding=1, dilation=1, padding_mode=mode, input_size=(size,) * axes
    )
    assert found == repeats**axes


def test_each_axis_keeps_its_own_stride_and_its_own_repeats() -> None:
    # Circular: the first axis keeps its stride, the second does not divide, the third is unpadded.
    effect = padding_effect(
        (3, 3, 1),
        stride=(2, 2, 3),
        padding=(1, 1, 0),
        dilation=1,
        padding_mode="circular",
        input_size=(4, 5, 6),
    )
    assert effect == ((2, 1, 3), 1)
    effect = padding_effect(
        (1, 3, 1), stride=1, padding=(2, 1, 0), dilation=1, padding_mode="replicate", input_size=4
    )
    assert effect == ((1, 1, 1), 3 * 2)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_a_kernel_that_does_not_fit_is_refused_in_every_mode(mode: str) -> None:
    with pytest.raises(ValueError, match="expected an input that the kernel fits in"):
        padding_effect(
            (5, 1), stride=1, padding=0, dilation=1, padding_mode=mode, input_size=(4, 4)
        )
