"""Runs a language or vision model in this process through vLLM, for the workers of a cluster.

Each sample is processed by a thread that makes one request at a time, but vLLM is fast on large batches. So the
requests of all threads are gathered and passed on together, as soon as the previous batch is done.
"""

import base64
import io
import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from PIL import Image

from fusion_jax.errors import UserError, first_line
from fusion_jax.synth.backends.base import Reply, Unusable
from fusion_jax.synth.backends.config import ModelConfig


class Gatherer:
    """Calls a function on a list for callers that each have one item."""

    def __init__(self, work: Callable[[list[Any]], list[Any]], most: int):
        """Args: work: items -> results, in order. most: items at a time."""
        self._work, self._most = work, most
        self._waiting: queue.SimpleQueue[tuple[Any, Future]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, item: Any) -> Any:
        """The item's result. Raises the error of the work."""
        done: Future = Future()
        self._waiting.put((item, done))
        return done.result()

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._most:
                try:
                    # The callers are threads that were all woken by the last batch, so most arrive within moments.
                    batch.append(self._waiting.get(timeout=0.01))
                except queue.Empty:
                    break
            try:
                results = self._work([item for item, _ in batch])
            except BaseException as e:
                if len(batch) == 1:
                    batch[0][1].set_exception(e)
                else:
                    self._one_by_one(batch)
            else:
                for (_, done), result in zip(batch, results):
                    done.set_result(result)

    def _one_by_one(self, batch: list[tuple[Any, Future]]) -> None:
        """Repeats a failed batch item by item: if one item caused the failure, the others then succeed."""
        for item, done in batch:
            try:
                done.set_result(self._work([item])[0])
            except BaseException as e:
                done.set_exception(e)


class VllmModel:
    """A language or vision model; its attributes are those of `LanguageModel` and `VisionModel`."""

    paid = True  # in time

    def __init__(self, config: ModelConfig):
        """Loads the model. Raises UserError where the package, files or memory are missing."""
        try:
            import vllm
            from vllm.sampling_params import StructuredOutputsParams
        except ImportError as e:
            raise UserError(
                "backend='vllm' needs the package vllm (0.11 or newer) on this machine: pip install vllm, "
                "or use backend='endpoint' with a vLLM server."
            ) from e
        self.name = config.model
        self.settings = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        self._vllm, self._structured = vllm, StructuredOutputsParams
        self._use_schema = config.structured == "json_schema"
        try:
            self._llm = vllm.LLM(model=config.model, limit_mm_per_prompt={"image": 2})
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"vLLM cannot load {config.model!r}: {first_line(e)}") from e
        self._gather = Gatherer(self._answer, config.concurrency)

    def chat(self, messages: list[dict], schema: dict | None, seed: int, purpose: str, data: dict) -> Reply:
        """See `LanguageModel.chat`."""
        del purpose, data
        return self._ask(messages, schema, seed)

    def verify(
        self, images: list[Image.Image], messages: list[dict], question: str, answer: str, seed: int, data: dict
    ) -> Reply:
        """See `VisionModel.verify`."""
        del question, answer, data
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _png_url(image)}} for image in images]
        parts.append({"type": "text", "text": messages[-1]["content"]})
        return self._ask([*messages[:-1], {"role": "user", "content": parts}], None, seed)

    def _ask(self, messages: list[dict], schema: dict | None, seed: int) -> Reply:
        try:
            return self._gather((messages, schema, seed))
        except ValueError as e:  # for instance a prompt longer than the model's context
            raise Unusable("bad_request", " ".join(str(e).split())[:300]) from e

    def _answer(self, requests: list[tuple[list[dict], dict | None, int]]) -> list[Reply]:
        options = []
        for _, schema, seed in requests:
            form = self._structured(json=json.dumps(schema)) if schema and self._use_schema else None
            options.append(self._vllm.SamplingParams(seed=seed, structured_outputs=form, **self.settings))
        outputs = self._llm.chat([messages for messages, _, _ in requests], options, use_tqdm=False)
        return [
            Reply(one.outputs[0].text, None, len(one.prompt_token_ids or ()), len(one.outputs[0].token_ids))
            for one in outputs
        ]


def _png_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
