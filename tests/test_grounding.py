"""Grounding: recorded values, a loop over every pair, and two processes against one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from train.losses.grounding import gather_with_gradients, grounding_loss

from .processes import run_forked

PROCESSES = 2


def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "golden" / "reference_losses.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[f"ground_{name}"])) for name in ("total", *GOLDEN_INPUTS)}


GOLDEN_INPUTS = ("cap", "reg", "cm", "rm", "scale")


def test_golden_number(within):
    recorded = golden()
    masks = recorded["cm"].bool(), recorded["rm"].bool()
    loss = grounding_loss(recorded["cap"], recorded["reg"], *masks, recorded["scale"])
    within("grounding loss against recorded value", (loss - recorded["total"]).abs(), 1e-5)


def mask(counts: list[int], length: int) -> Tensor:
    """(B, length) bool, as many true as counted, at any place."""
    return torch.stack([torch.randperm(length) < count for count in counts])


def batch(words=(3, 5, 1, 2), regions=(7, 2, 4, 6), width=6, dtype=torch.float64) -> dict[str, Tensor]:
    sizes = len(words), max(words), max(regions)
    return {
        "word_embeds": torch.randn(sizes[0], sizes[1], width, dtype=dtype),
        "region_embeds": torch.randn(sizes[0], sizes[2], width, dtype=dtype),
        "word_mask": mask(words, sizes[1]),
        "region_mask": mask(regions, sizes[2]),
    }


def slow_reference(word_embeds, region_embeds, word_mask, region_mask, scale) -> Tensor:
    """Pair by pair, noun by noun, from lists without padding or images that lack either."""
    pairs = [
        (words[held], regions[shown])
        for words, regions, held, shown in zip(word_embeds, region_embeds, word_mask, region_mask, strict=True)
        if held.any() and shown.any()
    ]
    by_words, by_regions = torch.zeros(2, len(pairs), len(pairs), dtype=word_embeds.dtype)
    for caption, (words, _) in enumerate(pairs):
        for image, (_, regions) in enumerate(pairs):
            cosines = torch.stack([torch.stack([F.cosine_similarity(w, r, dim=0) for r in regions]) for w in words])
            by_words[caption, image] = sum((scale * row).softmax(0) @ (scale * row) for row in cosines) / len(words)
            by_regions[caption, image] = sum((scale * column).softmax(0) @ (scale * column) for column in cosines.T)
            by_regions[caption, image] /= len(regions)
    losses = []
    for nearness in (by_words, by_regions):
        for number in range(len(pairs)):
            losses.append(nearness[number].logsumexp(0) - nearness[number, number])
            losses.append(nearness[:, number].logsumexp(0) - nearness[number, number])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("words", [(3, 5, 1, 2), (3, 0, 1, 2)])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_equals_the_formula_written_with_loops(words, scale, within):
    inputs = batch(words)
    error = (grounding_loss(**inputs, scale=scale) - slow_reference(**inputs, scale=scale)).abs()
    within("grounding loss against a loop over all pairs, fp64", error, 1e-12)


def test_images_without_nouns_or_regions_are_excluded():
    """Whatever stands in their places and in padding, NaN too."""
    inputs = batch(words=(3, 0, 2, 4, 0), regions=(2, 5, 0, 3, 0))
    expected = grounding_loss(**{name: value[[0, 3]] for name, value in inputs.items()}, scale=5.0)
    for name in ("word", "region"):
        inputs[f"{name}_embeds"][~inputs[f"{name}_mask"]] = float("nan")
        inputs[f"{name}_embeds"].requires_grad_()
    loss = grounding_loss(**inputs, scale=5.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name in ("word_embeds", "region_embeds"):
        gradient = inputs[name].grad
        assert (gradient[[1, 2, 4]] == 0).all() and (gradient[[0, 3]] != 0).any() and gradient.isfinite().all()


@pytest.mark.parametrize(("words", "regions"), [((0, 2), (3, 0)), ((0, 0), (2, 3)), ((1, 1), (0, 0))])
def test_without_pairs_zero_loss_backpropagates(words, regions):
    inputs = batch(words=(*words, 4), regions=(*regions, 4))
    inputs = {name: value[:2] for name, value in inputs.items()}
    for name in ("word_embeds", "region_embeds"):
        inputs[name].requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    loss = grounding_loss(**inputs, scale=scale)
    assert loss == 0 and loss.shape == ()
    loss.backward()
    assert all((leaf.grad == 0).all() for leaf in (inputs["word_embeds"], inputs["region_embeds"], scale))


def test_order_of_images_nouns_and_regions_does_not_matter():
    inputs = batch()
    expected = grounding_loss(**inputs, scale=5.0)
    images, words, regions = torch.randperm(4), torch.randperm(5), torch.randperm(7)
    shuffled = {name: value[images][:, words if "word" in name else regions] for name, value in inputs.items()}
    torch.testing.assert_close(grounding_loss(**shuffled, scale=5.0), expected)


def test_captions_of_their_own_images_cost_less():
    inputs = batch(words=(2, 2, 2), regions=(2, 2, 2), width=8)
    inputs["region_embeds"] = inputs["word_embeds"] + 0.1 * torch.randn(3, 2, 8)
    swapped = {**inputs, "region_embeds": inputs["region_embeds"].roll(1, dims=0)}
    assert grounding_loss(**inputs, scale=10.0) < 0.3 * grounding_loss(**swapped, scale=10.0)


def test_gradients_against_finite_differences():
    inputs = batch(words=(2, 0, 3), regions=(3, 2, 2), width=3)
    leaves = [inputs[name].requires_grad_() for name in ("word_embeds", "region_embeds")]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    masks = inputs["word_mask"], inputs["region_mask"]
    assert torch.autograd.gradcheck(lambda w, r, s: grounding_loss(w, r, *masks, s), (*leaves, scale))


def test_half_precision_is_computed_in_single(within):
    inputs = batch(dtype=torch.float32)
    halved = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    rounded = {name: value.float() if value.is_floating_point() else value for name, value in halved.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = grounding_loss(**halved, scale=torch.tensor(100.0))
    assert loss.dtype == torch.float32
    error = (loss / grounding_loss(**rounded, scale=100.0) - 1).abs()
    within("grounding loss of bf16 embeddings under autocast, relative", error, 1e-6)


def test_single_process_gathers_its_own_batch():
    tensor = torch.randn(2, 3)
    assert gather_with_gradients(tensor) is tensor


CASES = {  # of each process: nouns and regions of its images
    "unequal": (((3, 1), (7, 2)), ((5, 2, 4), (1, 3, 2))),
    "nothing in one process": (((3, 2), (2, 4)), ((0, 0), (0, 1))),
    "nothing at all": (((0, 0), (1, 0)), ((0,), (3,))),
}


def of_process(case: str, rank: int) -> dict[str, Tensor]:
    """Images of a process, padded to its own longest caption and image; the same wherever it is called."""
    torch.manual_seed(rank)
    words, regions = CASES[case][rank]
    inputs = batch(words, regions, dtype=torch.float32)
    torch.manual_seed(7)  # The weights that are learned are the same in all processes.
    return inputs | {
        "word_map": torch.randn(6, 6, requires_grad=True),
        "region_map": torch.randn(6, 6, requires_grad=True),
        "scale": torch.tensor(5.0, requires_grad=True),
    }


def loss_and_gradients(parts: list[dict[str, Tensor]]) -> list[Tensor]:
    """Of captions and regions mapped by weights; `parts` are one process's images, or every process's."""
    learned = [parts[0][name] for name in ("word_map", "region_map", "scale")]
    gathered = {
        name: gather_with_gradients(padded_together([part[name] @ weight for part in parts]))
        for name, weight in zip(("word_embeds", "region_embeds"), learned[:2], strict=True)
    }
    masks = {name: gather_with_gradients(padded_together([p[name] for p in parts])) for name in MASKS}
    loss = grounding_loss(**gathered, **masks, scale=learned[2])
    return [loss.detach(), *torch.autograd.grad(loss, learned)]


MASKS = ("word_mask", "region_mask")


def padded_together(tensors: list[Tensor]) -> Tensor:
    """One after the other along the first axis, the second padded."""
    longest = max(tensor.shape[1] for tensor in tensors)
    padded = [tensor.new_zeros(len(tensor), longest, *tensor.shape[2:]) for tensor in tensors]
    for target, tensor in zip(padded, tensors, strict=True):
        target[:, : tensor.shape[1]] = tensor
    return torch.cat(padded)


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    results = {}
    for case in CASES:
        loss, *gradients = loss_and_gradients([of_process(case, rank)])
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= PROCESSES
        results[case] = [loss, *gradients]
    torch.save(results, Path(folder) / f"results{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    run_forked(run_process, str(folder), count=PROCESSES)
    return [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_batch(of_two_processes, within, case):
    """The loss of each is the whole batch's, and the mean of their gradients its gradient: embeddings' and scale's."""
    expected = loss_and_gradients([of_process(case, rank) for rank in range(PROCESSES)])
    assert (expected[0] == 0) == (case == "nothing at all")
    for results in of_two_processes:
        for position, (value, whole) in enumerate(zip(results[case], expected, strict=True)):
            what = "loss" if position == 0 else "gradients"
            error = (value - whole).abs().max() / whole.abs().max().clamp(min=1e-30)
            within(f"grounding {what} of two processes, {case}, relative", error, 1e-5)
