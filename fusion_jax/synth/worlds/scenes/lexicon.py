"""Lists the words of drawn scenes: the things that can be drawn, named and read.

A word that is not listed is not drawn: `parse.py` ignores it, and a caption with none of these nouns is refused.
"""

import dataclasses

# Named colours and their RGB values. Under the shading of `sculpt.py` each stays closest to itself.
RGB = {
    "red": (208, 34, 38),
    "orange": (243, 134, 20),
    "yellow": (247, 216, 44),
    "green": (52, 158, 66),
    "blue": (38, 98, 214),
    "purple": (128, 56, 176),
    "pink": (245, 140, 186),
    "brown": (128, 78, 42),
    "white": (246, 246, 244),
    "black": (38, 38, 44),
    "gray": (140, 144, 150),
}
COLOURS = tuple(RGB)
COLOUR_WORDS = {colour: colour for colour in COLOURS} | {
    "grey": "gray",
    "silver": "gray",
    "violet": "purple",
    "crimson": "red",
    "scarlet": "red",
    "golden": "yellow",
    "navy": "blue",
}

SIZES = ("small", "", "large")  # "" is neither, and is not mentioned
SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ROWS = ("air", "back", "front")
COLUMNS = ("left", "center", "right")


@dataclasses.dataclass(frozen=True)
class Noun:
    """A thing that can be drawn.

    Attributes:
      name, plural: its words.
      home: where it makes sense: "indoors", "outdoors", under the open "sky" or "anywhere".
      metres: height of an ordinary one. That of an airplane is its apparent height, because it flies far away.
      air: whether it hangs or flies in the upper third; everything else stands on the ground.
      colours: its colours when a caption names none.
      use: what it is for or what it does, "can ..." or "is used to ..." (reasoning).
      carrier: whether texts can be written on it.
    """

    name: str
    plural: str
    home: str
    metres: float
    colours: tuple[str, ...]
    use: str
    air: bool = False
    carrier: bool = False


_PAINTED = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "gray", "brown")
_GAY = ("red", "orange", "yellow", "green", "blue", "purple", "pink")

_NOUNS = (
    Noun("apple", "apples", "anywhere", 0.08, ("red", "green", "yellow"), "can be eaten"),
    Noun("pear", "pears", "anywhere", 0.1, ("green", "yellow", "brown"), "can be eaten"),
    Noun("pumpkin", "pumpkins", "anywhere", 0.3, ("orange", "yellow", "green", "white"), "can be cooked or carved"),
    Noun("cake", "cakes", "indoors", 0.25, ("pink", "brown", "white", "yellow"), "can be sliced and shared"),
    Noun("mug", "mugs", "indoors", 0.1, _PAINTED, "holds a hot drink", carrier=True),
    Noun("teapot", "teapots", "indoors", 0.18, _PAINTED, "is used to pour tea"),
    Noun("bottle", "bottles", "anywhere", 0.35, ("green", "blue", "brown", "red", "purple"), "keeps a liquid"),
    Noun("vase", "vases", "indoors", 0.3, _PAINTED, "can hold cut stems"),
    Noun("candle", "candles", "indoors", 0.2, _PAINTED, "gives a little light"),
    Noun("lamp", "lamps", "indoors", 0.5, _PAINTED, "can light up a room"),
    Noun("clock", "clocks", "indoors", 0.25, _PAINTED, "shows the time"),
    Noun("chair", "chairs", "indoors", 0.9, _PAINTED, "is something to sit on"),
    Noun("ball", "balls", "anywhere", 0.25, _GAY, "can be thrown and caught"),
    Noun("gift", "gifts", "anywhere", 0.3, _GAY, "waits to be unwrapped"),
    Noun("hat", "hats", "anywhere", 0.15, _PAINTED, "can be worn on the head"),
    Noun("suitcase", "suitcases", "anywhere", 0.6, _PAINTED, "is packed for a journey"),
    Noun("bucket", "buckets", "anywhere", 0.35, _PAINTED, "can carry water or sand"),
    Noun("barrel", "barrels", "outdoors", 0.9, ("brown", "red", "blue", "green", "gray"), "stores what must keep"),
    Noun("umbrella", "umbrellas", "outdoors", 2.3, _GAY, "gives shade and keeps off the rain"),
    Noun("tent", "tents", "outdoors", 1.5, _GAY, "is used to sleep outdoors"),
    Noun("house", "houses", "outdoors", 5.0, ("red", "yellow", "white", "blue", "pink", "brown"), "can be lived in"),
    Noun("tree", "trees", "outdoors", 5.0, ("green", "orange", "yellow", "red"), "gives shade to those below"),
    Noun("cactus", "cacti", "anywhere", 0.5, ("green", "blue", "purple"), "can live with little water"),
    Noun(
        "flower", "flowers", "anywhere", 0.5, ("red", "yellow", "pink", "purple", "white", "orange"), "needs sunlight"
    ),
    Noun("mushroom", "mushrooms", "outdoors", 0.12, ("red", "brown", "orange", "white"), "grows in damp places"),
    Noun("car", "cars", "outdoors", 1.5, _PAINTED, "can take people along a road"),
    Noun("bus", "buses", "outdoors", 3.0, _GAY, "can take many people at once"),
    Noun("cat", "cats", "anywhere", 0.4, ("gray", "black", "white", "orange", "brown"), "can move quietly by itself"),
    Noun("rabbit", "rabbits", "anywhere", 0.35, ("white", "gray", "brown", "black"), "can hop away quickly"),
    Noun("duck", "ducks", "anywhere", 0.4, ("yellow", "white", "brown", "green"), "can swim and walk"),
    Noun("snail", "snails", "outdoors", 0.06, ("brown", "orange", "yellow", "pink"), "moves very slowly"),
    Noun("balloon", "balloons", "anywhere", 0.4, _GAY, "rises because it is light", air=True),
    Noun("kite", "kites", "sky", 1.0, _GAY, "needs wind to fly", air=True),
    Noun("bird", "birds", "outdoors", 0.25, ("blue", "red", "yellow", "black", "white", "brown"), "can fly", air=True),
    Noun("butterfly", "butterflies", "outdoors", 0.1, _GAY, "can fly on thin wings", air=True),
    Noun("airplane", "airplanes", "sky", 1.5, ("white", "red", "blue", "yellow", "gray"), "can fly far", air=True),
    Noun("lantern", "lanterns", "anywhere", 0.5, _GAY, "gives a soft light", air=True),
    Noun("sign", "signs", "outdoors", 2.0, _PAINTED, "tells people something", carrier=True),
    Noun("billboard", "billboards", "outdoors", 4.0, _PAINTED, "is read from far away", carrier=True),
    Noun("banner", "banners", "anywhere", 0.9, _PAINTED, "can be read by everyone below", air=True, carrier=True),
    Noun("book", "books", "indoors", 0.25, _PAINTED, "can be read", carrier=True),
    Noun("box", "boxes", "anywhere", 0.5, ("brown", *_GAY, "white"), "keeps things together", carrier=True),
    Noun("chalkboard", "chalkboards", "anywhere", 1.4, ("black", "green"), "is written on with chalk", carrier=True),
)
NOUNS = {noun.name: noun for noun in _NOUNS}
CARRIERS = tuple(name for name, noun in NOUNS.items() if noun.carrier)

# Synonyms with the same drawing, singular and plural.
_SYNONYMS = {
    "cup": ("mug", "cups"),
    "present": ("gift", "presents"),
    "kitten": ("cat", "kittens"),
    "bunny": ("rabbit", "bunnies"),
    "plane": ("airplane", "planes"),
    "automobile": ("car", "automobiles"),
    "crate": ("box", "crates"),
    "signboard": ("sign", "signboards"),
    "blackboard": ("chalkboard", "blackboards"),
    "pail": ("bucket", "pails"),
    "cottage": ("house", "cottages"),
    "parasol": ("umbrella", "parasols"),
}
# Word -> (name, whether it is a plural).
NOUN_WORDS = {noun.name: (noun.name, False) for noun in NOUNS.values()}
NOUN_WORDS |= {noun.plural: (noun.name, True) for noun in NOUNS.values()}
NOUN_WORDS |= {word: (name, False) for word, (name, _) in _SYNONYMS.items()}
NOUN_WORDS |= {many: (name, True) for name, many in _SYNONYMS.values()}

# Texts that the embedded backend writes on things when a caption has none: greetings, shops, notices.
TEXTS = (
    "OPEN",
    "CLOSED",
    "WELCOME",
    "FRESH BREAD",
    "SALE TODAY",
    "HAPPY BIRTHDAY",
    "GOOD MORNING",
    "TEA ROOM",
    "Mind the step",
    "Thank you",
    "No parking here",
    "Summer fair",
    "Keep calm and read on",
    "Hot soup all day",
    "Lost and found",
    "Ring the bell",
    "Best of luck",
    "Back in five minutes",
    "FRAGILE",
    "THIS SIDE UP",
    "Do not disturb",
    "Free entry",
    "Ice cream",
    "Flea market on Sunday",
    "Please wait to be seated",
    "Paint and brushes",
    "MUSIC TONIGHT",
    "Apples and pears",
    "Winter sale",
    "Reading club",
    "Meet us at noon",
    "Half price books",
    "Handle with care",
    "Garden tools",
    "Bus stop",
    "First floor",
    "Quiet please",
    "See you soon",
    "Made by hand",
    "Home sweet home",
)
