"""Scores images against texts with CLIP or SigLIP from a local folder, through transformers."""

import threading
from pathlib import Path

import numpy as np
from PIL import Image

from fusion_jax.errors import UserError, first_line
from fusion_jax.synth.backends.config import ScorerConfig


class ClipScorer:
    """Computes cosines between images and texts. Texts that are too long for the model are cut at their end."""

    def __init__(self, config: ScorerConfig):
        """Raises UserError where packages or files are missing."""
        path = Path(config.path)
        if not path.is_dir():
            raise UserError(f"There is no folder {path} (scorer.path): give a CLIP or SigLIP model's folder.")
        try:
            import torch
            from transformers import AutoModel, AutoProcessor
        except ImportError as e:
            raise UserError("scorer.path needs torch and transformers: pip install -e '.[torch]'.") from e
        self._torch, self._lock = torch, threading.Lock()
        self._device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model = AutoModel.from_pretrained(path, local_files_only=True).to(self._device).eval()
            self._processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise UserError(f"Cannot load the scorer {path}: {first_line(e)}") from e
        if not hasattr(self._model, "get_image_features"):
            raise UserError(f"{path} is a {type(self._model).__name__}: scorer.path must be a CLIP or SigLIP model.")
        self.name = path.resolve().name
        self._length = self._model.config.text_config.max_position_embeddings

    def similarity(self, images: list[Image.Image], texts: list[str]) -> np.ndarray:
        """(images, texts) float32, cosine of the embeddings."""
        torch = self._torch
        with self._lock, torch.inference_mode():
            image_inputs = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
            text_inputs = self._processor(
                text=texts, return_tensors="pt", padding="max_length", truncation=True, max_length=self._length
            )
            image_vectors = self._embed(self._model.get_image_features(**image_inputs.to(self._device)))
            text_vectors = self._embed(self._model.get_text_features(**text_inputs.to(self._device)))
            return (image_vectors @ text_vectors.T).float().cpu().numpy()

    def _embed(self, output):
        output = getattr(output, "pooler_output", output)  # transformers 5 returns more than the embedding
        return self._torch.nn.functional.normalize(output, dim=-1)
