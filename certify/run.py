"""One training run: a folder with a checkpoint, its settings and its metrics."""

from __future__ import annotations

import csv
import io
import json
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify import architectures
from certify.augmentation import augmentations
from certify.checkpoints import Checkpoint, CheckpointError, load_checkpoint
from certify.data import load_data
from certify.files import one_writer, write_text
from certify.hashes import hash_of_images
from certify.ranks import ALONE, Ranks
from certify.training import EpochMetrics, Trainer
from certify.training_config import TrainingConfig


@dataclass(frozen=True)
class RunConfig:
    """What to train on what, and where the result goes.

    Attributes:
        model: name for `certify.architectures.build`.
        hyperparameters: its keyword arguments beyond input shape and number of classes.
        dataset: name for `certify.data.load_data`.
        data_dir: torchvision's root folder, where the data set needs one.
        training: the optimisation.
        device: ``"cpu"``, ``"cuda"``, ... or ``"auto"``.
    """

    model: str
    hyperparameters: dict[str, Any]
    dataset: str
    data_dir: str | None
    training: TrainingConfig
    device: str = "auto"


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the named device; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: a device that this machine does not have, or one of several for all processes.
    """
    if ranks.count > 1 and ":" in name:
        raise ValueError(f"with several processes leave out the number of --device {name}")
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception as error:  # each backend has its own way of not being there
        reason = str(error).split("\n")[0]
        if reason.startswith("Expected one of"):
            reason = "expected cpu, cuda, cuda:1, ..."
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    return device


def run_training(
    config: RunConfig,
    out: str | Path,
    *,
    download: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_start: Callable[[Trainer], None] | None = None,
    on_step: Callable[[EpochMetrics], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
) -> Checkpoint:
    """Train and leave ``ckpt.pt``, ``config.json`` and ``metrics.csv`` in ``out``.

    The checkpoint is rewritten after each epoch (of epochs that are short beside that, after so
    many that it takes a fiftieth of the time), so that an interrupted run can be resumed and a
    diverged one leaves good weights. With the same seed, machine and number of
    threads the weights are the same, resumed or not, unless ``max_minutes`` is set. Once ``stop``,
    which is asked before each step, says so, the run is saved as it is, in the middle of an epoch,
    and the checkpoint returned has its ``progress``.

    Several ``ranks`` share each batch; the first one reads and writes ``out``, and is the one for
    the callbacks. Batch normalisation sees each process's own images. All processes get the
    checkpoint.

    Raises:
        ValueError: settings or data that do not fit (nothing is written), or a folder that
            already holds a run, or that another one is writing to.
        OSError: the folder cannot be written, or the disk is full; an older checkpoint stays.
        TrainingDiverged: the loss is no longer finite; the last good checkpoint stays.
    """
    out = Path(out)
    path = out / "ckpt.pt"

    def check_free() -> None:
        if path.exists() and not (resume or overwrite):
            raise ValueError(f"{path} exists; choose another --out, or --resume or --overwrite it")

    ranks.told(check_free)
    device = choose_device(config.device, ranks)
    data = ranks.in_turn(
        lambda: load_data(config.dataset, train=True, data_dir=config.data_dir, download=download)
    )
    data, _ = data.split(config.training.hold_out)
    torch.manual_seed(config.training.seed)
    hyperparameters = architectures.keywords(
        config.model,
        config.hyperparameters,
        input_shape=data.input_shape,
        num_classes=len(data.classes),
    )
    augment = augmentations(config.training.augment, config.dataset)
    model = architectures.build(config.model, hyperparameters).to(device)
    settings = _settings(config, hyperparameters)
    _refuse_other_state(model)
    ranks.agree(hash_of_images(data.images, data.labels) if ranks.count > 1 else None, "images")
    trainer = Trainer(model, data, config.training, augment, ranks)

    checkpoint = Checkpoint(
        config.model,
        hyperparameters,
        {},
        data.input_shape,
        data.classes,
        config.dataset,
        config.data_dir,
        asdict(config.training),
    )

    def begin() -> Checkpoint | None:
        """Take the folder; return what is to be continued."""
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(one_writer(out))
        if not path.exists():
            return None
        check_free()  # another run may have just written it
        return load_checkpoint(path) if resume else None

    with ExitStack() as stack:
        before = ranks.told(begin)
        history: list[EpochMetrics] = []
        if before is not None:
            history = _continue(trainer, before, config, hyperparameters, path)
        if ranks.first:
            write_text(out / "config.json", settings)
            if on_start is not None:
                on_start(trainer)
            if before is None:  # nothing more can stand in the way
                path.unlink(missing_ok=True)
            folder = _Folder(out, trainer, checkpoint, history, on_epoch)
            if before is not None and before.progress is not None and trainer.finished:
                folder.save(finished=True)  # the time was over before it was written
            _run_epochs(trainer, folder.write, on_step, stop)
        else:
            _run_epochs(trainer, lambda metrics, last: None, None, stop)
        return ranks.told(lambda: load_checkpoint(path))


def _run_epochs(
    trainer: Trainer,
    write: Callable[[EpochMetrics | None, bool], None],
    on_step: Callable[[EpochMetrics], None] | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Train to the end, or until stopped; ``write`` after each epoch, and tell it of the last."""
    ended = trainer.finished
    while not ended:
        metrics = trainer.run_epoch(on_step, stop)
        ended = metrics is None or trainer.finished
        write(metrics, ended)


class _Folder:
    """What a training leaves on disk, kept up to date.

    Args:
        out: the folder.
        trainer: what is saved.
        checkpoint: how, weights and progress aside.
        history: metrics of the epochs before.
        on_epoch: called with those of an epoch, once they are written.
    """

    def __init__(
        self,
        out: Path,
        trainer: Trainer,
        checkpoint: Checkpoint,
        history: list[EpochMetrics],
        on_epoch: Callable[[EpochMetrics], None] | None,
    ) -> None:
        self._out = out
        self._trainer = trainer
        self._checkpoint = checkpoint
        self._history = history
        self._on_epoch = on_epoch
        self._pause = _Pause()

    def write(self, metrics: EpochMetrics | None, last: bool) -> None:
        """Write the metrics of an epoch, if it came to its end, and now and then the checkpoint."""
        if metrics is not None:
            self._history.append(metrics)
        if last or self._pause.over():
            self.save(finished=last and metrics is not None)
        write_text(self._out / "metrics.csv", _table(self._history))
        if metrics is not None and self._on_epoch is not None:
            self._on_epoch(metrics)

    def save(self, finished: bool) -> None:
        """Write the checkpoint."""
        with self._pause:
            weights = _on_cpu(self._trainer.result)
            progress = None if finished else _progress(self._trainer, self._history)
            found = replace(self._checkpoint, state_dict=weights, progress=progress)
            found.save(self._out / "ckpt.pt")


class _Pause:
    """Between things that shall take a fiftieth of the time at most, or a tenth of a second."""

    def __init__(self) -> None:
        self._cost = 0.0
        self._end = time.monotonic()

    def over(self) -> bool:
        return self._cost < 0.1 or time.monotonic() - self._end >= 49.0 * self._cost

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._end = time.monotonic()
        self._cost = self._end - self._start


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    weights = module.state_dict()  # which also carries the modules' versions
    for name in weights:
        weights[name] = weights[name].cpu()
    return weights


def _progress(trainer: Trainer, history: list[EpochMetrics]) -> dict[str, Any]:
    """What a checkpoint holds for a training that goes on."""
    progress = trainer.state_dict()
    if trainer.result is trainer.model:
        del progress["model"]  # the checkpoint's own state_dict
    progress["history"] = [asdict(entry) for entry in history]
    return progress


def _refuse_other_state(model: nn.Module) -> None:
    """Refuse what a checkpoint cannot hold: a state beside parameters and buffers."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the model's state {name!r} is not a tensor, so it cannot be saved")


def _continue(
    trainer: Trainer,
    checkpoint: Checkpoint,
    config: RunConfig,
    hyperparameters: dict[str, Any],
    path: Path,
) -> list[EpochMetrics]:
    """Put a trainer where the checkpoint left off; return the metrics up to there."""
    asked = {"model": config.model, "dataset": config.dataset, **asdict(config.training)}
    found: dict[str, Any] = {"model": checkpoint.model, "dataset": checkpoint.dataset}
    # What an older version did not know was as it is by default.
    found |= {**asdict(TrainingConfig()), **checkpoint.config}
    asked["hyperparameters"], found["hyperparameters"] = hyperparameters, checkpoint.hyperparameters
    different = sorted(name for name in asked if _plain(asked[name]) != _plain(found.get(name)))
    if different:
        raise ValueError(
            f"cannot resume {path}: it was started with other settings of {', '.join(different)}"
        )
    if checkpoint.progress is None:
        trainer.epoch = trainer.config.epochs  # finished: nothing left to do
        return []
    try:
        state = dict(checkpoint.progress)
        history = [EpochMetrics(**entry) for entry in state.pop("history")]
        trainer.load_state_dict({"model": checkpoint.state_dict, **state})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot resume {path}: {reason}") from error
    return history


def _plain(value: Any) -> Any:
    """The same for tuples and lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _settings(config: RunConfig, hyperparameters: dict[str, Any]) -> str:
    settings = {
        **asdict(config),
        "hyperparameters": hyperparameters,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    try:
        return json.dumps(settings, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(
            f"hyperparameters can be numbers, texts, lists and dicts: {error}"
        ) from error


def _table(history: list[EpochMetrics]) -> str:
    text = io.StringIO()
    rows = csv.DictWriter(
        text, fieldnames=list(EpochMetrics.__dataclass_fields__), lineterminator="\n"
    )
    rows.writeheader()
    rows.writerows(asdict(entry) for entry in history)
    return text.getvalue()
