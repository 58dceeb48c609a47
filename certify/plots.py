"""Pictures of reports, drawn by matplotlib."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from certify.curves import Curve
from certify.files import write_atomically
from certify.report import Report, epsilon_name

COLOURS = ("#1f5fa8", "#c2401c", "#2f8f4e", "#8a4fbf", "#b8860b", "#00838f", "#ad1457", "#5d4037")
GREY = "#777777"


def plot_certified_accuracy(report: Report, path: str | Path, title: str = "") -> None:
    """Draw certified accuracy over the L2 radius, and that under attack if there is one.

    Args:
        report: what `certify.evaluate` returned.
        path: destination; its ending (png, svg, pdf) chooses the format.
        title: printed above the axes.

    Raises:
        ValueError: an ending that matplotlib does not know.
        OSError: the folder cannot be written.
    """
    title = title or f"{report.n:,} images, {report.certificate} certificate"
    save(draw_report(report, title), path)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format that the ending says."""
    kind = Path(path).suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=150))


def draw_report(report: Report, title: str = "") -> Figure:
    """Certified accuracy over the radius, with the clean and the attacked one."""
    curves = {"certified": report.certified_curve}
    if report.attacked_curve is not None:
        curves["withstood attacks"] = report.attacked_curve
    figure = draw_curves(curves, report.clean_accuracy, report.epsilons, title)
    (axes,) = figure.axes
    for epsilon, certified in report.certified_accuracy.items():
        axes.plot([epsilon], [100 * certified], "o", color=COLOURS[0])
        place = epsilon / axes.get_xlim()[1]
        axes.annotate(
            f"{100 * certified:.1f} % at {epsilon_name(epsilon)}",
            (epsilon, 100 * certified),
            # Below the curve, and where there is no room to the left of it, farther below.
            xytext=(-6, -18) if place > 0.25 else (-320 * place, -34),
            textcoords="offset points",
            ha="right" if place > 0.25 else "left",
            color=COLOURS[0],
        )
    return figure


def draw_curves(
    curves: Mapping[str, Curve],
    clean: float | None = None,
    epsilons: Sequence[float] = (),
    title: str = "",
    dashed: Mapping[str, Curve] | None = None,
) -> Figure:
    """Fractions of images over the radius, each with its name; dashed ones go with the others."""
    dashed = dashed or {}
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    reach = [_ninety_nine(curve) for curve in (*curves.values(), *dashed.values())]
    end = max([*(1.25 * e for e in epsilons), *(1.05 * r for r in reach), 1e-9])
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        _step(axes, curve, color=colour, linewidth=2, label=name)
        if name in dashed:
            _step(axes, dashed[name], color=colour, linewidth=1, linestyle="--")
    if clean is not None:
        axes.axhline(100 * clean, color=GREY, linewidth=1, linestyle=":")
        axes.text(end, 100 * clean, "clean ", ha="right", va="bottom", color=GREY)
    if len(curves) > 1:
        axes.legend(frameon=False)
    axes.set(xlim=(0, end), ylim=(0, 105), xlabel="L2 radius (pixels in [0, 1])")
    axes.set_ylabel("images, %")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure


def _step(axes: Axes, curve: Curve, **style: Any) -> None:
    heights = [100 * fraction for fraction in curve.fraction]
    axes.step(curve.radius, heights, where="pre", **style)


def draw_radii(report: Report, classes: Sequence[str]) -> Figure:
    """Histograms of the radii of right predictions, a row for each class, up to twenty of them."""
    right = report.found.prediction == report.labels
    radii = report.found.radius.clamp(max=1e9)
    shown = list(range(min(20, len(classes))))
    end = max(_quantile(radii[right], 0.99) * 1.1, 1e-9)
    figure = Figure(figsize=(6.4, 0.8 + 0.32 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for row, index in enumerate(shown):
        own = radii[right & (report.labels == index)]
        counts = torch.histc(own.clamp(max=end).float(), bins=60, min=0.0, max=end)
        heights = 0.85 * counts / counts.max().clamp_min(1.0)
        edges = torch.linspace(0.0, end, 61)
        axes.stairs(
            (-row + heights).tolist(), edges.tolist(), baseline=-row, fill=True, color=COLOURS[0]
        )
        if len(own):
            middle = own.median().item()
            axes.plot([middle, middle], [-row, -row + 0.85], color=COLOURS[1], linewidth=1.5)
    axes.set_yticks([-row + 0.3 for row in range(len(shown))])
    axes.set_yticklabels([classes[index][:24] for index in shown])
    axes.set(xlim=(0, end), ylim=(-len(shown) + 0.9, 1.0), xlabel="certified radius")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def draw_training(metrics: str) -> Figure | None:
    """Curves of a ``metrics.csv``, or ``None`` if there are fewer than two epochs."""
    rows = list(csv.DictReader(io.StringIO(metrics)))
    if len(rows) < 2:
        return None
    epochs = [int(row["epoch"]) + 1 for row in rows]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, label) in enumerate(
        (("clean_accuracy", "clean"), ("certified_accuracy_estimate", "certified (estimate)"))
    ):
        values = [100 * float(row[name]) for row in rows]
        left.plot(epochs, values, color=COLOURS[index], label=label)
    left.set(xlabel="epoch", ylabel="%", title="accuracy in training")
    left.legend(frameon=False)
    right.plot(epochs, [float(row["lipschitz_estimate"]) for row in rows], color=COLOURS[2])
    right.set(xlabel="epoch", title="Lipschitz constant (estimate)", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _ninety_nine(curve: Curve) -> float:
    """The radius behind which a hundredth of the images that count is left."""
    limit = 0.01 * curve.fraction[0]
    return next(
        (r for r, f in zip(curve.radius, curve.fraction, strict=True) if f <= limit),
        curve.radius[-1],
    )


def _quantile(values: Tensor, fraction: float) -> float:
    return values.quantile(fraction).item() if len(values) else 0.0
