"""Lists the families of language models that can be imported, each in a row with its peculiarities.

To add a family like Llama, add a row to `FAMILIES`. Where its layer computes something different, add the class to
models/, a field for it to `LLMConfig` (which the row sets in `implies`), and the names of its tensors to table.py.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion_jax.config import OWN_TEMPLATE
from fusion_jax.data import chat_template
from fusion_jax.data.templates import TEMPLATES
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import UserError, check
from fusion_jax.interop.rope import listed_windows, rope_config, windows_from_a_layer_on
from fusion_jax.models.config import RopeConfig

log = logging.getLogger("fusion_jax")


@dataclass(frozen=True)
class Family:
    """The peculiarities of a family of language models in Hugging Face folders and GGUF files.

    Attributes:
      template: its chat template in `templates.TEMPLATES`, used where the tokenizer has none of its own.
      implies: fields of `LLMConfig` that follow from the architecture, so that config.json does not have them.
      fused: whether its files hold query, key and value as one tensor, and gate and up as another.
      rope: reads the rotary settings of config.json. windows: reads which layers have a sliding window.
      gguf: its `general.architecture` in GGUF files, "" where it has none of its own.
      gguf_interleaved: whether llama.cpp stores the two numbers of a rotary pair side by side, not half a head apart.
      published: model_type of the published code's model on this decoder, "" where there is none. Such a family keeps
        its template even where the tokenizer has one.
    """

    template: str
    implies: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    rope: Callable[[Mapping[str, Any], str], RopeConfig] = rope_config
    windows: Callable[[Mapping[str, Any], int, str], set[str] | None] = listed_windows
    gguf: str = ""
    gguf_interleaved: bool = False
    published: str = ""


# By model_type of config.json.
FAMILIES = {
    "llama": Family("llama3", gguf="llama", gguf_interleaved=True, published="fusion_llama"),
    "mistral": Family("mistral"),  # a llama in GGUF files
    "phi3": Family("phi3", fused=True, gguf="phi3", published="fusion_phi"),
    "qwen2": Family("chatml", implies={"qkv_bias": True}, windows=windows_from_a_layer_on, gguf="qwen2"),
}
PUBLISHED = {family.published: name for name, family in FAMILIES.items() if family.published}
GGUF = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}


def family_of(model_type: str) -> Family:
    """The family of a language model's or of a published model's model_type."""
    return FAMILIES[PUBLISHED.get(model_type, model_type)]


def choose_template(model_type: str, tokenizer: Tokenizer | None) -> str:
    """Names the chat template of an imported model.

    That is the published one for a family with published models, else the tokenizer's own, else the first template
    whose special tokens the tokenizer has. Without a tokenizer it is the family's.

    Raises:
      UserError: no template fits the tokenizer's special tokens.
    """
    family = family_of(model_type)
    if tokenizer is None:
        return family.template
    fitting = [name for name in (family.template, *TEMPLATES) if tokenizer.has_token(TEMPLATES[name].stops[0])]
    if tokenizer.chat_template is not None and not (family.published and family.template in fitting):
        try:
            return chat_template.find(OWN_TEMPLATE, tokenizer).name
        except UserError as error:
            if not fitting:
                raise
            log.warning("%s It is imported with %s.", error, fitting[0])
    check(bool(fitting), f"{tokenizer.folder} fits no chat template; allowed: {', '.join(TEMPLATES)}.")
    return fitting[0]
