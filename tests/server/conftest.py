"""The page, a visitor of it and a file that nobody may see, for the page's tests; see page_site."""

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
