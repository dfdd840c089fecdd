"""Trains an exported folder with TRL, a few steps each way, on conversations with images; see soak_trl.py.

Prints a line for each way: what the first batch trains on, first and last loss. Run as `python trl_runs.py FOLDER`.
"""

import math
import sys
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
STEPS = 8


def rows(make) -> Dataset:
    """Eight, of two colours, two shapes and questions of three lengths."""
    found = []
    for k, colour in enumerate(list(COLOURS) * 4):
        image = Image.new("RGB", (40, 30) if k % 3 else (30, 60), COLOURS[colour])
        question = [{"role": "user", "content": "What colour is it?" + " Please." * (k % 3)}]
        say = lambda word: [{"role": "assistant", "content": f"It is {word}."}]  # noqa: E731
        found.append({"images": [image], **make(question, say, colour, "blue" if colour == "red" else "red")})
    return Dataset.from_list(found)


MESSAGES = rows(lambda question, say, colour, _: {"messages": question + say(colour)})
COMPLETIONS = rows(lambda question, say, colour, _: {"prompt": question, "completion": say(colour)})
PAIRS = rows(lambda q, say, colour, other: {"prompt": q, "chosen": say(colour), "rejected": say(other)})


def main(folder: str) -> None:
    torch.set_num_threads(1)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def load():
        return transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

    def lora(target):
        return LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")

    common = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 5e-3, "logging_steps": 1}
    common |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "max_length": 256}
    common |= {"lr_scheduler_type": "constant", "disable_tqdm": True}
    ways = {
        "sft_messages": (trl.SFTTrainer, trl.SFTConfig, MESSAGES, {}, {}),
        "sft_answers": (trl.SFTTrainer, trl.SFTConfig, MESSAGES, {"assistant_only_loss": True}, {}),
        "sft_completions": (trl.SFTTrainer, trl.SFTConfig, COMPLETIONS, {}, {}),
        "sft_lora": (trl.SFTTrainer, trl.SFTConfig, COMPLETIONS, {}, {"peft_config": lora(["q_proj", "v_proj"])}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}, {"ref_model": load()}),
        "dpo_lora": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}, {"peft_config": lora("all-linear")}),
    }
    print(f"transformers {transformers.__version__}, trl {trl.__version__}")
    for name, (trainer, config, data, options, more) in ways.items():
        with tempfile.TemporaryDirectory() as out:
            args = config(output_dir=out, **common, **options)
            run = trainer(load(), args=args, train_dataset=data, processing_class=processor, **more)
            batch = next(iter(run.get_train_dataloader()))
            if name.startswith("sft") and name != "sft_messages":  # DPO has no labels, and messages train on all
                said = [processor.tokenizer.decode(line[line >= 0]) for line in batch["labels"]]
                assert all(text in ("It is red.<|end|>", "It is blue.<|end|>") for text in said), said
            before = {key: p.detach().clone() for key, p in run.model.named_parameters() if p.requires_grad}
            run.train()
            losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
            assert len(losses) == STEPS and all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
            encoder = {key: p for key, p in run.model.named_parameters() if key in before and "vision_tower" in key}
            assert encoder and all((p != before[key]).any() for key, p in encoder.items())
            print(f"{name}: {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
