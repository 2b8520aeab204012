"""Tests that images of every kind, passed in every form, become their expected pixels."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_gkc.image_processing_gkc import GKCImageProcessor, read_image

from .image_kinds import KINDS, FileServer, apply_orientation, array_inputs, encode_image, file_inputs

WITH_ORIENTATION = ("jpeg", "png", "webp", "tiff")


@pytest.fixture(scope="module")
def server():
    server = FileServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


def noise_of(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=6)
@given(st.integers(0, 10**6), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_all_image_kinds_in_all_input_forms_become_expected_pixels(folder, server, kind, seed, size):
    example = KINDS[kind](noise_of(seed, size))
    for file_format, data in example.files.items():
        by_pillow = np.asarray(read_image(Image.open(io.BytesIO(data))))
        where = f"{kind} as {file_format}"
        assert by_pillow.shape == (*size, 3), where
        if example.expected is not None:
            assert np.abs(by_pillow - np.rint(example.expected)).max() <= example.tolerance, where
        for form, image in file_inputs(data, folder, server).items():
            np.testing.assert_array_equal(np.asarray(read_image(image)), by_pillow, err_msg=f"{where}, {form}")
    for array in example.arrays:
        for form, (image, data_format) in array_inputs(array).items():
            difference = np.abs(np.asarray(read_image(image, data_format)).astype(int) - by_pillow).max()
            # Pillow converts a 16-bit color file to 8 bits, read_image a 16-bit array.
            assert difference <= (example.tolerance if array.dtype == np.uint16 else 0), (
                f"{kind}, {array.dtype} {form}"
            )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "lossy" in kind or kind in ("RGB", "RGBA", "16-bit gray")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(folder, server, kind, orientation):
    """Compares a file with the tag to one with the same stored pixels and no tag."""
    for file_format, data in KINDS[kind](noise_of(0, (5, 9))).files.items():
        if file_format not in WITH_ORIENTATION:
            continue
        stored = Image.open(io.BytesIO(data))
        exif = Image.Exif()
        exif[0x0112] = orientation
        settings_of_kind = {"lossless": True, "exact": True} if file_format == "webp" else {}
        tagged = encode_image(stored, file_format, exif=exif, **settings_of_kind)
        untagged = encode_image(stored, file_format, **settings_of_kind)
        expected = apply_orientation(np.asarray(read_image(untagged)), orientation)
        for form, image in file_inputs(tagged, folder, server).items():
            message = f"{kind} as {file_format}, {form}"
            np.testing.assert_array_equal(np.asarray(read_image(image)), expected, err_msg=message)


@pytest.mark.parametrize("kind", ["8-bit gray", "RGB", "RGBA", "16-bit gray", "1 bit", "float gray"])
def test_processor_returns_equal_pixels_for_all_input_forms(folder, server, kind):
    """The images are resized, normalized and padded."""
    example = KINDS[kind](noise_of(1, (9, 13)))
    images = []
    for data in example.files.values():
        images += file_inputs(data, folder, server).values()
    for array in example.arrays:
        images += [image for image, data_format in array_inputs(array).values()]
    pixel_values = GKCImageProcessor(size={"shortest_edge": 20, "longest_edge": 40})(
        images, return_tensors="pt"
    ).pixel_values
    assert len(images) > 7 and pixel_values.shape[-2:] == (32, 32)
    assert all((values == pixel_values[0]).all() for values in pixel_values)


@pytest.mark.parametrize("data", [b"", b"no picture", b"<html></html>"], ids=["zero bytes", "text", "page"])
def test_errors_name_unreadable_images(folder, server, data):
    for name, image in unreadable_inputs(data, folder, server).items():
        with pytest.raises(ValueError, match="cannot be read as an image") as error:
            read_image(image, name="image 3")
        assert name in str(error.value) and len(str(error.value)) < 500


def unreadable_inputs(data, folder, server):
    path = folder / "broken.png"
    path.write_bytes(data)
    return {
        "broken.png": path,
        "image 3": data,
        "127.0.0.1": server.url(data),
        "data:image/png": "data:image/png," + "A" * 5000,
    }


@pytest.mark.parametrize("kind", ["RGB", "lossy RGB", "palette", "16-bit gray", "1 bit"])
def test_truncated_files_are_refused(folder, server, kind):
    for file_format, whole in KINDS[kind](noise_of(2, (60, 80))).files.items():
        data = whole[: len(whole) // 2]
        for form, image in {"bytes": data, "path": folder / "truncated", "URL": server.url(data)}.items():
            (folder / "truncated").write_bytes(data)
            with pytest.raises(ValueError, match="cannot be read as an image"):
                read_image(image)
                pytest.fail(f"{kind} as {file_format} by {form} was accepted")


def test_error_names_missing_url(server):
    with pytest.raises(ValueError, match=r"/nowhere\.png: cannot be read as an image: HTTP Error 404"):
        read_image(server.url(None, "/nowhere.png"))


def test_decompression_bombs_are_errors(tmp_path):
    """The size is read from the header, without decoding."""
    path = tmp_path / "bomb.png"
    path.write_bytes(encode_image(Image.new("1", (20000, 20000))))
    with pytest.raises(ValueError, match=r"bomb\.png: .* exceeds limit"):
        read_image(path)


def test_large_image_is_read_without_warning(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (8192, 8192), 1).save(path)
    with warnings.catch_warnings(action="error"):
        batch = GKCImageProcessor(do_normalize=False)(path, return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 800, 800)
    assert (batch.pixel_values == 1).all()


@pytest.mark.parametrize(("shape", "resized"), [((1, 8000), (1, 1333)), ((8000, 1), (1333, 1)), ((1, 1), (800, 800))])
def test_extreme_aspect_ratios_are_resized(folder, server, shape, resized):
    data = encode_image(Image.fromarray(np.full((*shape, 3), 200, np.uint8)))
    for image in file_inputs(data, folder, server).values():
        batch = GKCImageProcessor(do_normalize=False)(image, return_tensors="pt")
        mask = batch.pixel_mask[0]
        assert (int(mask[:, 0].sum()), int(mask[0].sum())) == resized
        assert np.allclose(batch.pixel_values[0, :, : resized[0], : resized[1]], 200 / 255)
