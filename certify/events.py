"""The metrics of a training, for TensorBoard."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from certify.training import EpochMetrics


class Events:
    """Writes metrics by epoch, counted from one, to a folder that ``tensorboard --logdir`` shows.

    Args:
        folder: for nothing else; made when something is written.

    Raises:
        ValueError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "--tensorboard needs a package: pip install 'certify-lipschitz[tensorboard]'"
            ) from error
        self._folder = Path(folder)
        self._make = SummaryWriter
        self._writer: Any = None

    def begin(self, epoch: int) -> None:
        """Go on behind so many epochs; what was written of later ones is no longer shown."""
        if epoch == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = self._make(str(self._folder), purge_step=epoch + 1)

    def write(self, metrics: EpochMetrics) -> None:
        """Write the metrics of an epoch."""
        values = asdict(metrics)
        epoch = values.pop("epoch") + 1
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Nothing more will be written."""
        if self._writer is not None:
            self._writer.close()
