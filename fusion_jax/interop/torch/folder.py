"""Writes an exported folder without its tensors: configs, tokenizer, chat template and code."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from fusion_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from fusion_jax.data.templates import Template, first_ids, stop_ids
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.data.tokenizer_base import VISION_END, VISION_START
from fusion_jax.interop.tokenizer_json import tokenizer_json
from fusion_jax.models.config import FusionConfig

# The code that transformers runs with trust_remote_code; each file imports only the others and installed packages.
# `_CODE` is written for the export. `_SHARED` are files of training, so that images are read and cut as in training.
_PARTS = ("configuration", "vision", "decoder", "modeling", "image", "text", "arguments", "layout", "processing")
_CODE = tuple(f"{part}_fusion" for part in _PARTS)
_SHARED = (
    "data/avif",
    "data/base64_text",
    "data/decoding",
    "data/formats",
    "data/grey",
    "data/jpeg2000",
    "data/pieces",
    "data/row_text",
    "data/tiles",
    "files",
)
_MAX_NEW_TOKENS = 512


def write_side_files(
    folder: str | Path, model_config: FusionConfig, tokenizer: Tokenizer | None, template: Template | None, dtype: str
) -> None:
    """Makes `folder`, which holds or will hold the safetensors, loadable by transformers' Auto classes.

    Args:
      folder: created if needed.
      model_config: the config of the model.
      tokenizer: None writes only the files of the model, without a processor. template: needed with a tokenizer.
      dtype: the dtype of the tensors, by torch's name ("bfloat16").

    Raises:
      UserError: the tokenizer lacks a token of the template, or its files have changed since loading.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    for source in (*(here / f"{name}.py" for name in _CODE), *(here.parents[1] / f"{name}.py" for name in _SHARED)):
        code = re.sub(r"^from fusion_jax\.(?:\w+\.)*(\w+) import", r"from .\1 import", source.read_text(), flags=re.M)
        if source.stem == "processing_fusion":  # transformers 4.57 copies only the files that this one imports itself
            code += "".join(f"from .{Path(name).name} import __name__ as _  # noqa\n" for name in _SHARED)
        (folder / source.name).write_text(code, encoding="utf-8")
    ids = {}
    if tokenizer is not None and template is not None:
        ids = {"bos_token_id": tokenizer.bos_id} if tokenizer.bos_id is not None else {}
        ids["pad_token_id"] = tokenizer.pad_id
        stops = list(stop_ids(tokenizer, template))
        tokenizer.save(folder)
        pieces = isinstance(tokenizer, SentencePieceTokenizer)
        converted = tokenizer_json(tokenizer) if pieces else None
        if converted is not None:
            (folder / "tokenizer.json").write_text(converted, encoding="utf-8")
        _complete_tokenizer(folder, tokenizer, converted is not None)
        needs_sentencepiece = pieces and converted is None
        described = processor_config(model_config, tokenizer, template) | {"sentencepiece": needs_sentencepiece}
        _write(folder / "processor_config.json", described)
        (folder / "chat_template.jinja").write_text(chat_template(model_config, template), encoding="utf-8")
        ids["eos_token_id"] = stops
    config = {
        "model_type": "fusion_jax",
        "architectures": ["FusionForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_fusion.FusionConfig",
            "AutoModelForCausalLM": "modeling_fusion.FusionForCausalLM",
            "AutoModelForImageTextToText": "modeling_fusion.FusionForCausalLM",
        },
        "dtype": dtype,
        **dataclasses.asdict(model_config),
        "latent_count": model_config.fixed_latent_count,
        "template": None if template is None else _described(template),
        **ids,
    }
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"do_sample": False, "max_new_tokens": _MAX_NEW_TOKENS, **ids})


def processor_config(model_config: FusionConfig, tokenizer: Tokenizer, template: Template) -> dict[str, Any]:
    """The exported processor's settings, made from the model, tokenizer and template."""
    return {
        "processor_class": "FusionProcessor",
        "auto_map": {"AutoProcessor": "processing_fusion.FusionProcessor"},
        "template": _described(template),
        "bos_token_id": next(iter(first_ids(tokenizer, template)), None),
        "image_size": model_config.vision.image_size,
        "image_tokens": model_config.tokens_per_image,
        "latent_count": model_config.fixed_latent_count,
        "text_guided": model_config.text_guided,
        "quadrants": model_config.uses_quadrants,
        "zero_image_for_text": model_config.text_only == "zero_image",
        "hide_question_id_zero": model_config.hide_question_id_zero,
        "image_first": model_config.image_place == "first",
        "first_guides": model_config.guide == "first_round",
        "tile_grids": model_config.tile_grids,
        "tile_tokens": model_config.tokens_per_tile,
    }


def _described(template: Template) -> dict[str, Any]:
    """The template as a dict; `system` is the text before the first round of a conversation without a system text."""
    return dataclasses.asdict(template) | {"system": "".join(text for text, _ in template.system_parts(None))}


def _complete_tokenizer(folder: Path, tokenizer: Tokenizer, converted: bool) -> None:
    """Adds to the tokenizer's files what our tokenizer adds itself: the two vision tokens and the padding token.

    Where tokenizer.json was converted from SentencePiece (`converted`), the properties of added tokens are added, too.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    added = config.setdefault("added_tokens_decoder", {})
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    for token, i in ((VISION_START, tokenizer.vision_start_id), (VISION_END, tokenizer.vision_end_id)):
        added.setdefault(str(i), {"content": token, **flags, "special": True})
    if converted:
        for token, i in tokenizer.added.items():
            left, right = tokenizer.strips(token)
            entry = {"content": token, **flags, "lstrip": left, "rstrip": right, "special": tokenizer.is_special(token)}
            # transformers adds a token again if its flags differ from those of tokenizer.json.
            added[str(i)] = entry | {"normalized": True}
        config["clean_up_tokenization_spaces"] = False
        config |= tokenizer.tokens
    config["pad_token"] = tokenizer.decode([tokenizer.pad_id], skip_special=False)
    config["padding_side"] = "left"  # as generation requires
    config["processor_class"] = "FusionProcessor"
    # The generic class runs tokenizer.json as it is; other classes may rebuild it.
    generic = "PreTrainedTokenizerFast" if (folder / "tokenizer.json").is_file() else "LlamaTokenizer"
    config["tokenizer_class"] = generic
    for key in ("chat_template", "auto_map"):  # those of the tokenizer's original model; ours are in files of their own
        config.pop(key, None)
    _write(path, config)
    other = folder / "special_tokens_map.json"
    if other.is_file():
        roles = tokenizer.tokens if converted else {}
        _write(other, json.loads(other.read_text(encoding="utf-8")) | roles | {"pad_token": config["pad_token"]})


def chat_template(model_config: FusionConfig, template: Template) -> str:
    """A Jinja template that writes messages as the readable prompt; visual positions are tags."""

    def text(value: str) -> str:
        return json.dumps(value, ensure_ascii=False)

    def text_of(part: str) -> str:
        return "said(m) | trim" if part in template.trims else "said(m)"

    system = text("".join(part for part, _ in template.system_parts(None)))
    if template.system_frame is not None:
        before, after = map(text, template.system_frame)
        own = text_of("system").replace("(m)", "(messages[0])")
        system = f'{before} + ({own}) + {after} if messages[0].role == "system" and said(messages[0]) else {system}'

    placeless = "" if template.system_frame is not None else " and not said(m)"
    slot = f"{VISION_START}%s{VISION_END}"
    latents = text(slot % "<latent_image>")
    if not model_config.semantic_exchange:
        latents = '""'
    elif model_config.text_only == "none":
        latents = f'({latents} if ns.images else "")'
    ended = template.end + template.between
    closing = ended if ended and template.answer.startswith(ended) else template.answer
    lines = [
        "{%- set ns = namespace(images=false, asked=false) -%}",
        "{%- macro said(message) -%}",
        "  {%- if message.content is string -%}{{ message.content }}",
        "  {%- else -%}",
        "    {%- for part in message.content -%}",
        '      {{- "<image>" if part.type in ("image", "image_url") else part.text if part.type == "text" '
        'else raise_exception("A part of type " ~ part.type ~ " has no place here.") -}}',
        "    {%- endfor -%}",
        "  {%- endif -%}",
        "{%- endmacro -%}",
        '{%- for m in messages if m.role == "user" and "<image>" in said(m) -%}',
        "  {%- set ns.images = true -%}",
        "{%- endfor -%}",
        "{%- for m in messages -%}",
        f'  {{%- if m.role not in ("user", "assistant") and not (m.role == "system" and loop.first{placeless}) -%}}',
        '    {{- raise_exception("A message of role " ~ m.role ~ " has no place here.") -}}',
        "  {%- endif -%}",
        "{%- endfor -%}",
        f"{{{{- {system} -}}}}",
        '{%- for m in messages if m.role != "system" -%}',
        '  {%- if m.role == "user" -%}',
        f'    {{{{- ({text(template.between)} if ns.asked else "") + {text(template.question)} + {latents} -}}}}',
        "    {%- set ns.asked = true -%}",
        '    {%- if "<image>" in said(m) -%}',
        f'      {{{{- {text(slot % "<image>")} + "\\n" + (said(m) | replace("<image>", "") | trim) -}}}}',
        "    {%- else -%}",
        f"      {{{{- {text_of('question')} -}}}}",
        "    {%- endif -%}",
        f"    {{{{- {text(template.answer)} if add_generation_prompt or not loop.last else {text(closing)} -}}}}",
        "  {%- elif ns.asked -%}",
        f"    {{%- generation -%}}{{{{- ({text_of('answer')}) + {text(template.end)} -}}}}{{%- endgeneration -%}}",
        "  {%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(lines) + "\n"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
