"""Neural image compression of whole-slide images: the library.

Every step of the method can be called from here alone; nothing in this package imports
the orchestrator (``nic_assets``) or the experiment tracker; some errors name the asset to make.
"""

import os

# PyTorch's threads (OpenMP) wait for each other at every layer. By default a thread that waits
# computes in a loop: on cores that other work shares, it keeps the one it waits for from working.
# The variable is read when PyTorch is loaded, and processes that are started inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
