"""Compressing many slides: failures, full disks, several processes, killed processes."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from nic_core.cohort import EncoderSpec
from nic_core.compression.batch import BATCH_SCHEMA, compress_slides, slides_by_id, write_report
from nic_core.encoders import train_encoder
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import grid_hash, open_grid
from nic_core.slides import SlideSource
from nic_core.store import exclusive_lock
from tests.slides import vendors
from tests.slides.conftest import paint, write_tiff
from tests.slides.test_slide_images import write_ome

pytestmark = pytest.mark.slow

# tests start many processes, which share these imports
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["nic_core.compression.batch", "nic_core.encoders", "tests.slides.test_batch"]
)


def mean_rgb(patch: int = 64) -> PreparedEncoder:
    spec = EncoderSpec(name="mean", objective="mean_rgb")
    trained = train_encoder(spec, [], patch=patch, mpp=1.0, embedding_size=3, tracker=None)
    return trained.encoder.prepare("cpu")


@pytest.fixture
def slides(tmp_path) -> dict[str, SlideSource]:
    """Three slides of 8 x 8 cells that are all tissue."""
    return by_id(
        *(
            write_tiff(tmp_path / f"{name}.tif", paint(512, 512, seed), mpp=1.0)
            for seed, name in enumerate("abc")
        )
    )


def by_id(*paths: Path) -> dict[str, SlideSource]:
    return slides_by_id(map(SlideSource, paths))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_bad_slide_does_not_stop_the_others(slides, tmp_path):
    (tmp_path / "text.svs").write_text("no slide")
    bad = by_id(tmp_path / "text.svs", tmp_path, tmp_path / "gone.svs")
    outcomes = []
    out = tmp_path / "grids"
    table = compress_slides(bad | slides, mean_rgb(), out, on_outcome=outcomes.append)
    assert dict(table.schema) == BATCH_SCHEMA
    assert table["slide"].to_list() == [*bad, *slides] == [outcome.slide for outcome in outcomes]
    failed, good = table[:3], table[3:]
    assert set(failed["status"]) == {"failed"}
    assert failed["reason"].to_list() == [
        "not an image of a known format",
        "is a folder",
        "cannot be read (No such file or directory)",
    ]
    assert failed["remedy"].null_count() == 0
    assert failed["cells"].null_count() == 3
    assert set(good["status"]) == {"compressed"}
    assert good["reason"].null_count() == 3
    for row in good.iter_rows(named=True):
        grid = open_grid(out / f"{row['slide']}.zarr")
        assert row["cells"] == grid.valid.sum() == 64
        assert row["patches_per_second"] == pytest.approx(row["cells"] / row["seconds"])
    assert names(out) == ["a.zarr", "b.zarr", "c.zarr"]


def test_only_changed_slides_are_compressed_again(slides, tmp_path):
    encoder, out = mean_rgb(), tmp_path / "grids"

    def statuses(encoder=encoder, mpp=None, **options):
        sources = {slide: replace(source, mpp=mpp) for slide, source in slides.items()}
        table = compress_slides(sources, encoder, out, **options)
        assert table["cells"].to_list() == [int(open_grid(p).valid.sum()) for p in out.iterdir()]
        return set(table["status"])

    assert statuses() == {"compressed"}
    assert statuses() == {"up to date"}
    other = replace(encoder, card=encoder.card.model_copy(update={"weights_hash": "1" * 64}))
    coarser = replace(encoder, precision="bfloat16")
    for changed in (
        {"encoder": other},
        {"encoder": coarser},
        {"encoder": replace(coarser, reading="input")},
        {"encoder": mean_rgb(32)},
        {"mpp": 0.9},
        {"orientations": True},
    ):
        assert statuses(**changed) == {"compressed"}
        assert statuses(**changed) == {"up to date"}
    assert statuses() == {"compressed"}
    assert statuses(resume=False) == {"compressed"}
    write_tiff(slides["b"].path, paint(512, 512, 9), mpp=1.0)
    table = compress_slides(slides, encoder, out)
    assert table["status"].to_list() == ["up to date", "compressed", "up to date"]


def test_each_slide_is_read_with_its_own_mpp_image_and_mask(tmp_path):
    scans = [(paint(size, size), f"scan {size}", 1.0) for size in (512, 256)]
    for name in "abc":
        write_ome(tmp_path / f"{name}.ome.tif", scans)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(mask)
    slides = slides_by_id(
        [
            SlideSource(tmp_path / "a.ome.tif", mpp=0.5),
            SlideSource(tmp_path / "b.ome.tif", image=1),
            SlideSource(tmp_path / "c.ome.tif", mask=mask),
        ]
    )
    encoder, out = mean_rgb(), tmp_path / "grids"
    assert compress_slides(slides, encoder, out)["cells"].to_list() == [16, 16, 8]
    a, b, c = (open_grid(out / f"{name}.zarr") for name in "abc")
    assert [grid.provenance.slide_mpp for grid in (a, b, c)] == [0.5, 1.0, 1.0]
    assert [grid.provenance.slide_image for grid in (a, b, c)] == [0, 1, 0]
    np.testing.assert_array_equal(c.valid, np.eye(8, dtype=bool))
    assert set(compress_slides(slides, encoder, out)["status"]) == {"up to date"}
    Image.fromarray(np.tri(8, dtype=np.uint8)).save(mask)
    again = compress_slides(slides, encoder, out)
    assert again["status"].to_list() == ["up to date", "up to date", "compressed"]
    assert again["cells"].to_list() == [16, 16, 36]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.png", None, "mask {}: "),
        ("none.geojson", None, "mask {}: the annotations cannot be read ("),
        ("text.png", "no image", "mask {}: "),
        ("text.geojson", "no mask", "mask {}: the annotations cannot be read ("),
    ],
)
def test_a_mask_that_cannot_be_read_is_the_reason(slides, tmp_path, name, content, reason):
    mask = tmp_path / name
    if content is not None:
        mask.write_text(content)
    masked = slides | {"b": replace(slides["b"], mask=mask)}
    table = compress_slides(masked, mean_rgb(), tmp_path / "grids")
    assert table["status"].to_list() == ["compressed", "failed", "compressed"]
    assert table["reason"][1].startswith(reason.format(mask))
    assert table["path"][1] == str(slides["b"].path)


def test_sources_of_one_slide_that_differ_are_refused(tmp_path):
    path = tmp_path / "a.svs"
    with pytest.raises(ValueError, match=r"a.svs is given twice, with different um/px, image or"):
        slides_by_id([SlideSource(path), SlideSource(path, mpp=0.5)])


def test_files_with_the_same_slide_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x/a.svs and .*y/a.ome.tif have the same slide id 'a'"):
        by_id(tmp_path / "x" / "a.svs", tmp_path / "y" / "a.ome.tif")
    assert list(by_id(*[tmp_path / "a.svs"] * 2)) == ["a"]


def test_the_files_of_a_dicom_series_are_one_slide(tmp_path, monkeypatch):
    pixels = paint(128, 128)
    level0 = vendors.write_dicom(tmp_path / "P1", [pixels], 0.5, label=pixels)
    assert by_id(*sorted(level0.parent.iterdir())) == {"P1": SlideSource(level0)}
    monkeypatch.chdir(level0.parent)
    assert by_id(Path("label.dcm")) == {"P1": SlideSource(Path("level0.dcm"))}


def test_other_exceptions_are_not_caught(slides, tmp_path):
    def broken(slide, done, total):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        compress_slides(slides, mean_rgb(), tmp_path / "grids", progress=broken)
    assert names(tmp_path / "grids") == []


def test_progress_goes_from_zero_to_all_cells_of_each_slide(slides, tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}
    compress_slides(
        slides,
        mean_rgb(),
        tmp_path / "grids",
        progress=lambda slide, *cells: seen.setdefault(slide, []).append(cells),
    )
    assert list(seen) == list(slides)
    for cells in seen.values():
        assert (cells[0], cells[-1]) == ((0, 64), (64, 64))


def test_a_full_disk_stops_the_batch_with_one_error(slides, mount):
    folder = mount("size=64k")
    (folder / "ballast").write_bytes(bytes(52_000))
    table = compress_slides(slides, mean_rgb(), folder / "grids")
    assert table["status"].to_list() == ["failed", "not tried", "not tried"]
    assert table["reason"][0] == f"{folder}/grids/a.zarr: No space left on device"
    assert table["remedy"][0] == "free some space and run again"
    assert names(folder / "grids") == []
    (folder / "ballast").unlink()
    again = compress_slides(slides, mean_rgb(), folder / "grids")
    assert again["status", "reason"].row(0) == ("compressed", None)


def test_a_slide_locked_by_another_process_is_compressed_last(slides, tmp_path):
    out, outcomes = tmp_path / "grids", []
    locked, release = threading.Event(), threading.Event()

    def hold():
        with exclusive_lock(out / "a.zarr"):
            locked.set()
            release.wait()

    def on_outcome(outcome):
        outcomes.append((outcome.slide, outcome.status))
        if outcome.slide == "c":
            release.set()

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    table = compress_slides(slides, mean_rgb(), out, on_outcome=on_outcome)
    thread.join()
    assert outcomes == [
        ("a", "waiting"),
        ("b", "compressed"),
        ("c", "compressed"),
        ("a", "compressed"),
    ]
    assert table["slide"].to_list() == ["a", "b", "c"]
    assert set(table["status"]) == {"compressed"}


def run(slides, encoder, out, start, report):
    start.wait()
    write_report(report, compress_slides(slides, encoder, out))


def test_processes_with_the_same_slides_share_the_work(slides, tmp_path):
    start = processes.Event()
    reports = [tmp_path / f"{number}.csv" for number in range(3)]
    children = [
        processes.Process(target=run, args=(slides, mean_rgb(), tmp_path / "grids", start, report))
        for report in reports
    ]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    tables = [pl.read_csv(report, schema_overrides=BATCH_SCHEMA) for report in reports]
    every = pl.concat(tables)
    assert every.filter(pl.col("status") == "compressed")["slide"].sort().to_list() == [
        "a",
        "b",
        "c",
    ]
    assert every.filter(pl.col("status") == "up to date").height == 6
    assert every["cells"].to_list() == [64] * 9
    assert names(tmp_path / "grids") == ["a.zarr", "b.zarr", "c.zarr"]


def test_a_killed_process_leaves_a_complete_store(slides, tmp_path):
    slide, out = {"a": slides["a"]}, tmp_path / "grids"
    encoders = {patch: mean_rgb(patch) for patch in (64, 32)}
    hashes = {}
    start = time.perf_counter()
    for patch, encoder in encoders.items():
        compress_slides(slide, encoder, out)
        hashes[patch] = grid_hash(out / "a.zarr")
    window = time.perf_counter() - start
    random.seed(0)
    killed = 0
    for _ in range(30):
        # alternate between two patch sizes, so that the store is never up to date
        current = open_grid(out / "a.zarr").provenance.patch
        arguments = (slide, encoders[96 - current], out, processes.Event(), tmp_path / "report.csv")
        child = processes.Process(target=run, args=arguments)
        child.start()
        arguments[3].set()
        child.join(random.uniform(0, window))
        child.kill()
        child.join()
        was_killed = child.exitcode == -signal.SIGKILL
        # adapt to the speed of the machine, so that kills happen during the work
        window *= 1.3 if was_killed else 0.5
        killed += was_killed
        grid = open_grid(out / "a.zarr")
        assert grid_hash(grid) == hashes[grid.provenance.patch]
    assert killed > 3
    compress_slides(slide, encoders[64], out)
    assert grid_hash(out / "a.zarr") == hashes[64]
    assert names(out) == ["a.zarr"]
