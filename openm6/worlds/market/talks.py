"""Reviews with praise and blame, and questions of customers with a shop's replies."""

from __future__ import annotations

from openm6.data.store import Record
from openm6.worlds.market.goods import Goods, make_goods
from openm6.worlds.market.wording import Wording

# Praise and blame of each topic.
_SAID: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "质量": (
        ("{s}做工很细", "用了一个月还像新的", "质量比想的好", "针脚整齐，很结实", "拿到手就知道是好东西"),
        ("没用几天就坏了", "线头到处都是", "{s}感觉是假的", "质量对不起这个价", "洗一次就变形了"),
    ),
    "物流": (
        ("昨天下单今天就到了", "送货很快", "快递员态度好", "包得严严实实", "比预计早两天收到"),
        ("等了十天才到", "盒子都压扁了", "快递放错地方", "催了几次才发货", "路上耽误了一个星期"),
    ),
    "价格": (
        ("{y}很划算", "这个价格买到算便宜", "比店里便宜一半", "活动价真实惠", "花{y}就买到，值了"),
        ("{y}太贵了", "买完第二天就降价", "不值{y}", "同样的别家便宜", "这个价格有点离谱"),
    ),
    "外观": (
        ("{c}很正", "{p}特别好看", "样子{f}，同事都问哪买的", "和图片一样漂亮", "拿出来大家都夸好看"),
        ("{c}和图片差太多", "{p}印歪了", "看着很土", "颜色暗沉，不喜欢", "实物比照片难看多了"),
    ),
    "服务": (
        ("客服很耐心", "有问必答", "退换很爽快", "店家主动补了差价", "问什么都马上回"),
        ("客服不理人", "说好的赠品没有", "退货被拒绝", "态度很差", "问了三天没人回"),
    ),
}
_BEGUN = ("这{m}{k}", "买了{c}的{k}，", "{b}的{k}，", "给妈妈买的{k}，", "第二次买{k}了，")
_TURNS = ("，不过", "，但是", "，可惜", "，就是", "，只是")


def reviews(w: Wording) -> Record:
    """text; label: 好评, 差评, or 中评 where it praises one thing and blames another; topic: of the first."""
    goods = make_goods(w)
    words = goods.words()
    topic, other = w.some(list(_SAID), 2)
    label = w.one(("好评", "中评", "差评"))
    first = 0 if label == "好评" else 1 if label == "差评" else int(w.chance(0.5))
    text = w.one(_BEGUN).format(**words) + w.say(_SAID[topic][first], **words)
    if label == "中评":
        text += w.one(_TURNS) + w.say(_SAID[other][1 - first], **words)
    elif w.chance(0.5):
        text += "，" + w.say(_SAID[other][first], **words)
    return {"text": text + w.one(("。", "！", "")), "label": label, "topic": topic}


_QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": ("这{m}{k}是什么颜色的", "请问颜色是什么", "{k}是哪种颜色", "想问下是什么色的", "颜色能说一下吗"),
    "material": ("这是什么料子", "请问{k}的材质是什么", "用什么做的呀", "是什么面料", "材质方便说下吗"),
    "price": ("这个多少钱", "请问{k}怎么卖", "价格是多少呀", "现在什么价", "{k}要多少钱一{m}"),
    "season": ("这个什么季节用", "{k}冬天能用吗", "适合哪个季节呀", "请问是哪一季的", "夏天用合适吗"),
    "style": ("这是什么风格", "{k}是哪种风格的", "样子偏什么风格呀", "请问风格是", "风格能介绍一下吗"),
}
_REPLIES = {
    "colour": "亲，这{m}{k}是{c}的，图案是{p}。",
    "material": "亲，用的是{s}，{t}，{v}。",
    "price": "亲，现在{y}一{m}，喜欢可以直接下单。",
    "season": "亲，这{m}{k}适合{j}，{u}。",
    "style": "亲，是{f}风格的，{c}{p}，很好搭配。",
}
_WISHES = ("想要{x}的，有吗", "有没有{x}的", "{x}的还有吗", "能不能给我一{m}{x}的", "请问{x}的有货吗")
_THANKS = ("好的谢谢", "谢谢啦", "知道了，多谢", "好，明白了", "嗯嗯，谢谢")


def talks(w: Wording) -> Record:
    """attributes of the goods, history (the customer's last words, perhaps after an exchange), reply."""
    goods = make_goods(w)
    history, reply = _turn(w, goods)
    if w.chance(0.4):
        asked, told = _turn(w, goods)
        history = f"客：{asked}\n店：{told}\n客：{history}"
    elif w.chance(0.15):
        history, reply = w.say(_THANKS), "亲，不客气，祝您购物愉快。"
    return {"attributes": [goods.row()], "history": history, "reply": reply}


def _turn(w: Wording, goods: Goods) -> tuple[str, str]:
    """A customer's words, and a reply that is true of the goods."""
    words = goods.words()
    if w.chance(0.35):
        other = make_goods(w)
        wanted = goods.colour if w.chance(0.5) else other.colour
        asked = w.say(_WISHES, x=wanted, **words)
        if wanted == goods.colour:
            return asked, "有的亲，{c}的{k}现在有货，{y}一{m}。".format(**words)
        return asked, "抱歉亲，没有{x}的，这{m}{k}只有{c}。".format(x=wanted, **words)
    name = w.one(list(_QUESTIONS))
    mark = w.one(("？", "?", ""))
    return w.say(_QUESTIONS[name], **words) + mark, _REPLIES[name].format(**words)
