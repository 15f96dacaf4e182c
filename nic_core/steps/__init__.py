"""The steps of a study: each reads its inputs from the store and writes its product to the store.

A step is named ``make_<asset>`` after the asset that it makes. It reads the products of earlier
steps, calls the package that implements the method, and writes its own product atomically. A
script calls the steps in this order: slide index, slides, patch tables, quality report, patch
tasks, encoders, encoder probes, grids, grid manifests, embedding colours, grid previews, target
folds, slide models, explanations, external evaluations, probability maps, map scores, evaluation
report.
"""

from nic_core.steps.encoders import (
    encoder_figures,
    leaked_groups,
    make_encoder,
    make_encoder_probe,
    make_features_encoder,
    make_patch_task,
    patch_task_is_current,
    patch_task_keys,
)
from nic_core.steps.evaluation_report import draw_slide, make_evaluation_report
from nic_core.steps.explanations import Explanation, make_explanation
from nic_core.steps.external import (
    ExternalEvaluation,
    evaluate_external,
    external_versions,
    frozen_model_folder,
    make_external_evaluation,
    study_slides,
    write_external_evaluation,
)
from nic_core.steps.grids import (
    make_embedding_colours,
    make_features_grid,
    make_grid,
    make_grid_manifest,
    make_grid_preview,
    prepare_encoder,
    read_cells,
    read_grid_manifest,
)
from nic_core.steps.probability_maps import make_map_scores, make_probability_map
from nic_core.steps.quality_report import QualityReport, make_quality_report
from nic_core.steps.slide_index import (
    SlideScan,
    digest,
    encoder_bases,
    encoder_versions,
    excluded_slides,
    initial_weight_files,
    make_slide_index,
    patch_task_versions,
    read_file_snapshot,
    read_patient_groups,
    read_slide_index,
    scan_slides,
    target_versions,
    write_slide_index,
)
from nic_core.steps.slide_models import (
    TargetFolds,
    find_target_folds,
    find_unmatched_labels,
    make_slide_model,
    make_target_folds,
    read_slide_model,
)
from nic_core.steps.slides import SlideRecord, make_patch_table, make_slide, read_record

__all__ = [
    "Explanation",
    "ExternalEvaluation",
    "QualityReport",
    "SlideRecord",
    "SlideScan",
    "TargetFolds",
    "digest",
    "draw_slide",
    "encoder_bases",
    "encoder_figures",
    "encoder_versions",
    "evaluate_external",
    "excluded_slides",
    "external_versions",
    "find_target_folds",
    "find_unmatched_labels",
    "frozen_model_folder",
    "initial_weight_files",
    "leaked_groups",
    "make_embedding_colours",
    "make_encoder",
    "make_encoder_probe",
    "make_evaluation_report",
    "make_explanation",
    "make_external_evaluation",
    "make_features_encoder",
    "make_features_grid",
    "make_grid",
    "make_grid_manifest",
    "make_grid_preview",
    "make_map_scores",
    "make_patch_table",
    "make_patch_task",
    "make_probability_map",
    "make_quality_report",
    "make_slide",
    "make_slide_index",
    "make_slide_model",
    "make_target_folds",
    "patch_task_is_current",
    "patch_task_keys",
    "patch_task_versions",
    "prepare_encoder",
    "read_cells",
    "read_file_snapshot",
    "read_grid_manifest",
    "read_patient_groups",
    "read_record",
    "read_slide_index",
    "read_slide_model",
    "scan_slides",
    "study_slides",
    "target_versions",
    "write_external_evaluation",
    "write_slide_index",
]
