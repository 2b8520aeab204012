"""Masks at any size against interpolation and against their own coordinates."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gkc import mask_resampling
from modeling_gkc.mask_resampling import MaskResampler, resize_masks
from modeling_gkc.post_processing import semantic_scores, semantic_segmentation

from .logits_toys import random_logits


@pytest.mark.parametrize("target", [(36, 48), (9, 12), (100, 31), (5, 7), (1, 1), (200, 3)])
@pytest.mark.parametrize("content", [None, (36, 48)])
@pytest.mark.parametrize("tile_bytes", [1, 5000, 32 * 2**20])
def test_equals_interpolate_when_the_content_fills_the_input(target, content, tile_bytes, monkeypatch):
    monkeypatch.setattr(mask_resampling, "TILE_BYTES", tile_bytes)
    _, masks = random_logits()
    expected = F.interpolate(masks[None].double(), size=target, mode="bilinear", align_corners=False)[0]
    resampler = MaskResampler(masks, content, target)
    got = torch.cat([tile for _, tile in resampler.tiles(planes=3)], dim=1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(resize_masks(masks, content, target), got, rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=200)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_content_of_any_size_is_stretched_over_the_target(grid, padding, target):
    """Each pixel samples the plane at its own place in the content, whatever the padding."""
    content = tuple(max(1, 4 * side - cut) for side, cut in zip(grid, padding, strict=True))
    cells = [
        ((torch.arange(target[axis]) + 0.5) * content[axis] / target[axis] / 4 - 0.5).clamp(
            0, -(-content[axis] // 4) - 1
        )
        for axis in (0, 1)
    ]
    plane = torch.arange(grid[0])[:, None] + 100.0 * torch.arange(grid[1])
    padded = F.pad(plane[None], (0, 2, 0, 3), value=1e6)
    expected = cells[0][:, None] + 100 * cells[1]
    torch.testing.assert_close(resize_masks(padded, content, target)[0], expected, rtol=1e-6, atol=2e-3)


def test_without_a_target_the_grid_is_cut():
    _, masks = random_logits()
    assert torch.equal(resize_masks(masks, (29, 48)), masks[:, :8])
    labels, _ = semantic_segmentation(*random_logits(), content_size=(29, 41))
    assert labels.shape == (8, 11)


def test_padding_does_not_matter():
    logits, masks = random_logits()
    for content in ((30, 40), (32, 40)):
        results = [
            semantic_scores(logits, F.pad(masks[:, :8, :10], (0, 4, 0, 3), value=fill), content, (60, 77))
            for fill in (-50.0, 50.0)
        ]
        assert torch.equal(*results)


@pytest.mark.parametrize(("content", "target"), [((0, 4), (3, 3)), ((40, 52), None), ((4, 4), (0, 3))])
def test_impossible_sizes(content, target):
    with pytest.raises(ValueError, match=r"does not fit|at least 1"):
        MaskResampler(torch.zeros(2, 10, 12), content, target)


def test_masks_may_be_chosen_twice():
    _, masks = random_logits()
    chosen = MaskResampler(masks, None, (20, 31)).select(torch.tensor([5, 1, 3])).select(torch.tensor([2, 0]))
    assert chosen.num_masks == 2
    assert torch.equal(chosen.rows(0, 20), resize_masks(masks[[3, 5]], None, (20, 31)))
