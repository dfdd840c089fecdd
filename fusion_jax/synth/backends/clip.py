"""CLIP or SigLIP by local path, through transformers, as scorer."""

import threading
from pathlib import Path

import numpy as np
from PIL import Image

from fusion_jax.errors import UserError, first_line
from fusion_jax.synth.config import ScorerConfig


class ClipScorer:
    """Cosines between images and texts. Texts longer than the model reads are cut at its end."""

    def __init__(self, config: ScorerConfig):
        """UserError where packages or files are missing."""
        path = Path(config.path)
        if not path.is_dir():
            raise UserError(f"There is no folder {path} (scorer.path): give a CLIP or SigLIP model's folder.")
        try:
            import torch
            from transformers import AutoModel, AutoProcessor
        except ImportError as e:
            raise UserError("scorer.path needs torch and transformers: pip install 'fusion_jax[torch]'.") from e
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
            shown = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
            said = self._processor(
                text=texts, return_tensors="pt", padding="max_length", truncation=True, max_length=self._length
            )
            seen = self._embed(self._model.get_image_features(**shown.to(self._device)))
            read = self._embed(self._model.get_text_features(**said.to(self._device)))
            return (seen @ read.T).float().cpu().numpy()

    def _embed(self, found):
        found = getattr(found, "pooler_output", found)  # transformers 5 returns more than the embedding
        return self._torch.nn.functional.normalize(found, dim=-1)
