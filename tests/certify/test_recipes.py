"""Named settings of whole trainings, and the commands that know them."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from certify import TrainingConfig, architectures
from certify.augmentation import augmentations
from certify.cli import main
from certify.commands.training import DEFAULT_RECIPE
from certify.data import num_classes
from certify.recipes import RECIPES, Recipe, describe, recipe
from certify.train_options import option_name, option_value

SHAPES = {"mnist": (1, 28, 28), "mnist-5k": (1, 28, 28), "cifar10": (3, 32, 32)}


def told(words: str) -> dict[str, Any]:
    """What the options of a described command stand for, by the command's own parser."""
    program, command, *options = shlex.split(words)
    assert program == "certify"
    return main.commands[command].make_context(command, options).params


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_network(name: str) -> None:
    found = recipe(name)
    assert found is RECIPES[name]
    config = found.config()
    assert isinstance(config, TrainingConfig)
    shape = SHAPES[found.dataset]
    hyperparameters = architectures.keywords(
        found.model,
        found.hyperparameters,
        input_shape=shape,
        num_classes=num_classes(found.dataset),
    )
    assert set(found.hyperparameters) < set(hyperparameters)
    model = architectures.build(found.model, hyperparameters).eval()
    assert model(torch.rand(2, *shape)).shape == (2, num_classes(found.dataset))
    augmentations(config.augment, found.dataset)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_sets_differs_from_the_defaults(name: str) -> None:
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert set(recipe(name).training) <= known
    config = dataclasses.asdict(recipe(name).config())
    assert {key: config[key] for key in recipe(name).training} == recipe(name).training


def test_the_default_is_a_recipe() -> None:
    assert DEFAULT_RECIPE in RECIPES


def test_an_unknown_name_lists_all() -> None:
    with pytest.raises(ValueError, match=r"expected recipe to be one of mnist-5k, .*, got 'nope'"):
        recipe("nope")


def test_fields_that_do_not_exist_or_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="learning"):
        Recipe("x", "mnist", "mlp", training={"learning": 1}).config()
    with pytest.raises(ValueError, match="expected lr > 0"):
        Recipe("x", "mnist", "mlp", training={"lr": 0.0}).config()


# --- changes ----------------------------------------------------------------------------------


BASE = Recipe(
    "about",
    dataset="mnist",
    model="mlp",
    hyperparameters={"hidden": [8], "activation": "relu"},
    training={"epochs": 3, "lr": 0.1},
    evaluation="--eps 1",
)


def test_nothing_asked_changes_nothing() -> None:
    assert BASE.changed(None, None, {}, {}) == BASE
    assert BASE.changed(None, None, {}, {"epochs": None, "seed": None}) == BASE
    assert BASE.changed("mnist", "mlp", {}, {"epochs": 3}) == BASE


def test_what_is_asked_for_comes_first() -> None:
    found = BASE.changed("cifar10", None, {"hidden": [4]}, {"lr": 0.5, "seed": 0, "epochs": None})
    assert found.dataset == "cifar10"
    assert found.model == "mlp"
    assert found.hyperparameters == {"hidden": [4], "activation": "relu"}
    assert found.training == {"epochs": 3, "lr": 0.5, "seed": 0}
    assert (found.about, found.evaluation) == ("about", "--eps 1")
    assert BASE.hyperparameters == {"hidden": [8], "activation": "relu"}  # and it stays
    assert BASE.training == {"epochs": 3, "lr": 0.1}


@pytest.mark.parametrize("value", [0, 0.0, False, ""])
def test_values_that_look_like_nothing_are_asked_for(value: object) -> None:
    assert BASE.changed(None, None, {}, {"lr": value}).training["lr"] == value


def test_another_model_does_not_get_the_hyperparameters_of_the_first() -> None:
    found = BASE.changed(None, "2c2f", {"width": 2}, {})
    assert found.model == "2c2f"
    assert found.hyperparameters == {"width": 2}
    assert found.training == BASE.training
    same = BASE.changed(None, "mlp", {"width": 2}, {})
    assert same.hyperparameters == {"hidden": [8], "activation": "relu", "width": 2}


# --- the text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_description_says_what_the_recipe_is(name: str) -> None:
    found = recipe(name)
    (text,) = [part for part in describe().split("\n\n") if part.startswith(f"{name}: ")]
    about, training, evaluation, *rest = text.split("\n")
    assert about == f"{name}: {found.about}"
    settings = " ".join(" ".join(rest).split()) + ","
    assert f"dataset {found.dataset}," in settings
    assert f"model {found.model}," in settings
    for key, value in found.hyperparameters.items():
        assert f"{key}={value}," in settings
    for key, value in found.training.items():
        assert f"{option_name(key)[2:]} {option_value(key, value)}," in settings

    params = told(training)
    nothing = {field.name: params[field.name] for field in dataclasses.fields(TrainingConfig)}
    asked = recipe(params["recipe_name"]).changed(
        params["dataset"], params["model"], dict(params["settings"]), nothing
    )
    assert asked == found
    assert params["out"] == f"runs/{name}"
    asked_evaluation = told(evaluation)
    assert asked_evaluation["model"] == f"runs/{name}/ckpt.pt"
    assert asked_evaluation["eps"]


def test_the_text_fits_on_a_screen() -> None:
    assert len(describe().splitlines()) <= 60


def test_the_command_prints_it() -> None:
    result = CliRunner().invoke(main, ["recipes"])
    assert result.exit_code == 0, result.output
    assert result.output == describe() + "\n"


def test_an_unknown_recipe_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(main, ["train", "--recipe", "nope", "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.output.splitlines()
    assert line.startswith("Error: expected recipe to be one of mnist-5k, ")
    assert not out.exists()


def test_options_come_before_those_of_a_recipe(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--set", "hidden=[4]", "--batch-size", "4000", "--lr", "0.001"]
    out = tmp_path / "run"
    result = CliRunner().invoke(
        main, ["train", "--recipe", "mnist-5k", *options, "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    content = torch.load(out / "ckpt.pt", weights_only=True)
    assert content["hyperparameters"]["hidden"] == [4]
    expected = dataclasses.replace(recipe("mnist-5k").config(), epochs=1, batch_size=4000, lr=0.001)
    assert content["config"] == dataclasses.asdict(expected)
