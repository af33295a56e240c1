"""Chat templates, written here, that treat what an assistant says as published ones do, and tokenizers with them."""

from __future__ import annotations

import json
from functools import cache

from deepseek.tokenizer import Tokenizer

_SYSTEM = ("{% set ns = namespace(system='', tool=false, user=false) %}{% for m in messages %}"
           "{% if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}"
           "{{ bos_token }}{{ ns.system }}{% for t in tools or [] %}[{{ t.function | tojson }}]{% endfor %}")
_RESULT = "<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
_CALLS = ("{% for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
          "{{ c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}")

# DeepSeek-V3: a content is cut at `</think>`; calls only where there is no content; nothing before an answer to a tool
V3 = (_SYSTEM + "{% for m in messages %}{% if m.role == 'user' %}{% set ns.tool = false %}<｜User｜>{{ m.content }}"
      "{% elif m.role == 'assistant' and m.content is none %}{% set ns.tool = false %}<｜Assistant｜>"
      "<｜tool▁calls▁begin｜>" + _CALLS + "<｜tool▁calls▁end｜>{{ eos_token }}"
      "{% elif m.role == 'assistant' %}{% if ns.tool %}<｜tool▁outputs▁end｜>{{ m.content }}{{ eos_token }}"
      "{% set ns.tool = false %}{% else %}<｜Assistant｜>"
      "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
      "{% elif m.role == 'tool' %}{% if not ns.tool %}<｜tool▁outputs▁begin｜>{% endif %}{% set ns.tool = true %}"
      + _RESULT + "{% endif %}{% endfor %}{% if ns.tool %}<｜tool▁outputs▁end｜>{% elif add_generation_prompt %}"
      "<｜Assistant｜>{% endif %}")
# DeepSeek-R1: the same, and the prompt begins to think
R1 = V3.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}")
# DeepSeek-V3.1: `thinking` decides what the prompt ends with; every written turn has its thought behind it
V31 = ("{% if thinking is not defined %}{% set thinking = false %}{% endif %}" + _SYSTEM +
       "{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = true %}<｜User｜>{{ m.content }}"
       "{% elif m.role == 'assistant' %}{% if ns.user %}<｜Assistant｜></think>{% endif %}{% set ns.user = false %}"
       "{% if m.tool_calls %}{{ m.content or '' }}<｜tool▁calls▁begin｜>" + _CALLS + "<｜tool▁calls▁end｜>"
       "{% elif '</think>' in m.content %}{{ m.content.split('</think>', 1)[1] }}{% else %}{{ m.content }}{% endif %}"
       "{{ eos_token }}{% elif m.role == 'tool' %}" + _RESULT + "{% endif %}{% endfor %}"
       "{% if add_generation_prompt and ns.user %}<｜Assistant｜>"
       "{{ '<think>' if thinking else '</think>' }}{% endif %}")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# As Qwen3's: a key for reasoning, shown after the last question only; calls as JSON; the prompt may rule thinking out
LAST = ("{% set ns = namespace(last=0) %}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% set said = m.content or '' %}{% set mused = m.reasoning_content or '' %}"
        "{% if m.role == 'assistant' and '</think>' in said %}"
        "{% set mused = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if mused and loop.index0 > ns.last %}<think>\n{{ mused }}\n</think>\n\n{% endif %}{{ said }}"
        "{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
# As Llama's: trimmed contents, the first call alone, arguments as an object
LLAMA = ("{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
         "<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end|>\n\n"
         "{% if m.tool_calls %}{\"name\": \"{{ m.tool_calls[0].function.name }}\", \"parameters\": "
         "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}<|eot|>"
         "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}")
# Thoughts in marks of its own, of the last turn alone; another key for them
CHANNELS = ("{% for m in messages %}<|{{ m.role }}|>{% if m.thinking and loop.last %}"
            "[thought]{{ m.thinking }}[/thought]{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
OPENS = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}")
KNOWN = {"V3": V3, "R1": R1, "V3.1": V31, "ChatML": CHATML, "last thoughts": LAST, "Llama": LLAMA, "channels": CHANNELS,
         "opens": OPENS}


@cache
def definition(tags: bool) -> str:
    definition = Tokenizer.train(["the quick brown fox asks what time it is"] * 3, 290).definition
    if not tags:
        return definition
    about = json.loads(definition)
    names = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<|im_start|>", "<|im_end|>"]
    about["added_tokens"] += [
        {"id": 290 + n, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": "think" not in name} for n, name in enumerate(names)]
    return json.dumps(about)


def with_template(template: str | None, *, tags: bool = True) -> Tokenizer:
    """A byte-level tokenizer with this template. tags: the tags of reasoning and roles are tokens of their own."""
    return Tokenizer(definition(tags), {}, template)
