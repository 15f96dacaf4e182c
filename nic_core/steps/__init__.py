"""The steps of a study, each from the store to the store.

A step reads what earlier steps left in the :class:`~nic_core.store.Store`, calls the module
that does the work and writes its product whole. An orchestrator calls them partition by
partition; a script can call them in this order: ``inputs``, ``slides``, ``encoders``, ``grids``,
``maps``, ``models``, ``explanations``, ``reports``.
"""

from nic_core.steps.encoders import (
    encoder_tracked,
    leaked_groups,
    make_encoder,
    make_patch_task,
    patch_task_is_current,
    probe_encoder,
)
from nic_core.steps.explanations import Explained, explain_model
from nic_core.steps.grids import compress, gather_grids, prepare_encoder
from nic_core.steps.inputs import (
    Found,
    digest,
    encoder_versions,
    find_slides,
    patch_task_versions,
    read_index,
    read_seen,
    target_versions,
    write_found,
    write_index,
)
from nic_core.steps.maps import map_slide, score_map
from nic_core.steps.models import divide, make_model, model_tracked
from nic_core.steps.reports import draw_slide, write_report
from nic_core.steps.slides import SlideRecord, prepare_slide, read_record, tabulate_patches

__all__ = [
    "Explained",
    "Found",
    "SlideRecord",
    "compress",
    "digest",
    "divide",
    "draw_slide",
    "encoder_tracked",
    "encoder_versions",
    "explain_model",
    "find_slides",
    "gather_grids",
    "leaked_groups",
    "make_encoder",
    "make_model",
    "make_patch_task",
    "map_slide",
    "model_tracked",
    "patch_task_is_current",
    "patch_task_versions",
    "prepare_encoder",
    "prepare_slide",
    "probe_encoder",
    "read_index",
    "read_record",
    "read_seen",
    "score_map",
    "tabulate_patches",
    "target_versions",
    "write_found",
    "write_index",
    "write_report",
]
