"""Implements FUSION and FLARE vision-language models for PyTorch and transformers.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    inputs = processor([{"role": "user", "content": question}], Image.open("image.jpg"))
    answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    print(processor.batch_decode(answer, skip_special_tokens=True))

The question's tokens join the image's patches in the encoder (text-guided encoding). In the decoder each round of the
conversation has l x l latent tokens, which the exchange layers update from the image, guided by its question:

    tokens        s s v i i i i v v L L L L v q q e a a e s v L L L L v q e    (i image, L latent, q question,
    visual_index -1-1-1 0 1 2 3-1-1 4 5 6 7-1-1-1-1-1-1-1-1-1 8 91011-1-1-1     a answer, s v e template)
    round_end                                     ^                       ^    the last token before an answer

Shapes: B conversations, S positions, N images, V views of an image, P patches, I tokens of an image in the sequence,
T question tokens, R rounds, L = l * l latents, D decoder width, M images that exist in the batch, K rounds with
latents. All tensors are batch-first, and rows may be padded on either side.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .configuration_fusion import NO_IMAGE, PIXELS, QUADRANTS, FusionConfig
from .decoder_fusion import DecoderLayer, Exchange, FusionRMSNorm, SamplerLayer, decoder_mask, inverse_frequencies
from .vision_fusion import VisionEncoder, checkpointed, pool, resize, square, stitch, tiled_windows, windows

# The name of the cache in transformers: `past_key_values`, or `cache` from 5.24 on.
CACHE = fields(CausalLMOutputWithPast)[2].name


@dataclass
class FusionOutput(CausalLMOutputWithPast):
    """loss = ce + mapping_loss_weight (v2t + t2v); the losses only with labels. logits: (B, S, vocabulary)."""

    ce: Tensor | None = None
    v2t: Tensor | None = None
    t2v: Tensor | None = None


class Visual(NamedTuple):
    """Outputs of the encoder.

    Attributes:
      table: (B, N I + R L, D) into which visual_index points; I includes the room for tiles.
      places: (B, S) bool, the visual positions.
      question, patches: pairs that the mapping loss compares; None without it.
    """

    table: Tensor
    exchange: Exchange | None
    places: Tensor
    question: tuple[Tensor, Tensor] | None
    patches: tuple[Tensor, Tensor] | None


@dataclass
class FusionModelOutput(ModelOutput):
    """last_hidden_state: (B, S, D), normed."""

    last_hidden_state: Tensor | None = None
    visual: Visual | None = None


class Learned(nn.Module):
    """Parameters outside the layers, by name; `forward` returns one of them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, name: str) -> Tensor:
        chosen = getattr(self, name)
        if self.training:  # distributed training waits for every parameter's gradient
            chosen = chosen + sum((0.0 * p.sum() for other, p in self.named_parameters() if other != name), 0.0)
        return chosen


class FusionModel(nn.Module):
    """The encoder, projectors, latents and decoder with exchange: everything but the head and the losses."""

    gradient_checkpointing = False

    def __init__(self, config: FusionConfig):
        super().__init__()
        c, d, dv = config.llm, config.llm["width"], config.vision["width"]
        self.config = config
        taps = 3 if config.taps == "released" else 2
        # Nested as in the published names.
        tower = nn.ModuleDict({"vision_model": VisionEncoder(config)})
        self.vision_tower = nn.ModuleDict({"vision_tower": tower})
        self.mm_projector = nn.Sequential(nn.Linear(taps * dv, d), nn.GELU(), nn.Linear(d, d))
        if config.text_guided or config.mapping_loss_weight > 0:
            self.aux_projector = nn.Sequential(nn.Linear(d, dv), nn.GELU(), nn.Linear(dv, dv))
        if config.semantic_exchange and config.latent_init == "learned":
            self.latents = Learned({str(n): (n, d) for n in config.latent_counts})
        if config.tile_grids:
            self.row_end = Learned({"weight": (d,)})
        self.vision_sampler_layers = nn.ModuleList(SamplerLayer(config) for _ in config.exchange_after)
        self.embed_tokens = nn.Embedding(c["vocab_size"], d)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(c["layers"]))
        self.norm = FusionRMSNorm(d, c["norm_eps"])
        self.table_tokens = config.table_tokens
        self.frequencies = inverse_frequencies(c["rope"], c["head_dim"])  # NumPy: a buffer could be converted or lost

    def encode(
        self,
        dtype: torch.dtype,
        visual_index: Tensor,
        pixel_values: Tensor,
        image_kind: Tensor | None = None,
        tilings: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        round_image: Tensor | None = None,
        round_end: Tensor | None = None,
        latent_start: Tensor | None = None,
    ) -> Visual:
        """Computes everything before the decoder. Only existing images and tiles are encoded."""
        config, encoder, device = self.config, self.vision_tower["vision_tower"]["vision_model"], visual_index.device
        b, n = pixel_values.shape[:2]
        if image_kind is None:
            image_kind = torch.ones((b, n), dtype=torch.long, device=device)
        present = image_kind.flatten().nonzero()[:, 0]
        slot = torch.zeros(b * n, dtype=torch.long, device=device)
        slot[present] = torch.arange(len(present), device=device)
        pixels = pixel_values.flatten(0, 1)[present].to(dtype)

        crops, owner, cut = pixels[:, -1], torch.arange(len(pixels), device=device), None
        if config.tile_grids:
            cut = [[0] * 6] * len(pixels) if tilings is None else tilings.flatten(0, 1)[present].tolist()
            counts = [rows * columns for rows, columns, *_ in cut]
            crops = torch.cat([crops, *(views[:count] for views, count in zip(pixels, counts))])
            owner = torch.cat([owner, owner.repeat_interleave(torch.tensor(counts, device=device))])
        state = encoder.embed(crops)
        question = text = mask = None
        if config.text_guided:
            question = self.embed_tokens(question_ids.flatten(0, 1)[present]).to(device)
            text = self.aux_projector(question)[owner]
            question, mask = question[owner], question_mask.flatten(0, 1)[present].bool()[owner]
        features = self.mm_projector(encoder(state, text, mask)).to(device)
        whole, question_features = features[:, : config.patches], features[:, config.patches :]
        tokens = context = resize(whole[: len(pixels)], config.image_tokens)
        if cut is not None:
            context = self.with_tiles(tokens, resize(whole[len(pixels) :], config.tile_tokens), cut)

        table = F.pad(context, (0, 0, 0, self.table_tokens - context.shape[1]))
        table = table.new_zeros((b * n, *table.shape[1:])).index_copy(0, present, table)
        table = table.view(b, -1, table.shape[-1])
        exchange = None
        if config.semantic_exchange and latent_start is not None and (latent_start >= 0).any():
            row, r = (latent_start >= 0).nonzero(as_tuple=True)
            # The number of latents follows from the number of positions of the rounds' latents.
            count = int((visual_index >= table.shape[1]).sum()) // len(row)
            side = math.isqrt(count)
            if side == 0 or side**2 != count:
                raise ValueError(f"visual_index gives each round {count} latents, which is not a square number.")
            grid = square(tokens)
            if config.uses_quadrants:
                plain = self.mm_projector(encoder(encoder.embed(pixels[:, :QUADRANTS].flatten(0, 1)))).to(device)
                # Top left, top right, bottom left, bottom right.
                context = pool(stitch(plain, 2, 2), 3 * side)
                grid = square(context)
            image = slot[row * n + round_image[row, r].clamp(min=0)]
            if config.latent_init == "learned":
                if count not in config.latent_counts:
                    raise ValueError(f"There are no latents for l^2 = {count}; allowed are {config.latent_counts}.")
                latents = self.latents(str(count)).to(table).expand(len(row), -1, -1)
            else:
                # Cells of the l x l grid are unions of cells of the context's grid, so pooling that again is exact.
                real = (image_kind.flatten()[present] == PIXELS)[:, None, None]
                latents = torch.where(real, pool(grid, side), 0.0).to(table.dtype)[image]
            both = table.new_zeros((*latent_start.shape, count, table.shape[-1])).index_put((row, r), latents)
            table = torch.cat([table, both.flatten(1, 2)], 1)
            places = latent_start[row, r, None] + torch.arange(count, device=device)
            if cut is None:
                index, real = (a[None] for a in windows(*grid.shape[1:3], side, device))
            else:
                boxes = [box for _, _, *box in cut]
                index, real = (a[image] for a in tiled_windows(boxes, grid.shape[1], side, device))
            exchange = Exchange(context, image, row, round_end[row, r].clamp(min=0), places, index, real)

        pairs = [None, None]
        if config.mapping_loss_weight > 0:
            if question is not None:
                pairs[0] = (question[mask], question_features[mask])
            pairs[1] = (state, whole)
        return Visual(table, exchange, visual_index >= 0, *pairs)

    def with_tiles(self, tokens: Tensor, tiles: Tensor, cut: list[list[int]]) -> Tensor:
        """Joins the tokens of each image's whole view with those of its tiles, row by row with a row end after each.

        Args:
          tokens: (M, I, D). tiles: (tiles of all images, tokens of a tile, D). cut: for each image the rows and columns
            of tiles, and top, bottom, left and right of the tokens that are kept in their merged grid.

        Returns:
          (M, the most tokens of an image, D), with zeros after an image's tokens.
        """
        end = self.row_end("weight").to(tokens)
        if self.training:  # distributed training waits for every parameter's gradient
            tokens = tokens + 0.0 * end
        listed = []
        for own, (rows, columns, top, bottom, left, right) in zip(tokens, cut):
            if rows:
                grid = stitch(tiles[: rows * columns], rows, columns)[0, top:bottom, left:right]
                lines = torch.cat([grid, end.expand(len(grid), 1, -1)], 1)
                own, tiles = torch.cat([own, lines.flatten(0, 1)]), tiles[rows * columns :]
            listed.append(own)
        widest = max(map(len, listed))
        return torch.stack([F.pad(own, (0, 0, 0, widest - len(own))) for own in listed])

    def idle(self, x: Tensor) -> Tensor:
        """Returns 0, computed so that every parameter for images has a (zero) gradient.

        Distributed training waits for these gradients, whether or not this process has an image in its batch.
        """
        config, size = self.config, self.config.vision["image_size"]
        count = config.latent_counts[0] if config.semantic_exchange else 0
        first = self.table_tokens

        def one(*shape):
            return torch.zeros((1, *shape), dtype=torch.long, device=x.device)

        visual = self.encode(
            x.dtype,
            first + torch.arange(count, device=x.device)[None],
            torch.zeros((1, 1, QUADRANTS + 1, 3, size, size), device=x.device),
            question_ids=one(1, 1),
            question_mask=one(1, 1) + 1,
            round_image=one(1),
            round_end=one(1),
            latent_start=one(1),
        )
        y = visual.table[:, first : first + count] if count else visual.table
        total = visual.table.sum()
        if visual.exchange is not None:
            for sampler in self.vision_sampler_layers:
                y = sampler(y, *visual.exchange).to(y.device)
            total = total + y.sum()
        if visual.patches is not None:
            total = total + self.aux_projector(visual.patches[1]).sum().to(total.device)
        return 0.0 * total

    def rotary(self, attention_mask: Tensor, queries: int, reach: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 (B, 1, queries, d / 2), of the last positions of each row."""
        lengths = attention_mask.long().cumsum(1)
        positions = (lengths - 1).clamp(min=0)[:, -queries:]
        short, long, scale = self.frequencies
        rope, device = self.config.llm["rope"], attention_mask.device
        frequencies = torch.tensor(short, dtype=torch.float32, device=device)
        if rope["kind"] == "longrope":
            # A row uses the long factors for all of its tokens or for none, as transformers does for a batch of one.
            beyond = (lengths[:, -1] if reach is None else reach.to(device)) > rope["original_length"]
            if reach is None and queries < lengths.shape[1]:
                cached = lengths[:, -queries - 1]
                if (beyond & (cached > 0) & (cached <= rope["original_length"])).any():
                    raise ValueError(
                        f"A row passes the {rope['original_length']} positions of LongRoPE's short factors, by which "
                        "its cached keys were rotated: give every call `reach`, each row's tokens and longest answer."
                    )
            frequencies = torch.where(
                beyond[:, None], torch.tensor(long, dtype=torch.float32, device=device), frequencies
            )
            frequencies = frequencies[:, None, None]
        angles = positions[:, None, :, None].float() * frequencies
        return angles.cos() * scale, angles.sin() * scale

    def decode(
        self, x: Tensor, attention_mask: Tensor, exchange: Exchange | None, cache, past: int, reach, states: list | None
    ) -> Tensor:
        """Runs the decoder. x: (B, S, D). states: a list to which every layer's input is appended, or None."""
        queries = x.shape[1]
        dense = cache is not None and not isinstance(cache, DynamicCache)
        mask, causal = decoder_mask(attention_mask, queries, self.config.llm["sliding_window"], dense)
        shared = (*self.rotary(attention_mask, queries, reach), mask, causal)

        after = self.config.exchange_after
        remat = self.gradient_checkpointing and self.training
        for i, layer in enumerate(self.layers):
            if states is not None:
                states.append(x)
            if remat:
                x = checkpointed(self, layer.__call__, x, *shared)
            else:
                x = layer(x, *shared, cache=cache, past=past)
            if exchange is not None and i in after:
                sampler = self.vision_sampler_layers[after.index(i)]
                # Tensors are passed one by one: reentrant checkpointing computes no gradient for those inside a tuple.
                x = checkpointed(self, sampler.__call__, x, *exchange) if remat else sampler(x, *exchange)
        return self.norm(x)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache=None,
        reach: Tensor | None = None,
        states: list | None = None,
        **images: Tensor | None,
    ) -> FusionModelOutput:
        """Runs the model as FusionForCausalLM.forward does; the other arguments of that have no effect here."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x, visual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds, None
        (b, s), device = x.shape[:2], x.device
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is None:
            attention_mask = torch.ones((b, past + s), dtype=torch.long, device=device)
        attention_mask = attention_mask.to(device)
        if attention_mask.ndim != 2 or attention_mask.shape[1] != past + s:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; {past} cached and {s} new positions ask for "
                f"({b}, {past + s})."
            )
        images = {name: image.to(device) for name, image in images.items() if isinstance(image, Tensor)}
        kind, index = images.get("image_kind"), images.get("visual_index")
        if kind is not None and not (kind != NO_IMAGE).any():
            index = None
        elif not past:
            self.check_whole(images)
        if index is not None:
            images |= placed(images, attention_mask, past or s)
            index = images["visual_index"]
        if index is not None and not past:
            visual = self.encode(x.dtype, **images)
            rows = torch.arange(b, device=device)[:, None]
            x = torch.where((index >= 0)[..., None], visual.table[rows, index.clamp(min=0)].to(x.dtype), x)
        if self.training and torch.is_grad_enabled() and torch.distributed.is_available():
            incomplete = visual is None or (self.config.exchange_after and visual.exchange is None)
            if incomplete and torch.distributed.is_initialized():
                x = x + self.idle(x)
        exchange = None if visual is None else visual.exchange
        return FusionModelOutput(self.decode(x, attention_mask, exchange, cache, past, reach, states), visual)

    def check_whole(self, images: dict[str, Tensor]) -> None:
        """Raises ValueError if only some inputs of an image exist: the model would then answer without seeing it."""
        index = images.get("visual_index")
        if "pixel_values" not in images and (index is None or not (index >= 0).any()):
            return
        config, needed = self.config, ["pixel_values", "visual_index"]
        needed += ["question_ids", "question_mask"] * config.text_guided
        needed += ["round_image", "round_end", "latent_start"] * config.semantic_exchange
        needed += ["tilings"] * bool(config.tile_grids)
        missing = [name for name in needed if name not in images]
        if missing:
            raise ValueError(f"There is an image without {', '.join(missing)}: pass on all that the processor gives.")


def placed(images: dict[str, Tensor], attention_mask: Tensor, read: int) -> dict[str, Tensor]:
    """Converts `visual_index` (B, S), `round_end` and `latent_start` to positions of the padded rows.

    They count from each row's first token, wherever it is.

    Args:
      read: number of positions that the first call of a conversation has read, or is reading.

    Raises:
      ValueError: visual positions or questions come after those.
    """
    index, start = images["visual_index"], attention_mask.long().argmax(1, keepdim=True)
    at = torch.arange(index.shape[1], device=index.device) + start
    names = [name for name in ("round_end", "latent_start") if name in images]
    moved = {name: torch.where(images[name] >= 0, images[name] + start, -1) for name in names}
    ends = moved["round_end"][moved["latent_start"] >= 0] if len(moved) == 2 else at[:0]
    if ((index >= 0) & (at >= read)).any() or (ends >= read).any():
        raise ValueError(
            "A conversation's images, latents and questions are read all at once: pass it whole and without a cache, "
            "and leave out prefill_chunk_size."
        )
    column = torch.arange(attention_mask.shape[1], device=index.device) - start
    real = (column >= 0) & (column < index.shape[1])
    return moved | {"visual_index": index.gather(1, column.clamp(0, index.shape[1] - 1)).where(real, -1)}


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.float(), b.float().to(a.device)
    norms = a.square().sum(-1) * b.square().sum(-1)
    # The lower bound is inside the root, so that a zero vector has a finite gradient.
    return 1.0 - (a * b).sum(-1) * torch.rsqrt(norms.clamp(min=1e-16))


class FusionForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FusionConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _no_split_modules = ["VisionLayer", "DecoderLayer", "SamplerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (if config.tie_word_embeddings)
    _supports_sdpa = True
    _can_compile_fullgraph = False
    # Layers of the tower that the taps do not read; they are in the files where the imported tower had them.
    _keys_to_ignore_on_load_unexpected = [r"\.vision_model\.encoder\.layers\.\d+\."]  # noqa: RUF012

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        self.model = FusionModel(config)
        self.lm_head = nn.Linear(config.llm["width"], config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | FusionRMSNorm):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Learned):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_index: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_kind: Tensor | None = None,
        tilings: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        round_image: Tensor | None = None,
        round_end: Tensor | None = None,
        latent_start: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        reach: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> FusionOutput | tuple:
        """Runs one forward pass. `FusionProcessor` makes its inputs; without images leave out all that concern images.

        Args:
          input_ids: (B, S), the pad token at visual positions; or inputs_embeds, (B, S, D).
          attention_mask: (B, past + S), 0 for padding.
          visual_index: (B, up to S) from each row's first token on, -1 for text, else an index into the row's
            [N * I image tokens | R * L latents]. With dynamic resolution I is `config.table_tokens`: the tokens of the
            whole view, then those of the tiles row by row, each row closed by the row end.
          pixel_values: (B, N, V, 3, H, W) in [-1, 1], the whole image last; first, where the model uses them, its four
            quadrants (top left, top right, bottom left, bottom right), or its tiles row by row. Zeros for a zero image.
          image_kind: (B, N) NO_IMAGE, PIXELS or ZERO_IMAGE; by default all are PIXELS.
          tilings: (B, N, 6) rows and columns of the image's tiles; top, bottom, left and right of the tokens that are
            kept of their merged grid. Zeros where it has none.
          question_ids, question_mask: (B, N, T) question tokens that guide the image's encoding.
          round_image, round_end, latent_start: (B, R) the round's image, the position of the last token before its
            answer and of its first latent, from the row's first token on; -1 where there is none.
          labels: (B, S) token ids, not shifted; negative where unsupervised. num_items_in_batch: supervised tokens of
            all batches that are accumulated; the loss is then this batch's share of their mean.
          past_key_values: the cache; from 5.24 on transformers calls it `cache`.
          logits_to_keep: number of last positions that get logits, or these positions; 0 for all.
          reach: (B,) most tokens that each row will have, by which LongRoPE's factors are chosen; by default those that
            it has. `generate` passes those of the prompt and of the longest answer without its last, which is not read.
          kwargs: other arguments of transformers, which are ignored.
        """
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = cache is not None
        if use_cache and self.training and self.model.gradient_checkpointing:
            use_cache = False
        if not use_cache:
            cache = None
        elif cache is None:
            cache = DynamicCache()
        if output_attentions:
            raise ValueError("The attention here gives no weights: leave out output_attentions.")
        positions = kwargs.get("position_ids")
        if positions is not None:
            check_positions(positions, attention_mask)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [] if wanted else None
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            cache,
            reach,
            states,
            visual_index=visual_index,
            pixel_values=pixel_values,
            image_kind=image_kind,
            tilings=tilings,
            question_ids=question_ids,
            question_mask=question_mask,
            round_image=round_image,
            round_end=round_end,
            latent_start=latent_start,
        )
        hidden, visual = outputs.last_hidden_state, outputs.visual
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        losses = {}
        if labels is not None:
            if logits.shape[1] != hidden.shape[1]:
                raise ValueError("The loss needs the logits of all positions: leave out logits_to_keep.")
            losses = self.losses(logits, labels.to(logits.device), visual, num_items_in_batch)
        output = FusionOutput(logits=logits, **{CACHE: cache}, **losses)
        if states is not None:
            output.hidden_states = (*states, hidden)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def losses(self, logits: Tensor, labels: Tensor, visual: Visual | None, items=None) -> dict[str, Tensor]:
        """Means over the batch's supervised tokens, question tokens and patches."""
        supervised = labels[:, 1:] >= 0
        if visual is not None:  # trainers that supervise all of input_ids mean only the text
            supervised &= ~visual.places[:, 1:].to(labels.device)
        count = supervised.sum()
        chosen = logits[:, :-1][supervised].float()
        ce = F.cross_entropy(chosen, labels[:, 1:][supervised], reduction="sum") / count.clamp(min=1)
        v2t = t2v = ce.new_zeros(())
        if visual is not None and visual.question is not None and len(visual.question[0]):
            v2t = cosine_distance(*visual.question).mean().to(ce.device)
        if visual is not None and visual.patches is not None:
            state, whole = visual.patches
            t2v = cosine_distance(state, self.model.aux_projector(whole)).mean().to(ce.device)
        loss = ce + self.config.mapping_loss_weight * (v2t + t2v)
        if items is not None:
            loss = loss * count / items
        return {"loss": loss, "ce": ce, "v2t": v2t, "t2v": t2v}

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """Generates as in transformers.

        With LongRoPE each row's factors are chosen once, by its prompt and longest answer, as cached keys are fixed.
        """
        ids = next((kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), inputs)
        if self.config.llm["rope"]["kind"] == "longrope" and kwargs.get("reach") is None and ids is not None:
            mask = kwargs.get("attention_mask")
            mask = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device) if mask is None else mask
            kwargs["reach"] = mask.sum(1) + self.longest_answer(ids.shape[1], generation_config, kwargs) - 1
        return super().generate(inputs, generation_config, *args, **kwargs)

    def longest_answer(self, prompt: int, generation_config, kwargs: dict) -> int:
        """The most tokens that `generate` may add to prompts of this length."""

        def option(name):
            places = (kwargs.get(name), getattr(generation_config, name, None))
            return next((value for value in places if value is not None), None)

        new, length = option("max_new_tokens"), option("max_length")
        if new is None and length in (None, 20):  # transformers may write 20 where no length is set
            new, length = self.generation_config.max_new_tokens, self.generation_config.max_length
        if new is None:
            new = 20 if length in (None, 20) else length - prompt
        return max(new, 1)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:  # made for a cache of fixed length; ours is made later
            inputs["attention_mask"] = attention_mask
        return inputs


def check_positions(positions: Tensor, attention_mask: Tensor | None) -> None:
    """Raises ValueError if positions (B, S) differ from those that the model computes itself."""
    queries = positions.shape[-1]
    if attention_mask is None:
        steps = positions.diff(dim=-1)
        real = torch.ones_like(steps)
    else:
        real = attention_mask[:, -queries:].long().to(positions.device)
        steps, real = positions.diff(dim=-1), real[:, 1:] * real[:, :-1]
    if ((steps != 1) & real.bool()).any():
        raise ValueError(
            "position_ids do not count each row's tokens one by one. Rows that hold several texts are not supported: "
            "leave out position_ids and packing."
        )
