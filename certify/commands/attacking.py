"""``certify attack``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import click

from certify.commands.options import (
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


@click.command(short_help="Look for the nearest images of other classes.")
@network_options
@click.option("--dataset", help="A name, or folder:PATH; default: that of the training.")
@common_options
@images_options
@effort_options
@click.option("--csv", "csv_path", metavar="FILE", help="Write a row per image.")
@click.option("--json", "json_path", metavar="FILE", help="Write the summary.")
def attack(
    domain: tuple[float, ...] | None,
    dataset: str | None,
    data_dir: str | None,
    download: bool,
    device: str,
    eps: tuple[float, ...],
    limit: int | None,
    held_out: int | None,
    batch_size: int,
    attack_steps: int,
    restarts: int,
    foolbox: bool,
    csv_path: str | None,
    json_path: str | None,
    **which: Any,
) -> None:
    """Attack every test image of any network. What withstands an attack is not proven robust."""
    check_folders(csv_path, json_path)
    with one_line_errors(), ExitStack() as stack:
        from certify.attack import Effort
        from certify.attack_report import attack_data
        from certify.commands.progress import Progress
        from certify.files import write_text
        from certify.ranks import job
        from certify.run import choose_device

        ranks = stack.enter_context(job())
        network = load_named(dataset, **which)
        dataset = dataset or network.dataset
        if dataset is None:
            raise InputError("pass --dataset: only a ckpt.pt of certify train names its own")
        images = "test images" if held_out is None else f"last {held_out:,} training images"
        if ranks.first:
            click.echo(f"attacking {network.description} on the {images} of {dataset}")
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
        with Progress(len(data), "image", shown=ranks.first) as bar:
            report = attack_data(
                network.model.to(choose_device(device)),
                network.input_shape,
                data,
                eps,
                domain=domain,
                effort=Effort(attack_steps, restarts, foolbox),
                batch_size=batch_size,
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
