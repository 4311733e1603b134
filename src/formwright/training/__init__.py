"""Training: one loop for every objective, exact to the bit when resumed; healing of cut models; tokenizers."""

from formwright.training.ending import Diverged, Interrupted
from formwright.training.heal import heal
from formwright.training.loop import Trained, train
from formwright.training.recipe import Recipe

__all__ = ["Diverged", "Interrupted", "Recipe", "Trained", "heal", "train"]
