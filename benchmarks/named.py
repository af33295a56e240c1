"""Names built in by training: does the text of a domain go to the experts of its name, and what does that cost?

Two runs of the preset `small` (11 M parameters, 8 routing groups) on the same tokens of eight domains, in one order:
guided, where every domain's text is drawn to the group that bears its name, and unguided, V3's own balancing over all
experts. About an hour each on two cores; a run that was stopped goes on where it was. Then, without labels:

    routing accuracy   tokens after the first 32 of a document (or window); gate weights summed over all MoE layers; the
                       strongest group against the label; macro average over domains
    held out           records of the training sources that training has not seen (3 %, by hash)
    unseen source      a whole source per domain that training has not seen (benchmarks/domains.py)
    perplexity         of both runs on the held-out records
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from deepseek.atlas import Atlas, RoutingAccuracy
from deepseek.atlas.plot import save_png
from deepseek.checkpoint import load_model
from deepseek.cli import main as deepseek
from deepseek.data import Document, ReadReport, TokenShards, read_documents
from deepseek.data.shards import encode_documents
from deepseek.model import CausalLM, RoutingRecord
from deepseek.ops.loss import IGNORE
from deepseek.tokenizer import Tokenizer
from domains import TRAIN, UNSEEN, add_data, data_folder, places
from harness import arguments, machine, table, versions, write_result

RUNS = {"guided": [], "unguided": ["--guide_weight", "0"]}
BATCH, SEQ = 16, 256
UNSEEN_TOKENS = 40_000  # of a source, from its records evenly spread


def train(name: str, work: Path, data: Path, steps: int, threads: int) -> Path:
    """The folder of a finished run; both share tokenizer and token shards."""
    out = work / name
    named = [f"{expert}={place}" for expert, files in TRAIN.items() for place in places(data, files)]
    for part in ("tokens", "tokenizer"):
        if name != "guided" and not (out / part).exists():
            out.mkdir(parents=True, exist_ok=True)
            (out / part).symlink_to((work / "guided" / part).resolve())
    if deepseek(["train", "small", "--experts", *named, "--out", str(out), "--steps", str(steps), "--batch_size",
                 str(BATCH), "--seq_len", str(SEQ), "--lr", "3e-3", "--warmup_steps", "100", "--eval_every", "410",
                 "--save_every", "205", "--eval_batches", "24", "--precision", "fp32", "--valid_fraction", "0.03",
                 "--threads", str(threads), *RUNS[name]]):
        raise SystemExit(2)
    return out


@torch.no_grad()
def held_out(model: CausalLM, shards: TokenShards) -> tuple[float, RoutingAccuracy]:
    """(loss per token, routing) over every held-out window."""
    accuracy, total, count = RoutingAccuracy(model.config, shards.experts), 0.0, 0
    for batch in shards.valid_batches(BATCH, SEQ):
        routing = RoutingRecord()
        n = int((batch.labels_BT != IGNORE).sum())
        total += model.loss(batch.ids_BT, batch.labels_BT, routing=routing).main.item() * n
        count += n
        accuracy.add(routing, batch.expert_BT, batch.ids_BT)
    return total / count, accuracy


def windows(documents: list[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """Windows evenly spread over a source, UNSEEN_TOKENS in all at most; encoded as training encodes documents."""
    pieces = [ids[start : start + SEQ] for _, ids in encode_documents(documents, tokenizer)
              for start in range(0, len(ids), SEQ)]
    pieces = [piece for piece in pieces if len(piece) > 40]
    kept = max(1, min(len(pieces), UNSEEN_TOKENS * len(pieces) // sum(map(len, pieces))))
    return [pieces[i * len(pieces) // kept] for i in range(kept)]


@torch.no_grad()
def unseen(model: CausalLM, tokenizer: Tokenizer, names: tuple[str, ...], data: Path) -> RoutingAccuracy:
    accuracy = RoutingAccuracy(model.config, names)
    for expert, (_, files) in UNSEEN.items():
        documents = list(read_documents(places(data, files), ReadReport()))
        pieces = windows(documents, tokenizer)
        for i in range(0, len(pieces), BATCH):
            rows = pieces[i : i + BATCH]
            longest = max(map(len, rows))
            ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            expert_BT = torch.tensor([[names.index(expert)] * len(row) + [-1] * (longest - len(row)) for row in rows])
            routing = RoutingRecord()
            model.hidden(ids_BT, routing=routing)  # padding stands behind, where nothing looks
            accuracy.add(routing, expert_BT, ids_BT)
    return accuracy


def picture(path: Path, names: tuple[str, ...], shares: dict[str, Tensor]) -> None:
    """shares: title -> [N, N], of the tokens of each name's text those whose strongest group is each name's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), dpi=110, layout="constrained")
    short = [name.removesuffix("_expert") for name in names]
    for axis, (title, share_NN) in zip(figure.subplots(1, len(shares), sharey=True), shares.items(), strict=True):
        axis.imshow(share_NN.numpy(), cmap="Blues", vmin=0, vmax=1)
        for i, row in enumerate(share_NN.tolist()):
            for j, value in enumerate(row):
                if value >= 0.01:
                    axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                              color="white" if value > 0.55 else "black")
        axis.set_xticks(range(len(names)), short, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), short)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens that go mostly to the experts named …, %")
    figure.axes[0].set_ylabel("text of")
    save_png(figure, path)


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    add_data(parser)
    parser.add_argument("--work", type=Path, help="folder of the two runs (default: runs/named)")
    parser.add_argument("--steps", type=int, help="of 4,096 tokens (default: 3,690; 30 on a generated sample)")
    parser.add_argument("--picture", type=Path, help="PNG to draw (default: routing.png in the folder of the runs)")
    args = parser.parse_args()
    args.data, sample = data_folder(args.data)
    args.work = args.work or Path(f"runs/named{sample}")
    args.steps = args.steps or (30 if sample else 3690)
    torch.set_num_threads(args.threads)
    folders = {name: train(name, args.work, args.data, args.steps, args.threads) for name in RUNS}
    shards = TokenShards.open(args.work / "guided" / "tokens")
    tokenizer = Tokenizer.load(args.work / "guided" / "tokenizer")
    models = {name: load_model(folder / "model") for name, folder in folders.items()}
    loss, within = {}, {}
    for name, model in models.items():
        loss[name], within[name] = held_out(model, shards)
        print(f"\n{name}: held-out perplexity {math.exp(loss[name]):.3f}\n{within[name].table()}", flush=True)
    beyond = unseen(models["guided"], tokenizer, shards.experts, args.data)
    print(f"\nunseen sources\n{beyond.table()}")
    atlas = Atlas.built_in(models["guided"].config, shards.experts, {
        name: {"routing_accuracy": found, "routing_accuracy_unseen": beyond.by_name()[name]}
        for name, found in within["guided"].by_name().items()})
    atlas.save(folders["guided"] / "model")
    across, inside = within["guided"].max_vio()
    twin_across, twin_inside = within["unguided"].max_vio()
    shares = {title: found.confusion_NG[:, : len(shards.experts)] / found.confusion_NG.sum(1, keepdim=True)
              for title, found in (("held-out records", within["guided"]), ("sources that training never saw", beyond))}
    picture(args.picture or args.work / "routing.png", shards.experts, shares)
    rows = [["name", "held-out records", "whole unseen source", "which"],
            *([name, f"{within['guided'].by_name()[name]:.1%}", f"{beyond.by_name()[name]:.1%}", UNSEEN[name][0]]
              for name in shards.experts),
            ["macro average", f"{within['guided'].macro():.1%}", f"{beyond.macro():.1%}", "chance 12.5 %"]]
    perplexity = {name: math.exp(value) for name, value in loss.items()}
    config = models["guided"].config
    where = machine(args.threads)
    total = sum(p.numel() for p in models["guided"].parameters())
    text = ["# Names built in by training", "",
            f"Preset small ({total / 1e6:.1f} M parameters, {config.n_routed_experts} experts in {config.n_group} "
            f"groups, {config.num_experts_per_tok} a token), {args.steps} steps of {BATCH} x {SEQ} tokens = "
            f"{args.steps * BATCH * SEQ / 1e6:.1f} M; {where['cpu']}, {args.threads} threads, "
            f"torch {versions('torch')['torch']}.", "", "Routing accuracy, guided run:", "", table(rows), "",
            f"Held-out perplexity: guided {perplexity['guided']:.3f}, unguided twin {perplexity['unguided']:.3f}, "
            f"ratio {perplexity['guided'] / perplexity['unguided']:.4f}.", "",
            f"MaxVio, guided: {across:.2f} across groups (which follow the domains' shares), {inside:.2f} within; "
            f"unguided twin: {twin_across:.2f} and {twin_inside:.2f}.", "",
            "```", within["guided"].table(), "", "unseen sources", beyond.table(), "```"]
    write_result("named", "\n".join(text), {
        "machine": where, "perplexity": perplexity, "held_out": within["guided"].by_name(), "unseen": beyond.by_name(),
        "macro": {"held_out": within["guided"].macro(), "unseen": beyond.macro()},
        "max_vio": {"guided": (across, inside), "unguided": (twin_across, twin_inside)}},
        keep=not sample)


if __name__ == "__main__":
    main()
