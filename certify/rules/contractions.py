r"""Layers of `models` that are contractions as a whole, beyond the norms of their parts."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.rules.registry import lipschitz_rule
from certify.signal import Signal, UnsupportedModel
from ff_bounds.rounding import round_up
from ff_bounds.row_sums import near_isometry_bound, scaled_square_bound
from models import BlockReflectorConv2d, SLLConv2d


@lipschitz_rule(SLLConv2d)
def sll(module: SLLConv2d, x: Signal) -> Signal:
    r"""``x - 2 V^T T^{-1} relu(V x + b)`` has constant ``sqrt(1 + 4 max(s - 1, 0) s)``.

    Here ``s >= ||T^{-1/2} V||^2``. For two inputs with difference ``d`` let ``z = V d`` and ``e``
    the difference behind relu, whose slopes lie in [0, 1]: ``e_i z_i >= e_i^2``. Then

        ``|d - 2 V^T T^{-1} e|^2 = |d|^2 - 4 sum_i e_i z_i / t_i + 4 |V^T T^{-1} e|^2
          <= |d|^2 + 4 (s - 1) sum_i e_i^2 / t_i``,

    as ``|V^T T^{-1/2} y|^2 <= s |y|^2`` with ``y = T^{-1/2} e``. Where ``s > 1`` the last sum is at
    most ``sum_i z_i^2 / t_i <= s |d|^2``. (Araujo et al. 2023, theorem 3, for ``s <= 1``.)
    """
    divisors, q = module.divisors(), module.q
    inner = module.weight.shape[:1]
    _check(module, x, module.weight.shape[1], {"t": (divisors, inner), "q": (q, inner)}, inner)
    square = scaled_square_bound(module.weight, divisors, q)
    excess = round_up((square - 1.0).clamp_min(0.0), 1)
    return x.scaled(round_up((1.0 + 4.0 * excess * square).sqrt(), 6))


@lipschitz_rule(BlockReflectorConv2d)
def block_reflector(module: BlockReflectorConv2d, x: Signal) -> Signal:
    r"""At most the largest norm of the matrices that multiply the frequencies.

    Let ``X`` be the half of an image's spectrum that is kept. ``|x|^2`` is, up to a factor, the sum
    of ``|X|^2``, with weight two for frequencies whose conjugates were left out and one for the
    columns that are their own conjugates. Of the product on the latter the inverse transform takes
    the part that belongs to a real image, a projection. So no more comes back than the matrices let
    through.
    """
    channels = module.weight.shape[:1]
    _check(module, x, channels[0], {}, channels)
    matrices = module.reflectors(*x.shape[2:])
    return x.scaled(near_isometry_bound(matrices).amax(), linear=True)


def _check(
    module: SLLConv2d | BlockReflectorConv2d,
    x: Signal,
    channels: int,
    tensors: dict[str, tuple[Tensor, torch.Size]],
    outputs: torch.Size,
) -> None:
    """Refuse what would be broadcast, so that an entry meets several others."""
    kind = type(module).__name__
    if len(x.shape) != 4 or x.shape[1] != channels or module.weight.ndim != 4:
        raise UnsupportedModel(f"{kind}: expected (N, {channels}, H, W), got {x.shape}")
    if module.bias is not None:
        tensors = {**tensors, "bias": (module.bias, outputs)}
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape:
            raise UnsupportedModel(f"{kind}: {name} has shape {tuple(tensor.shape)}")
