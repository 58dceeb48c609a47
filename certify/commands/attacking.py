"""``certify attack``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import click

from certify.commands.asked import Asked, asks, tries
from certify.commands.options import check_folders, one_line_errors


@click.command(short_help="Look for the nearest images of other classes.")
@asks
@tries
@click.option("--csv", "csv_path", metavar="FILE", help="Write a row per image.")
@click.option("--json", "json_path", metavar="FILE", help="Write the summary.")
def attack(
    asked: Asked, effort: Callable[[], Any], csv_path: str | None, json_path: str | None
) -> None:
    """Attack every test image of any network. What withstands an attack is not proven robust."""
    check_folders(csv_path, json_path)
    with one_line_errors(), ExitStack() as stack:
        from certify.attack_report import attack_data
        from certify.commands.progress import Progress
        from certify.files import write_text
        from certify.ranks import job

        ranks = stack.enter_context(job())
        network, data, _ = asked.load(ranks, "attacking")
        with closing(Progress(len(data), "image", shown=ranks.first)) as bar:
            report = attack_data(
                network.model,
                network.input_shape,
                data,
                asked.eps,
                domain=asked.domain,
                effort=effort(),
                batch_size=asked.batch_size,
                on_batch=lambda count: bar.update(count * ranks.count),
                ranks=ranks,
            )
        if not ranks.first:
            return
        click.echo(report.to_table())
        if csv_path:
            write_text(csv_path, report.to_csv())
        if json_path:
            write_text(json_path, report.to_json())
        for path in filter(None, (csv_path, json_path)):
            click.echo(f"wrote {path}")
