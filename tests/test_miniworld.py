"""The mini-world: generator, words, tiny CLIP, gate, evaluation."""

import json
import math
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_gkc import GKCForOpenVocabSegmentation, GKCProcessor
from train.data.drawn_world import dataset as dataset_module
from train.data.drawn_world.dataset import build_dataset, training_vocabulary
from train.data.drawn_world.parallel import map_scenes
from train.data.drawn_world.shapes import OUTLINES, shape_mask
from train.data.drawn_world.words import (
    CAPTION_WORDS,
    COARSE,
    CONCEPTS,
    NEVER_SEEN,
    SHAPES,
    STUFFS,
    VOID,
    WORDS,
    coarse_label,
)
from train.data.drawn_world.world import TRAINING_SHAPES, TRAINING_STUFFS, draw_scene
from train.data.schema import check_dataset, read_row
from train.metrics import SemanticMetric
from train.miniworld import clip as clip_module
from train.miniworld.clip import MiniCLIP, contrastive_loss, load_clip, train_clip
from train.miniworld.clip_data import CaptionedBatches, collect_crops, collect_other_world
from train.miniworld.evaluate import ProtocolScore, evaluate, format_scores, per_cent
from train.miniworld.gate import format_gate, measure_gate, save_gate
from train.miniworld.lexicon import Lexicon
from train.miniworld.other_world import draw_other_world
from train.miniworld.protocols import IGNORED, all_protocols, concepts, seen
from train.miniworld.settings import CLIPTraining
from train.miniworld.tokenizer import CONTEXT_LENGTH, build_tokenizer
from train.teacher.crops import GRAY, crop_region

TOY = CLIPTraining(steps=6, scenes=12, batch_size=16, half_size_share=0.5)


def region(concept: str, colour: str | None = None, fill: str | None = None) -> dict:
    is_shape = concept in SHAPES
    return {
        "kind": "shape" if is_shape else "stuff",
        "concept": concept,
        "colour": (colour or "red") if is_shape else None,
        "fill": (fill or "solid") if is_shape else None,
        "radius": 12.0 if is_shape else None,
        "aspect": 0.0 if is_shape else None,
        "latents": [0.0, 0.0, 0.0],
    }


# Region crops


def test_crop_of_the_whole_image_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(crop_region(image, np.ones((8, 8), dtype=bool), 8), image)


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_crop_of_one_pixel(keep_aspect):
    image = np.zeros((5, 7, 3), dtype=np.uint8)
    image[4, 6] = (10, 200, 30)
    mask = image[..., 1] > 0
    assert (crop_region(image, mask, 16, keep_aspect) == (10, 200, 30)).all()


def test_crop_is_gray_outside_the_mask_and_keeps_or_stretches():
    image = np.full((20, 20, 3), 255, dtype=np.uint8)
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:6, 3:19] = True  # 4 x 16
    mask[2, 3] = False
    stretched, padded = crop_region(image, mask, 16), crop_region(image, mask, 16, keep_aspect=True)
    assert stretched.shape == padded.shape == (16, 16, 3)
    assert (padded[:6] == GRAY).all() and (padded[10:] == GRAY).all()
    assert (padded[7:10] == 255).all() and padded[6, 0, 0] == GRAY
    assert (stretched[8:] == 255).all() and stretched[0, 0, 0] < 160  # bicubic resizing overshoots


def test_crop_rejects_empty_masks_and_masks_of_another_size():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="empty"):
        crop_region(image, np.zeros((4, 4), dtype=bool), 8)
    with pytest.raises(ValueError, match="must be equal"):
        crop_region(image, np.ones((4, 5), dtype=bool), 8)


# Words


def test_every_word_belongs_to_one_concept_and_is_one_token():
    words = [word for words in WORDS.values() for word in words]
    assert all(len(words) == 6 for words in WORDS.values())
    assert len(set(words)) == len(words)
    tokenizer = build_tokenizer()
    for word in [*words, *CAPTION_WORDS]:
        bos, token, eos = tokenizer(word).input_ids
        assert (bos, eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert token != tokenizer.unk_token_id


def test_tokenizer_special_tokens_and_loading(tmp_path):
    tokenizer = build_tokenizer()
    assert tokenizer.eos_token_id != 2, "transformers' CLIP would pool another token"
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    batch = loaded(["A Red, circle.", "zebra"], padding=True)
    assert loaded.convert_ids_to_tokens(batch.input_ids[0]) == ["<bos>", "a", "red", "circle", "<eos>"]
    assert loaded.convert_ids_to_tokens(batch.input_ids[1]) == ["<bos>", "<unk>", "<eos>", "<pad>", "<pad>"]
    assert batch.attention_mask == [[1] * 5, [1, 1, 1, 0, 0]]
    assert loaded.model_max_length == CONTEXT_LENGTH


def test_coarse_labels():
    assert {coarse_label(concept) for concept in CONCEPTS} == {*COARSE, None}
    assert coarse_label("ring") == "round" and coarse_label("wood") == "wall" and coarse_label("heart") is None


def test_lexicon_names_only_attributes_of_the_region():
    lexicon, random = Lexicon(seed=3), Random(0)
    captions = {lexicon.caption(region("ring", "blue", "dotted"), random) for _ in range(300)}
    allowed = {"ring", "round", "blue", "dotted", "small"}
    known = {word for name in allowed for word in WORDS[name]} | set(CAPTION_WORDS)
    assert {word for caption in captions for word in caption.split()} <= known
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(caption).input_ids) <= CONTEXT_LENGTH for caption in captions)
    assert {lexicon.caption(region("sand"), random).split()[-1] for _ in range(200)} == set(WORDS["sand"])


def test_lexicon_is_seeded_and_every_register_has_second_senses():
    attributes = region("star", "pink", "striped")
    draws = [[Lexicon(seed).caption(attributes, Random(1)) for _ in range(3)] for seed in (0, 0)]
    assert draws[0] == draws[1]
    lexicon, random = Lexicon(0), Random(0)
    senses = [{lexicon.second_sense(kind, random).split()[-1] for _ in range(400)} for kind in range(6)]
    assert sum(len(words) for words in senses) == len(set.union(*senses)), "a word has one second sense"


# Scenes


def test_scene_is_reproducible_and_independent_of_the_others():
    first, again, other = draw_scene(5, 7), draw_scene(5, 7), draw_scene(5, 8)
    assert np.array_equal(first.image, again.image) and first.regions == again.regions
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [32, 96, 150])
def test_scene_of_any_size(size):
    scene = draw_scene(1, 0, size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert set(np.unique(scene.region_index)) - {-1} == set(range(len(scene.regions)))


def test_scene_is_similar_at_every_size():
    small, large = draw_scene(2, 3, 48), draw_scene(2, 3, 96)
    assert small.regions == large.regions
    agreement = (small.region_index == large.region_index[::2, ::2]).mean()
    assert agreement > 0.95


def test_every_shape_and_other_world_kind_is_drawn():
    for shape in OUTLINES:
        mask = shape_mask(shape, (24, 24), 15, 0.3, 0.5, 48)
        assert 0.05 < mask.mean() < 0.6, shape
    generator = np.random.default_rng(0)
    pictures = [draw_other_world(kind, generator, 32) for kind in range(6)]
    assert all(picture.shape == (32, 32, 3) and picture.std() > 5 for picture in pictures)


def test_dataset_schema(tmp_path):
    dataset = build_dataset("train", 6, seed=4, show_progress=False)
    check_dataset(dataset, training_vocabulary().labels, progress=False)
    longer = build_dataset("train", 8, seed=4, show_progress=False)
    assert longer.select(range(6)).to_list() == dataset.to_list()
    dataset.save_to_disk(tmp_path / "saved")
    for row in dataset:
        image, ids = read_row(row)
        assert image.shape == (96, 96, 3)
        assert len(row["segments"]) == len(row["attributes"])
        for segment, attributes in zip(row["segments"], row["attributes"], strict=True):
            assert coarse_label(attributes["concept"]) == COARSE[segment["category_id"]]
            assert (ids == segment["id"]).sum() >= 40


def test_training_scenes_annotate_no_void_class_and_show_no_unseen_class():
    scenes = [draw_scene((4, 0), index, 96, TRAINING_SHAPES, TRAINING_STUFFS) for index in range(40)]
    drawn = {attributes["concept"] for scene in scenes for attributes in scene.regions}
    assert set(VOID) <= drawn and not drawn & set(NEVER_SEEN)
    dataset = build_dataset("train", 40, seed=4, show_progress=False)
    labelled = {attributes["concept"] for row in dataset for attributes in row["attributes"]}
    assert not labelled & {*VOID, *NEVER_SEEN}
    assert any((read_row(row)[1] == 0).any() for row in dataset)


def test_test_set_has_every_concept():
    dataset = build_dataset("test", 40, show_progress=False)
    pairs = {
        (CONCEPTS[segment["category_id"]], attributes["concept"])
        for row in dataset
        for segment, attributes in zip(row["segments"], row["attributes"], strict=True)
    }
    assert pairs == {(concept, concept) for concept in CONCEPTS}
    assert set(dataset_module.test_vocabulary().labels) == {*SHAPES, *STUFFS}


def test_processes_do_not_change_the_scenes():
    single, double = (
        [scene.image.tobytes() for scene in map_scenes(partial(draw_scene, 3), 3, processes, show_progress=False)]
        for processes in (1, 2)
    )
    assert single == double


def test_unknown_split_is_rejected():
    with pytest.raises(ValueError, match="train, test"):
        build_dataset("validation", 1)


# Tiny CLIP


def test_batches_mix_and_resume():
    crops = collect_crops((0, 1), 6, 32, show_progress=False)
    other_world = collect_other_world((0, 2), 3, 32)
    batches = CaptionedBatches(crops, other_world, Lexicon(0), batch_size=20, seed=0)
    pictures, captions = batches.draw()
    assert pictures.shape == (20, 32, 32, 3) and pictures.dtype == torch.uint8 and len(captions) == 20
    state = batches.state_dict()
    expected = batches.draw()
    batches.load_state_dict(state)
    pictures, captions = batches.draw()
    assert torch.equal(pictures, expected[0]) and captions == expected[1]


def test_contrastive_loss_by_hand():
    embeds = torch.eye(3)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    torch.testing.assert_close(contrastive_loss(embeds, embeds, "abc", torch.tensor(2.0)), torch.tensor(expected))
    # Two pictures with one caption share it: the best possible loss is that of a coin.
    twins = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    loss = contrastive_loss(twins, twins, ["a", "a", "b"], torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor(2 / 3 * math.log(2)))


@pytest.fixture
def few_other_worlds(monkeypatch):
    monkeypatch.setattr(clip_module, "OTHER_WORLD_PICTURES", 4)


def test_contrastive_training_lowers_the_loss(few_other_worlds):
    torch.manual_seed(0)
    settings = CLIPTraining(steps=12, scenes=8, batch_size=24)
    model, batches = MiniCLIP.from_scratch(0), clip_module._batches(settings, 1, False)
    pictures, captions = batches.draw()
    batches.draw = lambda: (pictures, captions)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    losses = [clip_module._step(model, batches, optimizer, schedule, settings, True) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_trained_files_and_resuming_to_the_same_weights(tmp_path, monkeypatch, few_other_worlds):
    whole = train_clip(tmp_path / "whole", TOY, save_every=2, gate_scenes=3, show_progress=False)
    names = {path.relative_to(tmp_path / "whole").as_posix() for path in (tmp_path / "whole").rglob("*.*")}
    assert {"vision/model.safetensors", "text/model.safetensors", "text/tokenizer.json", "gate.json"} <= names
    assert not any(name.endswith((".pt", ".partial", ".bin")) for name in names)

    original, calls = clip_module._step, []

    def killed_in_the_fifth_step(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(clip_module, "_step", killed_in_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        train_clip(tmp_path / "killed", TOY, save_every=2, gate_scenes=3, show_progress=False)
    with pytest.raises(ValueError, match="other settings"):
        train_clip(tmp_path / "killed", CLIPTraining(steps=7, scenes=12), show_progress=False)
    monkeypatch.setattr(clip_module, "_step", original)
    resumed = train_clip(tmp_path / "killed", TOY, save_every=2, gate_scenes=3, show_progress=False)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name

    loaded = load_clip(tmp_path / "whole")
    texts = ["a red circle", "lawn"]
    torch.testing.assert_close(loaded.embed_texts(texts), whole.embed_texts(texts))
    assert loaded.embed_images(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 96)


# Gate


def one_hot_texts(texts):
    """Return a text encoder that maps every concept and its synonyms to an axis of its own."""
    names = {word: number for number, words in enumerate(WORDS.values()) for word in words}
    rows = [sum(F.one_hot(torch.tensor(names[word]), len(WORDS)).float() for word in text.split()) for text in texts]
    return F.normalize(torch.stack(rows), dim=-1)


def perfect_images(regions):
    """Return the sum of the embeddings of a region's attributes."""
    texts = []
    for attributes in regions:
        words = [attributes["concept"], attributes["colour"], attributes["fill"], coarse_label(attributes["concept"])]
        texts.append(" ".join(dict.fromkeys(word for word in words if word)))
    return one_hot_texts(texts)


def gate_regions():
    return [
        region(concept, colour, fill)
        for concept in CONCEPTS
        for colour, fill in (("red", "solid"), ("blue", "dotted"))
    ]


def test_gate_of_a_perfect_encoder(tmp_path):
    gate = measure_gate(perfect_images(gate_regions()), gate_regions(), one_hot_texts)
    rows = gate["rows"]
    assert all(rows[row]["accuracy"] == 1.0 for row in ("coarse", "colour", "fill", "sub", "void", "never"))
    assert rows["void"]["regions"] == 6 and rows["coarse"]["regions"] == 2 * 12
    # Two equally frequent embeddings with cosine c are both sqrt((1 + c) / 2) from their mean; a star is 1 of 3 words.
    star = [one for one in gate_regions() if one["concept"] == "star"]
    collapse = measure_gate(perfect_images(star), star, one_hot_texts)["rows"]["coarse"]["collapse"]
    assert collapse == pytest.approx(math.sqrt((1 + 1 / 3) / 2))
    assert gate["synonyms"]["coarse"] == pytest.approx(1.0)
    save_gate(gate, tmp_path / "gate.json")
    assert json.loads((tmp_path / "gate.json").read_text()) == gate


def test_gate_of_a_constant_encoder_is_missed():
    constant = torch.ones(len(gate_regions()), len(WORDS))
    gate = measure_gate(constant, gate_regions(), one_hot_texts)
    assert all(row["collapse"] == pytest.approx(1.0) for row in gate["rows"].values())
    assert sum(row["accuracy"] for row in gate["rows"].values()) < 1
    assert len(gate["misses"]) == 10
    table = format_gate(gate)
    assert table.count("MISS ") == 10 and "MISSED" in table


def test_gate_without_regions_is_a_miss():
    gate = measure_gate(torch.ones(1, len(WORDS)), [region("grass")], one_hot_texts)
    assert "void: no region to measure on" in gate["misses"]
    assert "no region" in format_gate(gate)


# Protocols and scores


def test_protocols():
    protocols = {protocol.name: protocol for protocol in all_protocols()}
    ring = region("ring", "pink", "checkered")
    right = {
        "seen": "round",
        "seen by 5th word": "orbed",
        "seen by 6th word": "roundish",
        "colour": "pink round",
        "fill": "checkered round",
        "sub": "ring",
        "all": "ring",
    }
    for name, protocol in protocols.items():
        number = protocol.class_of(ring)
        assert (protocol.prompts[number][0] if number != IGNORED else None) == right.get(name), name
    assert protocols["seen"].class_of(region("heart")) == IGNORED
    assert protocols["colour"].prompts[protocols["colour"].class_of(region("brick"))] == ("wall",)
    assert protocols["all"].class_of(region("sand")) != IGNORED
    tokenizer = build_tokenizer()
    for protocol in protocols.values():
        assert len(set(protocol.prompts)) == len(protocol.prompts)
        assert all(tokenizer.unk_token_id not in tokenizer(words[0]).input_ids for words in protocol.prompts)


def test_per_cent():
    assert (per_cent(0.1234), per_cent(0.0), per_cent(None)) == ("12.3", "0.0", "-")


def recorded_scores(pairs, num_classes, classes):
    """IoU by class and its mean, as the recorded figures were computed: by torch's own confusion matrix and mean."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for prediction, truth in pairs:
        known = truth >= 0
        index = truth[known].long() * num_classes + prediction[known].long()
        confusion += torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)
    chosen = torch.tensor(list(classes))
    chosen = chosen[confusion.sum(dim=1)[chosen] > 0]
    union = confusion.sum(dim=1) + confusion.sum(dim=0) - confusion.diag()
    iou = confusion.diag().double()[chosen] / union[chosen]
    return dict(zip(chosen.tolist(), iou.tolist(), strict=True)), iou.mean().item()


def test_recorded_figures_are_those_of_the_metrics(monkeypatch, test_rows):
    """The shipped checkpoint on scenes of the recorded protocol: the old computation and `train.metrics` agree."""
    folder = Path(__file__).parent.parent / "hub_card" / "gkc-mini"
    model, processor = (kind.from_pretrained(folder) for kind in (GKCForOpenVocabSegmentation, GKCProcessor))
    pairs, update, compared = {}, SemanticMetric.update, []

    def record(metric, prediction, truth):
        pairs.setdefault(metric, []).append((torch.from_numpy(prediction), torch.from_numpy(truth)))
        update(metric, prediction, truth)

    class Compared(ProtocolScore):
        def result(self):
            found = super().result()
            for group, classes in self.protocol.groups.items():
                iou, miou = recorded_scores(pairs[self.metric], len(self.protocol.prompts), classes)
                columns = self.metric.compute(classes=classes)["iou"]
                assert {index: columns[index] for index in classes if columns[index] is not None} == iou
                # The metric's mean is rounded once, torch's in every sum: the last bit of a double may differ.
                assert found[group]["miou"] == pytest.approx(miou, rel=0, abs=2**-53)
                compared.append(group)
            return found

    monkeypatch.setattr(SemanticMetric, "update", record)
    monkeypatch.setattr("train.miniworld.evaluate.ProtocolScore", Compared)
    evaluate(model, processor, list(test_rows), show_progress=False)
    assert len(compared) == 13 and min(map(len, pairs.values())) > 5


class _Inputs(dict):
    def to(self, device):
        return self


class OracleProcessor:
    """Stands in for GKCProcessor: words by `one_hot_texts`, a picture by its number in `rows`."""

    def __init__(self, rows):
        self.rows = {row["image"].tobytes(): row for row in rows}

    def __call__(self, images=None, text=None, prompt_templates=None, return_tensors=None):
        if text is None:
            return _Inputs(rows=[self.rows[image.tobytes()] for image in images])
        return _Inputs(words=[word for words in text.names for word in words])

    def unknown_classes(self, vocabulary):
        return []


class OracleModel:
    """Has one query per segment with its exact mask (at stride 4) and the embedding of everything true of it."""

    device = torch.device("cpu")
    config = SimpleNamespace(projection_dim=len(WORDS), prompt_reduction="mean")

    def eval(self):
        return self

    def get_class_embeddings(self, words):
        return SimpleNamespace(class_embeds=one_hot_texts(words), class_ids=torch.arange(len(words)))

    def classify(self, query_embeds, class_embeds, class_ids, prompt_reduction):
        no_object = torch.zeros(1, len(WORDS))
        return 100 * query_embeds @ torch.cat([class_embeds, no_object]).T

    def __call__(self, rows, class_embeds, output_stages):
        count = max(len(row["segments"]) for row in rows)
        masks = torch.full((len(rows), count, 24, 24), -20.0)
        embeds = torch.zeros(len(rows), count, len(WORDS))
        for number, row in enumerate(rows):
            ids = torch.from_numpy(read_row(row)[1])
            for query, segment in enumerate(row["segments"]):
                share = F.avg_pool2d((ids == segment["id"]).float()[None], 4)[0]
                masks[number, query] = torch.where(share > 0.5, 20.0, -20.0)
            embeds[number, : len(row["segments"])] = perfect_images(row["attributes"])
        return SimpleNamespace(masks_queries_logits=masks, query_embeds=embeds, content_sizes=None)


@pytest.fixture(scope="module")
def test_rows():
    return build_dataset("test", 24, show_progress=False)


def test_evaluation_of_an_oracle(test_rows):
    rows = list(test_rows)
    result = evaluate(OracleModel(), OracleProcessor(rows), rows, batch_size=5, show_progress=False)
    scores = result["scores"]
    assert result["images"] == 24
    exact = [group for group in scores if "word" not in group]
    assert all(scores[group]["region_accuracy"] == 1.0 for group in exact), scores
    assert all(scores[group]["miou"] > 0.8 for group in exact), scores
    assert result["harmonic_mean"] > 0.8
    table = format_scores(result)
    assert "all/never" in table and "harmonic" in table


def test_evaluation_of_a_constant_model(test_rows):
    class Constant(OracleModel):
        def classify(self, query_embeds, class_embeds, class_ids, prompt_reduction):
            logits = torch.zeros(*query_embeds.shape[:2], len(class_embeds) + 1)
            logits[..., 0] = 10.0
            return logits

    rows = list(test_rows)
    protocols = [seen(), concepts("void", VOID)]
    result = evaluate(Constant(), OracleProcessor(rows), rows, protocols, show_progress=False)
    hearts = sum(
        (np.asarray(read_row(row)[1]) == segment["id"]).sum()
        for row in rows
        for segment in row["segments"]
        if CONCEPTS[segment["category_id"]] == VOID[0]
    )
    voids = sum(
        (np.asarray(read_row(row)[1]) == segment["id"]).sum()
        for row in rows
        for segment in row["segments"]
        if CONCEPTS[segment["category_id"]] in VOID
    )
    assert result["scores"]["void"]["miou"] == pytest.approx(hearts / voids / 3)
    assert result["harmonic_mean"] is None


def test_scores_without_ground_truth_are_null(test_rows):
    """A picture that holds no void concept: strict JSON, and a dash for people."""
    rows = [row for row in test_rows if not {CONCEPTS[s["category_id"]] for s in row["segments"]} & set(VOID)][:1]
    protocols = [seen(), concepts("void", VOID)]
    result = evaluate(OracleModel(), OracleProcessor(rows), rows, protocols, show_progress=False)
    assert result["scores"]["void"] == {"miou": None, "region_accuracy": None}
    assert result["scores"]["seen"]["miou"] > 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    (line,) = [line for line in format_scores(result).splitlines() if line.startswith("void")]
    assert line.split() == ["void", "-", "-"]
