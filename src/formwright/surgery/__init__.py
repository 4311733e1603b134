"""Surgeries on models: adapt, compress, grow. See :mod:`formwright.surgery.base`."""

from formwright.surgery.base import Phase, Plan, Promises, Surgery, apply, copy, plan, replay, surgery, undo, words

__all__ = ["Phase", "Plan", "Promises", "Surgery", "apply", "copy", "plan", "replay", "surgery", "undo", "words"]
