"""Compression: encode the patches of a slide to a grid, for one slide or many."""

import lazy_loader

# the names of __init__.pyi; the module of each is imported at its first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
