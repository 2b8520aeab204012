"""Two processes that share a batch unequally: the mean of their gradients is the gradient of the whole batch."""

from itertools import accumulate
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from modeling_gkc.loss_gkc import GKCCriterion, classification_loss
from train.losses.distillation import RELATIONS, text_guided_distillation_loss

from .conftest import small_config
from .processes import run_forked

CASES = {  # number of segments of the images of each process
    "no segment in one process": ((3, 1), (0, 0)),
    "40 segments and 1": ((9, 8, 9, 6, 8), (1,)),
    "no segment at all": ((0, 0), (0,)),
    "fewer segments than processes": ((1, 0), (0,)),
}
QUERIES, CLASSES, WIDTH = 10, 5, 8
POINTS = torch.cartesian_prod((torch.arange(8) + 0.3) / 8, (torch.arange(8) + 0.6) / 8)
PROCESSES = 2


def on_a_grid(*shape: int, **_) -> Tensor:
    """Stands in for `torch.rand` where points are drawn, which every process draws differently."""
    return POINTS[: shape[-2]].expand(*shape).clone()


class Batch:
    """Everything the losses compare, of all images; the same in every process."""

    def __init__(self, counts: tuple[int, ...]):
        torch.manual_seed(0)
        images, regions = len(counts), sum(counts)
        self.parameters = {
            "class_logits": torch.randn(images, QUERIES, CLASSES + 1),
            "mask_logits": 3 * torch.randn(images, QUERIES, 6, 10),
            "embeds": torch.randn(regions, WIDTH),
            "scale": torch.tensor(0.7),
        }
        self.parameters = {name: value.requires_grad_() for name, value in self.parameters.items()}
        self.mask_labels = [(torch.rand(count, 12, 20) > 0.5).float() for count in counts]
        self.class_labels = [torch.randint(0, CLASSES, (count,)) for count in counts]
        self.matches = [(torch.randperm(QUERIES)[:count], torch.randperm(count)) for count in counts]
        self.teacher, self.text = F.normalize(torch.randn(2, regions, WIDTH), dim=-1)
        self.image_index = torch.arange(images).repeat_interleave(torch.tensor(counts))


def losses(batch: Batch, images: slice) -> dict[str, Tensor]:
    """Every loss, by name, of some images of the batch."""
    classes, masks = (batch.parameters[name][images] for name in ("class_logits", "mask_logits"))
    labels = batch.mask_labels[images], batch.class_labels[images]
    config = small_config(train_num_points=len(POINTS), importance_sample_ratio=0.0, oversample_ratio=1.0)
    with mock.patch.object(torch, "rand", on_a_grid):
        values, _ = GKCCriterion(config)([-classes, classes], [-masks, masks], *labels)
    values["classification"] = classification_loss(classes, labels[1], batch.matches[images], 0.1)
    index = batch.image_index
    shard = (index >= images.start) & (index < images.stop)
    student = F.normalize(batch.parameters["embeds"], dim=-1)
    compared = student[shard], batch.teacher[shard], batch.text[shard], index[shard], batch.parameters["scale"]
    for relation in RELATIONS:
        terms = text_guided_distillation_loss(*compared, relation)
        values |= {f"distillation {relation} {number}": term for number, term in enumerate(terms)}
    return values


def gradients(batch: Batch, images: slice) -> dict[str, Tensor]:
    """Of every loss, the gradients of all parameters, flat and side by side."""
    parameters = list(batch.parameters.values())
    return {
        name: torch.cat(
            [
                gradient.flatten()
                for gradient in torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            ]
        )
        for name, loss in losses(batch, images).items()
    }


def run_process(rank: int, folder: str) -> None:
    """One of the processes: the gradients of its images, averaged as distributed training does."""
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    averaged = {}
    for case, shards in CASES.items():
        batch = Batch(sum(shards, ()))
        start, stop = list(accumulate(map(len, shards), initial=0))[rank : rank + 2]
        averaged[case] = gradients(batch, slice(start, stop))
        for gradient in averaged[case].values():
            dist.all_reduce(gradient)
            gradient /= PROCESSES
    if rank == 0:
        torch.save(averaged, Path(folder) / "averaged.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("processes")
    run_forked(run_process, str(folder), count=PROCESSES)
    return torch.load(folder / "averaged.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_averaged_gradients_are_those_of_the_whole_batch(averaged, within, case):
    counts = sum(CASES[case], ())
    expected = gradients(Batch(counts), slice(0, len(counts)))
    assert averaged[case].keys() == expected.keys()
    for name, gradient in expected.items():
        kind = name.split()[0].removesuffix("_0")
        error = (averaged[case][name] - gradient).abs().max()
        if any(counts) or kind in ("classification", "loss_cross_entropy"):
            error = error / gradient.abs().max()
        within(f"gradients of two processes, {case}: {kind}", error, 1e-5)
