"""Conversations and images to the inputs of an exported model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from .configuration_fusion import IGNORE, NO_IMAGE, PIXELS, QUADRANTS, ZERO_IMAGE
from .image_fusion import is_deep_colour, open_image, to_rgb

try:  # only tokenizers that come as tokenizer.model need it
    import sentencepiece
except ImportError:
    sentencepiece = None

IMAGE_TAG = "<image>"  # how a turn's text says that it carries the image
VISION_START, VISION_END = "<vision_start>", "<vision_end>"  # frame every visual place
# Stand-ins in a row of ids until the layout fills the places.
IMAGE, LATENTS = -200, -300
SPACE = "▁"  # SentencePiece's visible stand-in for a space


class SentencePieceText:
    """Text to ids exactly as the model was trained: SentencePiece, added tokens cut out first, longest match first.

    One "▁" goes before each text and is dropped where a special token opens it. transformers' fast conversion of the
    same tokenizer.model differs where white space comes in runs or next to added tokens.
    """

    def __init__(self, model: bytes, tokenizer):
        if sentencepiece is None:
            raise ImportError("This model's tokenizer.model needs the package: pip install sentencepiece")
        # A protobuf message may be continued: normalizer_spec { add_dummy_prefix: false }; the last value wins.
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        self.added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        names = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.splitter = re.compile("(" + "|".join(names) + ")")
        self.guard = tokenizer.unk_token or self.model.id_to_piece(self.model.unk_id())
        self.guard_length = len(self.model.encode(self.guard))

    def __call__(self, text: str) -> list[int]:
        if not text:
            return []
        # Odd places hold added tokens, even places the text between them.
        parts = self.splitter.split(SPACE + text.replace(SPACE, " "))
        for k in range(1, len(parts), 2):
            token = self.added[parts[k]][1]
            if token.lstrip:
                parts[k - 1] = parts[k - 1].rstrip()
            if token.rstrip:
                parts[k + 1] = parts[k + 1].lstrip()
        if len(parts) > 1 and parts[0] == SPACE and self.added[parts[1]][1].special:
            parts[0] = ""
        ids = []
        for k, part in enumerate(parts):
            if k % 2:
                ids.append(self.added[part][0])
            elif part.startswith((SPACE, " ")):
                # Some models trim white space in front of what they are given: give them something else in front.
                ids += self.model.encode(self.guard + part)[self.guard_length :]
            elif part:
                ids += self.model.encode(part)
        return ids


class FusionProcessor(ProcessorMixin):
    """Conversations and images to the model's inputs.

    A conversation is a list of {"role": "user" | "assistant", "content": text or list of parts}, a part being
    {"type": "text", "text": ...} or {"type": "image"}, which may carry its picture as "image" (PIL) or "path". At most
    one image a conversation. A first message of role "system" takes the place of the template's own system text, where
    the template can hold one. A conversation that ends with the user waits for an answer; one that ends with the
    assistant is a training row and gets labels.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

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
        chat_template=None,
    ):
        """latent_count 0: the model has no latents. bos_token_id: stands in front of every conversation, None: nothing
        does. template: dict of system, question, answer, end, between; system_frame (before and after a conversation's
        own system text), or None; trims (which of system, question and answer lose the white space around them)."""
        super().__init__(tokenizer, chat_template=chat_template)
        self.template = template
        self.bos_token_id = bos_token_id
        self.image_size = image_size
        self.image_tokens = image_tokens
        self.latent_count = latent_count
        self.text_guided = text_guided
        self.quadrants = quadrants
        self.zero_image_for_text = zero_image_for_text
        self.hide_question_id_zero = hide_question_id_zero
        self.image_first = image_first
        self.sentencepiece_model: bytes | None = None
        self._added = dict(tokenizer.added_tokens_decoder)
        self._encode: Any = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        where = {
            k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only", "subfolder") if k in kwargs
        }
        path = cached_file(
            pretrained_model_name_or_path, "tokenizer.model", _raise_exceptions_for_missing_entries=False, **where
        )
        if path is not None:
            processor._use_sentencepiece(Path(path).read_bytes())
        return processor

    def _use_sentencepiece(self, model: bytes) -> None:
        try:
            self._encode = SentencePieceText(model, self.tokenizer)
            self.sentencepiece_model = model
        except RuntimeError:
            pass  # some folders hold a file of this name that is no SentencePiece model, beside tokenizer.json

    def save_pretrained(self, save_directory, **kwargs):
        saved = super().save_pretrained(save_directory, **kwargs)
        if self.sentencepiece_model is not None:
            (Path(save_directory) / "tokenizer.model").write_bytes(self.sentencepiece_model)
        return saved

    def to_dict(self):
        names = ("template", "bos_token_id", "image_size", "image_tokens", "latent_count", "text_guided", "quadrants")
        names += ("zero_image_for_text", "hide_question_id_zero", "image_first", "auto_map")
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {**values, "processor_class": type(self).__name__}

    @property
    def model_input_names(self):
        names = ["input_ids", "attention_mask", "visual_index", "pixel_values", "image_kind"]
        return [*names, "question_ids", "question_mask", "round_image", "round_end", "latent_start"]

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Ids of `text`; behind an added token (id `after`) there is no word prefix, and it may swallow white space."""
        token = self._added.get(after)
        if token is None:
            return self._encode(text)
        return self._encode(token.content + text)[len(self._encode(token.content)) :]

    def __call__(
        self, conversations=None, images=None, latent_count=None, padding_side="left", return_tensors="pt", text=None
    ) -> BatchFeature:
        """The model's inputs.

        Args:
          conversations: one conversation or a list of them; `text` is another name for it.
          images: one image (PIL or path), list of one, or None per conversation, where they do not carry it themselves.
          latent_count: l^2, by default the model's own.
          padding_side: generation needs "left".
        """
        conversations = text if conversations is None else conversations
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; only 'pt' is.")
        if conversations and not isinstance(conversations[0], list | tuple):
            conversations = [conversations]
            images = [images]
        images = list(images) if images is not None else [None] * len(conversations)
        if len(images) != len(conversations):
            raise ValueError(f"{len(images)} images for {len(conversations)} conversations: give one or None for each.")
        count = self.latent_count if latent_count is None or not self.latent_count else latent_count
        return self._collate([self._row(c, i, count) for c, i in zip(conversations, images)], count, padding_side)

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False, images=None, **kwargs):
        """The readable prompt, or with `tokenize` the model's inputs. Options that other processors need to get there
        (add_generation_prompt, return_dict, padding, ...) may be given and change nothing."""
        options = {k: kwargs[k] for k in ("latent_count", "padding_side", "return_tensors") if kwargs.get(k)}
        if tokenize:
            return self(conversation, images, **options)
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        conversations = conversation if many else [conversation]
        images = images if many and images is not None else [images] * len(conversations)
        prompts = [self._row_text(c, i)[0]["prompt"] for c, i in zip(conversations, images)]
        return prompts if many else prompts[0]

    def _system(self, messages) -> str:
        """What stands before the first round."""
        first = messages[0] if messages else {}
        content = first.get("content") if first.get("role") == "system" else None
        said = content if isinstance(content, str) else "".join(part["text"] for part in content or [])
        if not said:
            return self.template["system"]
        if not self.template.get("system_frame"):
            raise ValueError("The model's chat template cannot hold a system message.")
        before, behind = self.template["system_frame"]
        return before + self._trimmed("system", said) + behind

    def _trimmed(self, part: str, text: str) -> str:
        return text.strip() if part in self.template.get("trims", ()) else text

    def _rounds(self, messages, image) -> tuple[list[tuple[str, str | None]], bool, Any]:
        """(question, answer or None) pairs, whether there is an image, and the image. The question that carries it
        starts with the tag and a newline."""
        turns, images = [], list(image) if isinstance(image, list | tuple) else [image] * (image is not None)
        for k, message in enumerate(messages):
            role, content, said = message.get("role"), message.get("content"), ""
            if role == "system" and k == 0:
                continue
            if role not in ("user", "assistant"):
                raise ValueError(f"A turn's role is {role!r}; allowed are user and assistant, and system at the start.")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part.get("type") == "text":
                    said += part["text"]
                elif part.get("type") == "image":
                    said += IMAGE_TAG
                    images += [part[key] for key in ("image", "path") if part.get(key) is not None]
                else:
                    raise ValueError(f"A part's type is {part.get('type')!r}; allowed are text and image.")
            turns.append((role, said))
        turns = turns[1:] if turns and turns[0][0] == "assistant" else turns
        if not turns or any(role != ("user", "assistant")[k % 2] for k, (role, _) in enumerate(turns)):
            raise ValueError("A conversation must alternate between user and assistant and hold a user's turn.")
        questions, answers = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
        tags = [question.count(IMAGE_TAG) for question in questions]
        if sum(tags) > 1 or len(images) > 1:
            raise ValueError(f"{max(sum(tags), len(images))} images; one image per conversation is supported.")
        if sum(tags) and not images:
            raise ValueError("The conversation says where its image goes, but there is no image.")
        if images:
            owner = tags.index(1) if sum(tags) else 0
            questions[owner] = f"{IMAGE_TAG}\n{questions[owner].replace(IMAGE_TAG, '').strip()}"
        rounds = [(question, answers[k] if k < len(answers) else None) for k, question in enumerate(questions)]
        return rounds, bool(images), images[0] if images else None

    def _row_text(self, messages, image) -> tuple[dict, list, bool, Any]:
        rounds, has_image, image = self._rounds(messages, image)
        return self._tokenize(rounds, has_image, self._system(messages)), rounds, has_image, image

    def _tokenize(self, rounds, has_image: bool, system: str | None = None) -> dict:
        """Cuts the text at placeholders and at answers and tokenizes each piece by itself, BOS in front where the model
        has one. `system`: what stands before the first round, by default the template's own."""
        template, front = self.template, [] if self.bos_token_id is None else [self.bos_token_id]
        ids, labels, ends, prompt = [*front], [IGNORE] * len(front), [], []
        pending, after = "", None  # text that waits, and the id it follows; None where a piece starts

        def say(text: str) -> None:
            nonlocal pending
            pending += text
            prompt.append(text)

        def flush() -> None:
            nonlocal pending, after
            new = self.encode(pending, after)
            ids.extend(new)
            labels.extend([IGNORE] * len(new))
            pending, after = "", ids[-1]

        def placeholder(marker: int, tag: str) -> None:
            nonlocal after
            say(VISION_START)
            flush()
            ids.append(marker)
            labels.append(IGNORE)
            prompt.append(tag)
            after = None
            say(VISION_END)

        say(template["system"] if system is None else system)
        for k, (question, answer) in enumerate(rounds):
            question = self._trimmed("question", question)
            say((template["between"] if k else "") + template["question"])
            if self.latent_count and (has_image or self.zero_image_for_text):
                placeholder(LATENTS, "<latent_image>")
            if question.startswith(IMAGE_TAG) and has_image:
                placeholder(IMAGE, IMAGE_TAG)
                question = question.removeprefix(IMAGE_TAG)
            say(question + template["answer"])
            flush()
            ends.append(len(ids) - 1)
            if answer is not None:
                answer = self._trimmed("answer", answer)
                prompt.append(answer + template["end"])
                new = self.encode(answer + template["end"], after)
                ids.extend(new)
                labels.extend(new)
                after = new[-1]
        question_ids = []
        if has_image and self.text_guided:
            texts = [question.removeprefix(IMAGE_TAG).strip() for question, _ in rounds]
            question_ids = [*front, *self.encode("".join(texts))]
        return {"ids": ids, "labels": labels, "ends": ends, "question_ids": question_ids, "prompt": "".join(prompt)}

    def crops(self, image) -> np.ndarray:
        """(V, size, size, 3) uint8: the quadrants of the image at twice the size, if the model uses them, and the whole
        image last. Both sizes are resized from the original, bicubically and without keeping the aspect ratio."""
        size = self.image_size
        # A rotation noted in EXIF data is not applied, as in training.
        image = to_rgb(image, is_deep_colour(image)) if isinstance(image, Image.Image) else open_image(image)
        whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[None]
        if not self.quadrants:
            return whole.copy()
        double = np.asarray(image.resize((2 * size, 2 * size), Image.Resampling.BICUBIC))
        quadrants = double.reshape(2, size, 2, size, 3).transpose(0, 2, 1, 3, 4).reshape(4, size, size, 3)
        return np.concatenate([quadrants, whole])

    def _row(self, messages, image, count: int) -> dict:
        """One conversation laid out from position 0."""
        text, rounds, has_image, image = self._row_text(messages, image)
        # The first visual place of the image's round holds the image, the latents follow: the published order. With
        # `image_first` it is that of the conversation.
        markers = [token for token in text["ids"] if token < 0]
        if IMAGE in markers:
            place = markers.index(IMAGE)
            markers.insert(0 if self.image_first else max(place - 1, 0), markers.pop(place))
        row = {"ids": [], "labels": [], "visual": [], "end": [], "start": [], "question": text["question_ids"]}
        for i, (token, label) in enumerate(zip(text["ids"], text["labels"])):
            if i in text["ends"]:
                row["end"].append(len(row["ids"]))
            places = [-1]
            if token < 0:
                if markers.pop(0) == IMAGE:
                    places = range(self.image_tokens)
                else:
                    first = self.image_tokens + len(row["start"]) * count
                    row["start"].append(len(row["ids"]))
                    places = range(first, first + count)
                token = self.tokenizer.pad_token_id
            row["visual"] += places
            row["ids"] += [token] * len(places)
            row["labels"] += [label] * len(places)
        row["finished"] = rounds[-1][1] is not None
        row["crops"] = self.crops(image) if has_image else None
        row["kind"] = PIXELS if has_image else ZERO_IMAGE if self.zero_image_for_text and row["start"] else NO_IMAGE
        return row

    def _collate(self, rows: list[dict], count: int, side: str) -> BatchFeature:
        length, size = max(len(row["ids"]) for row in rows), self.image_size
        shifts = [length - len(row["ids"]) if side == "left" else 0 for row in rows]

        def padded(key: str, value: int, width: int = length, shift: bool = False) -> Tensor:
            """The rows' lists as one tensor; `shift`: they hold positions, else they are moved to their place."""
            out = torch.full((len(rows), width), value)
            for line, row, start in zip(out, rows, shifts):
                values = torch.tensor(row[key][:width], dtype=torch.long)
                if shift:
                    line[: len(values)] = values + start
                else:
                    line[(start if width == length else 0) :][: len(values)] = values
            return out

        data = {"input_ids": padded("ids", self.tokenizer.pad_token_id)}
        data["attention_mask"] = torch.zeros_like(data["input_ids"])
        for line, row, start in zip(data["attention_mask"], rows, shifts):
            line[start : start + len(row["ids"])] = 1
        if any(row["finished"] for row in rows):
            data["labels"] = padded("labels", IGNORE)
        if all(row["kind"] == NO_IMAGE for row in rows):
            return BatchFeature(data)

        data["visual_index"] = padded("visual", -1)
        pixels = torch.zeros((len(rows), 1, QUADRANTS * self.quadrants + 1, 3, size, size))
        for view, row in zip(pixels[:, 0], rows):
            if row["crops"] is not None:
                view.copy_(torch.from_numpy(row["crops"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        data["pixel_values"] = pixels
        data["image_kind"] = torch.tensor([[row["kind"]] for row in rows])
        if self.text_guided:
            width = max(1, *(len(row["question"]) for row in rows))
            question = torch.zeros((len(rows), 1, width), dtype=torch.long)
            mask = torch.zeros_like(question, dtype=torch.bool)
            for ids, real, row in zip(question[:, 0], mask[:, 0], rows):
                ids[: len(row["question"])] = torch.tensor(row["question"], dtype=torch.long)
                real[: len(row["question"])] = True
            # The published code pads with 0 and takes every id 0 for padding.
            data["question_ids"] = question
            data["question_mask"] = mask & (question != 0) if self.hide_question_id_zero else mask
        if self.latent_count:
            rounds = max(len(row["start"]) for row in rows)
            data["latent_start"] = padded("start", -1, rounds, shift=True)
            data["round_end"] = padded("end", -1, rounds, shift=True)
            data["round_image"] = torch.where(data["latent_start"] >= 0, 0, -1)
        return BatchFeature(data)
