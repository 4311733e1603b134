"""``formwright prove``: a paper's claims, measured here."""

from __future__ import annotations

from typing import Annotated

import typer

from formwright import registry
from formwright.cli.common import Json, Seed, Threads, emit, set_threads
from formwright.registry import register


@register("verb", "prove", summary="a paper's claims, measured here")
def prove(
    names: Annotated[list[str] | None, typer.Argument(help="proofs by name; all of them without")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="the form of seconds that continuous integration runs")
    ] = False,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """One line a claim: the published figure, the bar, the figure measured here, holds or not. Exit code 1 if any does
    not hold."""
    set_threads(threads)
    chosen = names or registry.names("proof")
    for name in chosen:
        registry.find("proof", name)
    from formwright.proofs.base import prove as run

    proofs = []
    for name in chosen:
        proof = run(name, quick=quick, seed=seed)
        proofs.append(proof)
        if not json:
            paper = registry.find("proof", name).paper
            typer.echo(f"{name}" + (f" · {paper}" if paper else "") + f" · seed {seed} · {proof.minutes:.1f} min")
            for claim in proof.claims:
                typer.echo(f"  {'holds   ' if claim.holds else 'NOT HELD'}  {claim.claim}")
                typer.echo(f"            published {claim.published} · bar {claim.bar} · measured {claim.measured}")
    if json:
        emit([proof.to_dict() for proof in proofs])
    if not all(proof.holds for proof in proofs):
        raise typer.Exit(1)
