"""``formwright new``: what it writes works and passes the conformance suite; bad requests end in a sentence."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import formwright as fw
from conformance.samples import Case
from formwright import registry
from formwright.cli import main as cli
from formwright.cli.new import TEMPLATES, WHATS, attribute, function_name, render
from formwright.parts.base import initialise
from formwright.surgery import Plan
from plugins import forgotten

NAMES = {"part": "token-shift", "surgery": "drop-bias", "task": "echo", "op": "swiglu"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what plug-ins in it register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    with forgotten():
        yield tmp_path


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    return int(done.value.code or 0)


def written(what: str) -> Any:
    """What the example defines, loaded as the plug-in that ``new`` has just written."""
    name = NAMES[what]
    assert command("new", what, name) == 0
    return registry.load_plugin(f"{function_name(name)}.py:{attribute(what, name)}")


def tiny(layers: list[dict], **more: Any) -> Any:
    spec = {"stem": {"part": "token-embedding", "vocab": 11, "width": 32}, "layers": layers, **more}
    return fw.build(spec, seed=0)


# ---------------------------------------------------------------------- the files


@pytest.mark.parametrize("what", WHATS)
def test_writes_one_file_under_the_given_name(what: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert command("new", what, "my-own-thing") == 0
    assert [path.name for path in here.iterdir()] == ["my_own_thing.py"]
    source = (here / "my_own_thing.py").read_text()
    assert source == render(what, "my-own-thing")
    assert "$" not in source
    assert ("class MyOwnThing" if what in ("part", "surgery") else "def my_own_thing") in source
    said = capsys.readouterr().err
    assert "my_own_thing.py" in said
    assert "python -m formwright.registry" in said  # this is a source checkout
    for name in registry.HOMES:  # the place it names is one that the registry reads
        if f"src/formwright/{WHATS[what][1]}/" in said and WHATS[what][1] in registry.HOMES[name]:
            break
    else:
        pytest.fail(f"{said!r} names no home of the registry")


@pytest.mark.parametrize("what", WHATS)
def test_is_formatted_and_free_of_lint(what: str) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    assert ruff.exists(), "the linters are part of the development set-up: make test installs them"
    place = registry.ROOT / WHATS[what][1] / "example.py"
    for check in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        done = subprocess.run(
            [str(ruff), *check, "--stdin-filename", str(place), "-"],
            input=render(what, NAMES[what]),
            text=True,
            capture_output=True,
            cwd=registry.ROOT.parent.parent,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("what", WHATS)
def test_the_registry_reads_it_as_a_file_of_the_package(what: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved into the package it is found by its syntax alone: nothing else is edited."""
    place = here / WHATS[what][1]
    place.mkdir(parents=True)
    (place / "moved.py").write_text(render(what, NAMES[what]))
    monkeypatch.setattr(registry, "ROOT", here)
    (entry,) = registry.scan()
    assert (entry.kind in WHATS[what][0]) and entry.name == NAMES[what]
    assert entry.attribute == attribute(what, NAMES[what])
    assert entry.summary


def test_every_template_belongs_to_a_kind() -> None:
    assert {path.name for path in TEMPLATES.iterdir() if path.is_file()} == {f"{what}.py.txt" for what in WHATS}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prat", "x"), "did you mean 'part'"),
        (("part", "TokenShift"), "did you mean 'token-shift'"),
        (("part", "token_shift"), "did you mean 'token-shift'"),
        (("part", "9lives"), "must be lower-case words"),
        (("part", ""), "must be lower-case words"),
        (("task", "../up"), "must be lower-case words"),
        (("part", "attention"), "taken by formwright.parts.mixers.attention"),
        (("part", "mlp"), "channel 'mlp' is taken"),
        (("op", "attention"), "op 'attention' is taken"),
        (("part", "part"), "would hide 'Part'"),
        (("task", "np"), "would hide 'np'"),
        (("op", "class"), "a word of Python"),
        (("task", "int"), "a word of Python"),
        (("part", "mine", "--out", "mine.txt"), "must end in .py"),
        (("part", "mine", "--out", "nowhere/mine.py"), "folder nowhere does not exist"),
        (("part",), "formwright new --help"),
    ],
)
def test_bad_requests_end_in_a_sentence(
    arguments: tuple[str, ...], words: str, here: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("new", *arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ") and "Traceback" not in said
    assert not list(here.iterdir())


def test_an_existing_file_stays_unless_forced(here: Path, capsys: pytest.CaptureFixture) -> None:
    mine = here / "token_shift.py"
    mine.write_text("mine")
    assert command("new", "part", "token-shift") == 2
    assert "already exists" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert command("new", "part", "token-shift", "--out", "other.py") == 0
    assert command("new", "part", "token-shift", "--force") == 0
    assert mine.read_text() == (here / "other.py").read_text() == render("part", "token-shift")


# ---------------------------------------------------------------------- the part


def checks(module: str) -> Iterator[tuple[str, Any]]:
    """The checks of the conformance suite that take a case, each with its further parameters spelled out."""
    for name, check in vars(importlib.import_module(module)).items():
        if not name.startswith("test_"):
            continue
        sets: list[dict[str, Any]] = [{}]
        for mark in getattr(check, "pytestmark", []):
            names, values = mark.args[:2] if mark.name == "parametrize" else ("case", ())
            if names != "case":
                sets = [{**held, names: value} for held in sets for value in values]
        takes = set(inspect.signature(inspect.unwrap(check)).parameters) - {"data"}
        if takes == {"case", *sets[0]}:
            yield name, [(check, held) for held in sets]


def test_the_part_passes_the_conformance_suite(here: Path) -> None:
    made = written("part")
    run = set()
    for index, options in enumerate(made.examples):
        case = Case("mixer", "token-shift", index, options)
        for name, calls in checks("conformance.test_layer_parts"):
            run.add(name)
            for check, held in calls:
                if getattr(check, "only", lambda part: True)(case.build()):
                    check(case=case, **held)
    assert {
        "test_alone_equals_padded_equals_packed",
        "test_no_output_depends_on_a_later_input",
        "test_parallel_equals_streamed",
        "test_stated_cost_is_counted_cost",
        "test_gradient_is_exact",
    } <= run


def test_the_part_stands_in_a_spec_by_path(here: Path) -> None:
    written("part")
    model = tiny([{"part": "token_shift.py:TokenShift"}, {"part": "mlp", "hidden": 16}], head={"part": "mean-pool"})
    assert [line["is"] for line in model.layout()] == ["token-shift", "mlp"]
    assert model.causal and model.streams
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 32)


def test_the_part_mixes_with_the_token_before(here: Path) -> None:
    part = written("part")(4)
    initialise(part, 0)
    with torch.no_grad():
        part.out.weight.copy_(torch.eye(4))
        part.mix.fill_(0.25)
    x = torch.arange(12.0).reshape(1, 3, 4)
    want = 0.25 * x + 0.75 * torch.cat((torch.zeros(1, 1, 4), x[:, :-1]), 1)
    torch.testing.assert_close(part(x, fw.Context()), want)


def test_the_part_does_not_stream_packed(here: Path) -> None:
    part = written("part")(4)
    ctx = fw.Context(offsets=torch.tensor([0, 2]), state=fw.State(1))
    with pytest.raises(fw.Refusal, match="padded layout"):
        part(torch.zeros(1, 2, 4), ctx)


# ---------------------------------------------------------------------- the surgery


def biased(scale: float = 1.0) -> Any:
    model = tiny([{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 16}], head={"part": "mean-pool"})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for slot in model.slots().values():
            slot.bias.copy_(scale * torch.randn(slot.bias.shape, generator=generator))
    return model


def test_the_surgery_decides_applies_and_undoes(here: Path) -> None:
    written("surgery")
    model = biased()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        model.slot("b1.mlp:up").bias.mul_(1e-4)
        before = model(tokens)
    plan = fw.plan(model, "drop-bias")
    assert list(plan.decisions["drop"]) == ["b1.mlp:up"]
    assert Plan.from_json(plan.to_json()) == plan
    fw.apply(model, plan, keep_undo=True)
    assert model.slot("b1.mlp:up").dense_bias() is None
    assert model.slot("b1.mlp:down").dense_bias() is not None
    with torch.no_grad():
        after = model(tokens)
    assert 0 < (after - before).norm() < 1e-3 * before.norm()
    fw.undo(model)
    with torch.no_grad():
        assert torch.equal(model(tokens), before)


def test_the_surgery_by_path_is_part_of_a_saved_model(here: Path) -> None:
    written("surgery")
    model = fw.apply(biased(1e-4), "drop_bias.py:DropBias", where="b1.*")
    fw.save(model, "out")
    loaded = fw.load("out", plugin="drop_bias.py")
    assert [entry.name for entry in loaded.history] == ["drop_bias.py:DropBias"]
    assert loaded.slot("b1.mlp:up").dense_bias() is None
    tokens = torch.tensor([[4, 5]])
    assert torch.equal(model(tokens), loaded(tokens))


def test_the_surgery_goes_with_every_other(here: Path) -> None:
    """In both orders it runs, is saved and loads with equal outputs, or is refused with a sentence."""
    written("surgery")
    tokens = torch.tensor([[4, 5, 6]])
    ran = set()
    for other in registry.names("surgery"):
        by = registry.resolve("surgery", other)
        if other == "drop-bias":
            continue
        for order in ((other, "drop-bias"), ("drop-bias", other)):
            model = biased(1e-4).eval()  # some draw noise while they train
            try:
                for name in (*([by.after] if by.after else []), *order):
                    options = {} if name == "drop-bias" else registry.resolve("surgery", name).examples[0]
                    fw.apply(model, name, None if name == "drop-bias" else [[1, 2, 3], [4, 5]], **options)
            except fw.Refusal as refusal:
                assert len(str(refusal)) > 20
                continue
            fw.save(model, "-".join(order))
            said, again = model(tokens), fw.load("-".join(order), plugin="drop_bias.py")(tokens)
            for mine, loaded in zip(*(v.values() if isinstance(v, dict) else [v] for v in (said, again))):
                assert torch.equal(mine, loaded)
            ran.add(order)
    assert {("lora", "drop-bias"), ("drop-bias", "lora"), ("drop-bias", "finercut"), ("drop-bias", "llm-int8")} <= ran


def test_the_surgery_refuses_before_any_work(here: Path) -> None:
    written("surgery")
    model = biased()
    for options, words in (
        ({"threshold": 0}, "above 0"),
        ({"threshold": "much"}, "must be a number"),
        ({"treshold": 0.1}, "did you mean 'threshold'"),
        ({"where": "b7.*"}, "matches no slot"),
    ):
        with pytest.raises(fw.FormwrightError, match=words):
            fw.plan(model, "drop-bias", **options)
    with pytest.raises(fw.Refusal, match="none of 6 biases"):
        fw.plan(model, "drop-bias", threshold=1e-9)
    plan = fw.plan(model, "drop-bias", threshold=100.0)
    fw.apply(model, Plan.from_dict({**plan.to_dict(), "decisions": {"drop": {"b0.attention:q": 0}}}))
    edited = Plan.from_dict({**plan.to_dict(), "decisions": {"drop": {"b0.attention:q": 0, "b9.mlp:up": 0}}})
    with pytest.raises(fw.FormwrightError) as complaint:
        fw.apply(model, edited)
    assert "no slot 'b9.mlp:up'" in str(complaint.value)
    assert "'b0.attention:q' has no bias" in str(complaint.value)


# ---------------------------------------------------------------------- the task


def test_the_task_is_sound(here: Path) -> None:
    written("task")
    task = fw.task("echo.py:echo", length=8, size=200)
    assert task.name == "echo"
    assert any("equal" in line for line in task.check())
    for name, score in task.baselines("test").items():
        assert score.value < 0.65, f"{name} solves it"
    for index in range(20):
        tokens, label = task.draw("test", index)
        assert tokens.shape == (8,)
        assert label == int(tokens[0] == tokens[-1])


# ---------------------------------------------------------------------- the op


def test_the_op_equals_its_reference_in_float64(here: Path) -> None:
    op = written("op")
    reference = registry.load_plugin("swiglu.py:swiglu_reference")
    generator = torch.Generator().manual_seed(0)
    for shape in ((), (0,), (5,), (3, 0, 4), (2, 3, 4)):
        for scale in (1.0, 1e3):
            gate, up = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
            torch.testing.assert_close(op(gate, up), reference(gate, up), rtol=1e-12, atol=1e-12)
    gate, up = (torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(op, (gate, up))
    assert torch.autograd.gradgradcheck(op, (gate, up))
    mine = torch.autograd.grad(op(gate, up).sum(), (gate, up))
    theirs = torch.autograd.grad(reference(gate, up).sum(), (gate, up))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_op_keeps_two_tensors_and_leaves_its_inputs(here: Path) -> None:
    op = written("op")
    kept: list[Any] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    gate, up = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    before = gate.detach().clone(), up.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        op(gate, up)
    assert len({tensor.data_ptr() for tensor in kept}) == 2
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        registry.load_plugin("swiglu.py:swiglu_reference")(gate, up)
    assert len({tensor.data_ptr() for tensor in kept}) == 4
