"""Runs the data engine with served models: captions from a file, two endpoints, a diffusion pipeline.

OPENAI_API_KEY=... python -m fusion_jax.synthesize --config configs/synthesize_endpoint.py:captions.jsonl \
    --out runs/synthesis --config.pools[0].source="my captions" --config.pools[0].licence="CC BY 4.0" \
    --config.llm.base_url=http://llm:8000/v1 --config.vision.base_url=http://vlm:8000/v1

Where the papers name a model, it is used here: Llama-3.1-70B writes, FLUX.1-dev draws. On a cluster set engine="ray"
(docs/synthesis.md).
"""

from ml_collections import ConfigDict

from configs.synthesize import PUBLISHED


def get_config(captions: str = "captions.jsonl"):
    config = {
        "pools": [{"path": captions or "captions.jsonl", "text": "caption", "source": "", "licence": ""}],
        "kinds": PUBLISHED,
        "stages": {},
        "seed": 0,
        # The published thresholds are the defaults; perplexity takes a KenLM file.
        "filters": {"perplexity_model": ""},
        "llm": {
            "backend": "endpoint",
            "model": "meta-llama/Llama-3.1-70B-Instruct",
            "base_url": "http://localhost:8000/v1",
            "concurrency": 64,
            "requests_per_second": 0.0,
        },
        "vision": {
            "backend": "endpoint",
            "model": "Qwen/Qwen2.5-VL-72B-Instruct",
            "base_url": "http://localhost:8001/v1",
            "concurrency": 64,
            "requests_per_second": 0.0,
            "temperature": 0.0,
            "max_tokens": 256,
        },
        "images": {"backend": "diffusers", "model": "black-forest-labs/FLUX.1-dev", "width": 1024, "height": 1024},
        "scorer": {"path": ""},
        "select": {"keep": 0.9, "image_score_min": 0.0, "validation": 0.001},
        "engine": "local",
        "ray": {"address": "", "actors": {}, "gpus": {}, "cpus": {}},
        "journal": "",
    }
    return ConfigDict(config)
