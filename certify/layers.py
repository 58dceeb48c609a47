"""Where a network's Lipschitz bound comes from: layer by layer, bound beside what data shows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from certify.bounding import Bounding, Norms
from certify.centres import proven_walk
from certify.certified_model import CertifiedModel
from certify.graph import LipschitzGraph
from certify.operators import Convolution, Weighted
from certify.report import finite
from certify.signal import Affine, Signal
from certify.snapshot import exact_copy
from certify.tightening import TIGHTENINGS, NetworkBound, bound_network

_STEP = 1e-4  # of the differences that gains are measured by
_LOOKS = 8  # steps of power iteration towards the largest gain


@dataclass(frozen=True)
class Layer:
    """One matrix or convolution, with the normalisation that is merged into it.

    Attributes:
        name: of its modules.
        kind: what it is, e.g. ``"conv 64 -> 128, 3x3 / 2"``.
        shape: of its output, for one sample.
        bound: proven bound of its norm.
        seen: largest ratio of the norms of differences after and before it that was seen.
        share: part of the logarithm of the network's bound that it stands for: the bound's
            elasticity with respect to its norm, times the logarithm of the norm.
        bound_so_far: proven Lipschitz bound from the network's input to its output.
        seen_so_far: largest such ratio that was seen.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bound: float
    seen: float
    share: float
    bound_so_far: float
    seen_so_far: float


@dataclass(frozen=True)
class NetworkReport:
    """A network's bounds.

    Attributes:
        method: how convolutions were bounded.
        layers: in the order of execution.
        lipschitz: proven bound of the network for each of `TIGHTENINGS` that was asked for.
        seconds: what tracing, each of these and looking for gains took.
        seen: largest gain of the network that was seen; no bound, but none can be below it.
        images: what the gains were seen on, for people.
    """

    method: str
    layers: tuple[Layer, ...]
    lipschitz: dict[str, float]
    seconds: dict[str, float]
    seen: float
    images: str

    def to_json(self) -> str:
        """Return everything as JSON; an infinite number is null."""
        content = asdict(self)
        for layer in content["layers"]:
            layer.update({k: finite(v) for k, v in layer.items() if isinstance(v, float)})
        content["lipschitz"] = {k: finite(v) for k, v in self.lipschitz.items()}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def to_table(self) -> str:
        """Return the report for people."""
        width = max([5, *(len(layer.name) for layer in self.layers)])
        kinds = max([4, *(len(layer.kind) for layer in self.layers)])
        shapes = ["x".join(map(str, layer.shape)) for layer in self.layers]
        sizes = max([6, *map(len, shapes)])
        head = f"{'layer':<{width}}  {'kind':<{kinds}}  {'output':<{sizes}}  {'norm <=':>9} "
        head += f"{'seen':>9} {'share':>7}"
        lines = [head + f"  {'so far <=':>9} {'seen':>9}"]
        lines += [
            f"{layer.name:<{width}}  {layer.kind:<{kinds}}  {shape:<{sizes}}  {layer.bound:9.4g} "
            f"{layer.seen:9.4g} {100 * layer.share:6.1f}%  {layer.bound_so_far:9.4g} "
            f"{layer.seen_so_far:9.4g}"
            for layer, shape in zip(self.layers, shapes, strict=True)
        ]
        lines += ["", f"norms of convolutions by {self.method}"]
        previous = None
        for level, value in self.lipschitz.items():
            gain = "" if previous is None else f"{_ratio(previous, value):>9}"
            lines.append(
                f"{_MEANING[level]:<42}{value:>11.5g} {gain:>9}  {self.seconds[level]:8.1f} s"
            )
            previous = value
        seen = f"largest gain seen on {self.images}"
        lines.append(f"{seen:<42}{self.seen:>11.5g} {'':>9}  {self.seconds['looking']:8.1f} s")
        lines.append(f"{'tracing':<42}{'':>21}  {self.seconds['tracing']:8.1f} s")
        return "\n".join(lines)


_MEANING = {
    "none": "product of all norms",
    "merge": "normalisation merged into its neighbours",
    "join": "neighbours and skips bounded together",
    "balance": "channels balanced between layers",
}


def report_layers(
    model: nn.Module | CertifiedModel,
    images: Tensor,
    *,
    described_as: str = "the given images",
    method: str = "supremum",
    tighten: str = "balance",
    domain: Sequence[float] | None = None,
) -> NetworkReport:
    """Bound a network in all steps, and each of its layers.

    Args:
        model: as `CertifiedModel` takes it, or one of these.
        images: ``(N, *input_shape)`` at which gains are measured, along the direction in which
            the logits change most.
        described_as: what these are, for people.
        method: how convolutions are bounded.
        tighten: the last of `TIGHTENINGS` to take.
        domain: as in `CertifiedModel`.

    Raises:
        UnsupportedModel, ValueError: as `CertifiedModel`.
    """
    start = time.perf_counter()
    if isinstance(model, CertifiedModel):
        domain = domain or model.domain
    network = model.model if isinstance(model, CertifiedModel) else model
    copied = exact_copy(network, tuple(images.shape[1:]))
    graph = LipschitzGraph(copied, tuple(images.shape[1:]), domain)
    output = proven_walk(graph)
    seconds = {"tracing": time.perf_counter() - start}
    found: dict[str, NetworkBound] = {}
    for level in TIGHTENINGS[: TIGHTENINGS.index(tighten) + 1]:
        start = time.perf_counter()
        found[level] = bound_network(output, method, level)
        _ = found[level].lipschitz
        seconds[level] = time.perf_counter() - start
    lipschitz = {level: bound.lipschitz.item() for level, bound in found.items()}

    start = time.perf_counter()
    plain = found.get("merge") or bound_network(output, method, "merge")
    changes = _changes(copied, graph, images.to(graph.device, torch.float64))
    layers = _layers(plain.bounding, plain.norms, plain.values, changes)
    seen = _ratio_of(_change(changes, output), _change(changes, plain.bounding.order[0]))
    seconds["looking"] = time.perf_counter() - start
    return NetworkReport(method, layers, lipschitz, seconds, seen, described_as)


def _layers(
    bounding: Bounding, norms: Norms, values: dict[Signal, Tensor], changes: dict[str, Tensor]
) -> tuple[Layer, ...]:
    operators = bounding.operators()
    logs = {o: norms(o).detach().log().requires_grad_() for o in operators}
    with torch.enable_grad():
        total = bounding.evaluate(lambda operator: logs[operator].exp())[bounding.output].log()
        slopes = torch.autograd.grad(total, list(logs.values()), allow_unused=True)
    elasticity = {
        operator: 0.0 if slope is None or not bool(slope.isfinite()) else slope.item()
        for operator, slope in zip(operators, slopes, strict=True)
    }
    start = _change(changes, bounding.order[0])
    layers = []
    for signal in bounding.layers():
        operator = bounding.operator(signal)
        assert isinstance(signal.step, Affine)
        assert isinstance(operator, Weighted)
        after, before = _change(changes, signal), _change(changes, signal.parents[0])
        share = elasticity[operator] * logs[operator].item() / total.item() if total != 0 else 0.0
        layers.append(
            Layer(
                signal.name,
                _kind(operator),
                signal.shape[1:],
                norms(operator).item(),
                _ratio_of(after, before),
                share,
                values[signal].item(),
                _ratio_of(after, start),
            )
        )
    return tuple(layers)


def _changes(model: nn.Module, graph: LipschitzGraph, images: Tensor) -> dict[str, Tensor]:
    """Norms ``(N,)`` of what changes at each node, along the direction of the largest gain."""
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    direction = _unit(direction.to(images))
    for _ in range(_LOOKS):
        with torch.no_grad():
            moved = model(images + _STEP * direction) - model(images)
        x = images.clone().requires_grad_()
        with torch.enable_grad():
            (back,) = torch.autograd.grad((model(x + 0.0) * moved).sum(), x)
        direction = _unit(torch.where(_norms(back) > 0, back, direction))
    with torch.no_grad():
        first = graph.tensors(images.clone())
        second = graph.tensors(images + _STEP * direction)
    return {
        node: _norms(second[node] - tensor).flatten()
        for node, tensor in first.items()
        if tensor.is_floating_point() and tensor.ndim and tensor.shape[0] == len(images)
    }


def _norms(tensor: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(tensor.reshape(len(tensor), -1), dim=1)
    return norms.reshape(-1, *[1] * (tensor.ndim - 1))


def _unit(tensor: Tensor) -> Tensor:
    return tensor / _norms(tensor).clamp_min(1e-300)


def _change(changes: dict[str, Tensor], signal: Signal) -> Tensor | None:
    """Change of a signal, or of the last one before it that is a node of the graph."""
    while not signal.node and len(signal.parents) == 1:
        signal = signal.parents[0]
    return changes.get(signal.node)


def _ratio_of(after: Tensor | None, before: Tensor | None) -> float:
    if after is None or before is None:
        return math.nan
    return (after / before.clamp_min(1e-300)).amax().item()


def _ratio(before: float, after: float) -> str:
    return f"/ {before / after:.3g}" if after > 0 and math.isfinite(before) else ""


def _kind(operator: Weighted) -> str:
    if not isinstance(operator, Convolution):
        rows, columns = operator.weight.shape
        return f"linear {columns} -> {rows}"
    taps = "x".join(str(size) for size in operator.weight.shape[2:])
    name = "transposed conv" if operator.adjoint else "conv"
    steps = "" if set(operator.stride) == {1} else f" / {max(operator.stride)}"
    groups = f", {operator.groups} groups" if operator.groups > 1 else ""
    return f"{name} {operator.inputs} -> {operator.outputs}, {taps}{steps}{groups}"
