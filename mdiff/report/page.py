"""`report.html` and `report.json`: one self-contained page about one run, or several side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from mdiff import __version__
from mdiff.errors import UserError
from mdiff.files import locate, strict, write_text
from mdiff.probes import results
from mdiff.probes.compare import compare
from mdiff.probes.records import ProbeResult
from mdiff.report import explore, figures, probed, views, words
from mdiff.report.collect import Run, as_json, probe_json, read_run
from mdiff.report.html import embedded_json, environment, read_asset, script
from mdiff.types import Estimate

RESERVED = {"title", "seconds", "peak_rss_gb", "versions", "runs", "run", "verdict", "differences", "extra"}
"""Fields of `report.json` that no run may be named like."""


def write_report(
    out: Path, runs: Mapping[str, Path], *, title: str, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write `report.html` and `report.json` about `runs` into `out`.

    Args:
      out: folder for the two files; made when it does not exist.
      runs: name to run folder, in the order to show; the first is what the others are compared with.
      title: heading of the page.
      extra: what only the caller knows: "seconds" (total wall seconds), "peak_rss_gb", "command"; any other
        entry is shown under its own name.

    Returns:
      What was written to `report.json`.

    Raises:
      UserError: no runs, a run without a readable audit, or `out` cannot be written.
    """
    if not runs:
        raise UserError("report: no run given; name at least one run folder")
    read = [read_run(name, locate(folder)) for name, folder in runs.items()]
    paired = _paired(runs)
    report = _report(read, paired, title, dict(extra or {}))
    html = _html(read, report)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    out = locate(out)
    try:
        write_text(out / "report.html", html)
        write_text(out / "report.json", text + "\n")
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot write the report ({error.strerror}); choose another folder"
        ) from None
    return report


def terminal_table(report: Mapping[str, Any]) -> Table:
    """The numbers of `report.json`: one row per measure, one column per run, with intervals.

    Args:
      report: what `write_report` returned.
    """
    table = Table(title=Text(str(report["title"])), title_justify="left")
    table.add_column("")
    for name in report["runs"]:
        table.add_column(Text(name), justify="right")
    entries = [report[name] for name in report["runs"]]
    for name in views.measures(entries):
        cells = []
        for run in entries:
            found = views.entry(run, name)
            cells.append(Text("–" if found is None else _cell_text(name, found)))
        table.add_row(Text(words.measure(name).label), *cells)
    return table


def probe_tables(report: Mapping[str, Any]) -> list[Table]:
    """The numbers of every probe in `report.json`, one table per probe.

    Args:
      report: what `write_report` returned.
    """
    entries = [report[name]["probes"] for name in report["runs"]]
    tables = []
    for probe in dict.fromkeys(name for entry in entries for name in entry):
        known = [entry.get(probe) for entry in entries]
        title = next(tree["title"] for tree in known if tree is not None)
        table = Table(title=Text(title), title_justify="left")
        table.add_column("")
        for name in report["runs"]:
            table.add_column(Text(name), justify="right")
        columns = [{} if tree is None else probed.from_json(tree) for tree in known]
        labels = {key: label for column in columns for key, (label, _) in column.items()}
        for key, label in labels.items():
            table.add_row(
                Text(label), *(Text(column[key][1] if key in column else "–") for column in columns)
            )
        tables.append(table)
    return tables


def probe_table(found: ProbeResult) -> Table:
    """The numbers of one probe's result."""
    return probe_tables({"runs": [""], "": {"probes": {found.probe: probe_json(found)}}})[0]


def _paired(runs: Mapping[str, Path]) -> dict[str, dict[str, Estimate]]:
    """Paired differences of every run to the first; a run that cannot be paired with it is left out."""
    first, *others = ((name, locate(folder)) for name, folder in runs.items())
    found = {}
    for name, folder in others:
        try:
            found[name] = compare(results.load(first[1]), results.load(folder))
        except UserError:  # other images, rules or number of generations: the page compares intervals then
            continue
    return found


def _report(
    runs: Sequence[Run], paired: Mapping[str, Mapping[str, Estimate]], title: str, extra: dict[str, Any]
) -> dict[str, Any]:
    """`report.json`, with nothing in it that JSON cannot hold."""
    ledgers = [run.ledger for run in runs if run.ledger]
    seconds = [sum((ledger.get("seconds") or {}).values()) for ledger in ledgers]
    peaks = [ledger["peak_rss_gb"] for ledger in ledgers if ledger.get("peak_rss_gb") is not None]
    if taken := sorted(RESERVED & {run.name for run in runs}):
        raise UserError(f"run name {taken[0]!r}: is a field of report.json; choose another name")
    entries = {run.name: as_json(run) for run in runs}
    return strict(
        {
            "title": title,
            "seconds": extra.pop("seconds", sum(seconds) if seconds else None),
            "peak_rss_gb": extra.pop("peak_rss_gb", max(peaks, default=None)),
            "versions": _versions(runs),
            "runs": [run.name for run in runs],
            "verdict": words.verdict(runs, paired),
            "differences": {
                f"{name} minus {runs[0].name}": {measure: asdict(value) for measure, value in found.items()}
                for name, found in paired.items()
            },
            "extra": extra,
            **entries,
            **({"run": entries[runs[0].name]} if len(runs) == 1 else {}),
        }
    )


def _html(runs: Sequence[Run], report: Mapping[str, Any]) -> str:
    shown = [views.run_view(run, i, report[run.name]) for i, run in enumerate(runs)]
    curves = views.curve_figures(runs)
    levels = sorted({level for run in runs if (level := words.level(run))})
    sliders = explore.sliders(runs)
    data = {
        "runs": [
            {"name": run.name, "color": figures.color(i), "pairs": explore.pairs(run)}
            | {"pictures": views.stored_pictures(run)}
            for i, run in enumerate(runs)
        ],
        "sliders": sliders,
    }
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            css=Markup(read_asset("page.css")),
            code=script(read_asset("page.js")),
            data=embedded_json(strict(data)),
            sliders=explore.view(runs, sliders),
            bound=explore.ROWS,
            probes=probed.sections(runs),
            runs=shown,
            rows=views.table(runs, report),
            differences=views.differences(report),
            level=levels[0] + " " if len(levels) == 1 else "",
            feature=", ".join(
                sorted({str(run.audit["feature"]) for run in runs if run.audit.get("feature")})
            ),
            glance=views.embedded(
                (
                    "",
                    "Memorized fraction and control with intervals; the numbers are in the table",
                    figures.rates(runs),
                ),
                ("", "Energy distance with intervals; the numbers are in the table", figures.energies(runs)),
            ),
            pictures=any(view["top"] or view["random"] for view in shown),
            has_top=any(view["top"] for view in shown),
            has_random=any(view["random"] for view in shown),
            ratio_rule=" and ".join(words.fraction(cut) for cut in words.thresholds(runs)),
            curves=curves,
            has_curves=any(curves.values()),
            spaces=views.SPACES,
            comparable_losses=len({json.dumps(run.config.get("loss"), sort_keys=True) for run in runs}) == 1,
            notes=views.notes(runs),
            provenance=views.provenance(runs, report),
            provenance_by_run=views.provenance_by_run(runs, report),
            seconds=views.seconds(runs),
            version=__version__,
        )
    )


def _cell_text(name: str, found: Estimate) -> str:
    kind = words.measure(name).kind
    return f"{' '.join(words.shown(found, kind)).strip()} (n = {found.n:,})"


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    """Versions by package; where the runs differ, each run's own."""
    known = {run.name: run.record.get("versions") or run.evaluation.get("versions") or {} for run in runs}
    merged = {}
    for package in dict.fromkeys(package for versions in known.values() for package in versions):
        said = {name: str(versions[package]) for name, versions in known.items() if package in versions}
        same = len(set(said.values())) == 1
        merged[package] = (
            next(iter(said.values())) if same else "; ".join(f"{k}: {v}" for k, v in said.items())
        )
    return merged
