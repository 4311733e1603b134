"""What a model costs: parameters, bytes, multiply-accumulates, memory, and time measured fairly."""

from formwright.measure.report import Measurement, measure
from formwright.measure.timing import Timing, alternate

__all__ = ["Measurement", "Timing", "alternate", "measure"]
