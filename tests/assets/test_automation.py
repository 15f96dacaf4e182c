"""What is done without being asked: ticks of both sensors on an ephemeral instance."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from nic_assets.assets.inputs import ENCODER_ENTRY, SLIDE_FILE
from nic_assets.automation import automate
from nic_assets.build import build_defs
from nic_assets.partitions import SLIDES
from nic_core.cohort import Automation, CohortError, load_cohort
from nic_core.store import Store
from tests.assets.worlds import ENCODERS, SLIDE_KEYS, World

NIGHTLY = Automation()
ALWAYS = Automation(opens="0 20 * * *", closes=None)
GRIDS = {f"{encoder}|{slide}" for encoder in ENCODERS for slide in SLIDE_KEYS}


class Operator:
    """Lets time pass, evaluates the conditions and runs what they ask for."""

    def __init__(self, world: World, hours: Automation = NIGHTLY) -> None:
        self.world, self.hours = world, hours
        self.now = datetime(2026, 1, 1, 12, tzinfo=UTC)
        self.cursor = None
        self.definitions: dict[str, dg.Definitions] = {}

    def tick(self, minutes: float = 1) -> dict[str, set[str]]:
        """One evaluation; what it asks for, by asset."""
        self.now += timedelta(minutes=minutes)
        result = dg.evaluate_automation_conditions(
            defs=self._definitions(),
            instance=self.world.instance,
            evaluation_time=self.now,
            cursor=self.cursor,
        )
        self.cursor = result.cursor
        graph = self._definitions().resolve_asset_graph()
        asked = {
            key.to_user_string(): set(result.get_requested_partitions(key))
            for key in graph.materializable_asset_keys
        }
        return {name: keys for name, keys in asked.items() if keys}

    def night(self) -> dict[str, set[str]]:
        """From before the opening on, run what is asked for until nothing is; all of it."""
        self.tick()
        self.now = self.now.replace(hour=19, minute=59)
        done: dict[str, set[str]] = {}
        for _ in range(12):
            asked = self.tick()
            for name, keys in asked.items():
                done[name] = done.get(name, set()) | keys
                for key in sorted(keys):
                    self.world.make(name, key)
        assert not asked, "it comes to an end"
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


def test_what_is_missing_when_it_is_first_switched_on_is_built_in_the_order_of_the_graph():
    world = World()
    done = Operator(world).night()
    assert done == {
        "mask": set(SLIDE_KEYS),
        "encoder": set(ENCODERS),
        "grid": GRIDS,
        "gathered": set(ENCODERS),
        "model": set(ENCODERS),
    }
    assert len(world.made) == len(set(world.made)), "nothing is made twice"


def test_nothing_is_made_of_an_input_that_nobody_has_looked_at_yet():
    world = World(look=False)
    operator = Operator(world, ALWAYS)
    assert operator.tick() == {}
    world.look()
    assert operator.tick() == {"mask": set(SLIDE_KEYS), "encoder": set(ENCODERS)}


def test_nothing_is_built_outside_the_hours_but_a_layer_is_summed_up():
    world, operator = made()
    world.slides["s1"] = "b"
    world.look()
    for _ in range(3):
        assert operator.tick(30) == {}
    world.make("mask", "s1")
    world.make("grid", "first|s1")
    assert operator.tick() == {"gathered": {"first"}}


def test_a_new_slide_is_made_under_every_encoder_and_no_other():
    world, operator = made()
    world.slides["s4"] = "a"
    world.look()
    done = operator.night()
    assert done["mask"] == {"s4"}
    assert done["grid"] == {"first|s4", "second|s4"}
    assert done["model"] == set(ENCODERS)
    assert "encoder" not in done


def test_a_changed_slide_is_made_again():
    world, operator = made()
    world.slides["s2"] = "b"
    world.look()
    done = operator.night()
    assert done["mask"] == {"s2"}
    assert done["grid"] == {"first|s2", "second|s2"}


def test_an_encoder_run_again_with_identical_weights_rebuilds_nothing():
    world, operator = made()
    world.make("encoder", "first")
    assert operator.night() == {}


def test_new_weights_rebuild_exactly_their_grids_and_the_models_on_them():
    world, operator = made()
    world.encoders["second"] = "b"
    world.look()
    assert operator.night() == {
        "encoder": {"second"},
        "grid": {key for key in GRIDS if key.startswith("second")},
        "gathered": {"second"},
        "model": {"second"},
    }


def test_a_new_code_version_rebuilds_what_it_makes():
    world, operator = made()
    world.code = "2"
    done = operator.night()
    assert done["mask"] == set(SLIDE_KEYS)
    assert done["grid"] == GRIDS


def test_what_is_stale_already_when_it_is_first_switched_on_is_rebuilt():
    world = World()
    world.make_all()
    world.slides["s3"] = "b"
    world.look()
    assert Operator(world).night()["mask"] == {"s3"}


def test_a_failed_run_is_tried_once_a_night_and_not_forgotten():
    world, operator = made()
    world.slides["s1"] = "b"
    world.bad = {"s1"}
    world.look()
    for _ in range(2):
        assert operator.night()["mask"] == {"s1"}
    world.bad = set()
    done = operator.night()
    assert done["mask"] == {"s1"}
    assert done["model"] == set(ENCODERS)
    assert operator.night() == {}


def test_a_slide_that_fails_keeps_no_model_from_the_others():
    world = World()
    world.bad = {"s1"}
    done = Operator(world).night()
    assert done["grid"] == {key for key in GRIDS if not key.endswith("s1")}
    assert done["model"] == set(ENCODERS)


def test_a_change_that_arrives_while_a_run_is_in_flight_is_not_lost():
    world, operator = made(ALWAYS)
    world.slides["s1"] = "b"
    world.look()
    asked = operator.tick()
    assert asked == {"mask": {"s1"}}

    # the run reads the slide; meanwhile it changes again, and the sensor says so
    def change() -> None:
        world.slides["s1"] = "c"
        world.look()

    world.meanwhile = change
    world.make("mask", "s1")
    world.meanwhile = lambda: None
    assert operator.tick() == {"mask": {"s1"}}
    world.make("mask", "s1")
    assert operator.tick() == {"grid": {"first|s1", "second|s1"}}


def test_what_a_person_has_rebuilt_is_not_built_again():
    world, operator = made()
    world.encoders["second"] = "b"
    world.look()
    for asset in ("encoder", "grid", "gathered", "model"):
        world.make(asset)
    assert operator.night() == {}


def test_without_a_closing_time_a_change_is_taken_up_at_once():
    world, operator = made(ALWAYS)
    world.slides["s1"] = "b"
    world.look()
    assert operator.tick() == {"mask": {"s1"}}
    assert operator.tick() == {}, "asked for once"


def test_a_schedule_that_says_no_time_is_refused():
    with pytest.raises(CohortError, match="automation.opens: '0 25 .*' is no cron schedule"):
        automate([], Automation(opens="0 25 * * *"))


def test_a_cohort_may_do_without():
    world = World()
    (mask, *_) = automate(world.assets(), None)
    assert list(mask.automation_conditions_by_key.values()) == []


# --- the sensor ------------------------------------------------------------------------------


class Watched:
    """A folder of files that stand for slides, under the real definitions."""

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
        self.asked: set[str] = set()

    def put(self, name: str, content: str) -> None:
        (self.wsi / f"{name}.tif").write_text(content)

    def tick(self) -> str:
        """What the sensor says; a request is run, once for each key as the daemon does."""
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
            if request.run_key in self.asked:
                return "known"
            self.asked.add(request.run_key)
            result = self.defs.resolve_job_def("scan_slides").execute_in_process(
                instance=self.instance, run_config=request.run_config, raise_on_error=False
            )
        return "asked" if result.success else "failed"

    def slides(self) -> list[str]:
        return list(self.instance.get_dynamic_partitions("slides"))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    watched = Watched(tmp_path)
    watched.put("a", "slide a")
    watched.put("b", "slide b")
    return watched


def test_files_dropped_into_a_folder_become_partitions_at_the_second_look(watched):
    assert "still being written" in watched.tick()
    assert watched.slides() == []
    assert watched.tick() == "asked"
    assert watched.slides() == ["a", "b"]
    assert watched.tick() == "nothing new among 2 files"


def test_a_file_that_is_still_being_copied_is_left(watched):
    watched.tick()
    watched.tick()
    watched.put("c", "half")
    assert watched.tick() == "nothing new among 3 files, 1 still being written"
    watched.put("c", "half and half")
    assert watched.tick() == "nothing new among 3 files, 1 still being written"
    assert watched.tick() == "asked"
    assert watched.slides() == ["a", "b", "c"]


def test_a_tick_that_is_repeated_asks_for_nothing_new(watched):
    watched.tick()
    cursor = watched.cursor
    assert watched.tick() == "asked"
    # the daemon died before it wrote the cursor: the same files, the same tick again
    (watched.store.slides / "seen.parquet").unlink()
    watched.cursor = cursor
    assert watched.tick() == "known"


def test_a_vanished_file_is_reported_and_its_partition_goes(watched):
    watched.tick()
    watched.tick()
    (watched.wsi / "b.tif").unlink()
    watched.tick()
    assert watched.tick() == "asked"
    assert watched.slides() == ["a"]
    (check,) = watched.instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("slide_index"), "slide_files_there"), limit=1
    )
    assert not check.event.asset_check_evaluation.passed
    assert check.event.asset_check_evaluation.metadata["gone_since_the_last_look"].value == ["b"]


def test_a_changed_file_makes_its_slide_stale_and_no_other(watched):
    watched.tick()
    watched.tick()
    before = versions(watched)
    watched.put("a", "another slide")
    watched.tick()
    assert watched.tick() == "asked"
    after = versions(watched)
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]


def test_a_folder_that_is_not_there_is_said_and_nothing_asked_for(watched):
    watched.wsi.rename(watched.wsi.with_name("elsewhere"))
    assert watched.tick().endswith("wsi is not a folder")


def versions(watched: Watched) -> dict[str, str]:
    tags = watched.instance.event_log_storage.get_latest_tags_by_partition(
        SLIDE_FILE, dg.DagsterEventType.ASSET_MATERIALIZATION, ["dagster/data_version"]
    )
    return {slide: found["dagster/data_version"] for slide, found in tags.items()}
