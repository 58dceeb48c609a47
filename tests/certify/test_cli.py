from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from certify.checkpoints import load_checkpoint
from certify.cli import main

WritePng = Callable[[Path, tuple[int, int], int], None]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(result: Result, message: str) -> None:
    """Bad input: exit code 2, one line that says what is wrong, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert result.output.rstrip().endswith(errors[0])


def test_train_then_eval(run_folder: Path, tmp_path: Path) -> None:
    assert {entry.name for entry in run_folder.iterdir()} == {
        "ckpt.pt",
        "config.json",
        "metrics.csv",
    }
    settings = json.loads((run_folder / "config.json").read_text())
    assert settings["training"]["epochs"] == 4
    metrics = list(csv.DictReader((run_folder / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in metrics] == ["0", "1", "2", "3"]
    checkpoint = load_checkpoint(run_folder / "ckpt.pt")
    assert checkpoint.progress is None
    assert checkpoint.input_shape == (1, 28, 28)

    files = [tmp_path / name for name in ("radii.csv", "summary.json", "curve.png")]
    result = invoke(
        "eval", "--model", run_folder / "ckpt.pt", "--eps", "0.1", "--eps", "36/255",
        "--csv", files[0], "--json", files[1], "--plot", files[2],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(files[1].read_text())
    assert summary["n"] == 1000
    assert summary["clean_accuracy"] > 0.85
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    for epsilon, accuracy in summary["certified_accuracy"].items():
        certified = [
            row["label"] == row["predict"] and float(row["radius"]) > float(epsilon) for row in rows
        ]
        assert sum(certified) / 1000 == accuracy
    at_36 = summary["certified_accuracy"][repr(36 / 255)]
    assert re.search(rf"certified at 36/255 +{100 * at_36:.2f} %", result.output)
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_eval_limit(run_folder: Path) -> None:
    result = invoke("eval", "--model", run_folder / "ckpt.pt", "--limit", 10)
    assert result.exit_code == 0
    assert re.search(r"images +10\n", result.output)


def test_the_tighter_bound_certifies_no_less(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["--model", "2c2f", "--set", "width=4", "--epochs", 1, "--batch-size", 200]
    assert invoke("train", *small, "--out", run).exit_code == 0
    constants = []
    for method in ("fantastic_four", "supremum"):
        summary = tmp_path / f"{method}.json"
        result = invoke(
            "eval", "--model", run / "ckpt.pt", "--method", method, "--limit", 20, "--json", summary
        )
        assert result.exit_code == 0, result.output
        constants.append(json.loads(summary.read_text())["lipschitz"])
    assert 0 < constants[1] < constants[0]


def test_help_does_not_import_torch() -> None:
    code = "import sys, certify.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("package", ["ff_bounds", "certify.certified_model", "certify.training"])
def test_the_library_does_not_import_torchvision(package: str) -> None:
    code = f"import sys, {package}; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "unknown data set 'imagenet'; expected one of"),
        (
            ["--dataset", "mnist", "--data-dir", "/nowhere"],
            "no mnist under /nowhere ",
        ),
        (["--dataset", "mnist"], "needs --data-dir"),
        (["--model", "vgg"], "expected model to be one of mlp, 2c2f"),
        (["--set", "width=7"], "has no hyperparameter width"),
        (["--set", "hidden"], "does not have the form KEY=VALUE"),
        (["--set", "activation=swish"], "expected activation to be one of relu"),
        (["--eps", "-0.5"], "'-0.5' is negative"),
        (["--eps", "much"], "'much' is not a number"),
        (["--eps", "1/0"], "'1/0' is not a number"),
        (["--eps", "nan"], "'nan' is not a number"),
        (["--lr", "-1"], "expected lr > 0"),
        (["--epochs", "0"], "expected at least one epoch"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--model", "resnet20"], "does not fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_training_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_one_line(invoke("train", *arguments, "--out", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_image_sizes_that_do_not_fit(tmp_path: Path, run_folder: Path, write_png: WritePng) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_png(tmp_path / "data" / split / name / "x.png", (2, 2), 0)
    data = f"folder:{tmp_path / 'data'}"
    result = invoke("train", "--dataset", data, "--model", "4c3f", "--out", tmp_path / "run")
    assert_one_line(result, "does not fit")
    assert not (tmp_path / "run").exists()
    result = invoke("eval", "--model", run_folder / "ckpt.pt", "--dataset", data)
    assert_one_line(result, r"takes images of shape \(1, 28, 28\), the data has \(3, 2, 2\)")


def test_bad_evaluation_input(tmp_path: Path, run_folder: Path) -> None:
    whole = (run_folder / "ckpt.pt").read_bytes()
    broken = tmp_path / "broken.pt"
    broken.write_bytes(whole[: len(whole) // 2])
    assert_one_line(invoke("eval", "--model", tmp_path / "no.pt"), "no checkpoint at")
    assert_one_line(invoke("eval", "--model", broken), "not a checkpoint, or it is damaged")
    good = run_folder / "ckpt.pt"
    result = invoke("eval", "--model", good, "--csv", tmp_path / "missing" / "x.csv")
    assert_one_line(result, "the folder of .* does not exist")
    assert_one_line(invoke("eval", "--model", good, "--eps", "-1"), "'-1' is negative")
    result = invoke("eval", "--model", good, "--limit", 5, "--plot", tmp_path / "curve.xyz")
    assert_one_line(result, "not supported")


def test_nan_weights_are_named(tmp_path: Path, run_folder: Path) -> None:
    checkpoint = load_checkpoint(run_folder / "ckpt.pt")
    next(iter(checkpoint.state_dict.values()))[:] = torch.nan
    checkpoint.save(tmp_path / "nan.pt")
    assert_one_line(invoke("eval", "--model", tmp_path / "nan.pt"), "NaN or infinity in '0.mean'")


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    result = invoke(
        "train", "--set", "hidden=[16]", "--epochs", 30, "--lr", "1e18", "--batch-size", 2000,
        "--loss", "cross-entropy", "--out", tmp_path / "run",
    )  # fmt: skip
    assert_one_line(result, "the loss became .* in epoch .*; try a smaller --lr")
    if (tmp_path / "run" / "ckpt.pt").exists():
        state = load_checkpoint(tmp_path / "run" / "ckpt.pt").state_dict
        assert all(torch.isfinite(value).all() for value in state.values())


def test_a_run_is_not_overwritten_unasked(run_folder: Path) -> None:
    before = (run_folder / "ckpt.pt").read_bytes()
    assert_one_line(invoke("train", "--out", run_folder), "exists; choose another --out")
    result = invoke("train", "--out", run_folder, "--resume", "--lr", "0.5")
    assert_one_line(result, "was started with other settings of .*lr")
    assert (run_folder / "ckpt.pt").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    small = ["--epochs", "1", "--set", "hidden=[8]", "--batch-size", "500", "--out", tmp_path / "r"]
    assert invoke("train", *small).exit_code == 0
    before = (tmp_path / "r" / "ckpt.pt").read_bytes()
    metrics = (tmp_path / "r" / "metrics.csv").read_bytes()
    assert invoke("train", *small, "--resume").exit_code == 0
    assert (tmp_path / "r" / "ckpt.pt").read_bytes() == before
    assert (tmp_path / "r" / "metrics.csv").read_bytes() == metrics
    assert invoke("train", *small, "--overwrite").exit_code == 0


def test_kill_and_resume_gives_the_same_weights(tmp_path: Path) -> None:
    """kill -9 in the middle of training; the resumed run ends where an untouched one does."""
    epochs = 4
    command = [sys.executable, "-m", "certify", "train", "--epochs", str(epochs), "--set"]
    command += ["hidden=[32]", "--batch-size", "50", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(tmp_path / "straight")], env=environment, check=True, capture_output=True
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, str(killed)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (killed / "ckpt.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint(killed / "ckpt.pt").progress is not None

    subprocess.run(
        [*command, str(killed), "--resume"], env=environment, check=True, capture_output=True
    )
    for name in ("straight", "killed"):
        assert len((tmp_path / name / "metrics.csv").read_text().splitlines()) == epochs + 1
    straight = load_checkpoint(tmp_path / "straight" / "ckpt.pt").state_dict
    resumed = load_checkpoint(killed / "ckpt.pt").state_dict
    for name, value in straight.items():
        assert torch.equal(value, resumed[name])
