"""What importing the package costs, and which way its rooms may look."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grasp_dist"
HEAVY = ("deepspeed", "ray", "submitit", "transformers", "peft", "datasets", "matplotlib")


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_is_light():
    assert not loaded_by("import grasp_dist") & {*HEAVY, "torch"}
    assert not loaded_by("import grasp_dist.cli, grasp_dist.graph, grasp_dist.manifest") & {*HEAVY, "torch"}


def test_the_projector_needs_torch_and_safetensors_only():
    assert not loaded_by("from grasp_dist import GraspProjector, SpuriousBasis") & set(HEAVY)


@pytest.mark.parametrize("name", ["GraspProjector", "InputError", "SpuriousBasis", "detect_basis"])
def test_public_names(name):
    import grasp_dist

    assert getattr(grasp_dist, name).__name__ == name
    assert name in dir(grasp_dist)


def test_every_folder_is_installed():
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    folders = [path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")]
    names = [".".join(folder.parts) for folder in folders]
    assert [name for name in names if f'"{name}",' not in text] == []


# A room may import from those after it.
ORDER = [
    "cli",
    "worker",
    "stages",
    "tasks",
    "preflight",
    "evaluation",
    "baselines",
    "detection",
    "training",
    "projection",
    "basis",
]


def test_dependencies_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ORDER:
            continue
        earlier = ORDER[: ORDER.index(room)]
        text = path.read_text()
        for other in earlier:
            assert f"from grasp_dist.{other}" not in text, f"{path.name} of {room} imports {other}"
