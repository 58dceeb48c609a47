"""Certified radii of a network with a smooth head."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from certify.certificates import Certificate
from certify.curvature import curvature_bound
from certify.dual import STEPS, DualResult, dual_bounds, margins_of
from certify.head import SmoothHead
from certify.linear_maps import norms
from certify.second_order import second_order_radius

_LARGEST_BATCH = 2**22
"""Entries of the largest tensor while points go through the network."""


class SmoothRadii:
    """Certificates by second derivatives.

    Args:
        head: the smooth part and a Lipschitz constant of what is before it. Its radii are divided
            by that constant, rounded down.
        method: how convolutions are bounded, see `ff_bounds.conv_bound`.
    """

    def __init__(self, head: SmoothHead, method: str) -> None:
        self.head = head
        self._method = method
        self._margins = margins_of(head.model)
        largest = max(math.prod(signal.shape[1:]) for signal in head.bound.bounding.order)
        self._batch = max(1, _LARGEST_BATCH // largest)

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
        features = self._features(x)
        prediction = logits.argmax(dim=1)
        margins = self.head.bound.margins
        top = logits.gather(1, prediction[:, None])
        radius = torch.full_like(logits, torch.inf)
        for other in range(logits.shape[1]):
            classes = torch.full_like(prediction, other)
            gradient = self._margins(features, prediction, classes)[1]
            radius[:, other] = second_order_radius(
                top[:, 0] - logits[:, other],
                norms(gradient.flatten(1), 1),
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
        found = dual_bounds(
            self._margins,
            self._features(x),
            logits,
            self.curvature,
            allowance=allowance,
            steps=steps,
            early_exit=early_exit,
            batch=self._batch,
        )
        if self.head.backbone is None:
            return found
        unseen = torch.full_like(found.upper, torch.inf)
        return replace(found, lower=self._divided(found.lower), upper=unseen)

    def _features(self, x: Tensor) -> Tensor:
        if self.head.backbone is None:
            return x
        features: Tensor = self.head.backbone(x.clone())
        return features

    def _divided(self, radius: Tensor) -> Tensor:
        """Radii of inputs from those of features, rounded down."""
        if self.head.backbone is None:
            return radius
        found = radius / self.head.lipschitz * (1.0 - 2.0**-50)
        return torch.where(radius > 0, found.nan_to_num(nan=0.0), 0.0)
