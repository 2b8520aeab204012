"""Tests of overlays and label maps."""

import numpy as np
import pytest
from PIL import Image

from modeling_gkc.visualization import DrawnSegment, draw_overlay, label_map

SEGMENTS = [
    DrawnSegment(1, "lamp", (200, 30, 40), 0.9),
    DrawnSegment(2, "sofa", (30, 200, 40)),
    DrawnSegment(7, "x", (0, 0, 0)),
]


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture
def segmentation() -> np.ndarray:
    segmentation = np.zeros((40, 50), dtype=np.int32)
    segmentation[5:20, 5:30], segmentation[25:, 30:] = 1, 2
    return segmentation


@pytest.mark.parametrize("void", [-1, 3, 255, 65535, 2**31 - 1])
def test_overlay_is_independent_of_the_void_id(image, segmentation, void):
    expected = draw_overlay(image, segmentation, SEGMENTS)
    assert len(expected.getcolors(2**24)) > 100
    changed = np.where(segmentation == 0, void, segmentation)
    np.testing.assert_array_equal(np.asarray(draw_overlay(image, changed, SEGMENTS)), np.asarray(expected))


@pytest.mark.parametrize("void", [-1, 0, 2**31 - 1])
def test_overlay_without_segments_is_void(image, void):
    overlay = draw_overlay(image, np.full((40, 50), void), [])
    first = draw_overlay(image, np.zeros((40, 50), dtype=int), SEGMENTS)
    np.testing.assert_array_equal(np.asarray(overlay), np.asarray(first))


def test_overlay_of_another_size_is_an_error(image, segmentation):
    with pytest.raises(ValueError, match=r"\(40, 49\).*\(40, 50\)"):
        draw_overlay(image, segmentation[:, 1:], SEGMENTS)


def test_label_map_contains_the_ids(segmentation):
    small = label_map(segmentation, {1: (200, 30, 40)})
    assert small.mode == "P" and small.getpalette()[3:6] == [200, 30, 40]
    np.testing.assert_array_equal(np.asarray(small), segmentation)
    large = label_map(np.where(segmentation == 0, 65535, segmentation), {})
    assert large.mode == "I;16" and np.asarray(large).max() == 65535
    assert label_map(segmentation, {}, max_id=65535).mode == "I;16"


def test_negative_ids_in_label_map_are_an_error(segmentation):
    with pytest.raises(ValueError, match=r"got -1\.\.1: pass such a `void_id`"):
        label_map(segmentation.clip(max=1) - (segmentation == 0), {})


@pytest.fixture(scope="module")
def plain_overlay() -> np.ndarray:
    """Draw a segment in the right half of a plain image that is large enough not to be resized."""
    image = Image.new("RGB", (600, 480), (100, 150, 200))
    segmentation = np.zeros((480, 600), dtype=int)
    segmentation[:, 300:] = 1
    return np.asarray(draw_overlay(image, segmentation, SEGMENTS))[:480, :600].astype(int)


def test_void_is_the_darkened_image(plain_overlay):
    assert np.abs(plain_overlay[:, :299] - [60, 90, 120]).max() <= 1  # 0.6 of the image, everywhere


def test_segments_are_blended_with_the_desaturated_image(plain_overlay):
    """0.45 * (0.7 * the mean, 150, + 0.3 * the image) + 0.55 * (200, 30, 40)."""
    corner = plain_overlay[:100, 301:]  # the name is in the middle
    assert np.abs(corner - [170.75, 84, 96.25]).max() <= 1


def test_outlines_are_white_on_both_sides_of_an_edge(plain_overlay):
    is_white = (plain_overlay[:100] == 255).all(axis=-1)
    assert is_white[:, 299:301].all() and is_white.sum() == 200


def test_horizontal_outlines_are_white():
    segmentation = np.zeros((480, 600), dtype=int)
    segmentation[400:] = 1
    overlay = np.asarray(draw_overlay(Image.new("RGB", (600, 480)), segmentation, SEGMENTS))
    is_white = (overlay[390:410, :50] == 255).all(axis=-1)
    assert is_white[9:11].all() and is_white.sum() == 100
