"""Contact sheet of dataset samples with overlays and legends, for visual checks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modeling_gkc.visualization import MAX_SIDE, MIN_SIDE, DrawnSegment, draw_overlay, shade
from modeling_gkc.vocabulary import Vocabulary

from .schema import NO_CLASS, ids_within

PAPER, INK, FAINT_INK = (255, 255, 255), (25, 25, 25), (110, 110, 110)
_MARGIN, _LINE, _SWATCH, _FONT_SIZE = 12, 26, 18, 16
_HATCH_STEP, _HATCH_WIDTH = 14, 3
Color = tuple[int, int, int]


@dataclass
class Sample:
    """Image (H, W, 3) uint8 with its segment ids (H, W) and its segments as in `train.data.schema`."""

    image: np.ndarray
    ids: np.ndarray
    segments: Sequence[Mapping[str, Any]]

    @property
    def classes(self) -> dict[int, int]:
        """Class of each segment id that has a class."""
        return {segment["id"]: segment["category_id"] for segment in self.segments if segment["category_id"] >= 0}


@dataclass
class SheetRow:
    """Row of one or more samples, such as frames of a video, with one legend."""

    title: str
    samples: Sequence[Sample] = ()
    problems: list[str] = field(default_factory=list)


@dataclass
class LegendEntry:
    """Legend entry: a class, its color (None for void), its fraction of the pixels, and its objects and crowds."""

    label: str
    color: Color | None
    share: float
    objects: int = 0
    crowds: int = 0

    @property
    def text(self) -> str:
        """Text of the entry."""
        parts = [self.label, f"{100 * self.share:.0f} %" if self.share >= 0.01 else "< 1 %"]
        parts += [f"{self.objects} objects"] if self.objects > 1 else []
        parts += [f"{self.crowds} crowd"] if self.crowds else []
        return "   ".join(parts)


def draw_sheet(heading: str, rows: Sequence[SheetRow], vocabulary: Vocabulary) -> Image.Image:
    """Draw rows of samples as one image.

    A row shows images and, to the right or below, overlays with outlines and names. Classes have the colors of the
    vocabulary, and further objects of a class have shades of its color. Void is hatched and listed separately.

    Args:
        heading: Heading of the sheet.
        rows: Rows to draw, from top to bottom.
        vocabulary: Names and colors of the classes.

    Returns:
        The sheet as an RGB image.
    """
    drawn = [_draw_row(row, vocabulary) for row in rows]
    heading_height = _LINE + 2 * _MARGIN
    width = max([row.width for row in drawn] + [_text_width(heading) + 2 * _MARGIN])
    sheet = Image.new("RGB", (width, heading_height + sum(row.height for row in drawn)), PAPER)
    ImageDraw.Draw(sheet).text((_MARGIN, heading_height / 2), heading, INK, _font(), anchor="lm")
    top = heading_height
    for row in drawn:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def legend(samples: Sequence[Sample], vocabulary: Vocabulary) -> list[LegendEntry]:
    """Return the legend entries of samples, sorted by decreasing area, with void (pixels without a class) last.

    Args:
        samples: One image, or frames of one video in which an object has the same id.
        vocabulary: Names and colors of the classes.
    """
    areas, objects, crowds = Counter(), {}, {}
    for sample in samples:
        classes = sample.classes
        kept = {segment["id"]: segment["iscrowd"] for segment in sample.segments}
        for number, area in _areas(sample.ids).items():
            category = classes.get(number, NO_CLASS)
            areas[category] += area
            if category != NO_CLASS:
                (crowds if kept[number] else objects).setdefault(category, set()).add(number)
    total, palette = sum(areas.values()), vocabulary.palette
    entries = [
        LegendEntry(
            vocabulary.labels[category],
            palette[category],
            area / total,
            len(objects.get(category, ())),
            len(crowds.get(category, ())),
        )
        for category, area in areas.most_common()
        if category != NO_CLASS
    ]
    void = [LegendEntry("(void)", None, areas[NO_CLASS] / total)] if areas[NO_CLASS] else []
    return entries + void


def overlay(sample: Sample, vocabulary: Vocabulary, shades: Mapping[int, int] | None = None) -> Image.Image:
    """Draw the segments of a sample over its image, with outlines, names and hatched void.

    Args:
        sample: Sample to draw.
        vocabulary: Names and colors of the classes.
        shades: Shade of the class color by segment id. None takes the `shade_steps` of the sample.

    Returns:
        An RGB image of the size that `enlarged` returns.
    """
    shades = shade_steps([sample]) if shades is None else shades
    image = enlarged(sample.image)
    size = image.size
    classes, palette = sample.classes, vocabulary.palette
    # Ids can be as large as 2**24; the present ones are renumbered from 0.
    present = [number for number in ids_within(sample.ids).tolist() if number in classes]
    small = np.full(sample.ids.shape, len(present), dtype=np.int32)
    for index, number in enumerate(present):
        small[sample.ids == number] = index
    small = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.NEAREST))
    crowds = {segment["id"] for segment in sample.segments if segment["iscrowd"]}
    drawn = [
        DrawnSegment(
            index,
            vocabulary.labels[classes[number]] + (" (crowd)" if number in crowds else ""),
            shade(palette[classes[number]], shades.get(number, 0)),
        )
        for index, number in enumerate(present)
    ]
    hatched = np.where((small == len(present))[..., None] & _hatching(size)[..., None], 255, np.asarray(image))
    # `draw_overlay` does not resize an image of this size; the crop removes its legend.
    return draw_overlay(Image.fromarray(hatched.astype(np.uint8)), small, drawn).crop((0, 0, *size))


def shade_steps(samples: Sequence[Sample]) -> dict[int, int]:
    """Return the rank of each segment id among the objects of its class, the same in all frames of a video."""
    classes = {number: category for sample in samples for number, category in sample.classes.items()}
    earlier: Counter[int] = Counter()
    steps = {}
    for number in sorted(classes):
        steps[number] = earlier[classes[number]]
        earlier[classes[number]] += 1
    return steps


def enlarged(image: np.ndarray) -> Image.Image:
    """Resize an image so that its short side is `MIN_SIDE` or its long side `MAX_SIDE`, as `draw_overlay` does."""
    image = Image.fromarray(image)
    scale = min(MIN_SIDE / min(image.size), MAX_SIDE / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def _hatching(size: tuple[int, int]) -> np.ndarray:
    """Return a mask (H, W) bool of diagonal lines."""
    columns, rows = np.arange(size[0]), np.arange(size[1])
    return (columns[None] + rows[:, None]) % _HATCH_STEP < _HATCH_WIDTH


def _areas(ids: np.ndarray) -> dict[int, int]:
    numbers, counts = np.unique(ids, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _draw_row(row: SheetRow, vocabulary: Vocabulary) -> Image.Image:
    """Draw the title, images, overlays and legend of a row."""
    images = _images(row.samples, vocabulary)
    entries = legend(row.samples, vocabulary) if row.samples else []
    body = max(images.height, 8 * _LINE if entries else 0)
    key = _draw_legend(entries, body)
    lines = [row.title, *row.problems]
    head = len(lines) * _LINE + _MARGIN
    width = max(images.width + key.width, *map(_text_width, lines)) + 3 * _MARGIN
    canvas = Image.new("RGB", (width, head + max(body, key.height) + 2 * _MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.line((_MARGIN, 0, width - _MARGIN, 0), FAINT_INK)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + number * _LINE), line, INK, _font())
    canvas.paste(images, (_MARGIN, head))
    canvas.paste(key, (images.width + 2 * _MARGIN, head))
    return canvas


def _images(samples: Sequence[Sample], vocabulary: Vocabulary) -> Image.Image:
    """Draw one sample as image and overlay side by side, or several as a line of images above a line of overlays."""
    if not samples:
        return Image.new("RGB", (1, 1), PAPER)
    shades = shade_steps(samples)
    pairs = [(enlarged(sample.image), overlay(sample, vocabulary, shades)) for sample in samples]
    if len(pairs) == 1:
        return _line_up(pairs[0])
    above, below = (_line_up([pair[place] for pair in pairs]) for place in (0, 1))
    return _line_up([above, below], downwards=True)


def _line_up(images: Sequence[Image.Image], downwards: bool = False) -> Image.Image:
    gap, axis = _MARGIN // 2, int(downwards)
    size = [max(image.size[side] for image in images) for side in (0, 1)]
    size[axis] = sum(image.size[axis] + gap for image in images) - gap
    canvas, place = Image.new("RGB", size, PAPER), [0, 0]
    for image in images:
        canvas.paste(image, tuple(place))
        place[axis] += image.size[axis] + gap
    return canvas


def _draw_legend(entries: Sequence[LegendEntry], height: int) -> Image.Image:
    """Draw legend entries in as many columns as the height requires."""
    if not entries:
        return Image.new("RGB", (1, 1), PAPER)
    per_column = max(1, height // _LINE)
    columns = -(-len(entries) // per_column)
    column_width = _SWATCH + 3 * _MARGIN + max(_text_width(entry.text) for entry in entries)
    canvas = Image.new("RGB", (columns * column_width, min(per_column, len(entries)) * _LINE), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, entry in enumerate(entries):
        column, row = divmod(index, per_column)
        left, middle = column * column_width, row * _LINE + _LINE // 2
        swatch = Image.new("RGB", (_SWATCH, _SWATCH), entry.color or FAINT_INK)
        if entry.color is None:
            swatch.paste(PAPER, mask=Image.fromarray(_hatching(swatch.size)))
        ImageDraw.Draw(swatch).rectangle((0, 0, _SWATCH - 1, _SWATCH - 1), outline=FAINT_INK)
        canvas.paste(swatch, (left, middle - _SWATCH // 2))
        draw.text((left + _SWATCH + _MARGIN, middle), entry.text, INK, _font(), anchor="lm")
    return canvas


def _text_width(text: str) -> int:
    return round(_font().getlength(text))


def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default(size=_FONT_SIZE)
