"""What the commands share: options, and how errors are told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from certify.option_types import Numbers, Setting, Shape


class InputError(click.ClickException):
    """What the user gave cannot be used: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the line; of several processes with the same to say, once."""
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(3.0)  # torchrun ends this process before that if the first has failed too
        super().show(file)


class LostError(InputError):
    """Another process of the job is gone."""

    def show(self, file: Any = None) -> None:
        """Print the line, unless the process that knows why has ended the job before."""
        time.sleep(6.0)
        click.ClickException.show(self, file)


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
        kind = LostError if isinstance(error, RankLost) else InputError
        raise kind(shown) from error


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


def check_folders(*paths: str | None) -> None:
    """Refuse, before the work, to write files into folders that do not exist."""
    for path in paths:
        if path and not Path(path).resolve().parent.is_dir():
            raise InputError(f"the folder of {path} does not exist")


METHODS = ["fantastic_four", "tensor_norm", "gram_iteration", "supremum", "best"]
TIGHTENINGS = ["none", "merge", "join", "balance"]
