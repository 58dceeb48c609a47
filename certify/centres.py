"""Values at the centre of a domain, with what rounding may have done to them.

Products of tensors that depend on the input (`certify.products`) rest on the values at the centre
of the domain, which are those of a forward pass in float64. How far these are from the exact ones
is bounded as the rounding of any forward pass is (`certify.forward_error`), which makes no use of
what is stated here about the centre, and added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from certify.bounding import Norms, in_order
from certify.forward_error import ForwardError
from certify.graph import LipschitzGraph
from certify.nodes import node_name
from certify.norms import proven_norms
from certify.operators import Weighted
from certify.signal import Product, Signal, UnknownRounding, UnsupportedModel


def _cheap(operators: Sequence[Weighted]) -> Norms:
    return proven_norms(operators, "fantastic_four")


def proven_walk(
    graph: LipschitzGraph, measure: Callable[[Sequence[Weighted]], Norms] = _cheap
) -> Signal:
    """Walk a graph; where it has products, with proven values at the centre of the domain.

    Args:
        graph: of a network in float64.
        measure: proves norms of operators.

    Raises:
        UnsupportedModel: as `LipschitzGraph.walk`, or products in a network of which it is not
            known how much its operations round.
    """
    output = graph.walk()
    if not any(isinstance(signal.step, Product) for signal in in_order(output)):
        return output
    try:
        errors = ForwardError(graph, output, measure).errors_at(graph.centre())
    except UnknownRounding as reason:
        raise UnsupportedModel(
            f"products rest on values at the centre of the domain, and {reason}"
        ) from None
    graph.allow_at_centre(
        {node_name(*place): error.max().item() for place, error in errors.items()}
    )
    return graph.walk()
