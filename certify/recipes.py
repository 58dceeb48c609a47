"""Named settings of whole trainings.

Each is data: what to train on what, and how. Options on the command line go before a recipe's.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from certify.train_options import option_name, option_value
from certify.training_config import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.

    Attributes:
        about: what it is for, in a line.
        dataset: name for `certify.data.load_data`.
        model: name for `certify.architectures.build`.
        hyperparameters: of the model.
        training: fields of `TrainingConfig`; those that are missing keep their defaults.
        evaluation: options of ``certify eval`` that go with it.
    """

    about: str
    dataset: str
    model: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: str = ""

    def config(self) -> TrainingConfig:
        """The training's settings.

        Raises:
            ValueError: see `TrainingConfig`.
        """
        return TrainingConfig(**self.training)

    def changed(
        self,
        dataset: str | None,
        model: str | None,
        hyperparameters: Mapping[str, Any],
        training: Mapping[str, Any],
    ) -> Recipe:
        """This recipe with what was asked for in place of its own; ``None`` changes nothing.

        Another model does not get the hyperparameters of the recipe's own.
        """
        kept = self.hyperparameters if model in (None, self.model) else {}
        asked = {name: value for name, value in training.items() if value is not None}
        return replace(
            self,
            dataset=dataset or self.dataset,
            model=model or self.model,
            hyperparameters={**kept, **hyperparameters},
            training={**self.training, **asked},
        )


_FLAT = {"width": 16, "depth": [0, 0], "dense": [256, 256, 256, 256]}
"""Orthogonal dense layers behind one convolution: on MNIST more convolutions certified less."""

_MNIST = {
    "optimizer": "nadam",
    "lr": 4e-3,
    "warm_up": 0.05,
    "clip_norm": 3.0,
    "augment": "none",
    "loss": "emma",
    "method": "supremum",
    "precision": "auto",
}

_AT_MNIST = "--method best --eps 0.3 --eps 0.5 --eps 1.58 --attack"

_CIFAR = {
    "optimizer": "nadam",
    "lr": 2e-3,
    "warm_up": 0.05,
    "clip_norm": 3.0,
    "augment": "shift:4,flip",
    "loss": "emma",
    "epsilon": 84 / 255,
    "epsilon_start": 4 / 255,
    "method": "supremum",
    "precision": "auto",
}

_AT_CIFAR = "--method best --eps 36/255 --eps 72/255 --eps 108/255 --eps 1 --attack"

RECIPES: dict[str, Recipe] = {
    "mnist-5k": Recipe(
        "the demo: half a minute on two CPU cores, no download",
        dataset="mnist-5k",
        model="mlp",
        training={"epochs": 60, "batch_size": 128, "lr": 3e-3},
        evaluation="--eps 0.5",
    ),
    "mnist-0.5": Recipe(
        "two CPU cores, minutes: certified at small radii",
        dataset="mnist",
        model="liresnet",
        hyperparameters=_FLAT,
        training={**_MNIST, "epochs": 60, "epsilon": 0.9, "augment": "shift:1"},
        evaluation=_AT_MNIST,
    ),
    "mnist-0.5-dual": Recipe(
        "the same with a smooth last layer, certified by duality; an hour on one core",
        dataset="mnist",
        model="liresnet",
        hyperparameters={**_FLAT, "head": "softplus"},
        training={
            **_MNIST,
            "epochs": 120,
            "epsilon": 0.9,
            "augment": "shift:1",
            "loss": "dual",
        },
        evaluation=_AT_MNIST.replace("--method best", "--method best --certificate best"),
    ),
    "mnist-1.58": Recipe(
        "the same for large radii",
        dataset="mnist",
        model="liresnet",
        hyperparameters=_FLAT,
        training={**_MNIST, "epochs": 20, "epsilon": 2.2},
        evaluation=_AT_MNIST,
    ),
    "cifar10-small": Recipe(
        "two CPU cores, 90 minutes",
        dataset="cifar10",
        model="liresnet",
        hyperparameters={"width": 64, "depth": [1, 2], "dense": [256, 256]},
        training={**_CIFAR, "augment": "shift:2,flip", "epochs": 150, "max_minutes": 88.0},
        evaluation=_AT_CIFAR,
    ),
    "cifar10-gpu": Recipe(
        "one GPU, 22 minutes however far it has come (not measured; see docs/results.md)",
        dataset="cifar10",
        model="liresnet",
        hyperparameters={"width": 256, "depth": [1, 2], "dense": [512, 512]},
        training={
            **_CIFAR,
            "epochs": 300,
            "max_minutes": 22.0,
            "lr": 1e-3,
            "cuda_graph": True,
            "channels_last": True,
        },
        evaluation=_AT_CIFAR,
    ),
    "cifar10-best": Recipe(
        "one GPU, long (not measured)",
        dataset="cifar10",
        model="liresnet",
        hyperparameters={"width": 512, "depth": [2, 4], "dense": [512, 512]},
        training={**_CIFAR, "epochs": 800, "lr": 1e-3, "cuda_graph": True, "channels_last": True},
        evaluation=_AT_CIFAR,
    ),
}
"""By the names that ``certify train --recipe`` takes."""


def recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        ValueError: an unknown name; the message lists all.
    """
    if name not in RECIPES:
        raise ValueError(f"expected recipe to be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def describe() -> str:
    """All recipes as a text: what each is for, how it is run, and its settings."""
    parts = [
        f"{name}: {found.about}\n"
        f"  certify train --recipe {name} --out runs/{name}\n"
        f"  certify eval --model runs/{name}/ckpt.pt {found.evaluation}\n"
        + textwrap.indent(textwrap.fill(_settings(found), 94, break_on_hyphens=False), "    ")
        for name, found in RECIPES.items()
    ]
    where = (
        "mnist and cifar10: add --data-dir DIR to train, or --dataset folder:DIR "
        "(docs/command_line.md, Data)"
    )
    return "\n\n".join([*parts, where])


def _settings(found: Recipe) -> str:
    """The settings by the names of their options."""
    words = [f"dataset {found.dataset}", f"model {found.model}"]
    words += [f"{key}={value}" for key, value in found.hyperparameters.items()]
    words += [f"{option_name(k)[2:]} {option_value(k, v)}" for k, v in found.training.items()]
    return ", ".join(words)
