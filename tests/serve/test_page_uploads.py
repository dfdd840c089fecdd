"""Images that strangers upload to the page: what is kept, for whom, how much and how long."""

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from page_site import UPLOAD, Browser, file, png, served
from PIL import Image

from fusion_jax.errors import BadRecord
from fusion_jax.serve import uploads


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"<html><script>alert(1)</script></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_only_images_are_kept(visitor, data):
    for name in ("a.png", "a.html", "a.svg"):
        answer = visitor.upload(data, name)
        assert answer.status_code == 415 and answer.text.startswith("This is no image")
    assert visitor.http.get("/gradio_api/file=a.html").status_code == 404


@pytest.mark.parametrize("name", ["../../a.html", "/etc/passwd", "a\x00b.png", "x" * 5000, "..", "a.html", "é.svg", ""])
def test_a_name_of_a_file_says_nothing(visitor, name):
    data = png()
    answer = visitor.http.post(
        UPLOAD,
        content=(
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="'
            + name.encode()
            + b'"\r\nContent-Type: text/html\r\n\r\n'
            + data
            + b"\r\n--b--\r\n"
        ),
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    if answer.status_code != 200:  # not even a form
        assert answer.status_code == 400
        return
    (kept,) = answer.json()
    assert len(kept) == 36 and kept.endswith(".png") and int(kept[:32], 16)
    shown = visitor.http.get(f"/gradio_api/file={kept}")
    assert shown.content == data and shown.headers["content-type"] == "image/png"
    assert shown.headers["x-content-type-options"] == "nosniff"
    assert shown.headers["content-security-policy"] == "default-src 'none'; sandbox"


def test_pages_in_the_shape_of_images_are_shown_as_images(visitor):
    made = io.BytesIO()
    Image.new("P", (1, 1)).save(made, "GIF")
    (kept,) = visitor.upload(made.getvalue() + b"<script>alert(1)</script>", "a.html").json()
    shown = visitor.http.get(f"/gradio_api/file={kept}")
    assert shown.headers["content-type"] == "image/gif" and shown.headers["x-content-type-options"] == "nosniff"


def test_an_upload_is_its_browsers_alone(site, visitor):
    image = visitor.image()
    with Browser(site[0]) as other:
        assert other.http.get(f"/gradio_api/file={image['path']}").status_code == 404
        answer = other.join(0, ["Mine?", image, 0, 16])
        assert answer.status_code == 403 and "not among your uploads" in answer.json()["detail"]
    assert visitor.ask("Mine?", image)[0]


def test_an_upload_is_one_file_of_a_form(visitor):
    two = [("files", ("a.png", png(), "image/png"))] * 2
    assert visitor.http.post(UPLOAD, files=two).status_code == 400
    assert visitor.http.post(UPLOAD, files=[("other", ("a.png", png(), "image/png"))]).status_code == 400
    assert visitor.http.post(UPLOAD, data={"files": "text"}).status_code == 400
    assert visitor.http.post(UPLOAD, json={"files": [file("/etc/passwd")]}).status_code == 400
    assert visitor.http.post(UPLOAD, content=b"--b", headers={"Content-Type": "multipart/form-data"}).status_code == 400


def test_uploads_are_bounded_in_all():
    noise = png((64, 64), None) + bytes(50_000)
    with served(image_bytes=60_000, upload_bytes=200_000) as (address, _), Browser(address) as one:
        large = one.upload(png() + bytes(60_000))
        assert large.status_code == 413 and "60000 bytes" in large.text
        assert one.upload(png() + bytes(10_000_000)).status_code == 413
        with ThreadPoolExecutor(8) as pool:
            found = sorted(answer.status_code for answer in pool.map(lambda _: one.upload(noise), range(8)))
        assert found == [200] * 3 + [507] * 5
        assert one.upload(noise).text == "The server has no room for another image; try again later."


def test_uploads_make_room_with_time(tmp_path, monkeypatch):
    store, data = uploads.Uploads(tmp_path, 3 * len(png()), files=3), png()
    names = [store.add("a", data) for _ in range(3)]
    with pytest.raises(uploads.NoRoom):
        store.add("b", data)
    now = time.monotonic()
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now + uploads.SPARED + 1)
    newest = store.add("b", data)
    with pytest.raises(BadRecord):
        store.path(names[0], "a")
    assert store.read(names[1], "a")[0] == store.read(str(store.folder / newest), "b")[0] == data
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now + uploads.KEPT + 1)
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == [newest]
    assert store.folder.stat().st_mode & 0o777 == 0o700
    store.close()
    assert not store.folder.exists()


def test_only_the_file_that_was_written_is_read(tmp_path, secret):
    store = uploads.Uploads(tmp_path, 1 << 20)
    for planted in (os.symlink, os.link):
        name = store.add("a", png())
        (store.folder / name).unlink()
        planted(secret, store.folder / name)
        with pytest.raises(BadRecord):
            store.read(name, "a")
    name = store.add("a", png())
    (store.folder / name).unlink()
    os.mkfifo(store.folder / name)
    for given in (name, secret, f"../{Path(secret).name}", str(store.folder), "", "."):
        with pytest.raises(BadRecord):
            store.read(given, "a")
