"""Words that name values (colours, materials, those of other items), and the rule that a text names no values other
than those of an item.

Words are read whole: a longer known word hides all inside it. So 仿羊绒 is not 羊绒, 红包 is no colour, and 深蓝色 is
one value."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from openm6.core.errors import DataError, UsageError
from openm6.tasks.numbers import plain

LEXICON = Path(__file__).with_name("lexicon.yaml")
"""Colours and materials that are known without any other item."""

_KEYS = {"colours", "goods", "materials", "imitations", "negations", "others"}


class Values:
    """All known words, by the values that they name; a word may name nothing.

    meanings    word: the values that it names
    implied     value: further words that may name it; 酒红 is 红 too
    bare        characters that are colours in a column of colours alone: 红 in 红/黑
    """

    def __init__(
        self,
        meanings: Mapping[str, Set[str]],
        implied: Mapping[str, Set[str]] | None = None,
        bare: Mapping[str, str] | None = None,
        closed: Iterable[str] = (),
    ):
        self.meanings: dict[str, Set[str]] = {plain(word): values for word, values in meanings.items()}
        self.implied, self.bare = dict(implied or {}), dict(bare or {})
        self.closed = {said: value for value in closed if (said := plain(value)) not in self.meanings}
        self.meanings.update({said: {said} for said in self.closed})
        self.next: dict[str, set[str]] = defaultdict(set)
        for word in self.meanings:
            for place, character in enumerate(word):
                self.next[word[:place]].add(character)
        self._longest = max(map(len, self.meanings), default=0)

    @classmethod
    def load(cls, path: Path = LEXICON, closed: Iterable[str] = ()) -> Values:
        """The words of a lexicon file (see the head of `LEXICON` for its form) and the values `closed`. Raises
        UsageError or DataError for a missing or invalid file."""
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The lexicon {path} cannot be read ({type(error).__name__}).") from None
        except yaml.YAMLError as error:
            raise DataError(f"The lexicon {path} is no YAML: {' '.join(str(error).split())[:200]}.") from None
        if not isinstance(content, dict) or not content.keys() <= _KEYS:
            raise DataError(f"The lexicon {path} has to be a mapping with keys of: {', '.join(sorted(_KEYS))}.")
        meanings: dict[str, set[str]] = {}
        implied: dict[str, set[str]] = defaultdict(set)
        goods, bare = _words(content.get("goods")), {}
        for name, kind, words in _kinds(content.get("colours")):
            value = _colour(words[0])
            implied[value] |= {_colour(name)} if kind else set()
            for word in words:
                short = [word] if len(word) > 1 else [word + one for one in goods]
                meanings.update({said: {value} for said in (_colour(word), *short)})
                bare.update({word: value} if len(word) == 1 else {})
        materials: dict[str, set[str]] = {}
        for name, kind, words in _kinds(content.get("materials")):
            materials.update({word: {words[0]} for word in words})
            implied[words[0]] |= {name} if kind else set()
        for word in materials:
            meanings.update({before + word: {before + word} for before in _words(content.get("imitations"))})
            meanings.update({before + word: set() for before in _words(content.get("negations"))})
        meanings.update(materials)
        meanings.update({word: set() for word in _words(content.get("others"))})
        return cls(meanings, implied, bare, closed)

    def read(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and word of the known words of a text in plain characters, without those inside a longer one."""
        found, reached = [], 0
        for start in range(len(text)):
            end = self._end_of(text, start)
            if end > reached:
                found.append((start, end, text[start:end]))
                reached = end
        return found

    def _end_of(self, text: str, start: int) -> int:
        """End of the longest word that begins at the place; 0 for none."""
        found, end = 0, start
        while end < len(text) and text[end] in self.next.get(text[start:end], ()):
            end += 1
            if text[start:end] in self.meanings:
                found = end
        return found

    def holds(self, word: str) -> bool:
        """Whether a text contains a known word."""
        return bool(self.read(plain(word)))

    def tail(self, text: str) -> str:
        """The end of a text that affects how its continuation is read: from the first known word that is incomplete, or
        overlaps an incomplete one; "" if there is none."""
        said = plain(text)
        first = max(0, len(said) - self._longest)
        start = next((n for n in range(first, len(said)) if said[n:] in self.next), len(said))
        while start < len(said):
            before = range(max(0, start - self._longest), start)
            earlier = next((n for n in before if self._end_of(said, n) > start), start)
            if earlier == start:
                break
            start = earlier
        return said[start:]

    def follows(self, tail: str) -> Iterable[str]:
        """Characters that continue a word at the end."""
        return set().union(*(self.next.get(tail[n:], ()) for n in range(len(tail))))


class OwnValues:
    """The values of one item, by its cells (column and text) and other texts: the only known values that another text
    may name (a rule of tasks/constraints.py)."""

    def __init__(self, known: Values, cells: Iterable[tuple[str, str]], texts: Iterable[str] = ()):
        self.known, self.holds, self.tail, self.follows = known, known.holds, known.tail, known.follows
        self._allowed: set[str] = set()
        given = []
        for column, cell in cells:
            said = plain(cell)
            given.append(said)
            if re.search("色|colou?r", plain(column)):
                # In the cell a word is a colour without 色 too, and so is each character of 红黑拼色.
                given += [f"{word}色" for word in re.findall(r"[^\W_]+", said)]
                inside = {n for start, end, _ in known.read(said) for n in range(start, end)}
                self._allowed |= {known.bare[c] for n, c in enumerate(said) if n not in inside and c in known.bare}
        said = "\n".join((*given, *map(plain, texts)))
        self._own = {word for _, _, word in known.read(said)} | {word for word in known.closed if word in said}
        self._name(self._own)

    def _name(self, words: Iterable[str]) -> None:
        """Allow the values that these words name and imply."""
        for word in words:
            for value in self.known.meanings.get(word, ()):
                if value not in self._allowed:
                    self._allowed.add(value)
                    self._name(map(plain, self.known.implied.get(value, ())))

    def _has(self, word: str) -> bool:
        return self._allowed >= self.known.meanings[word]

    def _may_become(self, start: str) -> bool:
        """Whether a word may become a longer word of the item. Other longer words (红色文化) are allowed in a text, but
        do not justify beginning one: a model that begins one most often means the value."""
        return any(len(word) > len(start) and word.startswith(start) for word in self._own)

    def wrong(self, text: str, ended: bool = True) -> str:
        """The violation in a text; "" if there is none, or if the last word of a text that has not `ended` may become
        another."""
        said = plain(text)
        for start, end, word in self.known.read(said):
            if self._has(word):
                continue
            if ended or not any(self._may_become(said[n:]) for n in range(start + 1)):
                return text[start:end]
        return ""


def _kinds(section: Any) -> Iterable[tuple[str, bool, list[str]]]:
    """For each name and each of its kinds: the name, whether it is a kind, and its synonyms."""
    for names, kinds in (section or {}).items():
        for place, one in enumerate((str(names), *_words(kinds))):
            yield str(names).split("=")[0], place > 0, one.split("=")


def _words(text: Any) -> list[str]:
    return str(text or "").split()


def _colour(word: str) -> str:
    return word if word.endswith("色") else f"{word}色"
