"""Image files and arrays of every kind with their expected RGB pixels, computed from the definition of the kind."""

import base64
import io
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PALETTE = np.arange(256)[:, None] * np.array([1, 3, 7]) % 256


@dataclass
class Example:
    """One image as files and arrays, with its expected pixels.

    Attributes:
        files: Content of image files by format.
        expected: Pixels (H, W, 3) in 0..255, None for lossy formats, whose pixels depend on the decoder.
        tolerance: Allowed difference in levels due to rounding in the decoder.
        arrays: Arrays (H, W) or (H, W, C) with the same meaning.
    """

    files: dict[str, bytes]
    expected: np.ndarray | None
    tolerance: int = 0
    arrays: list[np.ndarray] = field(default_factory=list)


def encode_image(image: Image.Image, kind: str = "png", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Assemble a PNG file from chunks (type, content), adding their checksums."""
    written = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        written.append(struct.pack(">I", len(content)) + kind + content + checksum)
    return b"".join(written)


def png16_file(values: np.ndarray, color_type: int, transparency: bytes = b"") -> bytes:
    """Write a 16-bit PNG file, which Pillow cannot write in color."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *([(b"tRNS", transparency)] if transparency else [])]
    return png_file([*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def pack_bits(values: np.ndarray, bits: int, big_endian: bool = True) -> bytes:
    """Pack rows of samples (H, W * C), padding each row to a whole byte."""
    if bits == 16:
        return values.astype(">u2" if big_endian else "<u2").tobytes()
    places = values[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(places.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def tiff_file(
    content: bytes, shape: tuple[int, ...], bits: int, sample_format: int, photometric: int, big_endian: bool
) -> bytes:
    """Write a TIFF file with one strip; tag numbers are those of TIFF 6.0, section 8."""
    (height, width, channels), order = shape, ">" if big_endian else "<"
    start = 8 + 2 + 12 * 10 + 4
    short, long = 3, 4
    entries = [(256, long, 1, width), (257, long, 1, height), (258, short, channels, bits), (259, short, 1, 1)]
    entries += [(262, short, 1, photometric), (273, long, 1, start + 6), (277, short, 1, channels)]
    entries += [(278, long, 1, height), (279, long, 1, len(content)), (339, short, 1, sample_format)]
    table = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        # A single short is stored in the entry itself, three shorts by their offset.
        stored = struct.pack(order + "HH", value, 0) if (kind, count) == (short, 1) else None
        table += struct.pack(order + "HHI", tag, kind, count)
        table += stored or struct.pack(order + "I", start if count == 3 else value)
    header = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8)
    return header + table + struct.pack(order + "I", 0) + struct.pack(order + "HHH", *[bits] * 3) + content


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None].astype(float), 3, axis=-1)


def composite_on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite colors (H, W, 3) with opacities (H, W) in 0..255 on white."""
    opacity = alpha[..., None] / 255
    return colors * opacity + 255 * (1 - opacity)


def one_bit(noise: np.ndarray) -> Example:
    bits = noise[..., 0] > 127
    image = Image.fromarray(bits)
    files = {kind: encode_image(image, kind) for kind in ("png", "tiff", "bmp")}
    return Example(files, gray(255 * bits), arrays=[bits, bits[..., None]])


def eight_bit_gray(noise: np.ndarray) -> Example:
    values = noise[..., 0]
    files = {kind: encode_image(Image.fromarray(values), kind) for kind in ("png", "tiff", "bmp", "gif")}
    arrays = [values, values[..., None], values.astype(np.int32), values / 255, (values / 255).astype(np.float32)]
    return Example(files, gray(values), arrays=arrays)


def gray_with_opacity(noise: np.ndarray) -> Example:
    image = Image.fromarray(np.ascontiguousarray(noise[..., :2]), "LA")
    expected = composite_on_white(gray(noise[..., 0]), noise[..., 1])
    return Example({"png": encode_image(image), "tiff": encode_image(image, "tiff")}, expected, tolerance=1)


def _palette_image(noise: np.ndarray) -> Image.Image:
    image = Image.fromarray(noise[..., 0], "P")
    image.putpalette(PALETTE.astype(np.uint8).tobytes())
    return image


def palette(noise: np.ndarray) -> Example:
    image = _palette_image(noise)
    return Example({kind: encode_image(image, kind) for kind in ("png", "gif", "tiff", "bmp")}, PALETTE[noise[..., 0]])


def palette_with_one_transparent_color(noise: np.ndarray) -> Example:
    index = int(noise[0, 0, 0])
    image = _palette_image(noise)
    files = {kind: encode_image(image, kind, transparency=index) for kind in ("png", "gif")}
    return Example(files, composite_on_white(PALETTE[noise[..., 0]], np.where(noise[..., 0] == index, 0, 255)))


def palette_with_opacities(noise: np.ndarray) -> Example:
    opacities = np.arange(256)[::-1]
    image = encode_image(_palette_image(noise), transparency=bytes(opacities.tolist()))
    return Example({"png": image}, composite_on_white(PALETTE[noise[..., 0]], opacities[noise[..., 0]]), tolerance=1)


def color(noise: np.ndarray) -> Example:
    values = np.ascontiguousarray(noise[..., :3])
    image = Image.fromarray(values)
    files = {kind: encode_image(image, kind) for kind in ("png", "tiff", "bmp", "ppm")}
    files["webp"] = encode_image(image, "webp", lossless=True)
    arrays = [values, values.astype(np.int64), values / 255, (values / 255).astype(np.float32)]
    return Example(files, values.astype(float), arrays=arrays)


def color_with_one_transparent_color(noise: np.ndarray) -> Example:
    values = np.ascontiguousarray(noise[..., :3])
    chosen = values[0, 0]
    image = encode_image(Image.fromarray(values), transparency=tuple(chosen.tolist()))
    return Example({"png": image}, composite_on_white(values, np.where((values == chosen).all(axis=-1), 0, 255)))


def color_with_opacity(noise: np.ndarray) -> Example:
    image = Image.fromarray(noise, "RGBA")
    files = {kind: encode_image(image, kind) for kind in ("png", "tiff")}
    files["webp"] = encode_image(image, "webp", lossless=True, exact=True)
    arrays = [noise, noise / 255]
    return Example(files, composite_on_white(noise[..., :3], noise[..., 3]), tolerance=1, arrays=arrays)


def cmyk(noise: np.ndarray) -> Example:
    """Build a CMYK image, in which each ink absorbs its fraction of the light and black of all colors."""
    light = 255 - noise.astype(float)
    image = Image.fromarray(noise, "CMYK")
    return Example({"tiff": encode_image(image, "tiff")}, light[..., :3] * light[..., 3:] / 255, tolerance=1)


def _wide(noise: np.ndarray) -> np.ndarray:
    return noise.astype(np.uint16) * 256 + noise[..., ::-1]


def sixteen_bit_gray(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    files = {kind: encode_image(Image.fromarray(values), kind) for kind in ("png", "tiff")}
    return Example(files, gray(np.rint(values / 257)), arrays=[values, values[..., None]])


def sixteen_bit_grey_big_endian(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    image = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    return Example({"tiff": encode_image(image, "tiff")}, gray(np.rint(values / 257)))


def sixteen_bit_grey_with_one_transparent_value(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    chosen = int(values[0, 0])
    expected = composite_on_white(gray(np.rint(values / 257)), np.where(values == chosen, 0, 255))
    return Example({"png": png16_file(values, 0, struct.pack(">H", chosen))}, expected)


def sixteen_bit_color(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., :3]
    return Example({"png": png16_file(values, 2)}, np.rint(values / 257.0), tolerance=1, arrays=[values])


def sixteen_bit_color_with_opacity(noise: np.ndarray) -> Example:
    values = _wide(noise)
    expected = composite_on_white(values[..., :3] / 257, values[..., 3] / 257)
    return Example({"png": png16_file(values, 6)}, expected, tolerance=2, arrays=[values])


def wide_integer_gray(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    image = Image.fromarray(values.astype(np.int32))
    return Example({"tiff": encode_image(image, "tiff")}, gray(np.rint(values / 257)))


def float_gray(noise: np.ndarray) -> Example:
    values = (noise[..., 0] / 255).astype(np.float32)
    return Example({"tiff": encode_image(Image.fromarray(values), "tiff")}, gray(noise[..., 0]), arrays=[values])


def twelve_bit_gray(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0] >> 4
    content = pack_bits(values.astype(int), 12)
    return Example(
        {"tiff": tiff_file(content, (*values.shape, 1), 12, 1, 1, False)}, gray(np.rint(values / 4095 * 255))
    )


def sixteen_bit_grey_with_white_as_zero(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    data = tiff_file(pack_bits(values, 16, False), (*values.shape, 1), 16, 1, 0, False)
    return Example({"tiff": data}, gray(255 - np.rint(values / 257)))


def float_grey_with_white_as_zero(noise: np.ndarray) -> Example:
    values = (noise[..., 0] / 255).astype(">f4")
    data = tiff_file(values.tobytes(), (*values.shape, 1), 32, 3, 0, True)
    return Example({"tiff": data}, gray(255 - noise[..., 0]))


def lossy_image(noise: np.ndarray) -> Example:
    image = Image.fromarray(np.ascontiguousarray(noise[..., :3]))
    return Example({"jpeg": encode_image(image, "jpeg"), "webp": encode_image(image, "webp")}, None)


def gray_lossy_image(noise: np.ndarray) -> Example:
    return Example({"jpeg": encode_image(Image.fromarray(noise[..., 0]), "jpeg")}, None)


def printed_lossy_image(noise: np.ndarray) -> Example:
    return Example({"jpeg": encode_image(Image.fromarray(noise, "CMYK"), "jpeg")}, None)


def animation(noise: np.ndarray) -> Example:
    """Build animations, of which the first of three frames is read."""
    frames = [_palette_image(np.roll(noise, turn, axis=-1)) for turn in range(3)]
    several = {"save_all": True, "append_images": frames[1:]}
    files = {kind: encode_image(frames[0], kind, **several) for kind in ("gif", "tiff")}
    rgb = [frame.convert("RGB") for frame in frames]
    for kind, settings in (("png", {}), ("webp", {"lossless": True})):
        files[kind] = encode_image(rgb[0], kind, save_all=True, append_images=rgb[1:], **settings)
    return Example(files, PALETTE[noise[..., 0]])


KINDS: dict[str, Callable[[np.ndarray], Example]] = {
    "1 bit": one_bit,
    "8-bit gray": eight_bit_gray,
    "gray with opacity (LA)": gray_with_opacity,
    "palette": palette,
    "palette, one transparent index": palette_with_one_transparent_color,
    "palette, opacities (tRNS bytes)": palette_with_opacities,
    "RGB": color,
    "RGB, one transparent color (tRNS)": color_with_one_transparent_color,
    "RGBA": color_with_opacity,
    "CMYK": cmyk,
    "16-bit gray": sixteen_bit_gray,
    "16-bit gray, big-endian": sixteen_bit_grey_big_endian,
    "16-bit gray, one transparent value (tRNS)": sixteen_bit_grey_with_one_transparent_value,
    "16-bit RGB": sixteen_bit_color,
    "16-bit RGBA": sixteen_bit_color_with_opacity,
    "32-bit integer gray": wide_integer_gray,
    "float gray": float_gray,
    "12-bit gray": twelve_bit_gray,
    "16-bit gray, white as zero": sixteen_bit_grey_with_white_as_zero,
    "float gray, white as zero": float_grey_with_white_as_zero,
    "lossy RGB": lossy_image,
    "lossy gray": gray_lossy_image,
    "lossy CMYK": printed_lossy_image,
    "animation": animation,
}


def apply_orientation(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Return a stored image (H, W, C) as displayed, by the EXIF standard's table of first row and first column."""
    return {
        1: lambda: stored,
        2: lambda: stored[:, ::-1],
        3: lambda: stored[::-1, ::-1],
        4: lambda: stored[::-1],
        5: lambda: stored.transpose(1, 0, 2),
        6: lambda: stored.transpose(1, 0, 2)[:, ::-1],
        7: lambda: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda: stored.transpose(1, 0, 2)[::-1],
    }[orientation]()


class FileServer:
    """HTTP server on localhost that serves bytes from a thread."""

    def __init__(self):
        files: dict[str, bytes] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path in files
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(files.get(self.path, b"<html>not found</html>"))

            def log_message(self, *arguments):
                pass

        self.files = files
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def url(self, data: bytes | None, name: str = "/image") -> str:
        """Return the URL of these bytes, or for None a URL that does not exist."""
        if data is not None:
            self.files[name] = data
        return f"http://127.0.0.1:{self.server.server_port}{name}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def file_inputs(data: bytes, folder: Path, server: FileServer) -> dict[str, object]:
    """Return an image file in all forms in which it can be passed to the library."""
    path = folder / "image"
    path.write_bytes(data)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    return {
        "PIL image, not loaded": Image.open(io.BytesIO(data)),
        "PIL image": loaded,
        "path (Path)": path,
        "path (str)": str(path),
        "bytes": data,
        "http URL": server.url(data),
        "data URL": "data:image/x;base64," + base64.b64encode(data).decode(),
    }


def array_inputs(array: np.ndarray) -> dict[str, tuple[object, str | None]]:
    """Return an array (H, W) or (H, W, C) in all forms, each with its unambiguous `input_data_format`."""
    if array.ndim == 2:
        return {"array (H, W)": (array, None), "tensor (H, W)": (torch.from_numpy(array), None)}
    first = np.moveaxis(array, -1, 0)
    return {
        "array (H, W, C)": (array, "channels_last"),
        "array (C, H, W)": (first, "channels_first"),
        "tensor (H, W, C)": (torch.from_numpy(array), "channels_last"),
        "tensor (C, H, W)": (torch.from_numpy(first.copy()), "channels_first"),
    }
