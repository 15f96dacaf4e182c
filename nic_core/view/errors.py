"""The error that an answer of the viewer reports."""

from __future__ import annotations

import re
from collections.abc import Iterable

# two separators or more, or a drive: a path, and not a quotient such as um/px
_NAME = r"[^\s/\\:;,'\"()]"
_PATH = re.compile(rf"{_NAME}*(?:/{_NAME}+){{2,}}/?|[A-Za-z]:(?:\\{_NAME}+)+")


UNREACHABLE = "its server does not answer, or denies the access"
TRY_LATER = "check the server and its login, and try again later"


class ViewError(Exception):
    """A request cannot be answered.

    Attributes
    ----------
    status : int
        HTTP status: 400 wrong parameters, 401 without the token, 404 unknown, 410 the slide's file
        vanished, 422 the slide cannot be read, 503 busy, or a remote slide's server is.
    reason, remedy : str
        What is wrong, and what to do; without paths.
    """

    def __init__(self, status: int, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.remedy = status, reason, remedy


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """Return a message without paths of files: pages show ids alone.

    Parameters
    ----------
    known : iterable of str
        Paths that the message may name, also with spaces.
    """
    for path in sorted(filter(None, known), key=len, reverse=True):
        text = text.replace(path, "the file")
    return _PATH.sub("the file", text)
