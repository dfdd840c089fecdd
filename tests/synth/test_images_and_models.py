"""Image measures, and models in this process: tiny ones with random weights through the real libraries."""

import io
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fusion_jax.errors import UserError
from fusion_jax.synth import images
from fusion_jax.synth.backends import endpoint
from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.backends.config import ImageConfig, ScorerConfig
from fusion_jax.synth.backends.vllm import Gatherer


def picture(seed=0, side=64):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def test_ssim_against_its_definition():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 255, (16, 20)).astype(np.float32)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.float32)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = []
    for y in range(0, 16 - 7, 4):
        for x in range(0, 20 - 7, 4):
            p, q = (one[y : y + 8, x : x + 8].astype(np.float64) for one in (a, b))
            covariance = ((p - p.mean()) * (q - q.mean())).mean()
            top = (2 * p.mean() * q.mean() + c1) * (2 * covariance + c2)
            expected.append(top / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (p.var() + q.var() + c2)))
    assert images.ssim(a, b) == pytest.approx(np.mean(expected), rel=1e-3)
    assert images.ssim(a, a) == pytest.approx(1, abs=1e-6)
    both = images.ssim(np.stack([a, b]), np.stack([b, b]))
    assert both == pytest.approx((images.ssim(a, b) + 1) / 2, rel=1e-6)


def test_ssim_a_falls_with_noise_and_is_at_most_2():
    smooth = picture()
    noise = np.random.default_rng(1).normal(0, 40, (64, 64, 3))
    noisy = Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))
    assert images.ssim_a(noisy) < images.ssim_a(noisy.filter(ImageFilter.GaussianBlur(1))) < images.ssim_a(smooth) <= 2
    assert images.ssim_a(Image.new("RGB", (16, 16), (9, 9, 9))) == pytest.approx(2)


def test_perceptual_hash():
    one, other = picture(0), picture(1)
    again = one.resize((200, 200)).resize((64, 64))
    distance = (images.perceptual_hash(one) ^ images.perceptual_hash(again)).bit_count()
    assert distance <= 2 < 10 < (images.perceptual_hash(one) ^ images.perceptual_hash(other)).bit_count()


@pytest.mark.parametrize(("width", "height", "mode"), [(64, 64, "RGB"), (17, 1, "RGB"), (1, 33, "RGBA")])
def test_png_is_a_whole_file_with_the_same_pixels(width, height, mode):
    image = picture().resize((width, height)).convert(mode)
    data = images.png(image)
    Image.open(io.BytesIO(data)).verify()  # the chunks' checksums
    again = Image.open(io.BytesIO(data))
    assert again.format == "PNG" and again.mode == "RGB" and not again.info
    assert np.array_equal(np.asarray(again), np.asarray(image.convert("RGB")))


def test_files_appear_whole(tmp_path):
    images.write_once(tmp_path / "a" / "b.png", images.png(picture()))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]
    assert np.array_equal(np.asarray(images.open_file(tmp_path / "a" / "b.png")), np.asarray(picture()))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"bad\.png"):
        images.open_file(tmp_path / "bad.png")


def test_drawn_images_are_of_the_formats_that_training_reads(tmp_path):
    """Whatever a server sends in their place drops the sample: a broken DDS, PostScript, pictures in other pictures."""
    file = io.BytesIO()
    picture().save(file, "DDS")
    dds = file.getvalue()
    lying = dds[:12] + b"\xff\xff\0\0" * 2 + dds[20:]
    for data in (
        dds,
        dds[:100],
        lying,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"",
        images.png(picture())[:99],
    ):
        with pytest.raises(Unusable, match="cannot be used"):
            endpoint._decode(data)
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(OSError, match=r"a\.png"):
            images.open_file(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="a pipe"):
        images.open_file(tmp_path / "pipe.png")
    assert np.array_equal(np.asarray(endpoint._decode(images.png(picture()))), np.asarray(picture()))


def tokenizer(folder):
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    return made, len(vocabulary)


def test_clip_scores_are_the_models_cosines(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from fusion_jax.synth.backends.clip import ClipScorer

    words, size = tokenizer(tmp_path / "words")
    torch.manual_seed(0)
    text = {"vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "eos_token_id": size - 1,
        "bos_token_id": size - 2,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**sizes), words)
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")

    scorer = ClipScorer(ScorerConfig(path=str(tmp_path / "clip"), device="cpu"))
    shown, said = [picture(0), picture(1)], ["a cat", "dogs", "a very long text that goes on and on"]
    found = scorer.similarity(shown, said)
    inputs = processor(text=said, images=shown, return_tensors="pt", padding=True, truncation=True, max_length=16)
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image / model.logit_scale.exp()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert scorer.name == "clip"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="Cannot load the scorer"):
        ClipScorer(ScorerConfig(path=str(tmp_path / "empty")))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A Stable Diffusion pipeline of a few thousand parameters, as a folder."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    import transformers

    folder = tmp_path_factory.mktemp("diffusion")
    words, size = tokenizer(folder / "words")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16)
    text = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=size - 1,
    )
    made = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder / "tiny")
    return folder / "tiny"


def test_diffusion_draws_by_seed(pipeline):
    from fusion_jax.synth.backends.diffusion import Diffusion

    config = ImageConfig(backend="diffusers", model=str(pipeline), steps=2, dtype="float32", device="cpu")
    generator = Diffusion(config)
    first, again, other = (np.asarray(generator.draw("a cat", (40, 24), seed, {})) for seed in (1, 1, 2))
    assert first.shape == (24, 40, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert generator.name == "tiny" and generator.settings["steps"] == 2


def test_a_pipeline_that_does_not_fit(pipeline, monkeypatch):
    from fusion_jax.synth.backends import diffusion

    config = ImageConfig(backend="diffusers", model=str(pipeline), dtype="float32", device="cpu")
    monkeypatch.setattr(diffusion, "_host_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"needs 0\.0 GiB and this machine's memory has 0\.0 GiB free: take a smaller"):
        diffusion.Diffusion(config)


def test_gatherer_hands_over_what_threads_ask_together():
    batches = []

    def work(items):
        batches.append(len(items))
        if "bad" in items:
            raise UserError("bad")
        return [item * 2 for item in items]

    gather = Gatherer(work, 8)
    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: gather(i)})) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: 2 * i for i in range(40)}
    assert max(batches) <= 8 and len(batches) < 40
    with pytest.raises(UserError, match="bad"):
        gather("bad")
    assert gather(4) == 8


def test_one_request_that_fails_does_not_take_those_gathered_with_it():
    def work(items):
        if 3 in items:
            raise ValueError("too long")
        return [item * 2 for item in items]

    gather = Gatherer(work, 8)
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(gather, i) for i in range(8)]
    assert [one.result() for i, one in enumerate(found) if i != 3] == [0, 2, 4, 8, 10, 12, 14]
    with pytest.raises(ValueError, match="too long"):
        found[3].result()
