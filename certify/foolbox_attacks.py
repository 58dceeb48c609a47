"""Attacks of the library foolbox, where it is installed. Nothing is proven by them."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from certify.minimum_norm import Seen, Target, on_rays


def by_foolbox(target: Target, model: nn.Module, x: Tensor, own: Tensor) -> dict[str, Seen]:
    """The nearest points of other classes that foolbox's attacks find.

    Those are fast minimum-norm and Carlini-Wagner, on the network in float64, within the domain, or
    else the pixels' range; what they find is looked at again here, and the rays to it.

    Args:
        target: says what is seen.
        model: the same network.
        x: ``(N, ...)`` float64.
        own: ``(N,)`` predicted classes.

    Raises:
        ValueError: foolbox is not installed.

    References:
        M. Pintor et al., Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints,
        NeurIPS 2021.
        N. Carlini, D. Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017.
        J. Rauber et al., Foolbox Native, JOSS 2020.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            foolbox: Any = import_module("foolbox")
    except ImportError as error:
        raise ValueError(
            "foolbox is not installed: pip install 'certify-lipschitz[foolbox]'"
        ) from error
    attacks = {
        "foolbox-fmn": foolbox.attacks.L2FMNAttack(),
        "foolbox-cw": foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=100),
    }
    bounds = target.domain or (min(x.min().item(), 0.0), max(x.max().item(), 1.0))
    found = {}
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore")
        attacked = foolbox.PyTorchModel(model, bounds=bounds, device=x.device)
        for name, attack in attacks.items():
            reached = []
            for part, label in zip(x.split(target.batch), own.split(target.batch), strict=True):
                _, points, _ = attack(attacked, part.clone(), label.clone(), epsilons=None)
                reached.append(on_rays(target, part, points.detach(), label))
            found[name] = Seen.joined(reached)
    return found
