from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from certify.augmentation import augmentations, flip, shift
from certify.data import DataError, load_data, num_classes, pixels

WritePng = Callable[[Path, tuple[int, int], int], None]


def write_idx(folder: Path, images: torch.Tensor, labels: torch.Tensor, split: str) -> None:
    """Write MNIST's own file format, as torchvision lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">IIII", 2051, *images.shape)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
    header = struct.pack(">II", 2049, len(labels))
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())


def test_mnist_5k_is_the_fixed_split_of_real_digits() -> None:
    train, test = load_data("mnist-5k", train=True), load_data("mnist-5k", train=False)
    assert train.images.shape == (4000, 1, 28, 28)
    assert test.labels.bincount().tolist() == [100] * 10
    assert train.images.dtype == torch.uint8
    assert train.images.max() == 255
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 5000  # no digit is in both splits


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_torchvision_layout(tmp_path: Path, name: str, folder: str) -> None:
    images = torch.randint(256, (12, 28, 28), dtype=torch.uint8)
    labels = (torch.arange(12) % 10).to(torch.uint8)
    for split in ("train", "t10k"):
        write_idx(tmp_path / folder / "raw", images, labels, split)
    data = load_data(name, train=False, data_dir=str(tmp_path))
    assert torch.equal(data.images[:, 0], images)
    assert torch.equal(data.labels, labels.to(torch.int64))
    assert len(data.classes) == 10
    assert len(data.head(5)) == 5


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_colour_images_are_channels_first(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from torchvision import datasets

    channels_first = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    stored = channels_first if name == "svhn" else channels_first.transpose(0, 2, 3, 1)
    source = SimpleNamespace(data=stored, targets=[1, 0], labels=np.array([1, 0]))
    kind = {"cifar10": "CIFAR10", "svhn": "SVHN"}[name]
    monkeypatch.setattr(datasets, kind, lambda *args, **kwargs: source)
    data = load_data(name, train=True, data_dir="anywhere")
    assert np.array_equal(data.images.numpy(), channels_first)
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "name", ["mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn"]
)
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"no {name} under .* \\(expected .*--download"):
        load_data(name, train=True, data_dir=str(tmp_path))
    with pytest.raises(DataError, match="needs --data-dir"):
        load_data(name, train=True)


def test_folder(tmp_path: Path, write_png: WritePng) -> None:
    for index, name in enumerate(("cat", "dog")):
        write_png(tmp_path / "test" / name / "a.png", (5, 7), 10 * index)
    data = load_data(f"folder:{tmp_path}", train=False)
    assert data.input_shape == (3, 5, 7)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1]
    assert data.images[1].unique().tolist() == [10]


def test_bad_folders(tmp_path: Path, write_png: WritePng) -> None:
    with pytest.raises(DataError, match="expected images at"):
        load_data(f"folder:{tmp_path}", train=True)
    write_png(tmp_path / "train" / "cat" / "a.png", (5, 7), 1)
    write_png(tmp_path / "train" / "cat" / "b.png", (6, 7), 1)
    with pytest.raises(DataError, match="expected images of one size 5x7, got 6x7"):
        load_data(f"folder:{tmp_path}", train=True)
    (tmp_path / "train" / "cat" / "a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"cannot read the image .*a\.png"):
        load_data(f"folder:{tmp_path}", train=True)


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="unknown data set 'imagenet'; expected one of mnist-5k"):
        load_data("imagenet", train=True)


def test_pixels_are_in_the_unit_interval() -> None:
    assert pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]


def test_shift_moves_whole_images() -> None:
    image = torch.zeros(64, 1, 5, 5)
    image[:, :, 2, 2] = 1.0
    moved = shift(1)(image, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape
    assert (moved.sum(dim=(1, 2, 3)) == 1).all()
    places = {tuple(place) for place in moved.nonzero()[:, 2:].tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


def test_flip_mirrors_half_of_the_images() -> None:
    image = torch.arange(3.0).expand(400, 1, 2, 3)
    mirrored = flip(image, torch.Generator().manual_seed(0))
    flipped = mirrored[:, 0, 0, 0] == 2
    assert torch.equal(mirrored[flipped], image[flipped].flip(3))
    assert torch.equal(mirrored[~flipped], image[~flipped])
    assert 150 < flipped.sum() < 250


def test_augmentations_keep_labels() -> None:
    assert augmentations("auto", "mnist-5k")
    assert augmentations("auto", "folder:somewhere") == []


def test_number_of_classes_without_the_images(tmp_path: Path, write_png: WritePng) -> None:
    for name in ("a", "b", "c"):
        write_png(tmp_path / "test" / name / "x.png", (2, 2), 0)
    (tmp_path / "test" / "notes.txt").write_text("")
    for dataset in (f"folder:{tmp_path}", "mnist-5k"):
        assert num_classes(dataset) == len(load_data(dataset, train=False).classes)
    with pytest.raises(DataError, match=r"expected images at .*nowhere/test/<class>/"):
        num_classes(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="unknown data set 'imagenet'"):
        num_classes("imagenet")


def test_the_first_images_are_of_all_classes() -> None:
    """Sources that are sorted by class are shuffled, and remember the order that they had."""
    for train in (True, False):
        data = load_data("mnist-5k", train=train)
        assert sorted(data.places.tolist()) == list(range(len(data)))
        by_place = data.labels[data.places.argsort()]
        assert bool((by_place.diff() >= 0).all())
        rest, last = data.split(len(data) // 4)
        for part in (data.head(len(data) // 4), last):
            assert part.labels.bincount().min() >= 0.5 * len(part) / 10
        assert sorted([*rest.places.tolist(), *last.places.tolist()]) == list(range(len(data)))
