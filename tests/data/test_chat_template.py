"""Chat templates that lie with a tokenizer: cut into the same text as transformers renders, or refused with a sentence.

The four of the first test write what those of Phi-3.5, Llama-3.1, Qwen2.5 and SmolLM2 write for text alone, in other
words; "Phi-3.5" and the rest are how their conversations look, not their files.
"""

import json
import shutil
import time

import pytest
import tokenizers

from fusion_jax.data import chat_template
from fusion_jax.data.conversation import TEMPLATES, encode_conversation, encode_prompt, stop_ids
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.interop.families import choose_template

PHI = """{% for m in messages %}{% if m['role'] != 'system' or m['content'] %}
{{- '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
LLAMA = """{{- bos_token }}
{%- if tools is not defined %}{%- set tools = none %}{%- endif %}
{%- if date is not defined %}{%- set date = "26 Jul 2024" %}{%- endif %}
{%- set system = "" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n" + system + "<|eot_id|>" }}
{%- for m in messages %}
    {{- "<|start_header_id|>" + m.role + "<|end_header_id|>\n\n" + m.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{%- endif %}
"""
CHATML = """{%- if messages[0].role != "system" %}{{- "<|im_start|>system\nSYSTEM<|im_end|>\n" }}{%- endif %}
{%- for m in messages %}{{- "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}
"""
QWEN = CHATML.replace("SYSTEM", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
SMOL = CHATML.replace("SYSTEM", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
MISTRAL = """{{- bos_token }}{%- for m in messages %}
    {%- if m.role == "user" %}{{- "[INST] " + m.content + " [/INST]" }}
    {%- elif m.role == "assistant" %}{{- m.content + eos_token }}
    {%- else %}{{- raise_exception("only user and assistant") }}{%- endif %}
{%- endfor %}"""
PUBLISHED = {"phi": PHI, "llama": LLAMA, "qwen": QWEN, "smol": SMOL, "mistral": MISTRAL}
SPECIAL = {
    "phi": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smol": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
}
ROLES = {
    "phi": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": False},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False},
    "smol": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
}
TEXTS = ["What is the capital of France? The capital of France is Paris.", "Name a colour.\nRed, and another: blue!"]
CHATS = [
    ("What is the capital of France?",),
    ("Name a colour.", "Red.", "And\nanother?"),
    ("Name\n\n  a colour", "Blue!", "And of France?", "Red, and blue.\n- a\n- b", "What is it?"),
]


@pytest.fixture(scope="module")
def byte_level():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([*TEXTS, QWEN, SMOL], trainer)
    return model.to_str()


@pytest.fixture
def folder(byte_level, tmp_path):
    def make(family, template=None, **config):
        where = tmp_path / family
        where.mkdir(exist_ok=True)
        model = tokenizers.Tokenizer.from_str(byte_level)
        model.add_special_tokens(SPECIAL[family])
        if family in ("llama", "mistral"):  # a file that puts its BOS in front of a text
            bos = (SPECIAL[family][0], model.token_to_id(SPECIAL[family][0]))
            model.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        model.save(str(where / "tokenizer.json"))
        content = ROLES[family] | {"chat_template": PUBLISHED[family] if template is None else template} | config
        (where / "tokenizer_config.json").write_text(json.dumps(content))
        return where

    return make


def turns(values):
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]


def refused(folder):
    with pytest.raises(UserError) as error:
        chat_template.find("own", load_tokenizer(folder))
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_ids_are_those_of_apply_chat_template(folder, family):
    transformers = pytest.importorskip("transformers", reason="compared with transformers")
    where = folder(family)
    tokenizer, theirs = load_tokenizer(where), transformers.PreTrainedTokenizerFast.from_pretrained(where)
    template = chat_template.find("own", tokenizer)
    roles = {"human": "user", "gpt": "assistant"}
    for said in CHATS:
        for system in (None, "Answer in one word.", " Be brief.\n") if family != "mistral" else (None,):
            chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns(said)]
            chat = [{"role": "system", "content": system}] * (system is not None) + chat
            expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
            got = encode_prompt(turns(said), tokenizer, template, 0, latents=False, system=system)
            assert got.input_ids.tolist() == expected
            finished = [*chat, {"role": "assistant", "content": "Paris."}]
            expected = theirs.apply_chat_template(finished, tokenize=True)["input_ids"]
            got = encode_conversation(turns([*said, "Paris."]), tokenizer, template, 0, latents=False, system=system)
            count = len(got.input_ids)
            assert got.input_ids.tolist() == expected[:count]
            # What follows the last answer is no part of it: a newline, or the end of the whole text.
            assert tokenizer.decode(expected[count:], skip_special=False) in ("", "\n", "\n<|endoftext|>")
            assert got.labels[-1] == got.input_ids[-1] == tokenizer.token_id(template.stops[0])
            assert got.labels[-1] in stop_ids(tokenizer, template)


def test_pieces(folder):
    smol = chat_template.find("own", load_tokenizer(folder("smol")))
    chatml = TEMPLATES["chatml"]
    for name in ("system_frame", "question", "answer", "end", "between"):
        assert getattr(smol, name) == getattr(chatml, name), name
    assert smol.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    # Its BOS opens every turn and is no BOS.
    assert (smol.bos, smol.stops, smol.trims) == (False, ("<|im_end|>",), ())
    llama = chat_template.find("own", load_tokenizer(folder("llama")))
    assert llama.bos and llama.default_system == "" and llama.system_frame[0].endswith("26 Jul 2024\n\n")
    assert set(llama.trims) == {"system", "question", "answer"}
    phi = chat_template.find("own", load_tokenizer(folder("phi")))
    assert (phi.bos, phi.default_system, phi.between) == (False, None, "\n")
    mistral = load_tokenizer(folder("mistral"))
    template = chat_template.find("own", mistral)
    assert template.system_frame is None and template.bos and template.answer == " [/INST]"
    with pytest.raises(BadRecord, match="own has no place for a system text"):
        encode_prompt(turns(["a"]), mistral, template, 0, system="Be brief.")


def test_system_texts_that_have_no_place_of_their_own(folder):
    """Said again with every question, or within the first one: such a template holds conversations without one."""
    again = SMOL.replace("m.content", '(messages[0].content if messages[0].role == "system" else "") + m.content')
    within = MISTRAL.replace('"user" %}{{-', '"user" %}{{- messages[0].content if messages[0].role == "system" }}{{-')
    within = within.replace("else %}", 'elif m.role != "system" %}')
    for family, text in (("smol", again), ("mistral", within)):
        template = chat_template.find("own", load_tokenizer(folder(family, text)))
        assert template.system_frame is None
        assert (template.default_system or "").count("SmolLM") == (family == "smol")


def test_white_space_is_trimmed_as_the_template_does(folder):
    transformers = pytest.importorskip("transformers", reason="compared with transformers")
    for family in ("llama", "qwen"):
        where = folder(family)
        tokenizer, theirs = load_tokenizer(where), transformers.PreTrainedTokenizerFast.from_pretrained(where)
        said = (" \n Name it ", " Red \n", "\n\nAnd ")
        chat = [{"role": ("user", "assistant")[k % 2], "content": value} for k, value in enumerate(said)]
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        got = encode_prompt(turns(said), tokenizer, chat_template.find("own", tokenizer), 0, latents=False)
        assert tokenizer.decode(got.input_ids.tolist(), skip_special=False) == expected


def test_which_file_and_which_of_several(folder, tmp_path):
    where = folder("smol", [{"name": "tool_use", "template": "{{ x"}, {"name": "default", "template": SMOL}])
    tokenizer = load_tokenizer(where)
    assert tokenizer.chat_template == (SMOL, where / "tokenizer_config.json")
    (where / "chat_template.jinja").write_text(QWEN)
    assert load_tokenizer(where).chat_template == (QWEN, where / "chat_template.jinja")
    assert load_tokenizer(where) != tokenizer  # the template is part of what a tokenizer is
    load_tokenizer(where).save(tmp_path / "saved")
    shutil.rmtree(where)
    assert "Qwen" in chat_template.find("own", load_tokenizer(tmp_path / "saved")).default_system


def test_an_import_takes_the_folders_template_but_for_the_published_ones(folder, caplog):
    kinds = {"smol": "llama", "qwen": "qwen2", "mistral": "mistral", "llama": "llama", "phi": "phi3"}
    found = {family: choose_template(kind, load_tokenizer(folder(family))) for family, kind in kinds.items()}
    assert found == {"smol": "own", "qwen": "own", "mistral": "own", "llama": "llama3", "phi": "phi3"}
    assert not caplog.records
    assert choose_template("qwen2", load_tokenizer(folder("qwen", "{{ x"))) == "chatml"
    assert "cannot be used" in caplog.text and "imported with chatml" in caplog.text
    assert choose_template("qwen2", load_tokenizer(folder("qwen", ""))) == "chatml"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.nothing.at.all }}", "UndefinedError"),
        ("always the same", "does not write a question once"),
        (SMOL.replace('m.content +', 'm.content + " Zq3two" +'), "one of the words that it is probed with"),
        (SMOL.replace("<|im_", "<im_"), "no control token closes an answer"),
        # As templates that think: the last answer is written otherwise than the same one once more follows.
        (
            SMOL.replace("m.content", '("<think>" if loop.last and m.role == "assistant" else "") + m.content'),
            "one after the other",
        ),
        (SMOL.replace("m.content", '(loop.index | string) + m.content'), "written otherwise once more follows"),
        (SMOL.replace("m.content", "m.content[:4]"), "does not write a question once"),
        (SMOL.replace("m.content", 'm.content.lstrip()'), "one after the other"),
        (SMOL.replace("m.content", "m.content * 9999999999"), "MemoryError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ('{{ raise_exception("no\n' + "x" * 5000 + '") }}', "TemplateError"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used(folder, template, reason):
    said = refused(folder("smol", template))
    assert reason in said and "tokenizer_config.json" in said
    assert said.endswith("set config.template to one of chatml, llama3, mistral, phi3.")


def test_a_template_without_end_is_ended(folder):
    begun = time.monotonic()
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "too much time or memory" in refused(folder("smol", endless))
    assert time.monotonic() - begun < 25


def test_folders_without_one_or_with_something_else(folder):
    assert "has no chat template; set config.template" in refused(folder("smol", ""))
    where = folder("smol", 5)
    with pytest.raises(UserError, match="chat_template must be a text, got 5"):
        load_tokenizer(where)
    where = folder("smol", "x" * 200_000)
    with pytest.raises(UserError, match="a chat template of over 131,072 characters"):
        load_tokenizer(where)
    where = folder("smol")
    (where / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template.jinja is no UTF-8 text"):
        load_tokenizer(where)


def test_names(folder):
    tokenizer = load_tokenizer(folder("smol"))
    assert chat_template.find("phi3", tokenizer) is TEMPLATES["phi3"]
    assert chat_template.find("own", tokenizer) is chat_template.find("own", tokenizer)  # cut once
    with pytest.raises(UserError, match=r"'vicuna' is unknown; allowed: phi3, llama3, chatml, mistral, own"):
        chat_template.find("vicuna", tokenizer)
