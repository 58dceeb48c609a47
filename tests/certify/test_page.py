"""Pages, curves and comparisons of reports."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from certify import Certificate, Report
from certify.cli import main
from certify.comparison import Comparison
from certify.curves import Curve
from certify.data import ImageData
from certify.page import Page

F64 = torch.float64


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@given(st.lists(st.floats(0.0, 1e3), max_size=60), st.integers(0, 20), st.floats(0.0, 1e3))
def test_curves_are_exact_at_few_images(radii: list[float], wrong: int, radius: float) -> None:
    count = len(radii) + wrong
    if not count:
        return
    found = Curve.of(torch.tensor(radii, dtype=F64), count)
    expected = sum(r > radius for r in radii) if radius else len(radii)
    assert found.at(radius) == pytest.approx(expected / count, abs=1e-12)
    assert Curve.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_curves_of_many_images_are_short_and_never_too_high() -> None:
    radii = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=F64) ** 3
    found = Curve.of(radii, 6000)
    assert len(found.radius) <= 401
    for radius in torch.linspace(0.01, 1.2, 300).tolist():
        exact = (radii > radius).double().sum().item() / 6000
        assert exact - 0.005 <= found.at(radius) <= exact


class Reader(HTMLParser):
    """Tags that are open, addresses that are loaded, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "path", "use", "!doctype", "rect"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_stands_alone(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    model = ("--model", run_folder / "ckpt.pt")
    result = invoke("eval", *model, "--limit", 40, "--eps", 0.1, "--attack", "--report", page)
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith(f"wrote {page / 'index.html'}")
    names = {entry.name for entry in page.iterdir()}
    assert {"index.html", "report.json", "radii.png", "certified-accuracy.svg"} <= names
    content = (page / "index.html").read_text()
    reader = Reader()
    reader.feed(content)
    assert not reader.open
    assert all(re.match(r"data:image/png;base64,|#", where) for where in reader.addresses)
    assert "url(http" not in content
    assert "@import" not in content
    images = [a for a in reader.addresses if a.startswith("data:")]
    assert len(images) >= 12
    assert base64.b64decode(images[0].partition(",")[2]).startswith(b"\x89PNG")
    for text in ("certified at 0.1", "withstood attacks", "share of its log", "epoch"):
        assert text in reader.text
    assert "prefers-color-scheme: dark" in content
    summary = json.loads((page / "report.json").read_text())
    assert summary["n"] == 40


def test_names_from_files_are_text(tmp_path: Path) -> None:
    """Folders can be named as one likes."""
    name = "<script>alert(1)</script>"
    found = Certificate(torch.tensor([0, 0]), torch.tensor([1.0, 2.0], dtype=F64))
    report = Report(torch.tensor([0, 0]), found, (0.5,), 1.0, "lipschitz", 1.0)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    page = Page(name, report, ImageData(images, torch.tensor([0, 0]), (name,)))
    assert "<script" not in page.write(tmp_path).read_text()


def test_a_page_of_a_report_without_radii(tmp_path: Path) -> None:
    found = Certificate(torch.tensor([1, 1]), torch.zeros(2, dtype=F64))
    report = Report(torch.tensor([0, 0]), found, (), 1.0, "lipschitz", 1.0)
    images = torch.zeros(2, 2, 4, 4, dtype=torch.uint8)
    page = Page("none", report, ImageData(images, torch.tensor([0, 0]), ("a", "b")), metrics="")
    assert "<p>None.</p>" in page.write(tmp_path).read_text()


def test_reports_side_by_side(run_folder: Path, tmp_path: Path) -> None:
    paths = []
    for name, eps in (("a", 0.1), ("b", 0.3)):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "report.json")
        evaluation = ("eval", "--model", run_folder / "ckpt.pt", "--limit", 30, "--eps", eps)
        assert invoke(*evaluation, "--json", paths[-1]).exit_code == 0
    plot = tmp_path / "all.svg"
    result = invoke("compare", *paths, "--plot", plot)
    assert result.exit_code == 0, result.output
    lines = {line[:18].strip(): line[18:].split() for line in result.output.splitlines()}
    assert lines[""] == ["a", "b"]
    assert lines["images"] == ["30", "30"]
    exact, read = lines["certified at 0.1"][0], lines["certified at 0.1"][2]
    assert read == "~" + exact  # of thirty images the curve has all
    assert plot.stat().st_size > 1000
    assert Comparison.of(paths, ["x", "y"]).epsilons == [0.1, 0.3]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"curve": 1}', "[" * 100_000, "null"])
def test_reports_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    result = invoke("compare", tmp_path / "a.json")
    assert result.exit_code == 2
    assert "cannot read the report" in result.output
    assert "Traceback" not in result.output
    assert invoke("compare", tmp_path / "a.json", "--name", "x", "--name", "y").exit_code == 2


def test_folders_of_reports_are_compared(tmp_path: Path) -> None:
    for name in ("first", "second"):
        folder = tmp_path / name / "report"
        folder.mkdir(parents=True)
        radius = torch.tensor([0.5, 1.0], dtype=torch.float64)
        found = Certificate(torch.tensor([0, 0]), radius)
        report = Report(torch.tensor([0, 0]), found, (0.1,), 2.0, "lipschitz", 0.5)
        (folder / "report.json").write_text(report.to_json())
    compared = Comparison.of([tmp_path / "first", tmp_path / "second" / "report"])
    assert list(compared.reports) == ["first", "second"]
    (tmp_path / "rows.csv").write_text("idx,label")
    with pytest.raises(ValueError, match="it is not what certify eval --json writes"):
        Comparison.of([tmp_path / "rows.csv"])
