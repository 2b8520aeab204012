# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Drawing of results with Pillow: overlays with a legend, and label maps. All sizes are (height, width)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 480
MAX_SIDE = 2048
COLOR_OPACITY = 0.55
DESATURATION = 0.7
VOID_BRIGHTNESS = 0.6

Color = tuple[int, int, int]

_BACKGROUND = (255, 255, 255)
_INK = (25, 25, 25)
_FAINT_INK = (110, 110, 110)
_ANCHOR_SIDE = 96


@dataclass
class DrawnSegment:
    """Segment to draw.

    Attributes:
        id: Its value in the segmentation.
        label: Its name.
        color: Its color (red, green, blue).
        score: Its score, None if it has none.
    """

    id: int
    label: str
    color: Color
    score: float | None = None


def draw_overlay(image: Image.Image, segmentation: np.ndarray, segments: Sequence[DrawnSegment]) -> Image.Image:
    """Draw a segmentation over its image, with outlines, names and a legend of areas.

    Small images are enlarged until names are legible, and large ones reduced. Segments are drawn on a desaturated
    image, so that their colors match the legend; pixels without a segment keep their color and are darkened.

    Args:
        image: The image.
        segmentation: Segment ids (H, W) in the size of the image; ids of no segment are void.
        segments: The segments. Segments without pixels are omitted from the legend.

    Returns:
        RGB image with the legend on the right, or below if the image is wider than 1.6 times its height.

    Raises:
        ValueError: The segmentation does not have the size of the image.
    """
    if segmentation.shape != (image.height, image.width):
        raise ValueError(
            f"The segmentation has the size {segmentation.shape}, but the image {(image.height, image.width)} "
            "(height, width): resize one of them."
        )
    width, height = _canvas_size(image)
    void = max((segment.id for segment in segments), default=-1) + 1
    segmentation = np.where((segmentation < 0) | (segmentation > void), void, segmentation)
    areas = np.bincount(segmentation.ravel(), minlength=void + 1)
    segments = sorted((segment for segment in segments if areas[segment.id]), key=lambda segment: -areas[segment.id])
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    shown = _resize_nearest(segmentation, height, width)
    overlay = _blend(np.asarray(resized), shown, segments)
    font = ImageFont.load_default(size=max(14, min(width, height) // 30))
    _write_names(overlay, shown, segments, font)
    fractions = [areas[segment.id] / segmentation.size for segment in segments]
    return _add_legend(overlay, segments, fractions, font)


def shade(color: Color, step: int) -> Color:
    """Return a shade of a color for another object of the same class.

    Args:
        color: Color of the class.
        step: Number of the object: 0 keeps the color, odd steps are lighter and even ones darker.
    """
    amount = min(0.2 * ((step + 1) // 2), 0.7)
    target = 255 if step % 2 else 0
    return tuple(round(channel + amount * (target - channel)) for channel in color)


def label_map(segmentation: np.ndarray, colors: dict[int, Color], max_id: int = 255) -> Image.Image:
    """Return a segmentation as an image whose pixel values are the ids, to be saved as PNG.

    Args:
        segmentation: Ids (H, W) in 0..65535.
        colors: Colors by id, for image viewers; other ids are black.
        max_id: Largest id that may occur, so that all maps of one kind have the same format.

    Returns:
        An 8-bit palette image, or a 16-bit grayscale image for ids above 255.

    Raises:
        ValueError: An id is outside of 0..65535, such as a void id of -1.
    """
    if not (segmentation.min() >= 0 and segmentation.max() <= 65535):
        raise ValueError(
            f"Ids must be in 0..65535, got {segmentation.min()}..{segmentation.max()}: pass such a `void_id` to the "
            "post-processing."
        )
    if max(max_id, segmentation.max()) > 255:
        return Image.fromarray(segmentation.astype(np.uint16))
    palette = np.zeros((256, 3), dtype=np.uint8)
    for value, color in colors.items():
        if value < 256:
            palette[value] = color
    image = Image.fromarray(segmentation.astype(np.uint8))
    image.putpalette(palette.tobytes())
    return image


def _canvas_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height to draw at: the short side at least `MIN_SIDE`, the long one at most `MAX_SIDE`."""
    scale = max(1.0, MIN_SIDE / min(image.size))
    scale = min(scale, MAX_SIDE / max(image.size))
    return tuple(max(1, round(side * scale)) for side in image.size)


def _resize_nearest(segmentation: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = (np.arange(height) * segmentation.shape[0]) // height
    columns = (np.arange(width) * segmentation.shape[1]) // width
    return segmentation[rows[:, None], columns]


def _blend(image: np.ndarray, segmentation: np.ndarray, segments: Sequence[DrawnSegment]) -> Image.Image:
    size = int(segmentation.max()) + 1
    colors = np.zeros((size, 3), dtype=np.float32)
    drawn = np.zeros(size, dtype=bool)
    for segment in segments:
        colors[segment.id] = segment.color
        drawn[segment.id] = True
    desaturated = DESATURATION * image.mean(axis=-1, keepdims=True) + (1 - DESATURATION) * image
    overlay = (1 - COLOR_OPACITY) * desaturated + COLOR_OPACITY * colors[segmentation]
    blended = np.where(drawn[segmentation][..., None], overlay, VOID_BRIGHTNESS * image).astype(np.uint8)
    blended[_outlines(segmentation)] = _BACKGROUND
    return Image.fromarray(blended)


def _outlines(segmentation: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) of the pixels that touch another segment."""
    edge = np.zeros(segmentation.shape, dtype=bool)
    vertical = segmentation[1:] != segmentation[:-1]
    horizontal = segmentation[:, 1:] != segmentation[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    return edge


def _write_names(
    image: Image.Image, segmentation: np.ndarray, segments: Sequence[DrawnSegment], font: ImageFont.ImageFont
) -> None:
    """Write each name inside its segment if there is room; the legend lists all names."""
    draw = ImageDraw.Draw(image)
    taken: list[tuple[float, float, float, float]] = []
    for segment in segments:
        inside = segmentation == segment.id
        row, column, room = _anchor(inside)
        left, top, right, bottom = draw.textbbox((0, 0), segment.label, font=font, anchor="mm")
        if room < (bottom - top) / 2 or right - left > 0.9 * image.width:
            continue
        middle = min(max(column, 4 - left), image.width - 4 - right)
        step = round(bottom - top) + 8
        for candidate in (row, row + step, row - step, row + 2 * step, row - 2 * step):
            box = (middle + left - 4, candidate + top - 3, middle + right + 4, candidate + bottom + 3)
            if 0 <= candidate < len(inside) and inside[candidate, column] and not any(_overlap(box, b) for b in taken):
                taken.append(box)
                draw.rounded_rectangle(box, radius=4, fill=_INK)
                draw.text((middle, candidate), segment.label, font=font, fill=_BACKGROUND, anchor="mm")
                break


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _anchor(inside: np.ndarray) -> tuple[int, int, float]:
    """Return row and column of the pixel of a mask (H, W) farthest from its edge, and that distance in pixels."""
    height, width = inside.shape
    step = max(1, max(height, width) // _ANCHOR_SIDE)
    core = np.pad(inside[step // 2 :: step, step // 2 :: step], 1)
    depth = 0
    while core.any():
        last, depth = core, depth + 1
        core = core.copy()
        core[1:-1, 1:-1] &= last[:-2, 1:-1] & last[2:, 1:-1] & last[1:-1, :-2] & last[1:-1, 2:]
    if depth == 0:
        rows, columns = np.nonzero(inside)
        return int(rows[0]), int(columns[0]), 1.0
    rows, columns = np.nonzero(last[1:-1, 1:-1])
    nearest = np.argmin(np.hypot(rows - rows.mean(), columns - columns.mean()))
    return int(rows[nearest]) * step + step // 2, int(columns[nearest]) * step + step // 2, depth * step


def _add_legend(
    image: Image.Image, segments: Sequence[DrawnSegment], fractions: Sequence[float], font: ImageFont.ImageFont
) -> Image.Image:
    rows = _legend_rows(segments, fractions)
    line = round(1.7 * sum(font.getmetrics()))
    swatch = round(0.6 * line)
    entry_width = swatch + 3 * line // 2 + max((int(font.getlength(text)) for _, text in rows), default=0)
    below = image.width > 1.6 * image.height
    if below:
        columns = max(1, image.width // entry_width)
        size = (max(image.width, entry_width), image.height + line * (-(-len(rows) // columns) + 1))
    else:
        per_column = max(1, image.height // line - 1)
        columns = max(1, -(-len(rows) // per_column))
        size = (image.width + entry_width * columns, max(image.height, line * 2))
    canvas = Image.new("RGB", size, _BACKGROUND)
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    for index, (color, text) in enumerate(rows):
        column, row = (index % columns, index // columns) if below else divmod(index, per_column)
        left = line // 2 + column * entry_width + (0 if below else image.width)
        middle = line + row * line + (image.height if below else 0)
        box = (left, middle - swatch // 2, left + swatch, middle + swatch // 2)
        draw.rounded_rectangle(box, radius=3, fill=color, outline=_FAINT_INK)
        draw.text((left + swatch + line // 3, middle), text, font=font, fill=_INK, anchor="lm")
    return canvas


def _legend_rows(segments: Sequence[DrawnSegment], fractions: Sequence[float]) -> list[tuple[Color | None, str]]:
    """Return color and text of the legend's entries, in the order of the segments, void last."""
    rows = []
    for segment, fraction in zip(segments, fractions, strict=True):
        score = "" if segment.score is None else f"   {segment.score:.2f}"
        rows.append((segment.color, f"{segment.label}   {_percent(fraction)}{score}"))
    void = 1 - sum(fractions)
    if void > 1e-9:
        rows.append((None, f"(none)   {_percent(void)}"))
    return rows


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.01 else "< 1 %"


__all__ = ["DrawnSegment", "draw_overlay", "label_map", "shade"]
