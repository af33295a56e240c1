"""The accounts as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..config import ARCHITECTURES
from .accounting import ModelInfo
from .fit import WORKING_SHARE, Fit, price_of_tokens
from .machine import Machine
from .units import in_bytes, in_count, in_speed, scaled


def to_json(
    info: ModelInfo, fits: Sequence[Fit] | None = None, machine: Machine | None = None,
    price_per_hour: float | None = None, tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """What `render` prints, as JSON values: plain numbers in parameters, FLOPs, bytes; null where nothing was asked."""
    config = info.config
    price = price_of_tokens(fits, price_per_hour, tokens_per_second)
    return {
        "name": info.name, "model_type": config.model_type,
        "layers": config.num_hidden_layers, "moe_layers": len(config.moe_layers),
        "routed_experts": config.n_routed_experts, "experts_per_token": config.num_experts_per_tok,
        "shared_experts": config.n_shared_experts, "context": info.context,
        "parameters": {
            "total": info.total, "active": info.active, "active_beyond_lookup": info.active_beyond_lookup,
            "active_share": info.active_share, "gate_bias_buffer": info.gate_bias,
            "parts": {_key(p.name): {"total": p.total, "active": p.active} for p in info.parts},
            "mtp": {"total": info.mtp.total, "active": info.mtp.active},
        },
        "flops_per_token": {"model": info.flops, "dense_twin": info.dense_flops, "saved_share": info.flops_saved},
        "decode_read_bytes": {"model": info.read, "dense_twin": info.dense_read},
        "latency_ratio_bound": info.latency_bound,
        "memory_bytes": {
            _key(m.format): {"weights": m.weights, "resident_if_streamed": m.resident, "read_per_token": m.read}
            for m in info.memory
        },
        "cache_bytes_per_token": {"mla": info.cache_per_token, "plain_attention": info.plain_cache_per_token},
        "machine": None if machine is None else asdict(
            machine, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}),
        "fits": None if fits is None else [asdict(f) | {"fits": f.fits} for f in fits],
        "cost": price,
    }


def render(
    info: ModelInfo, fits: Sequence[Fit] | None = None, machine: Machine | None = None,
    price_per_hour: float | None = None, tokens_per_second: float | None = None,
) -> str:
    """The accounts as a table for a terminal, at most 100 columns wide (a longer name keeps its length).

    A price needs a speed: `tokens_per_second`, or `fits`, whose fastest entry is taken. Raises RequestError without.
    """
    config = info.config
    price = price_of_tokens(fits, price_per_hour, tokens_per_second)
    shared = f" + {config.n_shared_experts} shared" if config.n_shared_experts else ""
    experts = (f"{len(config.moe_layers)} of them with {config.n_routed_experts} experts, "
               f"{config.num_experts_per_tok}{shared} a token")
    lines = [
        info.name or "model",
        f"  {ARCHITECTURES[config.model_type]}, {config.num_hidden_layers} layers, "
        + (experts if config.moe_layers else "all of them dense"),
        "",
        f"{'Parameters':<20}{'total':>12}{'active':>12}",
        *(f"  {p.name:<18}{in_count(p.total):>12}{in_count(p.active):>12}" for p in info.parts if p.total),
        f"  {'all':<18}{in_count(info.total):>12}{in_count(info.active):>12}   {info.active_share:.1%} active",
    ]
    if config.tie_word_embeddings:
        lines.append("  The embedding serves as the head, too, and counts once.")
    else:
        lookup = f"{in_count(info.active_beyond_lookup):>24}   a token reads one row of it"
        lines.append(f"  {'less the embedding':<18}{lookup}")
    if info.mtp.total:
        lines.append(f"  {'MTP (not in all)':<18}{in_count(info.mtp.total):>12}{in_count(info.mtp.active):>12}")
    lines += [
        "",
        f"{'Per token':<20}{'this model':>12}{'dense twin':>12}   with {info.context:,} positions in view",
        f"  {'FLOPs':<18}{scaled(info.flops, 1000, _FLOPS):>12}{scaled(info.dense_flops, 1000, _FLOPS):>12}"
        f"   {info.flops_saved:.1%} fewer",
        f"  {'read (BF16)':<18}{in_bytes(info.read):>12}{in_bytes(info.dense_read):>12}"
        f"   latency up to {info.latency_bound:.1f}x lower: the bound by bandwidth",
        "",
        f"{'Cache per token':<20}{'MLA':>12}{'plain':>12}   BF16",
        f"  {'all layers':<18}{in_bytes(info.cache_per_token):>12}{in_bytes(info.plain_cache_per_token):>12}"
        f"   {info.plain_cache_per_token / info.cache_per_token:.1f}x smaller",
        "",
        f"{'Memory':<20}{'weights':>12}{'of FP32':>12}{'   without MTP' if info.mtp.total else ''}",
        *(f"  {m.format:<18}{in_bytes(m.weights):>12}{m.weights / info.memory[0].weights:>12.1%}"
          f"{_RECIPES.get(m.format, '')}" for m in info.memory),
    ]
    if machine:
        lines += ["", *_machine_lines(machine)]
    if fits is not None:
        lines += ["", *_fit_lines(fits)]
    if price:
        least, source = {
            "given": ("", "as given"),
            "bound": ("at least ", f"the bound for {price['format']} here, one sequence at a time"),
            "estimate": ("about ", f"estimated for {price['format']} here, one sequence at a time"),
        }[price["basis"]]
        lines += ["", f"10^8 tokens cost {least}{price['per_1e8_tokens']:,.2f}",
                  f"  at {price_per_hour:,.2f} an hour and {in_speed(price['tokens_per_second'])} tokens/s, {source}"]
    elif price_per_hour is not None:
        lines += ["", "10^8 tokens: no format fits this machine, so there is no speed to price"]
    return "\n".join(lines)


_FLOPS = "FLOP kFLOP MFLOP GFLOP TFLOP"
_RECIPES = {
    "FP8": "   official blocks; embedding, head, gate, norms BF16",
    "NF4": "   blocks of 64; embedding int8, gate and norms BF16",
}


def _machine_lines(machine: Machine) -> list[str]:
    cores = f"{machine.cores_available} cores for this process, {machine.cores_physical} physical"
    return [
        f"Machine: {machine.cpu}"[:100],
        f"  {cores}" + (f"; {', '.join(machine.instructions)}" if machine.instructions else ""),
        f"  RAM {in_bytes(machine.memory)}, {in_bytes(machine.available)} available, "
        f"now read at {machine.bandwidth / 1e9:.1f} GB/s; disk {in_bytes(machine.disk_free)} free",
        *(f"  GPU {in_bytes(g.memory)}, {in_bytes(g.available)} available, now read at {g.bandwidth / 1e9:,.0f} GB/s; "
          f"{g.name[:36]}" for g in machine.gpus),
    ]


def _fit_lines(fits: Sequence[Fit]) -> list[str]:
    where = {"gpu": "GPU", "ram": "RAM", "disk": "too big", "storage": "file only", "none": "too big"}
    lines = [f"{'Fits here?':<20}{'needs':>12}{'tokens/s':>12}   "
             f"{fits[0].context:,} positions, {WORKING_SHARE:.0%} working memory"]
    for f in fits:
        speed = "-" if f.tokens_per_second is None else f"{'<' if f.bound else '~'} {in_speed(f.tokens_per_second)}"
        note = f"{where[f.place]}{'; ' if f.note else ''}{f.note}"
        lines.append(f"  {f.format:<18}{in_bytes(f.need):>12}{speed:>12}   {note}"[:100])
    return [*lines, "  < what bandwidth allows one sequence at most   ~ the same, but a cache could beat it"]


def _key(name: str) -> str:
    return name.lower().replace(" ", "_")
