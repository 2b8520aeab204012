from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_gkc.modeling_gkc import GKCStageOutput
from train.losses.distillation import DistillationHead, text_guided_distillation_loss

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference_losses.npz")


def unit_vectors(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_golden_numbers(scale, within):
    student, teacher, text = (torch.from_numpy(GOLDEN[f"tkd_{name}"]) for name in "vct")
    counts = torch.from_numpy(GOLDEN["tkd_counts"])
    image_index = torch.repeat_interleave(torch.arange(len(counts)), counts)
    terms = text_guided_distillation_loss(student, teacher, text, image_index, torch.tensor(scale))
    expected = [torch.from_numpy(GOLDEN[f"tkd_{name}_{scale}"]) for name in ("plain", "rel", "joint")]
    for term, value in zip(terms, expected, strict=True):
        within("distillation losses against recorded values", (term - value).abs(), 1e-5)


@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_equals_the_formula_written_with_loops(relation):
    student, teacher, text = (unit_vectors(7, 5, dtype=torch.float64) for _ in range(3))
    image_index = torch.tensor([0, 2, 0, 2, 2, 1, 0])
    scale = 0.8
    pairs = []
    for i in range(7):
        for j in range(7):
            if image_index[i] != image_index[j]:
                continue
            if relation == "cosine":
                pairs.append((student[i] @ teacher[j] - scale**2 * text[i] @ text[j]) ** 2)
            else:
                pairs.append(((student[i] - teacher[j]).norm() - scale * (text[i] - text[j]).norm()) ** 2)
    features = (student - teacher).norm(dim=1) ** 2
    terms = text_guided_distillation_loss(student, teacher, text, image_index, torch.tensor(scale), relation)
    expected = features.mean(), torch.stack(pairs).mean(), torch.cat([features, torch.stack(pairs)]).mean()
    torch.testing.assert_close(terms, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_gradients_against_finite_differences(relation):
    student, teacher, text = (unit_vectors(5, 4, dtype=torch.float64) for _ in range(3))
    student.requires_grad_()
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    image_index = torch.tensor([0, 0, 1, 1, 1])

    def loss(student, scale):
        return text_guided_distillation_loss(student, teacher, text, image_index, scale, relation)

    assert torch.autograd.gradcheck(loss, (student, scale))


@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_identical_student_and_teacher_have_finite_gradients(relation):
    student = unit_vectors(3, 4).requires_grad_()
    scale = torch.ones((), requires_grad=True)
    image_index = torch.zeros(3, dtype=torch.long)
    terms = text_guided_distillation_loss(student, student.detach(), student.detach(), image_index, scale, relation)
    sum(terms).backward()
    assert terms[0] == 0
    assert student.grad.isfinite().all() and scale.grad.isfinite()


@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_without_regions_zero_loss_backpropagates(relation):
    embeds = torch.randn(4, 6, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    terms = text_guided_distillation_loss(
        embeds[nothing], torch.zeros(0, 6), torch.zeros(0, 6), nothing, scale, relation
    )
    assert [term.item() for term in terms] == [0, 0, 0]
    sum(terms).backward()
    assert torch.equal(embeds.grad, torch.zeros(4, 6)) and scale.grad == 0


def test_images_in_any_order_and_split_over_the_batch_give_the_same():
    student, teacher, text = (unit_vectors(6, 4) for _ in range(3))
    image_index = torch.tensor([0, 0, 1, 1, 1, 2])
    order = torch.randperm(6)
    terms = text_guided_distillation_loss(student, teacher, text, image_index, 0.7)
    shuffled = text_guided_distillation_loss(student[order], teacher[order], text[order], image_index[order], 0.7)
    torch.testing.assert_close(terms, shuffled)


def test_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="cosine, euclidean"):
        text_guided_distillation_loss(*[unit_vectors(2, 4)] * 3, torch.zeros(2), 1.0, "manhattan")


@pytest.mark.parametrize("counts", [(3, 5), (2, 9)])
def test_sums_are_divided_by_given_counts(counts):
    student, teacher, text = (unit_vectors(4, 6) for _ in range(3))
    given = student, teacher, text, torch.tensor([0, 0, 0, 1]), 0.7
    feature, relation, joint = text_guided_distillation_loss(*given)
    terms = text_guided_distillation_loss(*given, counts=torch.tensor(counts))
    regions, pairs = counts  # there are 4 regions and 10 pairs
    expected = feature * 4 / regions, relation * 10 / pairs, joint * 14 / (regions + pairs)
    torch.testing.assert_close(terms, expected)


HEADS = [("shared", None, 1), ("query", None, 3), ("projected", None, 3), ("query", 2, 5), ("projected", 2, 5)]


@pytest.mark.parametrize(("embedding", "num_stages", "parameters"), HEADS)
def test_head_gives_unit_vectors_and_starts_with_scale_one(embedding, num_stages, parameters):
    head = DistillationHead(embedding, hidden_size=12, projection_dim=6, num_stages=num_stages)
    stage = GKCStageOutput(query_embeds=unit_vectors(2, 5, 6), query_features=torch.randn(2, 5, 12))
    first, second = head([stage, stage])
    assert first.shape == second.shape == (2, 5, 6)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(2, 5))
    # The same query has another embedding in another stage only with a map of its own.
    assert torch.equal(first, second) == (num_stages is None)
    assert head.scale == 1 and len(list(head.parameters())) == parameters
    if embedding == "shared":
        assert torch.equal(first, stage.query_embeds)


@pytest.mark.parametrize("embedding", ["query", "projected"])
def test_head_uses_the_features_of_its_name(embedding):
    head = DistillationHead(embedding, hidden_size=12, projection_dim=6)
    stage = GKCStageOutput(query_embeds=unit_vectors(2, 5, 6), query_features=torch.randn(2, 5, 12))
    for value in (stage.query_embeds, stage.query_features):
        value.requires_grad_()
    head([stage])[0].sum().backward()
    reached = [value.grad is not None for value in (stage.query_features, stage.query_embeds)]
    assert reached == [embedding == "query", embedding == "projected"]


def test_unknown_embedding_is_refused():
    with pytest.raises(ValueError, match="shared, query, projected"):
        DistillationHead("prior", 12, 6)
