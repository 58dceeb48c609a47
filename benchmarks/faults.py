"""What becomes of runs that are killed, and of files that are damaged.

    python benchmarks/faults.py kill [--cycles 50]
    python benchmarks/faults.py corrupt [--files 200]

``kill`` trains on ``mnist-5k`` in a process of its own, sends SIGKILL at a random moment and
resumes, over and over, until the training is finished, and compares the weights with those of a
training that nothing happened to. ``corrupt`` damages a checkpoint in random ways and gives it to
``certify eval``, which has to end with exit code 2 and one line.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import torch
from click.testing import CliRunner

from certify.checkpoints import load_checkpoint
from certify.cli import main as certify

TRAINING = ("train", "--epochs", "60", "--set", "hidden=[64]", "--batch-size", "20", "--ema", "0.9")


@click.group()
def main() -> None:
    """Count what survives."""


@main.command()
@click.option("--cycles", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
def kill(cycles: int, seed: int) -> None:
    """Kill and resume a training; compare its weights with an undisturbed one's."""
    choice, kills, finished, different = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        _process(straight).wait()
        wanted = load_checkpoint(straight / "ckpt.pt").state_dict
        while kills < cycles or finished == 0:
            process = _process(killed, resume=(killed / "ckpt.pt").exists())
            if kills < cycles:
                time.sleep(choice.uniform(0.5, 5.0))
                process.send_signal(signal.SIGKILL)
            process.wait()
            if process.returncode == -signal.SIGKILL:
                kills += 1
            elif process.returncode:
                raise click.ClickException("a resumed training failed")
            checkpoint = killed / "ckpt.pt"
            if checkpoint.exists() and load_checkpoint(checkpoint).progress is None:
                found = load_checkpoint(checkpoint).state_dict
                finished += 1
                different += any(not torch.equal(found[name], wanted[name]) for name in wanted)
                checkpoint.unlink()
    click.echo(f"{kills} kills, {finished} trainings finished, {different} with other weights")


def _process(out: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "certify", *TRAINING, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command + ["--resume"] * resume,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def truncated(content: bytes, choice: random.Random) -> bytes:
    """Cut off at a random place."""
    return content[: choice.randrange(len(content))]


def flipped(content: bytes, choice: random.Random) -> bytes:
    """Random bits are others, where that is noticed: in what the archive checks."""
    damaged = bytearray(content)
    for _ in range(choice.randrange(1, 200)):
        damaged[choice.randrange(len(damaged))] ^= 1 << choice.randrange(8)
    return bytes(damaged)


def noise(content: bytes, choice: random.Random) -> bytes:
    """Random bytes of the same number."""
    return choice.randbytes(len(content))


class _Call:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {_Call.path}",)

    path = ""


def code(content: bytes, choice: random.Random) -> bytes:
    """A pickle that runs a command, alone or in an archive of torch's kind."""
    file = io.BytesIO()
    if choice.random() < 0.5:
        pickle.dump({"state_dict": _Call()}, file)
    else:
        torch.save({"format": "certify checkpoint 1", "model": _Call()}, file)
    return file.getvalue()


def bomb(content: bytes, choice: random.Random) -> bytes:
    """An archive that says it holds a terabyte."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}}))
        archive.writestr("archive/data/0", bytes(choice.randrange(1, 2**24)))
    return file.getvalue().replace(b"data/0", b"data/1")


def other_values(content: bytes, choice: random.Random) -> bytes:
    """Weights of another kind, or that are no numbers."""
    found = torch.load(io.BytesIO(content), weights_only=True)
    name = choice.choice(list(found["state_dict"]))
    weight = found["state_dict"][name]
    found["state_dict"][name] = choice.choice(
        [
            weight.double(),
            weight.to(torch.int64),
            weight.to(torch.complex64),
            weight[..., :-1],
            weight * torch.nan,
            weight + torch.inf,
            None,
            "weights",
        ]
    )
    if choice.random() < 0.3:
        del found[choice.choice(list(found))]
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


DAMAGES = (truncated, flipped, noise, code, bomb, other_values)


@main.command()
@click.option("--files", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
def corrupt(files: int, seed: int) -> None:
    """Damage a checkpoint in many ways; each must be one clear line, or change nothing."""
    choice, counts = random.Random(seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder, "good"), Path(folder, "bad.pt")
        _Call.path = str(Path(folder, "executed"))
        arguments = ["train", "--epochs", "1", "--set", "hidden=[8]", "--out", str(good)]
        CliRunner().invoke(certify, arguments, catch_exceptions=False)
        content = (good / "ckpt.pt").read_bytes()
        evaluation = ["eval", "--limit", "5", "--model"]
        expected = CliRunner().invoke(certify, [*evaluation, str(good / "ckpt.pt")])
        for index in range(files):
            damage = DAMAGES[index % len(DAMAGES)]
            bad.write_bytes(damage(content, choice))
            result = CliRunner().invoke(certify, [*evaluation, str(bad)])
            lines = result.stderr.strip().splitlines()
            if result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("Error: "):
                counts["one line"] += 1
            elif result.exit_code == 0 and _radii(result.output) == _radii(expected.output):
                counts["no difference"] += 1  # a bit that nothing depends on
            else:
                counts["anything else"] += 1
                click.echo(f"{damage.__name__}: exit {result.exit_code}: {result.output!r}")
        counts["executed"] = int(Path(_Call.path).exists())
    click.echo(f"{files} files: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


def _radii(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("clean", "median", "Lip"))]


if __name__ == "__main__":
    main()
