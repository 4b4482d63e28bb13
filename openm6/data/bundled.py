"""Records from files and folders that contain the pictures: Parquet, WebDataset tar, folders of pictures."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from openm6.core.errors import DataError
from openm6.core.extras import require
from openm6.core.files import fault_of, parse
from openm6.core.images import MAX_BYTES, PICTURES, held_picture
from openm6.data.files import absolute, is_clutter, list_folder, open_file
from openm6.data.rejects import OnReject, Reject
from openm6.data.store import Record
from openm6.data.tables import read_csv, read_jsonl


def plain_picture(value: Any) -> Any:
    """The bytes of a picture stored in base64, in a data URL, or as {"bytes": ..., "path": ...} (the format of Hugging
    Face; the path where there are no bytes). Other values are returned unchanged."""
    if isinstance(value, str):
        return held_picture(value) or value
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else plain_picture(value["bytes"])
    if isinstance(value, list):
        return [plain_picture(v) for v in value]
    return value


def rows_of(table: Any) -> Iterator[Record]:
    """The rows of an Arrow table; NaN, by which pandas writes a missing number, becomes None."""
    return ({k: None if v != v else v for k, v in row.items()} for row in table.to_pylist())


def read_parquet(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """Parquet; binary columns stay bytes. `path` is a file or a folder of files."""
    require("parquet", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in _files(path, ".parquet"):
        try:
            with open_file(name) as file, pq.ParquetFile(file) as table:
                number = 0
                for batch in table.iter_batches(batch_size=256):
                    for row in rows_of(batch):
                        yield {**row, "_where": f"{name}#{number}"}
                        number += 1
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(f"{name} is no Parquet file, or is damaged ({type(error).__name__}).") from None


def read_tar(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """WebDataset: consecutive members with the same name up to the first dot make one record.

    A picture becomes `image`, .txt `text`, .cls `label`, the keys of .json columns of their own; any other member a
    column named by its suffix. Members are read from the stream: nothing is written to disk, whatever their names."""
    for name in _files(path, ".tar", ".tar.gz"):
        record: Record | None = None  # also where a member cannot be used: the record is incomplete
        key = ""
        try:
            with open_file(name) as file, tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    if not member.isfile() or is_clutter(member.name):
                        continue
                    stem, _, ending = member.name.rpartition("/")[2].partition(".")
                    full = f"{member.name.rpartition('/')[0]}/{stem}"
                    if full != key:
                        if record:
                            yield record
                        record = {"_where": f"{name}#{stem}", "__key__": stem}
                    key = full
                    if record is None:
                        continue
                    if member.size > MAX_BYTES:
                        fault = f"has {member.size / 2**20:.0f} MiB; at most {MAX_BYTES / 2**20:.0f} are read"
                    else:
                        content = archive.extractfile(member)
                        fault = _add_member(record, ending.lower(), content.read() if content else b"")
                    if fault:
                        where, record = f"{name}#{member.name}", None
                        on_reject(Reject(where, f"{where} {fault}."))
            if record:
                yield record
        except (tarfile.ReadError, EOFError, OSError, zlib.error):
            if not key:
                raise DataError(f"{name} is no tar file, or is damaged at its beginning.") from None
            # The record before the damage may lack a member: it is not used.
            on_reject(Reject(name, f"{name} is truncated or damaged after {key.lstrip('/')}."))


def _files(path: str, *endings: str) -> list[str]:
    """The file itself, or the files of a folder with one of the suffixes."""
    return [path] if path.lower().endswith(endings) else [n for n in list_folder(path) if n.lower().endswith(endings)]


def _add_member(record: Record, ending: str, content: bytes) -> str:
    """Add a member to its record. Returns the reason why it cannot be used, as a verb with its object, else ""."""
    try:
        if "." + ending.rpartition(".")[2] in PICTURES:
            # The usual `name.jpg` is the record's picture; `name.mask.png` is a column of its own.
            record["image" if "." not in ending else ending.rpartition(".")[0]] = content
        elif ending == "json":
            columns = parse(content.decode("utf-8-sig"))
            if fault := fault_of(columns):
                return fault
            record.update(columns if isinstance(columns, dict) else {"json": columns})
        elif ending in ("txt", "caption", "text"):
            record["text"] = content.decode("utf-8-sig").strip()
        elif ending == "cls":
            record["label"] = content.decode("utf-8-sig").strip()
        else:
            record[ending] = content
    except ValueError:  # undecodable text or JSON
        return f"is not valid {'JSON' if ending == 'json' else 'UTF-8 text'}"
    return ""


def read_folder(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """Pictures with texts: metadata.jsonl or metadata.csv (`file_name` names the picture), or a .txt of the same name
    beside each picture, or one folder a label: {image, text | label | the columns of the metadata}."""
    files = list_folder(path)
    for name in files:
        if name.rsplit("/", 1)[-1].lower() in ("metadata.jsonl", "metadata.csv"):
            for row in (read_jsonl if name.lower().endswith("l") else read_csv)(name, images_root, on_reject):
                if picture := row.pop("file_name", None) or row.pop("image", None):
                    yield {"image": picture, **row, "_root": absolute(images_root or name.rsplit("/", 1)[0])}
                else:
                    on_reject(Reject(row["_where"], f"{row['_where']} has no file_name."))
            return
    pictures = [name for name in files if name.lower().endswith(PICTURES)]
    if not pictures:
        raise DataError(f"{path} holds no pictures (.jpg, .png, .webp ...), no Parquet and no tar files.")
    texts = {name.rpartition(".")[0]: name for name in files if name.lower().endswith(".txt")}
    for name in pictures:
        image = absolute(name)  # independent of the folder that relative paths start from
        if beside := texts.get(name.rpartition(".")[0]):
            with open_file(beside) as file:
                try:
                    yield {"image": image, "text": file.read().decode("utf-8-sig").strip(), "_where": name}
                except UnicodeDecodeError:
                    on_reject(Reject(beside, f"{beside} is not UTF-8 text."))
        elif texts:
            on_reject(Reject(name, f"{name} has no text beside it ({PurePosixPath(name).stem}.txt)."))
        else:
            folder = PurePosixPath(name).parent
            label = {} if folder == PurePosixPath(path) else {"label": folder.name}
            yield {"image": image, **label, "_where": name}
