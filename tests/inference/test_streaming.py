"""The text of tokens: the same whether it comes at once or in pieces, whatever bytes the tokens spell."""

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.inference.streaming import TextStream
from fusion_jax.synth.tokenizer import train_tokenizer

WORDS = ["a", "b", "▁", "▁a", "▁b", "é", "▁猫", "\ufffd", "▁▁", "!"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def written(folder, model):
    """A folder of a tokenizer.json."""
    folder.mkdir()
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return load_tokenizer(folder)


def byte_fallback(folder):
    """As Llama 2's, Mistral's and Gemma's tokenizer.json are."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *BYTES, *WORDS])}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    return written(folder, model)


def byte_level(folder):
    """As Llama 3's and Qwen's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "Ġa", "ĠĠ", "Ã©"])}, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return written(folder, model)


def sentencepiece(folder):
    return load_tokenizer(train_tokenizer(["A red circle and a blue star, é and 猫."], folder, 400))


@pytest.fixture(scope="module", params=[byte_fallback, byte_level, sentencepiece], ids=lambda make: make.__name__)
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("t") / "tokenizer")


def ids_of(tokenizer, data):
    """One id for each byte."""
    known = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [known[bytes([byte])] for byte in data]


def sequences(tokenizer, count):
    """Ids at random, with much of what is hard: parts of characters, bytes that begin none, spaces, control tokens."""
    rng = random.Random(0)
    hard = ids_of(tokenizer, "é猫😀".encode() + b"\xff\x80\xc3\xf0\x9f\xe7 \n")
    for _ in range(count):
        pool = rng.choice((hard, range(tokenizer.vocab_size)))
        yield [rng.choice(pool) for _ in range(rng.randrange(1, 12))], rng


@pytest.mark.parametrize("stop", [(), ("é",), ("\ufffd", "a b")])
@pytest.mark.parametrize("prefix", [None, "", " "])
def test_pieces_are_the_whole_wherever_they_are_split(tokenizer, stop, prefix):
    shown = set()
    for ids, rng in sequences(tokenizer, 400):
        whole = TextStream(tokenizer, (), stop, len(ids), prefix)
        whole.add(ids)
        parts, start = TextStream(tokenizer, (), stop, len(ids), prefix), 0
        pieces = []
        while start < len(ids):
            end = rng.randrange(start + 1, len(ids) + 1)
            pieces.append(parts.add(ids[start:end]))
            start = end
        assert "".join(pieces) == parts.text == whole.text and parts.finish == whole.finish, ids
        if not stop:
            text = tokenizer.decode(ids, inside=prefix is not None)
            expected = text.strip() if prefix is None else text.removeprefix(prefix)
            assert whole.text == expected, ids
        shown.add(whole.text)
    assert len(shown) > 90


def test_text_is_that_of_the_tokens_bytes(tokenizer):
    """`inside`, so that no first space is taken for a word's prefix; and nothing before is changed by what follows."""
    for ids, _ in sequences(tokenizer, 400):
        spoken = [i for i in ids if not tokenizer.is_control(i)]
        data = b"".join(map(tokenizer.token_bytes, spoken))
        assert tokenizer.decode(spoken, inside=True) == data.decode(errors="replace")
        begun = tokenizer.decode(spoken[:-1], inside=True).rstrip("\ufffd")
        assert tokenizer.decode(spoken, inside=True).startswith(begun)


def test_a_wrong_byte_is_replaced_and_the_rest_goes_on(tokenizer):
    ids = [*ids_of(tokenizer, "né".encode()), *ids_of(tokenizer, b"\xff\xe7"), *ids_of(tokenizer, "a猫!".encode())]
    assert tokenizer.decode(ids) == "né\ufffd\ufffda猫!"
    stream = TextStream(tokenizer, (), (), 99)
    assert [stream.add([i]) for i in ids] == ["n", "", "é", "", "", "\ufffd\ufffda", "", "", "猫", "!"]


def test_what_follows_the_last_token_of_an_exact_answer_is_not_waited_for(tokenizer):
    stream = TextStream(tokenizer, (), ("xyz",), 99, "")
    ids = ids_of(tokenizer, b" x ")
    assert stream.add(ids[:2]) == " " and stream.add(ids[2:], last=True) == "x "
    assert stream.finish == "stop"
