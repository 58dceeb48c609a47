"""A report as one HTML page, which needs no network and follows light and dark."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from certify.data import ImageData
from certify.files import write_text
from certify.layers import NetworkReport
from certify.plots import COLOURS, GREY, draw_radii, draw_report, draw_training, save
from certify.report import Report, epsilon_name, percent

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d2025;
  --soft: #626a75; --line: #dfe2e6; --c0: #1f5fa8; --c1: #c2401c; --c2: #2f8f4e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2026; --ink: #e8eaed;
  --soft: #a0a8b3; --line: #343a43; --c0: #7db3ee; --c1: #f0906c; --c2: #7fcf98; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
p { margin: .25rem 0; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1.1rem; min-width: 0; }
.tiles { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.tiles div { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr));
  gap: 1rem; align-items: start; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.scroll { overflow-x: auto; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child, td:last-child { text-align: left; }
.bar { display: inline-block; height: .7rem; background: var(--c0); border-radius: 2px;
  vertical-align: middle; }
.less { background: var(--c1); }
.images { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(4.9rem, 1fr)); }
figure { margin: 0; }
figure img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
figcaption { font-size: .78rem; color: var(--soft); overflow-wrap: anywhere; }
pre { margin: 0; overflow-x: auto; font-size: .85rem; }
"""

_MOST_IMAGES = 12
_MOST_LAYERS = 60


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        title: of the page.
        report: certificates of a data set.
        data: the images and labels that they are about.
        layers: bounds of the network, layer by layer, if they were computed.
        metrics: text of the training's ``metrics.csv``, if there is one.
    """

    title: str
    report: Report
    data: ImageData
    layers: NetworkReport | None = None
    metrics: str | None = None

    def write(self, folder: str | Path) -> Path:
        """Write ``index.html``, its plots as PNG and SVG, and ``report.json``; return the page.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {
            "certified-accuracy": draw_report(self.report),
            "radii": draw_radii(self.report, self.data.classes),
        }
        training = None if self.metrics is None else draw_training(self.metrics)
        if training is not None:
            figures["training"] = training
        for name, figure in figures.items():
            for ending in ("png", "svg"):
                save(figure, folder / f"{name}.{ending}")
        write_text(folder / "report.json", self.report.to_json())
        write_text(folder / "index.html", self._html(figures))
        return folder / "index.html"

    def _html(self, figures: dict[str, Figure]) -> str:
        captions = {
            "certified-accuracy": "Certified accuracy over the radius",
            "radii": "Radii of right predictions by class, with their medians",
            "training": "Training",
        }
        parts = [
            f"<section><h2>{captions[name]}</h2>{_svg(figure)}</section>"
            for name, figure in figures.items()
        ]
        parts.append(
            f"<section><h2>Summary</h2><pre>{_text(self.report.to_table())}</pre></section>"
        )
        wide = [] if self.layers is None else [_layers(self.layers)]
        wide += [
            self._images("Most robust images", smallest=False),
            self._images("Right, and the least robust", smallest=True),
        ]
        about = f"{self.report.n:,} images; every radius is proven, in the arithmetic "
        about += f"{self.report.precision}. Radii are L2 distances between images in [0, 1]."
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(self.title)}</title><style>{_STYLE}</style></head><body>"
            f"<h1>{_text(self.title)}</h1><p>{_text(about)}</p>{_tiles(self.report)}"
            f'<div class="grid">{"".join(parts)}</div>'
            + "".join(f'<div style="margin-top:1rem">{part}</div>' for part in wide)
            + "</body></html>\n"
        )

    def _images(self, title: str, *, smallest: bool) -> str:
        """Images with the largest or the smallest positive radii of right predictions."""
        found, labels = self.report.found, self.report.labels
        counts = (found.prediction == labels) & (found.radius > 0)
        order = found.radius.where(counts, math.inf if smallest else -math.inf)
        count = min(_MOST_IMAGES, int(counts.sum()))
        chosen = order.argsort(descending=not smallest, stable=True)[:count].tolist()
        figures = []
        for index in chosen:
            label = _text(self.data.classes[int(labels[index])])
            lines = [label, f"proven {found.radius[index].item():.3g}"]
            if self.report.attack is not None:
                lines.append(f"broken at {self.report.attack.distance[index].item():.3g}")
            figures.append(
                f'<figure title="image {index}"><img alt="{label}" '
                f'src="{_png(self.data.images[index])}">'
                f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
            )
        body = f'<div class="images">{"".join(figures)}</div>' if figures else "<p>None.</p>"
        return f"<section><h2>{title}</h2>{body}</section>"


def _text(text: str) -> str:
    return html.escape(text)


def _svg(figure: Figure) -> str:
    """The figure inside the page, in the page's colours."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    colours = {COLOURS[0]: "--c0", COLOURS[1]: "--c1", COLOURS[2]: "--c2", GREY: "--soft"}
    for colour, variable in {**colours, "#000000": "--ink", "#b0b0b0": "--line"}.items():
        svg = svg.replace(colour, f"var({variable})")
    # Text has no colour of its own unless it is black.
    return svg.replace("<svg ", '<svg style="fill: var(--ink)" ', 1)


def _png(image: Tensor) -> str:
    """An image ``(C, H, W)`` as a data URI."""
    channels = image if image.shape[0] in (1, 3) else image[:1]
    pixels = channels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _tiles(report: Report) -> str:
    tiles = [("clean", percent(report.clean_accuracy))]
    attacked = report.attacked_accuracy
    for epsilon, certified in report.certified_accuracy.items():
        tiles.append((f"certified at {epsilon_name(epsilon)}", percent(certified)))
        if epsilon in attacked:
            tiles.append(
                (f"withstood attacks at {epsilon_name(epsilon)}", percent(attacked[epsilon]))
            )
    tiles += [
        ("median radius", f"{report.median_radius:.3f}"),
        ("Lipschitz constant", f"{report.lipschitz:.4g}"),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in tiles
        )
        + "</div>"
    )


def _layers(report: NetworkReport) -> str:
    """The layers' shares of the logarithm of the network's Lipschitz bound."""
    largest = max([abs(layer.share) for layer in report.layers], default=0.0) or 1.0

    def row(cells: Sequence[str], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def rows() -> Iterable[str]:
        for layer in report.layers[:_MOST_LAYERS]:
            width = 8.0 * abs(layer.share) / largest
            kind = "bar" if layer.share >= 0 else "bar less"
            bar = f'<span class="{kind}" style="width:{width:.2f}rem"></span>'
            yield row(
                [
                    _text(layer.name),
                    _text(layer.kind),
                    f"{layer.bound:.4g}",
                    f"{layer.seen:.4g}",
                    f"{layer.bound_so_far:.4g}",
                    f"{100 * layer.share:.1f} %".replace("-0.0", "0.0"),
                    bar,
                ]
            )

    head = row(["layer", "kind", "norm ≤", "seen", "so far ≤", "share of its log", ""], "th")
    more = len(report.layers) - _MOST_LAYERS
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    rest += "<p>Share: how much of the logarithm of the network's bound is that of the layer's norm"
    if any(layer.share < 0 for layer in report.layers):
        rest += "; below zero where a norm below one makes the bound smaller"
    rest += ".</p>"
    return (
        f'<section><h2>Layers</h2><div class="scroll"><table>{head}{"".join(rows())}</table></div>'
        f"{rest}</section>"
    )
