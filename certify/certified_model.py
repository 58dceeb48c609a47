"""A network with its proven Lipschitz bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.data import Dataset

from certify.attack import Adversary, Effort
from certify.bounding import Norms
from certify.centres import proven_walk
from certify.certificates import Certificate, check_certificate, in_a_row, largest_of
from certify.certificates import certificate as certified_by_margins
from certify.dual import STEPS, DualResult
from certify.folding import refuse_other_results
from certify.forward_error import ForwardError
from certify.graph import LipschitzGraph
from certify.head import smooth_head
from certify.local_network import LocalNetwork
from certify.local_radius import local_certificate
from certify.norms import Prove, check_method, proven_norms
from certify.operators import Weighted
from certify.precision import precision as precision_named
from certify.programs import module_of
from certify.signal import Signal, UnknownRounding, UnsupportedModel
from certify.smooth_radii import SmoothRadii
from certify.snapshot import exact_copy
from certify.tightening import NetworkBound, bound_network

_LOCAL_PASSES = 3
"""Whose rounding a local certificate pays for.

It rests on what enters activations ``a`` in one pass in float64, and on logits of another. Take a
network that adds, behind each operation, what that pass rounded there. It computes exactly ``a``
and the pass's own logits; its slopes are those of the network, so that the local bounds at ``a``
are about it; and from the network it differs, everywhere, by the bound of a pass's error at most.
So from the logits that are used to the pass's own, by way of the exact ones, two errors count, and
from the one network to the other a third.
"""


class CertifiedModel:
    """A snapshot of a classifier, ready to certify inputs.

    The model is copied, put into evaluation mode and converted to float64 (exact for the stored
    weights), so that later changes of the original cannot invalidate the bounds. The copy lives
    on the original's device; logits are computed there, in float64.

    What is proven: without a ``precision``, the radii hold for the network with the stored weights,
    computed in exact arithmetic. The bounds include all rounding, and that of the float64 passes
    that compute logits and gradients is paid for, unless `check_rounding` refuses; else it is not
    (about 1e-13 relative). With a ``precision``, the radii hold for what a machine computes in that
    arithmetic (`certify.precision` says what is assumed of it), here and at perturbed inputs that
    are numbers of it, or of float32 where it is coarser.

    Args:
        model: a module that maps ``(N, *input_shape)`` to logits ``(N, C)``, or a program of
            ``torch.export`` that does (`certify.programs`).
        input_shape: shape of one input, e.g. ``(1, 28, 28)``.
        method: how convolutions are bounded, see `ff_bounds.conv_bound`.
        tighten: how far the bound goes beyond the product of norms, one of
            `certify.tightening.TIGHTENINGS`.
        precision: what the network runs in, one of `certify.precision.PRECISIONS`, or ``None`` or
            ``"exact"`` for exact arithmetic.
        prove: proves the norms of operators, all while the model is made; for those who record or
            check how, or share the work.
        domain: smallest and largest entry of an input, ``(0, 1)`` for images. Only networks that
            multiply tensors that depend on the input (squeeze and excitation) need it; what is
            proven then holds for perturbed inputs within the domain, and rests on the network's
            values at its centre (`certify.products`).

    Raises:
        UnsupportedModel: an operation that has no rule, or cannot have one.
        ValueError: NaN or infinite parameters, an input shape or a method that does not fit.

    Example:
        >>> import models
        >>> model = models.build("mlp", hidden=(8,), input_shape=(1, 4, 4))
        >>> certified = CertifiedModel(model, (1, 4, 4))
        >>> found = certified.certify(torch.rand(5, 1, 4, 4))
        >>> found.radius.shape
        torch.Size([5])
    """

    @torch.inference_mode(False)  # whose tensors cannot be watched for writes in place
    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        input_shape: Sequence[int],
        *,
        method: str = "fantastic_four",
        tighten: str = "join",
        domain: Sequence[float] | None = None,
        precision: str | None = None,
        prove: Prove = proven_norms,
    ) -> None:
        check_method(method)
        if not isinstance(model, nn.Module):
            model = module_of(model, input_shape)
        self._prove = prove
        precision = None if precision == "exact" else precision
        self.precision = None if precision is None else precision_named(precision)
        self.method = method
        self.tighten = tighten
        self._model = exact_copy(model, input_shape)
        graph = LipschitzGraph(self._model, input_shape, domain)
        self.input_shape = tuple(input_shape)
        self.domain = domain
        self._device = graph.device
        self._graph = graph
        self._output = output = proven_walk(graph, lambda some: prove(some, method))
        refuse_other_results(model, self._model, input_shape)
        self._shape = output.shape
        if len(self._shape) != 2:
            raise UnsupportedModel(f"expected logits (N, C), got shape {self._shape}")
        self._bound = bound_network(output, method, tighten, prove)
        if precision is not None:  # whatever may be refused is so here
            self.check_rounding()
        elif prove is not proven_norms:  # nothing is left to be proven later
            _ = self.rounding_is_known

    @cached_property
    @torch.inference_mode(False)
    def _rounding(self) -> ForwardError:
        return ForwardError(self._graph, self._output, self._norms)

    @cached_property
    def rounding_is_known(self) -> bool:
        """Whether radii account for the rounding of the pass that computes the logits here."""
        try:
            self.check_rounding()
        except UnknownRounding:
            return False
        return True

    def check_rounding(self, certificate: str = "lipschitz") -> None:
        """Refuse a network of which it is not known how much what is computed of it rounds.

        That is its logits, and with ``"curvature"`` and ``"dual"``, and with ``"best"`` where the
        network has these, their gradients as well.

        Raises:
            UnknownRounding: naming the operation.
            UnsupportedModel: a certificate that the network does not have.
        """
        start = torch.zeros(1, *self.input_shape, dtype=torch.float64, device=self._device)
        one = None if self.precision is None else start.new_ones(1)
        self._allowance(start, start.new_zeros(1).long(), one)
        if certificate in ("curvature", "dual", "best"):
            try:
                self.smooth.check_rounding()
            except UnsupportedModel as error:
                if certificate != "best" or isinstance(error, UnknownRounding):
                    raise

    def _norms(self, operators: Sequence[Weighted]) -> Norms:
        """Norms of operators, as far as they are not proven already."""
        known: dict[Weighted, Tensor] = {}
        for operator in operators:
            with suppress(KeyError):
                known[operator] = self._bound.norms(operator)
        rest = self._prove([o for o in operators if o not in known], self.method)
        return lambda operator: known[operator] if operator in known else rest(operator)

    def __repr__(self) -> str:
        arithmetic = "exact" if self.precision is None else self.precision.name
        return (
            f"CertifiedModel(({_listed(self.input_shape)}) -> {self.num_classes} classes, "
            f"Lipschitz constant {self.lipschitz():.4g} by {self.method}, {self.tighten}, "
            f"arithmetic {arithmetic})"
        )

    @property
    def model(self) -> nn.Module:
        """The float64 copy that is certified."""
        return self._model

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self._shape[1]

    def lipschitz(self) -> Tensor:
        """Proven Lipschitz bound of the map from input to logits, L2 to L2; float64 scalar."""
        return _proven(self._bound.lipschitz)

    def margin_lipschitz(self) -> Tensor:
        """Proven Lipschitz bounds ``(C, C)`` of all differences of two logits, float64."""
        return _proven(self._bound.margins)

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``(N, C)`` of inputs ``(N, *input_shape)``, in float64."""
        check_floating(x)
        if tuple(x.shape[1:]) != self.input_shape:
            one = tuple(x.shape) == self.input_shape
            raise ValueError(
                f"expected inputs (N, {_listed(self.input_shape)}), got ({_listed(x.shape)})"
                + ("; x[None] is a batch of one" if one else "")
            )
        # A copy: the model may begin with an operation in place.
        logits: Tensor = self._model(x.to(self._device, torch.float64, copy=True))
        return logits

    def arguments(self, x: Tensor) -> dict[Signal, Tensor]:
        """What enters the activations of `local` at inputs, as far as that is known."""
        nodes = self._graph.arguments(x.to(self._device, torch.float64, copy=True))
        return {s: nodes[s.node] for s in self.local.activations() if s.node in nodes}

    @cached_property
    def _unscaled(self) -> NetworkBound:
        """Bounds of the tensors themselves, for bounds that go further."""
        scaled = self.tighten == "balance"
        return bound_network(self._output, self.method, "join") if scaled else self._bound

    @cached_property
    def local(self) -> LocalNetwork:
        """The network as local bounds see it."""
        return LocalNetwork(self._unscaled)

    @cached_property
    @torch.inference_mode(False)
    def smooth(self) -> SmoothRadii:
        """The smooth last layers and their certificates.

        Raises:
            UnsupportedModel: there are none.
        """
        tighten = "join" if self.tighten == "balance" else self.tighten
        head = smooth_head(self._graph, self._output, self._unscaled, self.method, tighten)
        known = self._rounding if self.rounding_is_known else None
        found = SmoothRadii(head, self.method, known)
        if self.precision is not None:
            found.check_rounding()
        return found

    def curvature(self) -> Tensor:
        """Proven bounds ``K (C, C)`` of second derivatives, float64; see `curvature_bound`.

        ``Hess(logit_y - logit_t) >= -K[y, t]`` everywhere, hence ``<= K[t, y]``. Where only the
        last layers are smooth, it is about them, as functions of their inputs.

        Raises:
            UnsupportedModel: no smooth activation behind those whose second derivative is not
                bounded, as that of ReLU.
        """
        return _proven(self.smooth.curvature)

    def applicable(self) -> tuple[str, ...]:
        """The certificates that this network has, from cheap to dear, without ``"best"``."""
        found = ["lipschitz"]
        if self.local.activations():
            found.append("local")
        try:
            _ = self.smooth
        except UnsupportedModel:
            return tuple(found)
        return (*found, "curvature", "dual")

    def certify(
        self, x: Tensor | Iterable[Tensor | Sequence[Tensor]], certificate: str = "lipschitz"
    ) -> Certificate:
        """Predict and certify inputs ``(N, *input_shape)``; see `certify.certificate`.

        With a ``domain`` the radii are about perturbed inputs within it.

        Args:
            x: the inputs; or batches of them, with or without labels, as a `DataLoader` gives
                them (`certify.evaluate` looks at the labels).
            certificate: ``"lipschitz"``: by global bounds; ``"local"``: by what activations of
                straight pieces, as ReLU, can do near each input, which takes longer and is never
                worse (`certify.local`); ``"curvature"``: by the gradient at the input and bounds of
                second derivatives (`certify.second_order`), for smooth networks, never worse;
                ``"dual"``: by duality, usually much larger (`certify.dual`); ``"best"``: the
                largest of those that apply.

        Raises:
            ValueError: inputs of another shape, or outside the domain, or another certificate.
            UnsupportedModel: second derivatives of a network that has none.
        """
        check_certificate(certificate)
        if isinstance(x, Dataset):
            raise ValueError("expected a DataLoader: DataLoader(data, batch_size=500)")
        if not isinstance(x, Tensor):
            found = [self.certify(_inputs(batch), certificate).cpu() for batch in x]
            if not found:
                raise ValueError("there are no inputs to certify")
            return in_a_row(found)
        if certificate == "best":
            return largest_of([self.certify(x, one) for one in self.applicable()])[0]
        one = self._one(x, certificate)
        # The global radius pays for less rounding.
        return largest_of([one, self._one(x, "lipschitz")])[0] if certificate == "local" else one

    def _one(self, x: Tensor, certificate: str) -> Certificate:
        """Certify by one kind, rounding paid for."""
        with torch.no_grad():
            logits = self._logits_within(x)
            x = x.to(self._device, torch.float64)
            classes = logits.argmax(dim=1)
            passes = _LOCAL_PASSES if certificate == "local" else 1
            if self.precision is None:
                known = self.rounding_is_known
                allowance = self._allowance(x, classes, passes=passes) if known else None
                found = self._certified(x, logits, certificate, allowance)
                return Certificate(classes, _where_same(found, classes))
            exact = self._certified(x, logits, certificate, None)
            allowance = self._allowance(x, classes, exact.radius, passes)
            found = self._certified(x, logits, certificate, allowance)
            radius = torch.minimum(_where_same(found, classes), _farthest(exact.radius))
            return Certificate(classes, radius, exact.radius)

    def _certified(
        self, x: Tensor, logits: Tensor, kind: str, allowance: Tensor | None
    ) -> Certificate:
        """Certify with margins that are smaller by allowances ``(N, C)``.

        Where that leaves none, the certificate may be about another class.
        """
        if kind == "dual":
            return self.smooth.dual(x, logits, allowance=allowance).certificate()
        if allowance is not None:
            own = logits.argmax(dim=1, keepdim=True)
            higher = torch.nextafter(logits + allowance, torch.full_like(logits, torch.inf))
            logits = higher.scatter(1, own, logits.gather(1, own))
        margins = self.margin_lipschitz()
        if kind == "local":
            return local_certificate(self.local, self.arguments(x), logits, margins)
        plain = certified_by_margins(logits, margins)
        if kind == "lipschitz":
            return plain
        return largest_of([self.smooth.by_curvature(x, logits), plain])[0]

    def _allowance(
        self, x: Tensor, classes: Tensor, radius: Tensor | None = None, passes: int = 1
    ) -> Tensor:
        """By how much rounding can change margins ``(N, C)``: here, and within a radius."""
        within = None if radius is None else _farthest(radius)
        found = self._rounding.margin_bounds(x, within, self.precision, classes, passes=passes)
        return found.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def dual(self, x: Tensor, *, steps: int = STEPS, early_exit: bool = True) -> DualResult:
        """Bound the distances to all other classes from both sides; see `certify.dual`.

        Args:
            x: the inputs ``(N, *input_shape)``.
            steps: forward-backward passes for each class at most.
            early_exit: skip what cannot change the smallest radius.

        Raises:
            ValueError, UnsupportedModel: as `certify`.
        """
        with torch.no_grad():
            logits = self._logits_within(x)
            x = x.to(self._device, torch.float64)
            classes = logits.argmax(dim=1)
            proven = partial(self.smooth.dual, x, logits, steps=steps, early_exit=early_exit)
            if self.precision is None:
                allowance = self._allowance(x, classes) if self.rounding_is_known else None
                return proven(allowance=allowance)
            exact = proven()
            smallest = exact.lower.amin(dim=1)
            found = proven(allowance=self._allowance(x, classes, smallest))
            lower = torch.minimum(found.lower, _farthest(smallest)[:, None])
            lower.scatter_(1, found.prediction[:, None], torch.inf)
            passes = exact.passes + found.passes
            return replace(found, lower=lower, passes=passes, exact=smallest)

    @cached_property
    def adversary(self) -> Adversary:
        """What attacks this network, within the domain if there is one; see `certify.attack`."""
        network = self._graph.split(self._output.node)[0].eval()
        return Adversary(network, self.input_shape, domain=self.domain)

    def attack(self, x: Tensor, effort: Effort | None = None) -> Tensor:
        """Look for the nearest points of other classes; see `certify.minimum_norm`.

        Args:
            x: the inputs ``(N, *input_shape)``.
            effort: how hard to try.

        Returns:
            ``(N,)`` float64, distances at which the prediction was seen to change, or infinity.
            Nothing is proven by them. ``adversary.nearest(x).points`` are the points.
        """
        adversary = self.adversary if effort is None else self.adversary.with_effort(effort)
        return adversary.nearest(x).distance

    def surely_differs(self, x: Tensor, classes: Tensor) -> Tensor:
        """Whether another logit is the largest at inputs, by more than rounding can do, ``(N,)``.

        Where it is not known how much that is, by more than 1e-9 of the largest one.
        """
        with torch.no_grad():
            x, classes = x.to(self._device, torch.float64), classes.to(self._device)
            logits = self.logits(x)
            if self.rounding_is_known:
                allowance = self._rounding.margin_bounds(x, None, None, classes)
            else:
                allowance = 1e-9 * logits.abs().amax(dim=1, keepdim=True)
            return (logits > logits.gather(1, classes[:, None]) + allowance).any(dim=1)

    def broken(self, x: Tensor, radius: Tensor | float) -> Tensor:
        """Try to change predictions within radii ``(N,)``, or one; see `certify.attack.pgd`.

        Returns:
            ``(N,)`` bool, whether that succeeded.
        """
        radii = torch.as_tensor(radius, dtype=torch.float64).expand(len(x))
        return torch.isfinite(self.adversary.within(x, radii).distance)

    def _logits_within(self, x: Tensor) -> Tensor:
        if self.domain is not None and not _within(x, self.domain):
            raise ValueError(f"expected inputs with entries in {list(self.domain)}")
        return self.logits(x)


def _inputs(batch: Any) -> Tensor:
    """The inputs of a batch that may have labels."""
    inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"expected batches of tensors, got {type(inputs).__name__}; see torch.as_tensor"
        )
    if inputs.ndim == 1 and not inputs.is_floating_point():
        raise ValueError("these are labels: pass the inputs of a batch, or a list of batches")
    return inputs


def check_floating(x: Tensor) -> None:
    """Refuse integers, whose units are not those of the network, with a ``ValueError``."""
    if not isinstance(x, Tensor):
        raise ValueError(f"expected inputs as tensors, got {type(x).__name__}; see torch.as_tensor")
    if not x.is_floating_point():
        raise ValueError(
            f"expected inputs of floating point, got {x.dtype}; for images of bytes x / 255"
        )


def _proven(bound: Tensor) -> Tensor:
    """Return a copy, which the caller may change; refuse a bound that is not a number."""
    if bool(torch.isnan(bound).any()):
        raise ValueError("the Lipschitz bound is NaN; are the weights sane?")
    return bound.clone()


def _farthest(radius: Tensor) -> Tensor:
    """Radii, limited to what leaves numbers to compute with."""
    return radius.clamp_max(2.0**20)


def _where_same(found: Certificate, classes: Tensor) -> Tensor:
    """Radii of these classes; zero where the certificate is about another one."""
    return torch.where(found.prediction == classes, found.radius, 0.0)


def _within(x: Tensor, domain: Sequence[float]) -> bool:
    return bool(((x >= domain[0]) & (x <= domain[1])).all())


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(str(size) for size in shape)
