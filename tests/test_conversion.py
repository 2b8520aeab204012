"""OpenAI's CLIP ResNets: every published size, the text encoder, and files read without running anything in them."""

import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, CLIPTextModelWithProjection

from modeling_gkc.conversion import clip_resnet_from_openai, clip_text_from_openai, read_weights, torchscript_archive
from modeling_gkc.modeling_clip_resnet import CLIPResNetBackbone

from .openai_clip import PUBLISHED, TINY, random_weights, save_archive, weights

# Millions of parameters of the image and the text encoders (model_profile.csv of OpenCLIP).
PUBLISHED_MILLIONS = {
    "RN50": (38.32, 63.69),
    "RN101": (56.26, 63.43),
    "RN50x4": (87.14, 91.16),
    "RN50x16": (167.33, 123.65),
    "RN50x64": (420.38, 202.88),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "RN-tiny.pt"
    save_archive(random_weights(), str(path))
    return path


def millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """On the meta device: shapes without memory."""
    size = PUBLISHED[name]
    with torch.device("meta"):
        state_dict = weights(size)
        image_tower, text_tower = clip_resnet_from_openai(state_dict), clip_text_from_openai(state_dict)
    config = image_tower.config
    assert (config.width, tuple(config.depths), config.image_size) == (size.width, size.depths, size.image_size)
    assert config.num_attention_heads == size.width // 2 and config.projection_dim == size.projection_dim
    config = text_tower.config
    assert (config.hidden_size, config.num_attention_heads) == (size.text_width, size.text_width // 64)
    assert (config.num_hidden_layers, config.max_position_embeddings, config.vocab_size) == (12, 77, 49408)
    assert (config.bos_token_id, config.eos_token_id, config.hidden_act) == (49406, 49407, "quick_gelu")
    image_millions, text_millions = PUBLISHED_MILLIONS[name]
    assert millions(image_tower) == pytest.approx(image_millions, abs=0.005)
    assert millions(text_tower) == pytest.approx(text_millions, abs=0.005)


def text_embeds(state_dict: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """CLIP's text encoder as the paper describes it (Radford et al., 2021, section 2.4), on OpenAI's weights.

    Pre-norm transformer with causal attention; the features at the end token, which has the highest id, are
    normalised and projected.
    """
    state_dict = {name: value.float() for name, value in state_dict.items()}
    length, width = input_ids.shape[1], state_dict["ln_final.weight"].shape[0]

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state_dict[f"{name}.weight"], state_dict[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state_dict[f"{name}.weight"], state_dict[f"{name}.bias"])

    x = state_dict["token_embedding.weight"][input_ids] + state_dict["positional_embedding"][:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(TINY.text_layers):
        prefix = f"transformer.resblocks.{layer}"
        normed = layer_norm(x, f"{prefix}.ln_1")
        packed = normed @ state_dict[f"{prefix}.attn.in_proj_weight"].T + state_dict[f"{prefix}.attn.in_proj_bias"]
        query, key, value = (part.unflatten(-1, (-1, 64)) for part in packed.chunk(3, dim=-1))
        scores = torch.einsum("blhc,bmhc->bhlm", query, key) / 8
        attention = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        mixed = torch.einsum("bhlm,bmhc->blhc", attention, value).flatten(2)
        x = x + linear(mixed, f"{prefix}.attn.out_proj")
        hidden = linear(layer_norm(x, f"{prefix}.ln_2"), f"{prefix}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{prefix}.mlp.c_proj")
    x = layer_norm(x, "ln_final")
    return x[torch.arange(len(x)), input_ids.argmax(dim=-1)] @ state_dict["text_projection"]


@torch.no_grad()
def test_text_tower(within):
    state_dict = random_weights()
    tower = clip_text_from_openai(state_dict | {"transformer.resblocks.0.attn_mask": torch.zeros(12, 12)})
    assert not tower.training and tower.dtype == torch.float32
    input_ids = torch.randint(0, 38, (6, 10))
    input_ids[:, 0] = 38
    for row, end in enumerate((3, 9, 1, 5, 7, 2)):
        input_ids[row, end], input_ids[row, end + 1 :] = 39, 0
    expected = text_embeds(state_dict, input_ids)
    error = (tower(input_ids=input_ids).text_embeds - expected).abs().max() / expected.abs().max()
    within("CLIP's text encoder against its description, relative", error, 1e-5)
    padded = input_ids.masked_fill((input_ids == 39).cumsum(dim=1) > 0, 39)
    error = (tower(input_ids=padded).text_embeds - expected).abs().max() / expected.abs().max()
    within("the same padded with the end token, as CLIP's tokenizer pads", error, 1e-5)


def test_text_tower_of_something_else_is_refused():
    state_dict = random_weights()
    image_only = {name: value for name, value in state_dict.items() if name.startswith("visual.")}
    with pytest.raises(ValueError, match="no text encoder"):
        clip_text_from_openai(image_only)
    state_dict["transformer.resblocks.1.extra"] = state_dict.pop("transformer.resblocks.1.mlp.c_proj.bias")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc2\.bias.*resblocks\.1\.extra"):
        clip_text_from_openai(state_dict)


@pytest.mark.parametrize("change", ["missing", "scalar", "empty", "five dimensions"])
def test_any_weight_that_is_wrong_is_named(change):
    """Each kind of weight in turn, of both towers; no tower is built of what is left."""
    wrong = {"scalar": (), "empty": (0, 0), "five dimensions": (1, 1, 1, 1, 2)}
    good = weights(TINY)
    needless = re.compile(r"logit_scale|num_batches_tracked|layer[134]|resblocks\.1")
    for name in [name for name in good if not needless.search(name)]:
        changed = {key: value for key, value in good.items() if key != name or change != "missing"}
        if change != "missing":
            changed[name] = torch.zeros(wrong[change])
        make = clip_resnet_from_openai if name.startswith("visual.") else clip_text_from_openai
        with torch.device("meta"), pytest.raises(ValueError) as refusal:
            make(changed)
        message = str(refusal.value)
        assert re.search("missing|unexpected|shape", message) and "\n" not in message, (name, message)


def test_missing_and_misshapen_weights_by_name_and_shape():
    state_dict = random_weights()
    without_projection = {name: value for name, value in state_dict.items() if name != "visual.attnpool.c_proj.weight"}
    with pytest.raises(ValueError, match=r"not the weights of a CLIP ResNet: `attnpool\.c_proj\.weight` is missing\."):
        clip_resnet_from_openai(without_projection)
    state_dict["visual.conv1.weight"] = torch.zeros(2, 3, 5, 5)
    state_dict["visual.extra"] = state_dict.pop("visual.bn1.bias")
    message = (
        r"missing \['encoder\.stem\.layers\.0\.normalization\.bias'\], unexpected \['extra'\], wrong shapes "
        r"\['encoder\.stem\.layers\.0\.convolution\.weight \(2, 3, 5, 5\), not \(2, 3, 3, 3\)'\]\.$"
    )
    with pytest.raises(ValueError, match=message):
        clip_resnet_from_openai(state_dict)
    state_dict["transformer.resblocks.1.attn.in_proj_bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"in_proj_bias' of shape \(7,\) cannot be split into three projections"):
        clip_text_from_openai(state_dict)


def test_saved_tower_loads_as_model_and_as_backbone(tmp_path, transformers_log):
    tower = clip_resnet_from_openai(random_weights())
    tower.save_pretrained(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["config.json", "model.safetensors"]
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = tower(pixel_values, output_hidden_states=True)
        loaded = AutoModel.from_pretrained(tmp_path)(pixel_values)
        backbone, info = CLIPResNetBackbone.from_pretrained(tmp_path, output_loading_info=True)
        feature_maps = backbone.eval()(pixel_values).feature_maps
    torch.testing.assert_close(loaded.image_embeds, expected.image_embeds, rtol=0, atol=0)
    assert not info["missing_keys"] and all(name.startswith("attention_pooling.") for name in info["unexpected_keys"])
    for feature_map, hidden_state in zip(feature_maps, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(feature_map, hidden_state, rtol=0, atol=0)


def test_an_archive_is_read_as_torch_reads_it(archive):
    read, expected = read_weights(archive), torch.jit.load(archive).state_dict()
    assert read.keys() == expected.keys() == random_weights().keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)
    assert read["visual.conv1.weight"].dtype == torch.float16
    clip_resnet_from_openai(read)
    assert isinstance(clip_text_from_openai(read), CLIPTextModelWithProjection)


def rewritten(archive: Path, target: Path, change) -> Path:
    """Copy a zip with each file replaced by `change(name, content)`; None omits the file."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = change(name.partition("/")[2], source.read(name))
            if content is not None:
                copy.writestr(name, content)
    return target


def test_no_code_of_an_archive_runs(archive, tmp_path):
    """Torch cannot open an archive whose program is garbage; the weights are the same as ever."""
    broken = rewritten(
        archive, tmp_path / "a.pt", lambda name, content: b"raise" if name.startswith("code/") else content
    )
    with pytest.raises(RuntimeError):
        torch.jit.load(broken)
    read, expected = read_weights(broken), read_weights(archive)
    assert all(torch.equal(read[name], value) for name, value in expected.items())


class _Attack:
    """Pickles to a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(mark: Path) -> dict[str, bytes]:
    return {
        "a shell command": pickle.dumps(_Attack(os.system, f"touch {mark}")),
        "Python code": pickle.dumps(_Attack(eval, f"open({str(mark)!r}, 'w')"), protocol=2),
        "an import in a newer protocol": pickle.dumps(_Attack(os.mkdir, str(mark)), protocol=4),
        "a name inside of torch": b"ctorch.serialization\nload\n(X\x01\x00\x00\x00atR.",
        "attributes of a module": b"c__torch__\nModule\n)\x81N}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.",
        "a tensor beyond its storage": b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nHalfStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\x00\x06tQK\x00(M\xff\xffK\x09t(K\x09K\x01t\x89}tR.",
    }


REASONS = {
    "a shell command": "asks for (posix|nt).system",
    "Python code": "asks for __builtin__.eval",
    "an import in a newer protocol": "asks for (posix|nt).mkdir",
    "a name inside of torch": "asks for torch.serialization.load",
    "attributes of a module": "is no plain module",
    "a tensor beyond its storage": "out of bounds",
}


@pytest.mark.parametrize("kind", REASONS)
def test_hostile_pickles_are_refused(archive, tmp_path, kind):
    mark = tmp_path / "mark"
    payload = attacks(mark)[kind]
    hostile = rewritten(
        archive, tmp_path / "hostile.pt", lambda name, content: payload if name == "data.pkl" else content
    )
    with pytest.raises(
        ValueError, match=r"hostile\.pt: cannot be read as a TorchScript archive of weights"
    ) as refusal:
        read_weights(hostile)
    assert re.search(REASONS[kind], str(refusal.value))
    assert not mark.exists()


def test_hostile_pickles_run_code_in_plain_torch_load(tmp_path):
    payloads = attacks(tmp_path / "mark")
    for kind in ("a shell command", "Python code", "an import in a newer protocol"):
        pickle.loads(payloads[kind])
        mark = tmp_path / "mark"
        assert mark.exists()
        mark.rmdir() if mark.is_dir() else mark.unlink()


def test_hostile_state_dicts_are_refused(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"weight": torch.zeros(1), "attack": _Attack(os.system, f"touch {mark}")}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(attacks(mark)["a shell command"])
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match=rf"{name}: contains more than weights, or is damaged"):
            read_weights(tmp_path / name)
    assert not mark.exists()


def test_damaged_archives_are_refused(archive, tmp_path):
    damages = {
        "short": lambda name, content: content[:-2] if name == "data/0" else content,
        "missing": lambda name, content: None if name == "data/0" else content,
        "cut": lambda name, content: content[: len(content) // 2] if name == "data.pkl" else content,
        "big": lambda name, content: b"big" if name == "byteorder" else content,
    }
    for name, damage in damages.items():
        path = rewritten(archive, tmp_path / f"{name}.pt", damage)
        with pytest.raises(ValueError, match=rf"{name}\.pt: cannot be read as a TorchScript archive"):
            read_weights(path)
    (tmp_path / "half.pt").write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half\.pt: contains more than weights, or is damaged"):
        read_weights(tmp_path / "half.pt")


@pytest.mark.parametrize("allow_jit", [False, True])
def test_a_damaged_directory_of_the_zip_is_refused(archive, tmp_path, allow_jit):
    """Bytes of a directory entry flipped: magic number, flags, length of the name, offset."""
    path = tmp_path / "damaged.pt"
    for position in (0, 8, 28, 42):
        content = bytearray(archive.read_bytes())
        content[content.index(b"PK\x01\x02") + position] ^= 0xFF
        path.write_bytes(content)
        with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=r"damaged\.pt: ") as refusal:
            read_weights(path, allow_jit=allow_jit)
        assert "\n" not in str(refusal.value)


def test_flipped_bit_raises(archive, tmp_path):
    with zipfile.ZipFile(archive) as source:
        entry = source.getinfo(next(name for name in source.namelist() if name.endswith("/data/0")))
    content = bytearray(archive.read_bytes())
    content[content.index(zipfile.ZipFile(archive).read(entry), entry.header_offset)] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.pt: .*CRC"):
        read_weights(tmp_path / "flipped.pt")


def test_cyclic_modules_raise(archive, tmp_path):
    circle = b"c__torch__\nModule\n)\x81q\x00}X\x04\x00\x00\x00selfh\x00sb."
    path = rewritten(archive, tmp_path / "a.pt", lambda name, content: circle if name == "data.pkl" else content)
    with pytest.raises(ValueError, match="its module self is in another place too"):
        read_weights(path)


class _Module:
    """Pickles to a module of an archive with the given attributes."""

    def __init__(self, **attributes):
        self.attributes = attributes

    def __reduce__(self):
        return _Module, (), self.attributes


def module_pickle(root: _Module) -> bytes:
    return pickle.dumps(root, protocol=2).replace(f"c{__name__}\n_Module\n".encode(), b"c__torch__\nModule\n")


def nested(leaf: _Module, depth: int) -> _Module:
    """Modules that hold the next one twice: 2^depth names for the leaf."""
    for _ in range(depth):
        leaf = _Module(a=leaf, b=leaf)
    return leaf


def test_shared_modules_are_visited_once(archive, tmp_path):
    """At depth 60 a walk over all names would never end."""
    empty = module_pickle(nested(_Module(training=False), 60))
    path = rewritten(archive, tmp_path / "a.pt", lambda name, content: empty if name == "data.pkl" else content)
    assert read_weights(path) == {}
    # A tensor without numbers, which needs no file of its own.
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuM\x00\x06tQK\x00(K\x03t(K\x01t\x89}tR"
    )
    mark = pickle.dumps(4321, protocol=2)[2:-1]
    weighty = module_pickle(nested(_Module(weight=4321), 60))
    assert weighty.count(mark) == 1
    weighty = weighty.replace(mark, tensor)
    path = rewritten(archive, tmp_path / "b.pt", lambda name, content: weighty if name == "data.pkl" else content)
    with pytest.raises(ValueError, match=r"its module (a\.)+b is in another place too"):
        read_weights(path)


def test_jit_opens_an_archive_only_when_allowed(archive):
    with pytest.warns(UserWarning, match="runs code of the file"):
        read = read_weights(archive, allow_jit=True)
    expected = read_weights(archive)
    assert all(torch.equal(read[name], value) for name, value in expected.items())


def test_other_forms_of_weights(tmp_path):
    state_dict = random_weights()
    torch.save(state_dict, tmp_path / "weights.pt")
    torch.save({"epoch": 3, "state_dict": state_dict}, tmp_path / "training.pt")
    torch.save(state_dict, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state_dict, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "training.pt", "legacy.pt", "weights.safetensors"):
        read = read_weights(tmp_path / name)
        assert read.keys() == state_dict.keys()
        assert all(torch.equal(read[key], value) for key, value in state_dict.items())


def test_files_without_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        read_weights(tmp_path / "nothing.pt")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.safetensors: cannot be read as safetensors"):
        read_weights(tmp_path / "text.safetensors")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pt: contains more than weights, or is damaged"):
        read_weights(tmp_path / "text.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: must contain a dict of weights by name, got list"):
        read_weights(tmp_path / "list.pt")


def recompressed(archive: Path, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy an archive with its entries compressed or not."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", compression) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), compression)
    return path


class TestHostileArchives:
    """Nothing needs more memory than the file has bytes."""

    @pytest.fixture(scope="class")
    def plain(self, tmp_path_factory) -> Path:
        path = tmp_path_factory.mktemp("archive") / "plain.pt"
        save_archive({"weight": torch.arange(6.0).view(2, 3)}, str(path))
        return path

    def test_compressed_entries_are_refused(self, plain, tmp_path):
        assert torch.equal(
            read_weights(recompressed(plain, tmp_path / "a.pt"))["weight"], torch.arange(6.0).view(2, 3)
        )
        with pytest.raises(ValueError, match=r"its entry .* is compressed, which torch never writes"):
            read_weights(recompressed(plain, tmp_path / "b.pt", zipfile.ZIP_DEFLATED))

    def test_sizes_beyond_the_file_raise(self, plain, tmp_path):
        data = bytearray(recompressed(plain, tmp_path / "a.pt").read_bytes())
        central = data.rfind(b"PK\x01\x02", 0, data.rfind(b"/data/0") or None)
        data[central + 20 : central + 28] = struct.pack("<II", 2**31, 2**31)  # compressed and plain size
        (tmp_path / "b.pt").write_bytes(data)
        with pytest.raises(ValueError, match=r"says it has 2147483648 bytes, in a file of"):
            read_weights(tmp_path / "b.pt")

    @pytest.mark.parametrize(
        ("storage", "size", "stride", "message"),
        [
            (1, (2**20, 2**10), (0, 0), "repeats the numbers"),
            (10, (3, 8), (1, 1), "repeats the numbers"),
            (10, (5, 5), (5, 1), "out of bounds of its storage of 10"),
            (10, (2,), (-1,), "of size"),
            (10, (2, 2), (1,), "of size"),
            (10, (2.0,), (1,), "of size"),
        ],
    )
    def test_tensors_with_repeated_storage_elements_raise(self, storage, size, stride, message):
        with pytest.raises(pickle.UnpicklingError, match=message):
            torchscript_archive._tensor_maker()(torch.zeros(storage), 0, size, stride)

    def test_tensor_views_are_read(self):
        make, numbers = torchscript_archive._tensor_maker(), torch.arange(24.0)
        for view in (numbers.view(2, 3, 4).permute(2, 0, 1), numbers[3::2], numbers.view(4, 6)[:, 2:4], numbers[:0]):
            made = make(numbers, view.storage_offset(), tuple(view.shape), view.stride())
            assert torch.equal(made, view)
