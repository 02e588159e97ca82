"""What a sweep's page says: the figures, the front, the recommendation and its reasons, and what is missing."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from grasp_dist.errors import InputError
from grasp_dist.launch.sweep.grid import trials_of
from grasp_dist.launch.sweep.page import build_page
from grasp_dist.launch.sweep.results import gather, objectives
from tests.launch.sweep_cases import made_up, write_scores

MEANS = {
    "base": (0.0, 0.01),
    "naive": (0.99, 0.81),
    "ablation": (0.5, 0.3),
    "write-k1": (0.99, 0.51),
    "write-k4": (0.985, 0.06),
    "write-k8": (0.98, 0.05),
    "random-write-k8": (0.99, 0.80),
}
APART = (-0.02, 0.0, 0.02)


def typical(model: str, seed: int) -> tuple[float, float]:
    task, drift = MEANS[model]
    return task, drift if model == "base" else drift + APART[seed]


@pytest.fixture
def sweep(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    write_scores(config, typical)
    return config


def test_figures_front_and_choice(sweep):
    found = gather(sweep)
    rows = {row["name"]: row for row in found["combinations"]}
    assert list(rows) == ["write-k1", "write-k4", "write-k8", "random-write-k8"]
    assert rows["write-k4"]["drift"]["mean"] == pytest.approx(0.06)
    assert rows["write-k4"]["drift"]["sd"] == pytest.approx(0.02)
    assert rows["write-k4"]["remaining"] == pytest.approx(0.05 / 0.80)
    assert rows["write-k4"]["distance"] == pytest.approx(0.05)
    assert [rows[name]["on_front"] for name in rows] == [True, True, True, False]
    assert found["choice"]["name"] == "write-k4", "rank 8 is better by less than the seeds' scatter"
    assert found["missing"] == []
    assert found["num_trials"] == 12


def test_objectives_of_one_arm(sweep):
    trials = [trial for trial in trials_of(sweep) if trial.arm == "write-k8"]
    assert objectives(sweep, trials) == pytest.approx({"task": 0.98, "drift": 0.04})
    assert objectives(sweep, trials[:1]) == pytest.approx({"task": 0.98, "drift": 0.02})


def test_a_loss_as_task_is_better_when_lower(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    losses = {"base": 4.0, "naive": 1.0, "write-k1": 1.0, "write-k4": 1.1, "write-k8": 3.0}
    write_scores(config, lambda model, seed: (losses.get(model, 1.0), typical(model, seed)[1]), kind="loss")
    found = gather(config)
    assert found["tolerance"] == pytest.approx(0.15), "5 % of what naive gained"
    assert found["choice"]["name"] == "write-k4", "rank 8 lost the task"
    (trial, *_) = [trial for trial in trials_of(config) if trial.arm == "write-k4"]
    assert objectives(config, [trial])["task"] == -1.1


class Page(HTMLParser):
    """Text of a page, its tags balanced, nothing loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert not any(name in ("src", "href") and not str(value).startswith("#") for name, value in attributes)
        if tag not in ("meta", "link", "br", "path", "use", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_recommends_with_reasons(sweep, tmp_path):
    build_page(sweep, tmp_path / "page", commands=["grasp-dist sweep 'a b.yaml'"])
    page = Page((tmp_path / "page" / "sweep.html").read_text())
    words = " ".join(page.text.split())
    assert "Recommended: write, rank 4" in words
    assert (
        "drift from 0.810 to 0.060 (base 0.010), task 0.985 against naive\N{RIGHT SINGLE QUOTATION MARK}s 0.990"
        in words
    )
    assert (
        "Write side, rank 8 has less drift still (0.050), but by 0.010 only, which is within one standard error"
        in words
    )
    assert "A random basis (write, rank 8) leaves 99% of the drift" in words
    assert "grasp-dist sweep 'a b.yaml'" in words
    assert page.text.count("Drift against task, by side and rank") == 1
    assert "Drift and task by rank" in words
    shown = json.loads((tmp_path / "page" / "sweep.json").read_text())
    assert shown["verdict"]["level"] == "good"


def test_the_table_for_other_tools(sweep, tmp_path):
    build_page(sweep, tmp_path / "page", commands=[])
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "page" / "sweep.csv").open())}
    assert list(rows) == ["write-k1", "write-k4", "write-k8", "random-write-k8", "base", "naive"]
    assert float(rows["write-k4"]["drift_mean"]) == pytest.approx(0.06)
    assert [row["recommended"] for row in rows.values()] == ["False", "True", "False", "", "", ""]
    assert rows["random-write-k8"]["control"] == "True"
    assert rows["base"]["task_sd"] == ""


def test_what_is_not_finished_is_named_and_left_out(sweep, tmp_path):
    run = tmp_path / "run" / "evaluate"
    shutil.rmtree(run / "write-k8")
    (run / "write-k4" / "seed-2" / "manifest.json").write_text(json.dumps({"status": "running"}))
    found = build_page(sweep, tmp_path / "page", commands=[])
    assert found["missing"] == ["evaluate/write-k4/seed-2", *(f"evaluate/write-k8/seed-{seed}" for seed in range(3))]
    row = next(row for row in found["combinations"] if row["name"] == "write-k4")
    assert [one["seed"] for one in row["seeds"]] == [0, 1]
    assert any(note.startswith("Not finished, and left out: ") for note in found["verdict"]["notes"])


def test_values_that_are_not_finite_are_no_result(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    write_scores(config, lambda model, seed: (None, None) if model == "write-k8" else typical(model, seed))
    found = build_page(config, tmp_path / "page", commands=[])
    row = next(row for row in found["combinations"] if row["name"] == "write-k8")
    assert row["drift"] is None
    assert not row["on_front"]
    assert found["choice"]["name"] == "write-k4"
    trials = [trial for trial in trials_of(config) if trial.arm == "write-k8"]
    assert str(objectives(config, trials)) == "{'task': nan, 'drift': nan}"


def test_one_seed_that_diverged_costs_its_combination_the_recommendation(organism, tmp_path):
    def scores(model: str, seed: int) -> tuple[float | None, float | None]:
        return (None, None) if (model, seed) == ("write-k4", 2) else typical(model, seed)

    config = made_up(organism, tmp_path / "run")
    write_scores(config, scores)
    found = build_page(config, tmp_path / "page", commands=[])
    rows = {row["name"]: row for row in found["combinations"]}
    assert (rows["write-k4"]["diverged"], rows["write-k4"]["on_front"]) == ([2], False)
    assert found["choice"]["name"] == "write-k8"
    assert any("Diverged" in note and "write-k4 (seed 2)" in note for note in found["verdict"]["notes"])
    assert (tmp_path / "page" / "sweep.html").read_text().count(">diverged<") == 1
    trials = [trial for trial in trials_of(config) if trial.arm == "write-k4"]
    assert str(objectives(config, trials)) == "{'task': nan, 'drift': nan}", "a search sees the same"


@pytest.mark.parametrize(("model", "whose"), [("naive", "naive fine-tune"), ("base", "base model")])
def test_without_figures_of_what_it_is_compared_with_there_is_still_a_page(organism, tmp_path, model, whose):
    config = made_up(organism, tmp_path / "run")
    write_scores(config, lambda name, seed: (None, None) if name == model else typical(name, seed))
    verdict = build_page(config, tmp_path / "page", commands=[])["verdict"]
    assert (verdict["level"], whose in verdict["headline"]) == ("void", True)


def test_a_smaller_rank_that_loses_the_task_is_no_reason(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    means = MEANS | {"write-k1": (0.4, 0.02), "write-k4": (0.985, 0.5)}
    write_scores(config, lambda name, seed: (means[name][0], means[name][1] + (name != "base") * APART[seed]))
    found = build_page(config, tmp_path / "page", commands=[])
    assert found["choice"]["name"] == "write-k8"
    (note,) = [note for note in found["verdict"]["notes"] if "comes nearest" in note]
    assert "rank 4 comes nearest" in note
    assert ": 0.450 more" in note


def test_scores_of_other_inputs_are_no_scores(sweep, tmp_path):
    sweep.training.steps += 1
    with pytest.raises(InputError, match="no evaluation in"):
        build_page(sweep, tmp_path / "page", commands=[])
    sweep.training.steps -= 1
    sweep.project.arms["write-k1"].rank = 2  # as if it were another combination of the same name
    found = build_page(sweep, tmp_path / "page", commands=[])
    assert found["missing"] == [f"evaluate/write-k1/seed-{seed}" for seed in (0, 1, 2)]
    assert "write-k1" not in {row["name"] for row in found["combinations"]}


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"naive": (0.99, 0.012)}, "void", "hardly moved drift"),
        (
            {"write-k4": (0.4, 0.06), "write-k8": (0.3, 0.05), "write-k1": (0.5, 0.51)},
            "bad",
            "No combination keeps the task",
        ),
        ({"write-k4": (0.985, 0.7), "write-k8": (0.98, 0.75)}, "mixed", "62% of the naive drift is left"),
        ({"write-k1": (0.99, 0.8), "write-k4": (0.985, 0.7), "write-k8": (0.98, 0.75)}, "bad", "86% of the"),
        ({"random-write-k8": (0.99, 0.2)}, "mixed", "changes the drift as well"),
    ],
)
def test_it_says_when_there_is_nothing_good_to_recommend(organism, tmp_path, change, level, words):
    config = made_up(organism, tmp_path / "run")
    means = MEANS | change

    def scores(model: str, seed: int) -> tuple[float, float]:
        task, drift = means[model]
        return task, drift if model == "base" else drift + APART[seed]

    write_scores(config, scores)
    verdict = build_page(config, tmp_path / "page", commands=[])["verdict"]
    assert verdict["level"] == level
    assert words in " ".join([verdict["headline"], *verdict["notes"]])


def test_one_seed_is_called_one_seed(organism, tmp_path):
    config = made_up(organism, tmp_path / "run", seed=[0])
    write_scores(config, typical)
    verdict = build_page(config, tmp_path / "page", commands=[])["verdict"]
    assert verdict["label"].endswith("(one seed)")
    assert any("Run at least two" in note for note in verdict["notes"])


def test_names_from_the_configuration_are_escaped(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    write_scores(config, typical)
    title = config.model_copy(
        update={"report": config.report.model_copy(update={"title": "<script>alert(1)</script>"})}
    )
    build_page(title, tmp_path / "page", commands=["x </pre><script>"])
    assert not re.search(r"<script", (tmp_path / "page" / "sweep.html").read_text())


def test_nothing_finished_yet(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    with pytest.raises(InputError, match="nothing to show yet"):
        gather(config)
