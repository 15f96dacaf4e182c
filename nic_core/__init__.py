"""Neural image compression of whole-slide images: the library.

Every step of the method can be called from here alone; nothing in this package imports
the orchestrator (``nic_assets``) or the experiment tracker; some errors name the asset to make.
"""

import pyvips

# libvips remembers what it loaded by file name: a file that changed would be read as it was
pyvips.cache_set_max(0)
