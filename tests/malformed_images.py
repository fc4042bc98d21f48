"""Image files that no encoder writes: damaged ones, and ones that are expensive to decode."""

from __future__ import annotations

import random
import struct
import zlib

from PIL import Image

from tools.evaluation.image_files import encode
from tools.shapes.dataset import draw_scene

# Lengths and sizes that parsers do not expect.
NUMBER_BYTES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\x01")


def png_of_size(width: int, height: int, empty_chunks: int = 0) -> bytes:
    """A PNG file whose header has this size, with little data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    header += empty_chunks * chunk(b"abCd", b"")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def jpeg_of_frame(jpeg: bytes, code: int, bits: int = 8) -> bytes:
    """A baseline JPEG file whose frame says that it is of another kind, or has other bits a sample."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 1] + bytes((code,)) + jpeg[at + 2 : at + 4] + bytes((bits,)) + jpeg[at + 5 :]


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG file whose last scan is repeated ``count`` times."""
    file = encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    return file[:last] + file[last:-2] * count + file[-2:]


def with_segments(jpeg: bytes, count: int, segment: bytes) -> bytes:
    """A JPEG file with ``count`` copies of a segment (code, length and content) at its beginning."""
    return jpeg[:2] + count * (b"\xff" + segment) + jpeg[2:]


def mutate(file: bytes, seed: int) -> bytes:
    """A file with a few bytes changed, parts left out, doubled or taken from elsewhere in it."""
    generator = random.Random(seed)
    content = bytearray(file)
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(len(content) or 1)
        length = generator.choice((1, 2, 4, generator.randint(1, 400)))
        match generator.randrange(7):
            case 0:
                content[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                content[at : at + length] = generator.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length]
            case 4:
                content[at : at + 4] = generator.choice(NUMBER_BYTES)
            case 6:  # repetition is often expensive
                content[at:at] = content[at : at + length] * generator.randint(2, 300)
            case 5:  # most structure is at the beginning
                content[at % 64 : at % 64 + 1] = bytes([generator.randrange(256)])
    return bytes(content)


def small_files() -> list[bytes]:
    """One small image in each format and several of its variants."""
    scene = Image.fromarray(draw_scene("test", 0, size=48).image)
    exif = scene.getexif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return [
        encode(scene, "JPEG", exif=exif, quality=60),
        encode(scene, "JPEG", progressive=True, quality=60),
        encode(scene.convert("CMYK"), "JPEG", quality=60),
        encode(scene, "PNG", exif=exif),
        encode(scene.convert("P"), "PNG", transparency=bytes(range(256))),
        encode(scene.convert("I;16") if scene.mode == "L" else scene.convert("L").convert("I;16"), "PNG"),
        encode(scene, "PNG", save_all=True, append_images=[scene.rotate(90)]),
        encode(scene, "WEBP", quality=60, exif=exif),
        encode(scene, "WEBP", lossless=True),
        encode(scene, "WEBP", save_all=True, append_images=[scene.rotate(90)]),
    ]


FILES = small_files()


def webp_of_chunks(webp: bytes, count: int) -> bytes:
    """The file with so many small chunks before its own."""
    chunks = b"ABCD\x01\0\0\0x\0" * count + webp[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
