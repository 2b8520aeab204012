"""Tests of post-processing against golden numbers, direct formulas and pycocotools."""

import inspect
import math
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.utils import ModelOutput

from modeling_gkc import mask_resampling, post_processing
from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.post_processing import (
    decode_rle,
    instance_segmentation,
    panoptic_segmentation,
    resize_masks,
    semantic_scores,
    semantic_segmentation,
    semantic_segments,
    void_label,
)
from modeling_gkc.processing_gkc import GKCProcessor

from .logits_toys import logits_of, mask_of, random_logits

GOLDEN = Path(__file__).parent / "golden" / "reference_losses.npz"


@pytest.fixture(scope="module")
def golden() -> SimpleNamespace:
    arrays = np.load(GOLDEN)
    names = {"class_logits": "inf_cls", "mask_logits": "inf_mask", "sem": "sem", "pan": "pan", "pan_info": "pan_info"}
    return SimpleNamespace(**{key: torch.from_numpy(arrays[name]) for key, name in names.items()})


@pytest.fixture(params=[1, 5000, 32 * 2**20], ids=["row by row", "few rows", "one tile"])
def tile_bytes(request, monkeypatch) -> int:
    """Run tests with several tile heights, which must not change results."""
    monkeypatch.setattr(mask_resampling, "TILE_BYTES", request.param)
    return request.param


class TestGolden:
    def test_semantic_scores(self, golden, tile_bytes, within):
        scores = semantic_scores(golden.class_logits, golden.mask_logits)
        within("semantic scores against recorded values, max abs", (scores - golden.sem).abs().max(), 1e-5)

    def test_semantic_map(self, golden, tile_bytes):
        labels, scores = semantic_segmentation(golden.class_logits, golden.mask_logits)
        assert torch.equal(labels, golden.sem.argmax(dim=0))
        torch.testing.assert_close(scores, golden.sem.amax(dim=0), rtol=0, atol=1e-5)

    def test_panoptic(self, golden, tile_bytes):
        result = panoptic_segmentation(
            golden.class_logits,
            golden.mask_logits,
            threshold=0.3,
            overlap_mask_area_threshold=0.3,
            label_ids_to_fuse={2, 3, 4},
        )
        assert torch.equal(result["segmentation"], golden.pan)
        info = [[s["id"], s["label_id"], int(not s["was_fused"])] for s in result["segments_info"]]
        assert info == golden.pan_info.tolist()


class TestSemantic:
    @pytest.mark.parametrize("target", [None, (21, 17), (70, 90)])
    @pytest.mark.parametrize("classes", [11, 847])
    def test_matches_the_direct_formula(self, target, classes, tile_bytes, within):
        logits, masks = random_logits(queries=20, classes=classes)
        resized = resize_masks(masks, (30, 45), target)
        direct = torch.einsum("qk,qhw->khw", logits.softmax(-1)[:, :-1], resized.sigmoid())
        labels, scores = semantic_segmentation(logits, masks, (30, 45), target)
        for got, expected in (
            (semantic_scores(logits, masks, (30, 45), target), direct),
            (scores, direct.amax(0)),
        ):
            within("semantic scores against the direct formula, max abs", (got - expected).abs().max(), 1e-5)
        clear = direct.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-5
        assert torch.equal(labels[clear], direct.argmax(0)[clear]) and clear.float().mean() > 0.99
        assert labels.dtype == torch.int64

    @pytest.mark.parametrize(
        ("confidence", "favour", "most_computed"),
        [(0, 0, 300), (1, 0, 299), (12, 0, 150), (1, 20, 8)],
        ids=["all alike", "hesitant", "confident", "one wins everywhere"],
    )
    @pytest.mark.parametrize("size", [(37, 90), (150, 131)])
    def test_skipped_classes_never_have_the_highest_score(
        self, confidence, favour, most_computed, size, within, monkeypatch
    ):
        """Compare with all scores where few, some or all of 300 classes, each with a duplicate, are computed."""
        logits, masks = random_logits(queries=30, classes=300)
        logits = confidence * logits
        logits[:, 150:300] = logits[:, :150]
        logits[:, 7] += favour
        masks[:15] *= 20
        computed = []
        sums = post_processing._weighted_sums
        monkeypatch.setattr(
            post_processing,
            "_weighted_sums",
            lambda class_scores, masks: computed.append(class_scores.shape[1]) or sums(class_scores, masks),
        )
        labels, scores = semantic_segmentation(logits, masks, target_size=size)
        assert max(computed) <= most_computed and (max(computed) == 300) == (confidence == 0)
        direct = torch.einsum("qk,qhw->khw", logits.softmax(-1)[:, :-1], resize_masks(masks, None, size).sigmoid())
        within("best semantic scores against the direct formula, max abs", (scores - direct.amax(0)).abs().max(), 1e-5)
        chosen = direct.gather(0, labels[None])[0]
        within("semantic scores of the chosen classes below the best, max", (direct.amax(0) - chosen).max(), 1e-5)

    @pytest.mark.parametrize(("classes", "void"), [(1, 255), (255, 255), (256, 65535), (847, 65535)])
    def test_default_void_value_is_not_a_class(self, classes, void):
        assert void_label(classes) == void
        logits, masks = random_logits(classes=classes)
        plain, scores = semantic_segmentation(logits, masks)
        threshold = scores.median().item()
        labels, _ = semantic_segmentation(logits, masks, void_threshold=threshold)
        assert torch.equal(labels == void, scores < threshold)
        assert torch.equal(labels[labels != void], plain[labels != void])
        assert plain.max() < classes <= void

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_precisions(self, dtype):
        logits, masks = (tensor.to(dtype) for tensor in random_logits())
        labels, scores = semantic_segmentation(logits, masks, target_size=(20, 30))
        expected, _ = semantic_segmentation(logits.float(), masks.float(), target_size=(20, 30))
        assert torch.equal(labels, expected) and scores.dtype == torch.float32


def peak_memory(setup: str, call: str) -> float:
    """Return the peak memory growth in megabytes of a call in a separate process, including the result."""
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from modeling_gkc import post_processing\n"
        "from modeling_gkc.post_processing import *\n"
        "def held(field):\n"
        "    return int(Path('/proc/self/status').read_text().split(field + ':')[1].split()[0]) / 1024\n"
        "torch.set_num_threads(1)\n"
        f"{setup}\n"
        "semantic_segmentation(logits[:, :9], masks[:, :8, :8])\n"
        "before = held('VmRSS')\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # resets the peak
        f"{call}\n"
        "print(held('VmHWM') - before)\n"
    )
    root = Path(__file__).parent.parent
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return float(finished.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's record of memory")
def test_memory_is_bounded_with_847_classes(within):
    """Class scores of one image of 1024 x 2048 pixels need 7 GB; the bound is 300 MB above the inputs.

    The first tiles show the peak of the computation, while a whole image would take half a minute. The size of the
    results that are not computed is added: 64-bit classes and 32-bit scores of 7 of 8 rows.
    """
    setup = "logits, masks = torch.randn(100, 848), torch.randn(100, 256, 512)"
    tiles = "semantic_segmentation(logits, masks[:, :32], target_size=(128, 2048))\n"
    others = (
        "logits[:, 5] += 12\n"  # every query competes
        "panoptic_segmentation(logits, masks[:, :32], target_size=(128, 2048))\n"
        "instance_segmentation(logits, masks[:, :32], target_size=(128, 2048))\n"
        "instance_segmentation(logits, masks[:, :32], target_size=(128, 2048), return_coco_annotation=True)\n"
    )
    left_out = 7 / 8 * 1024 * 2048 * (8 + 4) / 2**20
    within("post-processing at 847 classes, MB above the inputs", peak_memory(setup, tiles + others) + left_out, 300)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's record of memory")
def test_memory_of_the_score_map_is_bounded_with_847_classes(within):
    """Check a bound below the 840 MB that the scores of all classes would take for this part of the image."""
    setup = (
        "from modeling_gkc import GKCImageProcessor\n"
        "logits, masks = torch.randn(100, 848), torch.randn(100, 32, 512)\n"
        "outputs = {'class_queries_logits': logits[None], 'masks_queries_logits': masks[None]}"
    )
    call = (
        "process = GKCImageProcessor().post_process_semantic_segmentation\n"
        "process(outputs, target_sizes=[(128, 2048)], return_scores=True)\n"
    )
    within("score map at 847 classes, MB above the inputs", peak_memory(setup, call), 300)


def direct_panoptic(class_logits, masks, threshold, mask_threshold, overlap, fuse):
    """Run the panoptic inference of Mask2Former on masks of the final size, one pixel at a time."""
    probabilities = class_logits.softmax(-1)
    kept = [
        (float(row.max()), int(row.argmax()), mask.sigmoid())
        for row, mask in zip(probabilities, masks, strict=True)
        if row.argmax() < len(row) - 1 and row.max() > threshold
    ]
    segmentation = torch.zeros(masks.shape[-2:], dtype=torch.int32)
    if not kept:
        return segmentation, []
    winner = torch.stack([score * mask for score, _, mask in kept]).argmax(dim=0)
    info, stuff = [], {}
    for index, (score, label, mask) in enumerate(kept):
        own = mask >= mask_threshold
        won, shown = winner == index, (winner == index) & own
        if not shown.any() or won.sum() / own.sum() < overlap:
            continue
        if label in stuff:
            segmentation[shown] = stuff[label]["id"]
            stuff[label]["score"] = max(stuff[label]["score"], score)
            continue
        info.append({"id": len(info) + 1, "label_id": label, "was_fused": label in fuse, "score": score})
        segmentation[shown] = info[-1]["id"]
        if label in fuse:
            stuff[label] = info[-1]
    return segmentation, info


class TestPanoptic:
    @pytest.mark.parametrize("seed", range(12))
    def test_matches_the_direct_formula(self, seed, tile_bytes):
        torch.manual_seed(seed)
        logits, masks = random_logits(queries=12, classes=4, spread=2.0)
        masks = F.interpolate(masks[None], size=(14, 18), mode="bilinear")[0]
        thresholds = [(0.5, 0.5, 0.8), (0.2, 0.5, 0.4), (0.0, 0.3, 0.0), (0.3, 0.7, 0.5)][seed % 4]
        fuse = [set(), {0, 2}, {0, 1, 2, 3}][seed % 3]
        result = panoptic_segmentation(logits, masks, None, (31, 40), *thresholds, label_ids_to_fuse=fuse)
        segmentation, info = direct_panoptic(logits, resize_masks(masks, None, (31, 40)), *thresholds, fuse)
        assert torch.equal(result["segmentation"], segmentation)
        assert result["segments_info"] == info

    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.sets(st.integers(0, 3)))
    def test_ids_are_consecutive_and_all_in_the_map(self, seed, threshold, overlap, fuse):
        torch.manual_seed(seed)
        logits, masks = random_logits(queries=10, classes=4, height=5, width=6)
        result = panoptic_segmentation(
            logits, masks, threshold=threshold, overlap_mask_area_threshold=overlap, label_ids_to_fuse=fuse
        )
        ids = [segment["id"] for segment in result["segments_info"]]
        assert ids == list(range(1, len(ids) + 1))
        assert set(result["segmentation"].unique().tolist()) - {0} == set(ids)
        stuff = [segment["label_id"] for segment in result["segments_info"] if segment["was_fused"]]
        assert len(stuff) == len(set(stuff)) and set(stuff) <= fuse
        assert all(threshold < segment["score"] <= 1 for segment in result["segments_info"])

    def test_mask_area_is_independent_of_the_class_score(self):
        """Drop a mask that loses most of its area; an area weighted by the class score would keep it."""
        logits = logits_of([[0.9, 0.05, 0.05], [0.05, 0.55, 0.4]])
        masks = torch.stack([mask_of(["####....", "####...."]), mask_of(["..######", "..######"])])
        result = panoptic_segmentation(logits, masks, threshold=0.3, overlap_mask_area_threshold=0.7)
        # The second mask wins 8 of its 12 pixels; its area weighted by the class score would be at most 6.6.
        assert [segment["label_id"] for segment in result["segments_info"]] == [0]
        assert result["segmentation"].tolist() == [[1] * 4 + [0] * 4] * 2
        result = panoptic_segmentation(logits, masks, threshold=0.3, overlap_mask_area_threshold=0.6)
        assert result["segmentation"].tolist() == [[1] * 4 + [2] * 4] * 2

    def test_merged_stuff_keeps_the_highest_score(self):
        logits = logits_of([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.8, 0.1, 0.1]])
        masks = torch.stack([mask_of(["##......"]), mask_of(["..##...."]), mask_of([".....###"])])
        fused = panoptic_segmentation(logits, masks, label_ids_to_fuse={0})
        assert fused["segmentation"].tolist() == [[1, 1, 2, 2, 0, 1, 1, 1]]
        assert [s["was_fused"] for s in fused["segments_info"]] == [True, False]
        assert fused["segments_info"][0]["score"] == pytest.approx(0.8)
        apart = panoptic_segmentation(logits, masks)
        assert apart["segmentation"].tolist() == [[1, 1, 2, 2, 0, 3, 3, 3]]

    def test_no_segments(self):
        logits = logits_of([[0.2, 0.8], [0.4, 0.6]])
        result = panoptic_segmentation(logits, torch.zeros(2, 4, 5), target_size=(3, 2))
        assert result["segments_info"] == []
        assert torch.equal(result["segmentation"], torch.zeros(3, 2, dtype=torch.int32))

    def test_class_score_threshold_is_exclusive(self):
        logits = logits_of([[0.5, 0.5, 0.0]])
        masks = mask_of(["##.."])[None]
        assert panoptic_segmentation(logits, masks, threshold=0.5)["segments_info"] == []
        assert len(panoptic_segmentation(logits, masks, threshold=0.499)["segments_info"]) == 1

    def test_mask_threshold_is_inclusive(self):
        result = panoptic_segmentation(logits_of([[1.0, 0.0]]), torch.tensor([[[8.0, 0.0, -8.0]]]))
        assert result["segmentation"].tolist() == [[1, 1, 0]]

    def test_mask_area_includes_pixels_at_the_threshold(self):
        """Drop the first mask, which wins one of its two pixels, less than 0.8 of them."""
        masks = torch.tensor([[[8.0, 0.0]], [[-8.0, 8.0]]])
        result = panoptic_segmentation(logits_of([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), masks)
        assert result["segmentation"].tolist() == [[0, 1]]
        assert [segment["label_id"] for segment in result["segments_info"]] == [1]


def direct_instances(class_logits, masks, threshold, mask_threshold, top_k):
    """Run the instance inference of Mask2Former on masks of the final size: (score, class, mask), best first."""
    scores = class_logits.softmax(-1)[:, :-1]
    found = []
    for pair in scores.flatten().argsort(descending=True, stable=True)[:top_k].tolist():
        query, label = divmod(pair, scores.shape[1])
        probability = masks[query].sigmoid()
        inside = probability > mask_threshold
        if inside.any():
            found.append((float(scores[query, label] * probability[inside].mean()), label, inside))
    return sorted((item for item in found if item[0] >= threshold), key=lambda item: -item[0])


class TestInstance:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("top_k", [1, 9, 1000])
    def test_matches_the_direct_formula(self, seed, top_k, tile_bytes):
        torch.manual_seed(seed)
        logits, masks = random_logits(queries=8, classes=4)
        threshold, mask_threshold = [(0.0, 0.5), (0.3, 0.5), (0.2, 0.8)][seed % 3]
        arguments = (logits, masks, (33, 47), (20, 30), threshold, mask_threshold)
        expected = direct_instances(logits, resize_masks(masks, (33, 47), (20, 30)), threshold, mask_threshold, top_k)
        result = instance_segmentation(*arguments, top_k=top_k, return_binary_maps=True)
        assert [s["label_id"] for s in result["segments_info"]] == [label for _, label, _ in expected]
        assert [s["score"] for s in result["segments_info"]] == pytest.approx([item[0] for item in expected], abs=1e-6)
        assert torch.equal(result["segmentation"], torch.stack([item[2] for item in expected]))
        assert [s["id"] for s in result["segments_info"]] == list(range(1, len(expected) + 1))

        encoded = instance_segmentation(*arguments, top_k=top_k, return_coco_annotation=True)["segmentation"]
        np.testing.assert_array_equal(np.stack([decode_rle(rle) for rle in encoded]), result["segmentation"].numpy())

    def test_higher_scores_cover_lower_scores_in_the_map(self, tile_bytes):
        logits = logits_of([[0.7, 0.1, 0.2], [0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])
        masks = torch.stack(
            [mask_of(["####...."]), mask_of(["..####.."]), mask_of(["...##..."]), mask_of([".....###"])]
        )
        result = instance_segmentation(logits, masks, threshold=0.4)
        assert [s["label_id"] for s in result["segments_info"]] == [1, 0, 0]  # the third query is fully covered
        assert result["segmentation"].tolist() == [[2, 2, 1, 1, 1, 1, 3, 3]]
        assert result["segmentation"].dtype == torch.int32
        stricter = instance_segmentation(logits, masks, threshold=0.4, overlap_mask_area_threshold=0.6)
        assert stricter["segmentation"].tolist() == [[-1, -1, 1, 1, 1, 1, 2, 2]]
        assert [s["id"] for s in stricter["segments_info"]] == [1, 2]

    def test_query_may_have_two_classes(self):
        logits = logits_of([[0.45, 0.45, 0.1]])
        masks = mask_of(["##.."])[None]
        whole = instance_segmentation(logits, masks, threshold=0.3, return_binary_maps=True)
        assert {s["label_id"] for s in whole["segments_info"]} == {0, 1} and len(whole["segmentation"]) == 2
        assert len(instance_segmentation(logits, masks, threshold=0.3)["segments_info"]) == 1

    @pytest.mark.parametrize(
        ("flag", "empty"), [("return_binary_maps", (0, 4, 5)), ("return_coco_annotation", []), (None, (4, 5))]
    )
    def test_no_segments(self, flag, empty):
        for masks in (torch.full((2, 4, 5), -9.0), torch.full((2, 4, 5), 9.0)):
            logits = torch.zeros(2, 6)
            result = instance_segmentation(logits, masks, threshold=0.5, **({flag: True} if flag else {}))
            found = result["segmentation"]
            assert result["segments_info"] == []
            assert (found if isinstance(found, list) else tuple(found.shape)) == empty

    def test_mask_threshold_is_exclusive(self):
        """Pixels at the threshold are outside, also for a void class, which leaves them to the next segment."""
        logits, masks = logits_of([[1.0, 0.0]]), torch.tensor([[[8.0, 0.0, -8.0]]])
        painted = instance_segmentation(logits, masks)
        assert painted["segmentation"].tolist() == [[1, -1, -1]]
        assert painted["segments_info"][0]["score"] == pytest.approx(1 / (1 + np.exp(-8)), abs=1e-6)
        whole = instance_segmentation(logits, masks, return_binary_maps=True)["segmentation"]
        assert whole.tolist() == [[[True, False, False]]]
        logits = logits_of([[0.0, 1.0, 0.0], [0.9, 0.0, 0.1]])
        masks = torch.tensor([[[8.0, 0.0, -8.0]], [[8.0, 8.0, -8.0]]])
        for form, expected in (({}, [[-1, 1, -1]]), ({"return_binary_maps": True}, [[[False, True, False]]])):
            result = instance_segmentation(logits, masks, void_label_ids=[1], **form)
            assert result["segmentation"].tolist() == expected

    def test_score_threshold_is_inclusive(self):
        one = torch.zeros(1, 2), torch.ones(1, 2, 2)
        (found,) = instance_segmentation(*one, threshold=0.1)["segments_info"]
        assert instance_segmentation(*one, threshold=found["score"])["segments_info"] == [found]

    @pytest.mark.parametrize("top_k", [0, -1, 1.5, None])
    def test_invalid_top_k_raises(self, top_k):
        with pytest.raises(ValueError, match=f"`top_k` must be a whole number of at least 1, got {top_k}"):
            instance_segmentation(*random_logits(), top_k=top_k)

    def test_two_mask_formats_raise(self):
        with pytest.raises(ValueError, match="Set only one"):
            instance_segmentation(*random_logits(), return_binary_maps=True, return_coco_annotation=True)


@dataclass
class Outputs:
    class_queries_logits: torch.Tensor
    masks_queries_logits: torch.Tensor
    content_sizes: torch.Tensor | None = None


class TestMethods:
    @pytest.fixture
    def outputs(self) -> Outputs:
        logits, masks = zip(*(random_logits() for _ in range(3)), strict=True)
        sizes = torch.tensor([[36, 48], [30, 41], [20, 48]])
        return Outputs(torch.stack(logits).requires_grad_(), torch.stack(masks).requires_grad_(), sizes)

    def test_each_image_has_its_own_content_and_target_size(self, outputs):
        processor = GKCImageProcessor()
        targets = [(50, 60), (31, 41), (7, 9)]
        for given_targets in (targets, torch.tensor(targets), None):
            semantic = processor.post_process_semantic_segmentation(outputs, target_sizes=given_targets)
            panoptic = processor.post_process_panoptic_segmentation(outputs, 0.3, 0.5, 0.8, {1}, given_targets)
            instance = processor.post_process_instance_segmentation(outputs, 0.3, target_sizes=given_targets, top_k=5)
            for index in range(3):
                one = (
                    outputs.class_queries_logits[index].detach(),
                    outputs.masks_queries_logits[index].detach(),
                    tuple(outputs.content_sizes[index].tolist()),
                    None if given_targets is None else targets[index],
                )
                assert torch.equal(semantic[index], semantic_segmentation(*one)[0])
                expected = panoptic_segmentation(*one, 0.3, label_ids_to_fuse={1})
                assert torch.equal(panoptic[index]["segmentation"], expected["segmentation"])
                assert panoptic[index]["segments_info"] == expected["segments_info"]
                assert instance[index]["segments_info"] == instance_segmentation(*one, 0.3, top_k=5)["segments_info"]
                assert not semantic[index].requires_grad

    def test_outputs_may_be_any_mapping_or_object(self, outputs):
        processor = GKCImageProcessor()
        expected = processor.post_process_semantic_segmentation(outputs)
        for container in (vars(outputs), ModelOutput(vars(outputs)), SimpleNamespace(**vars(outputs))):
            got = processor.post_process_semantic_segmentation(container)
            assert all(map(torch.equal, got, expected))

    def test_outputs_without_content_sizes_have_no_padding(self, outputs):
        outputs.content_sizes = None
        maps = GKCImageProcessor().post_process_semantic_segmentation(outputs)
        assert [tuple(labels.shape) for labels in maps] == [(9, 12)] * 3

    def test_void_threshold(self, outputs):
        maps = GKCImageProcessor().post_process_semantic_segmentation(outputs, void_threshold=7.0)
        assert all((labels == 255).all() for labels in maps)

    def test_wrong_number_of_target_sizes_raises(self, outputs):
        with pytest.raises(ValueError, match="got 2 for 3 images"):
            GKCImageProcessor().post_process_panoptic_segmentation(outputs, target_sizes=[(3, 4), (5, 6)])

    @pytest.mark.parametrize(
        "sizes",
        [(3, 4, 5), torch.tensor([3, 4, 5]), [(3, 4), (5, 6), (7,)], [(3, 4), (5, 6.5), (7, 8)], 3, ["ab"] * 3],
    )
    def test_invalid_target_sizes_raise(self, outputs, sizes):
        with pytest.raises(ValueError, match=r"`target_sizes` must give one \(height, width\) per image, such as"):
            GKCImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)

    def test_classes_to_fuse_may_be_a_tensor(self, outputs):
        method = GKCImageProcessor().post_process_panoptic_segmentation
        arguments = {"threshold": 0.1, "overlap_mask_area_threshold": 0.0}
        results = [method(outputs, label_ids_to_fuse=ids, **arguments) for ids in (range(5), torch.arange(5))]
        infos = [[image["segments_info"] for image in result] for result in results]
        assert infos[0] == infos[1] and any(segment["was_fused"] for image in infos[0] for segment in image)

    def test_outputs_without_logits_raise(self):
        with pytest.raises(ValueError, match="class_queries_logits"):
            GKCImageProcessor().post_process_semantic_segmentation({"logits": torch.zeros(1)})

    def test_arguments_of_the_stock_pipeline(self, outputs):
        processor = GKCImageProcessor()
        stock = {"threshold": 0.9, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.5, "target_sizes": None}
        for method in (processor.post_process_panoptic_segmentation, processor.post_process_instance_segmentation):
            assert len(method(outputs, **stock)) == 3


def all_results(logits: torch.Tensor, masks: torch.Tensor) -> dict[str, object]:
    arguments = (logits, masks, (30, 41), (21, 50))
    labels, scores = semantic_segmentation(*arguments)
    results = {
        "masks": resize_masks(masks, *arguments[2:]),
        "masks of the grid": resize_masks(masks),
        "scores": semantic_scores(*arguments),
        "labels": labels,
        "best scores": scores,
        "segments": semantic_segments(labels, scores, 5),
    }
    for name, result in {
        "panoptic": panoptic_segmentation(*arguments, 0.2, 0.5, 0.1),
        "map": instance_segmentation(*arguments, 0.1),
        "whole": instance_segmentation(*arguments, 0.1, return_binary_maps=True, void_label_ids=[1]),
    }.items():
        results[name], results[f"segments, {name}"] = result["segmentation"], result["segments_info"]
    return results


def assert_same(first: dict[str, object], second: dict[str, object]) -> None:
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name
            assert not second[name].requires_grad, name
        else:
            assert value and value == second[name], name


class TestAutocastAndGradients:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_results_are_independent_of_autocast(self, dtype):
        logits, masks = random_logits(queries=20)
        expected = all_results(logits, masks)
        with torch.autocast("cpu", dtype):
            assert_same(expected, all_results(logits, masks))
            assert (logits @ logits.T).dtype == dtype  # autocast is still enabled for the caller

    def test_results_have_no_gradients(self):
        logits, masks = random_logits(queries=20)
        assert_same(all_results(logits, masks), all_results(logits.requires_grad_(), masks.requires_grad_()))


FUNCTIONS = [semantic_scores, semantic_segmentation, panoptic_segmentation, instance_segmentation]


@pytest.mark.parametrize("function", FUNCTIONS)
class TestFinite:
    @pytest.mark.parametrize(
        ("number", "which"),
        [(torch.nan, "class"), (torch.inf, "class"), *((x, "mask") for x in (torch.nan, torch.inf, -torch.inf))],
    )
    def test_non_finite_logits_raise(self, function, number, which):
        logits, masks = random_logits()
        (logits if which == "class" else masks).flatten()[3] = number
        with pytest.raises(ValueError, match=f"The {which} logits contain NaN or infinity.* bf16 or fp32"):
            function(logits, masks)

    def test_class_logits_may_be_minus_infinity_but_not_all(self, function):
        logits, masks = random_logits()
        logits[:, 1] = -torch.inf
        result = function(logits, masks)
        if function is semantic_scores:
            assert (result[1] == 0).all()
        logits[2] = -torch.inf
        with pytest.raises(ValueError, match="The class logits contain"):
            function(logits, masks)


SHARES = ("threshold", "mask_threshold", "overlap_mask_area_threshold", "void_threshold")


class TestArguments:
    """Invalid arguments raise errors that name them; `tests.fuzz.post_processing` tries many more."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1.5, "0.5", True, [0.5]])
    @pytest.mark.parametrize("name", SHARES)
    @pytest.mark.parametrize("function", [panoptic_segmentation, instance_segmentation])
    def test_thresholds_outside_0_to_1_raise(self, function, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be a number between 0 and 1, got"):
            function(*random_logits(), **{name: value})

    @pytest.mark.parametrize("value", [math.nan, -0.1, 7.5, "1"])
    def test_semantic_void_threshold_lies_between_0_and_the_number_of_queries(self, value):
        for call in (semantic_segmentation, semantic_by_method):
            with pytest.raises(ValueError, match="`void_threshold` must be a number between 0 and 7, the number of"):
                call(*random_logits(queries=7), void_threshold=value)

    def test_numpy_and_torch_numbers_are_accepted(self):
        logits = random_logits()
        expected = panoptic_segmentation(*logits, threshold=0.25, target_size=(4, 5))
        for number in (np.float32(0.25), np.array(0.25), torch.tensor(0.25)):
            got = panoptic_segmentation(*logits, threshold=number, target_size=np.array([4, 5]))
            assert torch.equal(got["segmentation"], expected["segmentation"])

    @pytest.mark.parametrize(
        "function", [semantic_scores, semantic_segmentation, panoptic_segmentation, instance_segmentation]
    )
    @pytest.mark.parametrize(
        ("which", "change", "message"),
        [
            (0, lambda logits: logits.numpy(), r"`class_logits` must be a tensor \(Q, K \+ 1\) .*, got a ndarray"),
            (1, lambda logits: "masks", r"`mask_logits` must be a tensor \(Q, h, w\) .*, got a str"),
            (1, lambda logits: logits > 0, "`mask_logits` must be a tensor .* got of torch.bool"),
            (0, lambda logits: logits[None], r"`class_logits` must have the shape \(Q, K \+ 1\), got \(1, 7, 6\)"),
            (
                0,
                lambda logits: logits[:, :1],
                "`class_logits` must have at least two columns, one class and no-object",
            ),
            (0, lambda logits: logits[:5], "`class_logits` and `mask_logits` must be of the same queries"),
            (
                0,
                lambda logits: logits.to_sparse(),
                r"`class_logits` must be a dense .*, got the layout torch.sparse_coo",
            ),
            (
                1,
                lambda logits: logits.to_sparse(),
                r"`mask_logits` must be a dense .*: convert it to a dense one first",
            ),
            (1, lambda logits: logits.to_mkldnn(), r"`mask_logits` must be a dense .*torch._mkldnn"),
            (1, lambda logits: logits.to(torch.float8_e4m3fn), r"`mask_logits` must have at least 16 bits.*float8"),
            (
                0,
                lambda logits: torch.nested.nested_tensor(list(logits), layout=torch.jagged),
                "`class_logits` must be a dense .* got a nested tensor",
            ),
        ],
    )
    def test_logits_with_wrong_shapes_raise(self, function, which, change, message):
        logits = list(random_logits())
        logits[which] = change(logits[which])
        with pytest.raises(ValueError, match=message):
            function(*logits)

    def test_batches_with_wrong_shapes_raise(self):
        logits, masks = torch.zeros(2, 7, 6), torch.zeros(2, 7, 9, 12)
        for outputs in ((logits, masks[:1]), (logits[0], masks), (logits.numpy(), masks), (logits[..., :1], masks)):
            with pytest.raises(ValueError, match="`class_queries_logits`"):
                GKCImageProcessor().post_process_panoptic_segmentation(Outputs(*outputs))

    @pytest.mark.parametrize("size", ["ab", 5, (3,), (3, 4.5), (0, 3), (-1, 3), {3, 4}, (2**20, 2**20)])
    @pytest.mark.parametrize("name", ["content_size", "target_size"])
    def test_invalid_sizes_raise(self, name, size):
        for function in (semantic_segmentation, panoptic_segmentation, instance_segmentation, semantic_scores):
            with pytest.raises(ValueError, match=f"`{name}`"):
                function(*random_logits(), **{name: size})
        with pytest.raises(ValueError, match=f"`{name}`"):
            resize_masks(random_logits()[1], **{name: size})

    @pytest.mark.parametrize("ids", [3, "12", b"\1", torch.tensor(1), np.array(1), [9], [True]])
    def test_invalid_class_ids_raise(self, ids):
        for name in ("void_label_ids", "label_ids_to_fuse"):
            with pytest.raises(ValueError, match=f"`{name}` must"):
                panoptic_segmentation(*random_logits(), **{name: ids})

    @pytest.mark.parametrize("value", ["no", 1, None])
    @pytest.mark.parametrize("name", ["return_binary_maps", "return_coco_annotation"])
    def test_flags_that_are_not_booleans_raise(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be True or False, got {value!r}"):
            instance_segmentation(*random_logits(), **{name: value})

    def test_void_id_outside_64_bits_raises(self):
        with pytest.raises(ValueError, match=f"`void_id` {2**70} does not fit"):
            semantic_segmentation(*random_logits(), void_id=2**70)
        found = instance_segmentation(*random_logits(queries=2, classes=1), top_k=10**9, void_id=3)
        assert 3 in found["segmentation"]

    def test_invalid_semantic_maps_raise(self):
        class_map, scores = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
        for name, arguments in {
            "class_map": (class_map.float(), scores, 3),
            "scores": (class_map, scores[:1], 3),
            "`scores` must be finite": (class_map, scores * math.nan, 3),
            "num_classes": (class_map, scores, 0),
        }.items():
            with pytest.raises(ValueError, match=name):
                semantic_segments(*arguments)

    @pytest.mark.parametrize("value", [math.nan, -1, "5", 2**31])
    def test_void_label_of_an_invalid_number_of_classes_raises(self, value):
        with pytest.raises(ValueError, match="`num_classes` must be a whole number"):
            void_label(value)


def semantic_by_method(class_logits, mask_logits, **arguments):
    outputs = Outputs(class_logits[None], mask_logits[None])
    return GKCImageProcessor().post_process_semantic_segmentation(outputs, **arguments)


def test_methods_raise_for_non_finite_logits():
    logits, masks = (tensor[None] for tensor in random_logits())
    masks[0, 0, 0, 0] = torch.nan
    outputs = {"class_queries_logits": logits, "masks_queries_logits": masks}
    for task in ("semantic", "panoptic", "instance"):
        with pytest.raises(ValueError, match="The mask logits contain"):
            getattr(GKCImageProcessor(), f"post_process_{task}_segmentation")(outputs)


MASK2FORMER_DEFAULTS = {  # intended differences
    # transformers ignores this argument; GKC drops covered instances, and none by default.
    ("post_process_instance_segmentation", "overlap_mask_area_threshold"): 0.0,
}


@pytest.mark.parametrize("owner", [GKCImageProcessor, GKCProcessor])
def test_arguments_match_mask2former(owner):
    """Compare methods, arguments, their order and defaults; additional arguments are keyword-only."""
    names = [name for name in dir(Mask2FormerImageProcessorPil) if name.startswith("post_process_")]
    assert len(names) == 3
    for name in names:
        theirs = inspect.signature(getattr(Mask2FormerImageProcessorPil, name)).parameters
        ours = inspect.signature(getattr(owner, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[other].kind is inspect.Parameter.KEYWORD_ONLY for other in list(ours)[len(theirs) :])
        for argument, parameter in theirs.items():
            assert ours[argument].default == MASK2FORMER_DEFAULTS.get((name, argument), parameter.default)


@pytest.mark.parametrize("classes", [5, 70])
def test_scores_of_all_classes(classes, monkeypatch):
    """Scores have the format of transformers, also if tiles hold few rows or fewer classes than there are."""
    monkeypatch.setattr(mask_resampling, "TILE_BYTES", 80_000)
    processor, (logits, masks) = GKCImageProcessor(), random_logits(classes=classes)
    outputs = Outputs(logits[None], masks[None], torch.tensor([[36, 48]]))
    for targets in (None, [(50, 60)]):
        (plain,) = processor.post_process_semantic_segmentation(outputs, targets, void_label_ids=[1])
        (found,) = processor.post_process_semantic_segmentation(outputs, targets, True, void_label_ids=[1])
        assert type(found) is SemanticSegmentationPostProcessorOutput
        assert torch.equal(found.segmentation, plain)
        expected = semantic_scores(logits, masks, (36, 48), targets and targets[0])
        assert torch.equal(found.segmentation_scores, expected)
        best = expected.argmax(dim=0)
        assert torch.equal(found["segmentation"], best.masked_fill(best == 1, void_label(classes)))
    with pytest.raises(ValueError, match="`return_segmentation_scores`"):
        processor.post_process_semantic_segmentation(outputs, None, [(50, 60)])


@pytest.mark.parametrize("classes", [5, 70])
def test_score_map(classes, monkeypatch, within):
    """The highest class score of each pixel, also of void pixels, alone and with the scores of all classes."""
    monkeypatch.setattr(mask_resampling, "TILE_BYTES", 80_000)
    process, (logits, masks) = (
        GKCImageProcessor().post_process_semantic_segmentation,
        random_logits(queries=9, classes=classes),
    )
    outputs = Outputs(logits[None], masks[None], torch.tensor([[36, 48]]))
    for targets in (None, [(50, 60)]):
        void = {"void_label_ids": [1], "void_threshold": 0.7}
        (plain,) = process(outputs, targets, **void)
        (found,) = process(outputs, targets, return_scores=True, **void)
        (both,) = process(outputs, targets, True, return_scores=True, **void)
        assert type(found) is SemanticSegmentationPostProcessorOutput and set(found.keys()) == {
            "segmentation",
            "scores",
        }
        assert set(both.keys()) == {"segmentation", "scores", "segmentation_scores"}
        assert torch.equal(found.segmentation, plain) and torch.equal(both.segmentation, plain)
        assert torch.equal(found.scores, both.scores) and found.scores.dtype == torch.float32
        labels, scores = semantic_segmentation(logits, masks, (36, 48), targets and targets[0], **void)
        assert torch.equal(found.segmentation, labels) and torch.equal(found.scores, scores)
        within(
            "score map against the best of all scores", (scores - both.segmentation_scores.amax(0)).abs().max(), 1e-6
        )
        assert (plain == void_label(classes)).any() and (plain != void_label(classes)).any()
    with pytest.raises(ValueError, match="`return_scores`"):
        process(outputs, return_scores=[1])


def test_masks_of_panoptic_segments():
    outputs = Outputs(*(tensor[None] for tensor in random_logits()))
    settings = {"threshold": 0.1, "overlap_mask_area_threshold": 0.1, "target_sizes": [(40, 50)]}
    (as_map,) = GKCImageProcessor().post_process_panoptic_segmentation(outputs, **settings)
    (as_masks,) = GKCImageProcessor().post_process_panoptic_segmentation(outputs, **settings, return_binary_maps=True)
    assert as_masks["segments_info"] == as_map["segments_info"] and len(as_map["segments_info"]) > 1
    assert as_masks["segmentation"].dtype == torch.bool
    for segment, mask in zip(as_map["segments_info"], as_masks["segmentation"], strict=True):
        assert torch.equal(mask, as_map["segmentation"] == segment["id"])
    (none,) = GKCImageProcessor().post_process_panoptic_segmentation(outputs, 1.0, return_binary_maps=True)
    assert none["segmentation"].shape == (0, 9, 12) and none["segments_info"] == []


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("content", [(36, 48), (35, 47), (20, 48), (36, 13)])
def test_swapped_target_sizes_warn(content, task):
    processor, (logits, masks) = GKCImageProcessor(), random_logits()
    outputs = Outputs(logits[None].expand(2, -1, -1), masks[None].expand(2, -1, -1, -1), torch.tensor([content] * 2))
    method = getattr(processor, f"post_process_{task}_segmentation")
    upright, turned = (content[0] * 3, content[1] * 3), (content[1] * 3 + 1, content[0] * 3 - 1)
    with pytest.warns(UserWarning, match=r"image 2 \(index 1\).*`original_sizes`") as caught:
        method(outputs, target_sizes=[upright, turned])
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(outputs, target_sizes=[upright, (50, 50)])
        method(outputs)
        squashing = GKCImageProcessor(size={"height": content[0], "width": content[1]})
        getattr(squashing, method.__name__)(outputs, target_sizes=[upright, turned])
