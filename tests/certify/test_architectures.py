from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from certify.architectures import (
    ArchitectureError,
    build,
    is_architecture,
    is_torchvision,
    is_users,
    keywords,
)

WriteCode = Callable[[str, str], None]

NETS = """
from torch import nn

def both(input_shape, num_classes, width=4):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    layers = nn.Linear(size, width), nn.ReLU(), nn.Linear(width, num_classes)
    return nn.Sequential(nn.Flatten(), *layers)

def classes(*, num_classes):
    return nn.Linear(3, num_classes)

def neither():
    return nn.Linear(3, 5)

def anything(**settings):
    return nn.Linear(len(settings), settings["num_classes"])

def positional(num_classes=2, /):
    return nn.Linear(3, num_classes)

class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.fc = nn.Linear(2, num_classes)

class Zoo:
    @staticmethod
    def small():
        return nn.Linear(1, 1)

def lazily():
    from nets_lazy import make
    return make()

def fails():
    raise RuntimeError("no such layer\\nand more")

def leaves():
    raise SystemExit(3)

def number():
    return 3

made = nn.Linear(1, 1)
constant = 3
"""


@pytest.mark.parametrize(
    ("name", "own", "torchvision", "users"),
    [
        ("mlp", True, False, False),
        ("torchvision:resnet18", False, True, False),
        ("torchvision:no.such:thing", False, True, False),
        ("nets:make", False, False, True),
        ("a.b-c.d:Class.method", False, False, True),
        ("ckpt.pt", False, False, False),
        ("folder/nets:make", False, False, False),
        ("nets:", False, False, False),
        (":make", False, False, False),
        ("nets:make it", False, False, False),
        ("__import__('os'):system", False, False, False),
    ],
)
def test_forms_of_names(name: str, own: bool, torchvision: bool, users: bool) -> None:
    assert (name in models.MODELS, is_torchvision(name), is_users(name)) == (
        own,
        torchvision,
        users,
    )
    assert is_architecture(name) == (own or torchvision or users)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("mlp", {"input_shape", "num_classes"}),
        ("torchvision:resnet18", {"num_classes"}),
        ("nets:both", {"input_shape", "num_classes"}),
        ("nets:classes", {"num_classes"}),
        ("nets:neither", set()),
        ("nets:anything", {"input_shape", "num_classes"}),
        ("nets:positional", set()),
        ("nets:Net", {"num_classes"}),
    ],
)
def test_only_accepted_keywords_are_passed(
    write_code: WriteCode, name: str, accepted: set[str]
) -> None:
    write_code("nets.py", NETS)
    offered: dict[str, Any] = {"input_shape": (3, 8, 8), "num_classes": 7}
    arguments = keywords(name, {}, **offered)
    assert arguments == {key: offered[key] for key in accepted}
    assert isinstance(build(name, arguments), nn.Module)
    assert keywords(name, {"num_classes": 2, "x": 1}, **offered) == {
        **arguments,
        "num_classes": 2,
        "x": 1,
    }
    assert keywords(name, {}) == {}


def test_what_is_built(write_code: WriteCode) -> None:
    write_code("nets.py", NETS)
    built: Any = build("nets:both", {"input_shape": (1, 2, 2), "num_classes": 3, "width": 6})
    assert built[1].weight.shape == (6, 4)
    assert type(build("nets:Net", {})).__name__ == "Net"
    assert isinstance(build("nets:Zoo.small", {}), nn.Linear)


def test_imports_are_from_the_current_folder(write_code: WriteCode, tmp_path: Path) -> None:
    write_code("nets.py", NETS)
    write_code("nets_lazy.py", "from torch import nn\nmake = nn.Identity\n")
    write_code("nets_package/deep/here.py", "from torch import nn\nmake = nn.Identity\n")
    before = list(sys.path)
    assert isinstance(build("nets:lazily", {}), nn.Identity)
    assert isinstance(build("nets_package.deep.here:make", {}), nn.Identity)
    assert sys.path == before
    assert isinstance(build("torch.nn:Identity", {}), nn.Identity)  # and from the environment


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vgg", {}, "expected model to be one of mlp, .*, torchvision:NAME or package.module:f"),
        ("mlp", {"hidden": 3}, "building mlp failed: TypeError: 'int' object is not iterable"),
        ("nowhere.nets:make", {}, "cannot import 'nowhere.nets': ModuleNotFoundError: No module"),
        ("nets_broken:make", {}, "cannot import 'nets_broken': SyntaxError"),
        ("nets_script:make", {}, "cannot import 'nets_script': SystemExit: 1"),
        ("nets:make", {}, r"'nets' has no 'make' \(.*nets.py\)"),
        ("nets:made", {}, "expected nets:made to be a function or class .* of type Linear"),
        ("nets:constant", {}, "expected nets:constant to be a function or class .* of type int"),
        ("nets:number", {}, "expected nets:number to return an nn.Module, got int"),
        ("nets:fails", {}, "building nets:fails failed: RuntimeError: no such layer$"),
        ("nets:leaves", {}, "building nets:leaves failed: SystemExit: 3"),
        ("nets:classes", {}, "failed: TypeError: classes.. missing .* argument: 'num_classes'"),
        ("nets:neither", {"x": 1}, "failed: TypeError: .* unexpected keyword argument 'x'"),
        ("nets:neither", {1: 1}, "failed: TypeError"),
        ("torchvision:fcn_resnet50", {}, "expected a classifier of torchvision.models.*fcn_resn"),
        ("torchvision:quantized_resnet18", {}, "expected a classifier of torchvision.models"),
        ("torchvision:ResNet", {}, "expected a classifier of torchvision.models"),
        ("torchvision:resnet18", {"x": 1}, "building torchvision:resnet18 failed: TypeError"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "is built without weights"),
        ("torchvision:resnet18", {"pretrained": True}, "failed: TypeError"),
    ],
)
def test_refusals(
    write_code: WriteCode, name: str, arguments: dict[Any, Any], message: str
) -> None:
    write_code("nets.py", NETS)
    write_code("nets_broken.py", "def make(:\n")
    write_code("nets_script.py", "import sys\nsys.exit(1)\n")
    before = list(sys.path)
    with pytest.raises(ArchitectureError, match=message):
        build(name, arguments)
    assert sys.path == before


@pytest.mark.parametrize("file", ["models.py", "models/__init__.py", "models/small.py"])
def test_a_package_named_as_one_in_use_is_not_mistaken(write_code: WriteCode, file: str) -> None:
    """Otherwise ``models:resnet18`` would be ours without a word."""
    write_code(file, "def resnet18(): ...\n")
    with pytest.raises(ArchitectureError, match=r"'models' in the current folder .* rename yours"):
        build("models:resnet18", {})


def test_a_folder_without_code_hides_nothing(write_code: WriteCode) -> None:
    write_code("models/notes.txt", "weights are kept here")
    assert isinstance(build("models:mlp", {}), nn.Module)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "mnasnet0_5", "squeezenet1_1"])
def test_torchvision(name: str) -> None:
    """Without warnings, which the suite turns into errors, and with one output in training."""
    model = build(f"torchvision:{name}", {"num_classes": 3}).train()
    size = 299 if name == "inception_v3" else 64
    with torch.no_grad():
        assert model(torch.rand(2, 3, size, size)).shape == (2, 3)
