"""File name patterns, the same on every Python version and system.

``*`` and ``?`` stay within a name, ``[abc]`` and ``[!abc]`` are one character, ``**/`` is any number of
directories. A pattern without a slash is matched against the last name of a path, one with a slash against
the whole relative path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1024)
def _expression(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression."""
    body = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]/]+\]|.", pattern.removeprefix("./"), re.DOTALL):
        if token == "**/":
            body += "(?:.*/)?"
        elif token == "**":
            body += ".*"
        elif token == "*":
            body += "[^/]*"
        elif token == "?":
            body += "[^/]"
        elif token[0] == "[" and len(token) > 1:
            negated = "^" if token[1] == "!" else ""
            body += "[" + negated + token[1:-1].removeprefix("!").replace("\\", r"\\") + "]"
        else:
            body += re.escape(token)
    try:
        return re.compile(body, re.DOTALL)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a valid file pattern ({error})") from None


def matches(relative: str, patterns: Sequence[str]) -> bool:
    """Whether the path ``relative`` (forward slashes) matches one of ``patterns``.

    Raises:
        ValueError: a pattern is malformed.
    """
    name = relative.rsplit("/", 1)[-1]
    return any(
        _expression(pattern.rstrip("/")).fullmatch(relative if "/" in pattern.rstrip("/") else name)
        for pattern in patterns
    )
