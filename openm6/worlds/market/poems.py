"""Verses in four classical forms and short stories: invented, so that form, theme and required content can be checked.

A verse keeps the number of lines and characters of its form, its even lines rhyme (the last characters are of one
group), and no line is repeated."""

from __future__ import annotations

from openm6.data.store import Record
from openm6.tasks.forms import FORMS, form_of
from openm6.worlds.market.wording import Wording

_THEMES = {
    "春": ("春风", "新燕", "桃花", "杏雨", "柳絮", "细草", "黄莺"),
    "夏": ("荷叶", "蝉声", "新荷", "萤火", "竹影", "莲舟", "榴花"),
    "秋": ("秋风", "落叶", "归雁", "菊花", "白露", "寒蝉", "红枫"),
    "冬": ("北风", "梅花", "白雪", "寒鸦", "炉火", "冰河", "松枝"),
    "山": ("山泉", "青松", "白云", "樵歌", "石径", "飞鸟", "岭雾"),
    "江": ("江水", "渔火", "孤帆", "白鹭", "芦花", "潮声", "汀沙"),
    "月": ("明月", "清辉", "桂影", "星河", "夜色", "银光", "流萤"),
    "茶": ("茶香", "清泉", "竹炉", "新芽", "松风", "素手", "青烟"),
}
RHYMES = (
    ("花香", "月光", "山冈", "夕阳", "池塘", "远方", "故乡", "衣裳", "芬芳", "秋霜", "村庄", "长廊"),
    ("青山", "人间", "江南", "长安", "春寒", "衣衫", "花间", "石栏", "溪滩", "天蓝", "风帆", "云端"),
    ("春风", "清明", "繁星", "长亭", "归程", "虫鸣", "钟声", "心情", "天晴", "浮萍", "画屏", "诗情"),
    ("高楼", "小舟", "清秋", "乡愁", "江流", "枝头", "白鸥", "桥头", "沙洲", "田畴", "山丘", "西楼"),
)
"""Groups of line ends that rhyme."""

_FREE = ("细雨", "古寺", "落日", "碧水", "新柳", "老树", "野渡", "石阶", "小路", "柴门", "晚霞", "渔歌")
_VERBS = "入照过满落绕映到动拂染伴送近"
_PLACES = ("江南", "山中", "门外", "窗前", "溪上", "桥边", "天际", "村头", "楼头", "岸上")


def poems(w: Wording) -> Record:
    """theme, form, poem. The test split has combinations of theme, form and rhyme of its own."""
    while True:
        theme, form, rhyme = w.one(list(_THEMES)), w.one(list(FORMS)), w.number(0, len(RHYMES) - 1)
        if ((list(_THEMES).index(theme) + list(FORMS).index(form) + rhyme) % 4 == 0) == (w.split == "test"):
            break
    lines, length = FORMS[form]
    rhymes, free = w.some(RHYMES[rhyme], lines // 2), w.some(_FREE, lines // 2)
    subjects = w.some(_THEMES[theme], min(lines, 7))
    subjects += w.some(_THEMES[theme], lines - len(subjects))
    places, verbs = w.some(_PLACES, lines), w.some(_VERBS, lines)
    written = []
    for number in range(lines):
        end = rhymes[number // 2] if number % 2 else free[number // 2]
        line = subjects[number] + verbs[number] + end
        written.append((places[number] if length == 7 else "") + line + ("。" if number % 2 else "，"))
    return {"theme": theme, "form": form, "poem": "".join(written)}


def form_kept(poem: str, form: str) -> bool:
    """Whether a poem has the lines and characters of its form."""
    lines = [line for line in poem.replace("。", "，").split("，") if line]
    count, length = form_of(form)
    return len(lines) == count and all(len(line) == length for line in lines)


_WHO = ("小明", "小红", "小华", "阿宝", "小芳", "大伟", "小雨", "阿青")
_WHERE = ("公园", "学校", "海边", "集市", "图书馆", "车站", "果园", "湖边")
_WHAT = ("雨伞", "书包", "帽子", "风筝", "水壶", "围巾", "画册", "口琴")
_WEATHER = ("天气很好", "下着小雨", "刮着大风", "太阳刚刚升起", "天快黑了")
_PLOTS = (
    (
        ("那天{t}，{a}带着{x}去{p}。", "{t}的一天，{a}拿着{x}来到{p}。"),
        ("走着走着，{x}不见了。", "一不留神，{a}把{x}弄丢了。"),
        ("{a}急得到处找，路上遇到了{b}。", "正着急的时候，{b}走了过来。"),
        ("{b}说：“别急，我帮你一起找。”", "{b}二话不说，就跟着一起找。"),
        ("最后他们在一棵树下找到了{x}，两个人都笑了。", "原来{x}就在长椅下面，{a}连声说谢谢。"),
    ),
    (
        ("{b}的生日快到了，{a}想送一份礼物。", "{a}记得明天是{b}的生日。"),
        ("那天{t}，{a}在{p}看中了一件{x}。", "{t}，{a}去{p}挑了很久，选了{x}。"),
        ("可是钱不够，{a}就帮店主扫了一下午的地。", "为了买它，{a}把零钱都拿了出来。"),
        ("第二天，{b}打开盒子，看到了{x}。", "生日那天，{a}把{x}交给了{b}。"),
        ("{b}高兴得跳了起来。", "{b}说这是最好的礼物。"),
    ),
    (
        ("{t}，{a}和{b}约好去{p}。", "{a}约{b}去{p}玩，那天{t}。"),
        ("他们都想要同一件{x}，谁也不让谁。", "为了一件{x}，两个人吵了起来。"),
        ("{a}一个人坐着，心里很难过。", "{b}转过身去，不说话了。"),
        ("过了一会儿，{a}把{x}递给了{b}。", "后来{b}先开口：“{x}给你吧。”"),
        ("从此他们成了最好的朋友。", "两个人一起用{x}，玩到天黑才回家。"),
    ),
    (
        ("{a}住在{p}旁边，最喜欢的东西是{x}。", "{p}旁边住着{a}，他有一件心爱的{x}。"),
        ("一天{t}，{b}从远方来，什么也没带。", "{t}的时候，{b}来了，身上空空的。"),
        ("{a}想了想，把{x}借给了{b}。", "{a}把{x}送到{b}手里。"),
        ("{b}带着{x}走了，很久没有消息。", "许多天过去，{x}没有还回来。"),
        ("第二年，{b}带着{x}和一封信回来了。", "春天到了，{b}回来了，还多带了一份礼物。"),
    ),
    (
        ("{p}要举行比赛，{a}报了名。", "听说{p}有比赛，{a}第一个报名。"),
        ("比赛那天{t}，{a}发现没带{x}。", "那天{t}，{a}到了才想起{x}忘在家里。"),
        ("对手{b}看见了，把自己的{x}借给他。", "{b}虽然是对手，还是把{x}让了出来。"),
        ("比赛很激烈，{b}赢了。", "最后{a}只差一点点。"),
        ("{a}把{x}还给{b}，说：“谢谢你，明年再来。”", "两个人握着手，都觉得自己赢了。"),
    ),
)


def stories(w: Wording) -> Record:
    """keywords (two people, a place, a thing) and story, five sentences in which all of them occur. The test split has
    combinations of place and thing of its own."""
    while True:
        place, thing = w.number(0, len(_WHERE) - 1), w.number(0, len(_WHAT) - 1)
        if ((place + thing) % 4 == 0) == (w.split == "test"):
            break
    a, b = w.some(_WHO, 2)
    told = {"a": a, "b": b, "p": _WHERE[place], "x": _WHAT[thing], "t": w.one(_WEATHER)}
    story = "".join(w.one(sentence).format(**told) for sentence in w.one(_PLOTS))
    return {"keywords": "、".join(told[name] for name in "abpx"), "story": story}
