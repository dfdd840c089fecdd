"""Writes the model card, README.md, of a folder that is exported for transformers."""

import datetime
from pathlib import Path

from fusion_jax import __version__
from fusion_jax.config import RunConfig
from fusion_jax.errors import UserError
from fusion_jax.files import brief, shown
from fusion_jax.training.checkpoint_folders import step_of
from fusion_jax.training.jsonl import read_rows
from fusion_jax.training.losses import PARTS


def model_card(folder: Path, config: RunConfig, dtype: str, parameters: int) -> str:
    """The README.md of a `transformers` folder, from the run's config and the metrics beside the checkpoint.

    Args:
      folder: step folder of the checkpoint. config: its run config.
      dtype: the dtype of the tensors. parameters: how many the model has.

    Raises:
      UserError: the metrics beside the checkpoint are not in the form that runs write.
    """
    model = config.model
    vision, step = model.vision, step_of(folder)
    origin = f"Trained to step {step} with" if step else "Converted with"
    stages = [stage for stage in config.stages if stage.data]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        "# A vision-language model whose vision encoder reads the question",
        "",
        f"{parameters:,} parameters in {dtype} (FLARE, ICLR 2026; FUSION, arXiv 2504.09925). {origin} "
        f"fusion_jax {__version__}; exported {datetime.date.today()}.",
        "",
        "```python",
        "from PIL import Image",
        "from transformers import AutoModelForCausalLM, AutoProcessor",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
        'processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)',
        'chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}]',
        'inputs = processor([chat], images=[[Image.open("image.jpg")]])',
        'answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]',
        "print(processor.batch_decode(answer, skip_special_tokens=True))",
        "```",
        "",
        "| part | |",
        "|---|---|",
        f"| vision encoder | {vision.layers} layers, width {vision.width}, {vision.image_size} pixels, patches of "
        f"{vision.patch_size}; guided by the question: {_yes(model.text_guided)} |",
        f"| language model | {model.llm.layers} layers, width {model.llm.width}, vocabulary {model.llm.vocab_size} |",
        f"| semantic exchange | {model.exchange_layers} layers, l^2 of {_listed(model.latent_counts)} |",
        f"| mapping loss | lambda {model.mapping_loss_weight} |",
        f"| template | {config.template} |",
        "",
    ]
    if stages:
        lines += [
            "## Training",
            "",
            "| stage | data | batch | learning rate | steps or epochs |",
            "|---|---|---|---|---|",
        ]
        for s in stages:
            length = f"{s.steps} steps" if s.steps else f"{s.epochs} epochs"
            name, data = shown(s.name), shown(Path(s.data).name)
            lines.append(f"| {name} | {data} | {s.batch_size} | {s.learning_rate} | {length} |")
        lines.append("")
    lines += metrics_at(folder)
    return "\n".join(lines)


def metrics_at(folder: Path) -> list[str]:
    """Lines on the last training and validation losses up to a step folder's step; none where there are no metrics."""
    file = folder.parent.parent / "metrics.jsonl"
    if not file.is_file():
        return []
    last: dict[str, float] = {}
    try:
        for entry in read_rows(file):
            if entry["step"] <= step_of(folder):
                for name, value in entry.items():
                    if name in ("total", *PARTS) or name.startswith("validation/"):
                        if type(value) not in (int, float):
                            raise ValueError(f"{name} is {brief(value)} at step {entry['step']}")
                        last[name] = float(value)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file} holds other lines than a run writes: {shown(error)}.") from error
    rows = [f"| {shown(name)} | {value:.4f} |" for name, value in sorted(last.items())]
    return ["## Metrics at this step", "", "| loss | |", "|---|---|", *rows, ""] if rows else []


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _listed(counts: tuple[int, ...]) -> str:
    return "{" + ", ".join(map(str, counts)) + "}"
