"""The graph of a module, and the walk over it with Lipschitz rules."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from certify.batch_numbers import refuse_batch_numbers
from certify.cutting import cut
from certify.nodes import (
    Arguments,
    Operation,
    Recorder,
    asks_for_size,
    is_module,
    module_of,
    node_name,
    operation_of,
    takes,
)
from certify.operators import Scale
from certify.rules import REFUSALS, RULES
from certify.rules.installed import register_installed
from certify.rules.registry import ROUNDINGS
from certify.rules.rounding import exact, norms_of
from certify.signal import (
    Input,
    Signal,
    Slopes,
    UnsupportedModel,
    checked_domain,
)
from certify.tracing import (
    BATCH,
    Root,
    agree,
    check_against_module,
    example_of,
    label_of,
    refuse_what_tracing_misses,
    trace,
    without_tf32,
)


class LipschitzGraph:
    """The graph of a module in evaluation mode, ready to be walked with Lipschitz rules.

    The module is traced with ``torch.fx`` down to the operations that have a rule. Whatever the
    trace would not see is refused: hooks, a ``forward`` patched on an instance, control flow that
    depends on values. The graph is then run on examples beside the module: a tensor that is
    modified in place after it was computed and then used again is found by its version counter,
    and another result than the module's is refused, as is a forward that writes into the module's
    own tensors or stays in training mode.

    The graph refers to the module's parameters and buffers; it does not copy them.

    Args:
        model: any module with one tensor argument (others at their defaults) and one tensor
            result.
        input_shape: shape of one sample, without the batch.
        domain: smallest and largest entry that an input may have; needed by products only.

    Raises:
        UnsupportedModel: what cannot be traced faithfully.
        ValueError: the input shape does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        domain: Sequence[float] | None = None,
    ) -> None:
        limits = checked_domain(domain)
        refuse_what_tracing_misses(model)
        register_installed()
        tensors = chain(model.parameters(), model.buffers())
        floating = next(
            (t for t in tensors if t.is_floating_point()), torch.zeros((), dtype=torch.float64)
        )
        self.device = floating.device
        example = example_of(input_shape).to(floating)
        self._example = example
        with _evaluating(model):
            root = Root(model)
            graph, self.computes_constants = trace(root, example)
            _refuse_early(root, graph)
            shapes = check_against_module(root, graph, example)
            refuse_batch_numbers(graph, shapes)
            self._recorder = Recorder(root, graph)
            self.input_shape = tuple(input_shape)
            self.domain = limits
            centres = None if limits is None else self._centres(example[:1], limits)
            start = Input(self.device, limits, floating.dtype)
            self._walker = _Walker(root, graph, shapes, centres, start)

    def walk(self) -> Signal:
        """Return the output as the steps that it arises by.

        Raises:
            UnsupportedModel: an operation without a rule, or one that its rule refuses.
        """
        result = self._walker.run(None)
        if not isinstance(result, Signal):
            raise UnsupportedModel("the output does not depend on the input, or is not one tensor")
        return result

    def tensors(self, x: Tensor) -> dict[str, Tensor]:
        """Run the graph on a batch; return the tensor at each of its nodes, by `Signal.node`."""
        return self._recorder.record(x)

    def arguments(self, x: Tensor) -> dict[str, Tensor]:
        """Run the graph on a batch; return what enters its `Slopes`, by their `Signal.node`.

        To be called after `walk`. An activation whose rule first does something else is left out.
        """
        return Arguments(self._walker.module, self._walker.graph, self._walker.sources).note(x)

    def split(self, node: str) -> tuple[nn.Module, nn.Module]:
        """Cut the network at a tensor that all paths go through.

        Args:
            node: its `Signal.node`.

        Returns:
            The network up to that tensor, and from there on.

        Both are for gradients: nothing in them is detached.

        Raises:
            UnsupportedModel: what is behind the tensor uses others as well, such as a size, or the
                parts do something else than the whole.
        """
        root, graph = self._walker.module, self._walker.graph
        before, after = cut(root, graph, node)
        with _evaluating(root), torch.no_grad(), without_tf32():
            whole = fx.Interpreter(root, graph=graph).run(self._example.clone())
            if not agree(after(before(self._example.clone())), whole):
                raise UnsupportedModel(f"the network cannot be cut at node {node!r}")
        return before, after

    def _centres(self, like: Tensor, domain: tuple[float, float]) -> dict[str, tuple[float, float]]:
        """Norms and largest entries of all tensors at the centre of the domain, as computed."""
        self._centre = torch.full_like(like, (domain[0] + domain[1]) / 2.0)
        with torch.no_grad():
            tensors = self.tensors(self._centre)
        return {
            node: (norms_of(tensor.to(torch.float64)[None], 1).item(), tensor.abs().amax().item())
            for node, tensor in tensors.items()
            if tensor.is_floating_point() and tensor.numel()
        }

    def centre(self) -> Tensor:
        """The centre ``(1, *input_shape)`` of the domain."""
        return self._centre.clone()

    def allow_at_centre(self, errors: Mapping[str, float]) -> None:
        """Raise what is computed at the centre of the domain by L2 errors, by `Signal.node`."""
        centres = self._walker.centres
        assert centres is not None
        for node, error in errors.items():
            if node in centres:
                norm, largest = (_above(size + error) for size in centres[node])
                centres[node] = norm, largest

    @property
    def module(self) -> nn.Module:
        """What the graph's nodes belong to."""
        return self._walker.module

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self._walker.graph

    def operations(self) -> dict[fx.Node, Operation]:
        """What the nodes do that the output depends on, as of the last `walk`."""
        placed, computed = self._walker.placed, self._walker.computed
        (output,) = (n for n in self.graph.nodes if n.op == "output")
        needed = {output}
        for n in reversed(self.graph.nodes):
            if n in needed:
                needed.update(n.all_input_nodes)
        found = {}
        for n, results in placed.items():
            if n in needed:
                sources = [
                    signal
                    for used in n.all_input_nodes
                    for place, signal in placed.get(used, ())
                    if len(placed[used]) == 1 or takes(n, place)
                ]
                constants = [used for used in n.all_input_nodes if used in computed]
                found[n] = Operation(self.module, n, results, sources, bool(constants))
        return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


class _Walker(fx.Interpreter):
    """Run a graph on `Signal`s; what does not depend on the input runs as it is."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        shapes: dict[fx.Node, list[tuple[int, ...]]],
        centres: dict[str, tuple[float, float]] | None,
        start: Input,
    ) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self._known_shapes = shapes
        self.centres = centres
        self._start = start
        self._rules: dict[fx.Node, Callable[..., Any]] = {}
        self.sources: dict[str, fx.Node] = {}  # of what enters each activation
        self.placed: dict[fx.Node, list[tuple[int, Signal]]] = {}
        self.computed: set[fx.Node] = set()  # constants behind which there is rounding

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            start = self._placed(n, 0, Signal((), self._start), self._known_shapes[n][0])
            self.placed = {n: [(0, start)]}
            return start
        if n.op in ("get_attr", "output"):
            return super().run_node(n)
        if not any(_holds_signal(self.env[used]) for used in n.all_input_nodes):
            constant = super().run_node(n)
            self._note_constant(n, constant)
            return constant
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n not in self._rules:
            self._rules[n] = self._rule(n)
        rule = self._rules[n]
        try:
            result = rule(*args, **kwargs)
        except UnsupportedModel as refusal:
            raise UnsupportedModel(f"node {label_of(n)}: {refusal}") from None
        except TypeError as error:  # arguments that the rule does not provide for
            raise UnsupportedModel(f"node {label_of(n)}: {error}") from error
        if isinstance(result, Signal) and isinstance(result.step, Slopes):
            used = [u for u in n.all_input_nodes if self.env[u] is result.parents[0]]
            if used:
                self.sources[n.name] = used[0]
        leaves, structure = pytree.tree_flatten(result)
        if not any(isinstance(leaf, Signal) for leaf in leaves):
            return result
        shapes = self._known_shapes[n]
        if len(shapes) != len(leaves):
            raise UnsupportedModel(f"node {label_of(n)}: its rule returns {len(leaves)} results")
        placed = [
            self._placed(n, index, leaf, shape)
            for index, (leaf, shape) in enumerate(zip(leaves, shapes, strict=True))
        ]
        self.placed[n] = [(i, leaf) for i, leaf in enumerate(placed) if isinstance(leaf, Signal)]
        return pytree.tree_unflatten(placed, structure)

    def _note_constant(self, n: fx.Node, value: Any) -> None:
        """Note a constant that a machine computes with rounding, as it does what it is about.

        Places and comparisons of weights, too: a machine rounds these before.
        """
        given = pytree.tree_leaves([self.env[used] for used in n.all_input_nodes])
        found = pytree.tree_leaves(value)
        moved = ROUNDINGS.get(operation_of(self.module, n)[0]) is exact
        moved = moved and (not any(map(_is_floating, given)) or all(map(_is_floating, found)))
        floating = any(map(_is_floating, [*given, *found]))
        rounds = floating and not moved and not asks_for_size(n)
        if rounds or any(used in self.computed for used in n.all_input_nodes):
            self.computed.add(n)

    def _placed(self, n: fx.Node, index: int, result: Any, shape: tuple[int, ...]) -> Any:
        """Give a rule's result its place in the graph."""
        if not isinstance(result, Signal):
            return result
        if not shape or shape[0] != BATCH:
            raise UnsupportedModel(f"node {label_of(n)}: the result loses the batch axis")
        node = node_name(n, index)
        centre = None if self.centres is None else self.centres.get(node)
        if result.node and result.shape == shape and result.centre == centre:
            return result  # the rule gave back what it got
        if isinstance(result.step, Input) and result.node:  # there is one, with one centre
            one = torch.ones(1, dtype=torch.float64, device=result.step.device)
            result = result.through(Scale(one, 0))
        name, origin = label_of(n).strip("'"), result if result.node else result.origin
        return replace(result, shape=shape, name=name, node=node, centre=centre, origin=origin)

    def _rule(self, n: fx.Node) -> Callable[..., Any]:
        key, _ = operation_of(self.module, n)
        if key not in RULES:
            raise _refusal(self.module, n)
        rule = RULES[key]
        return functools.partial(rule, module_of(self.module, n)) if is_module(n) else rule


def _refuse_early(root: nn.Module, graph: fx.Graph) -> None:
    """Refuse modules without a rule, and torch's functions that cannot have one, before any runs.

    Whatever else has no rule may turn out to be about sizes, and is left to the walk.
    """
    for n in graph.nodes:
        if n.op not in ("call_module", "call_function") or not n.all_input_nodes:
            continue
        key, name = operation_of(root, n)
        functional = key in REFUSALS and name.startswith("torch.nn.functional.")
        weights = is_module(n) and all(used.op == "get_attr" for used in n.all_input_nodes)
        if key not in RULES and not weights and (is_module(n) or functional):
            raise _refusal(root, n)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _above(number: float) -> float:
    return math.nextafter(number, math.inf)


def _refusal(root: nn.Module, n: fx.Node) -> UnsupportedModel:
    key, name = operation_of(root, n)
    reason = f"no Lipschitz rule for {name}; register one with @certify.lipschitz_rule"
    if key in REFUSALS:
        reason = f"{name}: {REFUSALS[key]}"
    return UnsupportedModel(f"node {label_of(n)}: {reason}")


def _holds_signal(value: Any) -> bool:
    if isinstance(value, (Signal, Tensor)):
        return isinstance(value, Signal)
    return any(isinstance(leaf, Signal) for leaf in pytree.tree_leaves(value))
