"""Matching and losses: golden numbers, transformers' own loss, and the cases that break training runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from modeling_gkc import loss_gkc
from modeling_gkc.loss_gkc import (
    GKCCriterion,
    GKCMatcher,
    LossDivisors,
    MaskParts,
    classification_loss,
    dice_loss,
    mask_costs,
    mask_loss,
    sample_all_maps,
    sample_points,
)
from modeling_gkc.mask_decoder import predict_masks

from .conftest import small_config


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parent / "golden" / "reference_losses.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


def test_classification_loss_golden(golden, within):
    matches = [(golden["src0"], golden["tgt0"]), (golden["src1"], golden["tgt1"])]
    loss = classification_loss(golden["ce_logits"], [golden["lab0"], golden["lab1"]], matches, 0.1)
    within("plain-name cross-entropy against recorded value", (loss - golden["ce_plain"]).abs(), 1e-5)


def batch(num_segments=(3, 1), size=(24, 40)):
    """Blocky masks: (N, H, W) of 0 and 1 for each image, and their classes."""
    masks = [(torch.rand(count, size[0] // 8, size[1] // 8) > 0.5).float() for count in num_segments]
    masks = [
        torch.nn.functional.interpolate(m[None], size=size)[0] if len(m) else torch.zeros(0, *size) for m in masks
    ]
    return masks, [torch.randint(0, 5, (count,)) for count in num_segments]


def stage_logits(batch_size=2, num_queries=10, num_classes=5, size=(6, 10)):
    return torch.randn(batch_size, num_queries, num_classes + 1), 3 * torch.randn(batch_size, num_queries, *size)


def test_losses_equal_transformers_on_the_same_points(monkeypatch, within):
    """With the sampled points fixed to a grid, every loss of every stage equals transformers' Mask2Former loss."""
    config = small_config(train_num_points=240, importance_sample_ratio=0.0, oversample_ratio=1.0)
    grid = torch.stack(
        torch.meshgrid((torch.arange(10) + 0.3) / 10, (torch.arange(24) + 0.6) / 24, indexing="xy"), dim=-1
    ).reshape(1, -1, 2)
    source_config = Mask2FormerConfig(
        train_num_points=240, importance_sample_ratio=0.0, oversample_ratio=1.0, num_labels=5, no_object_weight=0.1
    )
    source = Mask2FormerLoss(source_config, {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0})
    mask_labels, class_labels = batch()
    stages = [stage_logits() for _ in range(3)]
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: grid[:, : shape[-2]].expand(*shape).clone())
    expected = source(
        masks_queries_logits=stages[-1][1],
        class_queries_logits=stages[-1][0],
        mask_labels=mask_labels,
        class_labels=class_labels,
        auxiliary_predictions=[
            {"class_queries_logits": classes, "masks_queries_logits": masks} for classes, masks in stages[:-1]
        ],
    )
    losses, _ = GKCCriterion(config)(*zip(*stages, strict=True), mask_labels, class_labels)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        within("losses of every stage against transformers' Mask2Former", (loss - expected[name]).abs(), 1e-5)


def test_pairwise_costs_are_the_pairs_losses():
    logits, labels = torch.randn(4, 50), (torch.rand(3, 50) > 0.5).float()
    cross_entropy, dice = mask_costs(logits, labels)
    for query in range(4):
        for segment in range(3):
            pair = logits[query : query + 1], labels[segment : segment + 1]
            torch.testing.assert_close(cross_entropy[query, segment], mask_loss(*pair, 1.0))
            torch.testing.assert_close(dice[query, segment], dice_loss(*pair, 1.0))


def test_matching_finds_the_perfect_queries():
    config = small_config()
    mask_labels, class_labels = batch((3, 2))
    classes, masks = stage_logits(size=(24, 40))
    wanted = [torch.tensor([7, 2, 4]), torch.tensor([9, 0])]
    for image, queries in enumerate(wanted):
        masks[image, queries] = 20 * mask_labels[image] - 10
        classes[image, queries] = 10 * torch.nn.functional.one_hot(class_labels[image], 6).float()
    losses, matches = GKCCriterion(config)([classes], [masks], mask_labels, class_labels)
    for (queries, segments), expected in zip(matches[0], wanted, strict=True):
        assert queries[segments.argsort()].tolist() == expected.tolist()
    assert losses["loss_mask"] < 0.5 and losses["loss_dice"] < 0.2


def test_image_without_segments():
    criterion = GKCCriterion(small_config())
    mask_labels, class_labels = batch((0, 2))
    classes, masks = (tensor.requires_grad_() for tensor in stage_logits())
    losses, matches = criterion([classes], [masks], mask_labels, class_labels)
    assert len(matches[0][0][0]) == 0 and len(matches[0][1][0]) == 2
    criterion.total(losses).backward()
    assert classes.grad.isfinite().all() and masks.grad.isfinite().all()


def test_batch_without_segments_backpropagates_exact_zero_masks():
    criterion = GKCCriterion(small_config())
    mask_labels, class_labels = batch((0, 0))
    classes, masks = (tensor.requires_grad_() for tensor in stage_logits())
    losses, _ = criterion([classes], [masks], mask_labels, class_labels)
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    criterion.total(losses).backward()
    assert (masks.grad == 0).all() and (classes.grad != 0).any()


def test_more_segments_than_queries():
    mask_labels, class_labels = batch((14, 1))
    losses, matches = GKCCriterion(small_config())(*[[tensor] for tensor in stage_logits()], mask_labels, class_labels)
    assert len(matches[0][0][0]) == 10
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_cost_names_the_sample(bad):
    mask_labels, class_labels = batch((2, 2))
    classes, masks = stage_logits()
    masks[1, 3] = bad
    with pytest.raises(ValueError, match="sample 1"):
        GKCCriterion(small_config())([classes], [masks], mask_labels, class_labels)


def test_costs_are_fp32_under_autocast(monkeypatch):
    seen = []
    original = loss_gkc.mask_costs
    monkeypatch.setattr(loss_gkc, "mask_costs", lambda a, b: seen.append(original(a, b)) or seen[-1])
    mask_labels, class_labels = batch()
    classes, masks = stage_logits()
    with torch.autocast("cpu", torch.bfloat16):
        GKCCriterion(small_config())([classes.bfloat16()], [masks.bfloat16()], mask_labels, class_labels)
    assert {cost.dtype for pair in seen for cost in pair} == {torch.float32}


@pytest.mark.parametrize(
    ("mask_shape", "classes", "message"),
    [((2, 24, 40), [1], "Sample 0.*N = 1"), ((1, 24, 40), [7], r"class ids \[7\]"), ((24, 40), [1], "Sample 0")],
)
def test_mismatched_labels_raise(mask_shape, classes, message):
    with pytest.raises(ValueError, match=message):
        GKCCriterion(small_config())(
            *[[tensor] for tensor in stage_logits(batch_size=1)], [torch.zeros(mask_shape)], [torch.tensor(classes)]
        )


@pytest.mark.parametrize("value", [255, -1, float("nan")])
def test_masks_that_are_not_0_to_1_are_refused(value):
    stages = [[tensor] for tensor in stage_logits(batch_size=1)]
    mask = torch.zeros(1, 24, 40).index_fill(1, torch.arange(9), value)
    mask = mask if isinstance(value, float) else mask.to(torch.int16)
    with pytest.raises(ValueError, match="Sample 0: `mask_labels` must be 0 outside and 1 inside"):
        GKCCriterion(small_config())(*stages, [mask], [torch.tensor([0])])
    GKCCriterion(small_config())(*stages, [torch.full((1, 24, 40), 0.5)], [torch.tensor([0])])


def test_unknown_loss_name():
    with pytest.raises(KeyError, match="loss_boxes"):
        GKCCriterion(small_config()).weight("loss_boxes")


def test_sample_points_reads_pixel_centers():
    ramp = torch.arange(12.0).view(1, 1, 3, 4)
    centres = torch.tensor([[[0.125, 1 / 6], [0.875, 5 / 6], [0.375, 0.5]]])
    torch.testing.assert_close(sample_points(ramp, centres)[0, 0], torch.tensor([0.0, 11.0, 5.0]))


def test_normalizer_is_averaged_over_processes(monkeypatch):
    """Two processes of which the other holds no segment: the count is halved, so the mean of gradients is right."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value)
    assert loss_gkc.mean_over_processes(torch.tensor(6.0)) == 3.0


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (14, 1)])
def test_divisors_counted_ahead_are_those_counted_from_the_matches(counts):
    """Also with more segments than queries, and with none at all."""
    mask_labels, class_labels = batch(counts)
    stages = [[tensor] * 2 for tensor in stage_logits()]
    torch.manual_seed(1)
    expected, _ = GKCCriterion(small_config())(*stages, mask_labels, class_labels)
    torch.manual_seed(1)
    divisors = LossDivisors.from_counts(counts, 10, 0.1)
    losses, _ = GKCCriterion(small_config())(*stages, mask_labels, class_labels, divisors=divisors)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=0)


def test_given_divisors_divide(monkeypatch):
    """Without any counting over processes: a loss under three times the divisors is a third."""
    mask_labels, class_labels = batch()
    stages = [[tensor] * 2 for tensor in stage_logits()]
    divisors = LossDivisors.from_counts((3, 1), 10, 0.1)
    assert divisors.num_masks == 4 and divisors.class_weight == torch.tensor(4 + 16 * 0.1)
    tripled = LossDivisors(3 * divisors.num_masks, 3 * divisors.class_weight)
    monkeypatch.setattr(loss_gkc, "mean_over_processes", lambda _: pytest.fail("counted again"))
    torch.manual_seed(1)
    expected, _ = GKCCriterion(small_config())(*stages, mask_labels, class_labels, divisors=divisors)
    torch.manual_seed(1)
    losses, _ = GKCCriterion(small_config())(*stages, mask_labels, class_labels, divisors=tripled)
    for name, loss in losses.items():
        torch.testing.assert_close(3 * loss, expected[name])


def test_micro_batch_without_segments_uses_the_divisor_of_the_step():
    """The other micro-batch holds all segments of the step: this one's masks lose nothing, its queries no-objects."""
    classes, masks = (tensor.requires_grad_() for tensor in stage_logits())
    both = (LossDivisors.from_counts(counts, 10, 0.1) for counts in ((0, 0), (3, 1)))
    averaged = LossDivisors(*(sum(pair) / 2 for pair in zip(*(vars(each).values() for each in both), strict=True)))
    mask_labels, class_labels = batch((0, 0))
    losses, _ = GKCCriterion(small_config())([classes], [masks], mask_labels, class_labels, divisors=averaged)
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    expected = -0.1 * classes.log_softmax(-1)[..., -1].sum() / ((0.1 * 20 + 4 + 0.1 * 16) / 2)
    torch.testing.assert_close(losses["loss_cross_entropy"], expected)


def matched_one_by_one(config, class_logits, point_logits, class_labels, point_labels):
    """Compute the matching of one stage image by image and pair by pair."""
    class_logits, point_logits, matches = class_logits.detach(), point_logits.detach(), []
    for image, classes in enumerate(class_labels):
        costs = torch.zeros(class_logits.shape[1], len(classes))
        probabilities = class_logits[image].softmax(-1)
        for query, logits in enumerate(point_logits[image]):
            for segment, labels in enumerate(point_labels[image]):
                pair = logits[None], labels[None]
                costs[query, segment] = config.mask_weight * mask_loss(*pair, 1.0)
                costs[query, segment] += config.dice_weight * dice_loss(*pair, 1.0)
                costs[query, segment] -= config.class_weight * probabilities[query, classes[segment]]
        matches.append(tuple(map(torch.from_numpy, linear_sum_assignment(costs.numpy()))))
    return matches


def losses_one_by_one(config, class_logits, mask_logits, mask_labels, class_labels, point_seeds=None):
    """Compute the criterion by stage and image, with float masks, sampling in the documented order."""
    generators = [torch.default_generator] * len(mask_labels)
    if point_seeds is not None:
        generators = [torch.Generator().manual_seed(seed) for seed in point_seeds]
    num_points, num_masks = config.train_num_points, max(1, sum(map(len, class_labels)))
    num_uncertain = int(config.importance_sample_ratio * num_points)
    shared = [torch.rand(1, num_points, 2, generator=generator) for generator in generators]
    point_labels = [
        torch.cat([sample_points(mask[None, None], points)[0] for mask in masks] or [torch.zeros(0, num_points)])
        for masks, points in zip(mask_labels, shared, strict=True)
    ]
    losses, all_matches = {}, []
    for stage, (classes, masks) in enumerate(zip(class_logits, mask_logits, strict=True)):
        sampled = torch.cat([sample_points(each[None], points) for each, points in zip(masks, shared, strict=True)])
        matches = matched_one_by_one(config, classes, sampled, class_labels, point_labels)
        counts = [len(queries) for queries, _ in matches]
        candidates, uniform = (
            [torch.rand(count, number, 2, generator=g) for count, g in zip(counts, generators, strict=True)]
            for number in (int(num_points * config.oversample_ratio), num_points - num_uncertain)
        )
        mask_sum, dice_sum = torch.zeros(2)
        for image, pairs in enumerate(matches):
            for number, (query, segment) in enumerate(zip(*pairs, strict=True)):
                logits, labels = masks[image, query][None, None], mask_labels[image][segment][None, None]
                certainty = sample_points(logits, candidates[image][number][None])[0, 0].abs()
                points = candidates[image][number][certainty.argsort()[:num_uncertain]]
                points = torch.cat([points, uniform[image][number]])[None]
                pair = sample_points(logits, points)[0], sample_points(labels, points)[0]
                mask_sum, dice_sum = mask_sum + mask_loss(*pair, num_masks), dice_sum + dice_loss(*pair, num_masks)
        suffix = "" if stage == len(class_logits) - 1 else f"_{stage}"
        plain = classification_loss(classes, class_labels, matches, config.no_object_weight)
        losses |= {
            f"loss_cross_entropy{suffix}": plain,
            f"loss_mask{suffix}": mask_sum,
            f"loss_dice{suffix}": dice_sum,
        }
        all_matches.append(matches)
    return losses, all_matches


def equal_matches(first, second):
    return all(
        torch.equal(one, other)
        for stages in zip(first, second, strict=True)
        for images in zip(*stages, strict=True)
        for one, other in zip(*images, strict=True)
    )


@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (14, 0, 10, 2), (0, 0)])
@pytest.mark.parametrize("point_seeds", [None, [5, 6, 7, 8]])
def test_batched_matching_equals_matching_one_by_one(counts, point_seeds, within):
    """Matches, losses and gradients; images without segments, more segments than queries, masks of bool."""
    config = small_config()
    mask_labels, class_labels = batch(counts)
    stages = [stage_logits(len(counts)) for _ in range(3)]
    leaves = [tensor.requires_grad_() for stage in stages for tensor in stage]
    point_seeds = point_seeds and point_seeds[: len(counts)]
    criterion, results = GKCCriterion(config), []
    for compute, masks in ((losses_one_by_one, mask_labels), (criterion, [each.bool() for each in mask_labels])):
        torch.manual_seed(3)
        arguments = (*zip(*stages, strict=True), masks, class_labels)
        losses, matches = (
            compute(config, *arguments, point_seeds=point_seeds)
            if compute is losses_one_by_one
            else compute(*arguments, point_seeds=point_seeds)
        )
        gradients = torch.autograd.grad(criterion.total(losses), leaves, materialize_grads=True)
        results.append((losses, matches, torch.cat([gradient.flatten() for gradient in gradients])))
    (expected, expected_matches, expected_gradient), (losses, matches, gradient) = results
    assert equal_matches(matches, expected_matches) and losses.keys() == expected.keys()
    for name, loss in losses.items():
        within("losses of all stages together against one by one", (loss - expected[name]).abs(), 1e-5)
    error = (gradient - expected_gradient).abs().max() / expected_gradient.abs().max()
    within("gradients of all stages together against one by one, relative", error, 1e-5)


def test_equal_queries_and_equal_segments_are_matched_as_one_by_one():
    """Ties: any assignment among equals costs the same; the solver chooses as it does for one image alone."""
    config, size = small_config(), 64
    classes = torch.randn(2, 10, 6)[:, [0, 0, 1, 1, 1, 2, 3, 3, 4, 5]]
    points = (4 * torch.randn(2, 10, size).round())[:, [0, 0, 1, 1, 1, 2, 3, 3, 4, 5]]
    labels = [(torch.rand(4, size) > 0.5).float()[[0, 0, 1, 2]], (torch.rand(2, size) > 0.5).float()[[0, 0, 1]]]
    class_labels = [torch.tensor([1, 1, 2, 3]), torch.tensor([4, 4, 0])]
    expected = matched_one_by_one(config, classes, points, class_labels, labels)
    matches = GKCMatcher(config)(classes, points, class_labels, labels)
    twin = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 5])  # which queries are equal
    for (queries, segments), (wanted, wanted_segments) in zip(matches, expected, strict=True):
        kinds = sorted(zip(twin[queries].tolist(), segments.clamp(min=1).tolist(), strict=True))
        assert kinds == sorted(zip(twin[wanted].tolist(), wanted_segments.clamp(min=1).tolist(), strict=True))


def test_a_step_copies_costs_to_the_host_once(monkeypatch):
    """A copy waits for the device; there is one for all stages and images."""
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or original(tensor))
    mask_labels, class_labels = batch((3, 1, 2))
    stages = [stage_logits(3) for _ in range(4)]
    GKCCriterion(small_config())(*zip(*stages, strict=True), mask_labels, class_labels)
    assert copies == [(4, 3, 10, 3)]


def test_points_of_an_image_do_not_depend_on_the_batch(within):
    """With seeds, the sums over two halves of a batch are those over the whole."""
    mask_labels, class_labels = batch((3, 0, 2, 12))
    stages = [stage_logits(4) for _ in range(3)]
    divisors, seeds = LossDivisors.from_counts((3, 0, 2, 12), 10, 0.1), [11, 12, 13, 14]

    def losses(images):
        shard = [[tensor[images] for tensor in kind] for kind in zip(*stages, strict=True)]
        labels = mask_labels[images], class_labels[images]
        return GKCCriterion(small_config())(*shard, *labels, divisors=divisors, point_seeds=seeds[images])[0]

    first, second = losses(slice(0, 2)), losses(slice(2, 4))
    for name, loss in losses(slice(0, 4)).items():
        error = (first[name] + second[name] - loss).abs() / loss
        within("losses of a batch against the sum of its halves, relative", error, 1e-6)


def test_seeds_of_points_are_one_for_each_image():
    mask_labels, class_labels = batch()
    stages = [[tensor] for tensor in stage_logits()]
    with pytest.raises(ValueError, match=r"`point_seeds` must have one entry for each of the 2 images, got 1"):
        GKCCriterion(small_config())(*stages, mask_labels, class_labels, point_seeds=[1])


@pytest.mark.parametrize("size", [(6, 10), (1, 7), (16, 3)])
def test_maps_of_a_batch_are_sampled_like_single_ones(size, within):
    """Also at the edges, where pixels outside count as zero."""
    maps = [torch.randn(2, 5, *size) for _ in range(2)]
    edges = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 1e-4], [0.9999, 0.5]])
    points = torch.cat([edges.expand(2, -1, -1), torch.rand(2, 200, 2)], dim=1)
    for values, sampled in zip(maps, sample_all_maps(maps, points), strict=True):
        error = (sampled - sample_points(values, points)).abs().max()
        within("maps sampled together against one by one, max abs", error, 1e-5)


@pytest.mark.parametrize("counts", [(3, 1, 2), (0, 2, 0), (0, 0, 0)])
def test_recomputed_matched_masks_have_equal_losses_and_gradients(counts, within):
    """Those of all queries' masks, of which most have no gradient, and of products of what they are made of."""
    config, stages, size = small_config(), 3, 12
    generator = torch.Generator().manual_seed(0)
    embeds = [torch.randn(3, 8, 5, generator=generator, dtype=torch.float64) for _ in range(stages)]
    features = torch.randn(3, 5, size, size, generator=generator, dtype=torch.float64)
    leaves = [each.requires_grad_() for each in (*embeds, features)]
    class_logits = [torch.randn(3, 8, 5, generator=generator) for _ in range(stages)]
    labels = [torch.rand(count, 4 * size, 4 * size, generator=generator) < 0.5 for count in counts]
    classes = [torch.randint(4, (count,), generator=generator) for count in counts]
    found = []
    for parts in (None, MaskParts(embeds, features)):
        masks = [predict_masks(each, features) for each in embeds]
        losses, _ = GKCCriterion(config)(class_logits, masks, labels, classes, point_seeds=[1, 2, 3], mask_parts=parts)
        total = sum(loss for name, loss in losses.items() if "entropy" not in name)
        found.append((total, *torch.autograd.grad(total, leaves)))
    for one, other in zip(*found, strict=True):
        within("losses and gradients by matched masks alone, max abs", (one - other).abs().max().detach(), 1e-6)


def test_void_pixels_change_neither_losses_nor_gradients():
    """The masks predicted there are arbitrary; without `void` they change the losses."""
    mask_labels, class_labels = batch()
    void = torch.zeros(2, 24, 40, dtype=torch.bool)
    void[:, :, 20:] = True
    mask_labels = [masks.masked_fill(void[0], 0) for masks in mask_labels]
    classes, masks = stage_logits()
    other = masks.clone()
    other[..., 6:] = 9 * torch.randn_like(other[..., 6:])  # a cell further, because logits are interpolated
    # Without a choice of uncertain points, which may lie anywhere.
    criterion = GKCCriterion(small_config(importance_sample_ratio=0.0, oversample_ratio=1.0))

    def losses_of(logits, void=None):
        logits = logits.clone().requires_grad_()
        losses, matches = criterion([classes], [logits], mask_labels, class_labels, point_seeds=[3, 4], void=void)
        criterion.total(losses).backward()
        return losses, [part.tolist() for image in matches[0] for part in image], logits.grad

    first, second = losses_of(masks, void), losses_of(other, void)
    assert first[0] == second[0] and first[1] == second[1]
    assert (first[2][..., 6:] == 0).all() and (first[2][..., :5] != 0).any()
    assert losses_of(masks)[0]["loss_mask"] != losses_of(other)[0]["loss_mask"]
