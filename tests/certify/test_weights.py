from __future__ import annotations

import copy
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from certify.checkpoints import Checkpoint, CheckpointError
from certify.weights import load_network

WriteCode = Callable[[str, str], None]

NETS = """
from torch import nn

def make(num_classes=3, width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = make()
    def forward(self, x):
        return self.module(x)

class Stateful(nn.Linear):
    def __init__(self):
        super().__init__(16, 3)
    def get_extra_state(self):
        return {"a": 1}
    def set_extra_state(self, state):
        pass
"""


@pytest.fixture
def trained(write_code: WriteCode) -> nn.Module:
    write_code("nets.py", NETS)
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    model(torch.rand(50, 1, 4, 4))  # statistics of its own
    return model.eval()


def load(path: str | Path, **options: Any) -> nn.Module:
    return load_network(path, **{"arch": "nets:make", "input_shape": (1, 4, 4), **options}).model


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    x = torch.rand(5, 1, 4, 4)
    assert not model.training
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize(
    "pack",
    [
        lambda state: state,
        dict,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state, "state_dict": None},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    ],
    ids=["plain", "dict", "state_dict", "model", "model_state_dict", "parallel", "a", "b", "old"],
)
def test_state_dicts(
    trained: nn.Module, pack: Callable[[Mapping[str, Tensor]], Any], tmp_path: Path
) -> None:
    torch.save(pack(trained.state_dict()), tmp_path / "weights.pth")
    loaded = load_network("weights.pth", arch="nets:make", input_shape=(1, 4, 4))
    assert_same(loaded.model, trained)
    assert loaded.name == "nets:make"
    assert loaded.description == "weights.pth (nets:make)"
    assert loaded.input_shape == (1, 4, 4)
    assert loaded.dataset is None


def test_safetensors(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(trained.state_dict()), "weights.safetensors")
    assert_same(load("weights.safetensors"), trained)
    whole = Path("weights.safetensors").read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CheckpointError, match=r"half\.safetensors is no safetensors file, or it is"
    ):
        load("half.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load("none.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        load("weights.safetensors")


def test_a_module_named_module_keeps_its_prefix(trained: nn.Module) -> None:
    state = {f"module.{name}": value for name, value in trained.state_dict().items()}
    torch.save(state, "weights.pt")
    assert_same(load("weights.pt", arch="nets:Wrapped"), trained)
    state = {f"module.{name}": value for name, value in state.items()}
    torch.save(state, "parallel.pt")
    with pytest.raises(CheckpointError, match=r"'module\.0\.weight' .* is missing"):
        load("parallel.pt", arch="nets:Wrapped")  # cannot be told apart


@pytest.mark.parametrize("keep", [lambda state: state, dict], ids=["versions", "none"])
def test_modules_that_look_at_their_version(keep: Callable[[Any], Any], tmp_path: Path) -> None:
    """torchvision's MNASNet refuses weights of an unknown version; safetensors keeps none."""
    arch, path = "torchvision:mnasnet0_5", tmp_path / "weights.pt"
    state = load_network(arch, num_classes=2).model.state_dict()
    torch.save(keep(state), path)
    loaded = load_network(path, arch=arch, num_classes=2).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_the_model_keeps_its_dtype(trained: nn.Module) -> None:
    torch.save(copy.deepcopy(trained).double().state_dict(), "weights.pt")
    model = load("weights.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(model, trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"4.weight": None}, r"nets:make: '4\.weight' is missing in the file$"),
        ({"0.weight": None, "4.bias": None}, r"'0\.weight' \(and 1 more\) is missing"),
        ({"5.weight": torch.zeros(2)}, r"'5\.weight' is unknown to the architecture"),
        ({"4.weight": torch.zeros(10, 16)}, r"'4\.weight' should be \(3, 16\), is \(10, 16\)"),
        ({"4.bias": torch.zeros(3, dtype=torch.cfloat)}, "should be torch.float32, is torch.comp"),
        ({"4.bias": torch.zeros(3, dtype=torch.int64)}, "should be torch.float32, is torch.int64"),
        ({"4.bias": torch.zeros(3, device="meta")}, "do not fit nets:make: "),
    ],
    ids=str,
)
def test_weights_that_do_not_fit(
    trained: nn.Module, change: dict[str, Tensor | None], message: str
) -> None:
    state = {**trained.state_dict(), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        load("weights.pt")


def test_foolish_versions_are_an_error_and_no_crash(trained: nn.Module) -> None:
    for versions in (3, {"": 3}, {"1": {"version": "new"}}):
        state = OrderedDict(trained.state_dict())
        state._metadata = versions  # type: ignore[attr-defined]
        torch.save(state, "weights.pt")
        with pytest.raises(CheckpointError, match="do not fit nets:make"):
            load("weights.pt")


@pytest.mark.parametrize(
    "content",
    [
        3,
        [torch.zeros(2)],
        {},
        {"state_dict": {}},
        {"state_dict": {"a": 1}},
        {"net": {"a": torch.zeros(1)}},
        {1: torch.zeros(1)},
    ],
    ids=str,
)
def test_files_without_a_state_dict(trained: nn.Module, content: Any) -> None:
    torch.save(content, "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt holds no state dict"):
        load("weights.pt")


def test_state_that_is_no_tensor_is_not_loaded(trained: nn.Module) -> None:
    torch.save({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, "weights.pt")
    with pytest.raises(CheckpointError, match="'_extra_state' is missing"):
        load("weights.pt", arch="nets:Stateful")


def test_pickled_modules_do_not_run(trained: nn.Module) -> None:
    torch.save(trained, "model.pt")
    with pytest.raises(CheckpointError, match=r"not a checkpoint.*torch\.save\(model\.state_dict"):
        load("model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch calls this deprecated
        torch.jit.save(torch.jit.trace(trained, torch.rand(1, 1, 4, 4)), "script.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load("script.pt")


def test_settings_and_classes(trained: nn.Module) -> None:
    big = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    big.append(nn.Linear(24, 9)).eval()
    torch.save(big.state_dict(), "weights.pt")
    assert_same(load("weights.pt", num_classes=9, hyperparameters={"width": 6}), big)
    settings = {"width": 6, "num_classes": 9}
    assert_same(load("weights.pt", num_classes=3, hyperparameters=settings), big)


def test_architectures_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.build("mlp", hidden=(6,), input_shape=(1, 4, 4), num_classes=3).eval()
    torch.save(model.state_dict(), "weights.pt")
    settings = {"hidden": [6]}
    assert_same(load("weights.pt", arch="mlp", num_classes=3, hyperparameters=settings), model)


def test_arguments_that_do_not_go_together(trained: nn.Module) -> None:
    torch.save(trained.state_dict(), "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt holds weights only; pass --arch"):
        load("weights.pt", arch=None)
    with pytest.raises(ValueError, match=r"pass --input-shape.*nets:make alone does not tell"):
        load("weights.pt", input_shape=None)
    with pytest.raises(ValueError, match="nets:make names an architecture"):
        load("nets:make")
    with pytest.raises(ValueError, match="pass both or neither"):
        load("weights.pt", mean=[0.5])
    with pytest.raises(ValueError, match="for each of 1 channels, got 3"):
        load("weights.pt", mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match="one positive std per channel"):
        load("weights.pt", mean=[0.5], std=[0])
    with pytest.raises(CheckpointError, match="no checkpoint at resnet19"):
        load_network("resnet19")


def test_normalization_in_front(trained: nn.Module) -> None:
    torch.save(trained.state_dict(), "weights.pt")
    model = load("weights.pt", mean=[0.5], std=[2])
    x = torch.rand(3, 1, 4, 4)
    assert not model.training
    assert torch.equal(model(x), trained((x - 0.5) / 2))


def test_an_architecture_alone(trained: nn.Module) -> None:
    loaded = load_network("torchvision:resnet18", num_classes=2)
    assert loaded.description == "torchvision:resnet18 (randomly initialised)"
    assert loaded.input_shape == (3, 224, 224)
    own = load_network("nets:make", input_shape=(1, 4, 4))
    assert own.description == "nets:make (its factory's own weights)"
    before = torch.get_rng_state()
    again = load_network("nets:make", input_shape=(1, 4, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert_same(again.model, own.model)


def checkpoint_of(trained: nn.Module, **changes: Any) -> Checkpoint:
    fields: dict[str, Any] = {
        "model": "nets:make",
        "hyperparameters": {"num_classes": 3},
        "state_dict": trained.state_dict(),
        "input_shape": (1, 4, 4),
        "classes": ("a", "b", "c"),
        "dataset": "mnist-5k",
        "data_dir": "somewhere",
    }
    return Checkpoint(**{**fields, **changes})


def test_a_checkpoint_imports_nothing_by_itself(trained: nn.Module, write_code: WriteCode) -> None:
    write_code("nets_trap.py", "open('executed', 'w').close()\n")
    checkpoint_of(trained, model="nets_trap:make").save("ckpt.pt")
    with pytest.raises(CheckpointError, match="pass --arch nets_trap:make"):
        load_network("ckpt.pt")
    for name in ("nets_trap:", "nets_trap", "nets_trap:make it", "./nets_trap:make"):
        checkpoint_of(trained, model=name).save("ckpt.pt")
        with pytest.raises(CheckpointError, match="do not fit"):
            load_network("ckpt.pt")
    assert not Path("executed").exists()
    assert "nets_trap" not in sys.modules


def test_a_checkpoint_of_the_users_architecture(trained: nn.Module) -> None:
    checkpoint_of(trained).save("ckpt.pt")
    loaded = load_network("ckpt.pt", arch="nets:make", num_classes=77)
    assert_same(loaded.model, trained)
    assert (loaded.dataset, loaded.data_dir) == ("mnist-5k", "somewhere")
    assert loaded.input_shape == (1, 4, 4)
    assert load_network("ckpt.pt", arch="nets:make", input_shape=(1, 8, 8)).input_shape[1] == 8
    with pytest.raises(CheckpointError, match=r"in ckpt.pt do not fit nets:make: '0\.weight' shou"):
        load_network("ckpt.pt", arch="nets:make", hyperparameters={"width": 9})
    with pytest.raises(ValueError, match="--mean and --std are for networks trained elsewhere"):
        load_network("ckpt.pt", arch="nets:make", mean=[0.5], std=[1.0])
    with pytest.raises(ValueError, match="--set needs --arch"):
        load_network("ckpt.pt", hyperparameters={"width": 9})
    checkpoint_of(trained, state_dict={}).save("ckpt.pt")
    with pytest.raises(CheckpointError, match="is missing in the file"):
        load_network("ckpt.pt", arch="nets:make")


def test_another_version_of_checkpoints(trained: nn.Module) -> None:
    content = {"format": "certify checkpoint 2", "state_dict": trained.state_dict()}
    torch.save(content, "ckpt.pt")
    with pytest.raises(CheckpointError, match="was not written by this version"):
        load_network("ckpt.pt", arch="nets:make")


def test_checkpoints_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most are laid out without memory; where torchvision cannot, the user is asked."""
    monkeypatch.chdir(tmp_path)
    for name in ("squeezenet1_1", "mnasnet0_5", "regnet_x_400mf"):
        arch = f"torchvision:{name}"
        model = load_network(arch, num_classes=2).model
        changes = {"model": arch, "hyperparameters": {"num_classes": 2}}
        checkpoint_of(model, input_shape=(3, 32, 32), **changes).save("ckpt.pt")
        if name.startswith("regnet"):
            with pytest.raises(CheckpointError, match=f"pass --arch {arch}"):
                load_network("ckpt.pt")
            loaded = load_network("ckpt.pt", arch=arch)
        else:
            loaded = load_network("ckpt.pt")
        x = torch.rand(1, 3, 64, 64)
        assert torch.equal(loaded.model(x), model(x))
