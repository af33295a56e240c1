"""Measured names: which experts does the text of a domain visit, and is that more than chance?

    1. sample     a bounded random sample of windows of each name's documents (sample.py)
    2. route      through the model's layers; visits and weights of every expert, by document
    3. select     documents fall into two random halves; the first one's scores select the experts (selection.py)
    4. judge      the second half, which the selection has not seen, gives coverage beside what chance would give, and
                  a test over documents; what does not pass is refused, with its figures (evidence.py)

A name that training built in has its experts already: nothing is selected, both halves judge, and it stays whatever
they say.

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
from ..model.gate import routing_rule
from ..tokenizer import Tokenizer
from .atlas import MEASURED, Atlas, Measurement, NamedGroup, RejectedGroup, Shape, count, jaccard
from .evidence import (
    LEVEL,
    Routed,
    coverage,
    holm,
    lift_needed,
    members,
    random_experts_p,
    rank_correlation,
    select,
    share_as_large,
    shuffled_lifts,
    unit_coverage,
)
from .sample import LEAST_DOCUMENTS, Sample, draw, route, window_length
from .selection import THRESHOLDS, Score

UNITS = 64  # documents are dealt into so many bundles at most
LEAST_UNITS = 8
SPLITS = 10  # random halvings for stability
AGAIN = 0.5  # evidence is too little where a lead of half of what other text, or even routing, gives could be chance

Progress = Callable[[int, int], None]


def profile(
    model: CausalLM, tokenizer: Tokenizer, data: Mapping[str, Iterable[Document]], *, score: Score = "token",
    threshold: float | None = None, seq_len: int | None = None, tokens: int = 1 << 16, seed: int = 0,
    progress: Progress | None = None, atlas: Atlas | None = None,
) -> Atlas:
    """An atlas of the names in `data`, measured on the model that is given, whatever its format.

    data: {name: documents}. score, threshold: ESFT's token scores (0.2) or gate scores (0.1). tokens: to sample for
    each name, in windows of at most seq_len (512, or what the model takes if that is less). progress: called with
    (tokens done, tokens in all). atlas: the model's so far; names that training built in keep its experts and get
    their evidence (`atlas.updated(…)` of the result holds all names).
    Names that are no better than chance, or of which there is too little evidence, are in `refused`, with the reason.
    Raises ConfigError for an impossible setting or a model without routed experts, DataError, naming the name, where
    there is too little text.
    """
    config = model.config
    if atlas is not None and atlas.shape != Shape.of(config):
        raise ConfigError(f"the atlas was made for another shape: {atlas.shape}; the model has {Shape.of(config)}")
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
            raise DataError(f"{name}: too little evidence ({count(sample.documents, 'document')}): too little text: "
                            f"{sample.units} windows of at most {seq_len} tokens, must be at least {LEAST_UNITS} (more "
                            "text, or a smaller seq_len)")
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
    return judge(config, routed, measured, {name: sample.documents for name, sample in samples.items()}, atlas)


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
    """Return the factor by which the gate multiplied its weights."""
    *_, normalise, scale_anyway, scale = routing_rule(config)
    return scale if scale_anyway or not normalise else 1.0


def judge(config: ModelConfig, routed: Mapping[str, Routed], measured: Mapping[str, Measurement],
          documents: Mapping[str, int], atlas: Atlas | None = None) -> Atlas:
    """Select experts, test them on the held-out half, and sort names into groups and rejected ones. atlas: has the
    built-in names."""
    layers, experts = config.moe_layers, config.n_routed_experts
    given = {group.name: group for group in atlas.groups if group.kind == "built-in"} if atlas is not None else {}
    halves: dict[str, tuple[Routed, Routed]] = {}
    for place, (name, units) in enumerate(routed.items()):
        order_U = np.random.default_rng([measured[name].seed, place]).permutation(len(units.tokens_U))
        middle = len(order_U) // 2
        halves[name] = units.part(order_U[:middle]), units.part(order_U[middle:])
    names, held, whole = list(halves), [second for _, second in halves.values()], list(routed.values())
    candidates: list[NamedGroup] = []
    for own, name in enumerate(names):
        how, known = measured[name], given.get(name)
        if known is None:
            parts = held
            chosen, scores = select(halves[name][0].scores(how.score), layers, how.threshold)
        else:  # no text had a part in the choice, so all of it may judge
            parts, chosen = whole, known.experts
            scores_LE = whole[own].scores(how.score)
            scores = tuple(float(scores_LE[layers.index(layer), index]) for layer, index in chosen)
        mask_LE = members(chosen, layers, experts)
        evidence: dict[str, float] = {"experts": len(chosen), "tokens": how.tokens, "documents": documents[name]}
        for kind in ("slots", "weight"):
            found = [coverage(getattr(part, f"{kind}_ULE"), part.tokens_U, mask_LE) for part in parts]
            evidence[f"coverage_{kind}"] = found[own]
            if len(found) > 1:
                evidence[f"coverage_{kind}_others"] = float(np.mean(found[:own] + found[own + 1 :]))
        evidence["coverage_uniform"] = float(mask_LE.mean())
        evidence |= _test(parts, own, mask_LE, how)
        stability = _stability(routed[name], layers, how)
        if known is not None:  # a selection that was not made cannot be stable
            del stability["stability_jaccard"]
            evidence = {key: value for key, value in known.evidence.items() if key not in MEASURED} | evidence
        candidates.append(NamedGroup(name, "built-in" if known else "measured", chosen, scores, evidence | stability,
                                     how))
    groups, refused = [], []
    for group, adjusted in zip(candidates, holm([group.evidence["p"] for group in candidates]), strict=True):
        group = replace(group, evidence={**group.evidence, "p_adjusted": adjusted})
        if adjusted < LEVEL or group.kind == "built-in":
            groups.append(group)
        else:
            refused.append(RejectedGroup(group.name, _reason(group), group.evidence, group.measured))
    return Atlas(Shape.of(config), groups, refused)


def _test(parts: list[Routed], own: int, mask_LE: np.ndarray, how: Measurement) -> dict[str, float]:
    """p, and the lift that would have passed (a single name has none)."""
    amounts = [part.weight_ULE if how.score == "gate" else part.slots_ULE for part in parts]
    if len(parts) == 1:
        amount_LE = amounts[0].sum(0)
        return {"p": random_experts_p(amount_LE / amount_LE.sum(1, keepdims=True), mask_LE, how.seed)}
    seen, drawn_P = shuffled_lifts(
        np.concatenate([unit_coverage(amount, mask_LE) for amount in amounts]),
        np.concatenate([part.tokens_U for part in parts]), [len(part.tokens_U) for part in parts], own, how.seed)
    return {"p": share_as_large(seen, drawn_P), "lift_needed": lift_needed(drawn_P, LEVEL / len(parts))}


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


def _reason(group: NamedGroup) -> str:
    """Why held-out text does not confirm a name: it goes elsewhere, or there is too little of it to say."""
    evidence, how = group.evidence, group.measured
    assert how is not None
    kind, of = ("weight", "gate weight") if how.score == "gate" else ("slots", "routed slots")
    others, even = evidence.get(f"coverage_{kind}_others"), evidence["coverage_uniform"]
    needed, documents = evidence.get("lift_needed", 0.0), int(evidence["documents"])
    rivals = "" if others is None else f", {others:.1%} of the other names'"
    figures = (f"its {evidence['experts']} experts carry {evidence[f'coverage_{kind}']:.1%} of the {of} of its own "
               f"held-out text{rivals}, and {even:.1%} if routing were even (p = {evidence['p_adjusted']:.3f}, must be "
               f"below {LEVEL})")
    if documents >= LEAST_DOCUMENTS and needed <= AGAIN * max(others or 0.0, even):
        return f"no better than chance: {figures}"
    lead = f"; a lead of {needed:.1%} would have been told from chance" if needed else ""
    return f"too little evidence ({count(documents, 'document')}): {figures}{lead}; more documents may settle it"


def verdict(name: str, reason: str) -> str:
    """Format a rejection as a sentence."""
    return f"{name} {'has' if reason.startswith('too little') else 'is'} {reason}"


def doubts(atlas: Atlas) -> list[str]:
    """Names that training built in, which therefore stay, and that held-out text does not confirm, a sentence each."""
    return [f"{verdict(group.name, _reason(group))}; it stays, since training built it in" for group in atlas.groups
            if group.kind == "built-in" and group.evidence.get("p_adjusted", 0.0) >= LEVEL]
