"""Load what a recipe names: dataset, vocabulary, student, and the caches of its teacher and losses."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
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
from ..losses.registry import make_losses
from ..teacher.caches import DATASET_VOCABULARY, RegionCaches
from ..teacher.clip_towers import CLIPTowers, load_clip_towers
from ..teacher.region_teacher import OnlineTeacher, RegionTeacher, TeacherCache

_ROOT = Path(__file__).resolve().parent.parent.parent

_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def load_data(recipe: Recipe) -> dict[str, Dataset]:
    """The recipe's splits by their names, as they are stored.

    Raises:
        ValueError: dataset or split is not there.
    """
    if recipe.data.dataset is None:
        raise ValueError("The recipe names no dataset: give dataset=FOLDER, see README for making one.")
    several = not Path(recipe.data.dataset).is_dir() or (Path(recipe.data.dataset) / "dataset_dict.json").exists()
    several = several or is_prepared(recipe.data.dataset)
    if recipe.data.eval_split is not None and not several:
        raise ValueError(f"{recipe.data.dataset} has one split only, nothing to evaluate on: set eval_split=none.")
    splits = {}
    for field in ("train_split", "eval_split"):
        if (split := recipe.get(field)) is not None:
            try:
                splits[split] = load_split(recipe.data.dataset, split)
            except ValueError as error:
                reason = str(error).replace("DATASET:", "`dataset`:").replace("--split:", f"`{field}`:")
                reason += " Name another, or set eval_split=none." if field == "eval_split" else ""
                raise ValueError(reason) from error
    return splits


def load_vocabulary(recipe: Recipe) -> Vocabulary:
    """The training vocabulary: a packaged one, a file, or the `vocabulary.json` of the dataset's folder.

    Raises:
        ValueError: there is none.
    """
    if recipe.data.vocabulary not in (None, DATASET_VOCABULARY):
        try:
            return Vocabulary.parse(recipe.data.vocabulary)
        except ValueError as error:
            raise ValueError(f"`vocabulary`: {error}") from error
    path = Path(recipe.data.dataset or "") / VOCABULARY_NAME
    if not path.is_file():
        raise ValueError(f"There is no {path}: name the classes with vocabulary=NAME or vocabulary=FILE.")
    return Vocabulary.from_file(path)


def load_towers(recipe: Recipe) -> CLIPTowers | None:
    """The recipe's CLIP, None where it names none."""
    return None if recipe.model.clip is None else load_clip_towers(recipe.model.clip)


def load_student(recipe: Recipe, towers: CLIPTowers | None) -> tuple[GKCForOpenVocabSegmentation, GKCProcessor]:
    """The model before training and its processor.

    It is a checkpoint to start from; or has the text tower of CLIP, random decoders, and as backbone CLIP's image
    tower or the one that `recipe.backbone` names.

    Raises:
        ValueError: the recipe names neither, or what does not fit together.
    """
    if recipe.model.init_from is not None:
        return _load_checkpoint(recipe)
    if towers is None:
        raise ValueError("The recipe names nothing to start from: give clip=FOLDER, or init_from=CHECKPOINT.")
    backbone_config, weights = _backbone(recipe, towers)
    settings = {**recipe.model_settings(), "backbone_config": backbone_config}
    model = GKCForOpenVocabSegmentation(GKCConfig(**settings, text_config=towers.text_model.config))
    model.text_model.load_state_dict(towers.text_model.state_dict())
    if weights is not None:
        model.model.backbone.load_state_dict(weights)
    return model, GKCProcessor(GKCImageProcessor(), towers.tokenizer)


def _load_checkpoint(recipe: Recipe) -> tuple[GKCForOpenVocabSegmentation, GKCProcessor]:
    if recipe.model.config or recipe.model.backbone:
        raise ValueError(
            "`model.config` and `model.backbone` are settled by the checkpoint of `model.init_from`: give one or the "
            "other."
        )
    path = recipe.model.init_from
    if not Path(path).exists() and (_ROOT / path / "config.json").is_file():
        path = str(_ROOT / path)  # the shipped checkpoint, which recipes name from the root of the clone
    if path.startswith((".", "/")) or path.count("/") != 1:
        is_checkpoint = (Path(path) / "config.json").is_file()
    else:
        is_checkpoint = not Path(path).exists() or (Path(path) / "config.json").is_file()
    if not is_checkpoint:
        raise ValueError(f"`init_from`: {path} is no folder of a GKC checkpoint.")
    try:
        model, processor = load_checkpoint_parts(path, **recipe.loss_settings())
    except ValueError as error:
        raise ValueError(f"`init_from`: {path} cannot be loaded: {error}") from error
    _warn_of_other_sizes(recipe, processor)
    return model, processor


def _warn_of_other_sizes(recipe: Recipe, processor: GKCProcessor) -> None:
    """Say it if training shows objects at another scale than the checkpoint looks at them later."""
    size = processor.image_processor.size
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    if recipe.data.crop_size and short and long and not short / 2 <= recipe.data.crop_size <= 2 * long:
        warnings.warn(
            f"data.crop_size={recipe.data.crop_size} is far from the size at which {recipe.model.init_from} processes "
            f"images, {short} to {long} pixels; choose a value in this range.",
            UserWarning,
            stacklevel=2,
        )


def _backbone(recipe: Recipe, towers: CLIPTowers) -> tuple[Any, Mapping[str, Tensor] | None]:
    """Configuration and weights of the backbone; no weights for one that starts at random."""
    wanted = recipe.model.config.get("backbone_config")
    if recipe.model.backbone is not None:
        backbone = _pretrained_backbone(recipe.model.backbone)
        differing = sorted(key for key, value in (wanted or {}).items() if getattr(backbone.config, key) != value)
        if differing:
            raise ValueError(
                f"`backbone`: {recipe.model.backbone} differs from `model.config.backbone_config` in {differing}."
            )
        return backbone.config, backbone.state_dict()
    if wanted is not None:
        warnings.warn("No `backbone` is named: it starts from random weights.", UserWarning, stacklevel=2)
        return wanted, None
    if not isinstance(towers.vision_model, CLIPResNetVisionModel):
        raise ValueError(
            f"The image tower of {recipe.model.clip} gives no maps of four scales: name another `backbone`, such as "
            "facebook/convnext-base-224-22k."
        )
    weights = {f"encoder.{name}": value for name, value in towers.vision_model.encoder.state_dict().items()}
    return towers.vision_model.config.to_dict(), weights


def _pretrained_backbone(path: str) -> PreTrainedModel:
    try:
        check_shard_paths(path)
        config = AutoConfig.from_pretrained(path, out_features=_STAGES, trust_remote_code=False)
        # Not by AutoBackbone, which knows no folders.
        backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        backbone, info = backbone_class.from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        raise ValueError(f"`backbone`: {path} cannot be loaded: {error_line(error)}") from error
    # Norms of the feature maps belong to the backbone alone: no classifier was trained with them.
    missing = sorted(key for key in info["missing_keys"] if "hidden_states_norms" not in key)
    if missing:
        raise ValueError(f"`backbone`: {path} lacks weights: {', '.join(missing[:5])}.")
    return backbone


def split_classes(
    recipe: Recipe, splits: Mapping[str, Dataset], vocabulary: Vocabulary
) -> tuple[dict[str, Dataset], Vocabulary]:
    """The splits and the vocabulary of the classes that are trained, by the recipe's `category_split`.

    Raises:
        ValueError: the vocabulary marks no class as novel, or no image is left.
    """
    if recipe.data.category_split == "all":
        return dict(splits), vocabulary
    parts = {
        name: split_categories(dataset, vocabulary, recipe.data.vocabulary, recipe.data.category_split)
        for name, dataset in splits.items()
    }
    return {name: dataset for name, (dataset, _) in parts.items()}, parts[recipe.data.train_split][1]


def load_sources(recipe: Recipe, caches: RegionCaches) -> dict[str, Any]:
    """The arguments of `GKCTrainer` that say something about regions: a teacher, and those of `TrainingLoss.sources`.

    Args:
        recipe: The recipe, which decides what is needed.
        caches: The caches of the recipe's dataset.

    Raises:
        ValueError: A cache is not there or was made from something else; the message has the command that makes it.
    """
    losses = make_losses(recipe)
    sources = {}
    if needing := [loss.setting_without_clip for loss in losses if loss.needs_teacher]:
        teacher = RegionTeacher(caches.require_towers(" and ".join(needing)).vision_model)
        if recipe.teacher.source == "online":
            sources["online_teacher"] = OnlineTeacher(teacher)
        else:
            sources["teacher_embeddings"] = caches.open(TeacherCache, teacher)
    for loss in losses:
        sources |= loss.load_sources(caches)
    return sources
