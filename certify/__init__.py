"""Proven L2 robustness radii for PyTorch classifiers.

`CertifiedModel` bounds a network's Lipschitz constants and certifies inputs; `train` makes
networks for which that pays. The public names are loaded on first use, so that the command line
answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certify.attack import Effort
    from certify.certificates import Certificate, certificate
    from certify.certified_model import CertifiedModel
    from certify.checkpoints import load_model
    from certify.data import ImageData, load_data
    from certify.evaluation import evaluate
    from certify.layers import NetworkReport, report_layers
    from certify.losses import LOSSES, cross_entropy, margin_loss
    from certify.norms import NetworkEstimator
    from certify.report import Report
    from certify.rules import lipschitz_rule
    from certify.signal import Signal, UnsupportedModel
    from certify.training import train
    from certify.training_config import TrainingConfig

__all__ = [
    "LOSSES",
    "Certificate",
    "CertifiedModel",
    "Effort",
    "ImageData",
    "NetworkEstimator",
    "NetworkReport",
    "Report",
    "Signal",
    "TrainingConfig",
    "UnsupportedModel",
    "certificate",
    "cross_entropy",
    "evaluate",
    "lipschitz_rule",
    "load_data",
    "load_model",
    "margin_loss",
    "report_layers",
    "train",
]

_HOME = {
    "LOSSES": "losses",
    "Certificate": "certificates",
    "CertifiedModel": "certified_model",
    "Effort": "attack",
    "ImageData": "data",
    "NetworkEstimator": "norms",
    "NetworkReport": "layers",
    "Report": "report",
    "Signal": "signal",
    "TrainingConfig": "training_config",
    "UnsupportedModel": "signal",
    "certificate": "certificates",
    "cross_entropy": "losses",
    "evaluate": "evaluation",
    "lipschitz_rule": "rules",
    "load_data": "data",
    "load_model": "checkpoints",
    "margin_loss": "losses",
    "report_layers": "layers",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"certify.{_HOME[name]}"), name)
    raise AttributeError(f"module 'certify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
