"""Fuzzer of images of every kind, intact, damaged and artificial, compared with the pixels they represent.

Each input is a damaged file, a PNG or TIFF file of a rare kind, a PIL image of any mode, an array or tensor of any
shape, data type and values, or a batch for the image processor. It must be rejected by a ValueError that names it (a
TypeError for objects that are not images), or become the pixels that this module computes from its numbers in fp64.
"""

import io
import random
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_gkc.image_processing_gkc import GKCImageProcessor, read_image
from tests.image_kinds import (
    KINDS,
    apply_orientation,
    composite_on_white,
    encode_image,
    gray,
    pack_bits,
    png_file,
    tiff_file,
)

REFUSED = "refused"  # stands for expected pixels
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F")
MODES += ("I;16", "I;16L", "I;16B")
SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
NUMPY_TYPES = ("bool", "u1", "i1", "u2", ">u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", ">f4", "f8", "g")
NON_NUMERIC_TYPES = ("c8", "S3", "U2", "O", "M8[s]", "m8[s]", "V3")
TORCH_TYPES = (torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)
TORCH_TYPES += (torch.uint32, torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_ERROR = 0.501  # levels, for rounding in fp32


@dataclass
class Context:
    """Folder for files, intact files as (kind, format, content, pixels), and an image processor."""

    folder: Path
    files: list[tuple[str, str, bytes, np.ndarray]]
    processor: GKCImageProcessor


@dataclass
class Input:
    """One input of the fuzzer.

    Args:
        image: Argument of `read_image`.
        expected: Pixels (H, W, 3) in 0..255, REFUSED, or None if both reading and rejecting it are right.
        tolerance: Allowed difference in levels due to rounding in the decoder.
        data_format: `input_data_format` of arrays and tensors.
        may_be_refused: Whether rejecting it is right although it has expected pixels.
    """

    image: Any
    expected: np.ndarray | str | None
    tolerance: int = 0
    data_format: Any = None
    may_be_refused: bool = False


def setup(folder: Path) -> Context:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    files = []
    for kind, make in KINDS.items():
        noise = np.random.default_rng(len(files)).integers(0, 256, (9, 14, 4), dtype=np.uint8)
        for file_format, data in make(noise).files.items():
            files.append((kind, file_format, data, np.asarray(read_image(data)).astype(float)))
    image = Image.fromarray(noise[..., :3])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, "maker", "2026:01:01 00:00:00"
    for file_format, settings in (("jpeg", {"progressive": True}), ("png", {}), ("webp", {}), ("tiff", {})):
        data = encode_image(image, file_format, exif=exif, **settings)
        files.append(("with EXIF", file_format, data, np.asarray(read_image(data)).astype(float)))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        data = encode_image(image, "tiff", compression=compression)
        files.append((compression, "tiff", data, np.asarray(read_image(data)).astype(float)))
    return Context(folder, files, GKCImageProcessor(do_resize=False, do_normalize=False))


def check(context: Context, rng: random.Random) -> str:
    draw = rng.choices((_damaged, _made_png, _made_tiff, _of_any_mode, _array, _batch), (6, 2, 2, 2, 4, 1))[0]
    if draw is _batch:
        return _batch(context, rng)
    made = draw(context, rng)
    named = f"image {rng.randrange(10**6)}"
    if isinstance(made.image, bytes):
        made.image, named = _input_form(context, made.image, rng, named)
    try:
        got = read_image(made.image, made.data_format, name=named)
    except (ValueError, TypeError) as error:
        is_number = isinstance(made.image, np.ndarray | torch.Tensor)
        assert isinstance(error, ValueError) or is_number, f"a TypeError for a file: {error}"
        assert named in str(error) and len(str(error)) < 700, f"the error does not name {named}: {error}"
        may_refuse = made.may_be_refused or made.expected is None or isinstance(made.expected, str)
        assert may_refuse, f"{draw.__name__}: {_describe(made)} was refused: {error}"
        return "refused"
    _compare(draw.__name__, made, got)
    return "accepted"


def _compare(source: str, made: Input, got: Image.Image) -> None:
    assert got.mode == "RGB", got.mode
    assert not isinstance(made.expected, str), f"{source}: {_describe(made)} was accepted"
    if made.expected is None:
        return
    values = np.asarray(got).astype(float)
    assert values.shape == made.expected.shape, (
        f"{source}: {_describe(made)}: {values.shape}, not {made.expected.shape}"
    )
    fault = np.abs(values - made.expected).max()
    assert fault <= made.tolerance + MAX_ERROR, f"{source}: {_describe(made)} differs by {fault} levels"


def _describe(made: Input) -> str:
    image = made.image
    if isinstance(image, np.ndarray | torch.Tensor):
        kind = f"{type(image).__name__} {tuple(image.shape)} {image.dtype} as {made.data_format}"
    elif isinstance(image, Image.Image):
        kind = f"{image.format} image of mode {image.mode} with {str(image.info)[:100]}"
    else:
        kind = f"{type(image).__name__} {str(image)[:60]}"
    return kind


def _input_form(context: Context, data: bytes, rng: random.Random, name: str) -> tuple[Any, str]:
    """Return a file in one of the forms in which it can be passed, and its name in error messages."""
    form = rng.choice(("bytes", "Path", "str", "PIL"))
    if form == "bytes":
        return data, name
    path = context.folder / f"{name}.image"
    for old in context.folder.iterdir():
        old.unlink()
    path.write_bytes(data)
    if form == "PIL":
        try:
            return Image.open(path), path.name
        except Exception:  # read_image need not open files that Pillow cannot open
            return data, name
    return (path if form == "Path" else str(path)), path.name


# Expected pixels of a PIL image


def expected_pixels(image: Image.Image) -> tuple[np.ndarray | str | None, int]:
    """Return the expected pixels (H, W, 3) in 0..255, None if only Pillow knows them, and the tolerance in levels."""
    mode, transparency = image.mode, image.info.get("transparency")
    if 0 in image.size:
        return REFUSED, 0
    values, tolerance = np.asarray(image.convert("RGB")) if mode in ("YCbCr", "HSV", "LAB") else np.asarray(image), 0
    if mode in SIXTEEN_BITS or mode == "F":
        tags = getattr(image, "tag_v2", {})
        limit = 1 if mode == "F" else 4095 if tags.get(258) == (12,) else 65535
        slack = 1e-5 if mode == "F" else 0
        if not (values.min() >= -slack and values.max() <= limit + slack):
            return REFUSED, 0
        pixels = gray(np.clip(values.astype(float) / limit, 0, 1) * 255)
        pixels = 255 - pixels if tags.get(262) == 0 else pixels
        if mode != "F" and transparency is not None:
            pixels[values == transparency] = 255
    elif mode in ("P", "PA"):
        indices = values if mode == "P" else values[..., 0]
        pixels, tolerance = _palette_pixels(image, indices, values, transparency), 1
    elif mode in ("1", "L"):
        pixels = gray(values * 255 if mode == "1" else values)
        if transparency is not None:
            pixels[values == (bool(transparency) if mode == "1" else transparency)] = 255
    elif mode in ("LA", "RGBA", "La", "RGBa"):
        colors = values[..., :-1].astype(float)
        if mode in ("La", "RGBa"):
            colors = np.clip(colors * 255 / np.maximum(values[..., -1:], 1), 0, 255)
        colors = np.repeat(colors, 3, axis=-1) if colors.shape[-1] == 1 else colors
        pixels, tolerance = composite_on_white(colors, values[..., -1]), 2 if mode in ("La", "RGBa") else 1
    elif mode == "CMYK":
        light = 255 - values.astype(float)
        pixels, tolerance = light[..., :3] * light[..., 3:] / 255, 1
    else:
        pixels = values[..., :3].astype(float)
        if mode == "RGB" and transparency is not None:
            pixels[(values == np.array(transparency)).all(axis=-1)] = 255
    orientation = image.getexif().get(0x0112, 1)
    return apply_orientation(pixels, orientation if orientation in range(1, 9) else 1), tolerance


def _palette_pixels(image: Image.Image, indices: np.ndarray, values: np.ndarray, transparency: Any) -> np.ndarray:
    table = np.zeros((256, 4))
    table[:, 3] = 255
    stored = np.array(image.getpalette("RGBA")).reshape(-1, 4)
    table[: len(stored)] = stored
    if isinstance(transparency, bytes):
        table[: len(transparency), 3] = list(transparency)[:256]
    elif transparency is not None:
        table[transparency, 3] = 0
    alpha = values[..., 1] if image.mode == "PA" else table[indices, 3]
    return composite_on_white(table[indices, :3], alpha)


# Damaged files


def _damaged(context: Context, rng: random.Random) -> Input:
    _, file_format, data, pixels = rng.choice(context.files)
    damage = rng.choice((_cut, _flipped, _chunk_edited, _huge, _spliced))
    data = damage(data, rng, file_format)
    if damage is _cut:  # a truncated file is rejected unless no pixel was lost
        return Input(data, pixels, may_be_refused=True)
    if file_format == "png" and not _is_intact_png(data):
        return Input(data, pixels, may_be_refused=True)
    return _as_pillow_reads(data, file_format)


def _as_pillow_reads(data: bytes, file_format: str) -> Input:
    try:
        with Image.open(io.BytesIO(data)) as image:
            tiles = list(image.tile)
            image.load()
            expected, tolerance = expected_pixels(image)
        if file_format == "tiff" and not _fill(tiles, image.size):
            return Input(data, REFUSED)
    except Exception:  # Pillow's decoders raise errors of many types
        return Input(data, REFUSED)
    return Input(data, expected, tolerance)


def _fill(tiles: list, size: tuple[int, int]) -> bool:
    """Return whether the strips of a TIFF file cover the image up to its right and lower edge."""
    reached = np.array([tile[1][2:] for tile in tiles]).max(axis=0)
    return bool((np.sort(reached) >= np.sort(size)).all())


def _is_intact_png(data: bytes) -> bool:
    """Return whether all checksums of a PNG file are right, up to its IEND chunk."""
    at = 8
    while at + 12 <= len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 8 + length
        if data[end : end + 4] != struct.pack(">I", zlib.crc32(data[at + 4 : end])):
            return False
        at = end + 4
        if kind == b"IEND":
            return True
    return False


def _cut(data: bytes, rng: random.Random, file_format: str) -> bytes:
    return data[: rng.randrange(len(data))]


def _flipped(data: bytes, rng: random.Random, file_format: str) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _spliced(data: bytes, rng: random.Random, file_format: str) -> bytes:
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    middle = rng.choice((b"", rng.randbytes(rng.randrange(40)), data[start:stop] * 2, bytes(stop - start)))
    return data[:start] + middle + data[stop:]


def _chunk_edited(data: bytes, rng: random.Random, file_format: str) -> bytes:
    """Edit a chunk of a PNG file and update its checksums; overwrite two bytes of other files."""
    if file_format != "png":
        changed = bytearray(data)
        at = rng.randrange(min(len(data), 200))
        changed[at : at + 2] = rng.choice((b"\0\0", b"\xff\xff", b"\1\0", b"\0\1", rng.randbytes(2)))
        return bytes(changed[: len(data)])
    chunks = _chunks(data)
    at = rng.randrange(len(chunks))
    kind, content = chunks[at]
    edit = rng.choice(("lose", "double", "change", "add", "move"))
    if edit == "lose":
        del chunks[at]
    elif edit == "double":
        chunks.insert(at, chunks[at])
    elif edit == "move":
        chunks.insert(rng.randrange(len(chunks)), chunks.pop(at))
    elif edit == "change" and content:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        chunks[at] = kind, bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed) + 1)))])
    else:
        new = rng.choice((b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"gAMA", b"pHYs", b"acTL", b"fcTL", b"tEXt", b"zTXt"))
        chunks.insert(rng.randrange(1, len(chunks)), (new, rng.randbytes(rng.choice((0, 1, 2, 3, 6, 9, 26)))))
    return png_file(chunks)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _huge(data: bytes, rng: random.Random, file_format: str) -> bytes:
    """Set a size in the header that the file's content does not have."""
    side = rng.choice((0, 1, 200, 65535, 2**31 - 1, 2**32 - 1))
    place, form = {
        "png": (16 + rng.choice((0, 4)), ">I"),
        "gif": (6 + rng.choice((0, 2)), "<H"),
        "bmp": (18 + rng.choice((0, 4)), "<I"),
    }.get(file_format, (rng.randrange(min(len(data), 64)), "<I"))
    number = struct.pack(form, side % 65536 if form == "<H" else side)
    if form == "<H" and side > 4000:  # a large canvas of a small GIF is valid and only takes time
        number = b"\0\1"
    changed = data[:place] + number + data[place + len(number) :]
    return png_file(_chunks(changed)) if file_format == "png" else changed


# Files of rare kinds


def _samples(rng: random.Random, shape: tuple[int, ...], bits: int) -> np.ndarray:
    generator = np.random.default_rng(rng.randrange(2**32))
    return generator.integers(0, rng.choice((2**bits, max(2**bits // 4, 2))), shape, dtype=np.int64)


def _made_png(context: Context, rng: random.Random) -> Input:
    """Generate PNG files of all color types and bit depths, with and without tRNS."""
    color_type = rng.choice((0, 2, 3, 4, 6))
    bits = rng.choice({0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(color_type, (8, 16)))
    height, width, channels = rng.randint(1, 9), rng.randint(1, 9), {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    values = _samples(rng, (height, width, channels), bits)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    colors, alpha, chunks = _colors_of_png(values, color_type, bits, rng)
    data = png_file([(b"IHDR", header), *chunks, (b"IDAT", _png_rows(values, bits, rng)), (b"IEND", b"")])
    if color_type == 2 and bits == 16 and chunks:
        return Input(data, None)  # Pillow converts to 8 bits before it compares with the transparent color
    colors = np.broadcast_to(colors, (height, width, 3)).astype(float)
    return Input(data, composite_on_white(colors, alpha), tolerance=2 if bits == 16 else 1)


def _colors_of_png(
    values: np.ndarray, color_type: int, bits: int, rng: random.Random
) -> tuple[np.ndarray, np.ndarray, list[tuple[bytes, bytes]]]:
    """Return colors (H, W, 1 or 3) and opacities (H, W) in 0..255, and the chunks PLTE and tRNS."""
    levels, alpha = values * 255 / (2**bits - 1), np.full(values.shape[:2], 255.0)
    is_transparent = rng.random() < 0.5
    if color_type in (4, 6):
        return levels[..., :-1], levels[..., -1], []
    if color_type == 3:
        palette, opacities = _samples(rng, (2**bits, 3), 8), _samples(rng, (rng.randint(1, 2**bits),), 8)
        chunks = [(b"PLTE", palette.astype(np.uint8).tobytes())]
        if is_transparent:
            chunks.append((b"tRNS", bytes(opacities.tolist())))
            alpha = np.concatenate([opacities, np.full(2**bits - len(opacities), 255)])[values[..., 0]].astype(float)
        return palette[values[..., 0]], alpha, chunks
    if not is_transparent:
        return levels, alpha, []
    chosen = values[0, 0]
    alpha = np.where((values == chosen).all(axis=-1), 0.0, 255.0)
    return levels, alpha, [(b"tRNS", struct.pack(f">{len(chosen)}H", *chosen.tolist()))]


def _png_rows(values: np.ndarray, bits: int, rng: random.Random) -> bytes:
    """Return compressed rows, each stored unfiltered or as the difference from the row above."""
    stored = np.frombuffer(pack_bits(values.reshape(len(values), -1), bits), np.uint8).reshape(len(values), -1)
    above, lines = np.zeros_like(stored[0]), []
    for line in stored:
        kind = rng.choice((0, 2))
        lines.append(bytes([kind]) + (line - above if kind else line).tobytes())
        above = line
    return zlib.compress(b"".join(lines))


def _made_tiff(context: Context, rng: random.Random) -> Input:
    """Generate gray, palette and color TIFF files of all bit depths and both byte orders, also with white as zero."""
    big_endian = rng.random() < 0.5
    bits, sample_format = rng.choice(((1, 1), (2, 1), (4, 1), (8, 1), (12, 1), (16, 1), (32, 3)))
    photometric = rng.choice((0, 1) if bits not in (8, 16) else (0, 1, 2))
    height, width, channels = rng.randint(1, 9), rng.randint(1, 9), 3 if photometric == 2 else 1
    values = _samples(rng, (height, width, channels), min(bits, 16))
    intensity = values / (2 ** min(bits, 16) - 1)
    if bits == 32:
        content = intensity.astype(">f4" if big_endian else "<f4").tobytes()
    else:
        content = pack_bits(values.reshape(height, -1), bits, big_endian)
    pixels = 255 * np.broadcast_to(1 - intensity if photometric == 0 else intensity, (height, width, 3))
    data = tiff_file(content, values.shape, bits, sample_format, photometric, big_endian)
    # Pillow keeps the upper byte of 16-bit colors, and cannot decode some kinds.
    return Input(data, pixels, tolerance=1 if photometric == 2 else 0, may_be_refused=True)


def _of_any_mode(context: Context, rng: random.Random) -> Input:
    mode = rng.choice(MODES)
    size = rng.choice(((0, 3), (1, 1), *((rng.randint(1, 9), rng.randint(1, 9)) for _ in range(4))))
    generator = np.random.default_rng(rng.randrange(2**32))
    image = _random_image(mode, size, generator, rng)
    if mode in ("P", "PA"):
        layout = rng.choice(("RGB", "RGBA")) if mode == "P" else "RGB"
        image.putpalette(generator.bytes(rng.choice((1, 2, 16, 256)) * len(layout)), layout)
    first = image.getpixel((0, 0)) if all(size) else (0, 0, 0)
    transparent = {"P": [3, bytes([0, 99]), generator.bytes(256)], "RGB": [(1, 2, 3), first]}
    transparent |= {mode: [0, 1, 7] for mode in ("1", "L", "I;16", "I;16B", "I;16L")}
    if mode in transparent and rng.random() < 0.4:
        image.info["transparency"] = rng.choice(transparent[mode])
    if rng.random() < 0.3:
        image.getexif()[0x0112] = rng.choice((*range(10), "6", 6.5, 70000))
    expected, tolerance = expected_pixels(image)
    return Input(image, expected, tolerance)


def _random_image(mode: str, size: tuple[int, int], generator: np.random.Generator, rng: random.Random) -> Image.Image:
    if 0 in size:
        return Image.new(mode, size)
    if mode in ("I", "F"):
        ranges = {"I": ((0, 65536), (0, 300), (-9, 9), (0, 99999)), "F": ((0, 1), (0, 1), (-1, 1), (0, 2))}
        numbers = generator.uniform(*rng.choice(ranges[mode]), size[::-1])
        return Image.fromarray(numbers.astype(np.float32 if mode == "F" else np.int32))
    bytes_of_pixel = {"L": 1, "P": 1, "LA": 2, "La": 2, "PA": 2, "RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4}
    width = (size[0] + 7) // 8 if mode == "1" else size[0] * bytes_of_pixel.get(mode, 2 if "I;" in mode else 3)
    return Image.frombytes(mode, size, generator.bytes(width * size[1]))


# Arrays and tensors


def _array(context: Context, rng: random.Random) -> Input:
    axes = rng.choice((0, 1, 2, 2, 3, 3, 3, 3, 4, 5))
    shape = tuple(rng.choice((0, 1, 2, 3, 3, 4, 5, 7, 9)) for _ in range(axes))
    if axes == 3 and rng.random() < 0.7:
        channels = rng.choice((1, 3, 4))
        shape = (channels, *shape[1:]) if rng.random() < 0.5 else (*shape[:2], channels)
    data_format = rng.choice((None, None, None, "channels_first", "channels_last", "upside_down"))
    if rng.random() < 0.08:
        return Input(np.zeros(shape, rng.choice(NON_NUMERIC_TYPES)), REFUSED, data_format=data_format)
    numbers = _numbers(shape, rng)
    image = _as_array(numbers, rng) if rng.random() < 0.5 else _as_tensor(numbers, rng)
    if isinstance(image, torch.Tensor):
        plain = image.detach()
        values, preferred = (plain.double() if plain.is_floating_point() else plain).numpy(), 0
    else:
        values, preferred = image, -1
    return Input(image, _expected_of_array(values, preferred, data_format), data_format=data_format)


def _numbers(shape: tuple[int, ...], rng: random.Random) -> np.ndarray:
    generator = np.random.default_rng(rng.randrange(2**32))
    limits = rng.choice(((0, 1), (0, 1), (0, 255), (0, 255), (0, 65535), (-3, 5), (0, 1e6), (-2e-5, 1)))
    numbers = np.array(generator.uniform(*limits, shape))
    if numbers.size and rng.random() < 0.08:
        numbers.reshape(-1)[rng.randrange(numbers.size)] = rng.choice((np.nan, np.inf, -np.inf))
    return numbers


def _as_array(numbers: np.ndarray, rng: random.Random) -> np.ndarray:
    with np.errstate(all="ignore"):
        array = numbers.astype(rng.choice(NUMPY_TYPES))
    layout = rng.choice(("plain", "Fortran", "reversed", "repeated", "read-only"))
    if layout == "Fortran":
        return np.asfortranarray(array)
    if layout == "reversed" and array.ndim:
        return array[..., ::-1]
    if layout == "repeated" and array.ndim and array.size:
        return np.broadcast_to(array[:1], array.shape)
    array.flags.writeable = layout != "read-only"
    return array


def _as_tensor(numbers: np.ndarray, rng: random.Random) -> torch.Tensor:
    dtype = rng.choice(TORCH_TYPES)
    if not dtype.is_floating_point:
        numbers = np.asarray(np.nan_to_num(numbers, posinf=9e9, neginf=-9e9))
    tensor = torch.from_numpy(numbers)
    tensor = tensor.flip(-1) if numbers.ndim and rng.random() < 0.3 else tensor
    tensor = tensor.transpose(0, -1) if numbers.ndim and rng.random() < 0.2 else tensor
    tensor = tensor.to(dtype)
    return tensor.requires_grad_() if dtype.is_floating_point and rng.random() < 0.2 else tensor


def _expected_of_array(values: np.ndarray, preferred: int, data_format: str | None) -> np.ndarray | str:
    """Return the expected pixels of an array; if both ends may be channels, the one at `preferred` is."""
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and data_format in (None, "channels_first", "channels_last"):
        axis = {"channels_first": 0, "channels_last": -1}.get(data_format)
        if axis is None:
            fits = [end for end in (0, -1) if values.shape[end] in (3, 4)]
            fits = fits or [end for end in (0, -1) if values.shape[end] == 1] or [preferred]
            axis = preferred if preferred in fits else fits[0]
        values = np.moveaxis(values, axis, -1)
    else:
        return REFUSED
    if values.shape[-1] not in (1, 3, 4) or values.size == 0:
        return REFUSED
    kind, width = values.dtype.kind, values.dtype.itemsize
    limit = 1 if kind in "fb" else 65535 if (kind, width) == ("u", 2) else 255
    slack = 1e-5 if kind == "f" else 0
    numbers = values.astype(np.longdouble)
    if not (numbers.min() >= -slack and numbers.max() <= limit + slack):
        return REFUSED
    levels = np.clip(numbers.astype(float) / limit, 0, 1) * 255
    if levels.shape[-1] == 4:
        return composite_on_white(np.rint(levels[..., :3]), np.rint(levels[..., 3]))
    return np.broadcast_to(levels, (*levels.shape[:2], 3))


# The whole processor


def _batch(context: Context, rng: random.Random) -> str:
    """Pass several intact files at once, one of them perhaps replaced by an invalid one, which the error must name."""
    chosen = [rng.choice(context.files) for _ in range(rng.randint(1, 4))]
    images, expected = [data for _, _, data, _ in chosen], [pixels for *_, pixels in chosen]
    bad = rng.randrange(len(images)) if rng.random() < 0.5 else None
    if bad is not None:
        images[bad] = rng.choice(
            (b"", images[bad][:20], np.full((3, 3), -1), np.zeros((2, 5, 7)), Image.new("L", (0, 1)))
        )
    try:
        batch = context.processor(images, return_tensors="pt")
    except ValueError as error:
        assert bad is not None and f"image {bad + 1} (index {bad})" in str(error), f"refused: {error}"
        return "refused"
    assert bad is None, f"a batch with {images[bad]!r} was accepted"
    for index, pixels in enumerate(expected):
        height, width = pixels.shape[:2]
        inside = batch.pixel_mask[index].bool()
        assert inside.sum() == height * width and inside[:height, :width].all()
        got = batch.pixel_values[index, :, :height, :width].permute(1, 2, 0).numpy() * 255
        assert np.abs(got - pixels).max() < 1e-2 and not batch.pixel_values[index][:, ~inside].any()
    return "accepted"
