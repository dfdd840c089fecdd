"""Reads the required form of an answer, such as a JSON schema, from a chat request.

The keys are `response_format` of the OpenAI API, and `structured_outputs` and `guided_*` of vLLM.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from fusion_jax.server.error import ApiError
from fusion_jax.server.keys import Keys, check_keys, no_op, read

MOST_BYTES = 64 << 10  # of a schema, or of all choices together
MOST_REGEX = 8 << 10
MOST_CHOICES = 1000
MOST_NOTES = 100  # different words of a schema that are not keywords; each takes a millisecond to compare
# White space between the parts of JSON: a space, or a line break with an indent. Without a bound a model might write
# line breaks until its tokens are used up.
_SPACE = " |\\n[ \\t]{0,24}"

_NAMED = (
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
    "dependentSchemas",
)  # their keys are names that the caller chooses
_DATA = ("enum", "const", "default", "example", "examples", "required", "discriminator")  # their values are not schemas
_OLD = ("divisibleBy", "extends", "disallow")
_KEYWORDS = frozenset(
    (
        *_NAMED,
        *_DATA,
        *("$schema", "$id", "$ref", "$anchor", "$comment", "$dynamicRef", "$dynamicAnchor", "$vocabulary", "id"),
        *("type", "title", "description", "deprecated", "readOnly", "writeOnly", "nullable", "format"),
        *("allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
        *("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains"),
        *("minItems", "maxItems", "uniqueItems"),
        *("additionalProperties", "unevaluatedProperties", "propertyNames", "dependentRequired", "dependencies"),
        *("minProperties", "maxProperties"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("pattern", "minLength", "maxLength", "contentEncoding", "contentMediaType", "contentSchema"),
    )
)

_FORMAT = Keys(read=("type",))
_SCHEMA_FORMAT = Keys(read=("type", "json_schema"))
_SCHEMA = Keys(read=("schema",), ignored=("name", "description", "strict"))  # answers are always strict
_STRUCTURED = Keys(
    read=("json", "json_object", "regex", "choice"),
    ignored=("disable_fallback",),
    fixed={
        "grammar": ("use regex or json", no_op()),
        "structural_tag": ("use regex or json", no_op()),
        "whitespace_pattern": ("the server sets the white space of JSON", no_op()),
        "disable_any_whitespace": ("the server sets the white space of JSON", no_op(False)),
        "disable_additional_properties": ("write additionalProperties into the schema", no_op(False)),
    },
)


@dataclass(frozen=True)
class Form:
    """The form of an answer: a JSON schema or a regular expression.

    Attributes:
      key: the request's key for it. schema: a JSON schema, as JSON. regex: matches the whole answer.
      choices: all possible answers, where the request lists them; `regex` then matches them.
    """

    key: str
    schema: str = ""
    regex: str = ""
    choices: tuple[str, ...] = ()


def read_form(data: Mapping[str, Any]) -> Form | None:
    """The form in a request, None where it has none. Raises ApiError 400 for an invalid form or several of them."""
    forms = [
        *_response_format(read(data, "response_format", dict, {})),
        *_structured(read(data, "structured_outputs", dict, {}), "structured_outputs.", "structured_outputs"),
        *_structured({key: data.get(f"guided_{key}") for key in ("json", "regex", "choice")}, "guided_", None),
    ]
    if len(forms) > 1:
        names = " and ".join(form.key for form in forms)
        raise ApiError(
            400, f"An answer can have only one form; the request has {names}.", "invalid_value", forms[1].key
        )
    return forms[0] if forms else None


def _response_format(value: Mapping[str, Any]) -> list[Form]:
    key, kind = "response_format", value.get("type")
    if not value or kind == "text":
        check_keys(value, _FORMAT, key)
        return []
    if kind == "json_object":
        check_keys(value, _FORMAT, key)
        return [_json(key, {"type": "object"})]
    if kind != "json_schema":
        problem = f"{key}.type must be text, json_object or json_schema, not {json.dumps(kind)[:80]}"
        raise ApiError(400, f"{problem}.", "unsupported_value", f"{key}.type")
    check_keys(value, _SCHEMA_FORMAT, key)
    inner = read(value, "json_schema", dict, {}, key)
    check_keys(inner, _SCHEMA, f"{key}.json_schema")
    return [_json(f"{key}.json_schema.schema", inner.get("schema"))]


def _structured(values: Mapping[str, Any], prefix: str, place: str | None) -> list[Form]:
    if place:
        check_keys(values, _STRUCTURED, place)
    forms = []
    if values.get("json") is not None:
        forms.append(_json(f"{prefix}json", values["json"]))
    if read(values, "json_object", bool, False, place or ""):
        forms.append(_json(f"{prefix}json_object", {"type": "object"}))
    if values.get("regex") is not None:
        forms.append(_regex(f"{prefix}regex", values["regex"]))
    if values.get("choice") is not None:
        forms.append(_choice(f"{prefix}choice", values["choice"]))
    return forms


def _json(key: str, schema: Any) -> Form:
    if isinstance(schema, str) and len(schema) <= MOST_BYTES:
        try:
            schema = from_json(schema, allow_inf_nan=False, cache_strings="none")  # the parser of the request's body
        except ValueError as error:
            raise ApiError(400, f"{key} is not valid JSON: {str(error)[:200]}.", "invalid_value", key) from error
    if not isinstance(schema, dict):
        raise ApiError(400, f"{key} must be a JSON schema, an object.", "invalid_type", key)
    if "x-guidance" in schema:
        raise ApiError(400, f"{key}.x-guidance is not supported.", "unsupported_value", key)
    written = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACE}})
    _check_size(key, len(written), MOST_BYTES)
    _check_words(key, schema, set())
    return Form(key, schema=written)


def _check_words(key: str, schema: Any, notes: set[str]) -> None:
    """Raises ApiError 400 for a word that is almost a keyword of JSON Schema, and would silently have no effect.

    llguidance refuses keywords that it does not support. All other words are the caller's own notes.

    Args:
      notes: words that are known to be notes; new ones are added.
    """
    if not isinstance(schema, dict):
        return
    for word, value in schema.items():
        if word not in _KEYWORDS and word not in notes:
            near = _nearest(word)
            if near or word in _OLD:
                hint = f"did you mean {near[0]}?" if near else "it was one before JSON Schema's fourth draft"
                raise ApiError(400, f"{key}: {word[:80]} is not a keyword of JSON Schema; {hint}", "invalid_value", key)
            notes.add(word)
            if len(notes) > MOST_NOTES:
                many = f"{key} has over {MOST_NOTES} different words that are not keywords of JSON Schema"
                raise ApiError(400, f"{many}.", "invalid_value", key)
        if word not in _KEYWORDS or word in _DATA:
            continue
        inner = value.values() if word in _NAMED and isinstance(value, dict) else [value]
        for one in (*inner, *(value if isinstance(value, list) else ())):
            _check_words(key, one, notes)


def _nearest(word: str) -> list[str]:
    """Keywords that a misspelt word may stand for."""
    letters = sorted(word)
    near = difflib.get_close_matches(word, _KEYWORDS, n=1, cutoff=0.8 if len(word) > 4 else 1)
    return near or [known for known in _KEYWORDS if sorted(known) == letters]


def _regex(key: str, regex: Any) -> Form:
    if not isinstance(regex, str) or not regex:
        raise ApiError(400, f"{key} must be a regular expression, a text.", "invalid_type", key)
    _check_size(key, len(regex.encode()), MOST_REGEX)
    if (len(regex) - len(regex.rstrip("\\"))) % 2:  # llguidance would ignore it
        raise ApiError(400, f"{key} ends with a backslash that escapes nothing.", "invalid_value", key)
    return Form(key, regex=regex)


def _choice(key: str, choices: Any) -> Form:
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise ApiError(400, f"{key} must be a list of texts, none of them empty.", "invalid_value", key)
    if len(choices) > MOST_CHOICES:
        raise ApiError(400, f"{key} has {len(choices)} choices; at most {MOST_CHOICES}.", "invalid_value", key)
    _check_size(key, sum(len(one.encode()) for one in choices), MOST_BYTES)
    texts = ("".join(one if one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text) for text in choices)
    return Form(key, regex="|".join(texts), choices=tuple(choices))


def _check_size(key: str, size: int, most: int) -> None:
    if size > most:
        raise ApiError(400, f"{key} has {size} bytes; at most {most}.", "invalid_value", key)
