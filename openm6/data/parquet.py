"""Very large Parquet data, read in place: random access to rows, cheap for neighbouring ones.

Only the footers are read at first. A row group is decoded when one of its rows is requested and held while its
neighbours are; the order of the row groups is shuffled once, so that rows with near numbers come from all over the
data. With the shuffle inside a window of the loader this is the usual shuffle of streamed data, but as every row has a
number, a run is resumed exactly, at any number of processes."""

from bisect import bisect_right
from collections import OrderedDict
from threading import Lock

import numpy as np

from openm6.core.errors import DataError, UsageError
from openm6.data.bundled import open_parquet, plain_picture, rows_of
from openm6.data.files import expand, folder_of, is_folder, list_folder
from openm6.data.store import Record

WINDOW_ROWS = 4096
"""Maximum number of rows that are shuffled together (fewer where they are large)."""

WINDOW_BYTES = 512 * 2**20


class ParquetRows:
    """The rows of Parquet files, by number. `window` neighbouring rows are held in memory at a time.

    Raises UsageError when there is another file among them, DataError for a damaged or empty one."""

    def __init__(self, spec: str):
        self.columns: tuple[str, ...] = ()
        groups: list[tuple[str, int, int]] = []
        size = 0
        for path in _files(spec):
            with open_parquet(path) as table:
                meta = table.metadata
                self.columns = tuple(dict.fromkeys((*self.columns, *table.schema_arrow.names)))
                for number in range(meta.num_row_groups):
                    group = meta.row_group(number)
                    groups.append((path, number, group.num_rows))
                    size += group.total_byte_size
        order = np.random.default_rng(0).permutation(len(groups))
        self._groups = [groups[i] for i in order]
        self._ends = [0, *np.cumsum([rows for _, _, rows in self._groups]).tolist()]
        if len(self) == 0:
            raise DataError(f"{spec} holds no usable record.")
        self.window = max(1, min(WINDOW_ROWS, int(WINDOW_BYTES * len(self) / max(size, 1)), len(self)))
        # A window and its read-ahead touch this many groups.
        smallest = max(1, min(rows for _, _, rows in self._groups if rows))
        self._kept = min(len(groups), 2 * (self.window // smallest + 2))
        self._tables: OrderedDict[int, list[Record]] = OrderedDict()
        self._lock = Lock()
        self._group_locks = [Lock() for _ in groups]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        row = range(len(self))[index]
        place = bisect_right(self._ends, row) - 1
        row -= self._ends[place]
        path, number, _ = self._groups[place]
        return {**self._rows(place)[row], "_where": f"{path}#{number}.{row}", "_root": folder_of(path)}

    def _rows(self, place: int) -> list[Record]:
        with self._group_locks[place]:  # one thread decodes a group, the others wait for it
            with self._lock:
                if place in self._tables:
                    self._tables.move_to_end(place)
                    return self._tables[place]
            path, number, _ = self._groups[place]
            with open_parquet(path) as table:
                rows = [{k: plain_picture(v) for k, v in row.items()} for row in rows_of(table.read_row_group(number))]
            with self._lock:
                self._tables[place] = rows
                while len(self._tables) > self._kept:
                    self._tables.popitem(last=False)
            return rows


def _files(spec: str) -> list[str]:
    files: list[str] = []
    for path in expand(spec):
        files += [f for f in list_folder(path) if f.lower().endswith(".parquet")] if is_folder(path) else [path]
    for path in files:
        if not path.lower().endswith(".parquet"):
            raise UsageError(f"{path} is not Parquet: only Parquet files are streamed; leave out stream.")
    if not files:
        raise DataError(f"{spec} holds no Parquet files to stream.")
    return files
