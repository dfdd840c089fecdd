"""Converts weights from Hugging Face folders and GGUF files, and back to folders for PyTorch.

    python -m fusion_jax.convert import --from DIR --out CKPT                 a model in the published format
    python -m fusion_jax.convert import --vision DIR --llm DIR --out CKPT     backbones to start training from
    python -m fusion_jax.convert export --checkpoint CKPT --format published|transformers --out DIR

Tensors keep the dtype of their source unless `--dtype` sets another. The output folder must be new or empty; a run that
fails leaves nothing behind.
"""

import logging
import os
import time

from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.command_line.interrupts import loading
from fusion_jax.errors import UserError, check
from fusion_jax.interop import FORMATS
from fusion_jax.interop.tensors import DTYPES
from fusion_jax.models.config import PRESETS

log = logging.getLogger("fusion_jax")
FLAGS = flags.FLAGS

COMMANDS = ("import", "export")


def define_flags() -> None:
    flags.DEFINE_string("from", None, "import: folder of a whole model in the published format")
    flags.DEFINE_string("vision", None, "import: folder of a SigLIP or SigLIP2 vision tower")
    flags.DEFINE_string(
        "llm", None, "import: folder or GGUF file of a language model (Llama, Mistral, Phi-3, Qwen2 or like them)"
    )
    flags.DEFINE_enum("preset", None, PRESETS, "import of backbones: arithmetic of the model; by default paper")
    flags.DEFINE_string("checkpoint", None, "export: step folder, stage folder or workdir")
    flags.DEFINE_enum("format", None, FORMATS, "export: code that will open the folder")
    flags.DEFINE_string("out", None, "folder to write, new or empty")
    flags.DEFINE_enum("dtype", None, DTYPES, "type of all tensors that are written; by default the source's")
    flags.DEFINE_bool("allow_pickle", False, "import: also read pytorch_model.bin, without running code in it")
    flags.DEFINE_alias("to", "out")  # its name until 0.2


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in COMMANDS:
        words = " ".join(argv[1:]) or "nothing"
        raise UserError(f"Expected one of {', '.join(COMMANDS)}, got {words}; see --help.")
    check(FLAGS.out is not None, "Give the folder to write: --out DIR.")
    # Conversion runs on the CPU: it needs no accelerator, and must not occupy one.
    os.environ["JAX_PLATFORMS"] = "cpu"
    start = time.perf_counter()
    if argv[1] == "import":
        _import()
    else:
        _export()
    log.info("%s written in %.0f s", FLAGS.out, time.perf_counter() - start)


def _import() -> None:
    with loading():
        from fusion_jax.interop import importing
        from fusion_jax.interop.opening import open_backbones, open_published

    whole, vision, llm = FLAGS["from"].value, FLAGS.vision, FLAGS.llm
    backbones = vision is not None and llm is not None
    check(
        (whole is not None) != backbones and (backbones or not (vision or llm)),
        "Give --from DIR for a whole model, or both --vision DIR and --llm DIR for backbones.",
    )
    check(backbones or FLAGS.preset is None, "--preset is for backbones; a whole model is always released.")
    if backbones:
        opened = open_backbones(vision, llm, FLAGS.preset or "paper", FLAGS.allow_pickle, FLAGS.dtype)
    else:
        opened = open_published(whole, FLAGS.allow_pickle, FLAGS.dtype)
    log.info("%s", importing.summary(opened))
    if opened.tokenizer is None:
        log.warning("the folder has no tokenizer: training and generation from this checkpoint will need one")
    importing.write_checkpoint(opened, FLAGS.out)


def _export() -> None:
    with loading():
        from fusion_jax.interop import exporting

    check(FLAGS.checkpoint is not None, "Give the checkpoint to export: --checkpoint DIR.")
    check(FLAGS.format is not None, f"Give --format {' or '.join(FORMATS)}.")
    folder = exporting.export(FLAGS.checkpoint, FLAGS.out, FLAGS.format, FLAGS.dtype)
    log.info("exported %s", folder)


if __name__ == "__main__":
    define_flags()
    run_main(main)
