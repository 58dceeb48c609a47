"""The registry: which rule stands for which operation, and why some have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from certify.rules.rounding import Rounding

Rule = Callable[..., Any]
_Rule = TypeVar("_Rule", bound=Rule)

RULES: dict[object, Rule] = {}
"""Rule of each operation: a module type, a function, or the name of a tensor's method."""

ROUNDINGS: dict[object, Rounding] = {}
"""How much each of these operations can round, as far as that is known."""

REFUSALS: dict[object, str] = {}
"""Operations that cannot have a rule, and the reason."""


def lipschitz_rule(
    *operations: object, rounding: Rounding | None = None
) -> Callable[[_Rule], _Rule]:
    """Register a rule for module types, functions or names of tensor methods.

    Args:
        operations: what it is about.
        rounding: how much that can round, one of `certify.rules.rounding`: ``exact`` where entries
            are only moved, ``elementwise`` for a few sums and products with constants,
            ``of_library`` for a smooth function of each entry, ... Without it there are no radii
            for rounded arithmetic.

    Raises:
        ValueError: an operation that already has a rule, but for the same one, run again in a
            notebook.

    Example:
        >>> import torch
        >>> class Halve(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x / 2
        >>> @lipschitz_rule(Halve)
        ... def halve(module, x):
        ...     return x.scaled(0.5)
    """

    def register(rule: _Rule) -> _Rule:
        for operation in operations:
            if operation in RULES and _name(RULES[operation]) != _name(rule):
                raise ValueError(f"{operation!r} already has a Lipschitz rule")
        RULES.update(dict.fromkeys(operations, rule))
        if rounding is not None:
            ROUNDINGS.update(dict.fromkeys(operations, rounding))
        return rule

    return register


def _name(rule: Rule) -> tuple[str, str]:
    return rule.__module__, rule.__qualname__


def by_attributes(
    rule: Rule, *modules: type, attributes: str = "", rounding: Rounding | None = None
) -> None:
    """Register a function's rule for modules that call it with attributes of theirs.

    Args:
        rule: takes the signal and the named arguments.
        modules: module types.
        attributes: names, separated by spaces, of both the attributes and the arguments.
        rounding: as in `lipschitz_rule`.
    """
    names = attributes.split()

    def of_module(module: Any, x: Any) -> Any:
        return rule(x, **{name: getattr(module, name) for name in names})

    of_module.__doc__ = rule.__doc__
    lipschitz_rule(*modules, rounding=rounding)(of_module)


def refuse(reason: str, *operations: object) -> None:
    """Say why operations have no rule."""
    REFUSALS.update(dict.fromkeys(operations, reason))
