"""Conversations as token ids: chat templates, placeholders, labels and the question tokens for the encoder.

One round of an image conversation in the Phi-3 template, with its labels:

    <|user|> <vision_start> LATENTS <vision_end> <vision_start> IMAGE <vision_end> \\n  two cats?  <|end|> \\n
      -100       -100        -100       -100          -100       -100     -100   -100  -100 ...     -100  -100

    <|assistant|>  Yes  .  <|end|>
       -400         id  id   id            -400: the last token before an answer, the place of H_P

The sequence is cut at placeholders and at the start of each answer, and each cut piece is tokenized by itself. In front
of all stands the BOS token where the template has one or, if it says nothing, where the tokenizer's own files do
(`first_ids`); the question tokens for the encoder begin the same way.

With one image this is the published arrangement: wherever a turn says `<image>`, the image moves to the front of that
turn. With several images each `<image>` becomes a slot where it stands, in any turn and any number, one for each image
of the record in their order; the round's latents stand before the turn's text, behind the images that lead it:

    <image>\n<image>\nCompare them.       IMAGE \n IMAGE LATENTS \n Compare them.
    Is <image> older than <image>?        LATENTS Is IMAGE older than IMAGE ?
    And which is larger?                  LATENTS And which is larger?

(each IMAGE and LATENTS between <vision_start> and <vision_end>). A round's latents look at the latest image of that or
an earlier round, before any image at the first one. The questions of all rounds guide every image.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from fusion_jax.data.row_text import IGNORE as IGNORE
from fusion_jax.data.row_text import RowText
from fusion_jax.data.tokenizer import VISION_END, VISION_START, Tokenizer
from fusion_jax.errors import BadRecord, UserError, check_choice

IMAGE = -200  # in input_ids: here go the image's tokens
LATENTS = -300  # in input_ids: here go one round's latents
ANSWER_START = -400  # in labels: the last token before an answer, not supervised either

IMAGE_TAG = "<image>"  # how records say where the image belongs
# The same in somebody's own words, where `<image>` is text: half a surrogate pair, which no text may hold.
IMAGE_SLOT = "\ud800"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can say this; no tokenizer takes it
_LATENTS_TAG = "<latent_image>"  # only in the readable prompt


@dataclass(frozen=True)
class Template:
    """The fixed text around a conversation's turns.

    Attributes:
      name: key in `TEMPLATES`, or OWN.
      system_frame: what stands before and after a system text; None: the template cannot hold one.
      default_system: the system text of a conversation that brings none, without a frame the whole system part; None:
        such a conversation has no system part.
      question: before a question and its placeholders.
      answer: after the question; its last token is the place of H_P.
      end: closes an answer, and is supervised with it.
      between: after a closed answer when another round follows; not supervised.
      stops: tokens that end an answer while generating: the first is the last token of `end`, others count where the
        tokenizer has them.
      bos: whether a BOS stands in front of a conversation; None: as the tokenizer's own files say.
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
        """What comes before the first round, in pieces, and whether a piece is the conversation's own text.

        Args:
          text: its system text, None or empty for the template's; with one there must be a `system_frame`.
        """
        before, behind = self.system_frame or ("", "")
        if text:
            return [(before, False), (self.trimmed("system", text), True), (behind, False)]
        return [] if self.default_system is None else [(before + self.default_system + behind, False)]

    @property
    def greeting(self) -> str:
        """What stands before an answer that comes before the first question. A template that does not mark where an
        answer begins by itself (`mistral`) has it answer an empty question."""
        closed = self.end + self.between
        mark = self.answer.removeprefix(closed)
        return self.question + self.answer if mark == self.answer else mark


OWN = "own"  # the chat template that lies with the tokenizer, see `data.chat_template`
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


@dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation in token ids.

    Attributes:
      input_ids: (S,) token ids, with IMAGE and LATENTS where visual tokens go.
      labels: (S,) the id where the token is supervised, ANSWER_START on the last token before each answer, else IGNORE.
      instructs: (T,) the question tokens of all rounds, behind `first_ids`; [0] in a conversation without an image.
      rounds: number of questions.
      prompt: the readable text, with tags for placeholders and without BOS.
    """

    input_ids: Int32[np.ndarray, "S"]
    labels: Int32[np.ndarray, "S"]
    instructs: Int32[np.ndarray, "T"]
    rounds: int
    prompt: str


def find_template(name: str) -> Template:
    """The template of that name; UserError naming the allowed ones if there is none. `chat_template.find` knows OWN."""
    if name not in TEMPLATES:
        check_choice("conversation template ", name, (*TEMPLATES, OWN))
    return TEMPLATES[name]


def first_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """What stands in front of a conversation, and of the question tokens: the BOS token or nothing.

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


def encode_conversation(
    turns: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    template: Template,
    images: int,
    *,
    system: str | None = None,
    latents: bool = True,
    latents_without_image: bool = True,
    where: str = "conversation",
) -> Encoded:
    """A finished conversation, for training.

    Args:
      turns: `{"from": "human" | "gpt", "value": text}`, human first, gpt last. A leading gpt turn is dropped.
      tokenizer: as loaded.
      template: an entry of `TEMPLATES`, made for the tokenizer's model.
      images: how many images the record has; a bool does for one or none. The place of one image is where a human turn
        says `<image>`, moved to the front of that turn, or else the first human turn. Several stand where the human
        turns say `<image>`, as many times as there are images.
      system: the conversation's own system text; None or empty: the template's.
      latents: put a latent placeholder into each round.
      latents_without_image: do so also when there is no image.
      where: named in errors.

    Raises:
      BadRecord: the turns cannot be used; `reason` is one of empty_conversation, bad_turns, no_answer,
        several_images (tags beyond the one image), image_tag_in_answer, image_tag_without_image, image_without_tag,
        system_turn (the template has no place for a system text).
      UserError: the tokenizer lacks a token of the template.
    """
    rounds = _rounds(turns, images, finished=True, where=where)
    _check_system(system, template, where)
    return _encode(rounds, tokenizer, template, images, latents and (images > 0 or latents_without_image), system)


def encode_prompt(
    turns: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    template: Template,
    images: int,
    *,
    system: str | None = None,
    latents: bool = True,
    latents_without_image: bool = True,
    literal: bool = False,
    where: str = "conversation",
) -> Encoded:
    """A conversation that waits for its next answer, for generation: `turns` ends with a human turn.

    The ids are those of the same conversation in training, up to the last answer; the last one is where H_P is read.
    Arguments and errors as for `encode_conversation`.

    Args:
      literal: the turns are somebody's own words. Control tokens in them, and `<image>`, are text; only the template
        writes roles and ends, and IMAGE_SLOT says where an image goes. A leading gpt turn is what the model has greeted
        with. Data sets stay as they were published: a token that is written in their texts is that token.
    """
    rounds = _rounds(turns, images, finished=False, where=where, tag=IMAGE_SLOT if literal else IMAGE_TAG)
    _check_system(system, template, where)
    latents = latents and (images > 0 or latents_without_image)
    greeting = turns[0]["value"] if literal and turns[0]["from"] == "gpt" else None
    return _encode(rounds, tokenizer, template, images, latents, system, literal, greeting)


def stop_ids(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Ids that end an answer, ascending: the template's stops that the tokenizer has, and its EOS.

    Raises:
      UserError: the tokenizer lacks the first of them, or the BOS token that the template begins with.
    """
    first_ids(tokenizer, template)
    ids = {tokenizer.token_id(template.stops[0]), tokenizer.eos_id}
    return tuple(sorted(ids | {tokenizer.token_id(stop) for stop in template.stops if tokenizer.has_token(stop)}))


def _rounds(turns, images: int, finished: bool, where: str, tag: str = IMAGE_TAG) -> list[tuple[str, str | None]]:
    """Validated (question, answer) pairs with a `tag` for each image; the answer of an unfinished last round is
    None. A single image's tag starts its question, and a newline follows it."""
    if isinstance(turns, str | Mapping) or not isinstance(turns, Sequence):
        raise BadRecord("bad_turns", where, f"conversations must be a list of turns, not {type(turns).__name__}")
    if not turns:
        raise BadRecord("empty_conversation", where, "the conversation has no turns")
    for k, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get("from") not in ("human", "gpt"):
            raise BadRecord("bad_turns", where, f"turn {k} must have 'from' set to 'human' or 'gpt'")
        if not isinstance(turn.get("value"), str):
            raise BadRecord("bad_turns", where, f"turn {k} must have a text as 'value'")
        said = turn["value"].replace(tag, "") if turn["from"] == "human" else turn["value"]
        if _LONE_SURROGATE.search(said):
            raise BadRecord("bad_turns", where, f"turn {k} holds half a surrogate pair, which is no text")
    turns = turns[1:] if turns[0]["from"] == "gpt" else turns
    if not turns:
        raise BadRecord("empty_conversation", where, "the conversation has no human turn")
    for k, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[k % 2]:
            raise BadRecord("bad_turns", where, f"two {turn['from']} turns follow each other")
    if finished and len(turns) % 2:
        raise BadRecord("no_answer", where, "the last human turn has no answer")
    if not finished and not len(turns) % 2:
        raise BadRecord("bad_turns", where, "a prompt must end with a human turn")
    questions = [turn["value"] for turn in turns[::2]]
    answers = [turn["value"] for turn in turns[1::2]]
    # A model may have said such things itself: no reason to refuse it the next question.
    if finished and any(not answer.strip() for answer in answers):
        raise BadRecord("no_answer", where, "an answer is empty")
    if finished and any(IMAGE_TAG in answer for answer in answers):
        raise BadRecord("image_tag_in_answer", where, f"{IMAGE_TAG} may stand in human turns only")
    tags = [question.count(tag) for question in questions]
    detail = f"{sum(tags)} {IMAGE_TAG} tag{'s' * (sum(tags) != 1)} for {images:d} image{'s' * (images != 1)}"
    if sum(tags) > images:
        raise BadRecord("several_images" if images == 1 else "image_tag_without_image", where, detail)
    if sum(tags) < images and images > 1:
        raise BadRecord("image_without_tag", where, detail)
    if images == 1:
        owner = tags.index(1) if sum(tags) else 0
        questions[owner] = f"{tag}\n{questions[owner].replace(tag, '').strip()}"
    return [(question, answers[k] if k < len(answers) else None) for k, question in enumerate(questions)]


def _check_system(text: str | None, template: Template, where: str) -> None:
    """BadRecord where the template cannot hold a conversation's system text."""
    if text and template.system_frame is None:
        raise BadRecord("system_turn", where, f"the template {template.name} has no place for a system text")
    if text and _LONE_SURROGATE.search(text):
        raise BadRecord("bad_turns", where, "the system text holds half a surrogate pair, which is no text")


def _encode(
    rounds,
    tokenizer: Tokenizer,
    template: Template,
    images: int,
    latents: bool,
    system: str | None,
    literal: bool = False,
    greeting: str | None = None,
) -> Encoded:
    """`rounds` as `_rounds` returns them. greeting: said before them."""
    tokenizer.token_id(template.stops[0])  # a template of another model would be spelt out in letters, silently
    tag = IMAGE_SLOT if literal else IMAGE_TAG
    first = first_ids(tokenizer, template)
    row = RowText(tokenizer.encode_parts, first, (VISION_START, VISION_END))
    for text, own in template.system_parts(system):
        row.text(text, own and literal)
    if greeting is not None:
        row.text(template.greeting)
        row.cut()
        row.answer(template.trimmed("answer", greeting), template.end, literal)
        row.text(template.between)
    for k, (question, answer) in enumerate(rounds):
        question = template.trimmed("question", question)
        row.text((template.between if k else "") + template.question)
        pieces = question.split(tag, images)
        # The published template writes the latents before its one image; see `layout` for their order in the row.
        leading = next((i for i, piece in enumerate(pieces) if piece.strip()), len(pieces) - 1) if images > 1 else 0
        for i, piece in enumerate(pieces):
            if i > 0:
                row.placeholder(IMAGE, IMAGE_TAG)
            if i == leading and latents:
                row.placeholder(LATENTS, _LATENTS_TAG)
            row.text(piece, literal)
        row.text(template.answer)
        row.end_question()
        if answer is not None:
            row.answer(template.trimmed("answer", answer), template.end, literal)
    for end in row.ends:
        row.labels[end] = ANSWER_START
    instructs = [0]
    if images:
        texts = ["".join(question.split(tag, images)).strip() for question, _ in rounds]
        instructs = [*first, *tokenizer.encode_parts([("".join(texts), literal)])]
    return Encoded(
        input_ids=np.asarray(row.ids, np.int32),
        labels=np.asarray(row.labels, np.int32),
        instructs=np.asarray(instructs, np.int32),
        rounds=len(rounds),
        prompt="".join(row.prompt),
    )
