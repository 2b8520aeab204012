"""Evaluation of a segmenter on the vocabularies of the mini-world.

Shapes: Q queries, D embedding dimension, K classes, P prompts, (H, W) image size, N regions of an image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from modeling_gkc.post_processing import resize_masks

from ..data.schema import read_row
from ..losses.distillation import DistillationHead
from ..metrics.base import harmonic_mean, ratio
from ..metrics.semantic import SemanticMetric
from ..teacher.region_teacher import TeacherEmbeddings
from .protocols import IGNORED, Protocol, all_protocols


@dataclass
class SegmentedImage:
    """Predictions and ground truth of one image."""

    image_id: str
    query_embeds: Tensor  # (Q, D)
    masks: Tensor  # (Q, H, W) probabilities
    region_index: Tensor  # (H, W), -1 for pixels of no segment
    segment_ids: Tensor  # (N,)
    attributes: list[dict]  # of the N regions

    @classmethod
    def from_row(
        cls, row: Mapping, query_embeds: Tensor, mask_logits: Tensor, content_size: Sequence[int] | None
    ) -> "SegmentedImage":
        """Combine a row of the dataset with the query embeddings (Q, D) and mask logits (Q, h, w) of a model.

        `content_size` is the height and width of the image inside its padded input, None without padding.
        """
        region_index = _region_index(row)
        masks = resize_masks(mask_logits, content_size, tuple(region_index.shape)).sigmoid()
        segment_ids = torch.tensor([segment["id"] for segment in row["segments"]])
        return cls(row["image_id"], query_embeds, masks, region_index, segment_ids, row["attributes"])


class ProtocolScore:
    """Metric of one vocabulary: mIoU, and the fraction of regions whose best query has the correct class."""

    def __init__(self, protocol: Protocol, class_embeds: Tensor, class_ids: Tensor):
        self.protocol, self.class_embeds, self.class_ids = protocol, class_embeds, class_ids
        self.metric = SemanticMetric(len(protocol.prompts))
        self.regions = torch.zeros(2, len(protocol.prompts), dtype=torch.int64)  # correct regions, all regions

    def update(self, image: SegmentedImage, class_scores: Tensor, best_queries: Tensor) -> None:
        """Accumulate the prediction and the ground truth of one image.

        Args:
            image: Predictions and ground truth of the image.
            class_scores: Class probabilities (Q, K) of the queries.
            best_queries: Index (N,) of the query whose mask has the highest IoU with each region.
        """
        classes = [self.protocol.class_of(attributes) for attributes in image.attributes]
        labels = torch.tensor([*classes, IGNORED])  # the last entry is for region index -1
        truth = labels[image.region_index]
        if (truth == IGNORED).all():
            return
        prediction = torch.einsum("qk,qhw->hwk", class_scores, image.masks).argmax(dim=2)
        self.metric.update(prediction.numpy(), truth.numpy())
        asked = labels[:-1] != IGNORED
        named = class_scores[best_queries].argmax(dim=1)
        for row, kept in enumerate((asked & (named == labels[:-1]), asked)):
            self.regions[row] += torch.bincount(labels[:-1][kept], minlength=self.regions.shape[1])

    def result(self) -> dict[str, dict[str, float | None]]:
        """Return `miou` and `region_accuracy` of each group of classes, in 0..1, or None without ground truth."""
        scores = {}
        for group, classes in self.protocol.groups.items():
            correct, total = self.regions[:, list(classes)].sum(dim=1).tolist()
            scores[group] = {
                "miou": self.metric.compute(classes=classes)["miou"],
                "region_accuracy": ratio(correct, total),
            }
        return scores


@torch.no_grad()
def evaluate(
    model,
    processor,
    dataset: Sequence[Mapping],
    protocols: Sequence[Protocol] | None = None,
    prompt_reduction: str | None = None,
    batch_size: int = 16,
    teacher: TeacherEmbeddings | None = None,
    distillation_head: DistillationHead | None = None,
    show_progress: bool = True,
) -> dict:
    """Evaluate a segmenter with every vocabulary, with one forward pass per image.

    Args:
        model: `GKCForOpenVocabSegmentation` to evaluate.
        processor: `GKCProcessor` of the model.
        dataset: Test set from `drawn_world.dataset.build_dataset`.
        protocols: Vocabularies to evaluate. None takes all vocabularies of the mini-world.
        prompt_reduction: Reduction over the prompts of a class, as in the model's `forward`. None takes the model's.
        batch_size: Number of images in a forward pass.
        teacher: Teacher embeddings of the regions, to compare with the embeddings of the queries.
        distillation_head: Distillation head of training. If given, queries are classified by the mean of the class
            embedding and the distillation embedding.
        show_progress: Whether to show a progress bar.

    Returns:
        A dictionary of `scores`, the `miou` and `region_accuracy` of each group of classes; `harmonic_mean` of the
        mIoU of seen and novel concepts in the vocabulary of all concepts; `teacher_cosine`, the mean cosine similarity
        of the best query and the teacher over all regions; and `images`, the number of images. Scores are in 0..1,
        and None without ground truth or teacher.
    """
    model.eval()
    scores = [score_protocol(model, processor, protocol) for protocol in protocols or all_protocols()]
    images = _segmented(model, processor, dataset, batch_size, distillation_head)
    cosines: list[Tensor] = []
    for image in tqdm(images, "evaluation", len(dataset), unit="image", disable=not show_progress):
        best_queries = best_queries_of(image)
        if teacher is not None:
            seen_by_teacher = teacher.lookup([image.image_id], [image.segment_ids])[0]
            cosines.append((image.query_embeds[best_queries] * seen_by_teacher).sum(dim=1))
        for score in scores:
            words = score.class_embeds, score.class_ids, prompt_reduction
            logits = model.classify(image.query_embeds[None].to(model.device), *words)[0]  # (Q, K + 1)
            score.update(image, logits.softmax(dim=-1)[:, :-1].cpu(), best_queries)
    results = {group: values for score in scores for group, values in score.result().items()}
    return {
        "scores": results,
        "harmonic_mean": _seen_and_novel(results),
        "teacher_cosine": torch.cat(cosines).mean().item() if cosines else None,
        "images": len(dataset),
    }


def _seen_and_novel(results: Mapping[str, Mapping[str, float | None]]) -> float | None:
    if "all/seen" not in results:
        return None
    return harmonic_mean(results["all/seen"]["miou"], results["all/novel"]["miou"])


def score_protocol(model, processor, protocol: Protocol) -> ProtocolScore:
    """Encode the prompts of a vocabulary and create its metric."""
    encoded = EncodedVocabulary.encode([list(prompts) for prompts in protocol.prompts], model, processor)
    return ProtocolScore(protocol, encoded.class_embeds, encoded.class_ids)


def _segmented(
    model, processor, dataset: Sequence[Mapping], batch_size: int, distillation_head: DistillationHead | None
) -> Iterator[SegmentedImage]:
    """Yield the predictions of a dataset's images, with masks resized to the original image size."""
    some_words = torch.eye(1, model.config.projection_dim, device=model.device)  # queries are classified later
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        inputs = processor(images=[row["image"] for row in rows], return_tensors="pt").to(model.device)
        outputs = model(**inputs, class_embeds=some_words, output_stages=distillation_head is not None)
        embeds = _embeds(outputs, distillation_head).float().cpu()
        sizes = [None] * len(rows) if outputs.content_sizes is None else outputs.content_sizes.tolist()
        for number, row in enumerate(rows):
            masks = outputs.masks_queries_logits[number].cpu()
            yield SegmentedImage.from_row(row, embeds[number], masks, sizes[number])


def _embeds(outputs, distillation_head: DistillationHead | None) -> Tensor:
    """Return the query embeddings to classify, unit vectors (B, Q, D)."""
    if distillation_head is None:
        return outputs.query_embeds
    return F.normalize(outputs.query_embeds + distillation_head(outputs.stages)[-1], dim=-1)


def _region_index(row: Mapping) -> Tensor:
    """Return the index (H, W) of every pixel's segment in `row["segments"]`, or -1 for none."""
    _, ids = read_row(row)
    present, inverse = np.unique(ids, return_inverse=True)
    positions = {segment["id"]: position for position, segment in enumerate(row["segments"])}
    found = np.array([positions.get(number, -1) for number in present.tolist()])
    return torch.from_numpy(found[inverse].reshape(ids.shape))


def best_queries_of(image: SegmentedImage) -> Tensor:
    """Return the index (N,) of the query whose mask (probability above 0.5) has the highest IoU with each region."""
    regions = image.region_index[None] == torch.arange(len(image.attributes))[:, None, None]  # (N, H, W)
    regions, masks = regions.flatten(1).float(), (image.masks > 0.5).flatten(1).float()
    intersection = regions @ masks.T  # (N, Q)
    union = regions.sum(dim=1)[:, None] + masks.sum(dim=1) - intersection
    return (intersection / union.clamp(min=1)).argmax(dim=1)


def format_scores(result: Mapping) -> str:
    """Format the scores as a readable table in percent."""
    lines = [f"{'vocabulary':<20}{'mIoU':>8}{'region accuracy':>24}"]
    for group, values in result["scores"].items():
        lines.append(f"{group:<20}{per_cent(values['miou']):>8}{per_cent(values['region_accuracy']):>24}")
    if result["harmonic_mean"] is not None:
        lines.append(f"{'all, harmonic mean':<20}{per_cent(result['harmonic_mean']):>8}")
    return "\n".join(lines)


def per_cent(score: float | None) -> str:
    """Format a score in 0..1 in percent, or `-` if it is None."""
    return "-" if score is None else f"{100 * score:.1f}"
