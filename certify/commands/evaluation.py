"""``certify eval``."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from certify.commands.options import (
    METHODS,
    TIGHTENINGS,
    BrokenError,
    InputError,
    check_folders,
    common_options,
    effort_options,
    images_options,
    load_images,
    load_named,
    network_options,
    one_line_errors,
)


@click.command("eval", short_help="Certify a data set with a trained classifier.")
@network_options
@click.option("--dataset", help="A name, or folder:PATH; default: that of the training.")
@common_options
@images_options
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="How convolutions are bounded; best is the tightest, and slow.  "
    "[default: as in training, else fantastic_four]",
)
@click.option(
    "--tighten",
    default="join",
    show_default=True,
    type=click.Choice(TIGHTENINGS),
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
@effort_options
@click.option(
    "--save", "record_path", metavar="FILE", help="Write a certificate that `verify` can check."
)
@click.option("--csv", "csv_path", metavar="FILE", help="Write a row per image.")
@click.option("--json", "json_path", metavar="FILE", help="Write the summary.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw certified accuracy over radius.")
@click.option(
    "--report", "report_path", metavar="DIR", help="Write a page to look at, with its plots."
)
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
    attack_steps: int,
    restarts: int,
    foolbox: bool,
    limit: int | None,
    held_out: int | None,
    batch_size: int,
    record_path: str | None,
    csv_path: str | None,
    json_path: str | None,
    plot_path: str | None,
    report_path: str | None,
    **which: Any,
) -> None:
    """Certify every test image: a proven L2 radius within which the prediction cannot change."""
    check_folders(record_path, csv_path, json_path, plot_path, report_path)
    with one_line_errors(), ExitStack() as stack:
        import torch

        from certify.attack import Effort
        from certify.attacked import BrokenCertificate
        from certify.certified_model import CertifiedModel
        from certify.commands.progress import Progress
        from certify.evaluation import evaluate as certify_data
        from certify.files import write_atomically, write_text
        from certify.norms import proven_norms
        from certify.ranks import job
        from certify.records import Recorder, check_recordable, record_of, write_record
        from certify.run import choose_device
        from certify.signal import UnknownRounding

        ranks = stack.enter_context(job())

        def say(line: str) -> None:
            if ranks.first:
                click.echo(line)

        network = load_named(dataset, **which)
        dataset = dataset or network.dataset
        if dataset is None:
            raise InputError("pass --dataset: only a ckpt.pt of certify train names its own")
        images = "test images" if held_out is None else f"last {held_out:,} training images"
        say(f"certifying {network.description} on the {images} of {dataset}")
        data = ranks.in_turn(
            lambda: load_images(
                dataset,
                network,
                data_dir=data_dir,
                download=download,
                held_out=held_out,
                limit=limit,
            )
        )
        chosen_method = method or network.method or "fantastic_four"
        if record_path:
            check_recordable(chosen_method, tighten, certificate)
        recorder = Recorder(ranks)

        def certified_in(arithmetic: str | None) -> CertifiedModel:
            recorder.layers.clear()
            return CertifiedModel(
                network.model.to(choose_device(device)),
                network.input_shape,
                method=chosen_method,
                tighten=tighten,
                domain=domain,
                precision=arithmetic,
                prove=recorder if record_path else partial(proven_norms, ranks=ranks),
            )

        try:
            certified = certified_in(None if precision == "exact" else precision or "float64")
        except UnknownRounding as reason:
            if precision is not None:
                raise
            say(f"radii of exact arithmetic: {reason}")
            certified = certified_in(None)
        if record_path:
            certified.check_rounding()
        with Progress(len(data), "image", shown=ranks.first) as bar:
            try:
                report = certify_data(
                    certified,
                    data,
                    eps,
                    batch_size=batch_size,
                    certificate=certificate,
                    attack=Effort(attack_steps, restarts, foolbox) if attack else None,
                    on_batch=lambda count: bar.update(count * ranks.count),
                    ranks=ranks,
                )
            except BrokenCertificate as found:
                write_atomically("counterexample.pt", partial(torch.save, found.content))
                raise BrokenError(f"{found}; it is in counterexample.pt") from found
        say(report.to_table())
        if not ranks.first:
            return
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
        if report_path:
            title = f"{network.name} on {dataset}"
            page = _page(title, certified, report, data, network.model, which["model"])
            report_path = str(page.write(report_path))
        for path in filter(None, (record_path, csv_path, json_path, plot_path, report_path)):
            say(f"wrote {path}")


def _page(title: str, certified: Any, report: Any, data: Any, model: Any, file: str) -> Any:
    """What is known for a page: layers as far as they can be told, metrics beside a checkpoint."""
    from certify.data import pixels
    from certify.layers import report_layers
    from certify.page import Page

    layers = report_layers(
        model,
        pixels(data.images[:8]),
        method="supremum" if certified.method == "best" else certified.method,
        tighten="merge",
        domain=certified.domain,
    )
    metrics = Path(file).parent / "metrics.csv"
    text = metrics.read_text() if Path(file).is_file() and metrics.is_file() else None
    return Page(title, report, data, layers, text)
