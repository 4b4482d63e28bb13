"""Plans: the machines of the papers, the quickest layout, offload, time, energy, and the command."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from openm6.core.energy import carbon_intensity
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.units import size_of
from openm6.data.loader import Loader
from openm6.model import ModelConfig
from openm6.model.count import count_parameters, training_flops
from openm6.model.files import meta_model
from openm6.plan.footprint import (
    Layout,
    Work,
    buffers,
    weights_of,
)
from openm6.plan.hardware import HARDWARE, hardware
from openm6.plan.planner import GIB, Fixed, make_plan, usable
from openm6.plan.steptime import Machine, step_flops
from openm6.train.offload import Offload
from tests.plan.test_footprint import total
from tests.tasks.conftest import picture


def on(name: str, gpus: int, **changes: Any) -> Machine:
    return Machine(gpus, replace(hardware(name), **changes))


PAPERS = [
    ("m6-10b", on("a100-40g", 8), "adamw"),
    ("m6-t-100b", on("a100-80g", 128), "adamw"),
    ("m6-t-100b", on("a100-40g", 128), "adamw"),
    ("m6-moe-100b", on("a100-40g", 128), "adamw"),
    ("m6-t-1t", on("v100-32g", 480), "adafactor"),
    ("m6-10t", on("v100-32g", 512, host_memory=160), "adafactor"),
    ("m6-10t", on("v100-32g", 512, host_memory=320), "adamw"),
]


@pytest.mark.parametrize(("preset", "machine", "optimizer"), PAPERS)
def test_the_models_of_the_papers_fit_their_machines(preset: str, machine: Machine, optimizer: str) -> None:
    config = ModelConfig.preset(preset)
    plan = make_plan(config, machine, Work(8, 512), optimizer)
    layout, memory = plan.layout, plan.memory
    assert plan.parameters == total(config)
    assert memory.total <= plan.usable == int(machine.hardware.memory * 0.94 * GIB)
    assert layout.sharding in ("zero2", "zero3")
    assert machine.gpus % layout.experts == 0
    assert max(config.num_experts, 1) % layout.experts == 0
    # All processes together hold everything once, and up to a hundredth more for what does not divide evenly.
    everything = 4 * plan.parameters
    held = (memory.states.parameters + memory.host.parameters) * machine.gpus
    assert everything <= held <= 1.01 * everything
    if preset == "m6-t-1t":
        assert layout.experts == 480
    if preset == "m6-10t":
        assert layout.offload.layers > 0
        assert memory.host.total <= machine.hardware.host_memory * GIB
    else:
        assert layout.offload == Offload()


@pytest.mark.slow
def test_without_offload_ten_trillion_do_not_fit() -> None:
    with pytest.raises(OpenM6Error, match=r"is short of [\d,]+ bytes \([\d.]+ GiB\) in the memory of each") as caught:
        make_plan(
            ModelConfig.preset("m6-10t"), on("v100-32g", 512), Work(8, 512), "adamw", fixed=Fixed(offload=Offload())
        )
    assert caught.value.exit_code == 1


@pytest.mark.slow
def test_with_adamw_one_trillion_fits_v100s_only_by_offload() -> None:
    plan = make_plan(ModelConfig.preset("m6-t-1t"), on("v100-32g", 480), Work(8, 512), "adamw")
    assert plan.layout.offload.layers > 0


SMALL = ModelConfig.preset("m6-t-base")


@pytest.mark.parametrize(
    ("machine", "work", "fixed"),
    [
        (on("a100-40g", 4, memory=5), Work(8, 512), Fixed(offload=Offload())),
        (on("a100-40g", 4, memory=5, host_memory=0), Work(8, 512), Fixed("zero3", 4, "full")),
        (on("a100-40g", 1, memory=12), Work(64, 512), None),
    ],
    ids=["offload is off", "no memory of the host", "one with many rows"],
)  # fmt: skip
def test_what_does_not_fit_says_what_would(machine: Machine, work: Work, fixed: Fixed | None) -> None:
    with pytest.raises(OpenM6Error) as caught:
        make_plan(SMALL, machine, work, fixed=fixed)
    told = str(caught.value).partition("What fits: ")[2]
    tried = 0
    if "nothing fixed" in told:
        make_plan(SMALL, machine, work)
        tried += 1
    if found := re.search(r"--host-memory (\d+)", told):
        roomy = replace(machine.hardware, host_memory=float(found[1]))
        make_plan(SMALL, replace(machine, hardware=roomy), work, fixed=fixed)
        tried += 1
    if found := re.search(r"--rows (\d+)", told):
        make_plan(SMALL, machine, replace(work, rows=int(found[1])), fixed=fixed)
        with pytest.raises(OpenM6Error):
            make_plan(SMALL, machine, replace(work, rows=2 * int(found[1])), fixed=fixed)
        tried += 1
    if found := re.search(r"--gpus (\d+)", told):
        make_plan(SMALL, replace(machine, gpus=int(found[1])), work, fixed=fixed)
        tried += 1
        for fewer in range(machine.gpus, int(found[1])):  # it is the fewest
            with pytest.raises(OpenM6Error):
                make_plan(SMALL, replace(machine, gpus=fewer), work, fixed=fixed)
    assert tried and tried == told.count(";") + 1


def test_where_no_change_alone_helps_it_is_said() -> None:
    with pytest.raises(OpenM6Error, match="What fits: neither fewer rows nor more accelerators alone"):
        make_plan(SMALL, on("a100-40g", 1, memory=0.01), Work(1, 64))


def test_sizes_have_units() -> None:
    sizes = {"80GB": 80e9, "80 gib": 80 * GIB, "1.5MB": 1.5e6, "7B": 7, "2TiB": 2**41, "0.5KB": 500}
    assert {text: size_of(text) for text in sizes} == sizes
    assert size_of("80", GIB) == 80 * GIB
    for text in ("80", "80G", "80GBs", "-3GB", "1.2.3MB", "GB", "nan", "8iB", ""):
        with pytest.raises(ValueError):
            size_of(text)


def test_what_is_missing_is_told_to_the_byte() -> None:
    def plan(memory: float) -> None:
        make_plan(SMALL, on("a100-40g", 4, memory=memory), Work(8, 512), fixed=Fixed(offload=Offload()))

    with pytest.raises(OpenM6Error) as caught:
        plan(4)
    missing = int(str(caught.value).split("short of ")[1].split(" bytes")[0].replace(",", ""))
    needed = (int(4 * GIB * 0.94) + missing) / GIB / 0.94
    plan(needed * (1 + 1e-9))
    with pytest.raises(OpenM6Error):
        plan(needed * (1 - 1e-8))


def test_the_host_can_be_too_small_too() -> None:
    machine = on("a100-40g", 4, memory=5, host_memory=0.1)
    with pytest.raises(OpenM6Error, match="in the host's memory for each accelerator"):
        make_plan(SMALL, machine, Work(8, 512), fixed=Fixed("zero3", 4, "full", Offload(4, 4, 4)))


@pytest.mark.parametrize("memory", [6.5, 5, 4])
def test_as_little_as_possible_is_offloaded_what_comes_back_least_often_first(memory: float) -> None:
    machine = on("a100-40g", 4, memory=memory)
    fixed = {"sharding": "zero3", "experts": 4, "recompute": "full"}
    plan = make_plan(SMALL, machine, Work(8, 512), fixed=Fixed(**fixed))  # type: ignore[arg-type]
    offload = plan.layout.offload
    assert offload.optimizer > 0
    assert offload.optimizer == 5 or not offload.gradients
    assert offload.gradients == 5 or not offload.parameters
    # Of five layers of nearly all parameters.
    share = (8 * offload.optimizer + 4 * offload.gradients + 4 * offload.parameters) / 5
    assert plan.memory.host.total == pytest.approx(share / 4 * total(SMALL), rel=0.1)
    last = "parameters" if offload.parameters else "gradients" if offload.gradients else "optimizer"
    less = replace(offload, **{last: getattr(offload, last) - 1})
    with pytest.raises(OpenM6Error):
        make_plan(SMALL, machine, Work(8, 512), fixed=Fixed(**fixed, offload=less))  # type: ignore[arg-type]


def test_no_layout_that_fits_is_quicker() -> None:
    machine = on("v100-32g", 16, memory=8)
    best = make_plan(SMALL, machine, Work(8, 512))
    tried = 0
    for sharding in ("none", "zero2", "zero3"):
        for experts in (1, 2, 4, 8, 16):
            for recompute in ("none", "selective", "full"):
                try:
                    other = make_plan(SMALL, machine, Work(8, 512), fixed=Fixed(sharding, experts, recompute))
                except OpenM6Error:
                    continue
                tried += 1
                assert best.time.total <= other.time.total
    assert tried > 10


def test_whole_gradients_add_up_over_the_parts_of_a_step() -> None:
    """FSDP2 reduces only after the last part: until then each process holds whole gradients of what it gathers."""
    config, layout = SMALL, Layout(4, "zero3", 4, "full")
    weights = weights_of(meta_model(config))
    one, two = (buffers(config, weights, layout, Work(8, 512, micro_batches=n), 2, True) for n in (1, 2))
    experts = count_parameters(config)["experts"]
    assert two - one == 4 * (total(config) - experts + experts // 4)


def test_time_is_that_of_the_definition() -> None:
    config, machine, work = SMALL, on("v100-32g", 32, host_memory=0), Work(8, 512)
    plan = make_plan(config, machine, work, fixed=Fixed("zero3", 32, "full"))
    time = plan.time
    flops = training_flops(config, 4096, 8 * 512 * 512 // 2, 4096)
    head = 6 * config.vocab_size * config.hidden_size * 4096
    assert time.products == pytest.approx((flops + (flops - head) / 3) / (0.4 * 125e12))
    # Five layers; each position's row of 1,024 in bf16 goes there and back, forward, again and backward.
    assert time.exchange == pytest.approx(5 * 6 * 2 * 1024 * 4096 * 31 / 32 / 6.25e9)
    # Experts are all in their places: the others are gathered twice, in bf16, and once, in fp32, outside of the layers.
    parts = count_parameters(config)
    outside = parts["embedding"] + parts["image"] + 2 * 1024
    layers = parts["attention"] + parts["router"] + parts["norms"] - 2 * 1024
    assert time.gather == pytest.approx((2 * 2 * layers + 4 * outside) * 31 / 32 / 6.25e9)
    assert time.reduce == pytest.approx(4 * (layers + outside) * 31 / 32 / 6.25e9)
    assert time.waiting == pytest.approx((time.gather + time.reduce + time.exchange) / 2)
    states = plan.memory.states
    moved = 2 * states.parameters + states.gradients + 2 * states.optimizer
    assert time.update == pytest.approx(moved / 0.9e12)
    # What selective recomputation keeps on a GPU it does not keep on a CPU: attention's products, and the experts'.
    assert step_flops(config, "none", work, True) == step_flops(config, "selective", work, True) == flops
    again = (12 * 5 * 1024 * 8 * 512 * 512 // 2 + 6 * 5 * 2 * 1024 * 4096 * 4096) / 3
    assert step_flops(config, "selective", work, False) == pytest.approx(flops + again)


def test_energy_and_cost_follow_from_time() -> None:
    machine = Machine(8, hardware("h100"), pue=1.5, country="NOR")
    plan = make_plan(SMALL, machine, Work(8, 512), tokens=1e9)
    run = plan.run
    assert run is not None
    assert plan.tokens_per_step == 8 * 8 * 512
    assert run.steps == math.ceil(1e9 / plan.tokens_per_step)
    hours = run.steps * plan.time.total / 3600
    assert run.days == pytest.approx(hours / 24)
    assert run.kwh == pytest.approx(8 * 0.7 * 1.5 * hours)
    assert run.cost == pytest.approx(8 * 6.88 * hours)
    assert run.co2e_kg == pytest.approx(run.kwh * carbon_intensity("NOR"))
    assert carbon_intensity("NOR") < 0.1 < 0.4 < carbon_intensity("CHN")


def test_shared_layers_need_the_memory_of_one() -> None:
    shared = ModelConfig.preset("m6-10t", distinct_layers=1)
    plan = make_plan(shared, on("v100-32g", 512), Work(8, 512), "adamw")
    assert plan.layout.offload == Offload()
    assert plan.memory.states.total < 8 * GIB


@pytest.mark.parametrize(
    ("fixed", "gpus"),
    [(Fixed(experts=3), 4), (Fixed(sharding="none", experts=2), 4), (Fixed(sharding="zero3"), 1),
     (Fixed(sharding="none", offload=Offload(optimizer=1)), 4)],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(fixed: Fixed, gpus: int) -> None:
    with pytest.raises(UsageError, match="No layout over"):
        make_plan(SMALL, on("a100-80g", gpus), Work(1, 64), fixed=fixed)


def test_every_machine_has_a_plan() -> None:
    for name in HARDWARE:
        machine = Machine(2, hardware(name), gpu=name != "cpu")
        assert usable(machine) > make_plan(ModelConfig.preset("demo"), machine, Work(2, 128)).memory.total


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import openm6.cli
    from openm6.cli import plan  # noqa: F401  (it adds its command)

    yield lambda *words: CliRunner().invoke(openm6.cli.app, ["plan", *words])


def test_the_command_prints_what_is_planned(run: Any) -> None:
    done = run("m6-10b", "--gpus", "8", "--gpu-memory", "40", "--tokens", "1e9", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.output)
    assert content["layout"]["sharding"] == "zero3"
    assert content["memory"]["total"] <= content["usable"]
    assert content["run"]["kwh"] > 0
    assert any("40% of 312 TFLOP/s" in line for line in content["assumptions"])
    shown = run("m6-10b", "--gpus", "8", "--gpu-memory", "40", "--tokens", "1e9")
    assert f"{content['memory']['states']['optimizer']:,}" in shown.output
    assert "kg CO2e" in shown.output


def test_a_dry_run_by_command_gives_the_same_bytes(run: Any) -> None:
    words = ("m6-t-base", "--gpus", "16", "--hardware", "v100-32g", "--json")
    computed, read = (json.loads(run(*words, *more).output) for more in ((), ("--dry-run",)))
    assert read["memory"] == computed["memory"]
    assert "dry run" in read["assumptions"][0]
    assert "dry run" not in computed["assumptions"][0]


def test_figures_of_the_hardware_can_be_given(run: Any) -> None:
    words = ("m6-base", "--gpus", "1", "--tokens", "1e9", "--json")
    usual, cheap = (json.loads(run(*words, *more).output)["run"] for more in ((), ("-m", "price=1", "-m", "power=200")))
    assert usual["cost"] / cheap["cost"] == pytest.approx(5.12)
    assert usual["kwh"] / cheap["kwh"] == pytest.approx(2)


@pytest.mark.slow
def test_sizes_and_rates_may_have_units(run: Any) -> None:
    words = ("m6-base", "--gpus", "2", "--json")
    for one, other in (
        (("--gpu-memory", "40"), ("--gpu-memory", "40GiB")), (("-m", "memory=40"), ("--gpu-memory", "40 GiB")),
        (("--interconnect", "25"), ("--interconnect", "25GB/s")),
        (("-m", "bandwidth=1e12"), ("-m", "bandwidth=1000GB/s")),
    ):  # fmt: skip
        assert json.loads(run(*words, *one).output) == json.loads(run(*words, *other).output)
    usable_bytes = json.loads(run(*words, "--gpu-memory", "80GB").output)["usable"]
    assert usable_bytes == pytest.approx(0.94 * 80e9)


def test_a_recipe_is_planned_as_it_is(run: Any, tmp_path: Path) -> None:
    recipe = {
        "name": "r", "output": str(tmp_path / "out"), "model": {"preset": "small", "sizes": {"num_hidden_layers": 3}},
        "data": [{"source": "demo:catalogue/train", "task": "captioning"}],
        "train": {"steps": 100, "batch_size": 64, "accumulate": 4, "row_length": 384, "optimizer": "muon"},
    }  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    content = json.loads(run(str(path), "--gpus", "2", "--json").output)
    assert content["tokens_per_step"] == 64 * 384
    assert content["run"]["steps"] == 100
    assert content["parameters"] == total(ModelConfig.preset("small", num_hidden_layers=3, vocab_size=3072 + 1024))
    assert "muon" in content["assumptions"][0]


def test_attention_within_a_source_is_counted_as_it_is_read(run: Any, tmp_path: Path) -> None:
    work = Work(8, 512, trained=8 * 112)
    both, causal = (ModelConfig.preset("small", source=source) for source in ("bidirectional", "causal"))
    flops = [step_flops(config, "none", work, True) for config in (both, causal)]
    assert flops[1] == training_flops(causal, 8 * 512, 8 * 512 * 512 // 2, 8 * 112)
    assert flops[0] - flops[1] == pytest.approx(12 * 12 * 512 * 8 * 400 * 400 / 2)
    said = [make_plan(config, on("a100-40g", 1), work).assumptions for config in (both, causal)]
    assert "half of its row on average, and all of a bidirectional source" in "\n".join(said[0])
    assert "bidirectional" not in "\n".join(said[1])
    # A recipe that starts from a model may change how that one reads.
    causal.save(tmp_path / "model")
    recipe = {
        "name": "r", "output": str(tmp_path / "out"), "model": {"path": str(tmp_path / "model")},
        "data": [{"source": "demo:catalogue/train", "task": "caption"}], "train": {"steps": 10},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    change = "model.sizes.source=bidirectional"
    assert run(str(tmp_path / "r.yaml"), change, "--gpus", "2", "--json").exit_code == 0
    assert "it can be bidirectional, causal" in str(
        run(str(tmp_path / "r.yaml"), f"{change}ly", "--gpus", "2").exception
    )


@pytest.mark.slow
def test_a_recipe_alone_is_timed_on_this_machine(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for number in range(3):
        Path(f"pictures/{number}.jpg").write_bytes(picture(16, 16, number))
    small = ["codec.sizes={image_size: 16, patch: 2, widths: [8, 16], levels: [4, 4]}", "train.batch_size=2"]
    done = run("codec_256", *small, "train.steps=50000", "evaluation.data=[]", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["recipe"] == "codec 256" and told["steps"] == 50000
    assert told["seconds"] == pytest.approx(50000 * told["seconds_per_step"]) and told["seconds"] > 0
    said = run("codec_256", *small, "train.steps=50000", "evaluation.data=[]").output
    assert re.search(r"50,000 steps of [0-9.]+ s, about .*:\d\d:\d\d, without evaluations and checkpoints", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]  # nothing is left of the steps
    # The threads that read ahead end before their folder goes: they would write into it.
    monkeypatch.setattr("openm6.train.trainer.TemporaryDirectory", partial(TemporaryDirectory, dir=tmp_path))
    ends: list[int] = []
    steps = Loader.__iter__

    def watched(loader: Loader) -> Iterator[Any]:
        try:
            yield from steps(loader)
        finally:
            ends.append(len(list(tmp_path.iterdir())))

    monkeypatch.setattr(Loader, "__iter__", watched)
    assert run("codec_256", *small, "train.steps=50000", "evaluation.data=[]").exit_code == 0 and ends == [2]
    for words, reason in (
        (["codec_256", "--hardware", "h100"], "without --gpus and --hardware its first steps are timed"),
        (["codec_256", "data=[{source: nowhere, format: folder}]"], "nowhere"),
        (["try_on"], "runs/demo/model"),
        (["m6-10b", "train.steps=3"], "overrides a recipe, and m6-10b is not a recipe"),
    ):  # fmt: skip
        assert reason in str(run(*words).exception)


@pytest.mark.slow
def test_ten_trillion_parameters_are_laid_out_in_little_memory() -> None:
    words = ["m6-10t", "--gpus", "512", "--hardware", "v100-32g", "--host-memory", "320", "--dry-run", "--json"]
    code = f"""
import sys
from openm6.cli import main
from openm6.core.environment import peak_resident
sys.argv = ["openm6", "plan", *{words}]
try:
    main()
finally:
    print(peak_resident(), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 2**30  # bytes
    content = json.loads(done.stdout)
    states, host = content["memory"]["states"], content["memory"]["host"]
    # 20 of the 10,240 experts of each of 48 layers, and a 512th of what is not experts.
    experts, rest = 48 * 20 * 2 * 1024 * 9984, total(ModelConfig.preset("m6-10t")) - 48 * 10240 * 2 * 1024 * 9984
    assert states["parameters"] + host["parameters"] == pytest.approx(4 * (experts + rest / 512), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("m6-10x",), 'There is no preset "m6-10x".'),
        (("m6-base", "--hardware", "a100"), 'There is no hardware "a100".'),
        (("m6-base", "--country", "XX", "--tokens", "1"), 'There is no country "XX"'),
        (("m6-base", "-m", "watts=3"), "Hardware has no figure watts."),
        (("m6-base", "-m", "power=much"), "has to be a number"),
        (
            ("m6-base", "--gpu-memory", "80G"),
            "--gpu-memory has to be a number of GiB, or a size such as 80GB, not '80G'",
        ),
        (("m6-base", "--host-memory", "much"), "--host-memory has to be a number of GiB"),
        (("m6-base", "--interconnect", "0"), "--interconnect has to be a number above 0, or a rate such as 25GB/s"),
        (("m6-base", "-m", "per_host=0"), "has to be a number"),
        (("m6-base", "--length", "2048"), "this model has 1024 positions"),
        (("m6-base", "--images", "600", "--length", "512"), "more than the 512 positions"),
        (("m6-base", "--distinct-layers", "5"), "has to divide the 24 layers"),
    ],
)
def test_mistakes_are_told(run: Any, words: tuple[str, ...], told: str) -> None:
    error = run(*words).exception
    assert isinstance(error, UsageError)
    assert told in str(error)
