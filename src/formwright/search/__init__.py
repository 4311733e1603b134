"""Search: which composition of surgeries is cheapest at the quality asked for."""

from formwright.search.slim import Point, Slimmed, slim

__all__ = ["Point", "Slimmed", "slim"]
