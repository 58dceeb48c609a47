"""The part of a network that has second derivatives, and what is before it.

A smooth network is all of it. Where another one ends in smooth layers, behind ReLU or MaxMin,
radii of these last layers in the space of their inputs, divided by a Lipschitz constant of all that
is before, are radii of the network: an input that moves by less than ``r / L`` moves the features
by less than ``r``.

References:
    S. Singla, S. Feizi, Improved techniques for deterministic l2 robustness, NeurIPS 2022 (one
    hidden layer on a 1-Lipschitz network, certified by its second derivatives).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.bounding import in_order
from certify.centres import proven_walk
from certify.graph import LipschitzGraph
from certify.sensitivity import is_twice_differentiable
from certify.signal import Input, Signal, Slopes, UnsupportedModel
from certify.tightening import NetworkBound, bound_network


@dataclass(frozen=True)
class SmoothHead:
    """The last layers of a network, twice differentiable.

    Attributes:
        model: from features to logits, with nothing detached, so that its gradients are true.
        bound: Lipschitz bounds of it.
        backbone: from inputs to features, or ``None`` where these are the same.
        lipschitz: proven bound of the backbone, a float64 scalar.
        features: what enters it, as a tensor of the whole network.
        graph, output: the head itself, and its result.
    """

    model: nn.Module
    bound: NetworkBound
    backbone: nn.Module | None
    lipschitz: Tensor
    features: Signal
    graph: LipschitzGraph
    output: Signal


def smooth_head(
    graph: LipschitzGraph, output: Signal, whole: NetworkBound, method: str, tighten: str
) -> SmoothHead:
    """Find the largest part that ends in the logits and has second derivatives.

    Args:
        graph: of the network.
        output: what ``graph.walk()`` returned.
        whole: bounds of the network, without scales between its layers.
        method: how convolutions of its parts are bounded, see `ff_bounds.conv_bound`.
        tighten: how far their bounds go, as in `certify.tightening`; without scales.

    Raises:
        UnsupportedModel: there is no smooth activation behind all that is not smooth.
    """
    cut = cut_before_head(output)
    one = torch.ones((), dtype=torch.float64, device=graph.device)
    before, after = graph.split(cut.node)
    if isinstance(cut.step, Input):
        return SmoothHead(after, whole, None, one, cut, graph, output)
    start = proven_walk(LipschitzGraph(before, graph.input_shape, graph.domain))
    head = LipschitzGraph(after, cut.shape[1:])
    end = head.walk()
    lipschitz = bound_network(start, method, tighten).lipschitz
    bound = bound_network(end, method, tighten)
    return SmoothHead(after, bound, before, lipschitz, cut, head, end)


def cut_before_head(output: Signal) -> Signal:
    """The first tensor that all paths go through and behind which all is smooth.

    Raises:
        UnsupportedModel: there is no smooth activation behind all that is not smooth.
    """
    found: Signal | None = None
    smooth, bent = True, False
    # Walking back from the output, ``open_`` are the tensors behind which all has been seen.
    order = in_order(output)
    place = {signal: index for index, signal in enumerate(order)}
    open_ = {output}
    while open_ and smooth:
        signal = max(open_, key=place.__getitem__)
        open_.remove(signal)
        if not open_ and signal.node and bent:
            found = signal
        smooth = is_twice_differentiable(signal)
        bent |= isinstance(signal.step, Slopes) and signal.step.low != signal.step.high
        open_ |= set(signal.parents)
    if found is None:
        raise UnsupportedModel(
            "no curvature bound: the last activations have to be smooth (softplus, sigmoid, tanh, "
            "ELU, GELU, SiLU), and these are not; try --set activation=softplus, or of 2c2f, 4c3f "
            "and liresnet --set head=softplus"
        )
    return found
