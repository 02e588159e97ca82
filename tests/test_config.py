"""The configuration tree: what is refused, and how it is said."""

from pathlib import Path

import pytest

from grasp_dist.config import RunConfig
from grasp_dist.config_files import load_config, save_config, split_overrides
from grasp_dist.errors import InputError
from grasp_dist.settings_reference import settings_of
from tests.tiny_runs import grasp_dist

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
MINIMAL = "run_dir: out\nmodel: {path: m}\ndata: {path: d.jsonl}\n"


@pytest.fixture
def config_file(tmp_path):
    def write(extra: str = "") -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(MINIMAL + extra)
        return path

    return write


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_has_the_random_control(recipe):
    config = load_config(recipe)
    assert any(arm.basis == "random" for arm in config.project.arms.values())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("project: {rnak: 3}", "'project.rnak'; did you mean 'rank'"),
        (
            "evaluate: {probes: [{name: a, path: b, role: task, kidn: loss}]}",
            "'evaluate.probes.0.kidn'; did you mean 'kind'",
        ),
        ("project: {arms: {grasp: {sied: write}}}", "did you mean 'side'"),
        ("project: {arms: {a: {alternative: {kind: caft, rnk: 3}}}}", "did you mean 'rank'"),
        (
            "evaluate: {questions: [{name: q, path: p, judge: {kind: server, address: a, xyz: 3}}]}",
            "known here: address, at_once, by, key_variable, kind, per_minute, served_name",
        ),
        ("project: {check: true}", "project.check has settings of its own, got True; write {} for their defaults"),
        ("evaluate: {harness: [a]}", "evaluate.harness has settings of its own, got ['a']"),
        ("project: {arms: {full: {training: {lerning_rate: 1}}}}", "did you mean 'learning_rate'"),
        ("project: {arms: {naive: {}}}", "'naive' is taken"),
        ("training: {learning_rate: -1}", "training.learning_rate"),
        ("training: {method: full}", "detection reads LoRA updates"),
        ("detect: {method: file}", "detect.basis"),
        ("training: {seeds: [0, 0]}", "must differ"),
        ("training: {betas: [1.5, 2]}", "training.betas"),
        ("project: {arms: {grasp: {training: {seeds: [3]}}}}", "training.seeds"),
        ("report: {task: nope}", "none of the probes"),
        ("variables: [a]", "must be a mapping"),
        ("model: {path: m}\nmodle: 3", "did you mean 'model'"),
        ("report: {title: $nowhere}", "variables"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(config_file, extra, message):
    with pytest.raises(InputError) as error:
        load_config(config_file(extra))
    assert message in str(error.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="no mapping"):
        load_config(tmp_path / "list.yaml")


def test_yaml_is_read_safely(tmp_path):
    (tmp_path / "evil.yaml").write_text("run_dir: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(tmp_path / "evil.yaml")


def test_a_home_directory_is_meant_by_the_tilde(config_file):
    config = load_config(config_file("detect: {method: file, basis: ~/basis.safetensors}"))
    assert config.detect.basis == str(Path.home() / "basis.safetensors")


def test_overrides_leave_the_other_words_alone():
    words = ["run", "--project.rank", "8", "c.yaml", "--training.seeds=[0, 1]", "--nproc", "2", "--run_dir", "x"]
    rest, tree = split_overrides(words)
    assert rest == ["run", "c.yaml", "--nproc", "2"]
    assert tree == {"project": {"rank": 8}, "training": {"seeds": [0, 1]}, "run_dir": "x"}


@pytest.mark.parametrize("words", [["--project.rank"], ["--a.b", "[1"], ["--project", "3", "--project.rank", "1"]])
def test_malformed_overrides(words):
    with pytest.raises(InputError):
        split_overrides(words)


def test_overrides_win_and_variables_are_filled_in(config_file):
    path = config_file('variables: {root: here}\nevaluate: {probes: [{name: a, role: task, path: "${root}/a.jsonl"}]}')
    assert load_config(path).evaluate.probes[0].path == "here/a.jsonl"
    config = load_config(path, {"variables": {"root": "there"}, "project": {"rank": 2}})
    assert (config.evaluate.probes[0].path, config.project.rank) == ("there/a.jsonl", 2)


def test_saved_configuration_reads_back_the_same(config_file, tmp_path):
    config = load_config(config_file("report: {title: 'costs 5 $$ or $${more}'}"))
    assert config.report.title == "costs 5 $ or ${more}"
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_arms_inherit_and_override_training():
    config = RunConfig.model_validate(
        {
            "run_dir": "r",
            "model": {"path": "m"},
            "data": {"path": "d"},
            "training": {"steps": 7, "lora": {"rank": 4}},
            "project": {"arms": {"full": {"training": {"method": "full", "learning_rate": 1e-4}}}},
        }
    )
    training = config.arm_training("full")
    assert (training.method, training.learning_rate, training.steps, training.lora.rank) == ("full", 1e-4, 7, 4)
    assert list(config.project.arms) == ["full", "random"]


def test_every_setting_is_in_the_reference():
    settings = {one.path: one for one in settings_of(RunConfig)}
    assert settings["model.path"].default == ""
    assert (settings["training.lora.rank"].type, settings["training.lora.rank"].default) == ("whole number", "8")
    assert settings["detect.rounds"].help.startswith("Rounds of deflation")
    assert settings["evaluate.questions[].judge{kind: server}.key_variable"].default == "OPENAI_API_KEY"
    assert settings["project.arms.<name>.alternative{kind: caft}.layers"].type == "list of whole number or null"
    assert settings["evaluate.probes[].kind"].type.startswith("completion or ")
    assert settings["training.warmup_steps"].default == "0", "and not false"


def test_the_reference_in_the_docs_is_that_of_the_code():
    """If this fails: grasp-dist settings --markdown > docs/settings.md"""
    done = grasp_dist("settings", "--markdown")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    assert "lora.rank  (whole number = 8)" in grasp_dist("settings", "lora", "rank").stdout
    assert "no setting has nonesuch" in grasp_dist("settings", "nonesuch").stderr
