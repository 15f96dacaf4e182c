"""Neural image compression of whole-slide images: the library.

Every step of the method can be called from here alone; nothing in this package imports
the orchestrator (``nic_assets``) or the experiment tracker; some errors name the asset to make.
"""

import os

import pyvips

# libvips remembers what it loaded by file name: a file that changed would be read as it was
pyvips.cache_set_max(0)

# The threads of PyTorch (OpenMP) and of BLAS wait for each other many times a second. By default a
# thread that waits computes in a loop: on cores that other work shares, it keeps the thread it
# waits for from working. The libraries read these variables when they are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # of the shortest: 2^4 cycles
