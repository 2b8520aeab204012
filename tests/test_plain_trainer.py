"""transformers' own Trainer evaluates a model: what it hands to `compute_metrics`."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import (
    EvalPrediction,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    Trainer,
    TrainingArguments,
)

from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentationOutput

from .training_toys import VOCABULARY, toy_dataset, toy_model, toy_processor

IMAGES = 3


class Samples(torch.utils.data.Dataset):
    """Images with the labels of Mask2Former: masks (N, H, W) and classes (N,)."""

    def __init__(self):
        self.rows = list(toy_dataset(IMAGES))
        self.processor = toy_processor().image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        colors = torch.from_numpy(np.asarray(row["segmentation"]).astype(np.int64))
        ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        masks = torch.stack([ids == segment["id"] for segment in row["segments"]]).float()
        pixels = self.processor(images=[row["image"]], do_resize=False, return_tensors="pt")
        classes = torch.tensor([segment["category_id"] for segment in row["segments"]])
        return {"pixel_values": pixels["pixel_values"][0], "mask_labels": masks, "class_labels": classes}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict:
    labels = {name: [sample[name] for sample in samples] for name in ("mask_labels", "class_labels")}
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), **labels}


def evaluate(model, folder, concatenate: bool) -> EvalPrediction:
    """Return what `Trainer.evaluate` gives to `compute_metrics`."""
    seen = []
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            per_device_eval_batch_size=2,
            eval_do_concat_batches=concatenate,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=collate,
        eval_dataset=Samples(),
        compute_metrics=lambda prediction: seen.append(prediction) or {"seen": 1.0},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_seen"] == 1.0 and np.isfinite(metrics["eval_loss"])
    return seen[0]


@pytest.fixture(scope="module")
def model():
    """Return a toy model with a stored vocabulary, evaluated without text."""
    model = toy_model().eval()
    model.set_vocabulary(VOCABULARY, toy_processor())
    return model


def test_predictions_are_class_logits_and_mask_logits(model, tmp_path):
    predictions = evaluate(model, tmp_path, concatenate=True).predictions
    samples = Samples()
    with torch.no_grad():
        outputs = [model(samples[index]["pixel_values"][None]) for index in range(IMAGES)]
    assert len(predictions) == 2
    expected = (
        [output.class_queries_logits for output in outputs],
        [output.masks_queries_logits for output in outputs],
    )
    for ours, theirs in zip(predictions, expected, strict=True):
        np.testing.assert_allclose(ours, torch.cat(theirs).numpy(), rtol=0, atol=1e-4)


def test_predictions_have_the_form_of_mask2former(model, tmp_path):
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        out_features=[f"stage{n}" for n in range(1, 5)],
    )
    settings = {
        "hidden_dim": 32,
        "feature_size": 32,
        "mask_feature_size": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
    }
    settings |= {"num_queries": 10, "num_attention_heads": 4, "train_num_points": 64}
    other = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=3, **settings))
    ours, theirs = (evaluate(m, tmp_path, concatenate=False) for m in (model, other.eval()))
    assert len(ours.predictions) == len(theirs.predictions) == 2  # batches
    for batch, expected in zip(ours.predictions, theirs.predictions, strict=True):
        assert [part.shape for part in batch] == [part.shape for part in expected[:2]]
    assert [len(part) for part in ours.label_ids] == [len(part) for part in theirs.label_ids]


def test_what_the_trainer_gathers_is_decided_for_every_output(model):
    kept = ["loss", "class_queries_logits", "masks_queries_logits"]
    names = [field.name for field in fields(GKCForOpenVocabSegmentationOutput)]
    assert names[:3] == kept and names[3:] == model.config.keys_to_ignore_at_inference
    assert "keys_to_ignore_at_inference" not in model.config.to_dict()
