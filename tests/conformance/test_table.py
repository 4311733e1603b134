"""The table of exemptions is true: every row names a registered class and an existing check, and says why."""

from __future__ import annotations

import importlib

from conformance.exemptions import EXEMPT
from conformance.samples import CHECKS, cases
from formwright import registry

KINDS = ("mixer", "channel", "combinator", "norm", "combine", "stem", "head", "conditioner", "reshape", "linear")


def test_every_exemption_names_a_class_a_check_and_a_reason() -> None:
    for module in ("test_layer_parts", "test_pieces"):
        importlib.import_module(f"conformance.{module}")
    for (name, check), reason in EXEMPT.items():
        kind, _, rest = name.partition(":")
        assert rest in registry.names(kind)
        assert kind in CHECKS[check]
        assert len(reason.split()) > 5


def test_every_kind_of_piece_is_under_test() -> None:
    checked = {kind for kinds in CHECKS.values() for kind in kinds}
    assert checked == set(KINDS)
    assert {case.name for case in cases("mixer")} == set(registry.names("mixer"))
