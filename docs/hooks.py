"""What MkDocs does not do by itself: formulas, notebooks and the reference, without network or scripts.

- `$…$` and `$$…$$` (parsed by arithmatex) become MathML, which browsers render themselves.
- `notebooks/*.ipynb`, committed with their outputs, become pages; they are not run here.
- Every folder of `mdiff/` becomes a page of the reference, with one entry per module.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# What latex2mathml says otherwise than browsers want it: bars in pairs, operators, room after a function's name.
_BARS = re.compile(r"\\([lr])(vert|Vert)\b")
_AFTER = [
    (re.compile(r"<mi>&#x0007E;</mi>"), "<mo>&#x0223C;</mo>"),
    (re.compile(r"<mi>&#x02032;</mi>"), "<mo>&#x02032;</mo>"),
    (re.compile(r'<mo stretchy="true"([^>]*>&#x(?:0007C|02016);)'), r'<mo stretchy="false"\1'),
    (
        re.compile(r"<m[io]>(ln|log|exp|logit|tr|min|max|tan|cos|sin|arctan)</m[io]>(?=<m(?!o)|<msup><mi)"),
        r'<mi>\1</mi><mspace width="0.17em"/>',
    ),
]
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def reference_pages() -> dict[str, str]:
    """`{"reference/process.md": markdown, …}`: a page per folder, an entry per module."""
    folders: dict[str, list[str]] = {}
    for path in sorted((ROOT / "mdiff").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        folder = parts[1] if len(parts) > 2 else "mdiff"
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        folders.setdefault(folder, []).append(".".join(parts))
    pages = {}
    for folder, modules in folders.items():
        title = "mdiff" if folder == "mdiff" else f"mdiff.{folder}"
        entries = "\n".join(f"::: {name}\n" for name in sorted(modules))
        pages[f"reference/{folder}.md"] = f"# {title}\n\n{entries}"
    return dict(sorted(pages.items(), key=lambda item: (item[0] != "reference/mdiff.md", item[0])))


def on_config(config: Any) -> Any:
    """Fill the navigation's empty Reference entry."""
    for entry in config["nav"]:
        if "Reference" in entry:
            entry["Reference"] = [{Path(page).stem: page} for page in reference_pages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the reference and of the notebooks."""
    from mkdocs.structure.files import File

    for name, text in reference_pages().items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs as markdown, and the pictures the markdown shows."""
    import base64

    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = ""  # a kernel sends what is printed in pieces
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![output of the cell above]({name})")
            else:
                printed += "".join(output.get("text", data.get("text/plain", "")))
        if printed.strip():
            parts.append(f"```text\n{printed.rstrip()}\n```")
    parts.append(
        f"*This page is `{path.relative_to(ROOT)}` with its stored outputs; `make notebooks` runs it again.*"
    )
    return "\n\n".join(parts) + "\n", pictures


def mathml(formula: str, block: bool) -> str:
    """A LaTeX formula as MathML."""
    from latex2mathml.converter import convert

    paired = _BARS.sub(lambda m: rf"\{'left' if m[1] == 'l' else 'right'}\{m[1]}{m[2]}", formula)
    made = convert(paired, display="block" if block else "inline")
    for pattern, text in _AFTER:
        made = pattern.sub(text, made)
    return made


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML.

    Raises:
      PluginError: a formula that cannot be read, with its page.
    """
    from mkdocs.exceptions import PluginError

    def replace(found: re.Match[str]) -> str:
        kind, formula = found[1], html.unescape(found[2]).strip()
        try:
            made = mathml(formula, block=kind == "div")
        except Exception as error:  # the library has no common base of its errors
            raise PluginError(f"{page.file.src_path}: formula {formula!r}: {error!r}") from error
        return made if kind == "span" else f'<div class="formula">{made}</div>'

    return _MATH.sub(replace, content)
