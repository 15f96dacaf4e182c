"""The one error that a slide can raise."""

from __future__ import annotations

from pathlib import Path


class SlideError(Exception):
    """A slide cannot be used; says which, why, and what to do about it.

    Attributes
    ----------
    slide : str
        Path or id of the slide.
    reason : str
        What is wrong.
    remedy : str
        What the user can do.
    """

    def __init__(self, slide: str | Path, reason: str, remedy: str) -> None:
        self.slide = str(slide)
        self.reason = " ".join(reason.split())  # libraries report over several lines
        self.remedy = remedy
        # all three as args: an exception is rebuilt from them when it crosses processes
        super().__init__(self.slide, self.reason, self.remedy)

    def __str__(self) -> str:
        return f"{self.slide}: {self.reason}; {self.remedy}"
