"""A judge on this machine: an endpoint of chat completions that gives the replies of a test."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from fusion_jax.evals.judge import Judge

KEY = "sk-secret-5550123"


class Endpoint:
    """Speaks chat completions; `replies` are texts, statuses, or raw bodies, one a request, the last for ever."""

    def __init__(self, replies):
        self.replies, self.requests, self.keys = list(replies), [], []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
                reply = endpoint.replies.pop(0) if len(endpoint.replies) > 1 else endpoint.replies[0]
                reply = reply(body) if callable(reply) else reply
                status, text = (reply, "{}") if isinstance(reply, int) else (200, reply)
                if status == 200 and not text.startswith("<"):
                    text = json.dumps({"choices": [{"message": {"content": text}}]})
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def judge(self, **changes):
        url = f"http://127.0.0.1:{self.server.server_port}/v1/"
        return Judge(url, "grader", KEY, **{"pause": 0.01, "attempts": 3, **changes})
