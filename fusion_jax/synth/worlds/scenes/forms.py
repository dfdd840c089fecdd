"""Lists the kinds that this world answers, and finds for an unknown kind a known one of the same form."""

from fusion_jax.synth.backends.base import Unusable

CAPTION_KINDS = ("caption_color", "caption_count", "caption_scene", "caption_spatial", "caption_text")
CONTRAST_KINDS = ("contrast_short", "contrast_long")
DESCRIBED_KINDS = ("multi_choice", "conv_short", "conv_long", "reasoning", "text_qa", "caption_long")
KINDS = (*CAPTION_KINDS, *CONTRAST_KINDS, *DESCRIBED_KINDS)

# For kinds outside `KINDS`: (keys of `describe`, keys of a pair) -> the kind of the same form.
_FORMS = {
    "describe": {
        ("caption",): "caption_scene",
        ("description",): "conv_short",
        ("left", "right"): "contrast_short",
    },
    "qa": {("answer", "question"): "conv_short", ("answer", "options", "question"): "multi_choice"},
}


def likeness(kind: str, purpose: str, schema: dict | None) -> str:
    """The kind itself, or for an unknown one the known kind whose answers have the same form.

    Args:
      purpose: "describe" or "qa". schema: the schema of the answer.

    Raises:
      Unusable: no kind of this world has that form.
    """
    if kind in KINDS:
        return kind
    wanted = (schema or {}).get("properties", {})
    if purpose == "qa":
        wanted = wanted.get("pairs", {}).get("items", {}).get("properties", {}) if set(wanted) == {"pairs"} else {}
    known = _FORMS[purpose].get(tuple(sorted(wanted)))
    if known is None:
        forms = "; ".join(", ".join(keys) for keys in _FORMS[purpose])
        raise Unusable(
            "no_such_kind",
            f"the embedded backend cannot answer {purpose} of kind {kind!r}: it writes answers with the keys {forms}, "
            f"and the kind's schema has {', '.join(wanted) or 'others'}; give llm another backend",
        )
    return known
