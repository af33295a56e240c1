"""Ask a server with OpenAI's own client (pip install openai), while the text streams in.

deepseek serve mini --api_key KEY
python examples/serve_client.py http://127.0.0.1:8000/v1 KEY 'def read_file(path):'
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str, key: str, prompt: str) -> None:
    client = OpenAI(base_url=url, api_key=key)
    model, *adapters = (model.id for model in client.models.list())
    print(f"model {model}, adapters beside it: {', '.join(adapters) or 'none'}")
    for chunk in client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}],
                                                max_tokens=60, stream=True):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    ours = {"deepseek": {"routed": True}}  # beside OpenAI's fields: how many tokens visited each expert
    done = client.completions.create(model=model, prompt=prompt, max_tokens=20, extra_body=ours)
    for layer, counts in done.model_extra["deepseek"]["routed"][0].items():
        print(f"\nlayer {layer}: expert {max(range(len(counts)), key=counts.__getitem__)} saw most tokens", end="")
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
