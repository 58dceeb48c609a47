"""The arithmetics that networks run in, as far as a proof needs to know them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """A model of rounded arithmetic.

    What is assumed of the machine that runs the network: a single operation returns the exact
    result times ``1 + d`` with ``|d| <= unit``, plus at most ``smallest`` where it underflows
    (subnormal numbers may be flushed to zero, arguments too); the products of a matrix product or
    convolution are added in any order, with or without fused multiply-add, each addition off by
    ``sum_unit`` relative at most. So a convolution must not be computed by way of Winograd's or a
    Fourier transform, nor a matrix product by Strassen's. Torch's defaults on a GPU differ:
    ``float32`` needs ``torch.backends.cudnn.allow_tf32 = False``, ``bfloat16`` needs
    ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False``.

    Weights that a parametrization computes are those that it gave when the network was copied.

    Attributes:
        name: as users write it.
        unit: of results, and of parameters that were stored in a wider format.
        factor_unit: of what enters the products of a matrix product or convolution.
        sum_unit: of the additions there, and of the steps inside functions such as softplus.
        smallest: smallest normal number.
        largest: largest number.
    """

    name: str
    unit: float
    factor_unit: float
    sum_unit: float
    smallest: float
    largest: float

    def gamma(self, operations: int) -> float:
        """Relative error of so many chained operations; infinite where that has no bound."""
        return _gamma(operations, self.unit)

    def products(self, terms: int) -> float:
        """Error of a sum of so many products and an offset, over the sum of absolute values.

        Both factors are rounded, the products added one after the other, and the result rounded;
        three more roundings are those of parameters that were stored in a wider format. With
        ``f, u <= 2^-8``, ``(1 + f)^2 (1 + u)^4 <= 1 + 2.1 f + 4.2 u``.
        """
        sums = _gamma(terms + 2, self.sum_unit)
        factors = 2.1 * self.factor_unit + 4.2 * self.unit
        return (sums + factors + sums * factors) * (1.0 + 2.0**-40)

    def sums(self, terms: int) -> float:
        """The same without products, where each partial sum may be rounded as a result is."""
        return _gamma(terms + 6, max(self.unit, self.sum_unit))


def _gamma(operations: int, unit: float) -> float:
    product = operations * unit
    return product / (1.0 - product) * (1.0 + 2.0**-40) if product < 0.5 else float("inf")


PRECISIONS: dict[str, Precision] = {
    "float64": Precision("float64", 2.0**-53, 0.0, 2.0**-53, 2.0**-1022, 2.0**1023),
    "float32": Precision("float32", 2.0**-24, 0.0, 2.0**-24, 2.0**-126, 2.0**127),
    # Tensor cores cut off where others round, and align the terms of a sum to the largest.
    "tf32": Precision("tf32", 2.0**-24, 2.0**-10, 2.0**-22, 2.0**-126, 2.0**127),
    "bfloat16": Precision("bfloat16", 2.0**-8, 2.0**-8, 2.0**-22, 2.0**-126, 2.0**127),
}
"""By the names that ``--precision`` takes. ``bfloat16`` holds for autocast and for networks that
are in bfloat16 altogether, as long as sums are accumulated in float32."""


def precision(name: str) -> Precision:
    """Return an arithmetic by name.

    Raises:
        ValueError: an unknown name; the message lists all.
    """
    if name not in PRECISIONS:
        raise ValueError(f"expected precision to be one of {', '.join(PRECISIONS)}, got {name!r}")
    return PRECISIONS[name]
