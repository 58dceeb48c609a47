from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.models.resnet import BasicBlock

import models
from certify import CertifiedModel, UnsupportedModel
from certify.aten import _binding
from certify.checkpoints import CheckpointError
from certify.cli import main
from certify.program_files import read_program
from certify.programs import Names, module_of, read
from certify.weights import load_network

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.export's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def export(
    model: nn.Module, shape: tuple[int, ...], *, batch: int | None = None, dtype: Any = None
) -> ExportedProgram:
    example = torch.randn(batch or 2, *shape, dtype=dtype)
    sizes = ({0: Dim.DYNAMIC},) if batch is None else None
    return torch.export.export(model, (example,), dynamic_shapes=sizes, strict=False)


def saved(program: ExportedProgram, folder: Path, name: str = "net.pt2") -> str:
    path = str(folder / name)
    torch.export.save(program, path)
    return path


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.register_buffer("mean", torch.tensor([0.25, 0.5]).reshape(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.elu(self.norm(self.first((x - self.mean) / 0.3)))
        y = nn.functional.leaky_relu(self.second(x), 0.1, inplace=True)
        x = nn.functional.pad(torch.cat([x, 2 * y[:, 1:3]], dim=1), (0, 1, 1, 0))
        x = nn.functional.avg_pool2d(nn.functional.gelu(x), 2).transpose(2, 3).contiguous()
        return x.float().mean((2, 3)) + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


class GroupSort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape
        return x.view(batch, channels // 4, 4).sort(dim=2)[0].reshape(batch, channels)


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(1)
    small = {"input_shape": (1, 12, 12), "width": 4}
    return {
        "mlp": (models.build("mlp", hidden=(8,), input_shape=(1, 4, 4)), (1, 4, 4)),
        "maxmin mlp": (
            models.build("mlp", hidden=(8,), input_shape=(1, 4, 4), activation="maxmin"),
            (1, 4, 4),
        ),
        "maxmin": (models.build("2c2f", **small), (1, 12, 12)),
        "relu": (models.build("2c2f", activation="relu", **small), (1, 12, 12)),
        "softplus": (models.build("conv2", activation="softplus", **small), (1, 12, 12)),
        "sort": (nn.Sequential(nn.Linear(8, 8), GroupSort(), nn.Linear(8, 3)), (8,)),
        "residual": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
                nn.ReLU(inplace=True), BasicBlock(4, 4), BasicBlock(4, 4), nn.Flatten(),
                nn.Linear(4 * 36, 3),
            ),
            (1, 6, 6),
        ),
        "pooled": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(),
                nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Hardtanh(), nn.AdaptiveAvgPool2d(1),
                nn.Flatten(), nn.Dropout(), nn.Linear(4, 3),
            ),
            (1, 8, 8),
        ),
    }  # fmt: skip


def assert_same(program: Any, model: nn.Module, shape: tuple[int, ...]) -> None:
    expected = CertifiedModel(model, shape)
    found = CertifiedModel(program, shape)
    torch.testing.assert_close(found.lipschitz(), expected.lipschitz(), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(
        found.margin_lipschitz(), expected.margin_lipschitz(), rtol=1e-9, atol=0.0
    )
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.logits(x), expected.logits(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found.certify(x).radius, expected.certify(x).radius, rtol=1e-9, atol=1e-12
    )
    assert found.rounding_is_known == expected.rounding_is_known


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", nets())
def test_bounds_are_those_of_the_module(name: str, decomposed: bool, batch: int | None) -> None:
    model, shape = nets()[name]
    model(torch.rand(50, *shape))  # statistics of its own
    program = export(model.eval(), shape, batch=batch)
    if name == "softplus" and decomposed:  # into exponentials, which have no bounded slope
        with pytest.raises(UnsupportedModel, match=r"before run_decompositions\(\)"):
            CertifiedModel(program.run_decompositions(), shape)
        return
    assert_same(program.run_decompositions() if decomposed else program, model, shape)


def test_a_program_with_much_in_it_is_certified() -> None:
    torch.manual_seed(2)
    model = Residual()
    model(torch.rand(50, 2, 7, 7))
    program, x = export(model.eval(), (2, 7, 7)), torch.rand(3, 2, 7, 7)
    torch.testing.assert_close(module_of(program)(x), model(x))
    certified = CertifiedModel(program, (2, 7, 7))
    assert certified.lipschitz() > 0
    assert_same(program, module_of(program), (2, 7, 7))


def test_parameters_are_exact_and_the_programs_own_stay() -> None:
    model, shape = nets()["relu"]
    program = export(model.eval(), shape)
    before = {name: value.clone() for name, value in program.state_dict.items()}
    certified = CertifiedModel(program, shape)
    found = dict(certified.model.named_parameters())
    for name, value in before.items():
        assert torch.equal(program.state_dict[name], value)
        stored = found[f"stored_{name.replace('.', '_')}"]
        assert torch.equal(stored, value.double())
    with torch.no_grad():
        next(iter(program.state_dict.values())).zero_()
    assert all(bool(value.any()) for name, value in found.items() if "weight" in name)


class Cast(nn.Module):
    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.cast = cast

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.cast(x))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.to(torch.bfloat16).to(torch.float32),
        lambda x: x.half().float(),
        lambda x: x.double().float(),
        lambda x: x.long().float(),
    ],
)
def test_conversions_of_types_are_refused(
    cast: Callable[[Tensor], Tensor], decomposed: bool
) -> None:
    program = export(Cast(cast).eval(), (4,))
    program = program.run_decompositions() if decomposed else program
    with pytest.raises(UnsupportedModel, match=r"node 'to|node '_to_copy.*it converts"):
        CertifiedModel(program, (4,))


def test_a_conversion_that_does_nothing_is_none() -> None:
    model = Cast(lambda x: x.float().to(x.dtype).contiguous())
    program = export(model.eval(), (4,))
    assert_same(program, model.linear, (4,))
    assert CertifiedModel(program, (4,)).model(torch.rand(2, 4).double()).dtype == torch.float64


def test_a_model_in_double_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    assert_same(export(model, (4,), dtype=torch.float64), model, (4,))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: nn.functional.layer_norm(x, (4,)), r"node 'layer_norm'.*divides by a deviation"),
        (lambda x: torch.softmax(x, 1), "softmax only shrinks"),
        (lambda x: torch.cumsum(x, 1), r"node 'cumsum': no Lipschitz rule for aten.cumsum"),
        (lambda x: x @ x.T @ x, "depends on the other samples"),
        (lambda x: x - x.mean(0, keepdim=True), "batch"),
        (lambda x: (x, x), "one tensor as input and one as result"),
        (lambda x: nn.functional.dropout(x, training=True), "training mode"),
        (lambda x: x + torch.rand(4), "no Lipschitz rule for aten.rand"),
        (lambda x: torch.round(x), "not continuous"),
    ],
)
def test_what_cannot_be_certified_is_refused(function: Callable[..., Any], reason: str) -> None:
    program = export(Function(function).eval(), (4,))
    with pytest.raises(UnsupportedModel, match=reason):
        CertifiedModel(program, (4,))


def test_training_mode_is_refused() -> None:
    program = export(nets()["pooled"][0].train(), (1, 8, 8))
    with pytest.raises(UnsupportedModel, match=r"model.eval\(\)"):
        CertifiedModel(program, (1, 8, 8))


def test_a_program_that_needs_its_batch_is_refused() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, 2).sum(1, keepdim=True).reshape(2, 2)

    with pytest.raises(UnsupportedModel, match=r"dynamic_shapes=\(\{0: torch.export.Dim.DYNAMIC"):
        CertifiedModel(export(Mixed(), (4,), batch=2), (4,))


def test_the_shape_is_the_programs() -> None:
    program = export(nn.Linear(4, 2), (4,))
    assert read(program).input_shape() == (4,)
    with pytest.raises(ValueError, match=r"takes inputs \(any, 4\), not of shape \(5,\)"):
        CertifiedModel(program, (5,))
    free = torch.export.export(
        nn.AdaptiveAvgPool2d(1), (torch.rand(2, 1, 5, 5),), strict=False,
        dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"pass the input shape.*\(any, 1, any, 5\)"):
        read(free).input_shape()
    assert read(free).input_shape((1, 7, 5)) == (1, 7, 5)


def test_pairs_are_sorted_only_where_they_are() -> None:
    class Swapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pairs = x.reshape(x.shape[0], -1, 2)
            first, second = pairs[..., 0], pairs[..., 1]
            both = torch.stack([torch.minimum(first, second), torch.maximum(first, second)], 2)
            return both.reshape(x.shape)

    program = export(Swapped(), (4,))
    assert not any(isinstance(m, models.MaxMin) for m in module_of(program).modules())
    assert any(
        isinstance(m, models.MaxMin) for m in module_of(export(models.MaxMin(), (4,))).modules()
    )
    assert CertifiedModel(program, (4,)).lipschitz() >= 1.0


def test_sorted_pairs_of_another_shape() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pairs = x.reshape(x.shape[0], 2, 2, 3)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            both = torch.stack([torch.maximum(first, second), torch.minimum(first, second)], 2)
            return both.reshape(x.shape[0], -1)

    program = export(Flat(), (4, 3))
    assert_same(program, nn.Sequential(models.MaxMin(), nn.Flatten()), (4, 3))


@pytest.mark.parametrize("name", ["mlp", "maxmin", "pooled", "sort"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_files_are_read_as_torch_reads_them(name: str, decomposed: bool, tmp_path: Path) -> None:
    model, shape = nets()[name]
    program = export(model.eval(), shape)
    program = program.run_decompositions() if decomposed else program
    path = saved(program, tmp_path)
    network = load_network(path)
    assert network.input_shape == shape
    x = torch.rand(3, *shape)
    loaded = torch.export.load(path)
    torch.testing.assert_close(network.model(x), loaded.module()(x))
    assert_same(network.model, model, shape)


def test_files_with_much_in_them(tmp_path: Path) -> None:
    model = Residual().eval()
    network = load_network(saved(export(model, (2, 7, 7)), tmp_path))
    x = torch.rand(3, 2, 7, 7)
    torch.testing.assert_close(network.model(x), model(x))


def test_shared_and_transposed_weights_are_read(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6).T)
            self.again = self.weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight @ self.again.mT

    model = Shared()
    network = load_network(saved(export(model, (6,)), tmp_path))
    x = torch.rand(3, 6)
    torch.testing.assert_close(network.model(x), model(x))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def rewritten(path: str, target: str, change: Callable[[str, bytes], bytes]) -> str:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path = saved(export(nn.Linear(4, 2), (4,)), tmp_path)
    trap = pickle.dumps(Bomb(tmp_path / "executed"))

    def armed(name: str, content: bytes) -> bytes:
        return trap if name.endswith(".pt") else content

    def sized(name: str, content: bytes) -> bytes:
        if not name.endswith(("model.json", "program.json")):
            return content
        command = f"__import__('os').mkdir({str(tmp_path / 'executed')!r})"
        return json.dumps(_replaced(json.loads(content), "expr_str", command)).encode()

    for change in (armed, sized):
        with suppress(CheckpointError, UnsupportedModel):
            load_network(rewritten(path, str(tmp_path / "trap.pt2"), change))
        assert not (tmp_path / "executed").exists()


def _replaced(content: Any, key: str, value: str) -> Any:
    if isinstance(content, dict):
        return {k: value if k == key else _replaced(v, key, value) for k, v in content.items()}
    return [_replaced(v, key, value) for v in content] if isinstance(content, list) else content


def test_names_in_a_file_are_not_code(tmp_path: Path) -> None:
    path = saved(export(nn.Linear(4, 2), (4,)), tmp_path)
    command = 'weight"); __import__("os").abort(); ("'

    def renamed(name: str, content: bytes) -> bytes:
        if not name.endswith(".json"):
            return content
        text = json.dumps(command)[1:-1].encode()
        return content.replace(b'"weight"', b'"' + text + b'"')

    with pytest.raises(CheckpointError, match="damaged"):  # of the operation's argument
        load_network(rewritten(path, str(tmp_path / "named.pt2"), renamed))


def test_no_two_tensors_have_one_name() -> None:
    names = Names()
    given = ["a.b", "a_b", "a_b__2", "a.b__2", "a-b"]
    assert len({names.attribute(name) for name in given}) == len(given)


@pytest.mark.parametrize("operation", ["from_file", "set_", "resize_", "rand", "item"])
def test_only_known_operations_are_run(operation: str) -> None:
    assert _binding(operation) is None


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = saved(export(nets()["pooled"][0].eval(), (1, 8, 8)), tmp_path)
    whole = Path(path).read_bytes()
    broken = tmp_path / "broken.pt2"
    for content in (b"", b"nothing", whole[: len(whole) // 2], whole[:-30]):
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a program, or it is damaged"):
            load_network(str(broken))
    for place in range(60, len(whole) - 60, len(whole) // 40):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        broken.write_bytes(changed)
        try:
            read_program(broken)
        except (CheckpointError, UnsupportedModel):
            continue
        assert_same(load_network(str(broken)).model, nets()["pooled"][0].eval(), (1, 8, 8))


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph["graph_module"]["graph"]["nodes"].pop(),
        lambda graph: graph["schema_version"].update(major=9),
        lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.x"),
        lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target="builtins.eval"),
        lambda graph: graph["graph_module"]["signature"]["output_specs"].clear(),
        lambda graph: graph["graph_module"].pop("signature"),
    ],
)
def test_altered_graphs_are_refused(change: Callable[[Any], Any], tmp_path: Path) -> None:
    path = saved(export(nn.Linear(4, 2), (4,)), tmp_path)

    def altered(name: str, content: bytes) -> bytes:
        if not name.endswith(("models/model.json", "program.json")):
            return content
        graph = json.loads(content)
        change(graph)
        return json.dumps(graph).encode()

    with pytest.raises((CheckpointError, UnsupportedModel)):
        load_network(rewritten(path, str(tmp_path / "altered.pt2"), altered))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_command_line(tmp_path: Path) -> None:
    model, shape = (
        models.build("mlp", hidden=(8,), input_shape=(1, 28, 28)).eval(),
        (1, 28, 28),
    )
    path = saved(export(model, shape), tmp_path)
    record = str(tmp_path / "record.json")
    images = ("--dataset", "mnist-5k", "--limit", "20")
    result = run("eval", "--model", path, *images, "--save", record)
    assert result.exit_code == 0, result.output
    assert "a program" in result.output
    result = run("verify", record, "--model", path)
    assert result.exit_code == 0, result.output
    result = run("bound", "--model", path)
    assert result.exit_code == 0, result.output
    result = run("attack", "--model", path, *images, "--attack-steps", "1", "--restarts", "0")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--arch", "mlp"), "is a program"),
        (("--set", "width=3"), "is a program"),
        (("--input-shape", "1,5,5"), "takes inputs (any, 4)"),
    ],
)
def test_options_that_do_not_fit(options: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    path = saved(export(nn.Linear(4, 2), (4,)), tmp_path)
    result = run("bound", "--model", path, *options)
    assert result.exit_code == 2
    assert reason in result.output


def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    for content in (None, b"PK nothing"):
        if content is not None:
            path.write_bytes(content)
        result = run("bound", "--model", str(path))
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1


class Branching(nn.Module):
    """Another function for small batches."""

    def __init__(self, few: Callable[[int], bool]) -> None:
        super().__init__()
        self.few = few

    def forward(self, x: Tensor) -> Tensor:
        return 100.0 * x if self.few(x.shape[0]) else 1.0 * x


@pytest.mark.parametrize("of_a_file", [False, True])
@pytest.mark.parametrize("batch", [2, 8])
def test_programs_for_some_batches_only_are_refused(
    batch: int, of_a_file: bool, tmp_path: Path
) -> None:
    program = torch.export.export(
        Branching(lambda size: size < 4), (torch.rand(batch, 4),), strict=False,
        dynamic_shapes=({0: Dim.DYNAMIC},),
    )  # fmt: skip
    path = saved(program, tmp_path)
    with pytest.raises(UnsupportedModel, match=r"takes batches of \d .* without limits"):
        module_of(read_program(path) if of_a_file else program)


@pytest.mark.parametrize("of_a_file", [False, True])
def test_programs_that_suppose_something_of_sizes_are_refused(
    of_a_file: bool, tmp_path: Path
) -> None:
    program = export(Branching(lambda size: size == 6), (4,))
    if not getattr(program, "_guards_code", None):
        pytest.skip("this version of torch does not note it")
    path = saved(program, tmp_path)
    with pytest.raises(UnsupportedModel, match=r"supposes something about sizes"):
        module_of(read_program(path) if of_a_file else program)


def test_sizes_are_within_the_programs_limits(tmp_path: Path) -> None:
    program = torch.export.export(
        nn.Flatten(), (torch.rand(2, 1, 5, 5),), strict=False,
        dynamic_shapes=({0: Dim("n"), 2: Dim("h", min=4, max=9)},),
    )  # fmt: skip
    for known in (read(program), read_program(saved(program, tmp_path))):
        assert known.input_shape((1, 4, 5)) == (1, 4, 5)
        for height in (3, 10):
            with pytest.raises(ValueError, match=f"4 to 9 along axis 2, not {height}"):
                known.input_shape((1, height, 5))


def entries(path: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("other", [str, str.upper])
def test_two_entries_of_one_name_are_refused(other: Callable[[str], str], tmp_path: Path) -> None:
    path = saved(export(nn.Linear(4, 2), (4,)), tmp_path)
    name, content = list(entries(path).items())[-1]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(other(name), content)
    with pytest.raises(CheckpointError, match="two entries of one name"):
        load_network(path)


class Stored(nn.Module):
    """Tensors of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("kept", torch.tensor([3.0, 4.0]))
        self.register_buffer("left", torch.tensor([5.0, 6.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.kept * self.left * torch.tensor([7.0, 8.0])


@pytest.mark.parametrize("name", ["weight", "kept", "left"])
def test_tensors_of_each_kind_have_their_place(name: str) -> None:
    model = Stored()
    program, x = export(model, (2,)), torch.rand(3, 2)
    other = program.state_dict if name == "left" else program.constants
    other[name] = torch.tensor([100.0, 100.0])
    torch.testing.assert_close(module_of(program)(x), model(x))


def test_tensors_of_a_file_have_their_place(tmp_path: Path) -> None:
    model, x = Stored(), torch.rand(3, 2)
    path = saved(export(model, (2,)), tmp_path)
    if not any(name.endswith("model_weights_config.json") for name in entries(path)):
        pytest.skip("this version of torch pickles them")
    configs = {
        place: json.loads(content)
        for name, content in entries(path).items()
        for place in ("weights", "constants")
        if name.endswith(f"model_{place}_config.json")
    }

    def both(name: str, content: bytes) -> bytes:
        if not name.endswith("model_constants_config.json"):
            return content
        config = json.loads(content)
        (left, *_) = config["config"].values()
        config["config"]["weight"] = {**configs["weights"]["config"]["weight"], **left}
        return json.dumps(config).encode()

    path = rewritten(path, str(tmp_path / "both.pt2"), both)
    torch.testing.assert_close(load_network(path).model(x), model(x))


def changed(graph: Any) -> dict[str, Callable[[], object]]:
    """Ways to change the graph of a file, so that its signature says something else."""
    inner = graph["graph_module"]["graph"]
    signature = graph["graph_module"]["signature"]
    first = inner["nodes"][0]["outputs"][0]
    (kind,) = signature["output_specs"][0]
    return {
        "result": lambda: signature["output_specs"][0][kind].update(arg=first),
        "output": lambda: inner["outputs"].__setitem__(0, first),
        "inputs": lambda: inner["inputs"].reverse(),
        "order": lambda: signature["input_specs"].reverse(),
        "name": lambda: inner["nodes"][1].update(outputs=[first]),
    }


@pytest.mark.parametrize("way", ["result", "output", "inputs", "order", "name"])
def test_the_signature_is_that_of_the_graph(way: str, tmp_path: Path) -> None:
    path = saved(export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (4,)), tmp_path)

    def altered(name: str, content: bytes) -> bytes:
        if not name.endswith(("models/model.json", "program.json")):
            return content
        graph = json.loads(content)
        changed(graph)[way]()
        return json.dumps(graph).encode()

    with pytest.raises(CheckpointError, match=r"than its signature says|two results"):
        load_network(rewritten(path, str(tmp_path / "altered.pt2"), altered))


def test_a_programs_signature_is_that_of_its_graph() -> None:
    program = export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (4,))
    (spec,) = program.graph_signature.output_specs
    spec.arg.name = "linear"
    with pytest.raises(UnsupportedModel, match="than its signature says"):
        module_of(program)


def test_random_constants_are_refused() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rarely", torch.full((4,), 1e-7))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + 1000 * torch.bernoulli(self.rarely))

    with pytest.raises(UnsupportedModel, match=r"node 'bernoulli': aten.bernoulli.* is random"):
        module_of(export(Random(), (4,)))


def test_a_refused_program_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, 2).sum(1, keepdim=True).expand(4, 2).reshape(2, 4)

    with pytest.raises(UnsupportedModel, match="for a batch what it does for each"):
        module_of(export(Mixed(), (4,), batch=2))
    assert capfd.readouterr().err == ""


def bomb(path: str, tmp_path: Path, weights: bytes) -> str:
    """A file with weights as torch pickles them."""
    content = entries(path)
    target = str(tmp_path / "bomb.pt2")
    with zipfile.ZipFile(target, "w") as archive:
        for name, entry in content.items():
            if name.endswith("model_weights_config.json"):
                archive.writestr(name.replace("model_weights_config.json", "model.pt"), weights)
            else:
                old = name.endswith("serialized_state_dict.pt")
                archive.writestr(name, weights if old else entry)
    return target


def pickled(tensors: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def test_weights_of_few_entries_are_small(tmp_path: Path) -> None:
    path = saved(export(nn.Linear(4, 2), (4,)), tmp_path)
    bias = torch.tensor([1.0, 2.0])
    small = pickled({"weight": torch.tensor([3.0]).expand(2, 4), "bias": bias})
    found = load_network(bomb(path, tmp_path, small)).model(torch.ones(1, 4))
    assert torch.equal(found, torch.tensor([[13.0, 14.0]]))
    large = pickled({"weight": torch.zeros(1).expand(2**30, 4), "bias": bias})
    with pytest.raises(CheckpointError, match="not stored entry by entry"):
        load_network(bomb(path, tmp_path, large))


def test_expanded_weights_are_read(tmp_path: Path) -> None:
    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0]).expand(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.mT

    network = load_network(saved(export(Expanded(), (4,)), tmp_path))
    assert torch.equal(network.model(torch.ones(1, 4)), torch.tensor([[12.0, 12.0]]))


def test_weights_do_not_grow(tmp_path: Path) -> None:
    path = saved(export(nn.Linear(4, 2), (4,)), tmp_path)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        whole = pickled({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})
        with zipfile.ZipFile(io.BytesIO(whole)) as old:
            for name in old.namelist():
                archive.writestr(name, old.read(name))
    for weights in (packed.getvalue(), pickle.dumps({})):
        with pytest.raises(CheckpointError, match=r"a compressed archive|not an archive"):
            load_network(bomb(path, tmp_path, weights))


def test_programs_that_take_much_memory_are_not_run() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.full((2, 4), 1.0).sum(0)

    program = export(Large(), (4,))
    (made,) = (n for n in program.graph.nodes if n.target is torch.ops.aten.full.default)
    made.args = ([2**29, 4], 1.0)
    with pytest.raises(UnsupportedModel, match=r"node 'full': .* too much memory"):
        module_of(program)


def test_large_inputs_are_refused() -> None:
    program = torch.export.export(
        nn.ReLU(), (torch.rand(2, 5),), dynamic_shapes=({0: Dim("n"), 1: Dim("k")},), strict=False
    )
    assert module_of(program, (6,))(torch.rand(1, 6)).shape == (1, 6)
    with pytest.raises(ValueError, match="takes inputs of shape"):
        module_of(program, (2**40,))


def test_sizes_without_use_are_none() -> None:
    class Permuted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 2, 2).permute(0, 2, 1).reshape(-1, 4)

    program = export(Permuted(), (4,)).run_decompositions()
    assert CertifiedModel(program, (4,)).lipschitz() == pytest.approx(1.0)


def test_a_program_for_the_examples_batch_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = export(nn.Flatten(), (2, 2))
    (flat,) = (n for n in program.graph.nodes if n.op == "call_function")
    flat.target, flat.args = torch.ops.aten.reshape.default, (flat.args[0], [5, 4])
    with pytest.raises(UnsupportedModel, match="for a batch what it does for each"):
        CertifiedModel(program, (2, 2))
    assert capfd.readouterr().err == ""
