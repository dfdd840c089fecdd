"""The ways in which people use an exported model, each held against its plain answers. It needs torch and transformers
alone, so that it also runs where another version of transformers is installed.

    python tests/interop/ways.py FOLDER [WAY ...]    prints a line for each way; exit code 1 if one is not right
"""

import copy
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
NEW = 6
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Plain:
    """The model as it is loaded, a padded batch of two conversations with an image each, and the answers."""

    def __init__(self, folder: str | Path):
        self.folder = folder
        self.model, self.inputs = self.load(), None
        self.inputs = inputs_for(self.model.config, [(3, 1), (0, 1)])
        self.length = self.inputs["input_ids"].shape[1]
        self.labels = torch.where(self.inputs["attention_mask"] > 0, self.inputs["input_ids"], -100)
        self.labels[:, :-5] = -100
        with torch.no_grad():
            self.logits = self.model(**self.inputs).logits
        self.answers = self.generate(self.model)

    def load(self, **options):
        return AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=True, **options).eval()

    def generate(self, model, inputs=None, **options):
        inputs = self.inputs if inputs is None else inputs
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, **options}
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    def check(self, model, atol: float = 1e-5, generates: bool = True) -> None:
        with torch.no_grad():
            close(model(**self.inputs).logits, self.logits, atol)
        if generates:
            assert torch.equal(self.generate(model), self.answers), "it generates other tokens"


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found.detach().float(), expected.detach(), rtol=0, atol=atol)


def inputs_for(config, rows, seed: int = 0) -> dict:
    """Rows of (padding on the left, whether there is an image), with one round each; with dynamic resolution the first
    row's image has tiles."""
    draw = torch.Generator().manual_seed(seed)
    table, latents = config.table_tokens, config.latent_count
    length, b = max(padding for padding, _ in rows) + 2 + table + latents + 5, len(rows)
    side, views = config.vision["image_size"], 5 if config.uses_quadrants else 1
    tilings, images = torch.zeros(b, 1, 6, dtype=torch.long), [config.tokens_per_image] * b
    if config.tile_grids:
        tall, wide = config.tile_grids[0]
        tile = int((config.tile_tokens or config.patches) ** 0.5)
        views = 1 + tall * wide
        tilings[0, 0] = torch.tensor([tall, wide, 0, tall * tile - 1, 1, wide * tile])  # a row and a column are padding
        images[0] += (tall * tile - 1) * wide * tile

    def ids(*shape):
        return torch.randint(3, config.vocab_size, shape, generator=draw)

    inputs = {
        "input_ids": ids(b, length),
        "attention_mask": torch.ones(b, length, dtype=torch.long),
        "visual_index": torch.full((b, length), -1),
        "pixel_values": torch.rand((b, 1, views, 3, side, side), generator=draw) * 2 - 1,
        **({"tilings": tilings} if config.tile_grids else {}),
        "image_kind": torch.tensor([[int(has_image)] for _, has_image in rows]),
        "question_ids": ids(b, 1, 3),
        "question_mask": torch.ones(b, 1, 3, dtype=torch.bool),
        "round_image": torch.zeros(b, 1, dtype=torch.long),
        "round_end": torch.tensor([[length - 1 - padding] for padding, _ in rows]),  # from a row's first token on
        "latent_start": torch.full((b, 1), -1),
    }
    for row, (padding, has_image) in enumerate(rows):
        inputs["attention_mask"][row, :padding] = 0
        if has_image:
            first, behind = 2, 2 + images[row]
            inputs["visual_index"][row, first:behind] = torch.arange(images[row])
            inputs["visual_index"][row, behind : behind + latents] = table + torch.arange(latents)
            inputs["latent_start"][row] = behind if latents else -1
    return inputs


def one_row(plain, row=1):
    return {name: value[row : row + 1] for name, value in plain.inputs.items()}


# Generation.


def no_cache(plain):
    assert torch.equal(plain.generate(plain.model, use_cache=False), plain.answers)


def static_cache(plain):
    assert torch.equal(plain.generate(plain.model, cache_implementation="static"), plain.answers)


def beams(plain):
    found = plain.generate(plain.model, num_beams=3)
    assert torch.equal(found, plain.generate(plain.model, num_beams=3, use_cache=False))


def sampling(plain):
    torch.manual_seed(0)
    found = plain.generate(plain.model, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    again = plain.generate(plain.model, do_sample=True, num_return_sequences=2, use_cache=False)
    assert found.shape == (4, NEW) and torch.equal(found, again)


def prompt_lookup(plain):
    found = plain.generate(plain.model, one_row(plain), prompt_lookup_num_tokens=3)
    assert torch.equal(found, plain.answers[1:])


def left_padding(plain):
    for row in range(2):
        real = plain.inputs["attention_mask"][row].bool()
        alone = one_row(plain, row)
        alone |= {name: alone[name][:, real] for name in ("input_ids", "attention_mask")}
        assert torch.equal(plain.generate(plain.model, alone), plain.answers[row : row + 1])


def output_dict(plain):
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    out = plain.model.generate(
        **plain.inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1, **options
    )
    assert torch.equal(out.sequences[:, plain.length :], plain.answers)
    assert len(out.hidden_states[0]) == plain.model.config.llm["layers"] + 1
    assert torch.equal(torch.stack(out.logits, 1).argmax(-1), plain.answers)


def own_loop(plain):
    """With the cache under the name that this transformers gives it, and under the older one."""
    step = torch.full((2, 1), 7)
    mask = torch.cat([plain.inputs["attention_mask"], torch.ones_like(step)], 1)
    whole = {**plain.inputs, "input_ids": torch.cat([plain.inputs["input_ids"], step], 1), "attention_mask": mask}
    with torch.no_grad():
        expected = plain.model(**whole).logits[:, -1]
        for name in ("cache", "past_key_values"):
            out = plain.model(**plain.inputs, use_cache=True)
            kept = out["cache"] if "cache" in out.keys() else out["past_key_values"]  # noqa: SIM118
            close(plain.model(step, attention_mask=mask, **{name: kept}).logits[:, -1], expected)


def embeddings_as_inputs(plain):
    inputs = dict(plain.inputs)
    inputs["inputs_embeds"] = plain.model.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        close(plain.model(**inputs).logits, plain.logits)


def refusals(plain):
    places = plain.inputs["attention_mask"].cumsum(1) - 1
    with torch.no_grad():
        close(plain.model(**plain.inputs, position_ids=places.clamp(min=0)).logits, plain.logits)
    for options, call in (
        ({"position_ids": places % 5}, plain.model),
        ({"output_attentions": True}, plain.model),
        ({"logits_to_keep": 1, "labels": plain.labels}, plain.model),
        ({"prefill_chunk_size": 5, "max_new_tokens": 2}, plain.model.generate),
    ):
        try:
            call(**plain.inputs, **options)
        except ValueError:
            continue
        raise AssertionError(f"{next(iter(options))} is not refused")


# Loading, saving, other types and modules.


def saving(plain):
    with tempfile.TemporaryDirectory() as folder:
        plain.model.save_pretrained(folder)
        tied = plain.model.config.tie_word_embeddings
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        written = sum(p.nbytes for p in plain.model.parameters())
        assert size < written + 50_000, f"a head that is tied ({tied}) is written twice"
        plain.check(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))


def image_text_to_text(plain):
    auto = transformers.AutoModelForImageTextToText
    plain.check(auto.from_pretrained(plain.folder, trust_remote_code=True))


def more_tokens(plain):
    model = plain.load()
    old = model.config.vocab_size
    model.resize_token_embeddings(old + 7)
    assert model.config.vocab_size == model.config.llm["vocab_size"] == old + 7
    with torch.no_grad():
        logits = model(**plain.inputs).logits
    close(logits[..., :old], plain.logits)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        close(again(**plain.inputs).logits, logits)
        ids = plain.inputs["input_ids"].clone()
        ids[:, -1] = old + 3
        assert torch.isfinite(again(**{**plain.inputs, "input_ids": ids}, labels=ids).loss)
        tied = again.lm_head.weight is again.model.embed_tokens.weight
        assert tied == bool(again.config.tie_word_embeddings)


def half_precision(plain):
    largest = plain.logits.abs().max()
    for dtype in (torch.bfloat16, torch.float16):
        for model in (plain.load(dtype=dtype), copy.deepcopy(plain.model).to(dtype)):
            with torch.no_grad():
                logits = model(**plain.inputs).logits
            assert logits.dtype == dtype
            close(logits, plain.logits, 0.1 * largest)


def meta_device(plain):
    with torch.device("meta"):
        model = type(plain.model)(AutoConfig.from_pretrained(plain.folder, trust_remote_code=True))
    model.load_state_dict(plain.model.state_dict(), assign=True)
    model.tie_weights()
    plain.check(model.eval())


class Opaque(nn.Module):
    """A layer whose weight nobody can read, as layers of quantisation libraries."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.hidden = [layer]

    def forward(self, *args):
        return self.hidden[0](*args)


def replaced_modules(plain):
    """Were a weight used outside its module's forward, it would be missing."""
    model = plain.load()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | nn.LayerNorm):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Opaque(module))
    plain.check(model, generates=False)


def dynamic_quantisation(plain):
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(plain.load(), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        close(model(**plain.inputs).logits, plain.logits, 0.25 * plain.logits.abs().max())


def compiled(plain):
    plain.check(torch.compile(plain.load(), backend="eager"), generates=False)


# Training.


def gradients(model, plain, **options):
    model.zero_grad()
    model(**plain.inputs, labels=plain.labels, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointing(plain):
    for reentrant in (True, False):
        model = plain.load().train()
        expected = gradients(model, plain)
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for name, found in gradients(model, plain).items():
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6, msg=name)


def trainer(plain):
    """Two micro-batches of unequal counts are one batch, metrics get logits, and a saved model answers the same."""
    from transformers import Trainer, TrainingArguments

    names = [*plain.inputs, "labels"]
    columns = {**plain.inputs, "labels": plain.labels.clone()}
    columns["labels"][0, :-2] = -100
    rows = [{name: columns[name][row] for name in names} for row in range(2)]
    seen = {}

    def metrics(given):
        seen["logits"], seen["labels"] = given.predictions, given.label_ids
        return {"seen": 1.0}

    def train(folder, batch, accumulate):
        model = plain.load()
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=1e9,
            report_to=[],
            log_level="error",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        run = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
        run.train()
        return run

    with tempfile.TemporaryDirectory() as folder:
        together, apart = train(folder, 2, 1), train(folder, 1, 2)
        both = [(model.lm_head.weight, model.model.norm.weight) for model in (together.model, apart.model)]
        both = zip(*both)
        change = max(float((a - b).abs().max()) for a, b in both)
        moved = float((together.model.lm_head.weight - plain.model.lm_head.weight).abs().max())
        assert moved > 1e-4 and change < 0.05 * moved, (change, moved)
        assert together.evaluate()["eval_seen"] == 1.0
        assert seen["logits"].shape == (*plain.logits.shape,) and seen["labels"].shape == plain.labels.shape


def two_processes(plain):
    """Trainer with gradient checkpointing on two processes, one of which has no image."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
        command += [
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=127.0.0.1:0",
            __file__,
            "--worker",
            str(plain.folder),
            folder,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, plain.model.get_parameter(name))]
        assert len(moved) > 20, moved


def worker(folder: str, out: str) -> None:
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    rows = []
    for seed in range(8):  # the processes take turns: one has the images, the other the texts
        inputs = inputs_for(model.config, [(0, seed % 2 == 0)], seed)
        rows.append({name: value[0] for name, value in inputs.items()} | {"labels": inputs["input_ids"][0]})
    arguments = TrainingArguments(
        out,
        per_device_train_batch_size=1,
        max_steps=3,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        ddp_backend="gloo",
    )
    run = Trainer(model, arguments, train_dataset=rows)
    run.train()
    run.save_model(out)


# What needs further packages.


def offloading(plain):
    import accelerate  # noqa: F401

    total = sum(p.nbytes for p in plain.model.parameters())
    # Nearly everything on the disk. transformers 4.57 cannot read a model that is there as a whole, or a tied head.
    parts = [f"model.{name}" for name, _ in plain.model.model.named_children()]
    most = dict.fromkeys([*parts, "lm_head"], "disk") | {"model.norm": "cpu"}
    rooms = [{"cpu": int(total * 0.9)}, {"cpu": int(total * 0.7)}]
    if plain.model.config.tie_word_embeddings and transformers.__version__ < "5":
        rooms, most = [], most | {"model.embed_tokens": "cpu", "lm_head": "cpu"}
    for where in (*rooms, most):
        with tempfile.TemporaryDirectory() as folder:
            options = {"device_map": where} if where is most else {"device_map": "auto", "max_memory": where}
            model = plain.load(**options, offload_folder=folder)
            disk = [part for part, place in model.hf_device_map.items() if place == "disk"]
            assert disk, model.hf_device_map
            plain.check(model)
            plain.check(model)


def offloading_all(plain):
    from accelerate import cpu_offload, disk_offload

    with tempfile.TemporaryDirectory() as folder:
        for offload in (lambda model, **o: disk_offload(model, folder, **o), cpu_offload):
            model = plain.load()
            offload(model, execution_device=torch.device("cpu"))
            plain.check(model)


def _lora(plain, merges=True, **options):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(plain.load(), LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits, answers = model(**plain.inputs).logits, plain.generate(model)
        assert (logits - plain.logits).abs().max() > 1e-3, "the adapter changes nothing"
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(plain.load(), folder).eval()
        close(again(**plain.inputs).logits, logits)
        if merges:
            merged = again.merge_and_unload()
            close(merged(**plain.inputs).logits, logits, 2e-4)
            assert torch.equal(plain.generate(merged), answers)
    model.train()
    enable = getattr(model.base_model.model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    model(**plain.inputs, labels=plain.labels).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient: {without[:3]}"


def lora_two(plain):
    _lora(plain, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def lora_seven(plain):
    _lora(plain, target_modules=SEVEN, task_type="CAUSAL_LM")


def lora_all_linear(plain):
    _lora(plain, target_modules="all-linear", task_type="CAUSAL_LM")


def lora_head(plain):
    """A tied head's adapter is its own: peft says itself that merging it changes the embedding."""
    tied = plain.model.config.tie_word_embeddings
    _lora(plain, merges=not tied, target_modules=["lm_head"], task_type="CAUSAL_LM")


def lora_with_whole_modules(plain):
    whole = ["lm_head", "embed_tokens"]
    _lora(plain, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")


def processor(plain):
    from PIL import Image

    made = transformers.AutoProcessor.from_pretrained(plain.folder, trust_remote_code=True)
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    inputs = made([{"role": "user", "content": question}], Image.new("RGB", (48, 48), "red"))
    answer = plain.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert isinstance(made.batch_decode(answer[:, inputs["input_ids"].shape[1] :])[0], str)
    repr(made)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)


GENERATION = (no_cache, static_cache, beams, sampling, prompt_lookup, left_padding, output_dict, own_loop)
GENERATION += (embeddings_as_inputs, refusals)
LOADING = (saving, image_text_to_text, more_tokens, half_precision, meta_device, replaced_modules)
LOADING += (dynamic_quantisation,)
TRAINING = (checkpointing,)
TRAINER = (trainer, two_processes)  # accelerate, which Trainer needs
ADAPTERS = (offloading, offloading_all, lora_two, lora_seven, lora_all_linear, lora_head, lora_with_whole_modules)
WAYS = (*GENERATION, *LOADING, compiled, *TRAINING, *TRAINER, *ADAPTERS, processor)


def main(folder: str, *chosen: str) -> int:
    plain, wrong = Plain(folder), 0
    print(f"transformers {transformers.__version__}", flush=True)
    for way in WAYS:
        if chosen and way.__name__ not in chosen:
            continue
        try:
            way(plain)
            print(f"{way.__name__}: right", flush=True)
        except Exception as error:
            wrong += 1
            said = " ".join(str(error).split())
            print(f"{way.__name__}: {type(error).__name__}: {said[:300]}", flush=True)
            traceback.print_exc()
    return int(wrong > 0)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
