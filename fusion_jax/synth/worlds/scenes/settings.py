"""Lists the settings of scenes: their names, what they show and which things belong there."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setting:
    """A background scene.

    Attributes:
      phrase: its phrase after "a" or "an": "sandy beach". preposition: "on" or "in".
      indoors: whether it is under a roof. sky: whether the open sky is above it; without it things hang from above.
      metres: height of the smallest and of the largest thing that belongs there.
      ground, behind: what things stand on and what is behind them, as noun phrases.
      words: words by which a caption names it.
      shows: nouns that the backdrop itself may show, so that no question asks whether they are there.
      clash: colours that would be lost against it.
      mood: a true sentence about it.
    """

    name: str
    phrase: str
    preposition: str
    indoors: bool
    sky: bool
    metres: tuple[float, float]
    ground: str
    behind: str
    words: tuple[str, ...]
    mood: str
    shows: tuple[str, ...] = ()
    clash: tuple[str, ...] = ()


_SETTINGS = (
    Setting(
        "beach",
        "sandy beach",
        "on",
        False,
        True,
        (0.05, 6),
        "pale sand",
        "the sea and a bright sky",
        ("beach", "seaside", "shore", "sand"),
        "Small waves run along the water.",
    ),
    Setting(
        "meadow",
        "grassy meadow",
        "in",
        False,
        True,
        (0.05, 6),
        "short grass",
        "gentle hills under the sky",
        ("meadow", "grass", "lawn", "field", "garden", "park"),
        "Blades of grass cover the ground.",
        clash=("green",),
    ),
    Setting(
        "snow",
        "snowy field",
        "in",
        False,
        True,
        (0.1, 6),
        "white snow",
        "distant mountains",
        ("snow", "snowy", "winter"),
        "Snow covers all of the ground.",
        clash=("white",),
    ),
    Setting(
        "desert",
        "dry desert",
        "in",
        False,
        True,
        (0.05, 6),
        "dry sand",
        "wide dunes under a warm sky",
        ("desert", "dunes", "dune"),
        "No water is in sight.",
        clash=("orange",),
    ),
    Setting(
        "forest",
        "forest clearing",
        "in",
        False,
        False,
        (0.05, 6),
        "soft moss",
        "a row of dark trees",
        ("forest", "woods", "clearing"),
        "Tall trunks close off the view.",
        shows=("tree",),
        clash=("green",),
    ),
    Setting(
        "street",
        "city street",
        "on",
        False,
        True,
        (0.25, 6),
        "gray asphalt",
        "a skyline of tall buildings",
        ("street", "road", "city", "town"),
        "Rows of windows look down from the skyline.",
        shows=("house",),
        clash=("gray",),
    ),
    Setting(
        "courtyard",
        "brick courtyard",
        "in",
        False,
        False,
        (0.1, 3),
        "stone paving",
        "a wall of bricks",
        ("courtyard", "brick", "bricks", "yard", "alley"),
        "The joints of the brickwork run straight across.",
        clash=("brown",),
    ),
    Setting(
        "night",
        "field at night",
        "in",
        False,
        True,
        (0.1, 6),
        "dark grass",
        "a starry sky",
        ("night", "starry", "moonlight"),
        "Stars are scattered over the sky.",
        clash=("black", "blue"),
    ),
    Setting(
        "table",
        "wooden table",
        "on",
        True,
        False,
        (0.05, 0.5),
        "a top of brown boards",
        "a plain wall",
        ("table", "desk"),
        "The grain of the wood is easy to see.",
        clash=("brown",),
    ),
    Setting(
        "kitchen",
        "tiled kitchen",
        "in",
        True,
        False,
        (0.05, 0.5),
        "a light counter",
        "rows of square tiles",
        ("kitchen", "counter", "tiles"),
        "The tiles make a regular grid.",
        clash=("white",),
    ),
    Setting(
        "living room",
        "living room",
        "in",
        True,
        False,
        (0.2, 2),
        "a wooden floor",
        "striped wallpaper",
        ("room", "parlor", "floor", "wallpaper"),
        "Broad stripes run down the wallpaper.",
    ),
    Setting(
        "library",
        "quiet library",
        "in",
        True,
        False,
        (0.2, 2),
        "a soft carpet",
        "shelves full of books",
        ("library", "shelves", "bookshelf", "carpet"),
        "The shelves reach from one side to the other.",
        shows=("book",),
    ),
)
SETTINGS = {setting.name: setting for setting in _SETTINGS}
SETTING_WORDS = {word: setting.name for setting in _SETTINGS for word in setting.words}
