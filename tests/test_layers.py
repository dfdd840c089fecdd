"""The layers of the package: what may import what, what may be run, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fusion_jax"
# A package or file imports only what stands on a line above its own, or belongs to itself. The commands come last:
# every module at the root that is not named here is one.
LAYERS = (
    ("files", "c_compiler"),
    ("errors",),
    ("values", "web", "command_line"),
    ("batch",),
    ("models",),
    ("config",),
    ("data",),
    ("devices",),
    ("inference",),
    ("evals",),
    ("training",),
    ("interop", "inspection", "planning", "benchmarking", "server", "synth", "studies"),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
ROOT_LIBRARIES = {"__init__", "errors", "config", "batch", "files", "c_compiler"}
COMMANDS = {
    *("train", "evaluate", "chat", "serve", "plan", "benchmark", "visualize", "doctor", "synthesize", "convert"),
    *("shards", "inspect", "study"),
}
LONGEST, LONG, SHARE = 600, 350, 0.9
EXPORTED_MODEL = "interop/torch/modeling_fusion.py"  # one file on purpose: transformers loads it as such


def modules() -> dict[str, ast.Module]:
    """All modules of the package, parsed, by name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return trees


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return modules()


def imports(name: str, trees: dict[str, ast.Module]) -> Iterator[str]:
    """The package's modules that a module imports, inside functions too."""
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.split(".")[0] == "fusion_jax")
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []  # exported files import each other so
            module = ".".join([*above, *filter(None, [node.module])])
            if module.split(".")[0] == "fusion_jax":
                for one in node.names:
                    inner = f"{module}.{one.name}"
                    yield inner if inner in trees else module


def room(name: str) -> str:
    """The part of the package in which a module lies, `data` of fusion_jax.data.image; the root's is empty."""
    return name.partition(".")[2].partition(".")[0]


def is_allowed(source: str, target: str) -> bool:
    a, b = room(source), room(target)
    if not b:
        return True  # `fusion_jax` itself, which loads nothing but the answer to Ctrl-C
    if not a:
        return b == "command_line"
    if a == b and a in HEIGHT:
        return True
    return HEIGHT.get(b, len(LAYERS)) < HEIGHT.get(a, len(LAYERS))


def test_a_module_imports_only_what_lies_below_it(trees):
    wrong = {f"{a} imports {b}" for a in trees for b in imports(a, trees) if not is_allowed(a, b)}
    assert not wrong, "against the layers:\n" + "\n".join(sorted(wrong))


def test_the_test_of_layers_sees_what_it_should():
    assert is_allowed("fusion_jax.data.image", "fusion_jax.config")
    assert not is_allowed("fusion_jax.config", "fusion_jax.data.image")
    assert not is_allowed("fusion_jax.server.api", "fusion_jax.synth.engine")  # of the same layer
    assert not is_allowed("fusion_jax.plan", "fusion_jax.train")  # a command imports no other
    assert not is_allowed("fusion_jax.training.loop", "fusion_jax.train")
    inside = {"fusion_jax.a": ast.parse("def f():\n    from fusion_jax.data import image, tiles as t\n")}
    assert set(imports("fusion_jax.a", inside | {"fusion_jax.data.image": None})) == {
        "fusion_jax.data.image",
        "fusion_jax.data",
    }


def test_the_root_holds_commands_and_five_files():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_LIBRARIES | COMMANDS
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(HEIGHT) - ROOT_LIBRARIES, "give the new package its line in LAYERS"


def runs_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a module outside of functions and of its `if __name__ == "__main__"`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        is_main = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        if not is_main and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def defines_flags(tree: ast.Module) -> bool:
    called = (n.func for n in runs_at_import(tree) if isinstance(n, ast.Call))
    names = (getattr(func, "attr", getattr(func, "id", "")) for func in called)
    return any(name.startswith(("DEFINE_", "define_")) for name in names)


# Programs of their own that other modules start, and the former names of two commands.
PROGRAMS = {"data.render_chat", "server.try_grammar", "data.convert", "data.inspect"}


def test_nothing_but_commands_is_run(trees):
    run = {name.partition(".")[2] for name, tree in trees.items() if '__name__ == "__main__"' in _conditions(tree)}
    assert run == COMMANDS | PROGRAMS


def _conditions(tree: ast.Module) -> set[str]:
    return {ast.unparse(node.test).replace("'", '"') for node in tree.body if isinstance(node, ast.If)}


def test_importing_a_module_defines_no_flags(trees):
    wrong = {name.removeprefix("fusion_jax.") for name, tree in trees.items() if defines_flags(tree)}
    assert not wrong, f"define flags in a function: {wrong}"


def loaded(code: str) -> list[str]:
    """The names of the modules that a fresh process has loaded after it ran some code."""
    run = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_all_commands_fit_one_process():
    loaded("\n".join(f"import fusion_jax.{name}" for name in sorted(COMMANDS)))


def test_generation_loads_neither_the_input_pipeline_nor_checkpoints():
    heavy = {"grain", "orbax"} & {name.split(".")[0] for name in loaded("import fusion_jax.inference.generate")}
    assert not heavy, f"import fusion_jax.inference.generate loads {heavy}"


def test_configs_synthesis_and_shards_load_no_jax():
    names = ("config", "data.image", "data.conversation", "shards", "synth.engine", "synth.kinds")
    assert not {"jax", "flax"} & set(loaded("\n".join(f"import fusion_jax.{name}" for name in names)))


def test_files_are_short():
    lines = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    too_long = {name for name, count in lines.items() if count > LONGEST} - {EXPORTED_MODEL}
    assert not too_long, f"over {LONGEST} lines"
    long = sorted((name for name in lines if lines[name] > LONG), key=lines.get)
    assert len(long) <= (1 - SHARE) * len(lines), f"{len(long)} of {len(lines)} files have over {LONG} lines: {long}"
