"""Mamba checkpoints: the first release's names, a model made here said in published terms, and steps that agree."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from formwright.engine.state import State
from formwright.hub.huggingface import read, write
from formwright.models.build import build
from formwright.models.recipes import recipe
from hub.families_small import load, make, save

SMALL = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def test_names_of_the_first_release(tmp_path: Path) -> None:
    save(make("MambaForCausalLM", SMALL), tmp_path)
    wanted, path = read(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, path)
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), read(tmp_path).parameters()))


@torch.no_grad()
def test_a_recipe_is_said_in_published_terms_and_streams_alike(tmp_path: Path) -> None:
    model = build(recipe("mamba-130m", vocab=90, width=32, layers=2, state=4), seed=1)
    write(model, tmp_path)
    published = load("MambaForCausalLM", tmp_path)
    ids = torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    wanted = published(ids).logits
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-4)
    state = State(2)
    steps = torch.cat([model(piece, state=state) for piece in ids.split([4, 1, 1, 5], 1)], 1)
    torch.testing.assert_close(steps, wanted, rtol=1e-4, atol=1e-4)
