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
"""Open-vocabulary classifiers of queries: by cosine similarity, or by a closed-vocabulary head.

Both have the interface `QueryClassifier`, which computes class logits and query embeddings of a decoder stage for the
classes of any vocabulary. `GKCConfig.classifier` selects one of `CLASSIFIER_CLASSES`.

Letters: B images, Q queries, C hidden size, D text-embedding width, S source classes, M names of the source classes
(M >= S because of synonyms), K requested classes, P prompts of the requested classes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .class_embeddings import SAME_TEXT, average_class_embeds, reduce_prompt_logits
from .configuration_gkc import GKCConfig
from .label_text import shown

MAX_TEMPERATURE = 100.0
# A requested class covers the nearest source class, and others by this power of the ratio of the distances: "puppy"
# covers dog and hardly cat, while "animal", which is equally near to both, covers both.
COVERAGE_POWER = 4
# Requested classes compete for a source class by a higher power, so that many distant ones do not outweigh a near one.
COMPETITION_POWER = 8
# Lower limit that keeps logarithms finite, far below the probabilities of a head, so that gradients do not vanish.
SMALLEST_PROBABILITY = 1e-30
# Number of iterative refinements that correct rounding errors of `decoder`; each reduces them to a tenth or less.
REFINEMENTS = 2
# Lower limit of the cosine similarity of two embeddings of one name, which differ by rounding errors.
SAME_NAME_COSINE = 0.999
# Lower limit of the singular values of the basis, so that rounding errors do not confuse classes with similar names.
SMALLEST_SINGULAR_VALUE = 0.1


class ClassPrompts(NamedTuple):
    """Validated prompts of the requested classes.

    Attributes:
        embeds: (P, D) L2-normalized embeddings of the prompts.
        class_ids: (P,) class of each prompt, or None if each prompt is a class of its own.
        num_classes: Number K of classes.
        reduction: Reduction of the logits of the prompts of a class, `mean` or `max`.
    """

    embeds: Tensor
    class_ids: Tensor | None
    num_classes: int
    reduction: str

    def reduce(self, logits: Tensor) -> Tensor:
        """Reduce logits (..., P + 1) of prompts to logits (..., K + 1) of classes."""
        if self.class_ids is None:
            return logits
        return reduce_prompt_logits(logits, self.class_ids, self.reduction, self.num_classes)


class QueryClassifier(nn.Module):
    """Base class of the classifiers of queries.

    Args:
        config: Configuration of the segmentation model.
    """

    def __init__(self, config: GKCConfig):
        super().__init__()
        # Registered before the scale, because saved optimizers identify parameters by their order.
        self.register_parameter("no_object_embedding", None)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    @property
    def temperature(self) -> Tensor:
        """Factor of the logits, at most 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=MAX_TEMPERATURE)

    def forward(
        self, stage: ModelOutput, prompts: ClassPrompts, index: int = -1, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify the queries of a decoder stage.

        Args:
            stage: Output of the image path for this stage.
            prompts: Prompts of the requested classes.
            index: Index of the stage, negative from the last.
            class_weights: Result of `class_weights(prompts)`, if it was computed before.

        Returns:
            The class logits (B, Q, K + 1), whose last column is no-object, and the L2-normalized query embeddings
            (B, Q, D).
        """
        raise NotImplementedError

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """Compute the L2-normalized query embeddings (B, Q, D) of a decoder stage."""
        raise NotImplementedError

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """Compute the weights of the classification, which can be reused for other images with the same prompts."""
        raise NotImplementedError

    def classify_embeds(
        self, query_embeds: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """Compute class logits (B, Q, K + 1) from the query embeddings (B, Q, D) of this or an earlier output."""
        raise NotImplementedError

    def class_embeds(self, prompts: ClassPrompts) -> Tensor:
        """Reduce the prompts to one embedding per class that results in the same logits.

        Returns:
            (K, D) embeddings. They are not normalized if the logits of several prompts are averaged.

        Raises:
            ValueError: If classes have several prompts and no such embedding exists, as for their maximum.
        """
        if prompts.class_ids is not None:
            raise ValueError(_NO_SINGLE_EMBEDDING)
        return prompts.embeds

    def keep_last_stage(self) -> None:
        """Remove the weights that only classify stages before the last."""


class CosineClassifier(QueryClassifier):
    """Classifier by cosine similarities of query embeddings and prompts, times a learned temperature.

    Queries are embedded by a linear layer C -> C that all stages share and a linear layer C -> D for each stage. The
    embedding of no-object is learned.

    Args:
        config: Configuration of the segmentation model.
        num_pooled_features: Number F of features that are pooled under a mask.
    """

    def __init__(self, config: GKCConfig, num_pooled_features: int):
        super().__init__(config)
        width = config.hidden_size
        self.no_object_embedding = nn.Parameter(torch.empty(config.projection_dim))
        self.class_feature = config.class_feature
        self.pooled_projection = None
        if config.class_feature != "query":
            self.pooled_projection = nn.Sequential(
                nn.LayerNorm(num_pooled_features),
                nn.Linear(num_pooled_features, width),
                nn.ReLU(),
                nn.Linear(width, width),
            )
        self.dense = nn.Linear(width, width)
        self.stage_projections = nn.ModuleList(
            nn.Linear(width, config.projection_dim) for _ in range(config.decoder_layers + 1)
        )

    def forward(
        self, stage: ModelOutput, prompts: ClassPrompts, index: int = -1, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify the queries of a decoder stage; see `QueryClassifier.forward`."""
        query_embeds = self.embed_queries(stage, index)
        return self.classify_embeds(query_embeds, prompts, class_weights), query_embeds

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """Compute the L2-normalized query embeddings (B, Q, D) of a decoder stage."""
        features = stage.last_hidden_state
        if self.pooled_projection is not None:
            pooled = self.pooled_projection(stage.pooled_features)
            if self.class_feature != "pooled":
                pooled = features + pooled
            features = torch.where(stage.mask_is_empty[..., None], features, pooled)
        return F.normalize(self.stage_projections[index](F.relu(self.dense(features))), dim=-1)

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """Return the embeddings (P + 1, D) of the prompts and of no-object."""
        no_object = F.normalize(_at_least_fp32(self.no_object_embedding), dim=-1)
        return torch.cat([prompts.embeds.to(no_object), no_object[None]])

    def classify_embeds(
        self, query_embeds: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """Compute class logits (B, Q, K + 1) from query embeddings (B, Q, D) in fp32 at least.

        The temperature of up to 100 amplifies rounding errors.
        """
        with torch.autocast(query_embeds.device.type, enabled=False):
            query_embeds = _at_least_fp32(query_embeds)
            weights = self.class_weights(prompts) if class_weights is None else class_weights
            logits = self.temperature.to(query_embeds) * query_embeds @ weights.to(query_embeds).T
        return prompts.reduce(logits)

    def class_embeds(self, prompts: ClassPrompts) -> Tensor:
        """Reduce the prompts to one embedding per class; see `QueryClassifier.class_embeds`."""
        embeds, class_ids = prompts.embeds, prompts.class_ids
        if class_ids is None:
            return embeds
        if prompts.reduction == "max":
            raise ValueError(_NO_SINGLE_EMBEDDING)
        # A logit is linear in the embedding, so that the mean of the logits is the logit of the mean embedding.
        sums = embeds.new_zeros(prompts.num_classes, embeds.shape[1]).index_add(0, class_ids, embeds)
        return sums / class_ids.bincount()[:, None]

    def keep_last_stage(self) -> None:
        """Remove the projections of all stages before the last."""
        self.stage_projections = self.stage_projections[-1:]


class ConvexClassifier(QueryClassifier):
    """Classifier that distributes the class probabilities of a closed-vocabulary head over the requested classes.

    The query embedding is the convex combination of the text embeddings of the classes that the head was trained on,
    the source classes, weighted by their probabilities (ConSE: Norouzi et al., *Zero-Shot Learning by Convex
    Combination of Semantic Embeddings*, ICLR 2014). No-object is one more class with a direction of its own.

    Unlike ConSE, the logits are not cosine similarities of these embeddings and the prompts. CLIP embeddings of
    different words have cosine similarities of 0.7 to 0.9, so that a combination is closest to words that resemble all
    others. Instead, the probabilities of the source classes are recovered from the embedding, which is possible
    because the embeddings in `basis` are linearly independent; those that are too close for the numerical precision
    are moved apart. Each source class then gives its probability to the requested classes that are near to it, and all
    of it to its own name. With the names of the source, the probabilities therefore equal those of the source.
    Probability that no requested class takes goes to no-object.

    The own name of a class is the embedding given to `set_source`. With another prompt template, a name has another
    embedding and gets less of the probability of its class, so that the templates of the conversion should be used.

    The head can be trained. The embeddings of the source names are buffers of the checkpoint. A forward pass uses the
    probabilities of the head directly; those recovered from query embeddings differ by rounding errors of about 1e-5.

    Args:
        config: Configuration of the segmentation model, whose `source_vocabulary` has the S classes of the head and
            their names.
        num_pooled_features: Not used, because pooled features are not classified.
    """

    def __init__(self, config: GKCConfig, num_pooled_features: int | None = None):
        super().__init__(config)
        names, width = config.source_vocabulary, config.projection_dim
        self.labels = [class_names[0] for class_names in names]
        self.class_predictor = self.make_head(config)
        self.register_buffer("name_embeds", torch.zeros(sum(map(len, names)), width))
        self.register_buffer("name_class_ids", torch.zeros(len(self.name_embeds), dtype=torch.long))
        self.register_buffer("basis", torch.zeros(len(names) + 1, width))
        self.register_buffer("decoder", torch.zeros(width, len(names) + 1))
        self.register_buffer("typical_distance", torch.ones(()))

    def make_head(self, config: GKCConfig) -> nn.Module:
        """Create the head that maps query features (B, Q, C) to logits (B, Q, S + 1) of the source classes."""
        return nn.Linear(config.hidden_size, len(self.labels) + 1)

    @torch.no_grad()
    def set_source(self, class_predictor: nn.Linear, name_embeds: Tensor, name_class_ids: Tensor) -> None:
        """Copy the head of a source model and the embeddings of its class names.

        Args:
            class_predictor: Head C -> S + 1, whose last output is no-object.
            name_embeds: (M, D) L2-normalized text embeddings of the names, the label of each class first. A synonym
                that is also a name of another class is ambiguous and replaced by the label of its class.
            name_class_ids: (M,) class of each name, 0..S-1.

        Raises:
            ValueError: If two classes have the same text embedding, or a class has no name.
        """
        num_classes = len(self.labels)
        self.class_predictor.load_state_dict(class_predictor.state_dict())
        self.name_embeds.copy_(_without_shared_synonyms(name_embeds, name_class_ids))
        self.name_class_ids.copy_(name_class_ids)
        if num_classes > 1:
            distances = self._distances(self.name_embeds, self.name_class_ids, num_classes)
            self._check_distinct(distances)
            different = ~torch.eye(num_classes, dtype=torch.bool, device=distances.device)
            self.typical_distance.copy_(distances[different].median())
        classes = average_class_embeds(self.name_embeds.double(), self.name_class_ids)
        mixtures, values, directions = torch.linalg.svd(classes, full_matrices=True)
        stretched = mixtures * values.clamp(min=SMALLEST_SINGULAR_VALUE) @ directions[:num_classes]
        # Orthogonal to all classes, so that the probability of no-object does not affect those of the classes.
        no_object = directions[num_classes:][:1]
        self.basis.copy_(torch.cat([stretched, no_object]))
        self.decoder.copy_(torch.linalg.pinv(self.basis.double()))

    def _check_distinct(self, distances: Tensor) -> None:
        """Check that no two source classes have the same text embedding, given their distances (S, S)."""
        distances = distances.clone().fill_diagonal_(torch.inf)
        if distances.min() <= 3 * SAME_TEXT:
            pair = divmod(int(distances.argmin()), len(distances))
            first, second = (self.labels[index] for index in pair)
            raise ValueError(
                f"The text encoder gives the classes {shown(first)} and {shown(second)} one embedding: give them "
                "different names."
            )

    def forward(
        self, stage: ModelOutput, prompts: ClassPrompts, index: int = -1, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify the queries of a decoder stage; see `QueryClassifier.forward`."""
        probabilities = self.head_probabilities(stage)
        return self._convex_logits(probabilities, prompts, class_weights), self.embed_probabilities(probabilities)

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """Compute the L2-normalized query embeddings (B, Q, D) in fp32 at least; all stages share the head."""
        return self.embed_probabilities(self.head_probabilities(stage))

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """Return the shares (S + 1, K + 1) of `shares` for the prompts."""
        return self.shares(prompts.embeds, prompts.class_ids, prompts.num_classes)

    def classify_embeds(
        self, query_embeds: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """Compute class logits (B, Q, K + 1) from the query embeddings (B, Q, D) of an earlier output."""
        return self._convex_logits(self.recover_probabilities(query_embeds), prompts, class_weights)

    def _convex_logits(
        self, probabilities: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """Compute class logits (B, Q, K + 1) from probabilities (B, Q, S + 1) of the source classes."""
        with torch.autocast(probabilities.device.type, enabled=False):
            shares = self.class_weights(prompts) if class_weights is None else class_weights
            logits = (probabilities @ shares.to(probabilities)).clamp(min=SMALLEST_PROBABILITY).log()
            return self.temperature.to(logits) * logits

    def head_probabilities(self, stage: ModelOutput) -> Tensor:
        """Compute the head's probabilities (B, Q, S + 1) of the source classes and no-object in fp32 at least."""
        return _at_least_fp32(self.class_predictor(stage.last_hidden_state)).softmax(dim=-1)

    def embed_probabilities(self, probabilities: Tensor) -> Tensor:
        """Compute the query embeddings (B, Q, D) of probabilities (B, Q, S + 1) of the source classes."""
        with torch.autocast(probabilities.device.type, enabled=False):
            return F.normalize(probabilities @ self.basis.to(probabilities), dim=-1)

    def recover_probabilities(self, query_embeds: Tensor) -> Tensor:
        """Recover the probabilities (B, Q, S + 1) from query embeddings; inverts `embed_probabilities`."""
        with torch.autocast(query_embeds.device.type, enabled=False):
            query_embeds = _at_least_fp32(query_embeds)
            basis, decoder = self.basis.to(query_embeds), self.decoder.to(query_embeds)
            weights = query_embeds @ decoder
            for _ in range(REFINEMENTS):
                weights = weights + (query_embeds - weights @ basis) @ decoder
            # An embedding without any class is no-object.
            weights = torch.cat(
                [weights[..., :-1].clamp(min=0), weights[..., -1:].clamp(min=SMALLEST_PROBABILITY)], -1
            )
            return weights / weights.sum(dim=-1, keepdim=True)

    def shares(self, class_embeds: Tensor, class_ids: Tensor | None, num_classes: int) -> Tensor:
        """Compute the shares of the requested classes in the probability of each source class.

        A requested class covers the source class that is nearest to its names, and less of it with a larger distance:
        one half at the median distance of two source classes. Requested classes that cover the same source class share
        it according to their distances.

        Args:
            class_embeds: (P, D) L2-normalized embeddings of the prompts, the label of each class first.
            class_ids: (P,) class of each prompt, 0..K-1, or None if each prompt is a class of its own.
            num_classes: Number K of requested classes.

        Returns:
            (S + 1, K + 1) shares between 0 and 1, whose rows sum to 1. The last column is no-object, which gets the
            rest that no class covers. The last row is no-object, all of which stays no-object.
        """
        if class_ids is None:
            class_ids = torch.arange(num_classes, device=class_embeds.device)
        else:
            class_embeds = _without_shared_synonyms(class_embeds, class_ids)
        distances = self._distances(class_embeds, class_ids, num_classes)
        relative = distances.amin(dim=0) / distances
        fit = 1 / (1 + (distances / self.typical_distance.to(distances)) ** COVERAGE_POWER)
        coverage = (relative**COVERAGE_POWER * fit).clamp(min=SMALLEST_PROBABILITY)
        claims = (coverage.log() - COMPETITION_POWER * distances.log()).softmax(dim=1)
        covered = coverage.amax(dim=1, keepdim=True)
        shares = torch.cat([covered * claims, 1 - covered], dim=1)
        return torch.cat([shares, F.pad(shares.new_ones(1, 1), (num_classes, 0))])

    def _distances(self, class_embeds: Tensor, class_ids: Tensor, num_classes: int) -> Tensor:
        """Compute the cosine distances (S, K) of the nearest names of each source class and requested class."""
        embeds, names = _unit_vectors(class_embeds), _unit_vectors(self.name_embeds)
        cosines = names @ embeds.to(names).T  # (M, P)
        cosines = _group_max(cosines, self.name_class_ids, len(self.labels))  # (S, P)
        return (1 - _group_max(cosines.T, class_ids, num_classes).T).clamp(min=SAME_TEXT)


class FCCLIPClassifier(QueryClassifier):
    """Classifier of FC-CLIP (Yu et al., *Convolutions Die Hard*, NeurIPS 2023): ensemble of learned and CLIP logits.

    The learned embedding of a query is computed from the query and the mask features inside its mask. With
    `config.ensemble`, its class probabilities are combined with those of CLIP's embedding of the region, which knows
    more classes but was not trained on regions. The weight of CLIP is `ensemble_alpha` for seen classes, those of
    `source_vocabulary` on which the learned embedding was trained, and `ensemble_beta` for other classes. The
    probability of no-object is that of the learned embedding.

    A class is seen if one of its names has the text embedding of a name in `source_vocabulary`. These embeddings are
    stored in the checkpoint, so that the prompt templates of the checkpoint must be used. Case is ignored, as in
    CLIP's tokenizer.

    Args:
        config: Configuration of the segmentation model.
        num_pooled_features: Number of mask features that are pooled inside a mask.
    """

    def __init__(self, config: GKCConfig, num_pooled_features: int):
        super().__init__(config)
        width, projection_dim = config.hidden_size, config.projection_dim
        self.ensemble = config.ensemble
        self.clip_weights = config.ensemble_alpha, config.ensemble_beta
        self.pooled_projection = nn.Sequential(
            nn.LayerNorm(num_pooled_features), nn.Linear(num_pooled_features, width)
        )
        self.layers = nn.ModuleList(
            [nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, projection_dim)]
        )
        self.no_object_embedding = nn.Parameter(torch.empty(projection_dim))
        self.register_buffer("clip_logit_scale", torch.tensor(math.log(MAX_TEMPERATURE)))
        self.register_buffer("seen_embeds", torch.zeros(sum(map(len, config.source_vocabulary or [])), projection_dim))

    def forward(
        self, stage: ModelOutput, prompts: ClassPrompts, index: int = -1, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify the queries of a stage; see `QueryClassifier`. With an ensemble, embeddings are (B, Q, 2 * D)."""
        query_embeds = self.embed_queries(stage, index)
        if stage.region_embeds is not None:
            region_embeds = F.normalize(_at_least_fp32(stage.region_embeds), dim=-1)
            query_embeds = torch.cat([_at_least_fp32(query_embeds), region_embeds], dim=-1)
        return self.classify_embeds(query_embeds, prompts, class_weights), query_embeds

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """Compute the L2-normalized learned query embeddings (B, Q, D); all stages share the layers."""
        first, second, last = self.layers
        features = stage.last_hidden_state + self.pooled_projection(stage.pooled_features)
        return F.normalize(last(F.relu(second(F.relu(first(features))))), dim=-1)

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """Return embeddings (P + 1, D + 1) of the prompts and no-object; the last column is 1 for seen names."""
        no_object = F.normalize(_at_least_fp32(self.no_object_embedding), dim=-1)
        embeds = prompts.embeds.to(no_object)
        is_seen = torch.zeros_like(embeds[:, :1])
        if len(self.seen_embeds):
            names = _unit_vectors(embeds)
            cosines = names @ _unit_vectors(self.seen_embeds).to(names).T
            is_seen = (cosines.amax(dim=1, keepdim=True) > SAME_NAME_COSINE).to(embeds)
        return torch.cat([torch.cat([embeds, is_seen], dim=1), F.pad(no_object, (0, 1))[None]])

    def classify_embeds(
        self, query_embeds: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """Compute class logits (B, Q, K + 1) from (B, Q, D) or, combined with CLIP's, (B, Q, 2 * D) embeddings."""
        with torch.autocast(query_embeds.device.type, enabled=False):
            query_embeds = _at_least_fp32(query_embeds)
            weights = self.class_weights(prompts) if class_weights is None else class_weights
            weights, is_seen = weights.to(query_embeds).split([weights.shape[1] - 1, 1], dim=1)
            learned, region = query_embeds[..., : weights.shape[1]], query_embeds[..., weights.shape[1] :]
            logits = prompts.reduce(self.temperature.to(learned) * learned @ weights.T)
            if not region.shape[-1]:
                return logits
            clip_temperature = self.clip_logit_scale.exp().clamp(max=MAX_TEMPERATURE).to(region)
            clip_logits = prompts.reduce(clip_temperature * region @ weights.T)[..., :-1]
            is_seen = is_seen[:, 0]
            if prompts.class_ids is not None:
                is_seen = reduce_prompt_logits(is_seen, prompts.class_ids, "max", prompts.num_classes)
            alpha, beta = self.clip_weights
            clip_weights = beta + (alpha - beta) * is_seen[:-1]
            clip_weights = clip_weights * region.any(dim=-1, keepdim=True)  # (B, Q, K)
            return combine_class_logits(logits, clip_logits, clip_weights, self.ensemble)


def combine_class_logits(logits: Tensor, clip_logits: Tensor, clip_weights: Tensor, ensemble: str) -> Tensor:
    """Combine the class probabilities of two classifiers; the probability of no-object is that of the first.

    Args:
        logits: (..., K + 1) logits of the first classifier; the last column is no-object.
        clip_logits: (..., K) logits of the second classifier.
        clip_weights: (..., K) weight of the second classifier for each class, between 0 and 1.
        ensemble: `average` for the arithmetic mean or `geometric` for the geometric mean of the probabilities of the K
            classes with these weights. The probabilities are those of a softmax without no-object, and their mean is
            normalized to a sum of 1.

    Returns:
        (..., K + 1) logits whose softmax is the combination.
    """
    class_logits, no_object = logits[..., :-1], logits[..., -1:]
    # Computed with logarithms, so that probabilities that underflow to 0 do not result in NaN.
    first, second = class_logits.log_softmax(dim=-1), clip_logits.log_softmax(dim=-1)
    if ensemble == "geometric":
        combined = (1 - clip_weights) * first + clip_weights * second
    else:
        combined = torch.logaddexp((1 - clip_weights).log() + first, clip_weights.log() + second)
    return torch.cat([combined.log_softmax(dim=-1) + class_logits.logsumexp(dim=-1, keepdim=True), no_object], dim=-1)


_NO_SINGLE_EMBEDDING = (
    "This model takes the maximum over the names of a class, which one embedding per class cannot represent: export "
    "with `fixed=True` (--fixed), or give each class one name."
)


def _at_least_fp32(values: Tensor) -> Tensor:
    """Convert half precision to fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _unit_vectors(embeds: Tensor) -> Tensor:
    """Normalize embeddings in fp32 at least, because rounding errors of their lengths would count as distances."""
    return F.normalize(_at_least_fp32(embeds), dim=-1)


def _without_shared_synonyms(name_embeds: Tensor, class_ids: Tensor) -> Tensor:
    """Replace every synonym that is also a name of another class by the label of its class in (M, D) embeddings."""
    embeds = _unit_vectors(name_embeds)
    same_text = embeds @ embeds.T > 1 - 10 * SAME_TEXT
    shared = (same_text & (class_ids[:, None] != class_ids)).any(dim=1)
    labels = (class_ids[:, None] == class_ids).int().argmax(dim=1)  # (M,) row of the first name of the same class
    return torch.where(shared[:, None], name_embeds[labels], name_embeds)


def _group_max(values: Tensor, class_ids: Tensor, num_classes: int) -> Tensor:
    """Reduce values (P, N) of prompts to the maximum (K, N) of each class."""
    index = class_ids.to(values.device)[:, None].expand_as(values)
    largest = values.new_zeros(num_classes, values.shape[1])
    return largest.scatter_reduce(0, index, values, "amax", include_self=False)


CLASSIFIER_CLASSES = {
    "projection": CosineClassifier,
    "convex_combination": ConvexClassifier,
    "fc_clip": FCCLIPClassifier,
}

__all__ = [
    "CLASSIFIER_CLASSES",
    "ClassPrompts",
    "ConvexClassifier",
    "CosineClassifier",
    "FCCLIPClassifier",
    "QueryClassifier",
    "combine_class_logits",
]
