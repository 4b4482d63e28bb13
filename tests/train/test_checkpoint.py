"""Checkpoints: whole or not there, refused when damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from openm6.core.errors import OpenM6Error
from openm6.core.files import write_whole
from openm6.model.files import load_model
from openm6.train.checkpoint import Checkpoints, all_checkpoints, consolidate
from openm6.train.distributed import Group
from openm6.train.optimizer import Muon
from tests.conftest import tiny_model


def parts() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(checkpoints: Checkpoints, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    def describe(folder: Path) -> None:
        folder.mkdir()
        (folder / "card.json").write_text("{}")

    checkpoints.save(step, describe, model, [optimizer], {"note": step})
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    return latest


def open_at(path: Path) -> Checkpoints:
    return Checkpoints(path, keep=2, group=Group(0, 1, torch.device("cpu")))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    model, optimizer = parts()
    checkpoints = open_at(tmp_path)
    save(checkpoints, 7, model, optimizer)
    drawn = torch.rand(4)
    other, others = parts()
    latest = checkpoints.latest()
    assert latest is not None
    state = checkpoints.restore(latest, other, [others])
    assert state == {"note": 7, "step": 7}
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(torch.rand(4), drawn)
    moments, expected = (o.state_dict()["state"] for o in (others, optimizer))
    assert all(torch.equal(moments[i][k], expected[i][k]) for i in expected for k in expected[i])


def test_only_the_last_ones_stay(tmp_path: Path) -> None:
    model, optimizer = parts()
    checkpoints = open_at(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step, model, optimizer)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model, optimizer = parts()
    path = save(open_at(tmp_path), 1, model, optimizer)
    file = next((path / "state").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(OpenM6Error, match=r"step-00000001 is damaged; delete it"):
        open_at(tmp_path).restore(path, model, [optimizer])


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = parts()
    path = save(open_at(tmp_path), 1, model, optimizer)
    other: list[torch.optim.Optimizer] = [optimizer, Muon([model.weight])]
    with pytest.raises(
        OpenM6Error, match=r"step-00000001 was not made with this recipe's train.optimizer \(AdamW, Muon\)"
    ):
        open_at(tmp_path).restore(path, model, other)


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    model, optimizer = parts()
    path = save(open_at(tmp_path), 1, model, optimizer)
    other = nn.Linear(4, 2)
    with pytest.raises(OpenM6Error, match=r"weight is \[2, 3\] there and is \[2, 4\] here"):
        open_at(tmp_path).restore(path, other, [torch.optim.AdamW(other.parameters())])
    more = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(OpenM6Error, match=r"0.bias is missing there and is \[2\] here"):
        open_at(tmp_path).restore(path, more, [torch.optim.AdamW(more.parameters())])


def test_values_are_those_of_the_moment_of_saving(tmp_path: Path) -> None:
    """Training goes on while the checkpoint is written."""
    model, optimizer = parts()
    expected = model.weight.detach().clone()
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, Path.mkdir, model, [optimizer], {})
    with torch.no_grad():
        model.weight.zero_()
    checkpoints.wait()
    other, others = parts()
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.restore(latest, other, [others])
    assert torch.equal(other.weight, expected)


def test_a_write_that_fails_is_told_and_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = parts()
    checkpoints = open_at(tmp_path)
    save(checkpoints, 1, model, optimizer)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("openm6.train.checkpoint.publish", full)
    checkpoints.save(2, Path.mkdir, model, [optimizer], {})
    with pytest.raises(OpenM6Error, match="step-00000002 could not be written .no space left on device."):
        checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_consolidated_in_several_files_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    path = save(open_at(tmp_path), 1, model, torch.optim.AdamW(model.parameters()))
    model.config.save(path)
    for name, size in (("one", 2**30), ("many", 20_000)):
        monkeypatch.setattr("openm6.model.files.SHARD", size)
        consolidate(path, tmp_path / name)
        loaded = load_model(tmp_path / name)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_whole(target, lambda folder: (folder / "a").write_text("old") and None)

    def fails(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OpenM6Error, match="could not be written .no space left on device.; what was saved before"):
        write_whole(target, fails)
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_files_that_may_not_grow_fail_cleanly(tmp_path: Path) -> None:
    """A real refusal by the operating system in the middle of a tensor file."""
    code = f"""
import resource
from pathlib import Path
import torch
from safetensors.torch import save_file
from openm6.core.files import write_whole
from openm6.core.errors import OpenM6Error
from openm6.model.files import load_model
target = Path({str(tmp_path / "model")!r})
write_whole(target, lambda f: save_file({{"a": torch.zeros(10)}}, f / "m.safetensors"))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_whole(target, lambda f: save_file({{"a": torch.zeros(1_000_000)}}, f / "m.safetensors"))
except OpenM6Error as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "could not be written" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "m.safetensors").stat().st_size < 200
