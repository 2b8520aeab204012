"""Distractor images that never occur in scenes and give the words of captions a second sense (see `lexicon`)."""

from collections.abc import Callable

import numpy as np

from ..data.drawn_world.textures import WORLD_SIDE, Grid


def draw_other_world(kind: int, generator: np.random.Generator, size: int) -> np.ndarray:
    """Draw an image (size, size, 3) uint8 of kind 0 to 5: rings, spokes, plasma, maze, ramp, spiral."""
    grid = Grid.from_size(size)
    center = WORLD_SIDE / 2 + generator.uniform(-15, 15, 2)
    x, y = grid.x - center[0], grid.y - center[1]
    pattern = np.atleast_3d(_KINDS[kind](generator, grid, x, y))
    tint = np.array([1.0]) if pattern.shape[2] == 3 else generator.normal(0.9, 0.4, 3)
    shaded = 1.2 * pattern * tint + generator.normal(0, 0.4, 3) + 0.15 * generator.standard_normal((size, size, 3))
    return (np.clip(0.45 + 0.25 * shaded, 0, 1) * 255).astype(np.uint8)


def _rings(generator, grid: Grid, x, y) -> np.ndarray:
    return np.sin(np.hypot(x, y) / generator.uniform(1.5, 3.75) + generator.uniform(0, 6))


def _spokes(generator, grid: Grid, x, y) -> np.ndarray:
    return np.sin(np.arctan2(y, x) * generator.integers(4, 10) + generator.uniform(0, 6))


def _plasma(generator, grid: Grid, x, y) -> np.ndarray:
    return 1.3 * np.stack([grid.noise(generator, 24) for _ in range(3)], axis=-1)


def _maze(generator, grid: Grid, x, y) -> np.ndarray:
    cells = generator.integers(0, 2, (10, 10)) * 2.0 - 1.0
    rows, columns = ((axis * 10 / WORLD_SIDE).astype(int) for axis in (grid.y, grid.x))
    return cells[rows, columns]


def _ramp(generator, grid: Grid, x, y) -> np.ndarray:
    angle = generator.uniform(0, 2 * np.pi)
    return np.clip((x * np.cos(angle) + y * np.sin(angle)) / 37, -1.5, 1.5)


def _spiral(generator, grid: Grid, x, y) -> np.ndarray:
    radius = np.hypot(x, y)
    turn = radius / generator.uniform(3, 4.5) + 2 * np.arctan2(y, x) + generator.uniform(0, 6)
    return np.sin(turn) * (radius < 36)


_KINDS: tuple[Callable[..., np.ndarray], ...] = (_rings, _spokes, _plasma, _maze, _ramp, _spiral)
