"""Forges a small part of a checkpoint, and updates its list of files to match."""

import json

from fusion_jax.training import integrity


def forge(step, part, change):
    """Replaces the text of a small part of a checkpoint, and rewrites the list of files."""
    path = step / part / "_strings.json"
    inner = change(json.loads(json.loads(path.read_text())["json"]))
    path.write_text(json.dumps({"json": inner if isinstance(inner, str) else json.dumps(inner)}))
    integrity.write(step, 0)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}
