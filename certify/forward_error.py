r"""How far a network that is computed with rounding is from itself in exact arithmetic.

For a tensor ``t`` of the network let ``t(x)`` be its exact value at a sample and ``t^(x')`` what
the machine computes at a perturbed input with ``|x' - x| <= r``. Two bounds are carried from step
to step, for each sample: of the error ``e >= |t^(x') - t(x')|``, and of the size ``|t^(x')|``,
which is at most ``|t(x)| + Lip(t) r + e``. A step with Lipschitz constant ``L`` that rounds by
``d`` at most on arguments of that size makes ``L e + d`` of ``e``: its exact result on the computed
arguments is within ``L e`` of the exact one, and the computed one within ``d`` of that.

The values at the samples come from a pass in float64, with the errors that the same walk finds for
that (``r = 0``). What each operation rounds is in `certify.rules.rounding`.

References:
    N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, chapter 3.
    J. Jin, O. Ohrimenko, B. Rubinstein, Getting a-Round Guarantees: Floating-Point Attacks on
    Certified Robustness, AISec 2024 (radii of exact arithmetic broken by rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from certify.bounding import Bounding, Norms
from certify.graph import LipschitzGraph
from certify.joining import times
from certify.nodes import Operation
from certify.operators import Matrix, Weighted
from certify.precision import PRECISIONS, Precision
from certify.rules.rounding import Call, norms_of, sum_of
from certify.signal import Affine, Lipschitz, Product, Signal, Slopes, UnknownRounding, Wrapping
from ff_bounds.rounding import product_bound, round_up, sum_bound


class ForwardError:
    """Bounds of the rounding of a network's forward pass.

    Args:
        graph: of the network in float64.
        output: what `LipschitzGraph.walk` returned last.
        measure: proves norms of operators; not called before `bounds` is.

    Raises:
        UnknownRounding: an operation of which it is not known how much it can round.
    """

    def __init__(
        self,
        graph: LipschitzGraph,
        output: Signal,
        measure: Callable[[Sequence[Weighted]], Norms],
    ) -> None:
        self.output = output
        self.bounding = Bounding(output)
        self.operations = graph.operations()
        for operation in self.operations.values():
            operation.check()
        if graph.computes_constants:
            raise UnknownRounding(
                "the forward computes constants, which are rounded each time; make them parameters "
                "or buffers"
            )
        self._graph = graph
        self._measure = measure
        self._constants: dict[tuple[fx.Node, int], Tensor] = {}

    @cached_property
    def norms(self) -> Norms:
        """Proven norms of the network's operators, none of them merged."""
        signals = [s for operation in self.operations.values() for _, s in operation.results]
        operators = dict.fromkeys(self.bounding.operators())
        for signal in signals:  # some, as of padding that a convolution takes for its own, are not
            for found in Bounding(signal).operators() if signal not in self._known else ():
                operators.setdefault(found)
        return self._measure(list(operators))

    @cached_property
    def _known(self) -> set[Signal]:
        return set(self.bounding.order)

    @cached_property
    def _lipschitz(self) -> dict[Signal, Tensor]:
        return self.bounding.evaluate(self.norms)

    def lipschitz(self, signal: Signal) -> Tensor:
        """Proven Lipschitz bound of a tensor."""
        if signal not in self._lipschitz:
            self._lipschitz[signal] = Bounding(signal).evaluate(self.norms)[signal]
        return self._lipschitz[signal]

    def bounds(self, x: Tensor, radius: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
        """Bound the L2 errors of the logits.

        Args:
            x: ``(N, *input_shape)`` float64.
            radius: ``(N,)``, how far from these the inputs are that the machine gets, which are
                numbers of its precision, or of float32 where that is coarser.
            precision: what it computes in.

        Returns:
            ``(N,)`` each: of the machine's logits at such inputs, and of those of the float64 pass
            at ``x``.
        """
        here, there = self.walked(x, radius, precision)
        return there.carried[self.output], here.carried[self.output]

    def errors_at(self, x: Tensor) -> dict[tuple[fx.Node, int], Tensor]:
        """Bound the L2 errors ``(N,)`` of all tensors of the float64 pass at ``x``."""
        return self.walked(x, None, None)[0].errors

    def error_of(self, signal: Signal, x: Tensor) -> Tensor:
        """Bound the L2 error ``(N,)`` of one tensor of the float64 pass at ``x``."""
        (here,) = self.walked(x, None, None)
        return self.carry(signal, dict(here.carried), here.sizes)

    def margin_bounds(
        self,
        x: Tensor,
        radius: Tensor | None,
        precision: Precision | None,
        classes: Tensor,
        *,
        passes: int = 1,
    ) -> Tensor:
        """Bound the errors of the differences of logits.

        Where the last operation is a matrix with rows ``w_i``, an error ``e`` of the features and
        one ``d`` of the matrix product itself move the difference of two logits by at most
        ``|w_i - w_j| e + sqrt(2) d``; elsewhere by the root of two times the error of the logits.

        Args:
            x: as for `bounds`, and so are the next two.
            radius: of the balls.
            precision: of the machine, or ``None`` for one that does not round.
            classes: ``(N,)``.
            passes: in float64, whose errors count.

        Returns:
            ``(N, C)``, for ``logit[class] - logit[j]``, of the machine's logits and those of the
            float64 passes together.
        """
        here, *there = self.walked(x, radius, precision)
        return self.margins([here] * passes + there, classes)

    def margins(self, walks: Sequence[_Walk], classes: Tensor) -> Tensor:
        """Bound the errors of the differences of logits in several passes together, ``(N, C)``."""
        step, count = self.output.step, self.output.shape[1]
        matrix = isinstance(step, Affine) and isinstance(step.operator, Matrix)
        if not matrix or self.output.origin is not None:  # whose products are not the last step
            total = sum_of([walk.carried[self.output] for walk in walks])
            return round_up(2.0**0.5 * total, 3)[:, None].expand(-1, count)
        source = self.output.parents[0]
        features = sum_of([self.carry(source, dict(w.carried), w.sizes) for w in walks])
        local = sum_of([walk.added[self.output] for walk in walks])
        assert isinstance(step, Affine)
        assert isinstance(step.operator, Matrix)
        pairs = product_bound(step.operator.row_difference_bound()[classes], features[:, None])
        return round_up(pairs + 2.0**0.5 * local[:, None], 5)

    def walked(
        self, x: Tensor, radius: Tensor | None, precision: Precision | None
    ) -> tuple[_Walk, ...]:
        """Walk at the samples and, on a machine that rounds, in the balls around them."""
        none = x.new_zeros(len(x))
        here = _Walk(self, self._graph, PRECISIONS["float64"], none, None)
        with torch.no_grad():
            here.run(x.clone())
            if precision is None or radius is None:
                return (here,)
            there = _Walk(self, self._graph, precision, radius, here.errors)
            there.run(x.clone())
        return here, there

    def constant(self, place: tuple[fx.Node, int], signal: Signal, among: set[Signal]) -> Tensor:
        """Lipschitz constant of an operation's result as a function of all that enters."""
        if place not in self._constants:
            one = torch.ones((), dtype=torch.float64, device=self.output.input.device)
            self._constants[place] = self.carry(signal, dict.fromkeys(among, one), {})
        return self._constants[place]

    def carry(
        self, signal: Signal, errors: dict[Signal, Tensor], sizes: Mapping[Signal, Tensor]
    ) -> Tensor:
        """Carry errors through exact steps, from the signals where they are known."""
        if signal not in errors:
            if signal.origin is not None:
                errors[signal] = self.carry(signal.origin, errors, sizes)
                return errors[signal]
            for parent in signal.parents:
                self.carry(parent, errors, sizes)
            if isinstance(signal.step, Product):
                first, second = signal.parents
                one = product_bound(errors[first], _size(second, sizes))
                other = product_bound(_size(first, sizes), errors[second])
                errors[signal] = sum_bound(one, other)
            else:
                errors[signal] = self.bounding.value(signal, errors, self.norms)
        return errors[signal]


def _size(signal: Signal, sizes: Mapping[Signal, Tensor]) -> Tensor:
    """Size of a factor of a product, perhaps of one that is repeated first."""
    if signal in sizes:
        return sizes[signal]
    step = signal.step
    if not (isinstance(step, Lipschitz) and step.linear and signal.parents):
        raise UnknownRounding("it is not known how large a factor of a product can get")
    return times(_size(signal.parents[0], sizes), step.constant)


class _Walk(fx.Interpreter):
    """Run the network in float64 and carry errors beside it.

    Args:
        owner: what is known of the network.
        graph: itself.
        precision: of the machine.
        radius: see `ForwardError.bounds`.
        exact: errors of the float64 values, or ``None`` where these are computed.
    """

    def __init__(
        self,
        owner: ForwardError,
        graph: LipschitzGraph,
        precision: Precision,
        radius: Tensor,
        exact: dict[tuple[fx.Node, int], Tensor] | None,
    ) -> None:
        super().__init__(graph.module, graph=graph.graph)
        self.extra_traceback = False
        self._owner = owner
        self._precision = precision
        self._radius = radius
        self._exact = exact
        self._fixed = {n for n in graph.graph.nodes if n not in owner.operations}
        self.sizes: dict[Signal, Tensor] = {}  # of the exact tensors, and of those computed
        self.computed: dict[Signal, Tensor] = {}  # of the latter
        self._entries: dict[Signal, int] = {}
        self.carried: dict[Signal, Tensor] = {}
        self.added: dict[Signal, Tensor] = {}
        self.errors: dict[tuple[fx.Node, int], Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        operation = self._owner.operations.get(n)
        if operation is None:
            return super().run_node(n)
        arguments, options = self.fetch_args_kwargs_from_env(n)
        entries = {source: self._entries[source] for source in operation.sources}
        constants = [self.env[used] for used in n.all_input_nodes if used in self._fixed]
        fixed = tuple(value for value in constants if isinstance(value, Tensor))
        result = super().run_node(n)
        leaves = pytree.tree_leaves(result)
        for place, signal in operation.results:
            value = leaves[place].to(torch.float64)
            size, count = norms_of(value, 1), math.prod(value.shape[1:])
            if operation.sources:
                call = Call(
                    self._precision,
                    operation.module,
                    arguments,
                    options,
                    signal,
                    sum_of([self.computed[source] for source in operation.sources]),
                    size,
                    self._constant((n, place), operation, signal),
                    (sum(entries.values()), count),
                    fixed,
                    max([1.0] + [count / max(1, before) for before in entries.values()]) ** 0.5,
                )
                self._note((n, place), operation, call)
            else:
                self._start((n, place), signal, size, count)
            known = self._entries.get(signal)
            self._entries[signal] = count if known is None else min(count, known)
        return result

    def _constant(self, place: tuple[fx.Node, int], operation: Operation, signal: Signal) -> Tensor:
        if isinstance(signal.step, Product):
            return self._radius.new_ones(())
        among = set(operation.sources)
        among.update(s.parents[0] for s in operation.sources if isinstance(s.step, Wrapping))
        return self._owner.constant(place, signal, among)

    def _start(
        self, place: tuple[fx.Node, int], signal: Signal, size: Tensor, entries: int
    ) -> None:
        """The input, which coarse precisions round."""
        error = torch.zeros_like(size)
        if self._exact is not None and self._precision.unit > 2.0**-24:
            lost = 2.0 * self._precision.smallest * math.sqrt(entries)
            error = round_up(self._precision.unit * (size + self._radius) + lost, 3)
        size = round_up(size + self._radius + error, 3)
        self._keep(place, signal, error, size, size)

    def _note(self, place: tuple[fx.Node, int], operation: Operation, call: Call) -> None:
        """Bound the error and the size of a result."""
        owner, signal, size = self._owner, call.signal, call.leaving
        before = owner.carry(signal, dict(self.carried), self.sizes)
        applied = signal.origin is None and signal not in self.carried
        if applied and isinstance(signal.step, Slopes) and math.isfinite(signal.step.largest):
            # As far apart as two values of the function can be, whatever enters.
            farthest = 2.0 * signal.step.largest * math.sqrt(call.entries[1])
            before = before.clamp_max(farthest * (1.0 + 2.0**-50))
        if self._exact is None:
            # What is computed is known, and the exact result by the rule itself, as that grows by
            # at most half of what `leaving` does.
            leaving = round_up(size + 2.0 * operation.rounding(call), 3)
        else:
            reach = product_bound(owner.lipschitz(signal), self._radius)
            size = round_up(size + self._exact[place] + reach, 3)
            leaving = round_up(size + before, 1)
        local = operation.rounding(replace(call, leaving=leaving))
        # Nothing in between overflows: not a partial sum of all that enters either.
        most = call.entering * (1.0 + math.sqrt(call.entries[0])) + leaving + local
        local = torch.where(most < self._precision.largest / 8.0, local, torch.inf)
        error = sum_bound(before, local)
        self.added[signal] = sum_bound(self.added[signal], local) if signal in self.added else local
        # In the float64 pass what is computed is known.
        larger = sum_bound(size, error)
        self._keep(place, signal, error, larger, size if self._exact is None else larger)

    def _keep(
        self,
        place: tuple[fx.Node, int],
        signal: Signal,
        error: Tensor,
        size: Tensor,
        computed: Tensor,
    ) -> None:
        """Several nodes may stand for one signal, as where a constant is added: the largest."""
        found = ((self.carried, error), (self.sizes, size), (self.computed, computed))
        for known, new in found:
            known[signal] = torch.maximum(known[signal], new) if signal in known else new
        self.errors[place] = self.carried[signal]
