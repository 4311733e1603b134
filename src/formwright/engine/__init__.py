"""The engine: what streams remember, and generation in one loop that batches the calls of all requests."""

from formwright.engine.generate import Piece, generate, stream
from formwright.engine.state import State

__all__ = ["Piece", "State", "generate", "stream"]
