"""The documentation: short lines, and links, commands, flags, files and symbols that exist; the site builds."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import generate_commands  # noqa: E402
import generate_tree  # noqa: E402

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
# What was true of an earlier version may name what is gone; flags.md names the flags of the published scripts.
NOT_OF_TODAY = {"CHANGELOG.md", "flags.md"}
WIDTH = 120
# Names that look like files or symbols of ours and belong to others: to users, exports, or the published system.
OTHERS = {"modeling_fusion.py", "vqaEval.py", "fusion_jax/synth/kinds/riddle.py"}
CONFIGS = sorted(ROOT.glob("fusion_jax/**/config.py"))
SUFFIXES = "py|sh|c|ipynb|toml|yml"
# Endings of files that users have and runs write.
DATA = {
    "json",
    "jsonl",
    "yaml",
    "md",
    "html",
    "csv",
    "tsv",
    "png",
    "svg",
    "jinja",
    "model",
    "gguf",
    "bin",
    "lock",
    "vocab",
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
pages_of_today = pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in NOT_OF_TODAY], ids=lambda page: page.name
)


def prose(page):
    """The lines outside blocks of code, each with its number."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def code_spans(page):
    """The texts between backticks, with line breaks as spaces."""
    paragraph = "\n".join(line if not line.startswith("|") else f"{line}\n" for _, line in prose(page))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", paragraph)]


def commands(page):
    """Every command line on a page, in blocks of code and in the text, with continued lines joined."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for text in lines + code_spans(page):
        text = text.partition("  # ")[0]
        yield from re.findall(r"(?:python|pytest|bash) [^`;&|]+", text)


@pages
def test_lines_are_short(page):
    # Tables, pictures and words without a space cannot be wrapped.
    long = [
        number
        for number, line in prose(page)
        if len(line) > WIDTH and not line.startswith(("|", "![")) and " " in line.strip()
        if not line.strip().startswith("![")
    ]
    assert not long, f"{page.name} has lines of more than {WIDTH} characters: {long}"


@functools.cache
def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = [line.lstrip("# ") for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    text = "\n".join(line for _, line in prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_file(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(other), f"{page.name} links to {target}, a heading that does not exist"


@pages
def test_no_page_installs_from_an_index(page):
    # The name is not on the package index: everything is installed from the checkout.
    wrong = re.search(r"pip install[^\n`]* '?fusion_jax\b", page.read_text())
    assert not wrong, f"{page.name}: {wrong[0]}; write pip install -e '.[EXTRA]'"


@functools.cache
def flags_of(name):
    """The flags of a command, by the reference."""
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", generate_commands.PAGE.read_text(), re.M | re.S)
    assert section, f"docs/commands.md has no section for {name}"
    return set(re.findall(r"^\| `--(\w+)`", section[1], re.M))


@pages_of_today
def test_commands_and_their_flags_exist(page):
    known = set(generate_commands.commands())
    for command in commands(page):
        words = command.split()
        if words[:2] == ["python", "-m"] and words[2].startswith("fusion_jax."):
            name = words[2].removeprefix("fusion_jax.")
            if name == "NAME":
                continue
            if name not in known:
                assert importlib.util.find_spec(words[2]), f"{page.name}: {words[2]} does not exist"
                continue
            for word in words[3:]:
                flag = re.match(r"'?--(\w+)", word)
                if flag and flag[1] != "config":
                    assert flag[1] in flags_of(name), f"{page.name}: {name} has no flag --{flag[1]}"
        elif words[0] in ("bash", "python") and re.fullmatch(rf"[\w/]+\.({SUFFIXES})", words[1]):
            assert (ROOT / words[1]).is_file() or words[1] in OTHERS, f"{page.name}: {words[1]} does not exist"
        if words[0] == "bash" and words[1].startswith("launch/"):
            script = (ROOT / words[1]).read_text()
            for flag in re.findall(r"(?<= )--(\w+)", command.partition(" -- ")[0]):
                serve = words[1] == "launch/serve.sh" and flag in flags_of("serve")
                assert serve or f"--{flag}" in script or flag in ("dry_run", "help"), f"{page.name}: {command}"


@pages_of_today
def test_files_and_symbols_exist(page):
    """A path is written from the root of the repository or of the package: `training/step.py`, `launch/train.sh`."""
    for span in code_spans(page):
        match = re.match(rf"([\w./]*\w+\.(?:{SUFFIXES}))(?::([a-z_]\w*)|$)", span)
        if match and match[1] not in OTHERS:
            places = [ROOT / match[1], ROOT / "fusion_jax" / match[1], ROOT / "launch" / match[1]]
            assert any(map(Path.is_file, places)), f"{page.name}: the file {match[1]} does not exist"
    for span in code_spans(page):
        match = re.fullmatch(r"(\w+(?:\.\w+)*)\.(\w+)(?:\(.*\))?", span)
        modules = modules_named(match[1]) if match else []
        if modules and match[2] not in DATA | set(SUFFIXES.split("|")):
            word = re.compile(rf"\b{match[2]}\b")
            places = modules + CONFIGS + modules_named(span)  # a symbol, a key of a configuration, or a module
            assert any(word.search(f"{place.stem} {place.read_text()}") for place in places), f"{page.name}: {span}"


@functools.cache
def modules_named(name):
    """The modules that a dotted name may mean: `losses`, `models.attention`, `fusion_jax.evals.runner`."""
    path = name.removeprefix("fusion_jax.").replace(".", "/")
    return list(ROOT.glob(f"fusion_jax/**/{path}.py"))


def test_the_reference_of_commands_is_current():
    command = [sys.executable, "-c", "import generate_commands; print(generate_commands.page(), end='')"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "docs", env=environment(), timeout=300)
    assert result.returncode == 0, result.stderr
    assert generate_commands.PAGE.read_text() == result.stdout, "run python docs/generate_commands.py"


def test_the_tree_is_current():
    page = generate_tree.PAGE.read_text()
    assert generate_tree.tree() in page and generate_tree.with_tree(page) == page, "run python docs/generate_tree.py"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
    # Not --quiet, which hides warnings from --strict as well.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=600)
    assert result.returncode == 0, result.stderr
    built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {page.stem for page in ROOT.glob("docs/*.md")} - {"index"} <= built
    models = (tmp_path / "site" / "api" / "models" / "index.html").read_text()
    assert "fusion_jax.models.attention" in models


def environment():
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "NO_MKDOCS_2_WARNING": "1"}
