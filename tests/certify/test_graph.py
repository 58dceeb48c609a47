"""What is refused, what is accepted, and that the traced graph is the module."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from certify import CertifiedModel, UnsupportedModel
from certify.bounding import Bounding, merged
from certify.graph import LipschitzGraph
from certify.norms import NetworkEstimator, proven_norms
from certify.tracing import agree


class Layer(nn.Module):
    """A linear layer, buffers, and a forward to be given by subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("state", torch.zeros(4))
        self.register_buffer("rows", torch.zeros(100, 4))
        self.calls = 0
        self.memory: Any = 0.0


def forward(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    """Make a `Layer` with this forward."""
    return type("Given", (Layer,), {"forward": function})


# --- forwards that must be refused ------------------------------------------------------------


def doubles_its_input_in_place(self: Layer, x: Tensor) -> Tensor:
    y = x
    y += x
    return x


def writes_into_a_chunk(self: Layer, x: Tensor) -> Tensor:
    x.chunk(2, 1)[0].add_(1.0)
    return x


def writes_into_a_slice(self: Layer, x: Tensor) -> Tensor:
    x = self.linear(x)
    x[:, :2].add_(x[:, 2:])
    return x


def keeps_the_value_before_relu_(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    y.relu_()
    return y


def writes_into_a_constant(self: Layer, x: Tensor) -> Tensor:
    rows = torch.zeros(100, 4, dtype=torch.float64)
    rows.narrow(0, 0, x.shape[0]).add_(x)
    return F.relu(x) + rows.narrow(0, 0, x.shape[0])


def writes_into_data_of_a_constant(self: Layer, x: Tensor) -> Tensor:
    rows = torch.zeros(100, 4, dtype=torch.float64)
    rows.data.narrow(0, 0, x.shape[0]).add_(x)
    return F.relu(x) + rows.data.narrow(0, 0, x.shape[0])


def writes_into_a_buffer(self: Layer, x: Tensor) -> Tensor:
    self.rows.narrow(0, 0, x.shape[0]).zero_().add_(x)
    return F.relu(x) + self.rows.narrow(0, 0, x.shape[0])


def assigns_a_buffer(self: Layer, x: Tensor) -> Tensor:
    self.state = self.state + 1.0
    return x


def changes_a_buffer_that_nothing_uses(self: Layer, x: Tensor) -> Tensor:
    self.state.add_(1.0)
    return self.linear(x)


def changes_a_weight_and_restores_it(self: Layer, x: Tensor) -> Tensor:
    self.linear.weight.mul_(8.0)
    y = self.linear(x)
    self.linear.weight.mul_(0.125)
    return y


def changes_a_weight_through_a_result(self: Layer, x: Tensor) -> Tensor:
    """No value tells afterwards, and no overwritten tensor is used."""
    eightfold = self.linear.weight.mul_(8.0)
    y = self.linear(x)
    eightfold.mul_(0.125)
    return y


def changes_data_of_a_buffer(self: Layer, x: Tensor) -> Tensor:
    """No version counter tells."""
    self.state.data.add_(1.0)
    return self.linear(x)


def changes_its_statistics(self: Layer, x: Tensor) -> Tensor:
    """Each call has a larger gain than the one before, too small to be seen next to a bias."""
    self.norm.running_var.mul_(1.0 - 1e-9)
    return self.norm(x) + 1e3


def counts_calls(self: Layer, x: Tensor) -> Tensor:
    self.calls += 1
    return x + self.calls


def remembers(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x) + self.memory
    self.memory = x
    return y


def trains_in_forward(self: Layer, x: Tensor) -> Tensor:
    self.norm.train()
    return self.norm(x)


def drops_at_random(self: Layer, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True)


def adds_noise(self: Layer, x: Tensor) -> Tensor:
    return x + torch.randn(4)


def branches(self: Layer, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else self.linear(x)


def branches_where_tracing_does_not_look(self: Layer, x: Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.max() > 20:
        return self.linear(x + x)
    return self.linear(x)


def reads_a_number(self: Layer, x: Tensor) -> Tensor:
    return x + float(x[0, 0])


def loops_over_samples(self: Layer, x: Tensor) -> Tensor:
    return torch.stack([self.linear(row) for row in x])


def makes_a_layer(self: Layer, x: Tensor) -> Tensor:
    return nn.ReLU()(x)


def swaps_the_weight(self: Layer, x: Tensor) -> Tensor:
    weight = 3.0 * torch.ones(4, 4, dtype=torch.float64)
    result = torch.func.functional_call(self.linear, {"weight": weight}, (x,))
    assert isinstance(result, Tensor) or result is not None
    return result


class StaysInTraining(Layer):
    def train(self, mode: bool = True) -> StaysInTraining:
        super().train(True)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class CallsTwice(nn.Linear):
    """The forward of a linear layer, but not its call."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + super().__call__(x)


class BendsFarAway(Layer):
    def __call__(self, x: Tensor) -> Any:
        y = super().__call__(x)
        return 100 * y if isinstance(x, Tensor) and x.abs().max() > 50 else y

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class SteepReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * super().forward(x)


class SteepConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * super().forward(x)


def with_hook(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()))
        if register == "forward":
            model[1].register_forward_hook(lambda module, args, result: 100 * result)
        elif register == "pre":
            model[1].register_forward_pre_hook(lambda module, args: (100 * args[0],))
        else:
            model.register_forward_hook(
                lambda module, args, kwargs, result: 100 * result, with_kwargs=True
            )
        return model

    return make


def patched(container: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()))
        module = model[1] if container else model[1][0]
        module.forward = types.MethodType(lambda self, x: 100 * x, module)
        return model

    return make


def parametrized(parametrize: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(parametrize(nn.Linear(4, 4)), nn.ReLU())
        model(torch.zeros(2, 4))  # the older ones leave a tensor behind that cannot be copied
        return model

    return make


def keeps_its_features() -> nn.Module:
    def run(self: Layer, x: Tensor) -> Tensor:
        self.memory = self.linear(x)
        return self.memory.relu()

    model = forward(run)()
    model(torch.zeros(2, 4))
    return model


def with_complex_buffer() -> nn.Module:
    model = forward(lambda self, x: x + self.phase)()
    model.register_buffer("phase", torch.ones(4) * 1j)
    return model


REFUSED: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str]] = [
    # Operations without a rule, and those that cannot have one.
    (
        "softmax",
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)),
        (4,),
        r"node '1': .*Softmax: .*margins",
    ),
    ("nested", lambda: nn.Sequential(nn.Sequential(nn.Hardshrink())), (4,), "node '0.0': .*contin"),
    (
        "unknown",
        lambda: nn.Sequential(nn.FractionalMaxPool2d(2, 2)),
        (1, 4, 4),
        "'0': no Lip.*Frac",
    ),
    (
        "layer norm",
        lambda: nn.LayerNorm(4),
        (4,),
        "node 'the model itself': .*LayerNorm: it divides",
    ),
    ("attention", forward(lambda s, x: nn.MultiheadAttention(4, 1)(x, x, x)[0]), (2, 4), "."),
    ("square", forward(lambda s, x: x * x), (4,), "node 'mul': a product of two tensors"),
    ("quotient", forward(lambda s, x: 1.0 / x), (4,), "node 'truediv': division by a tensor"),
    ("function", forward(lambda s, x: F.softmax(x, 1)), (4,), "softmax'?: .*softmax: .*margins"),
    ("method", forward(lambda s, x: x.exp()), (4,), "tensor method 'exp'"),
    # Modules that are not what their type says.
    ("own __call__ of the model", BendsFarAway, (4,), "does not compute"),
    ("hook", with_hook("forward"), (4,), "module '1' .*forward hooks"),
    ("pre-hook", with_hook("pre"), (4,), "module '1' .*forward hooks"),
    ("hook on the model", with_hook("model"), (4,), "the model itself.*forward hooks"),
    ("patched layer", patched(container=False), (4,), "module '1.0' .*'forward' replaced"),
    ("patched container", patched(container=True), (4,), "module '1' .*'forward' replaced"),
    ("functional call", forward(swaps_the_weight), (4,), "does not compute|cannot be traced"),
    ("lazy", lambda: nn.Sequential(nn.LazyLinear(3)), (4,), "hooks|uninitialized"),
    ("unregistered", forward(makes_a_layer), (4,), "not installed as a submodule"),
    # Samples of a batch that touch each other.
    ("batch statistics", lambda: nn.BatchNorm1d(4, track_running_stats=False), (4,), "."),
    ("stays in training", StaysInTraining, (4,), "in training mode despite"),
    ("trains in forward", forward(trains_in_forward), (4,), "'norm' is in training mode"),
    ("x - x.mean(0)", forward(lambda s, x: x - x.mean(0)), (4,), "other samples"),
    ("x + x.flip(0)", forward(lambda s, x: x + x.flip(0)), (4,), "other samples"),
    ("flatten(0)", forward(lambda s, x: x.flatten(0).reshape(-1, 4)), (4,), "mixes the samples"),
    ("nn.Flatten(0)", lambda: nn.Sequential(nn.Flatten(0), nn.Linear(12, 4)), (4,), "."),
    ("reshape", forward(lambda s, x: x.reshape(-1, 2).reshape(-1, 4)), (4,), "loses the batch"),
    ("view of a fixed batch", forward(lambda s, x: x.view(3, 4)), (4,), "."),
    ("x + x[0]", forward(lambda s, x: x + x[0]), (4,), "other samples|slices"),
    ("x + first of ...", forward(lambda s, x: x + x[..., 0, :]), (4,), "other samples|slices"),
    (
        "first sample, well hidden",  # alone, sample 0 looks right
        forward(lambda s, x: (x[:, 0] + x[..., 0, :, :]).reshape(x.shape[0], -1)[:, :3]),
        (5, 3),
        "other samples|does not fit",
    ),
    (
        "batch size in the arithmetic",
        forward(lambda s, x: torch.add(x, x, alpha=(x.shape[0] - 1) * (x.shape[0] - 5) * 9 + 1)),
        (4,),
        "other samples|cannot be traced",
    ),
    # A graph that is not the forward.
    ("y = x; y += x; return x", forward(doubles_its_input_in_place), (4,), "in place|compute"),
    ("chunk then add_", forward(writes_into_a_chunk), (4,), "'output' uses 'x' after .* in place"),
    ("slice then add_", forward(writes_into_a_slice), (4,), "after it was modified in place"),
    ("relu_", forward(keeps_the_value_before_relu_), (4,), "'linear' after it was modified"),
    ("residual after in-place ReLU", lambda: InPlaceResidual(), (4,), "modified in place"),
    (
        "write into a constant",
        forward(writes_into_a_constant),
        (4,),
        "compute|modifies|cannot be traced",
    ),
    (
        "write into its data",
        forward(writes_into_data_of_a_constant),
        (4,),
        "compute|modifies|cannot be traced",
    ),
    ("write into a buffer", forward(writes_into_a_buffer), (4,), "modifie"),
    ("buffer assigned", forward(assigns_a_buffer), (4,), "assigns its buffers|cannot be traced"),
    ("buffer changed", forward(changes_a_buffer_that_nothing_uses), (4,), "modifies tensors"),
    ("weight changed", forward(changes_a_weight_and_restores_it), (4,), "modifie"),
    ("weight, by a result", forward(changes_a_weight_through_a_result), (4,), "modifies tensors"),
    ("data of a buffer", forward(changes_data_of_a_buffer), (4,), "modifies tensors"),
    (
        "statistics changed",
        forward(changes_its_statistics),
        (4,),
        "modifies tensors|does not compute",
    ),
    ("counter", forward(counts_calls), (4,), "does not compute"),
    ("memory", forward(remembers), (4,), "."),
    ("random dropout", forward(drops_at_random), (4,), "does not compute|other samples"),
    ("noise", forward(adds_noise), (4,), "does not compute"),
    ("branch", forward(branches), (4,), "control flow must not depend"),
    ("hidden branch", forward(branches_where_tracing_does_not_look), (4,), "does not compute"),
    ("number", forward(reads_a_number), (4,), "cannot be traced"),
    ("loop", forward(loops_over_samples), (4,), "cannot be traced"),
    # Results and models of another kind.
    ("tuple", forward(lambda s, x: (x, x)), (4,), "must return one tensor"),
    ("dict", forward(lambda s, x: {"logits": x}), (4,), "must return one tensor"),
    ("number result", forward(lambda s, x: x.sum()), (4,), "other samples"),
    ("integers", forward(lambda s, x: x.view(torch.int64)), (4,), "real numbers"),
    ("complex result", forward(lambda s, x: x + 1j), (4,), "real numbers"),
    ("complex buffer", with_complex_buffer, (4,), "'phase' is complex"),
    ("constant", forward(lambda s, x: s.linear.weight), (4,), "other samples|depend on the input"),
    ("images as logits", lambda: nn.ReLU(), (2, 4), r"expected logits \(N, C\)"),
    ("kept features", keeps_its_features, (4,), "tensors of a forward pass"),
    ("meta device", lambda: nn.Linear(4, 4, device="meta"), (4,), "no data"),
    ("data parallel", lambda: nn.DataParallel(nn.Linear(4, 4)), (4,), "DataParallel"),
    ("compiled", lambda: torch.compile(nn.Sequential(nn.Linear(4, 4))), (4,), "compiled; certify"),
]


class InPlaceResidual(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.relu(y)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("make", "shape", "reason"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    torch.manual_seed(0)
    with pytest.raises((UnsupportedModel, ValueError), match=reason) as raised:
        CertifiedModel(make(), shape)
    # Wrong sizes are the only ValueErrors here: a batch of one that BatchNorm or view refuses.
    assert raised.type is UnsupportedModel or "does not fit" in str(raised.value)


def test_script_modules_are_refused() -> None:
    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(UnsupportedModel, match="TorchScript"):
        CertifiedModel(Scripted(), (4,))


def test_global_hooks_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: None)
    try:
        with pytest.raises(UnsupportedModel, match="global forward hooks"):
            CertifiedModel(nn.Linear(2, 2), (2,))
    finally:
        handle.remove()


@pytest.mark.parametrize("shape", [(5,), (-4,), (4.0,), 4, (), (2, 2), ("4",)])
def test_wrong_input_shapes(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"input.shape"):
        CertifiedModel(nn.Linear(4, 2), shape)


def test_a_graph_that_the_checks_cannot_catch_by_values() -> None:
    """Outputs of 1e-9 must be compared on their own scale, not to an absolute tolerance."""

    def run(self: Layer, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) if self.calls % 2 else self.linear(x + x)

    model = forward(run)()
    with torch.no_grad():
        model.linear.weight *= 1e-9
        model.linear.bias.zero_()
    with pytest.raises(UnsupportedModel, match="does not compute"):
        CertifiedModel(model, (4,))


def proven(graph: LipschitzGraph) -> Tensor:
    bounding = Bounding(merged(graph.walk()))
    norms = proven_norms(bounding.operators(), "fantastic_four")
    return bounding.evaluate(norms)[bounding.output]


# --- models that must be accepted -------------------------------------------------------------


class Residual(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.linear(x)))


class Shared(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.linear(F.relu(y)) + y


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y += x  # nothing uses the former y again
        return y.relu_()


class Optional(Layer):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *rest: Any, **more: Any
    ) -> Tensor:
        if mask is not None:
            x = x + mask
        return self.linear(x) + scale + len(rest) + len(more)


class ByTraining(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * x if self.training else self.linear(x)


class Shapes(Layer):
    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape
        y = x.view(n, 2, c // 2).flatten(1)
        return self.linear(y.reshape(x.size(0), -1)) + self.linear.weight[0] + self.state


class Forward(Layer):
    """Calls ``forward`` itself, and keeps a layer in a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ReLU(), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class IntegersFirst(nn.Module):
    """The only buffers are integers: the example must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + self.index


ACCEPTED: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("layer", lambda: nn.Linear(4, 3), (4,)),
    ("activation", nn.Tanh, (4,)),
    ("empty", nn.Sequential, (4,)),
    ("residual", Residual, (4,)),
    ("shared", Shared, (4,)),
    ("in place, rightly", InPlace, (4,)),
    ("optional arguments", Optional, (4,)),
    ("other forward in training", ByTraining, (4,)),
    ("shapes", Shapes, (4,)),
    ("list of layers", Forward, (4,)),
    ("integers first", IntegersFirst, (4,)),
    ("graph module", lambda: torch.fx.symbolic_trace(Residual().eval()), (4,)),
    ("one layer twice", lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2), (4,)),
    ("spectral norm in a hook", parametrized(nn.utils.spectral_norm), (4,)),
    ("weight norm in a hook", parametrized(nn.utils.weight_norm), (4,)),
    ("pruned", parametrized(lambda m: prune.l1_unstructured(m, "weight", 1)), (4,)),
    ("spectral norm", parametrized(parametrizations.spectral_norm), (4,)),
    ("weight norm", parametrized(parametrizations.weight_norm), (4,)),
    ("orthogonal", parametrized(parametrizations.orthogonal), (4,)),
    ("own __call__", lambda: nn.Sequential(CallsTwice(4, 4)), (4,)),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("make", "shape"), [a[1:] for a in ACCEPTED], ids=[a[0] for a in ACCEPTED])
def test_accepted(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    certified = CertifiedModel(model, shape)
    x = torch.randn(200, *shape, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)
    torch.testing.assert_close(model.double()(x.clone()), certified.logits(x.clone()))
    change = (certified.logits(x.clone()) - certified.logits(y.clone())).norm(dim=1)
    bound = certified.lipschitz().item()
    assert (change / (x - y).norm(dim=1)).max().item() <= bound
    assert bound <= 10.0


@pytest.mark.parametrize(
    ("make", "shape"),
    [(SteepReLU, (4,)), (lambda: nn.Sequential(SteepConv(1, 1, 1), nn.Flatten()), (1, 2, 2))],
)
def test_a_subclass_is_what_its_forward_does(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = make()
    weight = next(model.parameters(), torch.ones(1)).abs().item()
    bound = CertifiedModel(model, shape).lipschitz().item()
    assert 100 * weight <= bound <= 100 * weight * (1 + 1e-6)


def test_bounds_of_branches_add_and_of_layers_multiply() -> None:
    model = Residual()
    with torch.no_grad():
        model.linear.weight.copy_(torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])))
    assert CertifiedModel(model, (4,)).lipschitz().item() == pytest.approx(4.0, rel=1e-4)
    both = nn.Sequential(model, model)
    assert CertifiedModel(both, (4,)).lipschitz().item() == pytest.approx(16.0, rel=1e-4)


def test_layers_without_an_activation_between_them_multiply() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    with torch.no_grad():
        for layer, factor in zip(model, (2.0, 3.0, 5.0), strict=True):
            layer.weight.copy_(factor * torch.eye(3))
    certified = CertifiedModel(model, (3,))
    assert certified.lipschitz().item() == pytest.approx(30.0)
    assert certified.margin_lipschitz()[0, 1].item() == pytest.approx(30.0 * 2.0**0.5)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(Residual(), nn.Dropout(), nn.Linear(4, 3))
    model.train()
    model[0].norm.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()

    graph = LipschitzGraph(model, (4,))
    proven(graph)

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random)


def test_training_modes_are_restored_after_a_refusal() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Tanh()))
    model[1].eval()
    with pytest.raises(ValueError, match="does not fit"):
        LipschitzGraph(nn.Sequential(model, nn.Linear(3, 3)), (4,))
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_walk_follows_the_weights() -> None:
    """The graph refers to the module, whose weights change in training."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graph = LipschitzGraph(model, (4,))
    before = proven(graph)
    with torch.no_grad():
        model[0].weight *= 2
    after = proven(graph)
    assert after.item() == pytest.approx(2 * before.item(), rel=1e-9)


def test_bounds_of_the_walk_have_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    bound = proven(LipschitzGraph(model, (4,)))
    bound.backward()
    for name in ("0.weight", "1.weight", "3.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


# --- control flow on sizes --------------------------------------------------------------------


def asserts_its_sizes(self: Layer, x: Tensor) -> Tensor:
    assert x.size(1) == 4
    if x.shape[-1] != 4 or len(x.shape) != 2 or x.ndim > 2:
        raise ValueError
    return self.linear(x)


def loops_over_features(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    return torch.stack([y[:, i] * (i + 1) for i in range(x.shape[1])], 1)


def grows_to_a_multiple(self: Layer, x: Tensor) -> Tensor:
    missing = -x.shape[1] % 6
    return F.pad(x, (0, int(missing))) if missing else x


def chooses_by_its_batch(self: Layer, x: Tensor) -> Tensor:
    return self.linear(x) if x.shape[0] > 1 else 2 * self.linear(x)


@pytest.mark.parametrize("function", [asserts_its_sizes, loops_over_features, grows_to_a_multiple])
def test_sizes_may_decide(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = forward(function)()
    certified = CertifiedModel(model, (4,))
    x = torch.randn(50, 4, dtype=torch.float64)
    y = x + torch.randn_like(x)
    torch.testing.assert_close(certified.logits(x), certified.model(x))
    change = (certified.logits(x) - certified.logits(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert change.max().item() <= certified.lipschitz().item()


@pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float64).min])
def test_a_masked_class_hides_no_difference_in_the_others(mask: float) -> None:
    """A forward that does something else where it is traced, with a class that is masked."""

    def masked(self: Layer, x: Tensor) -> Tensor:
        y = self.linear(x) * (3.0 if type(x) is Tensor else 1.0)
        return y.masked_fill(torch.arange(4) == 0, mask)

    with pytest.raises(UnsupportedModel, match="traced graph does not compute"):
        CertifiedModel(forward(masked)(), (4,))


@pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float64).min, -torch.inf])
def test_agreement_is_of_each_class_beside_those_of_its_size(mask: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64)
    rounded = logits * (1.0 + 1e-14 * torch.randn_like(logits))
    changed = logits.clone()
    changed[0, 1] += 1e-9
    for hidden in ([], [0], [2, 3, 4, 5, 6]):
        for x in (logits, rounded, changed):
            x[:, hidden] = mask
        assert agree(rounded, logits)
        assert not agree(changed, logits)


class Noisy(nn.Module):
    """Weights that are others each time."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1.0 + self.amount * torch.randn_like(weight))


@pytest.mark.parametrize(
    ("dtype", "classes", "mask"),
    [
        (torch.float32, 1000, 0.0),
        (torch.float32, 10, -1e6),
        (torch.float32, 10, -1e30),
        (torch.float16, 1000, 0.0),
        (torch.bfloat16, 1000, 0.0),
    ],
    ids=str,
)
def test_weights_that_change_are_noticed_in_all_precisions(
    dtype: torch.dtype, classes: int, mask: float
) -> None:
    torch.manual_seed(0)
    first = nn.Linear(12, 32)
    parametrize.register_parametrization(first, "weight", Noisy(1.0))
    last = nn.Linear(32, classes)
    with torch.no_grad():
        last.bias[0] += mask
    model = nn.Sequential(first, nn.ReLU(), last).to(dtype)
    with pytest.raises(UnsupportedModel, match="not the same each time"):
        CertifiedModel(model, (12,))


class Small(nn.Module):
    """A class whose logit is nothing but rounding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(6, 16), nn.Linear(16, 4), kind
        with torch.no_grad():
            self.last.weight[3], self.last.bias[3] = 0.5, 0.0
            self.last.weight[2], self.last.bias[2] = 0.0, 1e4

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.kind == "centred":
            return self.last(h - h.mean(1, keepdim=True))
        logits = self.last(h)
        if self.kind == "relative":
            return logits - torch.logsumexp(logits, 1, keepdim=True)
        one = (logits[:, :1] + logits[:, 1:2]) - logits[:, :1] - logits[:, 1:2]
        return torch.cat([logits[:, :3], one], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["centred", "relative", "cancelled"])
def test_logits_that_are_nothing_but_rounding_are_no_difference(
    kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    CertifiedModel(Small(kind).to(dtype), (6,))


def test_the_size_of_the_batch_may_not() -> None:
    with pytest.raises(UnsupportedModel, match="cannot be traced"):
        CertifiedModel(forward(chooses_by_its_batch)(), (4,))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.linear(x) * (x.shape[0] // 6 * 100 + 1),
        lambda self, x: self.linear(x) * (x.size(0) // 6 * 100 + 1) + 1e12,
        lambda self, x: self.linear(x) * (x.numel() // 24 * 100 + 1),
        lambda self, x: self.linear(x) * (torch.numel(x) // 24 * 100 + 1),
        lambda self, x: self.linear(x) * (x.numel() // x.shape[1] // 6 * 100 + 1),
        lambda self, x: self.linear(x) * ((x.shape + (1,))[0] // 6 * 100 + 1),  # noqa: RUF005
        lambda self, x: self.linear(x) * (x.shape[::-1][1] // 6 * 100 + 1),
        lambda self, x: self.linear(x) * (1 + torch.full((1,), x.shape[0] // 6)),
        lambda self, x: self.linear(x).reshape(-1, x.shape[0] // 6 * 5 + 4),
        lambda self, x: torch.roll(self.linear(x), x.shape[0] // 6, 1),
        lambda self, x: torch.roll(self.linear(x), 40),
        lambda self, x: torch.roll(self.linear(x), shifts=40) + 1e14,
        lambda self, x: self.linear(x).flip(0, 1) + 1e14,
        lambda self, x: self.linear(x).flip([1, 0]) + 1e14,
        lambda self, x: self.linear(x) * jump(x.shape[:1][-1]),
        lambda self, x: self.linear(x) * jump(x.size()[:1][-1:][0]),
        lambda self, x: self.linear(x) * jump((x.shape + (3,))[-3]),  # noqa: RUF005
        lambda self, x: self.linear(x) * jump((x.shape[1:] + (x.shape[0],))[-1]),  # noqa: RUF005
        lambda self, x: self.linear(x) * jump(torch.ones((x.shape[0],)).sum()),
        lambda self, x: self.linear(x) * jump(self.linear.bias[:1].expand(x.shape[0], -1).sum()),
        lambda self, x: self.linear(x) * jump(self.linear.weight[:1].repeat(len_(x), 1).sum()),
        lambda self, x: self.linear(x) * (1 + torch.ones((x.shape[0], 1))[5:].sum() * 100),
        lambda self, x: self.linear(x) * jump(torch.zeros((x.shape[0], 3)).t().shape[1]),
        lambda self, x: self.linear(x) * jump(torch.zeros((x.shape[0],))[None].shape[1]),
        lambda self, x: self.linear(x) * jump(torch.zeros(x.shape[::-1]).shape[1]),
        lambda self, x: self.linear(x) * jump(int(torch.zeros((len_(x), 3)).t().shape[1])),
        lambda self, x: self.linear(x) * jump(quotient(torch.zeros((len_(x), 1)))),
    ],
)
def test_the_size_of_a_batch_may_not_be_computed_with(function: Callable[..., Any]) -> None:
    """Where it shows in no batch of the examples, which have one, two or five samples.

    Torch 2.6 does not trace some of them at all.
    """
    with pytest.raises(UnsupportedModel, match=r"batch|cannot be traced"):
        CertifiedModel(forward(function)(), (4,))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.linear(x).view(x.size(0), -1),
        lambda self, x: self.linear(x).view(x.shape[0], 2, 2).flatten(1),
        lambda self, x: self.linear(x).reshape(x.shape),
        lambda self, x: self.linear(x).reshape(x.shape[:1] + (2, 2)).flatten(1),  # noqa: RUF005
        lambda self, x: torch.cat([self.linear(x), self.linear.weight[:1].expand(len_(x), -1)], 1),
        lambda self, x: torch.cat([self.linear(x), self.linear.weight[:1].repeat(len_(x), 1)], 1),
        lambda self, x: self.linear(x) * x.shape[1] * self.linear.weight.shape[0],
        lambda self, x: self.linear(x).view(-1, x.shape[1:].numel()),
        lambda self, x: torch.cat([self.linear.weight[:1].expand(len_(x), -1) + 1.0, x], 1),
    ],
)
def test_the_size_of_a_batch_may_be_that_of_a_result(function: Callable[..., Any]) -> None:
    certified = CertifiedModel(forward(function)(), (4,))
    x = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(certified.logits(x), certified.model(x))


def len_(x: Tensor) -> int:
    return x.shape[0]


def jump(number: Any) -> Any:
    return number // 6 * 100 + 1


def quotient(constant: Tensor) -> Any:
    return constant.numel() // constant.stride()[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.linear(x) * {64: 100.0}.get(x.shape[0], 1.0),
        lambda self, x: self.linear(x) * {(64, 4): 100.0}.get(tuple(x.shape), 1.0),
        lambda self, x: self.linear(x) * (1.0 if x.shape[0] not in {64} else 100.0),
    ],
)
def test_no_table_may_ask_for_the_size_of_a_batch(function: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be traced"):
        CertifiedModel(forward(function)(), (4,))


def test_parametrisations_of_the_original_survive() -> None:
    """Copies share the class that ``parametrize`` makes; the original keeps its weights."""
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.ReLU())
    before = model[0].weight.detach().clone()
    certified = CertifiedModel(model, (4,))
    assert torch.equal(model[0].weight, before)
    assert type(certified.model[0]) is nn.Linear
    assert certified.lipschitz().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(certified.model[0].weight, before.double())


def test_parametrised_weights_can_be_estimated_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    estimate = NetworkEstimator(model.train(), (4,))(30).lipschitz()
    assert estimate.item() == pytest.approx(
        CertifiedModel(model, (4,)).lipschitz().item(), rel=1e-3
    )
    estimate.backward()
    assert model[0].parametrizations.weight.original0.grad is not None


def chooses_by_a_large_batch(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    return 1000 * y if x.shape[0] > 7 else y


def chooses_by_its_entries(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    return 1000 * y if x.numel() > 100 else y


def chooses_by_a_shape(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    return 1000 * y if x.shape == (9, 4) else y


def chooses_by_an_unpacked_batch(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    n, _ = x.size()
    return 1000 * y if n > 7 else y


def chooses_by_a_looped_shape(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    return 1000 * y if [s for s in x.shape][0] > 7 else y  # noqa: C416, RUF015


def chooses_by_a_far_axis(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    return 1000 * y if x.size(-2) > 7 or x.shape[-2:][0] > 7 else y


@pytest.mark.parametrize(
    "function",
    [
        chooses_by_a_large_batch,
        chooses_by_its_entries,
        chooses_by_a_shape,
        chooses_by_an_unpacked_batch,
        chooses_by_a_looped_shape,
        chooses_by_a_far_axis,
    ],
)
def test_no_size_of_a_batch_may_decide(function: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot be traced|batch"):
        CertifiedModel(forward(function)(), (4,))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: (x * 1j).abs(),
        lambda self, x: torch.cos(x * (1 + 1j)).abs(),
        lambda self, x: torch.view_as_real(torch.complex(x, x)).flatten(1),
    ],
)
def test_complex_numbers_on_the_way_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModel, match="complex"):
        CertifiedModel(forward(function)(), (4,))


# --- weights that are computed ----------------------------------------------------------------


def lipschitz_of(model: nn.Module) -> float:
    return CertifiedModel(model, (4,)).lipschitz().item()


def test_pruning_one_of_two_tied_layers() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    prune.l1_unstructured(first, "weight", 0.6)
    product = (first.weight @ first.weight_orig).detach().double()
    exact = torch.linalg.matrix_norm(product, ord=2).item()
    assert lipschitz_of(nn.Sequential(second, first)) >= exact
    assert bool((second.weight != 0).all())  # the original is left alone


class Tenfold(prune.L1Unstructured):
    def __call__(self, module: nn.Module, inputs: Any) -> None:
        super().__call__(module, inputs)
        module.weight = 10 * module.weight


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.rand_like(weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_computed_weights_that_cannot_be_folded() -> None:
    tenfold = nn.Linear(4, 4)
    Tenfold.apply(tenfold, "weight", 1)
    with pytest.raises(UnsupportedModel, match=r"hooks|cannot be copied"):
        lipschitz_of(nn.Sequential(tenfold))

    noisy = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(noisy, "weight", Noise(), unsafe=True)
    with pytest.raises(UnsupportedModel, match="not the same each time"):
        lipschitz_of(nn.Sequential(noisy))

    nested = nn.utils.weight_norm(nn.Linear(4, 4))
    prune.l1_unstructured(nested, "weight_v", 2)
    nested(torch.zeros(1, 4))
    exact = torch.linalg.matrix_norm(nested.weight.detach().double(), ord=2).item()
    assert lipschitz_of(nn.Sequential(nested)) == pytest.approx(exact, rel=1e-6)


def test_sizes_behind_modules_are_worked_out_without_being_traced() -> None:
    """Layers run on the example while the trace is under way; they must not be recorded."""

    def run(self: Layer, x: Tensor) -> Tensor:
        y = self.norm(F.relu(self.linear(x)))
        assert y.shape[1] == 4
        return self.linear(y) if y.ndim == 2 else y

    graph = LipschitzGraph(forward(run)(), (4,))
    bounding = Bounding(graph.walk())
    assert len(bounding.layers()) == 2
    with pytest.raises(UnsupportedModel, match="cannot be traced"):
        CertifiedModel(forward(lambda s, x: s.linear(torch.zeros(x.shape[0], 4) + x))(), (4,))


def test_results_are_compared_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which GPUs compute float32 convolutions in, by default: by other steps for other batches."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, torch.fx.Proxy):
                seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    CertifiedModel(nn.Sequential(Watched(4, 2)), (4,))
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32
