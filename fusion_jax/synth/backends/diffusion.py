"""Draws images with a `diffusers` pipeline in this process, such as FLUX.1-dev."""

import inspect
import json
import math
import struct
import threading
from pathlib import Path

from PIL import Image

from fusion_jax.errors import UserError, first_line
from fusion_jax.synth.backends.base import Refused
from fusion_jax.synth.backends.config import ImageConfig

_ROOM = 1.15  # least memory that drawing needs, as a multiple of the weights
_MULTIPLE = 16  # pipelines draw sides of multiples of it; others are cut from the next larger one


class Diffusion:
    """An image generator; draws one image at a time."""

    paid = True  # in time

    def __init__(self, config: ImageConfig):
        """Loads the pipeline. Raises UserError where packages, files or memory are missing."""
        try:
            import torch
            from diffusers import DiffusionPipeline
        except ImportError as e:
            raise UserError(
                "images.backend='diffusers' needs torch and diffusers: pip install -e '.[diffusers]'."
            ) from e
        self.name = config.model if not Path(config.model).is_dir() else Path(config.model).resolve().name
        self.settings = {"steps": config.steps, "guidance": config.guidance, "dtype": config.dtype}
        self._lock = threading.Lock()
        self._device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, config.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"images.dtype={config.dtype!r} is not a dtype; use bfloat16, float16 or float32.")
        if Path(config.model).is_dir():
            _check_memory(Path(config.model), dtype.itemsize, self._device, torch)
        try:
            pipeline = DiffusionPipeline.from_pretrained(config.model, dtype=dtype)
            self._pipeline = pipeline.to(self._device)
        except torch.OutOfMemoryError as e:
            raise self._too_large(config) from e
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"Cannot load the diffusion model {config.model!r} (images.model): {first_line(e)}") from e
        self._pipeline.set_progress_bar_config(disable=True)
        self._config, self._torch = config, torch
        known = inspect.signature(self._pipeline.__call__).parameters
        wanted = {"num_inference_steps": config.steps, "guidance_scale": config.guidance}
        self._options = {name: value for name, value in wanted.items() if name in known}

    def draw(self, description: str, size: tuple[int, int], seed: int, data: dict) -> Image.Image:
        """See `ImageGenerator.draw`."""
        del data
        width, height = (math.ceil(side / _MULTIPLE) * _MULTIPLE for side in size)
        with self._lock:
            # The noise is drawn on the CPU, so that it is the same on every device.
            noise = self._torch.Generator("cpu").manual_seed(seed)
            try:
                drawn = self._pipeline(prompt=description, width=width, height=height, generator=noise, **self._options)
            except self._torch.OutOfMemoryError as e:
                raise self._too_large(self._config) from e
        if any(getattr(drawn, "nsfw_content_detected", None) or ()):
            raise Refused("refused", "the pipeline's safety checker hid the image")
        return drawn.images[0].convert("RGB").crop((0, 0, *size))

    def _too_large(self, config: ImageConfig) -> UserError:
        return UserError(
            f"The diffusion model {config.model!r} does not fit into the memory of {self._device} at "
            f"{config.width}x{config.height} in {config.dtype}: take a smaller images.model or size, or images.dtype."
        )


def _check_memory(folder: Path, itemsize: int, device: str, torch) -> None:
    """Raises UserError before loading where the weights do not fit: a process out of host memory would be killed."""
    need = sum(_elements(file) for file in folder.glob("*/*.safetensors") if ".fp16." not in file.name) * itemsize
    if device.startswith("cuda"):
        free, where = torch.cuda.mem_get_info(torch.device(device))[0], device
    else:
        free, where = _host_memory(), "this machine's memory"
    if free is not None and need * _ROOM > free:
        raise UserError(
            f"The diffusion model {folder} needs {need * _ROOM / 2**30:.1f} GiB and {where} has {free / 2**30:.1f} GiB "
            "free: take a smaller images.model, images.dtype='bfloat16', or another machine."
        )


def _elements(file: Path) -> int:
    """Numbers in a safetensors file, by its header."""
    try:
        with open(file, "rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, struct.error, MemoryError) as e:
        raise UserError(f"{file} is not a safetensors file: {e}.") from e


def _host_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
