"""Counters -> metrics, alerts, history, dashboard, terminal view. It reads what the engine offers; nothing below knows
that it is watched."""
