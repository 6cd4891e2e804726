"""The picture of samples: generations of chosen points of a front, beside the training images nearest to them."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from mdiff.report.figures import COLORS, short
from mdiff.report.front import Front, Fronts
from mdiff.report.front_cells import Measure
from mdiff.report.front_figures import SOFT, style
from mdiff.report.front_settings import Setting
from mdiff.report.front_words import named
from mdiff.types import Estimate

_SHOWN, _SIDE = 6, 4
"""Settings in the picture, and generations along one side of each."""


def samples(found: Fronts, front: Front) -> Figure | None:
    """Generations of standard training and of settings on the front, beside the training images nearest to them.

    Of each setting the first seed's cell, its generations drawn at random by the audit; those the ratio rule calls
    copies are framed. None where no chosen cell has pictures.
    """
    chosen = [
        (one, arrays) for one in _chosen(front, found.quality) if (arrays := _pictures(one)) is not None
    ]
    if not chosen:
        return None
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    with matplotlib.rc_context(style()):
        room = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)
        figure = Figure(figsize=(3.7 * columns, 2.35 * rows), layout=room)
        grid = figure.subplots(rows, 2 * columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for k, (one, (generated, nearest, copied)) in enumerate(chosen):
            left, right = grid[k // columns, 2 * (k % columns) : 2 * (k % columns) + 2]
            point = front.means[one.name]
            for axes, images in ((left, generated), (right, nearest)):
                axes.imshow(_mosaic(images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            _frame(left, generated.shape, copied)
            _frame(right, nearest.shape, np.zeros_like(copied))
            name = f"standard training ({one.name})" if one.standard else one.name
            place = "" if point.on_front else ", dominated"
            numbers = f"{_number(point.memorized, found.memorized)}, {_number(point.quality, found.quality)}"
            left.set_title(f"{short(name, 44)}{place}\n{numbers}", loc="left", fontsize=8.5)
            for axes, text in ((left, "generations"), (right, "nearest in training")):
                axes.text(
                    0.5, -0.02, text, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=SOFT
                )
        return figure


def _chosen(front: Front, quality: Measure) -> list[Setting]:
    """Standard training, and of the front as many as fit, spread from best quality to least memorization."""
    standard = [one for one in front.settings if one.standard and one.name in front.means][:2]
    on = [
        one
        for one in front.settings
        if one not in standard and one.name in front.means and front.means[one.name].on_front
    ]
    on.sort(key=lambda one: quality.sign * front.means[one.name].quality.value)
    room = min(len(on), _SHOWN - len(standard))
    picked = np.unique(np.linspace(0, len(on) - 1, room).round().astype(int))
    return [*standard, *(on[i] for i in picked)]


def _pictures(one: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """uint8 generations and their nearest training images [K,H,W,C], and which are copies."""
    for cell in one.measured.values():
        assert cell.run is not None
        arrays = cell.run.arrays
        if "random_generated" in arrays:
            index = arrays["random_index"][: _SIDE**2]
            copied = arrays["memorized"][index] if "memorized" in arrays else np.zeros(len(index), bool)
            return arrays["random_generated"][: len(index)], arrays["random_nearest"][: len(index)], copied
    return None


def _mosaic(images: np.ndarray) -> np.ndarray:
    """[K,H,W,C] as one picture, near to a square, with white room between."""
    corners, (rows, columns) = _corners(images.shape)
    out = np.full((rows, columns, images.shape[3]), 255, np.uint8)
    for (top, left), image in zip(corners, images, strict=True):
        out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out[..., 0] if images.shape[3] == 1 else out


def _frame(axes: Axes, shape: tuple[int, ...], which: np.ndarray) -> None:
    """A frame around each of the images of a mosaic that `which` [K] marks."""
    room = _room(shape) / 2
    corners, (rows, columns) = _corners(shape)
    for i in np.flatnonzero(which):
        corner = (corners[i][1] - 0.5 - room / 2, corners[i][0] - 0.5 - room / 2)
        axes.add_patch(Rectangle(corner, shape[2] + room, shape[1] + room, fill=False, ec=COLORS[1], lw=1.5))
    axes.set_xlim(-0.5 - room, columns - 0.5 + room)
    axes.set_ylim(rows - 0.5 + room, -0.5 - room)


def _corners(shape: tuple[int, ...]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(top, left) of each image of a mosaic, and its (height, width), in pixels."""
    count, height, width = shape[:3]
    side, room = math.ceil(math.sqrt(count)), _room(shape)
    corners = [((i // side) * (height + room), (i % side) * (width + room)) for i in range(count)]
    return corners, (math.ceil(count / side) * (height + room) - room, side * (width + room) - room)


def _room(shape: tuple[int, ...]) -> int:
    return max(2, round(max(shape[1:3]) / 8))


def _number(value: Estimate, measure: Measure) -> str:
    text = f"{100 * value.value:.1f} %" if measure.kind == "rate" else f"{value.value:.3g}"
    return f"{named(measure)} {text}"
