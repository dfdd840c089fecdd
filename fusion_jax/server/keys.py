"""Lists the keys that a chat request may have, and checks each of them.

Some keys are read, some are ignored because they do not change an answer, and some would change an answer in ways that
are not supported and may only have a value without effect. Every other key is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion_jax.errors import nearest
from fusion_jax.server.error import ApiError

Values = tuple[Any, ...]
Why = str


@dataclass(frozen=True)
class Keys:
    """The keys that an object of a request may have.

    Attributes:
      read: keys that the server reads. ignored: keys that do not change an answer, whatever their value.
      fixed: keys that would change an answer in ways that are not supported, each with the reason and with the values
        (see `no_op`) that have no effect.
    """

    read: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Why, Values]] = field(default_factory=dict)


def no_op(*values: Any) -> Values:
    """The values of an unsupported key that have no effect; null is always one of them."""
    return (None, *values)


def check_keys(data: Mapping[str, Any], keys: Keys, where: str = "") -> None:
    """Raises ApiError 400 for the first key that is unknown or has an unsupported value.

    Args:
      where: the place of the object in the request; "" for the request itself.
    """
    place = f"{where}." if where else ""
    for key, value in data.items():
        if key in keys.read or key in keys.ignored:
            continue
        name = f"{place}{key[:80]}"
        if key not in keys.fixed:
            near = nearest(key, (*keys.read, *keys.ignored, *keys.fixed))
            hint = near or (f"known are {', '.join(keys.read)}." if where else "the server's documentation lists all.")
            raise ApiError(400, f"{name} is not a key of a request; {hint}", "unknown_parameter", name)
        why, allowed = keys.fixed[key]
        if not any(_same(value, one) for one in allowed):
            choices = " or ".join(json.dumps(one) for one in allowed[1:]) or "null"
            raise ApiError(400, f"{name} is not supported: {why}. It can only be {choices}.", "unsupported_value", name)


def _same(value: Any, allowed: Any) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def read(data: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any, where: str = "") -> Any:
    """The value of a key; the default where it is missing or null. Raises ApiError 400 for another type."""
    value = data.get(key)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
        name = f"{where}.{key}" if where else key
        raise ApiError(400, f"{name} has the wrong type: {json.dumps(value)[:80]}.", "invalid_type", name)
    return value


_ONE = "each request gets one answer"
_NONE = "this server has none"
_END = "an answer ends where the model ends it, or at a text of 'stop'"
_TEXT = "the model reads images and text, and answers in text"
_PROMPT = "the template makes the prompt, and only the answer is returned"

# The keys of a chat request: the OpenAI API's, and those that vLLM, SGLang and llama.cpp add to it.
CHAT = Keys(
    read=(
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "seed",
        "stop",
        "logprobs",
        "top_logprobs",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_choice",
        "guided_regex",
    ),
    ignored=(
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "cache_salt",
        "guided_decoding_backend",
        "parallel_tool_calls",  # there are no tool calls, parallel or not
        "spaces_between_special_tokens",  # an answer's text has no such tokens
    ),
    fixed={
        "n": (_ONE, no_op(1)),
        "best_of": (_ONE, no_op(1)),
        "use_beam_search": (_ONE, no_op(False)),
        "length_penalty": (_ONE, no_op(1)),
        "presence_penalty": ("use repetition_penalty", no_op(0)),
        "frequency_penalty": ("use repetition_penalty", no_op(0)),
        "logit_bias": ("single tokens cannot be weighted", no_op({})),
        "bad_words": ("single tokens cannot be forbidden", no_op([])),
        "allowed_token_ids": ("use guided_choice or guided_regex", no_op()),
        "min_p": ("use top_p", no_op(0)),
        "typical_p": ("use top_p", no_op(1)),
        "tools": (_NONE, no_op([])),
        "tool_choice": ("there are no tools", no_op("none", "auto")),
        "functions": (_NONE, no_op([])),
        "function_call": ("there are no functions", no_op("none", "auto")),
        "modalities": (_TEXT, no_op(["text"])),
        "audio": (_TEXT, no_op()),
        "prediction": ("predicted outputs have no use here", no_op()),
        "moderation": (_NONE, no_op()),
        "web_search_options": ("this server searches nothing", no_op()),
        "documents": ("write them into a message", no_op([])),
        "reasoning_effort": ("the model has no reasoning", no_op("none")),
        "thinking_token_budget": ("the model has no reasoning", no_op()),
        "include_reasoning": ("the model has no reasoning", no_op(True, False)),
        "verbosity": ("ask for it in a message", no_op("medium")),
        "min_tokens": (_END, no_op(0)),
        "ignore_eos": (_END, no_op(False)),
        "stop_token_ids": (_END, no_op([])),
        "include_stop_str_in_output": (_END, no_op(False)),
        "skip_special_tokens": ("an answer's text has no control tokens", no_op(True)),
        "echo": (_PROMPT, no_op(False)),
        "add_generation_prompt": (_PROMPT, no_op(True)),
        "continue_final_message": (_PROMPT, no_op(False)),
        "add_special_tokens": (_PROMPT, no_op(False)),
        "chat_template": (_PROMPT, no_op()),
        "chat_template_kwargs": (_PROMPT, no_op({})),
        "mm_processor_kwargs": ("images are read as in training", no_op({})),
        "truncate_prompt_tokens": ("prompts are not truncated", no_op()),
        "prompt_logprobs": ("only the answer has logprobs", no_op(False)),
        "return_tokens_as_token_ids": ("tokens are returned as text and bytes", no_op(False)),
        "return_token_ids": ("tokens are returned as text and bytes", no_op(False)),
        "logits_processors": ("use guided_choice or guided_regex", no_op([])),
        "guided_grammar": ("use guided_regex or guided_json", no_op()),
        "guided_whitespace_pattern": ("the server sets the white space of JSON", no_op()),
        "priority": ("requests are answered in order", no_op(0)),
        "lora": (_NONE, no_op()),
        "vllm_xargs": (_NONE, no_op({})),
        "kv_transfer_params": (_NONE, no_op({})),
    },
)
STREAM = Keys(
    read=("include_usage",),
    ignored=("include_obfuscation",),
    fixed={"continuous_usage_stats": ("the counts come at the end", no_op(False))},
)
