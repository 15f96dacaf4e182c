"""Neural image compression of whole-slide images: the library.

Every step of the method can be called from here alone; nothing in this package imports
the orchestrator (``nic_assets``) or the experiment tracker; some errors name the asset to make.
"""
