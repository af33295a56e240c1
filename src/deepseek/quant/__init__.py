"""Codecs: how weights are stored in fewer bits."""
