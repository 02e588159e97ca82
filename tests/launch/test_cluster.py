"""Cluster files: what comes along loads, and what could break a script or a job is refused by name, with the remedy."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from grasp_dist.config import TrainingConfig
from grasp_dist.config_files import split_overrides
from grasp_dist.errors import InputError
from grasp_dist.launch import values
from grasp_dist.launch.cluster import Cluster, Container, Resources, cluster_names, load_cluster, seconds_of
from grasp_dist.settings import parse_yaml

ROOT = Path(__file__).parents[2]
JSON = sorted((ROOT / "cluster_configs" / "deepspeed").glob("*.json"), key=lambda path: path.stem)


@pytest.fixture
def cluster_file(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path, overrides: dict | None = None) -> str:
    with pytest.raises(InputError) as error:
        load_cluster(str(path), overrides)
    return str(error.value)


# What comes along


def test_the_five_clusters_come_along():
    assert cluster_names() == ["aws-efa", "local", "ray", "slurm-cpu", "slurm-h100-ib"]


@pytest.mark.parametrize("name", cluster_names())
def test_every_bundled_cluster_loads_and_says_what_to_change(name):
    known, cluster = load_cluster(name)
    assert known == name
    for kind in ("train", "evaluate", "light"):
        assert cluster.tasks_of(kind) >= max(1, cluster.gpus_of(kind))
    assert "CHANGE" in (ROOT / "cluster_configs" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", cluster_names())
def test_every_example_that_is_commented_out_is_valid_too(name, cluster_file):
    """A user removes the `# ` in front of any setting: the file must still load."""
    keys = {key for section in (Cluster, Resources, Container) for key in section.model_fields}
    live, found = [], 0
    for line in (ROOT / "cluster_configs" / f"{name}.yaml").read_text().splitlines():
        commented = re.match(r"(\s*)# (\s*(- |(\w+):( |$)).*)", line)
        key = commented[4] if commented else None
        taken = commented is not None and (key is None or key in keys or key.startswith(("NCCL_", "HF_")))
        found += taken
        live.append(f"{commented[1]}{commented[2]}" if taken else line)
    assert found
    load_cluster(str(cluster_file("\n".join(live) + "\n")))


def test_the_page_shows_every_field(cluster_file):
    page = (ROOT / "docs" / "clusters.md").read_text()
    text = re.search(r"## Every field\n\n```yaml\n(.*?)```", page, re.DOTALL)[1]
    load_cluster(str(cluster_file(text)))
    tree = parse_yaml(text)
    for section, shown in ((Cluster, tree), (Resources, tree["train"]), (Container, tree["container"])):
        assert set(section.model_fields) == set(shown)


def test_a_section_of_which_all_is_commented_out_is_its_defaults(cluster_file):
    path = cluster_file("kind: slurm\nenvironment:\n#  A: b\ntrain:\nlight:\n  gpus_per_node:\nshared:\npartition:\n")
    assert load_cluster(str(path))[1] == Cluster()


def test_light_jobs_stay_light_when_one_of_their_settings_is_given(cluster_file):
    cluster = load_cluster(str(cluster_file("gpus_per_node: 8\nlight: {memory: 8G}\n")))[1]
    assert (cluster.gpus_of("light"), cluster.tasks_of("light"), cluster.light.time) == (0, 1, "00:30:00")
    assert (cluster.gpus_of("train"), cluster.tasks_of("train")) == (8, 8)


def test_overrides_go_on_top():
    _, cluster = load_cluster("slurm-h100-ib", {"partition": "h200", "train": {"nodes": 4}})
    assert (cluster.partition, cluster.train.nodes, cluster.train.cpus_per_task) == ("h200", 4, 12)


def test_what_is_written_without_quotes_is_taken_as_it_stands(cluster_file):
    """YAML 1.1 would read half a day as 43200, which Slurm takes for a month of minutes, and 022 as 18."""
    text = "train: {time: 12:00:00, memory: 0}\nlight: {time: 30}\nenvironment: {A: 022, B: 0x10, C: 7}\n"
    cluster = load_cluster(str(cluster_file(text)))[1]
    assert (cluster.train.time, cluster.train.memory, cluster.light.time) == ("12:00:00", "0", "30")
    assert cluster.environment == {"A": "022", "B": "0x10", "C": "7"}
    _, overrides = split_overrides(["--cluster.train.time", "36:00:00", "--cluster.environment.A", "0"])
    cluster = load_cluster("slurm-cpu", overrides["cluster"])[1]
    assert (cluster.train.time, cluster.environment) == ("36:00:00", {"A": "0"})


def test_what_a_users_profile_says_for_sbatch_fills_what_the_file_leaves_out(cluster_file, monkeypatch):
    """sbatch would take it by itself; so a script shows it."""
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("SBATCH_PARTITION", "fast")
    cluster = load_cluster(str(cluster_file("account:\npartition: gpu\n")))[1]
    assert (cluster.account, cluster.partition, cluster.qos) == ("mine", "gpu", None)
    assert load_cluster("slurm-cpu", {"account": "team"})[1].account == "team"
    assert load_cluster("local")[1].account is None


@pytest.mark.parametrize(
    ("time", "seconds"), [("90", 5400), ("90:30", 5430), ("12:00:00", 43200), ("1-00:00:01", 86401), ("0:01:00", 60)]
)
def test_times(time, seconds):
    assert TypeAdapter(values.Time).validate_python(time) == time
    assert seconds_of(time) == seconds


# What is refused

NASTY = [
    "a b", "a;b", "a$(touch pwned)", "a`touch pwned`", "a'b", 'a"b', "a\\b", "a\nb", "a\n#SBATCH --wrap=x", "a>b",
    "a<b", "-rf", "--wrap=x", "", "a#b", "a\u2028b", "a\u202eb", "a\u00a0b", "a\x7fb", "~root", "{a,b}", "a" * 300,
    "%j", "ä",
]  # fmt: skip
NAMED = ["partition", "account", "qos", "constraint", "reservation", "gpu_type", "interface", "modules"]


@pytest.mark.parametrize("field", [*NAMED, "train.partition", "train.qos", "train.constraint", "train.memory"])
def test_names_hold_nothing_that_a_shell_or_sbatch_could_break_on(cluster_file, field):
    section, _, key = field.rpartition(".")
    for value in NASTY:
        inner = {key: [value] if key == "modules" else value}
        message = refusal(cluster_file(yaml.safe_dump({section: inner} if section else inner)))
        assert field in message
        assert "mine.yaml" in message
        assert re.search(r"only|lists them|without spaces|as `ip|with K, M|type the value anew", message), "no remedy"


@given(st.text(st.sampled_from("aZ0_" * 4 + "+-=.:,@%/&|!*?()[]{}<>$`'\"\\ ;#~^\n\t\u00a0ä"), max_size=12))
def test_whatever_is_let_through_is_one_word_to_a_shell(text):
    """The other way round: over any text, what a type accepts comes out of double quotes as it went in."""
    for kind in (values.Name, values.Partition, values.Constraint, values.Interface, values.Memory, values.Module):
        try:
            taken = TypeAdapter(kind).validate_python(text)
        except ValidationError:
            continue
        assert shlex.split(f'--option="{taken}"', comments=True) == [f"--option={taken}"]
        assert not taken.startswith("-")


@given(st.from_regex(r"[/$][a-zA-Z0-9$(){}`\"'\\ ;&|<>]{0,20}", fullmatch=True))
def test_a_scratch_folder_runs_nothing_between_double_quotes(text):
    try:
        taken = TypeAdapter(values.Scratch).validate_python(text)
    except ValidationError:
        return
    # Without variables nothing in it is special to bash, which is what is left when they are filled in.
    plain = re.sub(r"\$\{?\w+\}?", "x", taken)
    assert shlex.split(f'"{plain}"') == [plain]
    assert not set(plain) & set('$`\\"')


def test_a_scratch_folder_is_filled_in_by_bash_alone(tmp_path):
    scratch = TypeAdapter(values.Scratch).validate_python("/scratch/$USER; touch pwned/${SLURM_JOB_ID} & x")
    filled = subprocess.run(
        ["bash", "-c", f'printf %s "{scratch}"'],
        env={"USER": "me; touch pwned", "SLURM_JOB_ID": "$(touch pwned)", "PATH": os.environ["PATH"]},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert filled.stdout == "/scratch/me; touch pwned; touch pwned/$(touch pwned) & x"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "where", "remedy"),
    [
        # What YAML reads as something else than text.
        ("environment: {A: on}", "environment.A", "in quotes"),
        ("environment: {A: 1.10}", "environment.A", "in quotes"),
        ("partition: no", "partition", "in quotes"),
        # Times that are none.
        ("train: {time: '0'}", "train.time", "more than 0"),
        ("train: {time: '00:00:00'}", "train.time", "more than 0"),
        ("train: {time: '00:99:00'}", "train.time", "59 minutes"),
        ("train: {time: '1-24:00:00'}", "train.time", "23 hours"),
        ("train: {time: '400-00:00:00'}", "train.time", "366 days"),
        ("train: {time: '9999999'}", "train.time", "366 days"),
        ("train: {time: UNLIMITED}", "train.time", "give minutes"),
        ("train: {time: '1-12:00'}", "train.time", "give minutes"),
        ("train: {time: '-1'}", "train.time", "give minutes"),
        ("train: {time: '٣٠'}", "train.time", "give minutes"),
        ("train: {time: '00:02:00'}", "lead_seconds (120 s)", "more time"),
        ("lead_seconds: 0", "lead_seconds", "greater than or equal to 1"),
        ("lead_seconds: 70000", "lead_seconds", "less than or equal to 65535"),
        # Nodes, GPUs, processes.
        ("gpus_per_node: 8\ntrain: {gpus_per_node: 9}", "train.gpus_per_node", "more nodes"),
        ("train: {gpus_per_node: 1}", "train.gpus_per_node", "a node has 0"),
        ("gpus_per_node: 8\ntrain: {tasks_per_node: 16}", "train.tasks_per_node", "one process"),
        ("gpus_per_node: 8\ntrain: {tasks_per_node: 1}", "train.tasks_per_node", "leave it out"),
        ("gpus_per_node: 8\nlight: {gpus_per_node: 2}", "light.gpus_per_node", "0 or 1"),
        ("light: {nodes: 2}", "light.nodes", "can only be 1"),
        ("kind: local\ntrain: {nodes: 2}", "train.nodes", "this machine alone"),
        ("cpus_per_node: 8\ntrain: {tasks_per_node: 2, cpus_per_task: 5}", "train asks for 10 CPUs", "cpus_per_node"),
        ("train: {nodes: 0}", "train.nodes", "greater than or equal to 1"),
        ("max_array_size: 5000000", "max_array_size", "less than or equal to"),
        # Paths and mounts.
        ("shared: [data]", "shared.0", "absolute"),
        ("scratch: tmp", "scratch", "absolute"),
        ("scratch: /s/$(id)", "scratch", "$NAME"),
        ("scratch: /s/`id`", "scratch", "$NAME"),
        ("scratch: '/s/${a:-$(id)}'", "scratch", "$NAME"),
        ("python: -c", "python", "hyphen"),
        ("python: ''", "python", "not empty"),
        ("container: {runtime: pyxis}", "container.image", "must name an image"),
        ("container: {runtime: pyxis, image: --nv}", "container.image", "hyphen"),
        ("container: {mounts: ['/a,/etc:/etc']}", "container.mounts.0", "a link"),
        ("container: {mounts: ['/a b']}", "container.mounts.0", "a link"),
        ("container: {mounts: ['/a:b']}", "container.mounts.0", "/outside:/inside"),
        ("container: {mounts: ['/a:/b:ro:/c']}", "container.mounts.0", "/outside:/inside"),
        ("container: {mounts: ['/a:/b:RO;x']}", "container.mounts.0", "flags"),
        ("container: {mounts: ['${HOME}/x']}", "container.mounts.0", "a link"),
        ("container: {options: [bash]}", "container.options.0", "begins with a hyphen"),
        # What the launcher, Slurm or bash sets itself.
        ("srun_options: [bash]", "srun_options.0", "begins with a hyphen"),
        ("srun_options: ['--']", "srun_options.0", "begins with a hyphen"),
        ("srun_options: [--ntasks=1]", "srun_options", "launcher's own"),
        ("srun_options: [-n1]", "srun_options", "launcher's own"),
        ("srun_options: [-K1]", "srun_options", "launcher's own"),
        ("srun_options: [--kill-on-bad-exit=1]", "srun_options", "launcher's own"),
        ("srun_options: [--export=NONE]", "srun_options", "launcher's own"),
        ("container: {runtime: pyxis, image: a, options: [--export=NONE]}", "container.options", "launcher's own"),
        ("container: {runtime: pyxis, image: a, options: [-n1]}", "container.options", "launcher's own"),
        ("container: {runtime: pyxis, image: a, options: [--container-workdir=/]}", "container.options", "train"),
        ("container: {runtime: apptainer, image: a, options: [--cleanenv]}", "container.options", "SLURM_PROCID"),
        ("container: {runtime: apptainer, image: a, options: [-e]}", "container.options", "SLURM_PROCID"),
        ("container: {runtime: apptainer, image: a, options: [-cC]}", "container.options", "SLURM_PROCID"),
        ("container: {runtime: apptainer, image: a, options: [--containall]}", "container.options", "SLURM_PROCID"),
        ("container: {runtime: apptainer, image: a, options: [--bind=/b]}", "container.options", "container.mounts"),
        ("container: {runtime: apptainer, image: a, options: [--pwd=/b]}", "container.options", "launcher's own"),
        ("environment: {RANK: '0'}", "environment.RANK", "leave it out"),
        ("environment: {SLURM_PROCID: '0'}", "environment.SLURM_PROCID", "leave it out"),
        ("environment: {UID: '0'}", "environment.UID", "leave it out"),
        ("environment: {'A B': x}", "environment", "no variable's name"),
        ("environment: {'A=$(id)': x}", "environment", "no variable's name"),
        ("environment: {A: \"x\\ny\"}", "environment.A", "on one line"),
        ("scratch: /s\nenvironment: {TMPDIR: /t}", "environment.TMPDIR", "one of the two"),
        ("interface: ib0\nenvironment: {NCCL_SOCKET_IFNAME: ib1}", "environment.NCCL_SOCKET_IFNAME", "one of the two"),
        ("interface: ^docker0", "interface", "NCCL_SOCKET_IFNAME"),
        # Shell lines that would swallow the rest of a script.
        ("setup: ['echo \\']", "setup", "backslash"),
        ("setup: ['echo \"']", "setup", "bash -n"),
        ("setup: ['cat <<EOF']", "setup", "bash -n"),
        ("setup: ['if true; then']", "setup", "bash -n"),
        ("setup: ['fi']", "setup", "bash -n"),
        # Ray.
        ("kind: ray\naddress: 'head; id'", "address", "HOST:PORT"),
        # Keys.
        ("parition: gpu", "'parition'", "did you mean 'partition'"),
        ("parition:", "'parition'", "did you mean 'partition'"),
        ("train: {node: 2}", "'train.node'", "did you mean 'nodes'"),
        ("light: {node: 2}", "'light.node'", "did you mean 'nodes'"),
    ],
)  # fmt: skip
def test_refused_values_name_the_field_and_the_remedy(cluster_file, text, where, remedy):
    message = refusal(cluster_file(text + "\n"))
    assert where in message
    assert remedy in message


@pytest.mark.parametrize(
    "text",
    [
        "constraint: '[rack1|rack2]'",
        "constraint: (h100|h200)&ib",
        "partition: gpu,gpu-long",
        "interface: ib0,ib1",
        "scratch: ${LOCAL}/$SLURM_JOB_ID",
        "setup: ['if true; then', '  echo \\', '  yes', fi, 'cat <<EOF', text, EOF]",
        "srun_options: [--mpi=none, --cpu-bind=cores, -v]",
        "container: {runtime: pyxis, image: 'nvcr.io#nvidia/pytorch:26.10', mounts: [/a, '/a:/b', '/a:/b:ro+rbind']}",
        "container: {runtime: pyxis, image: a, options: [--no-container-mount-home, --container-remap-root]}",
        "container: {runtime: apptainer, image: a, options: [--no-home, --fakeroot, -c, -H/home/me, --nv]}",
        "environment: {A: 'a $(b) `c` \"d\"', NCCL_SOCKET_IFNAME: ^docker0}",
        "kind: ray\naddress: ray://[::1]:10001",
        "train: {memory: '0', time: 3-00:00:00}",
        "train: {memory: 0, time: 90}",
        "environment: {A: 0}",
    ],
)  # fmt: skip
def test_what_clusters_really_need_is_let_through(cluster_file, text):
    load_cluster(str(cluster_file(text + "\n")))


def test_setup_lines_are_read_and_not_run(cluster_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BASH_ENV", str(cluster_file(f"touch {tmp_path}/pwned\n", "bash_env")))
    load_cluster(str(cluster_file(f"setup: ['touch {tmp_path}/pwned', 'echo $(touch {tmp_path}/pwned)']\n")))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["h100", "", "nowhere.yaml", "a\0.yaml", "x" * 5000 + ".yaml", "~nobody-there/x.yaml", "."]
)
def test_a_cluster_that_is_not_there(name):
    assert "local, ray, slurm-cpu" in refusal(name)


def test_a_file_whose_name_would_break_a_script_is_refused(cluster_file):
    message = refusal(cluster_file("kind: local\n", "a\n#SBATCH --wrap=id\n.yaml"))
    assert "rename the file" in message


def test_a_path_with_spaces_and_quotes_is_fine(tmp_path):
    folder = tmp_path / 'it\'s a "folder" $HOME'
    folder.mkdir()
    (folder / "mine.yml").write_text("kind: local\n")
    assert load_cluster(str(folder / "mine.yml"))[0] == "mine"


# DeepSpeed's files


def test_deepspeed_files_say_what_our_own_engine_says():
    from grasp_dist.training.engines.zero import zero_config

    assert [path.stem for path in JSON] == ["zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]
    for path in JSON:
        strategy, _, offload = path.stem.partition("-")
        parallel = SimpleNamespace(
            strategy=strategy, offload="none" if not offload else "all" if strategy == "zero3" else "optimizer",
            device=SimpleNamespace(type="cuda"), world_size=1,
        )  # fmt: skip
        ours = zero_config(TrainingConfig(batch_size=1, precision="bf16"), parallel, 1)  # type: ignore[arg-type]
        theirs = json.loads(path.read_text())
        # A loop of one's own lets DeepSpeed clip, and may want the weights of ZeRO-3 in one file.
        assert theirs.pop("gradient_clipping") == 1.0
        del ours["gradient_clipping"], ours["steps_per_print"]
        theirs["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save", None)
        if strategy != "zero3":
            del ours["zero_optimization"]["stage3_param_persistence_threshold"]
        assert theirs == ours, path


TRAIN = """
import argparse, json, sys
import common, deepspeed, torch
from grasp_dist import GraspProjector

options = argparse.Namespace(model=None, basis=None, lora=False, steps=2, lr=1e-3)
torch.distributed.init_process_group("gloo")
for path in sys.argv[1:]:
    model = common.load_model(options)
    basis = common.load_basis(options, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=path)
    projector = GraspProjector(engine, basis)
    projector.attach(engine)
    for batch in common.tokens(options, model).split(1)[:2]:
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
    found = {"path": path, "stage": engine.zero_optimization_stage(), "residual": max(projector.residual().values())}
    print("found", json.dumps(found))
    projector.detach()
    engine.destroy()

from transformers import TrainingArguments
for path in sys.argv[1:]:
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    filled = json.load(open(path)) | dict.fromkeys(auto, "auto")
    for batch, steps, config in ((1, 1, path), (4, 2, filled)):
        args = TrainingArguments("unused", use_cpu=True, bf16=True, per_device_train_batch_size=batch,
                                 gradient_accumulation_steps=steps, report_to="none", deepspeed=config)
        args.hf_deepspeed_config.trainer_config_process(args)
        assert args.hf_deepspeed_config.config["gradient_accumulation_steps"] == steps
        print("trainer", path, batch)
"""


@pytest.mark.slow
def test_deepspeed_and_the_trainer_accept_every_file(tmp_path):
    """A step with each, on the CPU, with a projector; the Trainer refuses what contradicts its own arguments."""
    pytest.importorskip("deepspeed")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **rank, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *map(str, JSON)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    found = {Path(item["path"]).stem: item for kind, _, rest in lines if kind == "found" for item in [json.loads(rest)]}
    assert {name: item["stage"] for name, item in found.items()} == {path.stem: int(path.stem[4]) for path in JSON}
    assert max(item["residual"] for item in found.values()) <= 1e-6
    assert sum(kind == "trainer" for kind, _, _ in lines) == 2 * len(JSON)
