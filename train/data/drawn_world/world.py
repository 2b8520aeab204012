"""Scenes of the mini-world: two to five shapes on one or two kinds of stuff, with full ground truth.

A scene is determined by its seed and index alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .shapes import shape_mask
from .textures import COLOR_VALUES, WORLD_SIDE, Grid, fill_pattern, rgb, stuff_texture
from .words import COLORS, FILLS, NEVER_SEEN, SHAPES, STUFFS, Attributes

SMALLEST_AREA = 40.0  # in squared world units; regions with a smaller visible area are not annotated
TRAINING_SHAPES = tuple(shape for shape in SHAPES if shape not in NEVER_SEEN)
TRAINING_STUFFS = tuple(stuff for stuff in STUFFS if stuff not in NEVER_SEEN)


@dataclass(frozen=True)
class Scene:
    """Image (size, size, 3) uint8 with its regions; `region_index` (size, size) int64 is -1 outside of regions."""

    image: np.ndarray
    region_index: np.ndarray
    regions: list[Attributes]


def draw_scene(
    seed: int | Sequence[int],
    index: int,
    size: int = 96,
    shapes: Sequence[str] = SHAPES,
    stuffs: Sequence[str] = STUFFS,
) -> Scene:
    """Draw one scene of the given concepts.

    Args:
        seed: Random seed.
        index: Scene number.
        size: Side of the image in pixels.
        shapes: Shape concepts to choose from.
        stuffs: Kinds of stuff to choose from.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    generator = np.random.default_rng([*seeds, index])
    grid = Grid.from_size(size)
    image, region_index, regions = _background(generator, grid, stuffs)
    placed: list[tuple[float, float, float]] = []
    for shape in generator.choice(shapes, generator.integers(2, 6)):
        mask, paint, attributes = _object(generator, grid, str(shape), placed)
        image = np.where(mask[..., None], paint, image)
        region_index[mask] = len(regions)
        regions.append(attributes)
    return Scene(_expose(generator, grid, image), *_drop_occluded(region_index, regions, size))


def _background(generator: np.random.Generator, grid: Grid, stuffs: Sequence[str]):
    """Draw one or two kinds of stuff: image (size, size, 3), region index (size, size) and regions."""
    chosen = generator.choice(stuffs, generator.integers(1, min(2, len(stuffs)) + 1), replace=False)
    region_index = np.zeros((grid.size, grid.size), dtype=np.int64)
    if len(chosen) > 1:
        region_index[_beyond_border(generator, grid)] = 1
    image, regions = np.zeros((grid.size, grid.size, 3)), []
    for number, stuff in enumerate(map(str, chosen)):
        latents = _latents(generator)
        surface = stuff_texture(stuff, latents, grid, generator)
        image = np.where((region_index == number)[..., None], surface, image)
        regions.append(
            Attributes(
                kind="stuff", concept=stuff, colour=None, fill=None, radius=None, aspect=None, latents=latents.tolist()
            )
        )
    return image, region_index, regions


def _beyond_border(generator: np.random.Generator, grid: Grid) -> np.ndarray:
    """Return one side (size, size) bool of a wavy line near the image center."""
    angle, wavelength, offset = generator.uniform([0, 6, -18], [2 * np.pi, 14, 18])
    x, y = grid.x - WORLD_SIDE / 2, grid.y - WORLD_SIDE / 2
    distance = x * np.cos(angle) + y * np.sin(angle)
    return distance + 5 * np.sin((x * np.sin(angle) - y * np.cos(angle)) / wavelength) > offset


def _object(generator: np.random.Generator, grid: Grid, shape: str, placed: list[tuple[float, float, float]]):
    """Draw one shape: mask (size, size), paint (size, size, 3) and attributes; its position is added to `placed`."""
    radius = float(generator.uniform(9, 19))
    aspect = float(np.clip(generator.standard_normal(), -1.6, 1.6))
    x, y = _free_place(generator, radius, placed)
    placed.append((x, y, radius))
    pixels = grid.size / WORLD_SIDE
    angle = generator.uniform(0, 2 * np.pi)
    mask = shape_mask(shape, (x * pixels, y * pixels), radius * pixels, angle, aspect, grid.size)
    color, fill = str(generator.choice(COLORS)), str(generator.choice(FILLS))
    latents = _latents(generator)
    paint = _paint(generator, grid, (x, y, radius), color, fill, latents)
    attributes = Attributes(
        kind="shape", concept=shape, colour=color, fill=fill, radius=radius, aspect=aspect, latents=latents.tolist()
    )
    return mask, paint, attributes


def _free_place(generator: np.random.Generator, radius: float, placed: list[tuple[float, float, float]]):
    """Sample a center (x, y) in world units that avoids large overlap, with a limited number of attempts."""
    for _ in range(12):
        x, y = generator.uniform(10, WORLD_SIDE - 10, 2)
        if all(np.hypot(x - a, y - b) > 0.75 * (radius + c) for a, b, c in placed):
            break
    return float(x), float(y)


def _paint(generator: np.random.Generator, grid: Grid, place, color: str, fill: str, latents: np.ndarray):
    """Return the colored, filled and shaded plane (size, size, 3) from which a shape is cut."""
    x, y, radius = place
    hue, saturation, value = COLOR_VALUES[color]
    light = rgb(hue + 0.010 * latents[0], saturation * (1 + 0.12 * latents[1]), value * (1 + 0.13 * latents[2]))
    angle = generator.uniform(0, np.pi)
    period = max(4.5, radius * generator.uniform(0.42, 0.58))
    dark = fill_pattern(fill, grid, (x, y), angle, period)
    slope = ((grid.x - x) * np.cos(2 * angle) + (grid.y - y) * np.sin(2 * angle)) / radius
    return np.where(dark[..., None], 0.3 * light, light) * (1 + 0.12 * slope)[..., None]


def _latents(generator: np.random.Generator) -> np.ndarray:
    return np.clip(generator.standard_normal(3), -1.8, 1.8)


def _expose(generator: np.random.Generator, grid: Grid, image: np.ndarray) -> np.ndarray:
    """Apply a light gradient, exposure and sensor noise: float 0..1 to uint8, both (size, size, 3)."""
    slope = generator.uniform(-0.12, 0.12, 2)
    half = WORLD_SIDE / 2
    light = 1 + slope[0] * (grid.x - half) / half + slope[1] * (grid.y - half) / half
    exposed = image * light[..., None] * generator.uniform(0.92, 1.06)
    noisy = exposed + 0.04 * generator.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def _drop_occluded(region_index: np.ndarray, regions: list[Attributes], size: int):
    """Drop regions with a small visible area, and number the others consecutively."""
    areas = np.bincount(region_index.ravel(), minlength=len(regions)) * (WORLD_SIDE / size) ** 2
    kept = np.flatnonzero(areas >= SMALLEST_AREA)
    renumbered = np.full(len(regions), -1, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    return renumbered[region_index], [regions[number] for number in kept]
