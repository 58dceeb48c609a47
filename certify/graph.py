"""From a module to its graph, checked against the module itself, and the walk over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from certify.rules import REFUSALS, RULES
from certify.rules.installed import register_installed
from certify.signal import Input, Signal, UnsupportedModel

_SCALES = (0.0, 1e-2, 1e2, 1.0, -1.0)  # of the example's entries: branches on values show up
_BATCH = len(_SCALES)  # samples in the example that checks the traced graph
_PARTS = [1, 1, 1, 2]  # in which they are given to the module again

_ROOT = "the model itself"


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
        domain: tuple[float, float] | None = None,
    ) -> None:
        refuse_what_tracing_misses(model)
        register_installed()
        tensors = chain(model.parameters(), model.buffers())
        floating = next(
            (t for t in tensors if t.is_floating_point()), torch.zeros((), dtype=torch.float64)
        )
        self.device = floating.device
        example = _example(input_shape).to(floating)
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            root = _Root(model)
            graph = _trace(root)
            shapes = _check_against_module(root, graph, example)
            centres = None if domain is None else _centres(root, graph, example[:1], domain)
            start = Input(self.device, domain)
            self._walker = _Walker(root, graph, shapes, centres, start)
        finally:
            for module, mode in training.items():
                module.training = mode

    def walk(self) -> Signal:
        """Return the output as the steps that it arises by.

        Raises:
            UnsupportedModel: an operation without a rule, or one that its rule refuses.
        """
        result = self._walker.run(None)
        if not isinstance(result, Signal):
            raise UnsupportedModel("the output does not depend on the input, or is not one tensor")
        return result


class _Tracer(fx.Tracer):
    """Trace down to modules that have a rule, and to torch's own."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = _kind(m)
        known = kind in RULES or kind in REFUSALS
        torchs = kind.__module__.startswith("torch.nn") and kind is not nn.Sequential
        return known or torchs


def _kind(module: nn.Module) -> type[nn.Module]:
    """Type that decides about a module: that of before its weights were parametrised.

    ``torch.nn.utils.parametrize`` gives a module a subclass of its own in which a weight is a
    property; ``forward`` stays the same, and rules see the weight that it computes with.
    """
    kind = type(module)
    if parametrize.is_parametrized(module) and len(kind.__bases__) == 1:
        original: type[nn.Module] = kind.__bases__[0]
        if kind.forward is original.forward:
            return original
    return kind


class _Root(nn.Module):
    """Calls the model on one argument, so that the model is traced like any module in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def _trace(root: _Root) -> fx.Graph:
    try:
        return _Tracer().trace(root)
    except Exception as error:  # whatever the user's forward raises on a symbolic input
        raise UnsupportedModel(
            f"the forward of {type(root.model).__name__} cannot be traced ({_reason(error)}); "
            "control flow must not depend on the values of tensors"
        ) from error


def _example(input_shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    try:
        samples = torch.randn(_BATCH, *input_shape, generator=generator, dtype=torch.float64)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected input_shape as sizes, got {input_shape}") from error
    scales = torch.tensor(_SCALES, dtype=torch.float64)
    return samples * scales.reshape(-1, *[1] * len(input_shape))


def refuse_what_tracing_misses(model: nn.Module) -> None:
    """Refuse hooks and methods replaced on an instance: a graph does not show what they do.

    Raises:
        UnsupportedModel: naming the module.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise UnsupportedModel("global forward hooks are registered; remove them")
    for name, module in model.named_modules():
        where = f"module {name or _ROOT!r} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(f"{where} is TorchScript; certify what it was made from")
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
    root: _Root, graph: fx.Graph, example: Tensor
) -> dict[fx.Node, list[tuple[int, ...]]]:
    """Run the graph beside the module; return the shapes of the tensors at each node."""
    for name, module in root.model.named_modules():
        if module.training:
            raise UnsupportedModel(f"module {name or _ROOT!r} is in training mode despite eval()")
    checker = _Checker(root, graph=graph)
    own = [*root.parameters(), *root.buffers()]
    if any(isinstance(tensor, fx.Proxy) for tensor in own):  # left there by the trace
        raise UnsupportedModel("the forward assigns its buffers")
    own += checker.constants()
    before = [(tensor._version, tensor.clone()) for tensor in own]
    with torch.no_grad():
        expected = _call(root, example.clone())
        _compare(checker.check(example.clone()), expected)
        parts = [_call(root, part.clone()) for part in example.split(_PARTS)]
    if expected.shape[:1] != (_BATCH,) or not all(map(_agree, parts, expected.split(_PARTS))):
        raise UnsupportedModel("a sample's result depends on the other samples of its batch")
    for tensor, (version, value) in zip(own, before, strict=True):
        if tensor._version != version or not torch.equal(tensor, value):
            raise UnsupportedModel("the forward modifies tensors that the model keeps")
    return checker.shapes


_Centres = dict[fx.Node, list[tuple[float, float]]]


def _centres(
    root: _Root, graph: fx.Graph, like: Tensor, domain: tuple[float, float]
) -> _Centres:
    """Norms and largest entries of all tensors at the centre of the domain."""
    centres: _Centres = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            centres[n] = [_size(leaf) for leaf in pytree.tree_leaves(result)]
            return result

    with torch.no_grad():
        Noting(root, graph=graph).run(torch.full_like(like, (domain[0] + domain[1]) / 2.0))
    return centres


def _size(value: Any) -> tuple[float, float]:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return 0.0, 0.0
    return torch.linalg.vector_norm(value).item(), value.abs().amax().item()


def _call(root: _Root, x: Tensor) -> Tensor:
    try:
        result = root(x)
    except Exception as error:
        raise ValueError(
            f"input shape {tuple(x.shape[1:])} does not fit: {_reason(error)}"
        ) from error
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise UnsupportedModel("the model must return one tensor of real numbers")
    return result


def _compare(result: Any, expected: Tensor) -> None:
    if not isinstance(result, Tensor) or not _agree(result, expected):
        raise UnsupportedModel("the traced graph does not compute what the model computes")


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results of the same operations differ by rounding at most."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    size = torch.linalg.vector_norm(second[second.isfinite()]).item()
    tolerance = torch.finfo(second.dtype).eps ** 0.5 * size
    return torch.allclose(first, second, rtol=0.0, atol=tolerance, equal_nan=True)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _label(n: fx.Node) -> str:
    """Name of a node for the user: the path of a module, else the name that fx gave it."""
    if n.op != "call_module":
        return repr(n.name)
    return repr(str(n.target).removeprefix("model").removeprefix(".") or _ROOT)


class _Checker(fx.Interpreter):
    """Run a graph on tensors, note shapes, and refuse the use of a tensor that was overwritten."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, list[tuple[int, ...]]] = {}
        self._versions: dict[fx.Node, list[int]] = {}

    def constants(self) -> list[Tensor]:
        """Tensors that the graph reads from the model."""
        read = [self.fetch_attr(str(n.target)) for n in self.graph.nodes if n.op == "get_attr"]
        return [value for value in read if isinstance(value, Tensor)]

    def check(self, x: Tensor) -> Any:
        """Run the graph; refuse it if it fails where the module did not."""
        try:
            return self.run(x)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(f"the traced graph does not run: {_reason(error)}") from error

    def run_node(self, n: fx.Node) -> Any:
        for used in n.all_input_nodes:
            if _versions(self.env[used]) != self._versions[used]:
                raise UnsupportedModel(
                    f"node {_label(n)} uses {_label(used)} after it was modified in place; "
                    "write the operation out of place"
                )
        result = super().run_node(n)
        self._versions[n] = _versions(result)
        self.shapes[n] = [tuple(getattr(leaf, "shape", ())) for leaf in pytree.tree_leaves(result)]
        return result


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class _Walker(fx.Interpreter):
    """Run a graph on `Signal`s; what does not depend on the input runs as it is."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        shapes: dict[fx.Node, list[tuple[int, ...]]],
        centres: _Centres | None,
        start: Input,
    ) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self._known_shapes = shapes
        self._centres = centres
        self._start = start

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return Signal((), self._start).placed(
                self._known_shapes[n][0], n.name, self._centre(n, 0)
            )
        if n.op in ("get_attr", "output"):
            return super().run_node(n)
        if not any(_holds_signal(self.env[used]) for used in n.all_input_nodes):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            result = self._rule(n)(*args, **kwargs)
        except UnsupportedModel as refusal:
            raise UnsupportedModel(f"node {_label(n)}: {refusal}") from None
        except TypeError as error:  # arguments that the rule does not provide for
            raise UnsupportedModel(f"node {_label(n)}: {error}") from error
        leaves, structure = pytree.tree_flatten(result)
        if not any(isinstance(leaf, Signal) for leaf in leaves):
            return result
        shapes = self._known_shapes[n]
        if len(shapes) != len(leaves):
            raise UnsupportedModel(f"node {_label(n)}: its rule returns {len(leaves)} results")
        placed = [
            self._placed(n, leaf, shape, self._centre(n, index))
            for index, (leaf, shape) in enumerate(zip(leaves, shapes, strict=True))
        ]
        return pytree.tree_unflatten(placed, structure)

    def _centre(self, n: fx.Node, index: int) -> tuple[float, float] | None:
        return None if self._centres is None else self._centres[n][index]

    def _placed(
        self, n: fx.Node, result: Any, shape: tuple[int, ...], centre: tuple[float, float] | None
    ) -> Any:
        if not isinstance(result, Signal):
            return result
        if not shape or shape[0] != _BATCH:
            raise UnsupportedModel(f"node {_label(n)}: the result loses the batch axis")
        if result.name and result.shape == shape and result.centre == centre:
            return result  # the rule gave back what it got
        return result.placed(shape, _label(n).strip("'"), centre)

    def _rule(self, n: fx.Node) -> Callable[..., Any]:
        if n.op == "call_module":
            module = self.submodules[str(n.target)]
            kind = _kind(module)
            key: object = kind
            name = f"{kind.__module__}.{kind.__qualname__}"
            if key in RULES:
                rule = RULES[key]
                return lambda *args, **kwargs: rule(module, *args, **kwargs)
        else:
            key = n.target
            name = f"tensor method {n.target!r}" if n.op == "call_method" else _name_of(n.target)
            if key in RULES:
                return RULES[key]
        if key in REFUSALS:
            raise UnsupportedModel(f"{name}: {REFUSALS[key]}")
        raise UnsupportedModel(
            f"no Lipschitz rule for {name}; register one with @certify.lipschitz_rule"
        )


def _holds_signal(value: Any) -> bool:
    if isinstance(value, (Signal, Tensor)):
        return isinstance(value, Signal)
    return any(isinstance(leaf, Signal) for leaf in pytree.tree_leaves(value))


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__name__', function)}"
