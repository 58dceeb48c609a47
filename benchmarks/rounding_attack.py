"""Break radii by rounding alone.

    python benchmarks/rounding_attack.py [--tries 200000] [--precision float32]

Networks for which the Lipschitz bound is attained: linear ones, and deep ones of orthogonal
matrices and MaxMin. For each input a point is put on the way to the decision boundary, just inside
the radius, and its numbers are rounded to float32 in random directions, as long as the distance to
the input (exact, in float64) stays below the radius. A try breaks a radius if the network, computed
in float32, predicts another class there. "Exact" radii are proven for exact arithmetic, the others
for float32.

References:
    J. Jin, O. Ohrimenko, B. Rubinstein, Getting a-Round Guarantees: Floating-Point Attacks on
    Certified Robustness, AISec 2024 (the search).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import click
import torch
from torch import Tensor, nn

from certify import CertifiedModel
from models import MaxMin, Orthonormal, parametrized


def networks(seed: int) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, network and number of inputs."""
    torch.manual_seed(seed)
    for inputs in (16, 64, 784):
        yield f"linear, {inputs} inputs", nn.Linear(inputs, 2), inputs
    for depth in (3, 8):
        layers: list[nn.Module] = []
        for _ in range(depth):
            square = nn.Linear(64, 64)
            nn.init.normal_(square.weight)
            layers += [parametrized(square, Orthonormal()), MaxMin()]
        yield f"{depth} layers of MaxMin, 64 inputs", nn.Sequential(*layers, nn.Linear(64, 2)), 64


def boundary(certified: CertifiedModel, x: Tensor) -> Tensor:
    """Unit vectors along which the margin falls fastest at ``x``."""
    x = x.double().requires_grad_()
    logits = certified.model(x)
    top = logits.detach().argmax(dim=1, keepdim=True)
    margin = logits.gather(1, top) - logits.gather(1, 1 - top)
    (gradient,) = torch.autograd.grad(margin.sum(), x)
    return -gradient / gradient.norm(dim=1, keepdim=True)


def broken(
    model: nn.Module, x: Tensor, way: Tensor, radius: Tensor, generator: torch.Generator
) -> Tensor:
    """Whether one rounding of the point just inside each radius is seen as another class."""
    inside = radius * (1.0 - 2.0 ** -torch.randint(18, 40, radius.shape, generator=generator))
    target = x.double() + inside[:, None] * way
    near = target.float()
    ulp = torch.nextafter(near, torch.full_like(near, torch.inf)) - near
    steps = torch.randint(-1, 2, near.shape, generator=generator)
    point = near + steps * ulp
    distance = (point.double() - x.double()).norm(dim=1) * (1.0 + 1e-12)
    with torch.no_grad():
        changed = model(point).argmax(dim=1) != model(x).argmax(dim=1)
    return changed & (distance < radius)


@click.command()
@click.option("--tries", default=200_000, show_default=True, help="For each network.")
@click.option("--inputs", default=1000, show_default=True)
@click.option("--precision", default="float32", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(tries: int, inputs: int, precision: str, seed: int) -> None:
    """Print how many radii were broken, of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-tries // inputs)
    click.echo(f"{'network':<32}{'tries':>10}{'exact radii broken':>20}{'rounded':>14}{'cost':>10}")
    for name, model, size in networks(seed):
        x = torch.randn(inputs, size, generator=generator)
        model = copy.deepcopy(model).eval()
        exact, sound = (CertifiedModel(model, (size,), precision=p) for p in (None, precision))
        way = boundary(exact, x)
        radii = exact.certify(x).radius, sound.certify(x).radius
        counts = [torch.zeros(inputs, dtype=torch.bool) for _ in radii]
        for _ in range(rounds):
            for count, radius in zip(counts, radii, strict=True):
                count |= broken(model, x, way, radius, generator)
        cost = (1.0 - radii[1] / radii[0]).median().item()
        shares = [f"{int(count.sum()):,} of {inputs:,}" for count in counts]
        click.echo(f"{name:<32}{rounds * inputs:>10,}{shares[0]:>20}{shares[1]:>14}{cost:>10.1e}")


if __name__ == "__main__":
    main()
