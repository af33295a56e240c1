"""The state of a server in words and bars; rules and boards for Prometheus and Grafana, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_atomically

BAR = 20  # characters of a bar; the mark is at the expected share


def write_files(folder: Path) -> None:
    """Raises ConfigError where a file of the name is there already and says something else."""
    for own in sorted((files("deepseek.watch") / "files").iterdir(), key=lambda path: path.name):
        text, path = own.read_text(encoding="utf-8"), folder / own.name
        try:
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise ConfigError(f"{path}: is there already and was changed: must be moved away first")
            write_atomically(path, text)
        except OSError as error:
            raise ConfigError(f"files = {str(folder)!r}: must be a folder that can be written: {error}") from None
        print(path)


def fetch(url: str, api_key: str | None) -> dict[str, Any]:
    """The state of a server. Raises ConfigError for one that does not answer, or not like ours."""
    import http.client
    import urllib.error
    import urllib.request

    address = url.rstrip("/").removesuffix("/v1") + "/dashboard/state"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"url = {url!r}: must begin with http:// or https://, or be the folder of a run")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
            state: dict[str, Any] = json.load(answer)
        if not isinstance(state, dict) or "figures" not in state:
            raise ValueError("it says something else")
        return state
    except urllib.error.HTTPError as error:
        missing = error.code == 401 and api_key is None
        hint = ": it needs an API key (--api_key, --api_key_file or DEEPSEEK_API_KEY)" if missing else ""
        raise ConfigError(f"url = {url!r}: the server answers {error.code}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"url = {url!r}: no server of ours answers there: {reason}") from None


def view(state: dict[str, Any]) -> str:
    """A state in words and bars."""
    now, figures, groups, residency = state["rates"], state["figures"], state["groups"], state["residency"]
    lines = [f"{state['model']}   up {(state['time'] - state['began']) / 60:.0f} min   "
             f"{figures['requests_running']:.0f} running, {figures['requests_waiting']:.0f} waiting"]
    lines += [f"  ! {alert['message']}" for alert in state["alerts"]] or ["  no alert"]
    lines += ["", f"throughput   {_number(now['new_tokens'])} new tokens/s, {_number(now['tokens'])} with prompts",
              f"first token  p50 {_seconds(now['first_p50'])}, p99 {_seconds(now['first_p99'])}",
              f"per token    p50 {_seconds(now['each_p50'])}, p99 {_seconds(now['each_p99'])}",
              f"routing      accuracy {_share(state['accuracy'])} (chance {_share(state['chance'])}), conflicts "
              f"{_share(state['conflicts'])} of tokens, {_share(state['conflict_requests'])} of requests"]
    lines.append(f"experts      {_share(state['distinct'])} of the distinct ones that uniform routing would ask for")
    if (pool := state.get("pool")) is not None:
        lines += [f"pool         {pool['decisions']:.0f} decisions, {_share(pool['abstained'])} left to the base, "
                  f"accuracy {_share(pool['accuracy'])} of {pool['labelled']:.0f}, {_seconds(pool['seconds'])} each",
                  f"             {pool['composite']:.0f} composite requests, {pool['parts']:.0f} parts; passages for "
                  f"{_share(pool['hits'])} of {pool['retrievals']:.0f} searches"]
    if residency is not None:
        lines.append(f"residency    hits {_share(residency['hits'])}, stalled {_share(residency['stall'])}, "
                     f"{residency['read_bytes'] / 2**20:,.0f} MiB read")
    machine = [f"processors {_share(figures.get('cpu_ratio'))}", f"memory {_share(figures.get('memory_ratio'))}"]
    if "gpu_ratio" in figures:
        machine.append(f"GPU {_share(figures['gpu_ratio'])}")
    if now["joules_per_token"] is not None:
        machine.append(f"{_number(now['joules_per_token'])} J a token")
    if state["window"]["cost"] is not None:
        machine.append(f"{_number(state['window']['cost'])} for 10^8 tokens")
    lines.append("machine      " + ", ".join(machine))
    if groups:
        bands = state["band_names"]
        lines += ["", *_table(
            ["group", "slots over expected", "", *(f"layer{'s' * ('-' in band)} {band}" for band in bands), "accuracy",
             "drift"],
            [[group["name"], _bar(group["ratio"]), _ratio(group["ratio"]),
              *(_ratio(group["bands"][band]) for band in bands), _share(group["accuracy"]), _share(group["drift"])]
             for group in groups])]
    if pool is not None:
        lines += ["", *_table(
            ["member", "kind", "decisions", "share", "of the weights", "accuracy"],
            [[own["name"], own["kind"], f"{own['decisions']:.0f}", _share(own["share"]), _share(own["weight"]),
              _share(own["accuracy"])] for own in pool["members"]])]
    if state["business"]:
        lines += ["", *_table(
            ["domain", "requests", "completed", "tools right", "schema valid", "satisfied"],
            [[own["domain"], f"{own['requests']:.0f}", _share(own["completed"]), _share(own["tools"]),
              _share(own["schemas"]), _share(own["satisfied"])] for own in state["business"]])]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(cell.rjust(width) if i else cell.ljust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in (head, *rows)]


def _bar(ratio: float | None) -> str:
    """Twice the expected share fills it; the mark is at the expected one."""
    filled = 0 if ratio is None else min(BAR, round(ratio * BAR / 2))
    return "".join("|" if i == BAR // 2 else "#" if i < filled else "." for i in range(BAR))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(
        value) < 1 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
