"""Talk to a checkpoint, a line at a time: python examples/chat.py mini"""

from __future__ import annotations

import sys

from deepseek import LLM, SamplingParams


def main(model: str) -> None:
    llm = LLM(model)
    params = SamplingParams(max_tokens=200, temperature=0.6)
    messages: list[dict[str, str]] = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        for piece in llm.stream(messages, params):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(*sys.argv[1:])
