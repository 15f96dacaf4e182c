"""Encoders: networks that map a patch to an embedding, their patch tasks, training and files.

Docstrings of this package name the section of the method that they implement, and its source.
Section 2 is the encoder network (:mod:`~nic_core.encoders.networks`); section 3 is the training of
encoders (:mod:`~nic_core.encoders.objectives`, :mod:`~nic_core.encoders.training_loop`,
:mod:`~nic_core.encoders.augmentation`).

[A] Tellez et al., MIDL 2020 (arXiv 2004.07041); [B] Tellez et al., TPAMI 2019 (arXiv 1811.02840);
[model] layer configuration in the authors' released encoders; [code] behaviour of their released
scripts; [choice] not published, chosen by this project.
"""

import lazy_loader

# the names of __init__.pyi; the module of each is imported at its first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
