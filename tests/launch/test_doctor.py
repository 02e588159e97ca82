"""The doctor against real faults: each is found, named, and has its remedy; nothing is invented where all is well."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from grasp_dist.launch.commands_doctor import doctor_command
from grasp_dist.launch.doctor import doctor, folders, processes, ray_cluster
from grasp_dist.launch.doctor.check import Check
from grasp_dist.launch.doctor.folders import check_folders
from grasp_dist.launch.doctor.machine import check_machine
from grasp_dist.launch.doctor.processes import check_processes
from grasp_dist.launch.doctor.ray_cluster import check_ray
from grasp_dist.launch.doctor.reach import PORTS, writable
from grasp_dist.launch.doctor.software import ADVISORIES, affects, check_software
from tests.launch.doctor_cases import NOWHERE, cluster, the, told

RAY_ELSEWHERE = ("auto", "10.0.0.1:6379", "ray://10.0.0.1:10001")


# Versions


def install(folder: Path, name: str, version: str, *needs: str) -> None:
    """What pip leaves behind of a package, which is all that is judged."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_what_the_tests_run_with_is_well():
    assert {check.state for check in check_software(None, None)} == {"ok"}


@pytest.mark.parametrize(
    ("package", "version", "numbers"),
    [
        ("torch", "2.5.1", {"CVE-2025-32434", "CVE-2026-24747"}),
        ("torch", "2.9.1+cu128", {"CVE-2026-24747"}),
        ("torch", "2.10.0", set()),
        ("transformers", "5.2.0", {"CVE-2026-4372"}),
        ("transformers", "5.3.0", set()),
        ("ray", "2.51.0", {"CVE-2025-62593", "CVE-2026-27482", "CVE-2026-41486", "CVE-2026-57516"}),
        ("ray", "2.56.0", set()),
        ("deepspeed", "0.15.0", {"CVE-2024-43497"}),
        ("datasets", "5.1.0", {"CVE-2026-57845"}),
        ("lightning", "2.6.1", set()),
        ("lightning", "2.6.3", {"GHSA-w37p-236h-pfx3"}),
        ("torch", "not a version", set()),
    ],
)
def test_known_holes(packages, package, version, numbers):
    install(packages, package, version)
    holes = [check for check in told(check_software(None, None), "known holes") if check.state != "ok"]
    assert {number for check in holes for number in [check.found.rpartition("(")[2].rstrip(")")]} == numbers
    assert all(f"pip install '{package}" in check.remedy for check in holes)


def test_a_remedy_is_never_itself_affected():
    for advisory in ADVISORIES:
        fixed = SpecifierSet(advisory.remedy)
        for other in ADVISORIES:
            if other.package == advisory.package:
                oldest = next(iter(fixed)).version
                assert not affects(other, oldest) or ">" + oldest in advisory.remedy, (advisory, other)


def test_what_is_reached_fails_and_what_is_not_warns(packages):
    install(packages, "datasets", "5.0.0")
    install(packages, "transformers", "5.1.0")
    states = {check.found.split()[0]: check.state for check in told(check_software(None, None), "known holes")}
    assert states == {"datasets": "warning", "transformers": "failure"}


def test_missing_and_old_packages_are_named_with_the_command(packages):
    install(
        packages, "grasp-dist", "0.1.0", "no-such-package>=1", "torch>=99", "rich", 'submitit>=99; extra == "slurm"'
    )
    found = {check.found.split()[0]: check for check in told(check_software(None, None), "packages")}
    assert set(found) == {"no-such-package", "torch"}
    assert found["no-such-package"].remedy == "pip install 'grasp-dist'"
    assert found["torch"].remedy == "pip install 'torch>=99'"
    extra = the(check_software(cluster(launcher="submitit"), None), "extra slurm")
    assert (extra.state, "launcher: submitit" in extra.found) == ("failure", True)


def test_extras_are_looked_at_where_they_are_needed(run):
    run.parallel.strategy = "zero3"
    names = {check.name for check in check_software(cluster(kind="ray"), run)}
    assert {"extra ray", "extra deepspeed"} <= names
    assert "extra slurm" not in names


# Folders


def test_a_run_on_this_machine_is_well(run):
    assert {check.state for check in check_folders(cluster(kind="local"), run)} == {"ok"}


def test_folders_that_cannot_be_used(run, tmp_path):
    run.run_dir = f"{NOWHERE}/run"
    assert "cannot be written" in the(check_folders(None, run), "run_dir").found
    (tmp_path / "file").touch()
    run.run_dir = str(tmp_path / "file" / "run")
    assert "is a file" in the(check_folders(None, run), "run_dir").found
    scratch = the(check_folders(cluster(kind="local", scratch=f"{NOWHERE}/x"), None), "scratch")
    assert scratch.state == "failure"
    assert the(check_folders(cluster(scratch="/scratch/$SLURM_JOB_ID"), None), "scratch").state == "skipped"


def test_inputs_that_are_not_there_or_not_shared(run, organism, tmp_path, monkeypatch):
    shared = cluster(shared=[str(organism)])
    (outside,) = [check for check in told(check_folders(shared, run), "run_dir") if check.state == "failure"]
    assert "none of the shared folders" in outside.found
    run.evaluate.probes[0].path = str(tmp_path / "none.jsonl")
    missing = the(check_folders(None, run), "evaluate.probes.task.path")
    assert (missing.state, "is not there" in missing.found) == ("failure", True)
    run.evaluate.probes = run.evaluate.probes[1:]
    both = cluster(shared=[str(organism), str(tmp_path)])
    assert "working directory" in {check.name for check in check_folders(both, run) if check.state == "failure"}
    monkeypatch.chdir(tmp_path)
    assert {check.state for check in check_folders(both, run)} == {"ok"}


@pytest.mark.parametrize(("path", "local"), [("org/model", False), ("model", False), ("a/b/c", True), ("./m", True)])
def test_a_hub_id_is_no_folder_that_is_missing(run, path, local):
    run.model.path = path
    assert bool(told(check_folders(None, run), "model.path")) == local


def test_shared_folders(run, tmp_path):
    assert the(check_folders(cluster(), None), "shared").state == "warning"
    missing = the(check_folders(cluster(shared=["/no/such/folder"]), None), "shared")
    assert (missing.state, "no folder" in missing.found) == ("failure", True)
    unwritable = cluster(shared=[NOWHERE, str(tmp_path)])
    first, second = told(check_folders(unwritable, None), "shared")
    assert (first.state, second.state) == ("warning", "ok")
    first, _ = told(check_folders(unwritable, run), "shared")
    assert first.state == "warning", "nothing of this run is written there"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "nothing is left behind"


def test_a_shared_folder_of_others_that_holds_the_run_directory(run, tmp_path, monkeypatch):
    """As /shared, which belongs to root, with /shared/me in it. (Root itself may write everywhere.)"""
    (mine := tmp_path / "me").mkdir()
    closed = [tmp_path]
    monkeypatch.setattr(folders, "writable", lambda path: "Permission denied" if path in closed else writable(path))
    root = cluster(shared=[str(tmp_path)])
    run.run_dir = str(mine / "run")
    assert the(check_folders(root, run), "shared").state == "ok"
    assert not [check for check in told(check_folders(root, run), "run_dir") if check.state != "ok"]
    assert the(check_folders(root, None), "shared").state == "warning"
    closed.append(mine)
    assert the(check_folders(root, run), "shared").state == "warning"
    assert told(check_folders(root, run), "run_dir")[0].state == "failure"


# What a cluster file says about machines


def test_the_network_interface():
    assert the(check_machine(cluster(interface="lo")), "interface").state == "ok"
    missing = the(check_machine(cluster(kind="local", interface="lo,nope0")), "interface")
    assert missing.state == "failure"
    assert missing.found.startswith("nope0 is not")
    assert "lo" in missing.remedy
    assert the(check_machine(cluster(interface="nope0")), "interface").state == "warning", "the nodes may have it"
    for address in RAY_ELSEWHERE:
        ray = cluster(kind="ray", address=address, interface="nope0")
        assert the(check_machine(ray), "interface").state == "warning", "Ray's nodes may have it"
    here = cluster(kind="ray", address="local", interface="nope0")
    assert the(check_machine(here), "interface").state == "failure"


def test_secrets_and_forced_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("NCCL_", "FI_"))]:
        monkeypatch.delenv(name)
    fine = {"NCCL_IB_HCA": "mlx5", "RAY_AUTH_TOKEN_PATH": "/x", "RAY_AUTH_MODE": "token", "HF_HOME": "/x"}
    assert the(check_machine(cluster(environment=fine)), "environment").state == "ok"
    bad = {"HF_TOKEN": "hf_x", "AWS_SECRET_ACCESS_KEY": "x", "WANDB_API_KEY": "x", "NCCL_ALGO": "Ring"}
    found = told(check_machine(cluster(environment=bad)), "environment")
    assert [check.found.split()[0] for check in found] == [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
        "NCCL_ALGO",
    ]
    assert not any("hf_x" in check.found + check.remedy for check in found)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert "in this shell" in the(check_machine(cluster()), "environment").found


def test_the_python_of_the_jobs(tmp_path):
    name = "python of the jobs"
    assert the(check_machine(cluster(python=sys.executable)), name).state == "ok"
    without = tmp_path / "it's a python"
    without.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    without.chmod(0o755)
    found = the(check_machine(cluster(python=str(without))), name)
    assert (found.state, "No module named 'grasp_dist'" in found.found) == ("failure", True)
    assert the(check_machine(cluster(python="/no/python")), name).state == "warning"


def test_containers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    apptainer = {"runtime": "apptainer", "image": "/no/image.sif"}
    found = list(check_machine(cluster(kind="local", container=apptainer)))
    assert [the(found, name).state for name in ("container", "image", "python of the jobs")] == [
        "failure",
        "failure",
        "skipped",
    ]
    (tmp_path / "apptainer").write_text("#!/bin/sh\necho apptainer version 1.4.2\n")
    (tmp_path / "apptainer").chmod(0o755)
    (tmp_path / "image.sif").touch()
    apptainer["image"] = str(tmp_path / "image.sif")
    found = list(check_machine(cluster(kind="local", container=apptainer)))
    assert "1.4.2" in the(found, "container").found
    assert the(found, "image").state == "ok"
    pyxis = {"runtime": "pyxis", "image": "nvcr.io#nvidia/pytorch:26.10"}
    found = list(check_machine(cluster(container=pyxis)))
    assert [the(found, name).state for name in ("container", "image")] == ["skipped", "skipped"]


@pytest.mark.skipif(shutil.which("srun") is None, reason="needs srun")
def test_pyxis_that_is_not_installed():
    found = the(check_machine(cluster(container={"runtime": "pyxis", "image": "a.sqsh"})), "container")
    assert (found.state, "no pyxis" in found.found) == ("failure", True)


def test_modules_that_cannot_be_loaded():
    found = the(check_machine(cluster(modules=["no-such-module/1.0"])), "modules")
    assert (found.state, "module" in found.found) == ("warning", True)


# Processes


@pytest.mark.slow
def test_processes_of_this_machine_reach_each_other():
    found = list(check_processes(cluster(kind="local")))
    assert the(found, "gloo all-reduce").state == "ok"
    assert the(found, "gpus").state == "ok"
    assert the(check_processes(cluster(kind="local", gpus_per_node=64)), "gpus").state == "failure"


@pytest.mark.slow
def test_processes_that_do_not_reach_each_other_are_said_to():
    found = the(check_processes(cluster(kind="local", interface="nope0")), "gloo all-reduce")
    assert found.state == "failure"
    assert "nope0" in found.found
    assert "interface" in found.remedy


@pytest.mark.parametrize("address", RAY_ELSEWHERE)
def test_a_machine_that_only_drives_ray_needs_neither_gpus_nor_the_interface(monkeypatch, address):
    tried = []
    monkeypatch.setattr(processes, "_all_reduce", lambda *words: tried.append(words) or Check("", "", "ok", "done"))
    ray = {"kind": "ray", "gpus_per_node": 64, "interface": "nope0"}
    assert the(check_processes(cluster(**ray, address=address)), "gpus").state == "skipped"
    assert {interface for _, _, interface in tried} == {None}
    assert the(check_processes(cluster(**ray, address="local")), "gpus").state == "failure"
    assert tried[-1][2] == "nope0"


def test_ports_that_are_taken():
    assert processes._ports().state == "ok"
    sample = processes.random.Random(0).sample(PORTS, 50)
    with ExitStack() as stack:
        for port in sample[:8]:
            taken = stack.enter_context(closing(socket.socket()))
            taken.bind(("", port))
        assert "8 of 50" in processes._ports().found


def test_the_ports_are_those_of_the_job_script():
    script = (Path(__file__).parents[2] / "launch" / "templates" / "head.sh.j2").read_text()
    assert f"{PORTS.start} + SLURM_JOB_ID % {len(PORTS)}" in script


# Ray


def test_ray_that_is_reached_by_its_client(monkeypatch):
    """`ray status` knows no such address: what listens there is all that can be seen without connecting."""
    monkeypatch.setattr(ray_cluster, "installed", lambda package: "2.60.0")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        found = the(check_ray(cluster(kind="ray", address=address)), "cluster")
    assert (found.state, address in found.found) == ("ok", True)
    assert the(check_ray(cluster(kind="ray", address=address)), "cluster").state == "failure", "nobody listens now"


def test_ray_asks_for_a_token(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    local = {"kind": "ray", "address": "local"}
    assert the(check_ray(cluster(**local)), "token").state == "ok"
    refused = the(check_ray(cluster(**local, environment={"RAY_AUTH_MODE": "disabled"})), "token")
    assert (refused.state, "CVE-2023-48022" in refused.found) == ("failure", True)


@pytest.mark.slow
def test_a_ray_cluster_is_found_or_not(ray_alone):
    pytest.importorskip("ray")
    token = {"RAY_AUTH_MODE": "token"}
    gone = the(check_ray(cluster(kind="ray", address="127.0.0.1:1", environment=token)), "cluster")
    assert (gone.state, "127.0.0.1:1" in gone.found) == ("failure", True)
    program = (
        "import ray, sys\ncontext = ray.init(num_cpus=1, include_dashboard=False)\n"
        "print(context.address_info['gcs_address'], flush=True)\nsys.stdin.read()\nray.shutdown()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, **token}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as ray:  # fmt: skip
        assert ray.stdout
        address = ray.stdout.readline().strip()
        found = the(check_ray(cluster(kind="ray", address=address, environment=token)), "cluster")
        ray.communicate("")
    assert found.state == "ok", found
    assert address in found.found


# The command


@pytest.fixture
def command(monkeypatch):
    """The command line, as `grasp-dist doctor`."""
    app = typer.Typer()
    app.command()(doctor_command)
    return lambda *words, **settings: CliRunner().invoke(app, list(words), obj=settings, terminal_width=200)


@pytest.mark.slow
def test_the_command_ends_with_code_2_if_anything_fails(command, run, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    well = command(str(config), "--cluster", "local")
    assert well.exit_code == 0, well.output
    assert "0 failure(s)" in well.output
    assert "run_dir" in well.output
    ill = command(str(config), "--cluster", "local", run_dir=f"{NOWHERE}/run")
    assert ill.exit_code == 2
    assert "-> choose another run_dir" in ill.output
    assert "1 failure(s)" in ill.output


def test_settings_without_what_they_belong_to_are_refused(command):
    assert "--cluster NAME" in str(command(cluster={"partition": "x"}).exception)
    assert "CONFIG" in str(command(project={"rank": 2}).exception)
    assert "slurm-cpu" in str(command("--cluster", "nope").exception)


@pytest.mark.slow
def test_without_anything_it_looks_at_this_machine(tmp_path, monkeypatch):
    seen: list[Check] = []
    found = doctor(say=seen.append)
    assert seen == found
    assert {check.group for check in found} == {"software", "processes"}
    assert json.dumps([check.__dict__ for check in found])
