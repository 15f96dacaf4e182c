"""The cohort file and its tables: entries, the slide index, and the scan for changed files."""

from nic_core.cohort.encoders import (
    FILE_KINDS,
    EncoderEntry,
    EncoderSpec,
    ExternalNetwork,
    FeaturesEncoder,
    FileKind,
    ImportedEncoder,
    InitialWeights,
    Preprocess,
    PresetName,
    RegisteredEncoder,
    ReusedEncoder,
    TimmModel,
    Tokens,
)
from nic_core.cohort.external import ExternalCohort
from nic_core.cohort.fields import CohortError, NetworkName
from nic_core.cohort.file import COHORT_VARIABLE, DEFAULT_COHORT, Cohort, cohort_path, load_cohort
from nic_core.cohort.geometry import Geometry
from nic_core.cohort.patch_tasks import AnnotatedSlides, Hdf5Images, PatchTask
from nic_core.cohort.settings import (
    LEAST_FOLDS,
    Automation,
    CompressionSettings,
    FoldSetting,
    ModelSettings,
    Settings,
    SiteFolds,
)
from nic_core.cohort.slides import SlideFolder, Slides
from nic_core.cohort.targets import (
    CategoricalCovariate,
    ClassificationTarget,
    Covariate,
    NumericCovariate,
    ProbabilityMap,
    RegressionTarget,
    SurvivalTarget,
    Target,
)

__all__ = [
    "COHORT_VARIABLE",
    "DEFAULT_COHORT",
    "FILE_KINDS",
    "LEAST_FOLDS",
    "AnnotatedSlides",
    "Automation",
    "CategoricalCovariate",
    "ClassificationTarget",
    "Cohort",
    "CohortError",
    "CompressionSettings",
    "Covariate",
    "EncoderEntry",
    "EncoderSpec",
    "ExternalCohort",
    "ExternalNetwork",
    "FeaturesEncoder",
    "FileKind",
    "FoldSetting",
    "Geometry",
    "Hdf5Images",
    "ImportedEncoder",
    "InitialWeights",
    "ModelSettings",
    "NetworkName",
    "NumericCovariate",
    "PatchTask",
    "Preprocess",
    "PresetName",
    "ProbabilityMap",
    "RegisteredEncoder",
    "RegressionTarget",
    "ReusedEncoder",
    "Settings",
    "SiteFolds",
    "SlideFolder",
    "Slides",
    "SurvivalTarget",
    "Target",
    "TimmModel",
    "Tokens",
    "cohort_path",
    "load_cohort",
]
