"""What a family of published checkpoints is: its configuration in our terms, and its weight table.

One file per family, one class per model type. A family states ``defaults`` (what its configuration means where a key is
missing, which also fixes the type of each key), ``body`` (the configuration as a spec), ``rows`` (the weight table of
the body), and ``heads`` (for each published class its head and the rows of the head). Reading, writing and every check
are derived from these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from formwright.hub.families._table import Row, knows, table
from formwright.kit.errors import DataError, Refusal
from formwright.parts.activations import ACTIVATIONS
from formwright.spec import ModelSpec, SystemSpec

Data = dict[str, Any]


@dataclass(frozen=True)
class Maybe:
    """The default of a key that is of ``kind`` or null."""

    kind: type
    value: Any = None


#: No size of a model comes near; a product of two still fits a machine word.
LARGEST = 2**31 - 1


class Config:
    """A configuration read with a family's defaults: ``c.hidden_size``; a key may have other spellings."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], spellings: Mapping[str, str]) -> None:
        self.given = dict(given)
        self.values = {key: value.value if isinstance(value, Maybe) else value for key, value in defaults.items()}
        for key, value in given.items():
            self.values[spellings.get(key, key)] = value
        self.defaults = defaults

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["values"][key]
        except KeyError:
            raise AttributeError(key) from None

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def problems(self) -> list[str]:
        """A sentence for every value that is not of the kind its default is."""
        found = []
        for key, default in self.defaults.items():
            value = self.values[key]
            if isinstance(default, Maybe):
                if value is not None:
                    found += wrong(key, value, default.kind, 1)
            else:
                least = 0 if default == 0 or key.endswith("_id") else 1
                found += wrong(key, value, type(default), least)
        return found

    @property
    def layers(self) -> int:
        """The largest number of layers that it states, under any of the names for it."""
        keys = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
        return max((n for n in (self.values.get(key) for key in keys) if isinstance(n, int)), default=0)

    @property
    def classes(self) -> int:
        """Number of labels, stated by name or by number; 2 where nothing is said."""
        named = self.values.get("id2label")
        if isinstance(named, Mapping) and named:
            return len(named)
        count = self.values.get("num_labels")
        return count if isinstance(count, int) and count > 0 else 2

    @property
    def labels(self) -> list[str]:
        """Names of the labels in the order of their numbers."""
        named = self.values.get("id2label")
        if not isinstance(named, Mapping) or not named:
            return [f"LABEL_{index}" for index in range(self.classes)]
        try:
            order = sorted(named, key=int)
        except ValueError:
            raise DataError("id2label must map numbers to names") from None
        if [int(key) for key in order] != list(range(len(order))):
            raise DataError(f"id2label must number the labels 0 to {len(order) - 1}")
        return [str(named[key]) for key in order]


@dataclass(frozen=True)
class HeadForm:
    """A published class: the head it has, the rows of that head, and names that only repeat another tensor.

    node: configuration -> head of the spec. repeats: published name -> the published name whose tensor it repeats.
    """

    node: Callable[[Config], Data]
    rows: tuple[Row, ...] = ()
    repeats: Mapping[str, str] | None = None


def wrong(key: str, value: Any, kind: type, least: int = 0) -> list[str]:
    """A sentence if ``value`` is not of ``kind``; whole numbers lie between ``least`` and :data:`LARGEST`."""
    if kind is bool and not isinstance(value, bool):
        return [f"{key} must be true or false, not {value!r}"]
    if kind is int and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST):
        return [f"{key} must be a whole number of at least {least} and at most {LARGEST}, not {value!r}"]
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            return [f"{key} must be a number, not {value!r}"]
    if kind in (str, list, dict) and not isinstance(value, kind):
        return [f"{key} must be a {'text' if kind is str else kind.__name__}, not {value!r}"]
    return []


class Family:
    """See the module."""

    #: ``model_type`` of its configurations, and how to speak of it.
    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    #: The published class without a head, and what its tensors are prefixed with inside the classes with one.
    base: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    defaults: ClassVar[Data] = {}
    spellings: ClassVar[Mapping[str, str]] = {}
    rows: ClassVar[tuple[Row, ...]] = ()
    heads: ClassVar[Mapping[str, HeadForm]] = {}
    #: Patterns of tensors that are computed, not learned, and may stand in a file.
    ignored: ClassVar[tuple[str, ...]] = (r".*position_ids",)
    #: Learned tensors that no head here uses, as in a table; they are kept so that writing gives them back.
    kept: ClassVar[tuple[str, ...]] = ()
    #: Published name -> the name whose tensor it repeats, in the body.
    repeats: ClassVar[Mapping[str, str]] = {}
    #: Old endings of names and what they became.
    renamed: ClassVar[Mapping[str, str]] = {}

    def config(self, given: Mapping[str, Any]) -> Config:
        """The configuration read with this family's defaults; a DataError lists everything wrong with it."""
        config = Config(given, self.defaults, self.spellings)
        problems = config.problems()
        problems = problems or self.check(config)
        if given.get("quantization_config"):
            kind = given["quantization_config"]
            kind = kind.get("quant_method", "some") if isinstance(kind, dict) else "some"
            problems.append(f"the weights are quantised ({kind}); read the original checkpoint and quantise it here")
        if problems:
            raise DataError("\n".join(problems))
        return config

    def check(self, c: Config) -> list[str]:
        """Sentences for settings of a configuration that this library cannot run."""
        return []

    def body(self, c: Config) -> Data:
        """Everything of the spec but its head."""
        raise NotImplementedError

    def spec_of(self, given: Mapping[str, Any], architecture: str | None = None) -> ModelSpec | SystemSpec:
        """The spec that a configuration describes, with the head of ``architecture`` (default: its own)."""
        c = self.config(given)
        head = self.form(architecture or self.architecture(given)).node(c)
        return ModelSpec.from_dict({**self.body(c), "head": head})

    def architecture(self, given: Mapping[str, Any]) -> str:
        """The published class that a configuration names; the one without a head where it names none."""
        named = given.get("architectures")
        return str(named[0]) if isinstance(named, (list, tuple)) and named else self.base

    def form(self, architecture: str) -> HeadForm:
        """The head of a published class; DataError for one this family does not know."""
        if architecture not in self.heads:
            known = ", ".join(self.heads)
            raise DataError(
                f"architecture {architecture!r} has a head that is not known here (known: {known}); "
                "a head is never made up, so convert the checkpoint to one of these"
            )
        return self.heads[architecture]

    def all_rows(self, given: Mapping[str, Any], architecture: str) -> tuple[Row, ...]:
        """The weight table of a published class: body and head."""
        return (*prefixed(self.rows), *self.form(architecture).rows)

    def canonical(self, name: str) -> str:
        """A published name as it is spelled today."""
        for old, new in self.renamed.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def prefix_in(self, names: Iterable[str]) -> str:
        """The prefix that the body has in a file with these names: its own, or none."""
        return self.prefix if any(name.startswith(self.prefix) for name in names) else ""

    def prefix_of(self, architecture: str) -> str:
        """The prefix that the body has when this class is written."""
        return "" if architecture == self.base else self.prefix

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def repeats_of(self, architecture: str, prefix: str) -> dict[str, str]:
        """Published names that repeat another tensor of the file."""
        found = {**self.repeats, **(self.form(architecture).repeats or {})}
        return {a.replace("{p}", prefix): b.replace("{p}", prefix) for a, b in found.items()}

    def is_kept(self, name: str, prefix: str) -> bool:
        """Whether a tensor that this head does not use belongs to the family: to another head, or ``kept``."""
        return knows(self._others(), prefix, name)

    def _others(self) -> list[Row]:
        """Published names beside the body: those of every head, and what is only kept."""
        found = [row for form in self.heads.values() for row in form.rows]
        return found + [row for name in self.kept for row in table((name, name))]

    def untied(self, given: Data) -> Data:
        """The configuration of a file whose tensors say that the last linear is not the token table after all."""
        return {**given, "tie_word_embeddings": False}

    def neutral(self, name: str, prefix: str) -> str:
        """A published name with ``{p}`` in place of the body's prefix in its file."""
        if prefix:
            return "{p}" + name.removeprefix(prefix) if name.startswith(prefix) else name
        rows = [*prefixed(self.rows), *self._others()]
        body = [Row((), tuple(n for n in row.theirs if n.startswith("{p}")), row.change) for row in rows]
        return "{p}" + name if knows(body, "", name) else name

    def published(self, given: Data) -> Data:
        """The configuration as it is written to ``config.json``."""
        return dict(given)

    def config_of(self, facts: Facts) -> Data:
        """A configuration for a model that was not read from one; Refusal where the family has no words for it."""
        raise Refusal(f"{self.title} configurations are not written from a spec")

    def examples(self) -> list[tuple[str, Data]]:
        """(published class, small configuration) pairs that the tests build, read, write and compare."""
        return []


def prefixed(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of a body, whose published names stand behind the prefix."""
    return tuple(
        Row(row.ours, tuple(name if "{p}" in name else "{p}" + name for name in row.theirs), row.change) for row in rows
    )


class Facts:
    """What a configuration wants to know of a model built from a spec, read from its modules."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.width: int = model.width
        self.stem = model.stem
        self.layers = 1 + max((item.block for item in model.items()), default=-1)
        self.parts: list[Any] = [part for _, part in model.parts()]
        self.norm = next((item.norm for item in model.items() if getattr(item, "norm", None) is not None), None)

    def part(self, *names: str) -> Any:
        """The first part registered under one of ``names``; Refusal where there is none."""
        for part in self.parts:
            if getattr(type(part), "registered", ("", ""))[1] in names:
                return part
        raise Refusal(f"it has no {' or '.join(names)}")

    @property
    def attention(self) -> Any:
        return self.part("attention")

    @property
    def mlp(self) -> Any:
        return self.part("mlp", "gated-mlp")

    @property
    def hidden(self) -> int:
        return self.mlp.up.out_features

    @property
    def eps(self) -> float:
        if self.norm is None:
            raise Refusal("it has no norms")
        return self.norm.eps

    @property
    def positions(self) -> Any:
        found = getattr(self.stem, "positions", None)
        if found is None or found.table is None:
            raise Refusal("it has no learned positions")
        return found

    @property
    def order(self) -> str:
        return next((item.order for item in self.model.items() if hasattr(item, "order")), "pre")

    @property
    def tied(self) -> bool:
        """Whether a language head reads the token table; true where there is none, as configurations say then."""
        heads = [head for head in self.model.heads.values() if hasattr(head, "tied") and hasattr(head, "tie")]
        return all(head.tied for head in heads)

    def act(self, *preferred: str) -> str:
        """The published name of the MLP's activation."""
        for name in (*preferred, *ACTIVATIONS):
            if ACTIVATIONS.get(name) is self.mlp.activation:
                return name
        raise Refusal("its activation has no published name")


def labelled(c: Config) -> Data:
    return {"classes": c.classes, "labels": c.labels}


def states(c: Config) -> Data:
    """The head of a class without one."""
    return {"part": "states"}


def language(c: Config) -> Data:
    """The head of a language model, whose table is the stem's where the configuration says so."""
    return {"part": "lm", "tied": True} if c.tie_word_embeddings else {"part": "lm", "vocab": c.vocab_size}


def sequence_head(c: Config, **options: Any) -> Data:
    """A classifier of rows, or a regression where the configuration says so (one output, or by its problem type)."""
    kind = c.get("problem_type")
    if kind == "regression" or (kind is None and c.classes == 1):
        return lean({"part": "regression", "outputs": c.classes, **options})
    return lean({"part": "sequence-classifier", **labelled(c), **options})


def token_head(c: Config, **options: Any) -> Data:
    return lean({"part": "token-classifier", **labelled(c), **options})


def lean(node: Data) -> Data:
    """A node without options that say nothing."""
    return {key: value for key, value in node.items() if not (key == "dropout" and value == 0.0) and value is not None}


def layernorm(eps: float) -> Data:
    return {"part": "layernorm", "eps": eps}


def assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of a model's parameters, by name, without copying them."""
    for name, tensor in tensors.items():
        *way, last = name.split(".")
        holder = model.get_submodule(".".join(way))
        holder._parameters[last] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
