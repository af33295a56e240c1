"""Measured names: which experts does the text of a domain visit, and is that more than chance?

    1. sample     a bounded random sample of windows of each name's documents (sample.py)
    2. route      through the model's layers; visits and weights of every expert, by document
    3. select     documents fall into two random halves; the first one's scores select the experts (selection.py)
    4. judge      the second half, which the selection has not seen, gives coverage beside what chance would give, and
                  a test over documents; what does not pass is refused, with its figures (evidence.py)

docs/experts.md has the definitions and says why the test is this one.

Shape letters: U units (documents, or bundles of them), L layers, E experts, K experts a token, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from ..config import ModelConfig
from ..data import Document
from ..errors import ConfigError, DataError
from ..model import CausalLM
from ..model.gate import rule
from ..tokenizer import Tokenizer
from .atlas import Atlas, Measurement, NamedGroup, Refusal, Shape, jaccard
from .evidence import (
    LEVEL,
    Routed,
    coverage,
    holm,
    members,
    random_experts_p,
    rank_correlation,
    select,
    shuffled_p,
    unit_coverage,
)
from .sample import Sample, draw, route, window_length
from .selection import THRESHOLDS, Score

UNITS = 64  # documents are dealt into so many bundles at most
LEAST_UNITS = 8
SPLITS = 10  # random halvings for stability

Progress = Callable[[int, int], None]


def profile(
    model: CausalLM, tokenizer: Tokenizer, data: Mapping[str, Iterable[Document]], *, score: Score = "token",
    threshold: float | None = None, seq_len: int | None = None, tokens: int = 1 << 16, seed: int = 0,
    progress: Progress | None = None
) -> Atlas:
    """An atlas of the names in `data`, measured on the model that is given, whatever its format.

    data: {name: documents}. score, threshold: ESFT's token scores (0.2) or gate scores (0.1). tokens: to sample for
    each name, in windows of at most seq_len (512, or what the model takes if that is less). progress: called with
    (tokens done, tokens in all).
    Names that are no better than chance are in `refused`, with the reason. Raises ConfigError for an impossible setting
    or a model without routed experts, DataError, naming the name, where there is too little text.
    """
    config = model.config
    if score not in THRESHOLDS:
        raise ConfigError(f"score = {score!r}: must be token or gate")
    threshold = THRESHOLDS[score] if threshold is None else threshold
    if isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise ConfigError(f"threshold = {threshold!r}: must lie above 0 and be at most 1")
    seq_len = window_length(config, seq_len)
    if not config.moe_layers:
        raise ConfigError("the model has no routed experts to name")
    if not data:
        raise ConfigError("data: at least one name must be given")
    samples = {name: draw(name, documents, tokenizer, seq_len=seq_len, tokens=tokens, seed=seed)
               for name, documents in data.items()}
    for name, sample in samples.items():
        if sample.units < LEAST_UNITS:
            raise DataError(f"{name}: too little text: {sample.units} windows of at most {seq_len} tokens from "
                            f"{sample.documents} documents, must be at least {LEAST_UNITS} (more text, or a smaller "
                            "seq_len)")
    total = sum(sample.tokens for sample in samples.values())
    done = 0

    def advance(counted: int) -> None:
        nonlocal done
        done += counted
        if progress is not None:
            progress(done, total)

    routed = {name: _measure(model, sample, tokenizer, advance) for name, sample in samples.items()}
    measured = {name: Measurement(score, threshold, sample.tokens, sample.files,
                                  tuple(other for other in samples if other != name), seq_len, seed)
                for name, sample in samples.items()}
    return judge(config, routed, measured, {name: sample.documents for name, sample in samples.items()})


def _measure(model: CausalLM, sample: Sample, tokenizer: Tokenizer, advance: Callable[[int], None]) -> Routed:
    """Visits and weights of every expert, by unit; units beyond UNITS share places."""
    config = model.config
    units = min(sample.units, UNITS)
    shape = (units, len(config.moe_layers), config.n_routed_experts)
    tokens_U, slots_ULE, weight_ULE = np.zeros(units), np.zeros(shape), np.zeros(shape)
    scale = gate_scale(config)
    for batch in route(model, sample.windows, tokenizer):
        counted_BT = batch.counted_BT
        unit_B = np.array([sample.windows[i].unit % units for i in batch.windows])
        unit_N = np.repeat(unit_B, counted_BT.sum(1).numpy())
        np.add.at(tokens_U, unit_N, 1)
        counted_T = counted_BT.flatten().to(model.device)
        for row, layer in enumerate(config.moe_layers):
            found = batch.routing.routes[layer]
            index_NK = found.index_TK[counted_T].cpu().numpy()
            weight_NK = found.weight_TK[counted_T].double().cpu().numpy() / scale
            place = (unit_N[:, None] * config.n_routed_experts + index_NK).ravel()
            for amount_ULE, values in ((slots_ULE, None), (weight_ULE, weight_NK.ravel())):
                summed = np.bincount(place, values, units * config.n_routed_experts)
                amount_ULE[:, row] += summed.reshape(units, config.n_routed_experts)
        advance(len(unit_N))
    return Routed(tokens_U, slots_ULE, weight_ULE)


def gate_scale(config: ModelConfig) -> float:
    """What the gate multiplied its weights by."""
    *_, normalise, scale_anyway, scale = rule(config)
    return scale if scale_anyway or not normalise else 1.0


def judge(config: ModelConfig, routed: Mapping[str, Routed], measured: Mapping[str, Measurement],
          documents: Mapping[str, int]) -> Atlas:
    """Select, hold against the held-out half, and sort into groups and refusals."""
    layers, experts = config.moe_layers, config.n_routed_experts
    halves: dict[str, tuple[Routed, Routed]] = {}
    for place, (name, units) in enumerate(routed.items()):
        order_U = np.random.default_rng([measured[name].seed, place]).permutation(len(units.tokens_U))
        middle = len(order_U) // 2
        halves[name] = units.part(order_U[:middle]), units.part(order_U[middle:])
    names, held = list(halves), [second for _, second in halves.values()]
    candidates: list[NamedGroup] = []
    for own, name in enumerate(names):
        how = measured[name]
        chosen, scores = select(halves[name][0].scores(how.score), layers, how.threshold)
        mask_LE = members(chosen, layers, experts)
        evidence: dict[str, float] = {"experts": len(chosen), "tokens": how.tokens, "documents": documents[name]}
        for kind in ("slots", "weight"):
            found = [coverage(getattr(part, f"{kind}_ULE"), part.tokens_U, mask_LE) for part in held]
            evidence[f"coverage_{kind}"] = found[own]
            if len(found) > 1:
                evidence[f"coverage_{kind}_others"] = float(np.mean(found[:own] + found[own + 1 :]))
        evidence["coverage_uniform"] = float(mask_LE.mean())
        evidence["p"] = _p(held, own, mask_LE, how)
        evidence |= _stability(routed[name], layers, how)
        candidates.append(NamedGroup(name, "measured", chosen, scores, evidence, how))
    groups, refused = [], []
    for group, adjusted in zip(candidates, holm([group.evidence["p"] for group in candidates]), strict=True):
        found_all = {**group.evidence, "p_adjusted": adjusted}
        if adjusted < LEVEL:
            groups.append(replace(group, evidence=found_all))
        else:
            reason = _reason(found_all, measured[group.name].score)
            refused.append(Refusal(group.name, reason, found_all, group.measured))
    return Atlas(Shape.of(config), groups, refused)


def _p(held: list[Routed], own: int, mask_LE: np.ndarray, how: Measurement) -> float:
    amounts = [part.weight_ULE if how.score == "gate" else part.slots_ULE for part in held]
    if len(held) == 1:
        amount_LE = amounts[0].sum(0)
        return random_experts_p(amount_LE / amount_LE.sum(1, keepdims=True), mask_LE, how.seed)
    return shuffled_p(np.concatenate([unit_coverage(amount, mask_LE) for amount in amounts]),
                      np.concatenate([part.tokens_U for part in held]), [len(part.tokens_U) for part in held], own,
                      how.seed)


def _stability(units: Routed, layers: tuple[int, ...], how: Measurement) -> dict[str, float]:
    """Agreement of the selections, and of the scores' ranks, between random halves; means over SPLITS halvings."""
    overlaps, correlations = [], []
    generator = np.random.default_rng(how.seed)
    for _ in range(SPLITS):
        order_U = generator.permutation(len(units.tokens_U))
        a_LE, b_LE = (units.part(half).scores(how.score) for half in np.array_split(order_U, 2))
        (a, _), (b, _) = (select(scores_LE, layers, how.threshold) for scores_LE in (a_LE, b_LE))
        overlaps.append(jaccard(a, b))
        correlations.append(np.mean([rank_correlation(x, y) for x, y in zip(a_LE, b_LE, strict=True)]))
    return {"stability_jaccard": float(np.mean(overlaps)), "stability_rank": float(np.mean(correlations))}


def _reason(evidence: Mapping[str, float], score: str) -> str:
    kind, of = ("weight", "gate weight") if score == "gate" else ("slots", "routed slots")
    others = evidence.get(f"coverage_{kind}_others")
    beside = "" if others is None else f", {others:.1%} of the other names'"
    return (f"no better than chance: its {evidence['experts']} experts carry {evidence[f'coverage_{kind}']:.1%} of the "
            f"{of} of its own held-out text{beside}, and {evidence['coverage_uniform']:.1%} if routing were even "
            f"(p = {evidence['p_adjusted']:.3f}, must be below {LEVEL})")
