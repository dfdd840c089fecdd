"""Makes scenes at random, from a draft that leaves things open, or as variations of another scene.

All random choices use the generator that is passed in, so a seed decides them.
"""

import dataclasses
import random
from collections.abc import Iterable

from fusion_jax.synth.worlds.scenes import graph
from fusion_jax.synth.worlds.scenes.graph import MAX_OF_A_KIND, MAX_TEXT_WORDS, MAX_THINGS, Group, Scene
from fusion_jax.synth.worlds.scenes.lexicon import CARRIERS, COLUMNS, NOUNS, ROWS, SIZES, TEXTS
from fusion_jax.synth.worlds.scenes.parse import Draft, DraftGroup
from fusion_jax.synth.worlds.scenes.settings import SETTINGS

# Things that carry text but may also be without; a sign without text would look odd.
PLAIN_CARRIERS = ("mug", "book", "box")
AIR_SLOTS, GROUND_SLOTS = len(COLUMNS), 2 * len(COLUMNS)
# Largest ratio of heights in a scene that no caption prescribes: a snail beside a house would be a dot. Things that
# hang or fly are drawn by a rule of their own, and their heights may differ more.
RATIO, AIR_RATIO = 8.0, 25.0

BROAD = ("bird", "hat", "suitcase", "snail", "teapot", "cake")  # three of them side by side would be tiny


class Impossible(ValueError):
    """A draft that cannot be drawn as it says."""


def _fits(noun: str, setting: str) -> bool:
    """Whether a thing belongs in a setting: indoors or outdoors, and neither too small nor too large for it."""
    place, thing = SETTINGS[setting], NOUNS[noun]
    at_home = thing.home in ("anywhere", "indoors" if place.indoors else "outdoors", "sky" if place.sky else "")
    return at_home and noun not in place.shows and place.metres[0] <= thing.metres <= place.metres[1]


def _most(noun: str, groups: int) -> int:
    """Most copies of a thing in an invented scene with so many groups: three houses would all be tiny."""
    metres = NOUNS[noun].metres
    if metres >= 1.4:
        return 1 if groups > 2 else 2
    return 2 if metres >= 0.5 or noun in BROAD else MAX_OF_A_KIND


def _in_proportion(noun: str, others: Iterable[str]) -> bool:
    """Whether a thing can be drawn beside the others without one of them becoming a dot."""
    for other in others:
        small, large = sorted((NOUNS[noun].metres, NOUNS[other].metres))
        if large > small * (AIR_RATIO if NOUNS[noun].air or NOUNS[other].air else RATIO):
            return False
    return True


def choose_setting(draft: Draft, rng: random.Random) -> str:
    """Chooses a setting in which most of the draft's things make sense."""
    fitting = {name: sum(_fits(group.noun, name) for group in draft.groups) for name in SETTINGS}
    # Settings against which a thing's colour would be lost are left out.
    for group in draft.groups:
        for name, place in SETTINGS.items():
            fitting[name] -= (group.colour in place.clash) * 0.5
    best = max(fitting.values())
    return rng.choice([name for name, fit in fitting.items() if fit == best])


def settle(draft: Draft, rng: random.Random, exact: bool = False, colours: int | None = None) -> Scene:
    """Makes a scene that follows a draft and fills in what the draft leaves open.

    Args:
      draft: as read by `parse.parse`. rng: decides what is open.
      exact: whether to raise for what cannot be drawn as described (a seventh thing, a mug above an apple) instead of
        omitting it.
      colours: most different colours, as far as the draft leaves them open.

    Raises:
      Impossible: there is nothing to draw, or, if `exact`, not everything can be.
    """
    groups, moved = _countable(draft, exact)
    setting = draft.setting or choose_setting(draft, rng)
    relations = [(moved[a], r, moved[b]) for a, r, b in draft.relations if a in moved and b in moved]
    slots = _slots(groups, relations, rng)
    if slots is None:
        if exact:
            raise Impossible("the positions contradict each other, or a thing cannot be at its position")
        # Relations are added one by one, as long as all of them can hold.
        kept: list[tuple[int, str, int]] = []
        for relation in relations:
            if _slots(groups, [*kept, relation], random.Random(0)) is not None:
                kept.append(relation)
        slots = _slots(groups, kept, rng) or _slots(
            [dataclasses.replace(g, row=None, column=None) for g in groups], [], rng
        )
    assert slots is not None, "the limits of _countable leave a slot for everyone"
    finished = []
    for group, (row, column) in zip(groups, slots):
        colour = group.colour or _colour(group.noun, setting, [*finished, *groups], rng, colours)
        size = group.size
        if size is None:
            # A text that names the place is a full description, so without a size the thing has the ordinary one.
            size = "" if group.row and group.column else rng.choices(SIZES, (1, 2, 1))[0]
        finished.append(Group(group.noun, group.count or 1, colour, size, row, column, group.text))
    return graph.scene(setting, _without_twins(finished))


def _countable(draft: Draft, exact: bool) -> tuple[list[DraftGroup], dict[int, int]]:
    """The groups that fit into a picture, and the new index of each of the draft's groups."""
    kept: list[DraftGroup] = []
    moved: dict[int, int] = {}
    for i, group in enumerate(draft.groups):
        group = dataclasses.replace(group, count=group.count or 1)
        air = NOUNS[group.noun].air
        if group.row is not None and (group.row == "air") != air:
            if exact:
                raise Impossible(f"a {group.noun} cannot be drawn in the {group.row} row")
            group.row = None
        room = min(
            MAX_OF_A_KIND - sum(g.count or 1 for g in kept if g.noun == group.noun),
            MAX_THINGS - sum(g.count or 1 for g in kept),
        )
        twin = any(g.noun == group.noun and g.colour is not None and g.colour == group.colour for g in kept)
        full = sum(NOUNS[g.noun].air == air for g in kept) >= (AIR_SLOTS if air else GROUND_SLOTS)
        long = len(group.text.split()) > MAX_TEXT_WORDS or (group.text and group.noun not in CARRIERS)
        if exact and (room < group.count or full or twin or long):
            raise Impossible(f"more than can be drawn: {group.count} {NOUNS[group.noun].plural}")
        if room < 1 or full or twin:
            continue
        group.count = 1 if group.text else min(group.count, room)
        group.text = " ".join(group.text.split()[:MAX_TEXT_WORDS])
        moved[i] = len(kept)
        kept.append(group)
    if not kept:
        raise Impossible("it names nothing that can be drawn")
    return kept, moved


def _slots(groups: list[DraftGroup], relations, rng: random.Random) -> list[tuple[str, str]] | None:
    """A slot for each group, at random, such that every relation holds; None where that is impossible."""
    choices = []
    standing = [NOUNS[group.noun].metres for group in groups if not NOUNS[group.noun].air]
    for group in groups:
        rows = ("air",) if NOUNS[group.noun].air else ("back", "front")
        free = [(r, c) for r in rows for c in COLUMNS if group.row in (None, r) and group.column in (None, c)]
        rng.shuffle(free)
        # High things are mostly put in the back row: near the viewer they would hide the others or shrink them.
        if standing and max(standing) > 2 * min(standing) and rng.random() < 0.85:
            high = NOUNS[group.noun].metres ** 2 > max(standing) * min(standing)
            free.sort(key=lambda slot: (slot[0] == "front") == high)
        choices.append(free)

    def stand_in(index: int, slot: tuple[str, str]) -> Group:
        return Group(groups[index].noun, 1, "", "", *slot)

    chosen: list[tuple[str, str]] = []

    def place(index: int) -> bool:
        if index == len(groups):
            return True
        for slot in choices[index]:
            if slot in chosen:
                continue
            chosen.append(slot)
            known = [(a, r, b) for a, r, b in relations if max(a, b) == index]
            fine = all(graph.holds(r, stand_in(a, chosen[a]), stand_in(b, chosen[b])) for a, r, b in known)
            if fine and place(index + 1):
                return True
            chosen.pop()
        return False

    return chosen if place(0) else None


def _colour(noun: str, setting: str, others, rng: random.Random, limit: int | None) -> str:
    used = [group.colour for group in others if group.colour]
    free = [c for c in NOUNS[noun].colours if c not in SETTINGS[setting].clash]
    free = free or list(NOUNS[noun].colours)
    if limit is not None and len(set(used)) >= limit:
        free = [c for c in free if c in used] or used
    mine = [group.colour for group in others if group.noun == noun and group.colour]
    return rng.choice([c for c in free if c not in mine] or free)


def _without_twins(groups: list[Group]) -> list[Group]:
    """Drops a second group of the same noun and colour, which only chance can have produced."""
    seen: dict[tuple[str, str], Group] = {}
    for group in groups:
        seen.setdefault((group.noun, group.colour), group)
    return list(seen.values())


def random_draft(rng: random.Random, groups: int, texts: int = 0) -> Draft:
    """Draws nouns, counts, `texts` written texts and a setting at random; everything else stays open."""
    # Every second scene is indoors, though fewer settings are: neither answer is then the better guess.
    indoors = rng.random() < 0.5
    settings = [name for name, place in SETTINGS.items() if place.indoors == indoors]
    return extend(Draft(rng.choice(settings), [], []), rng, groups, texts)


def extend(draft: Draft, rng: random.Random, groups: int, texts: int = 0, longest: int = MAX_TEXT_WORDS) -> Draft:
    """Adds groups to the draft, as far as they fit: up to `groups` in all, and `texts` written texts of at most
    `longest` words."""
    phrases = [text for text in TEXTS if len(text.split()) <= longest]
    extended = Draft(
        draft.setting or choose_setting(draft, rng), [dataclasses.replace(g) for g in draft.groups], draft.relations
    )
    for group in extended.groups:
        group.count = group.count or 1
        if sum(bool(g.text) for g in extended.groups) < texts and NOUNS[group.noun].carrier and group.count == 1:
            group.text = group.text or rng.choice(phrases)
    groups = max(groups, len(extended.groups) + max(0, texts - sum(bool(g.text) for g in extended.groups)))
    while len(extended.groups) < groups:
        there = {group.noun for group in extended.groups}
        air = sum(NOUNS[group.noun].air for group in extended.groups)
        room = MAX_THINGS - sum(group.count or 1 for group in extended.groups)
        writing = sum(bool(g.text) for g in extended.groups) < texts
        pool = [
            name
            for name, noun in NOUNS.items()
            if name not in there
            and (noun.carrier if writing else not noun.carrier or name in PLAIN_CARRIERS)
            and _fits(name, extended.setting)
            and _in_proportion(name, there)
            and (air < AIR_SLOTS if noun.air else len(extended.groups) - air < GROUND_SLOTS)
        ]
        # Few nouns hang or fly: without a weight most pictures would have an empty sky.
        weights = [2.5 if NOUNS[name].air else 1.0 for name in pool]
        if room < 1 or not pool:
            break
        noun = rng.choices(pool, weights)[0]
        # Writing has to be large enough to read, so there are fewer things beside it.
        most = min(room, _most(noun, groups) if not texts else _most(noun, 3) - (_most(noun, 3) == 2))
        count = 1 if writing else min(most, rng.choices((1, 2, 3), (5, 2, 2))[0])
        extended.groups.append(DraftGroup(noun, count, text=rng.choice(phrases) if writing else ""))
    return extended


def vary(scene: Scene, rng: random.Random) -> Scene:
    """Makes a scene that differs from this one in up to five ways: colours, counts, things, places, the setting."""
    changes = rng.sample(("colour", "count", "noun", "setting", "swap", "drop", "colour"), rng.randint(3, 5))
    setting, groups = scene.setting, list(scene.groups)
    for change in changes:
        k = rng.randrange(len(groups))
        group = groups[k]
        if change == "colour":
            group = dataclasses.replace(group, colour=_colour(group.noun, setting, groups, rng, None))
        elif change == "count" and not group.text:
            most = _most(group.noun, len(groups))
            counts = [n for n in range(1, most + 1) if n != group.count] or [group.count]
            group = dataclasses.replace(group, count=rng.choice(counts))
        elif change == "noun" and not group.text:
            there = {g.noun for g in groups}
            pool = [n for n, noun in NOUNS.items() if _fits(n, setting) and noun.air == (group.row == "air")]
            pool = [n for n in pool if n not in there and not NOUNS[n].carrier]
            pool = [n for n in pool if _in_proportion(n, there - {group.noun})]
            noun = rng.choice(pool or [group.noun])
            group = dataclasses.replace(group, noun=noun, colour=_colour(noun, setting, groups, rng, None))
        elif change == "setting":
            places = [n for n, p in SETTINGS.items() if p.indoors == scene.place.indoors and n != setting]
            places = [n for n in places if all(g.colour not in SETTINGS[n].clash and _fits(g.noun, n) for g in groups)]
            setting = rng.choice(places or [setting])
        elif change == "swap":
            free = [(r, c) for r in ROWS for c in COLUMNS if (r == "air") == (group.row == "air")]
            free = [slot for slot in free if slot not in {g.slot for g in groups}]
            if free:
                row, column = rng.choice(free)
                group = dataclasses.replace(group, row=row, column=column)
        elif change == "drop" and len(groups) > 2:
            del groups[k]
            continue
        candidate = [*groups[:k], group, *groups[k + 1 :]]
        # A change that breaks a rule (a fourth apple, a twin) is left out.
        if not graph.fault(Scene(setting, tuple(candidate))):
            groups = candidate
    varied = graph.scene(setting, groups)
    return varied if varied != scene else vary(scene, rng)
