"""Speed-up of training and certification by several processes on one machine.

The same work by one process with one thread, by one process with as many threads as there are
processes otherwise, and by that many processes with one thread each, in turns; printed are the
least seconds of each, as the commands report them (start-up left out), and the ratios to the
first.

    python benchmarks/ranks.py --processes 2 --model 2c2f --epochs 2
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click


def run(processes: int, threads: int, *command: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "certify", *command],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def training_seconds(metrics: Path) -> float:
    """From the end of the first epoch to that of the last."""
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    return float(rows[-1]["seconds"]) - float(rows[0]["seconds"])


@click.command()
@click.option("--processes", default=2, show_default=True)
@click.option("--model", default="2c2f", show_default=True)
@click.option("--set", "settings", multiple=True, help="Argument of the model.")
@click.option("--epochs", default=3, show_default=True, help="One more is made, and not counted.")
@click.option("--batch-size", default=256, show_default=True)
@click.option("--method", default="best", show_default=True, help="Of eval.")
@click.option("--certificate", default="lipschitz", show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    processes: int,
    model: str,
    settings: tuple[str, ...],
    epochs: int,
    batch_size: int,
    method: str,
    certificate: str,
    rounds: int,
) -> None:
    """Measure and print the table."""
    ways = {(1, 1): [], (1, processes): [], (processes, 1): []}
    with tempfile.TemporaryDirectory() as folder:
        out, summary = Path(folder, "run"), Path(folder, "summary.json")
        for _ in range(rounds):
            for way, seconds in ways.items():
                more = [part for setting in settings for part in ("--set", setting)]
                train = ["--model", model, *more, "--batch-size", str(batch_size)]
                train += ["--epochs", str(epochs + 1), "--out", str(out), "--overwrite"]
                run(*way, "train", *train)
                evaluate = ["--model", str(out / "ckpt.pt"), "--method", method]
                evaluate += ["--certificate", certificate, "--batch-size", "50"]
                run(*way, "eval", *evaluate, "--json", str(summary))
                certified = json.loads(summary.read_text())["seconds"]
                seconds.append((training_seconds(out / "metrics.csv"), certified))
    print("| processes | threads each | training, s | ratio | certification, s | ratio |")
    print("|---|---|---|---|---|---|")
    least = {way: [min(found) for found in zip(*s, strict=True)] for way, s in ways.items()}
    first = least[1, 1]
    for (count, threads), (train, evaluation) in least.items():
        ratios = first[0] / train, first[1] / evaluation
        print(
            f"| {count} | {threads} | {train:.2f} | {ratios[0]:.2f} | {evaluation:.2f} "
            f"| {ratios[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
