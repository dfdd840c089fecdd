"""The reference of the configuration: written from the dataclasses, each field of which has its line."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "generate_config.py"
spec = importlib.util.spec_from_file_location("generate_config", SCRIPT)
generate_config = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate_config)


PARTS = generate_config.TRAINING + generate_config.STUDIES
if any(map(generate_config.is_documented, generate_config.SYNTHESIS)):
    PARTS += generate_config.SYNTHESIS


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.kind.__name__)
def test_every_field_has_its_line(part):
    fields = generate_config.fields(part.kind)
    assert list(fields) == [one.name for one in dataclasses.fields(part.kind)]
    for name, (_, _, line) in fields.items():
        assert line[:1] and line.endswith("."), f"{part.kind.__name__}.{name} needs a line of documentation under it"


def test_every_choice_is_of_a_field():
    for part in PARTS:
        assert set(part.choices) <= {one.name for one in dataclasses.fields(part.kind)}


def test_the_page_is_current():
    assert generate_config.PAGE.read_text() == generate_config.page(), "run python docs/generate_config.py"
