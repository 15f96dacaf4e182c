"""Neural image compression of whole-slide images: the library.

Every step of the method can be called from here alone; nothing in this package knows of
the orchestrator (``nic_assets``) or of the experiment tracker.
"""
