def model_figures(evaluated): return {}
