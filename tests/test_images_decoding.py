"""Files of every kind as arrays: real ones, made by Pillow or byte by byte, against NumPy."""

import io
import struct
import zlib

import numpy as np
import pytest

from hybridzoo.zoo.images.damaged import DamagedImage
from hybridzoo.zoo.images.decode import as_channels, decoded

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def file(image, kind="PNG", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def png(rows, colour_type, *chunks, bits=16):
    """A PNG written byte by byte, ``rows`` (h, w, c) of 16 bits."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    h, w = rows.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", w, h, bits, colour_type, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        *(chunk(*one) for one in chunks),
        chunk(b"IDAT", zlib.compress(lines)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def on_white(colour, alpha):
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


TURNED = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.swapaxes(0, 1), 2), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNED)
def test_photos_are_turned_as_the_camera_was_held(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    expected = TURNED[orientation](COLOUR)
    assert np.array_equal(decoded(file(COLOUR, exif=exif), "x.png", 3), expected)
    photo = decoded(file(COLOUR.repeat(16, 0).repeat(16, 1), "JPEG", quality=100, subsampling=0, exif=exif), "x.jpg", 3)
    assert np.abs(photo[8::16, 8::16].astype(int) - expected).max() < 12


def palette(transparency=None):
    image = Image.new("P", (9, 6))
    image.putdata((GREY // 64).ravel().tolist())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30])
    return file(image) if transparency is None else file(image, transparency=transparency)


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]])
DEEP = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(file(COLOUR), COLOUR, id="png"),
        pytest.param(file(COLOUR, "BMP"), COLOUR, id="bmp"),
        pytest.param(file(COLOUR, "TIFF"), COLOUR, id="tiff"),
        pytest.param(file(COLOUR, "WEBP", lossless=True), COLOUR, id="webp"),
        pytest.param(file(GREY), GREY[..., None], id="grey"),
        pytest.param(file(Image.fromarray(GREY > 127)), (GREY > 127)[..., None] * 255, id="black-and-white"),
        pytest.param(palette(), COLOURS[GREY // 64], id="palette"),
        pytest.param(palette(2), np.where((GREY // 64 == 2)[..., None], 255, COLOURS[GREY // 64]), id="palette-one-transparent"),
        pytest.param(
            palette(bytes([255, 128, 0, 255])),
            on_white(COLOURS[GREY // 64], np.array([255, 128, 0, 255])[GREY // 64]), id="palette-half-transparent",
        ),
        pytest.param(file(np.dstack([COLOUR, ALPHA])), on_white(COLOUR, ALPHA), id="rgba"),
        pytest.param(file(np.dstack([COLOUR, ALPHA]), "WEBP", lossless=True, exact=True), on_white(COLOUR, ALPHA), id="webp-rgba"),
        pytest.param(file(np.dstack([GREY, ALPHA])), on_white(GREY[..., None], ALPHA), id="grey-and-alpha"),
        pytest.param(file(GREY, transparency=int(GREY[2, 3])), np.where(GREY == GREY[2, 3], 255, GREY)[..., None], id="grey-one-transparent"),
        pytest.param(
            png(COLOUR, 2, (b"tRNS", struct.pack(">HHH", *COLOUR[1, 1])), bits=8),
            np.where((COLOUR == COLOUR[1, 1]).all(-1)[..., None], 255, COLOUR), id="colour-one-transparent",
        ),
        pytest.param(
            file(Image.fromarray(np.dstack([COLOUR, ALPHA]), "CMYK"), "TIFF"),
            (255 - COLOUR.astype(float)) * (255 - ALPHA[..., None].astype(float)) / 255, id="cmyk",
        ),
        pytest.param(png(DEEP[..., None], 0), DEEP[..., None] / 257, id="grey-16"),
        pytest.param(file(Image.fromarray(DEEP), "TIFF"), DEEP[..., None] / 257, id="tiff-16"),
        pytest.param(png(np.dstack([DEEP] * 3), 2), (DEEP >> 8)[..., None], id="colour-16"),
        pytest.param(png(np.dstack([DEEP, ALPHA.astype(np.uint16) * 257]), 4), on_white((DEEP >> 8)[..., None], ALPHA), id="grey-alpha-16"),
        pytest.param(file(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), DEEP[..., None] / 257, id="tiff-32"),
        pytest.param(file(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), GREY[..., None], id="tiff-float"),
    ],
)  # fmt: skip
def test_kinds_of_files(content, expected):
    made = decoded(content, "x", 3)
    assert made.shape == (6, 9, 3) and made.dtype in (np.uint8, np.float32)
    found = made if made.dtype == np.uint8 else made * 255
    # one of 255 for what Pillow rounds, and nothing for what it does not
    assert np.abs(found - expected.astype(float)).max() <= (1 if expected.dtype.kind == "f" else 0)
    grey = decoded(content, "x", 1)
    assert grey.shape == (6, 9, 1) and grey.dtype == made.dtype
    weighed = found.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs((grey[..., 0] if grey.dtype == np.uint8 else grey[..., 0] * 255) - weighed).max() <= 1


def test_16_bits_are_neither_cut_off_nor_rounded():
    made = decoded(png(DEEP[..., None], 0), "x", 1)
    assert made.dtype == np.float32 and np.array_equal(np.round(made[..., 0] * 65535), DEEP)


def test_adobe_jpegs_in_cmyk_are_no_negatives():
    light = Image.new("CMYK", (16, 16), (10, 20, 30, 0))
    assert np.abs(decoded(file(light, "JPEG", quality=95), "x", 3).astype(int) - [245, 235, 225]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_of_several_images_the_first_is_taken(kind):
    first, second = (Image.new("RGB", (5, 4), colour) for colour in ("red", "blue"))
    content = file(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    made = decoded(content, "x", 3)
    assert (made == np.array([255, 0, 0])).all() or np.abs(made.astype(int) - [255, 0, 0]).max() <= 2


def test_other_numbers_of_channels():
    cube = RNG.random((6, 9, 5))
    out = io.BytesIO()
    np.save(out, cube)
    np.testing.assert_allclose(decoded(out.getvalue(), "x.npy", 5), cube, atol=1e-7)
    assert np.array_equal(as_channels(np.moveaxis(cube, 2, 0), "x", 5), as_channels(cube, "x", 5))
    pages = [Image.fromarray(RNG.integers(0, 65536, (6, 9), dtype=np.uint16)) for _ in range(5)]
    made = decoded(file(pages[0], "TIFF", save_all=True, append_images=pages[1:]), "x.tif", 5)
    np.testing.assert_allclose(made, np.dstack([np.asarray(page) for page in pages]) / 65535, atol=1e-7)
    four = np.dstack([COLOUR, ALPHA])
    assert np.array_equal(decoded(file(four), "x.png", 4), four)
    assert np.array_equal(decoded(file(np.dstack([GREY, ALPHA])), "x.png", 2), np.dstack([GREY, ALPHA]))
    for content, c in ((file(COLOUR), 3), (file(GREY), 1)):
        with pytest.raises(DamagedImage, match=rf"x: has {c} channels, and the model takes 5 \(in_channels\)"):
            decoded(content, "x", 5)


def test_numbers_that_are_no_pixels():
    wide = Image.fromarray(np.full((2, 2), 70000, np.int32))
    for content, message in (
        (file(wide, "TIFF"), "x: holds int32. Images are"),
        (file(Image.fromarray(np.full((2, 2), 300, np.float32)), "TIFF"), "x: holds 300 to 300. Floats are"),
    ):
        with pytest.raises(DamagedImage, match=message):
            decoded(content, "x", 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_every_file_that_is_cut_is_damaged_or_whole(kind):
    big = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = file(big, kind)
    whole = decoded(content, "x", 3)
    refused = 0
    for size in range(0, len(content) - 2, max(1, len(content) // 40)):
        try:
            assert np.array_equal(decoded(content[:size], "x", 3), whole)  # what was cut off was no pixel
        except DamagedImage as e:
            assert str(e).startswith("x: is ")
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_were_altered_never_end_otherwise(seed):
    rng = np.random.default_rng(seed)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        content = np.frombuffer(file(COLOUR.repeat(4, 0), kind), np.uint8)
        for _ in range(40):
            altered = content.copy()
            altered[rng.integers(0, len(content), 3)] = rng.integers(0, 256, 3)
            try:
                made = decoded(altered.tobytes(), "x", 3)
                assert made.ndim == 3 and made.shape[2] == 3
            except DamagedImage as e:
                assert "x: " in str(e)
