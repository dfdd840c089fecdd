"""A site's own page in a real browser that asks the API of this server, where it is named and where it is not."""

import contextlib
import http.server
import json
import shutil
import threading

import pytest
from helpers.echo_server import serving

from fusion_jax.server.origins import read_origins

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
KEY = "a-key-for-the-test"
ASK = """
async ([path, key, options, credentials]) => {
  const headers = key ? {"Authorization": `Bearer ${key}`, "X-Stainless-Lang": "js"} : {}
  if (options.body) headers["Content-Type"] = "application/json"
  try {
    const answer = await fetch(path, {...options, headers, credentials})
    return [answer.status, await answer.text()]
  } catch (error) { return [0, String(error)] }
}
"""


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>a site</title>")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def other_site():
    """The port of a server with an empty page."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_browser_asks_from_a_site_that_is_named(tmp_path):
    with other_site() as port, sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for origins, credentials in (([f"http://localhost:{port}"], "include"), (["*"], "omit")):
            with serving(tmp_path / credentials, api_key=KEY, origins=read_origins(origins)) as server:
                page = chromium.new_page()
                page.goto(f"http://localhost:{port}/")

                def ask(path, page=page, server=server, credentials=credentials, key=KEY, **options):
                    if "body" in options:
                        options |= {"method": "POST", "body": json.dumps(options["body"])}
                    return page.evaluate(ASK, [server.address + path, key, options, credentials])

                chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
                status, text = ask("/v1/chat/completions", body=chat)
                assert status == 200 and json.loads(text)["choices"][0]["message"]["content"]
                status, text = ask("/v1/chat/completions/", body=chat | {"stream": True})
                assert status == 200 and text.endswith("data: [DONE]\n\n")
                assert ask("/health", key="")[0] == ask("/v1/models")[0] == 200
                for path, options, expected in (
                    ("/v1/chat/completions", {"body": chat | {"max_tokens": 10**6}}, 400),
                    ("/v1/chat/completions", {"body": chat, "key": "wrong"}, 401),
                    ("/v1/completions", {"body": chat}, 404),
                    ("/v1/chat/completions", {}, 405),
                ):
                    status, text = ask(path, **options)
                    assert status == expected and json.loads(text)["error"]["message"]
                assert ask("/v1/models", method="DELETE")[0] == 0
                if credentials == "include":  # the same page under another name is another site
                    page.goto(f"http://127.0.0.1:{port}/")
                    for path, options in (
                        ("/v1/chat/completions", {"body": chat}),
                        ("/v1/models", {}),
                        ("/health", {}),
                    ):
                        assert ask(path, **options)[0] == 0
                    assert not server.engine.reserved
        chromium.close()
