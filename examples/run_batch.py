"""Answer every line of a text file at once, as JSON of one shape, and count the experts.

python examples/run_batch.py MODEL prompts.txt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deepseek import LLM, SamplingParams
from deepseek.atlas import ExpertUsage

SCHEMA = {"type": "object", "properties": {"verdict": {"enum": ["yes", "no", "unclear"]}}, "required": ["verdict"],
          "additionalProperties": False}


def main(model: str, prompts: str) -> None:
    llm = LLM(model, max_num_seqs=32)
    usage = ExpertUsage(llm.model.config)
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    params = SamplingParams(max_tokens=64, temperature=0, json_schema=SCHEMA)
    for line, result in zip(lines, llm.generate(lines, params, usage=usage), strict=True):
        print(json.dumps({"prompt": line, "answer": result.text, "finish_reason": result.finish_reason}))
    print(usage.table(), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
