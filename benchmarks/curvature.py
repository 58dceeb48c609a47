"""Curvature bounds of trained networks against the Hessians at test images.

For label and runner-up of each image, the eigenvalues of the Hessian at both ends are approached
from inside by power iteration on ``K + H`` and ``K' - H`` (of the smooth last layers, where the
network is not smooth as a whole). None may be beyond its bound; how near
the largest comes says how tight the bound is.

    python benchmarks/curvature.py runs/2x1024/ckpt.pt [more.pt ...] [--data-dir DIR] [--images 500]
"""

from __future__ import annotations

import time

import click
import torch
from torch import Tensor, nn

from certify import CertifiedModel
from certify.data import load_data, pixels
from certify.weights import load_network


def margins(model: nn.Module, x: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Differences of two logits."""
    logits = model(x)
    return (logits.gather(1, own[:, None]) - logits.gather(1, other[:, None]))[:, 0]


def products(model: nn.Module, x: Tensor, pairs: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
    """Hessians times vectors."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margins(model, x, *pairs).sum(), x, create_graph=True)
    return torch.autograd.grad((gradient * v).sum(), x)[0]


def quotients(
    model: nn.Module,
    x: Tensor,
    pairs: tuple[Tensor, Tensor],
    sign: float,
    bound: Tensor,
    steps: int,
) -> Tensor:
    """Rayleigh quotients of ``sign H`` after steps of power iteration on ``bound + sign H``."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    shape = (-1, *[1] * (x.ndim - 1))
    found = torch.full((len(x),), -torch.inf, dtype=x.dtype)
    for _ in range(steps):
        v = v / v.flatten(1).norm(dim=1).reshape(shape)
        image = sign * products(model, x, pairs, v)
        found = torch.maximum(found, (image * v).flatten(1).sum(dim=1))
        v = image + bound.reshape(shape) * v
    return found


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--data-dir", help="Default: that of the training.")
@click.option("--images", default=500, show_default=True)
@click.option("--steps", default=40, show_default=True, help="Of power iteration.")
@click.option("--method", default="supremum", show_default=True)
def main(
    paths: tuple[str, ...], data_dir: str | None, images: int, steps: int, method: str
) -> None:
    """Print a row for each checkpoint."""
    titles = ("model", "cases", "beyond", "largest share", "median share", "seconds for K")
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for path in paths:
        network = load_network(path)
        certified = CertifiedModel(network.model, network.input_shape, method=method)
        start = time.perf_counter()
        curvature = certified.curvature()
        seconds = time.perf_counter() - start
        head = certified.smooth.head
        where = data_dir or network.data_dir
        data = load_data(network.dataset or "mnist-5k", train=False, data_dir=where)
        shares = []
        for batch in data.head(images).images.split(100):
            x = pixels(batch).double()
            x = x if head.backbone is None else head.backbone(x)
            logits = head.model(x)
            own, other = logits.topk(2, dim=1).indices.unbind(dim=1)
            for sign, bound in ((-1.0, curvature[own, other]), (1.0, curvature[other, own])):
                found = quotients(head.model, x, (own, other), sign, bound, steps)
                shares.append(found / bound)
        share = torch.cat(shares)
        beyond = int((share > 1.0).sum())
        row = f"| {path} | {len(share):,} | {beyond} | {share.max():.3f} | {share.median():.3f} "
        print(row + f"| {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
