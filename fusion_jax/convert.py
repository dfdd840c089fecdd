"""Weights in and out: Hugging Face and PyTorch folders to checkpoints, and back.

    python -m fusion_jax.convert import --from DIR --to CKPT                  a model in the published format
    python -m fusion_jax.convert import --vision DIR --llm DIR --to CKPT      backbones to start training from
    python -m fusion_jax.convert export --checkpoint CKPT --format published|transformers --to DIR

The dtype is the source's unless `--dtype` says otherwise. The target must be new or empty; a failed run leaves nothing.
"""

import logging
import os
import time

from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.command_line.interrupts import loading
from fusion_jax.errors import UserError, check

log = logging.getLogger("fusion_jax")

COMMANDS = ("import", "export")
_FROM = flags.DEFINE_string("from", None, "import: folder of a whole model in the published format")
_VISION = flags.DEFINE_string("vision", None, "import: folder of a SigLIP or SigLIP2 vision tower")
_LLM = flags.DEFINE_string(
    "llm", None, "import: folder of a language model (Phi-3, Llama, Qwen2, Mistral), or a GGUF file"
)
_PRESET = flags.DEFINE_string("preset", None, "import of backbones: paper (default) or released arithmetic")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "export: step folder, stage folder or workdir")
_FORMAT = flags.DEFINE_string("format", None, "export: published or transformers")
_TO = flags.DEFINE_string("to", None, "folder to write, new or empty")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; default: the source's")
_PICKLE = flags.DEFINE_bool("allow_pickle", False, "import: also read pytorch_model.bin (tensors only)")


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in COMMANDS:
        given = " ".join(argv[1:]) or "nothing"
        raise UserError(f"Expected one of {', '.join(COMMANDS)}, got {given}; see --help.")
    check(_TO.value is not None, "Give the folder to write: --to DIR.")
    # Conversion is host work: no accelerator is taken, and none is needed.
    os.environ["JAX_PLATFORMS"] = "cpu"
    begun = time.perf_counter()
    if argv[1] == "import":
        _import()
    else:
        _export()
    log.info("%s written in %.0f s", _TO.value, time.perf_counter() - begun)


def _import() -> None:
    with loading():
        from fusion_jax.interop import importing

    backbones = _VISION.value is not None and _LLM.value is not None
    check(
        (_FROM.value is not None) != backbones and (backbones or not (_VISION.value or _LLM.value)),
        "Give --from DIR for a whole model, or both --vision DIR and --llm DIR for backbones.",
    )
    check(backbones or _PRESET.value is None, "--preset is for backbones; a whole model is always released.")
    if backbones:
        preset = _PRESET.value or "paper"
        plan = importing.plan_backbones(_VISION.value, _LLM.value, preset, _PICKLE.value, _DTYPE.value)
    else:
        plan = importing.plan_published(_FROM.value, _PICKLE.value, _DTYPE.value)
    log.info("%s", importing.summary(plan))
    if plan.tokenizer is None:
        log.warning("the folder has no tokenizer: training and generation from this checkpoint will need one")
    importing.write_checkpoint(plan, _TO.value)


def _export() -> None:
    with loading():
        from fusion_jax.interop import exporting

    check(_CHECKPOINT.value is not None, "Give the checkpoint to export: --checkpoint DIR.")
    check(_FORMAT.value is not None, f"Give --format {' or '.join(exporting.FORMATS)}.")
    folder = exporting.export(_CHECKPOINT.value, _TO.value, _FORMAT.value, _DTYPE.value)
    log.info("exported %s", folder)


if __name__ == "__main__":
    run_main(main)
