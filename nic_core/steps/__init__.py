"""The steps of a study: each reads its inputs from the store and writes its product to the store.

A step is named ``make_<asset>`` after the asset that it makes. It reads the products of earlier
steps, calls the package that implements the method, and writes its own product atomically. A
script calls the steps in this order: slide index, slides, patch tables, quality report, patch
tasks, encoders, encoder probes, grids, grid manifests, embedding colours, grid previews, target
folds, target grids, slide models, explanations, champions, prediction plans, predictions,
predictions report, external evaluations, probability maps, map scores, evaluation report.
"""

import lazy_loader

# the names of __init__.pyi; the module of each is imported at its first use
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
