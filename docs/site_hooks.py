"""Makes the pages of the API reference: one a package, from the docstrings of its public modules.

MkDocs calls `on_files` (`hooks` in mkdocs.yml). The pages exist only while the site is built, so that a new module is
on its package's page without being listed anywhere.
"""

from pathlib import Path

from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "fusion_jax"
PACKAGES = ("models", "data", "devices", "training", "inference", "evals", "interop", "synth")
ROOT_MODULES = ("config", "batch", "errors", "files")
# Code that runs elsewhere (in an exported folder, or in a process of its own) is not an interface.
HIDDEN = ("fusion_jax.interop.torch",)


def on_files(files: Files, config) -> Files:
    """Adds api/root.md and a page for each package to the files of the site."""
    pages = {"root": [f"fusion_jax.{name}" for name in ROOT_MODULES]}
    pages |= {package: modules(package) for package in PACKAGES}
    for page, names in pages.items():
        title = "Configuration and batches" if page == "root" else f"fusion_jax.{page}"
        files.append(File.generated(config, f"api/{page}.md", content=content(title, names)))
    return files


def modules(package: str) -> list[str]:
    """The names of the modules of a package and of the packages in it, in their order."""
    names = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        name = ".".join(("fusion_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if path.read_text().strip() and not name.startswith(HIDDEN):
            names.append(name)
    return names


def content(title: str, names: list[str]) -> str:
    """A page in Markdown: its heading, then a directive of mkdocstrings for each module."""
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"
