"""Turns conversations and written prompts into token ids and labels, as in training."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_jax.data.pieces import NO_DUMMY_PREFIX, Added, Pieces
from fusion_jax.data.row_text import IGNORE, RowText

from .image_fusion import KEYS

try:  # only folders without tokenizer.json need it
    import sentencepiece
except ImportError:
    sentencepiece = None

IMAGE_TAG = "<image>"  # marks the image in the text of a turn
LATENTS_TAG = "<latent_image>"
VISION_START, VISION_END = "<vision_start>", "<vision_end>"  # around all visual positions
# Placeholders in a row of ids until the layout fills the positions.
IMAGE, LATENTS = -200, -300
_FRAMED = re.compile(f"{VISION_START}({IMAGE_TAG}|{LATENTS_TAG}){VISION_END}")
# The ways in which a conversation ends: with an open question, before an answer, within an answer, or after one.
ASKING, WAITING, ANSWERING, CLOSED = "asking", "waiting", "answering", "closed"


@dataclass
class Chat:
    """A conversation.

    Attributes:
      system: the text before the first round. end: ASKING, WAITING, ANSWERING or CLOSED.
      rounds: (question, answer or None); the question with the image begins with its tag.
    """

    system: str
    rounds: list[tuple[str, str | None]]
    end: str

    @property
    def has_image(self) -> bool:
        return any(question.startswith(IMAGE_TAG) for question, _ in self.rounds)


@dataclass
class Encoded:
    """A conversation as token ids.

    Attributes:
      ids: token ids, with IMAGE and LATENTS in place of visual tokens. labels: ids where supervised, else IGNORE.
      ends: positions of the last token before each answer. question_ids: the question that guides the encoder.
      prompt: the readable text.
    """

    ids: list[int]
    labels: list[int]
    ends: list[int]
    question_ids: list[int]
    prompt: str


class ChatText:
    """Writes conversations with the model's template, and reads them back.

    Args:
      template: dict, see `FusionProcessor`.
      encode: returns the ids of a text after the token with a certain id, or after none.
      first: ids before every conversation. latents: whether rounds have latents; latents_without_image: whether rounds
        of text only have them, too. text_guided: whether questions guide the encoder, those of all rounds or, with
        first_guides, the first.
    """

    def __init__(
        self,
        template: dict,
        encode: Callable[[str, int | None], list[int]],
        first: list[int],
        latents: bool,
        latents_without_image: bool,
        text_guided: bool,
        first_guides: bool,
    ):
        self.template, self.encode, self.first = template, encode, first
        self.latents, self.latents_without_image = latents, latents_without_image
        self.text_guided, self.first_guides = text_guided, first_guides
        # The end of a question and the header of its answer, where the template writes them separately.
        ended = template["end"] + template["between"]
        self.closing = ended if ended and template["answer"].startswith(ended) else ""
        closed = re.escape(template["end"]), re.escape(template["between"] + template["question"])
        self._answer_end = re.compile(rf"{closed[0]}(?={closed[1]}|\s*\Z)")

    def trimmed(self, part: str, text: str) -> str:
        return text.strip() if part in self.template.get("trims", ()) else text

    def system(self, own: str) -> str:
        """The text before the first round; `own` is the conversation's system text, or empty."""
        if not own:
            return self.template["system"]
        if not self.template.get("system_frame"):
            raise ValueError("The model's chat template cannot hold a system message.")
        before, after = self.template["system_frame"]
        return before + self.trimmed("system", own) + after

    def is_prompt(self, text: str) -> bool:
        """Whether a text begins as the template's prompts do."""
        frame = self.template.get("system_frame") or ("",)
        starts = (self.template["system"], frame[0], self.template["question"])
        return any(start and text.startswith(start) for start in starts)

    def has_marks(self, text: str) -> bool:
        """Whether a text contains the template's own words."""
        marks = (self.template[key].strip() for key in ("question", "answer", "end"))
        return any(mark and mark in text for mark in marks)

    def read(self, text: str) -> Chat:
        """Reads a conversation that the template has written.

        Raises:
          ValueError: the text is not such a conversation.
        """
        t, rounds, end = self.template, [], CLOSED
        if not t["answer"]:
            raise ValueError("The model's template does not mark where an answer begins: give messages, not a text.")
        start = text.find(t["question"]) if t["question"] else len(t["system"])
        if start < 0 or not self.is_prompt(text):
            raise ValueError(
                f"The text does not begin as this model's prompts do, with {(t['system'] + t['question'])[:80]!r}; "
                "make it with apply_chat_template, or give the messages themselves."
            )
        system, at = text[:start], start + len(t["question"])
        while True:
            header = text.find(t["answer"], at)
            if header < 0:
                question = text[at:]
                rounds.append((question.removesuffix(self.closing) if self.closing else question, None))
                end = ASKING
                break
            question, at = text[at:header], header + len(t["answer"])
            closed = self._answer_end.search(text, at)
            if closed is None:
                rounds.append((question, text[at:] or None))
                end = ANSWERING if text[at:] else WAITING
                break
            rounds.append((question, text[at : closed.start()]))
            at = closed.end()
            if not text[at:].strip() or text[at:] == t["between"]:
                break
            at += len(t["between"] + t["question"])
        return Chat(system, [(self._placed(question), answer) for question, answer in rounds], end)

    def _placed(self, question: str) -> str:
        """A written question without the tokens around visual positions, and with the image's tag at its start."""
        question = _FRAMED.sub(lambda match: IMAGE_TAG if match[1] == IMAGE_TAG else "", question)
        before, tag, after = question.partition(IMAGE_TAG)
        return question if not tag or not before.strip() else f"{IMAGE_TAG}\n{(before + after).strip()}"

    def encoded(self, chat: Chat) -> Encoded:
        """Tokenizes a conversation piece by piece; pieces end at placeholders and at answers."""
        template, has_image = self.template, chat.has_image
        row = RowText(self.encode_parts, self.first, (VISION_START, VISION_END))
        row.text(chat.system)
        for k, (question, answer) in enumerate(chat.rounds):
            last, question = k == len(chat.rounds) - 1, self.trimmed("question", question)
            row.text((template["between"] if k else "") + template["question"])
            if self.latents and (has_image or self.latents_without_image):
                row.placeholder(LATENTS, LATENTS_TAG)
            if question.startswith(IMAGE_TAG):
                row.placeholder(IMAGE, IMAGE_TAG)
                question = question.removeprefix(IMAGE_TAG)
            asking = last and chat.end == ASKING and self.closing
            row.text(question + (self.closing if asking else template["answer"]))
            row.end_question()
            if answer is not None:
                answer = self.trimmed("answer", answer)
                row.answer(answer, "" if last and chat.end == ANSWERING else template["end"])
        question_ids = []
        if has_image and self.text_guided:
            rounds = chat.rounds[:1] if self.first_guides else chat.rounds
            texts = [question.removeprefix(IMAGE_TAG).strip() for question, _ in rounds]
            question_ids = [*self.first, *self.encode("".join(texts), None)]
        return Encoded(row.ids, row.labels, row.ends, question_ids, "".join(row.prompt))

    def encode_parts(self, parts: Sequence[tuple[str, bool]], after: int | None) -> list[int]:
        """Ids of consecutive texts, none of which is literal here."""
        return self.encode("".join(text for text, _ in parts), after)

    def continued(self, text: str) -> Encoded:
        """Encodes a text that follows a prompt: an answer, as trainers on prompts and completions pass it."""
        if _FRAMED.search(text) or IMAGE_TAG in text:
            raise ValueError("A text that does not begin as this model's prompts do cannot hold an image.")
        header = self.encode(self.template["answer"], None)
        ids = self.encode(text, header[-1] if header else None)
        return Encoded(ids, [IGNORE] * len(ids), [], [], text)


def read_messages(messages: list[dict], images: list[Any], text: ChatText) -> tuple[Chat, Any]:
    """Reads a conversation, and its image or None.

    Args:
      messages: see `FusionProcessor`. images: those that the messages do not contain themselves.

    Raises:
      ValueError: the messages are not a conversation of this model, with the reason.
    """
    turns, system, images = [], "", list(images)
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"A message is {message!r}; it must be a dict of role and content.")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant") and not (role == "system" and k == 0):
            raise ValueError(f"A turn's role is {role!r}; allowed are user and assistant, and system at the start.")
        if not isinstance(content, str | list | tuple):
            raise ValueError(f"A turn's content is {content!r}; it must be a text or a list of parts.")
        written = content if isinstance(content, str) else "".join(_part(part, role, images) for part in content)
        if role == "system":
            system = written
        else:
            turns.append((role, written))
    turns = turns[1:] if turns and turns[0][0] == "assistant" else turns
    if not turns or any(role != ("user", "assistant")[k % 2] for k, (role, _) in enumerate(turns)):
        raise ValueError("A conversation must alternate between user and assistant and hold a user's turn.")
    questions, answers = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
    tags = [question.count(IMAGE_TAG) for question in questions]
    check_images(sum(tags), len(images))
    if images:
        owner = tags.index(1) if sum(tags) else 0
        questions[owner] = f"{IMAGE_TAG}\n{questions[owner].replace(IMAGE_TAG, '').strip()}"
    rounds = [(question, answers[k] if k < len(answers) else None) for k, question in enumerate(questions)]
    end = CLOSED if len(turns) % 2 == 0 else WAITING
    return Chat(text.system(system), rounds, end), images[0] if images else None


def check_images(places: int, images: int) -> None:
    if max(places, images) > 1:
        raise ValueError(f"{max(places, images)} images; one image per conversation is supported.")
    if places and not images:
        raise ValueError("The conversation has a position for an image, but there is no image.")


def _part(part: Any, role: str, images: list[Any]) -> str:
    """The text of a part of a message; its image is appended to `images`."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"A part of type text has {part.get('text')!r} as its text.")
        return part["text"]
    if kind not in ("image", "image_url"):
        raise ValueError(f"A part's type is {kind!r}; allowed are text, image and image_url.")
    if role != "user":
        raise ValueError(f"A message of role {role} holds an image; images belong to those of the user.")
    held = [part[key] for key in KEYS if part.get(key) is not None]
    images += held[:1]
    return IMAGE_TAG


class SentencePieceText:
    """Turns text into ids exactly as in training, by the SentencePiece model and the tokenizer's added tokens."""

    def __init__(self, model: bytes, tokenizer):
        if sentencepiece is None:
            raise ImportError("This model's tokenizer.model needs the package: pip install sentencepiece")
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        self.tokenizer = tokenizer
        self.guard = tokenizer.unk_token or self.model.id_to_piece(self.model.unk_id())
        self.look_up_added()

    def look_up_added(self) -> None:
        self.known = len(self.tokenizer)
        tokens = self.tokenizer.added_tokens_decoder.items()
        added = {token.content: Added(i, token.special, token.lstrip, token.rstrip) for i, token in tokens}
        self.pieces = Pieces(self.model, added, self.guard)

    def __call__(self, text: str) -> list[int]:
        if self.known != len(self.tokenizer):  # more tokens were added
            self.look_up_added()
        return self.pieces.encode(text)
