"""A language model that grades answers, behind an OpenAI-compatible endpoint.

JUDGE_MODEL      name of the model; without it nothing is ever sent anywhere
JUDGE_BASE_URL   for example https://api.openai.com/v1
JUDGE_API_KEY    sent as a bearer token and nowhere else; may be missing for a local server
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from fusion_jax.errors import UserError

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # answers that may be different the next time
_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Judge:
    """Where and whom to ask. `pause` is the wait in seconds before the second attempt; it doubles from there."""

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    attempts: int = 6
    pause: float = 2.0
    timeout: float = 60.0

    def ask(self, prompt: str, max_tokens: int, temperature: float = 0.0) -> str:
        """The model's reply to one message.

        Raises:
          UserError: the endpoint refuses, or stays unreachable for all attempts.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        for attempt in range(self.attempts):
            wait = min(self.pause * 2**attempt, _LONGEST_WAIT)
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
                if self.key:
                    # Not carried along to wherever the endpoint might redirect.
                    request.add_unredirected_header("Authorization", f"Bearer {self.key}")
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}"
                if error.code not in _AGAIN:
                    break
                wait = max(wait, _retry_after(error))
            except (urllib.error.URLError, OSError) as error:
                problem = str(getattr(error, "reason", error))
            except (ValueError, KeyError, IndexError, TypeError):
                problem = "an answer that is not in the form of chat completions"
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        # What the server said may repeat the request, so only the status is shown.
        raise UserError(f"The judge {self.model} at {self.base_url} does not answer: {problem}.")


def _retry_after(error: urllib.error.HTTPError) -> float:
    value = error.headers.get("Retry-After", "") if error.headers else ""
    return min(float(value), _LONGEST_WAIT) if value.replace(".", "", 1).isdigit() else 0.0


def from_environment(environment: Mapping[str, str] = os.environ) -> Judge | None:
    """The configured judge; None without JUDGE_MODEL. UserError where the address is missing or no URL."""
    model = environment.get("JUDGE_MODEL", "")
    if not model:
        return None
    url = environment.get("JUDGE_BASE_URL", "")
    if not url.startswith(("http://", "https://")):
        raise UserError("JUDGE_MODEL is set, so JUDGE_BASE_URL must be too: http(s)://host/v1.")
    return Judge(url, model, environment.get("JUDGE_API_KEY", ""))
