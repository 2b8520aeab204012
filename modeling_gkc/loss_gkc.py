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
"""Losses of the segmentation model: loss functions, Hungarian matcher and criterion.

Masks are compared at sampled points (Kirillov et al., *PointRend*, CVPR 2020), and queries are matched to segments by
bipartite matching (Carion et al., *DETR*, ECCV 2020), as in Mask2Former (Cheng et al., CVPR 2022). Losses are sums
over matched pairs divided by the number of segments of all processes, so that gradients do not depend on how a batch
is distributed over processes.

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
from .padding import EMPTY_MASK_LOGIT

Matches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LossDivisors:
    """Divisors of the summed losses, for callers that average over accumulated micro-batches.

    Attributes:
        num_masks: Scalar, the number of segments.
        class_weight: Scalar, the sum of the class weights of the cross-entropy over all queries.
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
        """Compute the divisors of one micro-batch from its labels, before the model is run.

        The caller averages them over the micro-batches and processes of a step.

        Args:
            segment_counts: Number of segments of each image.
            num_queries: Number of queries Q.
            no_object_weight: Weight of queries without a match.
            device: Device of the divisors.

        Returns:
            The divisors, summed over the images.
        """
        matched = sum(min(num_queries, count) for count in segment_counts)
        unmatched = len(segment_counts) * num_queries - matched
        weight = matched + unmatched * no_object_weight
        return cls(*torch.tensor([sum(segment_counts), weight], dtype=torch.float32, device=device))


@dataclass(frozen=True)
class MaskParts:
    """Factors of the mask logits, which are the products of mask embeddings and mask features.

    Attributes:
        embeds: For each stage (B, Q, C) mask embeddings.
        features: (B, C, h, w) mask features.
    """

    embeds: Sequence[Tensor]
    features: Tensor

    @classmethod
    def from_stages(cls, stages: Sequence, mask_features: Tensor | None) -> "MaskParts | None":
        """Collect the factors from the outputs of all stages; return None without mask features, as in evaluation."""
        return None if mask_features is None else cls([stage.mask_embeds for stage in stages], mask_features)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps bilinearly at points.

    Args:
        maps: (N, C, H, W) maps.
        points: (N, R, 2) or (1, R, 2) points (x, y) in 0..1 relative to the map.

    Returns:
        (N, C, R) values.
    """
    grid = (2 * points - 1)[:, None].expand(maps.shape[0], -1, -1, -1)
    return F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)[:, :, 0]


def sample_all_maps(maps: Sequence[Tensor], points: Tensor) -> Iterator[Tensor]:
    """Sample several maps of one size bilinearly at the same points, without gradients.

    This is several times faster than `sample_points` for many channels: the four pixels around a point are located
    once, and all channels of a pixel are contiguous in memory.

    Args:
        maps: Maps (B, C, h, w) of the same size.
        points: (B, R, 2) points (x, y) in 0..1 relative to the map.

    Yields:
        (B, C, R) values of each map in fp32.
    """
    batch_size, channels, height, width = maps[0].shape
    corners, weights = _corners(points.float(), height, width)  # (B, R, 4)
    corners = corners + (torch.arange(batch_size, device=points.device) * height * width)[:, None, None]
    for values in maps:
        table = values.detach().float().flatten(2).transpose(1, 2).reshape(-1, channels)
        sampled = F.embedding_bag(corners.flatten(0, 1), table, per_sample_weights=weights.flatten(0, 1), mode="sum")
        yield sampled.view(batch_size, -1, channels).transpose(1, 2)


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the flat indices (..., 4) of the four pixels around each point and their bilinear weights.

    Weights of pixels outside of the map are zero.
    """
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
    """Compute the binary cross-entropy of masks: the mean over points, summed over pairs, divided by `num_masks`.

    Args:
        mask_logits: (..., M, R) logits of M masks at R points.
        mask_labels: (..., M, R) labels in 0..1.
        num_masks: Divisor, the number of segments.

    Returns:
        (...) losses.
    """
    losses = F.binary_cross_entropy_with_logits(mask_logits, mask_labels, reduction="none")
    return losses.mean(dim=-1).sum(dim=-1) / num_masks


def dice_loss(mask_logits: Tensor, mask_labels: Tensor, num_masks: Tensor | float) -> Tensor:
    """Compute the dice loss (Milletari et al., *V-Net*, 3DV 2016) with a smoothing term of one.

    Args:
        mask_logits: (..., M, R) logits of M masks at R points.
        mask_labels: (..., M, R) labels in 0..1.
        num_masks: Divisor, the number of segments.

    Returns:
        (...) losses, summed over pairs and divided by `num_masks`.
    """
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
    """Compute the weighted cross-entropy of the queries; the label of unmatched queries is no-object.

    Args:
        logits: (B, Q, K + 1) class logits; the last column is no-object.
        class_labels: For each image the (N,) class ids of its segments.
        matches: For each image the indices of matched (queries, segments).
        no_object_weight: Weight of unmatched queries; that of matched queries is 1.
        divisor: Scalar, see `LossDivisors.class_weight`. Default: the sum of weights, averaged over processes.

    Returns:
        Scalar, the sum of weighted losses divided by `divisor`.
    """
    pairs = _Pairs.from_matches([matches], [len(classes) for classes in class_labels], logits.device)
    classes = torch.cat([classes.to(logits.device) for classes in class_labels])
    return _classification_losses(logits[None], classes, pairs, no_object_weight, divisor)[0]


@dataclass(frozen=True)
class _Pairs:
    """Matched pairs of all stages as tensors; the number of pairs is the same in every stage.

    Attributes:
        counts: Number of pairs of each image.
        images: (M,) index of the image of each pair.
        queries: (S, M) index of the query of each pair within its image.
        segments: (S, M) index of the segment of each pair within the batch.
    """

    counts: list[int]
    images: Tensor
    queries: Tensor
    segments: Tensor

    @classmethod
    def from_matches(cls, matches: Sequence[Matches], counts: Sequence[int], device: torch.device) -> "_Pairs":
        """Collect pairs from the matches of each stage and the number of segments of each image.

        All indices are copied to the device at once.
        """
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
    """Compute the (S,) weighted cross-entropies of (S, B, Q, K + 1) logits and (N,) class ids of the batch."""
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
    """Average a tensor over all processes of a distributed run; return it unchanged in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def _one_for_zero(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, torch.ones_like(count))


def mask_costs(mask_logits: Tensor, mask_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute pairwise binary cross-entropy and dice costs.

    Args:
        mask_logits: (..., Q, R) logits of Q predicted masks at R points.
        mask_labels: (..., N, R) labels of N segments at the same points.

    Returns:
        The binary cross-entropy costs and the dice costs, (..., Q, N) each.
    """
    num_points = mask_logits.shape[-1]
    # BCE(x, y) = softplus(x) - x * y, so all pairs need one matrix product.
    cross_entropy = (F.softplus(mask_logits).sum(dim=-1)[..., None] - mask_logits @ mask_labels.mT) / num_points
    probabilities = mask_logits.sigmoid()
    total = probabilities.sum(dim=-1)[..., None] + mask_labels.sum(dim=-1)[..., None, :]
    dice = 1 - (2 * probabilities @ mask_labels.mT + 1) / (total + 1)
    return cross_entropy, dice


class GKCMatcher:
    """Hungarian matcher: one-to-one assignment of queries to segments with minimal total cost, in fp32.

    Args:
        config: Configuration with the weights of the costs.
    """

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
        """Match queries to segments in one stage.

        Args:
            class_logits: (B, Q, K + 1) class logits.
            point_logits: (B, Q, R) mask logits at sampled points.
            class_labels: For each image (N,) class ids.
            point_labels: For each image (N, R) mask labels at the same points.

        Returns:
            For each image the indices of matched (queries, segments), min(Q, N) of each, on the CPU.

        Raises:
            ValueError: If a cost is not finite; the message names the sample.
        """
        return self.match_stages([class_logits], [point_logits], class_labels, point_labels)[0]

    def match_stages(
        self,
        class_logits: Sequence[Tensor],
        point_logits: Iterable[Tensor],
        class_labels: Sequence[Tensor],
        point_labels: Sequence[Tensor],
    ) -> list[Matches]:
        """Match queries to segments in several stages, copying all costs to the CPU at once.

        Args:
            class_logits: For each stage (B, Q, K + 1) class logits.
            point_logits: For each stage (B, Q, R) mask logits at sampled points.
            class_labels: As in `__call__`.
            point_labels: As in `__call__`.

        Returns:
            The matches of each stage, as in `__call__`.

        Raises:
            ValueError: If a cost is not finite; the message names the sample.
        """
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
        """Compute the (B, Q, N) matching costs, where N is the maximum number of segments of an image."""
        cross_entropy, dice = mask_costs(point_logits, labels)
        costs = self.mask_weight * cross_entropy + self.dice_weight * dice
        probabilities = class_logits.softmax(dim=-1)
        return costs - self.class_weight * probabilities.gather(2, classes[:, None].expand(-1, costs.shape[1], -1))


def _assign(costs: Tensor, counts: Sequence[int]) -> list[Matches]:
    """Solve the assignments of (S, B, Q, N) costs; an image uses as many columns as it has segments."""
    linear_sum_assignment = _linear_sum_assignment()

    costs_per_image = [costs[:, image, :, :count].numpy() for image, count in enumerate(counts)]
    for image, image_costs in enumerate(costs_per_image):
        if not np.isfinite(image_costs).all():
            raise ValueError(
                f"Non-finite matching cost for sample {image} of the batch: the model's outputs or the labels of this "
                "sample contain NaN or infinity. Check its image and masks, or lower the learning rate."
            )
    return [
        [tuple(map(torch.from_numpy, linear_sum_assignment(image_costs[stage]))) for image_costs in costs_per_image]
        for stage in range(len(costs))
    ]


class GKCCriterion:
    """Criterion that matches queries to segments and computes the losses of every stage.

    It returns unweighted losses by name: `loss_cross_entropy`, `loss_mask` and `loss_dice` for the last stage, and the
    same names with the suffix `_0`, `_1`, ... for the previous stages. `weight` returns the weight of a name.

    Random points are drawn uniformly in this order: (B, R) points of the matching, which all stages share; then for
    each stage the candidates of its pairs, ordered by image and query, and the points that stay uniform.

    Args:
        config: Configuration with the weights and the point sampling.
    """

    names = ("loss_cross_entropy", "loss_mask", "loss_dice")

    def __init__(self, config: GKCConfig):
        self.config = config
        self.matcher = GKCMatcher(config)

    def weight(self, name: str) -> float:
        """Return the weight of a loss by its name, with or without the suffix of a stage."""
        config = self.config
        weights = dict(zip(self.names, (config.class_weight, config.mask_weight, config.dice_weight), strict=True))
        base = name if name in weights else name.rsplit("_", 1)[0]
        if base not in weights:
            raise KeyError(f"Unknown loss {name!r}; known are {', '.join(self.names)}, each with an optional stage.")
        return weights[base]

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses."""
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
        void: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Compute losses and matches of all stages.

        Args:
            class_logits: For each stage (B, Q, K + 1) class logits.
            mask_logits: For each stage (B, Q, h, w) mask logits.
            mask_labels: For each image (N, H, W) masks of 0 and 1, preferably bool; they are not copied.
            class_labels: For each image (N,) class ids.
            divisors: Divisors of the summed losses. Default: computed from the labels and averaged over processes.
            point_seeds: For each image the seed of its random points, which then do not depend on the other images of
                the batch. Default: points are drawn from torch's global generator.
            mask_parts: Factors of the mask logits. If given, the masks of matched queries are recomputed from them,
                so that gradients pass through a few masks per image instead of those of all queries.
            void: (B, H, W) bool, true at pixels that neither the matching nor the mask losses see. Default: all pixels
                outside of a segment count as such.

        Returns:
            Losses by name, and for each stage the matches of all images.

        Raises:
            ValueError: If the labels are invalid or a matching cost is not finite.
        """
        check_labels(class_logits[-1], mask_labels, class_labels)
        device = mask_logits[-1].device
        mask_labels = [masks.to(device) for masks in mask_labels]
        class_labels = [classes.to(device, torch.int64) for classes in class_labels]
        draws = _PointDraws(len(mask_labels), point_seeds, device)
        void = None if void is None else void.to(device)
        matches = self._match(class_logits, mask_logits, mask_labels, class_labels, draws, void)
        pairs = _Pairs.from_matches(matches, [len(classes) for classes in class_labels], device)

        if divisors is None:
            count = torch.tensor(float(sum(len(classes) for classes in class_labels)), device=device)
            divisors = LossDivisors(mean_over_processes(count), None)
        cross_entropies = _classification_losses(
            torch.stack(list(class_logits)),
            torch.cat(class_labels),
            pairs,
            self.config.no_object_weight,
            divisors.class_weight,
        )
        num_masks = _one_for_zero(divisors.num_masks)
        predicted = _matched_masks(mask_logits, mask_parts, pairs)
        mask_losses = self._mask_losses(predicted, mask_labels, pairs, draws, num_masks, void)
        values = zip(cross_entropies, *mask_losses, strict=True)
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
        void: Tensor | None,
    ) -> list[Matches]:
        points = draws([1] * len(mask_labels), self.config.train_num_points)
        point_labels = [_sample_labels(masks, image[None]) for masks, image in zip(mask_labels, points, strict=True)]
        point_logits = sample_all_maps(mask_logits, points)
        if void is not None:
            hidden = _is_void(void, points)
            point_logits = (logits.masked_fill(hidden[:, None], EMPTY_MASK_LOGIT) for logits in point_logits)
            point_labels = [
                labels.masked_fill(of_image, 0) for labels, of_image in zip(point_labels, hidden, strict=True)
            ]
        return self.matcher.match_stages(class_logits, point_logits, class_labels, point_labels)

    def _mask_losses(
        self,
        predicted: Tensor,
        mask_labels: Sequence[Tensor],
        pairs: _Pairs,
        draws: "_PointDraws",
        num_masks: Tensor,
        void: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute binary cross-entropies (S,) and dice losses (S,) of the matched pairs' logits (S, M, h, w)."""
        if predicted.shape[1] == 0:
            zeros = predicted.flatten(1).sum(dim=1)
            return zeros, zeros
        points = torch.stack([self._uncertain_points(logits, pairs.counts, draws) for logits in predicted])
        targets = _sample_targets(mask_labels, pairs, points)
        sampled = sample_points(predicted.flatten(0, 1)[:, None], points.flatten(0, 1)).view_as(targets)
        if void is not None:
            hidden = _is_void(void[pairs.images], points.transpose(0, 1).flatten(1, 2))  # (M, S R)
            hidden = hidden.unflatten(1, (len(points), -1)).transpose(0, 1)
            sampled, targets = sampled.masked_fill(hidden, EMPTY_MASK_LOGIT), targets.masked_fill(hidden, 0)
        return mask_loss(sampled, targets, num_masks), dice_loss(sampled, targets, num_masks)

    @torch.no_grad()
    def _uncertain_points(self, mask_logits: Tensor, counts: Sequence[int], draws: "_PointDraws") -> Tensor:
        """Sample (M, R, 2) points of one stage: the least certain of an oversampled set, and uniform ones."""
        config = self.config
        num_points = config.train_num_points
        num_uncertain = int(config.importance_sample_ratio * num_points)
        candidates = draws(counts, int(num_points * config.oversample_ratio))
        certainty = sample_points(mask_logits[:, None], candidates)[:, 0].abs()
        # Unsorted, because the order does not matter and sorting would take most of the time.
        chosen = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        return torch.cat([uncertain, draws(counts, num_points - num_uncertain)], dim=1)


def _matched_masks(mask_logits: Sequence[Tensor], mask_parts: MaskParts | None, pairs: _Pairs) -> Tensor:
    """Return the (S, M, h, w) mask logits of the matched pairs in fp32, recomputed from their factors if given."""
    if mask_parts is not None:
        return predict_matched_masks(mask_parts.embeds, mask_parts.features, pairs.counts, pairs.queries).float()
    return torch.stack(
        [logits[pairs.images, queries] for logits, queries in zip(mask_logits, pairs.queries, strict=True)]
    ).float()


class _PointDraws:
    """Sampler of uniform random points (x, y) in 0..1, from torch's generator or from one generator per image."""

    def __init__(self, num_images: int, seeds: Sequence[int] | None, device: torch.device):
        if seeds is not None and len(seeds) != num_images:
            raise ValueError(
                f"`point_seeds` must have one entry for each of the {num_images} images, got {len(seeds)}."
            )
        self.device = device
        self.generators = None if seeds is None else [torch.Generator(device).manual_seed(int(s)) for s in seeds]

    def __call__(self, counts: Sequence[int], num_points: int) -> Tensor:
        """Sample (sum of `counts`, `num_points`, 2) points, with `counts[i]` rows for image i."""
        if self.generators is None:
            return torch.rand(sum(counts), num_points, 2, device=self.device)
        rows = [
            torch.rand(count, num_points, 2, device=self.device, generator=generator)
            for count, generator in zip(counts, self.generators, strict=True)
        ]
        return torch.cat(rows)


def _linear_sum_assignment() -> Callable:
    """Import scipy's solver on first use, because inference, also from remote code, does not need scipy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Training needs scipy: pip install 'gkc[train]', or pip install scipy.") from error
    return linear_sum_assignment


def _sample_labels(masks: Tensor, points: Tensor) -> Tensor:
    """Sample masks (N, H, W), with N = 0 allowed, at points (N, R, 2) or (1, R, 2), as floats (N, R)."""
    if len(masks) == 0:
        return points.new_zeros(0, points.shape[1])
    return sample_points(masks[:, None].float(), points)[:, 0]


def _is_void(void: Tensor, points: Tensor) -> Tensor:
    """Return which of the points (N, R, 2) lie more on void pixels than on others, given (N, H, W) void maps."""
    return sample_points(void[:, None].float(), points)[:, 0] > 0.5


def _sample_targets(mask_labels: Sequence[Tensor], pairs: _Pairs, points: Tensor) -> Tensor:
    """Sample the (S, M, R) labels of the pairs' segments at their points (S, M, R, 2).

    The points of all stages are sampled together, image by image, so that only the masks of one image at a time are
    converted to float.
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
    """Check that labels fit the logits and each other.

    Args:
        class_logits: (B, Q, K + 1) class logits.
        mask_labels: For each image (N, H, W) masks of 0 and 1.
        class_labels: For each image (N,) class ids in 0..K-1.

    Raises:
        ValueError: If the labels are invalid; the message names the sample.
    """
    batch_size, _, num_columns = class_logits.shape
    for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
        if not isinstance(labels, Sequence | Tensor):
            raise ValueError(f"`{name}` must be a list with a tensor for each image, got a {type(labels).__name__}.")
    if not len(mask_labels) == len(class_labels) == batch_size:
        raise ValueError(
            f"`mask_labels` ({len(mask_labels)}) and `class_labels` ({len(class_labels)}) must have one entry for "
            f"each of the {batch_size} images."
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
    "mask_costs",
    "mask_loss",
    "mean_over_processes",
    "sample_all_maps",
    "sample_points",
]
