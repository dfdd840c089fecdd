"""Answers that scoring rules stumble over, drawn with a seed: letters in all kinds of dress, numbers, contractions,
refusals, repetitions and other languages."""

import random
from collections.abc import Callable, Iterator

LETTERS = [*"ABCDABCDABCDEFGZ", *"abcde", *"ＡＢ", "А", "В"]  # the last two pairs are full-width and Cyrillic
DRESS = ["{}", "({})", "{}.", "{},", "{}:", "{})", "({}).", "[{}]", "**{}**", '"{}"', "'{}'", "“{}”", "{}\n", "\n{}"]
DRESS += ["option {}", "Option {}.", "Answer: {}.", "The answer is {}", "the correct answer is ({}).", "It is {}, so"]
DRESS += [
    " {} ",
    "{} or B",
    "{} and {}",
    "A {} dog",
    "{}. a dog",
    "{}) the sky",
    "答案是{}",
    "答えは{}",
    "정답은 {}",
    "選{}",
]
DRESS += [
    "I think that it is {}",
    "{} is not right, it must be the other one",
    "<{}>",
    "\\boxed{{{}}}",
    "{}\tx",
    "{}；",
]
PHRASES = [
    "I pick",
    "i choose",
    "I select",
    "my answer is",
    "my choice is",
    "choice is",
    "the correct choice is",
    "답:",
]
PHRASES += [
    "best option is",
    "the best option is",
    "the correct option is",
    "best answer is",
    "the answer is",
    "옵션",
    "选",
]
DRESS += [f"so {phrase} {{}} here, not B now" for phrase in PHRASES] + ["answer is A it says, no, choice is {} though"]
TEXTS = [
    "a dog",
    "A DOG.",
    "the sky",
    "a red bus",
    "Left",
    "Turn right.",
    "leaf",
    "ＣＥＮＴＲＥ",
    "centre",
    "Nokia 3310",
]
TEXTS += [
    "nokia",
    "noklas",
    "New  York",
    "Straße",
    "İstanbul",
    "猫",
    "нет",
    "はい",
    "नहीं",
    "🐶",
    "é",
    "e\u0301",
    "x^2+Y = 1",
]
TEXTS += [
    "none",
    "None",
    "nan",
    "NA",
    "null",
    "-",
    "0",
    "False",
    "True",
    "inf",
    "unanswerable",
    "Unanswerable.",
    "x ^ 2 + y",
]
YES_NO = ["Yes", "no", "No.", "NO!", "Yes, it is", "No, there is not", "y", "N", "n.", "yes/no", "no-one", "not sure"]
YES_NO += ["Yes. But no", "nothing", "eyes", "ye.s", "да", "是", "Yes\nno", "yes1,,2no", "I do not know"]
NUMBERS = ["3", "3.0", "03", "-3", "+3", "3.14159", "1,000", "1,,2", "1.000", "1e3", "1E-2", ".5", "5.", "5%", "12 %"]
NUMBERS += [
    "12%",
    "0.12",
    "11.9%",
    "$5.00",
    "€ 5",
    "5 cm",
    "24/7",
    "3 cats",
    "three",
    "Ten",
    "½",
    "２",
    "1 000",
    "950",
    "4.50",
]
NUMBERS += [
    "999.99",
    "1050",
    "1051",
    "3,5",
    "-0",
    "infinity",
    "[1, 2]",
    "[1,2] or [2, 3]",
    "2007-2008",
    "1.2.3",
    "x = 4",
    "=5",
]
WORDS = ["the", "a", "an", "dont", "don't", "don’t", "couldnt've", "couldn'tve", "somebody'd", "it's", "it’s", "Jo's"]
WORDS += [
    "so",
    "is",
    "answer",
    "final answer is",
    "thus",
    "could be",
    "result",
    "e.g.",
    "U.S.A.",
    "x/y",
    "a-b",
    "a - b",
    ";",
]
SAID = ["Sorry, I can't help with images of people yet.", "I'm sorry, but without the image provided I cannot", "..."]
SAID += [
    "Cannot determine the answer",
    "",
    " ",
    "\n",
    "\u00a0",
    "\u200b",
    "?",
    "()",
    "(",
    ".",
    ",",
    "\ufeffB",
    "B\u0300",
    "<B>",
]
RIGHT = ["2", "two", "2.", "Left", "left.", "E", "e.", "1000", "0.0", "9.5%", "dog", "x^2+y", "don't", "Unanswerable"]


def answers(count: int, seed: int) -> list[str]:
    """So many, with repetitions where the dice say so."""
    return list(_answers(count, random.Random(seed)))


def _answers(count: int, rng: random.Random) -> Iterator[str]:
    def mixed() -> str:
        pool = [*WORDS, *NUMBERS, *TEXTS, *YES_NO, *LETTERS]
        return rng.choice([" ", "", ", ", "\n"]).join(rng.choice(pool) for _ in range(rng.randint(2, 9)))

    def dressed() -> str:
        return rng.choice(DRESS).replace("{}", rng.choice(LETTERS)).replace("{{", "{").replace("}}", "}")

    kinds: list[Callable[[], str]] = [
        dressed,
        dressed,
        dressed,
        lambda: f"{dressed()} {rng.choice(TEXTS)}",
        lambda: f"{rng.choice(WORDS)} {dressed()} {mixed()}",
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(YES_NO),
        lambda: rng.choice(NUMBERS),
        lambda: f"{rng.choice(WORDS)} {rng.choice(NUMBERS)}",
        lambda: rng.choice(NUMBERS) + rng.choice([".", "%", " km", ", or so", "\n", " "]) + rng.choice(WORDS),
        lambda: rng.choice(SAID),
        lambda: rng.choice(RIGHT),
        mixed,
        mixed,
        lambda: f"{dressed()} " * rng.randint(2, 12),
        lambda: "".join(rng.choices("ABab.,:()' \n\t1%é", k=rng.randint(1, 12))),
    ]
    for _ in range(count):
        text = rng.choice(kinds)()
        yield rng.choice([str, str, str, str, str.upper, str.lower, str.title])(text)
