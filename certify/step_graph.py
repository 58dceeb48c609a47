"""Training steps that a GPU gets in one piece."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor, "float | Tensor"], Tensor]
"""From images, labels and a budget to metrics; leaves gradients at the parameters."""

_WARM_UP = 3
"""Steps before one is captured, in which libraries make what they keep."""


class StepGraph:
    """A step that is launched kernel by kernel a few times, then captured and replayed.

    A step of a small network is a thousand small kernels, whose launches take longer than they do;
    a CUDA graph launches all at once. Where a step cannot be captured, as it waits for the device,
    a warning says so, and all goes on as before.

    Args:
        step: what is captured.
        parameters: where it leaves gradients, on one device.
        batch_size: of the steps that are; others are launched.

    References:
        NVIDIA, CUDA programming guide, CUDA Graphs (stream capture); PyTorch documentation, CUDA
        semantics, CUDA Graphs (the stream of its own, the steps before).
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], batch_size: int) -> None:
        self._step = step
        self._parameters = parameters
        self._batch_size = batch_size
        self._device = parameters[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._before = _WARM_UP
        self._captured: Step | Literal[False] | None = None

    def __call__(self, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """Make the step; the result is good until the next call.

        Args:
            x: images, of the same layout in all calls.
            labels: their labels.
            epsilon: the budget.
        """
        if len(labels) != self._batch_size:
            return self._launched(x, labels, epsilon)
        if self._before:
            self._before -= 1
            return self._launched(x, labels, epsilon)
        if self._captured is None:
            self._captured = self._capture(x, labels)
        if not self._captured:
            return self._launched(x, labels, epsilon)
        return self._captured(x, labels, epsilon)

    def _launched(self, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """The step as it is, but on the stream that is captured, to which gradients belong."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            result = self._step(x, labels, epsilon)
        now.wait_stream(self._stream)
        return result

    def _capture(self, x: Tensor, labels: Tensor) -> Step | Literal[False]:
        """Note what the step launches, of which nothing is executed; ``False`` if it cannot be."""
        own_x, own_labels, own_epsilon = x.clone(), labels.clone(), x.new_zeros(())
        now, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=self._stream):
                result = self._step(own_x, own_labels, own_epsilon)
        except RuntimeError as error:
            torch.cuda.set_stream(now)  # which a capture that fails may leave changed
            reason = str(error.__context__ or error).strip().split("\n")[0]
            warnings.warn(f"steps cannot be captured in a CUDA graph: {reason}", stacklevel=4)
            return False
        gradients = [parameter.grad for parameter in self._parameters]

        def replay(x: Tensor, labels: Tensor, epsilon: float | Tensor) -> Tensor:
            own_x.copy_(x)
            own_labels.copy_(labels)
            own_epsilon.fill_(epsilon)
            graph.replay()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return result

        return replay
