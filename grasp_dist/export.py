"""A checkpoint as what others load: a PEFT adapter directory, or an ordinary model directory.

    LoRA            adapter_model.safetensors, adapter_config.json       PeftModel.from_pretrained(base, folder)
    LoRA, merged    the base's files, with W + s B A for each adapted W  AutoModelForCausalLM.from_pretrained(folder)
    full            the base's files, with the trained weights           AutoModelForCausalLM.from_pretrained(folder)

Weights are read, computed and written in blocks of rows, so that memory does not grow with the model. What was not
trained is copied byte by byte, under the names that the base's files have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grasp_dist.baselines.steering import STEERING
from grasp_dist.config import ModelConfig
from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.export_parts import Trained, adapter_parts, kept_parts, model_parts
from grasp_dist.fingerprints import model_fingerprint
from grasp_dist.manifest import write_json
from grasp_dist.model_card import model_card, run_figures
from grasp_dist.tensor_writer import Part, write_tensors
from grasp_dist.training.checkpoints.finding import newest_state, run_directory
from grasp_dist.training.checkpoints.reader import AdapterTensors, Shards
from grasp_dist.training.checkpoints.store import verify
from grasp_dist.training.files import replace_folder
from grasp_dist.training.parallel import Parallel

__all__ = ["export_checkpoint"]

_RECORD = "export.json"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FILE_BYTES = 2 * 2**30
# Of a base's folder: settings, tokenizer, code and terms of use. Weights and their index are written anew.
_COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_NOT_COPIED = ("adapter_config.json", "manifest.json", "trainer_state.json", _RECORD)

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given the number of bytes that will be written: what is called with each n more that were."""


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    base: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
    check: Callable[[Path], dict[str, Any]] = verify,
    progress: Progress = lambda num_bytes: nullcontext(lambda done: None),
) -> Path:
    """Write the model of a checkpoint to the new folder `out`, which appears when it is whole; returns it.

    checkpoint: a step's folder, or a checkpoints folder for the newest valid one; or a task's folder (or a run
    directory with one task), for its result if it is finished, and else its newest valid checkpoint.
    merge: of a LoRA run, the whole model instead of the adapter. base: the base model's directory, where it is not at
    the place that the checkpoint names. dtype: "bf16" or "fp32", of all floating-point weights; default: the base's own
    (an adapter's: as trained). overwrite: replace an earlier export. trust_remote_code: run Python code that comes with
    the base. say, check: as for `newest_state`.
    Raises `InputError` for a checkpoint that is not valid, a base that is not the one that was fine-tuned, weights that
    cannot be merged, and a folder that is taken or cannot be written.
    """
    if dtype not in (None, *_DTYPES):
        raise InputError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    out, target = Path(out), _DTYPES[dtype] if dtype else None
    folder, record = newest_state(checkpoint, say, check)
    method, reference = record.get("method"), record.get("base_model") or {}
    if method not in ("lora", "full"):
        raise InputError(f"{folder} does not say what was trained; only checkpoints of grasp-dist's runs are exported")
    if (folder / STEERING).exists():
        raise InputError(
            f"{folder} is a naive adapter that is steered when it is used: no file of weights can say so. Export the "
            f"naive fine-tune, and subtract what {STEERING} holds behind its layer"
        )
    if merge and method == "full":
        raise InputError(f"{folder} is of full fine-tuning: there is no adapter to merge; leave --merge out")
    _check_out(out, folder, overwrite)
    run = run_directory(folder, record)
    if method == "full" and record.get("finished"):
        parts = kept_parts(folder, target)
        content = _Content(parts, "model", _FILE_BYTES, lambda new: _copy_files(folder, new, target))
    else:
        trained = AdapterTensors(folder, record) if record.get("finished") else Shards(folder, check=False)
        if method == "lora" and not merge:
            source = _base_folder(reference, base, folder) if base is not None else None
            content = _adapter(trained, source, target)
        else:
            source = _base_folder(reference, base, folder)
            content = _model(trained, source, target, run, trust_remote_code)
    total = sum(part.num_bytes for part in content.parts)
    _check_space(out, total)
    card = model_card(record, run_figures(run, record), merged=merge, dtype=dtype)

    def write(new: Path) -> None:
        content.write_files(new)
        (new / "README.md").write_text(card, encoding="utf-8")
        with progress(total) as advance:
            write_tensors(new, content.parts, stem=content.stem, file_bytes=content.file_bytes, advance=advance)
        files = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        what = {key: record.get(key) for key in ("task", "step", "method", "basis", "config")}
        write_json(new / _RECORD, {"format": 1, **what, "merged": merge, "dtype": dtype, "files": [*files, _RECORD]})

    with replace_folder(out, Parallel("none", 0, 1, torch.device("cpu"))) as writer:
        writer.write(write)
    return out


@dataclass(frozen=True)
class _Content:
    """What an export holds beside the model card and the record."""

    parts: list[Part]
    stem: str
    file_bytes: int | None
    write_files: Callable[[Path], None]


def _adapter(trained: Trained, base: Path | None, target: torch.dtype | None) -> _Content:
    parts, config = adapter_parts(trained, target)
    if base is not None:
        config |= {"base_model_name_or_path": str(base.resolve()), "revision": None}

    def write_files(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    return _Content(parts, "adapter_model", None, write_files)


def _model(
    trained: Trained, base: Path, target: torch.dtype | None, run: Path | None, trust_remote_code: bool
) -> _Content:
    from grasp_dist.training.model import load_tokenizer, meta_model

    skeleton = meta_model(ModelConfig(path=str(base), trust_remote_code=trust_remote_code))
    parts = model_parts(trained, skeleton, base, target)
    tokenizer = None
    if run is not None and (configured := load_config(run / "config.yaml").model).tokenizer:
        tokenizer = load_tokenizer(configured)

    def write_files(folder: Path) -> None:
        _copy_files(base, folder, target)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    return _Content(parts, "model", _FILE_BYTES, write_files)


def _base_folder(reference: dict[str, Any], base: str | Path | None, checkpoint: Path) -> Path:
    """The directory of the base model: the one that was given, or what the checkpoint names; checked to be the model
    that was fine-tuned, as far as the checkpoint knows its content."""
    from grasp_dist.training.model import model_folder

    name, remedy = reference.get("id"), "give the directory of the model that was fine-tuned with --base"
    if base is not None:
        folder = Path(base).expanduser()
        if not folder.is_dir():
            raise InputError(f"--base {base} is no directory; {remedy}")
    elif name is None:
        raise InputError(f"{checkpoint} does not say which base model it belongs to; {remedy}")
    elif reference.get("hash") is not None and not Path(name).is_dir():
        raise InputError(f"the base model {name}, which {checkpoint} names, is not there any more; {remedy}")
    else:
        folder = model_folder(ModelConfig(path=name, revision=reference.get("revision")))
    if reference.get("hash") not in (None, model_fingerprint(folder)):
        raise InputError(f"the model in {folder} is not the one that was fine-tuned, or has changed since; {remedy}")
    return folder


def _check_out(out: Path, checkpoint: Path, overwrite: bool) -> None:
    place = out.resolve()
    if checkpoint.resolve() in (place, *place.parents) or place.parent.name == "checkpoints":
        raise InputError(f"--out {out} is among checkpoints, which are training's own folders; choose another place")
    if out.is_file():
        raise InputError(f"--out {out} is a file; give a new folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        own = set(json.loads((out / _RECORD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--out {out} holds files already, and is no earlier export; choose a new folder") from None
    if not overwrite:
        raise InputError(f"--out {out} is an earlier export; choose a new folder, or replace it with --overwrite")
    others = sorted(
        name for path in out.rglob("*") if path.is_file() and (name := str(path.relative_to(out))) not in own
    )
    if others:
        raise InputError(
            f"--out {out} is an earlier export, but {others[0]} was put there since, and --overwrite would remove it; "
            "move it, or choose a new folder"
        )


def _check_space(out: Path, num_bytes: int) -> None:
    there = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise InputError(
            f"the export needs {num_bytes / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free; free some space or "
            "choose another --out"
        )


def _copy_files(base: Path, folder: Path, target: torch.dtype | None) -> None:
    for path in sorted(base.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES or path.name.startswith(_COPIED_NAMES)
        if path.is_file() and wanted and path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if (base / "additional_chat_templates").is_dir():
        shutil.copytree(base / "additional_chat_templates", folder / "additional_chat_templates")
    if target is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Transformers renamed the key, and reads the weights in the dtype that it gives.
        config |= {key: str(target).removeprefix("torch.") for key in {"dtype"} | ({"torch_dtype"} & config.keys())}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
