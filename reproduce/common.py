"""What the reproductions share: variants trained over several seeds, curves, a page that says what holds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.common import machine
from reproduce.corpus import ENTROPY, write_corpus

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is: minutes on two cores (`small`), or a GPU's worth (`large`)."""

    sizes: dict[str, Any]
    steps: int
    batch_size: int
    seeds: int
    languages: int
    characters: int
    length: int
    learning_rate: float


SCALES = {
    "tiny": Scale(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        6, 16, 2, 2, 16, 32, 3e-3,
    ),
    "small": Scale(
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        200, 48, 3, 16, 64, 48, 3e-3,
    ),
    "large": Scale(
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
        6000, 512, 3, 128, 256, 128, 6e-4,
    ),
}  # fmt: skip
"""`tiny` is for tests."""


@dataclass(frozen=True)
class Variant:
    """One network or way of training that is compared."""

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    pseudo: dict[str, Any] | None = None
    grown_from: tuple[int, int] | None = None  # layers and steps of a first run, whose layers are then repeated


@dataclass
class Run:
    """What one variant gave with one seed. `curve`: (step, training loss), fresh lines all the time; `memory`: the
    most bytes that the process had up to each of these steps, beyond what a process without a network has."""

    curve: list[tuple[int, float]]
    test_loss: float
    seconds_per_step: float
    flops: float
    memory: list[int]
    variation: list[float]
    dropped: float


@dataclass(frozen=True)
class Finding:
    """A claim of a paper and whether it holds here."""

    claim: str
    verdict: str
    figures: str


def verdict(better: list[float], worse: list[float]) -> str:
    """Is what is better when higher higher, seed by seed? As `compare` says it of losses."""
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    width = max(max(better) - min(better), max(worse) - min(worse))
    if all(d > 0 for d in differences):
        apart = median(better) - median(worse) > width / 2
        return "holds" if apart else "holds in every seed, by less than the seeds differ"
    if all(d < 0 for d in differences):
        return "does not hold: the other way round in every seed"
    return "not settled: the seeds disagree"


def compare(claim: str, better: list[Run], worse: list[Run]) -> Finding:
    """Is the loss of `better` lower, seed by seed the same data? It holds when all seeds agree and the medians are
    further apart than half the wider of the two spreads; when they disagree, these seeds do not settle it."""
    a, b = [run.test_loss for run in better], [run.test_loss for run in worse]
    found = verdict([-loss for loss in a], [-loss for loss in b])
    return Finding(claim, found, f"test loss {median(a):.4f} against {median(b):.4f}")


def faster(claim: str, quick: list[Run], slow: list[Run]) -> Finding:
    """Is a step of `quick` shorter than one of `slow`? Within 3% nothing is said: machines are noisier than that."""
    a, b = median(run.seconds_per_step for run in quick), median(run.seconds_per_step for run in slow)
    verdict = "no difference" if abs(a / b - 1) < 0.03 else "holds" if a < b else "does not hold"
    return Finding(claim, verdict, f"step {1e3 * a:.0f} ms against {1e3 * b:.0f} ms")


def train_all(claim: str, variants: list[Variant], scale: Scale, folder: Path) -> dict[str, list[Run]]:
    """Every variant with every seed, one after the other; what is there already is not run again."""
    corpora = {
        seed: write_corpus(
            folder / "corpus" / str(seed), scale.languages, scale.characters, scale.steps * scale.batch_size, 512,
            scale.length, seed,
        )
        for seed in range(scale.seeds)
    }  # fmt: skip
    runs: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    for seed in range(scale.seeds):
        for variant in variants:
            started = time.monotonic()
            runs[variant.name].append(_train(claim, variant, seed, scale, folder, corpora[seed]))
            last = runs[variant.name][-1]
            seconds = time.monotonic() - started
            print(f"{variant.name}, seed {seed}: test loss {last.test_loss:.4f}, {seconds:.0f} s", flush=True)
    return runs


def _train(claim: str, variant: Variant, seed: int, scale: Scale, folder: Path, corpus: dict[str, Path]) -> Run:
    output = folder / "runs" / f"{variant.name.replace(' ', '-')}-{seed}"
    total = variant.train.get("steps", scale.steps)
    if variant.grown_from is None:
        return _run(_recipe(claim, variant, seed, scale, output, corpus, total))
    layers, steps = variant.grown_from
    shallow = replace(variant, sizes={**variant.sizes, "num_hidden_layers": layers})
    first = _run(_recipe(claim, shallow, seed, scale, output.with_name(output.name + "-first"), corpus, steps))
    recipe = _recipe(claim, variant, seed + 1000, scale, output, corpus, total - steps)
    grown = output.with_name(output.name + "-grown")
    if not grown.exists():
        _stack(output.with_name(output.name + "-first") / "model", grown, scale.sizes["num_hidden_layers"])
    recipe["model"] = {"path": str(grown)}
    del recipe["tokenizer"]
    second = _run(recipe)
    second.curve = first.curve + [(step + steps, loss) for step, loss in second.curve]
    second.variation = first.variation + second.variation
    second.flops += first.flops
    second.memory = first.memory + [max(first.memory[-1], bytes) for bytes in second.memory]
    return second


def _stack(shallow: Path, grown: Path, layers: int) -> None:
    """Repeat the whole stack of layers (G_stack, arXiv 2405.15319)."""
    from openm6.inference.session import Session
    from openm6.model import M6, ModelConfig
    from openm6.model.files import shared_name

    session = Session.load(shallow, device="cpu", trainable=True)
    weights, had = session.model.state_dict(), session.model.config.num_hidden_layers
    session.model = M6(ModelConfig(**{**session.model.config.to_dict(), "num_hidden_layers": layers}))
    session.model.load_state_dict({name: weights[shared_name(name, had)] for name in session.model.state_dict()})
    session.save(grown)


def _recipe(
    claim: str, variant: Variant, seed: int, scale: Scale, output: Path, corpus: dict[str, Path], steps: int
) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "name": f"{claim} {variant.name}",
        "seed": seed,
        "output": str(output),
        "model": {"preset": "demo", "sizes": {**scale.sizes, "image_embedder": "none", **variant.sizes}},
        "tokenizer": {"vocab_size": 1024, "characters": 0, "num_codes": 0, "max_token_length": 1},
        "data": [
            {"source": str(corpus["train"]), "task": "text_continuation", "name": "chains", "weight": 3},
            {"source": "demo:texts/train?pictures=2000", "task": "infilling", "name": "catalogue", "weight": 1},
        ],
        "train": {
            "steps": steps, "batch_size": scale.batch_size, "row_length": 256, "learning_rate": scale.learning_rate,
            "warmup": max(1, steps // 20), "log_every": max(1, scale.steps // 80), "checkpoint_every": steps,
            "workers": 0, "keep": 1, **variant.train,
        },
        "evaluation": {
            "every": steps, "limit": 512,
            "data": [{"source": str(corpus["test"]), "task": "text_continuation", "name": "test"}],
        },
    }  # fmt: skip
    if variant.pseudo:
        recipe["pseudo"] = variant.pseudo
    return recipe


def _run(recipe: dict[str, Any]) -> Run:
    """Train in a process of its own, so that its memory can be told; what is done is not done again."""
    output = Path(recipe["output"])
    done = output / "done"
    if not done.is_file():
        output.mkdir(parents=True, exist_ok=True)
        file = output / "run.yaml"
        file.write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
        with (output / "log.txt").open("w") as log:
            command = [sys.executable, "-m", "openm6", "train", str(file)]
            status = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, check=False).returncode
        if status:
            raise RuntimeError(f"{recipe['name']} with seed {recipe['seed']} failed; see {output / 'log.txt'}")
        done.touch()
    return _read(output)


@cache
def _idle_bytes() -> int:
    """What a process needs for the libraries of training alone, and for nothing on a GPU."""
    code = "import openm6.train.trainer, torch.distributed.checkpoint; from openm6.core.energy import peak_memory as p"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(p())"], capture_output=True, check=True, cwd=ROOT)
    return int(done.stdout)


def _read(output: Path) -> Run:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    tests = [line for line in lines if "evaluation" in line]
    later = steps[len(steps) // 4 :]
    return Run(
        curve=[(line["step"], line["loss_by_source"].get("chains", line["loss"])) for line in steps],
        test_loss=math.log(tests[-1]["perplexity"]),
        seconds_per_step=median(line["seconds_per_step"] for line in later),
        flops=sum(_flops(line, before) for before, line in zip([{"step": 0}, *steps], steps, strict=False)),
        memory=[max(0, bytes - _idle_bytes()) for bytes in accumulate((s["peak_memory_bytes"] for s in steps), max)],
        variation=[line["load_variation"] for line in steps if "load_variation" in line],
        dropped=median([line["load_dropped"] for line in later if "load_dropped" in line] or [0.0]),
    )


def _flops(line: dict[str, Any], before: dict[str, Any]) -> float:
    return 1e12 * line["tflops"] * line["seconds_per_step"] * (line["step"] - before["step"])


def write_page(
    name: str,
    title: str,
    intro: str,
    scale: Scale,
    runs: dict[str, list[Run]],
    findings: list[Finding],
    out: Path,
    remark: str = "",
) -> Path:
    """A page with figures, curves, what holds and a remark on it; JSON beside it."""
    out.mkdir(parents=True, exist_ok=True)
    picture = _draw(name, title, runs, out)
    lines = [f"# {title}", "", intro, "", f"![Loss curves]({picture.name})", "", "## What holds at this scale", ""]
    lines += ["| claim | here | figures |", "| --- | --- | --- |"]
    lines += [f"| {f.claim} | {f.verdict} | {f.figures} |" for f in findings]
    lines += [
        "",
        *([remark, ""] if remark else []),
        "## Figures",
        "",
        "| variant | test loss (lowest to highest) | ms a step | TFLOP | load variation | dropped | memory |",
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for variant, group in runs.items():
        losses = [run.test_loss for run in group]
        variation = [run.variation[-1] for run in group if run.variation]
        lines.append(
            f"| {variant} | {median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}) "
            f"| {1e3 * median(run.seconds_per_step for run in group):.0f} "
            f"| {median(run.flops for run in group) / 1e12:.2f} "
            f"| {f'{median(variation):.2f}' if variation else '–'} "
            f"| {100 * median(run.dropped for run in group):.1f}% "
            f"| {median(run.memory[-1] for run in group) / 2**20:.0f} MiB |"
        )
    lines += [
        "",
        f"{scale.seeds} seeds (data, weights and order); medians. {scale.steps} steps of {scale.batch_size} examples, "
        f"hidden size {scale.sizes['hidden_size']}, {scale.sizes['num_hidden_layers']} layers. The corpus: "
        f"{scale.languages} random languages over {scale.characters} characters (`reproduce/corpus.py`; no network "
        f"gets below {ENTROPY:.3f} nats a character) and sentences of the demo's catalogue. Test lines are new draws. "
        "Memory: the most that a process had beyond one without a network. TFLOP: of the whole run.",
        "",
        f"Made by `openm6 reproduce {name.replace('_', '-')}` on {machine()}, {date.today().isoformat()}.",
        "",
    ]
    page = out / f"{name}.md"
    page.write_text("\n".join(lines), "utf-8")
    told = {
        "findings": [vars(f) for f in findings],
        "runs": {variant: [vars(run) for run in group] for variant, group in runs.items()},
    }
    rounded = json.loads(json.dumps(told), parse_float=lambda text: float(f"{float(text):.5g}"))
    (out / f"{name}.json").write_text(json.dumps(rounded) + "\n", "utf-8")
    return page


def _from_eighth(curve: list[tuple[int, float]]) -> list[float]:
    return [loss for _, loss in curve[len(curve) // 8 :]]


def _draw(name: str, title: str, runs: dict[str, list[Run]], out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, (variant, group) in enumerate(runs.items()):
        colour = f"C{number}"
        longest = max(group, key=lambda run: len(run.curve)).curve
        steps = [step for step, _ in longest]
        columns = [[run.curve[i][1] for run in group if i < len(run.curve)] for i in range(len(steps))]
        left.plot(steps, [median(c) for c in columns], color=colour, lw=1.3, label=variant)
        left.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, lw=0)
        if group[0].variation:
            count = min(len(run.variation) for run in group)
            right.plot(
                steps[:count], [median(run.variation[i] for run in group) for i in range(count)], color=colour, lw=1.3,
                label=variant,
            )  # fmt: skip
    left.set(xlabel="step", ylabel="training loss on the chains (nats)", title=title)
    left.axhline(ENTROPY, color="grey", ls=":", lw=1)
    # What comes before an eighth of the run is the same for all: it would press the rest together.
    shown = [loss for group in runs.values() for run in group for loss in _from_eighth(run.curve)]
    left.set_ylim(min(ENTROPY, min(shown)) - 0.05, max(shown) + 0.05)
    left.legend(fontsize=8)
    right.set(
        xlabel="step", ylabel="coefficient of variation", title="Load variation, mean of the layers", ylim=(0, None)
    )
    target = out / f"{name}.png"
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target
