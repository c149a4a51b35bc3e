"""Pairs of phrases in two languages: generated from the names and formats of babel, or read from a user's TSV."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from pathlib import Path

from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_skeleton, format_timedelta
from babel.lists import format_list
from babel.numbers import format_compact_decimal, format_currency, format_decimal, format_percent
from babel.units import format_unit

from expertmesh.experts.errors import ConfigError

Pair = tuple[str, str]
Names = dict[str, str]
Write = Callable[[Locale], str]

GENERATED = 9000
LEAST = 50
LONGEST_LINE = 10_000
"""Characters of a line: a longer one is no pair of sentences."""
FIRST_DATE = date(1900, 1, 1)
UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "length-mile", "length-foot", "mass-kilogram", "mass-gram",
    "mass-pound", "volume-liter", "volume-milliliter", "duration-hour", "duration-minute", "duration-second",
    "duration-day", "duration-week", "duration-month", "duration-year", "temperature-celsius",
    "temperature-fahrenheit", "speed-kilometer-per-hour", "area-square-meter", "area-hectare", "power-watt",
    "energy-joule", "digital-megabyte", "frequency-hertz", "electric-volt", "pressure-hectopascal", "angle-degree",
)  # fmt: skip
CURRENCIES = (
    "USD", "EUR", "GBP", "JPY", "CHF", "SEK", "PLN", "CZK", "INR", "CNY", "BRL", "CAD", "AUD", "MXN", "KRW", "TRY",
    "ZAR", "NOK", "DKK", "HUF",
)  # fmt: skip


def generated_pairs(source: str, target: str, count: int = GENERATED) -> list[Pair]:
    """Names, dates, numbers, amounts and lists in two languages, no source text twice; the same at every call.

    All names of languages, territories and currencies occur alone once, and some again in amounts and lists: so a
    name that is held out may have been met elsewhere. Raises ConfigError for a language that babel does not know.
    """
    left, right = _locale(source), _locale(target)
    draw = random.Random(0)
    tables = [_names(left, right, table) for table in ("languages", "territories", "currencies")]
    kinds = [_date, _date, _number, _unit, _amount, _span, *(_list_of(names) for names in tables[:2] * 2)]
    pairs = {names[str(left)]: names[str(right)] for table in tables for names in table}
    while len(pairs) < count:
        write = draw.choice(kinds)(draw)
        pairs.setdefault(write(left), write(right))
    chosen = [(_plain(text), _plain(translation)) for text, translation in pairs.items()]
    draw.shuffle(chosen)
    return list(dict(chosen[:count]).items())


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file in UTF-8: in each line a text, a tab, its translation. Raises ConfigError with file and row.

    A source text that occurs again is left out, so that no held-out one is also trained on.
    """
    pairs: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            row = 0
            while line := file.readline(4 * LONGEST_LINE):
                row += 1
                source, target = _pair(f"{path}:{row}", line)
                if source:
                    pairs.setdefault(source, target)
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read: {error.strerror or error}") from None
    if len(pairs) < LEAST:
        raise ConfigError(f"{path}: it has {len(pairs)} different pairs: at least {LEAST} are needed")
    if len(set(pairs.values())) < 2:
        raise ConfigError(f"{path}: all translations are the same: there is nothing to learn")
    return list(pairs.items())


def _pair(where: str, line: bytes) -> Pair:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = ""
        if len(line) < 4 * LONGEST_LINE:
            raise ConfigError(f"{where}: the text is not UTF-8; save the file as UTF-8") from None
    if len(line) >= 4 * LONGEST_LINE or len(text) > LONGEST_LINE:
        raise ConfigError(f"{where}: the line has more than {LONGEST_LINE:,} characters: split it into sentences")
    if "\0" in text:
        raise ConfigError(f"{where}: it holds a NUL character, so it is not text; save the file as UTF-8")
    if not text.strip():
        return "", ""
    fields = [" ".join(field.split()) for field in text.split("\t")]
    if len(fields) != 2:
        raise ConfigError(f"{where}: {len(fields)} columns, but a text, a tab and its translation are needed")
    if not all(fields):
        missing = "text" if not fields[0] else "translation"
        raise ConfigError(f"{where}: the {missing} is empty: fill it in, or remove the line")
    return fields[0], fields[1]


def _locale(name: str) -> Locale:
    try:
        return Locale.parse(name, sep="-" if "-" in name else "_")
    except (UnknownLocaleError, ValueError, TypeError):
        raise ConfigError(f"babel knows no language {name!r}: name one such as en, de, fr, es, pt_BR, ja") from None


def _names(left: Locale, right: Locale, table: str) -> list[Names]:
    """The names of what is named in both languages, by language."""
    here, there = getattr(left, table), getattr(right, table)
    return [{str(left): here[code], str(right): there[code]} for code in sorted(here.keys() & there.keys())]


def _date(draw: random.Random) -> Write:
    day = FIRST_DATE + timedelta(days=draw.randrange(200 * 365))
    style = draw.choice(("short", "medium", "long", "full"))
    skeleton = draw.choice((None, None, "MMMMd", "yMMMM"))
    if skeleton is not None:
        return lambda locale: format_skeleton(skeleton, day, locale=locale)
    return lambda locale: format_date(day, style, locale=locale)


def _number(draw: random.Random) -> Write:
    value, large = _value(draw), round(10 ** draw.uniform(3, 12))
    written: list[Write] = [
        lambda locale: format_decimal(value, locale=locale),
        lambda locale: format_percent(value / 100, locale=locale),
        lambda locale: format_compact_decimal(large, format_type="long", fraction_digits=1, locale=locale),
    ]
    return draw.choice(written)


def _unit(draw: random.Random) -> Write:
    value, unit = _value(draw), draw.choice(UNITS)
    if draw.random() < 0.3:
        return lambda locale: format_unit(value, unit, "short", locale=locale)
    return lambda locale: format_unit(value, unit, "long", locale=locale)


def _amount(draw: random.Random) -> Write:
    value, currency = _value(draw), draw.choice(CURRENCIES)
    if draw.random() < 0.3:
        return lambda locale: format_currency(value, currency, locale=locale)
    return lambda locale: format_currency(value, currency, locale=locale, format_type="name")


def _span(draw: random.Random) -> Write:
    span = timedelta(seconds=round(10 ** draw.uniform(0, 8.5))) * draw.choice((1, -1))
    directed = draw.random() < 0.7
    return lambda locale: format_timedelta(span, add_direction=directed, threshold=1.2, locale=locale)


def _list_of(names: Sequence[Names]) -> Callable[[random.Random], Write]:
    def some(draw: random.Random) -> Write:
        chosen = draw.sample(names, draw.choice((2, 2, 3)))
        if draw.random() < 0.3:
            return lambda locale: format_list([own[str(locale)] for own in chosen], "or", locale)
        return lambda locale: format_list([own[str(locale)] for own in chosen], "standard", locale)

    return some


def _value(draw: random.Random) -> float:
    size = draw.choice((1.0, draw.uniform(0, 10), draw.uniform(2, 100), 10 ** draw.uniform(0, 6)))
    return round(size, draw.choice((0, 0, 1, 2)))


def _plain(text: str) -> str:
    """With usual spaces in place of those that do not break."""
    return " ".join(text.replace("\u202f", " ").replace("\xa0", " ").split())
