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

from certify import CertifiedModel
from certify.checkpoints import load_checkpoint, load_model
from certify.cli import main
from tests.certify.conftest import SMALL_RUN

WritePng = Callable[[Path, tuple[int, int], int], None]
WriteCode = Callable[[str, str], None]

NETS = """
import math
from torch import nn

def make(input_shape, num_classes, hidden=8):
    size = math.prod(input_shape)
    layers = nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    return nn.Sequential(nn.Flatten(), *layers)

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
    def forward(self, x):
        return self.layer(x.flatten(1))

class Stateful(Linear):
    def get_extra_state(self):
        return 1
    def set_extra_state(self, state):
        pass

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))

def settings(values):
    return Linear()
"""


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
        ".lock",
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


def test_the_local_certificate_gains(tmp_path: Path) -> None:
    run, csv_path, summary = tmp_path / "run", tmp_path / "radii.csv", tmp_path / "summary.json"
    small = ["--set", "hidden=[32,32]", "--set", "activation=relu", "--epochs", 2]
    assert invoke("train", *small, "--out", run).exit_code == 0
    evaluation = ["eval", "--model", run / "ckpt.pt", "--limit", 50, "--csv", csv_path]
    radii = []
    for certificate in ("lipschitz", "local"):
        result = invoke(*evaluation, "--certificate", certificate, "--json", summary)
        assert result.exit_code == 0, result.output
        assert json.loads(summary.read_text())["certificate"] == certificate
        rows = csv.DictReader(csv_path.read_text().splitlines())
        radii.append([float(row["radius"]) for row in rows])
    assert all(before <= after for before, after in zip(*radii, strict=True))
    assert json.loads(summary.read_text())["gained"] > 30
    assert re.search(r"median gain +\d+\.\d\d %", result.output)


def test_help_does_not_import_torch() -> None:
    code = "import sys, certify.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "package",
    ["ff_bounds", "certify.certified_model", "certify.training", "certify.weights"],
)
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
        (["--model", "vgg"], "expected model to be one of mlp, 2x1024"),
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


def test_train_and_eval_the_users_architecture(write_code: WriteCode) -> None:
    write_code("nets/small.py", NETS)
    small = ["--model", "nets.small:make", "--set", "hidden=6", "--batch-size", 200]
    result = invoke("train", *small, "--epochs", 2)
    assert result.exit_code == 0, result.output
    path = "runs/mnist-5k-nets.small-make/ckpt.pt"
    command = f"certify eval --model {path} --arch nets.small:make"
    assert command in result.output
    settings = json.loads(Path(path).with_name("config.json").read_text())
    expected = {"input_shape": [1, 28, 28], "num_classes": 10, "hidden": 6}
    assert settings["hyperparameters"] == expected

    evaluation = ["eval", "--model", path, "--limit", 20]
    assert_one_line(invoke(*evaluation), "is of nets.small:make, .*: pass --arch nets.small:make")
    result = invoke(*command.split()[1:], "--limit", 20)
    assert result.exit_code == 0, result.output
    assert f"certifying {path} (nets.small:make) on the test images of mnist-5k" in result.output
    result = invoke(*evaluation, "--arch", "mlp")
    assert_one_line(result, "building mlp failed: TypeError")

    result = invoke("train", *small, "--epochs", 2, "--resume")
    assert result.exit_code == 0, result.output
    other = [*small, "--set", "hidden=7"]
    assert_one_line(invoke("train", *other, "--epochs", 2, "--resume"), "settings of hyperparam")


def test_resuming_the_users_architecture(write_code: WriteCode) -> None:
    write_code("nets/small.py", NETS)
    small = ["--model", "nets.small:make", "--epochs", 2, "--batch-size", 200, "--out"]
    assert invoke("train", *small, "straight").exit_code == 0
    code = (
        "import os, certify.run as run; save = run.Checkpoint.save\n"
        "run.Checkpoint.save = lambda *a: (save(*a), os._exit(9))\n"
        "from certify.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "train", *map(str, small), "killed"]
    killed = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    assert load_checkpoint("killed/ckpt.pt").progress is not None
    result = invoke("train", *small, "killed", "--resume")
    assert result.exit_code == 0, result.output
    straight, resumed = (load_checkpoint(f"{x}/ckpt.pt").state_dict for x in ("straight", "killed"))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_eval_a_state_dict(write_code: WriteCode, tmp_path: Path) -> None:
    write_code("nets/small.py", NETS)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 5), torch.nn.ReLU(), torch.nn.Linear(5, 10)
    )
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "weights.pt")
    command = ["eval", "--model", "weights.pt", "--dataset", "mnist-5k", "--limit", 50]
    command += ["--arch", "nets.small:make"]
    shape = ["--input-shape", "1,28,28"]
    fits = [*shape, "--set", "hidden=5"]
    result = invoke(*command, *fits, "--json", "plain.json")
    assert result.exit_code == 0, result.output
    assert "certifying weights.pt (nets.small:make) on the test images of mnist-5k" in result.output
    normalised = [*command, *fits, "--mean", 0.1, "--std", 0.5]
    result = invoke(*normalised, "--json", "normalised.json")
    assert result.exit_code == 0, result.output
    plain, twice = (json.loads(Path(f"{x}.json").read_text()) for x in ("plain", "normalised"))
    assert twice["lipschitz"] == pytest.approx(2 * plain["lipschitz"])  # in units of pixels

    assert_one_line(invoke(*command, *shape), r"'1\.weight' should be \(8, 784\), is \(5, 784\)")
    told = invoke(*command, "--set", "hidden=5", "--json", "told.json")  # by the data
    assert told.exit_code == 0, told.output
    assert json.loads(Path("told.json").read_text())["lipschitz"] == plain["lipschitz"]
    without_shape = [*command[:3], *command[-2:], "--set", "num_classes=10"]
    assert_one_line(invoke("bound", *without_shape[1:]), "pass --input-shape")
    assert_one_line(invoke(*command, *fits, "--mean", 0), "--mean and --std go together")
    assert_one_line(invoke(*command, "--input-shape", "1x28x28"), "is not a shape such as 3,32,32")
    assert_one_line(invoke(*command, "--input-shape", "0,28,28"), "is not a shape such as 3,32,32")
    assert_one_line(invoke(*command, "--mean", "a"), "is not a list of numbers")
    assert_one_line(invoke(*command[:-2], *fits), r"weights\.pt holds weights only; pass --arch")
    assert_one_line(invoke(*command[:-1], "nets.small:nothing", *fits), "has no 'nothing'")
    assert_one_line(invoke(*command[:-1], "nets.large:make", *fits), "cannot import 'nets.large'")
    without_data = [*command[:3], *command[-2:], *fits, "--set", "num_classes=10"]
    assert_one_line(invoke(*without_data), "pass --dataset")


def test_eval_an_architecture_alone(write_code: WriteCode, write_png: WritePng) -> None:
    write_code("nets/small.py", NETS)
    digits = ["--dataset", "mnist-5k", "--limit", 5, "--input-shape", "1,28,28"]
    result = invoke("eval", "--model", "nets.small:Linear", *digits)
    assert result.exit_code == 0, result.output
    assert "certifying nets.small:Linear (its factory's own weights) on" in result.output

    for name in ("a", "b"):
        write_png(Path("data", "test", name, "x.png"), (32, 32), 99)
    images = ["eval", "--model", "torchvision:regnet_x_400mf", "--dataset", "folder:data"]
    result = invoke(*images)
    assert result.exit_code == 0, result.output
    assert "certifying torchvision:regnet_x_400mf (randomly initialised) on" in result.output
    result = invoke(*images, "--input-shape", "3,64,64")
    assert_one_line(result, r"takes images of shape \(3, 64, 64\), the data has \(3, 32, 32\)")
    assert_one_line(invoke(*images, "--arch", "mlp"), "--arch is for files of weights")


def test_train_a_torchvision_architecture(tmp_path: Path, write_png: WritePng) -> None:
    for split in ("train", "test"):
        for index, name in enumerate("ab"):
            for image in range(2):
                write_png(tmp_path / split / name / f"{image}.png", (32, 32), 50 * index + image)
    arch = "torchvision:regnet_x_400mf"
    data, path = f"folder:{tmp_path}", tmp_path / "run" / "ckpt.pt"
    small = ["--epochs", 1, "--batch-size", 4, "--out", path.parent, "--dataset", data]
    result = invoke("train", "--model", arch, *small)
    assert result.exit_code == 0, result.output
    assert f"next: certify eval --model {path}\n" in result.output
    assert load_checkpoint(path).hyperparameters == {"num_classes": 2}
    result = invoke("eval", "--model", path, "--arch", arch)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nets.small:few"], "the model has 3 classes, the data has a label 9"),
        (["nets.small:Stateful"], "state '_extra_state' is not a tensor"),
        (["nets.small:make", "--set", "hidden=many"], "building nets.small:make failed: TypeError"),
        (["nets.small:settings", "--set", "values={1}"], "hyperparameters can be numbers, texts"),
        (["nets.small:none"], "'nets.small' has no 'none'"),
        (["nets.none:make"], "cannot import 'nets.none'"),
        (["torchvision:resnet18"], "does not fit"),
        (["torchvision:fcn_resnet50"], "expected a classifier of torchvision.models"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_architectures_that_cannot_be_trained(
    write_code: WriteCode, arguments: list[str], message: str
) -> None:
    write_code("nets/small.py", NETS)
    assert_one_line(invoke("train", "--model", *arguments, "--out", "run"), message)
    assert not Path("run").exists()


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


def test_a_run_of_a_version_with_fewer_settings_goes_on(run_folder: Path, tmp_path: Path) -> None:
    """Where what it did not know is as it is by default."""
    checkpoint = load_checkpoint(run_folder / "ckpt.pt")
    del checkpoint.config["cuda_graph"]
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "ckpt.pt")
    asked = ("train", *SMALL_RUN, "--out", tmp_path / "run", "--resume")
    assert invoke(*asked).exit_code == 0
    assert_one_line(invoke(*asked, "--cuda-graph"), "other settings of cuda_graph")


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


def test_train_and_eval_by_second_derivatives(tmp_path: Path) -> None:
    run, summary = tmp_path / "run", tmp_path / "summary.json"
    smooth = ["--model", "2x1024", "--set", "hidden=[16]", "--loss", "dual", "--eps", 0.5]
    options = ["--curvature-penalty", 0.01, "--precision", "bfloat16", "--hold-out", 3000]
    result = invoke("train", *smooth, *options, "--epochs", 2, "--ramp", 0.1, "--out", run)
    assert result.exit_code == 0, result.output
    evaluation = ["eval", "--model", run / "ckpt.pt", "--limit", 30, "--eps", 0.2]
    evaluation += ["--held-out", 3000, "--json", summary]
    result = invoke(*evaluation, "--certificate", "best", "--attack")
    assert result.exit_code == 0, result.output
    assert "last 3,000 training images" in result.output
    assert json.loads(summary.read_text())["broken_within_radius"] == 0
    assert_one_line(
        invoke("train", *smooth, "--hold-out", 4000, "--out", tmp_path), "cannot hold out"
    )
    assert_one_line(invoke("train", "--loss", "dual", "--out", tmp_path), "have to be smooth")


# --- certify bound ----------------------------------------------------------------------------


def test_bound_a_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "layers.json"
    result = invoke("bound", "--model", run_folder / "ckpt.pt", "--json", target)
    assert result.exit_code == 0, result.output
    assert "norm <=" in result.output
    assert "channels balanced between layers" in result.output
    content = json.loads(target.read_text())
    assert content["seen"] <= content["lipschitz"]["balance"] <= content["lipschitz"]["none"]
    assert len(content["layers"]) >= 2


def test_bound_of_the_users_model_and_levels(write_code: WriteCode) -> None:
    write_code("nets/small.py", NETS)
    arguments = ("bound", "--model", "nets.small:Linear", "--input-shape", "1,28,28")
    result = invoke(*arguments, "--tighten", "merge", "--method", "fantastic_four")
    assert result.exit_code == 0, result.output
    assert "linear 784 -> 10" in result.output
    assert "normalisation merged" in result.output
    assert "balanced" not in result.output


def test_bad_arguments_of_bound(run_folder: Path, tmp_path: Path) -> None:
    model = run_folder / "ckpt.pt"
    for extra, message in (
        (("--domain", "1,0"), "expected a domain"),
        (("--json", tmp_path / "none" / "layers.json"), "does not exist"),
        (("--dataset", "nothing"), "nothing"),
        (("--input-shape", "3,5,5"), "does not fit"),
    ):
        assert_one_line(invoke("bound", "--model", model, *extra), message)


def test_eval_takes_a_domain_and_tightenings(run_folder: Path) -> None:
    model = run_folder / "ckpt.pt"
    found = []
    for level in ("none", "balance"):
        result = invoke(
            "eval", "--model", model, "--limit", 20, "--tighten", level, "--domain", "0,1"
        )
        assert result.exit_code == 0, result.output
        match = re.search(r"Lipschitz constant +(\S+)", result.output)
        assert match is not None
        found.append(float(match[1]))
    assert found[1] <= found[0]  # sorting channels leaves nothing to gain


def test_certificates_are_saved_and_proven_again(run_folder: Path, tmp_path: Path) -> None:
    model = ("--model", run_folder / "ckpt.pt")
    cert = tmp_path / "cert.json"
    result = invoke(
        "eval", *model, "--limit", 50, "--precision", "float32", "--method", "supremum",
        "--save", cert,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"^arithmetic +float32$", result.output, re.MULTILINE)
    assert re.search(r"^rounding costs +\S+ %$", result.output, re.MULTILINE)
    result = invoke("verify", cert, *model)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"\d+ bounds and 50 radii are proven: .*\n", result.output)
    cert.write_text(cert.read_text().replace('"lipschitz": ', '"lipschitz": 1'))
    assert_one_line(invoke("verify", cert, *model), "was changed after it was written")
    assert_one_line(invoke("verify", tmp_path / "none", *model), "cannot read the certificate")
    settings = ("--certificate", "local", "--save", cert)
    assert_one_line(invoke("eval", *model, *settings), "a certificate that can be checked needs")


def test_what_is_not_known_to_round_is_certified_exactly_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("enlarging.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    up = nn.Upsample(scale_factor=2, mode='bilinear')\n"
        "    return nn.Sequential(up, nn.Flatten(), nn.Linear(4 * 28 * 28, 10))\n"
    )
    asked = ("eval", "--model", "enlarging:make", "--input-shape", "1,28,28")
    asked += ("--dataset", "mnist-5k", "--limit", 5)
    result = invoke(*asked)
    assert result.exit_code == 0, result.output
    assert "radii of exact arithmetic: node '0': it is not known how much" in result.output
    assert re.search(r"^arithmetic +exact beyond the logits$", result.output, re.MULTILINE)
    assert_one_line(invoke(*asked, "--precision", "float32"), "it is not known how much")
    result = invoke(*asked, "--precision", "exact")
    assert result.exit_code == 0, result.output
    assert re.search(r"^arithmetic +exact beyond the logits$", result.output, re.MULTILINE)


def test_a_broken_certificate_ends_the_run_and_is_saved(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With margins that are believed to change by a thousandth of what they can."""
    lipschitz = CertifiedModel.margin_lipschitz
    monkeypatch.setattr(CertifiedModel, "margin_lipschitz", lambda self: 1e-3 * lipschitz(self))
    monkeypatch.chdir(tmp_path)
    model = ("--model", run_folder / "ckpt.pt", "--limit", 20, "--precision", "exact")
    result = invoke("eval", *model, "--attack")
    assert result.exit_code == 3
    assert re.fullmatch(
        r"Error: image \d+ is predicted as another class at distance .*; it is in "
        r"counterexample.pt\n",
        result.stderr,
    )
    found = torch.load("counterexample.pt", weights_only=True)
    certified = CertifiedModel(load_model(run_folder / "ckpt.pt"), (1, 28, 28))
    assert (found["point"] - found["image"]).norm() < found["radius"]
    logits = certified.logits(torch.stack([found["image"], found["point"]]))
    assert logits.argmax(dim=1)[0] == found["prediction"]
    margins = logits[:, found["prediction"], None] - logits
    others = torch.arange(10) != found["prediction"]
    assert margins[1, others].min() <= 0 < margins[0, others].min()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_interrupted_is_saved(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "certify", "train", "--epochs", "1000", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("epoch 1/1000")
        process.send_signal(number)
        printed = process.stdout.read()
        assert process.wait(60) == 128 + number
    assert printed.splitlines()[-1].startswith(f"stopped and saved {tmp_path}")
    assert load_checkpoint(tmp_path / "ckpt.pt").progress is not None
