"""Images that strangers upload to the page: what is kept, for whom, how much and how long."""

import io
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.page_site import UPLOAD, Browser, png, served
from PIL import Image

from fusion_jax.errors import BadRecord
from fusion_jax.server import page_events, upload_forms, uploads
from fusion_jax.server.environment import return_large_buffers


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
        assert answer.status_code == 415 and answer.text.startswith("This image cannot be used")
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
    image_file = io.BytesIO()
    Image.new("P", (1, 1)).save(image_file, "GIF")
    (kept,) = visitor.upload(image_file.getvalue() + b"<script>alert(1)</script>", "a.html").json()
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
    assert visitor.http.post(UPLOAD, files={"files": (None, "text")}).status_code == 400
    assert visitor.http.post(UPLOAD, content=b"--b", headers={"Content-Type": "multipart/form-data"}).status_code == 400


def test_an_upload_of_another_form_is_not_even_read(visitor, caplog):
    """Parsing 30 MB of `&` takes seconds of everybody's time."""
    begun = time.monotonic()
    for kind in ("application/x-www-form-urlencoded", "application/json", "text/plain", "", "multipart/mixed"):
        answer = visitor.http.post(UPLOAD, content=b"&" * (30 << 20), headers={"Content-Type": kind})
        assert answer.status_code == 415 and answer.text == "An upload must be a form with one file."
    assert time.monotonic() - begun < 5
    assert visitor.upload(headers={"Content-Encoding": "gzip"}).status_code == 415
    for body in (b"junk", b"--b\r\nbad header\r\n\r\n", b"--bxx"):
        answer = visitor.http.post(UPLOAD, content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert answer.status_code == 400
    assert not caplog.records


def test_uploads_are_bounded_in_all():
    noise = png((64, 64), None) + bytes(50_000)
    with served(image_bytes=60_000, upload_bytes=200_000) as (address, _), Browser(address) as one:
        large = one.upload(png() + bytes(60_000))
        assert large.status_code == 413 and "60000 bytes" in large.text
        assert one.upload(png() + bytes(10_000_000)).status_code == 413
        others = [Browser(address) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            statuses = sorted(answer.status_code for answer in pool.map(lambda other: other.upload(noise), others))
        assert statuses == [200] * 3 + [507] * 5
        assert one.upload(noise).text == "The server has no room for another image; try again later."
        for other in others:
            other.http.close()


def test_one_browser_does_not_fill_the_room_of_others(monkeypatch):
    monkeypatch.setattr(uploads.Uploads.__init__, "__defaults__", (15,))
    monkeypatch.setattr(uploads, "OWN_FILES", 10)
    with served() as (address, _), Browser(address) as many, Browser(address) as more, Browser(address) as one:
        names = [browser.upload().json()[0] for browser in (many, more) for _ in range(12)]

        def kept(browser, names):
            return [browser.http.get(f"/gradio_api/file={name}").status_code == 200 for name in names]

        assert sum(kept(many, names[:12])) + sum(kept(more, names[12:])) == 15
        assert all(kept(more, names[-7:])) and any(kept(many, names[:12]))
        (mine,) = one.upload().json()
        for _ in range(12):
            many.upload()
        assert kept(one, [mine]) == [True]
        assert sum(kept(more, names[12:])) >= 6  # nor of each other


def test_a_share_is_of_bytes_too(tmp_path):
    store, data = uploads.Uploads(tmp_path, 1000 * uploads.OWN_PART), png() + bytes(300)
    names = [store.add("a", data) for _ in range(3)]
    with pytest.raises(BadRecord):
        store.path(names[0], "a")
    assert store.read(names[2], "a") == data
    other = store.add("b", png() + bytes(2000))  # one image, whatever its size
    assert store.about(other, "b")[0] > 1000
    store.add("b", data)
    with pytest.raises(BadRecord):
        store.path(other, "b")


def test_slow_uploads_make_room_for_others(monkeypatch):
    monkeypatch.setattr(upload_forms, "SLOW", 4.0)
    with served() as (address, _), Browser(address) as one:
        place = (one.http.base_url.host, one.http.base_url.port)
        cookies = "; ".join(f"{name}={value}" for name, value in one.http.cookies.items())
        head = (
            f"POST {UPLOAD} HTTP/1.1\r\nHost: x\r\nCookie: {cookies}\r\nContent-Length: 9999\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b"
        ).encode()
        slow = [socket.create_connection(place, timeout=20) for _ in range(upload_forms.AT_ONCE)]
        for connection in slow:
            connection.sendall(head)
        time.sleep(1.5)  # in which even a busy server has taken them all in
        assert one.upload().status_code == 503
        time.sleep(2.7)
        assert one.upload().status_code == one.upload().status_code == 200
        assert slow[0].recv(1000).startswith(b"HTTP/1.1 408")
        for connection in slow:
            connection.close()


def test_uploads_make_room_with_time(tmp_path, monkeypatch):
    store, data = uploads.Uploads(tmp_path, 3 * len(png()), files=3), png()
    names = [store.add(owner, data) for owner in "acd"]
    with pytest.raises(uploads.NoRoom):
        store.add("b", data)
    now = time.monotonic()
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now + uploads.SPARED + 1)
    newest = store.add("b", data)
    with pytest.raises(BadRecord):
        store.path(names[0], "a")
    assert store.read(names[1], "c") == store.read(str(store.folder / newest), "b") == data
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


def _peak():
    """Peak of this process' resident memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))


def test_many_large_images_at_once_take_little_memory():
    """16 uploads whose last bytes come together; 40 downloads that nobody reads."""
    return_large_buffers()
    data, size = png() + bytes(8 << 20), 8
    start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + data
    end = b"\r\n--b--\r\n"
    with served(image_bytes=9 << 20) as (address, _), Browser(address) as one:
        place = (one.http.base_url.host, one.http.base_url.port)
        cookies = "; ".join(f"{name}={value}" for name, value in one.http.cookies.items())
        length, ready, statuses = len(start + end), threading.Barrier(16), []

        def head(line, more=""):
            return f"{line} HTTP/1.1\r\nHost: x\r\nCookie: {cookies}\r\n{more}\r\n".encode()

        def send():
            form = f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n"
            with socket.create_connection(place, timeout=20) as connection:
                connection.sendall(head(f"POST {UPLOAD}", form))
                connection.sendall(start)
                ready.wait(20)
                connection.sendall(end)
                statuses.append(connection.recv(1 << 16)[9:12])

        (name,) = one.upload(data).json()
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        threads = [threading.Thread(target=send) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [b"200"] * 16
        assert _peak() - before < 8 * size

        (name,) = one.upload(data).json()  # the first one has made room
        time.sleep(0.5)
        Path("/proc/self/clear_refs").write_text("5")
        before, deaf = _peak(), [socket.socket() for _ in range(40)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(place)
            connection.sendall(head(f"GET /gradio_api/file={name}"))
        time.sleep(1.5)
        assert _peak() - before < 5 * size
        assert one.http.get(f"/gradio_api/file={name}").content == data
        for connection in deaf:
            connection.close()


def test_few_images_of_questions_are_in_memory_at_once(monkeypatch):
    with served() as (address, engine), Browser(address) as one:
        image, lock, now, most = one.image(), threading.Lock(), 0, 0

        def prepare(record):
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.2)
            with lock:
                now -= 1

        monkeypatch.setattr(engine, "prepare", prepare)
        number = one.number("textbox", "image", "slider", "slider")
        for k in range(10):
            one.join(number, ["What?", image, 0, 16], session_hash=f"page{k}")
        for k in range(10):
            assert one.events(f"page{k}")[-1]["msg"] == "close_stream"
        assert most == page_events._READING
