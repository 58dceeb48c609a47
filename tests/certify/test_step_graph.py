"""Steps in CUDA graphs, where there is no GPU by a stand-in that replays core operations."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import models
from certify.augmentation import flip
from certify.data import ImageData
from certify.step_graph import StepGraph
from certify.training import Trainer
from certify.training_config import TrainingConfig


class Recording(TorchDispatchMode):
    """What a CUDA graph is to a GPU: operations on tensors at fixed places, without Python.

    Like that it refuses what waits for values, and tensors made of numbers of the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal"):
            raise RuntimeError(f"not permitted when a stream is capturing: {name}\nmore")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do the same again, to the same memory."""
        for func, args, kwargs, result in self.calls:
            given = {_place(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
            again = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(pytree.tree_leaves(result), again, strict=True):
                if isinstance(old, Tensor) and _place(old) not in given:  # no view, not in place
                    old.copy_(new)


def _place(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let `Recording` stand in for CUDA graphs; to be filled with all that steps change."""
    tensors: list[Tensor] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def capturing(graph: Recording, stream: Any) -> Iterator[None]:
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            with graph:
                yield
        finally:  # a GPU executes nothing of what it captures
            for tensor, value in zip(tensors, before, strict=True):
                tensor.detach().copy_(value)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    # Where tensors are on the CPU the values of a few decide; elsewhere they do not.
    monkeypatch.setattr("ff_bounds.rounding.bool", lambda value: False, raising=False)
    return tensors


def images(count: int = 75) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.randint(4, (count,), generator=generator), list("abcd"))


def lipschitz_network(**hyperparameters: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.build(
        "liresnet",
        **{"width": 4, "depth": (1, 1), "dense": (8,), **hyperparameters},
        input_shape=(3, 8, 8),
        num_classes=4,
    )


def strided_network() -> nn.Module:
    """Padded by copies of the image, which the norms of kernels do not show."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def smooth_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4))


def trained(trainer: Trainer, epochs: int = 2) -> list[Tensor]:
    found = []
    for _ in range(epochs):
        metrics = trainer.run_epoch()
        assert metrics is not None
        found += [torch.tensor([metrics.loss, metrics.lipschitz_estimate])]
    return [*found, *(value.clone() for value in trainer.model.state_dict().values())]


def graphed(trainer: Trainer, memory: list[Tensor]) -> Trainer:
    """As it would be on a GPU."""
    trainer._graph = StepGraph(trainer._gradients, trainer._trained, trainer.config.batch_size)
    memory += [*trainer.model.parameters(), *trainer.model.buffers()]
    memory += trainer._objective._estimator.buffers()
    if trainer._objective._smooth is not None:
        memory += trainer._objective._smooth.buffers()
        memory += trainer._objective._smooth._curvature._vectors
    return trainer


RAMP = TrainingConfig(epochs=2, batch_size=10, loss="emma", epsilon_start=0.1, augment="none")


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lipschitz_network, {"precision": "bfloat16", "optimizer": "nadam", "clip_norm": 0.1}),
        (lipschitz_network, {"method": "supremum", "clip_norm": 0.1, "ema": 0.9}),
        (lambda: lipschitz_network(block="sll"), {"method": "supremum", "loss": "margin"}),
        (lambda: lipschitz_network(block="reflector", depth=(1,)), {"loss": "gloro-trades"}),
        (lambda: lipschitz_network(block="aol"), {"loss": "annealing"}),
        (strided_network, {"loss": "gloro", "log_lipschitz_penalty": 0.1}),
        (strided_network, {"method": "supremum", "loss": "cross-entropy"}),
        (lambda: lipschitz_network(head="softplus"), {"method": "supremum", "loss": "dual"}),
        (smooth_network, {"loss": "dual", "attack_steps": 3}),
        (smooth_network, {"loss": "dual-emma"}),
        (smooth_network, {"loss": "crt", "curvature_penalty": 0.1}),
        (lambda: lipschitz_network(head="softplus"), {"loss": "crt", "curvature_penalty": 0.1}),
    ],
    ids=str,
)
def test_replayed_steps_are_those_that_are_launched(
    make: Callable[[], nn.Module], changes: dict[str, Any], memory: list[Tensor]
) -> None:
    config = dataclasses.replace(RAMP, **changes)
    launched = Trainer(make(), images(), config, [flip])
    replayed = graphed(Trainer(make(), images(), config, [flip]), memory)
    expected, found = trained(launched), trained(replayed)
    assert replayed._graph is not None
    assert replayed._graph._captured
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (strided_network, "crm"),  # asks whether there is any budget
        (lambda: nn.Sequential(strided_network(), nn.BatchNorm1d(4)), "emma"),  # may it be merged?
    ],
    ids=str,
)
def test_a_step_that_waits_is_launched_as_before(
    make: Callable[[], nn.Module], loss: str, memory: list[Tensor]
) -> None:
    config = dataclasses.replace(RAMP, loss=loss)
    launched = Trainer(make(), images(), config)
    replayed = graphed(Trainer(make(), images(), config), memory)
    with pytest.warns(UserWarning, match="captured in a CUDA graph: not permitted when.*dense$"):
        found = trained(replayed)
    for one, other in zip(trained(launched), found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_on_a_gpu(precision: str) -> None:
    config = dataclasses.replace(RAMP, precision=precision, method="supremum", clip_norm=0.1)
    found = []
    for chosen in (config, dataclasses.replace(config, cuda_graph=True)):
        trainer = Trainer(lipschitz_network().cuda(), images(), chosen, [flip])
        found.append(trained(trainer))
        assert chosen.cuda_graph == bool(trainer._graph and trainer._graph._captured)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3)
