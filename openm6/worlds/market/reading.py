"""Passages about shops with a summary, a title, questions and answers; and knowledge about materials, asked without a
passage."""

from __future__ import annotations

from openm6.data.store import Record
from openm6.worlds.market.goods import CATEGORIES, MERITS
from openm6.worlds.market.wording import Wording

_FAMILY, _GIVEN = "王李张刘陈杨赵黄周吴", "明华芳强丽军敏静伟娟"
_TOWNS = ("杭州", "苏州", "成都", "西安", "广州", "青岛", "长沙", "厦门", "南京", "大理")
_STREETS = ("河坊街", "解放路", "中山路", "人民路", "花园街", "长江路", "学府路", "古城街", "海滨路", "文化巷")
_NAMED, _KINDS = "云青星海松金玉风明远", ("小铺", "商行", "工坊", "生活馆", "杂货店")
_EVENTS = ("周末市集", "试穿会", "手工课", "老客户聚会", "新品发布会")

# Facts: wordings, questions, and wordings of the summary.
_TOLD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "place": (
        (
            "{shop}开在{place}的{street}上。",
            "在{place}{street}，有一家叫{shop}的店。",
            "{place}{street}上的{shop}很有名气。",
            "走进{place}的{street}，就能看到{shop}。",
            "{shop}的店面在{place}{street}。",
        ),
        (
            "{shop}在哪个城市？",
            "{shop}开在哪里？",
            "这家店在哪座城市？",
            "想去{shop}要到哪个城市？",
            "哪个城市有{shop}？",
        ),
    ),
    "owner": (
        (
            "店主叫{owner}，从小喜欢这一行。",
            "老板{owner}每天早上八点开门。",
            "开店的人是{owner}。",
            "{owner}是这家店的主人。",
            "这家店由{owner}打理。",
        ),
        ("{shop}的店主是谁？", "谁开了这家店？", "店主叫什么？", "老板的名字是什么？", "这家店是谁的？"),
    ),
    "year": (
        (
            "店是{year}年开的。",
            "{year}年，它第一次开门营业。",
            "从{year}年开业到现在，客人越来越多。",
            "它开业于{year}年。",
            "早在{year}年，这家店就开张了。",
        ),
        ("{shop}是哪一年开的？", "店是什么时候开的？", "哪年开业？", "这家店从哪一年开始营业？", "开业的年份是？"),
    ),
    "goods": (
        (
            "店里主要卖{goods}。",
            "这里的{goods}最受欢迎。",
            "招牌商品是{goods}。",
            "来的人大多是为了买{goods}。",
            "{goods}是店里卖得最好的。",
        ),
        ("{shop}主要卖什么？", "店里什么最受欢迎？", "招牌商品是什么？", "客人来买什么？", "这家店卖得最好的是什么？"),
    ),
    "count": (
        (
            "上个月一共卖出{count}件。",
            "一个月能卖{count}件。",
            "最近一个月的销量是{count}件。",
            "每月销量有{count}件。",
            "单月就卖掉了{count}件。",
        ),
        ("一个月卖多少件？", "上个月卖出多少件？", "月销量是多少？", "每月能卖几件？", "一个月的销量有多少？"),
    ),
    "event": (
        (
            "下个月店里要办{event}。",
            "店里正在准备{event}。",
            "最近还要举行{event}。",
            "接下来有一场{event}。",
            "{event}也快要开始了。",
        ),
        (
            "店里要办什么活动？",
            "下个月有什么活动？",
            "{shop}在准备什么？",
            "最近要举行什么？",
            "快要开始的活动是什么？",
        ),
    ),
}
_EXTRA = (
    "店面不大，却收拾得很干净。",
    "门口种着两盆花。",
    "街坊都爱到这里坐坐。",
    "下雨天客人会少一些。",
    "墙上挂着许多老照片。",
    "店里常常放着轻音乐。",
    "孩子们喜欢门口的木马。",
    "隔壁是一家面馆。",
)


def passages(w: Wording) -> Record:
    """passage, summary (place, owner, goods), title, question and answer, kind (the attribute asked for)."""
    while True:  # names of the test split are its own
        owner, shop = w.one(_FAMILY) + w.one(_GIVEN), w.one(_NAMED) + w.one(_NAMED) + w.one(_KINDS)
        if (sum(map(ord, owner + shop)) % 5 == 0) == (w.split == "test"):
            break
    sold = w.one(list(CATEGORIES))
    facts = {
        "shop": shop,
        "owner": owner,
        "place": w.one(_TOWNS),
        "street": w.one(_STREETS),
        "year": w.number(1985, 2024),
        "goods": w.one(CATEGORIES[sold][1]) + sold,
        "count": w.number(11, 99) * 10,
        "event": w.one(_EVENTS),
    }
    kinds = list(_TOLD)
    sentences = [w.say(_TOLD[kind][0], **facts) for kind in (kinds[0], *w.some(kinds[1:], 5))]
    for extra in w.some(_EXTRA, w.number(1, 2)):
        sentences.insert(w.number(1, len(sentences)), extra)
    asked = w.one(kinds)
    return {
        "passage": "".join(sentences),
        "summary": "{owner}在{place}开的{shop}，主要卖{goods}。".format(**facts),
        "title": "{place}{shop}：{goods}受欢迎".format(**facts),
        "question": w.say(_TOLD[asked][1], **facts),
        "answer": f"{facts[asked]}" + {"year": "年", "count": "件"}.get(asked, ""),
        "kind": asked,
    }


_CARE = {
    "纯棉": ("可以机洗", "中温熨烫", "春季"),
    "真丝": ("手洗", "低温熨烫", "夏季"),
    "亚麻": ("冷水洗", "高温熨烫", "夏季"),
    "羊毛": ("干洗", "垫布熨烫", "冬季"),
    "羊绒": ("干洗", "蒸汽熨烫", "冬季"),
    "牛仔": ("翻面洗", "中温熨烫", "秋季"),
    "真皮": ("用软布擦", "不能熨烫", "秋季"),
    "帆布": ("用刷子刷", "不用熨烫", "春季"),
    "尼龙": ("冷水洗", "不能熨烫", "秋季"),
    "麂皮": ("用橡皮擦", "不能熨烫", "冬季"),
}
_ASKED = {
    0: ("{s}怎么洗？", "{s}的东西脏了怎么办？", "{s}要怎样清洗？", "请问{s}用什么方法洗？", "{s}脏了该怎么清洁？"),
    1: ("{s}怎么熨？", "{s}皱了怎么办？", "{s}能熨烫吗？", "请问{s}要怎样熨？", "{s}起皱了该怎么处理？"),
    2: ("{s}适合什么季节？", "什么季节用{s}最好？", "{s}在哪个季节用？", "请问{s}是哪个季节的？", "{s}最适合哪一季？"),
    3: ("{s}有什么好处？", "{s}好在哪里？", "{s}的特点是什么？", "请问{s}有什么优点？", "为什么选{s}？"),
}
_ASKED_GOODS = ("{k}有什么用？", "为什么要买{k}？", "买{k}的好处是什么？", "请问{k}能做什么？", "{k}好在哪里？")
_POLITE = ("", "你好，", "想问一下，", "我想知道，", "麻烦问一下，")


def knowledge(w: Wording) -> Record:
    """question and answer about materials and goods: the facts are the same in all splits, because a model cannot infer
    unknown facts; a fifth of the wordings is not."""
    polite = w.one(_POLITE)
    if w.chance(0.25):
        category = w.one(list(CATEGORIES))
        return {"question": polite + w.say(_ASKED_GOODS, k=category), "answer": CATEGORIES[category][2]}
    kind, material = w.one(list(_ASKED)), w.one(list(_CARE))
    answer = "，".join(MERITS[material]) if kind == 3 else _CARE[material][kind]
    return {"question": polite + w.say(_ASKED[kind], s=material), "answer": answer}
