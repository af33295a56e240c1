"""Tune the experts of one name, and see what was gained, what was forgotten, and that nothing else moved.

python examples/tune_law.py runs/named/model cases.jsonl runs/law [general.jsonl]
"""

from __future__ import annotations

import sys

from deepseek import LLM, MoEFineTuner


def main(model: str, records: str, out: str, general: str | None = None, name: str = "law_expert") -> None:
    tuner = MoEFineTuner(model, expert_tune=(name,), retain_data=general, out=out, batch_size=4, max_length=128)
    print(tuner)
    report = tuner.fit(records, epochs=1)
    print(f"gained {report.gained:.3f} nats a token on held-out records; on other text the loss went from "
          f"{report.general_before:.3f} to {report.general_after:.3f}")
    print(f"{report.frozen_unchanged} of {report.frozen_tensors} frozen tensors have the SHA-256 they had")
    llm = LLM(model, adapter=report.result)  # the delta goes into its base as it is loaded
    print(llm.generate("The court", max_tokens=20, seed=1)[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
