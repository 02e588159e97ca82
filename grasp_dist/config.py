"""The one configuration tree: YAML in, dotted overrides, unknown keys refused with a suggestion.

Imports pydantic and PyYAML only, so that `--help` and a finished run answer at once.
"""

from __future__ import annotations

import difflib
import os
import string
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from grasp_dist.errors import InputError

__all__ = [
    "ArmConfig",
    "DataConfig",
    "DetectConfig",
    "EvaluateConfig",
    "LoraConfig",
    "ModelConfig",
    "ParallelConfig",
    "ProbeConfig",
    "ProjectConfig",
    "ReportConfig",
    "RunConfig",
    "TrainingConfig",
    "load_config",
    "save_config",
    "split_overrides",
]

Side = Literal["write", "read", "both"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]


class ModelConfig(_Section):
    path: LocalPath
    """Model directory (config.json, *.safetensors, tokenizer) or hub id."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    tokenizer: LocalPath | None = None
    """Tokenizer directory or hub id; default: the model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto: what transformers chooses for the model."""


class DataConfig(_Section):
    path: LocalPath
    """A JSONL/JSON/parquet/text file, a directory of them, or a hub id."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: Literal["auto", "messages", "prompt_completion", "text"] = "auto"
    """Columns: chat `messages`, `prompt` + `completion`, or `text`; auto looks at the columns."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are trained: the assistant's (the completion's), or every one. `text` always trains every token."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Longer examples are cut at this many tokens."""
    packing: bool = False
    """Fill sequences of max_length with several examples (each attends to itself only)."""
    append_eos: bool = True
    """End a plain completion or text with the tokenizer's end-of-sequence token, if it has one."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first N rows."""


class LoraConfig(_Section):
    rank: Annotated[int, Field(ge=1)] = 8
    """Rank r of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale: s = alpha / r (rsLoRA: alpha / sqrt(r))."""
    rslora: bool = False
    """Rank-stabilised scale."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""


class TrainingConfig(_Section):
    method: Literal["lora", "full"] = "lora"
    """LoRA adapters, or the weights themselves."""
    modules: Literal["write", "all", "everything"] | list[str] = "write"
    """What is trained: `write` (the linear modules that write to the residual stream: o_proj, down_proj and the like),
    `all` (every linear module of the decoder layers), `everything` (full fine-tuning of all parameters), or names."""
    lora: LoraConfig = LoraConfig()
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; used when `steps` is not given (default: 1)."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences per forward pass and rank; default: all of the rank's share at once."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm; null: do not."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 compute over fp32 master weights (a LoRA run keeps its frozen base in bf16)."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    """One fine-tune per seed (adapter initialisation and data order)."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines on the terminal; metrics.jsonl has every step."""

    @model_validator(mode="after")
    def _distinct_seeds(self) -> TrainingConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"training.seeds must differ, got {self.seeds}")
        return self


class ParallelConfig(_Section):
    strategy: Literal["auto", "fsdp2", "none"] = "auto"
    """`fsdp2` shards with fully_shard; `auto`: fsdp2 when there is more than one process."""
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward (less memory, one more all-gather)."""


class DetectConfig(_Section):
    method: Literal["warm", "restarted", "one_shot", "file"] = "warm"
    """`warm` deflation (one run of the naive length), `restarted` deflation, `one_shot` (the naive update's leading
    directions), or `file` (a basis that you bring)."""
    basis: LocalPath | None = None
    """The basis file for `method: file`."""
    adapter: LocalPath | None = None
    """A PEFT adapter directory for `method: one_shot`; default: the naive stage's, first seed."""
    side: Side = "both"
    """Which singular vectors join the basis: left (write), right (read), or both."""
    rounds: Annotated[int, Field(ge=1)] = 16
    """Rounds of deflation."""
    steps_per_round: Annotated[int, Field(ge=1)] | None = None
    """Steps of a round; default for warm: naive steps / rounds; for restarted: 60."""
    directions_per_round: Annotated[int, Field(ge=1)] = 1
    """Leading directions that join per weight, side and round."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Directions per weight and side for one-shot detection."""
    seed: int = 1000
    """Seed of the detection run; kept apart from the fine-tunes'."""

    @model_validator(mode="after")
    def _basis_file(self) -> DetectConfig:
        if self.method == "file" and not self.basis:
            raise ValueError("detect.method is 'file', so detect.basis must name a basis file")
        return self


class ArmConfig(_Section):
    """One protected fine-tune (per seed): what is blocked, and how it differs from `training`."""

    basis: LocalPath = "detected"
    """`detected`, `one_shot`, `random` (same ranks and sides as detected, the mandatory control), `none`, or a file."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """First k directions only; default: project.rank."""
    side: Side | None = None
    """Default: project.side."""
    gradient: bool | None = None
    pin: bool | None = None
    training: dict[str, Any] = {}
    """Settings of `training` that differ in this arm, e.g. {method: full, learning_rate: 1.0e-4}."""


class ProjectConfig(_Section):
    rank: Annotated[int, Field(ge=1)] | None = None
    """Use the first k directions of each weight; null: all."""
    side: Side | None = None
    """Use this side only; null: every side that the basis has."""
    gradient: bool = True
    """Project gradients before clipping."""
    pin: bool = True
    """Restore U^T W and W V after every optimizer step."""
    arms: dict[Name, ArmConfig] = {"grasp": ArmConfig(), "random": ArmConfig(basis="random")}
    """The protected fine-tunes by name. A random-basis control is added when none is there."""

    @model_validator(mode="after")
    def _reserved(self) -> ProjectConfig:
        for name in ("base", "naive", "ablation"):
            if name in self.arms:
                raise ValueError(f"project.arms: the name {name!r} is taken by the report's own column; choose another")
        if not any(arm.basis == "random" for arm in self.arms.values()):
            self.arms["random"] = ArmConfig(basis="random")
        return self


class ProbeConfig(_Section):
    """One measurement, read from a file (docs/probes.md has the formats)."""

    name: Name
    path: LocalPath
    role: Literal["task", "drift", "retention"]
    """`task`: to be kept as in naive; `drift`: to stay at the base; `retention`: pretrained behaviour to be kept."""
    kind: Literal["completion", "pair", "loss", "kl"] = "completion"
    """`completion`: probability of reference answer(s); `pair`: log-likelihood of a against b after the same prompt;
    `loss`: mean token loss on a training-format file; `kl`: KL(base || model) on prompts or text."""
    own_tokens: Annotated[int, Field(ge=0)] = 0
    """completion: let the model first answer greedily with this many tokens, then score the completions."""
    positions: Annotated[int, Field(ge=1)] = 16
    """kl: how many last positions of each prompt are compared."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    limit: Annotated[int, Field(ge=1)] | None = None


class EvaluateConfig(_Section):
    probes: list[ProbeConfig] = []
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Sequences per forward pass and rank."""
    ablation: bool = True
    """Add the column `ablation`: the naive model with the basis' directions ablated at inference."""
    shift: bool = True
    """Measure the activations' shift along the basis and along random directions."""

    @model_validator(mode="after")
    def _unique(self) -> EvaluateConfig:
        names = [probe.name for probe in self.probes]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluate.probes: names must differ, got {names}")
        return self


class ReportConfig(_Section):
    title: str = "GRASP: task against drift"
    task: str | None = None
    """Probe on the picture's task axis; default: the first with role `task`."""
    drift: str | None = None
    """Probe on the picture's drift axis; default: the first with role `drift`."""


class RunConfig(_Section):
    variables: dict[str, str] = {}
    """Text put in place of `${name}` in every other value, so that one recipe serves many models or data sets."""
    run_dir: LocalPath
    """Folder of the run: one sub-folder per stage, each with a manifest."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()
    detect: DetectConfig = DetectConfig()
    project: ProjectConfig = ProjectConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _arms(self) -> RunConfig:
        for name, arm in self.project.arms.items():
            self.arm_training(name)
            if "seeds" in arm.training:
                raise ValueError(f"project.arms.{name}.training: every arm runs with training.seeds; set them there")
        probes = [probe.name for probe in self.evaluate.probes]
        for axis in ("task", "drift"):
            wanted = getattr(self.report, axis)
            if wanted is not None and wanted not in probes:
                raise ValueError(f"report.{axis} is {wanted!r}, which is none of the probes {probes}")
        if self.training.method == "full" and self.detect.method != "file":
            raise ValueError(
                "training.method is 'full', but detection reads LoRA updates; keep training.method: lora for the naive "
                "and detect stages and add an arm with `training: {method: full}` under project.arms"
            )
        return self

    def arm_training(self, arm: str) -> TrainingConfig:
        """The training settings of one arm: `training` with the arm's own on top."""
        merged = _merge(self.training.model_dump(), self.project.arms[arm].training)
        try:
            return TrainingConfig.model_validate(merged)
        except ValidationError as error:
            raise ValueError(f"project.arms.{arm}.training: {_explain(error, TrainingConfig)}") from None


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file and put dotted overrides (see `split_overrides`) on top.

    Raises `InputError` for an unreadable file, an unknown key (with the nearest known one) or a bad value.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no mapping of settings; start from one of the files in recipes/")
    tree = _merge(tree, overrides or {})
    variables = tree.get("variables") or {}
    if not isinstance(variables, dict):
        raise InputError(f"{path}: `variables` must be a mapping of names to text, not {variables!r}")
    try:
        return RunConfig.model_validate({key: _substitute(value, variables, path) for key, value in tree.items()})
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, RunConfig)}") from None


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back."""
    tree = _escape(config.model_dump(mode="json", exclude={"variables"}))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    path = Path(path)
    if path.is_file() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the settings out of a command line; returns the other words and the settings as a tree.

    ['run', 'c.yaml', '--project.rank', '8', '--training.seeds=[0,1]', '--nproc', '2'] ->
    (['run', 'c.yaml', '--nproc', '2'], {'project': {'rank': 8}, 'training': {'seeds': [0, 1]}}). A setting is a word
    with a dot in its key, or a section of `RunConfig`; values are read as YAML. Raises `InputError` for one without a
    value.
    """
    tree: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not ("." in key or key in RunConfig.model_fields):
            rest.append(word)
            continue
        if not equals:
            if not queue:
                raise InputError(f"{word} needs a value")
            value = queue.pop(0)
        try:
            leaf = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"the value of --{key} is not valid YAML: {error}") from None
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"--{key} is under a key that another option sets to a value")
        node[last] = leaf
    return rest, tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _substitute(value: Any, variables: dict[str, Any], path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _substitute(item, variables, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, variables, path) for item in value]
    if isinstance(value, str) and "$" in value:
        try:
            return string.Template(value).substitute(variables)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path}: cannot fill in {value!r} ({error}); define the name under `variables`, and write $$ for a "
                "plain $"
            ) from None
    return value


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Pydantic's findings as one paragraph, an unknown key with its nearest known neighbour."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(root, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            lines.append(f"unknown key {where!r}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(
                f"{where}: {message} (got {item['input']!r})"
                if where and not isinstance(item["input"], dict)
                else message
            )
    return "; ".join(lines)


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the section that `path` leads to."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # an index of a list or a key of a mapping: its section was entered with the field
        model = _section_of(field.annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, dict, Union, types.UnionType, Annotated):
        for inner in get_args(annotation):
            if (found := _section_of(inner)) is not None:
                return found
    return None
