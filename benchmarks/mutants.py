"""Wrong rules and wrong bounds, and whether the tests notice.

    python benchmarks/mutants.py rules
    python benchmarks/mutants.py code [--only N]

``rules`` multiplies what each registered rule returns by a factor below one and runs the rule's own
cases. ``code`` changes one line of a copy of this repository at a time and runs the tests that are
about it; a mutant is caught if one of them fails.
"""

from __future__ import annotations

import collections
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parent.parent


@click.group()
def main() -> None:
    """Count what is caught."""


@main.command()
@click.option("--threads", default=1, show_default=True)
def rules(threads: int) -> None:
    """Make every rule too small, by 1 %, or by half where its cases are not that sharp."""
    torch.set_num_threads(threads)
    sys.path.insert(0, str(ROOT))
    from certify.rules import RULES
    from certify.signal import Signal
    from tests.certify.rules.harness import BUILT_IN, check
    from tests.certify.rules.test_registry import FILES

    def smaller(rule: Callable[..., Any], factor: float) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = rule(*arguments, **options)
            return pytree.tree_map_only(Signal, lambda s: s.scaled(factor), result)

        return call

    def caught(key: object, cases: list[Any]) -> float | None:
        for factor in (0.99, 0.5):
            for case in sorted(cases, key=lambda case: case.factor):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setitem(RULES, key, smaller(RULES[key], factor))
                    try:
                        check(case, patch)
                    except AssertionError:
                        return factor
        return None

    cases = [case for file in FILES for case in file.CASES]
    results = {key: caught(key, [c for c in cases if key in c.operations]) for key in BUILT_IN}
    shapes = {"size", "dim", "ndimension", "numel", torch.numel, getattr}
    shapes |= {torch.zeros_like, torch.ones_like, torch.full_like}  # whose results are constant
    shapes |= {"new_zeros", "new_ones", "new_full"}
    for key, factor in results.items():
        if factor is None and key not in shapes:
            click.echo(f"not caught: {key}")
    counts = collections.Counter(results[key] for key in results if key not in shapes)
    click.echo(
        f"{len(results)} rules, of which {len(shapes)} are about shapes alone; caught: "
        f"{counts[0.99]} times 0.99, {counts[0.5]} only times 0.5, {counts[None]} not"
    )


class Mutant(NamedTuple):
    """A change of a file, and the tests that should notice."""

    about: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "branch and bound: cells taken for half as wide",
        "ff_bounds/branch_and_bound.py",
        "half_width = angle * (1.0 + 1e-12) * 0.5**cells.level + blur",
        "half_width = 0.5 * angle * (1.0 + 1e-12) * 0.5**cells.level + blur",
        "tests/ff_bounds/test_supremum.py",
    ),
    Mutant(
        "branch and bound: no factor for what lies around a centre",
        "ff_bounds/branch_and_bound.py",
        "shrink = half_width.cos().square() * (1.0 - 1e-14)",
        "shrink = torch.ones_like(half_width)",
        "tests/ff_bounds/test_supremum.py",
    ),
    Mutant(
        "grid of frequencies: no factor for what lies between",
        "ff_bounds/frequency_grid.py",
        "factor /= math.cos((t - 1) / 2 * math.pi / size) - 1e-15",
        "factor /= 1.0",
        "tests/ff_bounds/test_frequency_grid.py",
    ),
    Mutant(
        "padding by copies: repeats forgotten",
        "ff_bounds/padding.py",
        "return 1 + max(before, after)",
        "return 1",
        "tests/ff_bounds/test_conv.py",
    ),
    Mutant(
        "padding by copies: one side only",
        "ff_bounds/padding.py",
        "return 1 + before + after",
        "return 1 + before",
        "tests/ff_bounds/test_conv.py",
    ),
    Mutant(
        "reflection counted from one side",
        "ff_bounds/padding.py",
        "counts[size - 1 - distance] += 1",
        "pass",
        "tests/ff_bounds/test_conv.py",
    ),
    Mutant(
        "circular padding: the stride kept at the seam",
        "ff_bounds/padding.py",
        "if size % stride == 0 and outputs * stride <= size:",
        "if True:",
        "tests/ff_bounds/test_conv.py",
    ),
    Mutant(
        "spectral norm: the residual of the factorisation is free",
        "ff_bounds/matrix.py",
        "proven = round_up(shift + 2.0 * error + 2.0 * gram_error, 4)",
        "proven = round_up(estimate, 4)",
        "tests/ff_bounds/test_matrix.py",
    ),
    Mutant(
        "spectral norm: scaled by half the power of two",
        "ff_bounds/matrix.py",
        "unscaled = undo_scaling(proven, exponent)",
        "unscaled = undo_scaling(proven, exponent - 1)",
        "tests/ff_bounds/test_matrix.py",
    ),
    Mutant(
        "rounding up does nothing",
        "ff_bounds/rounding.py",
        "return value * (1.0 + 2.0 * (operations + 2) * UNIT_ROUNDOFF)",
        "return value",
        "tests/ff_bounds/test_rounding.py",
    ),
    Mutant(
        "a product that underflows is zero",
        "ff_bounds/rounding.py",
        "product = round_up(first * second, 1).clamp_min(SMALLEST_NORMAL)",
        "product = round_up(first * second, 1)",
        "tests/ff_bounds/test_rounding.py",
    ),
    Mutant(
        "branches: the larger one in place of the sum",
        "certify/joining.py",
        "        total = sum_bound(total, bound)\n    return total",
        "        total = torch.maximum(total, bound)\n    return total",
        "tests/certify/rules/test_arithmetic.py",
    ),
    Mutant(
        "concatenation: the larger part",
        "certify/joining.py",
        "round_up(total.sqrt(), 2 * len(bounds) + 3) + 2.0**-500",
        "torch.ones_like(total)",
        "tests/certify/rules/test_arrangement.py",
    ),
    Mutant(
        "two layers together: the spread between slopes left out",
        "certify/bounding.py",
        "                joint = sum_bound(joint, rest)",
        "                pass",
        "tests/certify/test_bounding.py",
    ),
    Mutant(
        "two layers together: zeros at the border of a convolution left out",
        "certify/bounding.py",
        "low, high = min(low, 0.0), max(high, 0.0)",
        "pass",
        "tests/certify/test_bounding.py",
    ),
    Mutant(
        "margins: the Lipschitz constant of the logits without the root of two",
        "certify/norms.py",
        "lipschitz = round_up(lipschitz * 2.0**0.5, 2)",
        "lipschitz = round_up(lipschitz, 2)",
        "tests/certify/test_norms.py tests/certify/test_certified_model.py",
    ),
    Mutant(
        "rows of the last layer: their error left out",
        "certify/operators.py",
        "1.5 * self.norm_error() * others",
        "0.0 * others",
        "tests/certify/test_operators.py",
    ),
    Mutant(
        "BatchNorm without its epsilon",
        "certify/rules/affine.py",
        "deviation = (variance.to(torch.float64) + eps).sqrt()",
        "deviation = (variance.to(torch.float64) + 1.0).sqrt()",
        "tests/certify/rules/test_affine.py",
    ),
    Mutant(
        "certified at exactly the radius",
        "certify/certificates.py",
        "return right & (self.radius > epsilon) if known else right",
        "return right & (self.radius >= epsilon) if known else right",
        "tests/certify/test_certificates.py",
    ),
    Mutant(
        "dual: the residual counts half",
        "certify/dual.py",
        "parts = (0.5 * square, eta * margin, length.square() / (2.0 * left))",
        "parts = (0.5 * square, eta * margin, length.square() / (4.0 * left))",
        "tests/certify/test_dual.py",
    ),
    Mutant(
        "dual: radii of features taken for those of inputs",
        "certify/smooth_radii.py",
        "found = radius / self.head.lipschitz * (1.0 - 2.0**-50)",
        "found = radius",
        "tests/certify/test_head.py",
    ),
    Mutant(
        "curvature: the smaller of both ends",
        "certify/rules/smooth.py",
        "return input.elementwise(0.0, 1.0, largest=1.0, curvature=_both(0.7698003589195011))",
        "return input.elementwise(0.0, 1.0, largest=1.0, curvature=_both(0.7))",
        "tests/certify/rules/test_second_derivatives.py",
    ),
    Mutant(
        "rounding: errors are not carried through a layer",
        "certify/forward_error.py",
        "error = sum_bound(before, local)",
        "error = local",
        "tests/certify/test_forward_error.py",
    ),
    Mutant(
        "rounding: sums of products cost one rounding",
        "certify/precision.py",
        "sums = _gamma(terms + 2, self.sum_unit)",
        "sums = 0.0",
        "tests/certify/test_forward_error.py",
    ),
    Mutant(
        "rounding: no allowance off the margins",
        "certify/certified_model.py",
        "torch.nextafter(logits + allowance, torch.full_like(logits, torch.inf))",
        "logits",
        "tests/certify/test_forward_error.py",
    ),
    Mutant(
        "rounding: constants that follow from weights are exact",
        "certify/graph.py",
        "            self.computed.add(n)\n",
        "            pass\n",
        "tests/certify/test_forward_error.py",
    ),
    Mutant(
        "rounding: autocast within the forward goes unseen",
        "certify/tracing.py",
        "if any(torch.is_autocast_enabled(device) for device in _AUTOCAST):",
        "if False:",
        "tests/certify/test_forward_error.py",
    ),
    Mutant(
        "rounding: exact radii believe the logits",
        "certify/certified_model.py",
        "allowance = self._allowance(x, classes) if self.rounding_is_known else None",
        "allowance = None",
        "tests/certify/test_forward_error.py",
    ),
    Mutant(
        "products: the centre is as it was computed",
        "certify/centres.py",
        "    return graph.walk()\n",
        "    return output\n",
        "tests/certify/test_products.py",
    ),
    Mutant(
        "verification: angles are exact",
        "certify/grid_proofs.py",
        "(flat.shape[1] + angles + 80.0)",
        "(flat.shape[1] + 80.0)",
        "tests/certify/test_verification.py",
    ),
    Mutant(
        "attacks leave the domain",
        "certify/minimum_norm.py",
        "return points if self.domain is None else points.clamp(*self.domain)",
        "return points",
        "tests/certify/test_attack.py",
    ),
    Mutant(
        "verification: bounds are believed",
        "certify/verification.py",
        "if not norm_at_most(operator, bound):",
        "if False:",
        "tests/certify/test_verification.py",
    ),
    Mutant(
        "a checkpoint's checksums are not looked at",
        "certify/checkpoints.py",
        "            check_archive(path)\n",
        "",
        "tests/certify/test_checkpoints.py",
    ),
    Mutant(
        "forward error: a bounded function's values are near each other",
        "certify/forward_error.py",
        "farthest = 2.0 * signal.step.largest",
        "farthest = 0.1 * signal.step.largest",
        "tests/certify/test_forward_error.py",
    ),
    Mutant(
        "the number of samples may be computed with",
        "certify/batch_numbers.py",
        "fits = n.target in _BESIDE and not used & (numbers | marks.keys())",
        "fits = True",
        "tests/certify/test_graph.py",
    ),
    Mutant(
        "rolling without axes keeps samples apart",
        "certify/rules/arrangement.py",
        "() if dims is None else dims",
        "1 if dims is None else dims",
        "tests/certify/test_graph.py",
    ),
    Mutant(
        "processes with different weights share their proofs",
        "certify/ranks.py",
        "if any(other != found[0] for other in found):",
        "if False:",
        "tests/certify/test_ranks.py",
    ),
    Mutant(
        "a large logit hides what happens to the others",
        "certify/tracing.py",
        "spread > min(2.0**-6, 2.0**10 * unit) * sizes",
        "spread >= -sizes",
        "tests/certify/test_graph.py",
    ),
    Mutant(
        "gradients: products are exact",
        "certify/gradient_error.py",
        "self._precision.products(terms + 16) * path.absolute",
        "0.0 * path.absolute",
        "tests/certify/test_gradient_error.py",
    ),
    Mutant(
        "gradients: slopes are exact",
        "certify/gradient_error.py",
        "own = units * (",
        "own = 0.0 * (",
        "tests/certify/test_gradient_error.py",
    ),
    Mutant(
        "gradients: slopes are those at the exact arguments",
        "certify/gradient_error.py",
        "round_up(curvature * error, 2)",
        "0.0 * error",
        "tests/certify/test_gradient_error.py",
    ),
    Mutant(
        "dual: gradients are exact",
        "certify/dual.py",
        "length = (residual + off).sqrt() + eta * error",
        "length = (residual + off).sqrt()",
        "tests/certify/test_gradient_error.py",
    ),
    Mutant(
        "dual: computed features are the true ones",
        "certify/smooth_radii.py",
        "lower = (found.lower - off[:, None]).clamp_min(0.0)",
        "lower = found.lower",
        "tests/certify/test_gradient_error.py",
    ),
]


@main.command()
@click.option("--only", multiple=True, type=int, help="Numbers of mutants.")
def code(only: tuple[int, ...]) -> None:
    """Change one line at a time."""
    caught = 0
    numbers = only or range(len(MUTANTS))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        unused = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=unused)
        for number in numbers:
            mutant = MUTANTS[number]
            path = copy / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                raise click.ClickException(f"mutant {number} does not fit {mutant.file}")
            path.write_text(text.replace(mutant.old, mutant.new))
            start = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
            result = subprocess.run(
                [*command, *mutant.tests.split()], cwd=copy, capture_output=True, check=False
            )
            path.write_text(text)
            if result.returncode not in (0, 1):
                raise click.ClickException(f"mutant {number}: {result.stdout.decode()[-500:]}")
            caught += result.returncode == 1
            verdict = "caught" if result.returncode else "SURVIVED"
            seconds = time.monotonic() - start
            click.echo(f"{number:>3} {verdict:<9}{seconds:>5.0f} s  {mutant.about}")
    click.echo(f"{caught} of {len(numbers)} mutants caught")


if __name__ == "__main__":
    main()
