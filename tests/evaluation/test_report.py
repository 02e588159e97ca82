"""The report on made-up runs: figures, verdicts, missing pieces, hostile text, and a page that loads nothing."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.evaluation.report import build_report
from grasp_dist.evaluation.runs import read_runs
from grasp_dist.evaluation.summary import summarise_runs
from grasp_dist.evaluation.verdict import judge, number
from tests.evaluation.report_cases import VALUES, make_run

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "link", "br", "hr", "img", "input"}


class _Page(HTMLParser):
    """Checks nesting while it reads; collects ids, links and visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.loads, self.words, self.tags = [], [], [], [], []
        self.refers = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loads.append(value)
            if name in ("aria-labelledby", "aria-describedby"):
                self.refers |= set(value.split())
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / f"world-{i}", config=f"model: {{path: w{i}}}\nsame: line\n") for i in (1, 2, 3)]
    report = build_report(runs, root / "report", title="A title")
    return report, (root / "report" / "report.html").read_text(encoding="utf-8"), root


def _values(**changed):
    return {model: changed.get(model, values) for model, values in VALUES.items()}


def _verdict(root, values=VALUES, **settings):
    runs = [make_run(root / f"w{i}", values=values, noise=0, extras=False, **settings) for i in (1, 2)]
    return judge(summarise_runs(read_runs(runs)))


def test_the_figures_are_those_of_the_score_files(full):
    report, _, root = full
    assert report == json.loads((root / "report" / "report.json").read_text())
    rows = [
        row
        for i in (1, 2, 3)
        for row in json.loads((root / f"world-{i}" / "evaluate" / "scores.json").read_text())["models"]
        if row["model"] == "grasp"
    ]
    values = [row["probes"]["drift"]["value"] for row in rows]
    grasp = next(model for model in report["models"] if model["model"] == "grasp")
    assert grasp["n"] == 6
    assert grasp["probes"]["drift"]["mean"] == pytest.approx(sum(values) / 6)
    assert grasp["probes"]["drift"]["worst"] == max(values)
    assert len(grasp["drift_cuts"]["drift"]["rows"]) == 6
    assert grasp["drift_cuts"]["drift"]["summary"]["cut"] == pytest.approx(16, rel=0.1)
    assert report["verdict"]["level"] == "good"
    assert [model["model"] for model in report["models"]][:2] == ["base", "naive"]
    assert report["models"][-1]["model"] == "ablation"


def test_the_page_is_whole_self_contained_and_named(full):
    _, text, _ = full
    page = _Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert all(link.startswith("#") for link in page.loads)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert page.refers <= set(page.ids)
    assert {link[1:] for link in page.loads} <= set(page.ids)
    assert page.tags.count("svg") == 4
    assert page.tags.count("h1") == 1
    assert {"main", "header", "footer", "figcaption", "table"} <= set(page.tags)


def test_every_model_stands_beside_the_headlines(full):
    report, text, _ = full
    rows = {row["model"]: row for row in report["beside"]["rows"]}
    assert report["beside"]["to"] == "grasp"
    assert set(rows) == set(VALUES) - {"base"}
    values = {(r["model"], r["run"], r["seed"]): r["probes"]["drift"]["value"] for r in report["rows"]}
    pairs = [(world, seed) for world in ("world-1", "world-2", "world-3") for seed in (0, 1)]
    mean = sum(values["naive", w, s] - values["grasp", w, s] for w, s in pairs) / 6
    assert rows["naive"]["drift"]["mean"] == pytest.approx(mean)
    assert rows["naive"]["drift"]["n"] == 6
    assert rows["naive"]["drift"]["p"] == pytest.approx(2 / 64)
    assert rows["naive"]["drift"]["p_holm"] >= rows["naive"]["drift"]["p"]
    assert rows["grasp"]["drift"] is None
    points = {m["model"]: (m["probes"]["task"]["mean"], m["probes"]["drift"]["mean"]) for m in report["models"]}
    del points["base"]
    for name, (task, drift) in points.items():
        beaten = any(t >= task and d <= drift and (t, d) != (task, drift) for t, d in points.values())
        assert rows[name]["front"] is not beaten
    assert "Beside GRASP" in _Page(text).text


def test_the_tables_have_every_figure_and_run_nothing(full, tmp_path):
    report, _, root = full
    with (root / "report" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["rows"]) * len(report["probes"])
    row = next(r for r in rows if (r["model"], r["run"], r["seed"], r["probe"]) == ("grasp", "world-2", "1", "drift"))
    expected = next(r for r in report["rows"] if (r["model"], r["run"], r["seed"]) == ("grasp", "world-2", 1))
    assert float(row["value"]) == expected["probes"]["drift"]["value"]
    lines = (root / "report" / "report.md").read_text().splitlines()
    assert len(lines) == 2 + len(report["models"])
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| GRASP | 6 |") for line in lines)
    hostile = {**VALUES, "=cmd|x": VALUES["naive"]}
    run = make_run(tmp_path / "run", models=tuple(hostile), values=hostile, extras=False)
    build_report([run], tmp_path / "report")
    assert "\n'=cmd|x,run" in (tmp_path / "report" / "report.csv").read_text()
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_the_page_says_what_it_must(full):
    _, text, root = full
    page = _Page(text)
    for words in (
        "A title",
        "GRASP cut the drift",
        "random basis",
        "ablation",
        "one-shot",
        "torch 2.13.0",
        "Processes: 2",
    ):
        assert words in page.text
    for number_ in (1, 2, 3):
        assert f"grasp-dist run {root}/world-{number_}/config.yaml" in page.text
    assert re.search(r"should stay: good 0\.9\d\d \(base 0\.996, naive 0\.3\d\d\); in_context", page.text)
    # The first configuration whole, the others by their differences.
    assert page.text.count("same: line") == 1
    assert "+model: {path: w2}" in page.text
    # Colours are the page's: a stand-in that is left over would be nearly black in the dark.
    assert not re.search(r"#0a0[bcd]", text)


def test_hostile_text_is_shown_as_text(tmp_path):
    run = make_run(tmp_path / "run $x$ <b>", config=f"title: {HOSTILE}\n", seeds=(0, 1))
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    for probe in scores["probes"]:
        if probe["name"] == "near":
            probe["name"] = HOSTILE
    for row in scores["models"]:
        row["probes"][HOSTILE] = row["probes"].pop("near")
        if row["model"] == "one_shot":
            row["model"] = HOSTILE
            row["basis"] = HOSTILE
    (run / "evaluate" / "scores.json").write_text(json.dumps(scores))
    build_report([run], tmp_path / "out", title=HOSTILE, drift=HOSTILE)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.text.count(HOSTILE) >= 5
    assert "run $x$ <b>" in page.text


def test_scores_alone_make_a_report_that_names_what_is_missing(tmp_path):
    run = make_run(
        tmp_path / "r", models=("base", "naive", "grasp"), seeds=(0,), shift=False, extras=False, config=None
    )
    report = build_report([run], tmp_path / "out")
    text = _Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    for words in ("No spectra", "No training curves", "No shift of activations", "No ablation", "no config.yaml"):
        assert words in text
    assert "One fine-tune seed proves nothing" in text
    assert "no random basis beside it" in text
    assert report["verdict"]["level"] == "mixed"


def test_base_alone_and_no_drift_probe_make_a_report(tmp_path):
    run = make_run(tmp_path / "base", models=("base",), extras=False)
    assert build_report([run], tmp_path / "out")["verdict"]["level"] == "void"
    run = make_run(tmp_path / "other", models=("base", "naive", "grasp"))
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    scores["probes"] = [probe for probe in scores["probes"] if probe["role"] != "drift"]
    (run / "evaluate" / "scores.json").write_text(json.dumps(scores))
    report = build_report([run], tmp_path / "out2")
    assert report["drift"] is None
    assert "a drift probe" in report["verdict"]["headline"]
    _Page((tmp_path / "out2" / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({}, "good", "cut the drift 16.1-fold"),
        ({"grasp": (0.987, 0.5, 0.1, 0.9, 0.9, 0.1)}, "bad", "did not remove the drift: 91% of it is left"),
        ({"grasp": (0.987, 0.7, 0.1, 0.9, 0.9, 0.1)}, "bad", "made the drift worse"),
        ({"grasp": (0.987, 0.3, 0.1, 0.9, 0.9, 0.1)}, "mixed", "cut the drift 1.8-fold"),
        ({"grasp": (0.9, 0.03, 0.1, 0.9, 0.9, 0.1)}, "mixed", "It lost part of the task"),
        ({"grasp": (0.3, 0.03, 0.1, 0.9, 0.9, 0.1)}, "bad", "It lost part of the task"),
        ({"grasp": (0.987, 0.001, 0.1, 0.9, 0.9, 0.1)}, "good", "removed the drift altogether"),
        (
            {"random": (0.99, 0.2, 0.1, 0.9, 0.9, 0.1)},
            "mixed",
            "random basis of the same rank changed the drift as well",
        ),
        ({"naive": (0.99, 0.004, 0.1, 0.9, 0.9, 0.1)}, "void", "say nothing about removing it"),
    ],
)
def test_the_verdict_is_honest(tmp_path, changed, level, words):
    verdict = _verdict(tmp_path, _values(**changed))
    assert verdict.level == level
    assert words in " ".join([verdict.headline, *verdict.notes])


def test_one_bad_run_is_not_hidden_by_the_mean(tmp_path):
    failed = _values(grasp=(0.987, 0.4, 0.1, 0.9, 0.9, 0.1))
    runs = [make_run(tmp_path / f"w{i}", noise=0, extras=False, values=failed if i == 0 else VALUES) for i in range(6)]
    verdict = judge(summarise_runs(read_runs(runs)))
    assert verdict.level == "mixed"
    assert "In the worst of 12 fine-tunes (seed 0 of w0) the drift was cut 1.4-fold" in " ".join(verdict.notes)


def test_a_fine_tune_that_diverged_is_named_and_left_out(tmp_path):
    runs = [make_run(tmp_path / f"w{i}", noise=0, extras=False) for i in range(2)]
    path = runs[0] / "evaluate" / "scores.json"
    scores = json.loads(path.read_text())
    (row,) = (row for row in scores["models"] if (row["model"], row["seed"]) == ("grasp", 1))
    row["probes"]["drift"]["value"] = float("nan")
    path.write_text(json.dumps(scores))
    report = build_report(runs, tmp_path / "out")
    assert report["verdict"]["level"] == "bad"
    assert "GRASP diverged with seed 1 of w0" in report["verdict"]["notes"][0]
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text()
    _Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "run", extras=False) for parent in ("a", "b")]
    assert [record.name for record in read_runs(runs)] == ["a/run", "b/run"]
    assert summarise_runs(read_runs(runs))["models"][1]["n"] == 4


def test_axes_can_be_chosen_and_must_exist(tmp_path):
    run = make_run(tmp_path / "r", extras=False)
    assert build_report([run], tmp_path / "out", drift="near")["drift"] == "near"
    with pytest.raises(InputError, match=r"report\.drift.*'nope'.*task, drift"):
        build_report([run], tmp_path / "out", drift="nope")


def test_folders_without_scores_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"scores\.json.*grasp-dist evaluate"):
        build_report([tmp_path], tmp_path / "out")
    run = make_run(tmp_path / "r", extras=False)
    (run / "evaluate" / "scores.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="format 1"):
        build_report([run], tmp_path / "out")
    (run / "evaluate" / "scores.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        build_report([run], tmp_path / "out")
    with pytest.raises(InputError, match="at least one"):
        build_report([], tmp_path / "out")


def test_a_name_with_two_meanings_is_refused(tmp_path):
    runs = [make_run(tmp_path / name, extras=False) for name in "ab"]
    path = runs[1] / "evaluate" / "scores.json"
    path.write_text(path.read_text().replace('"role": "retention", "kind": "kl"', '"role": "drift", "kind": "kl"'))
    with pytest.raises(InputError, match="'neutral'"):
        build_report(runs, tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (0, "0"),
        (0.98765, "0.988"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (2.3e-7, "2e-7"),
        (123.456, "123.5"),
        (3.0, "3.000"),
    ],
)
def test_numbers_have_sensible_digits(value, text):
    assert number(value) == text


def test_what_can_be_said_without_labels(tmp_path):
    worked = " ".join(_verdict(tmp_path / "worked").notes)
    assert "GRASP moved 10% as far from the base as naive" in worked
    assert "as removals do that worked" in worked
    failed = " ".join(_verdict(tmp_path / "failed", _values(grasp=(0.99, 0.4, 0.5, 0.5, 0.9, 0.6))).notes)
    assert "so do removals that failed" in failed
    again = make_run(tmp_path / "again")
    path = again / "evaluate" / "scores.json"
    scores = json.loads(path.read_text())
    for row in scores["models"]:
        row["extensions"] = int(row["model"] == "grasp" and row["seed"] == 0)
    path.write_text(json.dumps(scores))
    report = build_report([again], tmp_path / "page")
    notes = " ".join(report["verdict"]["notes"])
    assert f"1 of {sum(row['model'] == 'grasp' for row in scores['models'])} fine-tunes were made again" in notes


def test_a_screening_that_found_nothing_is_the_verdict(tmp_path):
    run = make_run(tmp_path / "run", config="detect: {screen: {prompts: here}}\n")
    (run / "screen").mkdir()
    screen = {"found": False, "shared_shift": 0.02, "threshold": 0.05}
    (run / "screen" / "screen.json").write_text(json.dumps(screen))
    report = build_report([run], tmp_path / "out")
    assert report["verdict"]["label"] == "No factor found"
    assert "the naive fine-tune is kept" in report["verdict"]["headline"]
    assert "That is a drift all the same" in report["verdict"]["notes"][1]
    (run / "screen" / "screen.json").write_text(json.dumps({**screen, "found": True}))
    assert build_report([run], tmp_path / "again")["verdict"]["level"] == "good"


def test_rounds_that_gain_next_to_nothing_are_said_to_be_too_short(tmp_path):
    for name, gain, said in (("short", 0.05, True), ("long", 1.5, False), ("brought", "1.5", False)):
        run = make_run(tmp_path / name)
        path = run / "detect" / "basis.safetensors"
        SpuriousBasis.load(path).with_provenance(gains=[0.0, gain]).save(tmp_path / "basis.safetensors")
        (tmp_path / "basis.safetensors").replace(path)
        summary = summarise_runs(read_runs([run]))
        # The made-up curves begin at 4 and end near 0.25.
        expected = None if name == "brought" else pytest.approx(gain / 3.8, rel=0.1)
        assert summary["detection"]["gain_share"] == expected
        assert any("steps_per_round" in note for note in judge(summary).notes) is said
