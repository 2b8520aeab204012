"""Tiny CLIP model of the mini-world and its training.

python -m train.miniworld.clip --out run/clip --steps 3000 --scenes 8000 --seed 0
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_gkc.atomic_files import atomic_folder, atomic_path, atomic_write_json
from modeling_gkc.cli.common import output_folder, positive
from modeling_gkc.configuration_gkc import CLIPResNetConfig
from modeling_gkc.modeling_clip_resnet import CLIPResNetVisionModel

from ..teacher.crops import normalize_crops
from .clip_data import CaptionedBatches, CropSet, collect_crops, collect_other_world
from .gate import format_gate, measure_gate, save_gate
from .lexicon import Lexicon
from .settings import SETTING_HELP, CLIPTraining
from .tokenizer import CONTEXT_LENGTH, build_tokenizer

TRAINING_SPLIT, GATE_SPLIT, OTHER_WORLD_SPLIT = (
    10,
    11,
    12,
)  # combined with the seed, they select independent random streams
CROP_SIZE = 64  # pixels
OTHER_WORLD_PICTURES = 600  # number of images of each kind


class MiniCLIP(nn.Module):
    """CLIP model with image and text encoders and a joint embedding space of dimension D = 96."""

    def __init__(
        self,
        vision: CLIPResNetVisionModel,
        text: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        logit_scale: float = 10.0,
    ):
        super().__init__()
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))

    @classmethod
    def from_scratch(cls, seed: int) -> "MiniCLIP":
        """Create a model with random weights from a seed."""
        tokenizer = build_tokenizer()
        vision_config = CLIPResNetConfig(
            width=24, depths=[1, 1, 1, 1], num_attention_heads=8, image_size=CROP_SIZE, projection_dim=96
        )
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=96,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(CLIPResNetVisionModel(vision_config), CLIPTextModelWithProjection(text_config), tokenizer)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.logit_scale.device

    def embed_images(self, crops: Tensor) -> Tensor:
        """Embed crops (N, size, size, 3) uint8 as unit vectors (N, D)."""
        return F.normalize(self.vision(normalize_crops(crops, self.logit_scale)).image_embeds.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed N texts as unit vectors (N, D)."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.device)
        return F.normalize(self.text(**tokens).text_embeds.float(), dim=-1)


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
    """Return the symmetric contrastive loss of N images and captions; images with equal captions are all positives.

    Args:
        image_embeds: Unit vectors (N, D) of the images.
        text_embeds: Unit vectors (N, D) of the captions.
        captions: The N captions.
        scale: Scalar factor of the cosine similarities.
    """
    numbers = {caption: number for number, caption in enumerate(captions)}
    caption_ids = torch.tensor([numbers[caption] for caption in captions], device=image_embeds.device)
    positives = (caption_ids[:, None] == caption_ids).float()  # (N, N), symmetric
    targets = positives / positives.sum(dim=1, keepdim=True)
    logits = scale * image_embeds @ text_embeds.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def train_clip(
    out: str | Path,
    settings: CLIPTraining | None = None,
    num_proc: int = 1,
    save_every: int = 250,
    gate_scenes: int = 400,
    show_progress: bool = True,
    device: str = "cpu",
) -> MiniCLIP:
    """Train and evaluate a tiny CLIP, resuming from the last checkpoint of an interrupted run.

    Args:
        out: Output folder of the model and its `gate.json`.
        settings: Training settings. None takes the defaults.
        num_proc: Number of processes that draw scenes.
        save_every: Number of steps between checkpoints.
        gate_scenes: Number of scenes for the evaluation.
        show_progress: Whether to show progress bars.
        device: Device to train on.

    Returns:
        The trained model in evaluation mode.

    Raises:
        FloatingPointError: If the loss is not finite.
        ValueError: If the checkpoint in `out` has other settings.
    """
    settings, out = settings or CLIPTraining(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = MiniCLIP.from_scratch(settings.seed).to(device)
    batches = _batches(settings, num_proc, show_progress)
    _fit(model, batches, settings, out / "checkpoint.pt", save_every, show_progress)
    gate_crops = collect_crops((settings.seed, GATE_SPLIT), gate_scenes, CROP_SIZE, num_proc, show_progress)
    gate = evaluate_clip(model, gate_crops)
    save_clip(model, out)
    save_gate(gate | {"settings": asdict(settings)}, out / "gate.json")
    tqdm.write(format_gate(gate))
    return model.eval()


def _batches(settings: CLIPTraining, num_proc: int, show_progress: bool) -> CaptionedBatches:
    return CaptionedBatches(
        collect_crops((settings.seed, TRAINING_SPLIT), settings.scenes, CROP_SIZE, num_proc, show_progress),
        collect_other_world((settings.seed, OTHER_WORLD_SPLIT), OTHER_WORLD_PICTURES, CROP_SIZE),
        Lexicon(settings.seed, settings.lean),
        settings.batch_size,
        settings.seed,
        other_world_share=settings.other_world_share,
    )


def _fit(
    model: MiniCLIP,
    batches: CaptionedBatches,
    settings: CLIPTraining,
    checkpoint: Path,
    save_every: int,
    show_progress: bool,
) -> None:
    """Train with AdamW and a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    model.vision.to(memory_format=torch.channels_last)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "batches": batches}
    first_step = _resume(checkpoint, parts, settings)
    model.train()
    progress = tqdm(
        range(first_step, settings.steps), "CLIP", settings.steps, initial=first_step, disable=not show_progress
    )
    average = None
    for step in progress:
        half_size = step < settings.half_size_share * settings.steps
        loss = _step(model, batches, optimizer, schedule, settings, half_size)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The contrastive loss is {loss} at step {step}: lower --learning-rate. The last checkpoint is "
                f"{checkpoint}."
            )
        average = loss if average is None else 0.98 * average + 0.02 * loss
        progress.set_postfix(loss=f"{average:.3f}", refresh=False)
        if (step + 1) % save_every == 0 and step + 1 < settings.steps:
            _save_checkpoint(checkpoint, parts, settings, step + 1)
    checkpoint.unlink(missing_ok=True)


def _step(
    model: MiniCLIP, batches: CaptionedBatches, optimizer, schedule, settings: CLIPTraining, half_size: bool
) -> float:
    crops, captions = batches.draw()
    if half_size:
        crops = crops.float().unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean(dim=(2, 4))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bfloat16):
        image_embeds, text_embeds = model.embed_images(crops), model.embed_texts(captions)
    loss = contrastive_loss(image_embeds, text_embeds, captions, model.logit_scale.exp())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(settings.logit_scale_cap))
    return loss.item()


def _save_checkpoint(path: Path, parts: dict, settings: CLIPTraining, step: int) -> None:
    """Write all training states atomically to one checkpoint file."""
    state = {name: part.state_dict() for name, part in parts.items()}
    with atomic_path(path) as temporary:
        torch.save({"step": step, "settings": asdict(settings), **state}, temporary)


def _resume(path: Path, parts: dict, settings: CLIPTraining) -> int:
    """Load the checkpoint, if it exists, and return the number of finished steps."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        raise ValueError(f"{path} was written with other settings ({state['settings']}). Delete it to start again.")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


@torch.no_grad()
def embed_crops(model: MiniCLIP, crops: Tensor, batch_size: int = 256) -> Tensor:
    """Embed crops (N, size, size, 3) uint8 in evaluation mode as unit vectors (N, D) on the CPU."""
    model.eval()
    return torch.cat([model.embed_images(part).cpu() for part in crops.split(batch_size)])


@torch.no_grad()
def evaluate_clip(model: MiniCLIP, crops: CropSet) -> dict:
    """Measure a model on region crops with `gate.measure_gate`."""
    embeds = embed_crops(model, crops.crops)
    return measure_gate(embeds, crops.attributes, lambda texts: model.embed_texts(texts).cpu())


def save_clip(model: MiniCLIP, out: str | Path) -> None:
    """Save the towers to `vision/` and `text/`, the tokenizer to `text/`, and the temperature to `clip.json`.

    A recipe's `clip=FOLDER` and the `--clip FOLDER` of `train.cache` read the folder.
    """
    out = Path(out)
    with atomic_folder(out / "vision", overwrite=True) as unfinished:
        model.vision.save_pretrained(unfinished)
    with atomic_folder(out / "text", overwrite=True) as unfinished:
        model.text.save_pretrained(unfinished)
        model.tokenizer.save_pretrained(unfinished)
    temperature = {"logit_scale": model.logit_scale.exp().item()}
    atomic_write_json(out / "clip.json", temperature, indent=None)


def load_clip(path: str | Path) -> MiniCLIP:
    """Load a model that `save_clip` wrote, in evaluation mode."""
    path = Path(path)
    vision = CLIPResNetVisionModel.from_pretrained(path / "vision")
    text = CLIPTextModelWithProjection.from_pretrained(path / "text")
    return MiniCLIP(vision, text, PreTrainedTokenizerFast.from_pretrained(path / "text")).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m train.miniworld.clip", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=output_folder, required=True, help="output folder, which receives vision/, text/ and gate.json"
    )
    for field in fields(CLIPTraining):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        option = f"--{field.name.replace('_', '-')}"
        meaning = f"{SETTING_HELP[field.name]} (default: %(default)s)"
        parser.add_argument(option, default=field.default, help=meaning, **kind)
    parser.add_argument(
        "--num-proc", type=positive, default=1, help="number of processes that draw scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=positive, help="PyTorch CPU threads (default: PyTorch's); 1 suits a busy machine"
    )
    options = vars(parser.parse_args(arguments))
    out, num_proc, threads = (options.pop(name) for name in ("out", "num_proc", "threads"))
    if threads:
        torch.set_num_threads(threads)
    train_clip(out, CLIPTraining(**options), num_proc)


if __name__ == "__main__":
    main()
