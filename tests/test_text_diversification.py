from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_gkc.loss_gkc import classification_loss
from modeling_gkc.modeling_gkc import reduce_prompt_logits
from train.losses.synonyms import (
    CLUSTER_REDUCTIONS,
    assign_slots,
    clustered_synonym_loss,
    draw_synonyms,
    gather_slot_logits,
    sampled_synonym_loss,
)
from train.teacher.synonym_probabilities import synonym_probabilities, synonym_table

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference_losses.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def golden_targets():
    labels = [golden("lab0"), golden("lab1")]
    return labels, [(golden("src0"), golden("tgt0")), (golden("src1"), golden("tgt1"))]


def seeded_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("mode", "name"), [("max", "syn_clusterMax"), ("average", "syn_clusterAvg")])
def test_golden_numbers(mode, name, within):
    sizes = golden("syn_sizes")[:-1]
    class_ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    loss = clustered_synonym_loss(golden("syn_logits"), class_ids, *golden_targets(), 0.1, mode)
    within("synonym losses against recorded values", (loss - golden(name)).abs(), 1e-5)


def test_sampling_with_one_word_per_class_equals_the_plain_loss():
    labels, matches = golden_targets()
    logits = golden("ce_logits")
    slots = [torch.arange(5)] * 2
    torch.testing.assert_close(
        sampled_synonym_loss(logits, slots, labels, matches, 0.1), golden("ce_plain"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["average", "max"])
def test_gradients_of_clusters_against_finite_differences(mode):
    logits = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_()
    class_ids = torch.tensor([0, 0, 1, 2, 2])
    matches = [(torch.tensor([0, 2]), torch.tensor([1, 0])), (torch.tensor([1]), torch.tensor([0]))]
    labels = [torch.tensor([2, 0]), torch.tensor([1])]

    def loss(logits):
        return clustered_synonym_loss(logits, class_ids, labels, matches, 0.1, mode)

    reduction = CLUSTER_REDUCTIONS[mode]
    assert torch.autograd.gradcheck(lambda logits: reduce_prompt_logits(logits, class_ids, reduction), logits)
    assert torch.autograd.gradcheck(loss, logits)


def test_gradients_of_sampling_against_finite_differences():
    logits = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_()
    slots = [torch.tensor([1, 2, 3, 0]), torch.tensor([0, 2, 4])]
    matches = [(torch.tensor([0, 2]), torch.tensor([1, 0])), (torch.tensor([1]), torch.tensor([0]))]
    labels = [torch.tensor([3, 0]), torch.tensor([2])]

    def loss(logits):
        return sampled_synonym_loss(logits, slots, labels, matches, 0.1)

    assert torch.autograd.gradcheck(lambda logits: gather_slot_logits(logits, slots), logits)
    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("mode", ["average", "max", "sample"])
def test_images_without_regions(mode):
    logits = torch.randn(2, 3, 6, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    labels, matches = [nothing] * 2, [(nothing, nothing)] * 2
    if mode == "sample":
        loss = sampled_synonym_loss(logits, [torch.arange(5)] * 2, labels, matches, 0.1)
    else:
        loss = clustered_synonym_loss(logits, torch.arange(5), labels, matches, 0.1, mode)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="average, max"):
        clustered_synonym_loss(torch.zeros(1, 1, 2), torch.zeros(1), [], [], 0.1, "median")


def test_table_lists_the_words_of_each_class_in_any_order():
    table = synonym_table(torch.tensor([1, 0, 1, 2, 1]))
    assert table.tolist() == [[1, -1, -1], [0, 2, 4], [3, -1, -1]]


def test_draws_are_uniform_over_the_words_of_the_class():
    table = synonym_table(torch.tensor([0, 0, 0, 1, 1]))
    labels = torch.tensor([0] * 6000 + [1] * 6000)
    drawn = draw_synonyms(labels, table, seeded_generator())
    shares = torch.bincount(drawn, minlength=5) / 6000
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]), rtol=0, atol=0.02)
    assert set(drawn[:6000].tolist()) == {0, 1, 2} and set(drawn[6000:].tolist()) == {3, 4}


def test_only_words_probable_for_the_region_are_drawn():
    table = synonym_table(torch.tensor([0, 0, 0, 0]))
    probabilities = torch.tensor([[0.6, 0.05, 0.25, 0.1], [0.05, 0.8, 0.1, 0.05]]).repeat_interleave(500, dim=0)
    drawn = draw_synonyms(torch.zeros(1000, dtype=torch.long), table, seeded_generator(), probabilities)
    assert set(drawn[:500].tolist()) == {0, 2}  # 0.1 itself does not exceed the threshold
    assert set(drawn[500:].tolist()) == {1}


def test_most_probable_word_is_used_if_none_exceeds_the_threshold():
    table = synonym_table(torch.tensor([0] * 12 + [1]))
    probabilities = torch.full((1, 12), 1 / 12)
    probabilities[0, 7] += 0.01
    drawn = draw_synonyms(torch.tensor([0]), table, seeded_generator(), probabilities)
    assert drawn.tolist() == [7]


def test_the_same_generator_state_draws_the_same():
    table = synonym_table(torch.tensor([0, 0, 0, 1, 1]))
    labels = torch.randint(2, (50,))
    generator = seeded_generator(3)
    state = generator.get_state()
    first = draw_synonyms(labels, table, generator)
    generator.set_state(state)
    assert torch.equal(first, draw_synonyms(labels, table, generator))
    assert draw_synonyms(labels[:0], table, generator).shape == (0,)


def test_a_region_keeps_its_class_slot_if_free_else_takes_a_new_one():
    names = torch.tensor([0, 3, 6])
    labels = torch.tensor([1, 1, 0, 1, 1, 1])
    words = torch.tensor([4, 5, 0, 4, 3, 5])
    slot_prompts, slot_labels = assign_slots(labels, words, names)
    assert slot_prompts.tolist() == [0, 4, 6, 5, 3]
    assert slot_labels.tolist() == [1, 3, 0, 1, 4, 3]
    assert slot_prompts[slot_labels].tolist() == words.tolist()


def test_without_regions_the_slots_hold_the_names():
    slot_prompts, slot_labels = assign_slots(*torch.zeros(2, 0, dtype=torch.long), torch.tensor([0, 2]))
    assert slot_prompts.tolist() == [0, 2] and slot_labels.shape == (0,)


def test_slots_of_other_images_are_excluded():
    logits = torch.randn(2, 4, 6)
    slots = [torch.tensor([1, 2, 3, 0]), torch.tensor([4, 2])]
    gathered = gather_slot_logits(logits, slots)
    assert gathered.shape == (2, 4, 5)
    torch.testing.assert_close(gathered[0], logits[0][:, [1, 2, 3, 0, 5]])
    probabilities = gathered[1].softmax(-1)
    torch.testing.assert_close(probabilities[:, [0, 1, 4]], logits[1][:, [4, 2, 5]].softmax(-1))
    alone = [(torch.tensor([1]), torch.tensor([0]))]
    labels = [torch.tensor([1])]
    together = sampled_synonym_loss(logits, slots, labels * 2, alone * 2, 0.1)
    apart = [
        classification_loss(gather_slot_logits(logits[i : i + 1], slots[i : i + 1]), labels, alone, 0.1)
        for i in (0, 1)
    ]
    torch.testing.assert_close(together, sum(apart) / 2)


def test_probabilities_are_a_softmax_over_the_words_of_the_class():
    words, regions = (F.normalize(torch.randn(n, 8), dim=-1) for n in (5, 3))
    table = synonym_table(torch.tensor([0, 0, 0, 1, 1]))
    probabilities = synonym_probabilities(regions, torch.tensor([0, 1, 1]), table, words, logit_scale=10.0)
    torch.testing.assert_close(probabilities[0], (10 * words[:3] @ regions[0]).softmax(0))
    torch.testing.assert_close(probabilities[1, :2], (10 * words[3:] @ regions[1]).softmax(0))
    assert probabilities[1, 2] == 0
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
