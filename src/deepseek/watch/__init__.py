"""Counters -> metrics, alerts, history, dashboard, terminal view. It listens to the engine, which never imports it."""
