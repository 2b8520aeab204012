"""Tests that an image's result is the same alone and in any batch, through processor, model and post-processing.

In fp32, a batch and a single image differ by rounding, by a few parts in a million. This can change results in two
ways only, and the tests check that every difference is one of them: a decision may change where two numbers are within
1e-5 of each other; and a bit of an attention mask may flip where its logit is within rounding of zero, which changes
all of the image's logits. Such a flip is detected, and the difference must vanish in fp64.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, mask_decoder
from modeling_gkc.post_processing import resize_masks, semantic_scores

from .conftest import small_config

SIZES = [(1, 1), (5, 31), (32, 32), (30, 41), (33, 64), (64, 33), (64, 64), (57, 64), (1, 150), (150, 1), (96, 50)]
BOUND = 1e-5
ROUNDING = 1e-4
GARBAGE = 9.0
MASK_THRESHOLD = 0.5
THRESHOLD = 0.3
VOID_THRESHOLD = {"semantic": 1.2, "panoptic": 0.35, "instance": 0.35}


@pytest.fixture(scope="module")
def model() -> GKCForOpenVocabSegmentation:
    """Build a random model whose queries differ as those of a trained model do."""
    torch.manual_seed(0)
    model = GKCForOpenVocabSegmentation(small_config(hidden_size=64, mask_feature_size=64)).eval()
    decoder = model.model.mask_decoder
    with torch.no_grad():
        for layer in decoder.layers:
            for last in (layer.cross_attn.out_proj, layer.self_attn.out_proj, layer.fc2):
                last.weight *= 0.3
        # Random masks have logits up to 20, where fp32 has a precision of only 1e-5.
        decoder.mask_embedder.layers[-1].weight *= 0.25
    return model


@pytest.fixture(scope="module")
def class_embeds(model) -> torch.Tensor:
    """Return class embeddings that lie between the query embeddings."""
    outputs = forward(model, batch_of(images_of([(64, 64)], 100)), torch.eye(5, 16))
    queries = outputs.query_embeds[0]
    return F.normalize(queries[:5] - queries.mean(dim=0), dim=-1)


@dataclass
class Batch:
    pixel_values: torch.Tensor
    pixel_mask: torch.Tensor

    def take(self, images: list[int]) -> "Batch":
        return Batch(self.pixel_values[images], self.pixel_mask[images])


def images_of(sizes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def rounded(size: tuple[int, int]) -> tuple[int, int]:
    return tuple(math.ceil(side / 32) * 32 for side in size)


def batch_of(images: list[np.ndarray], extra: tuple[int, int] = (0, 0)) -> Batch:
    """Process images and pad the batch further at the bottom and right; each image's padding holds garbage."""
    inputs = GKCImageProcessor(do_resize=False)(images, input_data_format="channels_last", return_tensors="pt")
    padding = (0, extra[1], 0, extra[0])
    pixel_values, pixel_mask = F.pad(inputs.pixel_values, padding), F.pad(inputs.pixel_mask, padding)
    for image, values in zip(images, pixel_values, strict=True):
        height, width = rounded(image.shape[:2])
        values[:, height:] = GARBAGE
        values[:, :, width:] = GARBAGE
    return Batch(pixel_values, pixel_mask)


@torch.no_grad()
def forward(model, batch: Batch, class_embeds: torch.Tensor):
    dtype = model.dtype
    return model(batch.pixel_values.to(dtype), pixel_mask=batch.pixel_mask, class_embeds=class_embeds.to(dtype))


def difference(outputs, index: int, single) -> float:
    """Return the largest difference of logits between an image in a batch and the same image alone."""
    rows, columns = single.masks_queries_logits.shape[-2:]
    pairs = [
        (outputs.class_queries_logits[index], single.class_queries_logits[0]),
        (outputs.masks_queries_logits[index, :, :rows, :columns], single.masks_queries_logits[0]),
        (outputs.query_embeds[index], single.query_embeds[0]),
    ]
    assert torch.equal(outputs.content_sizes[index], single.content_sizes[0])
    return max(float((first - second).abs().max()) for first, second in pairs)


def record_attention_logits(model, batch: Batch, class_embeds: torch.Tensor) -> list[torch.Tensor]:
    """Return the mask logits (B, Q, h, w) of every layer and of the result, for images of one shape."""
    recorded = []
    original = mask_decoder.predict_masks

    def recording(*arguments):
        recorded.append(original(*arguments))
        return recorded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_decoder, "predict_masks", recording)
        forward(model, batch, class_embeds)
    return recorded


def is_flipped_attention_bit(model, class_embeds: torch.Tensor, images: list[np.ndarray], index: int) -> bool:
    """Return whether the image differs alone and in a batch because of attention bits within rounding of zero.

    The first layer whose attention masks differ must differ only where the logit is near zero, and all logits up to
    that layer must agree; in fp64 the results must agree entirely.
    """
    shape = rounded(images[index].shape[:2])
    same = [other for other, image in enumerate(images) if rounded(image.shape[:2]) == shape]
    group, single = batch_of([images[other] for other in same]), batch_of([images[index]])
    row = same.index(index)
    precise = copy.deepcopy(model).double()
    if difference(forward(precise, group, class_embeds), row, forward(precise, single, class_embeds)) > 1e-9:
        return False
    pairs = zip(
        record_attention_logits(model, group, class_embeds),
        record_attention_logits(model, single, class_embeds),
        strict=True,
    )
    for logits, alone in pairs:
        if (logits[row] - alone[0]).abs().max() > ROUNDING:
            return False
        flipped = (logits[row] >= 0) != (alone[0] >= 0)
        if flipped.any():
            return bool(alone[0][flipped].abs().max() <= ROUNDING)
    return False


def select_image(outputs, index: int) -> dict[str, torch.Tensor]:
    """Return one image of a batch in the form that post-processing takes."""
    names = ("class_queries_logits", "masks_queries_logits", "content_sizes")
    return {name: getattr(outputs, name)[index : index + 1] for name in names}


def post_process_all(
    outputs: dict[str, torch.Tensor], target: tuple[int, int]
) -> dict[str, tuple[torch.Tensor, list]]:
    """Return the map and the (label, score) pairs of its segments for every task."""
    processor = GKCImageProcessor()
    arguments = {"threshold": THRESHOLD, "mask_threshold": MASK_THRESHOLD, "overlap_mask_area_threshold": 0.2}
    given = {"semantic": {}, "panoptic": arguments | {"label_ids_to_fuse": [0, 2]}, "instance": arguments}
    found = {}
    for task, threshold in VOID_THRESHOLD.items():
        method = getattr(processor, f"post_process_{task}_segmentation")
        (result,) = method(outputs, target_sizes=[target], void_threshold=threshold, void_label_ids=[1], **given[task])
        segments = [] if task == "semantic" else result["segments_info"]
        pairs = [(segment["label_id"], segment["score"]) for segment in segments]
        found[task] = (result if task == "semantic" else result["segmentation"], pairs)
    return found


def ambiguous_pixels(outputs: dict[str, torch.Tensor], target: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return a mask (H, W) of the pixels where a decision is within 1e-5 of changing."""
    arguments = (
        outputs["class_queries_logits"][0],
        outputs["masks_queries_logits"][0],
        tuple(outputs["content_sizes"][0].tolist()),
        target,
    )
    best, second = semantic_scores(*arguments).topk(2, dim=0).values
    semantic = (best - second <= BOUND) | ((best - VOID_THRESHOLD["semantic"]).abs() <= BOUND)
    masks = resize_masks(*arguments[1:]).sigmoid()
    class_scores = arguments[0].softmax(dim=-1)[:, :-1]
    shown = torch.einsum("qk,qhw->qkhw", class_scores, masks).flatten(0, 1)
    is_ambiguous = ((masks - MASK_THRESHOLD).abs() <= BOUND).any(dim=0)
    is_ambiguous |= ((shown - VOID_THRESHOLD["instance"]).abs() <= BOUND).any(dim=0)
    best, second = (class_scores.amax(dim=1)[:, None, None] * masks).topk(2, dim=0).values
    return {"semantic": semantic, "panoptic": is_ambiguous | (best - second <= BOUND), "instance": is_ambiguous}


def has_ambiguous_segments(outputs: dict[str, torch.Tensor], target: tuple[int, int]) -> bool:
    """Return whether a query's class, a score's threshold or the order of two scores is within 1e-5 of changing."""
    class_scores = outputs["class_queries_logits"][0].softmax(dim=-1)
    best, second = class_scores.topk(2, dim=-1).values.unbind(dim=-1)
    processor = GKCImageProcessor()
    (found,) = processor.post_process_instance_segmentation(
        outputs, 0.0, target_sizes=[target], top_k=1000, return_binary_maps=True
    )
    scores = torch.tensor([1.0, THRESHOLD, 0.0] + [segment["score"] for segment in found["segments_info"]])
    margins = torch.cat([best - second, (best - THRESHOLD).abs(), scores.sort().values.diff()])
    return bool(margins.min() <= BOUND)


def assert_same_results(
    batch: dict[str, torch.Tensor], single: dict[str, torch.Tensor], target: tuple[int, int]
) -> int:
    """Compare maps and segments of all tasks and return the number of ambiguous pixels that differ."""
    ties = 0
    got, expected = post_process_all(batch, target), post_process_all(single, target)
    ambiguous = ambiguous_pixels(single, target)
    for task, (segmentation, segments) in expected.items():
        labels = [label for label, _ in segments]
        if [label for label, _ in got[task][1]] != labels:
            assert has_ambiguous_segments(single, target), f"{task}: segments differ, and no two scores are close"
            continue
        scores = [score for _, score in segments]
        assert [score for _, score in got[task][1]] == pytest.approx(scores, abs=BOUND), task
        differs = got[task][0] != segmentation
        assert not (differs & ~ambiguous[task]).any(), f"{task}: pixels differ that are not ambiguous"
        ties += int(differs.sum())
    return ties


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_split_and_padded_batches_match_single_images(model, class_embeds, seed, within):
    generator = np.random.default_rng(seed)
    chosen = SIZES[seed::4] + [SIZES[index] for index in generator.integers(0, len(SIZES), 4)]
    images = images_of(chosen, seed)
    singles = [forward(model, batch_of([image]), class_embeds) for image in images]
    targets = [tuple(generator.integers(1, 80, 2).tolist()) for _ in images]
    order = generator.permutation(len(images)).tolist()
    cut = int(generator.integers(1, len(images)))
    equal = 0
    compared = order + order[cut:]
    for part in (order, order[cut:]):
        batch = batch_of([images[index] for index in part], extra=tuple(generator.integers(0, 70, 2).tolist()))
        outputs = forward(model, batch, class_embeds)
        for position, index in enumerate(part):
            error = difference(outputs, position, singles[index])
            if error > BOUND:
                assert is_flipped_attention_bit(model, class_embeds, [images[other] for other in part], position), (
                    error
                )
                continue
            equal += 1
            within("batch against single images, max abs", error, BOUND)
            ties = assert_same_results(
                select_image(outputs, position), select_image(singles[index], 0), targets[index]
            )
            within("batch against single images, pixels that tie within 1e-5 and differ, of one image", ties, 3)
    within("batch against single images, fraction changed by a flipped bit", 1 - equal / len(compared), 0.2)


def test_compared_results_are_not_empty(model, class_embeds):
    """Comparing empty maps would show little."""
    single = select_image(forward(model, batch_of(images_of([(33, 64)], 0)), class_embeds), 0)
    results = post_process_all(single, (70, 60))
    for task, void in (("semantic", 255), ("panoptic", 0), ("instance", -1)):
        assert 0.2 < (results[task][0] == void).float().mean() < 0.8, task
        assert task == "semantic" or len(results[task][1]) >= 2, task
    assert all(pixels.float().mean() < 0.01 for pixels in ambiguous_pixels(single, (70, 60)).values())


@torch.no_grad()
@pytest.mark.parametrize("output_stages", [False, True])
def test_the_base_model_computes_each_image_as_if_it_were_alone(model, output_stages, within):
    precise = copy.deepcopy(model.model).double()
    images = images_of([*SIZES, (64, 64)], 12)
    batch = batch_of(images, extra=(40, 0))
    outputs = precise(batch.pixel_values, batch.pixel_mask, output_stages=output_stages)
    assert outputs.content_sizes.tolist() == [list(image.shape[:2]) for image in images]
    for index, image in enumerate(images):
        alone = batch_of([image])
        for inputs in ({"pixel_mask": alone.pixel_mask}, {}):
            single = precise(alone.pixel_values, **inputs, output_stages=output_stages)
            pairs = [(outputs, single), *zip(outputs.stages or (), single.stages or (), strict=True)]
            for together, apart in pairs:
                rows, columns = apart.masks_queries_logits.shape[-2:]
                masks = together.masks_queries_logits[index, :, :rows, :columns]
                error = (masks - apart.masks_queries_logits[0]).abs().max()
                within("base model, batch against single images in fp64, masks, max abs", error, 1e-9)
                error = (together.last_hidden_state[index] - apart.last_hidden_state[0]).abs().max()
                within("base model, batch against single images in fp64, queries, max abs", error, 1e-9)


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [
        ([(64, 64)] * 5, 1),
        ([(64, 64), (57, 40), (33, 64)], 1),
        ([(64, 64), (32, 64), (64, 64), (10, 60), (64, 50)], 2),
        ([(1, 1), (1, 150), (32, 32), (150, 1)], 3),
    ],
)
def test_images_of_equal_padded_size_share_one_forward_pass(model, class_embeds, sizes, calls):
    shapes = []
    hook = model.model.backbone.register_forward_pre_hook(
        lambda _, arguments, named: shapes.append((*arguments, *named.values())[0].shape), with_kwargs=True
    )
    try:
        forward(model, batch_of(images_of(sizes, 0), extra=(32, 64)), class_embeds)
    finally:
        hook.remove()
    assert len(shapes) == calls == len({rounded(size) for size in sizes})
    assert sum(shape[0] for shape in shapes) == len(sizes)


def test_batch_matches_single_images_in_double_precision(model, class_embeds, within):
    precise = copy.deepcopy(model).double()
    images = images_of([*SIZES, (64, 64)], 11)
    outputs = forward(precise, batch_of(images, extra=(40, 0)), class_embeds)
    for index, image in enumerate(images):
        single = forward(precise, batch_of([image]), class_embeds)
        within("batch against single images in fp64, max abs", difference(outputs, index, single), 1e-9)


def test_flipped_attention_bits_near_zero_are_detected(model, class_embeds):
    """The masks are shifted until a chosen logit of the first attention mask is zero within rounding."""
    images = images_of([(64, 64)] * 4, 5)
    moved = copy.deepcopy(model)
    bias = moved.model.mask_decoder.mask_embedder.layers[-1].bias
    features = []
    original = mask_decoder.predict_masks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_decoder, "predict_masks", lambda *given: features.append(given) or original(*given))
        forward(model, batch_of(images[:1]), class_embeds)
    embeds, first = features[0][0][0], features[0][1][0].flatten(1)  # (Q, C) and (C, h * w)
    start = bias.detach().clone()
    for query, position in [(query, position) for query in range(len(embeds)) for position in range(first.shape[1])]:
        feature = first[:, position]
        with torch.no_grad():
            bias.copy_(start - (embeds[query] @ feature) * feature / (feature @ feature))
        single = forward(moved, batch_of(images[:1]), class_embeds)
        if difference(forward(moved, batch_of(images), class_embeds), 0, single) > ROUNDING:
            assert is_flipped_attention_bit(moved, class_embeds, images, 0)
            break
    assert not is_flipped_attention_bit(model, class_embeds, images, 0)
