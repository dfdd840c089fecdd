"""What a conversion may touch, what it leaves behind, and what it goes on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fusion_jax.data import shard_writing, shards
from fusion_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Forty records with one image, which is in `images` and not in `empty`."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    (folder / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "images" / "a.png")
    records = [{"id": f"r{k}", "image": "a.png", "conversations": TURNS} for k in range(40)]
    (folder / "a.json").write_text(json.dumps(records))
    shard_writing.convert(folder / "a.json", folder / "images", folder / "calm", records_per_shard=10, progress=False)
    return folder


def run(made, out, images="images", **settings):
    settings = {"records_per_shard": 10, "progress": False} | settings
    return shard_writing.convert(made / "a.json", made / images, out, **settings)


def contents(folder):
    """All below a folder: the bytes of files, where links lead, None for folders."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def interrupt(made, out, monkeypatch, after=2):
    """A conversion whose process is killed after so many shards, as far as its folder is concerned."""
    write = shard_writing.write_shard

    def killed(task, advance):
        if task[1] == after:
            (task[0].out / "partial" / f"{task[0].name('shard', after)}.77.tmp").write_bytes(b"half")
            raise MemoryError
        return write(task, advance)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writing, "write_shard", killed)
        with pytest.raises(MemoryError):
            run(made, out)
    assert (out / "partial" / "plan.json").exists()


def write_user_files(out, name):
    """Folders of a user, some of which look much like ours."""
    partial = out / "partial"
    partial.mkdir(parents=True)
    if name == "notes":
        (partial / "notes.txt").write_text("mine")
    elif name == "notes and a lock":
        (partial / "notes.txt").write_text("mine")
        (partial / "lock").write_text("")
    elif name == "a plan of another program":
        (partial / "plan.json").write_text('{"format": "house", "rooms": 4}')
        (partial / "lock").write_text("")
    elif name == "numbered files":
        (partial / "00001.json").write_text('{"boxes": []}')
    elif name == "numbered files and a lock":
        (partial / "00001.json").write_text('{"boxes": []}')
        (partial / "lock").write_text("")
    elif name == "a plan in words":
        (partial / "plan.json").write_text("buy milk")
    elif name == "a folder inside":
        (partial / "deeper").mkdir()
        (partial / "deeper" / "00001.json").write_text("mine")
    elif name == "files beside":
        (out / "thesis.tex").write_text("mine")
    elif name == "a link":
        partial.rmdir()
        (out / "elsewhere").mkdir()
        (out / "elsewhere" / "00001.json").write_text("mine")
        partial.symlink_to(out / "elsewhere")
    elif name == "another manifest":
        (out / "manifest.json").write_text('{"name": "my extension", "version": 1}')
        (partial / "00001.json").write_text("mine")


@pytest.mark.parametrize(
    "name",
    [
        "notes",
        "notes and a lock",
        "a plan of another program",
        "a plan in words",
        "numbered files",
        "numbered files and a lock",
        "a folder inside",
        "files beside",
        "a link",
        "another manifest",
    ],
)
def test_files_of_others_are_refused_and_stay(made, tmp_path, name):
    out = tmp_path / "out"
    write_user_files(out, name)
    before = contents(out)
    with pytest.raises(UserError, match=str(out)):
        run(made, out)
    assert contents(out) == before


def test_a_folder_named_partial_beside_complete_shards_stays(made, tmp_path):
    out = tmp_path / "out"
    run(made, out)
    write_user_files(out, "notes")
    (out / "partial" / "00001.json").write_text("mine")
    before = contents(out)
    run(made, out)
    assert contents(out) == before


def test_a_link_beside_complete_shards_is_not_followed(made, tmp_path, monkeypatch):
    interrupt(made, tmp_path / "another", monkeypatch)
    run(made, tmp_path / "out")
    (tmp_path / "out" / "partial").symlink_to(tmp_path / "another" / "partial")
    before = contents(tmp_path)
    run(made, tmp_path / "out")
    assert contents(tmp_path) == before


def test_files_put_into_the_folder_meanwhile_stay(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(made, out, monkeypatch)
    (out / "partial" / "mine.txt").write_text("mine")
    (out / "README").write_text("mine")
    run(made, out)
    expected = contents(made / "calm") | {"README": b"mine", "partial": None, "partial/mine.txt": b"mine"}
    assert contents(out) == expected


def test_a_lock_that_is_a_link_is_not_followed(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(made, out, monkeypatch)
    (tmp_path / "precious").write_text("mine")
    (out / "partial" / "lock").unlink()
    (out / "partial" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError):
        run(made, out)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("torn", [b"", b"{", b'{\n "format": "fus', b"\0" * 300, b"\xff\x00garbage", None])
def test_a_torn_plan_begins_anew(made, tmp_path, monkeypatch, caplog, torn):
    out = tmp_path / "out"
    interrupt(made, out, monkeypatch)
    plan = out / "partial" / "plan.json"
    plan.unlink()
    if torn is not None:
        plan.write_bytes(torn)
    (out / "partial" / "00000.json").write_text('{"number": 0, "records": 1')
    run(made, out)
    assert "starting from scratch" in caplog.text
    assert contents(out) == contents(made / "calm")


@pytest.mark.parametrize("torn", [b"", b"{", b'{\n "format": "fusion_jax'])
def test_a_torn_plan_without_a_lock_begins_anew(made, tmp_path, torn):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "plan.json").write_bytes(torn)
    run(made, tmp_path)
    assert contents(tmp_path) == contents(made / "calm")


@pytest.mark.parametrize(
    "report",
    [
        "",
        "[]",
        "5",
        '{"records": 0}',
        '{"number": 0, "records": "x"}',
        "[" * 5000,
        '{"number": 0, "records": 0, "listed": 5}',
    ],
)
def test_damaged_reports_are_made_again(made, tmp_path, monkeypatch, report):
    interrupt(made, tmp_path, monkeypatch)
    (tmp_path / "partial" / "00000.json").write_text(report)
    run(made, tmp_path)
    assert contents(tmp_path) == contents(made / "calm")


@pytest.mark.parametrize(
    ("there", "workers"), [("nothing", 1), ("no parents", 1), ("an empty folder", 1), ("no parents", 2)]
)
def test_a_mistake_leaves_nothing_and_the_corrected_command_works(made, tmp_path, there, workers):
    out = tmp_path / "deep" / "er" / "out"
    if there != "no parents":
        out.parent.mkdir(parents=True)
    if there == "an empty folder":
        out.mkdir()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="records can"):
        run(made, out, "empty", workers=workers)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="None of the 40 records"):
        run(made, out, "empty", max_bad_records=1)
    assert contents(tmp_path) == before
    for wrong in ({"images": "nowhere"}, {"shard_count": 3}, {"workers": 0}):
        with pytest.raises(UserError):
            run(made, out, **wrong)
    assert contents(tmp_path) == before
    run(made, out)
    assert contents(out) == contents(made / "calm")


def test_a_stop_before_the_first_shard_leaves_nothing_and_one_after_it_all(made, tmp_path, monkeypatch):
    def stopped(task, advance):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_writing, "write_shard", stopped)
        run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    interrupt(made, tmp_path / "out", monkeypatch)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*")}
    assert len(kept) == 2
    run(made, tmp_path / "out")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time_ for name, time_ in kept.items())


def test_a_full_disk_keeps_what_is_finished(made, tmp_path, monkeypatch):
    """A real limit on what files of the process may take, as every write fails beyond it."""
    code = (
        "import resource, signal, sys; from fusion_jax.data import shard_writing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from fusion_jax.errors import UserError\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)\n"
        "    try:\n"
        "        shard_writing.convert(sys.argv[1], sys.argv[2], sys.argv[3], records_per_shard=10, progress=False,"
        " workers=int(sys.argv[5]))\n"
        "    except UserError as e:\n"
        "        print(e)\n"
    )
    (tmp_path / "full.py").write_text(code)
    out = tmp_path / "out"
    limit = max(p.stat().st_size for p in (made / "calm").glob("*.array_record")) // 2
    command = [sys.executable, tmp_path / "full.py", made / "a.json", made / "images", out, limit]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command), "1"], capture_output=True, text=True, env=environment, timeout=60)
    assert f"Cannot go on in {out}" in done.stdout, done
    assert "the same command continues" in done.stdout
    assert not out.exists()  # nothing was finished
    interrupt(made, out, monkeypatch)
    done = subprocess.run([*map(str, command), "2"], capture_output=True, text=True, env=environment, timeout=60)
    assert f"Cannot go on in {out}" in done.stdout, done
    assert len(list(out.glob("shard-*"))) == 2
    run(made, out)
    assert contents(out) == contents(made / "calm")


def test_images_missed_in_a_wrong_folder_are_looked_for_again(made, tmp_path, monkeypatch):
    """Stopped by hand, with half of the images missing, and started again with the right folder."""
    shutil.copytree(made / "images", tmp_path / "half")
    records = [{"image": f"{k % 2}.png", "conversations": TURNS} for k in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for name, count in (("half", 1), ("images", 2)):
        (tmp_path / name).mkdir(exist_ok=True)
        for k in range(count):
            shutil.copy(made / "images" / "a.png", tmp_path / name / f"{k}.png")
    interrupted = shard_writing.write_shard

    def stopped(task, advance):
        if task[1] == 2:
            raise KeyboardInterrupt
        return interrupted(task, advance)

    settings = {"records_per_shard": 10, "progress": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_writing, "write_shard", stopped)
        shard_writing.convert(tmp_path / "a.json", tmp_path / "half", tmp_path / "out", **settings)
    manifest = shard_writing.convert(tmp_path / "a.json", tmp_path / "images", tmp_path / "out", **settings)
    assert manifest["records"] == 40


@pytest.fixture
def begun(made, tmp_path, monkeypatch):
    """A conversion that was killed after three of four shards, in each of which one image of ten is missing."""
    shutil.copytree(made / "images", tmp_path / "images")
    (tmp_path / "empty").mkdir()
    records = [{"image": f"{'gone' if k % 10 == 7 else 'a'}.png", "conversations": TURNS} for k in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    run(tmp_path, tmp_path / "calm")
    interrupt(tmp_path, tmp_path / "out", monkeypatch, after=3)
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "wrong", [{"images": "empty"}, {"max_bad_records": 0}, {"images": "empty", "max_bad_records": 1}]
)
def test_a_mistake_takes_nothing_from_an_earlier_run(begun, wrong, workers):
    out = begun / "out"
    before = {name: data for name, data in contents(out).items() if not name.endswith((".tmp", "lock"))}
    assert sum(name.startswith("shard-") for name in before) == 3
    if wrong.get("max_bad_records") == 1:  # no record can be used, but for those that are converted
        run(begun, out, workers=workers, **wrong)
        assert before.items() >= {k: v for k, v in contents(out).items() if k.startswith(("shard-", "text-"))}.items()
        return
    if wrong == {"images": "empty"}:
        wrong["max_bad_records"] = 0.3  # nine records of a shard each are there, none of the last one
    with pytest.raises(shard_writing.Unusable, match=f"stays in {out}; delete it"):
        run(begun, out, workers=workers, **wrong)
    assert {name: data for name, data in contents(out).items() if not name.endswith("lock")} == before
    run(begun, out)
    assert contents(out) == contents(begun / "calm")


def test_another_path_to_the_image_folder_is_the_same_folder(begun, monkeypatch):
    """What an earlier run has finished stays, and is not made again, even if this one is stopped at once."""
    out = begun / "out"
    (begun / "link").symlink_to("images")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}

    def stopped(task, advance):
        raise KeyboardInterrupt

    for name in ("link", "empty/../images", "images/."):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shard_writing, "write_shard", stopped)
            run(begun, out, name)
    run(begun, out, "link")
    assert len(kept) == 6 and all((out / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    assert [path.read_bytes() for path in sorted(out.glob("*.array_record"))] == [
        path.read_bytes() for path in sorted((begun / "calm").glob("*.array_record"))
    ]


def test_a_link_that_leads_to_another_image_folder_now_is_another_folder(begun, monkeypatch):
    out, link = begun / "out", begun / "link"
    link.symlink_to("images")
    shutil.rmtree(out)
    interrupt_through = {"records_per_shard": 10, "progress": False}
    write = shard_writing.write_shard

    def stopped(task, advance):
        if task[1] == 3:
            raise KeyboardInterrupt
        return write(task, advance)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_writing, "write_shard", stopped)
        shard_writing.convert(begun / "a.json", link, out, **interrupt_through)
    shutil.copytree(begun / "images", begun / "better")
    shutil.copy(begun / "better" / "a.png", begun / "better" / "gone.png")
    link.unlink()
    link.symlink_to("better")
    assert run(begun, out, "link")["records"] == 40


def test_links_as_folders(made, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(made, tmp_path / "link")
    assert contents(tmp_path / "real") == contents(made / "calm")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link to nothing"):
        run(made, tmp_path / "dangling")
    assert not (tmp_path / "gone").exists()


def test_out_in_the_image_folder(made, tmp_path):
    images = shutil.copytree(made / "images", tmp_path / "images")
    with pytest.raises(UserError, match="holds files that are not shards"):
        shard_writing.convert(made / "a.json", images, images, progress=False)
    shard_writing.convert(made / "a.json", images, images / "shards", records_per_shard=10, progress=False)
    assert contents(images / "shards") == contents(made / "calm")
    assert (images / "a.png").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_says_one_line_and_the_same_command_goes_on(made, tmp_path, workers):
    """The real command with its process group interrupted, as a terminal does it."""
    records = json.loads((made / "a.json").read_text()) * 150
    (tmp_path / "b.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    arguments = ["--json_path", tmp_path / "b.json", "--image_folder", made / "images", "--out", out]
    arguments += ["--records_per_shard", "500", "--workers", workers]
    command = [sys.executable, "-m", "fusion_jax.shards", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    while not list(out.glob("partial/0*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "stopped; the same command goes on from here" in stderr.splitlines()[-1]
    assert "Traceback" not in stdout + stderr
    with pytest.raises(ProcessLookupError):
        while True:  # no process of the group is left
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert "there already" in done.stdout
    assert shards.read_manifest(out)["records"] == 6_000
