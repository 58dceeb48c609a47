"""Certified radii of a network with a smooth head."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from certify.certificates import Certificate
from certify.curvature import curvature_bound
from certify.dual import STEPS, DualResult, Rounding, dual_bounds, margins_of
from certify.forward_error import ForwardError
from certify.gradient_error import GradientError
from certify.head import SmoothHead
from certify.linear_maps import norms
from certify.norms import proven_norms
from certify.second_order import second_order_radius
from certify.signal import UnknownRounding
from ff_bounds.rounding import product_bound, sum_bound

_LARGEST_BATCH = 2**22
"""Entries of the largest tensor while points go through the network."""


class SmoothRadii:
    r"""Certificates by second derivatives.

    With a backbone, what is proven is about balls around the features ``b^`` that it computes.
    Where these are off by ``e`` at most, a ball of radius ``r`` contains one of ``r - e`` around
    the true features, and a gradient there is larger by ``max|Hess| e`` at most.

    Args:
        head: the smooth part and a Lipschitz constant of what is before it. Its radii are divided
            by that constant, rounded down.
        method: how convolutions are bounded, see `ff_bounds.conv_bound`.
        forward: the rounding of the whole network, if it is known. That of values and gradients is
            paid for then, unless `check_rounding` refuses.
    """

    def __init__(self, head: SmoothHead, method: str, forward: ForwardError | None = None) -> None:
        self.head = head
        self._method = method
        self._forward = forward
        self._error: GradientError | None = None
        with suppress(UnknownRounding):
            self._error = None if forward is None else self._gradient_error(forward)
        self._margins = margins_of(head.model)
        largest = max(math.prod(signal.shape[1:]) for signal in head.bound.bounding.order)
        self._batch = max(1, _LARGEST_BATCH // largest)

    def _gradient_error(self, forward: ForwardError) -> GradientError:
        if self.head.backbone is not None:
            measure = partial(proven_norms, method=self._method)
            forward = ForwardError(self.head.graph, self.head.output, measure)
        return GradientError(forward)

    def check_rounding(self) -> None:
        """Raise `UnknownRounding` where it is not known how much gradients round."""
        if self._error is None:
            if self._forward is None:
                raise UnknownRounding("it is not known how much the network rounds")
            self._gradient_error(self._forward)

    @cached_property
    def curvature(self) -> Tensor:
        """Bounds ``(C, C)`` of the head; see `curvature_bound`."""
        return curvature_bound(self.head.bound, self._method)

    def by_curvature(self, x: Tensor, logits: Tensor) -> Certificate:
        """Certify by margins, gradients and bounds of both derivatives; see `second_order`.

        Args:
            x: ``(N, ...)`` float64.
            logits: ``(N, C)`` there.
        """
        features, off = self._features(x)
        prediction = logits.argmax(dim=1)
        nowhere = x.new_zeros(len(x))
        error = self._rounding(features, prediction)(nowhere)[1] if self._error else nowhere
        margins = self.head.bound.margins
        top = logits.gather(1, prediction[:, None])
        radius = torch.full_like(logits, torch.inf)
        for other in range(logits.shape[1]):
            classes = torch.full_like(prediction, other)
            gradient = self._margins(features, prediction, classes)[1]
            bend = self.curvature[prediction, other]
            bend = product_bound(torch.maximum(bend, self.curvature[other, prediction]), off)
            radius[:, other] = second_order_radius(
                top[:, 0] - logits[:, other],
                sum_bound(sum_bound(norms(gradient.flatten(1), 1), error), bend),
                self.curvature[prediction, other],
                margins[prediction, other],
            )
        radius.scatter_(1, prediction[:, None], torch.inf)
        sound = torch.isfinite(logits).all(dim=1)
        smallest = self._divided(radius.amin(dim=1))
        return Certificate(prediction, torch.where(sound, smallest, 0.0))

    def dual(
        self,
        x: Tensor,
        logits: Tensor,
        *,
        allowance: Tensor | None = None,
        steps: int = STEPS,
        early_exit: bool = True,
    ) -> DualResult:
        """Certify by duality; see `certify.dual`. Arguments are as for `by_curvature`.

        Points of other classes are seen in the space of features; only where that is the space of
        inputs are they reported.
        """
        features, off = self._features(x)
        found = dual_bounds(
            self._margins,
            features,
            logits,
            self.curvature,
            allowance=allowance,
            rounding=self._rounding(features, logits.argmax(dim=1)) if self._error else None,
            steps=steps,
            early_exit=early_exit,
            batch=self._batch,
        )
        if self.head.backbone is None:
            return found
        unseen = torch.full_like(found.upper, torch.inf)
        lower = (found.lower - off[:, None]).clamp_min(0.0)
        return replace(found, lower=self._divided(lower), upper=unseen)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the head, as computed, and how far that is off."""
        none = x.new_zeros(len(x))
        if self.head.backbone is None:
            return x, none
        features: Tensor = self.head.backbone(x.clone())
        if self._forward is None:
            return features, none
        error = self._forward.error_of(self.head.features, x)
        return features, error.nan_to_num(nan=math.inf, posinf=math.inf)

    def _rounding(self, features: Tensor, classes: Tensor) -> Rounding:
        """What rounding can do within distances that grow, each to twice what it has to be."""
        assert self._error is not None
        error, known = self._error, features.new_full((len(features),), -1.0)
        found: list[Tensor] = []

        def within(distance: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal known
            if not found or bool((distance > known).any()):
                known = torch.where(distance > known, 2.0 * distance, known)
                found[:] = error.bounds(features, known, classes)
            return found[0], found[1]

        return within

    def _divided(self, radius: Tensor) -> Tensor:
        """Radii of inputs from those of features, rounded down."""
        if self.head.backbone is None:
            return radius
        found = radius / self.head.lipschitz * (1.0 - 2.0**-50)
        return torch.where(radius > 0, found.nan_to_num(nan=0.0), 0.0)
