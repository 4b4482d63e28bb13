"""The tokenizer: nothing is lost, nothing special slips in, old ids stay."""

import json
import pickle
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers, trainers

from openm6.core.errors import DataError, UsageError
from openm6.core.tokenizer import SPECIAL, Tokenizer, common_characters

TEXTS = ["图中的商品是什么颜色？", "红色条纹连衣裙在蓝色圆点帽子的左边。", "hello world, 2024  <|end|> <0x41>"] * 20
ALL_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 600, num_codes=64, alphabet="一二三你我他")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer, as the published language models have, with a special token of its own."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(TEXTS, trainer)
    fast.add_special_tokens(["<|im_end|>"])
    path = tmp_path_factory.mktemp("foreign")
    fast.save(str(path / "tokenizer.json"))
    return path


special_words = st.sampled_from([*SPECIAL, "<0x41>", "<0xE4>", "\x00", "  ", "\t", "龘", "\U0001f469\u200d\U0001f467"])


@settings(deadline=None, max_examples=300)
@given(st.lists(ALL_TEXT | special_words, max_size=6).map("".join))
def test_every_text_comes_back_and_holds_no_special_id(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    special = {tokenizer._fast.token_to_id(token) for token in SPECIAL}
    assert not special & set(ids)
    assert all(0 <= i < tokenizer.code_start for i in ids)


@pytest.mark.slow
def test_every_code_point_comes_back(tokenizer: Tokenizer) -> None:
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 20_000):
        text = "".join(map(chr, points[start : start + 20_000]))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_frequent_text_is_short_and_numbers_are_spelt_by_digit(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("红色条纹连衣裙")) < 7
    assert len(tokenizer.encode("一二三")) == 3
    digits = [tokenizer.encode(d) for d in "2024"]
    assert tokenizer.encode("2024") == [i for d in digits for i in d]


def test_ids_are_laid_out_as_promised(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == tokenizer.code_start + 64 <= 600 + 64
    assert (tokenizer.pad_id, tokenizer.answer_id, tokenizer.end_id) == (0, 1, 2) and tokenizer.first_new_id == 0
    names = ("image", "patch", "image_end", "mask", "table", "table_end", "row", "cell")
    assert [getattr(tokenizer, f"{name}_id") for name in names] == list(range(3, 11))


def test_special_tokens_and_codes_have_no_text(tokenizer: Tokenizer) -> None:
    codes = (tokenizer.code_start, tokenizer.vocab_size - 1)
    assert tokenizer.decode([tokenizer.answer_id, *tokenizer.encode("红"), *codes, tokenizer.end_id]) == "红"
    assert tokenizer.decode([]) == ""


def test_half_a_character_has_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("龘")
    assert len(ids) == 3 and tokenizer.decode_torn(ids[:2]).endswith("\ufffd")
    assert tokenizer.decode([*ids, *ids[:2]]) == "龘"  # bytes that stand together are read together
    assert tokenizer.decode([*tokenizer.encode("红"), *ids[:2], *tokenizer.encode("红"), ids[1], *ids]) == "红红龘"
    assert tokenizer.decode(tokenizer.encode("\ufffd")) == "\ufffd"  # a text may say it


@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_read_as_the_characters_that_they_have(tokenizer: Tokenizer, numbers: list[int]) -> None:
    ids = [tokenizer.class_ids[number] for number in numbers]
    assert tokenizer.decode(ids) == bytes(numbers).decode("utf-8", "ignore")
    whole = bytes(numbers).decode("utf-8", "ignore").encode()
    begun = tokenizer.begun(ids)
    assert not begun or (bytes(numbers).endswith(begun) and len(begun) < 4 and not whole.endswith(begun))


def test_a_lone_surrogate_is_bad_data(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="character 3 is half of a surrogate pair"):
        tokenizer.encode("红色\ud83d")
    with pytest.raises(DataError, match="not int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_a_long_text_is_cut_beside_other_threads(tokenizer: Tokenizer) -> None:
    """A server goes on answering while it reads one: the interpreter's lock is free for nearly all of the time."""
    sentence = "红色的靠垫，95 元。"
    ended, turns = Event(), 0

    def others() -> None:
        nonlocal turns
        while not ended.wait(0.001):
            turns += 1

    thread = Thread(target=others)
    thread.start()
    ids = tokenizer.encode(sentence * 50_000)
    ended.set()
    thread.join()
    assert turns > 5 and ids == tokenizer.encode(sentence) * 50_000
    with pytest.raises(DataError, match="character 500001 is half of a surrogate pair"):
        tokenizer.encode("红" * 500_000 + "\ud83d")


def test_saved_loaded_and_pickled_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "place")
    text = "红色<|end|>\U0001f600 <0x41>\t条纹"
    for other in (Tokenizer.load(tmp_path / "new" / "place"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text) == tokenizer.encode(text) and other.decode(other.encode(text)) == text
        assert (other.vocab_size, other.num_codes, other.end_id) == (tokenizer.vocab_size, 64, tokenizer.end_id)


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(iter(TEXTS), 600, num_codes=64, alphabet="他我你三二一")
    assert again._fast.to_str() == tokenizer._fast.to_str()


def test_transformers_opens_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    text = "图中的 商品\U0001f600是什么?"
    assert auto.encode(text) == tokenizer.encode(text) and auto.decode(auto.encode(text)) == text
    assert (auto.pad_token_id, auto.eos_token_id, len(auto)) == (0, 2, tokenizer.code_start)


@settings(deadline=None)
@given(ALL_TEXT)
def test_a_wrapped_tokenizer_keeps_its_ids(foreign: Path, text: str) -> None:
    before = Fast.from_file(str(foreign / "tokenizer.json"))
    wrapped = Tokenizer.wrap(foreign, num_codes=16)
    assert wrapped.encode(text) == before.encode(text).ids or "<|im_end|>" in text
    assert wrapped.decode(wrapped.encode(text)) == text


def test_wrapping_appends_from_where_it_is_told(foreign: Path, tmp_path: Path) -> None:
    used = Fast.from_file(str(foreign / "tokenizer.json")).get_vocab_size()
    assert Tokenizer.wrap(foreign / "tokenizer.json", 16).pad_id == used
    wrapped = Tokenizer.wrap(foreign, num_codes=16, start_at=used + 37)
    assert wrapped.first_new_id == wrapped.pad_id == used + 37
    assert wrapped.vocab_size == used + 37 + len(SPECIAL) + 16
    text = "<|end|><|unused_400|><|im_end|>红"
    assert max(wrapped.encode(text)) < used - 1 and wrapped.decode(wrapped.encode(text)) == text
    wrapped.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad_id, loaded.vocab_size) == (wrapped.pad_id, wrapped.vocab_size)
    with pytest.raises(UsageError, match=f"start_at is 3, but .* uses the ids up to {used - 1}"):
        Tokenizer.wrap(foreign, start_at=3)


def test_a_vocabulary_with_one_of_our_special_tokens_is_refused(foreign: Path) -> None:
    fast = Fast.from_file(str(foreign / "tokenizer.json"))
    fast.add_special_tokens(["<|pad|>"])
    with pytest.raises(UsageError, match=r"has a token <\|pad\|>, which is the name of one of OpenM6's"):
        Tokenizer.wrap(fast)


def test_wrong_files_are_refused_in_one_sentence(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist: a tokenizer is a directory"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UsageError, match="wrap a foreign one"):
        Tokenizer.load(foreign)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text((foreign / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_codes": 4}))
    with pytest.raises(UsageError, match=r"no token <\|pad\|>"):
        Tokenizer.load(tmp_path)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="280 tokens is too small"):
        Tokenizer.train(TEXTS, 280)
    with pytest.raises(UsageError, match="the given characters 100"):
        Tokenizer.train(TEXTS, 350, alphabet=common_characters(100))
    with pytest.raises(UsageError, match="num_codes is -1"):
        Tokenizer.train(TEXTS, 600, num_codes=-1)


def test_no_corpus_makes_the_vocabulary_larger_than_asked() -> None:
    many = ["".join(chr(0x4E00 + i) for i in range(k, k + 50)) for k in range(0, 3000, 50)]
    assert Tokenizer.train(many, 700, num_codes=0).vocab_size <= 700


def test_common_characters_are_common() -> None:
    characters = common_characters(2048)
    assert len(set(characters)) == 2048 and set("的一是不了人") <= set(characters[:40])
    assert common_characters(10) == characters[:10] and len(common_characters(10**6)) > 6000


@pytest.mark.parametrize("longest", [1, 2, 3, 5])
def test_no_token_is_longer_than_asked(longest: int) -> None:
    texts = ["红色条纹连衣裙卖得很好", "红色圆点连衣裙卖得很好", "蓝色条纹帽子"] * 20
    tokenizer = Tokenizer.train(texts, 700, 8, "红色", longest)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("红色条纹连衣裙卖得很好")]
    assert max(map(len, pieces)) == longest
    ids = sorted(tokenizer.encode("".join(sorted({*"".join(texts)}))))
    assert tokenizer.decode(tokenizer.encode("蓝色的 cat 🐈")) == "蓝色的 cat 🐈"
    assert ids[-1] < tokenizer.vocab_size
