"""Matching and losses: golden numbers, transformers' own loss, and the cases that break training runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from modeling_gkc import loss_gkc
from modeling_gkc.loss_gkc import GKCCriterion, classification_loss, dice_loss, mask_costs, mask_loss, sample_points

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
def test_labels_that_do_not_fit(mask_shape, classes, message):
    with pytest.raises(ValueError, match=message):
        GKCCriterion(small_config())(
            *[[tensor] for tensor in stage_logits(batch_size=1)], [torch.zeros(mask_shape)], [torch.tensor(classes)]
        )


def test_unknown_loss_name():
    with pytest.raises(KeyError, match="loss_boxes"):
        GKCCriterion(small_config()).weight("loss_boxes")


def test_sample_points_reads_pixel_centres():
    ramp = torch.arange(12.0).view(1, 1, 3, 4)
    centres = torch.tensor([[[0.125, 1 / 6], [0.875, 5 / 6], [0.375, 0.5]]])
    torch.testing.assert_close(sample_points(ramp, centres)[0, 0], torch.tensor([0.0, 11.0, 5.0]))


def test_normaliser_is_averaged_over_processes(monkeypatch):
    """Two processes of which the other holds no segment: the count is halved, so the mean of gradients is right."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value)
    assert loss_gkc.mean_over_processes(torch.tensor(6.0)) == 3.0
