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
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_dist import export as export_module
from grasp_dist import export_parts
from grasp_dist.errors import InputError
from grasp_dist.export import export_checkpoint
from grasp_dist.fingerprints import model_reference, tensor_shapes
from grasp_dist.manifest import Unit, digest
from grasp_dist.tensor_writer import Part, as_bytes, write_tensors
from grasp_dist.training.checkpoints.reader import Shards
from grasp_dist.training.checkpoints.store import Checkpoints, fingerprint, remove
from grasp_dist.training.lora import save_adapter
from grasp_dist.training.parallel import Parallel
from tests.distinct_pieces import SHAPES, save_distinct
from tests.distributed import run_distributed
from tests.export_cases import cut, lora_state, record_of, write_step
from tests.tiny_models import tiny_model
from tests.training.training_cases import save_mixtral, save_tiny, word_tokenizer

IDS = torch.arange(3, 19)[None]
ALONE = Parallel("none", 0, 1, torch.device("cpu"))


def logits(model) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def auto(folder: Path, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def peft(base: Path, folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(auto(base), folder)


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


def full_checkpoint(root: Path, base: Path, trained: dict[str, Tensor]) -> Path:
    tensors = {f"model.{name}": value for name, value in trained.items()}
    return write_step(root, record_of(tensors, base_model=model_reference(base)), cut(tensors, 3))


# -- reading


def test_what_three_ranks_wrote_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.prepare(7)
    ranks = run_distributed(save_distinct, 3, str(folder))
    whole = {name: torch.empty(shape) for name, shape in SHAPES.items()} | {"pins.p.write": torch.empty(2, 5)}
    record = {**record_of(whole), "step": 7}
    checkpoints.commit(folder, record, {path.name: fingerprint(path) for path in folder.iterdir()})
    shards = Shards(folder)
    assert shards.names() == sorted(whole)
    for name, shape in SHAPES.items():
        expected = torch.cat([rank[name] for rank in ranks]).view(shape)
        found = shards.read(name)
        assert found.shape == shards.shape(name) == shape
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        for start, stop in ((0, 1), (1, 3), (2, 99), (1, 1)):
            rows = shards.rows(name, start, stop)
            assert torch.equal(rows.view(torch.int32), expected[start:stop].view(torch.int32))
    assert torch.equal(shards.read("pins.p.write"), torch.arange(10.0).view(2, 5))
    assert torch.equal(shards.rows("pins.p.write", 1, 2), torch.arange(5.0, 10.0).view(1, 5))
    with pytest.raises(InputError, match=r"no tensor 'model\.c'"):
        shards.read("model.c")


@pytest.fixture
def pieces():
    return {"model.w": torch.randn(5, 7, generator=torch.Generator().manual_seed(1))}


def test_a_missing_shard_is_refused(pieces, tmp_path):
    folder = write_step(tmp_path, record_of(pieces), cut(pieces, 3))
    next(folder.glob("shard-00002-*")).unlink()
    with pytest.raises(InputError, match=r"shard-00002.*missing"):
        Shards(folder)
    with pytest.raises(InputError, match=r"shard-00002.*cannot be read"):
        Shards(folder, check=False)


def test_a_changed_byte_is_refused(pieces, tmp_path):
    folder = write_step(tmp_path, record_of(pieces), cut(pieces, 3))
    path = next(folder.glob("shard-00003-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00003.*sha256"):
        Shards(folder)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_piece_is_refused_and_never_filled_in(rank, pieces, tmp_path):
    """All files are as they were written; one rank's part of a tensor was never in them."""
    ranks = cut(pieces | {"model.v": torch.ones(9)}, 3)
    del ranks[rank]["model.w"]
    with pytest.raises(InputError, match=r"'model\.w'.*is not whole.* of 2 pieces"):
        Shards(write_step(tmp_path, record_of(pieces | {"model.v": torch.ones(9)}), ranks))


def test_a_tensor_in_no_file_and_one_in_no_record(pieces, tmp_path):
    with pytest.raises(InputError, match=r"'model\.x'.*is not whole"):
        Shards(write_step(tmp_path / "a", record_of(pieces | {"model.x": torch.ones(2)}), cut(pieces, 2)))
    with pytest.raises(InputError, match=r"holds 'model\.x'"):
        Shards(write_step(tmp_path / "b", record_of(pieces), cut(pieces | {"model.x": torch.ones(2)}, 2)))


def test_a_piece_twice_is_read_if_the_two_agree(pieces, tmp_path):
    ranks = cut(pieces, 3)
    start = ranks[1]["model.w"][0][0]
    flat = pieces["model.w"].reshape(-1)
    flat[start + 2] = float("nan")  # not equal to itself, and the same bits
    twice = {"model.w": ([start - 3], flat[start - 3 : start + 6].clone())}
    ranks = [*cut(pieces, 3), twice]
    shards = Shards(write_step(tmp_path / "same", record_of(pieces), ranks))
    assert torch.equal(shards.read("model.w").view(torch.int32), pieces["model.w"].view(torch.int32))
    assert torch.equal(shards.rows("model.w", 1, 3).view(torch.int32), pieces["model.w"][1:3].view(torch.int32))
    twice["model.w"][1][-1] += 1e-6
    shards = Shards(write_step(tmp_path / "other", record_of(pieces), ranks))
    with pytest.raises(InputError, match=r"'model\.w'.*written twice, and differently"):
        shards.read("model.w")


def test_blocks_in_two_dimensions(tmp_path):
    """Pins are saved as they are, cut along either dimension or both."""
    whole = torch.arange(40.0).view(5, 8)
    corners = [(slice(0, 3), slice(0, 2)), (slice(3, 5), slice(0, 2)), (slice(0, 5), slice(2, 8))]
    ranks = [{"pins.w.write": ([rows.start, columns.start], whole[rows, columns])} for rows, columns in corners]
    shards = Shards(write_step(tmp_path / "a", record_of({"pins.w.write": whole}), ranks))
    assert torch.equal(shards.read("pins.w.write"), whole)
    assert torch.equal(shards.rows("pins.w.write", 2, 4), whole[2:4])
    with pytest.raises(InputError, match=r"\[3:5, 0:2\] of \[5, 8\] is in none"):
        Shards(write_step(tmp_path / "b", record_of({"pins.w.write": whole}), [ranks[0], ranks[2]]))
    far = {"pins.w.write": ([4, 0], whole[3:5, 0:2])}
    with pytest.raises(InputError, match=r"\[4:6, 0:2\].*is not within"):
        Shards(write_step(tmp_path / "c", record_of({"pins.w.write": whole}), [ranks[0], far, ranks[2]]))


def test_shards_of_another_dtype_or_without_places(pieces, tmp_path):
    ranks = cut(pieces, 2)
    ranks[1]["model.w"] = (ranks[1]["model.w"][0], ranks[1]["model.w"][1].half())
    with pytest.raises(InputError, match="F16"):
        Shards(write_step(tmp_path / "a", record_of(pieces), ranks))
    checkpoints = Checkpoints(tmp_path / "b")
    folder = checkpoints.prepare(5)
    save_file(pieces, folder / "x.safetensors")
    checkpoints.commit(folder, record_of(pieces), {"x.safetensors": fingerprint(folder / "x.safetensors")})
    with pytest.raises(InputError, match="where its tensors belong"):
        Shards(folder)


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


def test_merging_full_fine_tuning_and_checkpoints_of_others(llama, pieces, tmp_path):
    step = full_checkpoint(tmp_path / "a", llama, {"model.norm.weight": torch.ones(24)})
    with pytest.raises(InputError, match="no adapter to merge"):
        export_checkpoint(step, tmp_path / "out", merge=True)
    step = write_step(tmp_path / "b", record_of(pieces, method=None), cut(pieces, 2))
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


# -- finished runs, and the model card


def make_run(tmp_path: Path, base: Path) -> tuple[Path, torch.nn.Module]:
    """A run with one task, finished behind step 9 and evaluated, with a checkpoint of step 5; and the final model."""
    run, inputs = tmp_path / "run", {"seed": 0, "arm": "grasp", "basis": "ba515"}
    task = Unit(run / "project" / "grasp" / "seed-0", inputs)
    task.start()
    _, factors, settings = lora_state(base)
    tensors = {f"model.{name}": value for name, value in factors.items()}
    settings |= {"task": "project/grasp/seed-0", "config": digest(inputs), "basis": "fe" * 32}
    write_step(task.folder / "checkpoints", record_of(tensors, **settings), cut(tensors, 2))
    model, _, _ = lora_state(base, seed=9)
    save_adapter(model, task.folder / "adapter", ALONE)
    metrics = {"steps": 9, "residual": 3.25e-7, "final_loss": 0.75}
    task.finish(outputs=["adapter"], metrics=metrics, world_size=2, base_model=model_reference(base))
    (run / "config.yaml").write_text(
        yaml.safe_dump({"run_dir": str(run), "model": {"path": str(base)}, "data": {"path": "d"}})
    )
    scored = Unit(run / "evaluate" / "grasp" / "seed-0", {"weights": task.output_hash("adapter")})
    scored.start()
    models = [
        {"model": name, "seed": seed, "probes": {"drift": {"value": value}}}
        for name, seed, value in (("base", None, 0.0625), ("grasp", 0, 0.1875), ("grasp", 1, 0.9999))
    ]
    probes = [{"name": "drift", "role": "drift", "kind": "completion", "n": 4}]
    (run / "evaluate" / "scores.json").write_text(json.dumps({"format": 1, "probes": probes, "models": models}))
    return run, model


def test_of_a_finished_task_its_result_is_exported(llama, tmp_path):
    """And its last checkpoint, which is of a step before, only when that is asked for."""
    run, model = make_run(tmp_path, llama)
    task = run / "project" / "grasp" / "seed-0"
    for number, place in enumerate((run, task, task / "adapter")):
        out = export_checkpoint(place, tmp_path / f"out-{number}")
        assert torch.equal(logits(peft(llama, out)), logits(model))
        assert json.loads((out / "export.json").read_text())["step"] == 9
    merged = export_checkpoint(run, tmp_path / "merged", merge=True)
    assert (logits(auto(merged)) - logits(model)).abs().max() <= 1e-5
    earlier = export_checkpoint(task / "checkpoints", tmp_path / "earlier")
    assert json.loads((earlier / "export.json").read_text())["step"] == 5
    assert (logits(peft(llama, earlier)) - logits(model)).abs().max() > 0.1
    with pytest.raises(InputError, match="not the one that was fine-tuned"):
        export_checkpoint(run, tmp_path / "out", merge=True, base=save_tiny(tmp_path / "other", seed=1))
    config = json.loads((task / "adapter" / "adapter_config.json").read_text())
    (task / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 50.0}))
    with pytest.raises(InputError, match="not as the finished training left it"):
        export_checkpoint(run, tmp_path / "out")


def test_a_finished_full_fine_tune(llama, tmp_path):
    task = Unit(tmp_path / "naive" / "seed-0", {"seed": 0})
    task.start()
    shutil.copytree(llama, task.folder / "model")
    task.finish(outputs=["model"], metrics={"steps": 3}, world_size=1)
    out = export_checkpoint(task.folder, tmp_path / "out", dtype="bf16")
    expected = {name: tensor.bfloat16() for name, tensor in load_file(llama / "model.safetensors").items()}
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert auto(out).dtype == torch.bfloat16


def test_the_card_tells_the_figures_of_this_very_model(llama, tmp_path):
    run, _ = make_run(tmp_path, llama)
    card = (export_checkpoint(run, tmp_path / "out") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "llama"  # not where it stands on this machine
    assert front["library_name"] == "peft"
    assert {"grasp", "lora"} <= set(front["tags"])
    assert str(tmp_path) not in card
    for figure in ("rank 3, alpha 5.0", "0.75", "3.25e-07", "ba515", "| steps | 9 |", "0.0625 | 0.1875 |"):
        assert figure in card, figure
    assert "0.9999" not in card
    merged = (export_checkpoint(run, tmp_path / "merged", merge=True) / "README.md").read_text()
    assert yaml.safe_load(merged.split("---")[1])["library_name"] == "transformers"
    assert "0.1875" in merged


@pytest.mark.parametrize("change", ["earlier step", "trained again", "copied"])
def test_the_card_gives_no_figures_of_another_model(change, llama, tmp_path):
    run, _ = make_run(tmp_path, llama)
    source = run
    if change == "trained again":
        Unit(run / "evaluate" / "grasp" / "seed-0", {"weights": "of before"}).start()
    else:
        source = next(run.rglob("step-*"))
    if change == "copied":
        source = shutil.copytree(source, tmp_path / "copy")
    card = (export_checkpoint(source, tmp_path / "out") / "README.md").read_text()
    assert "0.1875" not in card
    assert ("3.25e-07" in card) == (change == "trained again")
    assert ("| steps | 5 |" in card) == (change != "trained again")


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
