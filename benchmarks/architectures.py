"""Every classification architecture of torchvision: bounded, or refused and why.

    python benchmarks/architectures.py [--only resnet18 --only vgg11] [--pairs 10000] [--csv FILE]
                                       [--markdown docs/architectures.md]

Each network is initialised as torchvision does it, without training. The bound is compared with
ratios `|f(x) - f(y)| / |x - y|` of random pairs and of pairs moved uphill. Rows of a CSV that
exists already are not computed again.
"""

from __future__ import annotations

import csv
import time
import warnings
from pathlib import Path

import click
import torch
import torchvision
from torch import Tensor, nn

from certify import CertifiedModel, UnsupportedModel
from certify.architectures import build

SIZES = {"alexnet": 64, "inception_v3": 96, "maxvit_t": 224, "vit_h_14": 224}
NATIVE = ("vit", "swin")
HEAD = """# torchvision's classification architectures

Made by `python benchmarks/architectures.py --markdown docs/architectures.md` ({settings},
{versions}). Weights as torchvision initialises them, without training: the
numbers say what is supported and how loose a global bound of a deep network is, not how robust a
trained one would be. "seen" is the largest ratio `|f(x) - f(y)| / |x - y|` among random pairs and
pairs moved uphill. Networks with squeeze and excitation multiply tensors: they are bounded on
images with pixels in [0, 1].

| architecture | parameters | input | domain | Lipschitz constant | seen | pairs | seconds |
|---|---|---|---|---|---|---|---|
"""

FIELDS = ["architecture", "parameters", "input", "domain", "lipschitz", "seen", "pairs", "seconds"]
FIELDS += ["refused"]


def initialised(name: str) -> nn.Module:
    """Weights as torchvision initialises them, always the same."""
    torch.manual_seed(0)
    return build(f"torchvision:{name}", {}).eval()


def ratios(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Quotients of differences, one for each pair."""
    distance = (x - y).flatten(1).norm(dim=1)
    return (model(x) - model(y)).norm(dim=1) / distance


def largest_ratio(model: nn.Module, size: int, pairs: int, ascended: int) -> float:
    """Largest quotient among random pairs and pairs that were moved uphill."""
    largest = 0.0
    generator = torch.Generator().manual_seed(0)
    batch = 100
    for start in range(0, pairs, batch):
        x = torch.rand(min(batch, pairs - start), 3, size, size, generator=generator)
        scale = 10.0 ** -(start // batch % 4)
        y = (x + scale * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        with torch.no_grad():
            largest = max(largest, ratios(model, x, y).amax().item())
    x = torch.rand(ascended, 3, size, size, generator=generator)
    step = torch.randn(x.shape, generator=generator) * 1e-2
    for _ in range(20):
        step.requires_grad_()
        found = ratios(model, x, x + step)
        largest = max(largest, found.detach().amax().item())
        (slope,) = torch.autograd.grad(found.log().sum(), step)
        length = step.detach().flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        step = step.detach() + 0.5 * length * slope / slope.flatten(1).norm(dim=1).clamp_min(
            1e-30
        ).reshape(-1, 1, 1, 1)
        step = step * (length / step.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))
        step = (x + step).clamp(0, 1) - x
    return largest


def row(name: str, pairs: int, method: str, tighten: str) -> dict[str, object]:
    """Bound one architecture."""
    size = SIZES.get(name, 224 if name.startswith(NATIVE) else 32)
    model = initialised(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, object] = {"architecture": name, "parameters": parameters, "input": size}
    for domain in (None, (0.0, 1.0)):
        start = time.perf_counter()
        try:
            certified = CertifiedModel(
                model, (3, size, size), method=method, tighten=tighten, domain=domain
            )
        except UnsupportedModel as error:
            result["refused"] = str(error)
            if "give the range" not in str(error):
                break
        else:
            bound = certified.lipschitz().item()
            result.update(domain="" if domain is None else "[0, 1]", lipschitz=f"{bound:.4g}")
            result.update(seconds=f"{time.perf_counter() - start:.1f}", refused="", pairs=pairs)
            del certified
            seen = largest_ratio(model, size, pairs, max(1, pairs // 100))
            result["seen"] = f"{seen:.4g}"
            if not seen <= bound:
                raise AssertionError(f"{name}: the bound {bound} is below a ratio {seen}")
            break
    return result


@click.command()
@click.option("--only", multiple=True, help="Names; default: all.")
@click.option("--pairs", default=10_000, show_default=True)
@click.option("--method", default="fantastic_four", show_default=True)
@click.option("--tighten", default="merge", show_default=True)
@click.option("--csv", "path", type=Path, default=Path("architectures.csv"), show_default=True)
@click.option("--markdown", type=Path, help="Write the table as a page.")
@click.option("--threads", default=2, show_default=True)
def main(
    only: tuple[str, ...],
    pairs: int,
    method: str,
    tighten: str,
    path: Path,
    markdown: Path | None,
    threads: int,
) -> None:
    """Bound every classification architecture of torchvision, or say why not."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    names = list(only) or torchvision.models.list_models(module=torchvision.models)
    for name in names:
        if not any(found["architecture"] == name for found in rows):
            rows.append(row(name, pairs, method, tighten))
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, FIELDS)
                table.writeheader()
                table.writerows(rows)
        found = next(found for found in rows if found["architecture"] == name)
        click.echo("  ".join(f"{found.get(field, '')}" for field in FIELDS))
    if markdown is not None:
        markdown.write_text(page(rows, f"method {method}, tighten {tighten}"))


def page(rows: list[dict[str, object]], settings: str) -> str:
    """Return all rows as a page of documentation."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    lines = HEAD.format(settings=settings, versions=versions).splitlines()
    bounded = [row for row in rows if not row.get("refused")]
    for row in bounded:
        cells = [f"{float(str(row['parameters'])) / 1e6:.1f} M", f"{row['input']}²"]
        lipschitz = "beyond 1.8e308" if row["lipschitz"] == "inf" else str(row["lipschitz"])
        cells += [str(row.get("domain") or "all"), lipschitz, str(row["seen"])]
        cells += [str(row["pairs"]), str(row["seconds"])]
        lines.append(f"| {row['architecture']} | {' | '.join(cells)} |")
    lines += ["", "Refused:", "", "| architecture | why |", "|---|---|"]
    lines += [f"| {row['architecture']} | {row['refused']} |" for row in rows if row.get("refused")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
