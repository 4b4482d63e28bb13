"""Write the files of a small invented shop, for the scenario pages of the documentation:

python examples/shop.py shop

copy.jsonl, copy-test.jsonl      attributes, copy
talks.jsonl, talks-test.jsonl    attributes, history, reply
live.jsonl, live-test.jsonl      asr, script
goods.csv                        40 goods without a text: sku, title, and their attributes
items.jsonl, photos/             1,500 goods with a photo: sku, photo, caption, title, price, colour
items-test.jsonl                 200 others
visits.jsonl, visits-test.jsonl  history, bought: skus of items.jsonl; a customer buys one colour
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from openm6.data.source import open_source

TRAIN, TEST, GOODS, ITEMS, VISITS = 4_000, 200, 40, 1_500, 800


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def texts(folder: Path) -> None:
    for view, columns in (("copy", "attributes copy"), ("talks", "attributes history reply"), ("live", "asr script")):
        for split, suffix, count in (("train", "", TRAIN), ("test", "-test", TEST)):
            source = open_source(f"market:{view}/{split}?records={count}")
            write(folder / f"{view}{suffix}.jsonl", ({c: record[c] for c in columns.split()} for record in source))


def goods(folder: Path) -> None:
    rows = [record["attributes"][0] for record in open_source(f"market:copy/test?records={GOODS}")]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "goods.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["sku", "title", *names])
        table.writeheader()
        table.writerows(
            {"sku": f"G{number:03}", "title": f"{row.get('品牌', '')}{row['品类']}", **row}
            for number, row in enumerate(rows)
        )


def photos(folder: Path) -> None:
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    source, items = open_source(f"demo:studio/train?pictures={ITEMS + TEST}"), []
    for number in range(ITEMS + TEST):
        record = source[number]
        (folder / f"photos/{number:04}.jpg").write_bytes(record["image"])
        items.append(
            {
                "sku": f"P{number:04}", "photo": f"photos/{number:04}.jpg", "caption": record["caption"],
                "title": f"{record['colour']}{record['pattern']}{record['category']}",
                "price": int(rng.integers(20, 400)), "colour": record["colour"],
            }
        )  # fmt: skip
    items, held_out = items[:-TEST], items[-TEST:]
    write(folder / "items.jsonl", items)
    write(folder / "items-test.jsonl", held_out)
    shelves: dict[str, list[str]] = {}
    for item in items:
        shelves.setdefault(item["colour"], []).append(item["sku"])
    visits = []
    for _ in range(VISITS + TEST):
        shelf = shelves[str(rng.choice(sorted(shelves)))]
        *history, bought = (str(sku) for sku in rng.choice(shelf, 4, replace=False))
        visits.append({"history": history, "bought": bought})
    write(folder / "visits.jsonl", visits[:VISITS])
    write(folder / "visits-test.jsonl", visits[VISITS:])


def main(output: str) -> None:
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    texts(folder)
    goods(folder)
    photos(folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
