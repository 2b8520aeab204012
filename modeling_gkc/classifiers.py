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
"""Classifiers of queries: by cosines with text embeddings, or by a head that was trained on other classes.

Both are used in the same way: a module of stage -> class logits and query embeddings, for any classes that are asked
for. `GKCConfig.classifier` names one of `CLASSIFIER_CLASSES`.

Letters: B images, Q queries, C hidden, D text-embedding width, S source classes, M their names (M >= S: synonyms),
K classes that are asked for, P their prompts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .class_embeddings import SAME_TEXT, average_class_embeds, reduce_prompt_logits
from .configuration_gkc import GKCConfig

MAX_TEMPERATURE = 100.0
# A word covers the source class nearest to it fully, others by this power of how much nearer that one is: "puppy"
# covers dog and hardly cat, while "animal", as near to one as to the other, covers both.
COVERAGE_POWER = 4
# Words compete for a class by a higher power, so that hundreds of remote words do not outweigh the one that is meant.
COMPETITION_POWER = 8
# Keeps logarithms finite; far below what a head is ever sure of, so that its gradients never vanish for it.
SMALLEST_PROBABILITY = 1e-30
# Steps that correct the rounding of `decoder`; each leaves a tenth or less of what half precision has of it.
REFINEMENTS = 2
# Embeddings of one name in the same templates, also where half precision rounds them; other names are far below.
SAME_NAME_COSINE = 0.999
# Directions in which the classes differ less are stretched to it, or rounding would mix up classes with close names.
SMALLEST_SINGULAR_VALUE = 0.1


class ClassPrompts(NamedTuple):
    """Checked prompts of the classes that are asked for.

    Attributes:
        embeds: (P, D) L2-normalized embeddings.
        class_ids: (P,) class of each prompt, or None if each is its own.
        num_classes: K.
        reduction: How the logits of the prompts of a class become one, `mean` or `max`.
    """

    embeds: Tensor
    class_ids: Tensor | None
    num_classes: int
    reduction: str


class QueryClassifier(nn.Module):
    """Interface of the classifiers.

    Args:
        config: The segmenter's configuration.
    """

    def __init__(self, config: GKCConfig):
        super().__init__()
        # Before the scale, since saved optimizers know parameters by their position.
        self.register_parameter("no_object_embedding", None)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    @property
    def temperature(self) -> Tensor:
        """Factor of the logits, clamped at 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=MAX_TEMPERATURE)

    def forward(
        self, stage: ModelOutput, prompts: ClassPrompts, index: int = -1, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify the queries of a decoder stage.

        Args:
            stage: Output of the image path for this stage.
            prompts: The classes.
            index: Number of the stage, counted as in a list.
            class_weights: Output of `class_weights(prompts)`, if it is at hand.

        Returns:
            (B, Q, K + 1) class logits, the last column no-object, and (B, Q, D) L2-normalized query embeddings.
        """
        raise NotImplementedError

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """(B, Q, D) L2-normalized embeddings of the queries of the stage `index`."""
        raise NotImplementedError

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """Compute what the classification takes of the prompts; with fixed prompts it is computed once."""
        raise NotImplementedError

    def classify_embeds(self, query_embeds: Tensor, prompts: ClassPrompts) -> Tensor:
        """(B, Q, K + 1) class logits of the embeddings (B, Q, D) of an earlier output."""
        raise NotImplementedError

    def class_embeds(self, prompts: ClassPrompts) -> Tensor:
        """Reduce the prompts to one embedding per class that gives the same logits.

        Returns:
            (K, D), not normalized where the logits of several prompts are averaged.

        Raises:
            ValueError: The best of several prompts counts, for which there is no such embedding.
        """
        raise NotImplementedError

    def keep_last_stage(self) -> None:
        """Drop what classifies earlier stages than the last."""


class CosineClassifier(QueryClassifier):
    """Cosines between learned query embeddings and prompts, times a learned temperature; no-object is learned.

    Queries are embedded by one map C -> C for all stages and one map C -> D per stage.

    Args:
        config: The segmenter's configuration.
        num_pooled_features: Width of the features that are pooled under a mask.
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
        return self._cosine_logits(query_embeds, prompts, class_weights), query_embeds

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """(B, Q, D) L2-normalized embeddings of the queries of a stage."""
        features = stage.last_hidden_state
        if self.pooled_projection is not None:
            pooled = self.pooled_projection(stage.pooled_features)
            if self.class_feature != "pooled":
                pooled = features + pooled
            features = torch.where(stage.mask_is_empty[..., None], features, pooled)
        return F.normalize(self.stage_projections[index](F.relu(self.dense(features))), dim=-1)

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """(P + 1, D) embeddings of the prompts and of no-object."""
        no_object = F.normalize(_at_least_fp32(self.no_object_embedding), dim=-1)
        return torch.cat([prompts.embeds.to(no_object), no_object[None]])

    def classify_embeds(self, query_embeds: Tensor, prompts: ClassPrompts) -> Tensor:
        """(B, Q, K + 1) class logits of the embeddings (B, Q, D) of an earlier output."""
        return self._cosine_logits(query_embeds, prompts)

    def _cosine_logits(
        self, query_embeds: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """In fp32 at least: a temperature up to 100 would show the rounding of half precision."""
        with torch.autocast(query_embeds.device.type, enabled=False):
            query_embeds = _at_least_fp32(query_embeds)
            weights = self.class_weights(prompts) if class_weights is None else class_weights
            logits = self.temperature.to(query_embeds) * query_embeds @ weights.to(query_embeds).T
        if prompts.class_ids is None:
            return logits
        return reduce_prompt_logits(logits, prompts.class_ids, prompts.reduction, prompts.num_classes)

    def class_embeds(self, prompts: ClassPrompts) -> Tensor:
        """Reduce the prompts to one embedding per class; see `QueryClassifier.class_embeds`."""
        embeds, class_ids = prompts.embeds, prompts.class_ids
        if class_ids is None:
            return embeds
        if prompts.reduction == "max":
            raise ValueError(_NO_SINGLE_EMBEDDING)
        # A logit is linear in the embedding, so the mean of the logits is the logit of the mean.
        sums = embeds.new_zeros(prompts.num_classes, embeds.shape[1]).index_add(0, class_ids, embeds)
        return sums / class_ids.bincount()[:, None]

    def keep_last_stage(self) -> None:
        """Drop the projections of earlier stages than the last."""
        self.stage_projections = self.stage_projections[-1:]


class ConvexClassifier(QueryClassifier):
    """Class probabilities of a closed-vocabulary head, shared out to the classes that are asked for.

    A head's probabilities of the classes it was trained on (source classes) make a query embedding: the convex
    combination of the classes' text embeddings (Norouzi et al., *Zero-Shot Learning by Convex Combination of Semantic
    Embeddings*, ICLR 2014), no-object being one more class with a direction of its own.

    Cosines of that embedding with words would not give back what the head said: CLIP's embeddings of different words
    have cosines of 0.7 to 0.9, so a mixture leans towards the words that resemble all others. But a combination of
    linearly independent embeddings still holds its weights (`basis` has the embeddings, pulled apart where they are
    too close for the arithmetic). The weights are read out of it again, and each source class hands its probability to
    the words that it is close to: to its own name, asked again, all of it. With the source's own names the
    probabilities are therefore the source's. What no word claims is no-object: "none of these".

    "Its own name" means the embedding that `set_source` was given. The same name in another prompt template is another
    text, which gets the less of its class the farther the template moves it: ask in the templates of the conversion.

    The head trains; the embeddings of the source's names are part of the checkpoint and do not. Where the head itself
    is at hand, as in a forward pass, its probabilities are shared as they are; read out of embeddings they differ by
    rounding, some 1e-5.

    Args:
        config: With `source_vocabulary`, the S classes of the head and their names.
        num_pooled_features: Not used; pooled features are not classified.
    """

    def __init__(self, config: GKCConfig, num_pooled_features: int | None = None):
        super().__init__(config)
        names, width = config.source_vocabulary, config.projection_dim
        self.labels = [class_names[0] for class_names in names]
        self.class_predictor = nn.Linear(config.hidden_size, len(names) + 1)
        self.register_buffer("name_embeds", torch.zeros(sum(map(len, names)), width))
        self.register_buffer("name_class_ids", torch.zeros(len(self.name_embeds), dtype=torch.long))
        self.register_buffer("basis", torch.zeros(len(names) + 1, width))
        self.register_buffer("decoder", torch.zeros(width, len(names) + 1))
        self.register_buffer("typical_distance", torch.ones(()))

    @torch.no_grad()
    def set_source(self, class_predictor: nn.Linear, name_embeds: Tensor, name_class_ids: Tensor) -> None:
        """Take over a source's head and the embeddings of its names.

        Args:
            class_predictor: The head, C -> S + 1, no-object last.
            name_embeds: (M, D) L2-normalized text embeddings of the source's names, the label of each class first. A
                synonym that is also a name of another class says nothing and counts as its class's label.
            name_class_ids: (M,) class of each name, 0..S-1.

        Raises:
            ValueError: The text embeddings of some classes cannot be told apart, or a class has no name.
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
        # Orthogonal to all classes, so that how sure the head is of no-object moves no class.
        no_object = directions[num_classes:][:1]
        self.basis.copy_(torch.cat([stretched, no_object]))
        self.decoder.copy_(torch.linalg.pinv(self.basis.double()))

    def _check_distinct(self, distances: Tensor) -> None:
        distances = distances.clone().fill_diagonal_(torch.inf)
        if distances.min() <= 3 * SAME_TEXT:
            pair = divmod(int(distances.argmin()), len(distances))
            first, second = (self.labels[index] for index in pair)
            raise ValueError(
                f"The text tower cannot tell the classes {first!r} and {second!r} apart: give them names that differ."
            )

    def forward(
        self, stage: ModelOutput, prompts: ClassPrompts, index: int = -1, class_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify the queries of a decoder stage; see `QueryClassifier.forward`."""
        probabilities = self.head_probabilities(stage)
        return self._convex_logits(probabilities, prompts, class_weights), self.embed_probabilities(probabilities)

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """(B, Q, D) L2-normalized embeddings, fp32 at least; the head is the same at every stage."""
        return self.embed_probabilities(self.head_probabilities(stage))

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """(S + 1, K + 1) shares of the source classes and no-object, as `shares`."""
        return self.shares(prompts.embeds, prompts.class_ids, prompts.num_classes)

    def classify_embeds(self, query_embeds: Tensor, prompts: ClassPrompts) -> Tensor:
        """(B, Q, K + 1) class logits of the embeddings (B, Q, D) of an earlier output."""
        return self._convex_logits(self.read(query_embeds), prompts)

    def _convex_logits(
        self, probabilities: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities, times the temperature, by (B, Q, S + 1) probabilities of the source classes."""
        with torch.autocast(probabilities.device.type, enabled=False):
            shares = self.class_weights(prompts) if class_weights is None else class_weights
            logits = (probabilities @ shares.to(probabilities)).clamp(min=SMALLEST_PROBABILITY).log()
            return self.temperature.to(logits) * logits

    def class_embeds(self, prompts: ClassPrompts) -> Tensor:
        """Reduce the prompts to one embedding per class; see `QueryClassifier.class_embeds`."""
        if prompts.class_ids is not None:
            raise ValueError(_NO_SINGLE_EMBEDDING)
        return prompts.embeds

    def head_probabilities(self, stage: ModelOutput) -> Tensor:
        """(B, Q, S + 1) probabilities of the source classes and of no-object by the head, fp32 at least."""
        return _at_least_fp32(self.class_predictor(stage.last_hidden_state)).softmax(dim=-1)

    def embed_probabilities(self, probabilities: Tensor) -> Tensor:
        """(B, Q, D) embeddings of queries by their (B, Q, S + 1) probabilities."""
        with torch.autocast(probabilities.device.type, enabled=False):
            return F.normalize(probabilities @ self.basis.to(probabilities), dim=-1)

    def read(self, query_embeds: Tensor) -> Tensor:
        """(B, Q, S + 1) probabilities that make up (B, Q, D) embeddings; inverts `embed_probabilities`."""
        with torch.autocast(query_embeds.device.type, enabled=False):
            query_embeds = _at_least_fp32(query_embeds)
            basis, decoder = self.basis.to(query_embeds), self.decoder.to(query_embeds)
            weights = query_embeds @ decoder
            for _ in range(REFINEMENTS):
                weights = weights + (query_embeds - weights @ basis) @ decoder
            # What is made of no class at all is no-object.
            weights = torch.cat(
                [weights[..., :-1].clamp(min=0), weights[..., -1:].clamp(min=SMALLEST_PROBABILITY)], -1
            )
            return weights / weights.sum(dim=-1, keepdim=True)

    def shares(self, class_embeds: Tensor, class_ids: Tensor | None, num_classes: int) -> Tensor:
        """How much of each source class goes to each class that is asked for.

        A class covers what is nearest to its names, the less the farther that is: at the distance that is typical
        between two source classes, half. Classes that cover one source class share it by their distances to it.

        Args:
            class_embeds: (P, D) L2-normalized prompts, the label of each class first.
            class_ids: (P,) class of each, 0..K-1, or None if each is its own.
            num_classes: K.

        Returns:
            (S + 1, K + 1) shares in 0..1, whose rows sum to 1. The last column is no-object, which gets what no class
            covers; the last row, which is no-object, gives nothing to others.
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
        """(S, K) cosine distances of the nearest names of source classes and classes."""
        embeds, names = _unit_vectors(class_embeds), _unit_vectors(self.name_embeds)
        cosines = names @ embeds.to(names).T  # (M, P)
        cosines = _group_max(cosines, self.name_class_ids, len(self.labels))  # (S, P)
        return (1 - _group_max(cosines.T, class_ids, num_classes).T).clamp(min=SAME_TEXT)


class FCCLIPClassifier(QueryClassifier):
    """Classifier of FC-CLIP (Yu et al., *Convolutions Die Hard*, NeurIPS 2023): learned, and by the frozen CLIP head.

    The learned embedding of a query comes from the query and the mask features inside its mask. `config.ensemble`
    combines its class probabilities with those of the region's embedding by CLIP, which knows more classes but was not
    trained on regions: the weight of CLIP is `ensemble_alpha` for classes of `source_vocabulary`, which the learned
    embedding was trained on (seen classes), and `ensemble_beta` for others. The learned embedding alone decides about
    no-object.

    A class is seen if the text embedding of one of its names is that of a name in `source_vocabulary`, which the
    checkpoint stores: ask in the prompt templates of the checkpoint. As CLIP's tokenizer ignores case, so does this.

    Args:
        config: The segmenter's configuration.
        num_pooled_features: Width of the mask features that are pooled inside a mask.
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
        """Classify the queries of a stage; see `QueryClassifier`. With an ensemble embeddings are (B, Q, 2 * D)."""
        query_embeds = self.embed_queries(stage, index)
        if stage.region_embeds is not None:
            region_embeds = F.normalize(_at_least_fp32(stage.region_embeds), dim=-1)
            query_embeds = torch.cat([_at_least_fp32(query_embeds), region_embeds], dim=-1)
        return self._class_logits(query_embeds, prompts, class_weights), query_embeds

    def embed_queries(self, stage: ModelOutput, index: int = -1) -> Tensor:
        """(B, Q, D) L2-normalized learned embeddings; they are computed in the same way at every stage."""
        first, second, last = self.layers
        features = stage.last_hidden_state + self.pooled_projection(stage.pooled_features)
        return F.normalize(last(F.relu(second(F.relu(first(features))))), dim=-1)

    def class_weights(self, prompts: ClassPrompts) -> Tensor:
        """(P + 1, D + 1) embeddings of the prompts and no-object; the last column is 1 for prompts of seen names."""
        no_object = F.normalize(_at_least_fp32(self.no_object_embedding), dim=-1)
        embeds = prompts.embeds.to(no_object)
        is_seen = torch.zeros_like(embeds[:, :1])
        if len(self.seen_embeds):
            names = _unit_vectors(embeds)
            cosines = names @ _unit_vectors(self.seen_embeds).to(names).T
            is_seen = (cosines.amax(dim=1, keepdim=True) > SAME_NAME_COSINE).to(embeds)
        return torch.cat([torch.cat([embeds, is_seen], dim=1), F.pad(no_object, (0, 1))[None]])

    def classify_embeds(self, query_embeds: Tensor, prompts: ClassPrompts) -> Tensor:
        """(B, Q, K + 1) class logits of the embeddings of an earlier output, (B, Q, D) or (B, Q, 2 * D)."""
        return self._class_logits(query_embeds, prompts)

    def _class_logits(
        self, query_embeds: Tensor, prompts: ClassPrompts, class_weights: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(query_embeds.device.type, enabled=False):
            query_embeds = _at_least_fp32(query_embeds)
            weights = self.class_weights(prompts) if class_weights is None else class_weights
            weights, is_seen = weights.to(query_embeds).split([weights.shape[1] - 1, 1], dim=1)
            learned, region = query_embeds[..., : weights.shape[1]], query_embeds[..., weights.shape[1] :]
            logits = self._reduce(self.temperature.to(learned) * learned @ weights.T, prompts)
            if not region.shape[-1]:
                return logits
            clip_temperature = self.clip_logit_scale.exp().clamp(max=MAX_TEMPERATURE).to(region)
            clip_logits = self._reduce(clip_temperature * region @ weights.T, prompts)[..., :-1]
            is_seen = is_seen[:, 0]
            if prompts.class_ids is not None:
                is_seen = reduce_prompt_logits(is_seen, prompts.class_ids, "max", prompts.num_classes)
            alpha, beta = self.clip_weights
            clip_weights = beta + (alpha - beta) * is_seen[:-1]
            clip_weights = clip_weights * region.any(dim=-1, keepdim=True)  # (B, Q, K)
            return combine_class_logits(logits, clip_logits, clip_weights, self.ensemble)

    @staticmethod
    def _reduce(logits: Tensor, prompts: ClassPrompts) -> Tensor:
        if prompts.class_ids is None:
            return logits
        return reduce_prompt_logits(logits, prompts.class_ids, prompts.reduction, prompts.num_classes)

    def class_embeds(self, prompts: ClassPrompts) -> Tensor:
        """Return the embeddings (K, D) of classes with one prompt each; see `QueryClassifier`."""
        if prompts.class_ids is not None:
            raise ValueError(_NO_SINGLE_EMBEDDING)
        return prompts.embeds


def combine_class_logits(logits: Tensor, clip_logits: Tensor, clip_weights: Tensor, ensemble: str) -> Tensor:
    """Combine the class probabilities of two classifiers; that of no-object stays as the first one gives it.

    Args:
        logits: (..., K + 1) logits of the first classifier, the last column no-object.
        clip_logits: (..., K) logits of the second classifier.
        clip_weights: (..., K) weight of the second classifier for each class, 0..1.
        ensemble: `average` for the arithmetic, `geometric` for the geometric mean of the probabilities of the K
            classes (of the softmax without no-object), with these weights, normalized to a sum of 1 again.

    Returns:
        (..., K + 1) logits whose softmax is the combination.
    """
    class_logits, no_object = logits[..., :-1], logits[..., -1:]
    # In logarithms, a probability that underflows to 0 makes no NaN.
    first, second = class_logits.log_softmax(dim=-1), clip_logits.log_softmax(dim=-1)
    if ensemble == "geometric":
        combined = (1 - clip_weights) * first + clip_weights * second
    else:
        combined = torch.logaddexp((1 - clip_weights).log() + first, clip_weights.log() + second)
    return torch.cat([combined.log_softmax(dim=-1) + class_logits.logsumexp(dim=-1, keepdim=True), no_object], dim=-1)


_NO_SINGLE_EMBEDDING = (
    "This model takes the maximum over a class's names, which one embedding per class cannot represent: export with "
    "`fixed` (--fixed), or give each class one name."
)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _unit_vectors(embeds: Tensor) -> Tensor:
    """Normalise in fp32 at least: what half precision does to their lengths would count as distance."""
    return F.normalize(_at_least_fp32(embeds), dim=-1)


def _without_shared_synonyms(name_embeds: Tensor, class_ids: Tensor) -> Tensor:
    """(M, D) names, in which the label of its class stands for every synonym that another class has too."""
    embeds = _unit_vectors(name_embeds)
    same_text = embeds @ embeds.T > 1 - 10 * SAME_TEXT
    shared = (same_text & (class_ids[:, None] != class_ids)).any(dim=1)
    labels = (class_ids[:, None] == class_ids).int().argmax(dim=1)  # (M,) row of the first name of the same class
    return torch.where(shared[:, None], name_embeds[labels], name_embeds)


def _group_max(values: Tensor, class_ids: Tensor, num_classes: int) -> Tensor:
    """(P, N) -> (K, N) largest value of each class."""
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
