"""Checkpoints: whole or not there, refused when damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from openm6.atomic import write_whole
from openm6.errors import OpenM6Error
from openm6.train.checkpoint import Checkpoints
from openm6.train.muon import Muon


def parts() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(checkpoints: Checkpoints, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    from safetensors.torch import save_file

    def save_model(folder: Path) -> None:
        folder.mkdir()
        save_file(dict(model.state_dict()), folder / "model.safetensors")

    return checkpoints.save(step, save_model, [optimizer], {"note": step})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    model, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, keep=2)
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
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        save(checkpoints, step, model, optimizer)
    assert [p.name for p in checkpoints.all()] == ["step-00000002", "step-00000003"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model, optimizer = parts()
    path = save(Checkpoints(tmp_path, keep=2), 1, model, optimizer)
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(OpenM6Error, match=r"step-00000001 is damaged; delete it"):
        Checkpoints(tmp_path, keep=2).restore(path, model, [optimizer])


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = parts()
    path = save(Checkpoints(tmp_path, keep=2), 1, model, optimizer)
    other: list[torch.optim.Optimizer] = [optimizer, Muon([model.weight])]
    with pytest.raises(
        OpenM6Error, match=r"step-00000001 was not made with this recipe's train.optimizer \(AdamW, Muon\)"
    ):
        Checkpoints(tmp_path, keep=2).restore(path, model, other)


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


def test_files_that_may_not_grow_fail_cleanly(tmp_path: Path) -> None:
    """A real refusal by the operating system in the middle of a tensor file."""
    code = f"""
import resource
from pathlib import Path
import torch
from safetensors.torch import save_file
from openm6.atomic import write_whole
from openm6.errors import OpenM6Error
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
