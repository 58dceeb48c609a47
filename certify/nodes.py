"""What the nodes of a traced graph do, and what flows through them."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from certify.rules.registry import ROUNDINGS, RULES
from certify.rules.rounding import BY_OPERATOR, Call
from certify.signal import Affine, Signal, UnknownRounding, Wrapping
from certify.tracing import kind_of, label_of
from models import Normalize


class Operation:
    """A node whose results depend on the network's input.

    Attributes:
        module: that does it, or ``None``.
        results: places among the leaves of its result, with their signals.
        sources: signals that it gets.
        rounded: whether constants enter it that are computed, with rounding, each time.
    """

    def __init__(
        self,
        root: nn.Module,
        n: fx.Node,
        results: list[tuple[int, Signal]],
        sources: list[Signal],
        rounded: bool,
    ) -> None:
        self.module = module_of(root, n) if is_module(n) else None
        self.results = results
        self.sources = sources
        self._rounded = rounded
        self._starts = n.op == "placeholder"
        self._key, self._name = operation_of(root, n)
        self._label = label_of(n)

    def __str__(self) -> str:
        return f"node {self._label} ({self._name})"

    @property
    def is_torchs(self) -> bool:
        """Whether torch itself does it, and computes its gradient, as a rule of ours assumes."""
        rule = RULES.get(self._key)
        ours = str(getattr(rule, "__module__", "")).startswith("certify.rules.")
        module = str(getattr(self._key, "__module__", "") or "")
        torchs = module.split(".")[0] in ("torch", "_operator", "builtins")
        torchs = torchs or isinstance(self._key, str) or self._key is Normalize
        return self._starts or (ours and torchs)

    def rounding(self, call: Call) -> Tensor:
        """How much it can round; raises `UnknownRounding` where that is not known."""
        try:
            return ROUNDINGS[self._key](call)
        except UnknownRounding as reason:
            raise UnknownRounding(f"node {self._label}: {reason}") from None

    def check(self) -> None:
        """Raise `UnknownRounding` where that is not known."""
        if self._starts:
            return
        if not self.sources:
            raise UnknownRounding(f"node {self._label}: it is not known what enters it")
        if self._rounded:
            raise UnknownRounding(f"node {self._label}: constants are computed in the forward")
        if self._key not in ROUNDINGS:
            raise UnknownRounding(
                f"node {self._label}: it is not known how much {self._name} can round (a rule of "
                "yours says so by rounding=...)"
            )
        for _, signal in self.results:
            if ROUNDINGS[self._key] in BY_OPERATOR and isinstance(signal.step, Affine):
                wraps = [s.parents[0] for s in self.sources if isinstance(s.step, Wrapping)]
                if signal.parents[0] not in (*self.sources, *wraps):
                    raise UnknownRounding(f"node {self._label}: it rounds more than once")


class Recorder(fx.Interpreter):
    """Runs a graph and keeps all tensors."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self._found: dict[str, Tensor] = {}

    def record(self, x: Tensor) -> dict[str, Tensor]:
        """Return the tensor at each node."""
        self._found = {}
        self.run(x)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        """Keep what a node gives."""
        result = super().run_node(n)
        for index, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._found[node_name(n, index)] = leaf.clone()  # a later node may overwrite it
        return result


class Arguments(fx.Interpreter):
    """Runs a graph and keeps copies of the tensors that enter some of its nodes."""

    def __init__(self, model: nn.Module, graph: fx.Graph, sources: dict[str, fx.Node]) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self._sources = sources
        self._found: dict[str, Tensor] = {}

    def note(self, x: Tensor) -> dict[str, Tensor]:
        """Return the tensors by the nodes that they enter."""
        self.run(x)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        """Keep what enters a node."""
        if n.name in self._sources:  # before the node may overwrite it
            self._found[n.name] = self.env[self._sources[n.name]].clone()
        return super().run_node(n)


def node_name(n: fx.Node, index: int = 0) -> str:
    """Name of the tensor at a node, or of one of several."""
    return f"{n.name}.{index}" if index else n.name


def takes(n: fx.Node, place: int) -> bool:
    """Whether a node may use the result at that place of an operation with several."""
    chosen = n.args[1] if n.target is operator.getitem else None
    return type(chosen) is not int or chosen < 0 or chosen == place


def asks_for_size(n: fx.Node) -> bool:
    """Whether a node is about a tensor's shape, type or place, not about its values."""
    if n.op == "call_method":
        return n.target in ("size", "dim", "ndimension", "numel", "nelement", "stride")
    return n.target is len or (n.target is getattr and n.args[1] in ("shape", "ndim", "device"))


def is_module(n: fx.Node) -> bool:
    """Whether a node calls a module."""
    return n.op == "call_module"


def module_of(root: nn.Module, n: fx.Node) -> nn.Module:
    """The module that a node calls."""
    return root.get_submodule(str(n.target))


def operation_of(root: nn.Module, n: fx.Node) -> tuple[object, str]:
    """What a node does, as a key of rules, and its name for people."""
    if is_module(n):
        kind = kind_of(module_of(root, n))
        return kind, f"{kind.__module__}.{kind.__qualname__}"
    if n.op == "call_method":
        return n.target, f"tensor method {n.target!r}"
    module = getattr(n.target, "__module__", "?")
    return n.target, f"{module}.{getattr(n.target, '__name__', n.target)}"
