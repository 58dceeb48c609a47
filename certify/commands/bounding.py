"""``certify bound``."""

from __future__ import annotations

from typing import Any

import click

from certify.commands.options import (
    METHODS,
    TIGHTENINGS,
    check_folders,
    common_options,
    load_named,
    network_options,
    one_line_errors,
)


@click.command(short_help="Bound a network's Lipschitz constant, layer by layer.")
@network_options
@click.option("--dataset", help="Images on which gains are seen; default: random ones.")
@common_options
@click.option("--method", default="supremum", show_default=True, type=click.Choice(METHODS))
@click.option(
    "--tighten",
    default="balance",
    show_default=True,
    type=click.Choice(TIGHTENINGS),
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
    check_folders(json_path)
    with one_line_errors():
        from certify.data import images_to_look_at
        from certify.files import write_text
        from certify.layers import report_layers
        from certify.run import choose_device

        network = load_named(dataset, **which)
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
