"""Functions of each entry whose slope changes gradually.

A difference quotient is a mean of slopes, so their infimum and supremum are its ends; likewise
those of the second derivative are the ends of the slope's quotients (``curvature``). Decimal
constants are rounded outward; the tests prove those without a closed form.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from certify.rules.activations import SINGLE_SIXTH, number
from certify.rules.registry import by_attributes, lipschitz_rule
from certify.rules.rounding import of_library, sixths
from certify.signal import Signal, UnsupportedModel


@lipschitz_rule(torch.tanh, torch.tanh_, "tanh", "tanh_", rounding=of_library)
def tanh(input: Signal) -> Signal:
    """The slope is ``1 - t^2`` where ``t`` is the value, its slope ``-2 t (1 - t^2)``.

    That is extreme where ``t^2 = 1/3``: ``4 / (3 sqrt(3))``.
    """
    return input.elementwise(0.0, 1.0, largest=1.0, curvature=_both(0.7698003589195011))


by_attributes(tanh, nn.Tanh, rounding=of_library)


@lipschitz_rule(F.tanhshrink, rounding=of_library)
def tanhshrink(input: Signal) -> Signal:
    """``x - tanh(x)``, with slope ``tanh(x)^2``."""
    return input.elementwise(0.0, 1.0, curvature=_both(0.7698003589195011))


by_attributes(tanhshrink, nn.Tanhshrink, rounding=of_library)


@lipschitz_rule(
    torch.sigmoid, torch.sigmoid_, torch.special.expit, "sigmoid", "sigmoid_", rounding=of_library
)
def sigmoid(input: Signal) -> Signal:
    """The slope ``s (1 - s)`` is at most 1/4.

    Its own, ``s (1 - s) (1 - 2 s)``, is an eighth of that of ``tanh(x / 2)``: ``1 / (6 sqrt(3))``.
    """
    return input.elementwise(0.0, 0.25, largest=1.0, curvature=_both(0.09622504486493764))


by_attributes(sigmoid, nn.Sigmoid, rounding=of_library)


@lipschitz_rule(F.logsigmoid, rounding=of_library)
def logsigmoid(input: Signal) -> Signal:
    """``-log(1 + exp(-x))``: the slope ``1 / (1 + exp(x))`` lies between 0 and 1 and falls."""
    return input.elementwise(0.0, 1.0, curvature=(-0.25, 0.0))


by_attributes(logsigmoid, nn.LogSigmoid, rounding=of_library)


@lipschitz_rule(F.softplus, rounding=of_library)
def softplus(input: Signal, beta: float = 1.0, threshold: float = 20.0) -> Signal:
    """The slope is the sigmoid of ``beta x``, at most 1, and its own slope at most ``beta / 4``.

    Above ``threshold`` torch returns ``x`` itself: a jump by ``log(1 + exp(-threshold)) / beta``,
    which is below float64's rounding of a number of that size only from 34 on. Below the threshold
    it takes ``exp(beta x)``, which from 88 on is infinite in float32.
    """
    if not (0 < number(beta) < math.inf and 34 <= number(threshold) <= 88):
        raise UnsupportedModel(
            f"Softplus(beta={beta}, threshold={threshold}) jumps or overflows at its "
            "threshold; use beta > 0 and threshold=40, the same function without that"
        )
    return input.elementwise(0.0, 1.0, curvature=(0.0, number(beta) / 4.0))


by_attributes(softplus, nn.Softplus, attributes="beta threshold", rounding=of_library)


@lipschitz_rule(F.softsign, rounding=of_library)
def softsign(input: Signal) -> Signal:
    """``x / (1 + |x|)``: the slope ``1 / (1 + |x|)^2`` is at most 1, its own at most 2."""
    return input.elementwise(0.0, 1.0, curvature=_both(2.0))


by_attributes(softsign, nn.Softsign, rounding=of_library)


@lipschitz_rule(F.elu, rounding=of_library)
def elu(input: Signal, alpha: float = 1.0, inplace: bool = False) -> Signal:
    """Slopes 1 above zero, ``alpha exp(x)`` below: all between 0 and ``alpha``.

    Only with ``alpha = 1`` does the slope not jump.
    """
    curvature = (0.0, 1.0) if alpha == 1 else None
    return input.elementwise(min(0.0, number(alpha)), max(1.0, number(alpha)), curvature=curvature)


by_attributes(elu, nn.ELU, attributes="alpha", rounding=of_library)


@lipschitz_rule(F.elu_, rounding=of_library)
def elu_(input: Signal, alpha: float = 1.0) -> Signal:
    """As `elu`; what torch takes as the third argument here is a scale."""
    return elu(input, alpha)


@lipschitz_rule(F.selu, torch.selu, torch.selu_, rounding=of_library)
def selu(input: Signal, inplace: bool = False) -> Signal:
    """``s ELU(alpha)``: as ``alpha = 1.67...`` is above 1, the slope is at most ``s alpha``."""
    return input.elementwise(0.0, 1.758099340847377)


by_attributes(selu, nn.SELU, rounding=of_library)


@lipschitz_rule(F.celu, torch.celu, torch.celu_, rounding=of_library)
def celu(input: Signal, alpha: float = 1.0, inplace: bool = False) -> Signal:
    """``alpha (exp(x / alpha) - 1)`` below zero: slopes between 0 and 1 for positive alpha.

    With a negative one the slope is not bounded. The limits keep torch's ``1 / alpha`` from
    overflow. The slope ``exp(x / alpha)`` has a slope of at most ``1 / alpha``; torch's gradient
    takes both numbers in float32, so that they have to be such.
    """
    if not 1e-300 < number(alpha) < 1e300:
        raise UnsupportedModel(f"CELU with alpha={alpha}; expected a positive number")
    inverse = 1.0 / alpha
    exact = all(torch.tensor(n, dtype=torch.float32).item() == n for n in (alpha, inverse))
    return input.elementwise(0.0, 1.0, curvature=(0.0, _up(inverse)) if exact else None)


by_attributes(celu, nn.CELU, attributes="alpha", rounding=of_library)


@lipschitz_rule(F.gelu, rounding=of_library)
def gelu(input: Signal, approximate: str = "none") -> Signal:
    r"""Slopes slightly below 0 and above 1.

    ``x Phi(x)`` has the slope ``g = Phi(x) + x phi(x)`` with ``g(-x) = 1 - g(x)``. Its derivative
    ``phi(x) (2 - x^2)`` vanishes at ``sqrt(2)``, where ``g = (1 + erf 1) / 2 + 1 / (e sqrt(pi))``,
    and lies between ``-2 phi(2)`` and ``2 phi(0)``.

    With ``approximate="tanh"`` it is ``x (1 + t) / 2`` with ``t = tanh(u)`` and
    ``u = sqrt(2 / pi) (x + 0.044715 x^3)``. The slope ``(1 + t) / 2 + x (1 - t^2) u' / 2`` has the
    same symmetry and is largest at 1.4185; its own is extreme at 0 and 2.0135.
    """
    if approximate == "none":
        return input.elementwise(
            -0.1289041451851548,
            1.128904145185155,
            curvature=(-0.10798193302637611, 0.7978845608028655),
        )
    if approximate == "tanh":
        return input.elementwise(
            -0.12899306865877178,
            1.128993068658772,
            curvature=(-0.10791351589036793, 0.7978845608028655),
        )
    raise UnsupportedModel(f"GELU with approximate={approximate!r}")


by_attributes(gelu, nn.GELU, attributes="approximate", rounding=of_library)


@lipschitz_rule(F.silu, rounding=of_library)
def silu(input: Signal, inplace: bool = False) -> Signal:
    """``x s(x)`` has the slope ``g = s + x s (1 - s)`` with ``g(-x) = 1 - g(x)``.

    Its derivative ``s (1 - s) (2 - x tanh(x / 2))`` vanishes at 2.39936, where ``g = 1/2 + x/4``,
    and is extreme at 0 and 3.43584.
    """
    return input.elementwise(
        -0.09983932012886693, 1.099839320128867, curvature=(-0.03691437319989319, 0.5)
    )


by_attributes(silu, nn.SiLU, rounding=of_library)


@lipschitz_rule(F.mish, rounding=of_library)
def mish(input: Signal, inplace: bool = False) -> Signal:
    """``x t`` with ``t = tanh(log(1 + exp(x)))``, which torch evaluates without a threshold.

    With ``w = exp(2x) + 2 exp(x) + 2`` the slope ``t + x t'`` is
    ``1 - 2 / w + 4 x (exp(2x) + exp(x)) / w^2``, extreme at -2.2564 and 1.4906, and its own
    slope at 2.1148 and -0.0879.
    """
    return input.elementwise(
        -0.11252612238946257,
        1.088498161251728,
        curvature=(-0.05903335695393630, 0.6442046372369725),
    )


by_attributes(mish, nn.Mish, rounding=of_library)


@lipschitz_rule(F.hardswish, rounding=sixths)
def hardswish(input: Signal, inplace: bool = False) -> Signal:
    """``x relu6(x + 3) / 6``: the slope ``(2 x + 3) / 6`` between -3 and 3, 0 and 1 beyond.

    The division by 6 is as in `activations.hardsigmoid`.
    """
    return input.elementwise(-3.0 * SINGLE_SIXTH, 9.0 * SINGLE_SIXTH)


by_attributes(hardswish, nn.Hardswish, rounding=sixths)


@lipschitz_rule(
    torch.sin, torch.sin_, "sin", "sin_", torch.cos, torch.cos_, "cos", "cos_",
    rounding=of_library,
)  # fmt: skip
def sine(input: Signal) -> Signal:
    """The slope is a sine or cosine, and its slope, too."""
    return input.elementwise(-1.0, 1.0, curvature=_both(1.0))


@lipschitz_rule(torch.sinc, torch.sinc_, torch.special.sinc, "sinc", "sinc_", rounding=of_library)
def sinc(input: Signal) -> Signal:
    """``sin(pi x) / (pi x)`` has the odd slope ``pi (cos z - sin(z) / z) / z``, ``z = pi x``.

    It is extreme at ``x = 0.66259`` and its mirror image. (The second derivative is bounded, too,
    but torch's gradient is inaccurate near zero.)
    """
    return input.elementwise(-1.3703055927694596, 1.3703055927694596)


@lipschitz_rule(
    torch.atan, torch.atan_, torch.arctan, torch.arctan_, "atan", "atan_", "arctan", "arctan_",
    rounding=of_library,
)  # fmt: skip
def atan(input: Signal) -> Signal:
    """The slope ``1 / (1 + x^2)`` is at most 1, its own at most ``3 sqrt(3) / 8``."""
    return input.elementwise(0.0, 1.0, curvature=_both(0.6495190528383290))


@lipschitz_rule(
    torch.asinh, torch.asinh_, torch.arcsinh, torch.arcsinh_, "asinh", "asinh_", "arcsinh",
    "arcsinh_", rounding=of_library,
)  # fmt: skip
def asinh(input: Signal) -> Signal:
    """The slope ``1 / sqrt(1 + x^2)`` is at most 1, its own at most ``2 / (3 sqrt(3))``."""
    return input.elementwise(0.0, 1.0, curvature=_both(0.3849001794597506))


@lipschitz_rule(torch.erf, torch.erf_, torch.special.erf, "erf", "erf_", rounding=of_library)
def erf(input: Signal) -> Signal:
    """The slope ``2 exp(-x^2) / sqrt(pi)`` is largest at 0, its own at ``1 / sqrt(2)``."""
    return input.elementwise(0.0, 1.1283791670955128, curvature=_both(0.9678828980765735))


@lipschitz_rule(torch.erfc, torch.erfc_, torch.special.erfc, "erfc", "erfc_", rounding=of_library)
def erfc(input: Signal) -> Signal:
    """``1 - erf(x)``."""
    return input.elementwise(-1.1283791670955128, 0.0, curvature=_both(0.9678828980765735))


@lipschitz_rule(torch.special.ndtr, rounding=of_library)
def ndtr(input: Signal) -> Signal:
    """The normal slope ``exp(-x^2 / 2) / sqrt(2 pi)`` is largest at 0, its own slope at -1."""
    return input.elementwise(0.0, 0.3989422804014327, curvature=_both(0.2419707245191434))


def _both(curvature: float) -> tuple[float, float]:
    """The ends of an odd second derivative."""
    return -curvature, curvature


def _up(number: float) -> float:
    return math.nextafter(number, math.inf)
