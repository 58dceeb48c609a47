"""Names of augmentations, and what they do to images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify.augmentation import Augmentation, augmentations, flip, randaugment, shift


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, channels: int = 3, height: int = 9, width: int = 7) -> Tensor:
    """Pixels as they come from files: multiples of 1 / 255."""
    drawn = torch.randint(256, (count, channels, height, width), generator=generator(1))
    return drawn.float() / 255.0


def apply(described: str, x: Tensor, seed: int = 0, dataset: str = "folder:x") -> Tensor:
    torch.manual_seed(seed)  # which torchvision draws from
    draws = generator(seed)
    for change in augmentations(described, dataset):
        x = change(x, draws)
    return x


NAMES = ["none", "shift:0", "shift:2", "flip", "randaugment", "randaugment:1", "randaugment:2:15"]
NAMES += ["shift:4,flip", "flip,randaugment:2:9", " shift:1 , flip "]


@pytest.mark.parametrize("described", NAMES)
def test_names_are_taken_in_order(described: str) -> None:
    expected = 0 if described == "none" else described.count(",") + 1
    assert len(augmentations(described, "cifar10")) == expected


@pytest.mark.parametrize(
    "described",
    [
        "",
        "rotate",
        "shift",
        "shift:",
        "shift:a",
        "shift:-1",
        "shift:1:2",
        "shift:1.5",
        "flip:1",
        "flip:",
        "flip,",
        ",flip",
        "randaugment:2:31",
        "randaugment:2:9:1",
        "randaugment:-1",
        "randaugment:x",
        "none,flip",
        "flip,auto",
        "Flip",
        "shift=4",
    ],
)
def test_names_that_mean_nothing(described: str) -> None:
    with pytest.raises(ValueError, match=r"expected augmentations such as shift:4,flip.*, got '"):
        augmentations(described, "mnist")


def test_the_refusal_names_the_part_that_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"got 'rotate:3'$"):
        augmentations("flip,rotate:3,shift:1", "mnist")


@pytest.mark.parametrize(
    ("dataset", "count", "moves"),
    [
        ("mnist", 1, 1),
        ("mnist-5k", 1, 1),
        ("fashion-mnist", 2, 1),
        ("cifar10", 2, 4),
        ("cifar100", 2, 4),
        ("svhn", 0, 0),
        ("folder:somewhere", 0, 0),
    ],
)
def test_what_suits_a_data_set(dataset: str, count: int, moves: int) -> None:
    found = augmentations("auto", dataset)
    assert len(found) == count
    assert (flip in found) == (count == 2)
    if count:  # up to so many pixels: of a single bright one, all that it can reach
        bright = torch.zeros(2000, 1, 11, 11)
        bright[:, :, 5, 5] = 1.0
        reached = found[0](bright, generator()).amax(dim=(0, 1)).nonzero()
        assert reached.amin().item() == 5 - moves
        assert reached.amax().item() == 5 + moves


@pytest.mark.parametrize("described", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 6, 40])
def test_shapes_types_and_ranges_stay(described: str, channels: int, count: int) -> None:
    x = images(count, channels)
    before = x.clone()
    for seed in range(3):
        y = apply(described, x, seed)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.min().item() >= 0.0
        assert y.max().item() <= 1.0
    assert torch.equal(x, before)  # what came in is not written to


@pytest.mark.parametrize("described", ["shift:2", "flip", "randaugment:2:9", "shift:2,flip"])
def test_the_same_seed_makes_the_same_images(described: str) -> None:
    x = images(40)
    first, again, other = (apply(described, x, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, x)


@pytest.mark.parametrize("change", [shift(3), flip])
def test_own_changes_draw_from_the_given_generator_alone(change: Augmentation) -> None:
    x = images(40)
    torch.manual_seed(0)
    first, state = change(x, generator(5)), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(change(x, generator(5)), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_shifts_move_each_image_and_fill_with_zeros() -> None:
    x = images(50, 2, 5, 6) + 0.1  # no zeros
    y = shift(2)(x, generator())
    seen = set()
    for before, after in zip(x, y, strict=True):
        fitting = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                moved = torch.zeros_like(before)
                rows, columns = (
                    slice(max(0, d), n + min(0, d)) for d, n in ((down, 5), (right, 6))
                )
                from_rows, from_columns = (
                    slice(max(0, -d), n - max(0, d)) for d, n in ((down, 5), (right, 6))
                )
                moved[:, rows, columns] = before[:, from_rows, from_columns]
                if torch.equal(moved, after):
                    fitting.append((down, right))
        assert len(fitting) == 1
        seen.update(fitting)
    assert len(seen) > 10  # each image by itself


def test_a_shift_by_nothing_and_one_beyond_the_image() -> None:
    x = images()
    assert torch.equal(shift(0)(x, generator()), x)
    assert shift(20)(x, generator()).shape == x.shape


def test_flips_mirror_about_half_of_the_images() -> None:
    x = images(400)
    y = flip(x, generator())
    mirrored = (y == x.flip(3)).flatten(1).all(dim=1)
    same = (y == x).flatten(1).all(dim=1)
    assert bool((mirrored ^ same).all())
    assert 150 <= int(mirrored.sum()) <= 250


def test_randaugment_of_nothing_keeps_pixels() -> None:
    x = images(20)
    assert torch.equal(randaugment(0, 9)(x, generator()), x)


def test_randaugment_takes_parts_of_a_batch_alike() -> None:
    one = images(1)
    torch.manual_seed(0)
    changed = randaugment(2, 9)(one.expand(64, -1, -1, -1), generator())
    kinds = {tuple(image.flatten().tolist()) for image in changed}
    assert 4 <= len(kinds) <= 16
