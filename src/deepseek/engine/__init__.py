"""Requests -> tokens."""

from .engine import LLM, RequestOutput
from .sampler import SamplingParams

__all__ = ["LLM", "RequestOutput", "SamplingParams"]
