"""What a command shows of its progress, and what it writes for TensorBoard."""

from __future__ import annotations

import io
import sys
from contextlib import closing
from pathlib import Path

import pytest

from certify.commands import progress
from certify.commands.progress import Progress
from certify.events import Events
from certify.training import EpochMetrics


def metrics(epoch: int, loss: float) -> EpochMetrics:
    return EpochMetrics(epoch, loss, 0.5, 0.25, 3.0, 10.0 * epoch)


def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Progress(100, "image")) as quick:
        quick.update(50)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with closing(Progress(100, "image", done=20)) as slow:
        slow.update(30, "loss 2.0")
        slow.update(90)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("50% 50/100")
    assert "loss 2.0" in first
    assert second.startswith("100% 100/100")
    with closing(Progress(100, "image", shown=False)) as hidden:
        hidden.update(50)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with closing(Progress(10, "step", done=5, leave=True)) as bar:
        bar.update(5, "loss 1.0")
    assert not bar.in_log
    assert "10/10" in terminal.getvalue().split("\r")[-1]


def scalars(folder: Path, name: str) -> dict[int, float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_shows_each_epoch_once(tmp_path: Path) -> None:
    """A run that is killed in its third epoch goes on from the checkpoint of its first."""
    folder = tmp_path / "tensorboard"
    with closing(Events(folder)) as events:
        events.begin(0)
        for epoch in range(3):
            events.write(metrics(epoch, 9.0))
    with closing(Events(folder)) as events:
        events.begin(1)
        events.write(metrics(1, 5.0))
    assert scalars(folder, "train/loss") == {1: 9.0, 2: 5.0}
    with closing(Events(folder)) as events:  # another run
        events.begin(0)
        events.write(metrics(0, 1.0))
    assert scalars(folder, "train/loss") == {1: 1.0}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"certify-lipschitz\[tensorboard\]"):
        Events(tmp_path)
