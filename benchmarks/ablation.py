"""What each choice of a recipe is worth: one change at a time, several seeds.

    python benchmarks/ablation.py --data-dir DIR [--out runs/ablation] [--seeds 3] [--only NAME ...]

Trains a small network on 55,000 digits of MNIST for each variant and seed, unless that was done
before with the same settings, and certifies it on the other 5,000 training digits, so that choices
do not see the test digits. Prints mean and sample standard deviation over the seeds.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from certify import CertifiedModel
from certify.checkpoints import load_checkpoint
from certify.data import load_data
from certify.evaluation import evaluate
from certify.recipes import Recipe
from certify.run import RunConfig, run_training

BASE = Recipe(
    "the small network that all variants change in one place",
    dataset="mnist",
    model="liresnet",
    hyperparameters={"width": 16, "depth": [1, 2], "dense": [128]},
    training={
        "epochs": 10,
        "optimizer": "nadam",
        "lr": 4e-3,
        "clip_norm": 3.0,
        "augment": "shift:1",
        "loss": "emma",
        "epsilon": 1.58,
        "method": "supremum",
        "hold_out": 5000,
    },
)

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "block=aol": {"set": {"block": "aol"}},
    "block=sll": {"set": {"block": "sll"}},
    "block=reflector": {"set": {"block": "reflector"}},
    "block=plain": {"set": {"block": "plain"}},
    "loss=margin": {"loss": "margin"},
    "loss=gloro": {"loss": "gloro"},
    "loss=gloro-trades": {"loss": "gloro-trades"},
    "loss=annealing": {"loss": "annealing"},
    "loss=crm": {"loss": "crm", "trade_off": 5.0},
    "loss=dual, softplus head": {"loss": "dual", "set": {"head": "softplus"}},
    "ramp=0": {"ramp": 0.0},
    "ramp=1": {"ramp": 1.0},
    "method=fantastic_four": {"method": "fantastic_four"},
    "optimizer=adam": {"optimizer": "adam"},
    "optimizer=sgd": {"optimizer": "sgd", "lr": 0.1},
    "optimizer=muon": {"optimizer": "muon"},
    "schedule=linear": {"schedule": "linear"},
    "ema=0.999": {"ema": 0.999},
    "no clipping": {"clip_norm": 0.0},
    "no augmentation": {"augment": "none"},
}
EPSILONS = (0.3, 0.5, 1.58)


def measure(variant: str, seed: int, data_dir: str, out: Path) -> list[float]:
    """Train if need be; return clean and certified accuracies in per cent, and minutes."""
    folder = out / f"{variant.replace('=', '-').replace(', ', '-').replace(' ', '-')}-{seed}"
    kept = folder / "ablation.json"
    changes = dict(VARIANTS[variant])
    chosen = BASE.changed(None, None, changes.pop("set", {}), {**changes, "seed": seed})
    settings = json.loads(json.dumps(asdict(chosen)))
    before = json.loads(kept.read_text()) if kept.exists() else {}
    if before.get("settings") == settings:
        known: list[float] = before["found"]
        return known
    run = RunConfig(
        chosen.model, dict(chosen.hyperparameters), chosen.dataset, data_dir, chosen.config()
    )
    minutes: list[float] = []
    run_training(
        run, folder, overwrite=True, on_epoch=lambda metrics: minutes.append(metrics.seconds / 60)
    )
    checkpoint = load_checkpoint(folder / "ckpt.pt")
    certified = CertifiedModel(checkpoint.build(), checkpoint.input_shape, method="supremum")
    _, digits = load_data("mnist", train=True, data_dir=data_dir).split(chosen.config().hold_out)
    certificate = "dual" if chosen.config().needs_curvature else "lipschitz"
    report = evaluate(certified, digits, EPSILONS, certificate=certificate)
    accuracies = [report.clean_accuracy, *report.certified_accuracy.values()]
    found = [*(100 * accuracy for accuracy in accuracies), minutes[-1]]
    kept.write_text(json.dumps({"settings": settings, "found": found}))
    return found


@click.command()
@click.option("--data-dir", required=True)
@click.option("--out", default="runs/ablation", type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)))
@click.option("--threads", default=1, show_default=True)
def main(data_dir: str, out: Path, seeds: int, only: tuple[str, ...], threads: int) -> None:
    """Print a row for each variant: clean, certified at 0.3, 0.5 and 1.58, minutes."""
    torch.set_num_threads(threads)
    for variant in only or VARIANTS:
        rows = [measure(variant, seed, data_dir, out) for seed in range(seeds)]
        cells = [_spread([row[i] for row in rows]) for i in range(len(rows[0]) - 1)]
        minutes = statistics.mean(row[-1] for row in rows)
        click.echo(f"| {variant} | " + " | ".join(cells) + f" | {minutes:.1f} |")


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


if __name__ == "__main__":
    main()
