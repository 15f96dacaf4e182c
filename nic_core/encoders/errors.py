"""The error class of encoders."""


class EncoderError(ValueError):
    """An encoder cannot be trained, read or used; the message names it and a remedy."""
