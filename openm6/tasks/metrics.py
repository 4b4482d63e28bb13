"""Metrics: agreement of answers with references, with bootstrap confidence intervals.

Each metric takes predictions, and for each of them its references (one or more), and returns `Values`; a metric of an
extension may return a number, or a number for each prediction, instead (`values_of`). Perplexity is computed elsewhere:
it comes from the loss, not from answers.

    accuracy      fraction of the answers equal to a reference, but for width, case, blanks and final punctuation
    exact_match   fraction of the answers equal to a reference, blanks at the ends aside
    character_accuracy   mean of 1 - edits / characters of the nearest reference, 0 to 1 (of characters read)
    bleu          corpus BLEU-4, 0 to 100 (sacrebleu, tokenize="zh": each Chinese character is a word)
    rouge_l       mean ROUGE-L F1, 0 to 1, of characters, against the best-fitting reference
    cider         mean CIDEr-D, 0 to 10, of characters (papers print it times 100)
    same_form     fraction of the answers whose lines have as many characters as a reference's, one by one
    spearman      rank correlation of numbers, -1 to 1 (an answer that is not a number counts as 0)
    iou           mean overlap of boxes, 0 to 1: intersection over union with the reference
    found         fraction of the boxes that overlap the reference by 0.5 or more
    cell_f1       of tables: mean F1 of the cells, each with its column's name, 0 to 1; texts equal by accuracy are one
    macro_f1      of labels: mean over the labels of F1, 0 to 1; texts equal by accuracy are one label"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.core.extras import require
from openm6.tasks.slots.label import normalize_label
from openm6.tasks.slots.table import cells_of

if TYPE_CHECKING:
    from openm6.tasks.task import Task

Statistic = Callable[[np.ndarray], float]
Gram = tuple[str, ...]
_Vector = tuple[dict[Gram, float], list[float], int]


@dataclass(frozen=True, slots=True)
class Score:
    """A metric's value over `n` examples, with the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Values:
    """Scores of examples: `examples` [n], NaN where only all together have one; `corpus` returns the score of a
    selection of examples (row numbers), by default their mean."""

    examples: np.ndarray
    corpus: Statistic

    @classmethod
    def mean(cls, examples: Sequence[float] | np.ndarray) -> Values:
        values = np.array(examples, np.float64)
        return cls(values, lambda rows: float(values[rows].mean()))


def _nearest(one: Callable[[str, str], float]) -> Callable[[list[str], list[list[str]]], Values]:
    """A metric from `one`, which scores an answer against one reference: the mean over all answers of the score
    against their best-fitting reference."""

    def metric(predictions: list[str], references: list[list[str]]) -> Values:
        pairs = zip(predictions, references, strict=True)
        return Values.mean([max(one(said, wanted) for wanted in some) for said, some in pairs])

    return metric


accuracy = _nearest(lambda said, wanted: float(_plain(said) == _plain(wanted)))
exact_match = _nearest(lambda said, wanted: float(said.strip() == wanted.strip()))
same_form = _nearest(lambda said, wanted: float(_form(said) == _form(wanted)))
iou = _nearest(lambda said, wanted: _overlap(json.loads(said), json.loads(wanted)))
found = _nearest(lambda said, wanted: float(_overlap(json.loads(said), json.loads(wanted)) >= 0.5))


@_nearest
def character_accuracy(said: str, wanted: str) -> float:
    said, wanted = _plain(said), _plain(wanted)
    return max(0.0, 1 - _edit_distance(said, wanted) / len(wanted)) if wanted else float(not said)


@_nearest
def rouge_l(said: str, wanted: str) -> float:
    answer, reference = characters(said), characters(wanted)
    total = len(answer) + len(reference)
    return 2 * common_length(answer, reference) / total if total else 1.0


@_nearest
def cell_f1(said: str, wanted: str) -> float:
    first, second = (Counter((_plain(name), _plain(cell)) for name, cell in cells_of(one)) for one in (said, wanted))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def _form(text: str) -> list[int]:
    """The number of characters of each line of a verse."""
    return [len(line) for line in re.split(r"[，。；！？,.;!?\n]+", text.strip()) if line]


def _overlap(first: list[float], second: list[float]) -> float:
    """Intersection over union of two boxes: left, top, right, bottom."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (first, second)]
    return both / (sum(areas) - both) if sum(areas) > both else 0.0


def _edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for number, a in enumerate(first, 1):
        diagonal, row[0] = row[0], number
        for place, b in enumerate(second, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (a != b))
    return row[-1]


def bleu(predictions: list[str], references: list[list[str]]) -> Values:
    require(*LIBRARIES["bleu"])
    from sacrebleu.metrics.bleu import BLEU

    sentence = BLEU(tokenize="zh", effective_order=True)
    found = [sentence.sentence_score(p, wanted) for p, wanted in zip(predictions, references, strict=True)]
    # BLEU needs sums over the corpus: matches and totals of each order, lengths.
    sums = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found], np.int64)

    def corpus(rows: np.ndarray) -> float:
        total = sums[rows].sum(0).tolist()
        return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score)

    return Values(np.array([s.score for s in found]), corpus)


def cider(predictions: list[str], references: list[list[str]]) -> Values:
    """CIDEr-D. The weight of a character sequence depends on the number of examples whose references have it; the
    interval takes these weights as given."""
    said = [ngrams(characters(text)) for text in predictions]
    wanted = [[ngrams(characters(text)) for text in texts] for texts in references]
    occurrences = Counter(gram for grams in wanted for gram in set().union(*grams))
    weight = {gram: math.log(len(wanted) / count) for gram, count in occurrences.items()}
    unknown = math.log(max(1, len(wanted)))

    def vector(grams: Counter[Gram]) -> _Vector:
        """TF-IDF of the n-grams, the norm of each order's, and the number of bigrams, which stands for the length."""
        values = {gram: count * weight.get(gram, unknown) for gram, count in grams.items()}
        norms = [math.sqrt(sum(v * v for gram, v in values.items() if len(gram) == n)) for n in ORDERS]
        return values, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    def similarity(answer: _Vector, reference: _Vector) -> float:
        (a, a_norms, a_length), (b, b_norms, b_length) = answer, reference
        products = {gram: min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b}
        shared = [sum(value for gram, value in products.items() if len(gram) == n) for n in ORDERS]
        cosines = [s / (x * y) if x and y else 0.0 for s, x, y in zip(shared, a_norms, b_norms, strict=True)]
        return sum(cosines) / len(ORDERS) * math.exp(-((a_length - b_length) ** 2) / (2 * 6.0**2))

    pairs = zip(map(vector, said), wanted, strict=True)
    return Values.mean([10 * sum(similarity(p, vector(w)) for w in grams) / len(grams) for p, grams in pairs])


ORDERS = (1, 2, 3, 4)
"""Lengths of the n-grams that CIDEr-D compares."""


def ngrams(tokens: Sequence[str], orders: Iterable[int] = ORDERS) -> Counter[Gram]:
    return Counter(tuple(tokens[i : i + n]) for n in orders for i in range(len(tokens) - n + 1))


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for place, b in enumerate(second, 1):
            diagonal, row[place] = row[place], diagonal + 1 if a == b else max(row[place], row[place - 1])
    return row[-1]


def spearman(predictions: list[str], references: list[list[str]]) -> Values:
    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:
            return None

    wanted = [number(some[0]) for some in references]
    if None in wanted:
        text = references[wanted.index(None)][0]
        raise DataError(f"spearman compares numbers, and the reference {cut(text)!r} is none: take another metric.")
    pairs = np.array([(number(p) or 0.0, w) for p, w in zip(predictions, wanted, strict=True)])

    def corpus(rows: np.ndarray) -> float:
        said, right = pairs[rows].T
        if said.min() == said.max() or right.min() == right.max():  # no order to agree with
            return 0.0
        return float(np.corrcoef(_ranks(said), _ranks(right))[0, 1])

    return Values(-np.abs(pairs[:, 0] - pairs[:, 1]), corpus)


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks


def macro_f1(predictions: list[str], references: list[list[str]]) -> Values:
    said, right = label_pairs(predictions, references)
    names, codes = np.unique(said + right, return_inverse=True)
    answered, wanted = codes[: len(said)], codes[len(said) :]

    def corpus(rows: np.ndarray) -> float:
        total = np.bincount(np.concatenate([answered[rows], wanted[rows]]), minlength=len(names))
        hits = np.bincount(wanted[rows][answered[rows] == wanted[rows]], minlength=len(names))
        return float((2 * hits[total > 0] / total[total > 0]).mean())

    return Values(np.full(len(said), np.nan), corpus)


def label_namer(known: Iterable[str], others: Iterable[str] = ()) -> Callable[[str], str]:
    """A function that names the label of a text: the one of `known` that accuracy counts as equal, else the first such
    one of `others`, else the normalized text itself."""
    known = [normalize_label(label) for label in known]
    exact, names = set(known), dict[str, str]()
    for label in (*known, *map(normalize_label, others)):
        names.setdefault(_plain(label), label)

    def name(text: str) -> str:
        text = normalize_label(text)
        return text if text in exact else names.get(_plain(text), text)

    return name


def label_pairs(
    predictions: list[str], references: list[list[str]], known: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """The answered label and the right one of each record: of several references the answered one, else the first."""
    name = label_namer(known, (text for wanted in references for text in wanted))
    said, right = [name(text) for text in predictions], []
    for label, wanted in zip(said, references, strict=True):
        labels = [name(text) for text in wanted]
        right.append(label if label in labels else labels[0])
    return said, right


Metric = Callable[[list[str], list[list[str]]], Values | float | Sequence[float] | np.ndarray]

METRICS: dict[str, Metric] = {
    "accuracy": accuracy, "exact_match": exact_match, "character_accuracy": character_accuracy, "bleu": bleu,
    "rouge_l": rouge_l, "cider": cider, "same_form": same_form, "spearman": spearman, "iou": iou, "found": found,
    "cell_f1": cell_f1, "macro_f1": macro_f1,
}  # fmt: skip

BUILT_IN = frozenset(METRICS)

LIBRARIES = {"bleu": ("eval", "sacrebleu")}
"""Metrics that take a library: the extra that brings it, and its module."""

ELSEWHERE = ("perplexity", "recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", "parent", "facts_kept")
"""Metrics other than comparisons with references: of losses, of vectors (retrieve/ranks.py), and with the input table
(faithful.py)."""

LOWER_IS_BETTER = {"perplexity"}
"""Metrics of which a lower value is better; extensions add theirs (openm6.tasks.extend)."""


def gain(name: str, value: float) -> float:
    """The value of a metric, negated where lower is better, to compare models by any metric."""
    return -value if name in LOWER_IS_BETTER else value


def check_metric(metric: str, task: Task) -> None:
    """Raises UsageError for an unknown metric, or one that does not apply to the answers of `task`."""
    if metric not in METRICS and metric not in ELSEWHERE:
        known = (*METRICS, *ELSEWHERE)
        raise UsageError(f"There is no metric {metric}.{suggest(metric, known)} There are: {', '.join(known)}.")
    kind, inputs = task.slots[task.outputs[0]].type, {task.slots[name].type for name in task.inputs}
    needs = {"iou": "box", "found": "box", "macro_f1": "label", "cell_f1": "table"}.get(metric, kind)
    from_table = metric in ("parent", "facts_kept")
    if task.embeds:
        reason = "the task gives a vector, and is measured by how well it finds another task's"
    elif metric in ELSEWHERE and not from_table and metric != "perplexity":
        reason = "it measures vectors"
    elif task.draws and metric != "perplexity":
        reason = "it measures answers, and the task draws: measure it by perplexity"
    elif metric == "perplexity" and task.head:
        reason = "it measures answers of tokens, and the task's come from a head"
    elif from_table and "table" not in inputs:
        reason = "it measures texts that are written from a table"
    elif needs != kind:
        reason = f"it measures a {needs}, and the task gives a {kind}"
    else:
        return
    raise UsageError(f"The metric {metric} does not suit the task {task.name}: {reason}.")


def score(name: str, predictions: list[str], references: list[list[str]]) -> Score:
    """A metric by name, with its interval: see `values_of`."""
    return score_of(values_of(name, predictions, references))


def values_of(name: str, predictions: list[str], references: list[list[str]]) -> Values:
    """The `Values` of a metric by its name.

    A metric may return a number for each prediction, whose mean is the score, or one number, the score of all of them;
    its interval then comes from calling it on the resampled predictions. Raises UsageError for an unknown metric and
    for any other return value, ValueError for empty lists."""
    if name not in METRICS:
        raise UsageError(f"There is no metric {name}.{suggest(name, set(METRICS))} There are: {', '.join(METRICS)}.")
    count, metric = len(predictions), METRICS[name]
    if not predictions or count != len(references) or not all(references):
        raise ValueError("a score needs predictions, and for each of them at least one reference")
    returned = metric(predictions, references)
    try:
        scores = np.asarray(returned.examples if isinstance(returned, Values) else returned, np.float64)
    except (TypeError, ValueError):
        scores = np.array(np.nan)
    if isinstance(returned, Values) and scores.shape == (count,):
        return returned
    if scores.shape not in ((), (count,)) or not np.isfinite(scores).all():
        what = f"{len(scores)} numbers" if scores.shape and np.isfinite(scores).all() else repr(returned)[:80]
        raise UsageError(
            f"The metric {name} returned {what} for {count} answers: it has to return one finite number, one for each "
            "answer, or Values."
        )
    if scores.shape:
        return Values.mean(scores)

    def corpus(rows: np.ndarray) -> float:
        return float(metric([predictions[i] for i in rows], [references[i] for i in rows]))  # type: ignore[arg-type]

    return Values(np.full(count, np.nan), corpus)


def score_of(values: Values) -> Score:
    """The score over all examples, with its interval."""
    count = len(values.examples)
    low, high = bootstrap(count, values.corpus)
    return Score(values.corpus(np.arange(count)), low, high, count)


def bootstrap(n: int, statistic: Statistic, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a statistic of n examples: `statistic` gets row numbers [n], drawn with
    replacement (Efron, 1979). Seeded: the same examples give the same interval."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(n, size=n)) for _ in range(samples)]
    low, high = np.nanquantile(drawn, [0.025, 0.975]).tolist()
    return low, high


_TOKENS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")


def characters(text: str) -> list[str]:
    """Tokens of a text: single Chinese characters, other words whole, single punctuation marks."""
    return _TOKENS.findall(text)


def _plain(text: str) -> str:
    """A label without width, case, blanks and final punctuation; signs at its end (C#, A-) stay."""
    text = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip("。.!?,;:、") or text
