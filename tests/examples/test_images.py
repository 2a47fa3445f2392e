"""Decoding: right colours from every kind of file, in order, ahead, and threads that end."""

import struct
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from tests.frameworks import load


@pytest.fixture(scope="module")
def pil():
    """Pillow's Image module."""
    load("PIL")
    return load("PIL.Image")


@pytest.fixture(scope="module")
def images(pil):
    """The module under test."""
    return load("examples.data.images")


@pytest.fixture
def files(pil, tmp_path):
    """Forty PNGs, the i-th of which has the colour (i, 2i, 3i)."""
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for i, path in enumerate(paths):
        pil.new("RGB", (12, 10), (i, 2 * i, 3 * i)).save(path)
    return paths


# --- colours


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected", "atol"),
    [
        ("RGB", (200, 100, 50), "png", (200, 100, 50), 0),
        ("RGB", (200, 100, 50), "jpg", (200, 100, 50), 2),
        ("L", 77, "png", (77, 77, 77), 0),
        ("L", 77, "jpg", (77, 77, 77), 1),
        ("LA", (77, 128), "png", (77, 77, 77), 0),
        ("1", 1, "png", (255, 255, 255), 0),
        ("RGBA", (200, 100, 50, 0), "png", (200, 100, 50), 0),  # the colour stored, not black
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0), 2),
        ("CMYK", (255, 0, 0, 128), "tif", (0, 127, 127), 0),
        ("I;16", 0x4D00, "png", (0x4D,) * 3, 0),  # clipping gives 255
        ("I;16", 0x4DFF, "tif", (0x4D,) * 3, 0),
        ("I", 65535, "tif", (255, 255, 255), 0),
    ],
)
def test_every_mode_becomes_rgb(images, pil, tmp_path, mode, colour, suffix, expected, atol):
    path = tmp_path / f"image.{suffix}"
    pil.new(mode, (20, 14), colour).save(path)
    pixels = images.decode(path, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (8, 8, 3)), atol=atol)


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 100])])
def test_palettes_become_the_colours_that_they_name(images, pil, tmp_path, transparency):
    """Also partly transparent ones, of which Pillow warns."""
    image = pil.new("P", (16, 16), 1)
    image.putpalette([9, 8, 7, 200, 100, 50])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "image.png", **options)
    pixels = images.decode(tmp_path / "image.png", 8)
    np.testing.assert_array_equal(pixels, np.broadcast_to((200, 100, 50), (8, 8, 3)))


def test_all_of_16_bits_is_scaled_evenly(images, pil, tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pil.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = images.decode(tmp_path / "ramp.png", 256)
    np.testing.assert_array_equal(pixels, np.stack([ramp // 256] * 3, axis=-1))


def test_16_bit_colour_is_scaled_in_the_same_way(images, tmp_path):
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    row = b"\0" + struct.pack(">3H", 0x4DFF, 0x8000, 0xFFFF) * 9
    header = struct.pack(">2I5B", 9, 9, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 9)) + chunk(b"IEND", b"")
    (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    pixels = images.decode(tmp_path / "colour.png", 9)
    np.testing.assert_array_equal(pixels, np.broadcast_to((0x4D, 0x80, 0xFF), (9, 9, 3)))


def test_the_whole_image_is_squeezed_and_antialiased(images, pil, tmp_path):
    """Left half black, right half in stripes of one pixel: their mean is grey."""
    pixels = np.zeros((100, 400), np.uint8)
    pixels[:, 200::2] = 255
    pil.fromarray(pixels).save(tmp_path / "stripes.png")
    found = images.decode(tmp_path / "stripes.png", 20)
    np.testing.assert_array_equal(found[:, :9], 0)
    np.testing.assert_allclose(found[:, 11:], 127.5, atol=4)


def test_a_jpeg_that_libjpeg_shrinks_looks_the_same(images, pil, tmp_path):
    y, x = np.mgrid[:600, :800]
    smooth = np.stack([x * 255 / 800, y * 255 / 600, 127 + 100 * np.sin(x / 60)], axis=-1)
    pil.fromarray(smooth.astype(np.uint8)).save(tmp_path / "large.jpg", quality=95)
    with pil.open(tmp_path / "large.jpg") as whole:
        expected = images.resize(whole, 64)
    np.testing.assert_allclose(
        images.decode(tmp_path / "large.jpg", 64).astype(int), expected.astype(int), atol=3
    )


# --- what is no image


def test_a_truncated_file_is_named(images, pil, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "tif", "webp"):
        path = tmp_path / f"image.{suffix}"
        pil.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(images.UnreadableImage, match=f"unreadable image {path} "):
            images.decode(path, 32)


def test_what_is_no_image_is_named(images, pil, tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("lesion 7, left arm")
    sentence = (
        f"truncated or unreadable image {path} (of no known format); "
        "--skip-unreadable leaves such files out"
    )
    with pytest.raises(images.UnreadableImage) as caught:
        images.decode(path, 32)
    assert str(caught.value) == sentence
    pil.new("F", (9, 9), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(images.UnreadableImage, match="floating-point pixels have no known range"):
        images.decode(tmp_path / "float.tif", 32)
    pil.new("I", (9, 9), 65536).save(tmp_path / "deep.tif")
    with pytest.raises(images.UnreadableImage, match="more than 16 bits"):
        images.decode(tmp_path / "deep.tif", 32)


# --- streaming


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_the_order_asked_for(images, files, workers):
    order = np.random.default_rng(0).integers(0, 40, 33)
    pieces = [order[:8], order[8:16], order[16:32], order[32:]]
    batches = list(images.ImageFiles(files, 8, workers).batches(pieces))
    for piece, batch in zip(pieces, batches, strict=True):
        expected = np.outer(piece, [1, 2, 3])[:, None, None, :]
        np.testing.assert_array_equal(batch, np.broadcast_to(expected, (len(piece), 8, 8, 3)))


def test_no_batches_are_no_work(images, files):
    assert list(images.ImageFiles(files, 8, 2).batches([])) == []


def test_decoding_runs_ahead_but_not_far(images, files, monkeypatch):
    """While the consumer works on a batch of two, the next batches are decoded, and no more."""
    decoded, decode = [], images.decode

    def count(path, size):
        decoded.append(path)
        return decode(path, size)

    monkeypatch.setattr(images, "decode", count)
    before = threading.active_count()
    batches = images.ImageFiles(files, 8, 2).batches(np.arange(40).reshape(20, 2))
    next(batches)
    expected = 2 + 2 * images.BATCHES_AHEAD
    deadline = time.monotonic() + 10
    while len(decoded) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(decoded) == expected
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_an_abandoned_iterator_leaves_no_thread(images, files):
    before = threading.active_count()
    for _ in images.ImageFiles(files, 8, 2).batches(np.arange(40).reshape(20, 2)):
        break
    assert threading.active_count() == before


def test_a_file_that_breaks_later_reaches_the_consumer_by_name(images, files):
    files[21].write_bytes(b"")
    before = threading.active_count()
    batches = images.ImageFiles(files, 8, 2).batches(np.arange(40).reshape(20, 2))
    for _ in range(10):
        next(batches)
    with pytest.raises(images.UnreadableImage, match=f"unreadable image {files[21]} "):
        next(batches)
    assert threading.active_count() == before


def read_all(images, files, **changes):
    """With settings that most tests share."""
    settings = {"workers": 2, "keep": True, "skip_unreadable": False}
    settings |= {"on_progress": lambda done, total: None}
    return images.read_all(files, 8, **settings | changes)


def test_the_check_fills_the_memory(images, files, monkeypatch):
    found, readable = read_all(images, files)
    monkeypatch.setattr(images, "decode", None)  # nothing is decoded twice
    (batch,) = found.batches([np.arange(40)])
    assert readable.all()
    np.testing.assert_array_equal(batch[:, 3, 3], np.outer(np.arange(40), [1, 2, 3]))


def test_the_check_names_the_first_file_in_order(images, files):
    for i in (30, 7):
        files[i].write_bytes(b"")
    with pytest.raises(images.UnreadableImage, match=f"unreadable image {files[7]} "):
        read_all(images, files)
    _, readable = read_all(images, files, skip_unreadable=True)
    np.testing.assert_array_equal(np.flatnonzero(~readable), [7, 30])


def test_progress_is_told_for_every_file(images, files):
    told = []
    read_all(images, files, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 40) for done in range(1, 41)]


@pytest.mark.parametrize("keep", [False, True])
def test_only_what_is_to_be_kept_stays_in_memory(images, files, keep):
    """NumPy's arrays are traced: all 40 images at once, or a few of them at a time."""
    settings = {"workers": 2, "keep": keep, "skip_unreadable": False}
    tracemalloc.start()
    found, _ = images.read_all(files, 256, **settings, on_progress=lambda done, total: None)
    for batch in found.batches([np.array([i]) for i in range(40)]):
        assert batch.shape == (1, 256, 256, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (peak >= 40 * 256 * 256 * 3) == keep
