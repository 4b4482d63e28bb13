"""Metrics against values by hand and against the libraries' own corpus figures."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from openm6.core.errors import UsageError
from openm6.tasks.extend import register_metric
from openm6.tasks.metrics import (
    METRICS,
    Metric,
    Values,
    accuracy,
    bleu,
    bootstrap,
    character_accuracy,
    characters,
    cider,
    exact_match,
    rouge_l,
    score,
    values_of,
)

chinese = st.text(st.sampled_from("红蓝绿色的图中有一件。 a7"), min_size=1, max_size=14).filter(str.strip)
corpora = st.lists(st.tuples(chinese, st.lists(chinese, min_size=1, max_size=3)), min_size=1, max_size=8)


def test_characters_that_are_read_are_counted_by_edits() -> None:
    found = character_accuracy(["山水", "山", "山水田", "", "日月火水木", "xyz"], [["山水"]] * 6)
    assert found.examples.tolist() == pytest.approx([1, 0.5, 0.5, 0, 0, 0])
    assert character_accuracy(["山木"], [["日", "山水"]]).examples.tolist() == pytest.approx([0.5])


def test_accuracy_looks_past_width_case_blanks_and_final_punctuation() -> None:
    found = accuracy(["红色。", "Ａ b", "蓝", "", "左边"], [["蓝色", "红色"], ["ab"], ["蓝色"], ["x"], ["左边", "左"]])
    assert found.examples.tolist() == [1, 1, 0, 0, 1]


def test_exact_match_does_not() -> None:
    assert exact_match([" 红色", "红色。"], [["红色"], ["红色"]]).examples.tolist() == [1, 0]


def _lcs(a: list[str], b: list[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


@settings(deadline=None)
@given(corpora)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(corpus: list) -> None:
    predictions, references = [p for p, _ in corpus], [r for _, r in corpus]
    found = rouge_l(predictions, references).examples
    for value, prediction, wanted in zip(found, predictions, references, strict=True):
        said = characters(prediction)
        best = max(2 * _lcs(said, characters(w)) / (len(said) + len(characters(w))) for w in wanted)
        assert value == pytest.approx(best, abs=1e-6)


def test_rouge_l_by_hand_and_for_nothing() -> None:
    # 红色连衣裙 / 红色的裙: 红 色 裙 in common, 2 * 3 / (5 + 4)
    found = rouge_l(["红色连衣裙", "", "红"], [["红色的裙"], ["红"], [" ", "红"]]).examples
    assert found == pytest.approx([2 / 3, 0, 1])
    assert rouge_l(["红" * 600], [["红" * 600]]).examples == pytest.approx([1])


@settings(deadline=None)
@given(corpora)
def test_bleu_is_sacrebleus_corpus_figure(corpus: list) -> None:
    from sacrebleu.metrics.bleu import BLEU

    predictions, references = [p for p, _ in corpus], [r for _, r in corpus]
    longest = max(map(len, references))
    streams = [[r[k] if k < len(r) else None for r in references] for k in range(longest)]
    expected = BLEU(tokenize="zh").corpus_score(predictions, streams).score
    assert bleu(predictions, references).corpus(np.arange(len(predictions))) == pytest.approx(expected, abs=1e-9)


def test_bleu_by_hand() -> None:
    # 6 characters, all right, but the reference has 8: only the brevity penalty exp(1 - 8/6) is left.
    value = score("bleu", ["红色条纹裙子"], [["红色条纹裙子一条"]]).value
    assert value == pytest.approx(100 * np.exp(1 - 8 / 6))
    assert score("bleu", ["蓝"], [["红色条纹裙子"]]).value == 0


def test_cider_ranks_and_knows_the_perfect_answer() -> None:
    references = [["一件红色连衣裙"], ["蓝色圆点的帽子"], ["绿色雨伞在左边"]]
    right = cider([r[0] for r in references], references).examples
    assert right == pytest.approx([10, 10, 10])
    half = cider(["一件蓝色连衣裙", "蓝色圆点的帽子", "完全不同"], references).examples
    assert 0 < half[0] < half[1] and half[1] == pytest.approx(10) and half[2] == 0


def test_cider_by_hand() -> None:
    # Unigrams alone agree: 红 of both. idf = log(3/1) for each, tf 1: cosine of (红, 花) and (红, 旗) is 1/2; the
    # longer sequences have nothing in common. Equal lengths, so no penalty: 10 * (1/2 + 0 + 0 + 0) / 4.
    found = cider(["红花", "山", "水"], [["红旗"], ["山"], ["水"]]).examples
    assert found[0] == pytest.approx(10 * 0.5 / 4)


def test_cider_is_the_figure_of_pycocoevalcap() -> None:
    references = [
        ["一只红色的猫在草地上睡觉。", "草地上有一只睡觉的猫。"], ["蓝色的杯子放在桌上", "桌上的 iPhone 和蓝色杯子"],
        ["红色条纹连衣裙"], ["一件红色的毛衣"],
    ]  # fmt: skip
    found = cider(["草地上睡着一只红猫。", "桌上有 iPhone", "红色条纹连衣裙", ""], references)
    assert found.examples == pytest.approx([3.678272, 1.07207241, 10, 0], abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(corpora)
def test_rouge_l_and_edits_are_those_of_other_libraries(corpus: list) -> None:
    from rouge_chinese import Rouge
    from torchmetrics.functional.text import char_error_rate

    for text, wanted in corpus:
        right = " ".join(characters(wanted[0]))
        by_rouge = Rouge(["rouge-l"], ["f"]).get_scores(" ".join(characters(text)), right)[0]["rouge-l"]["f"]
        assert rouge_l([text], [wanted[:1]]).examples[0] == pytest.approx(by_rouge, abs=1e-6)
        one, two = (re.sub(r"[ 。.]", "", t) or "一" for t in (text, wanted[0]))
        errors = float(char_error_rate([one], [two]))
        assert character_accuracy([one], [[two]]).examples[0] == pytest.approx(max(0, 1 - errors), abs=1e-6)


def test_text_is_taken_apart_by_character() -> None:
    assert characters("红T恤, 12件 hello龘！") == ["红", "T", "恤", ",", "12", "件", "hello", "龘", "！"]
    assert characters("\U00020000a") == ["\U00020000", "a"] and characters(" \n") == []


@settings(deadline=None, max_examples=25)
@given(corpora, st.sampled_from(sorted(set(METRICS) - {"iou", "found", "spearman"})))
def test_every_score_lies_in_its_range_and_interval(corpus: list, name: str) -> None:
    predictions, references = [p for p, _ in corpus], [r for _, r in corpus]
    found = score(name, predictions, references)
    top = {"bleu": 100, "cider": 10}.get(name, 1) * (1 + 1e-9)
    assert 0 <= found.low <= found.high <= top and 0 <= found.value <= top and found.n == len(corpus)
    if name in ("accuracy", "exact_match"):
        assert found.low <= found.value <= found.high
    assert found == score(name, predictions, references)


def test_the_interval_is_that_of_a_share() -> None:
    values = np.arange(400) < 320
    low, high = bootstrap(400, lambda rows: float(values[rows].mean()))
    half = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.01)
    assert bootstrap(1, lambda rows: 0.5) == (0.5, 0.5)


def test_the_interval_covers_about_95_percent() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = rng.random(150) < 0.7
        low, high = bootstrap(150, lambda rows, v=values: float(v[rows].mean()), samples=200)
        hits += low <= 0.7 <= high
    assert 175 <= hits <= 200


def test_misuse() -> None:
    with pytest.raises(UsageError, match=r'no metric bleau\. Did you mean "bleu"'):
        score("bleau", ["a"], [["a"]])
    for predictions, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="at least one reference"):
            score("accuracy", predictions, references)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Metric], str]]:
    """Registers a metric of one's own for one test, and gives its name."""

    def register(metric: Metric) -> str:
        register_metric("own", metric)
        return "own"

    yield register
    METRICS.pop("own", None)


SAID, WANTED = ["是", "否", "是", "否", "是"], [["是"], ["否"], ["否"], ["是"], ["是"]]


@pytest.mark.slow
def test_a_metric_of_ones_own_may_return_one_number(own: Callable[[Metric], str]) -> None:
    def f1(answers: list[str], references: list[list[str]]) -> float:
        from sklearn.metrics import f1_score

        return f1_score([r[0] == "是" for r in references], [a == "是" for a in answers], zero_division=np.nan)

    found = score(own(f1), SAID, WANTED)
    assert found.value == pytest.approx(2 / 3) and found.n == 5
    assert 0 <= found.low < found.value < found.high <= 1


@pytest.mark.parametrize("kind", [list, np.array, lambda scores: torch.tensor(scores, dtype=torch.float32)])
def test_a_metric_of_ones_own_may_return_a_number_for_each_answer(own: Callable[[Metric], str], kind: Any) -> None:
    name = own(lambda said, wanted: kind([float(s in w) for s, w in zip(said, wanted, strict=True)]))
    assert score(name, SAID, WANTED) == score("exact_match", SAID, WANTED)
    assert values_of(name, SAID, WANTED).examples.tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("returned", [None, "high", {"f1": 0.5}, [0.5] * 4, [[0.5] * 5], math.nan, Values.mean([0.5])])
def test_a_metric_that_returns_anything_else_is_named(own: Callable[[Metric], str], returned: Any) -> None:
    with pytest.raises(UsageError, match="The metric own returned .* for 5 answers: it has to return one finite"):
        score(own(lambda said, wanted: returned), SAID, WANTED)


@pytest.mark.parametrize("name", ["accuracy", "perplexity", "parent"])
def test_a_metric_of_openm6_is_not_replaced(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' cannot name a metric of yours"):
        register_metric(name, lambda said, wanted: 1.0)


def test_lines_of_the_same_lengths() -> None:
    found = METRICS["same_form"](
        ["细草绿，春风到。", "细草，春风到。", "", "一\n二"], [["红花开，白云去。"]] * 3 + [["三,四"]]
    )
    assert found.examples.tolist() == [1, 0, 0, 1]


def test_rank_correlation_against_scipy_and_without_an_order() -> None:
    from scipy.stats import spearmanr

    said, wanted = ["0", "3", "1", "x", "4"], ["1", "2", "0", "0", "4"]
    value = score("spearman", said, [[w] for w in wanted]).value
    assert value == pytest.approx(spearmanr([0, 3, 1, 0, 4], [1, 2, 0, 0, 4]).statistic)
    assert score("spearman", ["1", "1"], [["1"], ["2"]]).value == 0


def test_overlap_of_boxes_by_hand() -> None:
    whole, half, away = "[0, 0, 1, 1]", "[0, 0, 0.5, 1]", "[0.6, 0, 0.9, 1]"
    said = [whole, half, half, half, "[0, 0, 0, 0]"]
    wanted = [[whole], [whole], [away], [away, "[0.25, 0, 0.5, 1]"], [whole]]
    assert METRICS["iou"](said, wanted).examples == pytest.approx([1, 0.5, 0, 0.5, 0])
    assert METRICS["found"](said, wanted).examples.tolist() == [1, 1, 0, 1, 0]


def test_cells_of_a_table_are_compared_with_the_names_of_their_columns() -> None:
    wanted = [['{"颜色": "红色", "品类": "围巾"}']] * 6
    said = [
        '[{"品类": "围巾", "颜色": "红色"}]', '{"颜色": "红色。"}', '{"颜色": "围巾", "品类": "红色"}', "红色的围巾",
        "[]", '[{"颜色": "红色"}, {"颜色": "红色"}]',
    ]  # fmt: skip
    assert METRICS["cell_f1"](said, wanted).examples == pytest.approx([1, 2 / 3, 0, 0, 0, 0.5])
