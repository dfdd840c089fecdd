"""Opens mixtures: YAML files that list data sets, how much of each is drawn and with what weight.

See data/sources.py for what an entry may say. A weight counts after the strategy: 1 is the default, 0.5 draws half of
what was chosen. Which records make up the fraction is decided by seed and name and stays the same from epoch to epoch.
A percentage is rounded up, and takes at least one record.
"""

from pathlib import Path

import yaml

from fusion_jax.data import shards
from fusion_jax.data.data_sets import DataSet, as_yaml, open_json, open_stored, parse_strategy
from fusion_jax.data.tfds import TfdsRecords
from fusion_jax.errors import UserError, nearest, no_key
from fusion_jax.files import brief, read_text, shown

_MAX_WEIGHT = 1_000_000
_MAX_YAML = 1 << 20  # bytes of a mixture
_MAX_KEYS = 1000  # keys of one YAML mapping, with all that is merged into it
# The key that names an entry's data, and the further keys that the entry may then have.
_ENTRIES = {
    "json_path": ("image_folder", "allow_outside"),
    "shards": (),
    "tfds": ("data_dir", "features", "prompt"),
}
_COMMON = ("sampling_strategy", "weight")


def open_mixture(path: Path, seed: int, image_folder: str | Path | None, allow_outside: bool) -> list[DataSet]:
    """Opens all data sets that a YAML mixture lists, in its order.

    Args:
      path: the YAML file.
      seed: for the `random` strategies and the fractions of weights.
      image_folder: for the entries that name none; by default the folder of each JSON file.
      allow_outside: as for `sources.load_source`.

    Raises:
      UserError: missing or invalid YAML, no `datasets`, unknown or duplicate keys, or whatever opening an entry raises.
    """
    try:
        config = yaml.load(read_text(path, limit=_MAX_YAML), Loader=_Loader)
    except OSError as e:
        raise UserError(f"Cannot read the data mixture {path}: {e.strerror}.") from e
    except RecursionError as e:
        raise UserError(f"{path} is not a data mixture: it is nested too deeply.") from e
    except Exception as e:  # besides YAMLError: values that do not fit their tag raise almost anything
        raise UserError(f"{path} is not valid YAML: {shown(' '.join(str(e).split()), 500)}.") from e
    if not isinstance(config, dict) or not isinstance(datasets := config.get("datasets"), list) or not datasets:
        has = (
            "; datasets is " + as_yaml(config["datasets"]) if isinstance(config, dict) and "datasets" in config else ""
        )
        raise UserError(f"{path} must have a list `datasets` with at least one entry, each with a json_path{has}.")
    entry_keys = {*_ENTRIES, *_COMMON, *(key for keys in _ENTRIES.values() for key in keys)}
    if misplaced := [key for key in config if key in entry_keys]:
        raise UserError(f"{path}: {misplaced[0]} is beside `datasets`; it belongs in an entry of that list.")
    parts = []
    for k, entry in enumerate(datasets):
        where = f"{path}, datasets entry {k}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be a mapping with one of {', '.join(_ENTRIES)}, not {as_yaml(entry)}.")
        kinds = [kind for kind in _ENTRIES if kind in entry]
        if len(kinds) != 1:
            has = ", ".join(kinds) or ", ".join(brief(key) for key in entry) or "nothing"
            near = "".join(f"; {one}" for one in (nearest(key, _ENTRIES) for key in entry) if one and not kinds) or "."
            raise UserError(f"{where} must be a mapping with one of {', '.join(_ENTRIES)}; it has {has}{near}")
        if not isinstance(entry[kinds[0]], str) or not entry[kinds[0]]:
            raise UserError(f"{where}: {kinds[0]} must be a text, not {as_yaml(entry[kinds[0]])}.")
        keys = (kinds[0], *_COMMON, *_ENTRIES[kinds[0]])
        for key in sorted(map(shown, entry.keys() - set(keys))):
            raise no_key(f"{path}: datasets[{k}]", key, keys)
        weight = entry.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight <= _MAX_WEIGHT:
            raise UserError(
                f"{where}: weight must be a number above 0 and at most {_MAX_WEIGHT:,}, not {as_yaml(weight)}."
            )
        folder = image_folder
        if "image_folder" in entry:
            named = entry["image_folder"]
            if not isinstance(named, str | None):
                raise UserError(f"{where}: image_folder must be a text, not {as_yaml(named)}.")
            folder = None if named is None else path.parent / named
        part = _open_entry(entry, path.parent, folder, seed, where, allow_outside)
        part.weigh(weight, seed)
        parts.append(part)
    for key in sorted(map(shown, config.keys() - {"datasets"})):
        raise no_key(f"{path}: the mixture", key, ["datasets"])
    return parts


def _open_entry(
    entry: dict, here: Path, image_folder: str | Path | None, seed: int, where: str, outside: bool
) -> DataSet:
    strategy = entry.get("sampling_strategy", "all")
    parse_strategy(strategy, where)  # a typing error should be reported before a long file is read
    if "json_path" in entry:
        outside = entry.get("allow_outside", outside)
        if not isinstance(outside, bool):
            raise UserError(f"{where}: allow_outside must be true or false, not {as_yaml(outside)}.")
        return open_json(here / entry["json_path"], image_folder, strategy, seed, where, outside)
    if "shards" in entry:
        folder = entry["shards"] if shards.is_url(entry["shards"]) else str(here / entry["shards"])
        return open_stored(folder, shards.Shards(folder), strategy, seed, where)
    data_dir, features, prompt = (entry.get(key) for key in _ENTRIES["tfds"])
    if not isinstance(data_dir, str | None) or not isinstance(prompt, str | None):
        raise UserError(f"{where}: data_dir and prompt must be texts.")
    if not isinstance(features, dict | None):
        raise UserError(f"{where}: features must be a mapping such as {{image: image, text: caption}}.")
    if data_dir is not None and not shards.is_url(data_dir):
        data_dir = str(here / Path(data_dir).expanduser())
    spec = f"tfds:{entry['tfds'].removeprefix('tfds:')}"
    try:
        records = TfdsRecords(spec, data_dir, features, prompt)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return open_stored(spec, records, strategy, seed, where)


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping names a key twice, or becomes huge by what is merged into it."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping has more than {_MAX_KEYS} keys", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name != "<<":
                problem = f"the key {name!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
