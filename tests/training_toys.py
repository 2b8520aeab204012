"""Toy data for tests of training: colored shapes on grass, with a tiny CLIP, tokenizer and model."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from configuration import Recipe
from modeling_gkc.configuration_gkc import CLIPResNetConfig
from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.modeling_clip_resnet import CLIPResNetVisionModel
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary
from train.data import dataset_features, encode_ids
from train.losses.base import LossContext
from train.losses.region_sampling import StepRegions
from train.losses.registry import make_losses
from train.teacher.noun_bank import NounBank

from .conftest import small_config

VOCABULARY = Vocabulary([["disc", "round"], ["square", "block", "box"], ["grass", "lawn"]])
COLORS = [(200, 40, 40), (40, 60, 210), (60, 160, 60)]
SIZE = 64


def toy_row(index: int, size: int = SIZE) -> dict:
    """Return a row with a disc and one or two squares on grass; segment ids use all three bytes."""
    generator = np.random.default_rng(index)
    y, x = np.mgrid[:size, :size]
    ids = np.full((size, size), 7, dtype=np.int32)
    center = generator.uniform(0.3, 0.7, 2) * size
    ids[(y - center[0]) ** 2 + (x - center[1]) ** 2 < (size / 5) ** 2] = 300
    classes = {7: 2, 300: 0}
    for number in range(1 + index % 2):
        top, left = generator.integers(0, size - size // 4, 2)
        ids[top : top + size // 4, left : left + size // 4] = 70_000 + number
        classes[70_000 + number] = 1
    colors = np.zeros((size, size, 3))
    for segment_id, category in classes.items():
        colors[ids == segment_id] = COLORS[category]
    image = np.clip(colors + generator.normal(0, 20, colors.shape), 0, 255).astype(np.uint8)
    visible = set(np.unique(ids).tolist())
    return {
        "image": Image.fromarray(image),
        "segmentation": Image.fromarray(encode_ids(ids)),
        "segments": [
            {"id": segment_id, "category_id": category, "iscrowd": False}
            for segment_id, category in classes.items()
            if segment_id in visible
        ],
        "captions": ["a disc on grass"],
        "image_id": f"toy-{index}",
        "video_id": "",
        "frame": 0,
    }


def toy_dataset(count: int = 6, size: int = SIZE, change=lambda index, row: row) -> Dataset:
    """Return a dataset of toy rows; `change` may alter a row before it is stored."""
    return Dataset.from_list(
        [change(index, toy_row(index, size)) for index in range(count)], features=dataset_features()
    )


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that knows the names of the vocabulary."""
    tokens = ["<pad>", "<bos>", "<unk>", "<eos>", "photo", *VOCABULARY.flat_names]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def toy_processor(**kwargs) -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(), toy_tokenizer(), **kwargs)


def toy_vision_model(seed: int = 0) -> CLIPResNetVisionModel:
    torch.manual_seed(seed)
    config = CLIPResNetConfig(width=8, depths=[1, 1, 1, 1], num_attention_heads=4, image_size=64, projection_dim=16)
    return CLIPResNetVisionModel(config)


def toy_model(seed: int = 0, **overrides) -> GKCForOpenVocabSegmentation:
    torch.manual_seed(seed)
    return GKCForOpenVocabSegmentation(small_config(**{"decoder_layers": 3, **overrides}))


def step_regions(recipe: Recipe, text_bank, teacher=None, **sources) -> StepRegions:
    """Return the region sampling of a recipe with its losses, without noun embeddings."""
    losses = make_losses(recipe)
    sources = {"noun_bank": NounBank((), torch.empty(0, 16)), **sources}
    for loss in losses:
        loss.setup(LossContext(recipe, text_bank=text_bank, teacher=teacher, sources=sources))
    return StepRegions(losses, text_bank, recipe.data.region_dropout)
