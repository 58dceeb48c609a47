"""``certify compare``."""

from __future__ import annotations

import click

from certify.commands.options import InputError, check_folders, one_line_errors


@click.command(short_help="Put the reports of several networks beside each other.")
@click.argument("reports", metavar="A.json B.json ...", nargs=-1, required=True)
@click.option("--name", "names", multiple=True, help="Of each report, in their order.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw all curves into one picture.")
def compare(reports: tuple[str, ...], names: tuple[str, ...], plot_path: str | None) -> None:
    """Print what `eval --json` or `eval --report` wrote for several networks, side by side."""
    if names and len(names) != len(reports):
        raise InputError(f"{len(reports)} reports have {len(names)} names: give one each, or none")
    check_folders(plot_path)
    with one_line_errors():
        from certify.comparison import Comparison

        comparison = Comparison.of(reports, names)
        click.echo(comparison.to_table())
        if plot_path:
            comparison.plot(plot_path)
            click.echo(f"wrote {plot_path}")
