"""Tests of the convex classifier: probabilities of the names of the source, and of other names."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_gkc.classifiers import SMALLEST_SINGULAR_VALUE, ClassPrompts, ConvexClassifier
from modeling_gkc.configuration_gkc import GKCConfig

from .conftest import small_config

MARGIN = 0.1
# (classes, width of the text space, cosine similarity of unrelated names), which is 0.7 to 0.9 for CLIP.
SPACES = [
    (1, 16, 0.0),
    (2, 512, 0.9),
    (15, 16, 0.8),
    (19, 512, 0.7),
    (80, 512, 0.8),
    (133, 512, 0.85),
    (150, 512, 0.9),
]
TWIN_COSINE = 0.97


def text_space(num_classes: int, width: int, cosine: float, generator: torch.Generator) -> Tensor:
    """Return embeddings (S, D) with a common component; every fourth has one of cosine similarity 0.97."""
    common = F.normalize(torch.randn(1, width, generator=generator), dim=-1)
    own = F.normalize(torch.randn(num_classes, width, generator=generator), dim=-1)
    embeds = F.normalize(cosine**0.5 * common + (1 - cosine) ** 0.5 * own, dim=-1)
    if width < 32:
        return embeds
    for index in range(0, num_classes - 1, 4):
        embeds[index + 1] = near(embeds[index], TWIN_COSINE, generator)
    return embeds


def near(embed: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """Return a unit vector with the given cosine similarity to another one."""
    step = torch.randn(embed.shape, generator=generator)
    step = F.normalize(step - step @ embed * embed, dim=0)
    return cosine * embed + (1 - cosine**2) ** 0.5 * step


def classifier_from(names: Tensor, class_ids: Tensor | None = None) -> ConvexClassifier:
    """Return a classifier whose head is the identity, so that the logits can be chosen."""
    class_ids = torch.arange(len(names)) if class_ids is None else class_ids
    num_classes = int(class_ids.max()) + 1
    vocabulary = [["name"] * int((class_ids == index).sum()) for index in range(num_classes)]
    head = torch.nn.Linear(num_classes + 1, num_classes + 1)
    with torch.no_grad():
        head.weight.copy_(torch.eye(num_classes + 1))
        head.bias.zero_()
    classifier = ConvexClassifier(
        SimpleNamespace(
            source_vocabulary=vocabulary,
            projection_dim=names.shape[1],
            hidden_size=num_classes + 1,
            logit_scale_init_value=0.0,
        )
    )
    classifier.set_source(head, names, class_ids)
    return classifier


def query_embeds(classifier: ConvexClassifier, probabilities: Tensor) -> Tensor:
    """Return the query embeddings for which the head gives the probabilities (Q, S + 1)."""
    logits = probabilities.clamp(min=1e-30).log().to(classifier.basis.dtype)
    return classifier.embed_queries(SimpleNamespace(last_hidden_state=logits[None]))


def class_probabilities(
    classifier: ConvexClassifier, probabilities: Tensor, requested: Tensor, class_ids=None
) -> Tensor:
    """Return the probabilities (Q, K + 1) of names and no-object, computed from query embeddings."""
    num_classes = len(requested) if class_ids is None else int(class_ids.max()) + 1
    with torch.no_grad():
        prompts = ClassPrompts(requested, class_ids, num_classes, "max")
        return classifier.classify_embeds(query_embeds(classifier, probabilities), prompts)[0].softmax(dim=-1)


def random_probabilities(num_classes: int, generator: torch.Generator) -> Tensor:
    logits = torch.randn(4, 64, num_classes + 1, generator=generator)
    return (logits * torch.tensor([0.3, 1.0, 3.0, 10.0])[:, None, None]).softmax(dim=-1).flatten(0, 1)


def adversarial_probabilities(names: Tensor) -> Tensor:
    """Return probabilities whose largest class leads by little more than the margin over its strongest competitor.

    The competitor is the nearest name, no-object, or all others together. The rest of the probability goes to the
    names nearest to the mean of all names.
    """
    num_classes = len(names)
    if num_classes == 1:
        return torch.tensor([[0.551, 0.449], [0.449, 0.551]])
    cosines = (names @ names.T).fill_diagonal_(-1)
    central = (names @ names.mean(dim=0)).argsort(descending=True)
    rows = []
    for winner in range(0, num_classes, 1 + num_classes // 55):
        rival = int(cosines[winner].argmax())
        for pair in ((winner, rival), (winner, num_classes), (num_classes, winner)):
            for share in (0.55, 0.35, 0.2):
                row = torch.zeros(num_classes + 1)
                row[pair[0]], row[pair[1]] = share + 0.0005, share - MARGIN - 0.0005
                rest = 1 - row.sum()
                others = [int(index) for index in central if index not in pair]
                others = others[: 1 + int(rest / (share - MARGIN))]
                if others:
                    row[others] += rest / len(others)
                rows.append(row / row.sum())
        flat = torch.full((num_classes + 1,), (1 - MARGIN - 0.001) / (num_classes + 1))
        flat[winner] += MARGIN + 0.001
        rows.append(flat)
    return torch.stack(rows)


def margins(probabilities: Tensor) -> Tensor:
    best = probabilities.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


@pytest.mark.parametrize(("num_classes", "width", "cosine"), SPACES)
def test_source_names_get_the_probabilities_of_the_head(num_classes, width, cosine, within):
    generator = torch.Generator().manual_seed(num_classes)
    names = text_space(num_classes, width, cosine, generator)
    probabilities = torch.cat([random_probabilities(num_classes, generator), adversarial_probabilities(names)])
    actual = class_probabilities(classifier_from(names), probabilities, names)
    within("probabilities of a head's own names, max abs", (actual - probabilities).abs().max(), 1e-4)
    clear = margins(probabilities) > MARGIN
    assert clear.sum() > 1 and (probabilities[clear].argmax(-1) == num_classes).any()
    assert torch.equal(actual[clear].argmax(-1), probabilities[clear].argmax(-1))


def test_cosine_similarities_do_not_give_the_probabilities_of_the_head(within):
    """Cosine similarities of the same embeddings change the most probable class by a clear margin."""
    generator = torch.Generator().manual_seed(0)
    names = text_space(133, 512, 0.85, generator)
    classifier, probabilities = classifier_from(names), adversarial_probabilities(names)
    named = probabilities[:, :-1].argmax(-1)
    clear = (probabilities[:, -1] < 0.01) & (margins(probabilities) > MARGIN)
    by_cosine = (query_embeds(classifier, probabilities)[0] @ names.T).argmax(-1)
    assert (by_cosine != named)[clear].float().mean() > 0.05
    assert torch.equal(class_probabilities(classifier, probabilities, names)[clear].argmax(-1), named[clear])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, within):
    generator = torch.Generator().manual_seed(0)
    names = text_space(150, 512, 0.85, generator)
    probabilities = torch.cat([random_probabilities(150, generator), adversarial_probabilities(names)])
    classifier = classifier_from(names).to(dtype)
    rounded = probabilities.clamp(min=1e-30).log().to(dtype).float().softmax(dim=-1)
    actual = class_probabilities(classifier, probabilities, names.to(dtype))
    error = (actual - rounded).abs().max()
    within(f"probabilities of a head's own names, {str(dtype).removeprefix('torch.')}, max abs", error, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_equal_names_get_the_probabilities_of_the_head(dtype, within):
    """A text encoder with random weights gives cosine similarities up to 0.99999."""
    generator = torch.Generator().manual_seed(0)
    name = F.normalize(torch.randn(16, generator=generator), dim=0)
    names = torch.stack([name, *(near(name, 1 - distance, generator) for distance in torch.logspace(-5, -2, 12))])
    probabilities = random_probabilities(13, generator)
    classifier = classifier_from(names)
    # Only basis and decoder are rounded, because rounded names would be equal.
    classifier.basis, classifier.decoder = (
        buffer.to(dtype).float() for buffer in (classifier.basis, classifier.decoder)
    )
    error = (class_probabilities(classifier, probabilities, names) - probabilities).abs().max()
    within(f"probabilities of nearly equal names, {str(dtype).removeprefix('torch.')}, max abs", error, 1e-3)


def test_query_embeddings_are_convex_combinations():
    generator = torch.Generator().manual_seed(0)
    names = text_space(19, 64, 0.8, generator)
    classifier = classifier_from(names)
    probabilities = random_probabilities(19, generator)
    embeds = query_embeds(classifier, probabilities)[0]
    no_object = classifier.basis[-1]
    torch.testing.assert_close(names @ no_object, torch.zeros(19), atol=1e-6, rtol=0)
    assert torch.linalg.svdvals(names)[-1] > SMALLEST_SINGULAR_VALUE, "or the names would be pulled apart"
    expected = probabilities[:, :-1] @ names + probabilities[:, -1:] * no_object
    torch.testing.assert_close(embeds, F.normalize(expected, dim=-1), atol=1e-6, rtol=0)


def test_order_and_selection_of_source_names():
    """A name has the same probability in every vocabulary; that of missing names goes to no-object."""
    generator = torch.Generator().manual_seed(0)
    names = text_space(80, 512, 0.8, generator)
    classifier, probabilities = classifier_from(names), random_probabilities(80, generator)
    chosen = torch.tensor([7, 3, 61, 0])
    actual = class_probabilities(classifier, probabilities, names[chosen])
    torch.testing.assert_close(actual[:, :-1], probabilities[:, chosen], atol=1e-4, rtol=0)
    torch.testing.assert_close(actual[:, -1], 1 - probabilities[:, chosen].sum(-1), atol=1e-4, rtol=0)


def test_synonyms_including_shared_ones():
    """Classes have one to three names, one of which belongs to two classes; all or only first names are requested."""
    generator = torch.Generator().manual_seed(0)
    names = text_space(8, 64, 0.8, generator)
    class_ids = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 4])
    rows = torch.tensor([0, 1, 2, 3, 4, 0, 5, 6, 7])  # class 2 has the first name of class 0 as synonym
    names = names[rows]
    classifier, probabilities = classifier_from(names, class_ids), random_probabilities(5, generator)
    by_all = class_probabilities(classifier, probabilities, names, class_ids)
    torch.testing.assert_close(by_all, probabilities, atol=1e-4, rtol=0)
    by_first = class_probabilities(classifier, probabilities, names[[0, 3, 4, 6, 8]])
    torch.testing.assert_close(by_first, probabilities, atol=1e-4, rtol=0)
    by_synonym = class_probabilities(classifier, probabilities, names[[2, 7]])
    torch.testing.assert_close(by_synonym[:, :2], probabilities[:, [0, 3]], atol=1e-3, rtol=0)


def test_a_name_close_to_a_source_class_gets_its_probability():
    generator = torch.Generator().manual_seed(0)
    names = text_space(100, 512, 0.8, generator)[::2]  # without near duplicates
    classifier = classifier_from(names)
    requested = torch.stack([near(names[index], 0.93, generator) for index in (4, 11, 30)])
    confident = torch.full((3, 51), 0.1 / 50)
    confident[range(3), [4, 11, 30]] += 0.9
    actual = class_probabilities(classifier, confident, requested)
    assert (actual[range(3), range(3)] > 0.85).all()
    assert (class_probabilities(classifier, confident, requested[:1])[1:, 0] < 0.1).all(), (
        "other classes get little of this name"
    )


def test_a_name_between_source_classes_gets_all_their_probabilities():
    """The name "animal" gets the probabilities of dog, cat and horse, even if the head cannot decide between them."""
    generator = torch.Generator().manual_seed(0)
    names = text_space(100, 512, 0.8, generator)[::2]
    kind = F.normalize(names[:3].sum(dim=0), dim=0)
    uncertain = torch.zeros(2, 51)
    uncertain[0, :3] = torch.tensor([0.5, 0.3, 0.15])
    uncertain[0, -1] = 0.05
    uncertain[1, 10] = 1.0
    actual = class_probabilities(classifier_from(names), uncertain, kind[None])
    assert actual[0, 0] > 0.8 and actual[1, 0] < 0.1


def test_an_unrelated_name_gets_less_than_one_half():
    """A name at the median distance of two source classes gets at most half of a class, at half of it nearly all."""
    generator = torch.Generator().manual_seed(0)
    names = text_space(100, 512, 0.8, generator)[::2]
    classifier = classifier_from(names)
    typical = float(classifier.typical_distance)
    confident = torch.eye(51)[:50]
    for distance, lowest, highest in ((2 * typical, 0, 0.1), (typical, 0, 0.5001), (typical / 2, 0.9, 1)):
        for index in range(10):
            word = near(names[index], 1 - distance, generator)
            assert lowest <= class_probabilities(classifier, confident, word[None])[index, 0] <= highest
    common = F.normalize(names.mean(dim=0), dim=0)
    for _ in range(20):
        own = F.normalize(torch.randn(512, generator=generator), dim=0)
        word = F.normalize(0.8**0.5 * common + 0.2**0.5 * own, dim=0)
        is_far = 1 - names @ word >= typical
        assert is_far.any() and (class_probabilities(classifier, confident, word[None])[is_far, 0] <= 0.5001).all()


def test_many_distant_names_do_not_outweigh_a_close_one():
    generator = torch.Generator().manual_seed(0)
    names = text_space(100, 512, 0.8, generator)[::2]
    remote = text_space(300, 512, 0.0, generator) * 0.2**0.5 + F.normalize(names.mean(dim=0), dim=0) * 0.8**0.5
    requested = torch.cat([F.normalize(remote, dim=-1), near(names[0], 0.93, generator)[None]])
    assert class_probabilities(classifier_from(names), torch.eye(51)[:1], requested)[0, -2] > 0.85


def test_the_probability_of_no_object_does_not_depend_on_the_names():
    """The head's probability of no-object is not given to any name."""
    generator = torch.Generator().manual_seed(0)
    names = text_space(50, 512, 0.8, generator)
    probabilities = random_probabilities(50, generator)
    for count in (1, 5, 200):
        requested = torch.cat([names[: count // 2], text_space(count - count // 2, 512, 0.5, generator)])
        actual = class_probabilities(classifier_from(names), probabilities, requested)
        assert (actual[:, -1] >= probabilities[:, -1] - 1e-4).all()


@pytest.mark.parametrize("scale", [1, 8])
def test_logits_and_gradients_equal_those_of_the_head(scale, within):
    """Cross-entropy over the source names has the gradients of the head's own loss, also for confident errors."""
    generator = torch.Generator().manual_seed(0)
    names = text_space(19, 64, 0.8, generator)
    classifier = classifier_from(names)
    logits = (scale * torch.randn(1, 100, 20, generator=generator)).requires_grad_()
    labels = torch.randint(20, (100,), generator=generator)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits[0], labels), logits)
    class_logits, _ = classifier(SimpleNamespace(last_hidden_state=logits), ClassPrompts(names, None, 19, "max"))
    (actual,) = torch.autograd.grad(F.cross_entropy(class_logits[0], labels), logits)
    error = (class_logits - logits.log_softmax(-1)).detach().abs().max()
    within("log-probabilities against the head's own, max abs", error, 1e-4)
    within("gradients against the head's own, relative", (actual - expected).norm() / expected.norm(), 1e-4)


def test_source_classes_of_equal_embeddings_raise_an_error():
    names = text_space(5, 64, 0.8, torch.Generator().manual_seed(0))
    names[3] = names[1]
    classifier = ConvexClassifier(
        SimpleNamespace(
            source_vocabulary=[["a"], ["b"], ["c"], ["d"], ["e"]],
            projection_dim=64,
            hidden_size=8,
            logit_scale_init_value=0.0,
        )
    )
    with pytest.raises(ValueError, match="'b' and 'd'"):
        classifier.set_source(torch.nn.Linear(8, 6), names, torch.arange(5))


def test_embeddings_of_no_source_class_are_no_object():
    generator = torch.Generator().manual_seed(0)
    names = text_space(5, 64, 0.8, generator)
    classifier = classifier_from(names)
    nothing = -F.normalize(names.sum(0), dim=0)[None, None]
    recovered = classifier.recover_probabilities(nothing)
    torch.testing.assert_close(recovered, torch.eye(6)[5:][None], atol=1e-6, rtol=0)
    assert classifier.classify_embeds(nothing, ClassPrompts(names, None, 5, "max")).isfinite().all()


def test_a_class_without_names_raises_an_error():
    names = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    classifier = classifier_from(names)
    with pytest.raises(ValueError, match=r"`class_ids` must contain every number from 0: .* missing \[1\]"):
        classifier.set_source(torch.nn.Linear(4, 4), names, torch.tensor([0, 0, 2]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"classifier": "cosine"}, "projection, convex_combination"),
        ({"classifier": "convex_combination"}, "source_vocabulary"),
        ({"classifier": "convex_combination", "source_vocabulary": [["a"], []]}, "source_vocabulary"),
        ({"source_vocabulary": [["a"]]}, "convex_combination"),
        (
            {"classifier": "convex_combination", "source_vocabulary": [["a"]], "class_feature": "pooled"},
            "class_feature='query'",
        ),
        ({"classifier": "convex_combination", "source_vocabulary": [["a"]] * 16}, "at most 15 source classes, got 16"),
    ],
)
def test_invalid_classifier_configurations_raise_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        small_config(**overrides)


def test_configuration_keeps_the_source_vocabulary():
    config = small_config(classifier="convex_combination", source_vocabulary=[["a", "b"], ["c"]])
    assert GKCConfig.from_dict(config.to_dict()).source_vocabulary == [["a", "b"], ["c"]]
