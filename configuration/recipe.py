"""`Recipe`: everything that decides a training run, in sections that validate themselves."""

import dataclasses
import difflib
import importlib
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from .sections import (
    DataSection,
    DistillationSection,
    GroundingSection,
    MatchingSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    Section,
    SynonymsSection,
    TeacherSection,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Names from before recipes had sections whose fields have other names now. All other old names are names of fields
# that only one section has, which are accepted without the section.
_RENAMED_FIELDS = {
    "model": "model.config",
    "teacher": "teacher.source",
    "synonym_mode": "synonyms.mode",
    "synonym_weight": "synonyms.weight",
    "synonym_probabilities": "synonyms.probabilities",
    "synonym_threshold": "synonyms.threshold",
    "synonym_logit_scale": "synonyms.logit_scale",
    "distillation_weight": "distillation.weight",
    "distillation_embedding": "distillation.embedding",
    "distillation_terms": "distillation.terms",
    "distillation_relation": "distillation.relation",
    "distillation_relation_weight": "distillation.relation_weight",
    "distillation_max_regions": "distillation.max_regions",
    "distillation_heads": "distillation.heads",
    "grounding_weight": "grounding.weight",
    "grounding_noun_dropout": "grounding.noun_dropout",
    "grounding_max_nouns": "grounding.max_nouns",
}
_RENAMED_RECIPES = {"own_folder": "custom"}
_SIMILARITY = 0.6  # smallest similarity of a known name that is suggested for an unknown one


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    The defaults are the settings of the paper's R-50 row except for six, which its recipe `coco_clip_r50` sets:
    `optimizer.precision` (published: mixed), `synonyms.probabilities` (published: those of CLIP for the region's box),
    `distillation.embedding` (published: `query`), `distillation.max_regions` (published: 200 on each of 8 GPUs),
    `data.region_dropout` (published: 0.5) and `grounding.weight` (published: 10).

    Each section is a dataclass in `configuration.sections`, whose docstring explains its fields. The section of a loss
    of `train.losses` has the name of that loss.
    """

    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection)
    matching: MatchingSection = field(default_factory=MatchingSection)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    synonyms: SynonymsSection = field(default_factory=SynonymsSection)
    distillation: DistillationSection = field(default_factory=DistillationSection)
    grounding: GroundingSection = field(default_factory=GroundingSection)

    @classmethod
    def field_names(cls) -> list[str]:
        """Return all names `section.field`, in the order of the sections."""
        return [
            f"{section.name}.{each.name}"
            for section in dataclasses.fields(cls)
            for each in dataclasses.fields(section.default_factory)
        ]

    @classmethod
    def full_name(cls, name: str) -> str:
        """Return the `section.field` that a name refers to.

        Args:
            name: `section.field`; or the name of a field that only one section has, such as `steps`; or a name from
                before recipes had sections, such as `synonym_mode`.

        Raises:
            ValueError: There is no such field, or several sections have it.
        """
        known = cls.field_names()
        if name in known:
            return name
        if name in _RENAMED_FIELDS:
            return _RENAMED_FIELDS[name]
        found = [full for full in known if full.partition(".")[2] == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"Several sections of a recipe have a field {name!r}: give {' or '.join(found)}.")
        fields_alone = [full.partition(".")[2] for full in known]
        near = []
        last_part = name.rpartition(".")[2]
        for match in difflib.get_close_matches(last_part, [*fields_alone, *_RENAMED_FIELDS], cutoff=_SIMILARITY):
            fulls = [full for full in known if full.partition(".")[2] == match]
            near += [full for full in fulls or [_RENAMED_FIELDS[match]] if full not in near]
        near = near or difflib.get_close_matches(name, known, cutoff=_SIMILARITY)
        hint = f"; did you mean {' or '.join(near[:4])}?" if near else "; `python -m train --help` lists all fields."
        raise ValueError(f"A recipe has no field {name!r}{hint}")

    def get(self, name: str) -> Any:
        """Return the value of a field by any name that `full_name` accepts."""
        section, _, each = self.full_name(name).partition(".")
        return getattr(getattr(self, section), each)

    def replace(self, changes: Mapping[str, Any] | None = None, **short_names: Any) -> Self:
        """Return a copy of the recipe with some fields changed.

        Args:
            changes: Values by any name that `full_name` accepts, such as `{"synonyms.mode": "max"}`.
            short_names: Values by names without a dot, such as `steps=100`.

        Raises:
            ValueError: There is no such field, or a value is impossible.
        """
        by_section: dict[str, dict[str, Any]] = {}
        for name, value in {**(changes or {}), **short_names}.items():
            section, _, each = self.full_name(name).partition(".")
            by_section.setdefault(section, {})[each] = value
        sections = {name: dataclasses.replace(getattr(self, name), **values) for name, values in by_section.items()}
        return dataclasses.replace(self, **sections)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the values by section and field, as types that JSON can represent."""
        return {section.name: _plain(getattr(self, section.name)) for section in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create a recipe from a dictionary.

        Args:
            values: Result of `to_dict`, or its flat form from before recipes had sections.

        Raises:
            ValueError: A name or value is impossible.
        """
        sections = {section.name for section in dataclasses.fields(cls)}
        changes = {}
        # The names `model` and `teacher` occur in flat recipes too, for `model.config` and `teacher.source`.
        is_flat = bool(values.keys() - sections)
        for name, value in values.items():
            if is_flat:
                changes[name] = value
            else:
                changes |= {f"{name}.{each}": part for each, part in value.items()}
        default = cls()
        return default.replace(
            {name: tuple(value) if isinstance(default.get(name), tuple) else value for name, value in changes.items()}
        )

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments of `GKCConfig` that the recipe sets: `GKCConfig(**recipe.model_settings(), ...)`."""
        return {**self.model.config, **self.loss_settings()}

    def loss_settings(self) -> dict[str, Any]:
        """Return the arguments of `GKCConfig` for matching and losses."""
        return dict(sorted(vars(self.matching).items()))

    def to_training_arguments(self, output_dir: str | os.PathLike, **overrides: Any) -> "TrainingArguments":
        """Return the `TrainingArguments` of the recipe for `GKCTrainer`.

        The batch is divided among processes and accumulated micro-batches. Gradients do not depend on the division.

        Args:
            output_dir: Folder of the checkpoints.
            overrides: Further `TrainingArguments`, such as `save_steps`.

        Raises:
            ValueError: The batch cannot be divided among processes and accumulated batches.
        """
        accumulation = overrides.get("gradient_accumulation_steps", self.optimizer.accumulation)
        parts = int(os.environ.get("WORLD_SIZE", "1")) * accumulation
        Section.require(
            self.data.batch_size % parts == 0,
            f"`data.batch_size` = {self.data.batch_size} cannot be divided among {parts} processes times accumulated "
            "batches; change one of them.",
        )
        import torch
        from transformers import TrainingArguments

        settings = {
            "max_steps": self.optimizer.steps,
            "per_device_train_batch_size": self.data.batch_size // parts,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": self.optimizer.learning_rate,
            "weight_decay": self.optimizer.weight_decay,
            "max_grad_norm": self.optimizer.max_grad_norm,
            "bf16": self.optimizer.precision == "bf16",
            "fp16": self.optimizer.precision == "fp16",
            "seed": self.run.seed,
            "data_seed": self.run.seed,
            "remove_unused_columns": False,
            "dataloader_drop_last": True,
            "ddp_find_unused_parameters": False,
            "logging_nan_inf_filter": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "report_to": "none",
        }
        return TrainingArguments(output_dir=os.fspath(output_dir), **{**settings, **overrides})


def _plain(value: Any) -> Any:
    """Convert nested sections and transformers configurations to dictionaries, and tuples to lists."""
    if dataclasses.is_dataclass(value) and isinstance(value, Section):
        value = vars(value)
    elif hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def recipe_names() -> list[str]:
    """Return the names of the recipes in `configuration/recipes`."""
    from . import recipes

    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def load_recipe(name: str, changes: Mapping[str, Any] | None = None, **short_names: Any) -> Recipe:
    """Load the recipe of `configuration/recipes/<name>.py`, with some fields changed.

    Args:
        name: Name of the recipe.
        changes: Values by name, see `Recipe.replace`.
        short_names: Values by names without a dot, see `Recipe.replace`.

    Raises:
        ValueError: There is no such recipe or field, or a value is impossible.
    """
    known = recipe_names()
    renamed = _RENAMED_RECIPES.get(name)
    hint = f"did you mean {renamed}?" if renamed else f"there are {', '.join(known)}."
    Section.require(name in known, f"There is no recipe {name!r}; {hint}")
    recipe: Recipe = importlib.import_module(f"{__package__}.recipes.{name}").RECIPE
    return recipe.replace(changes, **short_names)
