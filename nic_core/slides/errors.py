"""The error that slides raise."""

from __future__ import annotations

from pathlib import PurePath


class SlideError(Exception):
    """A slide cannot be used. The message names the slide, the reason and a remedy.

    Attributes
    ----------
    slide : str
        Path or id of the slide.
    reason : str
        What is wrong, in one line.
    remedy : str
        What the user can do.
    """

    def __init__(self, slide: str | PurePath, reason: str, remedy: str) -> None:
        self.slide = str(slide)
        self.reason = " ".join(reason.split())  # messages of libraries may have several lines
        self.remedy = remedy
        # pickle rebuilds an exception from its args, so all three must be among them
        super().__init__(self.slide, self.reason, self.remedy)

    def __str__(self) -> str:
        return f"{self.slide}: {self.reason}; {self.remedy}"
