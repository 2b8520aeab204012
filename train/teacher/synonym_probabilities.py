"""Which words of its class CLIP finds probable for a region, from the region's box with all that is in it.

As the published code prepares its mode of sampled synonyms: the un-masked box, "a photo of" the word, a softmax over
the words of the class at CLIP's own temperature.

Letters: N regions, S side of a crop, K classes, M most words of a class, P words of the vocabulary, D width of the
image-text space.
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
    """Prompts of each class, (K, M), filled up with -1; `class_ids` (P,) is the class of each prompt, in any order."""
    num_classes = int(class_ids.max()) + 1
    words = [torch.nonzero(class_ids == index).flatten() for index in range(num_classes)]
    return torch.nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=-1)


def synonym_probabilities(
    region_embeds: Tensor, class_labels: Tensor, table: Tensor, prompt_embeds: Tensor, logit_scale: float = 100.0
) -> Tensor:
    """CLIP's softmax over the words of each region's class, (N, M), zero where the class has fewer words.

    Args:
        region_embeds: (N, D) unit image embeddings of the regions.
        class_labels: (N,) their classes.
        table: (K, M) prompts of each class from `synonym_table`.
        prompt_embeds: (P, D) unit text embeddings.
        logit_scale: CLIP's temperature.
    """
    words = table.to(class_labels.device)[class_labels]  # (N, M)
    logits = logit_scale * torch.einsum("nd,nmd->nm", region_embeds, prompt_embeds[words.clamp(min=0)])
    return logits.masked_fill(words < 0, float("-inf")).softmax(dim=-1)


class BoxSynonyms:
    """CLIP's probabilities of the words of a region's class.

    Args:
        towers: from `train.teacher.clip_towers.load_clip_towers`.
        vocabulary: K classes with their words.
        logit_scale: factor of the cosines; None takes CLIP's own.
        prompt: what the text tower reads, with `{}` for the word; no article is fitted, as published.

    Raises:
        ValueError: a word is too long for the text tower.
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
        self._tokens = _tokenize([prompt.replace("{}", word) for word in vocabulary.flat_names], towers)
        self._words: Tensor | None = None

    def rows(self, crops: Tensor, classes: Tensor) -> Tensor:
        """Crops (N, S, S, 3) uint8 of regions of some classes (N,) -> probabilities (N, M) of the words of the class.

        Raises:
            ValueError: a class is not in the vocabulary.
        """
        if not len(crops):
            return torch.empty(0, self.columns)
        if not 0 <= int(classes.min()) <= int(classes.max()) < len(self.table):
            outside = sorted(set(classes.tolist()) - set(range(len(self.table))))
            raise ValueError(f"Segments have the category ids {outside}, the vocabulary {len(self.table)} classes.")
        embeds = self._teacher.embed_crops(crops)
        words = self._word_embeds().to(embeds.device)
        return synonym_probabilities(embeds, classes.to(embeds.device), self.table, words, self.logit_scale)

    def fingerprint(
        self, dataset: Dataset, remember: str | Path | None = None, progress: bool = True
    ) -> dict[str, str]:
        """Hashes of the dataset (`data`), of both towers (`teacher`), of the crops' settings and of the `words`.

        Args:
            dataset, remember, progress: see `train.storage.fingerprints.data_fingerprint`.
        """
        words = [self._tokens["input_ids"].tolist(), self.table.tolist(), round(self.logit_scale, 4)]
        return {
            "data": data_fingerprint(dataset, remember, progress),
            "teacher": model_fingerprint(self._towers.vision_model, self._towers.text_model),
            "crops": settings_fingerprint({"box": True, "image_size": self._teacher.image_size}),
            "words": settings_fingerprint(words),
        }

    @torch.no_grad()
    def _word_embeds(self) -> Tensor:
        """(P, D), computed once, where the text tower is."""
        if self._words is None:
            model = self._towers.text_model.eval()
            rows = range(0, len(self._tokens["input_ids"]), _PROMPTS_PER_PASS)
            passes = [
                {name: values[row : row + _PROMPTS_PER_PASS].to(model.device) for name, values in self._tokens.items()}
                for row in rows
            ]
            self._words = torch.cat([F.normalize(model(**tokens).text_embeds.float(), dim=-1) for tokens in passes])
        return self._words


def _tokenize(prompts: list[str], towers: CLIPTowers) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each (P, length)."""
    tokens = towers.tokenizer(prompts, padding=True, return_tensors="pt")
    longest = towers.text_model.config.max_position_embeddings
    lengths = tokens["attention_mask"].sum(dim=1)
    if int(lengths.max()) > longest:
        prompt = prompts[int(lengths.argmax())]
        raise ValueError(f"{prompt!r} has {int(lengths.max())} tokens, the text tower reads {longest}: shorten it.")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}
