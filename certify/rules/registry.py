"""The registry: which rule stands for which operation, and why some have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = Callable[..., Any]
_Rule = TypeVar("_Rule", bound=Rule)

RULES: dict[object, Rule] = {}
"""Rule of each operation: a module type, a function, or the name of a tensor's method."""

REFUSALS: dict[object, str] = {}
"""Operations that cannot have a rule, and the reason."""


def lipschitz_rule(*operations: object) -> Callable[[_Rule], _Rule]:
    """Register a rule for module types, functions or names of tensor methods.

    Raises:
        ValueError: an operation that already has a rule.

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
            if operation in RULES:
                raise ValueError(f"{operation!r} already has a Lipschitz rule")
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


def by_attributes(rule: Rule, *modules: type, attributes: str = "") -> None:
    """Register a function's rule for modules that call it with attributes of theirs.

    Args:
        rule: takes the signal and the named arguments.
        modules: module types.
        attributes: names, separated by spaces, of both the attributes and the arguments.
    """
    names = attributes.split()

    def of_module(module: Any, x: Any) -> Any:
        return rule(x, **{name: getattr(module, name) for name in names})

    of_module.__doc__ = rule.__doc__
    lipschitz_rule(*modules)(of_module)


def refuse(reason: str, *operations: object) -> None:
    """Say why operations have no rule."""
    REFUSALS.update(dict.fromkeys(operations, reason))
