"""The assets, one module a layer: slides, encoders, grids, models, reports."""
