"""Grids of patch embeddings: their store on disk, eight orientations, and previews."""

import lazy_loader

# the names of __init__.pyi; the module of each is imported at its first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
