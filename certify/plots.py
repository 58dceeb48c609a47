"""Pictures of a report."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from certify.evaluation import Report, epsilon_name
from certify.files import write_atomically


def plot_certified_accuracy(report: Report, path: str | Path, title: str = "") -> None:
    """Draw certified accuracy over the L2 radius.

    Args:
        report: what `certify.evaluate` returned.
        path: destination; its ending (png, svg, pdf) chooses the format.
        title: printed above the axes.

    Raises:
        ValueError: an ending that matplotlib does not know.
        OSError: the folder cannot be written.
    """
    right = report.found.prediction == report.labels
    radii = report.found.radius[right].clamp(max=1e9).sort().values
    # Just below the k-th smallest radius, all but k of the right predictions are certified.
    accuracy = (len(radii) - torch.arange(len(radii))) / report.n
    end = max([*(1.25 * e for e in report.epsilons), 1.05 * _quantile(radii, 0.99), 1e-9])

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.step(
        [0.0, *radii.tolist()],
        [100 * report.clean_accuracy, *(100 * accuracy).tolist()],
        where="pre",
        color="#1f5fa8",
        linewidth=2,
    )
    axes.axhline(100 * report.clean_accuracy, color="#777777", linewidth=1, linestyle=":")
    axes.text(end, 100 * report.clean_accuracy, "clean ", ha="right", va="bottom", color="#555555")
    for epsilon, certified in report.certified_accuracy.items():
        axes.plot([epsilon], [100 * certified], "o", color="#c2401c")
        axes.annotate(
            f"{100 * certified:.1f} % at {epsilon_name(epsilon)}",
            (epsilon, 100 * certified),
            xytext=(8, 4),
            textcoords="offset points",
            color="#c2401c",
        )
    axes.set(xlim=(0, end), ylim=(0, 105), xlabel="L2 radius (pixels in [0, 1])")
    axes.set_ylabel("certified accuracy, %")
    axes.set_title(title or f"{report.n:,} images, {report.certificate} certificate")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    kind = Path(path).suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=150))


def _quantile(values: torch.Tensor, fraction: float) -> float:
    return values.quantile(fraction).item() if len(values) else 0.0
