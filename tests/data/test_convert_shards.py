"""Shards: what goes in comes out, whatever happens on the way, and broken ones are reported."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from fusion_jax.data import shard_folder, shard_writing, shards
from fusion_jax.data.shard_checking import check_shards
from fusion_jax.data.sources import load_source
from fusion_jax.errors import BadRecord, UserError

ROOT = Path(__file__).parents[2]


def turns(k):
    return [{"from": "human", "value": f'<image>\n图 "{k}"?'}, {"from": "gpt", "value": f"naïve 🐱 {k}"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """60 records: images of three formats, no image, two images; records 7, 17, ... cannot be used."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0)
    for k, end in enumerate(("jpg", "png", "webp")):
        picture = pixels.integers(0, 256, (8 + k, 12, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{k}.{end}")
    (folder / "images" / "bad.jpg").write_bytes(b"no image")
    (folder / "secret.jpg").write_bytes((folder / "images" / "0.jpg").read_bytes())
    records = []
    for k in range(60):
        images = ["0.jpg", "1.png", "2.webp", None, ["0.jpg", "2.webp"]][k % 5]
        records.append({"id": f"r{k}", "image": images, "conversations": turns(k)})
    del records[2]["id"]
    records[0]["conversations"][1]["value"] = "half \ud83d"  # JSON may say so
    records[7]["image"] = "nowhere.jpg"
    records[17]["image"] = "bad.jpg"
    records[27]["image"] = "../secret.jpg"
    del records[37]["conversations"]
    records[47] = 5
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture(scope="module")
def converted(made):
    shard_writing.convert(made / "a.json", made / "images", made / "shards", shard_count=4, progress=False)
    return made / "shards"


@pytest.fixture
def copy(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(*args, **kwargs):
    command = [sys.executable, "-m", "fusion_jax.shards", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def test_records_come_out_as_they_went_in(made, converted):
    source, plain = load_source(converted), load_source(made / "a.json", made / "images")
    used = [k for k in range(60) if k % 10 != 7 or k == 57]
    assert len(source) == len(used)
    for i, k in enumerate(used):
        record, expected = source[i], plain[k]
        assert (record.id, record.turns) == (expected.id, expected.turns)
        assert record.images == tuple(path.read_bytes() for path in expected.images)
        assert record.sizes == tuple(Image.open(path).size for path in expected.images)
        text = source.text(i)
        assert (text.id, text.turns, text.sizes) == (record.id, record.turns, record.sizes)
        assert text.images == (b"",) * len(record.images)
    assert source[0].image_path == Path("0.jpg")
    assert source[3].image_path is None
    assert source[2].id == "2"
    assert source[-1].where == f"{converted}/shard-00003-of-00004.array_record, record 13 (id r59)"
    with pytest.raises(IndexError):
        source[len(source)]


def test_manifest(made, converted):
    manifest = shards.read_manifest(converted)
    assert manifest["source"] == {
        "file": "a.json",
        "bytes": (made / "a.json").stat().st_size,
        "sha256": shards.hash_file(made / "a.json"),
        "records": 60,
    }
    skipped = manifest["skipped"]
    assert skipped["records"] == 5
    assert skipped["reasons"] == dict.fromkeys(
        ["bad_record", "corrupt_image", "image_outside_folder", "missing_image", "missing_key"], 1
    )
    assert [one["record"] for one in skipped["listed"]] == [7, 17, 27, 37, 47]
    assert "nowhere.jpg" in skipped["listed"][0]["detail"]
    assert [shard["records"] for shard in manifest["shards"]] == [14, 13, 14, 14]
    assert manifest["records"] == 55
    assert sorted(p.name for p in converted.iterdir() if p.suffix != ".json") == sorted(
        shard[kind]["name"] for shard in manifest["shards"] for kind in ("shard", "text")
    )


def test_allow_outside(made, tmp_path):
    manifest = shard_writing.convert(
        made / "a.json", made / "images", tmp_path / "s", allow_outside=True, progress=False
    )
    assert manifest["records"] == 56
    assert manifest["skipped"]["reasons"].get("image_outside_folder") is None


def test_source_is_shared_by_threads_and_pickled(converted):
    source = load_source(converted)
    expected = [source[i] for i in range(len(source))]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, list(range(len(source))) * 20)) == expected * 20
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(len(again))] == expected


def test_command_is_killed_at_any_moment_and_goes_on(made, tmp_path):
    """The real command with two processes, killed twice, against an undisturbed run in one."""
    records = json.loads((made / "a.json").read_text())[:5] * 800
    (tmp_path / "b.json").write_text(json.dumps(records))
    arguments = ["--json_path", tmp_path / "b.json", "--image_folder", made / "images", "--records_per_shard", 500]
    shard_writing.convert(
        tmp_path / "b.json", made / "images", tmp_path / "calm", records_per_shard=500, progress=False
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fusion_jax.shards", *map(str, arguments), "--workers", "2", "--out", out]
    for stop in (1, 3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob("partial/0*.json"))) < stop and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        finished = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
        assert process.returncode == -signal.SIGKILL
        assert not (out / shards.MANIFEST).exists()
        with pytest.raises(UserError, match="not a folder of shards"):
            load_source(out)
        kept = {json.loads(p.read_text())["shard"]["name"] for p in out.glob("partial/0*.json")}
        assert kept
    done = run(*arguments, "--workers", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "4000 records, 4000 images" in done.stdout
    assert "there already" in done.stdout
    assert "converting" in done.stderr
    assert all((out / name).stat().st_mtime_ns == finished[name] for name in kept)
    assert contents(out) == contents(tmp_path / "calm")

    assert check_shards(out, progress=False) == []
    file = out / "text-00003-of-00008.array_record"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    load_source(out)  # the size is right
    checked = run("--out", out, "--check", "--workers", 1)
    assert checked.returncode == 2
    assert f"{file} has the hash" in checked.stdout
    assert f"error: {out} differs from its manifest in" in checked.stderr
    assert "Traceback" not in checked.stdout + checked.stderr


def test_going_on_takes_finished_shards_only(made, converted, tmp_path):
    """Half-written files, a report without its shard and leftovers of a finished run."""
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    manifest = json.loads((out / shards.MANIFEST).read_text())
    (out / shards.MANIFEST).unlink()
    (out / "partial").mkdir()
    plan = {key: manifest[key] for key in ("format", "version", "source", "settings")}
    (out / "partial" / "plan.json").write_text(json.dumps(plan))
    (out / "partial" / "shard-00000-of-00004.array_record.1.tmp").write_bytes(b"half")
    (out / "partial" / "00001.json").write_text('{"number": 1, "rec')
    report = {"number": 2, "skipped": {}, "listed": []} | manifest["shards"][2]
    (out / "partial" / "00002.json").write_text(json.dumps(report))
    (out / "shard-00002-of-00004.array_record").unlink()
    (out / "shard-00003-of-00004.array_record").write_bytes(b"half")
    arguments = made / "a.json", made / "images", out
    shard_writing.convert(*arguments, shard_count=4, workers=2, progress=False)
    assert contents(out) == contents(converted)
    (out / "partial").mkdir()
    shard_writing.convert(*arguments, shard_count=4, progress=False)
    assert contents(out) == contents(converted)
    assert not (out / "partial").exists()
    for other in ({"shard_count": 5}, {"shard_count": 4, "allow_outside": True}):
        with pytest.raises(UserError, match=r"of another conversion.*another folder"):
            shard_writing.convert(*arguments, **other, progress=False)
    with pytest.raises(UserError, match=r"of another conversion \(source"):
        shard_writing.convert(made / "a.jsonl", made / "images", out, shard_count=4, progress=False)


def test_jsonl_and_shards_without_any_usable_record(made, converted, tmp_path):
    (tmp_path / "c.jsonl").write_text("".join((made / "a.jsonl").read_text().splitlines(True)[4:10]))
    arguments = tmp_path / "c.jsonl", made / "images", tmp_path / "out"
    manifest = shard_writing.convert(*arguments, records_per_shard=1, progress=False)
    assert len(manifest["shards"]) == manifest["records"] == 5
    assert not (tmp_path / "out" / "shard-00003-of-00006.array_record").exists()
    source, expected = load_source(tmp_path / "out"), load_source(converted)
    assert [source[i].turns for i in range(5)] == [expected[i].turns for i in (4, 5, 6, 7, 8)]
    assert check_shards(tmp_path / "out", progress=False) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_folder": "nowhere"}, "no image folder"),
        ({"shard_count": 2, "records_per_shard": 2}, "not both"),
        ({"records_per_shard": 0}, "records_per_shard must be above 0"),
        ({"workers": 0}, "workers must be above 0"),
        ({"json_path": "nowhere.json"}, "nowhere.json"),
        ({"json_path": "images/0.jpg"}, "must end in .json"),
        ({"out": "a.json"}, "is a file"),
        ({"out": "images"}, "holds files that are not shards"),
        ({"max_bad_records": 0.05}, "5 of 60 records cannot be used.*record 7.*nowhere.jpg"),
    ],
)
def test_unusable_arguments(made, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(made)
    given = {"json_path": "a.json", "image_folder": "images", "out": tmp_path / "out", "progress": False}
    with pytest.raises(UserError, match=message):
        shard_writing.convert(**given | arguments)
    assert not (made / "images" / "partial").exists()


def test_one_run_at_a_time(made, tmp_path):
    with shard_folder.lock_folder(tmp_path / "out"), pytest.raises(UserError, match="Another process"):
        shard_writing.convert(made / "a.json", made / "images", tmp_path / "out", progress=False)


def test_refused_images(made, tmp_path, monkeypatch):
    os.mkfifo(made / "images" / "pipe.jpg")
    try:
        images = ["pipe.jpg", ".", "1.png", "0.jpg"]
        (tmp_path / "c.json").write_text(json.dumps([{"image": i, "conversations": turns(0)} for i in images]))
        monkeypatch.setattr(shard_writing, "MAX_PIXELS", 100)
        manifest = shard_writing.convert(tmp_path / "c.json", made / "images", tmp_path / "out", max_bad_records=1)
    finally:
        (made / "images" / "pipe.jpg").unlink()
    assert manifest["skipped"]["reasons"] == {"image_outside_folder": 1, "image_too_large": 1, "missing_image": 1}
    assert manifest["records"] == 1


def test_none_usable(made, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([{"image": "gone.jpg", "conversations": turns(0)}] * 3))
    with pytest.raises(UserError, match=r"None of the 3 records.*gone\.jpg"):
        shard_writing.convert(tmp_path / "c.json", made, tmp_path / "out", max_bad_records=1, progress=False)


def edit(folder, change):
    path = folder / shards.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2.*reads version 1"),
        (lambda m: m.pop("version"), "version None"),
        (lambda m: m.pop("format"), "lacks 'format'"),
        (lambda m: m.pop("records"), "'records' is missing"),
        (lambda m: m.pop("shards"), "'shards' is missing"),
        (lambda m: m.update(records="55"), "'records'.*not of type int"),
        (lambda m: m.update(records=54), "55 records.*54"),
        (lambda m: m["shards"][1].pop("text"), "'text' is missing in shard 1"),
        (lambda m: m["shards"][1]["shard"].pop("sha256"), "'sha256' is missing in 'shard' of shard 1"),
        (lambda m: m["shards"][1].update(records=-1), "'records' in shard 1"),
        (lambda m: (m["shards"][1].update(records=10**12), m.update(records=10**12 + 42)), "shard 1 cannot hold"),
        (lambda m: m["shards"][1]["shard"].update(name="../x.array_record"), "no valid and unique file name"),
        (lambda m: m["shards"].append(m["shards"][0]), "no valid and unique file name"),
        (lambda m: m.update(shards=[], records=0), "no records"),
    ],
)
def test_manifests_that_cannot_be_read(copy, change, message):
    edit(copy, change)
    with pytest.raises(UserError, match=message) as e:
        load_source(copy)
    assert str(copy) in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a valid manifest"), ("[]", "'format'"), ('{"version": 1, "version": 1}', "'version' occurs twice")],
)
def test_manifests_that_are_none(copy, text, message):
    (copy / shards.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=message):
        load_source(copy)


def test_missing_and_changed_shards(copy, tmp_path):
    name = "shard-00001-of-00004.array_record"
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{name} has changed: it has {len(data) - 1} bytes.*{len(data)}"):
        load_source(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_source(copy)
    assert any("is missing" in problem for problem in check_shards(copy, progress=False))
    (copy / shards.MANIFEST).unlink()
    with pytest.raises(UserError, match="not a folder of shards"):
        load_source(copy)
    with pytest.raises(UserError, match="not a folder of shards"):
        load_source(tmp_path)
    with pytest.raises(UserError, match="not a folder of shards"):
        load_source(tmp_path / "nowhere")


def test_a_damaged_record_is_a_bad_record(copy):
    """A changed byte costs one record, or some; the others can be read, and --check says which file it was."""
    path = copy / "shard-00002-of-00004.array_record"
    source = load_source(copy)
    victim = source[32]
    data = path.read_bytes()
    at = data.index(victim.images[0])
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    shards._reader.cache_clear()
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i])
        except BadRecord as e:
            assert e.reason == "corrupt_record"
            assert str(path) in str(e)
    assert len(found) == len(source) - 1
    problems = check_shards(copy, progress=False)
    assert any(f"{path} has the hash" in problem for problem in problems)
    (copy / "more.array_record").write_bytes(b"")
    assert f"{copy / 'more.array_record'} is not in the manifest" in check_shards(copy, progress=False)


def test_mixture_with_shards(made, converted):
    (made / "mix.yaml").write_text(
        "datasets:\n"
        "  - shards: shards\n    sampling_strategy: 'end:10%'\n    weight: 2\n"
        "  - json_path: a.json\n    image_folder: images\n    sampling_strategy: 'first:3'\n"
    )
    source = load_source(made / "mix.yaml")
    assert source.parts == [("shards", 12), ("a.json", 3)]
    expected = [*(f"r{k}" for k in range(54, 60)), *(f"r{k}" for k in range(54, 60)), "r0", "r1", "2"]
    assert [source[i].id for i in range(len(source))] == expected


def test_remote_shards_are_copied_once(converted, tmp_path, monkeypatch):
    """Through fsspec, here a file system in memory, as s3:// would be."""
    monkeypatch.setenv("FUSION_JAX_CACHE", str(tmp_path / "cache"))
    shards._reader.cache_clear()
    remote = fsspec.filesystem("memory")
    remote.put(str(converted), "/bucket/shards", recursive=True)
    source, expected = load_source("memory://bucket/shards"), load_source(converted)
    assert [source[i].turns for i in range(len(source))] == [expected[i].turns for i in range(len(source))]
    assert source[4].images == expected[4].images
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 4  # the texts were not asked for
    name = "/bucket/shards/text-00000-of-00004.array_record"
    data = remote.cat_file(name)
    remote.pipe_file(name, bytes(len(data)))
    with pytest.raises(UserError, match="has changed: its hash"):
        source.text(0)
    remote.rm(name)
    with pytest.raises(UserError, match="is missing"):
        load_source("memory://bucket/shards")
    with pytest.raises(UserError, match="not a folder of shards"):
        load_source("memory://bucket/nowhere")
    with pytest.raises(UserError, match="Cannot reach nonsense://x"):
        load_source("nonsense://x")
    with pytest.raises(UserError, match="copied to a local disk first"):
        load_source("s3://bucket/a.json")
