"""The compiled resizing against Pillow's, pixel for pixel, and what happens where it cannot be compiled."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from soak import soak_resample

from fusion_jax.data import resample as module

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: Pillow resizes"
)


@pytest.fixture
def library():
    found = module._library()
    assert found is not None
    return found


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Looks for the library anew, with an empty cache folder; the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module._load.cache_clear()
    yield tmp_path / "fusion_jax"
    module._load.cache_clear()


def noise(rng, width, height):
    """Half of the images have nothing but black and white, so that the cubic overshoots and has to be clipped."""
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels if rng.integers(2) else (pixels > 127).astype(np.uint8) * 255)


def by_pillow(image, width, height, covered=None):
    right, bottom = covered or image.size
    across = image.resize((width, image.height), Image.Resampling.BICUBIC, (0, 0, right, image.height))
    return np.asarray(across.resize((width, height), Image.Resampling.BICUBIC, (0, 0, width, bottom)))


def compiled(library, image, width, height, plain, covered=None):
    pixels = np.empty((1, height, width, 3), np.uint8)
    module._with_library(library, image, [pixels], covered or image.size, plain)
    return pixels[0]


@needs_compiler
@pytest.mark.parametrize("plain", [False, True])
def test_random_sizes(library, plain):
    rng = np.random.default_rng(0)
    for sizes in np.exp(rng.uniform(0, np.log(500), (250, 4))).astype(int).tolist():
        image = noise(rng, *sizes[:2])
        result = compiled(library, image, *sizes[2:], plain)
        np.testing.assert_array_equal(result, by_pillow(image, *sizes[2:]), err_msg=str(sizes))


EXTREMES = [
    (1, 1, 1, 1),
    (1, 1, 300, 200),
    (1, 5000, 64, 64),
    (5000, 1, 64, 64),
    (7, 3000, 400, 1),
    (3000, 7, 1, 400),
    (65_535, 2, 33, 35),
    (2, 65_535, 35, 33),
    (3, 5, 2000, 1500),
    (1283, 961, 768, 768),
    (640, 480, 640, 100),
    (640, 480, 100, 480),
    (640, 480, 640, 480),
    (33, 34, 11, 10),
    (2400, 1800, 101, 97),
]


@needs_compiler
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("sizes", EXTREMES)
def test_extreme_sizes(library, sizes, plain):
    image = noise(np.random.default_rng(1), *sizes[:2])
    np.testing.assert_array_equal(compiled(library, image, *sizes[2:], plain), by_pillow(image, *sizes[2:]))


@needs_compiler
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("covered", [(200.5, 149.25), (100.125, 150.0), (201.0, 0.5), (3.5, 150.0)])
def test_partly_covered_pixels(library, covered, plain):
    image = noise(np.random.default_rng(2), 201, 150)
    for width, height in ((64, 64), (300, 20)):
        result = compiled(library, image, width, height, plain, covered)
        np.testing.assert_array_equal(result, by_pillow(image, width, height, covered))


@pytest.fixture(params=["compiled", "pillow"])
def either(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(module, "_library", lambda: None)
    elif module._library() is None:
        pytest.skip("no C compiler: Pillow resizes")


@pytest.mark.usefixtures("either")
def test_tiles_and_several_sizes_at_once():
    image = noise(np.random.default_rng(3), 211, 97)
    nine, one, both = (
        np.zeros((9, 20, 30, 3), np.uint8),
        np.zeros((1, 7, 50, 3), np.uint8),
        np.zeros((5, 8, 8, 3), "u1"),
    )
    module.resample(image, [nine, one, both[:4], both[4:]])
    whole = by_pillow(image, 90, 60)
    for i in range(9):
        top, left = i // 3 * 20, i % 3 * 30
        np.testing.assert_array_equal(nine[i], whole[top : top + 20, left : left + 30])
    np.testing.assert_array_equal(one[0], by_pillow(image, 50, 7))
    double = by_pillow(image, 16, 16)
    np.testing.assert_array_equal(both[1], double[:8, 8:])
    np.testing.assert_array_equal(both[2], double[8:, :8])
    np.testing.assert_array_equal(both[4], by_pillow(image, 8, 8))


@needs_compiler
@pytest.mark.parametrize("strip", [1, 4 * 131 * 7, 4 * 131 * 64, 1 << 20])
def test_strips_of_what_cannot_be_read_in_place(library, monkeypatch, strip):
    image = noise(np.random.default_rng(4), 131, 103)
    expected = by_pillow(image, 40, 50)
    if hasattr(image, "__arrow_c_array__"):  # from Pillow 11.2
        assert [rows for _, rows, *_ in module._pixels(image)] == [103]
        monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    monkeypatch.setattr(module, "STRIP", strip)
    assert sum(rows for _, rows, *_ in module._pixels(image)) == 103
    np.testing.assert_array_equal(compiled(library, image, 40, 50, False), expected)


@needs_compiler
def test_images_that_pillow_keeps_in_pieces(library):
    image = noise(np.random.default_rng(4), 2500, 1800)  # 18 MB; a piece has up to 16
    assert len(list(module._pixels(image))) > 1
    np.testing.assert_array_equal(compiled(library, image, 40, 50, False), by_pillow(image, 40, 50))


@needs_compiler
def test_what_does_not_fit_is_refused_and_nothing_written(library):
    """Codes of resample.c: 2 for a size that cannot be, 3 for a buffer that is too small."""
    width, height, out, tiles = 5, 4, 6, 2
    source, middle = np.zeros((height, width, 4), np.uint8), np.full((height, 3 * out + 1), 7, np.uint8)
    target = np.full((tiles**2, out // 2, out // 2, 3), 7, np.uint8)

    def across(size=source.nbytes, width=width, part=5.0, rows=height, room=middle.nbytes, stride=19, out=out, plain=0):
        return library.fusion_across(
            source.ctypes.data, size, width, part, rows, middle.ctypes.data, room, stride, out, plain
        )

    def down(
        size=middle.nbytes,
        stride=19,
        rows=height,
        part=4.0,
        room=target.nbytes,
        width=out,
        out=out,
        tiles=tiles,
        plain=0,
    ):
        return library.fusion_down(
            middle.ctypes.data, size, stride, rows, part, target.ctypes.data, room, width, out, tiles, plain
        )

    for plain in (0, 1):
        impossible = [{name: value} for name in ("width", "rows", "out") for value in (0, -1, 2**24 + 1, 2**31 - 1)]
        impossible += [{"part": value} for value in (0.0, -1.0, 5.000001, float("nan"), float("inf"))]
        assert [across(**change, plain=plain) for change in impossible] == [2] * len(impossible)
        assert [down(**change, plain=plain) for change in impossible] == [2] * len(impossible)
        assert [down(tiles=value, plain=plain) for value in (0, -1, 4, 5, -(2**31))] == [2] * 5
        small = [
            {"size": source.nbytes - 1},
            {"size": 0},
            {"size": -1},
            {"width": 6},
            {"rows": 5},
            {"room": middle.nbytes - 1},
        ]
        small += [{"stride": value} for value in (18, 0, -19, 2**62, 2**63 - 1, -(2**63))] + [{"out": 7}]
        assert [across(**change, plain=plain) for change in small] == [3] * len(small)
        small = [{"size": middle.nbytes - 2}, {"rows": 5}, {"stride": 17}, {"stride": -19}, {"room": target.nbytes - 1}]
        small += [{"out": 8}, {"width": 8}, {"width": 2**24}]
        assert [down(**change, plain=plain) for change in small] == [3] * len(small)
        assert (middle == 7).all() and (target == 7).all()
    assert across() == down() == 0
    assert (middle[:, :-1] == 0).all() and (target == 0).all()


@needs_compiler
def test_what_the_library_refuses_is_an_error(monkeypatch):
    image = noise(np.random.default_rng(4), 30, 20)
    output = np.empty((1, 4, 4, 3), np.uint8)
    for covered in ((31, 20), (30, 21), (0, 20), (float("nan"), 20)):
        with pytest.raises(ValueError, match="30x20 pixels cannot be resized: its sizes are not possible"):
            module.resample(image, [output], covered)
    shown = module._pixels
    monkeypatch.setattr(module, "_pixels", lambda one: ((*found[:3], found[3] - 1) for found in shown(one)))
    with pytest.raises(ValueError, match="a buffer is too small"):
        module.resample(image, [output])


@needs_compiler
def test_random_shapes_under_sanitizers():
    """The long run is `python tests/soak/soak_resample.py`."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    try:
        found = soak_resample.run(2000, seed=1)
    except subprocess.CalledProcessError as e:
        if "lasan" in e.stderr or "lubsan" in e.stderr:
            pytest.skip("gcc comes without its sanitizers")
        raise
    assert found.total() == 2000 and found[0, 0] > 500
    assert {codes for codes, count in found.items() if count > 10} >= {(0, 0), (2, 0), (0, 2), (3, 0), (0, 3), (3, 3)}


@needs_compiler
def test_threads_share_the_library(fresh, caplog):
    image = noise(np.random.default_rng(5), 300, 200)

    def resized(_):
        pixels = np.empty((1, 64, 64, 3), np.uint8)
        module.resample(image, [pixels])
        return pixels[0]

    with ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(resized, range(12)):
            np.testing.assert_array_equal(pixels, by_pillow(image, 64, 64))
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
    assert not caplog.records


def fall_back(caplog):
    """The one line of the log, after resizing twice as Pillow does."""
    image = noise(np.random.default_rng(6), 70, 50)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            pixels = np.empty((1, 20, 30, 3), np.uint8)
            module.resample(image, [pixels])
            np.testing.assert_array_equal(pixels[0], by_pillow(image, 30, 20))
    assert module._library() is None
    (record,) = caplog.records
    assert "resized by Pillow" in record.getMessage()
    return record.getMessage()


def test_without_a_compiler(fresh, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in fall_back(caplog)


def test_with_a_compiler_that_does_not_exist(fresh, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "none" in fall_back(caplog)


@needs_compiler
def test_with_a_compiler_that_fails(fresh, monkeypatch, tmp_path, caplog):
    (tmp_path / "resample.c").write_text("#error nothing works here\n")
    monkeypatch.setattr(module, "SOURCE", tmp_path / "resample.c")
    assert "nothing works here" in fall_back(caplog)
    assert not list(fresh.iterdir())


def test_where_the_cache_folder_cannot_be_made(fresh, monkeypatch, caplog):
    fresh.write_text("a file in its place")
    monkeypatch.setenv("CC", "cc")
    assert str(fresh) in fall_back(caplog)


@needs_compiler
@pytest.mark.parametrize("change", [("#define BITS 22", "#define BITS 20"), ("1.5 * x - 2.5", "1.25 * x - 2.25")])
def test_code_that_does_not_reproduce_pillow_is_not_used(fresh, monkeypatch, tmp_path, caplog, change):
    source = module.SOURCE.read_text()
    assert change[0] in source
    (tmp_path / "resample.c").write_text(source.replace(*change))
    monkeypatch.setattr(module, "SOURCE", tmp_path / "resample.c")
    assert "does not give Pillow's pixels" in fall_back(caplog)


@needs_compiler
def test_processes_may_compile_at_once(tmp_path):
    code = "from fusion_jax.data import resample; assert resample._library(); print(*resample._build().parts[-2:])"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    run = [sys.executable, "-c", code]
    started = [subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = {process.communicate(timeout=120)[0] for process in started}
    assert [process.returncode for process in started] == [0] * 3
    (name,) = names
    assert [" ".join(path.parts[-2:]) for path in tmp_path.glob("*/*")] == [name.strip()]
