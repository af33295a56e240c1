"""Who serves a request: top-1, top-3, abstention and confusion of every scorer, and microseconds a request.

    python benchmarks/routing.py [--data FOLDER] [--model mini]

Eight names of routing.yaml with training texts of domains.py as samples; asked are held-out records of the same
sources, and a source each that training never saw. Beside the scorers: the best single member for all requests, and the
oracle. The distilled router is read by examples/edge_router.py. With --members, also as many members as texts: each
knows the first half of one, and is asked with the second. With --model, also the scorer that asks that model's gates,
on fewer of the requests, beside the others on the same.
"""

from __future__ import annotations

import hashlib
import random
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek import LLM
from deepseek.data import ReadReport, read_documents
from deepseek.domain import softmax
from deepseek.engine.routing import GateReader
from deepseek.files import read_yaml
from deepseek.route import ExpertPool, PoolMember
from deepseek.route.distilled import distill
from domains import TRAIN, UNSEEN, add_data, data_folder, places
from harness import arguments, machine, table, versions, write_result

CLIENT = Path(__file__).parent.parent / "examples" / "edge_router.py"
HELD_OUT = 0.1  # of a source's documents
PIECE = 1600  # characters of a piece of a long document
ASKED = 2000  # characters of a request at most
SAMPLES, RECORDS = 2400, 300  # of a name, evenly from its sources, at most
ABSTAIN = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
REQUIRED = {"keywords": (0.85, 0.8, 1000), "classifier": (0.95, 0.8, 2000), "distilled": (0.0, 0.0, 1000)}
Probabilities = Callable[[str], np.ndarray]
Requests = list[tuple[str, str]]  # (name, text)


def pieces(text: str) -> list[str]:
    """A long document in pieces that end at lines."""
    if len(text) <= ASKED:
        return [text]
    found, start = [], 0
    while start < len(text):
        line = text.rfind("\n", start + PIECE // 2, start + PIECE)
        end = line if line > 0 else start + PIECE
        found.append(text[start:end])
        start = end
    return [piece for piece in found if len(piece.strip()) > 100]


def is_held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") < HELD_OUT * 2**64


def read(data: Path, samples: int, records: int) -> tuple[dict[str, list[str]], Requests, Requests]:
    """(samples by name, held-out requests, requests of unseen sources). Documents are held out whole."""
    train: dict[str, list[str]] = {}
    held_out: Requests = []
    unseen: Requests = []
    for name, files in TRAIN.items():
        draw, train[name] = random.Random(name), []
        for file in files:
            sides: dict[bool, list[str]] = {False: [], True: []}
            for document in read_documents([data / file], ReadReport()):
                sides[is_held_out(document.text)] += pieces(document.text)
            for side in sides.values():
                draw.shuffle(side)
            train[name] += sides[False][: samples // len(files)]
            held_out += [(name, text[:ASKED]) for text in sides[True][: records // len(files)]]
    for name, (_, files) in UNSEEN.items():
        documents = read_documents(places(data, files), ReadReport())
        texts = [piece for document in documents for piece in pieces(document.text)]
        random.Random(name).shuffle(texts)
        unseen += [(name, text[:ASKED]) for text in texts[:records]]
    return train, held_out, unseen


def measured(names: Sequence[str], probabilities: Probabilities, requests: Requests) -> dict[str, Any]:
    """Means over names of top-1 and top-3; accuracy by name; confusion; (threshold, answered, right of these)."""
    p_NM = np.stack([probabilities(text) for _, text in requests])
    y_N = np.array([names.index(name) for name, _ in requests])
    rank_N = (p_NM > p_NM[np.arange(len(y_N)), y_N][:, None]).sum(1)
    rank_N[~p_NM.any(1)] = len(names)
    best_N, sure_N = p_NM.argmax(1), p_NM.max(1)
    curve = [(t, float((sure_N >= t).mean()), float((rank_N[sure_N >= t] == 0).mean()) if (sure_N >= t).any() else None)
             for t in ABSTAIN]
    there = [k for k in range(len(names)) if (y_N == k).any()]
    by_name = {names[k]: float((rank_N[y_N == k] == 0).mean()) for k in there}
    confusion = np.bincount(y_N * len(names) + best_N, minlength=len(names) ** 2).reshape(len(names), -1)
    return {"top1": statistics.mean(by_name.values()),
            "top3": statistics.mean(float((rank_N[y_N == k] < 3).mean()) for k in there),
            "by_name": by_name, "confusion": confusion.tolist(), "curve": curve, "best": best_N}


def microseconds(work: Callable[[str], object], texts: Sequence[str], rounds: int) -> tuple[float, float]:
    """(median, 99th percentile) over texts of the fastest of some rounds each."""
    took = []
    for text in texts:
        one = []
        for _ in range(rounds):
            began = time.perf_counter()
            work(text)
            one.append(time.perf_counter() - began)
        took.append(min(one) * 1e6)
    return float(np.median(took)), float(np.percentile(took, 99))


def many(train: dict[str, list[str]], count: int, asked: int, rounds: int) -> list[list[str]]:
    """Rows of a pool of so many members, each of which knows half of a text."""
    texts = list(dict.fromkeys(text for own in train.values() for text in own if len(text) > 600))
    random.Random(0).shuffle(texts)
    texts = texts[:count]
    members = [PoolMember(f"m{i}", text[:80].strip() or "text", samples=[text[: len(text) // 2]])
               for i, text in enumerate(texts)]
    rows, names = [], [member.name for member in members]
    requests = [(f"m{i}", texts[i][len(texts[i]) // 2 :][:ASKED])
                for i in range(0, len(texts), max(1, len(texts) // asked))]
    for scorer in ("keywords", "classifier"):
        began = time.perf_counter()
        pool = ExpertPool(members, scorer)
        probabilities = pool.scorer.probabilities
        built = time.perf_counter() - began
        found = measured(names, probabilities, requests)
        median, slow = microseconds(pool.route, [text for _, text in requests[:100]], rounds)
        rows.append([f"{scorer}, {len(members):,} members", f"{found['top1']:.1%}", f"{found['top3']:.1%}",
                     f"{median:,.0f}", f"{slow:,.0f}", f"{built:.1f} s"])
    return rows


def by_gates(model: str, members: Sequence[PoolMember], known: dict[str, Probabilities], parts: Sequence[Requests],
             count: int) -> tuple[list[list[str]], str]:
    """(rows of top-1 of the known scorers and of the model's gates, on `count` requests of each name; their cost)."""
    names = [member.name for member in members]
    some = [[one for name in names for one in [own for own in part if own[0] == name][:count]] for part in parts]
    pool = ExpertPool(members, "gate")
    llm = LLM(model)
    pool.bind(GateReader(llm))  # names that the model has no experts for may be among them
    began = time.perf_counter()
    scorer = pool.scorer
    built, stats = time.perf_counter() - began, llm.engine.stats
    gates = scorer.more[0]
    spent, seconds = stats.routing_tokens, stats.routing_seconds
    known = known | {"gate": scorer.probabilities,
                     "gate, no terms": lambda text: softmax(gates.logits(text)[0][None])[0]}
    rows = [[label, *(f"{measured(names, p, part)['top1']:.1%}" for part in some)] for label, p in known.items()]
    asked = 2 * sum(map(len, some))
    return rows, (f"{(stats.routing_tokens - spent) / asked:.0f} tokens and "
                  f"{(stats.routing_seconds - seconds) / asked * 1e3:.0f} ms a decision, {built:.0f} s at the start")


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    add_data(parser)
    parser.add_argument("--members", type=int, default=10_000, help="of the large pool; 0 leaves it out")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of a name at most (default: {SAMPLES})")
    parser.add_argument("--records", type=int, default=RECORDS, help=f"to ask of a name at most (default: {RECORDS})")
    parser.add_argument("--model", help="whose gates are asked, too")
    parser.add_argument("--gate_records", type=int, default=40, help="of a name, for that (default: 40)")
    args = parser.parse_args()
    data, kind = data_folder(args.data)
    train, held_out, unseen = read(data, args.samples, args.records)
    entries = read_yaml(Path(__file__).with_suffix(".yaml"))["members"]
    members = [PoolMember(one["name"], one["domain"], keywords=one["keywords"], samples=train[one["name"]])
               for one in entries]
    names = [member.name for member in members]
    scorers: dict[str, Probabilities] = {}
    decide: dict[str, Callable[[str], object]] = {}
    thresholds, built = {}, {}
    for scorer in ("keywords", "classifier"):
        pool = ExpertPool(members, scorer)
        began = time.perf_counter()
        scorers[scorer], thresholds[scorer] = pool.scorer.probabilities, pool.scorer.threshold
        built[scorer], decide[scorer] = time.perf_counter() - began, pool.route
        print(f"{scorer}: built in {built[scorer]:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.npz"
        distill(pool, path)
        size = path.stat().st_size
        client = runpy.run_path(str(CLIENT))["EdgeRouter"](str(path))
    scorers["distilled"], decide["distilled"] = client.probabilities, client.route
    thresholds["distilled"] = client.threshold
    found = {scorer: {"held_out": measured(names, p, held_out), "unseen": measured(names, p, unseen)}
             for scorer, p in scorers.items()}
    longest = sorted((text for _, text in held_out + unseen), key=len)[-200:]
    speed = {scorer: microseconds(work, longest, args.rounds) for scorer, work in decide.items()}
    same = {part: float((found["distilled"][part]["best"] == found["classifier"][part]["best"]).mean())
            for part in ("held_out", "unseen")}
    for own in found.values():
        for one in own.values():
            del one["best"]
    rows = [["scorer", "top-1, held out", "top-3", "top-1, unseen sources", "top-3", "threshold", "us a request",
             "99 %"]]
    for scorer, own in found.items():
        rows.append([scorer, *(f"{own[part][top]:.1%}" for part in ("held_out", "unseen") for top in ("top1", "top3")),
                     f"{thresholds[scorer]:.2f}", *(f"{us:,.0f}" for us in speed[scorer])])
    single = 1 / len(names)
    rows += [["best single member", f"{single:.1%}", "-", f"{single:.1%}", "-", "-", "-", "-"],
             ["oracle", "100.0%", "100.0%", "100.0%", "100.0%", "-", "-", "-"]]
    by_name = [["name", *(f"{scorer}, {part}" for scorer in found for part in ("held out", "unseen")), "unseen source"],
               *([name, *(f"{own[part]['by_name'].get(name, 0):.1%}" for own in found.values()
                          for part in ("held_out", "unseen")), UNSEEN[name][0]] for name in names)]
    text = ["# Who serves a request", "",
            f"{len(held_out):,} held-out records and {len(unseen):,} of whole sources that training never saw, of "
            f"{len(names)} names with {sum(map(len, train.values())):,} samples; means over the names. "
            f"{machine(args.threads)['cpu']}, numpy {versions('numpy')['numpy']}; times of texts of "
            f"{len(longest[0]):,} to {len(longest[-1]):,} characters. The distilled router has {size:,} bytes and "
            f"chooses as the classifier on {same['held_out']:.1%} of the held-out records and "
            f"{same['unseen']:.1%} of the unseen.",
            "", table(rows), "", table(by_name)]
    for scorer, own in found.items():
        for part in ("held_out", "unseen"):
            curve = [["threshold", *(f"{t:.2f}" for t, _, _ in own[part]["curve"])],
                     ["answered", *(f"{answered:.1%}" for _, answered, _ in own[part]["curve"])],
                     ["right of these", *("-" if right is None else f"{right:.1%}"
                                          for _, _, right in own[part]["curve"])]]
            short = [name.removesuffix("_expert") for name in names]
            confusion = [["true \\ chosen", *short], *([name, *map(str, row)] for name, row in
                                                      zip(short, own[part]["confusion"], strict=True))]
            text += ["", f"{scorer}, {part.replace('_', ' ')}", "", table(curve), "", table(confusion)]
    if args.members:
        large = many(train, args.members, 300, args.rounds)
        text += ["", "A member a text; it knows the first half and is asked with the second:", "", table(
            [["scorer", "top-1", "top-3", "us a request", "99 %", "built in"], *large])]
    gates = None
    if args.model:
        gates, cost = by_gates(args.model, members, scorers, (held_out, unseen), args.gate_records)
        text += ["", f"With the gates of {args.model}, on {args.gate_records} requests of each name ({cost}):", "",
                 table([["scorer", "top-1, held out", "top-1, unseen sources"], *gates])]
    failed = []
    for scorer, (top, beyond, us) in REQUIRED.items():
        own = found[scorer]
        reached = (own["held_out"]["top1"] >= top, own["unseen"]["top1"] >= beyond, speed[scorer][0] < us)
        failed += [f"{scorer}: {what}" for what, ok in zip((f"{top:.0%} of held-out records", f"{beyond:.0%} of unseen "
                   "sources", f"{us:,} us"), reached, strict=True) if not ok]
    text += ["", "All that is required is met." if not failed else f"Not met: {'; '.join(failed)}."]
    write_result("routing", "\n".join(text), {
        "machine": machine(args.threads), "found": found, "speed_us": speed, "built_s": built, "distilled_bytes": size,
        "distilled_same": same, "gates": gates}, keep=not kind and args.samples >= SAMPLES and args.records >= RECORDS)


if __name__ == "__main__":
    main()
