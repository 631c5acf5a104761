"""What must not leave the process: keys of servers, and passwords in addresses."""

from __future__ import annotations

import base64
import html
import json
import re
from functools import cache
from typing import Annotated, Any
from urllib.parse import quote, quote_plus, urlsplit

from pydantic import BeforeValidator, WithJsonSchema

MASK = "[key]"


def masked(text: str, key: str) -> str:
    """`text` without `key`, however a server may have written it."""
    return _pattern(key).sub(lambda _: MASK, text)


def checked(url: Any) -> str:
    """An address, if it is one and may be written down.

    Raises:
        ValueError: it is none, or holds what may be a secret; that is not repeated.
    """
    if not isinstance(url, str):
        raise ValueError("an address is a text such as https://api.deepseek.com/v1")
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # whose message quotes parts of it
        whole = False
    if "@" in (parts.netloc if whole else url):
        raise ValueError(
            "this address holds a user name or a password, and would be written into the manifest: leave them out; "
            "a judge's key belongs in an environment variable"
        )
    if "?" in url or "#" in url:
        raise ValueError(
            "this address goes on after its path (? or #), which no request could: leave that out; a judge's key "
            "belongs in an environment variable"
        )
    if not whole or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(f"{url!r} is no address such as https://api.deepseek.com/v1")
    return url


def _named(name: Any) -> Any:
    if not isinstance(name, str) or not re.fullmatch(VARIABLE, name):
        raise ValueError(
            "this is not the name of an environment variable, such as DEEPSEEK_API_KEY: the key itself belongs in "
            "that variable, not in the params, and is not repeated here"
        )
    return name


VARIABLE = "[A-Z][A-Z0-9_]*"
Address = Annotated[str, BeforeValidator(checked)]
Variable = Annotated[str, BeforeValidator(_named), WithJsonSchema({"type": "string", "pattern": f"^{VARIABLE}$"})]


@cache
def _pattern(key: str) -> re.Pattern[str]:
    """A key plain, percent-encoded, as Python, JSON and HTML quote it, and inside of base64."""
    quoted = json.dumps(key)[1:-1]
    forms = {key, quote(key), quote(key, safe=""), quote_plus(key), repr(key)[1:-1], html.escape(key), quoted}
    forms |= {quoted.replace("/", "\\/"), json.dumps(quoted)[1:-1]}
    for before in range(3):  # the key may begin at any of the three bytes that make four letters
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            coded = encode(bytes(before) + key.encode()).decode().rstrip("=")
            # The first and the last letter may hold bits of what stands beside the key.
            inner = coded[(before * 8 + 5) // 6 : (before + len(key.encode())) * 8 // 6]
            forms |= {inner} if len(inner) >= 8 else set()
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
