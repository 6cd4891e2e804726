"""Probe results as the template shows them: per probe one table with the runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mdiff.probes.records import Measure, ProbeResult, Table
from mdiff.report import figures, words
from mdiff.report.collect import Run
from mdiff.report.html import encode
from mdiff.types import Estimate

_BETTER = {"lower": "Lower is better.", "higher": "Higher is better.", "": ""}
ABSENT = "absent"


def sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One section per probe that any run has, in the order of first appearance."""
    return [_section(name, runs) for name in dict.fromkeys(name for run in runs for name in run.probes)]


def cell(measure: Measure) -> tuple[str, str, str]:
    """(value with unit, interval, count) of a number; ("absent", "", "") when there is none."""
    found = measure.estimate
    if found is None:
        return ABSENT, "", ""
    value, interval = words.shown(found, "rate" if measure.unit == "%" else "distance")
    unit = "" if measure.unit in ("%", "") else f"\N{NO-BREAK SPACE}{measure.unit}"
    return value + unit, interval, f"n = {found.n:,}"


def plain(value: Any) -> str:
    """A value of a probe's table as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return words.distance(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def sentence(text: str) -> str:
    """A remark as a sentence: with a capital, and a full stop."""
    text = text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".!?" else f"{text}."


def _section(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    found = [(i, run, run.probes[name]) for i, run in enumerate(runs) if name in run.probes]
    results = [result for *_, result in found]
    return {
        "name": name,
        "title": results[0].title,
        "space": ", ".join(dict.fromkeys(result.space for result in results)),
        "missing": [run.name for run in runs if name not in run.probes],
        "rows": [_row(key, name, runs) for key in _keys(results)],
        "tables": _tables(found),
        "curves": _curves(found),
        "notes": said([(run.name, [*map(sentence, result.notes)]) for _, run, result in found]),
    }


def _keys(results: Sequence[ProbeResult]) -> list[str]:
    return list(dict.fromkeys(row.key for result in results for row in result.rows))


def _row(key: str, name: str, runs: Sequence[Run]) -> dict[str, Any]:
    by_run = [
        {row.key: row for row in run.probes[name].rows}.get(key) if name in run.probes else None
        for run in runs
    ]
    known = next(row for row in by_run if row is not None)
    notes = said(
        [(run.name, [sentence(row.note)]) for run, row in zip(runs, by_run, strict=True) if row and row.note]
    )
    cells = []
    for row in by_run:
        value, interval, n = ("–", "", "") if row is None else cell(row)
        sort = None if row is None or row.estimate is None else row.estimate.value
        cells.append({"value": value, "interval": interval, "n": n, "sort": sort})
    return {
        "label": known.label[:1].upper() + known.label[1:],
        "notes": notes,
        "better": _BETTER[known.better],
        "cells": cells,
    }


def _tables(found: Sequence[tuple[int, Run, ProbeResult]]) -> list[dict[str, Any]]:
    """Tables of one title and columns are one table, with a column that names the run."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[str, Table]]] = {}
    for _, run, result in found:
        for table in result.tables:
            groups.setdefault((table.title, tuple(table.columns)), []).append((run.name, table))
    several = len(found) > 1
    return [
        {
            "title": title,
            "columns": (["run"] if several else []) + list(columns),
            "rows": [
                ([{"text": run, "sort": None}] if several else [])
                + [{"text": plain(x), "sort": x if isinstance(x, int | float) else None} for x in row]
                for run, table in tables
                for row in table.rows
            ],
        }
        for (title, columns), tables in groups.items()
    ]


def _curves(found: Sequence[tuple[int, Run, ProbeResult]]) -> list[dict[str, str]]:
    groups: dict[str, list[tuple[int, str, Any]]] = {}
    for i, run, result in found:
        for curve in result.curves:
            groups.setdefault(curve.title, []).append((i, run.name, curve))
    plots = [(title, figures.probe_curve(curves)) for title, curves in groups.items()]
    return [
        {"alt": title, "caption": title, "uri": encode("image/svg+xml", plot.svg.encode())}
        for title, plot in plots
        if plot is not None
    ]


def said(by_run: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, str]]:
    """Every sentence once, with the names of the runs it is about unless that is all of them."""
    by_text: dict[str, list[str]] = {}
    for name, texts in by_run:
        for text in texts:
            by_text.setdefault(str(text), []).append(name)
    return [
        {"text": text, "who": "" if len(names) == len(by_run) else ", ".join(names)}
        for text, names in by_text.items()
    ]


def from_json(tree: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Label and number as text, by key, of the measures of one probe in `report.json`."""
    rows = {}
    for row in tree["measures"]:
        low, high = (math.nan if row[end] is None else row[end] for end in ("low", "high"))
        found = None if row["value"] is None else Estimate(row["value"], low, high, row["n"])
        value, interval, n = cell(Measure(row["key"], row["label"], found, row["unit"]))
        rows[row["key"]] = row["label"], f"{value} {interval} {f'({n})' if n else ''}".strip()
    return rows
