"""Honest clients in a process of their own, so that they wait for the server alone and not for the attacker.

`python -m tests.helpers.honest_clients URL STREAMS` keeps so many streams going, one after another.
For each line on its input it writes a line of JSON: the seconds from a token to the next since the last such line, and
what went wrong so far. It ends with its input.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import httpx

BODY = {"model": "tiny", "prompt": "the quick", "max_tokens": 256, "stream": True, "ignore_eos": True}


class Honest:
    def __init__(self, url: str) -> None:
        self.url, self.over = f"{url}/v1/completions", threading.Event()
        self.gaps: list[float] = []
        self.failures: list[str] = []

    def run(self) -> None:
        with httpx.Client(timeout=120) as client:
            while not self.over.is_set():
                try:
                    with client.stream("POST", self.url, json=BODY) as answer:
                        if answer.status_code == 429:  # as it is told to
                            time.sleep(float(answer.headers["retry-after"]))
                        elif answer.status_code != 200:
                            self.failures.append(f"{answer.status_code} {answer.read()!r:.200}")
                            return
                        else:
                            self._read(answer)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    return

    def _read(self, answer: httpx.Response) -> None:
        last = None
        for line in answer.iter_lines():
            if '"error"' in line:
                self.failures.append(line)
            if line.startswith("data: {"):
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append(now - last)
                last = now
            if self.over.is_set():
                return


def main() -> None:
    honest = Honest(sys.argv[1])
    threads = [threading.Thread(target=honest.run, daemon=True) for _ in range(int(sys.argv[2]))]
    for thread in threads:
        thread.start()
    for _ in sys.stdin:
        done, honest.gaps = honest.gaps, []
        print(json.dumps({"gaps": done, "failures": honest.failures}), flush=True)
    honest.over.set()
    for thread in threads:
        thread.join(150)
    sys.exit(any(thread.is_alive() for thread in threads))


if __name__ == "__main__":
    main()
