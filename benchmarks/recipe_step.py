"""Milliseconds that a step of a recipe's training takes, on images of noise.

    python benchmarks/recipe_step.py --recipe cifar10-small
    python benchmarks/recipe_step.py --recipe cifar10-gpu --device cuda --set width=384

On a GPU the same network is trained with and without ``--cuda-graph``, in turns, so that the ratio
says what launches cost.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import click
import torch

from certify.architectures import build, keywords
from certify.augmentation import augmentations
from certify.data import ImageData
from certify.option_types import Setting
from certify.recipes import recipe
from certify.training import EpochMetrics, Trainer

SHAPES = {"cifar10": (3, 32, 32)}


def noise(dataset: str, count: int) -> ImageData:
    """Images of a data set's shape."""
    images = torch.randint(256, (count, *SHAPES.get(dataset, (1, 28, 28))), dtype=torch.uint8)
    return ImageData(images, torch.randint(10, (count,)), [str(label) for label in range(10)])


@click.command()
@click.option("--recipe", "name", default="cifar10-small", show_default=True)
@click.option(
    "--set",
    "settings",
    type=Setting(),
    multiple=True,
    help="Hyperparameters of the model, NAME=VALUE.",
)
@click.option("--batch-size", type=int)
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    name: str,
    settings: tuple[tuple[str, Any], ...],
    batch_size: int | None,
    steps: int,
    rounds: int,
    threads: int,
    device: str,
) -> None:
    """Measure and print the medians."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = recipe(name).changed(
        None, None, dict(settings), {"batch_size": batch_size, "hold_out": 0}
    )
    config = replace(found.config(), max_minutes=None)
    data = noise(found.dataset, steps * config.batch_size)
    hyperparameters = keywords(
        found.model, found.hyperparameters, input_shape=data.input_shape, num_classes=10
    )
    augment = augmentations(config.augment, found.dataset)
    kinds = (False, True) if torch.device(device).type == "cuda" else (False,)
    trainers = {}
    for graph in kinds:
        model = build(found.model, hyperparameters).to(device)
        trainers[graph] = Trainer(model, data, replace(config, cuda_graph=graph), augment)
        trainers[graph].run_epoch()  # to warm up
    times: dict[bool, list[float]] = {graph: [] for graph in kinds}
    for _ in range(rounds):
        for graph, trainer in trainers.items():
            last = time.perf_counter()

            def note(metrics: EpochMetrics, graph: bool = graph) -> None:
                nonlocal last
                now = time.perf_counter()
                times[graph].append(1e3 * (now - last))
                last = now

            trainer.run_epoch(note)
    weights = sum(parameter.numel() for parameter in model.parameters())
    click.echo(
        f"{name} {found.hyperparameters}: {weights / 1e6:.1f} M weights, batch "
        f"{config.batch_size}, {device}, {threads} threads, torch {torch.__version__}"
    )
    for graph, found_times in times.items():
        click.echo(
            f"{'a CUDA graph' if graph else 'launched':<12}  {statistics.median(found_times):8.2f}"
            f" ms a step ({min(found_times):.2f} to {max(found_times):.2f})"
        )


if __name__ == "__main__":
    main()
