"""Formats numbers for people."""

from __future__ import annotations


def scaled(value: float, step: int, units: str) -> str:
    """Three to four digits and a unit from `units`, which are `step` apart."""
    names = units.split()
    if value < step:
        return f"{value:,.0f} {names[0]}"
    while len(names) > 1 and value >= 0.9995 * step:
        value, names = value / step, names[1:]
    return f"{value:,.{2 if value < 9.995 else 1}f} {names[0]}"


def in_count(parameters: int) -> str:
    return f"{parameters}" if parameters < 1000 else scaled(parameters, 1000, "- K M B T")


def in_bytes(size: float) -> str:
    return scaled(size, 1024, "B KiB MiB GiB TiB")


def in_speed(tokens_per_second: float) -> str:
    digits = 0 if tokens_per_second >= 100 else 1 if tokens_per_second >= 1 else 3
    return f"{tokens_per_second:,.{digits}f}"
