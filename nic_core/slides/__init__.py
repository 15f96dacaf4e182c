"""Whole-slide images: open a slide file and read any region at any resolution.

This package depends on no other part of the project but :mod:`nic_core.types` and
:mod:`nic_core.object_stores`.
"""

import lazy_loader

# the names of __init__.pyi; the module of each is imported at its first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
