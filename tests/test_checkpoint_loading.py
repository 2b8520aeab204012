"""Folders that others made: nothing in them is run, nothing outside is read, and damage is one line."""

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from configuration import Recipe
from modeling_gkc import CLIPResNetConfig, GKCConfig, GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor
from modeling_gkc.checkpoint_loading import load_checkpoint_parts
from modeling_gkc.cli.common import UserError, load_checkpoint
from modeling_gkc.cli.main import main
from modeling_gkc.weight_renaming import rename_old_checkpoint
from train.engine.builders import load_student
from train.evaluate.adapters import model_type
from train.teacher.clip_towers import load_clip_towers

from .common_models import convex_config, largest_difference, tiny_config
from .conftest import small_config, word_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    processor = GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())
    model = GKCForOpenVocabSegmentation(small_config(encoder_layers=1, decoder_layers=1))
    model.set_vocabulary("disc; lawn, grass", processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


def change(folder: Path, name: str, *path_and_value: Any) -> None:
    """Set a value deep inside a JSON file."""
    *path, key, value = path_and_value
    values = json.loads((folder / name).read_text())
    place = values
    for step in path:
        place = place[step]
    place[key] = value
    (folder / name).write_text(json.dumps(values))


FIELDS = [
    ("hidden_size", "96"),
    ("hidden_size", True),
    ("hidden_size", 2**20),
    ("encoder_layers", 1_000_000),
    ("decoder_layers", 0),
    ("num_queries", 1.5),
    ("dropout", math.nan),
    ("logit_scale_init_value", math.inf),
    ("class_weight", math.nan),
    ("oversample_ratio", math.inf),
    ("classifier", 3),
    ("vocabulary", [[1]]),
    ("vocabulary", [[]]),
    ("vocabulary", [["\u200b"]]),
    ("vocabulary_num_prompts", 0),
    ("backbone_config", "resnet"),
    ("backbone_config", {"model_type": ["resnet"]}),
    ("backbone_config", {"depths": 3}),
    ("backbone_config", {"depths": [1, 1, 1, 10**6]}),
    ("backbone_config", {"width": "24"}),
    ("backbone_config", {"id2label": 5}),
    ("text_config", {"hidden_size": "512"}),
    ("text_config", {"num_hidden_layers": 0}),
    ("text_config", {"num_hidden_layers": -1}),
    ("text_config", {"num_hidden_layers": 10**6}),
    ("text_config", {"hidden_act": "none"}),
    ("text_config", {"layer_norm_eps": math.nan}),
    ("text_config", {"eos_token_id": -1}),
    ("text_config", [1]),
    ("dtype", True),
    ("quantization_config", 5),
    ("id2label", {"0": "a", "x": "b"}),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_invalid_field_raises_a_value_error_that_names_it(field, value):
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        GKCConfig.from_dict({"vocabulary": [["disc"]], "vocabulary_num_prompts": 1, field: value})
    message = str(caught.value)
    assert f"`{field}" in message and "\n" not in message
    if isinstance(value, dict) and field != "id2label":
        assert next(iter(value)) in message
    assert time.process_time() - began < 2


def test_end_token_outside_of_the_vocabulary_raises():
    with pytest.raises(ValueError, match=r"`text_config.eos_token_id` must be a whole number in 0\.\.63, got 64"):
        GKCForOpenVocabSegmentation(small_config(text_config=CLIPTextConfig(vocab_size=64, eos_token_id=64)))


def test_invalid_fields_of_the_image_encoder_raise():
    for values in ({"width": "24"}, {"depths": [1, 2]}, {"depths": ["a"] * 4}, {"image_size": 2**30}, {"width": None}):
        with pytest.raises(ValueError, match=f"`{next(iter(values))}`"):
            CLIPResNetConfig(**values)
    assert CLIPResNetConfig(stage_names=["other"]).stage_names[0] == "stem"


def test_labels_follow_the_stored_vocabulary():
    values = {"vocabulary": [["a"], ["b"]], "vocabulary_num_prompts": 2, "id2label": {"0": "x", "1": "b"}}
    assert GKCConfig.from_dict({**values, "label2id": {"z": 7}}).label2id == {"x": 0, "b": 1}
    with pytest.raises(ValueError, match=r"`id2label` must name the 2 stored classes 0\.\.1"):
        GKCConfig.from_dict({**values, "id2label": {"0": "x"}})


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def set_value(name: str, *path_and_value: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, name, *path_and_value)


def weights(edit: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


DAMAGES = {
    "a field of a wrong type": (set_value("config.json", "hidden_size", "96"), "`hidden_size` must be"),
    "no layers of text": (set_value("config.json", "text_config", "num_hidden_layers", 0), "text_config.num_hidden_"),
    "fewer layers": (set_value("config.json", "decoder_layers", 0), "`decoder_layers` must be positive"),
    "more layers": (set_value("config.json", "text_config", "num_hidden_layers", 2), "lacks weights: text_model"),
    "a million layers": (set_value("config.json", "encoder_layers", 10**6), "`encoder_layers` must be at most"),
    "other widths": (set_value("config.json", "encoder_ffn_dim", 32), "layers.0.fc1.weight (64, 32) for (32, 32)"),
    "a list for a configuration": (write("config.json", b"[]"), "is not a GKC checkpoint"),
    "a nested configuration": (write("config.json", b"[" * 10**5), "config.json cannot be read: RecursionError"),
    "a huge number": (
        write("config.json", b'{"model_type": "gkc", "hidden_size": ' + b"9" * 5000 + b"}"),
        "config.json cannot be read: Exc",
    ),
    "zeros": (write("config.json", bytes(100)), "is not a GKC checkpoint"),
    "half a character": (set_value("config.json", "dtype", "\ud800"), "no attribute '\\ud800'"),
    "an added weight": (weights(lambda t: t.update(extra=torch.ones(2))), "no place for: extra"),
    "a lost weight": (weights(lambda t: t.pop("classifier.logit_scale")), "lacks weights: classifier.logit_scale"),
    "weights of another length": (
        weights(lambda t: t.update({"classifier.logit_scale": torch.ones(2)})),
        "another shape",
    ),
    "cut weights": (write("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"), "is not a GKC checkpoint"),
    "no weights": (remove("model.safetensors"), "is not a GKC checkpoint"),
    "no tokenizer": (remove("tokenizer.json"), "is not a GKC checkpoint"),
    "a damaged tokenizer": (write("tokenizer.json", b'{"model": {"type": "WordLevel"}}'), "is not a GKC checkpoint"),
    "a tokenizer of a type": (set_value("tokenizer_config.json", "tokenizer_class", 5), "is not a GKC checkpoint"),
    "no length": (set_value("tokenizer_config.json", "model_max_length", 0), "model_max_length"),
    "another end": (set_value("tokenizer_config.json", "eos_token", "dog"), "ends texts with the token"),
    "fewer tokens of the tower": (
        set_value("config.json", "text_config", "vocab_size", 10),
        "is not a GKC checkpoint",
    ),
    "settings of images": (
        set_value("processor_config.json", "image_processor", "image_std", 0),
        "`image_std` must be",
    ),
    "no configuration": (remove("config.json"), "it has no file config.json"),
    "half a tokenizer": (write("tokenizer.json", b'{"model": {"ty'), "its tokenizer.json cannot be read: Untermin"),
    "settings of a tokenizer that are none": (write("tokenizer_config.json", b"null"), "its tokenizer_config.json"),
    "no UTF-8": (write("processor_config.json", b"\xff{}"), "its processor_config.json cannot be read: 'utf-8'"),
    "a tokenizer without an end": (
        set_value("tokenizer.json", "post_processor", None),
        "does not append the end token",
    ),
    "templates": (set_value("processor_config.json", "prompt_templates", ["x"]), "A prompt template needs"),
    "an index": (set_value("config.json", "backbone_config", "out_indices", [7]), "is not a GKC checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_gives_a_one_line_error(damaged, damage, capsys):
    apply, message = DAMAGES[damage]
    apply(damaged)
    with pytest.raises(UserError) as caught:
        load_checkpoint(damaged)
    text = str(caught.value)
    assert text.startswith(f"--model: {damaged} is not a GKC checkpoint: ") and message in text and "\n" not in text
    assert capsys.readouterr() == ("", "")


def test_commands_exit_with_status_2_and_write_nothing(damaged, capsys):
    change(damaged, "config.json", "hidden_size", "96")
    out = damaged.parent / "out"
    reason = "`hidden_size` must be of the type int, got '96'."
    for command in (
        ["segment", str(damaged), "--out", str(out)],
        ["embed", "--labels", "dog", "--out", str(out / "w.safetensors")],
        ["export", str(damaged), "--out", str(out)],
    ):
        model = [] if command[0] == "export" else ["--model", str(damaged)]
        (damaged / "a.png").touch()
        assert main([*command, *model]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.endswith(f"is not a GKC checkpoint: {reason}\n")
    assert not list(out.rglob("*.*"))
    with pytest.raises(ValueError, match=r"^`model.init_from`: .* cannot be loaded: `hidden_size`"):
        load_student(Recipe().replace(init_from=str(damaged)), None)
    with pytest.raises(ValueError, match=r"^--model: .* holds no model: `hidden_size`"):
        model_type(str(damaged))
    with pytest.raises(ValueError, match="contains no CLIP"):
        load_clip_towers(str(damaged))


def test_prompts_are_limited_to_the_text_encoders_length(damaged):
    change(damaged, "tokenizer_config.json", "model_max_length", 10**6)
    model, processor = load_checkpoint_parts(damaged)
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings == 16
    with pytest.raises(ValueError, match="takes at most 16"):
        processor(text="dog " * 15)


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Thing: pass\n"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("config.json", ("auto_map", {"AutoConfig": "code.Thing", "AutoModel": "code.Thing"})),
        ("config.json", ("backbone_config", "auto_map", {"AutoBackbone": "code.Thing", "AutoConfig": "code.Thing"})),
        ("config.json", ("text_config", "auto_map", {"AutoModel": "code.Thing"})),
        ("config.json", ("backbone_config", {"model_type": "bert", "auto_map": {"AutoBackbone": "code.Thing"}})),
        ("tokenizer_config.json", ("auto_map", {"AutoTokenizer": ["code.Thing", "code.Thing"]})),
        ("tokenizer_config.json", ("tokenizer_class", "Thing")),
        ("processor_config.json", ("auto_map", {"AutoProcessor": "code.Thing"})),
        ("processor_config.json", ("image_processor", "auto_map", {"AutoImageProcessor": "code.Thing"})),
        ("processor_config.json", ("image_processor", "image_processor_type", "Thing")),
    ],
)
def test_code_of_a_folder_is_never_run(damaged, name, place, monkeypatch):
    (damaged / "code.py").write_text(CODE)
    change(damaged, name, *place)
    if name == "tokenizer_config.json":
        change(damaged, name, "tokenizer_class", "Thing")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked on the terminal"))
    try:
        load_checkpoint(damaged)
    except UserError as error:
        assert "\n" not in str(error)
    assert not list(damaged.rglob("ran"))
    try:
        load_student(Recipe().replace(init_from=str(damaged)), None)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "shard", ["../whole.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "C:\\x", "..", 5, None]
)
def test_an_index_that_names_files_outside_is_refused(damaged, shard):
    (damaged / "model.safetensors").rename(damaged.parent / "whole.safetensors")
    names = list(load_file(damaged.parent / "whole.safetensors"))
    index = damaged / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names .*, which is not a file beside it"):
        load_checkpoint(damaged)
    shutil.copy(damaged.parent / "whole.safetensors", damaged / "part.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert load_checkpoint(damaged)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 5}', "{", "[" * 10**5])
def test_a_damaged_index_is_refused(damaged, text):
    (damaged / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is not an index of weights"):
        load_checkpoint(damaged)


def old_name(name: str) -> str:
    """Name of a weight before the classifiers were modules."""
    if name in ("classifier.no_object_embedding", "classifier.logit_scale"):
        return name.removeprefix("classifier.")
    return re.sub(r"^classifier\.", "class_embedder.", name)


@pytest.mark.parametrize("make", [tiny_config, convex_config])
def test_checkpoint_of_an_earlier_version_is_saved_under_current_names(make, tmp_path):
    model = GKCForOpenVocabSegmentation(make()).eval()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {old_name(name): weight for name, weight in weights.items()}
    assert "logit_scale" in old and any(name.startswith("class_embedder.") for name in old)
    assert not any(name.startswith("classifier") for name in old)
    assert rename_old_checkpoint(old).keys() == rename_old_checkpoint(weights).keys() == weights.keys()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert largest_difference(model.state_dict(), loaded.state_dict()) == 0
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()
