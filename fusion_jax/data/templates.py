"""Defines the conversation templates: the fixed text around turns, and the ids that begin and end it."""

from dataclasses import dataclass

from fusion_jax.config import OWN_TEMPLATE
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import UserError, check_choice


@dataclass(frozen=True)
class Template:
    """The fixed text around a conversation's turns.

    Attributes:
      name: key in `TEMPLATES`, or OWN_TEMPLATE.
      system_frame: the texts before and after a system text; None: the template cannot hold one.
      default_system: the system text of a conversation without one, or the whole system part if there is no frame;
        None: such a conversation has no system part.
      question: the text before a question and its placeholders.
      answer: the text after the question; its last token is the place of H_P.
      end: the text that closes an answer, and is supervised with it.
      between: the text after a closed answer if another round follows; not supervised.
      stops: tokens that end an answer while generating: the first is the last token of `end`, others count if the
        tokenizer has them.
      bos: whether a BOS begins a conversation; None: as the tokenizer's own files say.
      trims: which of "system", "question" and "answer" lose the white space around them.
    """

    name: str
    system_frame: tuple[str, str] | None
    default_system: str | None
    question: str
    answer: str
    end: str
    between: str
    stops: tuple[str, ...]
    bos: bool | None = None
    trims: tuple[str, ...] = ()

    def trimmed(self, part: str, text: str) -> str:
        return text.strip() if part in self.trims else text

    def system_parts(self, text: str | None) -> list[tuple[str, bool]]:
        """Returns what comes before the first round, in pieces, and whether a piece is the conversation's own text.

        Args:
          text: its system text, None or empty for the template's; with one there must be a `system_frame`.
        """
        before, after = self.system_frame or ("", "")
        if text:
            return [(before, False), (self.trimmed("system", text), True), (after, False)]
        return [] if self.default_system is None else [(before + self.default_system + after, False)]

    @property
    def greeting(self) -> str:
        """The text before an answer that comes before the first question. If a template does not mark where an answer
        begins by itself (`mistral`), it answers an empty question."""
        closed = self.end + self.between
        mark = self.answer.removeprefix(closed)
        return self.question + self.answer if mark == self.answer else mark


TEMPLATES = {
    # The first two as the published system writes them.
    "phi3": Template(
        name="phi3",
        system_frame=("<|system|>\n", "<|end|>\n"),
        default_system="You are a helpful AI assistant.",
        question="<|user|>\n",
        answer="<|end|>\n<|assistant|>\n",
        end="<|end|>",
        between="\n",
        stops=("<|end|>", "<|endoftext|>"),
        bos=True,
    ),
    "llama3": Template(
        name="llama3",
        system_frame=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        default_system=(
            "You are a helpful, highly intelligent language and vision assistant. You are able to understand the "
            "visual content that the user provides, and assist the user with a variety of tasks using natural "
            "language. Whenever an image is present in the conversation, very carefully examine it and consider its "
            "content when formulating your response."
        ),
        question="<|start_header_id|>user<|end_header_id|>\n\n",
        answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        between="",
        stops=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        bos=True,
    ),
    # With Qwen2's system text. Qwen2.5 and SmolLM2 have others: their folders' own templates say so.
    "chatml": Template(
        name="chatml",
        system_frame=("<|im_start|>system\n", "<|im_end|>\n"),
        default_system="You are a helpful assistant.",
        question="<|im_start|>user\n",
        answer="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    "mistral": Template(
        name="mistral",
        system_frame=None,
        default_system=None,
        question="[INST] ",
        answer=" [/INST]",
        end="</s>",
        between="",
        stops=("</s>",),
    ),
}


def find_template(name: str) -> Template:
    """Returns the template of that name. UserError names the allowed ones. `chat_template.find` knows `own`, too."""
    if name not in TEMPLATES:
        check_choice("conversation template ", name, (*TEMPLATES, OWN_TEMPLATE))
    return TEMPLATES[name]


def first_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Returns the ids that begin a conversation, and the question tokens: the BOS token or nothing.

    Raises:
      UserError: the template begins with a BOS token, and the tokenizer names none.
    """
    if not (tokenizer.adds_bos if template.bos is None else template.bos):
        return []
    if tokenizer.bos_id is None:
        raise UserError(
            f"The template {template.name} begins with a BOS token, and {tokenizer.folder}/tokenizer_config.json names "
            "no bos_token."
        )
    return [tokenizer.bos_id]


def stop_ids(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Returns the ids that end an answer, ascending: the template's stops that the tokenizer has, and its EOS.

    Raises:
      UserError: the tokenizer lacks the first of them, or the BOS token that the template begins with.
    """
    first_ids(tokenizer, template)
    ids = {tokenizer.token_id(template.stops[0]), tokenizer.eos_id}
    return tuple(sorted(ids | {tokenizer.token_id(stop) for stop in template.stops if tokenizer.has_token(stop)}))
