"""Networks by name: this project's, torchvision's, and the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import models

TORCHVISION_INPUT = (3, 224, 224)
"""Input shape for which torchvision's classifiers were made."""

_TORCHVISION = "torchvision:"
# Auxiliary logits would be a second output; without init_weights these two warn.
_TORCHVISION_SETTINGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


class ArchitectureError(ValueError):
    """The network cannot be built; the message says which name or argument is at fault."""


def is_architecture(name: str) -> bool:
    """Whether ``name`` has the form of an architecture's name; nothing is imported."""
    return name in models.MODELS or is_torchvision(name) or is_users(name)


def is_torchvision(name: str) -> bool:
    """Whether ``name`` is ``torchvision:NAME``."""
    return name.startswith(_TORCHVISION)


def is_users(name: str) -> bool:
    """Whether ``name`` is ``package.module:factory``: building it imports and runs that code.

    Example:
        >>> is_users("nets.small:make"), is_users("torchvision:resnet18"), is_users("mlp")
        (True, False, False)
    """
    module, colon, factory = name.partition(":")
    path = [*module.split("."), *factory.split(".")]
    return bool(colon) and not is_torchvision(name) and all(map(_is_part_of_a_path, path))


def keywords(
    name: str,
    hyperparameters: Mapping[str, Any],
    *,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments with which to `build` an architecture.

    Args:
        name: as in `build`.
        hyperparameters: passed in any case; they come before the other two.
        input_shape: passed where the architecture has an argument of that name, or takes any.
        num_classes: likewise.

    Raises:
        ArchitectureError: a name that means nothing, or cannot be imported.
    """
    offered = {"input_shape": input_shape, "num_classes": num_classes}
    accepted = ["num_classes"] if is_torchvision(name) else _accepted(_factory(name), offered)
    given = {key: offered[key] for key in accepted if offered[key] is not None}
    return {**given, **hyperparameters}


def build(name: str, hyperparameters: Mapping[str, Any]) -> nn.Module:
    """Build a network, with random weights or those that the user's factory gives it.

    Args:
        name: a key of `models.MODELS`; ``torchvision:NAME`` with one of torchvision's classifiers;
            or ``package.module:factory`` with a function or an ``nn.Module`` class, imported from
            the current folder or the environment. A name read from a file must not be passed on
            where `is_users` says that it would import code.
        hyperparameters: keyword arguments.

    Raises:
        ArchitectureError: a name that means nothing, a factory that fails, or that returns
            something other than an ``nn.Module``.
        ValueError: from `models.build`.
    """
    if is_torchvision(name) and "weights" in hyperparameters:
        raise ArchitectureError(
            f"{name} is built without weights; save their state_dict to a file and load that"
        )
    factory = _factory(name)
    try:
        with _current_folder_first():
            model = factory(**hyperparameters)
    except (Exception, SystemExit) as error:
        if name in models.MODELS and isinstance(error, ValueError):
            raise
        raise ArchitectureError(f"building {name} failed: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"expected {name} to return an nn.Module, got {type(model).__name__}"
        )
    return model


def _factory(name: str) -> Callable[..., object]:
    if name in models.MODELS:

        def build_own(**hyperparameters: Any) -> nn.Module:
            return models.build(name, **hyperparameters)

        return build_own
    if is_torchvision(name):
        return _torchvision_factory(name.removeprefix(_TORCHVISION))
    if is_users(name):
        return _users_factory(name)
    raise ArchitectureError(
        f"expected model to be one of {', '.join(models.MODELS)}, torchvision:NAME or "
        f"package.module:factory, got {name!r}"
    )


def _torchvision_factory(name: str) -> Callable[..., object]:
    from torchvision import models as classifiers

    if name not in classifiers.list_models(module=classifiers):
        raise ArchitectureError(
            f"expected a classifier of torchvision.models, such as resnet18, got {name!r}"
        )

    def build_torchvision(**hyperparameters: Any) -> object:
        settings = {**_TORCHVISION_SETTINGS.get(name, {}), **hyperparameters}
        return classifiers.get_model(name, weights=None, **settings)

    return build_torchvision


def _users_factory(name: str) -> Callable[..., object]:
    path, _, attribute = name.partition(":")
    with _current_folder_first():
        _refuse_hidden(path.split(".")[0])
        try:
            module = importlib.import_module(path)
        except (Exception, SystemExit) as error:
            raise ArchitectureError(f"cannot import {path!r}: {_reason(error)}") from error
    try:
        factory: Any = attrgetter(attribute)(module)
    except AttributeError as error:
        raise ArchitectureError(f"{path!r} has no {attribute!r} ({_place(module)})") from error
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArchitectureError(
            f"expected {name} to be a function or class that makes the model, "
            f"got an object of type {type(factory).__name__}"
        )
    made: Callable[..., object] = factory
    return made


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Import from the current folder first, as ``python -m`` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _refuse_hidden(top: str) -> None:
    """Refuse a package of the current folder that one of the same name, in use, would replace.

    A folder ``models`` is the common case: this project has a package of that name.
    """
    loaded, here = sys.modules.get(top), PathFinder.find_spec(top, [os.getcwd()])
    if loaded is None or here is None:
        return
    if here.origin is None:  # a folder without __init__.py: one of code, or just of that name?
        folders = [Path(folder) for folder in here.submodule_search_locations or ()]
        if not any(any(folder.glob("*.py")) for folder in folders):
            return
        place = str(folders[0])
    else:
        place = here.origin
    if Path(place).resolve() != Path(_place(loaded)).resolve():
        raise ArchitectureError(
            f"{top!r} in the current folder cannot be imported, as {top!r} is already "
            f"{_place(loaded)}; rename yours"
        )


def _place(module: ModuleType) -> str:
    """Where a module was imported from: a file, or the folder of a package without one."""
    file = getattr(module, "__file__", None)
    return str(file or next(iter(getattr(module, "__path__", [])), "built in"))


def _accepted(factory: Callable[..., object], names: Mapping[str, Any]) -> list[str]:
    """Those ``names`` that can be passed to ``factory`` as keyword arguments."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some callables written in C
        return []
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return list(names)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.name in names]


def _is_part_of_a_path(text: str) -> bool:
    return text.replace("-", "_").isidentifier()  # a folder may have a hyphen


def _reason(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
