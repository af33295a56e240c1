"""Requests -> tokens."""

from .control import ExpertControl
from .engine import Engine, EngineOptions
from .llm import LLM
from .request import RequestOutput
from .sampler import SamplingParams

__all__ = ["LLM", "Engine", "EngineOptions", "ExpertControl", "RequestOutput", "SamplingParams"]
