"""Encodes conversations as token ids: templates, placeholders, labels and question tokens.

One round of an image conversation in the Phi-3 template, with its labels:

    <|user|> <vision_start> LATENTS <vision_end> <vision_start> IMAGE <vision_end> \\n  two cats?  <|end|> \\n
      -100       -100        -100       -100          -100       -100     -100   -100  -100 ...     -100  -100

    <|assistant|>  Yes  .  <|end|>
       -400         id  id   id            -400: the last token before an answer, the place of H_P

The sequence is cut at placeholders and at the start of each answer, and each cut piece is tokenized by itself. It
begins with the BOS token if the template has one or, if the template does not say, if the tokenizer's own files do
(`first_ids`); the question tokens for the encoder begin the same way.

With one image this is the published arrangement: wherever a turn says `<image>`, the image moves to the front of that
turn. With several images each `<image>` becomes a slot in its place, in any turn and any number, one for each image of
the record in their order; the round's latents come before the turn's text, after the images at its start:

    <image>\\n<image>\\nCompare them.     IMAGE \\n IMAGE LATENTS \\n Compare them.
    Is <image> older than <image>?        LATENTS Is IMAGE older than IMAGE ?
    And which is larger?                  LATENTS And which is larger?

(each IMAGE and LATENTS is between <vision_start> and <vision_end>). A round's latents query the latest image of that or
an earlier round, or the first image if none has come yet. The questions of all rounds guide every image, or, if the
model's `guide` is `first_round`, that of the first one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from fusion_jax.data.row_text import IGNORE as IGNORE
from fusion_jax.data.row_text import RowText
from fusion_jax.data.templates import Template, first_ids
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.data.tokenizer_base import VISION_END, VISION_START
from fusion_jax.errors import BadRecord

IMAGE = -200  # in input_ids: the place of an image's tokens
LATENTS = -300  # in input_ids: the place of one round's latents
ANSWER_START = -400  # in labels: the last token before an answer, not supervised either

IMAGE_TAG = "<image>"  # in records: the place of an image
# The place of an image in literal text, where `<image>` is only text: a lone surrogate, which valid text cannot hold.
IMAGE_SLOT = "\ud800"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can express this; no tokenizer accepts it
_LATENTS_TAG = "<latent_image>"  # only in the readable prompt


@dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation in token ids.

    Attributes:
      input_ids: (S,) token ids, with IMAGE and LATENTS where visual tokens go.
      labels: (S,) the id where the token is supervised, ANSWER_START on the last token before each answer, else IGNORE.
      instructs: (T,) the question tokens that guide the images, after `first_ids`; [0] without an image.
      rounds: number of questions.
      prompt: the readable text, with tags for placeholders and without BOS.
    """

    input_ids: Int32[np.ndarray, "S"]
    labels: Int32[np.ndarray, "S"]
    instructs: Int32[np.ndarray, "T"]
    rounds: int
    prompt: str


def encode_conversation(
    turns: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    template: Template,
    images: int,
    *,
    system: str | None = None,
    latents: bool = True,
    latents_without_image: bool = True,
    first_guides: bool = False,
    where: str = "conversation",
) -> Encoded:
    """Encodes a finished conversation, for training.

    Args:
      turns: `{"from": "human" | "gpt", "value": text}`, human first, gpt last. A leading gpt turn is dropped.
      tokenizer: as loaded.
      template: an entry of `TEMPLATES`, made for the tokenizer's model.
      images: how many images the record has; a bool means one or none. The place of one image is where a human turn
        says `<image>`, moved to the front of that turn, or else the first human turn. Several are where the human
        turns say `<image>`, as many times as there are images.
      system: the conversation's own system text; None or empty: the template's.
      latents: put a latent placeholder into each round.
      latents_without_image: do so also when there is no image.
      first_guides: only the first round's question guides the images, not those of all rounds.
      where: the record's place, for errors.

    Raises:
      BadRecord: the turns cannot be used; `reason` is one of empty_conversation, bad_turns, no_answer,
        several_images (tags beyond the one image), image_tag_in_answer, image_tag_without_image, image_without_tag,
        system_turn (the template has no place for a system text).
      UserError: the tokenizer lacks a token of the template.
    """
    rounds = _rounds(turns, images, finished=True, where=where)
    _check_system(system, template, where)
    latents = latents and (images > 0 or latents_without_image)
    return _encode(rounds, tokenizer, template, images, latents, system, first_guides)


def encode_prompt(
    turns: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    template: Template,
    images: int,
    *,
    system: str | None = None,
    latents: bool = True,
    latents_without_image: bool = True,
    first_guides: bool = False,
    literal: bool = False,
    where: str = "conversation",
) -> Encoded:
    """Encodes a conversation that waits for its next answer, for generation: `turns` ends with a human turn.

    The ids are those of the same conversation in training, up to the last answer; the last one is where H_P is read.
    Arguments and errors as for `encode_conversation`.

    Args:
      literal: the turns are literal text. Control tokens in them, and `<image>`, are only text; only the template
        writes roles and ends, and IMAGE_SLOT marks the place of an image. A leading gpt turn is the model's greeting.
        Not so in data sets, which stay as they were published: a token that is written in their texts is that token.
    """
    rounds = _rounds(turns, images, finished=False, where=where, tag=IMAGE_SLOT if literal else IMAGE_TAG)
    _check_system(system, template, where)
    latents = latents and (images > 0 or latents_without_image)
    greeting = turns[0]["value"] if literal and turns[0]["from"] == "gpt" else None
    return _encode(rounds, tokenizer, template, images, latents, system, first_guides, literal, greeting)


def encode_guide(text: str, tokenizer: Tokenizer, template: Template) -> Int32[np.ndarray, "T"]:
    """Encodes a text for the vision encoder as `encode_conversation` does questions; an empty one has no tokens."""
    ids = [*first_ids(tokenizer, template), *tokenizer.encode_parts([(text, False)])] if text else []
    return np.asarray(ids, np.int32)


def _rounds(turns, images: int, finished: bool, where: str, tag: str = IMAGE_TAG) -> list[tuple[str, str | None]]:
    """Returns validated (question, answer) pairs with a `tag` for each image; an unfinished last round has the answer
    None. A single image's tag starts its question, and a newline follows it."""
    turns = _alternating(_checked_turns(turns, tag, where), finished, where)
    questions = [turn["value"] for turn in turns[::2]]
    answers = [turn["value"] for turn in turns[1::2]]
    # The model itself may have written such answers: that is no reason to refuse the next question.
    if finished and any(not answer.strip() for answer in answers):
        raise BadRecord("no_answer", where, "an answer is empty")
    if finished and any(IMAGE_TAG in answer for answer in answers):
        raise BadRecord("image_tag_in_answer", where, f"{IMAGE_TAG} may stand in human turns only")
    tags = [question.count(tag) for question in questions]
    _check_tags(sum(tags), images, where)
    if images == 1:
        owner = tags.index(1) if sum(tags) else 0
        questions[owner] = f"{tag}\n{questions[owner].replace(tag, '').strip()}"
    return [(question, answers[k] if k < len(answers) else None) for k, question in enumerate(questions)]


def _checked_turns(turns, tag: str, where: str) -> Sequence[Mapping[str, str]]:
    """Returns the turns; raises BadRecord unless each is a human's or the model's and has a text."""
    if isinstance(turns, str | Mapping) or not isinstance(turns, Sequence):
        raise BadRecord("bad_turns", where, f"conversations must be a list of turns, not {type(turns).__name__}")
    if not turns:
        raise BadRecord("empty_conversation", where, "the conversation has no turns")
    for k, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get("from") not in ("human", "gpt"):
            raise BadRecord("bad_turns", where, f"turn {k} must have 'from' set to 'human' or 'gpt'")
        if not isinstance(turn.get("value"), str):
            raise BadRecord("bad_turns", where, f"turn {k} must have a text as 'value'")
        text = turn["value"].replace(tag, "") if turn["from"] == "human" else turn["value"]
        if LONE_SURROGATE.search(text):
            raise BadRecord("bad_turns", where, f"turn {k} holds half a surrogate pair, which is not text")
    return turns


def _alternating(turns: Sequence[Mapping[str, str]], finished: bool, where: str) -> Sequence[Mapping[str, str]]:
    """Returns the turns without a leading one of the model. Raises BadRecord unless questions and answers alternate,
    and the last turn is an answer if the conversation is finished, else a question."""
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
    return turns


def _check_tags(tags: int, images: int, where: str) -> None:
    """Raises BadRecord unless the questions have as many image tags as there are images. One image needs no tag."""
    detail = f"{tags} {IMAGE_TAG} tag{'s' * (tags != 1)} for {images:d} image{'s' * (images != 1)}"
    if tags > images:
        raise BadRecord("several_images" if images == 1 else "image_tag_without_image", where, detail)
    if tags < images and images > 1:
        raise BadRecord("image_without_tag", where, detail)


def _check_system(text: str | None, template: Template, where: str) -> None:
    """Raises BadRecord if the template cannot hold the system text of a conversation."""
    if text and template.system_frame is None:
        raise BadRecord("system_turn", where, f"the template {template.name} has no place for a system text")
    if text and LONE_SURROGATE.search(text):
        raise BadRecord("bad_turns", where, "the system text holds half a surrogate pair, which is not text")


def _encode(
    rounds,
    tokenizer: Tokenizer,
    template: Template,
    images: int,
    latents: bool,
    system: str | None,
    first_guides: bool,
    literal: bool = False,
    greeting: str | None = None,
) -> Encoded:
    """Encodes `rounds`, as `_rounds` returns them, after a `greeting` of the model."""
    tokenizer.token_id(template.stops[0])  # the tokens of another model's template would silently be spelled out
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
        texts = ["".join(question.split(tag, images)).strip() for question, _ in rounds[: 1 if first_guides else None]]
        instructs = [*first, *tokenizer.encode_parts([("".join(texts), literal)])]
    return Encoded(
        input_ids=np.asarray(row.ids, np.int32),
        labels=np.asarray(row.labels, np.int32),
        instructs=np.asarray(instructs, np.int32),
        rounds=len(rounds),
        prompt="".join(row.prompt),
    )
