"""Errors that a user can act on.

Every complaint of the library is one of these: it says what was wrong, where, and what to do. The command line
prints the sentence and exits with 2; in Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FormwrightError(Exception):
    """Something the user can put right. ``str(error)`` is one clear sentence (or one per line for several)."""


class Refusal(FormwrightError):
    """What was asked for cannot be said or done here, and why. Raised before any work."""


class SpecError(FormwrightError):
    """A model spec, plan or option names something unknown or out of range."""


class DataError(FormwrightError):
    """The user's data or a checkpoint cannot be used as it stands."""


def all_of(kind: type[FormwrightError], problems: Sequence[str]) -> None:
    """Raise ``kind`` with every problem, a line each; nothing happens when there are none."""
    if problems:
        raise kind("\n".join(dict.fromkeys(problems)))


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'body'?"`` or an empty string when nothing known is near ``name``."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what it is, the nearest known name, and the list when it is short."""
    known = sorted(str(k) for k in known)
    listing = f" (known: {', '.join(known)})" if 0 < len(known) <= 24 else ""
    return f"unknown {what} {name!r}{nearest(name, known)}{listing}"
