"""What goes wrong with encoders."""


class EncoderError(ValueError):
    """An encoder cannot be trained, read or used as asked; the message names it."""
