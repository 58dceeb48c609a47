"""Which network and which images a command is about: the options, and what they name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from certify.commands.options import InputError, common_options, load_named, network_options
from certify.option_types import Epsilon

if TYPE_CHECKING:
    from certify.attack import Effort
    from certify.data import ImageData
    from certify.ranks import Ranks
    from certify.weights import LoadedNetwork

_NETWORK = ("model", "arch", "hyperparameters", "input_shape", "mean", "std")


class Loaded(NamedTuple):
    """A network, on its device, and images."""

    network: LoadedNetwork
    data: ImageData
    dataset: str


@dataclass(frozen=True)
class Asked:
    """What the options of `asks` say.

    Attributes:
        network: arguments of `certify.weights.load_network`.
        dataset: ``None`` for that of the training.
        data_dir, download, device: as `certify.data.load_data` and `certify.run.choose_device` take
            them.
        domain: range of the pixels, or ``None`` for any.
        eps: budgets.
        limit: only the first so many images.
        held_out: the last so many training images in place of the test images.
        batch_size: images at a time.
    """

    network: dict[str, Any]
    dataset: str | None
    data_dir: str | None
    download: bool
    device: str
    domain: tuple[float, ...] | None
    eps: tuple[float, ...]
    limit: int | None
    held_out: int | None
    batch_size: int

    def load(self, ranks: Ranks, doing: str) -> Loaded:
        """Load both, and say what is being done with them."""
        from certify.hashes import hash_of_images, hash_of_model
        from certify.run import choose_device

        network = load_named(self.dataset, **self.network)
        dataset = self.dataset or network.dataset
        if dataset is None:
            raise InputError("pass --dataset: only a ckpt.pt of certify train names its own")
        images = f"last {self.held_out:,} training images" if self.held_out else "test images"
        if ranks.first:
            click.echo(f"{doing} {network.description} on the {images} of {dataset}")
        load = functools.partial(
            load_images,
            dataset,
            network,
            data_dir=self.data_dir,
            download=self.download,
            held_out=self.held_out,
            limit=self.limit,
        )
        data = ranks.in_turn(load)
        network.model.to(choose_device(self.device, ranks))
        if ranks.count > 1:
            digests = hash_of_model(network.model), hash_of_images(data.images, data.labels)
            ranks.agree(digests, "weights or images")
        return Loaded(network, data, dataset)


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which network and which images, as its ``asked``."""

    @functools.wraps(command)
    def collected(**options: Any) -> None:
        network = {name: options.pop(name) for name in _NETWORK}
        names = [name for name in Asked.__dataclass_fields__ if name != "network"]
        own = {name: options.pop(name) for name in names}
        command(asked=Asked(network, **own), **options)

    dataset = click.option("--dataset", help="A name, or folder:PATH; default: that of training.")
    return network_options(dataset(common_options(_images_options(collected))))


def tries(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say how hard to attack, as what makes its ``effort``."""

    @functools.wraps(command)
    def collected(attack_steps: int, restarts: int, foolbox: bool, **options: Any) -> None:
        def effort() -> Effort:
            from certify.attack import Effort

            return Effort(attack_steps, restarts, foolbox)

        command(effort=effort, **options)

    wrapped: Callable[..., None] = collected
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
        wrapped = option(wrapped)
    return wrapped


def _images_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--batch-size", default=500, show_default=True, type=click.IntRange(min=1)),
        click.option(
            "--held-out",
            metavar="N",
            type=click.IntRange(min=1),
            help="The last N training images in place of the test images.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            help="Only so many: the first ones, or of mnist-5k and folders the same random ones.",
        ),
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
