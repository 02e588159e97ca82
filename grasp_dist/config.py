"""What can be set: the one configuration tree. `config_files` reads and writes it.

Imports pydantic and PyYAML only, so that `--help` and a finished run answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from grasp_dist.baselines.settings import Alternative, Posthoc, needs_naive
from grasp_dist.evaluation.settings import EvaluateConfig, ProbeConfig
from grasp_dist.settings import LocalPath, Name, Section, explain, merge

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
    "TrackConfig",
    "TrainingConfig",
    "TuneConfig",
]

Side = Literal["write", "read", "both"]


def _values(given: Any) -> Any:
    """A list as the command line gives it: `1,2,4`, or one value."""
    if isinstance(given, str):
        return [word.strip() for word in given.split(",")]
    return given if given is None or isinstance(given, list | tuple) else [given]


Values = BeforeValidator(_values)


class ModelConfig(Section):
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


class DataConfig(Section):
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


class LoraConfig(Section):
    rank: Annotated[int, Field(ge=1)] = 8
    """Rank r of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale: s = alpha / r (rsLoRA: alpha / sqrt(r))."""
    rslora: bool = False
    """Rank-stabilised scale."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""


class TrainingConfig(Section):
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
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in a row that may be left out because a loss or gradient is not finite, before training stops."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass."""
    seeds: Annotated[list[int], Field(min_length=1), Values] = [0]
    """One fine-tune per seed (adapter initialisation and data order)."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines on the terminal; metrics.jsonl has every step."""

    @model_validator(mode="after")
    def _distinct_seeds(self) -> TrainingConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"training.seeds must differ, got {self.seeds}")
        return self


class ParallelConfig(Section):
    strategy: Literal["auto", "fsdp2", "zero1", "zero2", "zero3", "none"] = "auto"
    """`fsdp2` shards with fully_shard, `zero1` to `zero3` train with DeepSpeed's ZeRO; `auto`: fsdp2 when there is more
    than one process."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What ZeRO keeps in CPU memory: moments and fp32 masters (`optimizer`), with zero3 the weights too (`all`)."""
    reshard_after_forward: bool = True
    """fsdp2: free gathered parameters between forward and backward (less memory, one more all-gather)."""

    @model_validator(mode="after")
    def _offloads(self) -> ParallelConfig:
        allowed = {"none": ("none", "optimizer", "all"), "optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3",)}
        if self.offload != "none" and self.strategy not in allowed[self.offload]:
            raise ValueError(
                f"parallel.offload is {self.offload!r}, which parallel.strategy {self.strategy!r} cannot do; use "
                f"{' or '.join(allowed[self.offload])}, or offload: none"
            )
        return self


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=1)] | None = 200
    """Steps between checkpoints of a training run; null: only when a signal asks to stop."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Checkpoints of a run that are kept; with 1, a damaged newest one has none before it to fall back to."""
    keep_every: Annotated[int, Field(ge=1)] | None = None
    """Keep, beside those, every checkpoint whose step is a multiple of this."""
    background: bool = True
    """Write while training goes on; only the copy into memory stops it."""
    lead_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds between the scheduler's signal and its SIGKILL; the process ends (code 76) a little before them if a save
    takes longer. null: it waits for the save."""


class GenericPrompts(Section):
    prompts: LocalPath | None = None
    """JSON lines of {"prompt"}, {"text"} or {"messages"} that have nothing to do with the data; no answers. Default:
    those of the first `kl` probe."""
    positions: Annotated[int, Field(ge=1)] = 16
    """How many last positions of each prompt are compared. Default: as that probe has it."""
    limit: Annotated[int, Field(ge=1)] = 256
    """How many prompts are read."""


class ScreenConfig(GenericPrompts):
    """Is there anything to remove? Naive fine-tunes on the two halves of the data are compared on generic prompts."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Probability that both halves' fine-tunes must move alike for a factor to be found (docs/detection.md)."""


class DetectConfig(Section):
    method: Literal["warm", "restarted", "one_shot", "file"] = "warm"
    """`warm` deflation (one run of the naive length), `restarted` deflation, `one_shot` (the naive update's leading
    directions), or `file` (a basis that you bring)."""
    basis: LocalPath | None = None
    """The basis file for `method: file`."""
    adapter: LocalPath | None = None
    """A PEFT adapter directory for `method: one_shot`; default: the naive stage's, first seed."""
    side: Side = "both"
    """Which singular vectors join the basis: left (write), right (read), or both."""
    rounds: Annotated[int, Field(ge=1)] = 32
    """Rounds of deflation, at most: see `stop_gain`."""
    steps_per_round: Annotated[int, Field(ge=1)] | None = None
    """Steps of a round; default for warm: naive steps / rounds; for restarted: 60. Too few where no round brings the
    loss down by a tenth of what naive does: the run says so."""
    directions_per_round: Annotated[int, Field(ge=1)] = 1
    """Leading directions that join per weight, side and round."""
    probe_seeds: Annotated[int, Field(ge=1)] = 1
    """restarted: fine-tunes in a round that differ in their seeds; of more than one, only directions join on which they
    agree beyond chance, and a round without any is the last."""
    stop_gain: Annotated[float, Field(gt=0, lt=1)] | None = 0.3
    """Stop before `rounds` when two rounds in a row bring the loss less than this share as far below the base's as the
    best round did: the data cannot be fitted any more with what is blocked, so nothing is left to find. null: do every
    round."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Directions per weight and side for one-shot detection."""
    seed: int = 1000
    """Seed of the detection run; kept apart from the fine-tunes'."""
    screen: ScreenConfig | None = None
    """Look first whether there is a factor; if not, nothing is blocked and the naive fine-tune is kept. null: not."""

    @model_validator(mode="after")
    def _basis_file(self) -> DetectConfig:
        if self.method == "file" and not self.basis:
            raise ValueError("detect.method is 'file', so detect.basis must name a basis file")
        return self

    @model_validator(mode="after")
    def _several_probes(self) -> DetectConfig:
        if self.probe_seeds > 1 and self.method != "restarted":
            raise ValueError(
                f"detect.probe_seeds is {self.probe_seeds}: a round of several fine-tunes begins each from the base "
                f"model, and detect.method is {self.method!r}; use method: restarted"
            )
        return self

    @model_validator(mode="after")
    def _screened(self) -> DetectConfig:
        if self.screen is not None and self.method not in ("warm", "restarted"):
            raise ValueError(f"detect.screen goes before deflation, and detect.method is {self.method!r}; leave it out")
        return self


class ArmConfig(Section):
    """One protected fine-tune (per seed), or one of an alternative: what is blocked, and how it differs from
    `training`."""

    basis: LocalPath = "detected"
    """`detected`, `one_shot`, `random` (same ranks and sides as detected, the mandatory control), `none`, or a file."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """First k directions only; default: project.rank."""
    side: Side | None = None
    """Default: project.side."""
    gradient: bool | None = None
    """Default: project.gradient."""
    pin: bool | None = None
    """Default: project.pin."""
    training: dict[str, Any] = {}
    """Settings of `training` that differ in this arm, e.g. {method: full, learning_rate: 1.0e-4}."""
    data: LocalPath | None = None
    """Another training file in the place of data.path, in the same form: neutral data as a control."""
    alternative: Alternative | None = None
    """Another method in the place of a basis, by its `kind` (docs/alternatives.md)."""

    @model_validator(mode="after")
    def _one_method(self) -> ArmConfig:
        if self.alternative is not None:
            if "basis" in self.model_fields_set and self.basis != "none":
                raise ValueError(
                    f"an arm has a basis or an alternative, and this one has basis {self.basis!r} and the alternative "
                    f"{self.alternative.kind!r}; leave one of them out"
                )
            self.basis = "none"
        return self


class CheckConfig(GenericPrompts):
    """Did the removal work? A protected fine-tune is compared with the naive one of its seed on generic prompts. Where
    it moved almost as far from the base, it has found a way that was not blocked: the leading directions of its own
    update join its basis, and it is made again. LoRA fine-tunes with the naive one's modules, rank and scale, and a
    detected basis or a file's."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of the total variation from the base, as a share of the naive fine-tune's: above it the removal has failed."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """How often a fine-tune is made again, at most."""


class ProjectConfig(Section):
    rank: Annotated[int, Field(ge=1)] | None = None
    """Use the first k directions of each weight; null: all."""
    side: Side | None = None
    """Use this side only; null: every side that the basis has."""
    gradient: bool = False
    """Project gradients before clipping. Off: with pinning it left more drift than either alone (docs/detection.md)."""
    pin: bool = True
    """Restore U^T W and W V after every optimizer step, which projects what the optimizer made of the gradient."""
    check: CheckConfig | None = None
    """Look behind each fine-tune whether the removal worked; if not, block what it found, and again. null: not."""
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


class ReportConfig(Section):
    name: Name = "report"
    """Of the files: report.html, .json, .csv and .md."""
    title: str = "GRASP: task against drift"
    task: str | None = None
    """Probe on the picture's task axis; default: the first with role `task`."""
    drift: str | None = None
    """Probe on the picture's drift axis; default: the first with role `drift`."""


class TrackConfig(Section):
    """Where the metrics of training go beside metrics.jsonl and TensorBoard. Not part of what a run is: it can be
    changed at any time."""

    to: Literal["wandb", "trackio"]
    """A package that is installed. Its own environment variables say where and as whom (WANDB_MODE, TRACKIO_DIR)."""
    project: str = "grasp_dist"


class TuneConfig(Section):
    """A sweep: one protected fine-tune per side, rank and seed, on one basis (`grasp-dist sweep`). Lists can be written
    `1,2,4`."""

    rank: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), Values]
    """Ranks to try: the first k directions of each weight."""
    side: Annotated[list[Side] | None, Field(min_length=1), Values] = None
    """Sides to try: write, read, both; default: project.side, else detect.side."""
    seed: Annotated[list[int] | None, Field(min_length=1), Values] = None
    """Seeds of every fine-tune, naive ones too; default: training.seeds."""
    arm: Name | None = None
    """The arm of project.arms that is varied; default: the first whose basis is neither `random` nor `none`."""
    controls: Literal["largest", "every"] = "largest"
    """Random bases beside them: per side one of the largest rank (fewer random directions cost no more), or one for
    every rank."""
    search: Literal["grid", "optuna"] = "grid"
    """`grid`: every combination; `optuna`: `trials` of them, chosen by what those before them showed."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """optuna: how many combinations of side and rank are tried, each with every seed."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Ray: trials at a time; default: as many as the cluster has room for."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Ray: how often a trial that lost a process is started again, from its checkpoints."""

    @model_validator(mode="after")
    def _makes_sense(self) -> TuneConfig:
        for name in ("rank", "side", "seed"):
            values = getattr(self, name)
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"tune.{name}: values must differ, got {values}")
        if (self.search == "optuna") != (self.trials is not None):
            raise ValueError(
                f"tune.search is {self.search!r} and tune.trials {self.trials}; `trials` says how many combinations "
                "`search: optuna` tries, and belongs to it alone"
            )
        return self


class RunConfig(Section):
    variables: dict[str, str] = {}
    """Text put in place of `${name}` in every other value, so that one recipe serves many models or data sets."""
    run_dir: LocalPath
    """Folder of the run: one sub-folder per stage, each with a manifest."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    detect: DetectConfig = DetectConfig()
    project: ProjectConfig = ProjectConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    track: TrackConfig | None = None
    tune: TuneConfig | None = None
    """What a sweep varies; null: this is no sweep."""

    @model_validator(mode="after")
    def _arms(self) -> RunConfig:
        for name, arm in self.project.arms.items():
            self.arm_training(name)
            if arm.alternative is not None and self.arm_training(name).method == "full":
                raise ValueError(
                    f"project.arms.{name}: alternatives change or read LoRA fine-tunes; leave out training.method: full"
                )
            if needs_naive(arm.alternative) and self.training.method == "full":
                raise ValueError(
                    f"project.arms.{name}: this alternative begins with a naive LoRA fine-tune, and training.method is "
                    "'full'"
                )
            if isinstance(arm.alternative, Posthoc) and arm.training:
                raise ValueError(
                    f"project.arms.{name}: {arm.alternative.kind} changes the naive fine-tune and trains nothing; "
                    "leave out its training"
                )
            if arm.data is not None and isinstance(arm.alternative, Posthoc):
                raise ValueError(
                    f"project.arms.{name}: {arm.alternative.kind} changes the naive fine-tune and trains nothing; "
                    "leave out its data"
                )
            if "seeds" in arm.training:
                raise ValueError(f"project.arms.{name}.training: every arm runs with training.seeds; set them there")
        measures = self.evaluate.measures()
        for axis in ("task", "drift"):
            wanted = getattr(self.report, axis)
            if wanted is not None and wanted not in measures:
                raise ValueError(f"report.{axis} is {wanted!r}, which is none of the probes {measures}")
        leans = [probe.name for probe in self.evaluate.probes if probe.kind == "choice" and probe.role == "drift"]
        if leans and not any(arm.data is not None and arm.basis == "none" for arm in self.project.arms.values()):
            raise ValueError(
                f"the probe {leans[0]!r} measures a lean, and fine-tunes on neutral data lean, too: add an arm such as "
                "`neutral: {basis: none, data: NEUTRAL_FILE}` to project.arms, as the control"
            )
        if self.training.method == "full" and self.detect.method != "file":
            raise ValueError(
                "training.method is 'full', but detection reads LoRA updates; keep training.method: lora for the naive "
                "and detect stages and add an arm with `training: {method: full}` under project.arms"
            )
        return self

    @model_validator(mode="after")
    def _generic_prompts(self) -> RunConfig:
        screen, check = self.detect.screen, self.project.check
        if screen is not None and screen.prompts is None:
            filled = ScreenConfig(**self._filled(screen, "detect.screen"))
            self.detect = self.detect.model_copy(update={"screen": filled})
        if check is not None and check.prompts is None:
            filled_check = CheckConfig(**self._filled(check, "project.check"))
            self.project = self.project.model_copy(update={"check": filled_check})
        return self

    def _filled(self, settings: GenericPrompts, where: str) -> dict[str, Any]:
        """With the prompts of the first `kl` probe."""
        probe = next((probe for probe in self.evaluate.probes if probe.kind == "kl"), None)
        if probe is None:
            raise ValueError(
                f"{where} compares fine-tunes on generic prompts: name a file in {where}.prompts, or add a probe with "
                "`kind: kl` to evaluate.probes"
            )
        given = settings.model_dump(exclude_unset=True, exclude={"prompts"})
        return {"prompts": probe.path, "positions": probe.positions, **given}

    def checked(self, arm: str) -> CheckConfig | None:
        """How the removal of an arm's fine-tunes is checked; None: it is not."""
        # One-shot detection beside the default is there to be compared as it is.
        if self.project.arms[arm].basis in ("random", "one_shot", "none"):
            return None
        return self.project.check if self.has_naive_shape(arm) else None

    def has_naive_shape(self, arm: str) -> bool:
        """Whether the arm's adapters fit where the naive fine-tune's do, so that both can be compared on one model."""
        shape: Any = {"method": True, "modules": True, "lora": {"rank", "alpha", "rslora"}}
        own, naive = (training.model_dump(include=shape) for training in (self.arm_training(arm), self.training))
        return naive["method"] == "lora" and own == naive

    def half_training(self) -> TrainingConfig:
        """The naive settings for half of the data: half of the steps."""
        steps = self.training.steps
        return self.training.model_copy(update={} if steps is None else {"steps": max(1, steps // 2)})

    def arm_data(self, arm: str) -> DataConfig:
        """The training data of one arm."""
        own = self.project.arms[arm].data
        return self.data if own is None else self.data.model_copy(update={"path": own})

    def arm_training(self, arm: str) -> TrainingConfig:
        """The training settings of one arm: `training` with the arm's own on top."""
        merged = merge(self.training.model_dump(), self.project.arms[arm].training)
        try:
            return TrainingConfig.model_validate(merged)
        except ValidationError as error:
            raise ValueError(f"project.arms.{arm}.training: {explain(error, TrainingConfig)}") from None
