"""Pictures of every kind with the pixels that they must become, worked out from what the kind says."""

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
    """One picture: files and arrays that hold it, and its pixels.

    Attributes:
        files: The bytes of a file by its format.
        expected: (H, W, 3) in 0..255, or None where only the decoder knows (lossy formats).
        tolerance: Levels by which roundings of the decoder may differ.
        arrays: Arrays (H, W) or (H, W, C) that mean the same.
    """

    files: dict[str, bytes]
    expected: np.ndarray | None
    tolerance: int = 0
    arrays: list[np.ndarray] = field(default_factory=list)


def encoded(image: Image.Image, kind: str = "png", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of these chunks (kind, content), with their checksums."""
    written = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        written.append(struct.pack(">I", len(content)) + kind + content + checksum)
    return b"".join(written)


def png(values: np.ndarray, color_type: int, transparency: bytes = b"") -> bytes:
    """A 16-bit PNG file, which Pillow does not write in colour."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *([(b"tRNS", transparency)] if transparency else [])]
    return png_file([*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def packed(values: np.ndarray, bits: int, big_endian: bool = True) -> bytes:
    """Rows of samples (H, W * C), each row ending on a whole byte."""
    if bits == 16:
        return values.astype(">u2" if big_endian else "<u2").tobytes()
    places = values[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(places.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    content: bytes, shape: tuple[int, ...], bits: int, sample_format: int, photometric: int, big_endian: bool
) -> bytes:
    """A TIFF file of one strip; the tags' numbers are those of TIFF 6.0, section 8."""
    (height, width, channels), order = shape, ">" if big_endian else "<"
    start = 8 + 2 + 12 * 10 + 4
    short, long = 3, 4
    entries = [(256, long, 1, width), (257, long, 1, height), (258, short, channels, bits), (259, short, 1, 1)]
    entries += [(262, short, 1, photometric), (273, long, 1, start + 6), (277, short, 1, channels)]
    entries += [(278, long, 1, height), (279, long, 1, len(content)), (339, short, 1, sample_format)]
    table = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        # One short stands in the first two of four bytes; of three shorts their place does.
        stored = struct.pack(order + "HH", value, 0) if (kind, count) == (short, 1) else None
        table += struct.pack(order + "HHI", tag, kind, count)
        table += stored or struct.pack(order + "I", start if count == 3 else value)
    header = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8)
    return header + table + struct.pack(order + "I", 0) + struct.pack(order + "HHH", *[bits] * 3) + content


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None].astype(float), 3, axis=-1)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) on white, by opacities (H, W) in 0..255."""
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def one_bit(noise: np.ndarray) -> Example:
    bits = noise[..., 0] > 127
    image = Image.fromarray(bits)
    files = {kind: encoded(image, kind) for kind in ("png", "tiff", "bmp")}
    return Example(files, grey(255 * bits), arrays=[bits, bits[..., None]])


def eight_bit_grey(noise: np.ndarray) -> Example:
    values = noise[..., 0]
    files = {kind: encoded(Image.fromarray(values), kind) for kind in ("png", "tiff", "bmp", "gif")}
    arrays = [values, values[..., None], values.astype(np.int32), values / 255, (values / 255).astype(np.float32)]
    return Example(files, grey(values), arrays=arrays)


def grey_with_opacity(noise: np.ndarray) -> Example:
    image = Image.fromarray(np.ascontiguousarray(noise[..., :2]), "LA")
    expected = on_white(grey(noise[..., 0]), noise[..., 1])
    return Example({"png": encoded(image), "tiff": encoded(image, "tiff")}, expected, tolerance=1)


def _palette_image(noise: np.ndarray) -> Image.Image:
    image = Image.fromarray(noise[..., 0], "P")
    image.putpalette(PALETTE.astype(np.uint8).tobytes())
    return image


def palette(noise: np.ndarray) -> Example:
    image = _palette_image(noise)
    return Example({kind: encoded(image, kind) for kind in ("png", "gif", "tiff", "bmp")}, PALETTE[noise[..., 0]])


def palette_with_one_transparent_colour(noise: np.ndarray) -> Example:
    index = int(noise[0, 0, 0])
    image = _palette_image(noise)
    files = {kind: encoded(image, kind, transparency=index) for kind in ("png", "gif")}
    return Example(files, on_white(PALETTE[noise[..., 0]], np.where(noise[..., 0] == index, 0, 255)))


def palette_with_opacities(noise: np.ndarray) -> Example:
    opacities = np.arange(256)[::-1]
    image = encoded(_palette_image(noise), transparency=bytes(opacities.tolist()))
    return Example({"png": image}, on_white(PALETTE[noise[..., 0]], opacities[noise[..., 0]]), tolerance=1)


def colour(noise: np.ndarray) -> Example:
    values = np.ascontiguousarray(noise[..., :3])
    image = Image.fromarray(values)
    files = {kind: encoded(image, kind) for kind in ("png", "tiff", "bmp", "ppm")}
    files["webp"] = encoded(image, "webp", lossless=True)
    arrays = [values, values.astype(np.int64), values / 255, (values / 255).astype(np.float32)]
    return Example(files, values.astype(float), arrays=arrays)


def colour_with_one_transparent_colour(noise: np.ndarray) -> Example:
    values = np.ascontiguousarray(noise[..., :3])
    chosen = values[0, 0]
    image = encoded(Image.fromarray(values), transparency=tuple(chosen.tolist()))
    return Example({"png": image}, on_white(values, np.where((values == chosen).all(axis=-1), 0, 255)))


def colour_with_opacity(noise: np.ndarray) -> Example:
    image = Image.fromarray(noise, "RGBA")
    files = {kind: encoded(image, kind) for kind in ("png", "tiff")}
    files["webp"] = encoded(image, "webp", lossless=True, exact=True)
    arrays = [noise, noise / 255]
    return Example(files, on_white(noise[..., :3], noise[..., 3]), tolerance=1, arrays=arrays)


def printing_colours(noise: np.ndarray) -> Example:
    """CMYK: each ink takes its share of the light, and black of all."""
    light = 255 - noise.astype(float)
    image = Image.fromarray(noise, "CMYK")
    return Example({"tiff": encoded(image, "tiff")}, light[..., :3] * light[..., 3:] / 255, tolerance=1)


def _wide(noise: np.ndarray) -> np.ndarray:
    return noise.astype(np.uint16) * 256 + noise[..., ::-1]


def sixteen_bit_grey(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    files = {kind: encoded(Image.fromarray(values), kind) for kind in ("png", "tiff")}
    return Example(files, grey(np.rint(values / 257)), arrays=[values, values[..., None]])


def sixteen_bit_grey_big_endian(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    image = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    return Example({"tiff": encoded(image, "tiff")}, grey(np.rint(values / 257)))


def sixteen_bit_grey_with_one_transparent_value(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    chosen = int(values[0, 0])
    expected = on_white(grey(np.rint(values / 257)), np.where(values == chosen, 0, 255))
    return Example({"png": png(values, 0, struct.pack(">H", chosen))}, expected)


def sixteen_bit_colour(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., :3]
    return Example({"png": png(values, 2)}, np.rint(values / 257.0), tolerance=1, arrays=[values])


def sixteen_bit_colour_with_opacity(noise: np.ndarray) -> Example:
    values = _wide(noise)
    expected = on_white(values[..., :3] / 257, values[..., 3] / 257)
    return Example({"png": png(values, 6)}, expected, tolerance=2, arrays=[values])


def wide_integer_grey(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    image = Image.fromarray(values.astype(np.int32))
    return Example({"tiff": encoded(image, "tiff")}, grey(np.rint(values / 257)))


def float_grey(noise: np.ndarray) -> Example:
    values = (noise[..., 0] / 255).astype(np.float32)
    return Example({"tiff": encoded(Image.fromarray(values), "tiff")}, grey(noise[..., 0]), arrays=[values])


def twelve_bit_grey(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0] >> 4
    content = packed(values.astype(int), 12)
    return Example({"tiff": tiff(content, (*values.shape, 1), 12, 1, 1, False)}, grey(np.rint(values / 4095 * 255)))


def sixteen_bit_grey_with_white_as_zero(noise: np.ndarray) -> Example:
    values = _wide(noise)[..., 0]
    data = tiff(packed(values, 16, False), (*values.shape, 1), 16, 1, 0, False)
    return Example({"tiff": data}, grey(255 - np.rint(values / 257)))


def float_grey_with_white_as_zero(noise: np.ndarray) -> Example:
    values = (noise[..., 0] / 255).astype(">f4")
    data = tiff(values.tobytes(), (*values.shape, 1), 32, 3, 0, True)
    return Example({"tiff": data}, grey(255 - noise[..., 0]))


def photograph(noise: np.ndarray) -> Example:
    image = Image.fromarray(np.ascontiguousarray(noise[..., :3]))
    return Example({"jpeg": encoded(image, "jpeg"), "webp": encoded(image, "webp")}, None)


def grey_photograph(noise: np.ndarray) -> Example:
    return Example({"jpeg": encoded(Image.fromarray(noise[..., 0]), "jpeg")}, None)


def printed_photograph(noise: np.ndarray) -> Example:
    return Example({"jpeg": encoded(Image.fromarray(noise, "CMYK"), "jpeg")}, None)


def animation(noise: np.ndarray) -> Example:
    """The first of three pictures."""
    frames = [_palette_image(np.roll(noise, turn, axis=-1)) for turn in range(3)]
    several = {"save_all": True, "append_images": frames[1:]}
    files = {kind: encoded(frames[0], kind, **several) for kind in ("gif", "tiff")}
    rgb = [frame.convert("RGB") for frame in frames]
    for kind, settings in (("png", {}), ("webp", {"lossless": True})):
        files[kind] = encoded(rgb[0], kind, save_all=True, append_images=rgb[1:], **settings)
    return Example(files, PALETTE[noise[..., 0]])


KINDS: dict[str, Callable[[np.ndarray], Example]] = {
    "1 bit": one_bit,
    "8-bit grey": eight_bit_grey,
    "grey with opacity (LA)": grey_with_opacity,
    "palette": palette,
    "palette, one transparent index": palette_with_one_transparent_colour,
    "palette, opacities (tRNS bytes)": palette_with_opacities,
    "RGB": colour,
    "RGB, one transparent colour (tRNS)": colour_with_one_transparent_colour,
    "RGBA": colour_with_opacity,
    "CMYK": printing_colours,
    "16-bit grey": sixteen_bit_grey,
    "16-bit grey, big-endian": sixteen_bit_grey_big_endian,
    "16-bit grey, one transparent value (tRNS)": sixteen_bit_grey_with_one_transparent_value,
    "16-bit RGB": sixteen_bit_colour,
    "16-bit RGBA": sixteen_bit_colour_with_opacity,
    "32-bit integer grey": wide_integer_grey,
    "float grey": float_grey,
    "12-bit grey": twelve_bit_grey,
    "16-bit grey, white as zero": sixteen_bit_grey_with_white_as_zero,
    "float grey, white as zero": float_grey_with_white_as_zero,
    "lossy RGB": photograph,
    "lossy grey": grey_photograph,
    "lossy CMYK": printed_photograph,
    "animation": animation,
}


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """A stored picture as it is to be shown, by the EXIF standard's table of first row and first column."""
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
    """Serves bytes at http://localhost from a thread of its own."""

    def __init__(self):
        files: dict[str, bytes] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path in files
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(files.get(self.path, b"<html>not here</html>"))

            def log_message(self, *arguments):
                pass

        self.files = files
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def url(self, data: bytes | None, name: str = "/picture") -> str:
        """Address of these bytes, or one where there is nothing."""
        if data is not None:
            self.files[name] = data
        return f"http://127.0.0.1:{self.server.server_port}{name}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def file_doors(data: bytes, folder: Path, server: FileServer) -> dict[str, object]:
    """All ways to give an image file."""
    path = folder / "picture"
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


def array_doors(array: np.ndarray) -> dict[str, tuple[object, str | None]]:
    """All ways to give an array (H, W) or (H, W, C), each with the `input_data_format` that removes any doubt."""
    if array.ndim == 2:
        return {"array (H, W)": (array, None), "tensor (H, W)": (torch.from_numpy(array), None)}
    first = np.moveaxis(array, -1, 0)
    return {
        "array (H, W, C)": (array, "channels_last"),
        "array (C, H, W)": (first, "channels_first"),
        "tensor (H, W, C)": (torch.from_numpy(array), "channels_last"),
        "tensor (C, H, W)": (torch.from_numpy(first.copy()), "channels_first"),
    }
