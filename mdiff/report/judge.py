"""The page on which a person judges pairs: one HTML file that needs no server and shows no scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mdiff.errors import UserError
from mdiff.files import locate, write_text
from mdiff.probes import results, verdicts
from mdiff.probes.results import AuditResult
from mdiff.probes.verdicts import Sheet
from mdiff.report.html import data_uri, environment, read_asset, script

_PIXELS = 256  # larger pictures are shrunk


def export(
    folder: Path,
    top: int | None = None,
    controls: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> tuple[Path, Sheet]:
    """Write `judge.html` about an audited run, or about an audit of folders.

    Args:
      folder: holds `audit.json`. A run's pictures come from `samples.npz` and its data; an audit of folders
        stores only its most copy-like pairs, so there are no others, and no controls.
      top: see `verdicts.choose`.
      controls: see `verdicts.choose`.
      seed: of the order shown.
      out: where to write; `folder` when None.

    Returns:
      The page's path and the pairs on it.

    Raises:
      UserError: no audit there, pictures that are not those audited, or numbers that do not fit.
    """
    folder = locate(folder)
    result = results.load(folder)
    if (folder / "config.json").is_file():
        sheet = verdicts.choose(result, top, controls, seed)
        pictures = _of_run(folder, result, sheet)
    else:
        stored = len(result.pictures["top_index"])
        for name, value, most in (("top", top, stored), ("controls", controls, 0)):
            if (value or 0) > most:
                raise UserError(
                    f"--{name} {value}: {folder} is no run but an audit of folders, which stores {stored} pairs "
                    f"and no control pictures; give at most {most}"
                )
        sheet = verdicts.choose(result, min(stored, 100) if top is None else top, 0, seed)
        pictures = _stored(result, sheet)
    path = (folder if out is None else locate(out)) / "judge.html"
    try:
        write_text(path, _html(sheet, pictures))
    except OSError as error:
        raise UserError(f"--out {path.parent}: {error.strerror}; choose another folder") from None
    return path, sheet


def _of_run(folder: Path, result: AuditResult, sheet: Sheet) -> list[tuple[np.ndarray, np.ndarray]]:
    from mdiff.recipes import experiment

    again = f"run mdiff eval --workdir {folder} again"
    if not (folder / "samples.npz").is_file():
        raise UserError(f"{folder}: no samples.npz; {again}")
    with (folder / "samples.npz").open("rb") as file, np.load(file) as stored:
        generated = stored["x"]
    index = result.pictures["top_index"]
    if len(generated) != len(result.rows["ratio"]) or not np.array_equal(
        generated[index], result.pictures["top_generated"]
    ):
        raise UserError(f"{folder / 'samples.npz'}: not the images that were audited; {again}")
    subset = experiment.reopen(folder).subset
    pairs = []
    for i, match, control, flipped in zip(
        sheet.generation, sheet.match, sheet.control, sheet.flipped, strict=True
    ):
        beside = (subset.heldout if control else subset.train).x[match]
        pairs.append((generated[i], beside[:, ::-1] if flipped else beside))
    return pairs


def _stored(result: AuditResult, sheet: Sheet) -> list[tuple[np.ndarray, np.ndarray]]:
    place = {int(i): k for k, i in enumerate(result.pictures["top_index"])}
    return [
        (result.pictures["top_generated"][place[int(i)]], result.pictures["top_nearest"][place[int(i)]])
        for i in sheet.generation
    ]


def _html(sheet: Sheet, pictures: list[tuple[np.ndarray, np.ndarray]]) -> str:
    # Whatever tells a control from another pair would unblind the judge: no ids, ranks or scores.
    known: dict[str, Any] = {
        "format": verdicts.FORMAT,
        "sheet": sheet.digest,
        "top": sheet.top,
        "controls": sheet.controls,
        "seed": sheet.seed,
    }
    code = read_asset("judge.js")
    return (
        environment()
        .get_template("judge.html")
        .render(
            css=Markup(read_asset("judge.css")),
            code=script(code),
            known=Markup(json.dumps(known)),
            answers=verdicts.ANSWERS,
            pairs=[
                {"left": data_uri(left, _PIXELS), "right": data_uri(right, _PIXELS)}
                for left, right in pictures
            ],
            small=bool(pictures) and max(pictures[0][0].shape[:2]) <= _PIXELS // 2,
        )
    )
