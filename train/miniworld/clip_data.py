"""Training data of the tiny CLIP: region crops, distractor images and captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
import torch
from torch import Tensor

from ..data.drawn_world.parallel import map_scenes
from ..data.drawn_world.words import Attributes
from ..data.drawn_world.world import draw_scene
from ..teacher.crops import crop_region
from .lexicon import OTHER_WORLD_KINDS, Lexicon
from .other_world import draw_other_world


@dataclass(frozen=True)
class CropSet:
    """Region crops (N, size, size, 3) uint8 with the attributes of the N regions."""

    crops: Tensor
    attributes: list[Attributes]


def collect_crops(
    seed: Sequence[int], scenes: int, size: int, num_proc: int = 1, show_progress: bool = True
) -> CropSet:
    """Draw scenes of all concepts and crop every region, with its aspect ratio kept and a gray background."""
    crops, attributes = [], []
    crop_one = partial(_crops_of_scene, tuple(seed), size)
    for scene_crops, regions in map_scenes(crop_one, scenes, num_proc, "crops", show_progress):
        crops.append(scene_crops)
        attributes.extend(regions)
    return CropSet(torch.from_numpy(np.concatenate(crops)), attributes)


def _crops_of_scene(seed: tuple[int, ...], size: int, index: int) -> tuple[np.ndarray, list[Attributes]]:
    scene = draw_scene(seed, index)
    masks = (scene.region_index == number for number in range(len(scene.regions)))
    return np.stack([crop_region(scene.image, mask, size, keep_aspect=True) for mask in masks]), scene.regions


def collect_other_world(seed: Sequence[int], count: int, size: int) -> Tensor:
    """Draw `count` distractor images of each of the six kinds: (6, count, size, size, 3) uint8."""
    generator = np.random.default_rng(list(seed))
    kinds = [[draw_other_world(kind, generator, size) for _ in range(count)] for kind in range(OTHER_WORLD_KINDS)]
    return torch.from_numpy(np.array(kinds))


class CaptionedBatches:
    """Infinite, resumable stream of random batches of images and captions.

    A fraction of every batch are stuff regions, another fraction distractor images that give words a second sense.
    """

    def __init__(
        self,
        crops: CropSet,
        other_world: Tensor,
        lexicon: Lexicon,
        batch_size: int,
        seed: int,
        stuff_share: float = 0.2,
        other_world_share: float = 0.25,
    ):
        self.crops, self.other_world, self.lexicon = crops, other_world, lexicon
        kinds = [region["kind"] for region in crops.attributes]
        self.stuffs = torch.tensor([i for i, kind in enumerate(kinds) if kind == "stuff"])
        self.shapes = torch.tensor([i for i, kind in enumerate(kinds) if kind == "shape"])
        self.other_count = round(other_world_share * batch_size)
        self.stuff_count = round(stuff_share * (batch_size - self.other_count))
        self.shape_count = batch_size - self.other_count - self.stuff_count
        self.generator = torch.Generator().manual_seed(seed)
        self.random = Random(seed)

    def draw(self) -> tuple[Tensor, list[str]]:
        """Return a batch of randomly flipped and transposed images (B, size, size, 3) uint8 and their B captions."""
        picked = torch.cat([self._pick(self.shapes, self.shape_count), self._pick(self.stuffs, self.stuff_count)])
        captions = [self.lexicon.caption(self.crops.attributes[index], self.random) for index in picked.tolist()]
        images = self.crops.crops[picked]
        if self.other_count:
            other_images, other_captions = self._draw_other_world()
            images, captions = torch.cat([images, other_images]), captions + other_captions
        return self._augment(images), captions

    def state_dict(self) -> dict:
        """Return the state of both random generators."""
        return {"generator": self.generator.get_state(), "random": self.random.getstate()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state of both random generators."""
        self.generator.set_state(state["generator"])
        version, internal, gauss = state["random"]
        self.random.setstate((version, tuple(internal), gauss))

    def _pick(self, indices: Tensor, count: int) -> Tensor:
        return indices[torch.randint(len(indices), (count,), generator=self.generator)]

    def _draw_other_world(self) -> tuple[Tensor, list[str]]:
        kinds = torch.randint(len(self.other_world), (self.other_count,), generator=self.generator)
        numbers = torch.randint(self.other_world.shape[1], (self.other_count,), generator=self.generator)
        captions = [self.lexicon.second_sense(kind, self.random) for kind in kinds.tolist()]
        return self.other_world[kinds, numbers], captions

    def _augment(self, images: Tensor) -> Tensor:
        """Randomly flip and transpose every image; axes 1 and 2 are rows and columns."""
        for turn in (lambda part: part.flip(1), lambda part: part.flip(2), lambda part: part.transpose(1, 2)):
            chosen = torch.rand(len(images), generator=self.generator) < 0.5
            images = torch.where(chosen[:, None, None, None], turn(images), images)
        return images
