"""The catalogue of data sets and models, on MLflow: versions, lineage, aliases such as live.

    $OPENM6_CATALOGUE     database: sqlite:///... or postgresql+psycopg://...; default OPENM6_HOME/catalogue.db
    $OPENM6_ARTIFACTS     artifact store: a folder, or s3://...; default OPENM6_HOME/artifacts

Adding a version is atomic: its files are stored before it gets a number. The database assigns the numbers, so that two
processes never get the same one. MLflow's server is not used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openm6.core.bases import base_of, changed_base, directory_hash
from openm6.core.environment import ARTIFACTS, CATALOGUE
from openm6.core.errors import ErrorKind, OpenM6Error, UsageError, cut, suggest, suggest_path
from openm6.core.extras import require
from openm6.core.files import lines_of, require_new, write_whole
from openm6.hub.jobs import home, last_step

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DATA, MODEL = "data", "model"
LIVE = "live"
"""The alias of the version to serve."""
SAMPLE = 10
"""Number of records stored as a sample of a data set."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_TAG = "openm6."


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a data set or a model. `made_of`: the versions that it derives from, as kind, name and number."""

    kind: str
    name: str
    number: int
    created: float
    about: dict[str, Any]
    made_of: tuple[tuple[str, str, int], ...] = ()
    aliases: tuple[str, ...] = ()
    files: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def title(self) -> str:
        """The full name with aliases: goods@3 [live]."""
        return f"{self.full_name} [{', '.join(self.aliases)}]" if self.aliases else self.full_name

    @property
    def measures(self) -> str:
        """The metrics of a model as text."""
        return ", ".join(f"{name} {value:g}" for name, value in self.about.get("metrics", {}).items())


@dataclass(frozen=True, slots=True)
class Lineage:
    """The tree of the versions that a version derives from."""

    version: Version
    made_of: list[Lineage] = field(default_factory=list)

    def lines(self, depth: int = 0) -> list[str]:
        """The tree as text, one version per line, indented by depth."""
        v = self.version
        line = f"{'  ' * depth}{v.kind} {v.title}"
        if source := v.about.get("source"):
            line += f"  {source} ({v.about['records']} records, {v.about['hash'][:12]})"
        if base := v.about.get("base"):
            line += f"  adapter of {base['path']} ({base['hash'][:12]})"
        return [line, *(line for one in self.made_of for line in one.lines(depth + 1))]


class Catalogue:
    """A catalogue in a database and an artifact store, by default those of the environment."""

    def __init__(self, database: str | None = None, artifacts: str | None = None):
        base = home()
        self.database = database or os.environ.get(CATALOGUE) or f"sqlite:///{base / 'catalogue.db'}"
        self.artifacts = artifacts or os.environ.get(ARTIFACTS) or str(base / "artifacts")

    # Adding

    def add_data(self, name: str, source: str, data_format: str | None = None, images: str | None = None) -> Version:
        """Add a version of a data set: source, schema, content hash, sample records. A version with the same hash is
        returned unchanged. The files stay in place."""
        about, sample = describe(source, data_format, images)
        for version in self.versions(DATA, name):
            if version.about.get("hash") == about["hash"]:
                return version
        return self._add(DATA, name, about, (), {"sample.jsonl": sample})

    def add_model(
        self,
        name: str,
        directory: Path,
        *,
        made_of: Iterable[str] = (),
        metrics: Mapping[str, float] | None = None,
        run: Path | None = None,
        note: str = "",
    ) -> Version:
        """Add a version of a model, copying its directory. `made_of`: the versions that it derives from, NAME@N or
        data:NAME@N; `run`: the folder of its training, whose energy is stored, and whose recipe if the model has none.
        The base of an adapter is stored as its path and a hash of its files. Raises UsageError for a directory that is
        not a model, OSError if its files cannot be stored."""
        from openm6.tasks.card import read_origin

        if not (directory / "config.json").is_file() and not (directory / "adapter_config.json").is_file():
            raise UsageError(f"{directory} is not a model directory.{suggest_path(directory)}")
        parts = tuple(self.named(one) for one in made_of)
        about: dict[str, Any] = {"metrics": dict(metrics or {}), "note": note, "from": str(directory.resolve())}
        about |= {"origin": origin} if (origin := read_origin(directory)) else {}
        if base := base_of(directory):
            about["base"] = {"path": str(base.resolve()), "hash": directory_hash(base)}
            known = self.version_at(base)
            parts = (known, *parts) if known and known not in parts else parts
        texts = {}
        if run is not None:
            last = last_step(run)
            about |= {"steps": last["step"], "loss": last["loss"], "energy_kwh": last.get("energy_kwh")} if last else {}
        for folder in filter(None, (run, directory)):  # the model's own recipe wins
            if (folder / "recipe.yaml").is_file():
                texts["recipe.yaml"] = (folder / "recipe.yaml").read_text("utf-8")
        return self._add(MODEL, name, about, parts, texts, directory)

    def _add(
        self, kind: str, name: str, about: dict[str, Any], made_of: Iterable[Version], texts: Mapping[str, str],
        directory: Path | None = None,
    ) -> Version:  # fmt: skip
        from mlflow.exceptions import MlflowException

        _check(name)
        client = self._client
        parts = [[v.kind, v.name, v.number] for v in made_of]
        content = {"about": about, "made_of": parts}
        run = client.create_run(self._experiment(kind), run_name=name)
        identity = run.info.run_id
        with tempfile.TemporaryDirectory() as folder:
            for file, text in {**texts, "about.json": json.dumps(content, ensure_ascii=False, indent=1)}.items():
                (Path(folder) / file).write_text(text, "utf-8")
            client.log_artifacts(identity, folder)
        if directory is not None:
            client.log_artifacts(identity, str(directory), "files")
        client.set_terminated(identity)
        try:
            client.create_registered_model(f"{kind}.{name}")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {f"{_TAG}content": json.dumps(content, ensure_ascii=False)}
        made = client.create_model_version(f"{kind}.{name}", f"{run.info.artifact_uri}/files", identity, tags=tags)
        return self._version(made)

    # Finding

    def names(self, kind: str) -> list[str]:
        """Names of all data sets or models."""
        found = self._client.search_registered_models(f"name LIKE '{kind}.%'")
        return sorted(one.name.removeprefix(f"{kind}.") for one in found)

    def versions(self, kind: str, name: str) -> list[Version]:
        """Versions of a data set or model, oldest first; none for an unknown name."""
        _check(name)
        client, aliases = self._client, defaultdict(list)
        found = client.search_model_versions(f"name = '{kind}.{name}'")
        if found:
            for alias, number in client.get_registered_model(f"{kind}.{name}").aliases.items():
                aliases[int(number)].append(alias)
        versions = (replace(self._version(one), aliases=tuple(aliases[int(one.version)])) for one in found)
        return sorted(versions, key=lambda version: version.number)

    def every(self, kind: str) -> list[Version]:
        """All versions of all data sets or models, by name."""
        return [version for name in self.names(kind) for version in self.versions(kind, name)]

    def named(self, text: str, kind: str = MODEL) -> Version:
        """The version of NAME (the latest), NAME@3 or NAME@live; `data:` in front names a data set. Raises UsageError
        (NOT_FOUND) for an unknown version."""
        if text.startswith(("data:", "model:")):
            kind, _, text = text.partition(":")
        name, _, which = text.partition("@")
        every = self.versions(kind, name) if _NAME.fullmatch(name) else []
        if not every:
            message = f"There is no {kind} {cut(name)}.{suggest(name, self.names(kind))}"
            raise UsageError(message, kind=ErrorKind.NOT_FOUND)
        found = [v for v in every if not which or which in (str(v.number), *v.aliases)]
        if not found:
            aliases = [alias for version in every for alias in version.aliases]
            numbers = f"{every[0].number} to {every[-1].number}"
            message = f"{name} has no version {cut(which)}; it has {numbers}.{suggest(which, aliases)}"
            raise UsageError(message, kind=ErrorKind.NOT_FOUND)
        return found[-1]

    def lineage(self, version: Version) -> Lineage:
        """The lineage of a version, down to the data."""
        below = [self.lineage(self.named(f"{kind}:{name}@{number}")) for kind, name, number in version.made_of]
        return Lineage(version, below)

    def fetch(self, version: Version, target: Path) -> Path:
        """Copy the files of a model to a new directory. Raises OpenM6Error if the store cannot be read."""
        from mlflow.artifacts import download_artifacts

        require_new(target)
        if version.kind != MODEL:
            raise UsageError("The catalogue stores no files of data sets: they stay in place.")

        def fill(folder: Path) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as draft:
                try:
                    got = download_artifacts(artifact_uri=version.files, dst_path=draft)
                except Exception as error:  # each store raises its own
                    source = f"{version.full_name} cannot be fetched from {version.files}"
                    raise OpenM6Error(f"The files of {source} ({type(error).__name__}).") from None
                for path in Path(got).iterdir():
                    path.rename(folder / path.name)

        write_whole(target, fill)
        return target

    def local(self, version: Version) -> Path:
        """The local directory of a model, fetched on first use. Raises OpenM6Error for an adapter whose base is missing
        or has changed since the adapter was added."""
        target = home() / "models" / version.full_name
        if not target.is_dir():
            self.fetch(version, target)
        if (base := version.about.get("base")) and (line := changed_base(target, base["hash"])):
            raise OpenM6Error(line)
        return target

    def version_at(self, directory: Path) -> Version | None:
        """The version that `local` fetched into this directory, None for another directory."""
        place = directory.resolve()
        return self.named(place.name) if place.parent == (home() / "models").resolve() else None

    def sample(self, version: Version) -> list[dict[str, Any]]:
        """The sample records of a data set."""
        return [json.loads(line) for line in lines_of(self._text(version, "sample.jsonl"))]

    def recipe(self, version: Version) -> str:
        """The training recipe of a model, "" if none is stored."""
        return self._text(version, "recipe.yaml")

    def parents(self, run: Path) -> list[str]:
        """The catalogue versions of a training's base model and data, for `made_of`."""
        import yaml

        recipe = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
        begun_from = self.version_at(Path(str((recipe.get("model") or {}).get("path") or "")))
        found = [begun_from.full_name] if begun_from else []
        sources = {str(section.get("source")) for section in recipe.get("data") or []}
        for name in self.names(DATA):
            known = [version for version in self.versions(DATA, name) if version.about["source"] in sources]
            found += [f"{DATA}:{version.full_name}" for version in known[-1:]]
        return found

    # Changing

    def promote(self, version: Version, alias: str = LIVE) -> Version | None:
        """Assign an alias to a version. Returns the version that had it before."""
        _check(alias)
        client, name = self._client, f"{version.kind}.{version.name}"
        before = next((v for v in self.versions(version.kind, version.name) if alias in v.aliases), None)
        if before is not None and before.number != version.number:
            client.set_registered_model_tag(name, f"{_TAG}before.{alias}", str(before.number))
        client.set_registered_model_alias(name, alias, str(version.number))
        return before

    def rollback(self, name: str, alias: str = LIVE) -> Version:
        """Assign an alias to the version that had it before. Raises UsageError if there is none."""
        self.named(name)
        number = self._client.get_registered_model(f"{MODEL}.{name}").tags.get(f"{_TAG}before.{alias}")
        if number is None:
            raise UsageError(f"No other version of {name} was {alias} before.")
        version = self.named(f"{name}@{number}")
        self.promote(version, alias)
        return version

    # MLflow

    @cached_property
    def _client(self) -> MlflowClient:
        require("hub", "mlflow")
        import mlflow
        from mlflow.exceptions import MlflowException
        from sqlalchemy import create_engine
        from sqlalchemy.exc import SQLAlchemyError

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            if self.database.startswith("sqlite:///"):
                Path(self.database.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            # Checked first: MLflow itself retries for minutes.
            with create_engine(self.database).connect():
                pass
            client = mlflow.MlflowClient(self.database, self.database)
            client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            place = re.sub(r"//[^@/]*@", "//", self.database)  # not its password
            raise OpenM6Error(f"The catalogue {place} cannot be opened ({type(error).__name__}).") from None
        return client

    def _text(self, version: Version, file: str) -> str:
        """The text of a small file beside a version, "" if it is missing."""
        from mlflow.artifacts import download_artifacts

        place = version.files.removesuffix("/files")
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(download_artifacts(artifact_uri=f"{place}/{file}", dst_path=folder)).read_text("utf-8")
            except Exception:  # each store raises its own
                return ""

    def _experiment(self, kind: str) -> str:
        from mlflow.exceptions import MlflowException

        name = f"openm6-{kind}"
        try:
            return self._client.create_experiment(name, f"{self.artifacts.rstrip('/')}/{kind}")
        except MlflowException:  # there is one
            return str(self._client.get_experiment_by_name(name).experiment_id)  # type: ignore[union-attr]

    def _version(self, one: ModelVersion) -> Version:
        kind, _, name = one.name.partition(".")
        content = json.loads(one.tags[f"{_TAG}content"])
        return Version(
            kind, name, int(one.version), one.creation_timestamp / 1000, content["about"],
            tuple((k, n, int(v)) for k, n, v in content["made_of"]), files=str(one.source),
        )  # fmt: skip


def _check(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{cut(name)!r} is not a valid name: use at most 100 letters, digits, - and _.")


def describe(source: str, data_format: str | None = None, images: str | None = None) -> tuple[dict[str, Any], str]:
    """A data set's columns with the types of their values, number of records and content hash; and sample records as
    JSON lines, with the sizes of pictures."""
    from openm6.data.source import open_source

    records = open_source(source, data_format, images)
    kinds: dict[str, set[str]] = {}
    sample = []
    for number, record in enumerate(records):
        shown = {}
        for name, value in sorted(record.items()):
            if name.startswith("_"):
                continue
            kinds.setdefault(name, set()).add(type(value).__name__)
            shown[name] = f"<{len(value)} bytes>" if isinstance(value, bytes) else value
        if number < SAMPLE:
            sample.append(json.dumps(shown, ensure_ascii=False, default=str))
    about = {
        "source": source, **{key: value for key, value in (("format", data_format), ("images", images)) if value},
        "records": len(records), "rejected": len(records.rejected), "hash": records.content_hash(),
        "columns": {name: " or ".join(sorted(found)) for name, found in kinds.items()},
    }  # fmt: skip
    return about, "\n".join(sample) + "\n"


def find_model(text: str | Path) -> tuple[Path, str]:
    """The absolute directory of a model and its default name. `text` is a model directory, or a model of the catalogue
    (NAME@3, NAME@live), whose files are fetched on first use. Imports no PyTorch, and MLflow only for a catalogue name.
    Raises UsageError for an unknown model, OpenM6Error if the catalogue or its files cannot be reached.
    """
    place = Path(text)
    if place.exists() or "@" not in str(text):
        from openm6.tasks.card import read_card

        read_card(place)
        base_of(place)
        place = place.resolve()
        return place, place.parent.name if place.name == "model" else place.name
    catalogue = Catalogue()
    file = catalogue.database.removeprefix("sqlite:///")
    if file != catalogue.database and not Path(file).exists():
        message = "is not a model directory, and the catalogue is empty: add a model by `openm6 models add`."
        raise UsageError(f"{text} {message}")
    version = catalogue.named(str(text))
    return catalogue.local(version).resolve(), version.name
