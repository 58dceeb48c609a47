"""From a module to its graph, checked against the module itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from certify.rules import REFUSALS, RULES
from certify.signal import UnsupportedModel
from certify.sizes import SizeTracer

_SCALES = (0.0, 1e-2, 1e2, 1.0, -1.0)  # of the example's entries: branches on values show up
BATCH = len(_SCALES)  # samples in the example that checks the traced graph
_PARTS = [1, 1, 1, 2]  # in which they are given to the module again

_ROOT = "the model itself"

_AUTOCAST = ("cpu", "cuda")

_MOVES = {
    "lift_fresh", "lift_fresh_copy", "detach", "alias", "clone", "view", "_unsafe_view",
    "reshape", "expand", "permute", "transpose", "t", "select", "slice", "unsqueeze", "squeeze",
    "cat", "stack", "empty", "zeros", "ones", "full", "eye", "scalar_tensor", "empty_like",
    "zeros_like", "ones_like", "full_like", "fill_", "zero_", "copy_",
}  # fmt: skip
"""Operations of torch's core that make or move numbers and do not compute with them."""


class _Tracer(SizeTracer):
    """Trace down to modules that have a rule, and to torch's own."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = kind_of(m)
        known = kind in RULES or kind in REFUSALS
        torchs = kind.__module__.startswith("torch.nn") and kind is not nn.Sequential
        return known or torchs

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if any(torch.is_autocast_enabled(device) for device in _AUTOCAST):
            raise UnsupportedModel(
                "the forward switches autocast on, which a graph does not show; take it out and "
                "pass a precision"
            )
        return super().create_node(kind, *args, **kwargs)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in _AUTOCAST:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Constants(TorchDispatchMode):
    """Notes whether floating-point tensors are computed with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed = False
        self._aside = 0

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Not to be noted."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._aside and func.overloadpacket.__name__ not in _MOVES:
            leaves = pytree.tree_leaves((args, kwargs, result))
            self.computed |= any(
                isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves
            )
        return result


def kind_of(module: nn.Module) -> type[nn.Module]:
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


class Root(nn.Module):
    """Calls the model on one argument, so that the model is traced like any module in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Call the model."""
        return self.model(x)


def trace(root: Root, example: Tensor) -> tuple[fx.Graph, bool]:
    """Trace a model with sizes as those of an example; refuse what cannot be traced.

    Returns:
        The graph, and whether constants in it were computed, with rounding, while it was traced.
    """
    tracer, constants = _Tracer(example), _Constants()
    tracer.aside = constants.left_alone
    try:
        with _without_autocast(), constants:
            return tracer.trace(root), constants.computed
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever the user's forward raises on a symbolic input
        raise UnsupportedModel(
            f"the forward of {type(root.model).__name__} cannot be traced ({_reason(error)}); "
            "control flow must not depend on the values of tensors"
        ) from error


def example_of(input_shape: Sequence[int]) -> Tensor:
    """Return a batch of random samples of several sizes."""
    generator = torch.Generator().manual_seed(0)
    try:
        samples = torch.randn(BATCH, *input_shape, generator=generator, dtype=torch.float64)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected input_shape as sizes, got {input_shape}") from error
    scales = torch.tensor(_SCALES, dtype=torch.float64)
    return samples * scales.reshape(-1, *[1] * len(input_shape))


def refuse_what_tracing_misses(model: nn.Module) -> None:
    """Refuse hooks and methods replaced on an instance: a graph does not show what they do.

    Hooks of the backward pass as well, as some certificates rest on gradients.

    Raises:
        UnsupportedModel: naming the module.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise UnsupportedModel("global forward hooks are registered; remove them")
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        raise UnsupportedModel("global backward hooks are registered; remove them")
    for name, module in model.named_modules():
        where = f"module {name or _ROOT!r} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(f"{where} is TorchScript; certify what it was made from")
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UnsupportedModel(f"{where} spreads a network over devices; certify its .module")
        if hasattr(module, "_orig_mod"):
            raise UnsupportedModel(f"{where} is compiled; certify the module that was compiled")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModel(
                f"{where} has forward hooks, which may change values; remove them"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedModel(
                f"{where} has backward hooks, which may change gradients; remove them"
            )
        for attribute, value in vars(module).items():
            if callable(value) and callable(getattr(type(module), attribute, None)):
                raise UnsupportedModel(
                    f"{where} has its method {attribute!r} replaced on the instance; "
                    "write a subclass instead"
                )


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute products of float32 in float32: TF32 differs by more than that's rounding."""
    convolutions = torch.backends.cudnn.allow_tf32
    matrices = torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(matrices)


def check_against_module(
    root: Root, graph: fx.Graph, example: Tensor
) -> dict[fx.Node, list[tuple[int, ...]]]:
    """Run the graph beside the module; return the shapes of the tensors at each node."""
    for name, module in root.model.named_modules():
        if module.training:
            raise UnsupportedModel(f"module {name or _ROOT!r} is in training mode despite eval()")
    checker = _Checker(root, graph=graph)
    left = [value for module in root.modules() for value in module._buffers.values()]
    if any(isinstance(value, fx.Proxy) for value in left):  # by the trace
        raise UnsupportedModel("the forward assigns its buffers")
    own = [*root.parameters(), *root.buffers()]
    own += checker.constants()
    before = [(tensor._version, tensor.clone()) for tensor in own]
    with torch.no_grad(), without_tf32():
        parts = [_call(root, part.clone()) for part in example.split(_PARTS)]
        found = checker.check(example.clone())
        if not isinstance(found, Tensor) or not agree(found, _joined(parts)):
            # Either of two reasons: the whole batch tells which.
            if isinstance(found, Tensor) and agree(found, _call(root, example.clone())):
                raise UnsupportedModel(
                    "a sample's result depends on the other samples of its batch"
                )
            raise UnsupportedModel("the traced graph does not compute what the model computes")
    for tensor, (version, value) in zip(own, before, strict=True):
        if tensor._version != version or not torch.equal(tensor, value):
            raise UnsupportedModel("the forward modifies tensors that the model keeps")
    return checker.shapes


def _call(root: Root, x: Tensor) -> Tensor:
    try:
        result = root(x)
    except Exception as error:
        raise ValueError(
            f"input shape {tuple(x.shape[1:])} does not fit: {_reason(error)}"
        ) from error
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise UnsupportedModel("the model must return one tensor of real numbers")
    return result


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Results of the parts of a batch, as that of the batch; empty if they cannot be."""
    sizes = [tuple(part.shape) for part in parts]
    fitting = all(
        len(size) > 0 and size[0] == count and size[1:] == sizes[0][1:]
        for size, count in zip(sizes, _PARTS, strict=True)
    )
    return torch.cat(list(parts)) if fitting else parts[0].new_empty(0)


def agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results ``(N, ...)`` of the same operations differ by rounding at most.

    The tolerance is relative to the largest entry, small where there are digits for it, so that an
    offset hides little. Entries that are nearly the same for all samples, as what a mask makes of
    classes, hide nothing in the rest: they do not count as large unless all are like that.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.numel() == 0:
        return True
    unit = torch.finfo(second.dtype).eps
    pair = torch.stack((first, second)).reshape(2, len(first) if first.ndim else 1, -1)
    pair = pair.to(torch.float64)
    known = torch.where(pair.isfinite(), pair, 0.0).flatten(0, 1)
    sizes = known.abs().amax(dim=0)
    spread = known.amax(dim=0) - known.amin(dim=0)
    varied = spread > min(2.0**-6, 2.0**10 * unit) * sizes
    largest = sizes[varied].amax() if bool(varied.any()) else sizes.amax()
    allowed = torch.where(varied, largest, torch.maximum(sizes, largest))
    close = (pair[0] - pair[1]).abs() <= min(unit**0.5, 2.0**12 * unit) * allowed
    same = (pair[0] == pair[1]) | (pair[0].isnan() & pair[1].isnan())
    return bool((close | same).all())


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def label_of(n: fx.Node) -> str:
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
                    f"node {label_of(n)} uses {label_of(used)} after it was modified in place; "
                    "write the operation out of place"
                )
        result = super().run_node(n)
        leaves = pytree.tree_leaves(result)
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves):
            raise UnsupportedModel(f"node {label_of(n)} computes with complex numbers")
        self._versions[n] = _versions(result)
        self.shapes[n] = [tuple(getattr(leaf, "shape", ())) for leaf in pytree.tree_leaves(result)]
        return result


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
