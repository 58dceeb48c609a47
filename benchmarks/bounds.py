"""Bounds of convolutions side by side: time, memory, tightness, and what falls short.

    python benchmarks/bounds.py                                   # ResNet-18, He-initialised
    python benchmarks/bounds.py --model runs/resnet18/ckpt.pt --native
    python benchmarks/bounds.py --model torchvision:mobilenet_v2 --model weights.pt

Per layer, in one process and one thread setting: the bounds of this project, and of its peers

* FFT + SVD (Sedghi, Gupta, Long 2019): every frequency of the input's grid. Exact for circular
  padding. The time of the half of the frequencies that a real kernel needs is shown too.
* Gram iteration on the same grid (Delattre et al. 2023), half of the frequencies, in float32 as
  published; its time is taken at the first iteration within 0.1 % of where it converges to.
* conv power iteration (100 steps on the zero-padded layer): no bound at all.
* orthogonium's `get_conv_sv`, if installed: Delattre et al. 2024, in float32.

"ratio" is to the proven lower bound of sigma*, the norm on the infinite lattice, which bounds the
layer for every input size and any zero padding. "short" counts layers where the value is below a
gain of the zero-padded layer at its own input size, found by 300 steps of power iteration: there
it is no bound of the layer.
"""

from __future__ import annotations

import csv
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_bounds import (
    NormBracket,
    conv2d_bound,
    fantastic_four_bound,
    supremum_bracket,
    supremum_brackets,
    tensor_norm_bound,
    tensor_norm_estimate,
    unit_stride_kernel,
)

GAP = 1e-3


@dataclass(frozen=True)
class Layer:
    """A convolution and the (square) input that its network gives it."""

    name: str
    weight: Tensor
    stride: int
    padding: int
    groups: int
    size: int

    @property
    def kernel(self) -> Tensor:
        """Unit-stride kernel ``(groups, c_out, c_in, h, w)``."""
        return unit_stride_kernel(self.weight, stride=self.stride, groups=self.groups)

    @property
    def grid(self) -> int:
        """Frequencies per axis on the circular grid of the input."""
        return max(1, self.size // self.stride)


def resnet18_layers() -> list[tuple[str, int, int, int, int, int]]:
    """Name, c_out, c_in, taps, stride and input size of the twenty convolutions on ImageNet."""
    layers = [("conv1", 64, 3, 7, 2, 224)]
    c_in, size = 64, 56
    for stage, c_out in enumerate((64, 128, 256, 512), start=1):
        stride = 1 if stage == 1 else 2
        layers.append((f"layer{stage}.0.conv1", c_out, c_in, 3, stride, size))
        layers.append((f"layer{stage}.0.conv2", c_out, c_out, 3, 1, size // stride))
        if stride == 2:
            layers.append((f"layer{stage}.0.downsample", c_out, c_in, 1, 2, size))
        layers += [(f"layer{stage}.1.conv{i}", c_out, c_out, 3, 1, size // stride) for i in (1, 2)]
        c_in, size = c_out, size // stride
    return layers


def he_initialised(seed: int) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for name, c_out, c_in, taps, stride, size in resnet18_layers():
        weight = torch.randn(c_out, c_in, taps, taps, generator=generator)
        weight *= math.sqrt(2.0 / (c_out * taps * taps))
        layers.append(Layer(name, weight, stride, taps // 2, 1, size))
    return layers


def of_model(source: str, input_size: int | None, native: bool) -> list[Layer]:
    """Convolutions of a checkpoint of ours, a torchvision architecture, or a plain state dict."""
    if source.startswith("torchvision:"):
        import torchvision

        model = torchvision.models.get_model(source.split(":", 1)[1], weights=None)
        return _traced(model, (3, input_size or 224, input_size or 224))
    content = torch.load(source, map_location="cpu", weights_only=True)
    if "hyperparameters" in content:
        from certify.checkpoints import load_checkpoint

        checkpoint = load_checkpoint(Path(source))
        shape = checkpoint.input_shape
        if input_size is not None:
            shape = (shape[0], input_size, input_size)
        layers = _traced(checkpoint.build(), shape)
        if native:
            sizes = [size for *_, size in resnet18_layers()]
            layers = [
                Layer(a.name, a.weight, a.stride, a.padding, a.groups, size)
                for a, size in zip(layers, sizes, strict=True)
            ]
        return layers
    size = input_size or 32
    return [
        Layer(name, weight.float(), 1, weight.shape[2] // 2, 1, size)
        for name, weight in content.items()
        if isinstance(weight, Tensor) and weight.ndim == 4
    ]


def _traced(model: nn.Module, shape: tuple[int, ...]) -> list[Layer]:
    """Convolutions in the order of execution, with the sizes that they see."""
    layers: list[Layer] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, nn.Conv2d)
            padding = module.padding[0]
            layers.append(
                Layer(
                    name,
                    module.weight.detach(),
                    module.stride[0],
                    padding if isinstance(padding, int) else module.kernel_size[0] // 2,
                    module.groups,
                    inputs[0].shape[-1],
                )
            )

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return layers


# --- the peers --------------------------------------------------------------------------------


def fft_svd(layer: Layer) -> tuple[float, float]:
    """Largest singular value over the grid, and the seconds until half of it was done."""
    start = time.perf_counter()
    kernel, grid = layer.kernel.double(), layer.grid
    symbol = torch.fft.fft2(kernel, s=(grid, grid)).movedim((-2, -1), (0, 1)).contiguous()
    largest, half = 0.0, 0.0
    for row in range(grid):
        if row == grid // 2 + 1:
            half = time.perf_counter() - start
        largest = max(largest, float(torch.linalg.svdvals(symbol[row]).max()))
    return largest, half or time.perf_counter() - start


def gram_iteration_on_grid(layer: Layer) -> tuple[float, float]:
    """The bound after convergence, and the seconds until it was within `GAP` of that."""
    kernel, grid = layer.kernel.float(), layer.grid
    if kernel.shape[1] > kernel.shape[2]:
        kernel = kernel.transpose(1, 2)
    start = time.perf_counter()
    symbol = torch.fft.rfft2(kernel, s=(grid, grid))
    gram = symbol.movedim((-2, -1), (0, 1)).reshape(-1, *kernel.shape[1:3]).contiguous()
    log_norm, values, times = torch.zeros(len(gram)), [], []
    for step in range(14):
        norm = torch.linalg.matrix_norm(gram)
        gram = gram / norm[:, None, None].clamp_min(1e-30)
        log_norm = 2 * log_norm + norm.clamp_min(1e-30).log()
        gram = torch.bmm(gram, gram.mH)
        last = torch.linalg.matrix_norm(gram).log() + 2 * log_norm
        values.append(float((last / 2 ** (step + 1)).max().exp()))
        times.append(time.perf_counter() - start)
        if step and values[-2] / values[-1] - 1 < 1e-5:
            break
    reached = next(i for i, value in enumerate(values) if value <= (1 + GAP) * values[-1])
    return values[reached], times[reached]


def power_iteration(layer: Layer, steps: int, dtype: torch.dtype = torch.float32) -> float:
    """The gain found after some steps of power iteration on the zero-padded layer."""
    weight = layer.weight.to(dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (1, weight.shape[1] * layer.groups, layer.size, layer.size)
    x = torch.randn(shape, generator=generator).to(dtype)
    options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    extra = (layer.size + 2 * layer.padding - weight.shape[2]) % layer.stride
    gain = 0.0
    for _ in range(steps):
        y = F.conv2d(x / x.norm(), weight, **options)  # type: ignore[arg-type]
        gain = float(y.norm())
        x = F.conv_transpose2d(y, weight, output_padding=extra, **options)  # type: ignore[arg-type]
    return gain


def orthogonium(layer: Layer) -> float:
    from orthogonium.layers.conv.singular_values import get_conv_sv

    kernel = layer.kernel.float()
    groups, c_out, c_in, height, width = kernel.shape
    conv = nn.Conv2d(
        groups * c_in, groups * c_out, (height, width), groups=groups, padding="same", bias=False
    )
    conv.weight.data = kernel.flatten(0, 1)
    value = get_conv_sv(conv, n_iter=2, return_stab_rank=False, imsize=layer.size)
    return float(value)


Found = float | tuple[float, float] | NormBracket

METHODS: dict[str, Callable[[Layer], Found]] = {
    "supremum": lambda layer: supremum_bracket(layer.kernel, GAP),
    "four bounds": lambda layer: fantastic_four_bound(
        layer.weight, stride=layer.stride, groups=layer.groups
    ).item(),
    "tensor norm": lambda layer: tensor_norm_bound(layer.kernel).item(),
    "tensor norm estimate": lambda layer: (
        tensor_norm_estimate(layer.kernel).item()
        * math.sqrt(layer.kernel.shape[-2] * layer.kernel.shape[-1])
    ),
    "FFT + SVD": fft_svd,
    "Gram iteration on the grid": gram_iteration_on_grid,
    "conv power iteration": lambda layer: power_iteration(layer, 100),
    "orthogonium": orthogonium,
}


# --- measuring --------------------------------------------------------------------------------


def resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` now or ``VmHWM`` at its largest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return math.nan


def reset_memory() -> float:
    """Give freed memory back and forget the largest size; MiB now."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return resident("VmRSS")


@dataclass
class Row:
    """What one method did on one layer."""

    layer: str
    method: str
    value: float
    seconds: float
    seconds_half: float
    mebibytes: float
    matrices: int
    ratio: float
    short: bool


def measure(layer: Layer, method: str) -> tuple[Found, float, float]:
    """What the method finds, seconds (the median of three, of one if slow), MiB."""
    times: list[float] = []
    before = reset_memory()
    while len(times) < 3 and (not times or times[0] < 0.5):
        start = time.perf_counter()
        found = METHODS[method](layer)
        times.append(time.perf_counter() - start)
    return found, statistics.median(times), resident("VmHWM") - before


def run(layers: list[Layer], methods: list[str]) -> Iterator[Row]:
    for layer in layers:
        gain = power_iteration(layer, 300, torch.float64)
        for method in methods:
            found, seconds, used = measure(layer, method)
            part, visited = math.nan, 0
            if isinstance(found, NormBracket):
                lower, value, visited = found.lower.item(), found.upper.item(), found.matrices
            elif isinstance(found, tuple):
                value, part = found
            else:
                value = found
            if method == "Gram iteration on the grid":
                seconds = part
            short = value < gain * (1 - 1e-12)
            ratio = value / lower
            yield Row(layer.name, method, value, seconds, part, used, visited, ratio, short)


def summary(rows: list[Row], methods: list[str]) -> str:
    lines = [
        f"{'method':<28}{'seconds':>9}{'x supremum':>12}{'MiB':>8}"
        f"{'ratio: least':>14}{'median':>9}{'largest':>9}{'short':>7}"
    ]
    total = {m: sum(r.seconds for r in rows if r.method == m) for m in methods}
    for method in methods:
        mine = [row for row in rows if row.method == method]
        ratios = sorted(row.ratio for row in mine)
        lines.append(
            f"{method:<28}{total[method]:>9.3f}{total[method] / total[methods[0]]:>12.2f}"
            f"{max(row.mebibytes for row in mine):>8.0f}{ratios[0]:>14.4f}"
            f"{statistics.median(ratios):>9.4f}{ratios[-1]:>9.4f}{sum(r.short for r in mine):>7}"
        )
        if method == "FFT + SVD":
            half = sum(row.seconds_half for row in mine)
            lines.append(
                f"{'  half of the frequencies':<28}{half:>9.3f}{half / total[methods[0]]:>12.2f}"
            )
    return "\n".join(lines)


def print_cost_over_sizes() -> None:
    """Time of one layer's bound on growing inputs: 64 channels, 3x3, a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    scales = 1.0 / torch.arange(1.0, 65.0)
    weight = torch.randn(64, 64, 3, 3, generator=generator) * scales[:, None, None, None]
    print(f"{'input':>8}{'supremum, s':>14}{'circular, s':>14}")
    for size in (32, 64, 128, 256, 512):
        line = f"{size:>8}"
        for method, mode in (("supremum", "zeros"), ("circular", "circular")):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                conv2d_bound(
                    weight, padding=1, padding_mode=mode, input_size=size, method=method, tol=GAP
                )
                times.append(time.perf_counter() - start)
            line += f"{statistics.median(times):>14.4f}"
        print(line)


def plot(rows: list[Row], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method and row.ratio > 1 + 1e-9]
        gaps = [row.ratio - 1 for row in mine]
        axes.loglog([row.seconds for row in mine], gaps, ".", label=method)
    axes.set_xlabel("seconds per layer")
    axes.set_ylabel("gap above the proven lower bound")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@click.command()
@click.option(
    "--model", "models", multiple=True, help="ckpt.pt, state_dict.pt or torchvision:NAME."
)
@click.option("--input-size", type=int, help="Instead of the model's own.")
@click.option("--native", is_flag=True, help="ImageNet's sizes, for a checkpoint of resnet18.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Or all."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--over-sizes", is_flag=True, help="Only: one layer on inputs of 32 to 512 pixels.")
@click.option("--csv", "csv_path", help="Write every row here.")
@click.option("--plot", "plot_path", help="Write a picture of time against gap here.")
def main(
    models: tuple[str, ...],
    input_size: int | None,
    native: bool,
    methods: tuple[str, ...],
    threads: int,
    over_sizes: bool,
    csv_path: str | None,
    plot_path: str | None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    if over_sizes:
        print_cost_over_sizes()
        return
    chosen = [
        "supremum",
        *(m for m in METHODS if m != "supremum" and (m in methods or not methods)),
    ]
    if "orthogonium" in chosen:
        try:
            import orthogonium  # noqa: F401
        except ImportError:
            print("orthogonium is not installed: left out")
            chosen.remove("orthogonium")
    sets = {source: of_model(source, input_size, native) for source in models}
    if not sets:
        sets = {"ResNet-18, He-initialised": he_initialised(seed=0)}
    everything: list[Row] = []
    for name, layers in sets.items():
        print(f"\n{name}: {len(layers)} convolutions, {threads} threads, torch {torch.__version__}")
        for method in chosen:  # warm up
            METHODS[method](Layer("", torch.randn(8, 8, 3, 3), 1, 1, 1, 8))
        rows = list(run(layers, chosen))
        print(summary(rows, chosen))
        start = time.perf_counter()
        supremum_brackets([layer.kernel for layer in layers], GAP)
        seconds = time.perf_counter() - start
        print(f"{'supremum, all in one call':<28}{seconds:>9.3f}")
        mine = [row for row in rows if row.method == "supremum"]
        print(f"matrices visited: {', '.join(str(row.matrices) for row in mine)}")
        everything += rows
    if csv_path:
        with open(csv_path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row.__dataclass_fields__)
            writer.writerows(vars(row).values() for row in everything)
    if plot_path:
        plot(everything, plot_path)


if __name__ == "__main__":
    main()
