"""Builders of the objects that a recipe names: dataset, vocabulary, student, teacher and the caches of losses."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from configuration import Recipe
from modeling_gkc.checkpoint_loading import check_shard_paths, load_checkpoint_parts
from modeling_gkc.configuration_gkc import GKCConfig
from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.label_text import error_line
from modeling_gkc.modeling_clip_resnet import CLIPResNetVisionModel
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

from ..data.load import load_split
from ..data.prepared import VOCABULARY_NAME, is_prepared
from ..data.splits import split_categories
from ..losses.registry import make_losses, settings_without_teacher
from ..teacher.caches import DATASET_VOCABULARY, RegionCaches
from ..teacher.clip_towers import CLIPTowers, load_clip_towers
from ..teacher.region_teacher import OnlineTeacher, RegionTeacher, TeacherCache
from ..teacher.segmenter_labels import StoredLabels

_ROOT = Path(__file__).resolve().parent.parent.parent

_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def load_data(recipe: Recipe) -> dict[str, Dataset]:
    """Load the splits of a recipe's dataset as they are stored, without augmentation.

    Returns:
        Training split and, unless `data.eval_split` is None, evaluation split, by their names.

    Raises:
        ValueError: The dataset or a split does not exist.
    """
    if recipe.data.dataset is None:
        raise ValueError(
            "The recipe names no dataset: give data.dataset=FOLDER. docs/training.md says how to make one."
        )
    several = not Path(recipe.data.dataset).is_dir() or (Path(recipe.data.dataset) / "dataset_dict.json").exists()
    several = several or is_prepared(recipe.data.dataset)
    if recipe.data.eval_split is not None and not several:
        raise ValueError(
            f"{recipe.data.dataset} has only one split, so none to evaluate on: set data.eval_split=none."
        )
    splits = {}
    for field in ("train_split", "eval_split"):
        if (split := recipe.get(field)) is not None:
            try:
                splits[split] = load_split(recipe.data.dataset, split)
            except ValueError as error:
                reason = str(error).replace("DATASET:", "`dataset`:").replace("--split:", f"`{field}`:")
                reason += " Name another, or set data.eval_split=none." if field == "eval_split" else ""
                raise ValueError(reason) from error
    return splits


def load_vocabulary(recipe: Recipe) -> Vocabulary:
    """Load the training vocabulary: a packaged one, a file, or the `vocabulary.json` of the dataset's folder.

    Raises:
        ValueError: The vocabulary does not exist or cannot be read.
    """
    if recipe.data.vocabulary not in (None, DATASET_VOCABULARY):
        try:
            return Vocabulary.parse(recipe.data.vocabulary)
        except ValueError as error:
            raise ValueError(f"`data.vocabulary`: {error}") from error
    path = Path(recipe.data.dataset or "") / VOCABULARY_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the classes with data.vocabulary=NAME or data.vocabulary=FILE.")
    return Vocabulary.from_file(path)


def load_towers(recipe: Recipe) -> CLIPTowers | None:
    """Load the towers of the recipe's CLIP; return None if it names none."""
    return None if recipe.model.clip is None else load_clip_towers(recipe.model.clip)


def load_student(recipe: Recipe, towers: CLIPTowers | None) -> tuple[GKCForOpenVocabSegmentation, GKCProcessor]:
    """Load or initialize the model that is trained, and its processor.

    The model is the checkpoint `model.init_from`. Without it, the model has CLIP's text encoder or that of the
    checkpoint `model.text_from`, randomly initialized decoders, and as backbone the one that `model.backbone` names or
    else CLIP's image encoder. With `model.text_from`, its processor resizes images to the scale of the training crops.

    Args:
        recipe: Recipe that names the weights.
        towers: Towers of the recipe's CLIP; None if the recipe names none.

    Raises:
        ValueError: The recipe names neither a checkpoint nor a CLIP, or its parts do not fit together.
    """
    if recipe.model.init_from is not None:
        return _load_checkpoint(recipe)
    image_settings = {}  # the default size, which is that of published evaluations
    if recipe.model.text_from is not None:
        try:
            text_model, *texts = load_text_encoder(recipe.model.text_from)
        except ValueError as error:
            raise ValueError(f"`model.text_from`: {error}") from error
        if (side := recipe.data.crop_size) is not None:
            image_settings["size"] = {"shortest_edge": side, "longest_edge": side}
    elif towers is not None:
        text_model, texts = towers.text_model, [towers.tokenizer]
    else:
        raise ValueError(
            "The recipe names no weights to start from: give model.clip=FOLDER or model.init_from=CHECKPOINT."
        )
    backbone_config, weights = _backbone(recipe, towers)
    settings = {**recipe.model_settings(), "backbone_config": backbone_config}
    model = GKCForOpenVocabSegmentation(GKCConfig(**settings, text_config=text_model.config))
    model.text_model.load_state_dict(text_model.state_dict())
    if weights is not None:
        model.model.backbone.load_state_dict(weights)
    return model, GKCProcessor(GKCImageProcessor(**image_settings), *texts)


def load_text_encoder(
    path: str | Path,
) -> tuple[CLIPTextModelWithProjection, PreTrainedTokenizerBase, Sequence[str] | None]:
    """Load the text encoder, with its projection, the tokenizer and the prompt templates of a checkpoint.

    Args:
        path: Checkpoint of a GKC, or of a zero-shot model with a CLIP.

    Raises:
        ValueError: The checkpoint cannot be loaded, or its text encoder is not CLIP's.
    """
    try:
        model, processor = load_checkpoint_parts(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    text_model = model.text_model
    if (kind := text_model.config.model_type) != "clip_text_model":
        raise ValueError(
            f"The text encoder of {path} is a {kind}, not CLIP's: name a checkpoint with a text encoder of CLIP."
        )
    if not isinstance(text_model, CLIPTextModelWithProjection):  # of a CLIPModel, which has the projection itself
        config = copy.deepcopy(text_model.config)
        config.projection_dim = model.tower.config.projection_dim
        projected = CLIPTextModelWithProjection(config)
        projected.text_model.load_state_dict(text_model.state_dict())
        projected.text_projection.load_state_dict(model.tower.text_projection.state_dict())
        text_model = projected.eval()
    return text_model, processor.tokenizer, processor.prompt_templates


def _load_checkpoint(recipe: Recipe) -> tuple[GKCForOpenVocabSegmentation, GKCProcessor]:
    """Load the checkpoint `model.init_from` with the loss settings of the recipe."""
    if recipe.model.config or recipe.model.backbone:
        raise ValueError(
            "`model.config` and `model.backbone` are determined by the checkpoint `model.init_from`: give either the "
            "checkpoint or these fields."
        )
    path = recipe.model.init_from
    if not Path(path).exists() and (_ROOT / path / "config.json").is_file():
        path = str(_ROOT / path)  # the shipped checkpoint, which recipes name from the root of the clone
    may_be_repository = path.count("/") == 1 and not path.startswith((".", "/")) and not Path(path).exists()
    if not may_be_repository and not (Path(path) / "config.json").is_file():
        raise ValueError(f"`model.init_from`: {path} is not a GKC checkpoint; name a folder with a config.json.")
    try:
        model, processor = load_checkpoint_parts(path, **recipe.loss_settings())
    except ValueError as error:
        raise ValueError(f"`model.init_from`: {path} cannot be loaded: {error}") from error
    _warn_of_crop_size(recipe, processor)
    return model, processor


def _warn_of_crop_size(recipe: Recipe, processor: GKCProcessor) -> None:
    """Warn if training crops are much larger or smaller than the images at inference."""
    size = processor.image_processor.size
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    if recipe.data.crop_size and short and long and not short / 2 <= recipe.data.crop_size <= 2 * long:
        warnings.warn(
            f"data.crop_size={recipe.data.crop_size} is far from the size at which {recipe.model.init_from} processes "
            f"images, {short} to {long} pixels; choose a value in this range.",
            UserWarning,
            stacklevel=2,
        )


def _backbone(recipe: Recipe, towers: CLIPTowers | None) -> tuple[Any, Mapping[str, Tensor] | None]:
    """Return configuration and weights of the backbone; the weights are None if it is initialized at random."""
    wanted = recipe.model.config.get("backbone_config")
    if recipe.model.backbone is not None:
        backbone = _pretrained_backbone(recipe.model.backbone)
        differing = sorted(key for key, value in (wanted or {}).items() if getattr(backbone.config, key) != value)
        if differing:
            raise ValueError(
                f"`model.backbone` {recipe.model.backbone} differs from `model.config.backbone_config` in "
                f"{differing}: give only one of them."
            )
        return backbone.config, backbone.state_dict()
    if wanted is not None:
        warnings.warn(
            "The recipe names no `model.backbone`, so the backbone is initialized at random.",
            UserWarning,
            stacklevel=2,
        )
        return wanted, None
    if towers is None:
        raise ValueError(
            "`model.text_from` gives a text encoder only: name a backbone too, such as "
            "model.backbone=microsoft/resnet-50."
        )
    if not isinstance(towers.vision_model, CLIPResNetVisionModel):
        raise ValueError(
            f"The image encoder of {recipe.model.clip} has no feature maps at four scales: name a backbone, such as "
            "model.backbone=facebook/convnext-base-224-22k."
        )
    weights = {f"encoder.{name}": value for name, value in towers.vision_model.encoder.state_dict().items()}
    return towers.vision_model.config.to_dict(), weights


def _pretrained_backbone(path: str) -> PreTrainedModel:
    """Load a pretrained backbone with feature maps of four stages."""
    try:
        check_shard_paths(path)
        config = AutoConfig.from_pretrained(path, out_features=_STAGES, trust_remote_code=False)
        # AutoBackbone cannot load from a folder.
        backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        backbone, info = backbone_class.from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        raise ValueError(f"`model.backbone`: {path} cannot be loaded: {error_line(error)}") from error
    # Checkpoints of classifiers have no normalization layers of the feature maps, which only backbones have.
    missing = sorted(key for key in info["missing_keys"] if "hidden_states_norms" not in key)
    if missing:
        raise ValueError(f"`model.backbone`: {path} lacks weights: {', '.join(missing[:5])}.")
    return backbone


def split_classes(
    recipe: Recipe, splits: Mapping[str, Dataset], vocabulary: Vocabulary
) -> tuple[dict[str, Dataset], Vocabulary]:
    """Restrict splits and vocabulary to the classes that `data.category_split` trains on.

    Args:
        recipe: Recipe with the setting.
        splits: Stored splits by name.
        vocabulary: Classes of the dataset.

    Returns:
        The splits and the vocabulary with the trained classes.

    Raises:
        ValueError: The vocabulary marks no class as novel, or no image is left.
    """
    if recipe.data.category_split == "all":
        return dict(splits), vocabulary
    parts = {
        name: split_categories(dataset, vocabulary, recipe.data.vocabulary, recipe.data.category_split)
        for name, dataset in splits.items()
    }
    return {name: dataset for name, (dataset, _) in parts.items()}, parts[recipe.data.train_split][1]


def load_sources(recipe: Recipe, caches: RegionCaches) -> dict[str, Any]:
    """Load the teacher and the further arguments of `GKCTrainer` that the losses of a recipe need.

    Args:
        recipe: Recipe that determines the losses.
        caches: Caches of the recipe's dataset.

    Returns:
        Keyword arguments of `GKCTrainer`, see `TrainingLoss.sources`.

    Raises:
        ValueError: A cache is missing or was made from other inputs; the message contains the command that writes it.
    """
    losses = make_losses(recipe)
    sources = {}
    without_teacher = settings_without_teacher(losses)
    if without_teacher and recipe.teacher.source == "labels":
        sources["teacher_embeddings"] = caches.open(TeacherCache, StoredLabels(recipe.data.dataset))
    elif without_teacher:
        teacher = RegionTeacher(caches.require_towers(without_teacher).vision_model)
        if recipe.teacher.source == "online":
            sources["online_teacher"] = OnlineTeacher(teacher)
        else:
            sources["teacher_embeddings"] = caches.open(TeacherCache, teacher)
    for loss in losses:
        sources |= loss.load_sources(caches)
    return sources
