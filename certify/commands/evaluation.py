"""``certify eval``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.commands.asked import Asked, Loaded, asks, tries
from certify.commands.options import (
    METHODS,
    TIGHTENINGS,
    BrokenError,
    check_folders,
    one_line_errors,
)

if TYPE_CHECKING:
    from certify.certified_model import CertifiedModel
    from certify.norms import Prove
    from certify.page import Page
    from certify.ranks import Ranks
    from certify.report import Report


@click.command("eval", short_help="Certify a data set with a trained classifier.")
@asks
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
@tries
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
    asked: Asked,
    method: str | None,
    tighten: str,
    certificate: str,
    precision: str | None,
    attack: bool,
    effort: Callable[[], Any],
    record_path: str | None,
    csv_path: str | None,
    json_path: str | None,
    plot_path: str | None,
    report_path: str | None,
) -> None:
    """Certify every test image: a proven L2 radius within which the prediction cannot change."""
    check_folders(record_path, csv_path, json_path, plot_path, report_path)
    with one_line_errors(), ExitStack() as stack:
        from certify.files import write_text
        from certify.norms import proven_norms
        from certify.ranks import job
        from certify.records import Recorder, check_recordable, record_of, write_record

        ranks = stack.enter_context(job())
        loaded = asked.load(ranks, "certifying")
        network, data, dataset = loaded
        method = method or network.method or "fantastic_four"
        if record_path:
            check_recordable(method, tighten, certificate)
        recorder = Recorder(ranks)

        def prover() -> Prove:
            recorder.layers.clear()
            return recorder if record_path else partial(proven_norms, ranks=ranks)

        if report_path:
            Path(report_path).mkdir(parents=True, exist_ok=True)
        if ranks.first:
            click.echo(f"bounds by {method}, {tighten}")
        bounded = partial(_bounded, loaded, prover, method, tighten, asked.domain)
        certified = _in_arithmetic(bounded, precision, certificate, ranks)
        if record_path:
            certified.check_rounding()
        report = _report(asked, certified, data, certificate, effort() if attack else None, ranks)
        if not ranks.first:
            return
        click.echo(report.to_table())
        if record_path:
            where = {"dataset": dataset, "held_out": asked.held_out}
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
            page = _page(loaded, certified, report, asked.network["model"])
            report_path = str(page.write(report_path))
        for path in filter(None, (record_path, csv_path, json_path, plot_path, report_path)):
            click.echo(f"wrote {path}")


def _bounded(
    loaded: Loaded,
    prover: Callable[[], Prove],
    method: str,
    tighten: str,
    domain: tuple[float, ...] | None,
    precision: str | None,
) -> CertifiedModel:
    from certify.certified_model import CertifiedModel

    return CertifiedModel(
        loaded.network.model,
        loaded.network.input_shape,
        method=method,
        tighten=tighten,
        domain=domain,
        precision=precision,
        prove=prover(),
    )


def _in_arithmetic(
    bounded: Callable[[str | None], CertifiedModel],
    precision: str | None,
    certificate: str,
    ranks: Ranks,
) -> CertifiedModel:
    """The network in the arithmetic asked for; else in float64, or what is known about."""
    from certify.signal import UnknownRounding

    try:
        found = bounded(precision or "float64")
        if precision != "exact":  # of which the table says how far it goes
            found.check_rounding(certificate)
        return found
    except UnknownRounding as reason:
        if precision is not None:
            raise
        if ranks.first:
            click.echo(f"radii of exact arithmetic: {reason}")
        return bounded(None)


def _report(
    asked: Asked, certified: CertifiedModel, data: Any, certificate: str, effort: Any, ranks: Ranks
) -> Report:
    """Certify, and attack if there is to be an effort; a broken radius is kept in a file."""
    import torch

    from certify.attacked import BrokenCertificate
    from certify.commands.progress import Progress
    from certify.evaluation import evaluate as certify_data
    from certify.files import write_atomically

    with ExitStack() as stack:
        bars = [
            stack.enter_context(closing(Progress(len(data), unit, shown=ranks.first)))
            for unit in ("image", "attack")[: 1 if effort is None else 2]
        ]
        try:
            return certify_data(
                certified,
                data,
                asked.eps,
                batch_size=asked.batch_size,
                certificate=certificate,
                attack=effort,
                on_batch=lambda count: bars[0].update(count * ranks.count),
                on_attacked=lambda count: bars[-1].update(count * ranks.count),
                ranks=ranks,
            )
        except BrokenCertificate as found:
            write_atomically("counterexample.pt", partial(torch.save, found.content))
            raise BrokenError(f"{found}; it is in counterexample.pt") from found


def _page(loaded: Loaded, certified: CertifiedModel, report: Report, file: str) -> Page:
    """What is known for a page: layers as far as they can be told, metrics beside a checkpoint."""
    from certify.data import pixels
    from certify.layers import report_layers
    from certify.page import Page

    network, data, dataset = loaded
    layers = report_layers(
        network.model,
        pixels(data.images[:8]),
        method="supremum" if certified.method == "best" else certified.method,
        tighten="merge",
        domain=certified.domain,
    )
    metrics = Path(file).parent / "metrics.csv"
    text = metrics.read_text() if Path(file).is_file() and metrics.is_file() else None
    return Page(f"{network.name} on {dataset}", report, data, layers, text)
