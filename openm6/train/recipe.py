"""A recipe: all settings of a training run, in one YAML file, validated before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from openm6.core.errors import UsageError, set_once, suggest
from openm6.train.explain import explain


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ChatSection(_Strict):
    """What the chat template of an imported model is given; null: as the model has it."""

    system: str | None = Field(None, description="system text where a task has none; empty: the template's own")
    date: str | None = Field(None, pattern=r"^\d{4}-\d\d-\d\d$", description="the date that a template writes")
    thinking: bool | None = Field(None, description="reason before an answer, where the template has a switch")


class ModelSection(_Strict):
    """The initial network: a `preset` (with `sizes` changed) at random, or the model directory `path`."""

    preset: str | None = None
    path: Path | None = None
    sizes: dict[str, Any] = Field(
        default_factory=dict,
        description="single values of ModelConfig to change; of a model from a path `source` alone",
    )
    codec: Path | None = Field(None, description="directory of an image codec, to generate images with")
    max_length: int | None = Field(None, ge=8, description="longest example in positions; the default is row_length")
    prompt_format: Literal["openm6"] | None = Field(
        None, description="ask a model that has a chat template in OpenM6's own form from now on"
    )
    chat: ChatSection = Field(default_factory=lambda: ChatSection(), description="settings of a chat template")

    @model_validator(mode="after")
    def _one_start(self) -> ModelSection:
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either preset or path")
        if self.path and (more := sorted(self.sizes.keys() - {"source"})):
            raise ValueError(f"sizes change a preset; a model from a path keeps its {more[0]}: only source can change")
        return self


class TokenizerSection(_Strict):
    """A tokenizer from a directory, or one trained on the texts of this recipe's data."""

    path: Path | None = None
    vocab_size: int = Field(3072, ge=512, description="text tokens to train, when there is no path")
    characters: int = Field(2048, ge=0, description="the most frequent Chinese characters, always included")
    num_codes: int = Field(1024, ge=0, description="ids reserved for image codes")
    max_token_length: int = Field(
        8, ge=1, description="characters of a token; 1 keeps each character alone, as M6 does"
    )


class SourceSection(_Strict):
    """One source."""

    source: str
    name: str | None = Field(None, description="name of its loss in the log; the default is the source")
    weight: float = Field(1.0, gt=0)
    start: int = Field(0, ge=0, description="step from which it is drawn: a curriculum")
    columns: dict[str, str] = Field(default_factory=dict, description="slot of the task: column of the data")
    format: str | None = None
    images: str | None = Field(None, description="folder that picture paths start from")
    stream: bool = Field(False, description="stream a large Parquet source instead of indexing it")
    limit: int | None = Field(None, ge=1)


class DataSection(SourceSection):
    """One source for one task."""

    task: str
    noise: float = Field(
        0.0, ge=0, lt=1, description="fraction of the characters of input texts that are dropped or exchanged"
    )
    shots: int = Field(0, ge=0, description="largest number of other records with answers before each record")
    turns: Literal["all", "last"] = Field("all", description="answers of a conversation that are learned")
    answers: Literal["data", "teacher"] = Field(
        "data", description="teacher: records without answers; distill.teacher answers them before the training begins"
    )
    against: str | None = Field(
        None, description="for a task that gives a vector: the task whose vector of the same record has to match"
    )
    against_columns: dict[str, str] = Field(default_factory=dict, description="columns for the slots of `against`")
    same: list[str] = Field(
        default_factory=list, description="columns: pairs that agree in all of them are no negatives of each other"
    )


class TrainSection(_Strict):
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1, description="examples a step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches of each process in a step (gradient accumulation)")
    packing: bool = True
    row_length: int = Field(256, ge=8, description="positions of a packed row")
    optimizer: Literal["adamw", "muon", "adafactor", "adam8bit"] = Field(
        "adamw",
        description="muon: Muon for matrices and kernels, AdamW for embeddings, norms and the output; adafactor: "
        "second moments by row and column, rates relative to a parameter's size; adam8bit: AdamW with 8-bit moments",
    )
    learning_rate: float = Field(1e-3, gt=0)
    matrix_learning_rate: float | None = Field(None, gt=0, description="of Muon; the default is learning_rate")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = Field(100, ge=0, description="steps")
    decay: float = Field(0.2, ge=0, le=1, description="fraction of the steps over which wsd decays")
    final_rate: float = Field(0.05, ge=0, le=1, description="last learning rate / highest")
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="fraction of each target that is spread over all ids")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where the machine has units for it"
    )
    compile: bool = False
    freeze_image_encoder: bool = Field(
        False, description="do not train the image encoder: required for data with image features"
    )
    workers: int = Field(2, ge=0, description="threads that prepare examples")
    max_rejected_fraction: float = Field(
        0.05, ge=0, le=1, description="stop when more of the records than this are bad"
    )
    checkpoint_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1, description="checkpoints that stay")
    log_every: int = Field(10, ge=1)
    country: str = Field("CHN", description="whose electricity mix CO2e is estimated by, an ISO code of three letters")


class OffloadSection(_Strict):
    """Fraction of the layers, from the first on, whose state is in the host's memory; one number stands for all three.

    A layer whose parameters are there is updated there, so its gradients and moments are there too.
    """

    parameters: float = Field(0.0, ge=0, le=1, description="come to the device whenever the layer is gathered")
    gradients: float = Field(0.0, ge=0, le=1, description="leave as soon as they are reduced")
    optimizer: float = Field(0.0, ge=0, le=1, description="moments: visit the device while the layer is updated")

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return dict.fromkeys(cls.model_fields, value) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _parameters_last(self) -> OffloadSection:
        if self.parameters > min(self.gradients, self.optimizer):
            raise ValueError(
                f"parameters ({self.parameters:g}) cannot be above gradients ({self.gradients:g}) or optimizer "
                f"({self.optimizer:g}): a layer whose parameters are on the host is updated there"
            )
        return self


class ParallelSection(_Strict):
    """The distribution of the network over the processes (train/parallel.py)."""

    sharding: Literal["none", "zero2", "zero3"] = Field(
        "none", description="zero2: gradients and optimizer states over all processes; zero3: parameters too"
    )
    experts: int = Field(1, ge=1, description="processes that share the experts of a layer")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations that the backward pass recomputes: none, all but products, all"
    )
    offload: OffloadSection = Field(
        OffloadSection(), description="in the host's memory: a fraction of the layers, or one for each kind of state"
    )


class PseudoSection(_Strict):
    """Pseudo-to-Real (arXiv 2110.03888): in the Pseudo stage, of `steps` steps, layers share weights; then they are
    delinked, and the Real stage trains a copy for each."""

    layers: int = Field(1, ge=1, description="distinct layers of the Pseudo stage; 1 shares all")
    steps: int = Field(ge=1, description="steps of the Pseudo stage")
    moments: Literal["rescale", "copy", "reset"] = Field(
        "rescale",
        description="optimizer moments of the copies: a shared gradient is the sum over its n layers, so first moments "
        "are divided by n and second ones by n^2; or taken as they are; or started anew",
    )
    rewarm: int = Field(100, ge=0, description="steps in which the learning rate comes up again after delinking")


class AdaptSection(_Strict):
    """Train an adapter instead of the network: `output/model` is an adapter of `model.path`."""

    method: Literal["lora", "ia3", "bottleneck", "prompt", "prefix", "head"] = "lora"
    rank: int = Field(8, ge=1, description="of LoRA; the width of a bottleneck")
    alpha: int = Field(16, ge=1, description="LoRA's change is scaled by alpha / rank")
    experts: bool = Field(False, description="LoRA on the weights of experts too")
    length: int = Field(16, ge=1, description="positions of a prompt or prefix")


class DistillSection(_Strict):
    """Distillation from a larger model, beside the labels (train/distill.py)."""

    teacher: Path
    weight: float = Field(0.5, ge=0, le=1, description="of the loss against the teacher; the labels have the rest")
    temperature: float = Field(2.0, gt=0, description="by which both sides' logits are divided")
    relations: float = Field(
        0.0, ge=0, description="weight of the loss on the similarities between positions (relational distillation)"
    )


class VectorsSection(_Strict):
    """Contrastive training of vectors, by data with `against` (train/contrastive.py)."""

    temperature: float = Field(0.05, gt=0)
    dims: list[int] = Field(
        default_factory=list, description="lengths at which a vector may be cut; the default is the whole alone"
    )


class EvaluationSection(_Strict):
    """Data to measure on while training: the tasks' own metrics, by decoding."""

    every: int = Field(1000, ge=1)
    limit: int = Field(256, ge=1, description="records a source, evenly spread over it")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many measures without a better first metric of the first source, and "
        "keep the weights of the best",
    )
    data: list[DataSection] = Field(default_factory=list)


class CodecSection(_Strict):
    """The image codec to start from: `sizes` of CodecConfig at random, or the model directory `path`."""

    sizes: dict[str, Any] = Field(default_factory=dict)
    path: Path | None = None
    perceptual_model: Path | None = Field(
        None, description="model directory whose image stem replaces the codec's encoder in the feature loss"
    )

    @model_validator(mode="after")
    def _one_start(self) -> CodecSection:
        if self.path and self.sizes:
            raise ValueError("a codec from a path keeps its own sizes")
        return self


class CodecEvaluationSection(_Strict):
    """Pictures to measure the codec on while it is trained."""

    every: int = Field(1000, ge=1)
    limit: int = Field(256, ge=1, description="pictures a source")
    patience: None = Field(None, description="a codec is trained to the end")
    data: list[SourceSection] = Field(default_factory=list)


class CodecRecipe(_Strict):
    """For an image codec; its data are pictures. A codec is small: every process holds it."""

    parallel: ClassVar[ParallelSection] = ParallelSection()
    pseudo: ClassVar[None] = None
    adapt: ClassVar[None] = None

    name: str
    seed: int = 0
    output: Path
    codec: CodecSection
    data: list[SourceSection] = Field(min_length=1)
    train: TrainSection
    evaluation: CodecEvaluationSection = CodecEvaluationSection()


class Recipe(_Strict):
    name: str
    seed: int = 0
    output: Path
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: list[DataSection] = Field(min_length=1)
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    pseudo: PseudoSection | None = None
    adapt: AdaptSection | None = None
    distill: DistillSection | None = None
    vectors: VectorsSection = VectorsSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.evaluation.patience and not self.evaluation.data:
            raise ValueError("evaluation.patience needs something to measure on: give evaluation.data")
        if not self.distill and any(section.answers == "teacher" for section in self.data):
            raise ValueError("data.*.answers is teacher, and there is none: give distill.teacher")
        if self.adapt and not self.model.path:
            raise ValueError("adapt changes an existing network: give model.path")
        if self.adapt and self.model.codec:
            raise ValueError("adapt leaves the model as it is, with the codec that it has: leave model.codec out")
        if self.adapt and self.model.sizes:
            raise ValueError("adapt leaves the model as it is, with the source that it has: leave model.sizes out")
        if self.pseudo and self.model.path:
            raise ValueError("pseudo trains a network from a preset; one from model.path has its layers already")
        if self.pseudo and self.pseudo.steps >= self.train.steps:
            raise ValueError(
                f"pseudo.steps ({self.pseudo.steps}) has to be below train.steps ({self.train.steps}): "
                "the second stage would have none"
            )
        return self


AnyRecipe = Recipe | CodecRecipe


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AnyRecipe:
    """Read a YAML recipe, apply `key.path=value` overrides, check everything.

    `name` is by default that of the file, `output` is runs/NAME. A UsageError names the file and, for every problem,
    the key, the value, and what is allowed.
    """
    path = find_recipe(path)
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # the YAML scanner's errors share no base class with OmegaConf's
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, DictConfig):
        content.setdefault("name", path.stem)
    return override_recipe(content, overrides, str(path))


def override_recipe(values: Any, overrides: list[str] | tuple[str, ...] = (), where: str = "recipe") -> AnyRecipe:
    """A recipe from plain values, with `key.path=value` overrides applied and everything checked."""
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f'"{override}" is no override; write key=value, e.g. train.steps=100.')
        set_once(given, key, value)
    try:
        content = OmegaConf.create(values)
        for key, value in given.items():  # one by one: a merge knows no places in lists, such as data.0.source
            try:
                OmegaConf.update(content, key, OmegaConf.from_dotlist([f"value={value}"]).value)
            except (IndexError, TypeError):
                raise UsageError(f'"{key}={value}": {where} has no place {key}.') from None
        found = OmegaConf.to_container(content, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{where} is no recipe: it has to hold keys such as model, data and train.")
    if "name" in found:
        found.setdefault("output", f"runs/{found['name']}")
    return check_recipe({str(key): value for key, value in found.items()}, where)


def recipe_text(recipe: AnyRecipe) -> str:
    """A recipe as YAML: the keys that were given."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), allow_unicode=True, sort_keys=False)


def check_recipe(values: dict[str, Any], where: str = "recipe") -> AnyRecipe:
    """A recipe from plain values; one with the key `codec` is a codec's."""
    kind = CodecRecipe if "codec" in values else Recipe
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, kind)}") from None


def find_recipe(path: str | Path) -> Path:
    """A path to a recipe, or the name of one that comes with OpenM6 (`demo`, `recipes/demo.yaml`)."""
    path = Path(path)
    if path.is_file():
        return path
    here = Path(__file__).parent / "recipes"
    shipped = here / f"{path.stem}.yaml"
    if path.suffix in ("", ".yaml") and path.parent.name in ("", "recipes") and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in here.glob("*.yaml"))
    raise UsageError(
        f"There is no recipe {path}.{suggest(path.stem, names)} Recipes that come with OpenM6: {', '.join(names)}."
    )
