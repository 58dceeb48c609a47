"""Reports of several networks beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certify.curves import Curve
from certify.report import epsilon_name, percent


@dataclass(frozen=True)
class Comparison:
    """What JSON files of `certify.Report` say.

    Attributes:
        reports: their content by name.
    """

    reports: dict[str, dict[str, Any]]

    @staticmethod
    def of(paths: Sequence[str | Path], names: Sequence[str] = ()) -> Comparison:
        """Read reports, named by what is different in their paths unless names are given.

        Args:
            paths: what ``eval --json`` wrote, or folders of ``eval --report``, or above these.
            names: one for each, or none.

        Raises:
            ValueError: a file that is none, or the same name twice.
        """
        files = [_in_folder(Path(path)) for path in paths]
        names = names or _names(files)
        if len(set(names)) < len(names):
            raise ValueError(f"expected a name of its own for each report, got {list(names)}")
        return Comparison({n: _read(p) for n, p in zip(names, files, strict=True)})

    @property
    def epsilons(self) -> list[float]:
        """All budgets at which any report has an accuracy, ascending."""
        found = {float(e) for one in self.reports.values() for e in one["certified_accuracy"]}
        return sorted(found)

    def to_table(self) -> str:
        """Return a column per report; a tilde marks what a curve says, which may be too low."""
        rows: list[list[str]] = [["", *self.reports]]
        every = list(self.reports.values())
        rows.append(["images", *(f"{one['n']:,}" for one in every)])
        rows.append(["clean accuracy", *(percent(one["clean_accuracy"]) for one in every)])
        for epsilon in self.epsilons:
            cells = [_certified(one, epsilon) for one in every]
            rows.append([f"certified at {epsilon_name(epsilon)}", *cells])
        for epsilon in self.epsilons:
            found = [one.get("attacked_accuracy", {}).get(repr(epsilon)) for one in every]
            if any(cell is not None for cell in found):
                cells = ["" if cell is None else percent(cell) for cell in found]
                rows.append([f"withstood at {epsilon_name(epsilon)}", *cells])
        for name, key in (("median radius", "median_radius"), ("Lipschitz constant", "lipschitz")):
            rows.append(
                [name, *("inf" if one[key] is None else f"{one[key]:.4g}" for one in every)]
            )
        rows.append(["certificate", *(str(one["certificate"]) for one in every)])
        rows.append(["arithmetic", *(str(one["precision"]) for one in every)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def plot(self, path: str | Path) -> None:
        """Draw certified accuracy over the radius, a curve for each, and dashed what withstood.

        Raises:
            ValueError: an ending that matplotlib does not know.
            OSError: the folder cannot be written.
        """
        from certify.plots import draw_curves, save

        curves = {name: Curve.from_json(one["curve"]) for name, one in self.reports.items()}
        attacked = {
            name: Curve.from_json(one["attacked_curve"])
            for name, one in self.reports.items()
            if "attacked_curve" in one
        }
        title = "certified accuracy" + (" (dashed: under attack)" if attacked else "")
        save(draw_curves(curves, epsilons=self.epsilons, title=title, dashed=attacked), path)


_KEYS = {
    "n", "clean_accuracy", "certified_accuracy", "median_radius", "lipschitz", "certificate",
    "precision", "curve",
}  # fmt: skip


def _read(path: str | Path) -> dict[str, Any]:
    try:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            content = None
        if not isinstance(content, dict) or not content.keys() >= _KEYS:
            raise ValueError("it is not what certify eval --json writes")
        for curve in ("curve", "attacked_curve"):
            Curve.from_json(content.get(curve, content["curve"]))
        accuracies = [content["clean_accuracy"], *content["certified_accuracy"].values()]
        numbers = [*accuracies, *map(float, content["certified_accuracy"])]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("it is not what certify eval --json writes")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read the report {path}: {error}") from error
    return content


def _certified(one: dict[str, Any], epsilon: float) -> str:
    found = one["certified_accuracy"].get(repr(epsilon))
    if found is not None:
        return percent(found)
    return "~" + percent(Curve.from_json(one["curve"]).at(epsilon))


def _in_folder(path: Path) -> Path:
    """The report in a folder, if it is one."""
    inside = [path / "report.json", path / "report" / "report.json"]
    return next((file for file in inside if file.is_file()), path)


def _names(paths: list[Path]) -> list[str]:
    """The parts of paths that are not the same in all; the whole name of a single one."""
    parts = [tuple(p for p in path.with_suffix("").parts if p != "report") for path in paths]
    if not all(parts):
        parts = [path.with_suffix("").parts for path in paths]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p[-2:]) if len(paths) > 1 else p[-1] for p in parts]
