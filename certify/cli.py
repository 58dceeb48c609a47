"""The command line: parse, call one function, print."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import click


class InputError(click.ClickException):
    """What the user gave cannot be used: one line, exit code 2."""

    exit_code = 2


class Epsilon(click.ParamType):  # type: ignore[type-arg]  # not generic in older clicks
    """A budget, as a number or a fraction such as 36/255."""

    name = "eps"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse ``value``; a click error for anything but a number of at least zero."""
        try:
            number = float(value) if isinstance(value, float) else float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value!r} is not a number or a fraction such as 36/255", param, ctx)
        if number < 0:
            self.fail(f"{value!r} is negative; a budget is at least 0", param, ctx)
        return number


class Setting(click.ParamType):  # type: ignore[type-arg]
    """``KEY=VALUE`` with a Python literal or a bare word as value."""

    name = "key=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Parse ``value``; a click error unless it has the form ``KEY=VALUE``."""
        if isinstance(value, tuple):
            return value
        key, sign, text = str(value).partition("=")
        if not sign or not key.isidentifier():
            self.fail(f"{value!r} does not have the form KEY=VALUE", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, text


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what the library says about bad input into one line and exit code 2."""
    from certify.signal import UnsupportedModel
    from certify.training import TrainingDiverged

    try:
        yield
    except (ValueError, OSError, UnsupportedModel, TrainingDiverged) as error:
        raise InputError(" ".join(str(error).split())) from error


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Options that both commands have."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
        click.option("--download", is_flag=True, help="Let torchvision fetch missing data."),
        click.option("--data-dir", metavar="DIR", help="torchvision's root folder."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="certify-lipschitz")
def main() -> None:
    """Train image classifiers with provable L2 robustness, and prove it."""


@main.command(short_help="Train a classifier.")
@click.option("--dataset", default="mnist-5k", show_default=True, help="A name, or folder:PATH.")
@_common
@click.option("--model", default="mlp", show_default=True, help="Architecture, by name.")
@click.option("--set", "settings", type=Setting(), multiple=True, help="Model hyperparameter.")
@click.option("--epochs", default=60, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", default=3e-3, show_default=True)
@click.option(
    "--loss", default="margin", show_default=True, type=click.Choice(["margin", "cross-entropy"])
)
@click.option(
    "--eps", type=Epsilon(), default=0.5, show_default=True, help="Budget of the margin loss."
)
@click.option(
    "--lipschitz-penalty", default=0.0, metavar="BETA", help="Weight of the sum of layer norms."
)
@click.option(
    "--log-lipschitz-penalty",
    default=0.0,
    metavar="LAMBDA",
    help="Weight of the log of the network's Lipschitz constant.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", metavar="DIR", help="Default: runs/DATASET-MODEL.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
def train(
    dataset: str,
    data_dir: str | None,
    download: bool,
    device: str,
    model: str,
    settings: tuple[tuple[str, Any], ...],
    eps: float,
    out: str | None,
    resume: bool,
    overwrite: bool,
    **training: Any,
) -> None:
    """Train a classifier and write ckpt.pt, config.json and metrics.csv to --out."""
    with _one_line_errors():
        from tqdm import tqdm

        from certify.run import RunConfig, run_training
        from certify.training import EpochMetrics, Trainer, TrainingConfig

        folder = Path(out or f"runs/{dataset.replace(':', '-').replace('/', '_')}-{model}")
        config = TrainingConfig(epsilon=eps, **training)
        run = RunConfig(model, dict(settings), dataset, data_dir, config, device)
        with tqdm(unit="step", disable=None, dynamic_ncols=True) as bar:

            def start(trainer: Trainer) -> None:
                bar.reset(total=config.epochs * trainer.steps_per_epoch)
                bar.update(trainer.epoch * trainer.steps_per_epoch)

            def step(metrics: EpochMetrics) -> None:
                bar.set_postfix_str(_describe(metrics), refresh=False)
                bar.update()

            def epoch(metrics: EpochMetrics) -> None:
                if bar.disable:
                    click.echo(f"epoch {metrics.epoch + 1}/{config.epochs}: {_describe(metrics)}")

            run_training(
                run,
                folder,
                download=download,
                resume=resume,
                overwrite=overwrite,
                on_start=start,
                on_step=step,
                on_epoch=epoch,
            )
    click.echo(f"wrote {folder / 'ckpt.pt'}; next: certify eval --model {folder / 'ckpt.pt'}")


def _describe(metrics: Any) -> str:
    """One line of running metrics; a tilde marks what rests on estimated norms."""
    return (
        f"loss {metrics.loss:.3f}, clean {100 * metrics.clean_accuracy:.1f} %, "
        f"certified ~{100 * metrics.certified_accuracy_estimate:.1f} %, "
        f"Lipschitz ~{metrics.lipschitz_estimate:.3g}"
    )


@main.command("eval", short_help="Certify a data set with a trained classifier.")
@click.option("--model", required=True, metavar="CKPT", help="A ckpt.pt of certify train.")
@click.option("--dataset", help="A name, or folder:PATH; default: that of the training.")
@_common
@click.option(
    "--eps",
    type=Epsilon(),
    multiple=True,
    default=(0.1, 0.5, 1.0),
    help="L2 budget, e.g. 0.5 or 36/255; may be repeated.  [default: 0.1, 0.5, 1.0]",
)
@click.option(
    "--method",
    default="fantastic_four",
    show_default=True,
    type=click.Choice(["fantastic_four", "tensor_norm", "gram_iteration", "supremum", "best"]),
    help="How convolutions are bounded; supremum is the tightest but for best.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images.")
@click.option("--batch-size", default=500, show_default=True, type=click.IntRange(min=1))
@click.option("--csv", "csv_path", metavar="FILE", help="Write a row per image.")
@click.option("--json", "json_path", metavar="FILE", help="Write the summary.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw certified accuracy over radius.")
def evaluate(
    model: str,
    dataset: str | None,
    data_dir: str | None,
    download: bool,
    device: str,
    eps: tuple[float, ...],
    method: str,
    limit: int | None,
    batch_size: int,
    csv_path: str | None,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Certify every test image: a proven L2 radius within which the prediction cannot change."""
    for path in (csv_path, json_path, plot_path):
        if path and not Path(path).resolve().parent.is_dir():
            raise InputError(f"the folder of {path} does not exist")
    with _one_line_errors():
        from tqdm import tqdm

        from certify.certified_model import CertifiedModel
        from certify.checkpoints import load_checkpoint
        from certify.data import load
        from certify.evaluation import evaluate as certify_data
        from certify.files import write_text
        from certify.run import choose_device

        checkpoint = load_checkpoint(model)
        dataset = dataset or checkpoint.dataset
        click.echo(f"certifying {model} ({checkpoint.model}) on the test images of {dataset}")
        network = checkpoint.build().to(choose_device(device))
        certified = CertifiedModel(network, checkpoint.input_shape, method=method)
        data = load(
            dataset, train=False, data_dir=data_dir or checkpoint.data_dir, download=download
        ).head(limit)
        with tqdm(total=len(data), unit="image", disable=None, leave=False) as bar:
            report = certify_data(certified, data, eps, batch_size=batch_size, on_batch=bar.update)
        click.echo(report.to_table())
        if csv_path:
            write_text(csv_path, report.to_csv())
        if json_path:
            write_text(json_path, report.to_json())
        if plot_path:
            from certify.plots import plot_certified_accuracy

            title = f"{checkpoint.model} on {dataset}: {report.n:,} test images"
            plot_certified_accuracy(report, plot_path, title)
        for path in filter(None, (csv_path, json_path, plot_path)):
            click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
