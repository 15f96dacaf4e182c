from .probability import (
    MAP_SCHEMA,
    overlay,
    probability_map,
    score_maps,
    tint,
    truth_of_cells,
)

__all__ = ["MAP_SCHEMA", "overlay", "probability_map", "score_maps", "tint", "truth_of_cells"]
