"""Checkpoints: everything that `certify eval` needs, in one file that cannot run code."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from certify.architectures import ArchitectureError, build, is_users
from certify.files import write_atomically

_FORMAT = "certify checkpoint 1"

_MOST_ENTRIES = 2**26
"""Of one input: a hostile file shall not ask for all memory by its shape."""


class CheckpointError(ValueError):
    """The file is not a checkpoint that can be used; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A model, its weights and where they come from.

    Attributes:
        model: name for `certify.architectures.build`.
        hyperparameters: its keyword arguments.
        state_dict: parameters and buffers.
        input_shape: ``(C, H, W)``.
        classes: names of the classes.
        dataset: name of the data set that it was trained on.
        data_dir: where that was found, if it matters.
        config: fields of `certify.TrainingConfig`.
        progress: what `certify train --resume` goes on from; ``None`` once training is finished.
    """

    model: str
    hyperparameters: dict[str, Any]
    state_dict: Mapping[str, Tensor]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    dataset: str
    data_dir: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] | None = None

    def save(self, path: str | Path) -> None:
        """Write atomically: an older checkpoint stays whole until the new one is."""
        content = {"format": _FORMAT, **_shallow(self)}
        write_atomically(path, lambda file: torch.save(content, file))

    def build(self) -> nn.Module:
        """Build the model with these weights, in evaluation mode, on the CPU.

        The architecture is laid out without memory and filled with the file's tensors, so that
        a hostile file cannot ask for more than it brings. Nor does it choose code to be run: an
        architecture of the user's is built by `certify.weights.load_network`, where it is named.

        Raises:
            CheckpointError: weights of another architecture, or an architecture of the user's.
        """
        if is_users(self.model):
            raise CheckpointError(
                f"the checkpoint is of {self.model}, and code is imported only where you name it: "
                f"pass --arch {self.model}"
            )
        try:
            with torch.device("meta"), _at_most(20 * len(self.state_dict) + 1000):
                model = build(self.model, self.hyperparameters)
            expected = model.state_dict()
            for name in sorted(expected.keys() | self.state_dict.keys()):
                if name not in expected or name not in self.state_dict:
                    raise ValueError(f"{name!r} is in only one of the model and the file")
                found, wanted = self.state_dict[name], expected[name]
                if found.shape != wanted.shape or found.dtype != wanted.dtype:
                    raise ValueError(
                        f"{name!r} should be {wanted.dtype} {tuple(wanted.shape)}, "
                        f"is {found.dtype} {tuple(found.shape)}"
                    )
                if found.is_meta or found.layout != torch.strided or not _is_stored(found):
                    raise ValueError(f"{name!r} is not stored entry by entry")
            model.load_state_dict(self.state_dict, assign=True)
        except Exception as error:  # the file's versions of modules can be anything
            cause = error.__cause__ if isinstance(error, ArchitectureError) else None
            if isinstance(cause, NotImplementedError):  # torch's, for what "meta" cannot do
                raise CheckpointError(
                    f"{self.model} cannot be laid out without memory; "
                    f"pass --arch {self.model} to have it built"
                ) from error
            reason = str(error).split("\n")[0]
            raise CheckpointError(
                f"the weights do not fit the architecture {self.model!r}: {reason}"
            ) from error
        return model.eval()


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Refuse to build an architecture of more modules than that."""
    count = 0

    def note(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > modules:
            raise ValueError("it has far more layers than the file has weights")

    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _is_stored(tensor: Tensor) -> bool:
    """Whether each entry has its own place in the file."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, or not a whole checkpoint of this project.
    """
    return parse_checkpoint(read_file(path), path)


def read_file(path: str | Path) -> Any:
    """Read what ``torch.save`` wrote, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, or one that holds more than tensors and plain values.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder; name the ckpt.pt in it")
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it
            check_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load's failures have no common type
        raise CheckpointError(
            f"{path} is not a checkpoint, or it is damaged ({type(error).__name__}); expected "
            "a ckpt.pt of 'certify train', or what torch.save(model.state_dict(), ...) writes: "
            "whole modules are not loaded, as that would execute what they name"
        ) from error


def check_archive(path: str | Path | IO[bytes]) -> None:
    """Compare checksums, which torch.load leaves out; refuse what would grow when unpacked.

    Nor may it have a name twice: torch reads the first of such entries, Python the last, and to
    torch small letters are as large ones.

    Raises:
        ValueError: an archive that is damaged, or not as torch writes it.
    """
    if not zipfile.is_zipfile(path):
        return  # torch's older format has no checksums
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed archive")
        names = [name.lower() for name in archive.namelist()]
        if len(set(names)) < len(names):
            raise ValueError("an archive with two entries of one name")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} does not fit")


def is_checkpoint(content: Any) -> bool:
    """Whether the content of a file says that `Checkpoint.save` wrote it, in any version."""
    form = content.get("format") if isinstance(content, dict) else None
    return isinstance(form, str) and form.startswith("certify checkpoint")


def parse_checkpoint(content: Any, path: str | Path) -> Checkpoint:
    """Check what `read_file` found at ``path``.

    Raises:
        CheckpointError: not a whole checkpoint of this project.
    """
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was not written by this version of 'certify train'")
    content = {name: value for name, value in content.items() if name != "format"}
    try:
        checkpoint = Checkpoint(**content)
        checkpoint = Checkpoint(
            **{
                **_shallow(checkpoint),
                "input_shape": tuple(int(size) for size in checkpoint.input_shape),
                "classes": tuple(str(name) for name in checkpoint.classes),
            }
        )
        well_formed = (
            isinstance(checkpoint.model, str)
            and isinstance(checkpoint.hyperparameters, dict)
            and isinstance(checkpoint.state_dict, Mapping)
            and all(isinstance(value, Tensor) for value in checkpoint.state_dict.values())
            and isinstance(checkpoint.dataset, str)
            and isinstance(checkpoint.data_dir, str | None)
            and isinstance(checkpoint.config, dict)
            and isinstance(checkpoint.config.get("method"), str | None)
            and all(size > 0 for size in checkpoint.input_shape)
            and math.prod(checkpoint.input_shape) <= _MOST_ENTRIES
        )
    except (TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{path} is damaged: its fields are not those of a checkpoint")
    return checkpoint


def load_model(path: str | Path) -> nn.Module:
    """Load the model of a checkpoint, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, or weights that do not fit.
    """
    return load_checkpoint(path).build()


def _shallow(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
