from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from certify.checkpoints import Checkpoint, CheckpointError, load_checkpoint, load_model


def example(**changes: Any) -> Checkpoint:
    torch.manual_seed(0)
    hyperparameters = {"hidden": (8,), "input_shape": (1, 4, 4), "num_classes": 3}
    model = models.build("mlp", **hyperparameters)
    fields: dict[str, Any] = {
        "model": "mlp",
        "hyperparameters": hyperparameters,
        "state_dict": model.state_dict(),
        "input_shape": (1, 4, 4),
        "classes": ("a", "b", "c"),
        "dataset": "mnist-5k",
    }
    return Checkpoint(**{**fields, **changes})


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_round_trip(tmp_path: Path) -> None:
    saved = example()
    saved.save(tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    assert loaded.classes == saved.classes
    assert loaded.input_shape == (1, 4, 4)
    model = load_model(tmp_path / "ckpt.pt")
    assert not model.training
    x = torch.rand(5, 1, 4, 4)
    reference = saved.build()
    assert torch.equal(model(x), reference(x))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["2c2f", "4c3f", "resnet20"])
def test_every_architecture_survives(tmp_path: Path, name: str) -> None:
    model = models.build(name, width=4).eval()
    shape = (3, 32, 32) if name == "resnet20" else (1, 28, 28)
    saved = example(model=name, hyperparameters={"width": 4}, state_dict=model.state_dict())
    saved.save(tmp_path / "ckpt.pt")
    x = torch.rand(2, *shape)
    assert torch.equal(load_model(tmp_path / "ckpt.pt")(x), model(x))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    example().save(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        example(progress={"cannot be saved": lambda: None}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["ckpt.pt"]


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(
            CheckpointError, match=r"no checkpoint at|is a folder; name the ckpt\.pt in it"
        ):
            load_checkpoint(path)


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    example().save(path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a checkpoint, or it is damaged"):
            load_checkpoint(path)
    weight = max(example().state_dict.values(), key=torch.numel)
    place = whole.index(weight.numpy().tobytes()) + 3  # a number becomes another one
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    path.write_bytes(b"hello, I am a text file")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)


def test_hostile_pickles_do_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "ckpt.pt", tmp_path / "executed"
    torch.save({"format": "certify checkpoint 1", "model": Hostile(trace)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"weight": torch.zeros(2)},
        {"format": "certify checkpoint 1"},
        {"format": "certify checkpoint 1", "model": "mlp", "surprise": 1},
    ],
    ids=str,
)
def test_foreign_files(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"was not written by|its fields are not"):
        load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": 3},
        {"hyperparameters": [1]},
        {"state_dict": {"0.mean": "text"}},
        {"input_shape": ("a",)},
        {"input_shape": 4},
        {"dataset": None},
        {"config": 1},
        {"config": {"method": ["x"]}},
        {"input_shape": (1, 20_000, 20_000)},
        {"input_shape": (1, 0, 4)},
    ],
    ids=str,
)
def test_fields_of_another_type(tmp_path: Path, wrong: dict[str, Any]) -> None:
    example(**wrong).save(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="its fields are not"):
        load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "resnet20"},
        {"model": "unknown"},
        {"hyperparameters": {"hidden": (9,), "input_shape": (1, 4, 4), "num_classes": 3}},
        {"hyperparameters": {"depth": 3}},
        # Laying this out in memory would take 80 GB.
        {"hyperparameters": {"hidden": (100_000, 100_000), "input_shape": (1, 4, 4)}},
        {"state_dict": {}},
    ],
    ids=str,
)
def test_weights_of_another_architecture(tmp_path: Path, wrong: dict[str, Any]) -> None:
    example(**wrong).save(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="the weights do not fit the architecture"):
        load_model(tmp_path / "ckpt.pt")


def test_weights_that_are_not_in_the_file(tmp_path: Path) -> None:
    """A few bytes that stand for gigabytes."""
    hyperparameters = {"hidden": (10**9,), "input_shape": (1, 4, 4), "num_classes": 3}
    with torch.device("meta"):
        shapes = models.build("mlp", **hyperparameters).state_dict()
    one = torch.zeros(1)
    for state in ({n: one.expand(s.shape) for n, s in shapes.items()}, dict(shapes)):
        saved = example(hyperparameters=hyperparameters, state_dict=state)
        saved.save(tmp_path / "ckpt.pt")
        assert (tmp_path / "ckpt.pt").stat().st_size < 10_000
        with pytest.raises(CheckpointError, match="is not stored entry by entry"):
            load_model(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("name", "depth"), [("resnet20", 6 * 10**6 + 2), ("liresnet", (10**8, 1))], ids=str
)
def test_an_architecture_without_end_is_given_up(tmp_path: Path, name: str, depth: object) -> None:
    example(model=name, hyperparameters={"depth": depth}).save(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="far more layers than the file has weights"):
        load_model(tmp_path / "ckpt.pt")


def test_weights_of_another_dtype(tmp_path: Path) -> None:
    state = {name: value.double() for name, value in example().state_dict.items()}
    example(state_dict=state).save(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"should be torch\.float32"):
        load_model(tmp_path / "ckpt.pt")


def test_the_users_architecture_is_not_imported(tmp_path: Path) -> None:
    example(model="antigravity:main").save(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="pass --arch antigravity:main"):
        load_model(tmp_path / "ckpt.pt")
    assert "antigravity" not in sys.modules


def test_torchvision_fetches_nothing(tmp_path: Path) -> None:
    hyperparameters = {"weights": "DEFAULT"}
    example(model="torchvision:resnet18", hyperparameters=hyperparameters).save(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="is built without weights"):
        load_model(tmp_path / "c.pt")
