"""Fixtures of the page, a visitor, a secret file, a checkpoint and a server process; see page_site, server_process."""

import pytest


@pytest.fixture(scope="module")
def site():
    from helpers.page_site import served

    with served() as site:
        yield site


@pytest.fixture
def visitor(site):
    from helpers.page_site import Browser

    site[1].go.set()
    with Browser(site[0]) as one:
        yield one


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("a-secret-that-stays-here")
    path.chmod(0o600)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from helpers.server_process import make_checkpoint

    folder = tmp_path_factory.mktemp("mein Öl")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    from helpers.server_process import running

    with running(folder) as process:
        yield process
