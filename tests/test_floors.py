"""A module imports only from floors below its own, or from its own folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mdiff"
FLOORS = {
    0: (
        "errors",
        "types",
        "keys",
        "trees",
        "fields",
        "config",
        "side",
        "nemo",
        "files",
        "console",
        "flops",
        "processes",
        "lock",
    ),
    1: ("process", "data"),
    2: ("nets",),
    3: ("objectives",),
    4: ("train",),
    5: ("sample",),
    6: ("features", "probes"),
    7: ("recipes",),
    8: ("plan", "report", "job", "arguments", "commands", "cli"),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
APART = {("features", "probes"), ("process", "data"), ("data", "process")}


def imports(path: Path) -> set[str]:
    """Parts of mdiff that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "mdiff" else [f"mdiff.{a.name}" for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mdiff.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in FLOOR, f"{own} has no floor; add it to DESIGN and to this test"
    for other in imports(path) - {own}:
        if other not in FLOOR:
            continue  # a name of mdiff/__init__.py
        down = FLOOR[other] < FLOOR[own]
        beside = FLOOR[other] == FLOOR[own] and (FLOOR[own] in (0, 8) or own == "probes")
        assert (down or beside) and (own, other) not in APART, f"{path}: {own} imports {other}"


def test_train_does_not_sample_or_probe():
    for path in (ROOT / "train").glob("*.py"):
        assert not imports(path) & {"sample", "probes", "features", "recipes", "report"}, path


def test_no_tensorflow_and_no_big_files():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "import tensorflow\n" not in text, path
        assert "import tensorflow as" not in text, path
        assert len(text.splitlines()) <= 420, path


def test_tests_need_no_extra_but_dev():
    """`make test` works without the extras `parity` and `docs`."""
    extras = {"torch", "torchmetrics", "mkdocs", "nbconvert", "nbformat", "nbclient", "latex2mathml"}
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & extras, path
