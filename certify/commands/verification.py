"""``certify verify``."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from certify.commands.asked import load_images
from certify.commands.options import (
    InputError,
    common_options,
    load_named,
    network_options,
    one_line_errors,
)


@click.command(short_help="Prove a saved certificate again, by other means.")
@click.argument("certificate", metavar="FILE")
@network_options
@click.option("--dataset", help="A name, or folder:PATH; default: that of the certificate.")
@common_options
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
    with one_line_errors():
        from certify.commands.progress import Progress
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
        network = load_named(dataset, **which)
        data = load_images(
            dataset, network, data_dir=data_dir, download=download, held_out=held_out
        )
        layers = record.get("layers")
        total = len(layers) if isinstance(layers, list) else 0
        with closing(Progress(total, "bound")) as bar:
            count = verify_record(
                record,
                network.model.to(choose_device(device)),
                data,
                on_layer=lambda done: bar.update(),
            )
        click.echo(f"{total} bounds and {count:,} radii are proven: {certificate}")
