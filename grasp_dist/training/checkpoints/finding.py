"""What a path means: one checkpoint, a folder of them, a training task, or a run with several. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grasp_dist.errors import InputError
from grasp_dist.manifest import MANIFEST, digest, quick_hash
from grasp_dist.training.checkpoints.store import MARKER, Checkpoints, verify

__all__ = ["checkpoint_roots", "is_checkpoint", "newest_state", "run_above", "run_directory"]

_NAME = "checkpoints"
_RESULTS = {"adapter": "lora", "model": "full"}
"""What a finished task leaves, and the method that leaves it."""
_DEPTH = 3
"""How far below a run directory its tasks are (project/<arm>/seed-<n>)."""


def is_checkpoint(path: Path) -> bool:
    """Whether the path is one checkpoint's folder, finished or not, under whatever name it was copied to."""
    path = path.absolute()
    return (path / MARKER).exists() or any(folder == path for _, folder in Checkpoints(path.parent).folders())


def checkpoint_roots(path: Path) -> list[Path]:
    """The checkpoints folders that a path means, by name; none for the folder of a single checkpoint.

    What a changed configuration has set aside (`seed-0.old-1`) is passed over, unless the path leads there. Raises
    `InputError` if there is none.
    """
    if is_checkpoint(path):
        return []
    if Checkpoints(path).folders():
        return [path]
    roots = [task / _NAME for task in _tasks(path) if Checkpoints(task / _NAME).folders()]
    if not roots:
        result = _finished(path)
        hint = f"{result[0]} is its finished result, and ready for use" if result else "give a run directory, or a task"
        raise InputError(f"there are no checkpoints under {path}; {hint}")
    return roots


def newest_state(
    path: str | Path, say: Callable[[str], None] = print, check: Callable[[Path], dict[str, Any]] = verify
) -> tuple[Path, dict[str, Any]]:
    """The folder and record of what training came to last: the checkpoint that the path is, the newest valid one in a
    checkpoints folder; and of a task (or a run with one task) its result if it is finished, else its newest valid
    checkpoint.

    say: is told which was chosen and what was passed over. check(folder): a checkpoint's record, or an `InputError`; by
    default it compares all files with their checksums. A finished result is an `adapter` or `model` folder, and its
    record, with what is known of it, says so: "finished". Raises `InputError` if there is nothing valid, and for a run
    with several tasks, which it lists.
    """
    path = Path(path)
    if is_checkpoint(path):
        return path, check(path)
    if path.name in _RESULTS and (result := _finished(path.parent)) and result[0] == path:
        return result
    if Checkpoints(path).folders():
        root = path
    else:
        tasks = [task for task in _tasks(path) if Checkpoints(task / _NAME).folders() or _finished(task)]
        if len(tasks) != 1:
            choices = "".join(f"\n  {task}  ({_describe(task)})" for task in tasks)
            raise InputError(
                f"{path} holds {len(tasks)} training tasks; give one of them:{choices}"
                if tasks
                else f"there is no checkpoint and no finished result under {path}; give a run directory, or a task"
            )
        if result := _finished(tasks[0]):
            say(f"finished result: {result[0]}")
            return result
        root = tasks[0] / _NAME
    for _, folder in Checkpoints(root).folders():
        try:
            record = check(folder)
        except InputError as error:
            say(f"passed over: {error}")
        else:
            say(f"checkpoint: {folder}")
            return folder, record
    raise InputError(f"none of the checkpoints in {root} is valid; what is wrong with each stands above")


def run_above(folder: Path) -> Path | None:
    """The run directory that a task's folder, or one in it, stands in; None if it is no run's."""
    above = list(folder.absolute().parents)[: _DEPTH + 2]
    return next((folder for folder in above if (folder / "config.yaml").is_file()), None)


def run_directory(folder: Path, record: dict[str, Any]) -> Path | None:
    """The run in which a checkpoint or result stands where its record says; None for one that was copied elsewhere."""
    run, task = run_above(folder), record.get("task")
    return run if run is not None and task and (run / task) in folder.absolute().parents else None


def _tasks(path: Path) -> Iterator[Path]:
    """The path and the folders below it, by name, that may be a task's."""
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a run directory, or a checkpoint in one")
    for folder, below, _ in os.walk(path):
        depth = len(Path(folder).relative_to(path).parts)
        skipped = {_NAME, *_RESULTS}
        below[:] = sorted(
            name
            for name in below
            if depth < _DEPTH and name not in skipped and ".old-" not in name and not name.startswith(".")
        )
        yield Path(folder)


def _describe(task: Path) -> str:
    return "finished" if _finished(task) else f"newest checkpoint: step {Checkpoints(task / _NAME).folders()[0][0]}"


def _finished(task: Path) -> tuple[Path, dict[str, Any]] | None:
    """A finished task's adapter or model, and a record of it like a checkpoint's; None if it is not finished.

    Raises `InputError` if the folder is not as the task left it.
    """
    manifest = _json(task / MANIFEST)
    name = next((name for name in _RESULTS if name in (manifest.get("outputs") or {})), None)
    if manifest.get("status") != "finished" or name is None or not (task / name).is_dir():
        return None
    folder, metrics, inputs = task / name, manifest.get("metrics") or {}, manifest.get("inputs") or {}
    if _tree_hash(folder) != manifest["outputs"][name]:
        raise InputError(
            f"{folder} is not as the finished training left it; export one of its checkpoints, or run the stage again"
        )
    run = run_above(task)
    adapter = _json(folder / "adapter_config.json") if name == "adapter" else None
    return folder, {
        "finished": True,
        "task": None if run is None else str(task.absolute().relative_to(run)),
        "step": metrics.get("steps"),
        "method": _RESULTS[name],
        "adapter_config": adapter,
        "base_model": manifest.get("base_model"),
        "basis": inputs.get("basis"),
        "config": digest(inputs),
        "world_size": manifest.get("world_size"),
        "versions": manifest.get("versions") or {},
        "extra": {"losses": [metrics.get("final_loss")]},
    }


def _tree_hash(folder: Path) -> str:
    return digest(
        {str(path.relative_to(folder)): quick_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
