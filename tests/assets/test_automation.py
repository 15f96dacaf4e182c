"""Automation: ticks of both sensors on an ephemeral instance."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from nic_assets.assets.inputs import ENCODER_ENTRY, SLIDE_FILE
from nic_assets.automation import automate
from nic_assets.build import build_defs
from nic_assets.partitions import SLIDES
from nic_assets.tags import REFRESH_TAG
from nic_core.cohort import Automation, CohortError, load_cohort
from nic_core.store import Store
from tests.assets.worlds import ENCODERS, SLIDE_KEYS, World

NIGHTLY = Automation()
ALWAYS = Automation(opens="0 20 * * *", closes=None)
GRIDS = {f"{encoder}|{slide}" for encoder in ENCODERS for slide in SLIDE_KEYS}


class Operator:
    """Advance the time, evaluate the conditions and materialize what they request."""

    def __init__(self, world: World, hours: Automation = NIGHTLY) -> None:
        self.world, self.hours = world, hours
        self.now = datetime(2026, 1, 1, 12, tzinfo=UTC)
        self.cursor = None
        self.definitions: dict[str, dg.Definitions] = {}

    def tick(self, minutes: float = 1) -> dict[str, set[str]]:
        """Evaluate the conditions once; return the requested partitions by asset."""
        self.now += timedelta(minutes=minutes)
        result = dg.evaluate_automation_conditions(
            defs=self._definitions(),
            instance=self.world.instance,
            evaluation_time=self.now,
            cursor=self.cursor,
        )
        self.cursor = result.cursor
        graph = self._definitions().resolve_asset_graph()
        requested = {
            key.to_user_string(): set(result.get_requested_partitions(key))
            for key in graph.materializable_asset_keys
        }
        return {name: keys for name, keys in requested.items() if keys}

    def night(self) -> dict[str, set[str]]:
        """Materialize what is requested from the opening on; return all of it by asset."""
        self.tick()
        self.now = self.now.replace(hour=19, minute=59)
        done: dict[str, set[str]] = {}
        for _ in range(12):
            requested = self.tick()
            for name, keys in requested.items():
                done[name] = done.get(name, set()) | keys
                for key in sorted(keys):
                    self.world.make(name, key)
        assert not requested, "the requests come to an end"
        self.now = self.now.replace(hour=5, minute=59) + timedelta(days=1)
        self.tick(2)
        return done

    def _definitions(self) -> dg.Definitions:
        code = self.world.code
        if code not in self.definitions:
            encoders = dg.StaticPartitionsDefinition(list(ENCODERS))
            self.definitions[code] = dg.Definitions(
                [
                    dg.AssetSpec(SLIDE_FILE, partitions_def=SLIDES),
                    dg.AssetSpec(ENCODER_ENTRY, partitions_def=encoders),
                    *automate(self.world.assets(), self.hours),
                ]
            )
        return self.definitions[code]


def made(hours: Automation = NIGHTLY) -> tuple[World, Operator]:
    world = World()
    world.make_all()
    operator = Operator(world, hours)
    assert operator.night() == {}
    world.made.clear()
    return world, operator


@pytest.mark.slow
def test_the_first_night_materializes_everything_in_graph_order():
    world = World()
    done = Operator(world).night()
    assert done == {
        "mask": set(SLIDE_KEYS),
        "encoder": set(ENCODERS),
        "grid": GRIDS,
        "gathered": set(ENCODERS),
        "model": set(ENCODERS),
    }
    assert len(world.made) == len(set(world.made)), "nothing is materialized twice"


def test_nothing_is_materialized_from_an_input_that_was_not_scanned():
    world = World(scan=False)
    operator = Operator(world, ALWAYS)
    assert operator.tick() == {}
    world.scan()
    assert operator.tick() == {"mask": set(SLIDE_KEYS), "encoder": set(ENCODERS)}


@pytest.mark.slow
def test_outside_the_hours_only_summaries_are_materialized():
    world, operator = made()
    world.slides["s1"] = "b"
    world.scan()
    for _ in range(3):
        assert operator.tick(30) == {}
    world.make("mask", "s1")
    world.make("grid", "first|s1")
    assert operator.tick() == {"gathered": {"first"}}


@pytest.mark.slow
def test_a_new_slide_gets_a_grid_under_every_encoder():
    world, operator = made()
    world.slides["s4"] = "a"
    world.scan()
    done = operator.night()
    assert done["mask"] == {"s4"}
    assert done["grid"] == {"first|s4", "second|s4"}
    assert done["model"] == set(ENCODERS)
    assert "encoder" not in done


@pytest.mark.slow
def test_a_changed_slide_is_materialized_again():
    world, operator = made()
    world.slides["s2"] = "b"
    world.scan()
    done = operator.night()
    assert done["mask"] == {"s2"}
    assert done["grid"] == {"first|s2", "second|s2"}


@pytest.mark.slow
def test_identical_weights_of_an_encoder_make_nothing_stale():
    world, operator = made()
    world.make("encoder", "first")
    assert operator.night() == {}


@pytest.mark.slow
def test_new_weights_rebuild_the_grids_and_models_of_their_encoder():
    world, operator = made()
    world.encoders["second"] = "b"
    world.scan()
    assert operator.night() == {
        "encoder": {"second"},
        "grid": {key for key in GRIDS if key.startswith("second")},
        "gathered": {"second"},
        "model": {"second"},
    }


@pytest.mark.slow
def test_a_new_code_version_makes_its_asset_stale():
    world, operator = made()
    world.code = "2"
    done = operator.night()
    assert done["mask"] == set(SLIDE_KEYS)
    assert done["grid"] == GRIDS


@pytest.mark.slow
def test_the_first_night_rebuilds_what_is_stale():
    world = World()
    world.make_all()
    world.slides["s3"] = "b"
    world.scan()
    assert Operator(world).night()["mask"] == {"s3"}


@pytest.mark.slow
def test_a_failed_partition_is_retried_once_per_night():
    world, operator = made()
    world.slides["s1"] = "b"
    world.bad = {"s1"}
    world.scan()
    for _ in range(2):
        assert operator.night()["mask"] == {"s1"}
    world.bad = set()
    done = operator.night()
    assert done["mask"] == {"s1"}
    assert done["model"] == set(ENCODERS)
    assert operator.night() == {}


@pytest.mark.slow
def test_a_failing_slide_does_not_block_models():
    world = World()
    world.bad = {"s1"}
    done = Operator(world).night()
    assert done["grid"] == {key for key in GRIDS if not key.endswith("s1")}
    assert done["model"] == set(ENCODERS)


@pytest.mark.slow
def test_a_change_during_a_run_is_not_lost():
    world, operator = made(ALWAYS)
    world.slides["s1"] = "b"
    world.scan()
    assert operator.tick() == {"mask": {"s1"}}

    # the slide changes again while the run reads it, and the sensor records the change
    def change() -> None:
        world.slides["s1"] = "c"
        world.scan()

    world.meanwhile = change
    world.make("mask", "s1")
    world.meanwhile = lambda: None
    assert operator.tick() == {"mask": {"s1"}}
    world.make("mask", "s1")
    assert operator.tick() == {"grid": {"first|s1", "second|s1"}}


@pytest.mark.slow
def test_what_a_person_materialized_is_not_materialized_again():
    world, operator = made()
    world.encoders["second"] = "b"
    world.scan()
    for asset in ("encoder", "grid", "gathered", "model"):
        world.make(asset)
    assert operator.night() == {}


@pytest.mark.slow
def test_without_a_closing_time_changes_are_materialized_at_once():
    world, operator = made(ALWAYS)
    world.slides["s1"] = "b"
    world.scan()
    assert operator.tick() == {"mask": {"s1"}}
    assert operator.tick() == {}, "requested only once"


def test_a_registration_is_requested_at_any_hour_and_again_every_hour():
    """It waits for a server, so a failed one is requested without a night in between."""
    down = True

    @dg.asset(code_version="1")
    def product() -> None: ...

    @dg.asset(deps=[product], tags={REFRESH_TAG: "hourly"}, code_version="1")
    def registered() -> None:
        if down:
            raise ConnectionRefusedError

    instance = dg.DagsterInstance.ephemeral()
    assert dg.materialize([product], instance=instance).success
    defs = dg.Definitions(automate([product, registered], NIGHTLY))
    cursor = None

    def requested_at(hour: int, minute: int) -> bool:
        nonlocal cursor
        result = dg.evaluate_automation_conditions(
            defs=defs,
            instance=instance,
            evaluation_time=datetime(2026, 1, 1, hour, minute, tzinfo=UTC),
            cursor=cursor,
        )
        cursor = result.cursor
        if result.total_requested:
            made = [product, registered]
            dg.materialize(made, selection=[registered], instance=instance, raise_on_error=False)
        return bool(result.total_requested)

    assert requested_at(12, 10)
    assert not requested_at(12, 30)
    assert requested_at(13, 1)
    down = False
    assert not requested_at(13, 59)
    assert requested_at(14, 1)
    assert not requested_at(15, 1)


def test_an_invalid_cron_schedule_is_refused():
    with pytest.raises(
        CohortError, match=r"automation.opens: '0 25 .*' is not a cron schedule; write"
    ):
        automate([], Automation(opens="0 25 * * *"))


def test_automation_can_be_disabled():
    world = World()
    (mask, *_) = automate(world.assets(), None)
    assert list(mask.automation_conditions_by_key.values()) == []


# --- the sensor ------------------------------------------------------------------------------


class Watched:
    """A folder of text files instead of slides, under the real definitions."""

    def __init__(self, root: Path) -> None:
        self.wsi = root / "wsi"
        self.wsi.mkdir()
        (root / "cohort.yaml").write_text(
            "name: c\nslides: {folders: [{path: wsi}]}\n"
            "encoders: [{name: rgb, objective: mean_rgb}]\n"
        )
        self.store = Store(root / "store")
        self.defs = build_defs(load_cohort(root / "cohort.yaml"), self.store)
        self.instance = dg.DagsterInstance.ephemeral()
        self.cursor: str | None = None
        self.run_keys: set[str] = set()

    def put(self, name: str, content: str) -> None:
        (self.wsi / f"{name}.tif").write_text(content)

    def tick(self) -> str:
        """Evaluate the sensor; run each requested run key once, as the daemon does."""
        sensor = self.defs.resolve_sensor_def("watch_inputs")
        context = dg.build_sensor_context(
            self.instance,
            cursor=self.cursor,
            resources={"store": self.store},
            definitions=self.defs,
        )
        data = sensor.evaluate_tick(context)
        self.cursor = data.cursor
        if data.skip_message:
            return data.skip_message
        for request in data.run_requests:
            if request.run_key in self.run_keys:
                return "requested before"
            self.run_keys.add(request.run_key)
            result = self.defs.resolve_job_def("make_slide_index").execute_in_process(
                instance=self.instance, run_config=request.run_config, raise_on_error=False
            )
        return "materialized" if result.success else "failed"

    def slides(self) -> list[str]:
        return list(self.instance.get_dynamic_partitions("slides"))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    watched = Watched(tmp_path)
    watched.put("a", "slide a")
    watched.put("b", "slide b")
    return watched


def test_new_files_become_partitions_at_the_second_scan(watched):
    assert watched.tick() == "2 files scanned, 2 may still be being written"
    assert watched.slides() == []
    assert watched.tick() == "materialized"
    assert watched.slides() == ["a", "b"]
    assert watched.tick() == "2 files scanned, no change"


def test_a_file_that_is_still_being_copied_is_ignored(watched):
    watched.tick()
    watched.tick()
    watched.put("c", "half")
    assert watched.tick() == "3 files scanned, 1 may still be being written"
    watched.put("c", "half and half")
    assert watched.tick() == "3 files scanned, 1 may still be being written"
    assert watched.tick() == "materialized"
    assert watched.slides() == ["a", "b", "c"]


def test_a_repeated_tick_requests_no_second_run(watched):
    watched.tick()
    cursor = watched.cursor
    assert watched.tick() == "materialized"
    # the daemon was killed before it stored the cursor, so the same tick is evaluated again
    watched.store.file_snapshot.unlink()
    watched.cursor = cursor
    assert watched.tick() == "requested before"


def test_a_removed_file_is_reported_and_its_partition_deleted(watched):
    watched.tick()
    watched.tick()
    (watched.wsi / "b.tif").unlink()
    watched.tick()
    assert watched.tick() == "materialized"
    assert watched.slides() == ["a"]
    (check,) = watched.instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("slide_index"), "slide_files_present"), limit=1
    )
    assert not check.event.asset_check_evaluation.passed
    assert check.event.asset_check_evaluation.metadata["removed_since_last_scan"].value == ["b"]


def test_a_changed_file_changes_the_version_of_its_slide_only(watched):
    watched.tick()
    watched.tick()
    before = versions(watched)
    watched.put("a", "another slide")
    watched.tick()
    assert watched.tick() == "materialized"
    after = versions(watched)
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]


def test_a_missing_folder_is_reported_by_the_sensor(watched):
    watched.wsi.rename(watched.wsi.with_name("elsewhere"))
    assert str(watched.wsi) in watched.tick()


def versions(watched: Watched) -> dict[str, str]:
    tags = watched.instance.event_log_storage.get_latest_tags_by_partition(
        SLIDE_FILE, dg.DagsterEventType.ASSET_MATERIALIZATION, ["dagster/data_version"]
    )
    return {slide: found["dagster/data_version"] for slide, found in tags.items()}
