"""Answers held-out questions with an exported folder, in PyTorch and without JAX or fusion_jax.

    python tests/interop/answer_in_torch.py EXPORTED DATA OUT.json

DATA/held_out.json is in LLaVA format; OUT.json gets a list of answers, in order.
"""

import json
import sys
from pathlib import Path

# Whoever imports these fails: an exported folder must stand alone.
for name in ("jax", "jaxlib", "flax", "fusion_jax"):
    sys.modules[name] = None

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor  # noqa: E402

BATCH = 16


def main(folder: str, data: Path, out: Path) -> None:
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    records = json.loads((data / "held_out.json").read_text())
    answers = []
    for start in range(0, len(records), BATCH):
        chats, images = [], []
        for record in records[start : start + BATCH]:
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            chats.append([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}])
            images.append([Image.open(data / record["image"])])
        inputs = processor(chats, images=images)
        new = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    out.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
