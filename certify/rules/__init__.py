"""The trusted base: what each operation does to a Lipschitz bound.

A rule takes the operation's own arguments, with a `certify.Signal` wherever the network has a
tensor that depends on its input, and returns the signal of the result. (The walker fills in the
shape.) A module's rule gets the module first. Everything here is about one sample: the L2 Lipschitz
constant of the map from one input to one output. A rule therefore has to refuse whatever lets
samples of a batch touch each other.

Operations are looked up by identity, a module by its exact type: a subclass may override
``forward``, so it needs a rule of its own.
"""

from certify.rules import (
    activations,
    affine,
    arithmetic,
    arrangement,
    contractions,
    pooling,
    reductions,
    refused,
    resampling,
    selection,
    smooth,
)
from certify.rules.registry import REFUSALS, RULES, lipschitz_rule

__all__ = [
    "REFUSALS",
    "RULES",
    "activations",
    "affine",
    "arithmetic",
    "arrangement",
    "contractions",
    "lipschitz_rule",
    "pooling",
    "reductions",
    "refused",
    "resampling",
    "selection",
    "smooth",
]
