"""``retrieval``: the user's own queries and documents, ranked like ``retrieval/stdlib``.

One pair a row in ``pairs.jsonl`` (or .csv, .tsv, .parquet, or a saved data set): a query and a document that answers
it. Repeated queries are one query with several right documents, repeated documents one document; pairs that share a
text stay on one side of the splits. Cost: reading the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from formwright.kit.errors import DataError, all_of
from formwright.registry import register
from formwright.tasks._retrieval import Pair, RetrievalTask
from formwright.tasks.tables import Table, check_text, guess, read_table

SHARES = (0.3, 0.3, 0.4)
QUERIES = ("query", "queries", "question", "anchor", "search")
DOCUMENTS = ("document", "documents", "doc", "passage", "positive", "answer", "context", "text")


@register("task", "retrieval", summary="rank your own documents for your own queries: --data pairs.jsonl")
class Retrieval(RetrievalTask):
    """MRR@10 on pairs from a table.

    data: the file. query, document: its columns; guessed where exactly one fits, and the guess is said.
    pool: documents per pool at most. strict: refuse rows with an empty query or document instead of skipping them.

    Raises:
        DataError: no such file or column, not UTF-8, too few pairs.
    """

    def __init__(
        self,
        data: str | Path,
        query: str | None = None,
        document: str | None = None,
        pool: int = 1500,
        seed: int = 0,
        strict: bool = False,
        rows: int = 32,
        similarity: Literal["cosine", "dot"] = "cosine",
    ) -> None:
        table = read_table(data)
        notes = list(table.notes)
        all_of(DataError, [table.missing(name) for name in (query, document) if name and name not in table.columns])
        taken: list[str] = []
        for given, what, names in ((query, "query", QUERIES), (document, "document", DOCUMENTS)):
            column = given
            if column is None:
                rest = [name for name in table.columns if name not in (query, document, *taken)]
                column, said = guess(table, what, f"--{what}", names, rest)
                notes.append(said)
            taken.append(column)
        for column, option in zip(taken, ("--query", "--document")):
            check_text(table, column, option)
        if taken[0] == taken[1]:
            raise DataError(f'{table.name}: query and document are the same column "{taken[0]}"')
        pairs = _pairs(table, taken[0], taken[1], strict, notes)
        super().__init__(
            table.name, pairs, shares=SHARES, seed=seed, pool=pool, similarity=similarity, rows=rows, notes=notes
        )


def _pairs(table: Table, query: str, document: str, strict: bool, notes: list[str]) -> list[Pair]:
    """The rows with both texts, grouped so that rows sharing a query or a document are one unit."""
    full: list[tuple[str, str]] = []
    empty: list[int] = []
    for row, line in zip(table.rows, table.lines):
        texts = row[query].strip(), row[document].strip()
        if all(texts):
            full.append(texts)
        else:
            empty.append(line)
    if empty:
        listed = table.places(empty)
        if strict:
            raise DataError(f"{table.name}: empty query or document in {listed}")
        notes.append(f"{len(empty)} rows skipped: empty query or document ({listed})")
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(key: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for asked, answer in full:
        one, other = sorted((root(("q", asked)), root(("d", answer))))
        parent[other] = one
    return [Pair(asked, answer, "\0".join(root(("q", asked)))) for asked, answer in full]
