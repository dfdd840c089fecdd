"""Renders chat templates in a process of its own, which loads nothing but Jinja.

A chat template is code by whoever published the tokenizer. Jinja's sandbox lets it reach nothing but its own texts; it
could still use unlimited time and memory, so `data.chat_template` runs it here, under limits. In: a JSON object
{"template", "context", "chats": [[messages, add_generation_prompt], ...]}; out: for each chat {"text"} or {"error"}.
"""

import contextlib
import json
import resource
import sys

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS, _BYTES = 2, 1 << 30
_MOST = 1 << 18  # characters of a rendered chat


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks answers for those who train; the text is its inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _refuse(message: str):
    raise TemplateError(message)


def _json(value, indent=None, **_):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def main() -> None:
    for limit, most in ((resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, _BYTES)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system has none
            resource.setrlimit(limit, (most, most))
    request = json.load(sys.stdin)
    # As transformers sets it up, except for today's date: an answer must not depend on the day.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    rendered = []
    try:
        template = environment.from_string(request["template"])
        for messages, prompt in request["chats"]:
            try:
                text = template.render(messages=messages, add_generation_prompt=prompt, **request["context"])
                rendered.append({"text": text} if len(text) <= _MOST else {"error": "the text is too long"})
            except Exception as error:  # a template may raise anything
                rendered.append({"error": f"{type(error).__name__}: {error}"[:200]})
    except (TemplateError, RecursionError, MemoryError) as error:
        rendered = [{"error": f"{type(error).__name__}: {error}"[:200]}] * len(request["chats"])
    json.dump(rendered, sys.stdout)


if __name__ == "__main__":
    main()
