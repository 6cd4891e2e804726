"""The documentation does what it says: code blocks run, commands parse, every module has its page."""

import json
import re
import shlex
import sys
from pathlib import Path

import jax
import matplotlib
import pytest

from mdiff import arguments, cli, config
from mdiff.data import builders, source
from mdiff.probes import registry
from mdiff.report import judge_command
from mdiff.sample import steps

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, *kinds: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind in kinds]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """An empty folder to work in; what a guide registers is forgotten, and programs are compiled in haste."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    tables = (steps.METHODS, registry.PROBES, builders.BUILDERS, builders.PIXELS)
    before = [dict(table) for table in tables]
    monkeypatch.setattr(source, "BUILTIN", source.BUILTIN)
    haste = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield tmp_path
    jax.config.update("jax_disable_most_optimizations", haste)
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.mark.parametrize(
    "page", [path for path in PAGES if blocks(path.read_text(), "python")], ids=lambda path: path.stem
)
def test_python_of_a_page_runs(page, scratch, monkeypatch):
    if "data-set" in page.name:
        monkeypatch.setenv("MDIFF_DATA_DIR", str(scratch / "data"))
    run(blocks(page.read_text(), "python"), page)


def test_python_of_the_readme_runs(scratch):
    parts = (ROOT / "README.md").read_text().split("<!-- tested -->")[1:]
    tested = [blocks(part, "python")[0] for part in parts]
    assert tested
    for block in tested:
        run([block], ROOT / "README.md")


def run(cells: list[str], where: Path) -> None:
    """One namespace for all cells of a page, as a reader would type them."""
    names = {"__name__": "guide"}
    for cell in cells:
        exec(compile(cell, str(where), "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_commands_parse(page, monkeypatch):
    """Every `mdiff …` line has options that exist, with values of their type; nothing is run."""

    class ParsedError(Exception):
        pass

    parse = arguments.parse

    def parse_only(*args, **kwargs):
        parse(*args, **kwargs)
        raise ParsedError

    monkeypatch.chdir(ROOT)
    for module in (cli, judge_command):
        monkeypatch.setattr(module, "parse", parse_only)
    monkeypatch.setattr(
        "mdiff.train.workdir.read", lambda folder: type("Stored", (), {"config": config.Config()})
    )
    for line in commands(page.read_text()):
        with pytest.raises(ParsedError):
            assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line


def commands(text: str) -> list[str]:
    joined = "\n".join(blocks(text, "", "bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("mdiff ")]


def test_commands_are_found():
    """The parser of pages above finds them: a page that shows one has one."""
    found = commands((DOCS / "guides/own-images.md").read_text())
    assert "mdiff watch runs/mine" in found and any("--train.eval-every 1000" in line for line in found)


def test_every_module_has_its_entry_in_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    sys.modules.pop("hooks", None)
    import hooks

    entries = re.findall(r"^::: (\S+)$", "\n".join(hooks.reference_pages().values()), re.MULTILINE)
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "mdiff").rglob("*.py")
    }
    assert sorted(entries) == sorted(modules)


def test_links_lead_somewhere():
    """Links between pages, and to pictures; pages made at build time are known by name."""
    made = {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text())):
            if target.startswith("http"):
                continue
            inside = (page.parent / target).resolve().relative_to(DOCS).as_posix()
            assert inside in made or inside.startswith("reference/") or (DOCS / inside).is_file(), (
                page,
                target,
            )


def test_nothing_is_fetched_and_pictures_are_small():
    for path in DOCS.rglob("*"):
        if path.suffix == ".png":
            assert path.stat().st_size < 300_000, path
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text and "http" not in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_run_from_top_to_bottom(notebook):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert notebook.stat().st_size < 600_000


def test_notebook_with_known_truth_runs(scratch):
    cells = json.loads((ROOT / "notebooks/known_truth.ipynb").read_text())["cells"]
    run(["".join(c["source"]) for c in cells if c["cell_type"] == "code"], ROOT / "notebooks")
