"""The scripts of examples/, run as a user does, with less training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _printed(name: str, folder: Path, *options: str) -> str:
    """What a script prints; it must succeed, without warnings, in an empty folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name), "--quick", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _numbers(printed: str, pattern: str) -> list[float]:
    """The number that a pattern's group matches, in each line that it matches."""
    found = [float(one) for one in re.findall(pattern, printed, re.MULTILINE)]
    assert found, f"nothing matches {pattern!r}"
    return found


@pytest.mark.slow
def test_own_model(tmp_path: Path) -> None:
    printed = _printed("own_model.py", tmp_path)
    (before,) = _numbers(printed, r"^cross-entropy, BatchNorm .*at 0.3: +(\S+) %")
    (after,) = _numbers(printed, r"^train\(\.\.\.\) .*at 0.3: +(\S+) %")
    assert before < 10.0 < 40.0 < after
    by_tightening = _numbers(printed, r"^supremum .* median radius (\S+)")
    assert len(by_tightening) == 4
    assert by_tightening == sorted(by_tightening)
    assert _numbers(printed, r"^attacks within a radius that succeeded: (\d+)") == [0.0]
    _, layer = _numbers(printed, r"^lipschitz +median radius (\S+)")
    assert _numbers(printed, r"^dual +median radius (\S+)")[0] > layer  # by the rule's curvature
    assert len(re.findall("^refused: ", printed, re.MULTILINE)) == 6
    assert printed.splitlines()[-1] == "accepted"


@pytest.mark.slow
def test_pretrained_torchvision(tmp_path: Path) -> None:
    printed = _printed("pretrained_torchvision.py", tmp_path)
    bounds = _numbers(printed, r"^(?:none|merge|join) +Lipschitz constant (\S+)")
    assert len(bounds) == 3
    assert bounds == sorted(bounds, reverse=True)
    (seen,) = _numbers(printed, r"^largest gain seen +(\S+)$")
    assert seen < 1e-6 * bounds[-1]  # vacuous
    assert "\nrefused: node" in printed
    assert _numbers(printed, r"^one block on \[0, 1\]: Lipschitz constant (\S+)")[0] < 10.0
    whole, half, quarter = _numbers(printed, r"^ *\d+ x \d+ +Lipschitz constant (\S+)")
    assert (half, quarter) == pytest.approx((whole / 2, whole / 4), rel=2e-3)


@pytest.mark.slow
def test_comparing_certificates(tmp_path: Path) -> None:
    printed = _printed("comparing_certificates.py", tmp_path, "--plot", "curves.png")
    kinds = ("lipschitz", "local", "curvature", "dual", "best", "attack")
    row = r" +\S+ % +\S+ % +\S+ % +(\S+)"  # certified at three radii, then the median radius
    median = {kind: _numbers(printed, f"^{kind}{row}") for kind in kinds}
    (relu, smooth), (relu_best, smooth_best) = median["lipschitz"], median["best"]
    assert relu < median["local"][0] <= relu_best <= median["attack"][0]
    assert smooth < median["curvature"][0] < median["dual"][0] <= smooth_best
    assert smooth_best <= median["attack"][1]
    assert "no attack broke a radius" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
