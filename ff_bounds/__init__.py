"""Proven, differentiable upper bounds of the spectral norms of kernels and matrices.

Tensors in, float64 scalars out. A name that ends in ``_bound`` is a promise: the value is at least
the exact norm of the stored weights, floating-point rounding included. What carries another name
(`PowerIterationPenalty`, `spectral_norm`) promises less, and says so.
"""

from ff_bounds.conv import conv2d_bound
from ff_bounds.fantastic_four import FourBounds, fantastic_four_bound, fantastic_four_bounds
from ff_bounds.matrix import spectral_norm_bound
from ff_bounds.penalty import PowerIterationPenalty
from ff_bounds.reference import conv2d_matrix, spectral_norm
from ff_bounds.supremum import NormBracket, supremum_bound, supremum_bracket
from ff_bounds.unfoldings import Unfoldings, unfoldings, unit_stride_kernel

__all__ = [
    "FourBounds",
    "NormBracket",
    "PowerIterationPenalty",
    "Unfoldings",
    "conv2d_bound",
    "conv2d_matrix",
    "fantastic_four_bound",
    "fantastic_four_bounds",
    "spectral_norm",
    "spectral_norm_bound",
    "supremum_bound",
    "supremum_bracket",
    "unfoldings",
    "unit_stride_kernel",
]
