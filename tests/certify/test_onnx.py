from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import models
from certify import CertifiedModel, UnsupportedModel
from certify.checkpoints import CheckpointError
from certify.cli import main
from certify.weights import load_network


def exported(
    model: nn.Module, shape: tuple[int, ...], path: Path, *, modern: bool, fixed: bool = False
) -> str:
    """Write an ONNX file, by either exporter of torch."""
    pytest.importorskip("onnxscript" if modern else "onnx")
    options: dict[str, Any] = {"dynamo": modern, "input_names": ["x"], "verbose": False}
    if not fixed:
        axes = {0: torch.export.Dim.DYNAMIC} if modern else {0: "batch"}
        options |= {"dynamic_shapes": (axes,)} if modern else {"dynamic_axes": {"x": axes}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch.onnx.export(model.eval(), (torch.rand(2, *shape),), str(path), **options)
    return str(path)


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(1)
    small = {"input_shape": (1, 12, 12), "width": 4}
    return {
        "mlp": (models.build("mlp", hidden=(8,), input_shape=(1, 4, 4)), (1, 4, 4)),
        "maxmin": (models.build("2c2f", **small, mean=(0.5,), std=(0.25,)), (1, 12, 12)),
        "relu": (models.build("2c2f", activation="relu", **small), (1, 12, 12)),
        "pooled": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                nn.Dropout(), nn.AvgPool2d(3, 2, padding=1), nn.LeakyReLU(0.25),
                nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU6(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
            ),
            (1, 12, 12),
        ),
        "residual": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), BasicBlock(4, 4), nn.Flatten(),
                nn.Linear(4 * 36, 3),
            ),
            (1, 6, 6),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", nets())
def test_bounds_are_those_of_the_module(
    name: str, fixed: bool, modern: bool, tmp_path: Path
) -> None:
    model, shape = nets()[name]
    network = load_network(
        exported(model, shape, tmp_path / "net.onnx", modern=modern, fixed=fixed)
    )
    assert network.input_shape == shape
    expected, found = CertifiedModel(model, shape), CertifiedModel(network.model, shape)
    x = torch.rand(4, *shape)
    # The exporters fold normalisation into convolutions, in float32.
    torch.testing.assert_close(found.lipschitz(), expected.lipschitz(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.logits(x), expected.logits(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.certify(x).radius, expected.certify(x).radius, rtol=1e-4, atol=1e-5
    )
    assert found.rounding_is_known
    if name in ("mlp", "maxmin", "relu"):
        torch.testing.assert_close(found.lipschitz(), expected.lipschitz(), rtol=1e-9, atol=0.0)
        torch.testing.assert_close(found.logits(x), expected.logits(x), rtol=1e-12, atol=1e-12)


class Function(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "cast":
            return x.half().float()
        if self.name == "batch":
            return x - x.mean(0, keepdim=True)
        return torch.sin(x) if self.name == "sine" else torch.softmax(x, 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cast", "conversion to another type"),
        ("batch", "batch"),
        ("sine", "Sin of ONNX is not known"),
        ("softmax", "Softmax of ONNX is not known"),
    ],
)
def test_what_cannot_be_certified_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    path = exported(Function(name), (4,), tmp_path / "net.onnx", modern=False)
    with pytest.raises(UnsupportedModel, match=reason):
        CertifiedModel(load_network(path).model, (4,))


def graph_of(*nodes: Any, sizes: Any = ("n", 4), opset: int = 13, **stored: Tensor) -> Any:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    real = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", real, sizes)],
        [helper.make_tensor_value_info("y", real, ("n", "c"))],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_asymmetric_padding_and_slices(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    model = graph_of(
        make("Conv", ["x", "w"], ["a"], pads=[0, 1, 2, 0], name="conv"),
        make("Slice", ["a", "from", "to", "axis"], ["b"]),
        make("Split", ["b"], ["c", "d"], axis=1),
        make("Max", ["c", "d"], ["e"]),
        make("ReduceMean", ["e"], ["y"], axes=[2, 3], keepdims=0),
        sizes=("n", 1, 5, 6),
        w=torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0)),
        **{"from": torch.tensor([1]), "to": torch.tensor([9]), "axis": torch.tensor([2])},
    )
    path = tmp_path / "net.onnx"
    onnx.save(model, str(path))
    network = load_network(str(path))
    assert network.input_shape == (1, 5, 6)
    assert CertifiedModel(network.model, (1, 5, 6)).lipschitz() > 0


def test_the_shape_is_the_files(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = graph_of(
        onnx.helper.make_node("GlobalAveragePool", ["x"], ["a"]),
        onnx.helper.make_node("Flatten", ["a"], ["y"]),
        sizes=("n", 2, "h", 5),
    )
    path = str(tmp_path / "net.onnx")
    onnx.save(model, path)
    assert load_network(path, input_shape=(2, 3, 5)).input_shape == (2, 3, 5)
    with pytest.raises(ValueError, match="pass the input shape"):
        load_network(path)
    with pytest.raises(ValueError, match="not of shape"):
        load_network(path, input_shape=(2, 3, 6))


def test_constants_that_are_computed_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = graph_of(
        onnx.helper.make_node("Exp", ["w"], ["v"], name="e"),
        onnx.helper.make_node("Mul", ["x", "v"], ["y"]),
        w=torch.rand(4),
    )
    path = str(tmp_path / "net.onnx")
    onnx.save(model, path)
    with pytest.raises(UnsupportedModel, match="node 'e': Exp computes constants"):
        load_network(path)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model, shape = nets()["mlp"]
    path = tmp_path / "net.onnx"
    whole = Path(exported(model, shape, path, modern=False)).read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not an ONNX file, or it is damaged"):
            load_network(str(path))
        result = CliRunner().invoke(main, ["bound", "--model", str(path)])
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CheckpointError, match=r"pip install onnx; or export .* torch.export"):
        load_network(str(path))


def test_command_line(tmp_path: Path) -> None:
    model = models.build("mlp", hidden=(8,), input_shape=(1, 28, 28))
    path = exported(model, (1, 28, 28), tmp_path / "net.onnx", modern=False)
    images = ["--dataset", "mnist-5k", "--limit", "20"]
    result = CliRunner().invoke(main, ["eval", "--model", path, *images])
    assert result.exit_code == 0, result.output


def test_the_size_of_a_batch_is_no_number(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    size = [make("Shape", ["x"], ["s"]), make("Gather", ["s", "zero"], ["n"])]
    zero, minus, three = torch.tensor([0]), torch.tensor([-1]), torch.tensor([3])
    graphs = {
        "scaled": [
            *size,
            make("Cast", ["n"], ["r"], to=1),
            make("Mul", ["x", "r"], ["y"]),
        ],
        "divided": [
            *size,
            make("Div", ["n", "three"], ["m"]),
            make("Concat", ["m", "minus"], ["t"], axis=0),
            make("Reshape", ["x", "t"], ["y"]),
        ],
        "last": [
            *size,
            make("Concat", ["minus", "n"], ["t"], axis=0),
            make("Reshape", ["x", "t"], ["y"]),
        ],
        "index": [*size, make("Slice", ["x", "zero", "n", "three"], ["y"])],
        "added": [*size, make("Add", ["x", "n"], ["y"])],
        "filled": [*size, make("ConstantOfShape", ["n"], ["c"]), make("Add", ["x", "c"], ["y"])],
        "itself": [make("Shape", ["x"], ["s"]), make("Gather", ["s", "s"], ["y"])],
        "result": [make("Shape", ["x"], ["y"])],
    }
    for nodes in graphs.values():
        path = str(tmp_path / "net.onnx")
        onnx.save(graph_of(*nodes, sizes=("n", 5), zero=zero, minus=minus, three=three), path)
        with pytest.raises(UnsupportedModel, match="with the number of inputs in a batch"):
            load_network(path)


def test_the_size_of_a_batch_is_a_first_size(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    model = graph_of(
        make("Shape", ["x"], ["s"]),
        make("Gather", ["s", "zero"], ["n"]),
        make("Cast", ["n"], ["i"], to=7),
        make("Unsqueeze", ["i", "first"], ["u"]),
        make("Concat", ["u", "rest"], ["t"], axis=0),
        make("Reshape", ["x", "t"], ["y"]),
        sizes=("n", 2, 3),
        zero=torch.tensor(0),
        first=torch.tensor([0]),
        rest=torch.tensor([-1]),
    )
    path = str(tmp_path / "net.onnx")
    onnx.save(model, path)
    network = load_network(path)
    assert CertifiedModel(network.model, (2, 3)).lipschitz() == pytest.approx(1.0)
    assert network.model(torch.rand(3, 2, 3)).shape == (3, 6)


@pytest.mark.parametrize("sizes", [(5, 4), (20,)])
def test_a_batch_of_any_size_is_compared_at_several(sizes: tuple[int, ...], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = graph_of(
        onnx.helper.make_node("Reshape", ["x", "s"], ["a"]),
        onnx.helper.make_node("Reshape", ["a", "t"], ["y"]),
        s=torch.tensor(sizes),
        t=torch.tensor([5, 4]),
    )
    path = str(tmp_path / "net.onnx")
    onnx.save(model, path)
    with pytest.raises(UnsupportedModel, match="for a batch what it does for each"):
        load_network(path)


def test_sizes_of_moved_axes_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    model = graph_of(
        make("Transpose", ["x"], ["a"]),  # without another use
        make("Shape", ["a"], ["s"]),
        make("Gather", ["s", "one"], ["n"]),
        make("Div", ["n", "eight"], ["m"]),  # none in the examples
        make("Add", ["m", "four"], ["c"]),
        make("Concat", ["minus", "c"], ["t"], axis=0),
        make("Reshape", ["x", "t"], ["y"]),
        one=torch.tensor([1]),
        eight=torch.tensor([8]),
        four=torch.tensor([4]),
        minus=torch.tensor([-1]),
    )
    path = str(tmp_path / "net.onnx")
    onnx.save(model, path)
    with pytest.raises(UnsupportedModel, match="moving the batch axis"):
        CertifiedModel(load_network(path).model, (4,))


def test_functions_of_a_file_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make, opset = onnx.helper.make_node, onnx.helper.make_opsetid("", 13)
    model = graph_of(make("Relu", ["x"], ["y"]))
    body = [make("Abs", ["a"], ["b"]), make("Add", ["a", "b"], ["c"])]
    model.functions.append(onnx.helper.make_function("", "Relu", ["a"], ["c"], body, [opset]))
    path = str(tmp_path / "net.onnx")
    onnx.save(model, path)
    with pytest.raises(UnsupportedModel, match="functions of its own"):
        load_network(path)


def assert_one_line(model: Any, path: Path, reason: str) -> None:
    """Assert that the command line refuses a file, and says why."""
    path.write_bytes(model.SerializeToString())
    result = CliRunner().invoke(main, ["bound", "--model", str(path)])
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert reason in result.output


@pytest.mark.parametrize("sizes", [("n", 2**20, 2**20), ("n", 2**62, 2**62), ("n", -3), (-3, 4)])
def test_large_and_negative_inputs_are_one_line(sizes: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = graph_of(onnx.helper.make_node("Relu", ["x"], ["y"]), sizes=sizes)
    assert_one_line(model, tmp_path / "net.onnx", "takes inputs of shape")


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "INT4", "STRING", "COMPLEX64", None])
def test_constants_of_other_types_are_one_line(kind: str | None, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = graph_of(onnx.helper.make_node("Mul", ["x", "w"], ["y"]), w=torch.ones(4))
    stored = model.graph.initializer[0]
    stored.data_type = 99 if kind is None else onnx.TensorProto.DataType.Value(kind)
    stored.raw_data = b""
    if kind == "STRING":
        stored.string_data.extend([b"a"] * 4)
    elif kind == "COMPLEX64":
        stored.raw_data = bytes(32)
    elif kind is not None:
        stored.raw_data = bytes({"BFLOAT16": 8, "FLOAT8E4M3FN": 4, "INT4": 2}[kind])
    assert_one_line(model, tmp_path / "net.onnx", "Error: ")


def test_constants_that_are_too_large_are_not_made(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    few = [
        make("Concat", [name] * 2, [name + "'"], axis=0)
        for name in ("w" + "'" * n for n in range(40))
    ]
    for first in (
        [make("ConstantOfShape", ["many"], ["c"])],
        [make("Range", ["zero", "large", "one"], ["c"])],
        [*few, make("Identity", ["w" + "'" * 40], ["c"])],
    ):
        model = graph_of(
            *first,
            make("Mul", ["x", "c"], ["y"]),
            w=torch.ones(4),
            many=torch.tensor([2**20, 2**20]),
            zero=torch.tensor(0),
            one=torch.tensor(1),
            large=torch.tensor(2**40),
        )
        assert_one_line(model, tmp_path / "net.onnx", "makes too large a tensor")


@pytest.mark.parametrize("opset", [7, 9, 13, 15])
def test_normalisation_of_every_opset(opset: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    names = ("scale", "offset", "mean", "variance")
    stored = {name: torch.rand(3) + 0.5 for name in names}
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["a"], epsilon=1e-3)
    flat = onnx.helper.make_node("Flatten", ["a"], ["y"])
    path = tmp_path / "net.onnx"
    onnx.save(graph_of(node, flat, sizes=("n", 3, 2), opset=opset, **stored), str(path))
    model = nn.BatchNorm1d(3, eps=1e-3).eval()
    for mine, name in zip(("weight", "bias", "running_mean", "running_var"), names, strict=True):
        getattr(model, mine).data = stored[name]
    found = CertifiedModel(load_network(str(path)).model, (3, 2))
    expected = CertifiedModel(nn.Sequential(model, nn.Flatten()), (3, 2))
    torch.testing.assert_close(found.lipschitz(), expected.lipschitz(), rtol=1e-6, atol=0.0)
    if opset == 7:
        node.attribute.append(onnx.helper.make_attribute("spatial", 0))
        other = graph_of(node, flat, sizes=("n", 3, 2), opset=opset, **stored)
        assert_one_line(other, path, "spatial=0")


def test_files_before_opset_7_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Mul", ["x", "w"], ["y"], broadcast=1, axis=1)
    model = graph_of(node, sizes=("n", 4, 4), opset=6, w=torch.rand(4))
    assert_one_line(model, tmp_path / "net.onnx", "opset [6]")
