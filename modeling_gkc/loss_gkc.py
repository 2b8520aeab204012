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

Letters: B images, Q queries, K classes, S stages, N segments of an image, M matched pairs of a batch and stage,
R points.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .argument_checks import check_tensor
from .configuration_gkc import GKCConfig
from .mask_decoder import predict_matched_masks

Matches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LossDivisors:
    """What the sums of the losses are divided by, where the caller counts it: over accumulated micro-batches too.

    Attributes:
        num_masks: Scalar, the number of segments.
        class_weight: Scalar, the sum of the weights of the plain-name cross-entropy over all queries.
    """

    num_masks: Tensor
    class_weight: Tensor

    @classmethod
    def from_counts(
        cls,
        segment_counts: Sequence[int],
        num_queries: int,
        no_object_weight: float,
        device: torch.device | str | None = None,
    ) -> "LossDivisors":
        """Sums over the images of one micro-batch with `segment_counts` segments, known before the model has run.

        The caller averages them over the micro-batches and processes that share a step.
        """
        matched = sum(min(num_queries, count) for count in segment_counts)
        unmatched = len(segment_counts) * num_queries - matched
        weight = matched + unmatched * no_object_weight
        return cls(*torch.tensor([sum(segment_counts), weight], dtype=torch.float32, device=device))


@dataclass(frozen=True)
class MaskParts:
    """What mask logits are products of.

    Attributes:
        embeds: For each stage (B, Q, C).
        features: (B, C, h, w).
    """

    embeds: Sequence[Tensor]
    features: Tensor

    @classmethod
    def from_stages(cls, stages: Sequence, mask_features: Tensor | None) -> "MaskParts | None":
        """From a model's stages; None where it gives no parts, as in evaluation."""
        return None if mask_features is None else cls([stage.mask_embeds for stage in stages], mask_features)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Samples maps (N, C, H, W) bilinearly at points (N, R, 2) or (1, R, 2), (x, y) in 0..1: (N, C, R)."""
    grid = (2 * points - 1)[:, None].expand(maps.shape[0], -1, -1, -1)
    return F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)[:, :, 0]


def sample_all_maps(maps: Sequence[Tensor], points: Tensor) -> Iterator[Tensor]:
    """As `sample_points` for several (B, C, h, w) of one size at the same (B, R, 2) points: (B, C, R) each, in fp32.

    Several times faster with many channels: a point's corners are found once, and all channels of a corner lie side by
    side. It has no gradient.
    """
    batch_size, channels, height, width = maps[0].shape
    corners, weights = _corners(points.float(), height, width)  # (B, R, 4)
    corners = corners + (torch.arange(batch_size, device=points.device) * height * width)[:, None, None]
    for values in maps:
        table = values.detach().float().flatten(2).transpose(1, 2).reshape(-1, channels)
        sampled = F.embedding_bag(corners.flatten(0, 1), table, per_sample_weights=weights.flatten(0, 1), mode="sum")
        yield sampled.view(batch_size, -1, channels).transpose(1, 2)


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat positions of the four pixels around each point (..., 4), and their bilinear weights; zero outside."""
    places = points * points.new_tensor([width, height]) - 0.5
    first = places.floor()
    share = places - first
    pixels = torch.stack([first, first + 1], dim=-2)  # (..., 2, (x, y))
    inside = (pixels >= 0) & (pixels < pixels.new_tensor([width, height]))
    weights = torch.stack([1 - share, share], dim=-2) * inside
    columns, rows = (pixels.long() * inside).unbind(dim=-1)
    flat = rows[..., :, None] * width + columns[..., None, :]
    return flat.flatten(-2), (weights[..., :, None, 1] * weights[..., None, :, 0]).flatten(-2)


def mask_loss(mask_logits: Tensor, mask_labels: Tensor, num_masks: Tensor | float) -> Tensor:
    """Binary cross-entropy of (..., M, R) logits against labels: mean over points, sum over pairs / `num_masks`."""
    losses = F.binary_cross_entropy_with_logits(mask_logits, mask_labels, reduction="none")
    return losses.mean(dim=-1).sum(dim=-1) / num_masks


def dice_loss(mask_logits: Tensor, mask_labels: Tensor, num_masks: Tensor | float) -> Tensor:
    """Dice loss (Milletari et al., *V-Net*, 2016), smoothed by one, of (..., M, R) logits against labels."""
    probabilities = mask_logits.sigmoid()
    intersection = 2 * (probabilities * mask_labels).sum(dim=-1)
    total = probabilities.sum(dim=-1) + mask_labels.sum(dim=-1)
    return (1 - (intersection + 1) / (total + 1)).sum(dim=-1) / num_masks


def classification_loss(
    logits: Tensor,
    class_labels: Sequence[Tensor],
    matches: Matches,
    no_object_weight: float,
    divisor: Tensor | None = None,
) -> Tensor:
    """Weighted mean cross-entropy; a query without a match has the label no-object.

    Args:
        logits: (B, Q, K + 1) class logits, the last column no-object.
        class_labels: For each image the (N,) classes of its segments.
        matches: For each image the matched (queries, segments).
        no_object_weight: Weight of queries without a match; the others weigh 1.
        divisor: Scalar, see `LossDivisors.class_weight`; by default the sum of weights, averaged over processes.

    Returns:
        Scalar: sum of weighted losses over the divisor.
    """
    pairs = _Pairs.from_matches([matches], [len(classes) for classes in class_labels], logits.device)
    classes = torch.cat([classes.to(logits.device) for classes in class_labels])
    return _classification_losses(logits[None], classes, pairs, no_object_weight, divisor)[0]


@dataclass(frozen=True)
class _Pairs:
    """Matches of all stages as tensors: every stage has as many.

    Attributes:
        counts: Pairs of each image.
        images: (M,) image of each pair.
        queries, segments: (S, M) its query and its segment, the segments of the batch counted through.
    """

    counts: list[int]
    images: Tensor
    queries: Tensor
    segments: Tensor

    @classmethod
    def from_matches(cls, matches: Sequence[Matches], counts: Sequence[int], device: torch.device) -> "_Pairs":
        """From the matches of each stage and the number of segments of each image; one copy to the device."""
        firsts = list(accumulate(counts, initial=0))[:-1]
        pair_counts = [len(queries) for queries, _ in matches[0]]
        images = torch.arange(len(counts)).repeat_interleave(torch.tensor(pair_counts))
        queries = torch.stack([torch.cat([queries for queries, _ in stage]) for stage in matches])
        segments = torch.stack(
            [torch.cat([each + first for (_, each), first in zip(stage, firsts, strict=True)]) for stage in matches]
        )
        together = torch.cat([images[None], queries, segments]).to(device)
        return cls(pair_counts, together[0], *together[1:].chunk(2))


def _classification_losses(
    logits: Tensor, classes: Tensor, pairs: _Pairs, no_object_weight: float, divisor: Tensor | None
) -> Tensor:
    """(S,) weighted cross-entropies of (S, B, Q, K + 1) logits and the (N,) classes of the batch's segments."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    no_object = logits.shape[-1] - 1
    targets = torch.full(logits.shape[:3], no_object, device=logits.device)
    stages = torch.arange(len(logits), device=logits.device)[:, None]
    targets[stages, pairs.images, pairs.queries] = classes[pairs.segments]
    weights = torch.where(targets == no_object, no_object_weight, 1.0).to(logits.dtype)
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(weights)
    if divisor is None:
        divisor = mean_over_processes(weights.sum(dim=(1, 2)))
    return (losses * weights).sum(dim=(1, 2)) / divisor.clamp(min=torch.finfo(logits.dtype).tiny)


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
    return _one_for_zero(mean_over_processes(count))


def _one_for_zero(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, torch.ones_like(count))


def mask_costs(mask_logits: Tensor, mask_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pairwise binary cross-entropy and dice costs (..., Q, N) of (..., Q, R) logits and (..., N, R) labels."""
    num_points = mask_logits.shape[-1]
    # BCE(x, y) = softplus(x) - x * y, so all pairs need one matrix product.
    cross_entropy = (F.softplus(mask_logits).sum(dim=-1)[..., None] - mask_logits @ mask_labels.mT) / num_points
    probabilities = mask_logits.sigmoid()
    total = probabilities.sum(dim=-1)[..., None] + mask_labels.sum(dim=-1)[..., None, :]
    dice = 1 - (2 * probabilities @ mask_labels.mT + 1) / (total + 1)
    return cross_entropy, dice


class GKCMatcher:
    """One-to-one assignment of queries to segments of least total cost, computed in fp32."""

    def __init__(self, config: GKCConfig):
        self.class_weight = config.class_weight
        self.mask_weight = config.mask_weight
        self.dice_weight = config.dice_weight

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
        return self.match_stages([class_logits], [point_logits], class_labels, point_labels)[0]

    def match_stages(
        self,
        class_logits: Sequence[Tensor],
        point_logits: Iterable[Tensor],
        class_labels: Sequence[Tensor],
        point_labels: Sequence[Tensor],
    ) -> list[Matches]:
        """Matches several stages, whose costs go to the CPU together; arguments as for one, logits for each stage."""
        device = class_logits[0].device
        classes = pad_sequence([classes.to(device) for classes in class_labels], batch_first=True)
        labels = pad_sequence([labels.float() for labels in point_labels], batch_first=True)  # (B, N, R)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            costs = [
                self._costs(logits.float(), points.float(), classes, labels)
                for logits, points in zip(class_logits, point_logits, strict=True)
            ]
        costs = torch.stack(costs).cpu()
        return _assign(costs, [len(classes) for classes in class_labels])

    def _costs(self, class_logits: Tensor, point_logits: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
        """(B, Q, N) costs, N the most segments of an image."""
        cross_entropy, dice = mask_costs(point_logits, labels)
        costs = self.mask_weight * cross_entropy + self.dice_weight * dice
        probabilities = class_logits.softmax(dim=-1)
        return costs - self.class_weight * probabilities.gather(2, classes[:, None].expand(-1, costs.shape[1], -1))


def _assign(costs: Tensor, counts: Sequence[int]) -> list[Matches]:
    """Matches of each stage from the (S, B, Q, N) costs, of which each image has as many columns as segments."""
    linear_sum_assignment = _linear_sum_assignment()

    of_images = [costs[:, image, :, :count].numpy() for image, count in enumerate(counts)]
    for image, image_costs in enumerate(of_images):
        if not np.isfinite(image_costs).all():
            raise ValueError(
                f"Non-finite matching cost for sample {image} of the batch: the model's outputs or the labels of this "
                "sample hold NaN or infinity. Check its image and masks, or lower the learning rate."
            )
    return [
        [tuple(map(torch.from_numpy, linear_sum_assignment(image_costs[stage]))) for image_costs in of_images]
        for stage in range(len(costs))
    ]


class GKCCriterion:
    """Matching and losses of every stage.

    Returns unweighted losses by name: `loss_cross_entropy`, `loss_mask`, `loss_dice` for the last stage, the same with
    `_0`, `_1`, ... for the stages before it. `weights` gives each name's weight.

    Uniform random points are drawn in this order: (B, R) of the matching, which all stages share; then for each stage
    the candidates of its pairs, the pairs of an image in the order of their queries, and the points that stay uniform.
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
        divisors: LossDivisors | None = None,
        point_seeds: Sequence[int] | None = None,
        mask_parts: MaskParts | None = None,
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Computes losses and matches.

        Args:
            class_logits: For each stage (B, Q, K + 1).
            mask_logits: For each stage (B, Q, h, w).
            mask_labels: For each image (N, H, W) masks of 0 and 1, best as bool; they are kept as they are.
            class_labels: For each image (N,) classes.
            divisors: Of the sums; by default counted here and averaged over processes.
            point_seeds: For each image the seed of its random points, which then do not depend on what else is in the
                batch; by default they are drawn from torch's own generator.
            mask_parts: What the mask logits are products of. With them the matched masks are computed once more, and
                gradients go that way: through a few masks of an image, not through those of all queries.

        Returns:
            Losses by name, and for each stage the matches of all images.
        """
        check_labels(class_logits[-1], mask_labels, class_labels)
        device = mask_logits[-1].device
        mask_labels = [masks.to(device) for masks in mask_labels]
        class_labels = [classes.to(device, torch.int64) for classes in class_labels]
        draws = _PointDraws(len(mask_labels), point_seeds, device)
        matches = self._match(class_logits, mask_logits, mask_labels, class_labels, draws)
        pairs = _Pairs.from_matches(matches, [len(classes) for classes in class_labels], device)

        divisors = divisors or LossDivisors(self._num_masks(class_labels), None)
        cross_entropies = _classification_losses(
            torch.stack(list(class_logits)),
            torch.cat(class_labels),
            pairs,
            self.config.no_object_weight,
            divisors.class_weight,
        )
        num_masks = _one_for_zero(divisors.num_masks)
        predicted = _matched_masks(mask_logits, mask_parts, pairs)
        values = zip(cross_entropies, *self._mask_losses(predicted, mask_labels, pairs, draws, num_masks), strict=True)
        losses = {}
        for stage, stage_values in enumerate(values):
            suffix = "" if stage == len(class_logits) - 1 else f"_{stage}"
            losses |= {name + suffix: value for name, value in zip(self.names, stage_values, strict=True)}
        return losses, matches

    def _match(
        self,
        class_logits: Sequence[Tensor],
        mask_logits: Sequence[Tensor],
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        draws: "_PointDraws",
    ) -> list[Matches]:
        points = draws([1] * len(mask_labels), self.config.train_num_points)
        point_labels = [_sample_labels(masks, image[None]) for masks, image in zip(mask_labels, points, strict=True)]
        return self.matcher.match_stages(
            class_logits, sample_all_maps(mask_logits, points), class_labels, point_labels
        )

    def _num_masks(self, class_labels: Sequence[Tensor]) -> Tensor:
        count = torch.tensor(float(sum(len(classes) for classes in class_labels)), device=class_labels[0].device)
        return divisor_over_processes(count)

    def _mask_losses(
        self,
        predicted: Tensor,
        mask_labels: Sequence[Tensor],
        pairs: _Pairs,
        draws: "_PointDraws",
        num_masks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The binary cross-entropies (S,) and dice losses (S,) of the matched pairs' logits (S, M, h, w)."""
        if predicted.shape[1] == 0:
            zeros = predicted.flatten(1).sum(dim=1)
            return zeros, zeros
        points = torch.stack([self._uncertain_points(logits, pairs.counts, draws) for logits in predicted])
        targets = _sample_targets(mask_labels, pairs, points)
        sampled = sample_points(predicted.flatten(0, 1)[:, None], points.flatten(0, 1)).view_as(targets)
        return mask_loss(sampled, targets, num_masks), dice_loss(sampled, targets, num_masks)

    @torch.no_grad()
    def _uncertain_points(self, mask_logits: Tensor, counts: Sequence[int], draws: "_PointDraws") -> Tensor:
        """(M, R, 2) points of one stage: the least certain ones of an over-sampled set, the rest uniform."""
        config = self.config
        num_points = config.train_num_points
        num_uncertain = int(config.importance_sample_ratio * num_points)
        candidates = draws(counts, int(num_points * config.oversample_ratio))
        certainty = sample_points(mask_logits[:, None], candidates)[:, 0].abs()
        # Their order does not matter, and to sort them takes most of the time.
        chosen = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        return torch.cat([uncertain, draws(counts, num_points - num_uncertain)], dim=1)


def _matched_masks(mask_logits: Sequence[Tensor], mask_parts: MaskParts | None, pairs: _Pairs) -> Tensor:
    """(S, M, h, w) mask logits of the matched pairs in fp32, with gradients to what they are made of."""
    if mask_parts is not None:
        return predict_matched_masks(mask_parts.embeds, mask_parts.features, pairs.counts, pairs.queries).float()
    return torch.stack(
        [logits[pairs.images, queries] for logits, queries in zip(mask_logits, pairs.queries, strict=True)]
    ).float()


class _PointDraws:
    """Uniform random points (x, y) in 0..1: from torch's generator, or from one of each image."""

    def __init__(self, num_images: int, seeds: Sequence[int] | None, device: torch.device):
        if seeds is not None and len(seeds) != num_images:
            raise ValueError(f"`point_seeds` ({len(seeds)}) need one entry for each of the {num_images} images.")
        self.device = device
        self.generators = None if seeds is None else [torch.Generator(device).manual_seed(int(s)) for s in seeds]

    def __call__(self, counts: Sequence[int], num_points: int) -> Tensor:
        """(sum of `counts`, num_points, 2), as many rows of each image as counted."""
        if self.generators is None:
            return torch.rand(sum(counts), num_points, 2, device=self.device)
        rows = [
            torch.rand(count, num_points, 2, device=self.device, generator=generator)
            for count, generator in zip(counts, self.generators, strict=True)
        ]
        return torch.cat(rows)


def _linear_sum_assignment() -> Callable:
    """Scipy's solver, imported where it is used: inference, also from remote code, needs no scipy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Training needs scipy: pip install 'gkc[train]', or pip install scipy.") from error
    return linear_sum_assignment


def _sample_labels(masks: Tensor, points: Tensor) -> Tensor:
    """Masks (N, H, W) at points (N, R, 2) or (1, R, 2): (N, R) float; also when there is no mask."""
    if len(masks) == 0:
        return points.new_zeros(0, points.shape[1])
    return sample_points(masks[:, None].float(), points)[:, 0]


def _sample_targets(mask_labels: Sequence[Tensor], pairs: _Pairs, points: Tensor) -> Tensor:
    """(S, M, R) labels of the pairs' segments at their points (S, M, R, 2).

    Masks are read where they lie, the points of all stages together: only one image's are ever widened to float.
    """
    num_stages, _, num_points, _ = points.shape
    counts = [len(masks) for masks in mask_labels]
    stages = torch.arange(num_stages, device=points.device)[:, None]
    by_segment = points.new_zeros(sum(counts), num_stages, num_points, 2)
    by_segment[pairs.segments, stages] = points
    labels = [
        _sample_labels(masks, image_points.flatten(1, 2))
        for masks, image_points in zip(mask_labels, by_segment.split(counts), strict=True)
    ]
    return torch.cat(labels).unflatten(1, (num_stages, num_points))[pairs.segments, stages]


def check_labels(class_logits: Tensor, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor]) -> None:
    """Refuses labels that do not fit the (B, Q, K + 1) logits or each other.

    Raises:
        ValueError: naming the sample and what is wrong with it.
    """
    batch_size, _, num_columns = class_logits.shape
    for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
        if not isinstance(labels, Sequence | Tensor):
            raise ValueError(f"`{name}` must be a list with a tensor for each image, got a {type(labels).__name__}.")
    if not len(mask_labels) == len(class_labels) == batch_size:
        raise ValueError(
            f"`mask_labels` ({len(mask_labels)}) and `class_labels` ({len(class_labels)}) need one entry for each of "
            f"the {batch_size} images."
        )
    for image, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
        check_tensor(f"class_labels[{image}]", classes, "(N,)", "integers")
        if masks.ndim != 3 or len(masks) != len(classes):
            raise ValueError(
                f"Sample {image}: `mask_labels` must be (N, height, width) with N = {len(classes)} as in "
                f"`class_labels`, got {tuple(masks.shape)}."
            )
        if masks.dtype != torch.bool and masks.numel() and not bool(((masks >= 0) & (masks <= 1)).all()):
            raise ValueError(
                f"Sample {image}: `mask_labels` must be 0 outside and 1 inside a segment, got values from "
                f"{masks.min().item():g} to {masks.max().item():g}; turn masks of 0 and 255 into `masks > 0`."
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
    "LossDivisors",
    "MaskParts",
    "classification_loss",
    "dice_loss",
    "divisor_over_processes",
    "mask_costs",
    "mask_loss",
    "mean_over_processes",
    "sample_all_maps",
    "sample_points",
]
