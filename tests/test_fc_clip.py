"""FC-CLIP's checkpoints against recorded numbers: weights, towers, every intermediate, and results."""

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling_gkc import GKCConfig, GKCForOpenVocabSegmentation, GKCImageProcessor, GKCModel
from modeling_gkc.classifiers import combine_class_logits
from modeling_gkc.conversion import clip_convnext_from_open_clip, clip_resnet_from_openai, clip_text_from_openai
from modeling_gkc.conversion.clip import read_weights
from modeling_gkc.conversion.fc_clip import clip_towers, fc_clip_processor, from_fc_clip
from modeling_gkc.export.exporter import export_segmenter
from modeling_gkc.mask_decoder import pool_inside_masks

from .conftest import small_config
from .fc_clip import Recording, empty_weights, published_keys, recording, tokenizer_of_recording

NAMES = ("rn", "convnext")
NUM_IMAGES = {"a": 1, "b": 2}
# Names of the recorded classes that are seen: those of the training classes.
SEEN_NAMES = ("cat", "couch", "road")


def towers(golden: Recording) -> tuple:
    """Build the towers of a recording, whose numbers of heads are not those of published ones."""
    weights = golden.clip_weights()
    text_model = clip_text_from_openai(weights, hidden_act="gelu", num_attention_heads=2)
    if golden.meta["kind"] == "rn":
        return clip_resnet_from_openai(weights, num_attention_heads=4), text_model
    return clip_convnext_from_open_clip(weights), text_model


def class_names(golden: Recording) -> list[list[str]]:
    return [names.replace(", ", ",").split(",") for names in golden.meta["test_class_strings"]]


def with_ensemble(golden: Recording, **changes) -> GKCForOpenVocabSegmentation:
    """Build the recorded model with its seen names and, by default, its geometric ensemble, in fp64.

    In fp64 no rounding of ours adds to that of the recorded numbers. The bounds are the largest differences of the
    published code in fp64 from the recorded numbers, which their README gives to one digit, rounded up.
    """
    image_tower, text_model = towers(golden)
    model = from_fc_clip(golden.weights, image_tower, text_model)
    values = model.config.to_dict() | {"ensemble": "geometric", "source_vocabulary": [[name] for name in SEEN_NAMES]}
    changed = GKCForOpenVocabSegmentation(GKCConfig.from_dict(values | changes))
    names = [name for names in class_names(golden) for name in names]
    seen = golden["text.classifier"][[names.index(name) for name in SEEN_NAMES]]
    changed.load_state_dict(model.state_dict() | {"classifier.seen_embeds": seen})
    return changed.double().eval()


def pixel_values(golden: Recording, case: str) -> Tensor:
    """Normalize the recorded pictures and pad them to one size."""
    mean, std = (torch.tensor(golden.meta[name])[:, None, None] for name in ("pixel_mean", "pixel_std"))
    images = [(golden[f"{case}.image{index}_rgb_u8"] - mean) / std for index in range(NUM_IMAGES[case])]
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2))
    pads = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
    return torch.stack([torch.nn.functional.pad(*pair) for pair in zip(images, pads, strict=True)])


def words(golden: Recording) -> dict[str, Tensor]:
    return {
        "class_embeds": golden["text.classifier"].double(),
        "class_ids": torch.arange(6).repeat_interleave(golden["text.synonyms_per_class"]),
    }


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> Recording:
    return recording(request.param)


@pytest.fixture(scope="module")
def model(golden) -> GKCForOpenVocabSegmentation:
    return with_ensemble(golden)


@torch.no_grad()
def run(model, golden, case="a", **kwargs):
    return model(pixel_values(golden, case).double(), **words(golden), **kwargs)


class TestForward:
    """Every intermediate of the recorded models."""

    def test_states_and_masks(self, model, golden, within):
        outputs = run(model, golden, output_stages=True, output_hidden_states=True)
        for index, state in enumerate(outputs.encoder_hidden_states):
            within("FC-CLIP: backbone", golden.error(f"a.backbone.res{index + 2}", state), 7e-6)
        for index, state in enumerate(outputs.pixel_decoder_hidden_states):
            name = f"a.pixel_decoder.level{index}_stride{32 >> index}"
            within("FC-CLIP: pixel decoder", golden.error(name, state), 7e-6)
        for index, stage in enumerate(outputs.stages):
            error = golden.error(f"a.decoder.stage{index}.mask_logits", stage.masks_queries_logits)
            within("FC-CLIP: mask logits, earlier stages", error, 1.5e-4)
        within("FC-CLIP: mask logits, last stage", error, 8e-5)
        error = golden.error("b.decoder.stage3.mask_logits", run(model, golden, "b").masks_queries_logits)
        within("FC-CLIP: mask logits, last stage", error, 8e-5)

    def test_mask_features(self, model, golden, within):
        kept = []
        hook = model.model.pixel_decoder.register_forward_hook(lambda *args: kept.append(args[-1].mask_features))
        run(model, golden)
        hook.remove()
        within("FC-CLIP: mask features", golden.error("a.pixel_decoder.mask_features", kept[0]), 7e-6)

    def test_learned_class_logits(self, golden, within):
        model = with_ensemble(golden, ensemble="none")
        for index, stage in enumerate(run(model, golden, output_stages=True).stages):
            error = golden.error(f"a.decoder.stage{index}.class_logits", stage.class_queries_logits)
            within("FC-CLIP: class logits", error, 2e-5)
            embeds = torch.nn.functional.normalize(golden[f"a.decoder.stage{index}.class_embed"].double(), dim=-1)
            within("FC-CLIP: class embeddings", (stage.query_embeds - embeds).abs().max(), 1e-5)
        probabilities = stage.class_queries_logits.softmax(dim=-1)
        within("FC-CLIP: probability of void", golden.error("a.void_prob", probabilities[..., -1]), 1e-5)
        learned = stage.class_queries_logits[..., :-1].softmax(dim=-1)
        within("FC-CLIP: in-vocabulary probabilities", golden.error("a.in_vocab.probs", learned), 1e-5)

    @pytest.mark.parametrize("case", ["a", "b"])
    def test_clip_head(self, model, golden, case, within):
        masks = golden[f"{case}.mask_logits_at_clip_res"] > 0
        feature_map = run(model, golden, case, output_hidden_states=True).encoder_hidden_states[-1]
        with torch.no_grad():
            region_embeds = model.model.region_head.embed_regions(feature_map, masks)
        within("FC-CLIP: embeddings by CLIP's head", golden.error(f"{case}.clip_embed", region_embeds), 1.5e-5)
        pooled, is_empty = pool_inside_masks(masks, feature_map)
        assert torch.equal(~is_empty, golden[f"{case}.mask_valid"])
        assert is_empty.any()
        if golden.meta["kind"] == "convnext":
            within("FC-CLIP: pooled features", golden.error(f"{case}.clip_pooled_before_head", pooled), 1e-5)

    @pytest.mark.parametrize("case", ["a", "b"])
    @torch.no_grad()
    def test_out_of_vocabulary_logits(self, model, golden, case, within):
        masks = golden[f"{case}.mask_logits_at_clip_res"] > 0
        feature_map = run(model, golden, case, output_hidden_states=True).encoder_hidden_states[-1]
        region_embeds = torch.nn.functional.normalize(
            model.model.region_head.embed_regions(feature_map, masks), dim=-1
        )
        prompts = model.resolve_vocabulary(**words(golden))
        weights = model.classifier.class_weights(prompts)
        scale = golden.weights["backbone.clip_model.logit_scale"].double().exp().clamp(max=100)
        assert model.classifier.clip_logit_scale.exp() > 100 == scale
        logits = prompts.reduce(scale * region_embeds @ weights[:, :-1].T)
        within("FC-CLIP: logits of CLIP", golden.error(f"{case}.out_vocab.logits_with_void", logits), 4e-5)
        probabilities = logits[..., :-1].softmax(dim=-1)
        within(
            "FC-CLIP: out-of-vocabulary probabilities", golden.error(f"{case}.out_vocab.probs", probabilities), 1e-5
        )

    @pytest.mark.parametrize("case", ["a", "b"])
    @pytest.mark.parametrize(
        ("suffix", "changes"),
        [
            ("", {}),
            (".valid_mask_{other}", {}),
            (".alpha0.7_beta0.9", {"ensemble_alpha": 0.7, "ensemble_beta": 0.9}),
        ],
    )
    def test_class_probabilities(self, golden, case, suffix, changes, within):
        is_resnet = golden.meta["kind"] == "rn"
        if "valid_mask" in suffix:
            suffix, changes = (
                suffix.format(other="off" if is_resnet else "on"),
                {"ensemble_on_valid_mask": not is_resnet},
            )
        name = f"{case}.class_log_probs{suffix}"
        if name not in golden.arrays:
            pytest.skip(f"{name} was not recorded")
        model = with_ensemble(golden, **changes)
        if not suffix:
            assert model.config.ensemble_on_valid_mask == golden.meta["ensemble_on_valid_mask"]
        probabilities = run(model, golden, case).class_queries_logits.softmax(dim=-1)
        error = (probabilities - golden[name].exp()).abs().max()
        within("FC-CLIP: class probabilities of the ensemble", error, 1e-5)

    def test_void_embedding_and_seen_classes(self, model, golden, within):
        prompts = model.resolve_vocabulary(**words(golden))
        weights = model.classifier.class_weights(prompts)
        within("FC-CLIP: embedding of void", golden.error("text.classifier_void_row", weights[-1, :-1]), 1e-6)
        seen = torch.zeros(6, dtype=torch.long).scatter_reduce(
            0, words(golden)["class_ids"], weights[:-1, -1].long(), "amax"
        )
        assert torch.equal(seen, golden["text.seen"])

    def test_single_precision(self, golden, within):
        outputs = {}
        for dtype in (torch.float32, torch.float64):
            model = with_ensemble(golden).to(dtype)
            inputs = {
                name: value.to(dtype) if value.is_floating_point() else value for name, value in words(golden).items()
            }
            with torch.no_grad():
                logits = model(pixel_values(golden, "a").to(dtype), **inputs).class_queries_logits
            outputs[dtype] = logits.softmax(dim=-1).double()
        error = (outputs[torch.float32] - outputs[torch.float64]).abs().max()
        within("FC-CLIP: class probabilities, fp32 against fp64", error, 2e-5)


class TestResults:
    """Semantic, panoptic and instance results in the recorded orders."""

    @pytest.fixture(params=["a0", "b0", "b1"])
    def image(self, request, model, golden) -> tuple[str, int, dict]:
        """Return the case, the number of the picture in it, and the outputs of the model with the sizes to return."""
        case, index = request.param[0], int(request.param[1])
        outputs = run(model, golden, case)
        sizes = [golden[f"{case}.image{other}_rgb_u8"].shape[1:] for other in range(NUM_IMAGES[case])]
        outputs.content_sizes = torch.tensor([list(size) for size in sizes])
        targets = [tuple(golden[f"{case}.image{other}_output_hw"].tolist()) for other in range(NUM_IMAGES[case])]
        return case, index, {"outputs": outputs, "target_sizes": targets}

    def processor(self, resampling: str = "two_step") -> GKCImageProcessor:
        return GKCImageProcessor(mask_resampling=resampling)

    def test_semantic(self, image, golden, within):
        case, index, arguments = image
        result = self.processor().post_process_semantic_segmentation(return_segmentation_scores=True, **arguments)[
            index
        ]
        name = f"{case}.sem_seg{index}"
        suffix = "_every3rd_pixel" if f"{name}_every3rd_pixel" in golden.arrays else ""
        scores = result["segmentation_scores"]
        error = golden.error(name + suffix, scores[:, ::3, ::3] if suffix else scores)
        within("FC-CLIP: semantic scores", error, 2e-5)
        assert torch.equal(result["segmentation"], golden[f"{name}_argmax"].long())

    def test_semantic_only(self, image, golden, within):
        case, index, arguments = image
        if case != "a":
            pytest.skip("this order was recorded for one picture")
        processor = self.processor("two_step_scores")
        result = processor.post_process_semantic_segmentation(return_segmentation_scores=True, **arguments)[index]
        scores = result["segmentation_scores"][:, ::3, ::3]
        error = golden.error("a.sem_seg0_semantic_only_every3rd_pixel", scores)
        within("FC-CLIP: semantic scores, resized themselves", error, 2e-5)

    @pytest.mark.parametrize(("threshold", "overlap"), [(0.0, 0.8), (0.0, 0.0), (0.5, 0.4), (0.8, 0.8)])
    def test_panoptic(self, image, golden, threshold, overlap):
        case, index, arguments = image
        stuff = set(range(6)) - set(golden.meta["thing_class_indices"])
        result = self.processor().post_process_panoptic_segmentation(
            threshold=threshold, overlap_mask_area_threshold=overlap, label_ids_to_fuse=stuff, **arguments
        )[index]
        name = f"{case}.panoptic{index}"
        name += "" if (threshold, overlap) == (0.0, 0.8) else f".object{threshold}_overlap{overlap}"
        assert torch.equal(result["segmentation"], golden[f"{name}.map"].int())
        rows = [[each["id"], each["label_id"], int(not each["was_fused"])] for each in result["segments_info"]]
        assert rows == golden[f"{name}.id_category_isthing"].tolist()

    def test_instances(self, image, golden, within):
        case, index, arguments = image
        things = golden.meta["thing_class_indices"]
        result = self.processor().post_process_instance_segmentation(
            threshold=0.0, top_k=golden.meta["topk_instances"], return_binary_maps=True, **arguments
        )[index]
        rows = [row for row, each in enumerate(result["segments_info"]) if each["label_id"] in things]
        name = f"{case}.instances{index}"
        found = torch.tensor([result["segments_info"][row]["score"] for row in rows])
        recorded = golden[f"{name}.scores"]
        # Of an empty mask the score is 0: the recorded results keep it, ours do not.
        kept = recorded > 0
        labels = torch.tensor([result["segments_info"][row]["label_id"] for row in rows])
        assert torch.equal(labels, golden[f"{name}.classes"][kept])
        masks = np.unpackbits(golden[f"{name}.masks_packbits"].numpy(), axis=-1)
        masks = torch.from_numpy(masks[..., : result["segmentation"].shape[-1]]).bool()[kept]
        flipped = (result["segmentation"][rows] != masks).flatten(1).sum(dim=1)
        assert flipped.sum() <= 3
        # A score is a mean over the mask, which one pixel of a small mask changes.
        errors = (found - recorded[kept]).abs()
        within("FC-CLIP: scores of instances", errors[flipped == 0].max(), 1e-5)
        within("FC-CLIP: scores of instances with a pixel more or less", errors.max(), 1e-4)


class TestEnsemble:
    """The combination of two classifiers."""

    def test_ensembles_match_their_formulas(self):
        logits, clip_logits = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
        weights = torch.rand(3, 4, dtype=torch.float64)
        learned, clip = logits[:, :-1].softmax(dim=-1), clip_logits.softmax(dim=-1)
        void = logits.softmax(dim=-1)[:, -1:]
        expected = {
            "average": (1 - weights) * learned + weights * clip,
            "geometric": learned ** (1 - weights) * clip**weights,
        }
        for ensemble, shares in expected.items():
            shares = shares / shares.sum(dim=-1, keepdim=True)
            combined = combine_class_logits(logits, clip_logits, weights, ensemble).softmax(dim=-1)
            torch.testing.assert_close(combined, torch.cat([shares * (1 - void), void], dim=-1))

    @pytest.mark.parametrize("ensemble", ["average", "geometric"])
    def test_weights_of_0_and_1_and_vanishing_probabilities(self, ensemble):
        logits, clip_logits = torch.tensor([[0.0, 900.0, 1.0]]), torch.tensor([[500.0, -500.0]])
        none, all_of_it = torch.zeros(1, 2), torch.ones(1, 2)
        torch.testing.assert_close(combine_class_logits(logits, clip_logits, none, ensemble), logits)
        combined = combine_class_logits(logits, clip_logits, all_of_it, ensemble).softmax(dim=-1)
        torch.testing.assert_close(combined, torch.tensor([[1.0, 0.0, 0.0]]))
        assert combine_class_logits(logits, clip_logits, none + 0.4, ensemble).isfinite().all()

    def test_none_is_the_default_and_needs_no_head(self, golden, monkeypatch):
        image_tower, text_model = towers(golden)
        model = from_fc_clip(golden.weights, image_tower, text_model)
        assert model.config.ensemble == "none" == GKCConfig().ensemble
        monkeypatch.setattr(model.model.region_head, "embed_regions", None)
        with torch.no_grad():
            outputs = model.double()(pixel_values(golden, "a").double(), **words(golden))
        assert outputs.query_embeds.shape == (1, 20, 64)

    def test_queries_are_classified_again_as_in_the_forward_pass(self, model, golden):
        outputs = run(model, golden)
        assert outputs.query_embeds.shape == (1, 20, 128)
        again = model.classify(outputs.query_embeds, **words(golden))
        torch.testing.assert_close(again, outputs.class_queries_logits, rtol=0, atol=0)

    def test_no_result_depends_on_a_neighbor(self, model, golden):
        """The recorded batch sees the padding that is there for the larger image, ours only without `pixel_mask`."""
        pixels = pixel_values(golden, "b").double()
        sizes = [golden[f"b.image{index}_rgb_u8"].shape[1:] for index in range(2)]
        pixel_mask = torch.zeros(2, 128, 128)
        for mask, (height, width) in zip(pixel_mask, sizes, strict=True):
            mask[:height, :width] = 1
        with torch.no_grad():
            together = model(pixels, pixel_mask, **words(golden))
            for index, (height, width) in enumerate(sizes):
                alone = model(pixels[index : index + 1, :, :height, :width], **words(golden))
                logits = together.class_queries_logits[index : index + 1]
                torch.testing.assert_close(logits, alone.class_queries_logits)
        seen = run(model, golden, "b").class_queries_logits.softmax(dim=-1)
        assert (seen - together.class_queries_logits.softmax(dim=-1)).abs().max() > 1e-3

    def test_training_leaves_the_clip_head_out(self, golden):
        model = with_ensemble(golden).train()
        outputs = model(pixel_values(golden, "a").double(), **words(golden))
        assert outputs.query_embeds.shape[-1] == 64
        outputs.class_queries_logits.sum().backward()
        assert all(parameter.grad is None for parameter in model.model.region_head.parameters())

    def test_save_and_load_with_another_ensemble(self, golden, tmp_path):
        model = with_ensemble(golden)
        expected = run(model, golden).class_queries_logits
        model.float().save_pretrained(tmp_path)
        loaded = GKCForOpenVocabSegmentation.from_pretrained(tmp_path).double()
        torch.testing.assert_close(run(loaded, golden).class_queries_logits, expected)
        assert not any(parameter.requires_grad for parameter in loaded.model.region_head.parameters())
        base = GKCModel.from_pretrained(tmp_path)
        assert not any(parameter.requires_grad for parameter in base.region_head.parameters())
        without = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, ensemble="none").double()
        assert run(without, golden).query_embeds.shape[-1] == 64

    def test_optimized_model_gives_the_same(self, golden):
        model = with_ensemble(golden).float()
        optimized = model.optimize_for_inference(compile=False)
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in words(golden).items()}
        with torch.no_grad():
            results = [each(pixel_values(golden, "a"), **inputs).class_queries_logits for each in (model, optimized)]
        torch.testing.assert_close(results[0].softmax(dim=-1), results[1].softmax(dim=-1), rtol=0, atol=1e-4)

    def test_export(self, golden, tmp_path):
        words = "cat, kitten; couch; road, street"
        tokenizer = tokenizer_of_recording()
        model = from_fc_clip(golden.weights, *towers(golden), tokenizer, words, "geometric")
        exported = export_segmenter(
            model,
            fc_clip_processor(tokenizer),
            tmp_path / "out",
            format="torch-export",
            size=64,
            fixed=True,
            check=True,
        )
        assert exported.difference < 1e-4
        assert exported.settings["outputs"]["query_embeds"][-1] == 128

    def test_mask_features_serve_the_projection_too(self):
        model = GKCForOpenVocabSegmentation(small_config(class_feature="query+mask_features")).eval()
        with torch.no_grad():
            outputs = model(torch.randn(1, 3, 64, 64), class_embeds=torch.eye(model.config.projection_dim)[:3])
        assert outputs.class_queries_logits.isfinite().all()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"ensemble": "geometric"}, "`ensemble` needs `classifier='fc_clip'`"),
            ({"classifier": "fc_clip"}, "needs `class_feature='query\\+mask_features'`"),
            ({"ensemble": "both"}, "`ensemble` must be one of none, average, geometric"),
            ({"ensemble_beta": 2.0}, "`ensemble_beta` must"),
            (
                {"classifier": "fc_clip", "class_feature": "query+mask_features", "backbone_config": "resnet"},
                "needs a CLIP image encoder as backbone",
            ),
            (
                {"classifier": "fc_clip", "class_feature": "query+mask_features", "backbone_config": "other width"},
                "must be that of the text encoder",
            ),
        ],
    )
    def test_configurations_that_cannot_work_are_refused(self, values, message):
        backbones = {
            "resnet": {"model_type": "resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "other width": {"model_type": "clip_resnet", "projection_dim": 7},
        }
        if "backbone_config" in values:
            values = values | {"backbone_config": backbones[values["backbone_config"]]}
        with pytest.raises(ValueError, match=message):
            GKCConfig(**values)


class TestConversion:
    """Weights of the published configurations."""

    @pytest.mark.parametrize("config", sorted(published_keys()))
    def test_published_key_lists_convert_whole(self, config):
        weights = empty_weights(config)
        with torch.device("meta"):
            model = from_fc_clip(weights, *clip_towers(weights))
        published = published_keys()[config]
        assert model.config.projection_dim == published["clip_embed_dim"]
        assert model.config.ensemble_on_valid_mask == published["ensemble_on_valid_mask"]
        if published["attention_pool_heads"]:
            assert model.config.backbone_config.num_attention_heads == published["attention_pool_heads"]
        assert (model.config.num_queries, model.config.decoder_layers, model.config.encoder_layers) == (250, 9, 6)
        left_out = sum(name.startswith("criterion.") for name in weights)
        packed = sum(".in_proj_" in name for name in weights)
        counters = sum("num_batches_tracked" in name for name in weights)
        # Packed projections are three each; the seen names are added.
        assert len(model.state_dict()) == len(weights) - left_out + 2 * packed + 1, counters

    def test_missing_unexpected_and_foreign_weights_are_named(self, golden):
        weights = dict(golden.weights)
        pair = towers(golden)
        del weights["sem_seg_head.predictor.decoder_norm.bias"]
        weights["sem_seg_head.extra"] = torch.zeros(1)
        with pytest.raises(
            ValueError, match=r"missing .*'model\.mask_decoder\.layer_norm\.bias'.*sem_seg_head\.extra"
        ):
            from_fc_clip(weights, *pair)
        with pytest.raises(ValueError, match="not the weights of FC-CLIP"):
            from_fc_clip(golden.clip_weights(), *pair)

    @pytest.mark.parametrize(
        ("name", "method"), [("cdt.cross_atten.mlp.weight", "MAFT\\+"), ("mask_adapter.a", "Mask-Adapter")]
    )
    def test_methods_built_on_it_are_refused_by_name(self, golden, name, method):
        with pytest.raises(ValueError, match=f"These are weights of {method}, which needs modules"):
            from_fc_clip(golden.weights | {name: torch.zeros(1)}, *towers(golden))

    def test_towers_of_another_clip_are_refused(self, golden):
        image_tower, text_model = towers(golden)
        text_model.config.projection_dim = 32
        with pytest.raises(ValueError, match="trained on a CLIP of width 64, but the text encoder has 32"):
            from_fc_clip(golden.weights, image_tower, text_model)

    def test_training_classes_are_stored_and_seen(self, golden):
        """With a tokenizer: the vocabulary with its synonyms, in FC-CLIP's 14 prompts."""
        tokenizer = tokenizer_of_recording()
        model = from_fc_clip(
            golden.weights, *towers(golden), tokenizer, "cat, kitten; couch; road, street", "geometric"
        )
        assert model.vocabulary.names == [["cat", "kitten"], ["couch"], ["road", "street"]]
        assert model.config.source_vocabulary == model.vocabulary.names
        processor = fc_clip_processor(tokenizer)
        prompts = model.resolve_vocabulary(**processor(text="kitten; street, couch; sofa", return_tensors="pt"))
        assert model.classifier.class_weights(prompts)[:, -1].tolist() == [1, 1, 1, 0, 0]

    def test_processor(self, golden, within):
        processor = fc_clip_processor(tokenizer_of_recording())
        prompts = [template.format("x") for template in processor.prompt_templates]
        assert [prompt.replace("\u00a0", " ").replace("x", "cat") for prompt in prompts] == golden.meta[
            "first_prompts"
        ][:14]
        image = golden["a.image0_rgb_u8"]
        inputs = processor.image_processor(image, do_resize=False, return_tensors="pt")
        within("FC-CLIP: input", golden.error("a.input", inputs.pixel_values), 2e-6)
        assert inputs.pixel_mask[0].sum() == 100 * 150
        text = processor(text="umbrella", return_tensors="pt")
        assert len(text.input_ids) == 14

    def test_article_stays_a(self):
        from modeling_gkc.prompt_templates import fill_template, resolve_templates

        prompts = [fill_template(template, "umbrella") for template in resolve_templates("fc_clip")]
        assert prompts[:2] == ["a photo of a umbrella.", "This is a photo of a umbrella"]

    def test_weights_are_read_under_model(self, golden, tmp_path):
        torch.save({"model": golden.weights, "iteration": 9}, tmp_path / "fcclip.pth")
        read = read_weights(tmp_path / "fcclip.pth")
        assert read.keys() == golden.weights.keys()
