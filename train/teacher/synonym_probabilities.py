"""CLIP's probabilities of the names of a region's class, from the region's unmasked bounding box.

They are computed as in the published code for sampled synonyms: the text is "a photo of" the name, and the softmax
over the names of the class has CLIP's own temperature.

Letters: N regions, S side of a crop, K classes, M most names of a class, P prompts of the vocabulary (one for each
name), D width of the image-text space.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from modeling_gkc.vocabulary import Vocabulary

from ..storage.fingerprints import data_fingerprint, model_fingerprint, settings_fingerprint
from .clip_towers import CLIPTowers
from .crops import crop_box
from .region_teacher import RegionTeacher, SynonymProbabilities

PROMPT = "a photo of {}"
_PROMPTS_PER_PASS = 256


def synonym_table(class_ids: Tensor) -> Tensor:
    """Return the prompts of each class.

    Args:
        class_ids: (P,) class of each prompt, in any order.

    Returns:
        (K, M) positions of the prompts, padded with -1.
    """
    num_classes = int(class_ids.max()) + 1
    prompts = [torch.nonzero(class_ids == index).flatten() for index in range(num_classes)]
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1)


def synonym_probabilities(
    region_embeds: Tensor, class_labels: Tensor, table: Tensor, prompt_embeds: Tensor, logit_scale: float = 100.0
) -> Tensor:
    """Compute CLIP's softmax over the names of each region's class.

    Args:
        region_embeds: (N, D) unit image embeddings of the regions.
        class_labels: (N,) classes of the regions.
        table: (K, M) prompts of each class, from `synonym_table`.
        prompt_embeds: (P, D) unit text embeddings.
        logit_scale: Factor of the cosine similarities.

    Returns:
        (N, M) probabilities, zero where a class has fewer than M names.
    """
    prompts = table.to(class_labels.device)[class_labels]  # (N, M)
    logits = logit_scale * torch.einsum("nd,nmd->nm", region_embeds, prompt_embeds[prompts.clamp(min=0)])
    return logits.masked_fill(prompts < 0, float("-inf")).softmax(dim=-1)


class BoxSynonyms:
    """Source of CLIP's probabilities of the names of a region's class.

    Args:
        towers: Towers of a CLIP, from `train.teacher.clip_towers.load_clip_towers`.
        vocabulary: K classes with their names.
        logit_scale: Factor of the cosine similarities; None uses CLIP's own.
        prompt: Prompt template with `{}` for the name. As published, no article is inserted.

    Raises:
        ValueError: A name is too long for the text encoder.
    """

    kind = SynonymProbabilities.kind
    with_crowds = True

    def __init__(
        self, towers: CLIPTowers, vocabulary: Vocabulary, logit_scale: float | None = None, prompt: str = PROMPT
    ):
        self._towers = towers
        self._teacher = RegionTeacher(towers.vision_model)
        self.logit_scale = float(towers.logit_scale if logit_scale is None else logit_scale)
        self.table = synonym_table(torch.tensor(vocabulary.class_ids))
        self.columns: int = self.table.shape[1]
        self.crop = partial(crop_box, size=self._teacher.image_size)
        self._tokens = _tokenize([prompt.replace("{}", name) for name in vocabulary.flat_names], towers)
        self._prompt_embeds: Tensor | None = None

    def rows(self, crops: Tensor, classes: Tensor) -> Tensor:
        """Compute the probabilities of the names of each region's class.

        Args:
            crops: (N, S, S, 3) uint8 crops of the regions.
            classes: (N,) classes of the regions.

        Returns:
            (N, M) probabilities, zero where a class has fewer than M names.

        Raises:
            ValueError: A class is not in the vocabulary.
        """
        if not len(crops):
            return torch.empty(0, self.columns)
        if not 0 <= int(classes.min()) <= int(classes.max()) < len(self.table):
            outside = sorted(set(classes.tolist()) - set(range(len(self.table))))
            raise ValueError(
                f"Segments have the category ids {outside}, but the vocabulary has {len(self.table)} classes: give "
                "the vocabulary of the dataset."
            )
        embeds = self._teacher.embed_crops(crops)
        prompt_embeds = self._encode_prompts().to(embeds.device)
        return synonym_probabilities(embeds, classes.to(embeds.device), self.table, prompt_embeds, self.logit_scale)

    def fingerprint(
        self, dataset: Dataset, remember: str | Path | None = None, progress: bool = True
    ) -> dict[str, str]:
        """Return hashes of the dataset (`data`), towers (`teacher`), crop settings (`crops`) and names (`words`).

        Args:
            dataset: Dataset of the regions.
            remember: File that stores the hash of the dataset, see `train.storage.fingerprints.data_fingerprint`.
            progress: Whether to show a progress bar.
        """
        names = [self._tokens["input_ids"].tolist(), self.table.tolist(), round(self.logit_scale, 4)]
        return {
            "data": data_fingerprint(dataset, remember, progress),
            "teacher": model_fingerprint(self._towers.vision_model, self._towers.text_model),
            "crops": settings_fingerprint({"box": True, "image_size": self._teacher.image_size}),
            "words": settings_fingerprint(names),
        }

    @torch.no_grad()
    def _encode_prompts(self) -> Tensor:
        """Return the unit embeddings (P, D) of all prompts, computed in the first call only."""
        if self._prompt_embeds is None:
            model = self._towers.text_model.eval()
            rows = range(0, len(self._tokens["input_ids"]), _PROMPTS_PER_PASS)
            passes = [
                {name: values[row : row + _PROMPTS_PER_PASS].to(model.device) for name, values in self._tokens.items()}
                for row in rows
            ]
            embeds = [F.normalize(model(**tokens).text_embeds.float(), dim=-1) for tokens in passes]
            self._prompt_embeds = torch.cat(embeds)
        return self._prompt_embeds


def _tokenize(prompts: list[str], towers: CLIPTowers) -> dict[str, Tensor]:
    """Tokenize prompts.

    Returns:
        `input_ids` and `attention_mask`, each (P, length).

    Raises:
        ValueError: A prompt has more tokens than the text encoder has positions.
    """
    tokens = towers.tokenizer(prompts, padding=True, return_tensors="pt")
    longest = towers.text_model.config.max_position_embeddings
    lengths = tokens["attention_mask"].sum(dim=1)
    if int(lengths.max()) > longest:
        prompt = prompts[int(lengths.argmax())]
        raise ValueError(
            f"{prompt!r} has {int(lengths.max())} tokens, the text encoder reads {longest}: shorten the name."
        )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}
