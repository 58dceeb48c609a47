"""What the commands share: options, and how errors are told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from certify.option_types import Epsilon, Numbers, Setting, Shape


class InputError(click.ClickException):
    """What the user gave cannot be used: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the line; of several processes with the same to say, once."""
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(3.0)  # torchrun ends this process before that if the first has failed too
        super().show(file)


class BrokenError(click.ClickException):
    """A certificate that an attack broke."""

    exit_code = 3


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the library says about bad input into one line and exit code 2."""
    from certify.ranks import RankLost
    from certify.signal import UnsupportedModel
    from certify.training import TrainingDiverged

    try:
        yield
    except (ValueError, OSError, UnsupportedModel, TrainingDiverged, RankLost) as error:
        line = " ".join(str(error).split())  # from files, too, which may hold anything
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        raise InputError(shown) from error


ARCHITECTURES = "a name, torchvision:NAME, or package.module:factory"


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that both commands have."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
        click.option("--download", is_flag=True, help="Let torchvision fetch missing data."),
        click.option("--data-dir", metavar="DIR", help="torchvision's root folder."),
    ):
        command = option(command)
    return command


def network_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which network: those of `load_named`, and the domain."""
    for option in (
        click.option(
            "--domain", type=Numbers(), help="Range of the pixels, 0,1: prove it for these only."
        ),
        click.option("--std", type=Numbers(), help="Per channel, divided by before the model."),
        click.option("--mean", type=Numbers(), help="Per channel, subtracted before the model."),
        click.option("--input-shape", type=Shape(), help="Of one image, e.g. 3,32,32."),
        click.option(
            "--set",
            "hyperparameters",
            type=Setting(),
            multiple=True,
            callback=lambda context, option, settings: dict(settings),
            help="Argument of --arch.",
        ),
        click.option("--arch", metavar="NAME", help=f"Architecture of the file: {ARCHITECTURES}."),
        click.option(
            "--model",
            required=True,
            metavar="FILE",
            help="A ckpt.pt, weights, a program (.pt2, .onnx), or an architecture.",
        ),
    ):
        command = option(command)
    return command


def load_named(dataset: str | None, **which: Any) -> Any:
    """Load what `network_options` names; the data may tell its shape and number of classes."""
    from certify.data import image_shape, num_classes
    from certify.weights import load_network

    if not dataset:
        return load_network(**which)
    return load_network(**which, num_classes=num_classes(dataset), image_shape=image_shape(dataset))


def load_images(
    dataset: str,
    network: Any,
    *,
    data_dir: str | None,
    download: bool,
    held_out: int | None,
    limit: int | None = None,
) -> Any:
    """Load the test images, or the last training images, or the first of them."""
    from certify.data import load_data

    data = load_data(
        dataset,
        train=held_out is not None,
        data_dir=data_dir or network.data_dir,
        download=download,
    )
    if dataset == network.dataset and network.classes and data.classes != network.classes:
        raise InputError(
            f"the network was trained on {dataset} with the classes {_few(network.classes)}; now "
            f"they are {_few(data.classes)}"
        )
    if data.input_shape != network.input_shape:  # before anything of that size is computed
        raise InputError(
            f"the model takes images of shape {network.input_shape}, the data has "
            f"{data.input_shape}"
        )
    if held_out is not None:
        _, data = data.split(held_out)
    return data.head(limit)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def images_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which images, and how many at a time."""
    for option in (
        click.option("--batch-size", default=500, show_default=True, type=click.IntRange(min=1)),
        click.option(
            "--held-out",
            metavar="N",
            type=click.IntRange(min=1),
            help="The last N training images in place of the test images.",
        ),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images."),
        click.option(
            "--eps",
            type=Epsilon(),
            multiple=True,
            default=(0.1, 0.5, 1.0),
            help="L2 budget, e.g. 0.5 or 36/255; may be repeated.  [default: 0.1, 0.5, 1.0]",
        ),
    ):
        command = option(command)
    return command


def effort_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say how hard to attack."""
    for option in (
        click.option("--foolbox", is_flag=True, help="Run foolbox's attacks too, if installed."),
        click.option(
            "--restarts",
            default=1,
            show_default=True,
            type=click.IntRange(min=0),
            help="Random starts of projected gradient descent.",
        ),
        click.option(
            "--attack-steps",
            default=20,
            show_default=True,
            type=click.IntRange(min=1),
            help="Gradients for each start of an attack.",
        ),
    ):
        command = option(command)
    return command


def check_folders(*paths: str | None) -> None:
    """Refuse, before the work, to write files into folders that do not exist."""
    for path in paths:
        if path and not Path(path).resolve().parent.is_dir():
            raise InputError(f"the folder of {path} does not exist")


METHODS = ["fantastic_four", "tensor_norm", "gram_iteration", "supremum", "best"]
TIGHTENINGS = ["none", "merge", "join", "balance"]
