"""Outlines and rasterized masks of the mini-world's shapes."""

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 2


def _regular(corners: int, radius: float) -> np.ndarray:
    angles = 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _box(half_width: float, half_height: float) -> np.ndarray:
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    return np.array(corners) * (half_width, half_height)


def _star() -> np.ndarray:
    return np.where(np.arange(10)[:, None] % 2 == 0, _regular(10, 1.1), _regular(10, 0.45))


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 50)
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -height], axis=1) / 15


def _drop() -> np.ndarray:
    t = np.linspace(0.8, 2 * np.pi - 0.8, 36)
    belly = np.stack([0.7 * np.cos(t) - 0.35, 0.7 * np.sin(t)], axis=1)
    return np.concatenate([belly, [(1.25, 0.0)]])


_ARROW = np.array([(-1.1, -0.25), (0.1, -0.25), (0.1, -0.8), (1.15, 0), (0.1, 0.8), (0.1, 0.25), (-1.1, 0.25)])

# Polygons that are drawn in order: points (N, 2) around the origin for radius 1, and whether to fill or to erase.
OUTLINES: dict[str, list[tuple[np.ndarray, bool]]] = {
    "circle": [(_regular(40, 0.9), True)],
    "ring": [(_regular(40, 1.0), True), (_regular(40, 0.55), False)],
    "square": [(_box(0.8, 0.8), True)],
    "triangle": [(_regular(3, 1.15), True)],
    "star": [(_star(), True)],
    "cross": [(_box(1.0, 0.36), True), (_box(0.36, 1.0), True)],
    "crescent": [(_regular(40, 1.05), True), (_regular(40, 0.85) + np.array([0.5, 0.0]), False)],
    "bar": [(_box(1.25, 0.36), True)],
    "heart": [(_heart(), True)],
    "arrow": [(_ARROW, True)],
    "hexagon": [(_regular(6, 0.95), True)],
    "drop": [(_drop(), True)],
}


def shape_mask(
    shape: str, center: tuple[float, float], radius: float, angle: float, aspect: float, size: int
) -> np.ndarray:
    """Rasterize a shape.

    Args:
        shape: Name of the shape, a key of `OUTLINES`.
        center: Position (x, y) of the shape in pixels.
        radius: Size of the shape in pixels.
        angle: Rotation in radians.
        aspect: Stretch along the shape's axis; 0 does not stretch.
        size: Side of the mask in pixels.

    Returns:
        The mask (size, size) bool.
    """
    canvas = Image.new("L", (size * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    stretch = 1 + 0.16 * aspect
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for points, painted in OUTLINES[shape]:
        placed = (points * (stretch, 1 / stretch)) @ rotation * radius + center
        draw.polygon([tuple(point) for point in placed * SUPERSAMPLING], fill=255 if painted else 0)
    return np.asarray(canvas.reduce(SUPERSAMPLING)) > 127
