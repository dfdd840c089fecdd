"""`python -m fusion_jax.serve --checkpoint DIR`: the API under /v1 and, where Gradio is installed, a web page at /.

An API key comes from the environment variable FUSION_API_KEY; it is never logged. Where the device fails the process
says why and ends with exit code 75, on which supervisors start it again.
"""

import contextlib
import logging
import signal

import jax.numpy as jnp
from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.command_line.interrupts import loading
from fusion_jax.config import DTYPES, RunConfig
from fusion_jax.errors import RunAgain, UserError, check
from fusion_jax.inference import generate
from fusion_jax.models.fusion import Fusion
from fusion_jax.server.environment import api_key, check_open_files
from fusion_jax.training import checkpoint

log = logging.getLogger("fusion_jax")

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "step folder, stage folder or workdir")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0 for all")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen on", lower_bound=0, upper_bound=65535)
_NAME = flags.DEFINE_string("model_name", "fusion", "name of the model in the API")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "compute; by default the training's")
_ROWS = flags.DEFINE_integer("rows", 8, "requests answered at once", lower_bound=1)
_QUEUE = flags.DEFINE_integer("queue", 64, "requests that may wait; more get status 429", lower_bound=0)
_TIMEOUT = flags.DEFINE_float("request_timeout", 120.0, "seconds for one request", lower_bound=0.1)
_HEADER_SECONDS = flags.DEFINE_float("header_seconds", 10.0, "seconds for a request's headers", lower_bound=0.1)
_BODY_SECONDS = flags.DEFINE_float("body_seconds", 60.0, "seconds for a request's body", lower_bound=0.1)
_CONNECTIONS = flags.DEFINE_integer("connections", 512, "open at once; idle ones make room for new ones", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 512, "longest answer in tokens", lower_bound=1)
_LENGTHS = flags.DEFINE_list("lengths", [], "prompt lengths to compile, visual tokens included (default: by training)")
_QUESTIONS = flags.DEFINE_list("question_lengths", [], "question tokens of the encoder to compile")
_ROUNDS = flags.DEFINE_list("rounds", [], "rounds of a conversation to compile")
_IMAGES = flags.DEFINE_integer("images", 0, "most images of a conversation (default: by training)", lower_bound=0)
_LATENTS = flags.DEFINE_integer(
    "latents", 0, "l^2, one of the model's latent counts (default: its fixed one)", lower_bound=0
)
_URLS = flags.DEFINE_bool("allow_image_urls", False, "fetch image_url from public http(s) addresses")
_PIXELS = flags.DEFINE_integer("max_image_pixels", 40_000_000, "larger images are refused undecoded", lower_bound=1)
_BYTES = flags.DEFINE_integer("max_body_bytes", 32 << 20, "larger requests are refused", lower_bound=1)
_BODIES = flags.DEFINE_integer(
    "max_bodies_bytes", 256 << 20, "of all requests being read; more get status 429", lower_bound=1
)
_PAGE = flags.DEFINE_bool("page", True, "serve the web page at /")
_UPLOADS = flags.DEFINE_integer("max_upload_bytes", 1 << 30, "of all images that the page keeps; more get status 507")
_HOST_NAMES = flags.DEFINE_list("host_names", [], "public host names of the server; needed where there is no API key")
_ORIGINS = flags.DEFINE_list(
    "cors_origins", [], "sites whose pages may use the API, such as https://app.example.org; * for all"
)
_DRAIN = flags.DEFINE_integer("drain_seconds", 60, "after SIGTERM, seconds for requests to finish", lower_bound=0)


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _CHECKPOINT.value:
        raise UserError("Give --checkpoint DIR; --help lists all flags.")
    try:
        with loading():
            from fusion_jax.server import api, protocol
            from fusion_jax.server.connections import Patience, make_server
            from fusion_jax.server.engine import Engine
            from fusion_jax.server.grammar import Grammars
            from fusion_jax.server.intake import return_large_buffers
            from fusion_jax.server.origins import read_host_names, read_origins
            from fusion_jax.server.pictures import Pictures
    except ImportError as error:
        raise UserError(f"Serving needs the package {error.name}: pip install 'fusion_jax[serve]'.") from error
    check(_UPLOADS.value >= 1, f"--max_upload_bytes={_UPLOADS.value} must be at least 1.")
    host_names, origins = read_host_names(_HOST_NAMES.value), read_origins(_ORIGINS.value)
    page = _import_page() if _PAGE.value else None
    key = api_key()
    check_open_files(_CONNECTIONS.value)

    # ---- Model.
    loaded = checkpoint.load_model(_CHECKPOINT.value)
    config = loaded.config
    model = Fusion(config.model, jnp.dtype(_DTYPE.value or config.dtype))
    buckets = buckets_of(config)
    prompts = generate.Prompts(config, loaded.tokenizer, buckets, _LATENTS.value or None)
    engine = Engine(model, loaded.params, prompts, _ROWS.value, _MAX_TOKENS.value, _QUEUE.value)
    limits = protocol.Limits(
        _MAX_TOKENS.value,
        body_bytes=_BYTES.value,
        image_bytes=_BYTES.value,
        image_pixels=_PIXELS.value,
        images=buckets.images[-1],
        text_bytes=prompts.text_bytes,
        upload_bytes=_UPLOADS.value,
    )
    options = api.Options(
        _NAME.value,
        limits,
        key,
        fetch_urls=_URLS.value,
        timeout=_TIMEOUT.value,
        body_seconds=_BODY_SECONDS.value,
        bodies_bytes=max(_BODIES.value, _BYTES.value),
        host_names=host_names,
        origins=origins,
        streams=max(_CONNECTIONS.value // 2, 1),
    )
    log.info("%s from %s; compiling %s", _NAME.value, loaded.folder, buckets)
    engine.start()
    grammars = Grammars(prompts, config.model.llm.vocab_size)
    grammars.load()

    # ---- Server.
    return_large_buffers()
    app = api.make_app(engine, options, grammars)
    if page is not None:
        app = page.mount(app, engine, options, Pictures(engine, config))
    patience = Patience(_CONNECTIONS.value, _HEADER_SECONDS.value, _BODY_SECONDS.value)

    server = make_server(app, _HOST.value, _PORT.value, patience, _DRAIN.value, lambda: engine.problem, engine.give_up)
    # uvicorn drains on these signals and then raises them again: that would end the process as if it had failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    log.info("listening on http://%s:%d%s", _HOST.value, _PORT.value, "; an API key is asked for" if key else "")
    with contextlib.suppress(SystemExit):  # where it cannot listen
        server.run()
    check(server.started, f"Could not listen on {_HOST.value}:{_PORT.value}; is the port taken?")
    if engine.problem:
        raise RunAgain(f"The engine has failed: {engine.problem}. Start the server again.")
    log.info("no request is open any more; bye")


def _import_page():
    try:
        from fusion_jax.server import page
    except ImportError as error:
        log.warning(
            "no web page: the package %s is missing (pip install 'fusion_jax[page]'; in a checkout start the server by "
            "bash launch/serve.sh)",
            error.name,
        )
        return None
    return page


def buckets_of(config: RunConfig) -> generate.Buckets:
    """From the flags, and where they say nothing from the limits that the stages trained with."""
    stages = config.stages
    longest = max(stage.max_length for stage in stages)
    question = max(stage.max_question_length for stage in stages)
    rounds = max(stage.max_rounds for stage in stages)
    images = _IMAGES.value or max(stage.max_images for stage in stages)
    return generate.Buckets(
        _numbers("lengths", _LENGTHS.value) or _halves(longest),
        _numbers("question_lengths", _QUESTIONS.value) or (question,),
        _numbers("rounds", _ROUNDS.value) or (rounds,),
        (0, 1) if images == 1 else (0, 1, images),
    )


def _numbers(name: str, values: list[str]) -> tuple[int, ...]:
    check(all(v.strip().isdigit() and int(v) for v in values), f"--{name} must be numbers, such as 512,1024.")
    return tuple(sorted({int(value) for value in values}))


def _halves(longest: int) -> tuple[int, ...]:
    """The length itself and its half: a short prompt shall not cost what a long one does."""
    return (longest // 2, longest) if longest >= 128 else (longest,)


if __name__ == "__main__":
    run_main(main)
