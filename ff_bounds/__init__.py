"""Proven, differentiable upper bounds of the spectral norms of kernels and matrices.

Tensors in, float64 scalars out. A name that ends in ``_bound`` is a promise: the value is at least
the exact norm of the stored weights, floating-point rounding included. What carries another name
(`PowerIterationPenalty`, `SupremumPenalty`, `spectral_norm`, `tensor_norm_estimate`) promises less,
and says so.
"""

from ff_bounds.circular import circular_bound, circular_bracket
from ff_bounds.conv import (
    conv1d_bound,
    conv2d_bound,
    conv3d_bound,
    conv_bound,
    lattice_bound,
)
from ff_bounds.conv_transpose import (
    conv_transpose1d_bound,
    conv_transpose2d_bound,
    conv_transpose3d_bound,
)
from ff_bounds.fantastic_four import FourBounds, fantastic_four_bound, fantastic_four_bounds
from ff_bounds.frequency_grid import (
    gram_iteration_circular_bound,
    gram_iteration_supremum_bound,
)
from ff_bounds.gram_iteration import gram_iteration_bound
from ff_bounds.matrix import spectral_norm_bound
from ff_bounds.penalty import PowerIterationPenalty
from ff_bounds.reference import (
    conv2d_matrix,
    conv_matrix,
    conv_transpose_matrix,
    spectral_norm,
)
from ff_bounds.supremum import (
    NormBracket,
    supremum_bound,
    supremum_bounds,
    supremum_bracket,
    supremum_brackets,
)
from ff_bounds.supremum_penalty import SupremumPenalty
from ff_bounds.tensor_norm import tensor_norm_bound, tensor_norm_estimate
from ff_bounds.unfoldings import Unfoldings, unfoldings, unit_stride_kernel
from ff_bounds.zero_padded import zero_padded_bound

__all__ = [
    "FourBounds",
    "NormBracket",
    "PowerIterationPenalty",
    "SupremumPenalty",
    "Unfoldings",
    "circular_bound",
    "circular_bracket",
    "conv1d_bound",
    "conv2d_bound",
    "conv2d_matrix",
    "conv3d_bound",
    "conv_bound",
    "conv_matrix",
    "conv_transpose1d_bound",
    "conv_transpose2d_bound",
    "conv_transpose3d_bound",
    "conv_transpose_matrix",
    "fantastic_four_bound",
    "fantastic_four_bounds",
    "gram_iteration_bound",
    "gram_iteration_circular_bound",
    "gram_iteration_supremum_bound",
    "lattice_bound",
    "spectral_norm",
    "spectral_norm_bound",
    "supremum_bound",
    "supremum_bounds",
    "supremum_bracket",
    "supremum_brackets",
    "tensor_norm_bound",
    "tensor_norm_estimate",
    "unfoldings",
    "unit_stride_kernel",
    "zero_padded_bound",
]
