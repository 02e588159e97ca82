"""The job graph of a run: what is in it, what waits for what, what it costs."""

from __future__ import annotations

import pytest

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.jobs import node_hours, plan_jobs

ARMS = {"grasp": {}, "random": {"basis": "random"}, "one_shot": {"basis": "one_shot"}}


@pytest.fixture
def graph(write_config) -> RunGraph:
    seeds = {"steps": 8, "batch_size": 6, "lora": {"rank": 4}, "seeds": [0, 1]}
    return RunGraph(load_config(write_config(training=seeds, project={"arms": ARMS})))


def _finish(graph: RunGraph, *stages: str) -> None:
    for task in graph.tasks(stages):
        task.unit.start()
        task.path.write_text(task.name)
        task.unit.finish(outputs=[task.output], metrics={}, world_size=1)


def test_a_new_run(graph):
    jobs = {job.key: job for job in plan_jobs(graph, Cluster(gpus_per_node=8))}
    assert list(jobs) == ["naive", "detect", "detect_one_shot", "project", "evaluate", "evaluate_others", "report"]
    assert {key: job.kind for key, job in jobs.items() if job.kind != "train"} == {
        "detect_one_shot": "light",
        "evaluate": "evaluate",
        "evaluate_others": "evaluate",
        "report": "light",
    }
    assert jobs["naive"].after == jobs["detect"].after == ()
    assert jobs["detect_one_shot"].after == ("naive",)
    assert jobs["project"].after == ("detect", "detect_one_shot")
    assert jobs["project"].tasks == tuple(f"project/{arm}/seed-{seed}" for arm in sorted(ARMS) for seed in (0, 1))
    assert (jobs["evaluate"].after, jobs["evaluate"].after_each) == (("detect",), "project")
    assert jobs["evaluate"].tasks == tuple(name.replace("project", "evaluate") for name in jobs["project"].tasks)
    assert jobs["evaluate_others"].after == ("naive", "detect")
    assert set(jobs["report"].after) == {"evaluate", "evaluate_others"}


def test_what_is_finished_is_not_in_it(graph):
    _finish(graph, "naive", "detect")
    jobs = {job.key: job for job in plan_jobs(graph, Cluster())}
    assert list(jobs) == ["project", "evaluate", "evaluate_others", "report"]
    assert jobs["project"].after == jobs["evaluate_others"].after == ()
    _finish(graph, "project", "evaluate", "report")
    assert plan_jobs(graph, Cluster()) == []


def test_evaluations_of_finished_fine_tunes_wait_for_nothing(graph):
    """An array of evaluations follows an array of fine-tunes one by one only if there are as many."""
    _finish(graph, "naive", "detect", "project")
    (first, *_) = graph.tasks(("project",))
    first.unit.fail("as a test wants it")
    jobs = {job.key: job for job in plan_jobs(graph, Cluster())}
    assert jobs["project"].tasks == (first.name,)
    assert jobs["evaluate"].after == ("project",)
    assert jobs["evaluate"].after_each is None


def test_an_array_larger_than_the_cluster_allows_is_refused(graph):
    with pytest.raises(InputError, match=r"project has 6 tasks, more than this cluster allows in an array \(5"):
        plan_jobs(graph, Cluster(max_array_size=5))


def test_node_hours_are_elements_times_nodes_times_limit(graph):
    cluster = Cluster(train={"nodes": 2, "time": "01:30:00"}, evaluate={"time": "00:30:00"}, light={"time": "15"})
    hours = node_hours(plan_jobs(graph, cluster), cluster)
    assert hours["project"] == 6 * 2 * 1.5
    assert hours["evaluate"] == 6 * 0.5
    assert hours["report"] == 0.25
