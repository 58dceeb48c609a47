"""Time of a training step with the four-bound penalty over one without, side by side.

Two copies of a network take turns on the same batches, in one process; the order within a pair
alternates. Printed are the medians and the median of the pairwise ratios.

    python benchmarks/training_step.py --model resnet32 --batch-size 128 --steps 60
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from certify.norms import NetworkEstimator

PENALTY = 1e-3


def make_step(
    model: nn.Module, penalised: str, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor], None]:
    """Return a function that makes one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    estimator = NetworkEstimator(model, shape) if penalised != "none" else None
    model.train()

    def step(x: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(model(x), labels)
        if estimator is not None:
            estimate = estimator()
            if penalised == "sum of layers":
                loss = loss + PENALTY * estimate.layers.sum()
            else:
                loss = loss + PENALTY * estimate.lipschitz().log()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


@click.command()
@click.option("--model", default="resnet32", show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(model: str, batch_size: int, steps: int, threads: int, device: str) -> None:
    """Measure and print the ratios."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = (3, 32, 32)
    plain = models.build(model, input_shape=shape).to(device)
    x = torch.rand(batch_size, *shape, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    print(f"{model}, batch {batch_size}, {device}, {threads} threads, torch {torch.__version__}")
    for penalised in ("sum of layers", "log of the network's constant"):
        pair = [make_step(copy.deepcopy(plain), kind, shape) for kind in ("none", penalised)]
        times: tuple[list[float], list[float]] = ([], [])
        for index in range(steps + 4):
            for which in (0, 1) if index % 2 else (1, 0):
                start = time.perf_counter()
                pair[which](x, labels)
                if index >= 4:  # the first four warm up
                    times[which].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        without, with_penalty = (1e3 * statistics.median(t) for t in times)
        print(
            f"{penalised:<30} without {without:8.1f} ms   with {with_penalty:8.1f} ms   "
            f"ratio {statistics.median(ratios):.3f}  (target 1.05; the paper's code 1.10)"
        )


if __name__ == "__main__":
    main()
