"""Colors, fills and stuff textures of the mini-world, as functions of a pixel grid in world units."""

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image

WORLD_SIDE = 96.0  # a scene is 96 world units wide, whatever its size in pixels

# Hue, saturation, value.
COLOR_VALUES = {
    "red": (0.0, 0.85, 0.85),
    "orange": (0.075, 0.9, 0.95),
    "yellow": (0.155, 0.85, 0.95),
    "green": (0.34, 0.8, 0.6),
    "cyan": (0.49, 0.75, 0.8),
    "blue": (0.62, 0.8, 0.85),
    "purple": (0.75, 0.65, 0.65),
    "pink": (0.90, 0.45, 0.97),
}
STUFF_VALUES = {
    "grass": (0.27, 0.55, 0.42),
    "sky": (0.58, 0.25, 0.88),
    "brick": (0.03, 0.5, 0.5),
    "wood": (0.08, 0.55, 0.45),
    "water": (0.55, 0.55, 0.5),
    "sand": (0.11, 0.32, 0.78),
}


@dataclass(frozen=True)
class Grid:
    """Pixel centers of a square image in world units: `x` and `y` are (size, size) float32."""

    size: int
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def from_size(cls, size: int) -> "Grid":
        """Return the grid of an image with sides of `size` pixels."""
        steps = ((np.arange(size) + 0.5) * WORLD_SIDE / size).astype(np.float32)
        x, y = np.meshgrid(steps, steps)
        return cls(size, x, y)

    def noise(self, generator: np.random.Generator, cell_height: float, cell_width: float | None = None) -> np.ndarray:
        """Sample smooth Gaussian noise (size, size) with a correlation length of one cell, in world units."""
        cells = [int(WORLD_SIDE / cell) + 2 for cell in (cell_height, cell_width or cell_height)]
        coarse = generator.standard_normal(cells).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC))


def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert HSV to RGB (3,) float32 in 0..1; the hue is periodic, the other values are clipped."""
    clipped = np.clip([saturation, value], 0, 1)
    return np.array(colorsys.hsv_to_rgb(hue % 1, *clipped), dtype=np.float32)


def fill_pattern(fill: str, grid: Grid, center: tuple[float, float], angle: float, period: float) -> np.ndarray:
    """Return the dark part (size, size) bool of a fill; `center` and `period` in world units, `angle` in radians."""
    along = (grid.x - center[0]) * np.cos(angle) + (grid.y - center[1]) * np.sin(angle)
    across = -(grid.x - center[0]) * np.sin(angle) + (grid.y - center[1]) * np.cos(angle)
    if fill == "solid":
        return np.zeros_like(along, dtype=bool)
    if fill == "striped":
        return np.abs(_wrapped(along, period)) < 0.24 * period
    if fill == "dotted":
        return np.hypot(_wrapped(along, period), _wrapped(across, period)) < 0.31 * period
    if fill == "checkered":
        return (along // (1.2 * period) + across // (0.8 * period)) % 2 > 0
    raise ValueError(f"Unknown fill {fill!r}.")


def _wrapped(coordinate: np.ndarray, period: float) -> np.ndarray:
    """Return the signed distance to the nearest multiple of `period`."""
    return (coordinate + period / 2) % period - period / 2


def stuff_texture(stuff: str, latents: np.ndarray, grid: Grid, generator: np.random.Generator) -> np.ndarray:
    """Draw a stuff texture (size, size, 3) float; `latents` (3,) shift its brightness, hue and scale."""
    hue, saturation, value = STUFF_VALUES[stuff]
    base = rgb(hue + 0.012 * latents[1], saturation, value) * (1 + 0.13 * latents[0])
    relief = _RELIEFS[stuff](grid, float(np.exp(0.22 * latents[2])), generator)
    return base * relief[..., None]


def _grass(grid: Grid, scale: float, generator: np.random.Generator) -> np.ndarray:
    return 1 + 0.33 * scale * grid.noise(generator, 6 * scale, 1.0)


def _sky(grid: Grid, scale: float, generator: np.random.Generator) -> np.ndarray:
    return 1 + 0.13 * scale * grid.noise(generator, 20 * scale) - 0.002 * (grid.y - WORLD_SIDE / 2)


def _brick(grid: Grid, scale: float, generator: np.random.Generator) -> np.ndarray:
    height = 9 * scale
    shifted = grid.x + np.floor(grid.y / height) % 2 * height
    mortar = (grid.y % height < 1.5) | (shifted % (2 * height) < 1.5)
    return np.where(mortar, 1.5, 0.95) + 0.05 * grid.noise(generator, 1.0)


def _wood(grid: Grid, scale: float, generator: np.random.Generator) -> np.ndarray:
    return 1 + 0.2 * np.sin((grid.x + 4 * grid.noise(generator, 24)) / (2 * scale)) + 0.1 * grid.noise(generator, 8)


def _water(grid: Grid, scale: float, generator: np.random.Generator) -> np.ndarray:
    return 1 + 0.22 * np.sin(grid.y / (1.65 * scale) + 2 * grid.noise(generator, 16) + 0.02 * grid.x)


def _sand(grid: Grid, scale: float, generator: np.random.Generator) -> np.ndarray:
    return 1 + 0.09 * scale * grid.noise(generator, 1.0) + 0.03 * grid.noise(generator, 12)


_RELIEFS = {"grass": _grass, "sky": _sky, "brick": _brick, "wood": _wood, "water": _water, "sand": _sand}
