"""Text to token ids and back, with the special tokens of OpenM6 and a range of ids for image codes.

    ids 0 .. n-1                    tokens of the text vocabulary and the special tokens
    ids n .. n + num_codes - 1      image codes; they have no text and are not in the tokenizer's files

A tokenizer that is trained here reads and writes all of Unicode without loss (lone surrogates are not Unicode text). A
wrapped one keeps its own normalization: Qwen's, for example, brings text to the form NFC."""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import resources
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any

import tokenizers

from openm6.core.errors import DataError, UsageError

SPECIAL = (
    "<|pad|>", "<|answer|>", "<|end|>", "<|image|>", "<|patch|>", "<|/image|>", "<|mask|>",
    "<|table|>", "<|/table|>", "<|row|>", "<|cell|>", *(f"<|reserved_{k}|>" for k in range(13)),
)  # fmt: skip
"""Special tokens in the order of their ids. Reserved tokens keep old models usable when later versions need one: the
first five are the questions about a generated picture (`estimate_ids`) and the two verdicts."""

HALF = "\ufffd"
"""An incomplete character in the text of `Tokenizer.decode_torn`."""

LONG = 4096
"""Length in characters from which a text is tokenized without holding the interpreter's lock."""

FILE_LIMIT = 128 * 2**20
"""Bytes of a tokenizer.json, at most: four times those of the largest vocabularies."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_SHOWN = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_LEVEL = {chr(byte): byte for byte in _SHOWN} | {
    chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in _SHOWN)
}
"""Characters that stand for bytes in byte-level vocabularies (GPT-2's table)."""


class Tokenizer:
    """A fast tokenizer (`tokenizers.Tokenizer`) whose vocabulary has our special tokens.

    vocab_size      number of all ids, with those of image codes: rows of the model's embedding
    code_start      id of the first of `num_codes` image codes
    estimate_ids    ids of the tokens that ask for a picture's relevance, fidelity and quality; answer: yes_id or no_id
    class_ids       256 ids that stand for numbers where a position answers with one (of the bytes, if present)
    first_new_id    lowest id of our special tokens: a wrapped vocabulary keeps all ids below it
    end_id          id of the token that ends an answer: `<|end|>`, or of a wrapped vocabulary its own (`ends`)
    end_ids         ids at which decoding stops, `end_id` first
    between_ids     ids between two texts that touch: `<|row|>`, or with an own end a newline's
    unwritten       ids that no text has where the vocabulary's own end is used: all that are not its own"""

    def __init__(self, fast: tokenizers.Tokenizer, num_codes: int = 0, ends: Sequence[str] = ()):
        """`ends`: tokens of a wrapped vocabulary that end an answer, in place of `<|end|>`; the first is the one that
        is learned, and that constraints allow."""
        if num_codes < 0:
            raise UsageError(f"num_codes is {num_codes}; it cannot be negative.")
        known = fast.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL if token not in known]
        if missing:
            raise UsageError(f"This tokenizer has no token {missing[0]}: Tokenizer.wrap adds the tokens of OpenM6.")
        ids = [known[token] for token in SPECIAL]
        # A special token in a user's text is text.
        fast.encode_special_tokens = True
        fast.no_padding()
        fast.no_truncation()
        self._fast = fast
        self._plain: dict[str, tuple[int, ...]] = {}
        (
            self.pad_id, self.answer_id, self.end_id, self.image_id, self.patch_id, self.image_end_id, self.mask_id,
            self.table_id, self.table_end_id, self.row_id, self.cell_id,
        ) = ids[:11]  # fmt: skip
        self.estimate_ids, self.yes_id, self.no_id = tuple(ids[11:14]), ids[14], ids[15]
        self.first_new_id = min(ids)
        self.class_ids = tuple(known.get(name, number) for number, name in enumerate(_BYTES))
        self.num_codes = num_codes
        self.code_start = max(known.values()) + 1
        self.vocab_size = self.code_start + num_codes
        self.ends = tuple(ends)
        if unknown := [token for token in ends if token not in known]:
            raise UsageError(f"This tokenizer has no token {unknown[0]}, which is to end its answers.")
        self.end_ids = tuple(known[token] for token in ends) or (self.end_id,)
        self.end_id = self.end_ids[0]
        self.between_ids = self.encode_often("\n") if ends else (self.row_id,)
        self.unwritten = range(self.first_new_id if ends else self.vocab_size, self.vocab_size)

    def with_ends(self, ends: Sequence[str]) -> Tokenizer:
        """The tokenizer with other end tokens."""
        return Tokenizer(self._fast, self.num_codes, ends)

    def is_like(self, other: Tokenizer) -> bool:
        """True if both tokenizers give the same ids for every text."""
        mine, theirs = (self.num_codes, self.ends), (other.num_codes, other.ends)
        return mine == theirs and self._fast.to_str() == other._fast.to_str()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, never those of a special token. Raises DataError for a lone surrogate."""
        try:
            if len(text) > LONG:
                return list(self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids)
            ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise _unreadable(text) from None
        return ids

    def encode_placed(self, text: str) -> list[tuple[int, int]]:
        """`encode`, each id with the place in the text where its token ends, in characters."""
        try:
            found = self._fast.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise _unreadable(text) from None
        return [(token, stop) for token, (_, stop) in zip(found.ids, found.offsets, strict=True)]

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens: those of OpenM6, and a wrapped vocabulary's own."""
        return {one.content: token for token, one in self._fast.get_added_tokens_decoder().items() if one.special}

    def encode_often(self, text: str) -> tuple[int, ...]:
        """`encode` with a cache, for the few texts that recur (instructions, labels)."""
        ids = self._plain.get(text)
        if ids is None:
            if len(self._plain) > 2**16:  # labels of an open set
                self._plain.clear()
            ids = self._plain[text] = tuple(self.encode(text))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens, image codes, and bytes of incomplete characters."""
        text = self.decode_torn(ids)
        if HALF not in text:
            return text
        kept: list[int] = []
        torn = False
        for is_bytes, run in groupby(
            (i for i in ids if i < self.code_start and i not in self._textless), self.parts.__contains__
        ):
            if not is_bytes:
                kept += run
                continue
            tokens = list(run)
            whole = iter(_in_characters(b"".join(self.parts[token] for token in tokens)))
            for token in tokens:
                inside = list(islice(whole, len(self.parts[token])))
                kept += [token] * any(inside)
                torn |= any(inside) and not all(inside)
        text = self.decode_torn(kept)
        return text.replace(HALF, "") if torn else text

    def decode_torn(self, ids: Sequence[int]) -> str:
        """`decode` with incomplete characters as U+FFFD."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    @cached_property
    def parts(self) -> dict[int, bytes]:
        """The bytes of every token that stands for bytes: `<0x41>`, and in a byte-level vocabulary tokens that begin or
        end within a character."""
        found = {}
        for token, (name, text) in self._each.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", name):
                found[token] = bytes.fromhex(name[3:5])
            elif HALF in text and all(character in _BYTE_LEVEL for character in name):
                found[token] = bytes(_BYTE_LEVEL[character] for character in name)
        return found

    @cached_property
    def damaged(self) -> frozenset[int]:
        """Tokens of whole characters whose text has U+FFFD: a vocabulary trained on damaged texts has them."""
        return frozenset(token for token, (_, text) in self._each.items() if HALF in text and token not in self.parts)

    @cached_property
    def _each(self) -> dict[int, tuple[str, str]]:
        """Name and text of every token."""
        names = {token: name for name, token in self._fast.get_vocab(with_added_tokens=True).items()}
        ids = sorted(names)
        texts = self._fast.decode_batch([[i] for i in ids], skip_special_tokens=True)
        return {token: (names[token], text) for token, text in zip(ids, texts, strict=True)}

    @cached_property
    def _textless(self) -> frozenset[int]:
        return frozenset(self.special.values())

    def begun(self, ids: Sequence[int]) -> bytes:
        """The bytes at the end of `ids` that begin a character without completing it; b"" if there are none."""
        said = (token for token in reversed(ids) if token < self.code_start and token not in self._textless)
        run = list(islice(takewhile(self.parts.__contains__, said), 4))  # a character has four bytes at most
        if not run:
            return b""
        decoder = getincrementaldecoder("utf-8")("ignore")
        decoder.decode(b"".join(self.parts[token] for token in reversed(run)))
        return bytes(decoder.getstate()[0])

    def is_part(self, token: int) -> bool:
        """True for an id without a text of its own: a single byte, a special token, an image code."""
        name = self._fast.id_to_token(token) or ""
        return bool(re.fullmatch("<0x[0-9A-F]{2}>", name)) or not self.decode([token])

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, readable by transformers' AutoTokenizer."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._fast.to_str(pretty=False), "utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<|pad|>",
            "eos_token": next(iter(self.ends), "<|end|>"),
            "mask_token": "<|mask|>",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "num_codes": self.num_codes,
            **({"ends": self.ends} if self.ends else {}),
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")

    def without_new(self, rows: int) -> tokenizers.Tokenizer:
        """The tokenizer with the tokens of the ids below `rows`, no image codes among them; below first_new_id it is
        what `wrap` was given."""
        if rows <= self.first_new_id:  # `wrap` has named the rows that were without a token
            while rows and self._fast.id_to_token(rows - 1) == _filler(rows - 1):
                rows -= 1
        content = json.loads(self._fast.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Open a tokenizer written by `save`. Raises UsageError where there is none."""
        directory = Path(directory)
        fast = open_fast(directory)
        config = directory / "tokenizer_config.json"
        try:
            content = json.loads(config.read_text("utf-8"))
            num_codes, ends = content["num_codes"], [str(token) for token in content.get("ends", ())]
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"{directory} holds no tokenizer of OpenM6 ({config.name} does not tell num_codes): "
                "wrap a foreign one by Tokenizer.wrap."
            ) from None
        return cls(fast, num_codes, ends)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled `tokenizers.Tokenizer` forgets encode_special_tokens.
        return _restore, (self._fast.to_str(), self.num_codes, self.ends)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        num_codes: int = 1024,
        alphabet: Iterable[str] = (),
        max_token_length: int = 8,
    ) -> Tokenizer:
        """Train a BPE of at most `vocab_size` tokens on texts, with all characters of `alphabet`.

        Merges are of characters (never over punctuation, blanks or digits, at most `max_token_length` together; 1
        merges none, as in M6, whose tokens are Chinese characters); an unknown character is encoded as its UTF-8 bytes.
        Raises UsageError when `vocab_size` cannot hold the alphabet."""
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

        alphabet = sorted(set(alphabet))
        room = vocab_size - len(SPECIAL) - len(_BYTES)
        if room < max(1, len(alphabet)):
            raise UsageError(
                f"A vocabulary of {vocab_size} tokens is too small: special tokens and bytes take "
                f"{len(SPECIAL) + len(_BYTES)}, the given characters {len(alphabet)}."
            )
        fast = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
        # One digit is one token, so that numbers are spelt alike everywhere. Splitting `<` and `>` off also keeps
        # a text that says "<0x41>" from being taken for the byte.
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\p{P}\p{S}\p{N}]|\s+"), "isolated")
        fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL, *_BYTES],
            initial_alphabet=alphabet,
            limit_alphabet=room,
            max_token_length=max_token_length + 1,  # the library's limit is exclusive, and pairs are always merged
            show_progress=False,
        )
        fast.train_from_iterator(texts, trainer)
        # The trainer takes the bytes as special tokens, which decoding would leave out.
        content = json.loads(fast.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
        if max_token_length == 1:  # merged tokens are at the end of the vocabulary
            content["model"]["merges"] = []
            kept = {*SPECIAL, *_BYTES}
            vocabulary = content["model"]["vocab"]
            content["model"]["vocab"] = {t: i for t, i in vocabulary.items() if len(t) == 1 or t in kept}
        return _restore(json.dumps(content), num_codes)

    @classmethod
    def wrap(
        cls, foreign: str | Path | tokenizers.Tokenizer, num_codes: int = 1024, start_at: int | None = None,
        ends: Sequence[str] = (),
    ) -> Tokenizer:  # fmt: skip
        """Append our tokens and codes to the ids of any fast tokenizer (or of a tokenizer.json, or its directory).

        `start_at` is the first id to be ours, where the embedding of the model has more rows than the tokenizer has
        tokens (Qwen3: 151,936 rows, 151,669 tokens)."""
        fast = foreign if isinstance(foreign, tokenizers.Tokenizer) else open_fast(Path(foreign))
        vocabulary = fast.get_vocab(with_added_tokens=True)
        if taken := [token for token in SPECIAL if token in vocabulary]:
            raise UsageError(f"The tokenizer has a token {taken[0]}, which is the name of one of OpenM6's.")
        used = max(vocabulary.values(), default=-1) + 1
        if start_at is not None and start_at < used:
            raise UsageError(f"start_at is {start_at}, but the tokenizer uses the ids up to {used - 1}.")
        fillers = [_filler(number) for number in range(used, start_at or used)]
        fast.add_special_tokens([*fillers, *SPECIAL])
        return cls(fast, num_codes, ends)


def _filler(number: int) -> str:
    """The name of an id without a token below those of OpenM6: a fast tokenizer leaves no id out."""
    return f"<|unused_{number}|>"


def _restore(content: str, num_codes: int, ends: Sequence[str] = ()) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(content), num_codes, ends)


def open_fast(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, or of its directory. Raises UsageError where there is none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} does not exist: a tokenizer is a directory with a tokenizer.json.")
    if file.stat().st_size > FILE_LIMIT:
        raise UsageError(f"{file} has more than {FILE_LIMIT // 2**20} MiB: it is no tokenizer.")
    try:
        return tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises plain Exception for any fault of the file
        raise UsageError(f"{file} is damaged or no tokenizer ({type(error).__name__}).") from None


def _in_characters(data: bytes) -> list[bool]:
    """For each byte, whether it belongs to a whole character."""
    text = data.decode("utf-8", "surrogateescape")
    return [not "\udc80" <= c <= "\udcff" for c in text for _ in c.encode("utf-8", "surrogateescape")]


def _unreadable(text: Any) -> DataError:
    if not isinstance(text, str):
        return DataError(f"A text is expected, not {type(text).__name__}.")
    place = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), 0)
    return DataError(f"The text {text[:20]!r} is broken: character {place + 1} is half of a surrogate pair.")


def common_characters(count: int) -> list[str]:
    """The `count` most frequent Chinese characters, most frequent first, of the 12,010 in characters.txt (by the word
    counts of the dictionary of jieba 0.42.1, MIT licence): an alphabet for small tokenizers."""
    text = resources.files("openm6.core").joinpath("characters.txt").read_text("utf-8")
    return list(text.replace("\n", ""))[:count]
