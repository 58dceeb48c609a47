"""``certify train`` and ``certify recipes``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import click

from certify.commands.options import ARCHITECTURES, common_options, one_line_errors
from certify.option_types import Setting
from certify.train_options import training_options

DEFAULT_RECIPE = "mnist-5k"


@click.command(short_help="Train a classifier.")
@click.option(
    "--recipe",
    "recipe_name",
    default=DEFAULT_RECIPE,
    show_default=True,
    metavar="NAME",
    help="What the other options start from; see certify recipes.",
)
@click.option("--dataset", help="A name, or folder:PATH.")
@common_options
@click.option("--model", help=f"Architecture: {ARCHITECTURES}.")
@click.option("--set", "settings", type=Setting(), multiple=True, help="Argument of the model.")
@training_options
@click.option("--out", metavar="DIR", help="Default: runs/DATASET-MODEL.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--tensorboard", is_flag=True, help="Write the metrics for TensorBoard, too.")
def train(
    recipe_name: str,
    dataset: str | None,
    data_dir: str | None,
    download: bool,
    device: str,
    model: str | None,
    settings: tuple[tuple[str, Any], ...],
    out: str | None,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
    **training: Any,
) -> None:
    """Train a classifier and write ckpt.pt, config.json and metrics.csv to --out."""
    with one_line_errors(), ExitStack() as stack:
        from certify.architectures import is_users
        from certify.commands.progress import Progress
        from certify.events import Events
        from certify.ranks import job
        from certify.recipes import recipe
        from certify.run import RunConfig, run_training
        from certify.training import EpochMetrics, Trainer

        chosen = recipe(recipe_name).changed(dataset, model, dict(settings), training)
        name = f"{chosen.dataset}-{chosen.model}".replace(":", "-").replace("/", "_")
        folder = Path(out or f"runs/{name}")
        arch = f" --arch {chosen.model}" if is_users(chosen.model) else ""
        config = chosen.config()
        run = RunConfig(
            chosen.model, dict(chosen.hyperparameters), chosen.dataset, data_dir, config, device
        )
        events = Events(folder / "tensorboard") if tensorboard else None
        ranks = stack.enter_context(job())
        bars: list[Progress] = []

        def start(trainer: Trainer) -> None:
            if config.precision == "auto":
                click.echo(f"the faster precision here: {trainer.precision}")
            total = config.epochs * trainer.steps_per_epoch
            bar = Progress(total, "step", done=trainer.steps, leave=True)
            bars.append(stack.enter_context(closing(bar)))
            if events is not None:
                stack.enter_context(closing(events)).begin(trainer.epoch)

        def step(metrics: EpochMetrics) -> None:
            bars[0].update(note=_describe(metrics))

        def epoch(metrics: EpochMetrics) -> None:
            if bars[0].in_log:
                click.echo(f"epoch {metrics.epoch + 1}/{config.epochs}: {_describe(metrics)}")
            if events is not None:
                events.write(metrics)

        with stopped_by_signals(last=ranks.count == 1) as stopped:
            checkpoint = run_training(
                run,
                folder,
                download=download,
                resume=resume,
                overwrite=overwrite,
                on_start=start,
                on_step=step,
                on_epoch=epoch,
                stop=lambda: bool(stopped),
                ranks=ranks,
            )
    path = folder / "ckpt.pt"
    if checkpoint.progress is not None:
        if ranks.first:
            click.echo(
                f"stopped and saved {path}; the same command with --resume goes on from there"
            )
        raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
    if ranks.first:
        click.echo(f"wrote {path}; next: certify eval --model {path}{arch}")


@contextmanager
def stopped_by_signals(last: bool = True) -> Iterator[list[int]]:
    """Collect the first Ctrl-C, or SIGTERM as of a batch system.

    A second one is as ever, if the first is to be the ``last``. It is not where ``torchrun`` sends
    one after another, and ends what takes too long by other means.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if last:
            for one, handler in before.items():
                signal.signal(one, handler)

    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, receive)
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _describe(metrics: Any) -> str:
    """One line of running metrics; a tilde marks what rests on estimated norms."""
    return (
        f"loss {metrics.loss:.3f}, clean {100 * metrics.clean_accuracy:.1f} %, "
        f"certified ~{100 * metrics.certified_accuracy_estimate:.1f} %, "
        f"Lipschitz ~{metrics.lipschitz_estimate:.3g}"
    )


@click.command(short_help="List the recipes of certify train.")
def recipes() -> None:
    """Print what each recipe stands for, as options of train, and how its result is evaluated."""
    from certify.recipes import describe

    click.echo(describe())
