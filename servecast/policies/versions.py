"""What an engine's command line knows, by version: one table per engine, one refusal per mistake.

A version is compared as four numbers, major, minor, patch and post release; the fourth number of ``0.9.0.1`` counts
like a post release. Release candidates and nightly builds are not accepted, since their options are a moving target.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Version = tuple[int, int, int, int]
"""Major, minor, patch, post release."""

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:\.(?:post)?(\d{1,4}))?", re.ASCII)


def parse_version(text: str) -> Version:
    """Numbers of a release, missing ones 0.

    >>> parse_version("0.32"), parse_version("0.4.6.post2")
    ((0, 32, 0, 0), (0, 4, 6, 2))
    """
    match = _VERSION.fullmatch(text)
    if match is None:
        raise ValueError(f"engine_version must be a release such as 0.32.0, got {text[:40]!r}")
    major, minor, patch, post = (int(part or 0) for part in match.groups())
    return major, minor, patch, post


def show_version(version: Version) -> str:
    """As the package index writes it.

    >>> show_version((0, 4, 6, 2))
    '0.4.6.post2'
    """
    text = ".".join(str(part) for part in version[:3])
    return f"{text}.post{version[3]}" if version[3] else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One long option: the range of versions whose parser has it, and how its boolean form reads."""

    since: Version
    """First version known to have it."""
    until: Version | None = None
    """First version known to be without it."""
    switch: bool = False
    """Takes no value: present is true."""
    negatable_since: Version | None = None
    """First version with a ``--no-`` twin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Versions of one engine whose options were checked, and those options."""

    name: str
    oldest: Version
    newest: Version
    options: Mapping[str, Option] = field(default_factory=dict)

    def check(self, text: str) -> Version:
        """Numbers of `text` if its options are known.

        A later patch of the newest minor version is accepted, since patch releases keep the command line; a later minor
        version is refused, since options have come and gone with minor versions.
        """
        version = parse_version(text)
        if version < self.oldest:
            raise ValueError(f"{self.name} {text} is older than {show_version(self.oldest)}, the oldest version known")
        if version[:2] > self.newest[:2]:
            raise ValueError(f"{self.name} {text} is newer than {show_version(self.newest)}, the newest version known")
        return version

    def require(self, option: str, text: str) -> Option:
        """The option's row, or one line that says from when until when the engine has it.

        >>> from servecast.policies.vllm import ENGINE
        >>> ENGINE.require("max_num_partial_prefills", "0.5.0")
        Traceback (most recent call last):
        ValueError: vllm 0.5.0 does not know max_num_partial_prefills (since 0.7.3, until 0.27.0)
        """
        key = option.replace("_", "-")
        if key not in self.options:
            raise ValueError(f"{self.name} has no option {option[:60]!r} in the table of known options")
        row, version = self.options[key], parse_version(text)
        if version < row.since or (row.until is not None and version >= row.until):
            span = f"since {show_version(row.since)}"
            if row.until is not None:
                span += f", until {show_version(row.until)}"
            raise ValueError(f"{self.name} {text} does not know {option} ({span})")
        return row
