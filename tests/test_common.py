"""Tests of what users of transformers expect of any model; `common_checks.py` lists which test covers which check."""

import copy
import inspect
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, CLIPTextConfig, PreTrainedModel
from transformers.utils import ModelOutput

from modeling_gkc import (
    CLIPResNetBackbone,
    CLIPResNetConfig,
    CLIPResNetVisionModel,
    GKCConfig,
    GKCForOpenVocabSegmentation,
    GKCModel,
)

from . import common_checks
from .common_models import (
    CASES,
    COMMON,
    HIDDEN_STATES,
    SEGMENTERS,
    Case,
    largest_difference,
    result,
    run,
    saved_and_loaded,
    tensors_of,
)
from .conftest import small_config

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@pytest.fixture(params=COMMON)
def case(request) -> Case:
    return COMMON[request.param]


class TestWeights:
    """Initialization, saving and loading."""

    def test_save_load(self, case, tmp_path):
        model, inputs = case.model(), case.inputs()
        first = saved_and_loaded(model, tmp_path / "first")
        assert {path.name for path in (tmp_path / "first").iterdir()} == {"config.json", "model.safetensors"}
        second = saved_and_loaded(first, tmp_path / "second")
        second.save_pretrained(tmp_path / "third")
        for loaded in (first, second):
            assert not loaded.training
            assert largest_difference(run(model, inputs), run(loaded, inputs)) == 0
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("second", "third")]
        assert configs[0] == configs[1]

    def test_from_pretrained_no_checkpoint(self, case):
        model = case.model()
        loaded = case.model_class.from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert largest_difference(model.state_dict(), loaded.state_dict()) == 0

    def test_all_weights_are_saved_under_their_names(self, case, tmp_path):
        """No weight is omitted or shares its memory, and no name of this library is changed when saving."""
        model = case.model()
        model.save_pretrained(tmp_path)
        saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
        assert len(saved) == len(state)
        # transformers saves some of its own models under the names of earlier releases.
        theirs = () if isinstance(model.config, CLIPResNetConfig) else ("model.backbone.", "backbone.", "text_model.")
        ours = {name for name in state if not name.startswith(theirs)}
        assert ours <= saved.keys() and all(torch.equal(saved[name], state[name]) for name in ours)
        assert not model._keys_to_ignore_on_save and not model.all_tied_weights_keys
        pointers = [tensor.data_ptr() for tensor in state.values() if tensor.numel()]
        assert len(pointers) == len(set(pointers))

    def test_load_contiguous_weights(self, case, tmp_path):
        loaded = saved_and_loaded(case.model(), tmp_path)
        assert all(parameter.is_contiguous() for parameter in loaded.parameters())

    def test_torch_save_load(self, case, tmp_path):
        model, inputs = case.model(), case.inputs()
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        loaded = case.model_class.from_pretrained(tmp_path, use_safetensors=False)
        assert largest_difference(run(model, inputs), run(loaded, inputs)) == 0

    def test_can_use_safetensors(self, case, tmp_path):
        case.model().save_pretrained(tmp_path)
        _, information = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            assert not information[name], name

    def test_all_missing_weights_are_reported_and_initialized(self, case, tmp_path):
        model = case.model()
        model.save_pretrained(tmp_path)
        save_file({"something": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
        loaded, information = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
        ignored = "|".join(loaded._keys_to_ignore_on_load_missing) or "$^"  # of transformers' backbones
        expected = {name for name in model.state_dict() if not re.search(ignored, name)}
        assert set(information["missing_keys"]) == expected
        assert set(information["unexpected_keys"]) == {"something"}
        assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())

    @pytest.mark.parametrize("name", [*SEGMENTERS, "image path"])
    def test_correct_missing_keys(self, name, tmp_path):
        """The head model loads a checkpoint of the base model and reports missing weights, and the reverse."""
        segmenter = CASES[name].model(CASES[name].config())
        if name == "image path":
            head = CASES["segmenter"].model()
            head.save_pretrained(tmp_path)
            loaded, information = GKCModel.from_pretrained(tmp_path, output_loading_info=True)
            assert not information["missing_keys"]
            assert largest_difference(loaded.state_dict(), head.model.state_dict()) == 0
            return
        segmenter.model.save_pretrained(tmp_path)
        loaded, information = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, output_loading_info=True)
        expected = {key for key in segmenter.state_dict() if not key.startswith("model.")}
        assert set(information["missing_keys"]) == expected and not information["unexpected_keys"]
        assert largest_difference(loaded.model.state_dict(), segmenter.model.state_dict()) == 0

    def test_weights_of_mismatched_shape(self, case, tmp_path):
        model = case.model()
        model.save_pretrained(tmp_path)
        other, changes = (
            case.config(),
            {CLIPResNetBackbone: ("width", 16), CLIPResNetVisionModel: ("projection_dim", 24)},
        )
        setattr(other, *changes.get(case.model_class, ("num_queries", 12)))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            case.model_class.from_pretrained(tmp_path, config=other)
        loaded, information = case.model_class.from_pretrained(
            tmp_path, config=other, ignore_mismatched_sizes=True, output_loading_info=True
        )
        mismatched = {entry[0] for entry in information["mismatched_keys"]}
        assert mismatched
        for key, tensor in loaded.state_dict().items():
            if key in mismatched:
                assert tensor.isfinite().all() and tensor.shape != model.state_dict()[key].shape
            else:
                torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=0)
        run(loaded, case.inputs())

    def test_can_init_all_missing_weights(self, case, monkeypatch):
        """Weights created on the meta device and initialized later equal those that the constructor creates."""
        initialize = PreTrainedModel._initialize_weights

        def seeded(*args, **kwargs):
            torch.manual_seed(1)
            initialize(*args, **kwargs)

        monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded)
        constructed = case.model()
        loaded = case.model_class.from_pretrained(None, config=case.config(), state_dict={})
        assert largest_difference(constructed.state_dict(), loaded.state_dict()) == 0

    def test_init_weights_can_init_buffers(self, case, monkeypatch):
        with torch.device("meta"):
            model = case.model()
        model.to_empty(device="cpu")
        model.init_weights()
        monkeypatch.setattr(PreTrainedModel, "_initialize_weights", lambda *args, **kwargs: None)
        constructed = dict(case.model().named_buffers())
        assert largest_difference(constructed, dict(model.named_buffers())) == 0

    def test_all_tensors_are_parameter_or_buffer(self, case):
        with torch.device("meta"):
            model = case.model()
        model.to_empty(device="cpu")
        model.init_weights()
        for name, tensor in tensors_of(run(model, case.inputs())):
            assert tensor.device.type == "cpu" and tensor.isfinite().all(), name

    def test_can_be_initialized_on_meta(self, case):
        with torch.device("meta"):
            model = case.model()
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}

    def test_cannot_load_with_meta_device_context_manager(self, case, tmp_path):
        case.model().save_pretrained(tmp_path)
        with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
            case.model_class.from_pretrained(tmp_path)

    def test_default_dtype_is_respected(self, case):
        torch.set_default_dtype(torch.float64)
        try:
            model, inputs = case.model(), case.inputs()
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        for name, tensor in tensors_of(run(model, inputs)):
            assert not tensor.is_floating_point() or tensor.dtype == torch.float64, name

    def test_model_is_small(self, case):
        assert case.model().num_parameters() < 500_000


class TestOutputs:
    """Inputs and outputs of a call."""

    def test_determinism(self, case):
        model, inputs = case.model(), case.inputs()
        first = run(model, inputs)
        torch.rand(1)
        assert largest_difference(first, run(model, inputs)) == 0

    def test_forward_signature(self, case):
        names = list(inspect.signature(case.model_class.forward).parameters)
        assert names[1] == case.model_class.main_input_name == "pixel_values"
        assert {"output_hidden_states", "output_attentions"} <= set(names)
        with pytest.raises(TypeError, match="unexpected keyword"):
            case.model()(**case.inputs(), output_hidden_state=True)

    def test_model_outputs_equivalence(self, case):
        model, inputs = case.model(), case.inputs()
        states = {"output_hidden_states": True}
        for arguments in ({}, states, case.labels(), case.labels() | states):
            torch.manual_seed(1)
            as_dict = run(model, inputs, **arguments)
            torch.manual_seed(1)
            as_tuple = run(model, inputs, **arguments, return_dict=False)
            assert isinstance(as_dict, ModelOutput) and type(as_tuple) is tuple
            assert largest_difference(as_dict.to_tuple(), as_tuple) == 0

    def test_return_dict_of_the_configuration(self, case):
        """Also holds where one model calls another."""
        model, inputs = case.model(), case.inputs()
        expected = run(model, inputs)
        model.config.return_dict = False
        if isinstance(model.base_model, GKCModel) and isinstance(model.base_model.backbone, CLIPResNetBackbone):
            model.config.backbone_config.return_dict = False
        assert largest_difference(expected.to_tuple(), run(model, inputs)) == 0
        assert largest_difference(expected, run(model, inputs, return_dict=True)) == 0

    def test_model_forward_default_config_values(self, case):
        """The token ids that only language models use are removed."""
        values = case.config().to_diff_dict()
        for part in (values, values.get("text_config", {})):
            for name in ("pad_token_id", "bos_token_id", "sep_token_id", "tie_word_embeddings"):
                part.pop(name, None)
        config = type(case.config())(**values)
        for _, tensor in tensors_of(run(case.model(config), case.inputs())):
            assert tensor.isfinite().all()

    def test_hidden_states_output(self, case):
        inputs = case.inputs()
        by_argument = run(case.model(), inputs, output_hidden_states=True)
        config = case.config()
        config.output_hidden_states = True
        by_config = run(case.model(config), inputs)
        names = HIDDEN_STATES[case.model_class]
        for outputs in (by_argument, by_config):
            shapes = [[tuple(state.shape) for state in outputs[name]] for name in names]
            assert shapes == expected_shapes(case)
        assert all(run(case.model(), inputs).get(name) is None for name in names)
        assert all(run(case.model(config), inputs, output_hidden_states=False).get(name) is None for name in names)

    def test_hidden_states_do_not_change_outputs(self, case):
        model, inputs = case.model(), case.inputs()
        plain, asked = run(model, inputs), run(model, inputs, output_hidden_states=True)
        assert set(asked) - set(plain) == set(HIDDEN_STATES[case.model_class])
        assert largest_difference(plain, {name: asked[name] for name in plain}) == 0

    def test_retain_grad_hidden_states_attentions(self, case):
        """The result depends on every hidden state and attention weight that is returned."""
        model = case.model_class._from_config(case.config(), attn_implementation="eager")
        wants_attentions = case.model_class is not CLIPResNetBackbone
        outputs = model(**case.inputs(), output_hidden_states=True, output_attentions=wants_attentions)
        names = [name for name in outputs if name.endswith(("hidden_states", "attentions"))]
        assert len(names) == len(HIDDEN_STATES[case.model_class]) + expected_attention_fields(case)
        states = {f"{name} {index}": state for name in names for index, state in enumerate(outputs[name])}
        for state in states.values():
            state.retain_grad()
        result(outputs).square().sum().backward()
        without = [name for name, state in states.items() if state.grad is None or not state.grad.abs().sum() > 0]
        assert without == []

    def test_get_and_set_input_embeddings(self, case):
        """The input embedding is the first layer that processes pixels."""
        model = case.model()
        embeddings = model.get_input_embeddings()
        seen = []
        embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        inputs = case.inputs()
        run(model, inputs)
        assert len(seen) == 1 and torch.equal(seen[0], inputs["pixel_values"])
        replacement = copy.deepcopy(embeddings)
        model.set_input_embeddings(replacement)
        assert model.get_input_embeddings() is replacement and model.get_output_embeddings() is None

    def test_enable_input_require_grads(self, case):
        model, inputs = case.model().requires_grad_(False), case.inputs()
        assert not result(model(**inputs)).requires_grad
        model.enable_input_require_grads()
        assert result(model(**inputs)).requires_grad and not inputs["pixel_values"].requires_grad
        model.disable_input_require_grads()
        assert not result(model(**inputs)).requires_grad

    def test_resize_token_embeddings_is_an_error(self, case):
        with pytest.raises(ValueError, match="no token embeddings"):
            case.model().resize_token_embeddings(100)

    def test_models_cannot_generate(self, case):
        assert not case.model_class.can_generate()

    def test_base_model_prefix(self, case):
        model = case.model()
        expected = model.model if case.model_class is GKCForOpenVocabSegmentation else model
        assert model.base_model is expected


def expected_shapes(case: Case) -> list[list[tuple[int, ...]]]:
    """Return the shapes of the hidden states of each field for two images of 64 x 96."""
    config, grids = case.config(), [(16, 24), (8, 12), (4, 6), (2, 3)]
    if isinstance(config, CLIPResNetConfig):
        return [[(2, width, *grid) for width, grid in zip(config.hidden_sizes, [grids[0], *grids], strict=True)]]
    channels = case.model().base_model.backbone.channels
    return [
        [(2, width, *grid) for width, grid in zip(channels, grids, strict=True)],
        [(2, config.hidden_size, *grid) for grid in grids[:0:-1]],
        [(2, config.num_queries, config.hidden_size)] * (config.decoder_layers + 1),
    ]


def expected_attention_fields(case: Case) -> int:
    return {CLIPResNetBackbone: 0, CLIPResNetVisionModel: 1}.get(case.model_class, 2)


class TestBackbone:
    """Checks that transformers has for backbones only."""

    def test_stages_are_selected_by_configuration(self):
        names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        config = CLIPResNetConfig()
        assert config.stage_names == names
        # All four stages instead of the last one, as every model here requests.
        assert config.out_features == names[1:] and config.out_indices == [1, 2, 3, 4]
        for given in ({"out_features": ["stage1", "stage3"]}, {"out_indices": [1, 3]}):
            config = CLIPResNetConfig(**given)
            assert config.out_features == ["stage1", "stage3"] and config.out_indices == [1, 3]
        config = CLIPResNetConfig(out_indices=[-2, -1])
        assert config.out_features == ["stage3", "stage4"]
        with pytest.raises(ValueError):
            CLIPResNetConfig(out_features=["stage1", "stage2"], out_indices=[0, 2])

    def test_backbone_common_attributes(self):
        backbone = CASES["backbone"].model()
        assert backbone.num_features == [8, 32, 64, 128, 256] and backbone.channels == [32, 64, 128, 256]
        assert backbone.out_feature_channels == dict(zip(backbone.stage_names, backbone.num_features, strict=True))
        assert (backbone.out_indices, backbone.has_attentions) == ([1, 2, 3, 4], False)

    @pytest.mark.parametrize("out_indices", [[4], [0], [1, 2, 3, 4], [-2, -1], [0, 4]])
    def test_selected_stages_are_returned(self, out_indices, tmp_path):
        config = CASES["backbone"].config()
        weights, inputs = CASES["backbone"].model(config).state_dict(), CASES["backbone"].inputs()
        everything = run(CASES["backbone"].model(config), inputs, output_hidden_states=True).hidden_states
        config = CLIPResNetConfig(
            **CASES["backbone"].config().to_dict() | {"out_features": None, "out_indices": out_indices}
        )
        backbone = CASES["backbone"].model(config)
        backbone.load_state_dict(weights)
        outputs = run(backbone, inputs)
        assert backbone.channels == [feature_map.shape[1] for feature_map in outputs.feature_maps]
        expected = [run(backbone, inputs, output_hidden_states=True).hidden_states[index] for index in out_indices]
        assert largest_difference(outputs.feature_maps, expected) == 0
        assert [tuple(state.shape) for state in everything] == expected_shapes(CASES["backbone"])[0]
        config.save_pretrained(tmp_path)
        assert CLIPResNetConfig.from_pretrained(tmp_path).out_indices == config.out_indices

    def test_tower_and_backbone_share_a_checkpoint(self, tmp_path):
        tower = CASES["image encoder"].model()
        tower.save_pretrained(tmp_path)
        backbone, information = CLIPResNetBackbone.from_pretrained(tmp_path, output_loading_info=True)
        assert not information["missing_keys"]
        assert {key.split(".")[0] for key in information["unexpected_keys"]} == {"attention_pooling"}
        inputs = CASES["backbone"].inputs()
        assert torch.equal(run(backbone, inputs).feature_maps[-1], run(tower, inputs).last_hidden_state)


class TestConfiguration:
    """Configuration files and subclasses."""

    def test_configuration_round_trips(self, case, tmp_path):
        config = case.config()
        config.to_json_file(tmp_path / "some.json")
        config.save_pretrained(tmp_path / "folder" / "sub")
        others = [
            type(config).from_json_file(tmp_path / "some.json"),
            type(config).from_pretrained(tmp_path / "folder" / "sub"),
            type(config).from_pretrained(tmp_path / "folder", subfolder="sub"),
            AutoConfig.from_pretrained(tmp_path / "folder" / "sub"),
            type(config).from_dict(json.loads(config.to_json_string())),
            type(config)(**config.to_diff_dict()),
            copy.deepcopy(config),
            pickle.loads(pickle.dumps(config)),
        ]
        for other in others:
            assert type(other) is type(config) and comparable(other) == comparable(config)

    def test_default_configuration_is_valid(self, case):
        assert comparable(type(case.config())()) != comparable(case.config())

    @pytest.mark.parametrize("name", ["segmenter", "image encoder"])
    def test_id2label_of_the_configuration(self, name):
        config = type(CASES[name].config())(num_labels=5)
        assert len(config.id2label) == len(config.label2id) == config.num_labels == 5
        config.num_labels = 3
        assert len(config.id2label) == len(config.label2id) == 3

    def test_text_configuration_is_read_from_a_full_checkpoint(self, tmp_path):
        config = small_config()
        config.save_pretrained(tmp_path)
        assert comparable(CLIPTextConfig.from_pretrained(tmp_path)) == comparable(config.text_config)

    def test_keyword_arguments_override_the_stored_configuration(self, tmp_path):
        small_config().save_pretrained(tmp_path)
        config, unused = GKCConfig.from_pretrained(tmp_path, num_queries=7, nothing=1, return_unused_kwargs=True)
        assert config.num_queries == 7 and unused == {"nothing": 1}

    def test_subclass_with_own_model_type(self, tmp_path):
        """Saving, loading and Auto classes work for a subclass with a model type of its own."""
        try:
            AutoConfig.register(OwnConfig.model_type, OwnConfig)
            AutoModel.register(OwnConfig, OwnModel)
            config = OwnConfig(**small_config().to_diff_dict() | {"model_type": "own_gkc", "favourite": "dog"})
            model = OwnModel(config).eval()
            model.save_pretrained(tmp_path)
            loaded, inputs = AutoModel.from_pretrained(tmp_path), CASES["segmenter"].inputs()
            assert type(loaded) is OwnModel and loaded.config.favourite == "dog"
            assert largest_difference(run(model, inputs), run(loaded, inputs)) == 0
        finally:
            CONFIG_MAPPING._extra_content.pop(OwnConfig.model_type, None)
            MODEL_MAPPING._extra_content.pop(OwnConfig, None)


class OwnConfig(GKCConfig):
    model_type = "own_gkc"
    favourite: str = "cat"


class OwnModel(GKCForOpenVocabSegmentation):
    config_class = OwnConfig


def comparable(config) -> dict:
    """Return a configuration without the fields that record when and from where it was loaded."""
    values = config if isinstance(config, dict) else config.to_dict()
    without = ("transformers_version", "_name_or_path", "architectures", "dtype", "model_type")
    return {
        name: comparable(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in without
    }


class TestList:
    """Completeness of the table of transformers' common checks."""

    def test_every_check_has_a_test_or_a_reason(self):
        for check, entry in common_checks.entries():
            assert entry.tests or len(entry.reason) > 15, f"{check}: neither a test nor a reason"
            for test in entry.tests:
                assert test in common_checks.defined_tests(), f"{check}: there is no test {test}"

    def test_every_common_test_is_listed(self):
        listed = {test for _, entry in common_checks.entries() for test in entry.tests}
        unlisted = {test for test in common_checks.defined_tests(common_checks.OWN_FILES) if test not in listed}
        assert unlisted == set()

    def test_documented_numbers_of_checks_are_right(self):
        numbers = re.findall(r"\d+", common_checks.table().splitlines()[0])[1:]
        (line,) = [line for line in BENCHMARKS.read_text().splitlines() if "transformers' own test suites" in line]
        assert re.findall(r"\d+", line) == numbers
