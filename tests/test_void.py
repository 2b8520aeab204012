"""Tests of void ("None of these") in all three tasks against slow references that loop over pixels."""

from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modeling_gkc import mask_resampling
from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.post_processing import (
    decode_rle,
    instance_segmentation,
    panoptic_segmentation,
    resize_masks,
    semantic_segmentation,
    semantic_segments,
    void_label,
)

from .logits_toys import logits_of, mask_of, random_logits

CLASSES = 4
SEEDS = st.integers(0, 10**6)
THRESHOLDS = st.none() | st.floats(0.1, 0.9) | st.floats(0, 1)
VOID_CLASSES = st.sets(st.integers(0, CLASSES - 1))
TILES = st.sampled_from([1, 32 * 2**20])
SIZES = st.sampled_from([None, (7, 5), (3, 11)])


@contextmanager
def tiles_of(size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_resampling, "TILE_BYTES", size)
        yield


def pixels_of(masks: torch.Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(masks.shape[1]) for column in range(masks.shape[2])]


def as_probabilities(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, target: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw class scores (Q, K + 1) and mask probabilities (Q, H, W)."""
    return class_logits.softmax(-1).numpy(), resize_masks(mask_logits, None, target).sigmoid().numpy()


class TestSemantic:
    @settings(deadline=None, max_examples=60)
    @given(SEEDS, st.none() | st.floats(0, 3), VOID_CLASSES, st.sampled_from([None, -1, 4, 77]), SIZES, TILES)
    def test_matches_a_loop_over_pixels(self, seed, threshold, void_ids, void_id, target, tile):
        torch.manual_seed(seed)
        logits, masks = random_logits(queries=5, classes=CLASSES, height=4, width=5)
        arguments = {"void_threshold": threshold, "void_label_ids": void_ids, "void_id": void_id}
        with tiles_of(tile):
            labels, scores = semantic_segmentation(logits, masks, target_size=target, **arguments)
        class_scores, probabilities = as_probabilities(logits, masks, target)
        for row, column in pixels_of(probabilities):
            per_class = [
                sum(float(class_scores[q, k]) * float(probabilities[q, row, column]) for q in range(5))
                for k in range(CLASSES)
            ]
            second, best = sorted(per_class)[-2:]
            assume(best - second > 1e-5 and (threshold is None or abs(best - threshold) > 1e-5))
            winner = per_class.index(best)
            is_void = winner in void_ids or (threshold is not None and best < threshold)
            expected = (255 if void_id is None else void_id) if is_void else winner
            assert labels[row, column] == expected
            assert float(scores[row, column]) == pytest.approx(best, abs=1e-5)

    @pytest.mark.parametrize(
        ("classes", "void_ids", "void"),
        [
            (255, (), 255),
            (256, (), 65535),
            (300, range(255, 300), 255),
            (300, range(255), 65535),
            (3, (0, 1, 2), 255),
            (65536, (), 2**31 - 1),
        ],
    )
    def test_default_void_id_is_not_a_class(self, classes, void_ids, void):
        logits, masks = random_logits(queries=2, classes=classes, height=2, width=2)
        labels, _ = semantic_segmentation(logits, masks, void_threshold=2.0, void_label_ids=void_ids)
        assert (labels == void).all() and labels.dtype == torch.int64
        assert void_label(max(set(range(classes)) - set(void_ids), default=-1) + 1) == void

    def test_void_id_of_a_class_raises(self):
        logits, masks = random_logits(classes=3)
        with pytest.raises(ValueError, match=r"`void_id` 2 is a class: choose .* 255"):
            semantic_segmentation(logits, masks, void_id=2)
        labels, _ = semantic_segmentation(logits, masks, void_id=2, void_label_ids=[2])
        assert labels.max() <= 2  # a void class is not part of the result, so that its index may be the void value

    @pytest.mark.parametrize("void_id", [-1, 255, 3, 2**40])
    @pytest.mark.parametrize("num_classes", [3, 4])
    def test_segments_are_the_classes_of_the_map(self, void_id, num_classes):
        """The last of four classes is void, and may be counted in `num_classes` or not."""
        logits, masks = random_logits(queries=20, classes=4)
        labels, scores = semantic_segmentation(logits, masks, void_label_ids=[3], void_id=void_id, void_threshold=0.9)
        if void_id == 3:
            num_classes = 3
        segments = semantic_segments(labels, scores, num_classes)
        shown = sorted(set(labels.unique().tolist()) - {void_id})
        assert (labels == void_id).any() and shown
        assert [(segment["id"], segment["label_id"]) for segment in segments] == [(label, label) for label in shown]
        assert scores.max() > 1  # sums over queries, which the score of a segment clips to 1
        for segment in segments:
            pixels = scores[labels == segment["id"]].double().clamp(max=1)
            assert segment["score"] == pytest.approx(pixels.mean().item(), abs=1e-9)
            assert 0 <= segment["score"] <= 1

    def test_scores_are_independent_of_void(self):
        logits, masks = random_logits()
        _, scores = semantic_segmentation(logits, masks)
        _, with_void = semantic_segmentation(logits, masks, void_threshold=0.9, void_label_ids={1, 3})
        assert torch.equal(scores, with_void)


def slow_panoptic(class_scores, masks, threshold, mask_threshold, overlap, fuse, void_threshold, void_ids, void_id):
    """Compute map and segments (class, score) in a loop over pixels and then over queries."""
    kept = [q for q, row in enumerate(class_scores) if row.argmax() < CLASSES and row.max() > threshold]
    owner = {}
    won = dict.fromkeys(kept, 0)
    for pixel in pixels_of(masks):
        scores = {q: class_scores[q].max() * masks[q][pixel] for q in kept}
        if not kept:
            continue
        winner = max(kept, key=scores.get)
        won[winner] += 1
        if masks[winner][pixel] >= mask_threshold and (
            void_threshold is None or scores[winner] >= np.float32(void_threshold)
        ):
            owner[pixel] = winner
    segmentation = np.full(masks.shape[1:], void_id)
    info, ids = [], {}
    for query in kept:
        label, score = int(class_scores[query].argmax()), float(class_scores[query].max())
        pixels = [pixel for pixel, other in owner.items() if other == query]
        area = int((masks[query] >= mask_threshold).sum())
        if not pixels or won[query] < overlap * area or label in void_ids:
            continue
        if label in ids:
            number = ids[label]
            info[number - 1][1] = max(info[number - 1][1], score)
        else:
            info.append([label, score])
            number = len(info)
            if label in fuse:
                ids[label] = number
        for pixel in pixels:
            segmentation[pixel] = number
    return segmentation, info


class TestPanoptic:
    @settings(deadline=None, max_examples=100)
    @given(
        SEEDS,
        st.sampled_from([0.0, 0.3, 0.5]),
        st.sampled_from([0.3, 0.5, 0.7]),
        st.sampled_from([0.0, 0.4, 0.8]),
        st.sets(st.integers(0, CLASSES - 1)),
        THRESHOLDS,
        VOID_CLASSES,
        st.sampled_from([None, 0, -1, 8, 255]),
        SIZES,
        TILES,
    )
    def test_matches_a_loop_over_pixels(
        self, seed, threshold, mask_threshold, overlap, fuse, void_threshold, void_ids, void_id, target, tile
    ):
        torch.manual_seed(seed)
        logits, masks = random_logits(queries=7, classes=CLASSES, height=4, width=5, spread=2.0)
        thresholds = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap,
            "void_threshold": void_threshold,
        }
        with tiles_of(tile):
            result = panoptic_segmentation(
                logits,
                masks,
                target_size=target,
                label_ids_to_fuse=fuse,
                void_label_ids=void_ids,
                void_id=void_id,
                **thresholds,
            )
        void = 0 if void_id is None else void_id
        expected, info = slow_panoptic(
            *as_probabilities(logits, masks, target),
            threshold,
            mask_threshold,
            overlap,
            fuse,
            void_threshold,
            void_ids,
            void,
        )
        np.testing.assert_array_equal(result["segmentation"].numpy(), expected)
        assert [[s["label_id"], s["score"]] for s in result["segments_info"]] == info
        assert [s["id"] for s in result["segments_info"]] == list(range(1, len(info) + 1))
        assert set(np.unique(expected)) - {void} == set(range(1, len(info) + 1))
        assert result["segmentation"].dtype == torch.int32

    def test_void_class_removes_its_pixels(self):
        logits = logits_of([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
        masks = torch.stack([mask_of(["#####..."]), mask_of(["....####"])])
        result = panoptic_segmentation(logits, masks, void_label_ids=[1])
        assert result["segmentation"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
        assert [s["label_id"] for s in result["segments_info"]] == [0]
        result = panoptic_segmentation(logits, masks, void_label_ids=[1], overlap_mask_area_threshold=0.9)
        assert result["segments_info"] == [] and not result["segmentation"].any()

    def test_void_threshold_applies_after_the_area_threshold(self):
        """A mask with low scores in three of four pixels passes the area threshold and keeps the fourth pixel."""
        logits = logits_of([[0.8, 0.1, 0.1]])
        masks = torch.tensor([[[8.0, 0.5, 0.5, 0.5]]])
        result = panoptic_segmentation(logits, masks, void_threshold=0.6)
        assert result["segmentation"].tolist() == [[1, 0, 0, 0]]
        assert result["segments_info"][0]["score"] == pytest.approx(0.8)

    def test_empty_segments_are_dropped_and_ids_are_consecutive(self):
        logits = logits_of([[0.55, 0.35, 0.1], [0.1, 0.9, 0.0], [0.95, 0.05, 0.0]])
        masks = torch.stack([mask_of(["##......"]), mask_of(["..###..."]), mask_of([".....###"])])
        result = panoptic_segmentation(logits, masks, void_threshold=0.6, label_ids_to_fuse=[0])
        assert result["segmentation"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
        assert [s["id"] for s in result["segments_info"]] == [1, 2]

    @pytest.mark.parametrize("void_id", [1, 7, 2**31, -(2**31) - 1])
    def test_void_id_of_a_possible_segment_raises(self, void_id):
        with pytest.raises(ValueError, match=f"`void_id` {void_id} may be .* at most 7: choose 0"):
            panoptic_segmentation(*random_logits(queries=7), void_id=void_id)


def slow_instances(class_scores, masks, threshold, mask_threshold, top_k, void_threshold, void_ids):
    """Rank pairs (score, class, whole mask without void, covering mask, pixel scores) in a loop over pixels."""
    pairs = sorted(
        ((class_scores[q, k], q, k) for q in range(len(class_scores)) for k in range(CLASSES)),
        key=lambda pair: -pair[0],
    )[:top_k]
    ranked = []
    for class_score, query, label in pairs:
        inside = [pixel for pixel in pixels_of(masks) if masks[query][pixel] > mask_threshold]
        if inside:
            score = float(class_score) * sum(float(masks[query][pixel]) for pixel in inside) / len(inside)
            assume(abs(score - threshold) > 1e-6)
            if score >= threshold:
                ranked.append((score, label, {pixel: class_score * masks[query][pixel] for pixel in inside}))
    ranked.sort(key=lambda item: -item[0])
    assume(all(first[0] - second[0] > 1e-6 for first, second in pairwise(ranked)))

    def is_shown(score: np.float32) -> bool:
        return void_threshold is None or score >= np.float32(void_threshold)

    taken, whole = set(), []
    for score, label, pixels in ranked:
        if label in void_ids:
            taken |= set(pixels)
        else:
            left = {pixel for pixel in set(pixels) - taken if is_shown(pixels[pixel])}
            if left:
                whole.append((score, label, left))
    owner = {}
    for rank, (_, _, pixels) in enumerate(ranked):
        for pixel in pixels:
            owner.setdefault(pixel, rank)
    covering = []
    for rank, (score, label, pixels) in enumerate(ranked):
        covered = [pixel for pixel, other in owner.items() if other == rank]
        shown = {pixel for pixel in covered if is_shown(pixels[pixel])}
        covering.append((score, label, shown, len(covered) / len(pixels)))
    return whole, covering


class TestInstance:
    @settings(deadline=None, max_examples=60)
    @given(
        SEEDS,
        st.sampled_from([0.0, 0.1, 0.3]),
        st.sampled_from([0.3, 0.5, 0.7]),
        st.sampled_from([0.0, 0.4, 0.8]),
        st.sampled_from([1, 6, 100]),
        THRESHOLDS,
        VOID_CLASSES,
        st.sampled_from([None, 0, -7, 101]),
        SIZES,
        TILES,
    )
    def test_matches_a_loop_over_pixels(
        self, seed, threshold, mask_threshold, overlap, top_k, void_threshold, void_ids, void_id, target, tile
    ):
        torch.manual_seed(seed)
        logits, masks = random_logits(queries=6, classes=CLASSES, height=4, width=5, spread=2.0)
        settings_of_both = (threshold, mask_threshold, top_k, void_threshold, void_ids)
        whole, covering = slow_instances(*as_probabilities(logits, masks, target), *settings_of_both)
        arguments = {
            "target_size": target,
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "top_k": top_k,
            "void_threshold": void_threshold,
            "void_label_ids": void_ids,
        }
        with tiles_of(tile):
            binary = instance_segmentation(logits, masks, **arguments, return_binary_maps=True)
            encoded = instance_segmentation(logits, masks, **arguments, return_coco_annotation=True)
            painted = instance_segmentation(
                logits, masks, **arguments, overlap_mask_area_threshold=overlap, void_id=void_id
            )
        for result in (binary, encoded):
            assert [s["label_id"] for s in result["segments_info"]] == [label for _, label, _ in whole]
            assert [s["score"] for s in result["segments_info"]] == pytest.approx([s[0] for s in whole], abs=1e-6)
        for (_, _, pixels), mask, rle in zip(whole, binary["segmentation"], encoded["segmentation"], strict=True):
            assert {tuple(pixel) for pixel in mask.nonzero().tolist()} == pixels
            np.testing.assert_array_equal(decode_rle(rle), mask.numpy())

        shown = [item for item in covering if item[2] and item[3] >= overlap and item[1] not in void_ids]
        expected = np.full(painted["segmentation"].shape, -1 if void_id is None else void_id)
        for number, (_, _, pixels, _) in enumerate(shown, start=1):
            for pixel in pixels:
                expected[pixel] = number
        np.testing.assert_array_equal(painted["segmentation"].numpy(), expected)
        assert [s["label_id"] for s in painted["segments_info"]] == [label for _, label, _, _ in shown]
        assert [s["id"] for s in painted["segments_info"]] == list(range(1, len(shown) + 1))
        assert painted["segmentation"].dtype == torch.int32

    def test_void_class_removes_pixels_of_lower_scores_only(self):
        logits = logits_of([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]])
        masks = torch.stack([mask_of(["####...."]), mask_of(["..####.."]), mask_of(["....####"])])
        arguments = {"void_label_ids": [1], "threshold": 0.5}
        painted = instance_segmentation(logits, masks, **arguments)
        assert painted["segmentation"].tolist() == [[1, 1, 1, 1, -1, -1, 2, 2]]
        binary = instance_segmentation(logits, masks, **arguments, return_binary_maps=True)
        assert binary["segmentation"].int().tolist() == [[[1, 1, 1, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 0, 1, 1]]]
        assert [s["label_id"] for s in binary["segments_info"]] == [0, 0]

    @settings(deadline=None, max_examples=40)
    @given(SEEDS, VOID_CLASSES)
    def test_map_stacks_the_whole_masks(self, seed, void_ids):
        torch.manual_seed(seed)
        logits, masks = random_logits(queries=6, classes=CLASSES, height=5, width=6)
        arguments = {"threshold": 0.05, "void_label_ids": void_ids}
        binary = instance_segmentation(logits, masks, **arguments, return_binary_maps=True)["segmentation"]
        painted = instance_segmentation(logits, masks, **arguments)["segmentation"]
        expected = torch.full_like(painted, -1)
        for number, mask in reversed(list(enumerate(binary))):
            expected[mask] = number
        seen = {number: rank for rank, number in enumerate(sorted(set(expected.unique().tolist()) - {-1}), start=1)}
        assert torch.equal(painted, expected.apply_(lambda number: seen.get(number, -1)))

    def test_many_masks_are_encoded_in_parts(self):
        logits, masks = random_logits(queries=50, classes=CLASSES)
        logits[:, 2] -= 5  # a void class that rarely wins
        arguments = {"threshold": 0.05, "void_label_ids": [2], "void_threshold": 0.1}
        binary = instance_segmentation(logits, masks, **arguments, return_binary_maps=True)
        encoded = instance_segmentation(logits, masks, **arguments, return_coco_annotation=True)
        assert len(binary["segmentation"]) > 16 and binary["segments_info"] == encoded["segments_info"]
        np.testing.assert_array_equal(
            np.stack([decode_rle(rle) for rle in encoded["segmentation"]]), binary["segmentation"].numpy()
        )

    @pytest.mark.parametrize("void_id", [1, 5])
    def test_void_id_of_a_possible_segment_raises(self, void_id):
        with pytest.raises(ValueError, match=f"`void_id` {void_id} may be .* at most 5: choose 0"):
            instance_segmentation(*random_logits(), top_k=5, void_id=void_id)


@pytest.mark.parametrize("function", [semantic_segmentation, panoptic_segmentation, instance_segmentation])
class TestAllTasks:
    @pytest.mark.parametrize("void_ids", [[-1], [5], [0, 17]])
    def test_void_label_ids_that_are_not_classes_raise(self, function, void_ids):
        with pytest.raises(ValueError, match=r"`void_label_ids` must be classes in 0\.\.4, got"):
            function(*random_logits(classes=5), void_label_ids=void_ids)

    @pytest.mark.parametrize(
        ("void_ids", "message"),
        [
            (torch.tensor([True, False, True, False, False]), "must hold the numbers of classes"),
            (np.array([True, False]), "must hold the numbers of classes"),
            (["1"], "must hold the numbers of classes"),
            ([1.5], "must hold the numbers of classes"),
            ([None], "must hold the numbers of classes"),
            (torch.tensor([[1, 3]]), "must hold the numbers of classes"),
            (3, "must be a list of classes"),
            (torch.tensor(3), "must be a list of classes"),
            ((label for label in [1, 3]), "must be a list of classes"),
        ],
        ids=["mask tensor", "mask array", "text", "fraction", "None", "two axes", "int", "scalar", "generator"],
    )
    def test_label_ids_of_wrong_type_raise(self, function, void_ids, message):
        with pytest.raises(ValueError, match=f"`void_label_ids` {message}"):
            function(*random_logits(classes=5), void_label_ids=void_ids)
        if function is panoptic_segmentation:
            with pytest.raises(ValueError, match=f"`label_ids_to_fuse` {message}"):
                function(*random_logits(classes=5), label_ids_to_fuse=void_ids)

    @pytest.mark.parametrize("void_id", [1.5, "7", True, float("nan"), torch.tensor([255, 255])])
    def test_void_id_that_is_not_an_integer_raises(self, function, void_id):
        with pytest.raises(ValueError, match="`void_id` must be a whole number, got"):
            function(*random_logits(classes=5), void_id=void_id)

    def test_label_ids_may_be_any_collection(self, function):
        logits, masks = random_logits(classes=5)
        results = [
            function(logits, masks, void_label_ids=ids)
            for ids in ([1, 3], (3, 1, 1), {1, 3}, torch.tensor([1, 3]), np.array([3, 1]))
        ]
        maps = [result[0] if isinstance(result, tuple) else result["segmentation"] for result in results]
        assert all(torch.equal(maps[0], other) for other in maps[1:])

    def test_all_classes_may_be_void(self, function):
        result = function(*random_logits(classes=5), void_label_ids=range(5), void_id=-3)
        segmentation = result[0] if isinstance(result, tuple) else result["segmentation"]
        assert (segmentation == -3).all()
        assert isinstance(result, tuple) or result["segments_info"] == []

    def test_methods_pass_on_void_arguments(self, function):
        torch.manual_seed(5)
        logits, masks = random_logits(queries=9, classes=5)
        outputs = {"class_queries_logits": logits[None], "masks_queries_logits": masks[None]}
        void = {"void_threshold": 0.7, "void_label_ids": [0, 2, 4], "void_id": -9}
        method = getattr(GKCImageProcessor(), f"post_process_{function.__name__}")
        (got,) = method(outputs, **void)
        expected, plain = function(logits, masks, **void), function(logits, masks)
        if isinstance(expected, tuple):
            assert torch.equal(got, expected[0]) and not torch.equal(got, plain[0])
        else:
            assert torch.equal(got["segmentation"], expected["segmentation"])
            assert got["segments_info"] == expected["segments_info"]
            assert not torch.equal(got["segmentation"], plain["segmentation"])
