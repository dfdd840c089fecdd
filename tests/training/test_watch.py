"""What accompanies the loop: the watchdog, spikes, traces, the timer of checkpoints, memory."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.training import metrics, watch
from fusion_jax.training.memory import explain_memory_errors, memory_in_use
from fusion_jax.training.profiling import Profile, parse_steps
from fusion_jax.training.saving import Every


def test_watchdog_shows_every_threads_stack_once_per_period(caplog):
    def the_thread_that_hangs():
        released.wait()

    released = threading.Event()
    thread = threading.Thread(target=the_thread_that_hangs)
    thread.start()
    try:
        with watch.Watch(0.3 / 60) as phase:
            for _ in range(8):  # busy, but never silent for long
                with phase("computing"):
                    time.sleep(0.06)
            assert not caplog.records
            with phase("waiting for input") as seconds:
                time.sleep(0.55)
        assert 0.5 < seconds() < 5
    finally:
        released.set()
        thread.join()
    assert len(caplog.records) == 1
    assert "(waiting for input)" in caplog.text and "the_thread_that_hangs" in caplog.text
    assert "test_watchdog_shows" in caplog.text, "the main thread too"


def test_spikes_stand_out_from_noise_and_trend():
    rng = np.random.default_rng(0)

    def step(total, grad_norm, update_norm=1.0):
        return {"total": total, "grad_norm": grad_norm, "update_norm": update_norm}

    steps = [step(5 * 0.99**i + 0.1 * rng.normal(), 1 + 0.3 * rng.random()) for i in range(300)]
    spikes = metrics.Spikes()
    assert spikes.find(1, steps) == []
    sentences = spikes.find(301, [step(3.0, 1.1), step(0.3, 40.0), step(np.nan, 1.0, np.nan), step(0.3, 1.1, np.inf)])
    assert [text.split(" is ")[0] for text in sentences] == [
        "step 301: total 3",
        "step 302: grad_norm 40",
        "step 303: total",
        "step 304: update_norm",
    ]
    assert "though loss and gradient are finite" in sentences[-1]
    # A few spikes do not make the next one normal.
    assert len(spikes.find(305, [step(3.0, 1.0)] * 5)) == 5


def test_steps_to_trace():
    assert parse_steps("") is None and parse_steps("3:5") == (3, 5)
    for wrong in ("3", "5:3", "0:2", "a:b", "3:"):
        with pytest.raises(UserError, match="must be FIRST:LAST"):
            parse_steps(wrong)


def test_trace_covers_its_steps(tmp_path):
    tracer = Profile((2, 3), tmp_path)
    for step in range(1, 6):
        tracer.before(step)
        tracer.after(step, jnp.zeros(()) + step)
        assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 3)
    tracer.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_trace_that_cannot_be_taken_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    jax.profiler.start_trace(str(tmp_path / "other"))  # one at a time
    try:
        tracer = Profile((1, 2), tmp_path / "file")
        for step in (1, 2, 3):
            tracer.before(step)
            tracer.after(step, jnp.zeros(()))
        tracer.close()
    finally:
        jax.profiler.stop_trace()
    assert caplog.text.count("no trace in") == 1


def test_time_to_save_comes_every_few_minutes():
    every = Every(0.05 / 60)
    assert not every.due(together=True)
    time.sleep(0.06)
    assert every.due(together=False)
    every.restart()
    assert not every.due(together=True)
    assert not Every(0).due(together=True)


def test_memory_in_use_is_plausible():
    assert 0.05 < memory_in_use()["host_gib"] < 100


def test_what_does_not_fit_into_memory_is_said_with_what_helps():
    with (
        pytest.raises(UserError, match=r"Out of memory.*accumulation.*now dots"),
        explain_memory_errors("dots"),
    ):
        jnp.zeros(1 << 46).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), explain_memory_errors("dots"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
