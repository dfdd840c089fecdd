"""Turns conversations and images into the inputs of an exported model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from fusion_jax.data.tiles import most_tokens

from .arguments_fusion import GROUPS, batch, flat, is_image, places_of
from .configuration_fusion import NO_IMAGE, PIXELS, ZERO_IMAGE
from .image_fusion import static_views, tiled_views
from .layout_fusion import Layout, Row, collate
from .text_fusion import (
    ANSWERING,
    ASKING,
    CLOSED,
    IMAGE,
    IMAGE_TAG,
    WAITING,
    Chat,
    ChatText,
    Encoded,
    SentencePieceText,
    check_images,
    read_messages,
)

# Keys of processor_config.json, and their defaults.
SETTINGS = {
    "template": None,
    "bos_token_id": None,
    "image_size": 384,
    "image_tokens": 576,
    "latent_count": 0,
    "text_guided": True,
    "quadrants": False,
    "zero_image_for_text": False,
    "hide_question_id_zero": False,
    "image_first": False,
    "first_guides": False,
    "tile_grids": [],
    "tile_tokens": 0,
    "sentencepiece": False,
}
# Arguments of other processors without effect here: a row always begins as in training.
_WITHOUT_EFFECT = ("add_special_tokens", "return_attention_mask", "return_token_type_ids", "return_mm_token_type_ids")
_OTHERS = ("videos", "audio", "tools")


class FusionProcessor(ProcessorMixin):
    """Turns conversations and images into the model's inputs.

    A conversation is a list of {"role": "user" | "assistant", "content": text or list of parts}. A part is
    {"type": "text", "text": ...} or {"type": "image"}, which may contain its picture as "image", "url", "path" or
    "base64", or {"type": "image_url", "image_url": {"url": ...}}. `image_fusion.to_rgb` lists the kinds of pictures. A
    conversation has at most one image. A first message of role "system" replaces the template's own system text, if the
    template has a place for one. A conversation that ends with the user waits for an answer; one that ends with the
    assistant is a training row and gets labels.

    `image_token` marks the position of the image in a text; `image_token_id` is the id at all visual positions.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"
    image_token = IMAGE_TAG

    def __init__(
        self,
        tokenizer=None,
        template=None,
        bos_token_id=None,
        image_size=384,
        image_tokens=576,
        latent_count=0,
        text_guided=True,
        quadrants=False,
        zero_image_for_text=False,
        hide_question_id_zero=False,
        image_first=False,
        first_guides=False,
        tile_grids=(),
        tile_tokens=0,
        sentencepiece=False,
        chat_template=None,
    ):
        """Args:
        template: dict of system, question, answer, end, between; system_frame (before and after a conversation's own
          system text), or None; trims (those of system, question and answer that lose surrounding white space).
        bos_token_id: the id before every conversation; None for none.
        latent_count: latents of a round; 0 for a model without latents.
        tile_grids: (rows, columns) of dynamic resolution. tile_tokens: of each tile.
        sentencepiece: only the folder's tokenizer.model gives the ids of training, not its tokenizer.json.
        """
        super().__init__(tokenizer, chat_template=chat_template)
        values = locals()
        for name in SETTINGS:
            setattr(self, name, values[name])
        self.tile_grids = [tuple(grid) for grid in tile_grids]
        self.sentencepiece_model: bytes | None = None
        self._added = dict(tokenizer.added_tokens_decoder)
        self._sentencepiece: SentencePieceText | None = None
        self._text = ChatText(
            template,
            self.encode,
            [] if bos_token_id is None else [bos_token_id],
            bool(latent_count),
            zero_image_for_text,
            text_guided,
            first_guides,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.sentencepiece:
            names = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
            where = {name: kwargs[name] for name in names if name in kwargs}
            processor._use_sentencepiece(
                Path(cached_file(pretrained_model_name_or_path, "tokenizer.model", **where)).read_bytes()
            )
        return processor

    def _use_sentencepiece(self, model: bytes) -> None:
        self._sentencepiece = SentencePieceText(model, self.tokenizer)
        self.sentencepiece_model = model

    def save_pretrained(self, save_directory, **kwargs):
        saved = super().save_pretrained(save_directory, **kwargs)
        if self.sentencepiece_model is not None:
            (Path(save_directory) / "tokenizer.model").write_bytes(self.sentencepiece_model)
        return saved

    def to_dict(self, **_):
        values = {name: getattr(self, name) for name in (*SETTINGS, "auto_map") if hasattr(self, name)}
        return {**values, "processor_class": type(self).__name__}

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def model_input_names(self):
        names = ["input_ids", "attention_mask", "visual_index", "pixel_values", "image_kind", "question_ids"]
        return [*names, "question_mask", "round_image", "round_end", "latent_start", "tilings"]

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """Generated ids (B, S) as texts."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Encodes `text` to ids; after an added token (id `after`) it has no word prefix, and may lose white space."""
        token = self._added.get(after)
        if token is None:
            return self._ids(text)
        return self._ids(token.content + text)[len(self._ids(token.content)) :]

    def _ids(self, text: str) -> list[int]:
        if self._sentencepiece is not None:
            return self._sentencepiece(text)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(
        self,
        conversations=None,
        images=None,
        latent_count=None,
        padding_side=None,
        return_tensors="pt",
        text=None,
        padding=True,
        truncation=False,
        max_length=None,
        pad_to_multiple_of=None,
        **options,
    ) -> BatchFeature:
        """Returns the model's inputs.

        Args:
          conversations: one conversation or a list of them, or the prompts that `apply_chat_template` returns for them.
            `text` is another name for it. A text that is not such a prompt is a question if it has an image; otherwise
            it follows a prompt (an answer with its end) and is tokenized as it would be there.
          images: those that the conversations do not contain: a list for each, or one list of all in the order of
            their positions, or one image for each. An image is a PIL image, array, tensor, bytes, path, URL or base64.
          latent_count: l^2, by default the model's own.
          padding: True or "longest", "max_length" (which needs max_length), or False, with which only rows of equal
            length become tensors. padding_side: by default the tokenizer's; generation needs "left".
          truncation: cuts the ends of rows to max_length positions, but only within an answer or after one: a round
            whose question or visual positions would be cut is removed whole.
          return_tensors: "pt", "np", or None for lists.

        Raises:
          ValueError: an argument is wrong, or the image or the last question would be cut.
        """
        options = flat(options)
        padding, truncation, max_length, pad_to_multiple_of, padding_side, return_tensors = (
            options.pop(name, value)
            for name, value in (
                ("padding", padding),
                ("truncation", truncation),
                ("max_length", max_length),
                ("pad_to_multiple_of", pad_to_multiple_of),
                ("padding_side", padding_side),
                ("return_tensors", return_tensors),
            )
        )
        masks = options.pop("return_assistant_tokens_mask", False)
        prompt = options.pop("add_generation_prompt", True)
        goes_on = options.pop("continue_final_message", False)
        for name in _OTHERS:
            if options.pop(name, None):
                raise ValueError(f"{name}: this model takes texts and images only.")
        unknown = sorted(set(options) - set(_WITHOUT_EFFECT))
        if unknown:
            raise TypeError(f"The processor has no argument {', '.join(unknown)}.")
        if is_image(conversations) or (conversations is None and text is None):
            conversations, images = (images, conversations) if images is not None else (text, conversations)
        conversations = text if conversations is None else conversations
        conversations, images = batch(conversations, images)

        count = self.latent_count if latent_count is None or not self.latent_count else latent_count
        limit = self._limit(max_length) if truncation and truncation != "do_not_truncate" else None
        rows = []
        for conversation, own in zip(conversations, images):
            encoded, image, end = self._encoded(conversation, own, prompt, goes_on)
            rows.append(self._row(encoded, image, end, count, limit))
        layout = Layout(
            self.tokenizer.pad_token_id,
            self.image_size,
            count,
            self.quadrants,
            self.text_guided,
            self.hide_question_id_zero,
            bool(self.tile_grids),
        )
        side = padding_side or self.tokenizer.padding_side
        return collate(rows, layout, side, padding, max_length, pad_to_multiple_of, return_tensors, masks)

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tokenize=False,
        images=None,
        add_generation_prompt=False,
        continue_final_message=False,
        return_dict=True,
        processor_kwargs=None,
        **kwargs,
    ):
        """Returns the readable prompts of conversations, or with `tokenize` the model's inputs.

        Args:
          conversation: one conversation or a list of them.
          images, and others: as for the processor itself.
          add_generation_prompt: whether the header of an answer follows a final question.
          continue_final_message: whether the last answer is left open.
          return_dict: False for input_ids only.
          kwargs: others are ignored.
        """
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        ways = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        own = chat_template in (None, self.chat_template)
        if kwargs.get("tools"):
            raise ValueError("The model's chat template does not support tools.")
        if tokenize:
            if not own:
                raise ValueError("The ids follow the model's own template; render another one with tokenize=False.")
            names = ("latent_count", "padding_side", "return_tensors", "padding", "truncation", "max_length")
            names += ("pad_to_multiple_of", "return_assistant_tokens_mask", *GROUPS)
            options = {**{name: kwargs[name] for name in names if name in kwargs}, **(processor_kwargs or {}), **ways}
            if options.get("return_assistant_tokens_mask"):  # trainers that use it expect lists
                options.setdefault("return_tensors", None)
            inputs = self(conversation, options.pop("images", images), **options)
            return inputs if return_dict else inputs["input_ids"]
        if not own:
            return self.tokenizer.apply_chat_template(
                conversation, chat_template=chat_template, tokenize=False, **ways, **kwargs
            )
        conversations, images = batch(conversation, images)
        prompts = [
            self._encoded(c, i, add_generation_prompt, continue_final_message, rendered=True)[0].prompt
            for c, i in zip(conversations, images)
        ]
        return prompts if many else prompts[0]

    def _limit(self, max_length: int | None) -> int | None:
        """Largest number of positions of a row; None without a limit."""
        own = self.tokenizer.model_max_length
        return max_length if max_length is not None else own if own < 1 << 40 else None

    def _encoded(
        self, conversation, images: list, prompt: bool, goes_on: bool, rendered: bool = False
    ) -> tuple[Encoded, Any, str]:
        """The ids and labels, the image or None, and how the conversation ends.

        Args:
          rendered: whether only the prompt is needed, so that the image may be missing.
        """
        if isinstance(conversation, str):
            text = conversation
            bos = self.tokenizer.bos_token if self.bos_token_id is not None else None
            if bos and text.startswith(bos) and not self._text.is_prompt(text):
                text = text.removeprefix(bos)
            if self._text.is_prompt(text) or (images and self._text.has_marks(text)):
                chat = self._text.read(text)
                places = sum(question.count(IMAGE_TAG) for question, _ in chat.rounds)
                check_images(places, len(images))
                if images and not places:
                    raise ValueError(
                        "The text has no place for its image: give the message an image part before "
                        f"apply_chat_template, or write {IMAGE_TAG} at the start of a question."
                    )
            elif images or IMAGE_TAG in text:
                chat, _ = read_messages([{"role": "user", "content": text}], images, self._text)
            else:
                return self._text.continued(text), None, WAITING
            return self._text.encoded(chat), images[0] if images else None, chat.end
        if rendered and not images and places_of(conversation):
            images = [None]
        chat, image = read_messages(conversation, images, self._text)
        if goes_on:
            if chat.end != CLOSED:
                raise ValueError("continue_final_message needs a conversation that ends with the assistant.")
            chat = Chat(chat.system, chat.rounds, ANSWERING)
        elif chat.end == WAITING and not prompt:
            chat = Chat(chat.system, chat.rounds, ASKING)
        return self._text.encoded(chat), image, chat.end

    def views(self, image) -> tuple[np.ndarray, list[int]]:
        """Views of an image, (V, size, size, 3) uint8: its quadrants or tiles, and the whole image last.

        With dynamic resolution the second value holds the rows and columns of tiles, and top, bottom, left and right of
        the tokens that show a part of the image; otherwise it is empty.
        """
        if not self.tile_grids:
            return static_views(image, self.image_size, self.quadrants), []
        views, tiling = tiled_views(image, self.image_size, self.tile_grids)
        box = tiling.box(self.image_size, math.isqrt(self.tile_tokens)) if tiling.rows else (0, 0, 0, 0)
        return views, [tiling.rows, tiling.columns, *box]

    def _row(self, encoded: Encoded, image, end: str, count: int, limit: int | None) -> Row:
        """One conversation laid out from position 0."""
        has_image = IMAGE in encoded.ids
        views, tiling = self.views(image) if has_image else (None, [0] * 6 if self.tile_grids else [])
        row = Row(encoded, views, tiling, NO_IMAGE, end == CLOSED)
        row.fill(
            self.image_tokens,
            most_tokens(self.tile_grids, self.tile_tokens),
            count,
            self.image_first,
            self.tokenizer.pad_token_id,
        )
        if has_image:
            row.kind = PIXELS
        elif self.zero_image_for_text and row.start:
            row.kind = ZERO_IMAGE
        if limit is not None:
            row.cut(limit)
        return row
