"""Small language models and a vision tower that `transformers` itself builds and saves, with tokenizers."""

import functools
import json

import numpy as np
import pytest
import tokenizers

from fusion_jax.interop import importing

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'fusion_jax[torch]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'fusion_jax[torch]'")

SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 16,
}


def config_of(kind):
    """Each architecture, with what sets it apart."""
    theta = {"rope_theta": 10000.0}
    return {
        "llama": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=theta | LLAMA3),
        "llama_tied": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=theta, tie_word_embeddings=True),
        "mistral": lambda: transformers.MistralConfig(**SIZES, rope_parameters=theta, sliding_window=7),
        "qwen2": lambda: transformers.Qwen2Config(**SIZES, rope_parameters=theta, tie_word_embeddings=True),
        "qwen2_window": lambda: transformers.Qwen2Config(
            **SIZES, rope_parameters=theta, use_sliding_window=True, sliding_window=5, max_window_layers=0
        ),
        "phi3": lambda: transformers.Phi3Config(
            **SIZES, rope_parameters=theta | LONGROPE, original_max_position_embeddings=16, sliding_window=300
        ),
    }[kind]()


KINDS = ("llama", "llama_tied", "mistral", "qwen2", "qwen2_window", "phi3")


KNOWN = 80  # tokens of the tokenizer; the embedding has 90 rows, as real folders have some to spare
SPECIAL = {
    "llama": ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "phi3": ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    "qwen2": ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "mistral": ("[INST]", "[/INST]"),
}


def write_tokenizer(folder, kind):
    family = kind.split("_")[0]
    words = ["<unk>", "<s>", "</s>", *SPECIAL[family]]
    words += [f"w{i}" for i in range(KNOWN - len(words))]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(list(words[: 3 + len(SPECIAL[family])]))
    model.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": "</s>", "pad_token": "<unk>"}
    if family != "qwen2":  # which has none
        roles["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


@functools.cache
def language_model(kind):
    torch.manual_seed(KINDS.index(kind))
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():  # nothing left at 0 or 1, so that no part can hide
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.2)
        elif "embed" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


@functools.cache
def tower(whole=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision_part = sizes | {"image_size": 32, "patch_size": 8}
    if not whole:
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision_part)).eval()
    config = transformers.SiglipConfig(vision_config=vision_part, text_config=sizes | {"vocab_size": 50})
    return transformers.SiglipModel(config).eval()


def write_folders(root):
    """Writes root/vision and root/KIND; one language model is cut into shards."""
    tower().save_pretrained(root / "vision")
    for kind in KINDS:
        shards = {"max_shard_size": "60KB"} if kind == "llama" else {}
        language_model(kind).save_pretrained(root / kind, **shards)
        write_tokenizer(root / kind, kind)
    return root


@pytest.fixture(scope="module", autouse=True)
def cheap_connectors():
    """Projectors and exchange layers from plain noise: tracing the model's own initialiser takes seconds a model."""

    def draw(model, new):
        rng = np.random.default_rng(0)
        for array in new.values():
            array[...] = 0.1 * rng.standard_normal(array.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "_initialise", draw)
        yield
