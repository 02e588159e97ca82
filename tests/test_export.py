"""Exported models are those that were trained: read by the libraries that users load them with, and held against PEFT's
own arithmetic and files. What is not whole, or not of this base, is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_dist import export as export_module
from grasp_dist import export_parts
from grasp_dist.errors import InputError
from grasp_dist.export import export_checkpoint
from grasp_dist.fingerprints import tensor_shapes
from grasp_dist.tensor_writer import Part, as_bytes, write_tensors
from grasp_dist.training.checkpoints.reader import Shards
from grasp_dist.training.checkpoints.store import remove
from grasp_dist.training.lora import save_adapter
from tests.export_cases import ALONE, auto, cut, full_checkpoint, logits, lora_state, peft, record_of, write_step
from tests.tiny_models import tiny_model
from tests.training.training_cases import save_mixtral, save_tiny, word_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def lora(llama, tmp_path):
    """The PEFT model that was trained on llama, and its checkpoint."""
    model, factors, settings = lora_state(llama)
    return model, lora_checkpoint(tmp_path / "checkpoints", factors, settings)


def lora_checkpoint(root: Path, factors: dict[str, Tensor], settings: dict) -> Path:
    tensors = {f"model.{name}": value for name, value in factors.items()}
    moments = {f"optimizer.exp_avg.{name}": torch.zeros_like(value) for name, value in factors.items()}
    return write_step(root, record_of(tensors | moments, **settings), cut(tensors | moments, 3))


# -- LoRA


def test_an_adapter_is_what_the_run_itself_would_save(lora, llama, tmp_path):
    model, step = lora
    out = export_checkpoint(step, tmp_path / "out")
    save_adapter(model, tmp_path / "own", ALONE)
    ours, own = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "own"))
    assert ours.keys() == own.keys()
    assert all(torch.equal(ours[name].view(torch.int32), own[name].view(torch.int32)) for name in own)
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (out, tmp_path / "own")]
    for config in settings:
        config["target_modules"] = sorted(config["target_modules"])
    assert settings[0] == settings[1]
    found = logits(peft(llama, out))
    assert torch.equal(found, logits(model))
    assert (found - logits(auto(llama))).abs().max() > 0.1


def test_an_adapter_in_bf16(lora, llama, tmp_path):
    model, step = lora
    out = export_checkpoint(step, tmp_path / "out", dtype="bf16")
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (logits(peft(llama, out)) - logits(model)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("llama", {"rslora": True}), ("gpt2", {}), ("phi3", {"modules": "all"}), ("gpt_neox", {})],
)
def test_merged_weights_are_those_of_peft(architecture, options, tmp_path, monkeypatch):
    monkeypatch.setattr(export_parts, "_BLOCK", 1000)  # several blocks per weight, the last of them short
    base = save_tiny(tmp_path / "base", architecture)
    model, factors, settings = lora_state(base, **options)
    step = lora_checkpoint(tmp_path / "checkpoints", factors, settings)
    merged = auto(export_checkpoint(step, tmp_path / "out", merge=True))
    expected = model.merge_and_unload()
    for name, value in expected.state_dict().items():
        assert (merged.state_dict()[name] - value).abs().max() <= 1e-5, name
    assert (logits(merged) - logits(expected)).abs().max() <= 1e-5
    assert (logits(merged) - logits(auto(base))).abs().max() > 0.1


def test_only_the_adapted_weights_change_and_the_rest_is_copied(lora, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_FILE_BYTES", 20_000)
    out = export_checkpoint(lora[1], tmp_path / "out", merge=True)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert all((out / name).stat().st_size < 22_000 for name in files)
    ours = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    base = load_file(llama / "model.safetensors")
    assert index["weight_map"].keys() == ours.keys() == base.keys()
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in base if "o_proj" in name or "down_proj" in name}
    assert (out / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert (logits(auto(out)) - logits(lora[0])).abs().max() <= 1e-5


def test_a_bf16_base_stays_bf16_unless_told_otherwise(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    model, factors, settings = lora_state(tmp_path / "base")
    step = lora_checkpoint(tmp_path / "checkpoints", factors, settings)
    exact = model.merge_and_unload().state_dict()
    own = export_checkpoint(step, tmp_path / "own", merge=True)
    wide = export_checkpoint(step, tmp_path / "wide", merge=True, dtype="fp32")
    for name, tensor in load_file(own / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16()), name
    for name, tensor in load_file(wide / "model.safetensors").items():
        assert (tensor - exact[name]).abs().max() <= 1e-6, name
    assert auto(own).dtype == torch.bfloat16
    assert auto(wide).dtype == torch.float32


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    tiny_model("llama").half().save_pretrained(tmp_path / "base")
    _, factors, settings = lora_state(tmp_path / "base")
    step = lora_checkpoint(tmp_path / "checkpoints", {name: value * 1e4 for name, value in factors.items()}, settings)
    with pytest.raises(InputError, match=r"not finite in torch\.float16.*--dtype bf16"):
        export_checkpoint(step, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
    export_checkpoint(step, tmp_path / "out", merge=True, dtype="bf16")


def test_an_adapted_head_that_is_tied_is_not_merged(tmp_path):
    base = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    model, factors, settings = lora_state(base, ["lm_head", "o_proj"])
    step = lora_checkpoint(tmp_path / "checkpoints", factors, settings)
    with pytest.raises(InputError, match=r"'lm_head\.weight', which is tied to 'model\.embed_tokens\.weight'"):
        export_checkpoint(step, tmp_path / "out", merge=True)
    assert torch.equal(logits(peft(base, export_checkpoint(step, tmp_path / "out"))), logits(model))


def test_experts_are_kept_and_attention_is_merged(tmp_path):
    base = save_mixtral(tmp_path / "base")
    model, factors, settings = lora_state(base, ["o_proj"])
    step = lora_checkpoint(tmp_path / "checkpoints", factors, settings)
    out = export_checkpoint(step, tmp_path / "out", merge=True)
    assert tensor_shapes(out) == tensor_shapes(base)
    assert (logits(auto(out)) - logits(model)).abs().max() <= 1e-5


def test_an_adapter_on_weights_that_are_computed_on_loading_is_not_merged(tmp_path):
    """HRM keeps gate and up in one tensor of its files, and in two modules."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8, "vocab_size": 32}
    config = AutoConfig.for_model("hrm_text", num_hidden_layers=2, num_layers_per_stack=1, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    _, factors, record = lora_state(tmp_path / "base", ["gate_proj"])
    step = lora_checkpoint(tmp_path / "checkpoints", factors, record)
    with pytest.raises(InputError, match=r"computes '.*gate_proj\.weight' from several weights.*Leave --merge out"):
        export_checkpoint(step, tmp_path / "out", merge=True)
    assert (export_checkpoint(step, tmp_path / "out") / "adapter_model.safetensors").is_file()


# -- full fine-tuning


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)])
def test_full_fine_tuning(architecture, tied, tmp_path):
    """Embeddings (tied to the head or not), a matrix and a bias or norm are trained; the rest is the base's."""
    base = save_tiny(tmp_path / "base", architecture, tie_word_embeddings=tied)
    model = auto(base)
    names = [name for name, _ in model.named_parameters()]
    chosen = [names[0], names[3], next(name for name in names if "ln_" in name or "norm" in name)]
    generator = torch.Generator().manual_seed(3)
    trained = {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in chosen}
    out = export_checkpoint(full_checkpoint(tmp_path / "checkpoints", base, trained), tmp_path / "out")
    with torch.no_grad():
        for name, value in trained.items():
            model.get_parameter(name).copy_(value)
    found = auto(out).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert tensor_shapes(out) == tensor_shapes(base)
    assert torch.equal(logits(auto(out)), logits(model))


def test_tied_weights_under_both_names_change_together(tmp_path):
    base = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, base / "model.safetensors", {"format": "pt"})
    trained = {"model.embed_tokens.weight": embeddings + 1}
    out = export_checkpoint(full_checkpoint(tmp_path / "checkpoints", base, trained), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], embeddings + 1)
    assert torch.equal(found["model.embed_tokens.weight"], embeddings + 1)


def test_full_fine_tuning_of_experts_that_are_fused_on_loading(tmp_path):
    base = save_mixtral(tmp_path / "base")
    model = auto(base)
    generator = torch.Generator().manual_seed(3)
    chosen = [name for name, _ in model.named_parameters() if ".experts." in name and ".0." in name] + [
        "lm_head.weight"
    ]
    assert len(chosen) == 3
    trained = {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in chosen}
    out = export_checkpoint(full_checkpoint(tmp_path / "checkpoints", base, trained), tmp_path / "out")
    assert tensor_shapes(out) == tensor_shapes(base)
    found = auto(out)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), trained.get(name, parameter)), name


def test_names_without_the_prefix_of_the_causal_lm(tmp_path):
    """Old GPT-2 files call a weight h.0..., and the model transformer.h.0...; the export keeps the file's names."""
    base = save_tiny(tmp_path / "base", "gpt2")
    tensors = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    model, factors, settings = lora_state(base)
    step = lora_checkpoint(tmp_path / "checkpoints", factors, settings)
    out = export_checkpoint(step, tmp_path / "out", merge=True)
    assert tensor_shapes(out).keys() == renamed.keys()
    assert (logits(auto(out)) - logits(model)).abs().max() <= 1e-5


def test_tokenizer_settings_and_terms_come_along(tmp_path):
    base = save_tiny(tmp_path / "base")
    word_tokenizer().save_pretrained(base)
    (base / "LICENSE").write_text("terms")
    (base / "adapter_config.json").write_text("{}")
    (base / "README.md").write_text("the base's")
    trained = {"model.norm.weight": torch.ones(24)}
    out = export_checkpoint(full_checkpoint(tmp_path / "checkpoints", base, trained), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "adapter_config.json").exists()
    assert "the base's" not in (out / "README.md").read_text()


def test_files_of_mixed_dtypes_are_read_by_safetensors(tmp_path):
    """Numbers stand where their size lets them be looked at in place; more bytes than a file may have are split."""
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5),
        "c": torch.ones((), dtype=torch.bfloat16),
        "d": torch.empty(0, 4),
        "e": torch.randn(2, 3, dtype=torch.float64),
    }
    names = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}
    parts = [
        Part(name, names[value.dtype], tuple(value.shape), lambda value=value: [as_bytes(value)])
        for name, value in tensors.items()
    ]
    (file,) = write_tensors(tmp_path, parts)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    assert all(found[name].data_ptr() % found[name].element_size() == 0 for name in tensors)
    files = write_tensors(tmp_path, parts, stem="split", file_bytes=30)
    assert [path.name for path in files] == [
        *(f"split-{number:05d}-of-00002.safetensors" for number in (1, 2)),
        "split.safetensors.index.json",
    ]
    assert json.loads(files[-1].read_text())["metadata"]["total_size"] == 3 + 20 + 2 + 48


# -- which base


def test_a_base_that_is_not_the_one_is_refused(lora, llama, tmp_path):
    step = lora[1]
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the one that was fine-tuned"):
        export_checkpoint(step, tmp_path / "out", merge=True, base=other)
    with pytest.raises(InputError, match="not the one that was fine-tuned"):
        export_checkpoint(step, tmp_path / "out", base=other)
    moved = shutil.copytree(llama, tmp_path / "moved")
    out = export_checkpoint(step, tmp_path / "out", base=moved)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    with pytest.raises(InputError, match="no directory"):
        export_checkpoint(step, tmp_path / "out2", base=tmp_path / "nowhere")


def test_a_base_that_is_gone_is_named(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    _, factors, settings = lora_state(base)
    step = lora_checkpoint(tmp_path / "checkpoints", factors, settings)
    shutil.rmtree(base)
    with pytest.raises(InputError, match=r"is not there any more.*--base"):
        export_checkpoint(step, tmp_path / "out", merge=True)
    assert (export_checkpoint(step, tmp_path / "out") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("other", ["wider", "shallower", "another architecture"])
def test_a_base_of_another_shape_is_refused(other, llama, tmp_path):
    """Of a hub model no hash is known; its weights have to fit."""
    _, factors, settings = lora_state(llama)
    settings["base_model"] = {"id": "somebody/model", "revision": None, "hash": None}
    step = lora_checkpoint(tmp_path / "checkpoints", factors, settings)
    base = {
        "wider": lambda: save_tiny(tmp_path / "base", hidden_size=32),
        "shallower": lambda: save_tiny(tmp_path / "base", num_hidden_layers=1),
        "another architecture": lambda: save_tiny(tmp_path / "base", "gpt2"),
    }[other]()
    with pytest.raises(InputError, match="--base"):
        export_checkpoint(step, tmp_path / "out", merge=True, base=base)
    assert not (tmp_path / "out").exists()
    export_checkpoint(step, tmp_path / "right", merge=True, base=llama)


# -- where it goes


def test_a_taken_folder_is_left_alone(lora, tmp_path):
    step = lora[1]
    taken = tmp_path / "taken"
    taken.mkdir()
    export_checkpoint(step, taken)  # empty
    with pytest.raises(InputError, match="--overwrite"):
        export_checkpoint(step, taken)
    export_checkpoint(step, taken, overwrite=True, dtype="bf16")
    assert load_file(taken / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        export_checkpoint(step, taken, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no earlier export"):
        export_checkpoint(step, other, overwrite=True)
    assert (other / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="among checkpoints"):
        export_checkpoint(step, step / "out")
    Shards(step)


def test_what_fails_leaves_nothing_behind(lora, llama, tmp_path, monkeypatch):
    """The disk fills up in the middle of the weights."""
    earlier = export_checkpoint(lora[1], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}

    def full(*args, **settings):
        (args[0] / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_tensors", full)
    with pytest.raises(InputError, match="the disk is full"):
        export_checkpoint(lora[1], tmp_path / "out", merge=True, overwrite=True)
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_merging_full_fine_tuning_and_checkpoints_of_others(llama, tmp_path):
    step = full_checkpoint(tmp_path / "a", llama, {"model.norm.weight": torch.ones(24)})
    with pytest.raises(InputError, match="no adapter to merge"):
        export_checkpoint(step, tmp_path / "out", merge=True)
    weights = {"model.w": torch.ones(5, 7)}
    step = write_step(tmp_path / "b", record_of(weights, method=None), cut(weights, 2))
    with pytest.raises(InputError, match="does not say what was trained"):
        export_checkpoint(step, tmp_path / "out")


# -- which checkpoint


def test_the_newest_valid_one_is_chosen(llama, tmp_path):
    run = tmp_path / "run"
    root = run / "project" / "grasp" / "seed-0" / "checkpoints"
    said: list[str] = []
    for step in (4, 8, 12):
        _, factors, settings = lora_state(llama, seed=step)
        tensors = {f"model.{name}": value for name, value in factors.items()}
        record = record_of(tensors, **settings)
        folder = write_step(root, {**record, "step": step}, cut(tensors, 2))
    (folder / "checkpoint.json").unlink()
    path = next((root / "step-00000008").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    for number, place in enumerate((root, root.parent, run)):
        out = export_checkpoint(place, tmp_path / f"out-{number}", say=said.append)
        assert json.loads((out / "export.json").read_text())["step"] == 4
    assert [line for line in said if "step-00000008" in line and "bytes" in line]
    assert sum(line == f"checkpoint: {root / 'step-00000004'}" for line in said) == 3
    with pytest.raises(InputError, match="not a finished checkpoint"):
        export_checkpoint(folder, tmp_path / "out")
    shutil.copytree(run / "project" / "grasp", run / "project" / "random")
    with pytest.raises(InputError, match=r"2 training tasks[\s\S]*project/grasp/seed-0[\s\S]*project/random/seed-0"):
        export_checkpoint(run, tmp_path / "out")
    remove(root / "step-00000004")
    with pytest.raises(InputError, match="none of the checkpoints"):
        export_checkpoint(root, tmp_path / "out")
    with pytest.raises(InputError, match="no checkpoint and no finished result"):
        export_checkpoint(llama, tmp_path / "out")


# -- memory

_MEASURE = """
import sys
from pathlib import Path
from grasp_dist.export import export_checkpoint

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key + ":"))

small, *large = sys.argv[1:]
export_checkpoint(small, small + "-out", merge=True)  # whatever is imported, is now
for step in large:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    export_checkpoint(step, step + "-out", merge="lora" in step, dtype="bf16", say=lambda line: None)
    print("peak", status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process' memory is Linux' to tell"
)
def test_memory_does_not_grow_with_the_model(lora, tmp_path):
    """Less is in memory than the largest weight, an embedding."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 40_000, "tie_word_embeddings": True}
    base = save_tiny(tmp_path / "base", num_hidden_layers=4, **sizes)
    model = auto(base)
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    largest = max(parameter.numel() * 4 for parameter in model.parameters())
    full = full_checkpoint(tmp_path / "full", base, {name: p.detach() for name, p in model.named_parameters()})
    _, factors, settings = lora_state(base, "all")
    adapted = lora_checkpoint(tmp_path / "lora", factors, settings)
    del model
    small = shutil.copytree(lora[1], tmp_path / "small")
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(small), str(full), str(adapted)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    assert len(peaks) == 2
    print(f"weights {total / 1e6:.0f} MB, largest {largest / 1e6:.1f} MB, peaks {[f'{p / 1e6:.0f} MB' for p in peaks]}")
    assert max(peaks) < largest < 0.7 * total
