"""Whether a sentence or clause asks for something, by how it begins and ends; English and Chinese.

Every pattern looks at a few words, so that the time is linear in the text.
"""

from __future__ import annotations

import re

_LOOKED_AT = 300  # characters of a sentence
_CLAUSE = 60  # of a clause
_END = 10  # of the end of a sentence
_CLOSING = " \t\r\n”\"'’)）」』\x01\x03"
COLON = (":", "：")
_FIRST = r"first(?:ly)?|second(?:ly)?|third(?:ly)?|first of all|to begin with"
_NEXT = (r"and then|then|next|finally|lastly|after (?:that|this)|afterwards?|also|and also|and finally|and lastly|"
         r"separately|besides|additionally|in addition|furthermore|moreover|plus|by the way|btw|"
         r"(?:on )?(?:(?:an?|the|my|one) )?(?:(?:very|completely|totally|entirely) )?(?:another|last|final|next|"
         r"other|more|second|third|separate|"
         r"different|unrelated|quick) (?:one|thing|question|topic|subject|matter|note)|(?:one|another) more|"
         r"unrelated(?:ly)?|while you're at it")
_POLITE = (r"and|or|but|so|now|ok|okay|hi|hello|hey|thanks|oh|please|pls|plz|kindly|just|maybe|"
           r"(?:could|can|would|will) you|i(?:'d| would)(?: also)? like(?: you)? to|"
           r"i(?: also)? (?:need|want)(?: you)? to|help me(?: to)?|let'?s")
_LEAD = rf"\W{{0,9}}(?:(?:{_FIRST}|{_NEXT}|{_POLITE})\b[,:]? ?){{0,5}}"
_VERBS = (r"explain|describe|write|draft|compose|summari[sz]e|sum up|translate|compute|calculate|work out|estimate|"
          r"evaluate|solve|prove|derive|show|find|list|compare|contrast|analy[sz]e|review|check|verify|parse|identify|"
          r"extract|classify|rewrite|rephrase|refactor|fix|debug|implement|design|create|generate|make|give|tell|"
          r"recommend|suggest|plan|book|order|reserve|convert|outline|discuss|define|determine|prepare|propose|"
          r"interpret|assess|name|simplify|plot|sketch|build|code|correct|edit|proofread|improve|argue|look up|"
          r"figure out|decide|advise|point out|break down|reply|say|state|remind|cancel|draw up|put together|"
          r"come up with|"
          r"think of|pick|choose|move|turn|walk me through|teach|set up|schedule|arrange|rank|shorten|polish|look for|"
          r"go through|sort out|tidy up|answer|count|congratulate")
_ASKING = r"what|why|how|who|whom|whose|which|(?:what|who|how|where|when)'?s"
_HELPING = (r"is|are|was|were|do|does|did|can|could|should|would|will|may|must|has|have|am|shall|isn't|aren't|"
            r"doesn't|don't|can't|won't")
_SUBJECT = r"i|you|we|he|she|they|it|the|my|our|your|a|an|this|that|these|there|any|someone|anyone"
_ZH_FIRST = r"首先|先|第一步"
_ZH_ADDS = (r"另外|还有|此外|顺便|对了|还想|除此之外|换个话题|题外话|(?:再|另)(?:问|来|说)?一?[个件]|"
            r"(?:另一|最后一|下一)[个件](?:问题|事)?")
_ZH_NEXT = rf"然后|接着|随后|其次|最后|再次|再|同时|还要|还得|并且|第[二三四五六七八九十]步|{_ZH_ADDS}"
_ZH_POLITE = (r"请问|请教|请[你您]|请(?!求)|麻烦[你您]?|帮我|帮忙|给我|替我|我想|我要|我需要|想|你好|您好|谢谢|你|您|"
              r"能否|能不能|可以|可否|问一下|问问|问|也|都|并|第[一二三四五六七八九十]|简[要单短]|详细|具体|仔细|"
              r"认真|大[概致]|"
              r"尽快|重新|分别")
_ZH_LEAD = rf"\W{{0,9}}(?:(?:{_ZH_FIRST}|{_ZH_NEXT}|{_ZH_POLITE})[，,、:：！! ]?){{0,6}}"
_ZH_VERBS = (  # with what keeps a statement out: 证明了, 写作, 解除, 用户
    r"解释|说明|介绍一?下?|描述|写(?!作|字|入)|编写|撰写|起草|草拟|拟一|总结|概括|归纳|翻译|计算|算(?!法|术|力|是)|"
    r"求(?!职|救|偿|助)|证明(?!上|了|其|材|人|被|原|已)|推导|解[答方出读析]|列[出举式一]|比较|对比|分析|"
    r"审[查核阅]|检查|判断|"
    r"梳理|提取|识别|改[写成进]|重构|修改|修复|优化|调试|实现|设计|生成|制定|推荐|预[订定约]|订[一个张两]|查[一找询]|"
    r"找[一个出几到]|画[一个出张]|做[一个份张]|告诉|评[价估论]|整理|润色|谈谈|讲[讲一解个]|说说|看看|看一下|把|"
    r"编[一个]|出[一几]|"
    r"(?:用|根据|按照?|仿照|以)[^，。\n]{1,20}?[写编做算求证画实解总翻说讲谈概介列]|安排|确认|核对")
_BEFORE = re.compile(rf"\A{_LEAD}{_ZH_LEAD}", re.IGNORECASE)
_COMMAND = re.compile(rf"{_LEAD}(?:{_VERBS})\b(?![-:]| of\b| (?:is|are|was|were|has|had)\b)|{_ZH_LEAD}(?:{_ZH_VERBS})",
                      re.IGNORECASE)
_QUESTION = re.compile(rf"{_LEAD}(?:(?:{_ASKING})\b|(?:when|where) (?:{_HELPING})\b|(?:{_HELPING}) (?:{_SUBJECT})\b)",
                       re.IGNORECASE)
_REQUEST = re.compile(rf"(?:帮我|帮忙|给我|麻烦[你您]?|请[你您]?(?!求))(?:{_ZH_VERBS})|请问|请教|想问|"
                      rf"我[想要][^，。？]{0,16}?(?:[订买找查]|去趟|学做)|"
                      r"\b(?:(?:could|can|would) you|please|(?:i|we)(?: also)? need|(?:i|we)(?:'d|"
                      r" would)(?: also)? (?:like|love)|"
                      r"i(?: also)? want|tell me|help me|let me know|i wonder|i was wondering)\b", re.IGNORECASE)
_INVERTED = re.compile(rf"{_LEAD}(?:(?:what|why|how|who|where|when) (?:{_HELPING})|(?:what|who|how|where|when)'?s) "
                       rf"(?:{_SUBJECT})\b", re.IGNORECASE)
_ORDER = re.compile(rf"{_LEAD}(?<![a-z])(?:{_FIRST}|{_NEXT})\b|"
                    rf"\W{{0,9}}(?:请|那|我想|我要|你){{0,2}}(?:{_ZH_FIRST}|{_ZH_NEXT})", re.IGNORECASE)
_NEW = re.compile(rf"\W{{0,9}}(?:(?:and|oh|so|but) )?(?:(?:{_NEXT})\b|{_ZH_NEXT})", re.IGNORECASE)
_ZH_LATER = re.compile(r"[,，](?:试?求(?!职|救|偿|助)|问(?!题)|请(?!求)|"
                       r"(?:[你您开头最后再]{0,2})[帮替给]我(?!们?公司)|帮忙|麻烦|写[一个段篇首几])|"
                       r"吗[,，。]|(?:什么|怎么办|多少|哪[个里])。")  # 已知…，求…
_ZH_NEW = re.compile(rf"\W{{0,9}}(?:{_ZH_ADDS})")
_ELSE = re.compile(r"\W{0,9}(?:and |oh |so |but |then,? )?(?:on )?(?:(?:an?|one) )?(?:(?:very|completely|totally|"
                   r"entirely) )?(?:another|separate|different|"
                   r"unrelated) (?:thing|question|topic|subject|matter|note)|\W{0,9}(?:unrelated|by the way|btw)\b|"
                   r"\W{0,9}(?:换个话题|题外话|顺便|对了|另一[个件]|(?:还有|再[问说])一?[个件])", re.IGNORECASE)
_INNER = re.compile(rf"\b(?:{_ASKING}|whether|should)\b", re.IGNORECASE)
_ZH_INNER = re.compile(r"吗|什么|怎么|怎样|如何|为何|多少|哪|是否|能不能|可不可以|是不是|有没有|要不要|该不该|谁")
_BACK = re.compile(  # not "is it safe to", "this week", nor a pronoun of what the sentence itself has named
    r"[^,;:]{0,28}?\b(?:(?<!is )(?<!was )(?<!be )it|it(?! (?:safe|legal|true|possible|ok|okay|normal|worth|better|"
    r"likely|"
    r"necessary|common|bad|fine|wise|dangerous|allowed|enough|a)\b)|its|(?<!like )this(?! (?:week|month|year|"
    r"morning|evening|"
    r"afternoon|weekend|time|summer|winter)\b)|these(?! days\b)|those|them|they|their|he|his|him|she)\b|"
    r".*\b(?:it|this|that|them)\W*\Z", re.IGNORECASE)
_ZH_BACK = re.compile(r"\W{0,9}(?:那么|那|为什么|所以)?(?:它|这|该|此|其|他|她)")
_INTRODUCES = re.compile(
    r"\b(?:following|below|these|two|three|four|five|few|several|some|all|\d+)\b.{0,20}\b(?:questions|tasks|things|"
    r"points|items|requests|favou?rs)\b|\beach (?:item|one|of|point|question)\b|"
    r"\bdo the following\b|help (?:me )?with (?:these|this|the following)|"
    r"(?:以下|下列|下面|如下|几个|[两三四五六\d]个)[^，。？?]{0,8}(?:问题|任务|事|题|要求|工作)|"
    r"请(?:依次|分别|逐一)?(?:完成|回答)", re.IGNORECASE)
_WANTS = re.compile(r"\b(?:i|we)(?: also)? (?:need|want)\b|\bplease\b|\b(?:could|can) you\b|\bhelp me\b|"
                    r"\b(?:need|want)s? (?:help|to know)\b|\bto-?dos?\b|"
                    r"帮我|帮忙|麻烦|我[要想]|需要你|处理一下|让我[^，。]{0,8}[两三四五几]", re.IGNORECASE)
_OF_ANSWER = re.compile(
    r"\W{0,9}(?:please |and )?(?:give|provide|show|write|explain|state|justify|include|list)(?: me)?"
    r"(?: your| the| a| an)?(?: [a-z]+)? (?:answers?|response|reasoning|reasons?|work|working|steps|sources|"
    r"explanations?|result)\b|"
    r"\W{0,9}请?(?:给出|说明|写出|列出|解释|简述|并)?(?:一下)?(?:你的|您的|具体|详细|相应的?|最终)?"
    r"(?:理由|依据|答案|过程|步骤|原因|解析|结果|列式)", re.IGNORECASE)
_POINTS_ON = re.compile(r"\b(?:following|below)\b|以下|下面|下列|如下|下文", re.IGNORECASE)
_LABEL = re.compile(r"\W{0,9}(?!(?:and|but|or|for|about|as|at|on|in|with)\b)[^\W\d]{1,20}"
                    r"(?: [^\W\d]{1,20}){0,2} ?[:：]\s*", re.IGNORECASE)
_CHINESE, _LATIN = re.compile(r"[㐀-䶿一-鿿豈-﫿]"), re.compile(r"[A-Za-z]")


def is_chinese(text: str) -> bool:
    """Whether a text is more Chinese than English: a character counts as three letters."""
    text = text[:_LOOKED_AT]
    return 3 * len(_CHINESE.findall(text)) > len(_LATIN.findall(text))


def length(text: str) -> int:
    """Of the beginning of a text in words; two Chinese characters count as one."""
    text = text[:_LOOKED_AT]
    chinese = len(_CHINESE.findall(text))
    return chinese // 2 + len(re.findall(r"[^\W_㐀-䶿一-鿿豈-﫿]+", text))


def has_order(text: str) -> bool:
    """Whether a clause begins with its place in an order: first, then, 最后."""
    return bool(_ORDER.match(text[:_CLAUSE]))


def matter(text: str) -> str:
    """A part of a request without words of order and politeness before it, where anything is left."""
    rest = _BEFORE.sub("", text[:_CLAUSE], 1) + text[_CLAUSE:]
    return rest if rest.strip() else text


def commands(text: str) -> bool:
    """Whether a clause says what to do ("explain", "计算"), after words of order and politeness."""
    return bool(_COMMAND.match(text[:_CLAUSE]))


def is_question(text: str) -> bool:
    """Whether a sentence ends in a question mark, before what closes a quote."""
    return text[-_END:].rstrip(_CLOSING).endswith(("?", "？"))


def introduces(text: str) -> bool:
    """Whether a sentence says that tasks follow: "two questions", "请回答"."""
    return bool(_INTRODUCES.search(text[-_LOOKED_AT:]))


def wants(text: str) -> bool:
    """Whether a sentence says that something is wanted: "for Monday I need", "老板让我交三样东西"."""
    return bool(_WANTS.search(text[-_LOOKED_AT:]))


def asks(text: str) -> bool:
    """Whether a sentence asks for something, be it a question, a command or a wish."""
    head, end = text[:_LOOKED_AT], text[-_END:].rstrip(_CLOSING)
    if is_question(text):
        return not (introduces(head) and length(head) < 16)
    states = end.endswith((".", "。"))
    if commands(head) or _REQUEST.search(head) or (_QUESTION.match(head) and not states) or (
            (_ZH_NEW.match(head) or has_order(head)) and _ZH_INNER.search(head)) or _ZH_LATER.search(head) or (
            _INVERTED.match(head)):
        return not introduces(head)
    return not states and not end.endswith((*COLON, ";", "；")) and bool(
        _ZH_INNER.search(head) or (_NEW.match(head) and _INNER.search(head)))


def asks_of(text: str, start: int, end: int) -> bool:
    """`asks` of a range, of which the beginning and the end count."""
    middle = min(end, start + _LOOKED_AT)
    return asks(text[start:middle] + text[max(middle, end - 2 * _END) : end])


def wonders(text: str) -> bool:
    """Whether a short Chinese sentence has a question word, whatever its end."""
    return len(text) < _LOOKED_AT // 3 and bool(_ZH_INNER.search(text))


def takes_more(text: str) -> bool:
    """Whether a sentence that asks is about what stands below it."""
    return text.rstrip().endswith(COLON) or bool(_POINTS_ON.search(text[:_LOOKED_AT]))


def is_label(text: str) -> bool:
    """Whether a sentence only names what follows: "Text:", "问题："."""
    return bool(_LABEL.fullmatch(text[:_LOOKED_AT])) and not _NEW.match(text) and not has_order(text)


def is_new(text: str) -> bool:
    """Whether a sentence leaves what was asked before it: also, by the way, 另外."""
    return bool(_NEW.match(text[:_CLAUSE]))


def is_elsewhere(text: str) -> bool:
    """Whether a sentence says that it is about something else than what stands before: different topic, 换个话题."""
    return bool(_ELSE.match(text[:_CLAUSE]))


def goes_on(text: str, anew: bool = False) -> bool:
    """Whether a sentence that asks goes on about what is asked before it: it says how to answer, is short, or points
    back. anew: something new was told in between, which it may point to."""
    head = text[:_LOOKED_AT]
    if _OF_ANSWER.match(head):
        return True
    if anew or _NEW.match(head):
        return False
    if length(head) <= 4:
        return True
    return bool(_ZH_BACK.match(head)) if is_chinese(head) else bool(_BACK.match(head)) and not has_order(head)
