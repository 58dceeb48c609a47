"""Trainings and evaluations that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from certify.checkpoints import load_checkpoint
from certify.ranks import Ranks


def test_items_are_shared_and_put_together_again() -> None:
    items = list(range(11))
    shares = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert Ranks().joined(Ranks().share(items)) == items


def launched(test: Any) -> Any:
    """Mark a test that starts processes."""
    windows = pytest.mark.skipif(sys.platform == "win32", reason="no gloo launcher to rely on")
    return pytest.mark.slow(windows(test))


def run(
    processes: int, *command: str, path: str = "", module: str = "certify"
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", module, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@launched
def test_shared_evaluations_write_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    """Seven batches of four processes, the last one smaller."""
    model = ("--model", str(run_folder / "ckpt.pt"), "--limit", "64", "--batch-size", "10")
    for command, processes in (("eval", 2), ("eval", 4), ("attack", 2)):
        found = []
        for count in (1, processes):
            path = tmp_path / f"{command}-{count}.csv"
            more = ("--attack", "--eps", "0.3") if command == "eval" else ("--eps", "0.3")
            result = run(count, command, *model, *more, "--csv", str(path))
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("wrote") == 1
            found.append(path.read_bytes())
        assert found[0] == found[1]


@launched
def test_bad_input_ends_a_shared_evaluation(tmp_path: Path) -> None:
    result = run(2, "eval", "--model", str(tmp_path / "none.pt"))
    assert result.returncode != 0
    assert "Error: " in result.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(folder / "ckpt.pt").state_dict
    return found


@launched
def test_shared_training_is_that_of_one_process(tmp_path: Path) -> None:
    """Batches of 999, so that the last of 4,000 images has four, and of 1,333: one is left."""
    for size, processes in (("999", 2), ("1333", 4)):
        folders = []
        for count in (1, processes):
            folders.append(tmp_path / f"{size}-{count}")
            settings = (
                "--epochs",
                "2",
                "--batch-size",
                size,
                "--set",
                "hidden=[32]",
                "--ema",
                "0.5",
            )
            result = run(count, "train", *settings, "--clip-norm", "1", "--out", str(folders[-1]))
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("wrote") == result.stdout.count("epoch 2/2") == 1
        one, several = map(weights, folders)
        for name in one:
            assert torch.allclose(one[name], several[name], rtol=0, atol=2e-4), name


@launched
def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    """Two epochs of the same are what one process after another makes of them."""
    common = ("train", "--batch-size", "1000", "--set", "hidden=[32]", "--epochs", "2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(1, *common, "--out", str(whole)).returncode == 0
    (tmp_path / "early.py").write_text(EARLY)
    stopped = run(2, *common, "--out", str(parts), path=str(tmp_path), module="early")
    assert "stopped and saved" in stopped.stdout
    assert load_checkpoint(parts / "ckpt.pt").progress is not None
    resumed = run(4, *common, "--out", str(parts), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    one, several = weights(whole), weights(parts)
    for name in one:
        assert torch.allclose(one[name], several[name], rtol=0, atol=2e-4), name


EARLY = """
import os, signal
from certify import cli, training

step = training.Trainer._step

def stopping(self, *arguments):
    if self.epoch == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *arguments)

training.Trainer._step = stopping
cli.main()
"""


@launched
def test_a_process_that_dies_ends_the_training(tmp_path: Path) -> None:
    (tmp_path / "doomed.py").write_text(DOOMED)
    out = tmp_path / "out"
    command = ("train", "--model", "doomed:network", "--epochs", "100000", "--out", str(out))
    result = run(2, *command, path=str(tmp_path))
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr  # torchrun ends the others before they can complain
    assert load_checkpoint(out / "ckpt.pt").progress is not None


DOOMED = """
import os, pathlib, signal, threading, time
import torch

def die():
    while not pathlib.Path(__file__).with_name("out").joinpath("ckpt.pt").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)

def network(input_shape, num_classes):
    if os.environ.get("RANK") == "1":
        threading.Thread(target=die).start()
    pixels = torch.Size(input_shape).numel()
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels, num_classes))
"""


@launched
def test_processes_with_different_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "uneven.py").write_text(UNEVEN)
    model = ("--model", "uneven:network", "--dataset", "mnist-5k", "--limit", "20")
    for command in ("eval", "attack"):
        result = run(2, command, *model, path=str(tmp_path))
        assert result.returncode != 0
        assert result.stderr.count("different weights or images") == 1
        assert "images  " not in result.stdout


UNEVEN = """
import os
import torch

def network(input_shape, num_classes):
    linear = torch.nn.Linear(torch.Size(input_shape).numel(), num_classes)
    linear.bias.data += float(os.environ["RANK"])
    return torch.nn.Sequential(torch.nn.Flatten(), linear)
"""


@launched
def test_the_process_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    model = ("--model", "mlp", "--dataset", "mnist-5k", "--limit", "40", "--batch-size", "10")
    result = run(2, "eval", *model, path=str(tmp_path), module="failing")
    assert result.returncode != 0
    assert "Error: a bad day" in result.stderr
    assert "rank      : 1" in result.stderr.split("Root Cause")[1]


FAILING = """
import os
from certify import certified_model, cli

certify = certified_model.CertifiedModel.certify

def failing(self, *arguments):
    if os.environ["RANK"] == "1":
        raise ValueError("a bad day")
    return certify(self, *arguments)

certified_model.CertifiedModel.certify = failing
cli.main()
"""


@launched
def test_weights_that_only_training_or_only_evaluation_uses(tmp_path: Path) -> None:
    (tmp_path / "modes.py").write_text(MODES)
    settings = ("--epochs", "2", "--batch-size", "1000", "--out", str(tmp_path / "out"))
    result = run(2, "train", "--model", "modes:network", *settings, path=str(tmp_path))
    assert result.returncode == 0, result.stderr


MODES = """
import torch

class Modes(torch.nn.Module):
    def __init__(self, pixels, classes):
        super().__init__()
        self.linear, self.other = (torch.nn.Linear(pixels, classes) for _ in range(2))

    def forward(self, x):
        return (self.linear if self.training else self.other)(x.flatten(1))

def network(input_shape, num_classes):
    return Modes(torch.Size(input_shape).numel(), num_classes)
"""


@launched
def test_shared_proofs_are_those_of_one_process(tmp_path: Path) -> None:
    """Layers of equal and of different shapes; what is written can be verified."""
    model = (
        "--model",
        "2c2f",
        "--input-shape",
        "1,28,28",
        "--dataset",
        "mnist-5k",
        "--limit",
        "20",
    )
    found = []
    for count in (1, 3):
        files = [tmp_path / f"{name}-{count}" for name in ("csv", "save")]
        options = ("--method", "supremum", "--csv", str(files[0]), "--save", str(files[1]))
        result = run(count, "eval", *model, *options)
        assert result.returncode == 0, result.stderr
        found.append([file.read_bytes() for file in files])
    assert found[0] == found[1]
