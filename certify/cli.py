"""The command line: parse, call one function, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from certify.option_types import Epsilon, Numbers, Setting, Shape
from certify.train_options import training_options


class InputError(click.ClickException):
    """What the user gave cannot be used: one line, exit code 2."""

    exit_code = 2


class BrokenError(click.ClickException):
    """A certificate that an attack broke."""

    exit_code = 3


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what the library says about bad input into one line and exit code 2."""
    from certify.signal import UnsupportedModel
    from certify.training import TrainingDiverged

    try:
        yield
    except (ValueError, OSError, UnsupportedModel, TrainingDiverged) as error:
        raise InputError(" ".join(str(error).split())) from error


DEFAULT_RECIPE = "mnist-5k"

_ARCHITECTURES = "a name, torchvision:NAME, or package.module:factory"


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Options that both commands have."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
        click.option("--download", is_flag=True, help="Let torchvision fetch missing data."),
        click.option("--data-dir", metavar="DIR", help="torchvision's root folder."),
    ):
        command = option(command)
    return command


def _network(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which network: those of `_load`, and the domain."""
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
        click.option("--arch", metavar="NAME", help=f"Architecture of the file: {_ARCHITECTURES}."),
        click.option(
            "--model", required=True, metavar="FILE", help="A ckpt.pt, weights, or an architecture."
        ),
    ):
        command = option(command)
    return command


def _load(dataset: str | None, **which: Any) -> Any:
    """Load the network that `_network` names; its number of classes may follow from the data."""
    from certify.data import num_classes
    from certify.weights import load_network

    return load_network(**which, num_classes=num_classes(dataset) if dataset else None)


_METHODS = ["fantastic_four", "tensor_norm", "gram_iteration", "supremum", "best"]
_TIGHTENINGS = ["none", "merge", "join", "balance"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="certify-lipschitz")
def main() -> None:
    """Train image classifiers with provable L2 robustness, and prove it."""


@main.command(short_help="Train a classifier.")
@click.option(
    "--recipe",
    "recipe_name",
    default=DEFAULT_RECIPE,
    show_default=True,
    metavar="NAME",
    help="What the other options start from; see certify recipes.",
)
@click.option("--dataset", help="A name, or folder:PATH.")
@_common
@click.option("--model", help=f"Architecture: {_ARCHITECTURES}.")
@click.option("--set", "settings", type=Setting(), multiple=True, help="Argument of the model.")
@training_options
@click.option("--out", metavar="DIR", help="Default: runs/DATASET-MODEL.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
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
    **training: Any,
) -> None:
    """Train a classifier and write ckpt.pt, config.json and metrics.csv to --out."""
    with _one_line_errors():
        from tqdm import tqdm

        from certify.architectures import is_users
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
    path = folder / "ckpt.pt"
    click.echo(f"wrote {path}; next: certify eval --model {path}{arch}")


def _describe(metrics: Any) -> str:
    """One line of running metrics; a tilde marks what rests on estimated norms."""
    return (
        f"loss {metrics.loss:.3f}, clean {100 * metrics.clean_accuracy:.1f} %, "
        f"certified ~{100 * metrics.certified_accuracy_estimate:.1f} %, "
        f"Lipschitz ~{metrics.lipschitz_estimate:.3g}"
    )


@main.command(short_help="List the recipes of certify train.")
def recipes() -> None:
    """Print what each recipe stands for, as options of train, and how its result is evaluated."""
    from certify.recipes import describe

    click.echo(describe())


@main.command("eval", short_help="Certify a data set with a trained classifier.")
@_network
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
    type=click.Choice(_METHODS),
    help="How convolutions are bounded; best is the tightest, and slow.  "
    "[default: as in training, else fantastic_four]",
)
@click.option(
    "--tighten",
    default="join",
    show_default=True,
    type=click.Choice(_TIGHTENINGS),
    help="How far to go beyond the product of the norms.",
)
@click.option(
    "--certificate",
    default="lipschitz",
    show_default=True,
    type=click.Choice(["lipschitz", "local", "curvature", "dual", "best"]),
    help="local: for ReLU; curvature, dual: for smooth networks; best: the largest radius.",
)
@click.option(
    "--precision",
    type=click.Choice(["exact", "float64", "float32", "tf32", "bfloat16"]),
    help="Arithmetic of the machine that runs the network; radii hold for what it computes.  "
    "[default: float64, or exact where it is not known how much an operation rounds]",
)
@click.option("--attack", is_flag=True, help="Attack every image as well.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images.")
@click.option(
    "--held-out",
    metavar="N",
    type=click.IntRange(min=1),
    help="The last N training images in place of the test images.",
)
@click.option("--batch-size", default=500, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--save", "record_path", metavar="FILE", help="Write a certificate that `verify` can check."
)
@click.option("--csv", "csv_path", metavar="FILE", help="Write a row per image.")
@click.option("--json", "json_path", metavar="FILE", help="Write the summary.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw certified accuracy over radius.")
def evaluate(
    domain: tuple[float, ...] | None,
    dataset: str | None,
    data_dir: str | None,
    download: bool,
    device: str,
    eps: tuple[float, ...],
    method: str | None,
    tighten: str,
    certificate: str,
    precision: str | None,
    attack: bool,
    limit: int | None,
    held_out: int | None,
    batch_size: int,
    record_path: str | None,
    csv_path: str | None,
    json_path: str | None,
    plot_path: str | None,
    **which: Any,
) -> None:
    """Certify every test image: a proven L2 radius within which the prediction cannot change."""
    for path in (record_path, csv_path, json_path, plot_path):
        if path and not Path(path).resolve().parent.is_dir():
            raise InputError(f"the folder of {path} does not exist")
    with _one_line_errors():
        import torch
        from tqdm import tqdm

        from certify.attacked import BrokenCertificate
        from certify.certified_model import CertifiedModel
        from certify.data import load
        from certify.evaluation import evaluate as certify_data
        from certify.files import write_atomically, write_text
        from certify.norms import proven_norms
        from certify.records import Recorder, check_recordable, record_of, write_record
        from certify.run import choose_device
        from certify.signal import UnknownRounding

        network = _load(dataset, **which)
        dataset = dataset or network.dataset
        if dataset is None:
            raise InputError("pass --dataset: only a ckpt.pt of certify train names its own")
        images = "test images" if held_out is None else f"last {held_out:,} training images"
        click.echo(f"certifying {network.description} on the {images} of {dataset}")
        chosen_method = method or network.method or "fantastic_four"
        if record_path:
            check_recordable(chosen_method, tighten, certificate)
        recorder = Recorder()

        def certified_in(arithmetic: str | None) -> CertifiedModel:
            recorder.layers.clear()
            return CertifiedModel(
                network.model.to(choose_device(device)),
                network.input_shape,
                method=chosen_method,
                tighten=tighten,
                domain=domain,
                precision=arithmetic,
                prove=recorder if record_path else proven_norms,
            )

        try:
            certified = certified_in(None if precision == "exact" else precision or "float64")
        except UnknownRounding as reason:
            if precision is not None:
                raise
            click.echo(f"radii of exact arithmetic: {reason}")
            certified = certified_in(None)
        data = load(
            dataset,
            train=held_out is not None,
            data_dir=data_dir or network.data_dir,
            download=download,
        )
        if held_out is not None:
            _, data = data.split(held_out)
        data = data.head(limit)
        with tqdm(total=len(data), unit="image", disable=None, leave=False) as bar:
            try:
                report = certify_data(
                    certified,
                    data,
                    eps,
                    batch_size=batch_size,
                    certificate=certificate,
                    attack=attack,
                    on_batch=bar.update,
                )
            except BrokenCertificate as found:
                write_atomically("counterexample.pt", partial(torch.save, found.content))
                raise BrokenError(f"{found}; it is in counterexample.pt") from found
        click.echo(report.to_table())
        if record_path:
            where = {"dataset": dataset, "held_out": held_out}
            record = record_of(certified, recorder, report, data, where, network.description)
            write_record(record_path, record)
        if csv_path:
            write_text(csv_path, report.to_csv())
        if json_path:
            write_text(json_path, report.to_json())
        if plot_path:
            from certify.plots import plot_certified_accuracy

            title = f"{network.name} on {dataset}: {report.n:,} images"
            plot_certified_accuracy(report, plot_path, title)
        for path in filter(None, (record_path, csv_path, json_path, plot_path)):
            click.echo(f"wrote {path}")


@main.command(short_help="Prove a saved certificate again, by other means.")
@click.argument("certificate", metavar="FILE")
@_network
@click.option("--dataset", help="A name, or folder:PATH; default: that of the certificate.")
@_common
def verify(
    certificate: str,
    domain: tuple[float, ...] | None,
    dataset: str | None,
    data_dir: str | None,
    download: bool,
    device: str,
    **which: Any,
) -> None:
    """Check that a certificate of `eval --save` is of this model and data, and proven.

    Norms are proven again by LAPACK on a grid of frequencies, and the radii derived from them.
    """
    with _one_line_errors():
        from tqdm import tqdm

        from certify.data import load
        from certify.records import read_record
        from certify.run import choose_device
        from certify.verification import verify as verify_record

        record = read_record(certificate)
        if domain is not None:
            raise InputError("the certificate says what domain it is about: leave --domain out")
        named = record.get("data")
        named = named if isinstance(named, dict) else {}
        held_out = named.get("held_out")
        held_out = held_out if type(held_out) is int else None
        dataset = dataset or str(named.get("dataset"))
        network = _load(dataset, **which)
        data = load(
            dataset,
            train=held_out is not None,
            data_dir=data_dir or network.data_dir,
            download=download,
        )
        if held_out is not None:
            _, data = data.split(held_out)
        layers = record.get("layers")
        total = len(layers) if isinstance(layers, list) else 0
        with tqdm(total=total, unit="bound", disable=None, leave=False) as bar:
            count = verify_record(
                record,
                network.model.to(choose_device(device)),
                data,
                on_layer=lambda done: bar.update(done - bar.n),
            )
        click.echo(f"{total} bounds and {count:,} radii are proven: {certificate}")


@main.command(short_help="Bound a network's Lipschitz constant, layer by layer.")
@_network
@click.option("--dataset", help="Images on which gains are seen; default: random ones.")
@_common
@click.option("--method", default="supremum", show_default=True, type=click.Choice(_METHODS))
@click.option(
    "--tighten",
    default="balance",
    show_default=True,
    type=click.Choice(_TIGHTENINGS),
    help="The last step beyond the product of the norms that is taken.",
)
@click.option(
    "--limit", default=8, show_default=True, type=click.IntRange(min=1), help="Images to look at."
)
@click.option("--json", "json_path", metavar="FILE", help="Write the report.")
def bound(
    domain: tuple[float, ...] | None,
    dataset: str | None,
    data_dir: str | None,
    download: bool,
    device: str,
    method: str,
    tighten: str,
    limit: int,
    json_path: str | None,
    **which: Any,
) -> None:
    """Print a proven bound for every layer, beside the gain that images show there."""
    if json_path and not Path(json_path).resolve().parent.is_dir():
        raise InputError(f"the folder of {json_path} does not exist")
    with _one_line_errors():
        from certify.data import images_to_look_at
        from certify.files import write_text
        from certify.layers import report_layers
        from certify.run import choose_device

        network = _load(dataset, **which)
        images = images_to_look_at(
            dataset, network.input_shape, limit, data_dir=data_dir, download=download
        )
        click.echo(f"bounding {network.description}")
        report = report_layers(
            network.model.to(choose_device(device)),
            images,
            described_as=dataset or "random images",
            method=method,
            tighten=tighten,
            domain=domain,
        )
        click.echo(report.to_table())
        if json_path:
            write_text(json_path, report.to_json())
            click.echo(f"wrote {json_path}")


if __name__ == "__main__":
    main()
