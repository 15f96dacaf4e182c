from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from nic_core.cohort import EncoderSpec
from nic_core.encoders import train_encoder
from nic_core.encoders.figures import embedding_map, neighbour_sheet
from nic_core.encoders.probes import (
    KNN,
    LINEAR,
    PROBE_SCHEMA,
    TaskEmbeddings,
    knn_probe,
    linear_probe,
    nearest_patches,
    principal_components,
    probe_table,
    task_embeddings,
)
from nic_core.pictures import BLUE, RED
from nic_core.reports import probe_results

from .conftest import make_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoders():
    task = make_dataset(side=62)
    sizes = {"patch": 62, "mpp": 0.5, "embedding_size": 16, "device": "cpu"}
    mean = train_encoder(EncoderSpec(name="mean", objective="mean_rgb"), [], **sizes).encoder
    spec = EncoderSpec(
        name="one", objective="supervised", tasks=("stripes",), patches_seen=960, batch=32,
        learning_rate=3e-3,
    )  # fmt: skip
    return mean, train_encoder(spec, [task], **sizes).encoder


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_score_a_trained_encoder_above_mean_rgb(encoders, probe):
    mean, trained = encoders
    unseen = make_dataset("unseen", side=62, seed=9)
    assert probe(task_embeddings(trained, unseen)).auc > 0.85
    assert probe(task_embeddings(mean, unseen)).auc < 0.75


def test_any_embedding_function_can_be_probed():
    class Stripes:
        def embed(self, pixels):
            return np.abs(np.diff(pixels.astype(float), axis=2)).mean((1, 2))

    assert linear_probe(task_embeddings(Stripes(), make_dataset(side=62))).auc > 0.85


def test_a_sample_is_seeded_and_has_every_class(encoders):
    mean, _ = encoders
    task = make_dataset("three", ("a", "b", "c"), (0, 1, 2), each=40, side=62)
    embeddings = task_embeddings(mean, task, patches=5, seed=3)
    assert len(embeddings.train_rows) == len(embeddings.test_rows) == 5
    assert set(embeddings.train_labels) == {0, 1, 2}
    assert set(embeddings.train_rows) <= set(task.rows("train"))
    assert set(embeddings.test_rows) <= set(task.rows("test"))
    again, other = (task_embeddings(mean, task, patches=5, seed=seed) for seed in (3, 4))
    assert np.array_equal(again.train_rows, embeddings.train_rows)
    assert not np.array_equal(other.train_rows, embeddings.train_rows)
    assert len(task_embeddings(mean, task, patches=1).train_rows) == 3
    whole = task_embeddings(mean, task)
    assert np.array_equal(whole.train_rows, task.rows("train"))
    assert np.allclose(whole.train.mean(0), 0, atol=1e-5)
    assert np.allclose(whole.train.std(0), 1, atol=1e-5)


def test_probe_table_marks_tasks_used_in_training(encoders):
    mean, trained = encoders
    tasks = [make_dataset(side=62), make_dataset("unseen", side=62, seed=9)]
    scores = probe_table(trained, [task_embeddings(trained, task) for task in tasks])
    assert scores.schema == PROBE_SCHEMA
    assert scores.select("task", "in_training", "probe").rows() == [
        ("stripes", True, LINEAR),
        ("stripes", True, KNN),
        ("unseen", False, LINEAR),
        ("unseen", False, KNN),
    ]
    imported = mean.card.model_copy(update={"objective": "imported"})
    elsewhere = probe_table(type(mean)(imported, mean.module), [task_embeddings(mean, tasks[0])])
    assert elsewhere["in_training"].to_list() == [None, None]
    results = probe_results("one", scores)
    assert results.filter(model=LINEAR, about="unseen", metric="AUC")["value"].item() == (
        scores.filter(probe=LINEAR, task="unseen")["auc"].item()
    )


def blobs() -> TaskEmbeddings:
    """Embeddings with classes far apart along one axis and noise along the others."""
    task = make_dataset(each=40, side=32)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(0, 0.1, (80, 6)).astype(np.float32)
    embeddings[:, 4] += 10 * task.labels
    train, test = task.rows("train"), task.rows("test")
    return TaskEmbeddings(task, embeddings[train], embeddings[test], train, test)


def test_neighbours_and_principal_axes_are_correct():
    embeddings = blobs()
    queries = np.arange(len(embeddings.test))
    nearest = nearest_patches(embeddings, queries, 5)
    distances = ((embeddings.test[:, None] - embeddings.train[None]) ** 2).sum(-1)
    assert np.array_equal(nearest, np.argsort(distances, 1)[:, :5])
    assert (embeddings.train_labels[nearest] == embeddings.test_labels[:, None]).all()
    points, shares = principal_components(embeddings)
    assert abs(np.corrcoef(points[:, 0], embeddings.test[:, 4])[0, 1]) > 0.999
    assert shares[0] > 0.9


def test_neighbour_frames_show_the_class():
    embeddings = blobs()
    wrong = TaskEmbeddings(
        embeddings.task,
        embeddings.train,
        embeddings.test[::-1].copy(),
        embeddings.train_rows,
        embeddings.test_rows,
    )
    drawn = embedding_map([embeddings, embeddings, embeddings])
    drawn.canvas.draw()
    assert sum(axes.axison for axes in drawn.axes) == 3
    for shown, colour in ((embeddings, BLUE), (wrong, RED)):
        sheet = neighbour_sheet([shown], queries=2, neighbours=4)
        sheet.canvas.draw()
        assert len(sheet.axes) == 2 * 5
        frames = [
            axes.spines["top"].get_edgecolor()[:3] for axes in sheet.axes if axes.get_frame_on()
        ]
        assert len(frames) == 2 * 4
        assert np.allclose(frames, to_rgb(colour))
        texts = [text.get_text() for text in sheet.legends[0].get_texts()]
        assert texts == ["same class", "other class"]
