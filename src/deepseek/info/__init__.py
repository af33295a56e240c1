"""A model in figures: parameters, FLOPs, memory, cost, and what of it fits a machine."""

from .accounting import FORMATS, Memory, ModelInfo, Part, describe
from .fit import Fit, cost, fit
from .machine import Gpu, Machine, measure_machine
from .report import render, to_json

__all__ = ["FORMATS", "Fit", "Gpu", "Machine", "Memory", "ModelInfo", "Part", "cost", "describe", "fit",
           "measure_machine", "render", "to_json"]
