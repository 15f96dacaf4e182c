"""Maps on the slide: probability maps of an encoder's heads, and heatmaps of slide models."""

import lazy_loader

# the names of __init__.pyi; the module of each is imported at its first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
