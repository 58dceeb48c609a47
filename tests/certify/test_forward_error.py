"""Errors of the forward pass: never beyond the bound, for every operation that has a rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from certify import CertifiedModel, UnsupportedModel
from certify.forward_error import ForwardError
from certify.graph import LipschitzGraph
from certify.norms import proven_norms
from certify.precision import PRECISIONS, precision
from certify.rules.registry import ROUNDINGS
from certify.signal import UnknownRounding
from tests.certify.rules.harness import Apply, Case
from tests.certify.rules.test_registry import FILES

CASES: list[Case] = [case for file in FILES for case in file.CASES]
KNOWN = [case for case in CASES if all(key in ROUNDINGS for key in case.operations)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def certified_and_error(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[CertifiedModel, ForwardError]:
    certified = CertifiedModel(model, shape)
    return certified, ForwardError(certified._graph, certified._output, certified._norms)


def check_errors(model: nn.Module, shape: tuple[int, ...], name: str) -> None:
    """Compare the errors of a float32 network in some precision with their bounds."""
    certified, bounds = certified_and_error(model, shape)
    rounded = copy.deepcopy(model).to(DTYPES[name]).eval()
    for scale in (1e-3, 1.0, 30.0):
        x = scale * torch.randn(20, *shape)
        radius = 0.1 * scale * torch.ones(20)
        ways = torch.randn(20, *shape)
        length = 0.99 * radius / ways.flatten(1).norm(dim=1)
        moved = x + length.reshape(-1, *[1] * len(shape)) * ways
        found, _ = bounds.bounds(x.double(), radius.double(), precision(name))
        with torch.no_grad():
            result = rounded(moved.to(DTYPES[name], copy=True)).double()
            exact = certified.logits(moved)
        assert bool(((result - exact).norm(dim=1) <= found).all()), scale


BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": lambda x: x,
    "behind a product": lambda x: 1.1 * x,
    "behind a shifted tanh": lambda x: torch.tanh(1.1 * x) + 1.0,
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.name)
def test_errors_stay_within_their_bounds(case: Case, name: str, before: str) -> None:
    torch.manual_seed(0)
    layers = [Apply(BEFORE[before]), case.make(), nn.Flatten(), Apply(lambda x: x + 0.7)]
    model = nn.Sequential(*layers).float().eval()
    try:
        with torch.no_grad():
            copy.deepcopy(model).to(DTYPES[name])(torch.zeros(2, *case.shape, dtype=DTYPES[name]))
    except RuntimeError as reason:
        pytest.skip(f"torch does not compute it in {name}, or with its float64 constants: {reason}")
    try:
        certified_and_error(model, case.shape)
        check_errors(model, case.shape, name)
    except UnsupportedModel as reason:
        known = (
            "gives other results in float64",
            "how much the mode",
            "which entries are the nearest",
        )
        if not any(text in str(reason) for text in known):
            raise
        pytest.skip(str(reason))


@pytest.mark.parametrize("certificate", ["lipschitz", "local", "curvature", "dual", "best"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_radii_shrink_by_what_rounding_costs(certificate: str, name: str) -> None:
    torch.manual_seed(0)
    activation = "relu" if certificate == "local" else "softplus"
    model = models.build("mlp", hidden=(20,), input_shape=(1, 3, 3), activation=activation)
    x = torch.rand(30, 1, 3, 3)
    exact = CertifiedModel(model, (1, 3, 3)).certify(x, certificate)
    found = CertifiedModel(model, (1, 3, 3), precision=name).certify(x, certificate)
    assert torch.equal(found.prediction, exact.prediction)
    assert bool((found.radius <= exact.radius).all())
    if name == "bfloat16":
        return
    limit = {"float64": 1e-11, "float32": 1e-3, "tf32": 0.3}[name]
    if certificate in ("dual", "best"):
        limit = max(limit, 1e-3)  # it ends its search when it is near enough to what can be proven
    assert bool((found.radius >= exact.radius - limit).all())
    assert bool((found.radius < exact.radius)[exact.radius > 0].all())


def test_a_network_without_a_margin_is_not_certified() -> None:
    """Margins below what float32 resolves, so that its predictions are those of chance."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
        model[1].bias.fill_(1e6)
    x = torch.tensor([[[[0.5, 0.49], [0.0, 0.0]]]])
    exact = CertifiedModel(model, (1, 2, 2)).certify(x)
    assert exact.radius.item() == pytest.approx(0.01 / 2**0.5, rel=1e-5)
    assert CertifiedModel(model, (1, 2, 2), precision="float64").certify(x).radius.item() > 0.007
    found = CertifiedModel(model, (1, 2, 2), precision="float32").certify(x)
    assert found.radius.item() == 0.0
    assert found.prediction.item() == 0


def test_what_is_not_known_is_refused() -> None:
    model = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten())
    assert CertifiedModel(model, (1, 2, 2)).lipschitz() > 0
    with pytest.raises(UnsupportedModel, match=r"node '0': it is not known how much .* can round"):
        CertifiedModel(model, (1, 2, 2), precision="float32")
    with pytest.raises(ValueError, match="expected precision to be one of float64, float32"):
        CertifiedModel(model, (1, 2, 2), precision="float8")


def test_sums_of_constants_do_not_hide_what_was_rounded_before() -> None:
    """Steep rows, whose roundings decide: a shift behind a clamp is a signal of its own."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(400, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(self.a(x), -1, 1) - 0.5

    torch.manual_seed(0)
    model = Steep()
    model.a.weight.data = 1e6 * torch.randn(3, 400)
    model.a.bias.data.zero_()
    weight = model.a.weight.data.double()
    x = torch.randn(8, 400).double()
    x = (x - (x @ weight.T) @ torch.linalg.inv(weight @ weight.T) @ weight).float()
    found = CertifiedModel(model, (400,), precision="float32").certify(x)
    wrong = model(x).argmax(dim=1) != found.prediction
    assert wrong.any()
    assert not found.radius[wrong].any()


IMAGES = (2, 5, 5)
SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "a shift beside its origin": lambda h: torch.cat([h.sigmoid(), h.sigmoid() + 1.0], 1),
    "their sum": lambda h: torch.relu(h) + (torch.relu(h) + 1.0),
    "a gate": lambda h: h * F.relu6(h + 3.0),
    "circular padding": lambda h: F.conv2d(
        F.pad(h, (1, 1, 1, 1), mode="circular"), torch.full((1, 2, 3, 3), 0.1)
    ),
    "reduced to one number": lambda h: h.sum((1, 2, 3)).unsqueeze(1),
    "taken apart": lambda h: h.flatten(1).unbind(1)[3][:, None],
    "named arguments": lambda h: torch.sum(input=h, dim=2) / 1.1,
    "no entries": lambda h: h.flatten(1)[:, :0],
}


@pytest.mark.parametrize("name", SHARED)
def test_errors_of_networks_with_shared_tensors(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.register_buffer("kernel", torch.full((1, 2, 3, 3), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            if name == "circular padding":
                return F.conv2d(F.pad(h, (1, 1, 1, 1), mode="circular"), self.kernel).flatten(1)
            return SHARED[name](h).flatten(1)

    torch.manual_seed(0)
    model = Net()
    domain = (-200.0, 200.0) if name == "a gate" else None
    certified = CertifiedModel(model, IMAGES, domain=domain)
    bounds = ForwardError(certified._graph, certified._output, certified._norms)
    x = torch.randn(50, *IMAGES)
    found, here = bounds.bounds(x.double(), torch.zeros(50).double(), precision("float32"))
    with torch.no_grad():
        error = (model(x).double() - certified.logits(x)).norm(dim=1)
    assert bool((error <= found).all())
    if name != "no entries":
        assert bool((found <= 1e5 * error.max()).all())
        assert bool((here > 0).all() and (here < 1e-6 * found).all())


class Computed(nn.Module):
    """A weight that is computed in the forward pass, with rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(1e4 + torch.randn(3, 20))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w - self.w.mean(1, keepdim=True))


class Transposed(Computed):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.transpose(0, 1)


def test_constants_that_are_computed_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="constants are computed in the forward"):
        CertifiedModel(Computed(), (20,), precision="float32")
    CertifiedModel(Transposed(), (20,), precision="float32")  # that one is only moved


class Constant(nn.Module):
    """Multiplies by what is made of its weight."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([257.0, -256.0]))
        self.plain = [torch.tensor([8192.0, 2.0**-12, -8192.0])]
        self.make = [make]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x * self.make[0](self), x * 0.0 + 0.5], 1)


ROUNDED: dict[str, Callable[[Any], Any]] = {
    "a number": lambda net: net.weight.sum().item(),
    "a gate": lambda net: (net.weight > 256.5)[:1],
    "a place": lambda net: net.weight.argmax().item(),
    "a place of a sorted one": lambda net: net.weight.sort()[1][0].item(),
    "of literals": lambda net: torch.ones(1, 2) @ torch.tensor([[257.0], [-256.0]]),
    "of a plain attribute": lambda net: net.plain[0].sum(),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_constants_that_follow_from_weights_are_refused(name: str) -> None:
    """In bfloat16 257 is 256, so that all of these are other ones."""
    with pytest.raises(UnknownRounding, match="comput"):
        CertifiedModel(Constant(ROUNDED[name]), (1,), precision="bfloat16")
    assert not CertifiedModel(Constant(ROUNDED[name]), (1,)).rounding_is_known


def test_autocast_within_the_forward_is_refused() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x)

    with pytest.raises(UnsupportedModel, match="switches autocast on"):
        CertifiedModel(Cast(), (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # around it, it makes no difference
        CertifiedModel(nn.Linear(4, 3), (4,))


def test_several_results_are_told_apart() -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.max(x, 2)[0]

    found = CertifiedModel(Largest(), (2, 3), precision="float32").certify(
        torch.tensor([[[1.0, 2.0, 0.0], [4.0, 5.0, 6.0]]])
    )
    assert found.radius.item() > 2.0


def _diagonal(weights: Sequence[float]) -> nn.Linear:
    linear = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor(weights, dtype=torch.float64)))
    return linear


def _normalisation(**values: float) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(2, eps=values.pop("eps", 1e-5)).double().eval()
    with torch.no_grad():
        for name, value in values.items():
            getattr(norm, name)[0] = value
    return norm


BEYOND: dict[str, tuple[nn.Module, str]] = {
    "weights": (_diagonal([1e40, 1.0]), "float32"),
    "weights that round up": (_diagonal([3.4e38, 1.0]), "bfloat16"),
    "a mean": (_normalisation(running_mean=1e39, weight=1e-28), "float32"),
    "an epsilon": (_normalisation(eps=1e300, weight=1e150), "float32"),
    "a weight": (_normalisation(weight=2.0**-128, eps=2.0**-59), "float32"),
    "a slope": (nn.CELU(alpha=2.0**120), "float32"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_constants_beyond_the_range_are_not_certified(name: str) -> None:
    module, precision = BEYOND[name]
    x = torch.tensor([[1e-3, 2e-3]], dtype=torch.float64)
    found = CertifiedModel(module, (2,), precision=precision).certify(x)
    assert not found.radius.any()


def test_a_right_prediction_without_a_radius_is_not_certified_at_zero() -> None:
    """In bfloat16 both logits are 1000."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        linear.bias.fill_(1000.0)
    x, label = torch.tensor([[0.4, 0.5]]), torch.tensor([1])
    assert CertifiedModel(linear, (2,)).certify(x).certified(label, 0.0).all()
    found = CertifiedModel(linear, (2,), precision="bfloat16").certify(x)
    assert not found.certified(label, 0.0).any()


def test_exact_radii_pay_for_the_pass_that_computes_the_logits() -> None:
    """Behind large biases that cancel, the logits here say nothing."""
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight[0] = 1.0
        model[0].bias.fill_(2.0**60)
        model[2].weight[0] = torch.tensor([1.0, -1.0])
        model[2].bias[1] = 0.5
    x = torch.full((1, 4), 0.8, dtype=torch.float64)
    certified = CertifiedModel(model, (4,))
    assert certified.rounding_is_known
    assert not certified.certify(x).radius.any()  # the exact prediction is the other one


OVERFLOWING: dict[str, Callable[[Tensor], Tensor]] = {
    "products": lambda x: torch.tanh(x * 1e20 * 1e20),
    "sums": lambda x: (x * 2e38 + x * 2e38) * 1e-38,
    "means": lambda x: (x * 3e37).repeat(1, 40).mean(1, keepdim=True) * torch.ones(3) * 1e-38,
    "softplus": lambda x: F.softplus(x, beta=1e-40, threshold=40.0) * 1e-30,
    "tiny divisors": lambda x: x * 1e-38 / 1.1e-40,
    "tiny factors": lambda x: x * 1e-41 * 1e38,
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_what_leaves_the_range_is_not_certified(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(OVERFLOWING[name](x))

    torch.manual_seed(0)
    try:
        found = CertifiedModel(Net(), (3,), precision="float32").certify(torch.rand(9, 3))
    except UnsupportedModel:
        return
    assert not found.radius.any()
    assert (found.exact > 0).any()


def test_maxima_with_constants_round_these() -> None:
    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.tensor([[0.1, 0.0]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.max(x, self.low)

    found = CertifiedModel(Limited(), (2,), precision="float32")
    assert found.certify(torch.tensor([[0.0, 0.1]])).radius.item() == 0.0


def test_tiny_tensors_keep_their_errors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)).double()
    _, bounds = certified_and_error(model, (5,))
    x = 1e-165 * torch.randn(20, 5, dtype=torch.float64)
    found, here = bounds.bounds(x, torch.zeros(20).double(), precision("float64"))
    assert bool((found > 1e-183).all())
    assert bool((here > 1e-183).all())


def test_a_sample_does_not_change_the_others() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([F.softplus(x, threshold=40.0), x], 1))

    certified = CertifiedModel(Net(), (4,), precision="float32")
    x = torch.rand(5, 4)
    alone = certified.certify(x).radius
    beside = certified.certify(torch.cat([x, 1e30 * torch.rand(1, 4)])).radius
    torch.testing.assert_close(beside[:5], alone, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("order", ["ascending", "descending", "as they are"])
def test_the_order_of_summation_does_not_matter(order: str) -> None:
    """A machine that adds one product after the other, in float32."""
    torch.manual_seed(0)
    model = nn.Linear(2000, 2, bias=False)
    with torch.no_grad():
        model.weight.abs_()
    _, bounds = certified_and_error(model, (2000,))
    x = torch.rand(10, 2000)
    found, _ = bounds.bounds(x.double(), torch.zeros(10).double(), precision("float32"))
    products = x[:, None] * model.weight.detach()
    if order != "as they are":
        products = products.sort(dim=2, descending=order == "descending").values
    total = torch.zeros(10, 2)
    for column in products.unbind(2):
        total = total + column
    exact = x.double() @ model.weight.detach().double().T
    error = (total.double() - exact).norm(dim=1)
    assert bool((error <= found).all())
    assert bool((error > 1e-3 * found).any())


@pytest.mark.parametrize("domain", [None, (-1.0, 1.0)])
def test_a_shift_of_the_logits_does_not_hide_the_last_products(
    domain: tuple[float, float] | None,
) -> None:
    """With a domain, shifted logits are a signal of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 3), Apply(lambda x: x + 0.7))
    plain = CertifiedModel(model[0], (400,), precision="float32")
    shifted = CertifiedModel(model, (400,), precision="float32", domain=domain)
    x = torch.rand(20, 400, dtype=torch.float64)
    found = []
    for certified in (plain, shifted):
        assert certified._rounding is not None
        classes = certified.logits(x).argmax(dim=1)
        one = torch.ones(20, dtype=torch.float64)
        found.append(certified._rounding.margin_bounds(x, one, precision("float32"), classes))
    assert bool((found[1] >= found[0]).all())


def test_nearest_entries_that_depend_on_the_precision_are_not_known() -> None:
    """In float32 the 41st of 82 copies is of the other entry of two."""

    class Enlarged(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size, self.last = size, nn.Linear(size, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.interpolate(x, size=self.size).flatten(1))

    with pytest.raises(UnknownRounding, match="node 'interpolate': which entries are the nearest"):
        CertifiedModel(Enlarged(82).double(), (1, 2), precision="float32")
    assert CertifiedModel(Enlarged(64), (1, 2)).rounding_is_known
    up = nn.Sequential(nn.Upsample(scale_factor=3), nn.Flatten())
    assert not CertifiedModel(up, (1, 2, 2)).rounding_is_known


def test_multiples_that_are_added_are_rounded_before() -> None:
    class Multiple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            constant = torch.tensor([-1000.0 - 3e-5, 0.0], dtype=torch.float64)
            self.register_buffer("constant", constant)

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(self.constant, x, alpha=1000.0)

    x = torch.tensor([[1.0, -2.5e-8]], dtype=torch.float64)
    assert CertifiedModel(Multiple(), (2,)).certify(x).radius.item() > 0
    assert CertifiedModel(Multiple(), (2,), precision="float32").certify(x).radius.item() == 0


def test_numbers_of_weights_that_are_read_past_the_trace_are_refused() -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0 + 2.0**-20))

        def forward(self, x: Tensor) -> Tensor:
            (weight,) = list(self.parameters())
            return x * ((weight.item() - 1.0) * 2.0**20)

    with pytest.raises(UnknownRounding, match="computes constants"):
        CertifiedModel(Sly(), (2,), precision="bfloat16")


def test_errors_of_a_bounded_function_are_bounded_by_its_range() -> None:
    """A sum that rounding loses moves a sigmoid from one end to the other, and no farther."""
    model = nn.Sequential(nn.Linear(22, 1), nn.Sigmoid(), nn.Linear(1, 2)).double()
    weight = torch.ones(22, dtype=torch.float64)
    weight[0], weight[-1] = 2.0**60, -(2.0**60)
    with torch.no_grad():
        model[0].weight[0] = weight
        model[0].bias.fill_(-10.0)
    graph = LipschitzGraph(model.eval(), (22,))
    found = ForwardError(graph, graph.walk(), lambda some: proven_norms(some, "fantastic_four"))
    errors = found.errors_at(torch.ones(1, 22, dtype=torch.float64))
    (error,) = (e for (node, _), e in errors.items() if node.target == "model.1")
    (before,) = (e for (node, _), e in errors.items() if node.target == "model.0")
    assert before.item() > 100.0  # of the sum; exactly it is 10
    assert 1.0 <= error.item() <= 2.0 + 1e-9
