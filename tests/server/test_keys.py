"""Every key of a request is understood, known to change nothing, or refused by its name."""

import json
import typing

import pytest
from helpers.requests import LIMITS, parse

from fusion_jax.server import protocol
from fusion_jax.server.error import ApiError
from fusion_jax.server.keys import CHAT, STREAM


def refused(**keys):
    with pytest.raises(ApiError) as caught:
        parse(**keys)
    assert caught.value.status == 400 and caught.value.param
    return caught.value


# What means something and is not supported, and a value of it that asks for nothing.
MEANINGFUL = [
    ("tool_choice", "required", "auto"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "none"),
    ("tools", [{"type": "function"}], []),
    ("functions", [{}], []),
    ("function_call", {"name": "f"}, "auto"),
    ("best_of", 2, 1),
    ("n", 2, 1),
    ("use_beam_search", True, False),
    ("min_tokens", 5, 0),
    ("ignore_eos", True, False),
    ("stop_token_ids", [1], []),
    ("include_stop_str_in_output", True, False),
    ("skip_special_tokens", False, True),
    ("echo", True, False),
    ("continue_final_message", True, False),
    ("add_generation_prompt", False, True),
    ("chat_template", "{{ messages }}", None),
    ("chat_template_kwargs", {"enable_thinking": True}, {}),
    ("modalities", ["text", "audio"], ["text"]),
    ("audio", {"voice": "alloy"}, None),
    ("prediction", {"type": "content", "content": "a"}, None),
    ("web_search_options", {}, None),
    ("reasoning_effort", "high", "none"),
    ("verbosity", "low", "medium"),
    ("presence_penalty", 0.5, 0.0),
    ("frequency_penalty", -1, 0),
    ("logit_bias", {"5": 100}, {}),
    ("min_p", 0.1, 0),
    ("bad_words", ["a"], []),
    ("allowed_token_ids", [1], None),
    ("prompt_logprobs", 1, None),
    ("guided_grammar", "root ::= [a-z]", None),
    ("truncate_prompt_tokens", 10, None),
    ("logits_processors", ["a"], []),
    ("priority", 5, 0),
]


@pytest.mark.parametrize(("key", "value", "nothing"), MEANINGFUL)
def test_what_is_not_supported_is_refused_by_name_and_its_default_is_not(key, value, nothing):
    error = refused(**{key: value})
    assert error.param == key and error.code == "unsupported_value" and f"{key} is not supported:" in error.message
    for harmless in (nothing, None):
        parse(**{key: harmless})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("temprature", "temperature"),
        ("guided_choices", "guided_choice"),
        ("structured_output", "structured_outputs"),
        ("reponse_format", "response_format"),
        ("stop_sequences", None),
        ("system", None),
    ],
)
def test_misspelt_keys_are_refused_with_what_may_be_meant(key, meant):
    for value in (1, None):
        error = refused(**{key: value})
        assert error.code == "unknown_parameter" and f"{key} is not a key of a request;" in error.message
        assert meant is None or f"did you mean {meant}" in error.message


def test_what_changes_no_answer_is_taken():
    harmless = {
        "user": "u-1",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "parallel_tool_calls": False,
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": False, "include_obfuscation": True, "continuous_usage_stats": False},
        "top_logprobs": 0,
        "top_k": -1,
    }
    wanted = parse(**harmless, seed=1)
    assert wanted == parse(seed=1) and wanted.form is None and wanted.top_logprobs is None


def test_every_key_of_the_official_client_is_known():
    params = pytest.importorskip("openai.types.chat.completion_create_params")
    keys = {*typing.get_type_hints(params.CompletionCreateParamsBase), "stream"}
    assert len(keys) > 30 and keys <= {*CHAT.read, *CHAT.ignored, *CHAT.fixed}
    options = pytest.importorskip("openai.types.chat").ChatCompletionStreamOptionsParam
    assert {*typing.get_type_hints(options)} <= {*STREAM.read, *STREAM.ignored, *STREAM.fixed}


def test_the_two_names_of_the_longest_answer():
    assert parse(max_tokens=5, max_completion_tokens=5).how.max_tokens == 5
    assert parse(max_tokens=None, max_completion_tokens=7).how.max_tokens == 7
    for key in ("max_tokens", "max_completion_tokens"):
        for value in (0, -1, 65, 10**400):
            error = refused(**{key: value})
            assert error.param == key and error.message.startswith(f"{key} must lie in 1..64")
    assert refused(max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"
    assert refused(max_tokens=0, max_completion_tokens=6).param == "max_tokens"


def test_probabilities_are_asked_for_in_pairs():
    assert parse(logprobs=True).top_logprobs == 0 and parse(logprobs=True, top_logprobs=20).top_logprobs == 20
    for wrong in ({"top_logprobs": 2}, {"logprobs": False, "top_logprobs": 1}):
        assert "needs logprobs" in refused(**wrong).message
    for most in (21, -1):
        assert refused(logprobs=True, top_logprobs=most).param == "top_logprobs"


@pytest.mark.parametrize(
    ("keys", "param", "said"),
    [
        ({"stream_options": {"include_use": True}}, "stream_options.include_use", "did you mean include_usage"),
        (
            {"stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "not supported",
        ),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "wrong type"),
        ({"response_format": {"type": "json"}}, "response_format.type", 'not "json"'),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "not a key"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema", "not a key"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "must be a JSON schema"),
        ({"response_format": "json"}, "response_format", "wrong type"),
        ({"structured_outputs": {"choices": ["a"]}}, "structured_outputs.choices", "did you mean choice?"),
        ({"structured_outputs": {"grammar": "root"}}, "structured_outputs.grammar", "use regex or json"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "wrong type"),
        ({"guided_choice": []}, "guided_choice", "list of texts"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "none of them empty"),
        ({"guided_choice": [f"{i}" for i in range(1001)]}, "guided_choice", "at most 1000"),
        ({"guided_regex": "a" * 9000}, "guided_regex", "at most 8192"),
        ({"guided_regex": "a\\\\\\"}, "guided_regex", "a backslash that escapes nothing"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": '{"not":' * 300 + "{}" + "}" * 300}, "guided_json", "recursion limit"),  # as in a body
        ({"guided_json": {"enum": ["a" * 70_000]}}, "guided_json", "at most 65536"),
        ({"guided_json": {"properties": {"a": {"tpye": "string"}}}}, "guided_json", "did you mean type?"),
        ({"guided_json": {"divisibleBy": 2}}, "guided_json", "before JSON Schema's fourth draft"),
        ({"guided_json": {f"note {i}": 1 for i in range(101)}}, "guided_json", "over 100 different words"),
        ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json", "not supported"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice", "only one form"),
    ],
)
def test_what_lies_within_a_key_is_looked_at_as_well(keys, param, said):
    error = refused(**keys)
    assert error.param == param and said in error.message, error.message


def test_a_schemas_own_words_are_no_keywords():
    """Names of properties, values and notes."""
    schema = {"properties": {"tpye": {"default": {"tpye": 1}}}, "enum": [{"tpye": 2}], "note": {"tpye": 3}}
    assert json.loads(parse(guided_json=schema).form.schema).items() >= schema.items()
    assert parse(guided_json=json.dumps(schema)).form == parse(guided_json=schema).form
    parse(guided_json={"properties": {f"{i}": {"x-order": i, "hint": ""} for i in range(500)}})


def test_a_form_is_read_from_each_of_its_keys():
    for keys in ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}):
        assert parse(**keys).form.regex == "a+"
    assert parse(guided_regex="a\\\\").form.regex == "a\\\\"
    schema = {"type": "object"}
    for keys in (
        {"guided_json": schema},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json_object": True}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}},
    ):
        assert json.loads(parse(**keys).form.schema)["type"] == "object"
    assert parse(guided_choice=["a.b", "猫"]).form.choices == ("a.b", "猫")
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"json_object": False}})
    assert protocol.parse(body.encode(), "fusion", LIMITS, False).form is None
