"""The metrics of training in Weights & Biases or trackio too, when asked. Both have one API."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from grasp_dist.config import RunConfig, TrackConfig
from grasp_dist.errors import InputError

__all__ = ["Tracker", "check_tracker"]


def check_tracker(settings: TrackConfig) -> None:
    """Raise `InputError` where the package is missing."""
    if importlib.util.find_spec(settings.to) is None:
        raise InputError(f"track.to: {settings.to} is not installed; pip install {settings.to}")


class Tracker:
    """One fine-tune there, named after the run's folder and the task; a continued one goes on.

    made_from: a digest of what it is made from. One that is made anew from something else is another one there: their
    steps begin at 1 again, which the services do not take.

    The service is a picture of what metrics.jsonl holds: one that fails in mid-run is left, with a line that says so,
    and training goes on. One that cannot be reached at the start raises `InputError`, since somebody has asked for it.
    """

    def __init__(self, config: RunConfig, title: str, *, made_from: str) -> None:
        self._config, self._title, self._made_from = config, title, made_from
        self._run: Any = None

    def begin(self) -> None:
        """Open it. Safe to call twice."""
        settings, folder = self._config.track, Path(self._config.run_dir).absolute()
        if settings is None or self._run is not None:
            return
        check_tracker(settings)
        service = importlib.import_module(settings.to)
        known_by = hashlib.sha256(f"{folder}\n{self._title}\n{self._made_from}".encode()).hexdigest()[:24]
        named: dict[str, Any] = {
            "project": settings.project,
            "name": f"{folder.name}/{self._title} {known_by[:6]}",
            "group": folder.name,
            "config": self._config.model_dump(mode="json", exclude={"variables", "track"}),
            "resume": "allow",
        }
        if settings.to == "wandb":
            named |= {"id": known_by, "dir": str(folder), "settings": service.Settings(silent=True, console="off")}
        else:
            named |= {"embed": False}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._run = service.init(**named)
        except Exception as error:  # of the service's own classes
            raise InputError(f"track: {settings.to} does not start: {error}") from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A step of the fine-tune, counted from 1."""
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics), step=step)
        except Exception as error:
            print(f"{self._title}  no longer tracked: {error}", flush=True)
            self._run = None

    def close(self) -> None:
        """Hand over what is left. Safe to call twice."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run.finish()
        except Exception as error:
            print(f"{self._title}  tracked without its end: {error}", flush=True)
