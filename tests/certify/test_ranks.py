"""Evaluations that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from certify.ranks import Ranks


def test_items_are_shared_and_put_together_again() -> None:
    items = list(range(11))
    shares = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert Ranks().joined(Ranks().share(items)) == items


def run(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "certify", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no gloo launcher to rely on")
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no gloo launcher to rely on")
def test_bad_input_ends_a_shared_evaluation(tmp_path: Path) -> None:
    result = run(2, "eval", "--model", str(tmp_path / "none.pt"))
    assert result.returncode != 0
    assert "Error: " in result.stderr
