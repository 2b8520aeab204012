"""Tests of mask resampling against `interpolate` and against masks that are linear functions of the coordinates."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gkc import GKCImageProcessor, mask_resampling
from modeling_gkc.mask_resampling import MaskResampler, TwoStepMaskResampler, resize_masks
from modeling_gkc.post_processing import (
    instance_segmentation,
    panoptic_segmentation,
    semantic_scores,
    semantic_segmentation,
)

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
def test_content_of_any_size_is_resampled_to_the_target(grid, padding, target):
    """Each pixel has the value of a linear function at its position, independent of the padding."""
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


def test_without_a_target_the_padding_is_removed():
    _, masks = random_logits()
    assert torch.equal(resize_masks(masks, (29, 48)), masks[:, :8])
    labels, _ = semantic_segmentation(*random_logits(), content_size=(29, 41))
    assert labels.shape == (8, 11)


def test_results_do_not_depend_on_the_padding():
    logits, masks = random_logits()
    for content in ((30, 40), (32, 40)):
        results = [
            semantic_scores(logits, F.pad(masks[:, :8, :10], (0, 4, 0, 3), value=fill), content, (60, 77))
            for fill in (-50.0, 50.0)
        ]
        assert torch.equal(*results)


@pytest.mark.parametrize(("content", "target"), [((0, 4), (3, 3)), ((40, 52), None), ((4, 4), (0, 3))])
def test_invalid_sizes_raise_errors(content, target):
    with pytest.raises(ValueError, match=r"must fit into|at least 1"):
        MaskResampler(torch.zeros(2, 10, 12), content, target)


def test_masks_can_be_selected_repeatedly():
    _, masks = random_logits()
    chosen = MaskResampler(masks, None, (20, 31)).select(torch.tensor([5, 1, 3])).select(torch.tensor([2, 0]))
    assert chosen.num_masks == 2
    assert torch.equal(chosen.rows(0, 20), resize_masks(masks[[3, 5]], None, (20, 31)))


def resize(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(planes[None].double(), size=size, mode="bilinear", align_corners=False)[0]


class TestTwoSteps:
    """Tests of Mask2Former's resampling: to the padded input, and then from its content to the target."""

    TARGETS = [(60, 75), (9, 12), (33, 44), (1, 1), (200, 3)]

    def expected(self, masks, content, target):
        at_input = resize(masks, (4 * masks.shape[1], 4 * masks.shape[2]))
        return resize(at_input[:, : content[0], : content[1]], target)

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("content", [(36, 48), (33, 44), (5, 3)])
    @pytest.mark.parametrize("tile_bytes", [1, 5000, 32 * 2**20])
    def test_masks(self, target, content, tile_bytes, monkeypatch):
        monkeypatch.setattr(mask_resampling, "TILE_BYTES", tile_bytes)
        _, masks = random_logits()
        resampler = TwoStepMaskResampler(masks, content, target)
        got = torch.cat([tile for _, tile in resampler.tiles(planes=3)], dim=1)
        torch.testing.assert_close(got.double(), self.expected(masks, content, target), rtol=0, atol=2e-5)
        chosen = resampler.select(torch.tensor([2, 0])).rows(0, target[0])
        torch.testing.assert_close(chosen, got[[2, 0]], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("tile_bytes", [1, 5000, 32 * 2**20])
    def test_scores(self, target, tile_bytes, monkeypatch):
        monkeypatch.setattr(mask_resampling, "TILE_BYTES", tile_bytes)
        classes, masks = random_logits()
        content = (33, 44)
        shares = classes.double().softmax(dim=-1)[:, :-1]
        expected = {
            "two_step": torch.einsum("qk,qhw->khw", shares, self.expected(masks, content, target).sigmoid()),
            "two_step_scores": resize(
                torch.einsum("qk,qhw->khw", shares, self.expected(masks, content, content).sigmoid()), target
            ),
        }
        for resampling, scores in expected.items():
            got = semantic_scores(classes, masks, content, target, resampling=resampling)
            torch.testing.assert_close(got.double(), scores, rtol=0, atol=2e-5)
            labels, best = semantic_segmentation(classes, masks, content, target, resampling=resampling)
            torch.testing.assert_close(best, got.amax(dim=0), rtol=0, atol=1e-6)
            assert torch.equal(labels, got.argmax(dim=0))
        if target != (33, 44):
            assert (expected["two_step"] - expected["two_step_scores"]).abs().max() > 1e-4

    def test_many_classes(self):
        """Classes that win at no pixel are skipped only when masks are resampled directly to the target."""
        masks, classes = random_logits()[1], 3 * torch.randn(len(random_logits()[1]), 201)
        scores = semantic_scores(classes, masks, (33, 44), (50, 60), resampling="two_step_scores")
        labels, _ = semantic_segmentation(classes, masks, (33, 44), (50, 60), resampling="two_step_scores")
        assert torch.equal(labels, scores.argmax(dim=0))

    @pytest.mark.parametrize("segment", [panoptic_segmentation, instance_segmentation])
    def test_segments_equal_those_of_two_step_resampling(self, segment):
        classes, masks = random_logits()
        content, target = (33, 44), (60, 75)
        settings = {"threshold": 0.1, "return_binary_maps": True}
        got = segment(classes, masks, content, target, resampling="two_step", **settings)
        resized = self.expected(masks, content, target).float()
        expected = segment(classes, resized, (240, 300), (60, 75), **settings)
        assert len(got["segments_info"]) == len(expected["segments_info"]) > 0
        assert (got["segmentation"] != expected["segmentation"]).float().mean() < 1e-3

    def test_image_processor_setting(self, tmp_path):
        classes, masks = random_logits()
        outputs = {
            "class_queries_logits": classes[None],
            "masks_queries_logits": masks[None],
            "content_sizes": torch.tensor([[33, 44]]),
        }
        GKCImageProcessor(mask_resampling="two_step_scores").save_pretrained(tmp_path)
        processor = GKCImageProcessor.from_pretrained(tmp_path)
        assert processor.mask_resampling == "two_step_scores" and GKCImageProcessor().mask_resampling == "direct"
        (result,) = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(60, 75)], return_segmentation_scores=True
        )
        scores = semantic_scores(classes, masks, (33, 44), (60, 75), resampling="two_step_scores")
        assert torch.equal(result["segmentation_scores"], scores)
        two_step = semantic_segmentation(classes, masks, (33, 44), resampling="two_step")
        direct = semantic_segmentation(classes, masks, (33, 44))
        assert torch.equal(two_step[0], direct[0]), "without a target masks stay on their grid"

    def test_unknown_resamplings_raise_errors(self):
        classes, masks = random_logits()
        with pytest.raises(ValueError, match="`resampling` must be one of direct, two_step, two_step_scores"):
            semantic_scores(classes, masks, resampling="cubic")
        with pytest.raises(ValueError, match="`mask_resampling` must be one of direct"):
            GKCImageProcessor(mask_resampling="cubic")
