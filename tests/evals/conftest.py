"""A judge for the tests of benchmarks that a language model grades."""

import pytest
from helpers.judge_endpoint import Endpoint


@pytest.fixture
def endpoint():
    """Starts judges: `endpoint(*replies)` is an `Endpoint`."""
    started = []

    def start(*replies):
        started.append(Endpoint(replies))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()
