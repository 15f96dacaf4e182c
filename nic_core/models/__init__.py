"""Models that predict a slide or a patient from compressed slides.

Modules by step of the method:

- :mod:`~nic_core.models.labels`, :mod:`~nic_core.models.fold_columns`,
  :mod:`~nic_core.models.folds`: labelled units and their folds
- :mod:`~nic_core.models.crops`: crops of grids, orientations, normalisation (paper B)
- :mod:`~nic_core.models.networks`: the grid CNN of paper B and two smaller networks
- :mod:`~nic_core.models.training`: training and test-time prediction of one fold (paper B)
- :mod:`~nic_core.models.cox`: survival (paper A)
- :mod:`~nic_core.models.cross_validation`: 4-fold cross-validation (paper B)
- :mod:`~nic_core.models.metrics`, :mod:`~nic_core.models.fold_metrics`,
  :mod:`~nic_core.models.baselines`, :mod:`~nic_core.models.comparison`: metrics with intervals and
  by fold, linear baselines, comparisons
- :mod:`~nic_core.models.explanation`: the value of each cell for the output [choice]
- :mod:`~nic_core.models.files`, :mod:`~nic_core.models.prediction`: the model file, new slides
- :mod:`~nic_core.models.figures`, :mod:`~nic_core.models.plots`: figures
- :mod:`~nic_core.models.kinds`: what depends on regression, classification or survival

Paper A is Tellez et al., MIDL 2020; paper B is Tellez et al., TPAMI 2019. [choice] marks what
neither paper specifies, [code] what the authors' scripts do.
"""
