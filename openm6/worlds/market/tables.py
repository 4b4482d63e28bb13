"""Small tables of goods, with questions and computed answers."""

from __future__ import annotations

from collections.abc import Callable

from openm6.data.store import Record
from openm6.worlds.market.goods import CATEGORIES, make_goods
from openm6.worlds.market.wording import Wording

Rows = list[dict[str, str]]


def _number(row: dict[str, str], column: str) -> int:
    return int(row[column].rstrip("元件"))


def _lookup(w: Wording, rows: Rows) -> tuple[str, str]:
    row, column = w.one(rows), w.one(("颜色", "材质", "价格", "库存"))
    asked = w.say(
        ("{k}的{c}是什么？", "{k}的{c}是多少？", "表里{k}的{c}是？", "请查{k}的{c}。", "告诉我{k}的{c}。"),
        k=row["品类"],
        c=column,
    )
    return asked, row[column]


def _found(w: Wording, rows: Rows) -> tuple[str, str]:
    column = w.one(("颜色", "材质"))
    single = [row for row in rows if [r[column] for r in rows].count(row[column]) == 1]
    if not single:
        return _lookup(w, rows)
    row = w.one(single)
    asked = w.say(
        (
            "哪件商品的{c}是{v}？",
            "{c}为{v}的是什么？",
            "什么商品的{c}是{v}？",
            "{v}的商品是哪个？",
            "找出{c}是{v}的商品。",
        ),
        c=column,
        v=row[column],
    )
    return asked, row["品类"]


def _extreme(w: Wording, rows: Rows) -> tuple[str, str]:
    most = w.chance(0.5)
    column = w.one(("价格", "库存"))
    row = (max if most else min)(rows, key=lambda r: _number(r, column))
    end = "高" if most else "低"
    asked = w.say(
        (
            "{c}最{e}的是什么？",
            "哪件商品{c}最{e}？",
            "什么的{c}最{e}？",
            "请找出{c}最{e}的商品。",
            "论{c}，最{e}的是哪件？",
        ),
        c=column,
        e=end,
    )
    return asked, row["品类"]


def _counted(w: Wording, rows: Rows) -> tuple[str, str]:
    colour = w.one(rows)["颜色"]
    asked = w.say(
        ("{v}的商品有几件？", "有几件商品是{v}的？", "表里{v}的有几件？", "数一数{v}的商品。", "一共几件{v}商品？"),
        v=colour,
    )
    return asked, f"{sum(row['颜色'] == colour for row in rows)}件"


def _compared(w: Wording, rows: Rows) -> tuple[str, str]:
    first, second = w.some(rows, 2)
    column = w.one(("价格", "库存"))
    row = max((first, second), key=lambda r: _number(r, column))
    asked = w.say(
        (
            "{a}和{b}，哪个{c}高？",
            "{a}跟{b}比，谁的{c}更高？",
            "{c}更高的是{a}还是{b}？",
            "比一比{a}和{b}的{c}，哪个高？",
            "在{a}与{b}之间，{c}高的是？",
        ),
        a=first["品类"],
        b=second["品类"],
        c=column,
    )
    return asked, row["品类"]


_KINDS: dict[str, Callable[[Wording, Rows], tuple[str, str]]] = {
    "lookup": _lookup,
    "found": _found,
    "extreme": _extreme,
    "counted": _counted,
    "compared": _compared,
}


def tables(w: Wording) -> Record:
    """table (three to five rows, numbers all different), question, answer, kind."""
    categories = w.some(list(CATEGORIES), w.number(3, 5))
    prices, stocks = w.some(range(29, 999), len(categories)), w.some(range(5, 300), len(categories))
    rows = []
    for category, price, stock in zip(categories, prices, stocks, strict=True):
        goods = make_goods(w, category=category)
        rows.append(
            {"品类": category, "颜色": goods.colour, "材质": goods.material, "价格": f"{price}元", "库存": f"{stock}件"}
        )
    kind = w.one(list(_KINDS))
    question, answer = _KINDS[kind](w, rows)
    return {"table": rows, "question": question, "answer": answer, "kind": kind}
