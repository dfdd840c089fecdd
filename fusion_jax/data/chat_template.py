r"""Finds the template of a conversation: one of `TEMPLATES`, or the tokenizer's own chat template.

A chat template is Jinja text that writes a list of messages. `Template` is the fixed text between them, so
conversations of known words are rendered and cut at those words (S, U, A and V here; the template is SmolLM2's):

    <|im_start|>system\n S <|im_end|>\n <|im_start|>user\n U <|im_end|>\n<|im_start|>assistant\n A <|im_end|> \n
    system_frame[0]        frame[1]     question             answer                                end        between

Rendering all of them again from the pieces must give the same texts, or the template is refused.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion_jax.config import OWN_TEMPLATE
from fusion_jax.data.templates import TEMPLATES, Template, find_template
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import UserError
from fusion_jax.files import shown

_RENDERER = Path(__file__).with_name("render_chat.py")
_SECONDS = 30
# Words that no template writes by itself. The first stands for the BOS token.
_BOS, _SYSTEM, *_SAID = ("Zq0bos", "Zq1system", "Zq2one", "Zq3two", "Zq4three", "Zq5four", "Zq6five")


class _CannotCut(Exception):
    """The chat template cannot be cut; the message says why, as a clause."""


def find(name: str, tokenizer: Tokenizer) -> Template:
    """Returns the template that a config's `template` names: one of `TEMPLATES`, or the tokenizer's own.

    Raises:
      UserError: an unknown name, or `own` if the tokenizer's folder has no chat template or one that cannot be cut.
    """
    return _own(tokenizer) if name == OWN_TEMPLATE else find_template(name)


@functools.lru_cache(maxsize=8)
def _own(tokenizer: Tokenizer) -> Template:
    others = f"set config.template to one of {', '.join(sorted(TEMPLATES))}"
    if tokenizer.chat_template is None:
        raise UserError(f"The tokenizer folder {tokenizer.folder} has no chat template; {others}.")
    text, path = tokenizer.chat_template
    try:
        return _cut(text, tokenizer)
    except _CannotCut as reason:
        raise UserError(f"The chat template in {path} cannot be used: {reason}; {others}.") from reason


def _cut(text: str, tokenizer: Tokenizer) -> Template:
    if any(word in text for word in (_BOS, _SYSTEM, *_SAID)):
        raise _CannotCut("it holds one of the words that it is probed with")
    padded = [f"\n {word} \n" for word in (_SYSTEM, *_SAID)]
    probes = [
        (None, _SAID[:1]),
        (None, _SAID[:3]),
        (None, _SAID[:5]),
        (None, padded[1:4]),
        (None, _SAID[:2]),
        (None, _SAID[:4]),
        (_SYSTEM, _SAID[:1]),
        (_SYSTEM, _SAID[:3]),
        (padded[0], padded[1:4]),
    ]
    rendered = _render(text, tokenizer, probes)
    for (system, _), (_, error) in zip(probes, rendered):
        if error is not None and system is None:
            raise _CannotCut(f"it does not write a conversation ({shown(error, 150)})")
    texts = [written or "" for written, _ in rendered]

    first, second = texts[:2]
    u, a, v = _SAID[:3]
    if first.count(u) != 1:
        raise _CannotCut("it does not write a question once")
    head, answer = first.split(u)
    if not (second.startswith(first + a) and second.endswith(v + answer)):
        raise _CannotCut("a question or its answer is written differently when more follows")
    middle = second[len(first + a) : len(second) - len(v + answer)]
    closing = tokenizer.first_control(middle)
    if closing is None:
        raise _CannotCut("no control token closes an answer")
    end, rest = middle[: closing[1]], middle[closing[1] :]

    # The BOS token, from the variable or spelled out. SmolLM2's opens each turn, so it does not count as one.
    bos = tokenizer.tokens.get("bos_token")
    front = next((b for b in (_BOS, bos) if b and head.startswith(b) and not rest.strip().startswith(b)), "")
    head = head.removeprefix(front)
    blank = len(rest) - len(rest.lstrip())
    question = next((rest[k:] for k in (blank, *range(len(rest) + 1)) if head.endswith(rest[k:])), "")
    template = Template(
        name=OWN_TEMPLATE,
        system_frame=None,
        default_system=head.removesuffix(question) or None,
        question=question,
        answer=answer,
        end=end,
        between=rest.removesuffix(question),
        stops=(middle[closing[0] : closing[1]],),
        bos=bool(front),
        trims=tuple(part for part, i in (("question", 1), ("answer", 2)) if padded[i] not in texts[3]),
    )
    if not question + answer:
        raise _CannotCut("nothing marks where an answer begins")

    def same(template: Template) -> bool:
        """Returns whether the pieces give every rendered text; more may follow after a last answer."""
        for (system, turns), rendering in zip(probes, texts):
            if system is None or template.system_frame is not None:
                written = front + _written(template, system, turns)
                if rendering != written and not (len(turns) % 2 == 0 and rendering.startswith(written)):
                    return False
        return True

    if not same(template):
        raise _CannotCut("it does not write the rounds of a conversation one after the other")
    with_system = _with_system(template, texts[6].removeprefix(front), padded[0] in texts[8])
    template = with_system if same(with_system) else template
    # The placeholder for the BOS token between rounds becomes that token.
    names = ("default_system", "question", "answer", "end", "between")
    changes = {name: getattr(template, name).replace(_BOS, bos or "") for name in names if getattr(template, name)}
    return dataclasses.replace(template, **changes)


def _with_system(template: Template, rendered: str, kept: bool) -> Template:
    """Returns the template with its system frame, if it has one. `kept`: white space around a system text stays."""
    before, system, after = rendered.partition(_SYSTEM)
    after, question, _ = after.partition(_SAID[0])
    if not system or not question or _SYSTEM in after or not after.endswith(template.question):
        return template
    after = after.removesuffix(template.question)
    default = template.default_system
    if default is not None:
        if not (default.startswith(before) and default.endswith(after) and len(default) >= len(before + after)):
            return template
        default = default[len(before) : len(default) - len(after)]
    trims = template.trims if kept else ("system", *template.trims)
    return dataclasses.replace(template, system_frame=(before, after), default_system=default, trims=trims)


def _written(template: Template, system: str | None, turns: Sequence[str]) -> str:
    """Writes a conversation with the pieces; the last of an even number of turns is a closed answer."""
    text = "".join(part for part, _ in template.system_parts(system))
    for k, turn in enumerate(turns):
        if k % 2:
            text += template.trimmed("answer", turn) + template.end
        else:
            text += (template.between if k else "") + template.question
            text += template.trimmed("question", turn) + template.answer
    return text


def _render(text: str, tokenizer: Tokenizer, probes) -> list[tuple[str | None, str | None]]:
    """Renders each (system text, turns) to (text, error); a conversation that ends with a question awaits an answer."""
    chats = []
    for system, turns in probes:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
        chats.append([messages, len(turns) % 2 == 1])
    tokens = dict(tokenizer.tokens)
    if "bos_token" in tokens:
        tokens["bos_token"] = _BOS
    request = json.dumps({"template": text, "context": tokens | {"tools": None, "documents": None}, "chats": chats})
    try:
        # -P: the folder of this file, whose modules have names of the standard library, is not searched for modules.
        done = subprocess.run(
            [sys.executable, "-P", str(_RENDERER)], input=request.encode(), capture_output=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise _CannotCut("it takes too long to render") from error
    if done.returncode < 0:
        raise _CannotCut("it takes too much time or memory to render")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise _CannotCut(f"it could not be rendered ({shown(lines[-1], 150) if lines else done.returncode})")
    return [(answer.get("text"), answer.get("error")) for answer in json.loads(done.stdout)]
