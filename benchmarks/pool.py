"""A pool of adapters on `mini`: what routing gains on a mixed stream, and what mixtures cost in a batch.

    loss    held-out records of law, code and medicine, for each of which there is an adapter, and of text, mathematics
            and conversation, for which there is none: nats a token of the answer under the base, each adapter for
            everything, their equal mixture, the pool's decision by keywords and by the classifier (made from the prompt
            alone, with training records as samples), a choice of each token in each matrix (Arrow), the adapter of the
            record's own name, and the best of base and adapters in hindsight
    speed   8 requests of 64 + 64 tokens at once with 8 different mixtures against 8 with one, on INT8, NF4 and BF16, of
            three adapters and of eight in pairs; the adapters are random, of the same shape, which costs the same time

    python benchmarks/pool.py --records FOLDER --work FOLDER [--only loss|speed] [--rounds 5] [--asked 16]

RECORDS is the folder `records` that recipes/mini/build.py leaves: train/NAME.jsonl and held_out/NAME.jsonl. Adapters
that are not in WORK are trained first, which goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepseek import LLM, ExpertPool, LoRAAdapter, MoEFineTuner
from deepseek.checkpoint import load_model, resolve
from deepseek.checkpoint.ready import with_bits
from deepseek.engine.request import AdapterChoice
from deepseek.engine.routing import apply
from deepseek.engine.scoring import score
from deepseek.errors import DataError
from deepseek.files import read_json, read_yaml, sha256, to_json, write_json
from deepseek.model.adapter import lora_modules
from deepseek.model.adapters import names_in
from deepseek.progress import ProgressBar
from deepseek.route import PoolMember
from harness import alternate, arguments, machine, ratio, table, versions, write_result

ADAPTED, OTHERS = ("law", "code", "medical"), ("text", "math", "dialogue")
SHAPE: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "o_proj", "kv_a_proj_with_mqa"]}
TRAINING: dict[str, Any] = {"lr": 1e-3, "batch_size": 4, "max_length": 256, "overlong": "cut", "eval_records": 12,
                            "general_records": 2, "save_every": 8}
STEPS = 60
CONTEXT, ANSWER = 256, 160  # tokens of a record at most
SAMPLES = 600  # of a member at most
REQUESTS, PROMPT, NEW = 8, 64, 64


class Asked(NamedTuple):
    """A held-out record. prompt: what decides; context, answer: token ids."""

    name: str
    prompt: str
    context: Sequence[int]
    answer: Sequence[int]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(llm: LLM, records: Path, name: str, count: int) -> list[Asked]:
    """Held-out records of a name that are not too long, in an order of chance."""
    assert llm.tokenizer is not None
    found, every = list[Asked](), lines(records / "held_out" / f"{name}_expert.jsonl")
    random.Random(name).shuffle(every)
    for record in every:
        if (turns := record.get("messages")) is not None:
            prompt, context = turns[-2]["content"], llm.encode(turns[:-1])
            answer = llm.tokenizer.encode(turns[-1]["content"])
        else:
            ids = llm.encode(record["text"])
            context, answer = ids[: len(ids) // 3], ids[len(ids) // 3 :]
            prompt = llm.tokenizer.decode(context)
        if answer and len(context) <= CONTEXT:
            found.append(Asked(name, prompt, context, answer[:ANSWER]))
    return found[:count]


class Losses:
    """Nats of each record's answer under adapters. What was asked before is in `file` and not run again."""

    def __init__(self, llm: LLM, stream: Sequence[Asked], folders: Mapping[str, Path], file: Path) -> None:
        self.llm, self.stream, self.file = llm, stream, file
        self.made = {name: sha256(folder / "manifest.json") for name, folder in folders.items()}
        self.known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def key(self, one: Asked, choice: AdapterChoice | None) -> str:
        names = [] if choice is None else names_in(self.llm.find_adapter(choice))
        made = [self.made[name] for name in names]
        return hashlib.sha256(to_json([one.context, one.answer, choice, made], sort_keys=True).encode()).hexdigest()

    def __call__(self, title: str, choices: Sequence[AdapterChoice | None]) -> list[float]:
        keys = [self.key(one, choice) for one, choice in zip(self.stream, choices, strict=True)]
        todo: dict[str, list[int]] = {}
        for i, choice in enumerate(choices):
            if keys[i] not in self.known:
                todo.setdefault(str(choice), []).append(i)
        for places in todo.values():
            pairs = [(self.stream[i].context, self.stream[i].answer) for i in places]
            with ProgressBar(total=len(places), desc=title, unit="record") as bar:
                scores = score(self.llm, pairs, adapter=choices[places[0]], on_score=lambda *_, bar=bar: bar.update())
            self.known.update({keys[i]: -one.logprob for i, one in zip(places, scores, strict=True)})
            write_json(self.file, self.known)
        return [self.known[key] for key in keys]


def sample(record: Mapping[str, Any]) -> str:
    return record.get("text") or "\n".join(turn["content"] for turn in record["messages"])


def adapters(model: Path, records: Path, work: Path, steps: int) -> dict[str, Path]:
    """The folders of the trained adapters."""
    found = {}
    for name in ADAPTED:
        found[name] = work / name / "adapter"
        if not found[name].is_dir():
            tuner = MoEFineTuner(model, adapter=LoRAAdapter(**SHAPE), out=work / name, steps=steps, **TRAINING,
                                 retain_data=records / "held_out" / "text_expert.jsonl")
            tuner.fit(records / "train" / f"{name}_expert.jsonl")
    return found


def loss(args: Any) -> None:
    model = resolve("mini")
    folders = adapters(model, args.records, args.work, args.steps)
    llm = LLM(model, adapters=folders)
    about = {one["name"]: one for one in read_yaml(Path(__file__).with_name("routing.yaml"))["members"]}
    members = []
    for name in ADAPTED:
        train = lines(args.records / "train" / f"{name}_expert.jsonl")
        random.Random(name).shuffle(train)
        members.append(PoolMember(name, about[f"{name}_expert"]["domain"], kind="adapter", path=folders[name],
                                  keywords=about[f"{name}_expert"]["keywords"],
                                  samples=[sample(record) for record in train[:SAMPLES]]))
    stream = [one for name in (*ADAPTED, *OTHERS) for one in asked(
        llm, args.records, name, args.asked if name in ADAPTED else args.asked // len(OTHERS))]
    losses = Losses(llm, stream, folders, args.work / "scores.json")
    names = [one.name for one in stream]
    equal = dict.fromkeys(ADAPTED, 1 / len(ADAPTED))
    found = {"base": losses("base", [None] * len(stream))}
    found |= {name: losses(name, [name] * len(stream)) for name in ADAPTED}
    found["equal mixture"] = losses("equal mixture", [equal] * len(stream))
    decided: dict[str, list[str]] = {}
    for scorer in ("keywords", "classifier"):
        pool = ExpertPool(members, scorer)
        choices = [apply(llm, one.prompt, pool.route(one.prompt)).adapter for one in stream]
        decided[scorer] = ["base" if choice is None else str(choice) for choice in choices]
        found[f"routed, {scorer}"] = losses(f"routed, {scorer}", choices)
    for top in (1, 2):
        own = {"arrow": [*ADAPTED], "top": top}
        found[f"tokens choose {top}"] = losses(f"tokens choose {top}", [own] * len(stream))
    found["adapter of its name"] = losses("own", [name if name in ADAPTED else None for name in names])
    single = ("base", *ADAPTED)
    found["best in hindsight"] = [min(found[name][i] for name in single) for i in range(len(stream))]
    tokens = [len(one.answer) for one in stream]

    def mean(own: Sequence[float], wanted: Callable[[str], bool] = lambda name: True) -> float:
        places = [i for i, name in enumerate(names) if wanted(name)]
        return sum(own[i] for i in places) / sum(tokens[i] for i in places)

    means = {title: {"all": mean(nats), **{name: mean(nats, name.__eq__) for name in ADAPTED},
                     "others": mean(nats, lambda name: name in OTHERS)} for title, nats in found.items()}
    columns = ["all", *ADAPTED, "others"]
    rows = [["nats a token", *columns], *([title, *(f"{nats[column]:.4f}" for column in columns)]
                                          for title, nats in means.items())]
    oracle, verdicts = means["best in hindsight"]["all"], []
    for scorer in decided:
        routed = means[f"routed, {scorer}"]["all"]
        below = all(routed < means[name]["all"] for name in single)
        abstained = sum(d == "base" for d, name in zip(decided[scorer], names, strict=True) if name in OTHERS)
        verdicts.append(f"{scorer}: {'below' if below else 'NOT below'} the base and every single adapter, "
                        f"{routed / oracle - 1:+.2%} from the best in hindsight; of the records without an adapter the "
                        f"base answers {abstained} of {sum(name in OTHERS for name in names)}")
    trained = ", ".join(str(read_json(args.work / name / "report.json", DataError)["steps"]) for name in ADAPTED)
    text = ["# A pool of adapters on mini: loss", "",
            f"{len(stream)} held-out records, {sum(tokens):,} tokens of answers; LoRA of rank {SHAPE['r']} on "
            f"{', '.join(SHAPE['target_modules'])}, trained for {trained} steps of {TRAINING['batch_size']} records. "
            f"{machine(args.threads)['cpu']}, torch {versions('torch')['torch']}.", "", table(rows), "",
            *(f"- {verdict}." for verdict in verdicts)]
    write_result("pool-loss", "\n".join(text), {"machine": machine(args.threads), "means": means, "decided": decided,
                                                "names": names, "tokens": tokens, "nats": found})


@torch.no_grad()
def random_adapters(model: Path, work: Path, count: int) -> dict[str, Path]:
    """Adapters of SHAPE with random matrices."""
    found = {f"a{i}": work / f"a{i}" for i in range(count)}
    for i, folder in enumerate(found.values()):
        if not folder.is_dir():
            base, generator = load_model(model), torch.Generator().manual_seed(i)
            side = LoRAAdapter(**SHAPE).attach(base)
            for _, module in lora_modules(base):
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(0.0, 0.01, generator=generator)
            LoRAAdapter.save(base, side, folder, str(model))
    return found


def mixtures(kind: str) -> list[AdapterChoice | None]:
    """Of each of the requests."""
    three = [{f"a{i}": round(0.2 + 0.1 * ((i * n + n) % 7), 2) for i in range(3)} for n in range(1, REQUESTS + 1)]
    pairs = [{f"a{n}": 0.6, f"a{(n + 1) % REQUESTS}": 0.4} for n in range(REQUESTS)]
    every: dict[str, list[AdapterChoice | None]] = {
        "no adapter": [None] * REQUESTS, "three adapters, one mixture": [three[0]] * REQUESTS,
        "three adapters, 8 mixtures": [*three], "eight in pairs, one mixture": [pairs[0]] * REQUESTS,
        "eight in pairs, 8 mixtures": [*pairs]}
    return every[kind]


def build(model: Path, folders: Mapping[str, Path], kind: str, threads: int) -> Callable[[], object]:
    llm, draw = LLM(model, adapters=folders, prefix_cache=False), random.Random(0)
    prompts = [[draw.randrange(100, 40_000) for _ in range(PROMPT)] for _ in range(REQUESTS)]
    return partial(llm.generate, prompts, adapter=mixtures(kind), max_tokens=NEW, temperature=0.0, ignore_eos=True)


def speed(args: Any) -> None:
    rows = [["8 requests at once, tokens/s", "no adapter", "one mixture", "8 mixtures", "8 against 1"]]
    data: dict[str, Any] = {}
    for title, bits in (("INT8", 8), ("NF4", 4), ("BF16", 16)):
        model = resolve(with_bits("mini", bits))
        folders = random_adapters(model, args.work / f"random-{title.lower()}", REQUESTS)
        for group in ("three adapters", "eight in pairs"):
            kinds = ["no adapter", f"{group}, one mixture", f"{group}, 8 mixtures"]
            took, stolen = alternate(partial(build, model, folders), kinds, args.threads, args.rounds, warmup=1)
            share = ratio(took[kinds[1]], took[kinds[2]])
            data[f"{title}, {group}"] = {"seconds": took, "stolen": stolen, "share": share}
            rates = [f"{REQUESTS * (PROMPT + NEW) / sorted(took[kind])[len(took[kind]) // 2]:.0f}" for kind in kinds]
            rows.append([f"{title}, {group}", *rates, f"{share:.1%}"])
    short = [name for name, one in data.items() if one["share"] < 0.8]
    text = ["# A pool of adapters on mini: mixtures in one batch", "",
            f"{REQUESTS} requests of {PROMPT} + {NEW} tokens, random LoRA of rank {SHAPE['r']}; medians of "
            f"{args.rounds} rounds, shares of pairs. "
            f"{machine(args.threads)['cpu']}, {args.threads} threads, torch {versions('torch')['torch']}.", "",
            table(rows), "", f"Asked for are 80 %: {'met' if not short else 'not met by ' + '; '.join(short)}."]
    write_result("pool-speed", "\n".join(text), {"machine": machine(args.threads), "found": data})


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--records", type=Path, help="folder of records that recipes/mini/build.py leaves")
    parser.add_argument("--work", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--only", choices=("loss", "speed"))
    parser.add_argument("--asked", type=int, default=16, help="records of a name; of text without an adapter in all")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only != "speed":
        if args.records is None:
            parser.error("--records: the loss needs records")
        loss(args)
    if args.only != "loss":
        speed(args)


if __name__ == "__main__":
    main()
