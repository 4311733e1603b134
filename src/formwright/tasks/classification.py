"""``classification``: the user's own table of texts and labels (CSV, TSV, JSONL, Parquet, or a saved data set).

Columns are named, or guessed where exactly one fits; every guess, skipped row and choice of metric is printed before
work. Splits are stratified 30/30/40. Cost: reading the file; a few milliseconds per thousand rows.
"""

from __future__ import annotations

from pathlib import Path

from formwright.kit.errors import DataError, all_of
from formwright.registry import register
from formwright.tasks._classification import Row, TextClassification
from formwright.tasks.tables import Table, check_text, guess, read_table, running_text

TEXTS = ("text", "texts", "body", "sentence", "content", "message", "review", "utterance")
LABELS = ("label", "labels", "class", "category", "target", "intent", "sentiment")


@register("task", "classification", summary="classify your own texts: --data FILE --text COLUMN --label COLUMN")
class Classification(TextClassification):
    """Accuracy or macro-F1 on rows of a table.

    data: the file. text, label, pair (second text), id: its columns. metric: "accuracy", "macro-f1" or None (accuracy,
    or macro-F1 where the largest class exceeds 60 %). strict: refuse rows with an empty text or label instead of
    skipping them. labels_by_index: match labels with the model's by their sorted order.

    Raises:
        DataError: no such file or column, not UTF-8, fewer than two classes, too few rows.
    """

    def __init__(
        self,
        data: str | Path,
        text: str | None = None,
        label: str | None = None,
        pair: str | None = None,
        id: str | None = None,
        metric: str | None = None,
        seed: int = 0,
        strict: bool = False,
        labels_by_index: bool = False,
        rows: int = 32,
    ) -> None:
        table = read_table(data)
        named = (text, label, pair, id)
        all_of(DataError, [table.missing(name) for name in named if name and name not in table.columns])
        notes = list(table.notes)
        rest = [column for column in table.columns if column not in named]
        if text is None:
            text, said = guess(table, "text", "--text", TEXTS, [c for c in rest if running_text(table, c)])
            notes.append(said)
        check_text(table, text)
        if label is None:
            rest = [column for column in rest if column != text]
            label, said = guess(table, "label", "--label", LABELS, [c for c in rest if _few_values(table, c)])
            notes.append(said)
        if label in (text, pair):
            raise DataError(f'{table.name}: the label and a text are the same column "{label}"')
        found = _rows(table, text, label, pair, id, strict, notes)
        super().__init__(
            table.name,
            found,
            metric=metric,
            seed=seed,
            labels_by_index=labels_by_index,
            rows=rows,
            notes=notes,
        )


def _few_values(table: Table, column: str) -> bool:
    """Two values or more, each twice or more on average, and no more than 100."""
    kinds = len({row[column] for row in table.rows if row[column].strip()})
    return 2 <= kinds <= min(100, len(table.rows) // 2)


def _rows(
    table: Table, text: str, label: str, pair: str | None, id: str | None, strict: bool, notes: list[str]
) -> list[Row]:
    """The rows with text and label; what is empty is noted with its lines, or refused."""
    empty: dict[str, list[int]] = {}
    found = []
    for row, line in zip(table.rows, table.lines):
        hollow = [column for column in (text, label, pair) if column and not row[column].strip()]
        if hollow:
            empty.setdefault(hollow[0], []).append(line)
            continue
        found.append(Row(row[text], row[label].strip(), row[pair] if pair else None, row[id] if id else ""))
    told = [f"empty {column} ({table.places(lines)})" for column, lines in empty.items()]
    if told and strict:
        raise DataError(f"{table.name}: {'; '.join(told)}")
    if told:
        notes.append(f"{sum(len(lines) for lines in empty.values())} rows skipped: {'; '.join(told)}")
    return found
