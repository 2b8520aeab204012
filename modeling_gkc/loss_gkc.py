# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Losses of the segmenter: pure functions -> matcher -> criterion.

Masks are compared at sampled points (Kirillov et al., *PointRend*, CVPR 2020) and queries are matched to segments one
to one (Carion et al., *DETR*, ECCV 2020), as in Mask2Former (Cheng et al., CVPR 2022). Losses are sums over matched
pairs divided by the number of segments of all processes, so that no gradient depends on how processes share a batch.

Letters: B images, Q queries, K classes, S stages, N segments of an image, M matched pairs of a batch, R points.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from .configuration_gkc import GKCConfig

Matches = list[tuple[Tensor, Tensor]]


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Samples maps (N, C, H, W) bilinearly at points (N, R, 2) or (1, R, 2), (x, y) in 0..1: (N, C, R)."""
    grid = (2 * points - 1)[:, None].expand(maps.shape[0], -1, -1, -1)
    return F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)[:, :, 0]


def mask_loss(mask_logits: Tensor, mask_labels: Tensor, num_masks: Tensor | float) -> Tensor:
    """Binary cross-entropy of (M, R) logits against (M, R) labels: mean over points, sum over pairs / `num_masks`."""
    losses = F.binary_cross_entropy_with_logits(mask_logits, mask_labels, reduction="none")
    return losses.mean(dim=1).sum() / num_masks


def dice_loss(mask_logits: Tensor, mask_labels: Tensor, num_masks: Tensor | float) -> Tensor:
    """Dice loss (Milletari et al., *V-Net*, 2016), smoothed by one, of (M, R) logits against (M, R) labels."""
    probabilities = mask_logits.sigmoid()
    intersection = 2 * (probabilities * mask_labels).sum(dim=1)
    total = probabilities.sum(dim=1) + mask_labels.sum(dim=1)
    return (1 - (intersection + 1) / (total + 1)).sum() / num_masks


def classification_loss(
    logits: Tensor, class_labels: Sequence[Tensor], matches: Matches, no_object_weight: float
) -> Tensor:
    """Weighted mean cross-entropy; a query without a match has the label no-object.

    Args:
        logits: (B, Q, K + 1) class logits, the last column no-object.
        class_labels: For each image the (N,) classes of its segments.
        matches: For each image the matched (queries, segments).
        no_object_weight: Weight of queries without a match; the others weigh 1.

    Returns:
        Scalar: sum of weighted losses over the sum of weights, the latter averaged over processes.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
    for image, (queries, segments) in enumerate(matches):
        targets[image, queries.to(logits.device)] = class_labels[image].to(logits.device)[segments.to(logits.device)]
    weights = torch.where(targets == logits.shape[-1] - 1, no_object_weight, 1.0).to(logits.dtype)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    total = mean_over_processes(weights.sum()).clamp(min=torch.finfo(logits.dtype).tiny)
    return (losses * weights.flatten()).sum() / total


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes of the training run; itself when there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def divisor_over_processes(count: Tensor) -> Tensor:
    """Divisor of a sum over `count` things, so that the processes' gradients average to that of the whole batch.

    It is the mean count of all processes, which may be less than one; 1 where no process has anything.
    """
    mean = mean_over_processes(count)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def mask_costs(mask_logits: Tensor, mask_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pairwise binary cross-entropy and dice costs (Q, N) of (Q, R) logits and (N, R) labels."""
    num_points = mask_logits.shape[1]
    # BCE(x, y) = softplus(x) - x * y, so all pairs need one matrix product.
    cross_entropy = (F.softplus(mask_logits).sum(dim=1)[:, None] - mask_logits @ mask_labels.T) / num_points
    probabilities = mask_logits.sigmoid()
    total = probabilities.sum(dim=1)[:, None] + mask_labels.sum(dim=1)[None]
    dice = 1 - (2 * probabilities @ mask_labels.T + 1) / (total + 1)
    return cross_entropy, dice


class GKCMatcher:
    """One-to-one assignment of queries to segments of least total cost, computed in fp32."""

    def __init__(self, config: GKCConfig):
        self.class_weight = config.class_weight
        self.mask_weight = config.mask_weight
        self.dice_weight = config.dice_weight

    @torch.no_grad()
    def __call__(
        self,
        class_logits: Tensor,
        point_logits: Tensor,
        class_labels: Sequence[Tensor],
        point_labels: Sequence[Tensor],
    ) -> Matches:
        """Matches one stage.

        Args:
            class_logits: (B, Q, K + 1).
            point_logits: (B, Q, R) mask logits at sampled points.
            class_labels: For each image (N,) classes.
            point_labels: For each image (N, R) masks at the same points.

        Returns:
            For each image (queries, segments), min(Q, N) of each, on the CPU.

        Raises:
            ValueError: if a cost is not finite, naming the image.
        """
        with torch.autocast(class_logits.device.type, enabled=False):
            probabilities = class_logits.float().softmax(dim=-1)
            return [
                self._match(image, probabilities[image], point_logits[image].float(), classes, masks.float())
                for image, (classes, masks) in enumerate(zip(class_labels, point_labels, strict=True))
            ]

    def _match(
        self, image: int, probabilities: Tensor, point_logits: Tensor, classes: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        linear_sum_assignment = _linear_sum_assignment()

        cross_entropy, dice = mask_costs(point_logits, masks)
        costs = self.mask_weight * cross_entropy + self.dice_weight * dice
        costs = (costs - self.class_weight * probabilities[:, classes]).cpu()
        if not costs.isfinite().all():
            raise ValueError(
                f"Non-finite matching cost for sample {image} of the batch: the model's outputs or the labels of this "
                "sample hold NaN or infinity. Check its image and masks, or lower the learning rate."
            )
        queries, segments = linear_sum_assignment(costs.numpy())
        return torch.from_numpy(queries), torch.from_numpy(segments)


class GKCCriterion:
    """Matching and losses of every stage.

    Returns unweighted losses by name: `loss_cross_entropy`, `loss_mask`, `loss_dice` for the last stage, the same with
    `_0`, `_1`, ... for the stages before it. `weights` gives each name's weight.
    """

    names = ("loss_cross_entropy", "loss_mask", "loss_dice")

    def __init__(self, config: GKCConfig):
        self.config = config
        self.matcher = GKCMatcher(config)

    def weight(self, name: str) -> float:
        """Weight of a loss by its name in the dictionary, with or without stage."""
        config = self.config
        weights = dict(zip(self.names, (config.class_weight, config.mask_weight, config.dice_weight), strict=True))
        base = name if name in weights else name.rsplit("_", 1)[0]
        if base not in weights:
            raise KeyError(f"Unknown loss {name!r}; known are {', '.join(self.names)}, each with an optional stage.")
        return weights[base]

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the losses."""
        return sum(self.weight(name) * loss for name, loss in losses.items())

    def __call__(
        self,
        class_logits: Sequence[Tensor],
        mask_logits: Sequence[Tensor],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Computes losses and matches.

        Args:
            class_logits: For each stage (B, Q, K + 1).
            mask_logits: For each stage (B, Q, h, w).
            mask_labels: For each image (N, H, W) masks of 0 and 1.
            class_labels: For each image (N,) classes.

        Returns:
            Losses by name, and for each stage the matches of all images.
        """
        check_labels(class_logits[-1], mask_labels, class_labels)
        device = mask_logits[-1].device
        mask_labels = [masks.to(device=device, dtype=torch.float32) for masks in mask_labels]
        class_labels = [classes.to(device) for classes in class_labels]
        num_masks = self._num_masks(class_labels)
        points = torch.rand(len(mask_labels), self.config.train_num_points, 2, device=device)
        point_labels = [_sample_labels(masks, image[None]) for masks, image in zip(mask_labels, points, strict=True)]

        losses, all_matches = {}, []
        for stage, (classes, masks) in enumerate(zip(class_logits, mask_logits, strict=True)):
            matches = self.matcher(classes, sample_points(masks.float(), points), class_labels, point_labels)
            suffix = "" if stage == len(class_logits) - 1 else f"_{stage}"
            values = self._stage_losses(classes, masks, mask_labels, class_labels, matches, num_masks)
            losses |= {name + suffix: value for name, value in zip(self.names, values, strict=True)}
            all_matches.append(matches)
        return losses, all_matches

    def _num_masks(self, class_labels: Sequence[Tensor]) -> Tensor:
        count = torch.tensor(float(sum(len(classes) for classes in class_labels)), device=class_labels[0].device)
        return divisor_over_processes(count)

    def _stage_losses(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        matches: Matches,
        num_masks: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cross_entropy = classification_loss(class_logits, class_labels, matches, self.config.no_object_weight)
        predicted = torch.cat([mask_logits[image, queries] for image, (queries, _) in enumerate(matches)]).float()
        if len(predicted) == 0:
            zero = predicted.sum()
            return cross_entropy, zero, zero
        points = self._uncertain_points(predicted)
        per_image = points.split([len(queries) for queries, _ in matches])
        targets = torch.cat(
            [
                _sample_labels(masks[segments], image_points)
                for masks, (_, segments), image_points in zip(mask_labels, matches, per_image, strict=True)
            ]
        )
        predicted = sample_points(predicted[:, None], points)[:, 0]
        return cross_entropy, mask_loss(predicted, targets, num_masks), dice_loss(predicted, targets, num_masks)

    @torch.no_grad()
    def _uncertain_points(self, mask_logits: Tensor) -> Tensor:
        """(M, R, 2) points: the least certain ones of an over-sampled set, the rest uniform."""
        config = self.config
        num_points = config.train_num_points
        num_uncertain = int(config.importance_sample_ratio * num_points)
        num_masks, device = len(mask_logits), mask_logits.device
        candidates = torch.rand(num_masks, int(num_points * config.oversample_ratio), 2, device=device)
        certainty = sample_points(mask_logits[:, None], candidates)[:, 0].abs()
        chosen = certainty.topk(num_uncertain, dim=1, largest=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        uniform = torch.rand(num_masks, num_points - num_uncertain, 2, device=device)
        return torch.cat([uncertain, uniform], dim=1)


def _linear_sum_assignment() -> Callable:
    """Scipy's solver, imported where it is used: inference, also from remote code, needs no scipy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Training needs scipy: pip install 'gkc[train]', or pip install scipy.") from error
    return linear_sum_assignment


def _sample_labels(masks: Tensor, points: Tensor) -> Tensor:
    """Masks (N, H, W) at points (N, R, 2) or (1, R, 2): (N, R); also when there is no mask."""
    if len(masks) == 0:
        return masks.new_zeros(0, points.shape[1])
    return sample_points(masks[:, None], points)[:, 0]


def check_labels(class_logits: Tensor, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor]) -> None:
    """Refuses labels that do not fit the (B, Q, K + 1) logits or each other.

    Raises:
        ValueError: naming the sample and what is wrong with it.
    """
    batch_size, _, num_columns = class_logits.shape
    if not len(mask_labels) == len(class_labels) == batch_size:
        raise ValueError(
            f"`mask_labels` ({len(mask_labels)}) and `class_labels` ({len(class_labels)}) need one entry for each of "
            f"the {batch_size} images."
        )
    for image, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if masks.ndim != 3 or len(masks) != len(classes):
            raise ValueError(
                f"Sample {image}: `mask_labels` must be (N, height, width) with N = {len(classes)} as in "
                f"`class_labels`, got {tuple(masks.shape)}."
            )
        outside = classes[(classes < 0) | (classes >= num_columns - 1)]
        if len(outside):
            raise ValueError(
                f"Sample {image}: class ids {outside.tolist()} are outside of the vocabulary of {num_columns - 1} "
                "classes."
            )


__all__ = [
    "GKCCriterion",
    "GKCMatcher",
    "classification_loss",
    "dice_loss",
    "divisor_over_processes",
    "mask_costs",
    "mask_loss",
    "mean_over_processes",
    "sample_points",
]
