"""Maps on the slide: probability maps of an encoder's heads, and heatmaps of slide models."""

from nic_core.maps.probability import (
    MAP_SCHEMA,
    overlay,
    probability_map,
    score_maps,
    tint,
    truth_of_cells,
)

__all__ = ["MAP_SCHEMA", "overlay", "probability_map", "score_maps", "tint", "truth_of_cells"]
