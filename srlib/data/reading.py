"""How a short answer is read: spelling, numbers, percent, units, names.

This is what stands around the mathematics: math-verify drops units, folds case and rounds, so a number, its
unit and a name are compared here and only the rest goes to `srlib.data.equal`. All of it is for answers of
at most a few hundred characters; `srlib.data.grade` sees to that.

Units. A unit is dropped only where the other side has none: `5 cm` is `5` (the question names the unit), but not
`5 mm`, nor `5 cm^2`. A unit is what stands behind a number and is

- one of `UNITS`, a single letter only inside `\\text{}` or `\\mathrm{}`: a bare `5m` is a product;
- a noun: a word of three letters or more in `\\text{}`, or bare one of four or more that can be spoken (`6 apples`).

Words that change the number (`OTHER`: more, less, half, sin, …) are no units; million and dozen are read. Units
are not converted: 60 minutes is not 1 hour. The base of a numeral is a unit that an answer must not add (52 is not `52_8`).

Percent. Where both sides have the sign the numbers are compared. Where one has it, `28 %` is 0.28, and from 1 % on 28 also.

Decimals are exact. One of six places and six digits or more may also be the rounded value of a fraction (0.333333 is 1/3).
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

LONGEST_UNIT = 24  # words and spaces
PLACES = 6  # of a decimal that may stand for what does not end, as math-verify has it
UNITS = {  # names and signs that are one unit; other nouns stand for themselves
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "dm": "decimeter decimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gramme",
    "kg": "kilogram kilogramme",
    "t": "tonne",
    "oz": "ounce",
    "lb": "lbs pound",
    "ml": "mL milliliter millilitre",
    "l": "L liter litre",
    "gal": "gallon",
    "ms": "millisecond",
    "s": "sec second",
    "min": "mins minute",
    "h": "hr hrs hour",
    "day": "",
    "yr": "yrs year",
    "deg": "degree",
    "rad": "radian",
    "dollar": "usd USD buck",
    "cent": "",
    "euro": "eur EUR",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "A": "amp ampere",
    "K": "kelvin",
    "C": "Celsius celsius",
    "F": "Fahrenheit fahrenheit",
    "Hz": "hertz",
    "Pa": "pascal",
    "kmh": "kph",
    "mph": "",
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "cup": "",
    "egg": "",
}
NAMES = {name: sign for sign, names in UNITS.items() for name in (sign, *names.split())}
SIGNS = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
NAMES |= SIGNS
SPLIT = {"mph": ("mi", "h"), "kmh": ("km", "h")}
LETTERS_ONLY_IN_TEXT = {"in", "mi", "ms", "Pa"}  # as a bare product of letters these are as likely
TIMES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
TIMES |= {name + "s": times for name, times in TIMES.items()}
OTHER = set(
    "more less fewer greater larger bigger smaller higher lower faster slower least most about approximately roughly"
    " nearly almost around over under between plus minus time times divided multiplied half halves third thirds quarter"
    " quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths"
    " hundredth hundredths thousandth thousandths millionth millionths first hundred thousand million billion trillion"
    " dozen score pair pairs gross double triple twice squared cubed root roots square cubic and or not to from than by"
    " with without if for when where mod modulo base choose factorial remainder sin cos tan cot sec csc arcsin arccos"
    " arctan sinh cosh tanh log lg ln exp sqrt frac max min gcd lcm lim inf infinity pi alpha beta gamma delta epsilon"
    " zeta theta lambda sigma omega even odd true false yes no none undefined negative positive ago before after"
    " later earlier north south east west left right up down above below am pm ad bc bce ratio power".split()
) - {"min", "sec"}
SKIPPED = {"of", "old", "long", "tall", "wide", "total", "altogether", "the"}
PER = {"per", "/", "a", "an", "each", "every"}
ANSWERS = {"yes", "no", "true", "false", "odd", "even", "all", "none", "always", "never"}  # words in any case

Unit = tuple[tuple[str, int], ...]  # sorted (sign, power), () for none


class Quantity(NamedTuple):
    """A number as it was written."""

    value: Fraction
    places: int  # behind the decimal point
    percent: bool
    unit: Unit


_TRANSLATED = {
    **dict.fromkeys("−–‐‑﹣－", "-"),
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n", " "),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    **dict(zip("×·⋅÷±≤≥≠≈∞π∪∩∈∅", (rf"\{c} " for c in "times cdot cdot div pm le ge ne approx infty pi cup cap in emptyset".split()))),
    "°": r"^\circ ",
    "％": r"\%",
    **{c: rf"\frac{{{f[0]}}}{{{f[2]}}}" for c, f in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8".split())},
    "’": "'",
}  # fmt: skip
_TABLE = str.maketrans(_TRANSLATED)
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_GAP = r"(?:[\s~]|\\[,!;: ]|\{,\}|\{\\,\}|,\\!|\\thinspace\b)+"
_GROUPS = re.compile(
    rf"(?<![\d.,])\d{{1,3}}(?:{_GAP}\d{{3}})+(?!\d)|(?<=\.)\d{{3}}(?:{_GAP}\d{{3}})*{_GAP}\d{{1,3}}(?!\d)"
)
_OPENS = re.compile(r"\\(?P<name>[A-Za-z]+)\s*\{|\\.|[{}]", re.DOTALL)
_LOOKS = set("boldsymbol bm mathbf mathit mathsf mathnormal boxed fbox underline emph mathop".split())
_WORDS = set("text textrm textbf textit textnormal textsf mathrm mbox hbox operatorname".split())


def tidy(text: str) -> str:
    """An answer without what changes only its looks, in one spelling: `\\text{}` for words, `\\frac{a}{b}`, `\\%`."""
    if re.fullmatch(r"-?[\d.,]*\d", text):
        return text
    text = text.translate(_TABLE)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_POWERS)}}}", text)
    text = _groups(text.strip())
    text = re.sub(r"^([*_`]{1,3})(.+)\1$", r"\2", text.strip()).strip()
    if text.count("$") - text.count("\\$") != 1:  # a single one is the currency
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"(\\\\)|\\[()[\],!;: ]|~|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", r"\1 ", text)
    text = re.sub(r"\\(?:displaystyle|textstyle|thinspace|quad|qquad|limits)(?![A-Za-z])", " ", text)
    text = re.sub(r"\{\s*\\(rm|bf|it)(?![A-Za-z])", r"\\text{", text)
    text = re.sub(r"\\(mathrm|mathbf|text)\s+([A-Za-z])(?![A-Za-z])", r"\\\1{\2}", text)
    text = _unwrapped(text)
    text = re.sub(r"\\text\{([^{}A-Za-z]*)\}|\\text\{([ei])\}", r"\1\2", text)
    text = re.sub(r"^\\text\{ *(-?[\d.,]*\d) *(?=[A-Za-z])", r"\1\\text{", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac\s+\{", r"\\frac{", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt(?=\s*[({])", r"\\sqrt", text).replace("√", "\\sqrt ").replace("**", "^")
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s+(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*(?:\{\s*)?\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])", r"^\\circ", text)
    text = re.sub(
        r"(?i:\\text\{\s*(?:percent|percentage|pct)\s*\}|(?<=[\d }])(?:percent|percentage|pct)\b)|(?<!\\)%",
        r"\\%",
        text,
    )
    text = re.sub(r"\s+", " ", text).strip()
    return text.removesuffix(".").rstrip().replace("{,}", ",")


def value(text: str, other: str) -> str:
    """What stands behind `x =` in a tidy text where the other side says no such thing."""
    assigned = re.fullmatch(r"(?:[A-Za-z](?:_\{?\w+\}?)?|\\[A-Za-z]+) ?= ?([^=]+)", text)
    return assigned[1] if assigned and "=" not in other else text


def _groups(text: str) -> str:
    return _GROUPS.sub(lambda m: re.sub(r"\D", "", m[0]), text)


def _unwrapped(text: str) -> str:
    """Without the commands that only change the type; one pass."""
    parts, kept, end = [], [], 0  # kept: whether the brace that closes is
    for token in _OPENS.finditer(text):
        parts.append(text[end : token.start()])
        end, written, name = token.end(), token.group(), token["name"]
        if name in _LOOKS:
            written = ""
            kept.append(False)
        elif name in _WORDS:
            written = "\\text{"
            kept.append(True)
        elif written.endswith("{") and written != "\\{":
            kept.append(bool(token.start()) or _around(text))
            written = written if kept[-1] else ""
        elif written == "}" and kept and not kept.pop():
            written = ""
        parts.append(written)
    return "".join((*parts, text[end:]))


def _around(text: str) -> bool:
    """Whether there is more to a text than what its first brace, which it begins with, closes behind."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return place + 1 < len(text.rstrip(" ."))
    return True


_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?:\\?(?P<money>[$€£¥₹]))? ?(?P<sign2>-?) ?(?:"
    r"(?P<n>\d+)(?: (?P<a>\d+)/(?P<b>\d+)| ?\\frac\{ ?(?P<c>\d+) ?\}\{ ?(?P<d>\d+) ?\})"
    r"|(?P<digits>\d+)_ ?\{?(?P<base>\d+)\}?"
    r"|\\frac\{ ?(?P<e>-?\d+) ?\}\{ ?(?P<f>\d+) ?\}|(?P<g>\d+) ?/ ?(?P<h>\d+)"
    r"|(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<part>\.\d+)?"
    r"(?:[eE](?P<ten>[-+]?\d{1,3})(?![\d.])| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?(?P<ten2>-?\d{1,3}) ?\}|(?P<ten3>\d)))?)"
    r" ?(?P<percent>\\%)?"
)


def quantity(text: str) -> Quantity | None:
    """A tidy text as a plain number with its unit; None where it is anything else."""
    m = _NUMBER.match(text)
    if not m or not (m["digits"] or m["whole"] or m["part"] or m["b"] or m["d"] or m["f"] or m["h"]):
        return None
    below = int(m["b"] or m["d"] or m["f"] or m["h"] or 1)
    if not below:
        return None
    above = Fraction(int(m["a"] or m["c"] or m["e"] or m["g"] or 0), below)
    if m["n"] and not 0 < above < 1:
        return None  # a product, not a mixed number
    decimal = Fraction(((m["whole"] or "0").replace(",", "") + (m["part"] or "")) if m["whole"] or m["part"] else 0)
    ten = int(m["ten"] or m["ten2"] or m["ten3"] or 0)
    value = (int(m["n"] or m["digits"] or 0) + above + decimal) * Fraction(10) ** ten
    places = max(len(m["part"]) - 1 - ten, 0) if m["part"] else 0
    value = -value if (m["sign"] == "-") != (m["sign2"] == "-") else value
    rest = text[m.end() :].strip()
    if (word := re.match(r"(?:\\text\{ ?)?([a-z]+)(?![A-Za-z]) ?(\}?)", rest)) and word[1] in TIMES:
        value, places = value * TIMES[word[1]], 0
        rest = rest[word.end() :] if word[2] or not rest.startswith("\\text") else "\\text{" + rest[word.end() :]
    found = _unit(rest) if rest else ()
    if found is None or (m["money"] and found and found != ((SIGNS[m["money"]], 1),) and not _per(found)):
        return None
    if m["money"]:
        found = tuple(sorted({**dict(found), SIGNS[m["money"]]: 1}.items()))
    if m["base"]:
        found = ((f"base {int(m['base'])}", 1),) if not found else found
    return Quantity(value, places, bool(m["percent"]), found)


def _per(unit: Unit) -> bool:
    return all(power < 0 for _, power in unit)


_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|[A-Za-z]+|\^\\circ|\^ ?\{ ?\d+ ?\}|\^ ?\d+|.", re.DOTALL)
_BEFORE = re.compile(r"(?:[\d})\]|!]|\\[a-z]+|(?<![A-Za-z])[A-Za-z])\s*$")


def split(text: str) -> tuple[str, Unit]:
    """A tidy text as what is measured and its unit, () where it has none."""
    tokens = list(_TOKEN.finditer(text))
    angle = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text)  # its degrees are no unit of what it gives
    first = len(tokens)
    while (
        first
        and len(tokens) - first < LONGEST_UNIT
        and re.match(r"\\text\{|[A-Za-z]|\^|/| ", tokens[first - 1].group())
    ):
        first -= 1
    for token in tokens[first:]:
        body = text[: token.start()]
        if token.group().strip() and _BEFORE.search(body[-40:]) and (unit := _unit(text[token.start() :])):
            if angle and unit == (("deg", 1),):
                break
            return body.strip(), unit
    return text, ()


def _unit(text: str) -> Unit | None:
    """What a text behind a number measures in; None: it is no unit."""
    powers: Counter[str] = Counter()
    sign, power, last, degree = 1, 1, "", False
    for word, marked in _pieces(text):
        if word == "^\\circ":
            last, degree = "deg", True
            powers[last] += sign
        elif word.startswith("^"):
            if not last:
                return None
            powers[last] += (int(re.sub(r"\D", "", word)) - 1) * (1 if powers[last] > 0 else -1)
            last = ""
        elif word in ("squared", "cubed") and last:
            powers[last] += {"squared": 1, "cubed": 2}[word] * (1 if powers[last] > 0 else -1)
            last = ""
        elif word in ("square", "sq", "cubic", "cu"):
            power = 2 if word.startswith("s") else 3
        elif word in PER and not (word == "a" and not marked and not powers and power == 1 and text.strip() == "a"):
            if sign < 0:
                return None
            sign, last = -1, ""
        elif word in SKIPPED:
            continue
        else:
            word = word.removeprefix("\\")
            noun = _name(word, marked or degree or word in SIGNS)
            if noun is None:
                return None
            names = SPLIT.get(noun, (noun,))
            for name, turn in zip(names, (1, -1)):
                powers[name] += sign * power * turn
            last, sign, power, degree = names[0], 1, 1, False
    if sign < 0 or power != 1:
        return None
    return tuple(sorted((name, n) for name, n in powers.items() if n)) or None


def _pieces(text: str) -> list[tuple[str, bool]] | tuple[tuple[str, bool]]:
    """The words and signs of a unit, each with whether it stands in `\\text{}`."""
    found: list[tuple[str, bool]] = []
    for token in _TOKEN.finditer(text):
        written = token.group()
        if written.startswith("\\text{"):
            inner = re.findall(r"[A-Za-z]+|\^ ?\{? ?\d+ ?\}?|[^\s.]", written[6:-1])
            found += [(word, True) for word in inner]
        elif written.strip() and written not in (".", "\\cdot"):
            found.append((written, False))
    return found or (("?", False),)


def _name(word: str, marked: bool) -> str | None:
    """The name of the unit or noun that a word stands for."""
    for form in (word, word.lower() if len(word) > 3 else word):
        for single in (form, form.removesuffix("s"), form.removesuffix("es")):
            if single in NAMES and (marked or len(word) > 2 or (len(word) == 2 and word not in LETTERS_ONLY_IN_TEXT)):
                return NAMES[single]
    word = word.lower()
    if not word.isalpha() or word in OTHER or len(word) < (3 if marked else 4) or not (marked or _spoken(word)):
        return None
    return word[:-3] + "y" if word.endswith("ies") and len(word) > 5 else word.removesuffix("s")


def _spoken(word: str) -> bool:
    """Whether it is a word rather than a product of letters: it has a vowel behind its first letter, and consonants."""
    return bool(re.search("[aeiouy]", word[1:].lower())) and bool(re.search("[^aeiou]", word.lower()))


def fits(given: Unit, wanted: Unit) -> bool:
    """Whether an answer's unit can be the gold one's: the same, or one side has none (see above)."""
    return given == wanted or not given or (not wanted and not given[0][0].startswith("base "))


def same(given: Quantity, wanted: Quantity) -> bool:
    """Whether two numbers are the same, whatever their units."""
    if given.percent == wanted.percent:
        return _same(given, wanted)
    percent, plain = (given, wanted) if given.percent else (wanted, given)
    hundredth = percent._replace(value=percent.value / 100, places=percent.places + 2)
    return _same(hundredth, plain) or (abs(percent.value) >= 1 and _same(percent, plain))


def _same(a: Quantity, b: Quantity) -> bool:
    return a.value == b.value or _rounds(a, b) or _rounds(b, a)


def _rounds(a: Quantity, b: Quantity) -> bool:
    """Whether `a` is a long decimal and `b`, which is none, rounds to it."""
    long = a.places >= PLACES and len(str(abs(a.value.numerator * 10**a.places // a.value.denominator))) >= PLACES
    return long and not b.places and round(b.value, a.places) == a.value


def latex(number: Quantity) -> str:
    """A number without its unit, for `srlib.data.equal`."""
    value = number.value / 100 if number.percent else number.value
    if number.places:
        places = number.places + 2 * number.percent
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        return ("-" if value < 0 else "") + digits[:-places] + "." + digits[-places:]
    sign = "-" if value < 0 else ""
    return (
        f"{sign}{abs(value.numerator)}"
        if value.denominator == 1
        else f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    )


class Name(NamedTuple):
    """Words, and whether `\\text{}` says that they are."""

    words: list[str]
    marked: bool


def name(text: str) -> Name | None:
    """A tidy text that consists of words alone, one of them longer than a letter; else None."""
    marked = "\\text{" in text
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    words = re.findall(r"\w+|[^\w\s]", plain)
    if not any(word.isalpha() and len(word) > 1 for word in words) or re.search(r"[\\{}^_=<>+*/|]", plain):
        return None
    if marked:  # with numbers only behind a word: not `5 apples`, but `May 5`
        return (
            None
            if words[0].isdigit() or plain.lstrip()[0] in "-.$(" and re.match(r"\W*\d", plain)
            else Name(words, True)
        )
    return Name(words, False) if all(map(str.isalpha, words)) else None


def same_name(a: Name, b: Name) -> bool:
    """Whether two names are the same: in letters, and in case but for the first letter of a word of a sentence.

    `evelyn` is `Evelyn`, but `RR` is not `Rr`, `AB` not `ab`, `Aabb` not `aabb`.
    """
    marked = a.marked or b.marked
    return len(a.words) == len(b.words) and all(_same_word(x, y, marked) for x, y in zip(a.words, b.words))


def _same_word(a: str, b: str, marked: bool) -> bool:
    if a == b or a.lower() == b.lower() in ANSWERS:
        return True
    genotype = re.fullmatch(r"(?:([a-z])\1)+", a.lower())
    sentence = a[1:] == b[1:] and a[0].lower() == b[0].lower() and len(a) > 2 and a[1:].islower()
    return sentence and not genotype and (marked or _spoken(a))
