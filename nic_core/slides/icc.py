"""ICC profiles of slides: describe them, and convert pixels to sRGB.

A scanner's profile says which colours its RGB numbers mean. Pixels are read as stored unless the
caller asks for sRGB [choice].
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms
from pydantic import BaseModel, ConfigDict

from nic_core.slides.errors import SlideError
from nic_core.slides.remote import SlidePath
from nic_core.types import Pixels


class IccProfile(BaseModel):
    """What is recorded of an ICC profile.

    Attributes
    ----------
    sha256 : str
        Of the profile as stored, 64 hexadecimal digits.
    description : str
        Its own description; empty if it has none or cannot be read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    description: str


def describe_profile(data: bytes) -> IccProfile:
    """Return hash and description of a profile as stored."""
    try:
        description = ImageCms.getProfileDescription(io.BytesIO(data)).strip()
    except ImageCms.PyCMSError:  # a damaged profile matters only when it is applied
        description = ""
    return IccProfile(sha256=hashlib.sha256(data).hexdigest(), description=description)


def srgb_conversion(path: SlidePath, data: bytes) -> Callable[[Pixels], Pixels]:
    """Return a function that converts pixels from a profile to sRGB.

    The rendering intent is the profile's own [choice], as OpenSlide's documentation recommends.

    Parameters
    ----------
    path : Path or RemotePath
        Slide, for the error.
    data : bytes
        Profile as stored.

    Raises
    ------
    SlideError
        The profile cannot be read, or is not one of RGB pixels.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            ImageCms.Intent(ImageCms.getDefaultIntent(profile)),
        )
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        raise SlideError(
            path,
            f"its ICC profile cannot be applied to RGB pixels ({error})",
            "read it with colours 'stored'",
        ) from error

    def convert(pixels: Pixels) -> Pixels:
        return np.array(ImageCms.applyTransform(Image.fromarray(pixels), transform))

    return convert
