"""Every kind of image becomes the same pixels."""

import contextlib
import io
import json
import logging
import math
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from PIL import Image
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from modeling_gkc import image_processing_gkc, image_reading
from modeling_gkc.image_processing_gkc import GKCImageProcessor, read_image, resized_size

from .image_kinds import pack_bits, png_file

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)


def as_array(image, **kwargs) -> np.ndarray:
    rgb = read_image(image, **kwargs)
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


def encoded(image: Image.Image, kind: str = "png", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


class TestReading:
    def test_all_input_types_agree(self, picture, tmp_path):
        path = tmp_path / "picture.png"
        Image.fromarray(picture).save(path)
        first = picture.transpose(2, 0, 1)
        for image in (
            path,
            str(path),
            path.read_bytes(),
            Image.open(path),
            Image.fromarray(picture),
            picture,
            first,
            torch.tensor(picture),
            torch.tensor(first),
            picture.astype(np.int64),
            picture.astype(np.float32) / 255,
            torch.tensor(first).double() / 255,
        ):
            np.testing.assert_array_equal(as_array(image), picture)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, picture, orientation, tmp_path):
        """Undo of each orientation, from the EXIF standard's table: the first row and column of the stored picture."""
        upright = picture
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: upright.transpose(1, 0, 2)[::-1],
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: upright.transpose(1, 0, 2)[:, ::-1],
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "rotated.png"
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        np.testing.assert_array_equal(as_array(path), upright)
        np.testing.assert_array_equal(as_array(Image.open(path)), upright)
        np.testing.assert_array_equal(as_array(path.read_bytes()), upright)

    @pytest.mark.parametrize(
        "mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
    )
    def test_every_mode_becomes_rgb(self, mode):
        grey = Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8))
        source = grey.convert("RGB")
        if mode == "RGBa":
            image = source.convert("RGBA").convert("RGBa")
        elif mode in ("P", "PA"):
            image = grey.convert("P").convert(mode)
        elif mode == "LAB":
            image = Image.merge("LAB", [grey, Image.new("L", (8, 8)), Image.new("L", (8, 8))])
        else:
            image = source.convert(mode)
        got = as_array(image)
        assert got.shape == (8, 8, 3)
        if mode not in ("1", "LAB"):
            assert np.abs(got.astype(int) - np.asarray(source)).max() <= 3

    def test_cmyk_colors(self):
        assert as_array(Image.new("CMYK", (2, 1), (0, 255, 255, 0))).tolist() == [[[255, 0, 0]] * 2]

    def test_palette_colors_and_transparency(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putdata([0, 1])
        assert as_array(image).tolist() == [[[10, 20, 30], [200, 100, 50]]]
        seen = Image.open(io.BytesIO(encoded(image, transparency=1)))
        assert as_array(seen).tolist() == [[[10, 20, 30], [255, 255, 255]]]

    def test_palette_with_transparency_values(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 255, 200, 100, 50, 0], "RGBA")
        image.putdata([0, 1])
        assert as_array(image).tolist() == [[[10, 20, 30], [255, 255, 255]]]

    @pytest.mark.parametrize("bits", [2, 4])
    def test_single_transparent_value_of_packed_gray(self, bits, tmp_path):
        """Pillow spreads the pixels over 0..255, and leaves the transparent value as it is stored."""
        values, path = np.arange(4).reshape(1, 4), tmp_path / "packed.png"
        header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
        rows = zlib.compress(b"\0" + pack_bits(values, bits))
        chunks = [(b"IHDR", header), (b"tRNS", b"\0\2"), (b"IDAT", rows), (b"IEND", b"")]
        path.write_bytes(png_file(chunks))
        step = 255 // (2**bits - 1)
        for image in (path, path.read_bytes(), Image.open(path)):
            assert as_array(image)[0, :, 0].tolist() == [0, step, 255, 3 * step]

    @pytest.mark.parametrize("channels_first", [False, True])
    def test_transparent_images_are_composited_on_white(self, channels_first):
        array = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
        expected = [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
        assert as_array(Image.fromarray(array, "RGBA")).tolist() == expected
        given = array.transpose(2, 0, 1) if channels_first else array
        assert as_array(given, input_data_format="channels_first" if channels_first else None).tolist() == expected

    @pytest.mark.parametrize("kind", ["png", "tiff"])
    def test_sixteen_bits_are_scaled_not_clipped(self, kind):
        values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
        expected = [0, 1, 128, 255]
        file = Image.open(io.BytesIO(encoded(Image.fromarray(values), kind)))
        big_endian = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
        for image in (file, big_endian, Image.fromarray(values.astype(np.int32)), values, values[..., None]):
            assert as_array(image)[0, :, 0].tolist() == expected
        np.testing.assert_array_equal(as_array(np.repeat(values[..., None], 3, axis=-1)), as_array(values))

    @pytest.mark.parametrize("values_at_once", [1, 7, 40, 2**20])
    def test_wide_numbers_are_narrowed_a_few_rows_at_a_time(self, values_at_once, monkeypatch):
        monkeypatch.setattr(image_reading, "_VALUES_AT_ONCE", values_at_once)
        values = np.arange(8 * 5 * 3, dtype=np.uint16).reshape(8, 5, 3) * 546
        np.testing.assert_array_equal(as_array(values), np.rint(values / 257))
        first = torch.from_numpy(values / 65535).permute(2, 0, 1)
        np.testing.assert_array_equal(as_array(first), np.rint(values / 257))

    def test_booleans_and_half_floats(self):
        assert as_array(np.array([[False, True]])).tolist() == [[[0] * 3, [255] * 3]]
        assert as_array(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)).tolist() == [[[0] * 3, [255] * 3]]

    @pytest.mark.parametrize(
        ("shape", "kind", "size"),
        [
            ((3, 5, 7), np.array, (7, 5)),
            ((5, 7, 3), np.array, (7, 5)),
            ((1, 1, 3), np.array, (1, 1)),
            ((3, 1, 1), np.array, (1, 1)),
            ((1, 7, 3), np.array, (7, 1)),
            ((1, 5, 7), np.array, (7, 5)),
            ((5, 7), np.array, (7, 5)),
            ((3, 5, 3), np.array, (5, 3)),
            ((3, 5, 3), torch.tensor, (3, 5)),
            ((4, 5, 3), torch.tensor, (3, 5)),
            ((1, 1), np.array, (1, 1)),
        ],
    )
    def test_the_channel_axis_is_found(self, shape, kind, size):
        assert read_image(kind(np.zeros(shape, dtype=np.uint8))).size == size

    def test_the_channel_axis_can_be_told(self):
        array = np.zeros((3, 5, 3), dtype=np.uint8)
        assert read_image(array, "channels_first").size == (3, 5)
        assert read_image(torch.tensor(array), "channels_last").size == (5, 3)

    @settings(deadline=None)
    @given(
        numpy_strategies.arrays(np.uint8, st.tuples(st.integers(5, 12), st.integers(5, 12), st.sampled_from([1, 3])))
    )
    def test_integers_floats_and_layouts_agree(self, array):
        expected = np.broadcast_to(array, (*array.shape[:2], 3))
        for image in (array, array.astype(np.float64) / 255, torch.tensor(array.transpose(2, 0, 1))):
            np.testing.assert_array_equal(as_array(image), expected)


class TestRefusing:
    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone\.png"):
            read_image(tmp_path / "gone.png")

    @pytest.mark.parametrize("content", [b"", b"hello", "truncated"])
    @pytest.mark.parametrize("kind", ["png", "jpeg"])
    def test_an_unreadable_file_is_named(self, tmp_path, picture, content, kind):
        path = tmp_path / f"broken.{kind}"
        whole = encoded(Image.fromarray(picture), kind)
        path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
        for image in (path, str(path)):
            with pytest.raises(ValueError, match=rf"broken\.{kind}"):
                read_image(image)
        if content == "truncated":
            with pytest.raises(ValueError, match=rf"broken\.{kind}"):
                read_image(Image.open(path))

    def test_a_tiff_file_without_its_last_strips(self, picture, tmp_path):
        """Pillow would leave the rest black."""
        path, whole = tmp_path / "strips.tiff", encoded(Image.fromarray(picture), "tiff")
        tag = struct.pack("<HHI", 257, 4, 1)
        height = whole.index(tag) + len(tag)
        path.write_bytes(whole[:height] + struct.pack("<I", 90) + whole[height + 4 :])
        for image in (path, path.read_bytes(), Image.open(path)):
            with pytest.raises(
                ValueError, match="cannot be read as an image: it contains only 70 x 45 of its 70 x 90 pixels"
            ):
                read_image(image)

    def test_a_broken_image_of_a_batch_is_named(self, picture):
        with pytest.raises(ValueError, match=r"image 2 \(index 1\)"):
            GKCImageProcessor()([picture, b"hello"], return_tensors="pt")

    @pytest.mark.parametrize(
        "image",
        [
            Image.new("RGB", (0, 5)),
            np.zeros((0, 5, 3), np.uint8),
            np.zeros((3, 5, 0), np.uint8),
            torch.zeros(3, 0, 5),
            np.zeros((4,), np.uint8),
            np.zeros((5, 6, 7), np.uint8),
            np.zeros((5, 6, 2), np.uint8),
            np.full((5, 5), 256),
            np.full((5, 5), -1),
            np.full((5, 5), 1.5),
            np.full((5, 5), -0.5),
            np.full((5, 5), np.nan),
            Image.fromarray(np.full((5, 5), 70000, np.int32)),
        ],
    )
    def test_empty_images_and_values_out_of_range(self, image):
        with pytest.raises(ValueError, match="the scan: cannot be read"):
            read_image(image, name="the scan")

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_rounding_errors_at_the_ends_are_forgiven(self, dtype):
        """Of 1e-5, no more: what lies farther out is no picture in 0..1."""
        values = np.array([[-9e-6, 1 + 9e-6, 1.0000001, 0.5]], dtype)
        for image in (values, torch.from_numpy(values), Image.fromarray(values.astype(np.float32))):
            assert as_array(image)[0, :, 0].tolist() == [0, 255, 255, 128]
        for value in (-2e-5, 1 + 2e-5):
            with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
                read_image(np.full((2, 2), value, dtype))

    @pytest.mark.parametrize("image", [None, 5, object(), np.array([["a"]])])
    def test_unsupported_types_raise(self, image):
        with pytest.raises(TypeError):
            read_image(image)

    def test_empty_inputs_raise(self):
        with pytest.raises(ValueError, match="`images` is empty"):
            GKCImageProcessor()([], return_tensors="pt")

    @pytest.mark.parametrize("size", [{"height": 5}, {"max_height": 5, "max_width": 5}, {"shortest_edge": 0}])
    def test_incomplete_sizes_raise(self, size):
        with pytest.raises(ValueError, match="size"):
            GKCImageProcessor(size=size)

    def test_unknown_settings(self, picture):
        with pytest.raises(TypeError, match="do_flip_channel_order"):
            GKCImageProcessor()(picture, do_flip_channel_order=True, return_tensors="pt")


class TestSizes:
    @settings(deadline=None)
    @given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 900), st.integers(900, 1500))
    def test_sizes_are_those_of_transformers_and_of_the_aspect(self, height, width, short, long):
        size = resized_size((height, width), {"shortest_edge": short, "longest_edge": long})
        theirs = get_size_with_aspect_ratio((height, width), short, long)
        assert size == tuple(min(max(side, 1), long) for side in theirs)
        assert min(size) <= short and max(size) <= long
        if theirs == (height, width):  # their rule: a short side that would not change keeps the whole image
            return
        scale = min(short / min(height, width), long / max(height, width))
        assert abs(size[0] - height * scale) <= 2 and abs(size[1] - width * scale) <= 2

    def test_published_test_size(self):
        """Detectron2's default, 800 x 1333 at most; the paper quotes its cost at 800 x 1216, this case padded."""
        size = GKCImageProcessor().size
        assert resized_size((480, 720), dict(size)) == (800, 1200)
        assert resized_size((400, 4000), dict(size)) == (133, 1333)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ({"height": 30, "width": 50}, (30, 50)),
            ({"shortest_edge": 90}, (90, 140)),
            ({"longest_edge": 35}, (22, 35)),
            (90, (90, 140)),
        ],
    )
    def test_other_forms_of_size(self, picture, size, expected):
        mask = GKCImageProcessor(size=size)(picture, return_tensors="pt").pixel_mask[0]
        assert (int(mask[:, 0].sum()), int(mask[0].sum())) == expected

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (3000, 2)])
    def test_tiny_and_narrow_images(self, shape):
        batch = GKCImageProcessor()(
            np.zeros((*shape, 3), np.uint8), input_data_format="channels_last", return_tensors="pt"
        )
        assert batch.pixel_values.isfinite().all()
        assert batch.pixel_mask.sum() >= 1
        assert all(side % 32 == 0 and side <= 1344 for side in batch.pixel_values.shape[-2:])


class TestPixels:
    def test_values_are_normalized_then_padded_with_zeros(self, picture):
        batch = GKCImageProcessor(do_resize=False)(picture, return_tensors="pt")
        assert batch.pixel_values.shape == (1, 3, 64, 96) and batch.pixel_values.dtype == torch.float32
        expected = (torch.tensor(picture) / 255 - MEAN) / STD
        torch.testing.assert_close(batch.pixel_values[0, :, :45, :70], expected.permute(2, 0, 1), rtol=0, atol=1e-6)
        mask = torch.zeros(1, 64, 96, dtype=torch.int64)
        mask[:, :45, :70] = 1
        assert torch.equal(batch.pixel_mask, mask)
        assert not (batch.pixel_values * (1 - mask[:, None])).any()

    def test_batch_equals_single_images(self, picture):
        processor = GKCImageProcessor(size={"shortest_edge": 40, "longest_edge": 90})
        images = [picture, picture[:20], picture[:, :9], picture[:1, :1]]
        batch = processor(images, return_tensors="pt")
        for index, image in enumerate(images):
            single = processor(image, input_data_format="channels_last", return_tensors="pt")
            height, width = single.pixel_values.shape[-2:]
            assert torch.equal(batch.pixel_values[index, :, :height, :width], single.pixel_values[0])
            assert torch.equal(batch.pixel_mask[index, :height, :width], single.pixel_mask[0])
            assert batch.pixel_mask[index].sum() == single.pixel_mask.sum()

    def test_an_array_of_images_is_a_batch(self, picture):
        processor = GKCImageProcessor()
        batch = processor(np.stack([picture, picture[::-1]]), return_tensors="pt")
        assert torch.equal(batch.pixel_values, processor([picture, picture[::-1]], return_tensors="pt").pixel_values)

    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.integers(8, 120),
        st.integers(120, 200),
        st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST]),
    )
    def test_pixels_are_those_of_transformers_mask2former_processor(self, within, shape, short, long, resample):
        size = get_size_with_aspect_ratio(shape, short, long)
        assume(min(size) > 0 and max(size) <= long)  # theirs fails for no pixel, and may exceed the limit by one
        image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
        given_both = {"size": {"shortest_edge": short, "longest_edge": long}, "resample": resample}
        as_last = {"input_data_format": "channels_last", "return_tensors": "pt"}
        theirs = Mask2FormerImageProcessorPil(**given_both, size_divisor=0)(image, **as_last).pixel_values[0]
        ours = GKCImageProcessor(**given_both, size_divisor=1)(image, **as_last).pixel_values[0]
        assert ours.shape == theirs.shape
        error = ((ours - theirs).abs() * STD[:, None, None]).max()
        within("resized pixels against transformers' Mask2Former, max abs of 0..1", error, 1 / 255)

    def test_settings_can_be_given_at_the_call(self, picture):
        processor = GKCImageProcessor()
        plain = processor(
            picture, do_resize=False, do_normalize=False, do_rescale=False, size_divisor=1, return_tensors="pt"
        )
        np.testing.assert_array_equal(plain.pixel_values[0].permute(1, 2, 0).numpy(), picture)
        as_floats = {"do_resize": False, "do_normalize": False, "size_divisor": 1}
        torch.testing.assert_close(
            processor(picture / 255, do_rescale=False, **as_floats, return_tensors="pt").pixel_values,
            processor(picture, **as_floats, return_tensors="pt").pixel_values,
        )
        assert processor(picture, return_tensors="np").pixel_values.dtype == np.float32
        assert processor(picture, return_tensors="pt").pixel_mask.dtype == torch.int64
        with pytest.raises(ValueError, match="return_tensors"):
            processor(picture, return_tensors="mlx")

    def test_without_padding_sizes_must_agree(self, picture):
        processor = GKCImageProcessor(do_resize=False, do_pad=False)
        assert processor([picture, picture], return_tensors="pt").pixel_values.shape == (2, 3, 45, 70)
        with pytest.raises(ValueError, match="do_pad"):
            processor([picture, picture[1:]], return_tensors="pt")


class TestSaving:
    def test_round_trip_through_auto_class(self, picture, tmp_path, transformers_log):
        processor = GKCImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}, image_mean=[0.1, 0.2, 0.3])
        processor.save_pretrained(tmp_path)
        with transformers_log.at_level(logging.WARNING):
            loaded = AutoImageProcessor.from_pretrained(tmp_path)
        assert transformers_log.records == []
        assert type(loaded) is GKCImageProcessor and loaded.to_dict() == processor.to_dict()
        assert torch.equal(
            loaded(picture, return_tensors="pt").pixel_values, processor(picture, return_tensors="pt").pixel_values
        )
        stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert stored["size"] == {"shortest_edge": 48, "longest_edge": 64} and stored["size_divisor"] == 32
        changed = AutoImageProcessor.from_pretrained(tmp_path, size={"height": 64, "width": 32}, do_normalize=False)
        assert changed(picture, return_tensors="pt").pixel_values.shape == (1, 3, 64, 32) and not changed.do_normalize


KNOWN_SETTINGS = list(GKCImageProcessor.valid_kwargs.__annotations__)
WRONG_SETTINGS = {
    "do_resize": ["no", 1],
    "image_mean": [[0.5, 0.5], math.nan, "grey", [0.5, 0.5, "0.5"]],
    "image_std": [0, [0.2, 0.0, 0.2], -1, math.inf, True, [[0.2, 0.2, 0.2]]],
    "input_data_format": ["last", 3],
    "resample": [99, "bilinear"],
    "rescale_factor": [math.nan, 0, -1, "1", [1]],
    "size": [
        0,
        "large",
        [1, 2, 3],
        {"shortest_edge": "64"},
        {"height": 3.5, "width": 2},
        {"height": 64, "width": 2**20},
    ],
    "size_divisor": [-1, 2.5, "32"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_SETTINGS.items() for value in values]
)
def test_invalid_setting_raises_and_names_it(name, value):
    picture = np.zeros((8, 9, 3), dtype=np.uint8)
    for use in (
        lambda: GKCImageProcessor(**{name: value}),
        lambda: GKCImageProcessor()(picture, **{name: value}, return_tensors="pt"),
    ):
        with pytest.raises(ValueError, match=f"`{name}"):
            use()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 10**6},
        {"size": {"longest_edge": 10**6}},
        {"crop_size": 0, "do_center_crop": True},
        {"crop_size": {"height": 4, "width": -4}, "do_center_crop": True},
        {"pad_size": {"height": "64", "width": 64}},
        {"pad_size": {"height": 2**40, "width": 64}},
    ],
)
def test_impossible_size_raises_and_names_it(settings):
    with pytest.raises(ValueError, match=rf"^`{next(iter(settings))}"):
        GKCImageProcessor(size=8)(np.zeros((8, 9, 3), dtype=np.uint8), **settings, return_tensors="pt")


def test_settings_of_any_kind_of_number():
    picture = np.full((8, 9, 3), 100, dtype=np.uint8)
    settings = {"rescale_factor": 1, "image_mean": np.array([1, 2, 3]), "image_std": (2, 2.0, np.float32(2))}
    (pixels,) = GKCImageProcessor(do_resize=False)(picture, **settings, return_tensors="pt").pixel_values
    assert pixels[:, 0, 0].tolist() == [49.5, 49.0, 48.5]


class Server(BaseHTTPRequestHandler):
    """Answers that no picture server gives, by path."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/slow-head":
            return self.drip(b"HTTP/1.0 200 OK\r\n" + b"X-A: b\r\n" * 50)
        self.send_response(200)
        if self.path == "/broken-off":
            self.send_header("Content-Length", str(10**6))
        self.end_headers()
        if self.path == "/slow":
            return self.drip(bytes(200))
        if self.path == "/endless":
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**16))
        self.wfile.write(PNG)

    def drip(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)

    def log_message(self, *arguments):
        pass


PNG = io.BytesIO()
Image.new("RGB", (3, 2), "red").save(PNG, "PNG")
PNG = PNG.getvalue()


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class TestAddresses:
    @pytest.mark.parametrize("path", ["/slow", "/slow-head"])
    def test_total_download_time_is_limited(self, address, path):
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"{path}: .*took longer than 0\.3 s: set a longer `timeout`"):
            read_image(address + path, timeout=0.3)
        assert time.monotonic() - began < 3

    def test_the_size_is_limited(self, address, monkeypatch):
        monkeypatch.setattr(image_processing_gkc, "MAX_URL_BYTES", 2**20)
        with pytest.raises(ValueError, match="is larger than 1 MiB: download it"):
            read_image(f"{address}/endless")

    @pytest.mark.parametrize("target", ["ftp://127.0.0.1:1/a.png", "file:///etc/hostname", "data:image/png;base64,"])
    def test_redirects_lead_to_web_addresses_only(self, address, target):
        with pytest.raises(
            ValueError, match=r"redirects to .* neither http nor https|Redirection to url .* is not allowed"
        ):
            read_image(f"{address}/to/{target}")
        assert read_image(f"{address}/to/{address}/picture").size == (3, 2)

    def test_interrupted_downloads_raise(self, address):
        with pytest.raises(ValueError, match=r"ended 9\d+ bytes early"):
            read_image(f"{address}/broken-off")

    @pytest.mark.parametrize("timeout", [math.nan, -1, "3"])
    def test_a_timeout_is_a_number(self, address, timeout):
        with pytest.raises(ValueError, match="`timeout` must be a number of at least 0"):
            read_image(f"{address}/picture", timeout=timeout)


class TestCommonCalls:
    """Settings that calls of transformers' image processors have, with the meaning that they have there."""

    def test_sizes_are_those_of_the_upright_image(self, picture, tmp_path):
        paths = []
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[274] = orientation
            paths.append(tmp_path / f"{orientation}.jpg")
            Image.fromarray(picture).save(paths[-1], exif=exif)
        sizes = GKCImageProcessor(size={"shortest_edge": 16})(paths, return_tensors="pt")["original_sizes"]
        assert sizes.tolist() == [[45, 70]] * 4 + [[70, 45]] * 4

    def test_lists_without_return_tensors(self, picture):
        theirs = Mask2FormerImageProcessorPil()([picture] * 2, np.zeros((2, 45, 70), np.uint8))
        ours = GKCImageProcessor()([picture] * 2, np.zeros((2, 45, 70), np.uint8))
        for name, value in theirs.items():
            assert type(ours[name]) is type(value) is list
            assert [type(entry) for entry in ours[name]] == [type(entry) for entry in value]
        assert ours["original_sizes"] == [[45, 70]] * 2
        as_arrays = GKCImageProcessor()([picture] * 2, return_tensors="np")
        assert all(isinstance(value, np.ndarray) for value in as_arrays.values())

    def test_older_name_of_the_longest_edge(self, picture, tmp_path):
        GKCImageProcessor().save_pretrained(tmp_path)
        for processor in (
            GKCImageProcessor(size=42, max_size=84),
            GKCImageProcessor.from_dict(GKCImageProcessor().to_dict(), size=42, max_size=84),
            GKCImageProcessor.from_pretrained(tmp_path, size=42, max_size=84),
            AutoImageProcessor.from_pretrained(tmp_path, size={"shortest_edge": 42}, max_size=84),
        ):
            assert dict(processor.size) == {"shortest_edge": 42, "longest_edge": 84}
        assert dict(GKCImageProcessor(max_size=1000).size) == {"shortest_edge": 800, "longest_edge": 1000}
        called = GKCImageProcessor()(picture, size=42, max_size=50, return_tensors="pt")
        assert called["pixel_mask"].sum(dim=(1, 2)).tolist() == [32 * 50]
        for wrong in ({"height": 4, "width": 4}, {"shortest_edge": 4, "longest_edge": 5}):
            with pytest.raises(ValueError, match="`max_size` can only be combined with `shortest_edge`"):
                GKCImageProcessor(size=wrong, max_size=84)
        with pytest.raises(ValueError, match="`max_size`"):
            GKCImageProcessor()(picture, size=42, max_size=0)

    @pytest.mark.parametrize("crop", [{"height": 32, "width": 40}, {"height": 61, "width": 40}, 96, [50, 91]])
    def test_center_crops_are_those_of_transformers(self, picture, crop):
        settings = {"do_resize": False, "do_center_crop": True, "crop_size": crop, "do_normalize": False}
        theirs = CLIPImageProcessorPil(**settings)(picture, return_tensors="pt")["pixel_values"]
        ours = GKCImageProcessor(**settings, size_divisor=1)(picture, return_tensors="pt")
        assert torch.allclose(ours["pixel_values"], theirs, atol=1e-6)
        assert ours["pixel_mask"].all() and ours["original_sizes"].tolist() == [list(theirs.shape[2:])]

    def test_format_and_device_of_the_result(self, picture):
        first = GKCImageProcessor()(picture, return_tensors="pt")
        last = GKCImageProcessor()(picture, data_format="channels_last", device="cpu", return_tensors="pt")
        assert torch.equal(first["pixel_values"].movedim(1, -1), last["pixel_values"])
        on_meta = GKCImageProcessor()(picture, np.zeros((45, 70)), device="meta", return_tensors="pt")
        assert {on_meta[name].device.type for name in ("pixel_values", "pixel_mask", "original_sizes")} == {"meta"}
        assert on_meta["mask_labels"][0].device.type == "meta"
        for setting in (
            {"device": "gpu"},
            {"data_format": "channels"},
            {"do_center_crop": True},
            {"crop_size": [1] * 3},
        ):
            with pytest.raises(ValueError, match="crop_size" if "do_center_crop" in setting else next(iter(setting))):
                GKCImageProcessor()(picture, **setting, return_tensors="pt")

    @pytest.mark.parametrize("device", ["mps:0" if torch.cuda.is_available() else "cuda", "xpu", "vulkan"])
    def test_unavailable_device_raises(self, picture, device):
        with pytest.raises(ValueError, match=rf"^`device` '{device}' is not available here \(.+\): leave it out"):
            GKCImageProcessor()(picture, device=device, return_tensors="pt")

    @pytest.mark.parametrize("name", [name for name in KNOWN_SETTINGS if name.startswith("do_")])
    def test_flags_of_none_raise(self, picture, name):
        with pytest.raises(ValueError, match=f"^`{name}` must be True or False, got None: leave it out"):
            GKCImageProcessor()(picture, **{name: None}, return_tensors="pt")

    def test_own_mean_and_std_per_channel(self):
        values = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
        settings = {"do_convert_rgb": False, "input_data_format": "channels_last", "return_tensors": "pt"}
        settings |= {"size": {"height": 32, "width": 32}}
        means = {"image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [1.0, 0.5, 0.25, 2.0]}
        ours = GKCImageProcessor()(values, **settings, **means)["pixel_values"]
        theirs = Mask2FormerImageProcessorPil(size_divisor=0)(values[..., :3], **settings)["pixel_values"]
        scale = STD / torch.tensor(means["image_std"][:3])
        shift = (MEAN - torch.tensor(means["image_mean"][:3])) / torch.tensor(means["image_std"][:3])
        expected = theirs * scale[:, None, None] + shift[:, None, None]
        assert ours.shape == (1, 4, 32, 32) and torch.allclose(ours[:, :3], expected, atol=2e-2)
        grey = GKCImageProcessor()(Image.new("L", (8, 8)), **settings, image_mean=0.5, image_std=0.5)
        assert grey["pixel_values"].shape == (1, 1, 32, 32)
        with pytest.raises(ValueError, match="`image_mean` must have 1 or 4 numbers, one per channel, got 3"):
            GKCImageProcessor()(values, **settings)
        with pytest.raises(ValueError, match=r"with \[1, 3\] channels cannot form a batch: set `do_convert_rgb=True`"):
            mixed = [Image.new("L", (8, 8)), Image.new("RGB", (8, 8))]
            GKCImageProcessor()(mixed, do_convert_rgb=False, do_normalize=False)

    def test_padding_to_a_size(self, picture):
        processor = GKCImageProcessor(do_resize=False, pad_size={"height": 64, "width": 128})
        assert processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 128)
        with pytest.raises(ValueError, match=r"`pad_size` must give .* at least \(45, 70\)"):
            processor(picture, pad_size={"height": 44, "width": 128})

    def test_ignored_settings_do_not_change_the_result(self, picture):
        plain = GKCImageProcessor()([picture] * 2, return_tensors="pt")
        other = GKCImageProcessor()([[picture], [], [picture]], disable_grouping=True, return_tensors="pt")
        assert torch.equal(plain["pixel_values"], other["pixel_values"])
