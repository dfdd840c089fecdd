"""Changes the text that guides the vision encoder, to find out whether answers depend on it.

The language model always reads the question itself. The encoder reads it as well (`question`, as in training), another
question of the same benchmark (`other`), or nothing (`none`).
"""

import dataclasses
import random

from fusion_jax.errors import UserError
from fusion_jax.evals.prepare import Prepared

GUIDES = ("question", "other", "none")


def guided_by(prepared: Prepared, guide: str) -> Prepared:
    """The same task with questions whose `guide` is set.

    Args:
      guide: one of GUIDES.

    Raises:
      UserError: no question has another one to be guided by, since all have the same words.
    """
    if guide == "question":
        return prepared
    texts = [question.prompt.replace("<image>", "").strip() for question in prepared.questions]
    guides = [""] * len(texts) if guide == "none" else _other_texts(texts, prepared.task.name)
    questions = [dataclasses.replace(question, guide=text) for question, text in zip(prepared.questions, guides)]
    return dataclasses.replace(prepared, questions=questions)


def _other_texts(texts: list[str], task: str) -> list[str]:
    """For each text one that differs from it, drawn in proportion to how often it occurs; always the same draw."""
    if len(set(texts)) < 2:
        raise UserError(f"{task}: all questions have the same words, so no other one can guide the encoder.")
    draw, others = random.Random(0), []
    for text in texts:
        while (other := draw.choice(texts)) == text:
            pass
        others.append(other)
    return others
