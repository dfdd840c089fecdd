"""Which keys a request may have: those that are taken, those that change nothing of an answer, those that would and can
have one value only. Every other key is refused by name."""

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
    """What an object of a request may hold.

    Attributes:
      taken: read by the server. ignored: of no meaning to an answer, whatever their value.
      fixed: would change an answer in ways that are not supported: why, and the values (see `no_op`) that ask for
        nothing.
    """

    taken: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Why, Values]] = field(default_factory=dict)


def no_op(*values: Any) -> Values:
    """Values that a key may have where what it means is not supported; null is always one."""
    return (None, *values)


def check_keys(data: Mapping[str, Any], keys: Keys, where: str = "") -> None:
    """ApiError 400 for the first key that is not understood, or has a value that is not supported.

    Args:
      where: the place of the object in the request; "" for the request itself.
    """
    place = f"{where}." if where else ""
    for key, value in data.items():
        if key in keys.taken or key in keys.ignored:
            continue
        name = f"{place}{key[:80]}"
        if key not in keys.fixed:
            near = nearest(key, (*keys.taken, *keys.ignored, *keys.fixed))
            said = near or (f"known are {', '.join(keys.taken)}." if where else "the server's documentation lists all.")
            raise ApiError(400, f"{name} is no key of a request; {said}", "unknown_parameter", name)
        why, allowed = keys.fixed[key]
        if not any(_same(value, one) for one in allowed):
            choices = " or ".join(json.dumps(one) for one in allowed[1:]) or "null"
            raise ApiError(400, f"{name} is not supported: {why}. It can only be {choices}.", "unsupported_value", name)


def _same(value: Any, allowed: Any) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def read(data: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any, where: str = "") -> Any:
    """The value of a key, the default where there is none or null. ApiError 400 for one of another type."""
    value = data.get(key)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
        name = f"{where}.{key}" if where else key
        raise ApiError(400, f"{name} has the wrong type: {json.dumps(value)[:80]}.", "invalid_type", name)
    return value


_ONE = "one answer is given"
_NONE = "there is none here"
_END = "an answer ends where the model ends it, or at a text of 'stop'"
_WORDS = "only text is heard and said"
_WHOLE = "the template writes the prompt, and an answer is all that comes back"

# Of a chat request: the OpenAI API's, and those that vLLM, SGLang and llama.cpp add to it.
CHAT = Keys(
    taken=(
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
        "parallel_tool_calls",  # there are none, in parallel or not
        "spaces_between_special_tokens",  # an answer's text has no such tokens
    ),
    fixed={
        "n": (_ONE, no_op(1)),
        "best_of": (_ONE, no_op(1)),
        "use_beam_search": (_ONE, no_op(False)),
        "length_penalty": (_ONE, no_op(1)),
        "presence_penalty": ("use repetition_penalty", no_op(0)),
        "frequency_penalty": ("use repetition_penalty", no_op(0)),
        "logit_bias": ("tokens are not weighed one by one", no_op({})),
        "bad_words": ("tokens are not forbidden one by one", no_op([])),
        "allowed_token_ids": ("use guided_choice or guided_regex", no_op()),
        "min_p": ("use top_p", no_op(0)),
        "typical_p": ("use top_p", no_op(1)),
        "tools": (_NONE, no_op([])),
        "tool_choice": ("there are no tools", no_op("none", "auto")),
        "functions": (_NONE, no_op([])),
        "function_call": ("there are no functions", no_op("none", "auto")),
        "modalities": (_WORDS, no_op(["text"])),
        "audio": (_WORDS, no_op()),
        "prediction": ("no answer is predicted", no_op()),
        "moderation": (_NONE, no_op()),
        "web_search_options": ("nothing is searched", no_op()),
        "documents": ("write them into a message", no_op([])),
        "reasoning_effort": ("the model answers at once", no_op("none")),
        "thinking_token_budget": ("the model answers at once", no_op()),
        "include_reasoning": ("the model answers at once", no_op(True, False)),
        "verbosity": ("ask for it in a message", no_op("medium")),
        "min_tokens": (_END, no_op(0)),
        "ignore_eos": (_END, no_op(False)),
        "stop_token_ids": (_END, no_op([])),
        "include_stop_str_in_output": (_END, no_op(False)),
        "skip_special_tokens": ("an answer's text has no control tokens", no_op(True)),
        "echo": (_WHOLE, no_op(False)),
        "add_generation_prompt": (_WHOLE, no_op(True)),
        "continue_final_message": (_WHOLE, no_op(False)),
        "add_special_tokens": (_WHOLE, no_op(False)),
        "chat_template": (_WHOLE, no_op()),
        "chat_template_kwargs": (_WHOLE, no_op({})),
        "mm_processor_kwargs": ("images are read as in training", no_op({})),
        "truncate_prompt_tokens": ("nothing is cut off a prompt", no_op()),
        "prompt_logprobs": ("logprobs are those of the answer", no_op(False)),
        "return_tokens_as_token_ids": ("tokens are given as text and bytes", no_op(False)),
        "return_token_ids": ("tokens are given as text and bytes", no_op(False)),
        "logits_processors": ("use guided_choice or guided_regex", no_op([])),
        "guided_grammar": ("use guided_regex or guided_json", no_op()),
        "guided_whitespace_pattern": ("white space of JSON is the server's", no_op()),
        "priority": ("requests are answered in their order", no_op(0)),
        "lora": (_NONE, no_op()),
        "vllm_xargs": (_NONE, no_op({})),
        "kv_transfer_params": (_NONE, no_op({})),
    },
)
STREAM = Keys(
    taken=("include_usage",),
    ignored=("include_obfuscation",),
    fixed={"continuous_usage_stats": ("the counts come at the end", no_op(False))},
)
