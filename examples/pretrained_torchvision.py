# %% [markdown]
# # A network of torchvision
#
# What is a global bound worth for an ordinary deep network, and what can be done instead?
#
#     python examples/pretrained_torchvision.py [--arch resnet18] [--weights DEFAULT] [--size 32]
#                                               [--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225]
#                                               [--quick]
#
# Without `--weights` nothing is downloaded and the weights are random: the bounds are then about
# a network as it starts its training, and the classes mean nothing. With weights the images are as
# large as in their training, which can take minutes; `--size 64` is faster. `--quick` takes a
# smaller network and trains less at the end.

# %%
import argparse
import time

import torch
import torchvision
from torch import Tensor, nn

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--arch", default="", help="a classifier of torchvision.models")
parser.add_argument("--weights", default=None, help="torchvision's name of weights, e.g. DEFAULT")
parser.add_argument("--size", type=int, default=0, help="height and width of the images")
parser.add_argument("--mean", default="", help="of the normalisation, if not torchvision's own")
parser.add_argument("--std", default="", help="likewise")
parser.add_argument("--quick", action="store_true", help="a smaller network, less training")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own
ARCH = options.arch or ("squeezenet1_1" if options.quick else "resnet18")
EPOCHS = 1 if options.quick else 4

# %% [markdown]
# ## Normalisation is a layer
#
# torchvision's networks expect normalised images. A radius between normalised images would be
# about 1 / std times as large as between images, and mean nothing to anyone. So put the
# normalisation in front, as a layer: the network then takes pixels in [0, 1], and radii are in
# these units. `certify eval` does the same with `--mean` and `--std`.

# %%
from models import Normalize

preset = torchvision.models.get_model_weights(ARCH).DEFAULT.transforms()  # no download
mean = [float(m) for m in options.mean.split(",")] if options.mean else list(preset.mean)
std = [float(s) for s in options.std.split(",")] if options.std else list(preset.std)
SIZE = options.size or (preset.crop_size[0] if options.weights else 32)
SHAPE = (3, SIZE, SIZE)

torch.manual_seed(0)
backbone = torchvision.models.get_model(ARCH, weights=options.weights)
network = nn.Sequential(Normalize(mean, std), backbone)
images = torch.rand(2, *SHAPE)  # put images of yours here, with pixels in [0, 1]
print(f"{ARCH}, weights {options.weights}, images {SHAPE}")

# %% [markdown]
# ## Layer by layer
#
# `norm <=` is the bound of each layer, `seen` the gain that some images showed. `so far <=` and the
# `seen` behind it are the same from the input up to there. Each layer's bound is close to what it
# can do; the product is far from what the network does, because no input meets the worst case of
# every layer at once.
#
# The four bounds of convolutions are the cheap choice for random weights, whose norms are costly
# to find more exactly. For trained weights `"supremum"` is both tighter and faster.

# %%
from certify import report_layers

METHOD = "supremum" if options.weights else "fantastic_four"
report = report_layers(
    network, images, described_as="images of noise", method=METHOD, tighten="merge"
)
print(report.to_table())

# %% [markdown]
# ## What tightening gains, and what is left
#
# `"join"` bounds neighbours and skips together. It has to bound products of kernels, which takes
# longer. (`"balance"`, left out here, scales channels between layers on top and takes longer yet.)

# %%
from certify import CertifiedModel
from certify.attack import Effort

bounds = dict(report.lipschitz)
start = time.perf_counter()
certified = CertifiedModel(network, SHAPE, method=METHOD, tighten="join")
bounds["join"] = certified.lipschitz().item()
print(f"bounded in {time.perf_counter() - start:.1f} s")
for tighten, value in bounds.items():
    print(f"{tighten:<8} Lipschitz constant {value:.4g}")
print(f"largest gain seen      {report.seen:.4g}")

found = certified.certify(images)
logits = certified.logits(images).sort(dim=1, descending=True).values
margins = logits[:, 0] - logits[:, 1]
adversary = certified.adversary.with_effort(Effort(steps=5))
distance = adversary.nearest(images.double()).distance
for row in zip(margins.tolist(), found.radius.tolist(), distance.tolist(), strict=True):
    print("margin {:.3g}: radius {:.3g}, attacked at {:.3g}".format(*row))

# %% [markdown]
# The radius is proven, and vacuous: zero stands where the bound leaves nothing, not even for the
# rounding of float64. An attack finds another class at a distance that is larger by many orders
# of magnitude; the truth lies between, and the bound is no help in finding out where. No
# tightening changes that for a network that was not trained for it.
#
# ## A certified head is no way out
#
# The last layer is well behaved. But a radius in the space of its inputs has to be divided by the
# Lipschitz constant of the layers before it, and that is where the bound is lost:

# %%
print(f"bound of the layer before the last {report.layers[-2].bound_so_far:.4g}")
print(f"bound of the last layer itself     {report.layers[-1].bound:.4g}")

# %% [markdown]
# It helps where the backbone is bounded by construction or training (`--set head=softplus` of
# `2c2f`, `4c3f` and `liresnet`).
#
# ## Squeeze and excitation
#
# These networks multiply tensors that both depend on the input: on all inputs there is no Lipschitz
# constant, on a bounded domain there is. With `domain=(0, 1)` the radii are about images within it.

# %%
from certify import UnsupportedModel

excited = torchvision.models.get_model("mobilenet_v3_small", weights=None)
try:
    CertifiedModel(excited, (3, 32, 32))
except UnsupportedModel as error:
    print("refused:", error)
bound = CertifiedModel(excited, (3, 32, 32), domain=(0, 1)).lipschitz().item()
print(f"mobilenet_v3_small on [0, 1]: Lipschitz constant {bound:.4g}")

# %% [markdown]
# Each product multiplies a bound by the size that the other factor can have, and what rounding can
# add to that is paid for as well. Many in a row leave a number without use, or infinity, which is
# a bound too, with radii of zero. One block in a small network is another matter:

# %%
torch.manual_seed(0)
small = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2, padding=1),
    nn.ReLU(),
    torchvision.ops.SqueezeExcitation(16, 8),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(16, 10),
)
certified = CertifiedModel(small, (3, 32, 32), domain=(0, 1))
some = torch.rand(5, 3, 32, 32)
print(f"one block on [0, 1]: Lipschitz constant {certified.lipschitz().item():.4g}")
radius, distance = certified.certify(some).radius, certified.attack(some)
print(f"median radius {radius.median():.3g}, median distance of the attack {distance.median():.3g}")

# %% [markdown]
# ## What can be done
#
# Train a network for its bound: small ones of few layers are the easiest. For images of digits that
# takes seconds; `certify recipes` lists settings of whole trainings.

# %%
from certify import TrainingConfig, evaluate, train
from certify.data import load_data
from certify.recipes import RECIPES
from models import build

for name, recipe in RECIPES.items():
    print(f"{name:<16} {recipe.about}")

torch.manual_seed(0)
digits = build("2c2f", width=8)
settings = TrainingConfig(epochs=EPOCHS, batch_size=64, epsilon=0.5)
train(digits, load_data("mnist-5k", train=True), settings)
certified = CertifiedModel(digits, (1, 28, 28), method="supremum")
print(evaluate(certified, load_data("mnist-5k", train=False), [0.1, 0.5]).to_table())

# %% [markdown]
# ## Large images, small network
#
# Averaging `k` by `k` pixels has Lipschitz constant `1 / k`. In front of a small network it makes
# the bound smaller by that factor and the radii, as distances between the large images, larger.
# That is no more than fair: the same visible change of an image with `k * k` times the pixels has
# `k` times the norm.


# %%
def enlarged(images: Tensor, k: int) -> Tensor:
    return images.repeat_interleave(k, dim=2).repeat_interleave(k, dim=3)


test = load_data("mnist-5k", train=False)
few = test.images[::50] / 255.0
for k in (1, 2, 4):
    shape = (1, 28 * k, 28 * k)
    certified = CertifiedModel(
        nn.Sequential(nn.AvgPool2d(k), digits), shape, method="supremum", tighten="join"
    )
    radius = certified.certify(enlarged(few, k)).radius
    print(
        f"{28 * k:>3} x {28 * k:<3}  Lipschitz constant {certified.lipschitz().item():.4g}"
        f"  median radius {radius.median():.4g}"
    )
