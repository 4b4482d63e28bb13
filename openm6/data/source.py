"""Sources: everything a recipe or a command may name as data, with random access to its records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

from openm6.data.readers import files_of, format_of, read
from openm6.data.rejects import Reject, Rejects
from openm6.data.store import ArrowRecords, Record, Records, cached, write_records
from openm6.errors import DataError, UsageError

_CACHE_VERSION = 1


class Source:
    """Named records: `len`, `[i]`, iteration, `columns`; `rejected` are the rows that reading left out.

    `window` is 0 where any record is equally near, else the number of neighbouring records among which order may be
    mixed without reading everything (see `openm6.data.parquet`).
    """

    def __init__(
        self, name: str, records: Records, rejected: tuple[Reject, ...] = (), limit: int | None = None, window: int = 0
    ):
        self.name, self.rejected, self.window = name, rejected, window
        self._records = records
        self._length = len(records) if limit is None else min(limit, len(records))

    @property
    def columns(self) -> tuple[str, ...]:
        return self._records.columns

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._records[index % self._length]

    def __iter__(self) -> Iterator[Record]:
        return (self._records[i] for i in range(self._length))


def open_source(
    spec: str | Path,
    format: str | None = None,
    images_root: str | None = None,
    *,
    stream: bool = False,
    limit: int | None = None,
    rejects: Rejects | None = None,
) -> Source:
    """Open data by its name.

    `demo:catalogue/train`, `demo:questions/test`, `demo:texts/train` (options: `?pictures=500&seed=1`),
    `tryon/train`, `logos/train`, `pets/train` (the same options), `digits/train`, `digits/test`, or a path, URL or glob
    in a format of `openm6.data.readers`. Files are read once into the cache (`$OPENM6_CACHE`, else ~/.cache/openm6) and
    again only when they change. With `stream` a Parquet source is read in passing and never copied.

    Rows that cannot be used are counted in `rejects` when it is given, which raises DataError when they are too many.
    Raises UsageError for an unknown name, DataError for missing, damaged or empty data.
    """
    name = str(spec)
    kind = name.partition("?")[0].partition("/")[0].rstrip(":")
    if name.startswith("demo:") or (kind in ("digits", "logos", "pets", "tryon") and not Path(name).exists()):
        if stream:
            raise UsageError(f"{name} is not streamed: stream is for Parquet files.")
        return Source(name, _built_in(name), limit=limit)
    if stream:
        from openm6.data.parquet import ParquetRows

        rows = ParquetRows(name)
        return Source(name, rows, limit=limit, window=rows.window)
    records, rejected = _through_cache(name, format, images_root)
    if rejects is not None:
        rejects.saw(len(records))
        for reject in rejected:
            rejects.count(reject.where, reject.reason, name)
    if len(records) == 0:
        why = f": {rejected[0].reason}" if rejected else "."
        raise DataError(f"{name} holds no usable record{why}")
    return Source(name, records, rejected, limit)


def _built_in(name: str) -> Records:
    place, _, query = name.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if place.startswith("digits"):
        from openm6.data.digits import open_digits

        _no_more(name, options)
        return open_digits(place.partition("/")[2] or "train")
    try:
        seed, pictures = int(options.pop("seed", 0)), int(options.pop("pictures", 0)) or None
        side = int(options.pop("side", 0)) or None if place.startswith("logos") else None
        if seed < 0 or (pictures or 0) < 0:
            raise ValueError
    except ValueError:
        raise UsageError(f"{name}: seed, pictures and side have to be whole numbers, not negative.") from None
    _no_more(name, options)
    view, _, split = place.removeprefix("demo:").partition("/")
    if place.startswith("logos"):
        from openm6.data.logos import open_logos

        return open_logos(split or "train", seed, pictures, side)
    if place.startswith("pets"):
        from openm6.data.pets import open_pets

        return open_pets(split or "train", seed, pictures)
    if not place.startswith("demo:"):
        from openm6.data.figures import open_figures

        return open_figures(split or "train", seed, pictures)
    from openm6.data.catalogue import open_catalogue

    return open_catalogue(view, split or "train", seed, pictures)


def _no_more(name: str, options: dict[str, str]) -> None:
    if options:
        raise UsageError(
            f"{name}: unknown option {', '.join(options)}; the demo, logo, pet and try-on data know seed and "
            "pictures, the logos side too, the digits none."
        )


def _through_cache(name: str, format: str | None, images_root: str | None) -> tuple[ArrowRecords, tuple[Reject, ...]]:
    from openm6.data.files import expand, fingerprint

    kinds = [format_of(path, format) for path in expand(name)]
    key = [_CACHE_VERSION, kinds, images_root, str(Path.cwd()), [fingerprint(f) for f in files_of(name)]]

    def make(folder: Path) -> None:
        rejected: list[Reject] = []
        write_records(folder, read(name, format, images_root, rejected.append))
        lines = [json.dumps([r.where, r.reason], ensure_ascii=False) + "\n" for r in rejected]
        (folder / "rejects.jsonl").write_text("".join(lines), "utf-8")

    folder = cached("source", key, make)
    lines = (folder / "rejects.jsonl").read_text("utf-8").splitlines()
    return ArrowRecords(folder), tuple(Reject(where, reason) for where, reason in map(json.loads, lines))
