"""From what the user names, an architecture and a file, to a network with its weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from certify import architectures
from certify.checkpoints import (
    Checkpoint,
    CheckpointError,
    is_checkpoint,
    parse_checkpoint,
    read_file,
)
from certify.onnx_files import is_onnx, read_onnx
from certify.program_files import is_program, read_program
from certify.programs import module_of
from models import Normalize

_NESTED = ("state_dict", "model", "model_state_dict")  # where training scripts put it
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and what is known about it.

    Attributes:
        model: in evaluation mode, on the CPU.
        name: of its architecture.
        description: what was loaded, for people: the file and the architecture, or the
            architecture and where the weights come from.
        input_shape: shape of one input.
        dataset: the data that it was trained on; ``None`` if unknown.
        data_dir: where these were found, if it matters.
        method: the bound of convolutions that its training followed; ``None`` if unknown.
        classes: of these data, in the order of the logits; empty if unknown.
    """

    model: nn.Module
    name: str
    description: str
    input_shape: tuple[int, ...]
    dataset: str | None = None
    data_dir: str | None = None
    method: str | None = None
    classes: tuple[str, ...] = ()


def load_network(
    model: str | Path,
    *,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    image_shape: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedNetwork:
    """Load a network. Nothing in a file is executed, nor imported because a file says so.

    Args:
        model: a checkpoint of ``certify train``; a file with a state dict (``.safetensors``, or
            anything that ``torch.save`` wrote), which needs ``arch``; a program of
            ``torch.export`` (``.pt2``) or an ONNX graph (``.onnx``); or an architecture, which
            then has the weights that it is built with, the same ones each time.
        arch: name for `certify.architectures.build`. A checkpoint needs it only where the
            architecture is the user's own code.
        input_shape: shape of one input; may be omitted for checkpoints, for programs, with an
            ``image_shape``, and for torchvision's architectures, whose images are 224 x 224.
        hyperparameters: keyword arguments of the architecture.
        num_classes: passed to the architecture where it has an argument of that name. A
            checkpoint has its own number.
        image_shape: of the images that it is for, where nothing else tells its input's shape.
        mean: per channel; with ``std``, a `models.Normalize` that is put in front of the network.
        std: per channel, likewise.

    Raises:
        CheckpointError: an unreadable file, or weights that do not fit the architecture.
        ArchitectureError: an architecture that cannot be built.
        UnsupportedModel: a program with operations that are not known.
        ValueError: arguments that do not go together.
    """
    model, given = str(model), dict(hyperparameters or {})
    told = image_shape if input_shape is None else input_shape
    normalization = _normalization(mean, std)
    if not Path(model).is_file() and architectures.is_architecture(model):
        if arch is not None:
            raise ValueError(f"--arch is for files of weights; {model} names an architecture")
        loaded = _untrained(model, given, told, num_classes)
    elif is_program(model) or is_onnx(model):
        if arch is not None or given:
            raise ValueError(f"--arch and --set are for files of weights; {model} is a program")
        loaded = _from_program(model, input_shape)
    else:
        content = _read(model)
        if is_checkpoint(content):
            if normalization is not None:
                raise ValueError(
                    "--mean and --std are for networks trained elsewhere; one of 'certify train' "
                    "takes pixels in [0, 1] as they are"
                )
            checkpoint = parse_checkpoint(content, model)
            loaded = _from_checkpoint(model, checkpoint, arch, given, input_shape)
        else:
            loaded = _from_state_dict(model, content, arch, given, told, num_classes)
    return loaded if normalization is None else _normalized(loaded, normalization)


def _untrained(
    name: str,
    hyperparameters: dict[str, Any],
    input_shape: Sequence[int] | None,
    num_classes: int | None,
) -> LoadedNetwork:
    shape = _input_shape(name, input_shape)
    arguments = architectures.keywords(
        name, hyperparameters, input_shape=shape, num_classes=num_classes
    )
    network = _build(name, arguments)
    origin = "its factory's own weights" if architectures.is_users(name) else "randomly initialised"
    return LoadedNetwork(network.eval(), name, f"{name} ({origin})", shape)


def _from_program(path: str, input_shape: Sequence[int] | None) -> LoadedNetwork:
    program = read_onnx(path, input_shape) if is_onnx(path) else read_program(path)
    shape = program.input_shape(input_shape)
    name = Path(path).stem
    return LoadedNetwork(module_of(program, shape), name, f"{path} (a program)", shape)


def _from_checkpoint(
    path: str,
    checkpoint: Checkpoint,
    arch: str | None,
    hyperparameters: dict[str, Any],
    input_shape: Sequence[int] | None,
) -> LoadedNetwork:
    if arch is not None:
        network = _build(arch, {**checkpoint.hyperparameters, **hyperparameters})
        _fill(network, checkpoint.state_dict, path, arch)
    elif hyperparameters:
        raise ValueError(f"--set needs --arch; {path} has its own hyperparameters")
    else:
        network = checkpoint.build()
    name = arch or checkpoint.model
    return LoadedNetwork(
        network.eval(),
        name,
        f"{path} ({name})",
        checkpoint.input_shape if input_shape is None else tuple(input_shape),
        checkpoint.dataset,
        checkpoint.data_dir,
        checkpoint.config.get("method"),
        checkpoint.classes,
    )


def _from_state_dict(
    path: str,
    content: Any,
    arch: str | None,
    hyperparameters: dict[str, Any],
    input_shape: Sequence[int] | None,
    num_classes: int | None,
) -> LoadedNetwork:
    state = _state_dict(content, path)
    if arch is None:
        raise CheckpointError(
            f"{path} holds weights only; pass --arch package.module:factory, torchvision:NAME or "
            "a model of certify train"
        )
    shape = _input_shape(arch, input_shape)
    arguments = architectures.keywords(
        arch, hyperparameters, input_shape=shape, num_classes=num_classes
    )
    network = _build(arch, arguments)
    _fill(network, state, path, arch)
    return LoadedNetwork(network.eval(), arch, f"{path} ({arch})", shape)


def _input_shape(name: str, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        return tuple(given)
    if architectures.is_torchvision(name):
        return architectures.TORCHVISION_INPUT
    raise ValueError(f"pass --input-shape, such as 3,32,32; {name} alone does not tell it")


def _build(name: str, hyperparameters: Mapping[str, Any]) -> nn.Module:
    """Build an architecture, always with the same random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return architectures.build(name, hyperparameters)


def _read(path: str) -> Any:
    """Read a file of tensors; nothing in it is executed."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return read_file(path)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"reading {path} takes one more package: pip install safetensors"
        ) from error
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # SafetensorError is none of the usual ones
        raise CheckpointError(f"{path} is no safetensors file, or it is damaged") from error


def _state_dict(content: Any, path: str) -> Mapping[str, Tensor]:
    """Return the tensors by name that a file holds, itself or under one of the usual keys."""
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content[key] for key in _NESTED if key in content]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and _all_tensors(candidate):
            return candidate
    raise CheckpointError(
        f"{path} holds no state dict: expected tensors by name, at the top or under "
        f"{', '.join(map(repr, _NESTED))}"
    )


def _all_tensors(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: str, name: str) -> None:
    """Copy weights into a model, whose tensors keep their dtypes."""
    try:
        wanted = model.state_dict()
        state = _unwrapped(state, wanted)
        for key in (key for key in wanted if key in state):
            _check_tensor(key, wanted[key], state[key])
        result = model.load_state_dict(state, strict=False)
        for problem, keys in (
            ("is missing in the file", result.missing_keys),
            ("is unknown to the architecture", result.unexpected_keys),
        ):
            if keys:
                more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
                raise ValueError(f"{keys[0]!r}{more} {problem}")
    except Exception as error:  # a file's metadata and a model's own hooks can fail in any way
        reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__
        raise CheckpointError(f"the weights in {path} do not fit {name}: {reason}") from error


def _unwrapped(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Drop the prefixes of wrappers that the file's model was in and ours is not."""
    result = OrderedDict(state)
    versions = getattr(state, "_metadata", None)
    if versions is not None:  # of the modules; load_state_dict looks at them
        result._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    for wrapper in 2 * _WRAPPERS:  # either may be around the other
        outside = result and all(key.startswith(wrapper) for key in result)
        if outside and not any(key.startswith(wrapper) for key in wanted):
            consume_prefix_in_state_dict_if_present(result, wrapper)
    if versions is None and result.keys() == wanted.keys():  # then they are those of today
        result._metadata = getattr(wanted, "_metadata", None)  # type: ignore[attr-defined]
    return result


def _check_tensor(key: str, wanted: Any, found: Tensor) -> None:
    if not isinstance(wanted, Tensor):
        return
    if wanted.shape != found.shape:
        raise ValueError(f"{key!r} should be {tuple(wanted.shape)}, is {tuple(found.shape)}")
    if (wanted.is_floating_point(), wanted.is_complex()) != (
        found.is_floating_point(),
        found.is_complex(),
    ):
        raise ValueError(f"{key!r} should be {wanted.dtype}, is {found.dtype}")


def _normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize | None:
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std go together: pass both or neither")
    if mean is None or std is None:
        return None
    return Normalize([float(value) for value in mean], [float(value) for value in std])


def _normalized(network: LoadedNetwork, normalization: Normalize) -> LoadedNetwork:
    channels = len(normalization.mean)
    if channels != network.input_shape[0]:
        raise ValueError(
            f"expected one mean and std for each of {network.input_shape[0]} channels, "
            f"got {channels}"
        )
    return replace(network, model=nn.Sequential(normalization, network.model).eval())
