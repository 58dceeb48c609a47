"""A small trained network on real digits, shared by the tests that need one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from certify.cli import main

SMALL_RUN = ["--epochs", "4", "--set", "hidden=[64]", "--batch-size", "64"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished training run, made through the command line."""
    folder = tmp_path_factory.mktemp("run") / "small"
    result = CliRunner().invoke(main, ["train", *SMALL_RUN, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


WritePng = Callable[[Path, tuple[int, int], int], None]


@pytest.fixture(scope="session")
def write_png() -> WritePng:
    """Write a colour image ``(height, width)`` of one value, making its folder."""

    def write(path: Path, size: tuple[int, int], value: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)

    return write


WriteCode = Callable[[str, str], None]


@pytest.fixture
def write_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteCode]:
    """Write Python files into a fresh current folder; what was imported from it is forgotten."""
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)

    def write(name: str, source: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    yield write
    for name in set(sys.modules) - known:
        place = getattr(sys.modules[name], "__file__", None)
        if name.startswith("nets") or (place and Path(place).is_relative_to(tmp_path)):
            del sys.modules[name]
