"""Serves a checkpoint: `python -m fusion_jax.serve --checkpoint DIR`.

The API is under /v1 and, where Gradio is installed, a web page at /. An API key comes from the environment
variable FUSION_API_KEY; it is never logged. Where the device fails, the process logs why and ends with exit code 75, on
which supervisors start it again.
"""

import contextlib
import logging
import math
import signal

from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.command_line.interrupts import loading
from fusion_jax.config import DTYPES
from fusion_jax.errors import RunAgain, UserError, check
from fusion_jax.inference.prompts import Prompts, buckets_of_training
from fusion_jax.models import weights
from fusion_jax.server.environment import api_key, check_open_files, return_large_buffers
from fusion_jax.training.loading import load_model

log = logging.getLogger("fusion_jax")


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "checkpoint to load: step folder, stage folder or workdir")
    flags.DEFINE_enum("dtype", None, DTYPES, "dtype to compute in (default: that of training)")
    flags.DEFINE_enum(
        "weights", "full", weights.KINDS, "how to store weights: full, in the dtype of computation, or as int8"
    )
    flags.DEFINE_integer(
        "latents", 0, "latents per round: l^2, one of the model's latent counts (0: its fixed count)", lower_bound=0
    )
    # Addresses.
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0 for all")
    flags.DEFINE_integer("port", 8000, "port to listen on; 0 for any free one", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("model_name", "fusion", "name of the model in the API")
    flags.DEFINE_list("host_names", [], "public host names of the server; needed without an API key")
    flags.DEFINE_list(
        "cors_origins", [], "sites whose pages may use the API, such as https://app.example.org; * for all"
    )
    flags.DEFINE_bool("page", True, "serve the web page at /")
    flags.DEFINE_bool("allow_image_urls", False, "fetch image_url from public http(s) addresses")
    # The engine.
    flags.DEFINE_integer("rows", 8, "requests answered at once", lower_bound=1)
    flags.DEFINE_integer("queue", 64, "requests that may wait; more get status 429", lower_bound=0)
    flags.DEFINE_integer("max_tokens", 512, "longest answer in tokens", lower_bound=1)
    flags.DEFINE_float(
        "prefix_gib", 1.0, "GiB of prompts to keep, so that a later turn prefills its rest (0: none)", lower_bound=0
    )
    flags.DEFINE_list(
        "lengths", [], "prompt lengths to compile, visual tokens included (default: that of training, and half)"
    )
    flags.DEFINE_list(
        "question_lengths", [], "question lengths of the encoder to compile (default: that of training, and 64, 256)"
    )
    flags.DEFINE_list("rounds", [], "numbers of rounds to compile (default: that of training, and 1, 4)")
    flags.DEFINE_integer("images", 0, "most images of a conversation (0: as many as in training)", lower_bound=0)
    # Limits.
    flags.DEFINE_float("request_timeout", 120.0, "seconds for one request", lower_bound=0.1)
    flags.DEFINE_float("header_seconds", 10.0, "seconds for a request's headers to arrive", lower_bound=0.1)
    flags.DEFINE_float("body_seconds", 60.0, "seconds for a request's body to arrive", lower_bound=0.1)
    flags.DEFINE_integer("connections", 512, "open connections; idle ones make room for new ones", lower_bound=1)
    flags.DEFINE_integer("max_image_pixels", 40_000_000, "largest image in pixels; checked undecoded", lower_bound=1)
    flags.DEFINE_integer("max_body_bytes", 32 << 20, "largest request in bytes", lower_bound=1)
    flags.DEFINE_integer(
        "max_bodies_bytes", 256 << 20, "bytes of all requests being read; more get status 429", lower_bound=1
    )
    flags.DEFINE_integer("max_upload_bytes", 1 << 30, "bytes of all images that the page keeps; more get status 507")
    flags.DEFINE_integer("drain_seconds", 60, "seconds for requests to finish after SIGTERM", lower_bound=0)


def main(argv: list[str]) -> None:
    f = flags.FLAGS
    if len(argv) > 1 or not f.checkpoint:
        raise UserError("Give --checkpoint DIR; --help lists all flags.")
    try:
        with loading():
            from fusion_jax.server import api, protocol
            from fusion_jax.server.connections import Patience, make_server
            from fusion_jax.server.engine import Engine
            from fusion_jax.server.grammar import Grammars
            from fusion_jax.server.options import Options
            from fusion_jax.server.origins import read_host_names, read_origins
            from fusion_jax.server.pictures import Pictures
            from fusion_jax.server.running_batch import RunningBatch
    except ImportError as error:
        raise UserError(f"Serving needs the package {error.name}: pip install -e '.[serve]'.") from error
    check(f.max_upload_bytes >= 1, f"--max_upload_bytes={f.max_upload_bytes} must be at least 1.")
    check(math.isfinite(f.prefix_gib), f"--prefix_gib={f.prefix_gib} must be a number of GiB; 0 keeps nothing.")
    host_names, origins = read_host_names(f.host_names), read_origins(f.cors_origins)
    page = _import_page() if f.page else None
    key = api_key()
    check_open_files(f.connections)

    # ---- Model.
    loaded = load_model(f.checkpoint, f.dtype, f.weights)
    config = loaded.config
    sizes = (_numbers(name, f[name].value) for name in ("lengths", "question_lengths", "rounds"))
    buckets = buckets_of_training(config.stages, *sizes, f.images)
    prompts = Prompts(config, loaded.tokenizer, buckets, f.latents or None)
    prefix_bytes = int(f.prefix_gib * (1 << 30))
    batch = RunningBatch(loaded.model, loaded.params, prompts, f.rows, f.max_tokens, prefix_bytes=prefix_bytes)
    engine = Engine(batch, f.queue)
    log.info("%s from %s; compiling %s", f.model_name, loaded.folder, buckets)
    engine.start()
    grammars = Grammars(prompts, config.model.llm.vocab_size)
    grammars.load()

    # ---- Application.
    limits = protocol.Limits(
        f.max_tokens,
        body_bytes=f.max_body_bytes,
        image_bytes=f.max_body_bytes,
        image_pixels=f.max_image_pixels,
        images=buckets.images[-1],
        text_bytes=prompts.text_bytes,
        upload_bytes=f.max_upload_bytes,
    )
    options = Options(
        f.model_name,
        limits,
        key,
        fetch_urls=f.allow_image_urls,
        timeout=f.request_timeout,
        body_seconds=f.body_seconds,
        bodies_bytes=max(f.max_bodies_bytes, f.max_body_bytes),
        host_names=host_names,
        origins=origins,
        streams=max(f.connections // 2, 1),
    )
    app = api.make_app(engine, options, grammars)
    if page is not None:
        app = page.mount(app, engine, options, Pictures(engine, config))

    # ---- Server.
    return_large_buffers()
    patience = Patience(f.connections, f.header_seconds, f.body_seconds)
    server = make_server(app, f.host, f.port, patience, f.drain_seconds, lambda: engine.problem, engine.give_up)
    # uvicorn drains on these signals and then raises them again: that would end the process as if it had failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    log.info("listening on http://%s:%d%s", f.host, f.port, "; requests need the API key" if key else "")
    with contextlib.suppress(SystemExit):  # raised where the server cannot listen
        server.run()
    check(server.started, f"Could not listen on {f.host}:{f.port}; is the port taken?")
    if engine.problem:
        raise RunAgain(f"The engine has failed: {engine.problem}. Start the server again.")
    log.info("no request is open any more; bye")


def _import_page():
    """The module of the web page; None, with a warning, where its packages are missing."""
    try:
        from fusion_jax.server import page
    except ImportError as error:
        log.warning(
            "no web page: the package %s is missing (pip install -e '.[page]'; in a checkout start the server by "
            "bash launch/serve.sh)",
            error.name,
        )
        return None
    return page


def _numbers(name: str, values: list[str]) -> tuple[int, ...]:
    """The numbers of a flag, ascending, each once. Raises UserError for what is not a positive number."""
    check(all(v.strip().isdigit() and int(v) for v in values), f"--{name} must be numbers, such as 512,1024.")
    return tuple(sorted({int(value) for value in values}))


if __name__ == "__main__":
    define_flags()
    run_main(main)
