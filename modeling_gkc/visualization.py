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
"""Pictures of results: overlays with a legend and label maps, with Pillow alone. All sizes are (height, width)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 480
MAX_SIDE = 2048
COLOR_SHARE = 0.55
GREY_SHARE = 0.7
VOID_DIMMING = 0.6

Color = tuple[int, int, int]

_BACKGROUND = (255, 255, 255)
_INK = (25, 25, 25)
_FAINT_INK = (110, 110, 110)
_ANCHOR_SIDE = 96


@dataclass
class DrawnSegment:
    """A segment to draw: its value in the map, its name, its colour, and a score or None."""

    id: int
    label: str
    color: Color
    score: float | None = None


def draw_overlay(image: Image.Image, segmentation: np.ndarray, segments: Sequence[DrawnSegment]) -> Image.Image:
    """
    Lay a segmentation over its picture, with outlines, names and a legend of areas.

    Small pictures are enlarged until names can be read, and large ones reduced. Segments are drawn on a greyed
    picture, so that their colours are those of the legend; pixels of no segment keep their colour, dimmed.

    Args:
        image: The picture.
        segmentation: (H, W) integers of the picture's size, each the id of a segment, or another one for none (void).
        segments: What the ids from 0 mean. Ids without a pixel are left out of the legend.

    Returns:
        An RGB picture, the legend at its right, or below a picture wider than 1.6 times its height.

    Raises:
        ValueError: the segmentation's size is not that of the picture.
    """
    if segmentation.shape != (image.height, image.width):
        raise ValueError(
            f"the segmentation is {segmentation.shape}, but the picture {(image.height, image.width)} (height, width)."
        )
    width, height = _canvas_size(image)
    void = max((segment.id for segment in segments), default=-1) + 1
    segmentation = np.where((segmentation < 0) | (segmentation > void), void, segmentation)
    areas = np.bincount(segmentation.ravel(), minlength=void + 1)
    segments = sorted((segment for segment in segments if areas[segment.id]), key=lambda segment: -areas[segment.id])
    small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    shown = _resize_nearest(segmentation, height, width)
    picture = _blend(np.asarray(small), shown, segments)
    font = _font(max(14, min(width, height) // 30))
    _write_names(picture, shown, segments, font)
    shares = [areas[segment.id] / segmentation.size for segment in segments]
    return _add_legend(picture, segments, shares, font)


def shade(color: Color, step: int) -> Color:
    """Another shade of a colour, for another object of its class: lighter and darker in turn; step 0 is the colour."""
    amount = min(0.2 * ((step + 1) // 2), 0.7)
    target = 255 if step % 2 else 0
    return tuple(round(channel + amount * (target - channel)) for channel in color)


def label_map(segmentation: np.ndarray, colors: dict[int, Color], max_id: int = 255) -> Image.Image:
    """
    A segmentation as a picture whose pixel values are the ids, to be saved as PNG.

    Args:
        segmentation: (H, W) integers in 0..65535.
        colors: Colours of ids, for viewers; other ids are black.
        max_id: Largest id that may occur, so that all maps of one kind have the same format.

    Returns:
        An 8-bit palette picture, or a 16-bit grey one for ids above 255.

    Raises:
        ValueError: an id is outside 0..65535, as the void of an instance map is unless another `void_id` is chosen.
    """
    if not (segmentation.min() >= 0 and segmentation.max() <= 65535):
        raise ValueError(
            f"ids must lie in 0..65535, got {segmentation.min()}..{segmentation.max()}: choose such a `void_id` when "
            "the segmentation is made."
        )
    if max(max_id, segmentation.max()) > 255:
        return Image.fromarray(segmentation.astype(np.uint16))
    palette = np.zeros((256, 3), dtype=np.uint8)
    for value, color in colors.items():
        if value < 256:
            palette[value] = color
    picture = Image.fromarray(segmentation.astype(np.uint8))
    picture.putpalette(palette.tobytes())
    return picture


def _canvas_size(image: Image.Image) -> tuple[int, int]:
    """Width and height to draw at: the short side at least `MIN_SIDE`, unless the long one would pass `MAX_SIDE`."""
    scale = max(1.0, MIN_SIDE / min(image.size))
    scale = min(scale, MAX_SIDE / max(image.size))
    return tuple(max(1, round(side * scale)) for side in image.size)


def _resize_nearest(segmentation: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = (np.arange(height) * segmentation.shape[0]) // height
    columns = (np.arange(width) * segmentation.shape[1]) // width
    return segmentation[rows[:, None], columns]


def _blend(picture: np.ndarray, segmentation: np.ndarray, segments: Sequence[DrawnSegment]) -> Image.Image:
    size = int(segmentation.max()) + 1
    colors = np.zeros((size, 3), dtype=np.float32)
    drawn = np.zeros(size, dtype=bool)
    for segment in segments:
        colors[segment.id] = segment.color
        drawn[segment.id] = True
    greyed = GREY_SHARE * picture.mean(axis=-1, keepdims=True) + (1 - GREY_SHARE) * picture
    overlay = (1 - COLOR_SHARE) * greyed + COLOR_SHARE * colors[segmentation]
    blended = np.where(drawn[segmentation][..., None], overlay, VOID_DIMMING * picture).astype(np.uint8)
    blended[_outlines(segmentation)] = _BACKGROUND
    return Image.fromarray(blended)


def _outlines(segmentation: np.ndarray) -> np.ndarray:
    """Pixels (H, W) that touch another segment."""
    edge = np.zeros(segmentation.shape, dtype=bool)
    vertical = segmentation[1:] != segmentation[:-1]
    horizontal = segmentation[:, 1:] != segmentation[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    return edge


def _write_names(
    picture: Image.Image, segmentation: np.ndarray, segments: Sequence[DrawnSegment], font: ImageFont.ImageFont
) -> None:
    """Write each name inside its segment, where it has room; the others are in the legend only."""
    draw = ImageDraw.Draw(picture)
    taken: list[tuple[float, float, float, float]] = []
    for segment in segments:
        inside = segmentation == segment.id
        row, column, room = _anchor(inside)
        left, top, right, bottom = draw.textbbox((0, 0), segment.label, font=font, anchor="mm")
        if room < (bottom - top) / 2 or right - left > 0.9 * picture.width:
            continue
        middle = min(max(column, 4 - left), picture.width - 4 - right)
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
    """Row and column of the pixel farthest from the edge of a mask (H, W), and about how far that is, in pixels."""
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
    picture: Image.Image, segments: Sequence[DrawnSegment], shares: Sequence[float], font: ImageFont.ImageFont
) -> Image.Image:
    rows = _legend_rows(segments, shares)
    line = round(1.7 * sum(font.getmetrics()))
    swatch = round(0.6 * line)
    entry_width = swatch + 3 * line // 2 + max((int(font.getlength(text)) for _, text in rows), default=0)
    below = picture.width > 1.6 * picture.height
    if below:
        columns = max(1, picture.width // entry_width)
        size = (max(picture.width, entry_width), picture.height + line * (-(-len(rows) // columns) + 1))
    else:
        per_column = max(1, picture.height // line - 1)
        columns = max(1, -(-len(rows) // per_column))
        size = (picture.width + entry_width * columns, max(picture.height, line * 2))
    canvas = Image.new("RGB", size, _BACKGROUND)
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for index, (color, text) in enumerate(rows):
        column, row = (index % columns, index // columns) if below else divmod(index, per_column)
        left = line // 2 + column * entry_width + (0 if below else picture.width)
        middle = line + row * line + (picture.height if below else 0)
        box = (left, middle - swatch // 2, left + swatch, middle + swatch // 2)
        draw.rounded_rectangle(box, radius=3, fill=color, outline=_FAINT_INK)
        draw.text((left + swatch + line // 3, middle), text, font=font, fill=_INK, anchor="lm")
    return canvas


def _legend_rows(segments: Sequence[DrawnSegment], shares: Sequence[float]) -> list[tuple[Color | None, str]]:
    """Colour and text of the legend's entries, in the segments' order, void last."""
    rows = []
    for segment, share in zip(segments, shares, strict=True):
        score = "" if segment.score is None else f"   {segment.score:.2f}"
        rows.append((segment.color, f"{segment.label}   {_percent(share)}{score}"))
    void = 1 - sum(shares)
    if void > 1e-9:
        rows.append((None, f"(none)   {_percent(void)}"))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


__all__ = ["DrawnSegment", "draw_overlay", "label_map", "shade"]
