"""The layout of the store: the path of every product.

::

    <root>/
      slide_index/              slides.parquet: the slides; files.parquet: a snapshot of every file
      slides/<slide>/           slide.json, thumbnail.jpg, tissue.png
      patch_tables/<geometry>/<slide>.parquet
      patch_tasks/<geometry>/<task>/       patches.npy, patches.parquet, findings.parquet, recipe
      encoders/<encoder>/       weights.safetensors (or network.*), card.json, history.parquet
      encoders/.<encoder>.training.pt      checkpoint of an unfinished training
      encoder_probes/<encoder>.parquet     scores of simple classifiers on its embeddings
      grids/<encoder>/<slide>.zarr
      grid_manifests/<encoder>.parquet     slide, content hash and cells of every grid
      embedding_colours/<encoder>.json     principal components of the embeddings of its grids
      cell_indexes/<encoder>/   unit vectors of all cells, for the search of similar ones
      grid_previews/<encoder>/<slide>.zarr     the grid as an RGB image, in these colours
      target_folds/<target>.parquet
      target_grids/<encoder>/<target>.parquet    the part of the grid manifest with labels
      slide_models/<encoder>/<target>/     fold-*.safetensors, card.json, predictions.parquet
      slide_models/<encoder>/.<target>.folds/    finished folds of an unfinished training
      explanations/<encoder>/<target>/     scores.parquet, <slide>/: heat.tif, heat.zarr, ...
      champions/<target>/       the registered model that predicts, version.json
      prediction_plans/<target>.parquet    what each slide is predicted from, or why it is not
      predictions/<target>/<slide>/        prediction.parquet, heatmap/: heat.tif, heat.zarr, ...
      reports/                  predictions.parquet, predictions.csv: all predictions
      external_grids/<cohort>/<encoder>/<slide>.zarr
      external_evaluations/<cohort>/<target>/    metrics.parquet, predictions.parquet, pictures, ...
      probability_maps/<map>/<slide>/      cells.parquet, overlay.jpg, probability.zarr
      map_scores/<map>.parquet
      quality_report/           slides.parquet: quality of every slide; outliers.png
      evaluation_report/        report.html, results.parquet, comparisons.parquet, pictures, ...
      mlflow/                   database and artifacts of the experiment tracker
      dagster/                  storage of the orchestrator

Only this module knows the layout. A product's folder is the plural of its asset's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nic_core.store.atomic import exclusive_lock, is_locked
from nic_core.store.keys import (
    ExternalKey,
    GridKey,
    MapKey,
    ModelKey,
    PatchTableKey,
    PatchTaskKey,
    PredictionKey,
)

STORE_VARIABLE = "NIC_STORE"
DEFAULT_STORE = Path("data/store")

Key = str | PatchTableKey | PatchTaskKey | GridKey | ModelKey | MapKey | PredictionKey | ExternalKey


@dataclass(frozen=True)
class Store:
    """Paths of every product under one root. A method has the name of the product's asset."""

    root: Path

    @classmethod
    def from_environment(cls) -> Store:
        """The store at ``$NIC_STORE``; by default ``data/store``."""
        return cls(Path(os.environ.get(STORE_VARIABLE) or DEFAULT_STORE).resolve())

    @property
    def slide_index(self) -> Path:
        """The table of slides."""
        return self.root / "slide_index" / "slides.parquet"

    @property
    def file_snapshot(self) -> Path:
        """Size, time and content identity of every input file at the last scan."""
        return self.root / "slide_index" / "files.parquet"

    def slide(self, slide: str) -> Path:
        return self.root / "slides" / slide

    def patch_table(self, key: PatchTableKey) -> Path:
        return self.root / "patch_tables" / key.geometry / f"{key.slide}.parquet"

    def patch_task(self, key: PatchTaskKey) -> Path:
        return self.root / "patch_tasks" / key.geometry / key.task

    def encoder(self, encoder: str) -> Path:
        return self.root / "encoders" / encoder

    def encoder_checkpoint(self, encoder: str) -> Path:
        """State of an unfinished training; removed when the encoder is complete."""
        return self.root / "encoders" / f".{encoder}.training.pt"

    def encoder_probe(self, encoder: str) -> Path:
        return self.root / "encoder_probes" / f"{encoder}.parquet"

    def grid(self, key: GridKey) -> Path:
        return self.root / "grids" / key.encoder / f"{key.slide}.zarr"

    def grid_manifest(self, encoder: str) -> Path:
        return self.root / "grid_manifests" / f"{encoder}.parquet"

    def embedding_colours(self, encoder: str) -> Path:
        return self.root / "embedding_colours" / f"{encoder}.json"

    def cell_index(self, encoder: str) -> Path:
        """Index of all cells of an encoder's grids. It belongs to no asset: it is made when it is
        first searched, and again if the grid manifest changed."""
        return self.root / "cell_indexes" / encoder

    def grid_preview(self, key: GridKey) -> Path:
        return self.root / "grid_previews" / key.encoder / f"{key.slide}.zarr"

    def target_folds(self, target: str) -> Path:
        return self.root / "target_folds" / f"{target}.parquet"

    def target_grids(self, key: ModelKey) -> Path:
        return self.root / "target_grids" / key.encoder / f"{key.target}.parquet"

    def slide_model(self, key: ModelKey) -> Path:
        return self.root / "slide_models" / key.encoder / key.target

    def slide_model_checkpoint(self, key: ModelKey) -> Path:
        """Finished folds of an unfinished training; removed when the model is complete."""
        return self.root / "slide_models" / key.encoder / f".{key.target}.folds"

    def explanation(self, key: ModelKey) -> Path:
        return self.root / "explanations" / key.encoder / key.target

    def champion(self, target: str) -> Path:
        """The registered model that predicts a target."""
        return self.root / "champions" / target

    def prediction_plan(self, target: str) -> Path:
        return self.root / "prediction_plans" / f"{target}.parquet"

    def prediction(self, key: PredictionKey) -> Path:
        return self.root / "predictions" / key.champion / key.slide

    @property
    def predictions_report(self) -> Path:
        """The table of all predictions; the same as CSV is beside it."""
        return self.root / "reports" / "predictions.parquet"

    def external_grids(self, cohort: str, encoder: str) -> Path:
        """Folder of the grids of an external cohort's slides."""
        return self.root / "external_grids" / cohort / encoder

    def external_evaluation(self, key: ExternalKey) -> Path:
        return self.root / "external_evaluations" / key.cohort / key.target

    def probability_map(self, key: MapKey) -> Path:
        return self.root / "probability_maps" / key.map / key.slide

    def map_scores(self, map: str) -> Path:
        """AUC of a map on the slides that have a truth image."""
        return self.root / "map_scores" / f"{map}.parquet"

    @property
    def quality_report(self) -> Path:
        return self.root / "quality_report"

    @property
    def evaluation_report(self) -> Path:
        return self.root / "evaluation_report"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    def products(self) -> Iterator[Product]:
        """Every product of a partitioned asset, asset by asset.

        Files that the layout has no place for, unfinished products and symbolic links are left out.
        """
        root = self.root.resolve()
        for pattern, (asset, parse, complete) in _PLACES.items():
            place = re.compile(re.escape(pattern).replace(r"\*", "([^/.][^/]*)"))
            for path in sorted(self.root.glob(pattern)):
                name = path.relative_to(self.root).as_posix()
                parts = place.fullmatch(f"{name}/" if pattern.endswith("/") else name)
                if parts is not None and path.resolve() == root / name:
                    yield Product(asset, parse("|".join(parts.groups())), path, complete)

    def published(self) -> Iterator[Path]:
        """Paths of all complete products, with those of assets without partitions.

        The databases are left out, and the cell indexes, which are made when they are searched.
        """
        yield from (product.path for product in self.products() if product.complete)
        single = (self.slide_index, self.file_snapshot, self.predictions_report)
        reports = (self.predictions_report.with_suffix(".csv"), self.quality_report)
        for path in (*single, *reports, self.evaluation_report):
            if path.exists():
                yield path
        yield from sorted(self.root.glob("external_grids/*/*/[!.]*.zarr"))

    def leftovers(self) -> Iterator[Leftover]:
        """Temporary files beside products: of writers that died, and of writers at work."""
        found: dict[Path, list[Path]] = {}
        for folder, folders, files in os.walk(self.root):
            for name in folders + files:
                marked = _TEMPORARY.fullmatch(name)
                if marked is not None:
                    found.setdefault(Path(folder, marked["product"]), []).append(Path(folder, name))
            # a product contains no other product, and a temporary folder is reported as one
            folders[:] = [name for name in folders if not _NO_PRODUCTS_INSIDE.search(name)]
        for product, temporary in sorted(found.items()):
            locked = is_locked(product)
            # the writer may have finished meanwhile
            present = tuple(sorted(f for f in temporary if locked or os.path.lexists(f)))
            if present:
                yield Leftover(product, present, locked)


# pattern -> asset, parser of its key, and whether the product is complete
_PLACES: dict[str, tuple[str, Callable[[str], Key], bool]] = {
    "slides/*/": ("slide", str, True),
    "patch_tables/*/*.parquet": ("patch_table", PatchTableKey.parse, True),
    "patch_tasks/*/*/": ("patch_task", PatchTaskKey.parse, True),
    "encoders/*/": ("encoder", str, True),
    "encoders/.*.training.pt": ("encoder", str, False),
    "encoder_probes/*.parquet": ("encoder_probe", str, True),
    "grids/*/*.zarr": ("grid", GridKey.parse, True),
    "grid_manifests/*.parquet": ("grid_manifest", str, True),
    "embedding_colours/*.json": ("embedding_colours", str, True),
    "grid_previews/*/*.zarr": ("grid_preview", GridKey.parse, True),
    "target_folds/*.parquet": ("target_folds", str, True),
    "target_grids/*/*.parquet": ("target_grids", ModelKey.parse, True),
    "slide_models/*/*/": ("slide_model", ModelKey.parse, True),
    "slide_models/*/.*.folds/": ("slide_model", ModelKey.parse, False),
    "explanations/*/*/": ("explanation", ModelKey.parse, True),
    "champions/*/": ("champion", str, True),
    "prediction_plans/*.parquet": ("prediction_plan", str, True),
    "predictions/*/*/": ("prediction", PredictionKey.parse, True),
    "external_evaluations/*/*/": ("external_evaluation", ExternalKey.parse, True),
    "probability_maps/*/*/": ("probability_map", MapKey.parse, True),
    "map_scores/*.parquet": ("map_scores", str, True),
}
_TEMPORARY = re.compile(r"\.(new|old|lock)\.(?P<product>.+)")
_NO_PRODUCTS_INSIDE = re.compile(r"\.zarr$|^\.(new|old)\.|^(mlflow|dagster)$")


@dataclass(frozen=True)
class Product:
    """A product in the store.

    Attributes
    ----------
    asset
        Name of the asset, which is also the method of :class:`Store` that gives the path.
    key
        Its partition: a slide, an encoder, a :class:`~nic_core.store.keys.GridKey`, ...
    complete
        False for the checkpoint of an unfinished training.
    """

    asset: str
    key: Key
    path: Path
    complete: bool = True

    def __str__(self) -> str:
        return f"{self.asset} {self.key}"


@dataclass(frozen=True)
class Leftover:
    """Temporary files beside a product; ``locked``: a living process is writing the product."""

    product: Path
    files: tuple[Path, ...]
    locked: bool

    def remove(self) -> None:
        """Remove the files, as the next writer of the product would.

        Raises
        ------
        StoreBusyError
            A process is writing the product.
        """
        with exclusive_lock(self.product, wait=False):
            pass
