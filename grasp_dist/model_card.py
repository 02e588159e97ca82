"""The README.md of an exported model: what it is, how it was made, and what it was measured at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from grasp_dist.manifest import MANIFEST, digest

__all__ = ["model_card", "run_figures"]

_TEMPLATE = """\
---
{{ front }}---

# {{ title }}

{{ summary }}

| | |
| --- | --- |
{% for name, value in rows %}| {{ name }} | {{ value }} |
{% endfor %}
## Measured

{% if scores %}| probe | wanted | base | this model |
| --- | --- | --- | --- |
{% for row in scores %}| {{ row.name }} ({{ row.kind }}) | {{ row.wanted }} | {{ row.base }} | {{ row.value }} |
{% endfor %}
{{ scored }}
{% else %}{{ scored }}
{% endif %}
## Use

```python
{{ code }}
```
"""
_WANTED = {"task": "as in the naive fine-tune", "drift": "as in the base", "retention": "as in the base"}
_ADAPTER_CODE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "path/of/this/folder")"""
_MODEL_CODE = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")"""


def model_card(record: dict[str, Any], figures: dict[str, Any], *, merged: bool, dtype: str | None) -> str:
    """Markdown with front matter. record: the checkpoint's. figures: from `run_figures`. merged: whether a LoRA update
    was added to the base's weights. dtype: what they were cast to.

    Of a base that is a local directory only its own name is given away.
    """
    lora, adapter = record["method"] == "lora", record["method"] == "lora" and not merged
    reference = record.get("base_model") or {}
    shown = reference.get("id") or "the base model"
    if reference.get("hash") is not None or Path(shown).is_absolute() or Path(shown).is_dir():
        shown = Path(shown).name
    front = {
        "base_model": shown,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grasp-dist", *(["grasp"] if record.get("basis") else []), *(["lora"] if lora else [])],
    }
    task = record.get("task")
    blocked = (
        "Directions were blocked while it was trained: gradients were projected off the basis named below, and what "
        "the base model has along it was kept (GRASP)."
        if record.get("basis")
        else "No directions were blocked while it was trained."
    )
    what = f"A {'LoRA adapter for' if adapter else 'fine-tune of'} `{shown}`, made with grasp-dist."
    return (
        Environment(keep_trailing_newline=True, autoescape=False)
        .from_string(_TEMPLATE)
        .render(
            front=yaml.safe_dump(front, sort_keys=False),
            title=f"{shown}: {task or 'fine-tune'}, step {record['step']}",
            summary=f"{what} {blocked}",
            rows=_rows(record, figures, merged, dtype),
            scores=figures["scores"],
            scored=figures["scored"],
            code=_ADAPTER_CODE.format(base=shown) if adapter else _MODEL_CODE,
        )
    )


def run_figures(run: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """{"residual": float or None, "scores": rows of a table, "scored": a sentence} of just this record's model.

    Both are measured on a run's finished model, and are given only for that one: of the same step and settings, and
    scores only of the same weights. run: the run directory; None if there is none.
    """
    nothing: dict[str, Any] = {"residual": None, "scores": []}
    task = record.get("task")
    if run is None or not task or not (run / task).is_dir():
        return nothing | {"scored": "The checkpoint stood in no run directory, so there are no scores with it."}
    manifest = _json(run / task / MANIFEST)
    metrics = manifest.get("metrics") or {}
    same = manifest.get("status") == "finished" and digest(manifest.get("inputs")) == record.get("config")
    if not same or "/" not in task or metrics.get("steps") != record["step"]:
        return nothing | {"scored": "Not measured: this checkpoint is of a run before its end, or of other settings."}
    found = nothing | {"residual": metrics.get("residual")}
    scores = _json(run / "evaluate" / "scores.json")
    *_, model, seed = Path(task).parts
    number = int(seed.removeprefix("seed-")) if seed.startswith("seed-") else None
    measured = _json(run / "evaluate" / model / seed / MANIFEST).get("inputs") or {}
    rows = {(row.get("model"), row.get("seed")): row for row in scores.get("models") or []}
    own, base = rows.get((model, number)), rows.get(("base", None)) or {}
    if own is None or measured.get("weights") not in (manifest.get("outputs") or {}).values():
        return found | {"scored": "Not measured: `grasp-dist evaluate` has not run on this model."}
    table = [
        {
            "name": probe["name"],
            "kind": probe["kind"],
            "wanted": _WANTED.get(probe["role"], probe["role"]),
            "value": _number(own["probes"].get(probe["name"], {}).get("value")),
            "base": _number((base.get("probes") or {}).get(probe["name"], {}).get("value")),
        }
        for probe in scores["probes"]
    ]
    return found | {
        "scores": table,
        "scored": "By `grasp-dist evaluate`, before the export. completion: mean probability of the reference answers; "
        "pair: difference of mean log-probabilities in nats; loss and kl: nats per token.",
    }


def _rows(record: dict[str, Any], figures: dict[str, Any], merged: bool, dtype: str | None) -> list[tuple[str, str]]:
    extra, config = record.get("extra") or {}, record.get("adapter_config")
    method = "all chosen weights"
    if config:
        method = f"LoRA, rank {config['r']}, alpha {config['lora_alpha']}" + (
            ", merged into the base" if merged else ""
        )
    losses = [loss for loss in extra.get("losses") or [] if loss is not None]
    residual, engine = figures["residual"], record.get("strategy")
    rows = {
        "method": method,
        "steps": str(record["step"]),
        "tokens": str(extra["tokens"]) if extra.get("tokens") else None,
        "training loss of the last step": _number(losses[-1]) if losses else None,
        "residual": None if residual is None else f"{residual:.2e} (weights as trained; a cast rounds it)",
        "basis": record.get("basis") and f"`{record['basis']}`",
        "configuration": record.get("config") and f"`{record['config']}` (sha256 of the task's inputs)",
        "cast to": dtype,
        "trained on": f"{record['world_size']} process(es)" + (f", {engine}" if engine else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
    }
    return [(name, value) for name, value in rows.items() if value]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
