"""Disks that are full, folders that cannot be written, and data that nobody would expect."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from certify.cli import main
from certify.data import DataError, load_data
from certify.files import one_writer, write_atomically
from tests.certify.conftest import WritePng

TRAIN = ("train", "--set", "hidden=[8]", "--epochs", "1", "--out")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(result: Result, text: str) -> None:
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert text in errors[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with one_writer(tmp_path):
        assert_one_line(invoke(*TRAIN, tmp_path), "another run is writing to")
    assert not (tmp_path / "ckpt.pt").exists()
    assert invoke(*TRAIN, tmp_path).exit_code == 0
    assert_one_line(invoke(*TRAIN, tmp_path), "exists; choose another --out")
    assert invoke(*TRAIN, tmp_path, "--overwrite").exit_code == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path, run_folder: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(invoke(*TRAIN, tmp_path / "file" / "run"), "Not a directory")
    if os.geteuid() == 0:  # who may write anywhere
        return
    tmp_path.chmod(0o500)
    assert_one_line(invoke(*TRAIN, tmp_path / "run"), "Permission denied")
    evaluation = ("eval", "--model", run_folder / "ckpt.pt", "--limit", 5)
    for option in ("--csv", "--json", "--save", "--plot"):
        assert_one_line(invoke(*evaluation, option, tmp_path / "a.svg"), "Permission denied")
    tmp_path.chmod(0o700)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """Files of more than 20,000 bytes cannot be written, as if the disk were full."""
    assert invoke(*TRAIN, tmp_path).exit_code == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert len(before) > 20_000
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from certify.cli import main\n"
        "main()\n"
    )
    other, model = tmp_path / "other", str(tmp_path / "ckpt.pt")
    for command in (
        [*TRAIN, str(other)],
        ["eval", "--model", model, "--csv", str(tmp_path / "rows.csv"), "--limit", "1000"],
        ["eval", "--model", model, "--save", str(tmp_path / "cert.json"), "--limit", "1000"],
    ):
        asked = [sys.executable, "-c", code, *command]
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
        assert found.returncode == 2, found.stderr
        assert found.stderr.strip().splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in found.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    left = {entry.name for folder in (tmp_path, other) for entry in folder.iterdir()}
    assert left == {".lock", "ckpt.pt", "config.json", "metrics.csv", "other"}


def test_a_write_that_fails_says_which(tmp_path: Path) -> None:
    def write(file: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore")

    with pytest.raises(OSError, match=r"cannot write .*a\.pt: PytorchStreamWriter failed"):
        write_atomically(tmp_path / "a.pt", write)
    assert not list(tmp_path.iterdir())


def _deep(path: Path) -> None:
    Image.fromarray(np.full((5, 7), 40_000, dtype=np.uint16)).save(path)


def _large(path: Path) -> None:
    """An image of 400 million pixels in 50 kB."""
    Image.new("1", (20_000, 20_000)).save(path)


def _truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_deep, "more than 8 bits per channel"),
        (_large, "exceeds limit"),
        (_truncated, "truncated"),
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: path.write_bytes(b"\x00\x05\x16\x07" + bytes(100)), "cannot identify"),
        (lambda path: path.mkdir(), ""),
    ],
    ids=["16 bits", "a bomb", "truncated", "empty", "a resource fork", "a folder"],
)
def test_images_that_cannot_be_used(
    tmp_path: Path, write_png: WritePng, write: Callable[[Path], object], message: str
) -> None:
    write_png(tmp_path / "test" / "cat" / "a.png", (5, 7), 1)
    write(tmp_path / "test" / "cat" / "b.png")
    if not message:  # torchvision looks into it for more
        assert len(load_data(f"folder:{tmp_path}", train=False)) == 1
        return
    with pytest.raises(DataError, match=rf"cannot read the image .*b\.png: .*{message}"):
        load_data(f"folder:{tmp_path}", train=False)


def test_links_that_lead_back(tmp_path: Path, write_png: WritePng) -> None:
    write_png(tmp_path / "test" / "cat" / "a.png", (5, 7), 1)
    (tmp_path / "test" / "cat" / "more").symlink_to(tmp_path / "test" / "cat")
    with pytest.raises(DataError, match="leads back to a folder that it is in"):
        load_data(f"folder:{tmp_path}", train=False)


def test_classes_that_are_not_those_of_the_training(tmp_path: Path, write_png: WritePng) -> None:
    """Without one of the classes the labels of those behind it would be others."""
    for split, names in (("train", "abc"), ("test", "abc")):
        for value, name in enumerate(names):
            write_png(tmp_path / "data" / split / name / "a.png", (5, 7), 80 * value)
    run = tmp_path / "run"
    dataset = ("--dataset", f"folder:{tmp_path / 'data'}")
    assert invoke(*TRAIN, run, *dataset, "--batch-size", 3).exit_code == 0
    assert invoke("eval", "--model", run / "ckpt.pt").exit_code == 0
    (tmp_path / "data" / "test" / "b" / "a.png").rename(tmp_path / "data" / "b.png")
    (tmp_path / "data" / "test" / "b").rmdir()
    result = invoke("eval", "--model", run / "ckpt.pt")
    assert_one_line(result, "with the classes a, b, c; now they are a, c")


@pytest.mark.parametrize("kind", ["magic", "sizes", "short", "empty", "more labels"])
def test_damaged_files_of_digits(tmp_path: Path, kind: str) -> None:
    """What torchvision reads, in which the header promises something else."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = struct.pack(">IIII", 0x803, 4, 28, 28) + bytes(4 * 784)
    labels = struct.pack(">II", 0x801, 4) + bytes(4)
    damaged = {
        "magic": struct.pack(">I", 0xFFFFFFFF) + images[4:],
        "sizes": struct.pack(">IIII", 0x803, 2**31 - 1, 2**31 - 1, 28) + bytes(100),
        "short": images[:-1],
        "empty": b"",
        "more labels": struct.pack(">IIII", 0x803, 3, 28, 28) + bytes(3 * 784),
    }[kind]
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(damaged)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
        (raw / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(damaged))
    with pytest.raises(DataError):
        load_data("mnist", train=False, data_dir=str(tmp_path))
