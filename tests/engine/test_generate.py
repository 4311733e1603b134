"""Generation: equal to recomputing everything and to transformers, rows independent, reproducible, stops, refusals."""

from __future__ import annotations

import pytest
import torch

from formwright.engine import State, generate, stream
from formwright.engine.autoregressive import Autoregressive
from formwright.engine.driver import drive, run_calls
from formwright.engine.protocols import Call, Request
from formwright.engine.sampling import choose, row_generators
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.models.batch import Batch
from formwright.models.build import build
from formwright.training.tokenizer import train_tokenizer

VOCAB = 61
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12]]


def decoder(seed: int = 0, **attention):
    mixer = {"part": "attention", "heads": 4, "causal": True, **attention}
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": 32, "std": 1.0},
            "layers": [{"repeat": 2, "layers": [mixer, {"part": "gated-mlp", "hidden": 48}]}],
            "final_norm": {"part": "rmsnorm"},
            "head": {"part": "lm", "vocab": VOCAB},
        },
        seed=seed,
    )


def recomputed(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "options", [{"rotary": {}}, {"rotary": {}, "window": 4, "kv_heads": 2}, {"distance": {"kind": "alibi"}}]
)
def test_greedy_equals_recomputing_everything(options):
    model = decoder(**options)
    assert generate(model, PROMPTS, max_new=12) == [recomputed(model, prompt, 12) for prompt in PROMPTS]


def test_greedy_at_learned_positions_stops_where_they_end():
    model = build(
        {
            "stem": {
                "part": "token-embedding",
                "vocab": VOCAB,
                "width": 32,
                "positions": {"kind": "learned", "max": 8},
            },
            "layers": [{"part": "attention", "heads": 2, "causal": True}, {"part": "mlp", "hidden": 32}],
            "head": {"part": "lm", "tied": True},
        }
    )
    found = list(stream(model, [[1, 2, 3], [1] * 8], max_new=20))
    assert [sum(p.row == row for p in found) for row in (0, 1)] == [6, 1]
    assert {p.reason for p in found if p.reason} == {"positions"}
    with pytest.raises(DataError, match=r"prompt 1 has 9 tokens and the model 8 positions"):
        generate(model, [[1], [1] * 9])


def test_rows_do_not_depend_on_their_batch_mates():
    model = decoder(rotary={})
    for how in ({}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.5, "top_k": 5, "top_p": 0.9}):
        together = generate(model, PROMPTS, max_new=10, **how)
        assert together == [generate(model, prompt, max_new=10, **how) for prompt in PROMPTS]
        assert together[::-1] == generate(model, PROMPTS[::-1], max_new=10, **how)


def test_temperature_is_reproducible_and_equal_prompts_differ():
    model = decoder(rotary={})
    how = {"max_new": 16, "temperature": 1.0}
    first = generate(model, [[1, 2]] * 3, seed=1, **how)
    before = torch.get_rng_state()
    assert first == generate(model, [[1, 2]] * 3, seed=1, **how)
    assert torch.equal(before, torch.get_rng_state())
    assert first != generate(model, [[1, 2]] * 3, seed=2, **how)
    assert len({tuple(row) for row in first}) == 3


def test_a_row_ends_at_an_id_and_the_others_go_on():
    model = decoder(rotary={})
    free = generate(model, PROMPTS, max_new=10)
    end = free[0][3]
    stopped = generate(model, PROMPTS, max_new=10, stop=end)
    for whole, cut in zip(free, stopped):
        assert cut == (whole[: whole.index(end)] if end in whole else whole)
    assert generate(model, PROMPTS, max_new=0) == [[]] * 4


def test_sampling_draws_from_the_set_it_was_given():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draw = row_generators([[1]], 0)[0]
    assert choose(logits, None) == 0
    assert {choose(logits, draw, 1.0, top_k=2) for _ in range(200)} == {0, 1}
    probability = logits.double().softmax(0)
    assert {choose(logits, draw, 1.0, top_p=float(probability[0]) + 1e-6) for _ in range(200)} == {0, 1}
    assert {choose(logits, draw, 1.0, top_p=0.01) for _ in range(50)} == {0}
    counts = torch.bincount(torch.tensor([choose(logits, draw, 1.0) for _ in range(4000)]), minlength=4)
    assert torch.allclose(counts / 4000, probability.float(), atol=0.03)


TEXTS = [
    "def read(path):\n    return open(path).read()\n",
    "for line in file:\n    print(line, end='')\n",
    "naïve café ☃",
] * 4


def test_texts_stream_in_whole_characters_and_stop_at_strings():
    tokenizer = train_tokenizer(TEXTS, 300)
    model = build(
        {
            "stem": {"part": "token-embedding", "vocab": tokenizer.size, "width": 32, "std": 1.0},
            "layers": [{"part": "attention", "heads": 4, "causal": True, "rotary": {}}],
            "head": {"part": "lm", "vocab": tokenizer.size},
        },
        seed=1,
    )
    model.tokenizer = tokenizer
    ids = generate(model, ["def r", "caf"], max_new=24, temperature=1.0, as_ids=True)
    texts = generate(model, ["def r", "caf"], max_new=24, temperature=1.0)
    assert texts == [tokenizer.decode(row) for row in ids]
    pieces = list(stream(model, "def r", max_new=24, temperature=1.0))
    assert "".join(p.text for p in pieces) == texts[0] and pieces[-1].reason in ("length", "end")
    assert isinstance(generate(model, "def r", max_new=2), str)
    stop = texts[0][2:4]
    cut = generate(model, "def r", max_new=24, temperature=1.0, stop=[stop])
    assert cut == texts[0][: texts[0].index(stop)]
    with pytest.raises(SpecError, match="empty string"):
        generate(model, "def r", stop="")


def test_what_cannot_generate_is_refused_by_the_part_that_cannot():
    encoder = decoder(causal=False)
    with pytest.raises(Refusal, match=r"b0\.attention \(attention\) reads later tokens"):
        generate(encoder, [[1]])
    headless = build({"stem": {"part": "token-embedding", "vocab": 9, "width": 8}, "layers": []})
    with pytest.raises(Refusal, match="no language-model head"):
        generate(headless, [[1]])
    model = decoder(rotary={})
    for prompts, error in (
        ("text", "no tokenizer"),
        ([[]], "empty prompt"),
        ([[VOCAB]], "ids 0 to"),
        ([[1], "a"], "all texts"),
    ):
        with pytest.raises(DataError, match=error):
            generate(model, prompts)
    with pytest.raises(SpecError, match=r"temperature=-1(.|\n)*top_k=0(.|\n)*top_p=2(.|\n)*max_new=-1"):
        generate(model, [[1]], temperature=-1, top_k=0, top_p=2, max_new=-1)


def test_controllers_change_logits_in_order():
    class Forbid:
        level, needs = "logits", ()

        def __init__(self, token):
            self.token = token

        def logits(self, own, ids, logits, aux):
            own["calls"] = own.get("calls", 0) + 1
            return logits.index_fill(1, torch.tensor([self.token]), float("-inf"))

        def state(self, own, state, probe):
            return state

    model = decoder(rotary={})
    free = generate(model, [[5, 9, 3]], max_new=6)[0]
    other = generate(model, [[5, 9, 3]], max_new=6, controllers=[Forbid(free[0]), Forbid(free[1])])[0]
    assert free[0] not in other and free[1] not in other


def test_the_driver_batches_requests_and_leaves_their_states_alone():
    model = decoder(rotary={})
    maker = Autoregressive()
    works = [maker.start(Request(rows=PROMPTS[:1], max_new=7), 0), maker.start(Request(rows=PROMPTS[1:], max_new=4), 0)]
    events = list(drive({"model": model}, [(maker, work) for work in works]))
    assert [row[len(p) :] for row, p in zip(works[0].rows, PROMPTS)] == generate(model, PROMPTS[:1], max_new=7)
    assert [row[len(p) :] for row, p in zip(works[1].rows, PROMPTS[1:])] == generate(model, PROMPTS[1:], max_new=4)
    assert sum(event.kind == "done" for _, event in events) == 4
    state = State(1)
    call = Call("model", "extend", Batch(inputs={"tokens": torch.tensor([[1, 2]])}), (state,))
    run_calls({"model": model}, [call])
    assert state.fresh and int(state.seen) == 0
    whole = run_calls({"model": model}, [Call("model", "whole", Batch(inputs={"tokens": torch.tensor([[1, 2]])}))])[0]
    assert whole.logits.shape == (1, 2, VOCAB)


def test_an_encoder_with_a_decoder_reads_its_memory_once():
    norm = {"part": "rmsnorm"}
    system = build(
        {
            "towers": {
                "encoder": {
                    "stem": {"part": "token-embedding", "vocab": VOCAB, "width": 32, "std": 1.0},
                    "layers": [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 32}],
                    "final_norm": norm,
                },
                "decoder": {
                    "stem": {"use": "encoder.stem", "width": 32},
                    "layers": [
                        {"part": "attention", "heads": 2, "causal": True, "rotary": {}},
                        {"part": "attention", "heads": 2, "memory": "encoder", "id": "cross"},
                        {"part": "mlp", "hidden": 32},
                    ],
                    "final_norm": norm,
                    "head": {"part": "lm", "vocab": VOCAB},
                    "memory": ["encoder"],
                },
            }
        },
        seed=2,
    )
    runs = []
    system.tower("encoder").stem.register_forward_hook(lambda *_: runs.append(1))
    found = generate(system, PROMPTS, max_new=6, start=0)
    # The stem is shared: one call for the encoder, one a step for the decoder.
    assert len(runs) == 7
    for prompt, row in zip(PROMPTS, found):
        ids = [0]
        for _ in range(6):
            inputs = {"encoder.tokens": torch.tensor([prompt]), "decoder.tokens": torch.tensor([ids])}
            ids.append(int(system(Batch(inputs=inputs))[0, -1].argmax()))
        assert row == ids[1:]


def configurations():
    from transformers import GPT2Config, LlamaConfig, OPTConfig, T5Config

    small = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return {
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small),
        "llama": LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            **small,
        ),
        "opt": OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **small,
        ),
        "t5": T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        ),
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5"])
def test_greedy_equals_transformers_on_ragged_batches(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    from formwright.hub.huggingface import read

    config = configurations()[family]
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    theirs = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:  # away from the near ties of a small random start
                parameter.mul_(4.0)
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path)
    count, pad_id = 12, config.pad_token_id
    width = max(map(len, PROMPTS))
    left = family != "t5"
    rows = [[pad_id] * (width - len(p)) + p if left else p + [pad_id] * (width - len(p)) for p in PROMPTS]
    mask = [[0] * (width - len(p)) + [1] * len(p) if left else [1] * len(p) + [0] * (width - len(p)) for p in PROMPTS]
    told = theirs.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = told.sequences[:, width:] if left else told.sequences[:, 1:]
    # min_new_tokens forbids the end token, which we then have to forbid as well.
    found = generate(ours, PROMPTS, max_new=count, start=0, controllers=[Never(config.eos_token_id)])
    compared = 0
    for row in range(len(PROMPTS)):
        for step in range(count):
            logits = told.logits[step][row].clone()
            logits[config.eos_token_id] = float("-inf")
            best = logits.topk(2).values
            if best[0] - best[1] < 1e-3:
                break
            assert found[row][step] == int(new[row, step])
            compared += 1
    assert compared >= 0.9 * count * len(PROMPTS)


class Never:
    level, needs = "logits", ()

    def __init__(self, token):
        self.token = token

    def logits(self, own, ids, logits, aux):
        return logits.index_fill(1, torch.tensor([self.token]), float("-inf"))

    def state(self, own, state, probe):
        return state
