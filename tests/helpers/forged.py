"""Checkpoints whose small parts say something else, with a list of files that knows of nothing wrong."""

import json

from fusion_jax.training import integrity


def forge(step, part, change):
    """Another text in a small part of a checkpoint, in the list of files too."""
    path = step / part / "_strings.json"
    inner = change(json.loads(json.loads(path.read_text())["json"]))
    path.write_text(json.dumps({"json": inner if isinstance(inner, str) else json.dumps(inner)}))
    integrity.write(step, 0)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}
