"""Training: one loop for every objective, exact to the bit when resumed; healing of cut models; tokenizers."""

from formwright.training.heal import heal
from formwright.training.loop import Trained, train
from formwright.training.recipe import Recipe
from formwright.training.run import Diverged, Interrupted

__all__ = ["Diverged", "Interrupted", "Recipe", "Trained", "heal", "train"]
