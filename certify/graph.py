"""From a module to its graph, checked against the module itself, and the walk over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from certify.rules import RULES
from certify.signal import Norms, Signal, UnsupportedModel

_BATCH = 3  # samples in the example that checks the traced graph


class LipschitzGraph:
    """The graph of a module in evaluation mode, ready to be walked with Lipschitz rules.

    The module is traced with ``torch.fx`` down to the operations that have a rule. Whatever the
    trace would not see is refused: hooks, a ``forward`` patched on an instance, control flow that
    depends on values. The graph is then run on an example beside the module: a tensor that is
    modified in place after it was computed and then used again is found by its version counter,
    and another result than the module's is refused.

    The graph refers to the module's parameters and buffers; it does not copy them.

    Args:
        model: any module with one tensor argument and one tensor result.
        input_shape: shape of one sample, without the batch.

    Raises:
        UnsupportedModel: what cannot be traced faithfully.
        ValueError: the input shape does not fit the model.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int]) -> None:
        _refuse_what_tracing_misses(model)
        self._model = model
        parameter: Tensor = next(chain(model.parameters(), model.buffers()), torch.zeros(()))
        self.device = parameter.device
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            example = torch.randn(
                _BATCH,
                *input_shape,
                generator=torch.Generator().manual_seed(0),
                dtype=torch.float64,
            ).to(parameter)
            self._graph = _trace(model)
            self._shapes = _check_against_module(model, self._graph, example)
        finally:
            for module, mode in training.items():
                module.training = mode

    def walk(self, norms: Norms) -> Signal:
        """Carry a Lipschitz bound from the input to the output, measuring operators by ``norms``.

        Raises:
            UnsupportedModel: an operation without a rule, or one that its rule refuses.
        """
        result = _Walker(self._model, self._graph, self._shapes, norms, self.device).run(None)
        if not isinstance(result, Signal):
            raise UnsupportedModel("the output does not depend on the input, or is not one tensor")
        return result


class _Tracer(fx.Tracer):
    """Trace down to modules that have a rule, and to torch's own."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in RULES or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    if _Tracer().is_leaf_module(model, ""):  # fx never records the root itself
        graph = fx.Graph()
        graph.output(graph.call_module("", (graph.placeholder("x"),)))
        return graph
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the user's forward raises on a symbolic input
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModel(
            f"the forward of {type(model).__name__} cannot be traced ({reason}); "
            "control flow must not depend on the values of tensors"
        ) from error


def _refuse_what_tracing_misses(model: nn.Module) -> None:
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise UnsupportedModel("global forward hooks are registered; remove them")
    for name, module in model.named_modules():
        where = f"module {name or 'the model itself'!r} ({type(module).__name__})"
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModel(
                f"{where} has forward hooks, which may change values; remove them"
            )
        for attribute, value in vars(module).items():
            if callable(value) and callable(getattr(type(module), attribute, None)):
                raise UnsupportedModel(
                    f"{where} has its method {attribute!r} replaced on the instance; "
                    "write a subclass instead"
                )


def _check_against_module(
    model: nn.Module, graph: fx.Graph, example: Tensor
) -> dict[fx.Node, tuple[int, ...]]:
    """Run the graph beside the module; return the shape of each tensor in it."""
    with torch.no_grad():
        try:
            expected = model(example.clone())
            alone = model(example[:1].clone())
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"input shape {tuple(example.shape[1:])} does not fit: {reason}"
            ) from error
        checker = _Checker(model, graph=graph)
        result = checker.run(example.clone())
    if not isinstance(result, Tensor) or not isinstance(expected, Tensor):
        raise UnsupportedModel("the model must return one tensor")
    if not _agree(result, expected):
        raise UnsupportedModel("the traced graph does not compute what the model computes")
    if not _agree(alone, expected[:1]):
        raise UnsupportedModel("a sample's result depends on the other samples of its batch")
    return checker.shapes


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results of the same operations differ by rounding at most."""
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=1e-3, atol=1e-5, equal_nan=True
    )


class _Checker(fx.Interpreter):
    """Run a graph on tensors, note shapes, and refuse the use of a tensor that was overwritten."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._versions: dict[fx.Node, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        for used in n.all_input_nodes:
            if _versions(self.env[used]) != self._versions[used]:
                raise UnsupportedModel(
                    f"node {n.name!r} uses {used.name!r} after it was modified in place; "
                    "write the operation out of place"
                )
        result = super().run_node(n)
        self._versions[n] = _versions(result)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class _Walker(fx.Interpreter):
    """Run a graph on `Signal`s; what does not depend on the input runs as it is."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        shapes: dict[fx.Node, tuple[int, ...]],
        norms: Norms,
        device: torch.device,
    ) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self._known_shapes = shapes
        self._norms = norms
        self._one = torch.ones((), dtype=torch.float64, device=device)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return Signal(self._known_shapes[n], self._one, self._norms)
        if n.op in ("get_attr", "output"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not any(isinstance(leaf, Signal) for leaf in pytree.tree_leaves((args, kwargs))):
            return super().run_node(n)
        try:
            result = self._rule(n)(*args, **kwargs)
        except UnsupportedModel as refusal:
            raise UnsupportedModel(f"node {n.name!r}: {refusal}") from None
        except TypeError as error:  # arguments that the rule does not provide for
            raise UnsupportedModel(f"node {n.name!r}: {error}") from error
        if not isinstance(result, Signal):
            return result
        shape = self._known_shapes[n]
        if not shape or shape[0] != _BATCH:
            raise UnsupportedModel(f"node {n.name!r}: the result loses the batch axis")
        return result if result.shape == shape else replace(result, shape=shape)

    def _rule(self, n: fx.Node) -> Callable[..., Any]:
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target)) if n.target else self.module
            key: object = type(module)
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            if key in RULES:
                rule = RULES[key]
                return lambda *args, **kwargs: rule(module, *args, **kwargs)
        else:
            key = n.target
            name = f"tensor method {n.target!r}" if n.op == "call_method" else _name_of(n.target)
            if key in RULES:
                return RULES[key]
        raise UnsupportedModel(
            f"no Lipschitz rule for {name}; register one with @certify.lipschitz_rule"
        )


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__name__', function)}"
