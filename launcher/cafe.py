"""The embedded task: a cafe order in English or Spanish in, strict JSON out.

Small enough to learn on two CPU cores in minutes, and visible: the base model rambles, the tuned one answers
`{"items":[{"item":"latte","size":"large","qty":2,"extras":["oat milk"]}],"to_go":true}`.

Everything is drawn from one seeded generator, so the same seed gives the same bytes on every machine. The two
splits never share an order: an order goes to the held-out split by a hash of its JSON, whatever its language.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict

NUM_TRAIN = 2000
NUM_HELD_OUT = 200

Split = Literal["train", "held_out"]


class Line(TypedDict, total=False):
    """One line of an order; `size` only on drinks, `extras` only where some were asked for."""

    item: str
    size: str
    qty: int
    extras: list[str]


class Order(TypedDict):
    """What the model must write, as compact JSON in this key order."""

    items: list[Line]
    to_go: bool


@dataclass(frozen=True)
class Noun:
    """One thing to order: its English plural, and its Spanish singular, plural and gender."""

    en_plural: str
    es: str
    es_plural: str
    feminine: bool = False


DRINKS = {
    "espresso": Noun("espressos", "espresso", "espressos"),
    "latte": Noun("lattes", "café con leche", "cafés con leche"),
    "cappuccino": Noun("cappuccinos", "capuchino", "capuchinos"),
    "americano": Noun("americanos", "café americano", "cafés americanos"),
    "green tea": Noun("green teas", "té verde", "tés verdes"),
    "hot chocolate": Noun("hot chocolates", "chocolate caliente", "chocolates calientes"),
    "orange juice": Noun("orange juices", "zumo de naranja", "zumos de naranja"),
}
FOODS = {
    "croissant": Noun("croissants", "cruasán", "cruasanes"),
    "muffin": Noun("muffins", "magdalena", "magdalenas", feminine=True),
    "toast": Noun("toasts", "tostada", "tostadas", feminine=True),
    "sandwich": Noun("sandwiches", "bocadillo", "bocadillos"),
    "cookie": Noun("cookies", "galleta", "galletas", feminine=True),
}
DRINK_EXTRAS = {
    "oat milk": "leche de avena",
    "soy milk": "leche de soja",
    "sugar": "azúcar",
    "cinnamon": "canela",
    "honey": "miel",
    "whipped cream": "nata",
}
FOOD_EXTRAS = {"butter": "mantequilla", "jam": "mermelada"}
EXTRAS_ES = DRINK_EXTRAS | FOOD_EXTRAS
SIZES_ES = {
    "small": ("pequeño", "pequeña"),
    "medium": ("mediano", "mediana"),
    "large": ("grande", "grande"),
}
NUMBERS_EN = {2: "two", 3: "three", 4: "four"}
NUMBERS_ES = {2: "dos", 3: "tres", 4: "cuatro"}

# {order} is the list of lines, {togo} the words for where it is taken; each is used by both kinds of order.
FRAMES_EN = (
    "{order}{togo}, please.",
    "Hi, can I get {order}{togo}?",
    "Good morning! I'd like {order}{togo}.",
    "Could I have {order}{togo}, please?",
    "I'll take {order}{togo}, thanks.",
    "For me {order}{togo}.",
)
FRAMES_ES = (
    "{order}{togo}, por favor.",
    "Hola, ¿me pone {order}{togo}?",
    "¡Buenos días! Quería {order}{togo}.",
    "¿Me puede poner {order}{togo}, por favor?",
    "Voy a tomar {order}{togo}, gracias.",
    "Para mí {order}{togo}.",
)
TO_GO_EN, HERE_EN = (" to go", " to take away"), ("", " for here", " to have here")
TO_GO_ES, HERE_ES = (" para llevar",), ("", " para tomar aquí")


def draw_order(rng: random.Random) -> Order:
    """One random order of one or two lines, no item twice."""
    num_lines = rng.choice((1, 2))
    names = rng.sample([*DRINKS, *FOODS], num_lines)
    return {"items": [_draw_line(rng, name) for name in names], "to_go": rng.random() < 0.5}


def _draw_line(rng: random.Random, name: str) -> Line:
    line: Line = {"item": name}
    if name in DRINKS:
        line["size"] = rng.choice(list(SIZES_ES))
    line["qty"] = rng.choices((1, 2, 3, 4), weights=(5, 3, 2, 1))[0]
    possible = list(DRINK_EXTRAS if name in DRINKS else FOOD_EXTRAS)
    if num_extras := rng.choices((0, 1, 2), weights=(5, 4, 2))[0]:
        line["extras"] = rng.sample(possible, num_extras)
    return line


def say_english(rng: random.Random, order: Order) -> str:
    """The order as a customer would say it in English."""
    said = [_say_line_english(rng, line) for line in order["items"]]
    to_go = rng.choice(TO_GO_EN if order["to_go"] else HERE_EN)
    return _sentence(rng.choice(FRAMES_EN).format(order=_join(said, " and "), togo=to_go))


def say_spanish(rng: random.Random, order: Order) -> str:
    """The order as a customer would say it in Spanish, with gender and number in agreement."""
    said = [_say_line_spanish(rng, line) for line in order["items"]]
    to_go = rng.choice(TO_GO_ES if order["to_go"] else HERE_ES)
    return _sentence(rng.choice(FRAMES_ES).format(order=_join(said, " y "), togo=to_go))


def _say_line_english(rng: random.Random, line: Line) -> str:
    noun = (DRINKS | FOODS)[line["item"]]
    words = [line["size"]] if "size" in line else []
    words.append(line["item"] if line["qty"] == 1 else noun.en_plural)
    if line["qty"] == 1:
        number = "an" if words[0][0] in "aeiou" else "a"
    else:
        number = rng.choice((NUMBERS_EN[line["qty"]], str(line["qty"])))
    extras = line.get("extras", [])
    return " ".join([number, *words]) + (" with " + _join(extras, " and ") if extras else "")


def _say_line_spanish(rng: random.Random, line: Line) -> str:
    noun = (DRINKS | FOODS)[line["item"]]
    words = [noun.es if line["qty"] == 1 else noun.es_plural]
    if "size" in line:
        size = SIZES_ES[line["size"]][noun.feminine]
        words.append(size if line["qty"] == 1 else size + "s")
    if line["qty"] == 1:
        number = "una" if noun.feminine else "un"
    else:
        number = rng.choice((NUMBERS_ES[line["qty"]], str(line["qty"])))
    extras = [EXTRAS_ES[extra] for extra in line.get("extras", [])]
    return " ".join([number, *words]) + (" con " + _join(extras, " y ") if extras else "")


def _join(parts: list[str], last: str) -> str:
    return last.join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def write(order: Order) -> str:
    """The one right answer: compact JSON, keys in the order of `Order` and `Line`."""
    return json.dumps(order, ensure_ascii=False, separators=(",", ":"))


def is_held_out(answer: str) -> bool:
    """Whether this answer belongs to the held-out split: one in ten, by hash, so no seed can mix the splits."""
    return hashlib.sha256(answer.encode()).digest()[0] % 10 == 0


def examples(split: Split, seed: int = 0) -> Iterator[dict]:
    """`NUM_TRAIN` or `NUM_HELD_OUT` different conversations in the `messages` shape, half in each language."""
    rng = random.Random(f"cafe-{split}-{seed}")
    wanted = NUM_TRAIN if split == "train" else NUM_HELD_OUT
    seen: set[str] = set()
    while len(seen) < wanted:
        order = draw_order(rng)
        answer = write(order)
        if answer in seen or is_held_out(answer) != (split == "held_out"):
            continue
        say = say_spanish if len(seen) % 2 else say_english
        seen.add(answer)
        yield {"messages": [{"role": "user", "content": say(rng, order)}, {"role": "assistant", "content": answer}]}
