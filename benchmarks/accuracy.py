"""Certified and attacked accuracy of finished trainings, as rows of a table.

    python benchmarks/accuracy.py runs/a runs/b ... [--attack 1000] [--eps 36/255 ...]

Each folder is what ``certify train`` left. All test images are certified, every class, with proven
bounds; so many, drawn at random, are attacked as well. What was found is kept in the folder, as
``accuracy.json``, and not computed again for the same checkpoint.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from certify import CertifiedModel
from certify.attack import Effort
from certify.checkpoints import load_checkpoint
from certify.data import load_data
from certify.evaluation import evaluate
from certify.option_types import Epsilon
from certify.report import Report
from certify.train_options import option_name, option_value
from certify.training_config import SECOND_ORDER_LOSSES, TrainingConfig


def command(folder: Path) -> str:
    """The command that repeats a training: the settings that are not the defaults."""
    settings = json.loads((folder / "config.json").read_text())
    words = [f"certify train --dataset {settings['dataset']} --model {settings['model']}"]
    fixed = ("input_shape", "num_classes")
    words += [f'--set "{k}={v}"' for k, v in settings["hyperparameters"].items() if k not in fixed]
    usual = asdict(TrainingConfig())
    for name, value in settings["training"].items():
        if value != usual[name] or name in ("epochs", "batch_size", "lr"):
            words.append(option_name(name))
            words += [] if value is True else [option_value(name, value)]
    return " ".join(words)


def measure(folder: Path, epsilons: tuple[float, ...], attacked: int, certificate: str) -> Any:
    """Certify and attack the network in a folder; return what the table shows."""
    checkpoint = load_checkpoint(folder / "ckpt.pt")
    model = checkpoint.build()
    certified = CertifiedModel(model, checkpoint.input_shape, method="best")
    data = load_data(checkpoint.dataset, train=False, data_dir=checkpoint.data_dir)
    if certificate == "auto":
        certificate = "dual" if checkpoint.config["loss"] in SECOND_ORDER_LOSSES else "lipschitz"
    whole = evaluate(certified, data, epsilons, certificate=certificate)
    found = _summary(whole)
    if attacked:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:attacked]
        some = type(data)(data.images[order], data.labels[order], data.classes)
        part = evaluate(certified, some, epsilons, certificate=certificate, attack=Effort())
        assert part.attack is not None
        found["attack"] = {
            "images": len(some),
            "certified": _listed(part.certified_accuracy),
            "attacked": _listed(part.attacked_accuracy),
            "broken": 0,  # or there would be an error
        }
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return {
        **found,
        "certificate": certificate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": float(rows[-1]["seconds"]) / 60.0,
        "seed": checkpoint.config["seed"],
        "command": command(folder),
    }


def _summary(report: Report) -> dict[str, Any]:
    return {
        "images": report.n,
        "clean": report.clean_accuracy,
        "certified": _listed(report.certified_accuracy),
        "lipschitz": report.lipschitz,
    }


def _listed(by_epsilon: dict[float, float]) -> list[float]:
    return list(by_epsilon.values())


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--eps", multiple=True, type=Epsilon(), default=("36/255", "72/255", "108/255", "1"))
@click.option("--attack", default=1000, show_default=True, help="Images to attack; 0 for none.")
@click.option("--certificate", default="auto", show_default=True)
def main(folders: tuple[Path, ...], eps: tuple[float, ...], attack: int, certificate: str) -> None:
    """Print a row of the table for each folder, and its command."""
    torch.set_num_threads(1)
    for folder in folders:
        kept = folder / "accuracy.json"
        digest = hashlib.sha256((folder / "ckpt.pt").read_bytes()).hexdigest()
        asked = {"eps": list(eps), "tried": attack, "asked": certificate, "checkpoint": digest}
        found = json.loads(kept.read_text()) if kept.exists() else {}
        if {name: found.get(name) for name in asked} != asked:
            found = {**measure(folder, eps, attack, certificate), **asked}
            kept.write_text(json.dumps(found, indent=2) + "\n")
        cells = [folder.name, str(found["seed"]), _percent(found["clean"])]
        cells += [_percent(value) for value in found["certified"]]
        if attack:
            beside = found["attack"]
            pairs = zip(beside["attacked"], beside["certified"], strict=True)
            cells.append(" ".join(f"{_percent(a)}/{_percent(c)}" for a, c in pairs))
            cells.append(str(beside["broken"]))
        cells += [f"{found['parameters'] / 1e6:.2f} M", f"{found['minutes']:.0f}"]
        click.echo("| " + " | ".join(cells) + " |")
        click.echo(f"  {found['command']}")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


if __name__ == "__main__":
    main()
