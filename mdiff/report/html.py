"""What both pages are made with: the template environment, pictures as data URIs, inlined scripts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

_HERE = Path(__file__).parent


class Script(NamedTuple):
    """An inlined script and the source expression that lets a page run it, and no other."""

    code: Markup
    allow: Markup


def environment() -> jinja2.Environment:
    """Templates of this folder; everything is escaped, and a name that is not given is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def read_asset(name: str) -> str:
    """The text of a style sheet or script of this folder."""
    return (_HERE / name).read_text(encoding="utf-8")


def script(code: str) -> Script:
    """A script to inline; the page's policy names its hash, so that injected scripts stay dead."""
    code = f"\n{code}"  # a leading newline of <script> is part of what is hashed
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return Script(Markup(code), Markup(f"'sha256-{digest}'"))


def embedded_json(tree: Any) -> Markup:
    """Compact JSON that cannot end the script element it stands in."""
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def encode(kind: str, content: bytes) -> str:
    """A data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def data_uri(image: np.ndarray, most: int, lossless: int = 48) -> str:
    """uint8 [H,W,C] as a data URI: PNG up to `lossless` pixels wide, else JPEG shrunk to `most`."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    stream = io.BytesIO()
    if max(picture.size) <= lossless:
        picture.save(stream, "PNG", optimize=True)
        return encode("image/png", stream.getvalue())
    picture.thumbnail((most, most))
    picture.save(stream, "JPEG", quality=85)
    return encode("image/jpeg", stream.getvalue())
