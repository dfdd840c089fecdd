"""Writes a scene as text: captions of the published kinds and descriptions of a given length.

All texts are true of the scene, and `parse.py` parses a description back to exactly the scene that it was written from.
"""

import random

from fusion_jax.synth.worlds.scenes import graph
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.lexicon import NUMBERS, RGB
from fusion_jax.synth.worlds.words import article, capital

CAPTION_WORDS = 12

_ROW_PHRASES = {
    "front": ("in the foreground", "at the front"),
    "back": ("in the background", "further back"),
    "air": ("high up", "near the top"),
}
_IN_FLIGHT = ("high up", "in the air")
_COLUMN_PHRASES = {
    "left": ("on the left", "on the left-hand side"),
    "center": ("in the middle", "in the center"),
    "right": ("on the right", "on the right-hand side"),
}
_FLYING = ("bird", "butterfly", "airplane", "kite")
_SITTING = ("cat", "rabbit", "duck", "snail")
_LYING = ("apple", "pear", "pumpkin", "ball", "hat", "book")


def count_words(text: str) -> int:
    """The number of words, by white space."""
    return len(text.split())


def where(group: Group, rng: random.Random | None = None, used: list[str] | None = None) -> str:
    """ "in the foreground on the left": the slot in words; without a generator always the same ones.

    Args:
      used: phrases of the text so far; the least frequent are chosen, and added to them.
    """
    row, column = _ROW_PHRASES[group.row], _COLUMN_PHRASES[group.column]
    if group.noun in _FLYING:
        row = _IN_FLIGHT
    if rng is None:
        return f"{row[0]} {column[0]}"
    words = [rng.choice(row), rng.choice(column)]
    if used is not None:
        words = [min(rng.sample(phrases, len(phrases)), key=used.count) for phrases in (row, column)]
        used += words
    if words[0].startswith(("in", "at")) and rng.random() < 0.3:
        words.reverse()
    return " ".join(words)


def be(group: Group) -> str:
    """ "is" or "are"."""
    return "are" if group.plural else "is"


def stands(group: Group, rng: random.Random) -> str:
    """A verb for how a group stands, lies, sits, flies or hangs."""
    if group.row != "air":
        own = ("sits", "sit") if group.noun in _SITTING else ("lies", "lie") if group.noun in _LYING else None
        one, many = rng.choice((own or ("stands", "stand"), own or ("is placed", "are placed"), ("can be seen",) * 2))
    elif group.noun in _FLYING:
        one, many = "flies", "fly"
    elif group.noun == "balloon":
        one, many = "floats", "float"
    else:
        one, many = "hangs", "hang"
    return many if group.plural else one


def ink(group: Group) -> str:
    """The colour of the letters on a carrier, as drawing.py paints them."""
    r, g, b = RGB[group.colour]
    return "black" if 0.3 * r + 0.59 * g + 0.11 * b > 120 else "white"


def written(group: Group, rng: random.Random, form: int | None = None) -> str:
    """The words after a carrier's name that quote its text, or nothing; `form` 0 to 3 chooses them."""
    if not group.text:
        return ""
    form = rng.randrange(4) if form is None else form
    return (
        f' that reads "{group.text}"',
        f' with the words "{group.text}" on it',
        f' that says "{group.text}" in {ink(group)} letters',
        f' bearing the words "{group.text}"',
    )[form]


def called(scene: Scene, group: Group, rng: random.Random | None = None) -> str:
    """A definite name that fits this group alone: "the apples", "the red apples"."""
    names = graph.names(scene, group)
    return names[0] if rng is None else rng.choice(names)


def _opening(scene: Scene, rng: random.Random) -> list[str]:
    place = scene.place
    phrase = article(place.phrase)
    first = rng.choice(
        (
            f"The picture shows {phrase}.",
            f"The scene is set {place.preposition} {phrase}.",
            f"This is a view of {phrase}.",
            f"{capital(phrase)} fills the picture.",
            f"We look at {phrase}.",
        )
    )
    second = rng.choice(
        (
            f"Below there is {place.ground}, and beyond it {place.behind}.",
            f"In front one sees {place.ground}, and behind it {place.behind}.",
            f"One sees {place.ground} and, at the far end, {place.behind}.",
        )
    )
    return [first, second]


def _introduction(group: Group, form: int, rng: random.Random, used: list[str]) -> str:
    p, full = where(group, rng, used), group.full + written(group, rng, form % 4)
    verb = stands(group, rng)
    return (
        f"{capital(p)} {verb} {full}.",
        f"{capital(full)} {verb} {p}.",
        f"{capital(p)}, one can see {full}.",
        f"{capital(p)} there {be(group)} {full}.",
        f"{capital(p)} the artist put {full}.",
        f"There {be(group)} {full} {p}.",
    )[form]


def relation_sentence(scene: Scene, a: Group, relation: str, b: Group, rng: random.Random) -> str:
    """A sentence that states the relation of a to b."""
    words = f"to the {relation}" if relation in ("left of", "right of") else relation
    verb = rng.choice((be(a), stands(a, rng)))
    return f"{capital(called(scene, a, rng))} {verb} {words} {called(scene, b, rng)}."


def _extras(scene: Scene, rng: random.Random) -> list[str]:
    """Further true sentences, in a random order."""
    sentences = []
    pairs = graph.relations(scene)
    rng.shuffle(pairs)
    seen = set()
    for a, relation, b in pairs:
        if frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            sentences.append(relation_sentence(scene, a, relation, b, rng))
    sentences = sentences[:4]
    first, second, third = rng.sample(graph.absent_nouns(scene), 3)
    sentences += [f"There is no {first} in sight.", f"No {second} and no {third} can be seen."]
    total = sum(group.count for group in scene.groups)
    if total > 1:
        sentences.append(f"Taken together, these are {NUMBERS[total]} things.")
    sentences += rng.sample(
        (
            "Light falls from the upper left.",
            "Everything has a thin dark outline and a soft shine.",
            "The drawing is clean, with rounded shapes and clear colors.",
            "No person appears anywhere.",
            "The view is straight ahead, from slightly above.",
            "It looks like an illustration made for children.",
            "All that matters is plainly visible.",
            *(() if scene.place.indoors else ("The air is clear, without fog or rain.",)),
            "The shading makes every shape look solid.",
            "The colors are strong and easy to tell apart.",
        ),
        7,
    )
    sentences.append(scene.place.mood)
    rng.shuffle(sentences)
    return sentences


def description(scene: Scene, rng: random.Random, low: int = 60, high: int = 180) -> str:
    """Writes one paragraph of `low` to `high` words that describes the whole scene."""
    opening = _opening(scene, rng)
    order = list(scene.groups)
    rng.shuffle(order)
    # Each form is used once, because the text filters count repetition.
    used: list[str] = []
    body = [_introduction(group, form, rng, used) for group, form in zip(order, rng.sample(range(6), 6))]
    sentences = [*opening, *body]
    extras = _extras(scene, rng)
    goal = rng.randint(low + (high - low) // 4, high - (high - low) // 4)
    for sentence in extras:
        total = count_words(" ".join(sentences))
        if total >= goal or total + count_words(sentence) > high:
            continue
        sentences.append(sentence)
    return " ".join(sentences)


def group_phrase(group: Group, size: bool = True, colour: bool = True) -> str:
    """ "two small red apples", or less of that if wanted."""
    words = " ".join(w for w in (group.size if size else "", group.colour if colour else "", group.words) if w)
    return f"{NUMBERS[group.count]} {words}" if group.plural else article(words)


def listed(phrases: list[str]) -> str:
    """ "a cat, two ducks and a tree"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _fitting(candidates: list[str], rng: random.Random) -> str | None:
    fitting = [capital(c) for c in candidates if count_words(c) <= CAPTION_WORDS]
    return rng.choice(fitting) if fitting else None


def _in(scene: Scene) -> str:
    """ "on a sandy beach", or "over a sandy beach" where nothing touches it."""
    aloft = all(group.row == "air" for group in scene.groups)
    over = aloft and (scene.place.preposition == "on" or not scene.place.indoors)
    return f"{'over' if over else scene.place.preposition} {article(scene.place.phrase)}"


def _set(scene: Scene, phrases: list[str]) -> str:
    """ "two red cars on a city street", but "a city street with a bird and a car", as the bird is not on the street."""
    aloft = {group.row == "air" for group in scene.groups}
    if len(aloft) > 1 and scene.place.preposition == "on":
        return f"{article(scene.place.phrase)} with {listed(phrases)}"
    return f"{listed(phrases)} {_in(scene)}"


def color_caption(scene: Scene, rng: random.Random) -> dict | None:
    """A caption of what has which colour; None where twelve words are too few."""
    groups = list(scene.groups)
    rng.shuffle(groups)
    bare = [group_phrase(g, size=False) for g in groups]
    sized = [group_phrase(g) for g in groups]
    forms = [
        f"{_set(scene, bare)}.",
        f"{_set(scene, sized)}.",
        f"{listed(sized)}.",
        f"there are {listed(bare)}.",
        f"a picture of {listed(bare)}.",
    ]
    forms = [f for f in forms if groups[0].plural or not f.startswith("there are")]
    text = _fitting(forms, rng)
    return text and {"caption": text, "colors": list(scene.colours)}


def count_caption(scene: Scene, rng: random.Random) -> dict | None:
    """A caption of how many things there are."""
    groups = list(scene.groups)
    rng.shuffle(groups)
    coloured = [rng.random() < 0.5 for _ in groups]
    phrases = [group_phrase(g, size=False, colour=c) for g, c in zip(groups, coloured)]
    text = _fitting([f"{_set(scene, phrases)}.", f"{listed(phrases)}."], rng)
    names: dict[str, dict] = {}
    for g, colour in zip(groups, coloured):
        name = f"{g.colour} {g.words}" if colour else g.words
        if name in names:
            return None
        names[name] = {"name": name, "count": g.count}
    return text and {"caption": text, "objects": list(names.values())}


def scene_caption(scene: Scene, rng: random.Random) -> dict | None:
    """A caption of things in one setting."""
    groups = list(scene.groups)
    rng.shuffle(groups)
    be_there = "are" if len(groups) > 1 or groups[0].plural else "is"
    full, bare = [group_phrase(g) for g in groups], [group_phrase(g, size=False) for g in groups]
    forms = [f"{_set(scene, full)}.", f"{_set(scene, bare)}.", f"{article(scene.place.phrase)} with {listed(bare)}."]
    if not _set(scene, bare).startswith(article(scene.place.phrase)):
        forms += [f"{listed(full)} {be_there} {_in(scene)}.", f"{_in(scene)}, {listed(bare)}."]
    text = _fitting(forms, rng)
    return text and {"caption": text, "scene": scene.place.phrase}


def spatial_caption(scene: Scene, rng: random.Random) -> dict | None:
    """A caption of where things are relative to each other."""
    pairs = graph.relations(scene)
    rng.shuffle(pairs)
    for a, relation, b in pairs:
        words = f"to the {relation}" if relation in ("left of", "right of") else relation
        full = f"{group_phrase(a)} {be(a)} {words} {group_phrase(b)}"
        bare = f"{group_phrase(a, size=False)} {words} {group_phrase(b, size=False)}"
        forms = [f"{full}.", f"{bare}."] + ([f"{bare} {_in(scene)}."] if {a.row, b.row} <= {"back", "front"} else [])
        text = _fitting(forms, rng)
        if text:
            return {"caption": text, "objects": [a.words, b.words], "relation": words}
    return None


def text_caption(scene: Scene, rng: random.Random) -> dict | None:
    """A caption of what is written on what; None where there is no text."""
    groups = list(scene.texts)
    if not groups:
        return None
    rng.shuffle(groups)
    phrases = [f'{group_phrase(g, size=False)} reads "{g.text}"' for g in groups]
    other = [f'"{g.text}" is written on {group_phrase(g, size=False)}' for g in groups]
    forms = [
        f"{listed(phrases)}.",
        f"{listed(other)}.",
    ]
    if scene.place.preposition == "in" or all(g.row != "air" for g in groups):
        here = f"{scene.place.preposition} {article(scene.place.phrase)}"
        forms += [f"{listed(phrases)} {here}.", f"{listed(other)} {here}."]
    text = _fitting(forms, rng)
    return text and {"caption": text, "texts": [{"text": g.text, "carrier": g.words} for g in groups]}


def pool_caption(scene: Scene, rng: random.Random) -> str:
    """A caption like those that people write: things, some colours, a place, perhaps a relation or a text."""
    groups = list(scene.groups)
    rng.shuffle(groups)
    # Each way to introduce a text is used once, because the text filters count repetition.
    phrases = [
        group_phrase(g, size=rng.random() < 0.6, colour=rng.random() < 0.85) + written(g, rng, form)
        for g, form in zip(groups, rng.sample(range(4), 4))
    ]
    forms = [_set(scene, phrases), f"{article(scene.place.phrase)} with {listed(phrases)}"]
    if not forms[0].startswith(article(scene.place.phrase)):
        forms += [f"{_in(scene)}, there {be(groups[0])} {listed(phrases)}", f"a picture of {forms[0]}"]
    pairs = graph.relations(scene)
    if pairs and len(groups) == 2:
        a, relation, b = rng.choice(pairs)
        words = f"to the {relation}" if relation in ("left of", "right of") else relation
        first, second = group_phrase(a) + written(a, rng, 0), group_phrase(b) + written(b, rng, 3)
        beyond = scene.place.preposition == "on" and "air" in (a.row, b.row)
        forms += [f"{first} {words} {second}{'' if beyond else ' ' + _in(scene)}"] * 2
    return capital(rng.choice(forms)) + "."
