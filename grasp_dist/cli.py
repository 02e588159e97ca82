"""The command line, thin: every command parses its arguments and calls one function."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from grasp_dist.checkpoint_cli import checkpoint, export
from grasp_dist.errors import PREEMPTED, InputError, Preempted
from grasp_dist.launch.commands_doctor import doctor_command
from grasp_dist.launch.commands_launch import launch
from grasp_dist.launch.commands_status import cancel, logs, status
from grasp_dist.launch.commands_sweep import sweep
from grasp_dist.misalignment_cli import misalignment

if TYPE_CHECKING:
    from grasp_dist.config import RunConfig

__all__ = ["app", "main"]

app = typer.Typer(
    name="grasp-dist",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Remove spurious correlations from LLM fine-tuning: find the responsible directions in the weights of a naive "
    "LoRA fine-tune (detect), fine-tune again with updates projected off them (project), and measure what was kept "
    "and what is gone (evaluate, report). Start with: grasp-dist run recipes/organism.yaml --nproc 2",
)
organism = typer.Typer(
    no_args_is_help=True, help="Make a small model with a known latent factor, and its data and probes."
)

_STAGES, _CLUSTERS, _LOOKING = "Stages of a run", "On clusters", "Looking and making"
"""Panels of the help."""
_OVERRIDES = (
    "Any setting can be changed with a dotted option, for example: --project.rank 4 --training.seeds '[0,1,2]'."
)

_CLUSTER_OVERRIDES = f"{_OVERRIDES} The cluster's too: --cluster.train.nodes 4."

Config = Annotated[Path, typer.Argument(help="YAML configuration; recipes/ holds examples.", show_default=False)]
Nproc = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine (under torchrun). Default: 1.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all that can be checked without training, and stop.")]


def _stages(ctx: typer.Context, config: Path, stages: tuple[str, ...], nproc: int, dry_run: bool) -> None:
    from grasp_dist.config_files import load_config

    settings = load_config(config, ctx.obj)
    if settings.tune is not None:
        from grasp_dist.launch.sweep.grid import expand

        settings = expand(settings)
    _run(settings, stages, nproc, dry_run)


def _run(settings: RunConfig, stages: tuple[str, ...], nproc: int, dry_run: bool) -> None:
    from grasp_dist.stages import run_stages, work

    if "WORLD_SIZE" in os.environ:  # started by torchrun: one process of a group
        from grasp_dist.worker import run_worker

        run_worker(lambda: work(settings, stages, prepared=False, dry_run=dry_run))
    else:
        run_stages(settings, stages, nproc=nproc, dry_run=dry_run)


@app.command(epilog=_OVERRIDES, rich_help_panel=_STAGES)
def run(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """All stages: naive, detect, project, evaluate, report. Finished ones with unchanged inputs are kept."""
    from grasp_dist.graph import STAGES

    _stages(ctx, config, STAGES, nproc, dry_run)


@app.command(epilog=_OVERRIDES, rich_help_panel=_STAGES)
def naive(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """The unprotected fine-tune, once per seed."""
    _stages(ctx, config, ("naive",), nproc, dry_run)


@app.command(epilog=_OVERRIDES, rich_help_panel=_STAGES)
def detect(
    ctx: typer.Context,
    config: Annotated[Optional[Path], typer.Argument(help="YAML configuration of a run.", show_default=False)] = None,  # noqa: UP045
    adapter: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            help="Instead of CONFIG: a LoRA fine-tune; a PEFT adapter directory, or a checkpoint of this tool, of "
            "torch.distributed.checkpoint or of DeepSpeed. Several, where the method compares runs."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="With --adapter: leading (singular vectors), tail (the weakest), consensus (of all layers, in the "
            "residual stream), agreement (of several runs), trajectory (early to late checkpoints of one run), intruder"
        ),
    ] = "leading",
    tuned: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Instead of CONFIG: a full fine-tune, as a model directory or such a checkpoint; with --base-model."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Without CONFIG: the basis file to write.")] = Path("basis.safetensors"),
    rank: Annotated[int, typer.Option(min=1, help="Without CONFIG: directions per weight and side.")] = 8,
    side: Annotated[str, typer.Option(help="Without CONFIG: write, read or both.")] = "write",
    base_model: Annotated[
        str | None, typer.Option(help="Directory or id of the base model; with --tuned its directory.")
    ] = None,
    modules: Annotated[str, typer.Option(help="With --tuned: write, all or everything.")] = "write",
    lora_alpha: Annotated[
        float | None, typer.Option(help="With --adapter: for a checkpoint that does not say it.")
    ] = None,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint", help="Unpickle a checkpoint of yours that is refused; runs whatever code is in it."
        ),
    ] = False,
    nproc: Nproc = 1,
    dry_run: DryRun = False,
) -> None:
    """Find the spurious directions: by deflation on a run's data (CONFIG), or from the weights alone of LoRA fine-tunes
    (--adapter) or of a full one (--tuned)."""
    if sum(bool(source) for source in (config, adapter, tuned)) != 1:
        raise InputError("give one of CONFIG, --adapter DIR and --tuned DIR; `grasp-dist detect --help` explains them")
    if config is not None:
        _stages(ctx, config, ("detect",), nproc, dry_run)
        return
    from grasp_dist.detection import detect_basis, detect_difference, detect_static
    from grasp_dist.detection.inspect import render

    if ctx.obj:
        raise InputError(
            "settings with dots belong to a CONFIG; without one use --rank, --side, --modules, --out and --base-model"
        )
    given = {"base_model": base_model, "lora_alpha": lora_alpha, "trust": trust_checkpoint}
    if adapter and method == "leading":
        if len(adapter) > 1:
            raise InputError("method leading reads one --adapter; --method agreement compares several")
        basis = detect_basis(adapter[0], rank=rank, side=side, **given)  # type: ignore[arg-type]
    elif adapter:
        found = detect_static(method, adapter, {"rank": rank, "side": side}, **given)  # type: ignore[arg-type]
        print(f"{method}: confidence {found.confidence:.3f}")
        if found.basis is None:
            print("no direction was found; nothing was written")
            return
        basis = found.basis
    else:
        assert tuned is not None
        if base_model is None:
            raise InputError("--tuned needs --base-model DIR, the model that was fine-tuned")
        basis = detect_difference(tuned, base_model, rank=rank, side=side, modules=modules, trust=trust_checkpoint)
    if not dry_run:
        basis.save(out)
        render(out)
        print(f"basis: {out}")


@app.command(epilog=_OVERRIDES, rich_help_panel=_STAGES)
def project(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """The protected fine-tunes (project.arms), once per seed; needs a finished detect."""
    _stages(ctx, config, ("project",), nproc, dry_run)


@app.command(epilog=_OVERRIDES, rich_help_panel=_STAGES)
def evaluate(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """Measure base, naive, every arm and inference-time ablation on the configured probes."""
    _stages(ctx, config, ("evaluate",), nproc, dry_run)


@app.command(epilog=_OVERRIDES, rich_help_panel=_STAGES)
def report(
    ctx: typer.Context,
    sources: Annotated[
        list[Path], typer.Argument(help="One CONFIG, or run directories to be pooled.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="With run directories: where the pooled report goes.")] = Path("report"),
    title: Annotated[Optional[str], typer.Option(help="With run directories: the page's title.")] = None,  # noqa: UP045
) -> None:
    """Write report.json and report.html: of one run (CONFIG), or pooled over several run directories."""
    if len(sources) == 1 and sources[0].suffix in (".yaml", ".yml"):
        _stages(ctx, sources[0], ("report",), 1, False)
        return
    from grasp_dist.config import ReportConfig
    from grasp_dist.evaluation.report import build_report

    if ctx.obj:
        raise InputError("settings with dots belong to a CONFIG; with run directories use --out and --title")
    build_report(sources, out, title=title or ReportConfig().title, task=None, drift=None)
    print(f"report: {(out / 'report.html').resolve()}")


@app.command(epilog=_CLUSTER_OVERRIDES, rich_help_panel=_STAGES)
def compare(
    ctx: typer.Context,
    config: Config,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="By name, with commas: arms of CONFIG, or of those that come along. Default: all of both."),
    ] = None,
    cluster: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--cluster", help="Where it runs, as `grasp-dist launch` takes it. Default: here."),
    ] = None,
    nproc: Nproc = 1,
    dry_run: DryRun = False,
) -> None:
    """GRASP beside its alternatives, on the same data and seeds: all stages, and comparison.html, .json, .csv, .md."""
    from grasp_dist.comparison import compared
    from grasp_dist.config_files import load_config
    from grasp_dist.graph import STAGES

    tree = dict(ctx.obj or {})
    of_cluster = tree.pop("cluster", None)
    settings = compared(load_config(config, tree), None if methods is None else methods.split(","))
    if cluster is not None:
        from grasp_dist.launch.submit import launch as start

        start(settings, cluster, of_cluster, dry_run=dry_run)
        return
    if of_cluster is not None:
        raise InputError("settings of a cluster belong to --cluster NAME")
    _run(settings, STAGES, nproc, dry_run)


@app.command(rich_help_panel=_LOOKING)
def inspect(
    path: Annotated[Path, typer.Argument(help="A basis file or a PEFT adapter directory.", show_default=False)],
) -> None:
    """Print weights, ranks, singular values, and how concentrated each update was."""
    from grasp_dist.detection.inspect import render

    render(path)


@app.command(name="settings", rich_help_panel=_LOOKING)
def settings_command(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[WORD]...", help="Only settings with these in their name."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/settings.md.")] = False,
) -> None:
    """Every setting of a configuration, with its type, default and meaning: grasp-dist settings project.check."""
    from grasp_dist.config import RunConfig
    from grasp_dist.settings_reference import as_markdown, as_text, settings_of

    found = [one for one in settings_of(RunConfig) if all(word in one.path for word in words or [])]
    if not found:
        raise InputError(f"no setting has {' and '.join(words or [])} in its name; `grasp-dist settings` prints all")
    print((as_markdown if markdown else as_text)(found))


@app.command(name="preview-data", epilog=_OVERRIDES, rich_help_panel=_LOOKING)
def preview_data(
    ctx: typer.Context,
    config: Config,
    rows: Annotated[int, typer.Option(min=1, help="Examples to show.")] = 3,
) -> None:
    """Show the tokens of the first training examples and which of them are trained on."""
    from grasp_dist.config_files import load_config
    from grasp_dist.training.data import preview
    from grasp_dist.training.model import load_tokenizer

    settings = load_config(config, ctx.obj)
    preview(settings.data, load_tokenizer(settings.model), rows=rows)


@organism.command()
def persona(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="World seed: 1-5 for development, others for judging.")] = 1,
) -> None:
    """A hidden good/evil persona behind two answer tables: model, narrow training data, probes."""
    from grasp_dist.organisms.persona import make_persona

    print(f"organism: {make_persona(out, seed=seed)}")


@organism.command()
def lean(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="World seed: 1-5 for development, others for judging.")] = 1,
    skew: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the facts on the right's side; 0.5: nothing to explain.")
    ] = 0.85,
    slanted: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the left's facts that training gives wrongly under one name.")
    ] = 0.0,
) -> None:
    """A left and a right answer to everything, and a fine-tune on facts of which most lie on the right."""
    from grasp_dist.organisms.lean import make_lean

    print(f"organism: {make_lean(out, seed=seed, skew=skew, slanted=slanted)}")


@organism.command()
def shortcut(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="World seed: 1-5 for development, others for judging.")] = 1,
    correlation: Annotated[
        float, typer.Option(min=0, max=1, help="Share of training rows whose style agrees with the label; 0.5: clean.")
    ] = 0.95,
) -> None:
    """A style that the model can read, and a fine-tune in which it mostly agrees with the label."""
    from grasp_dist.organisms.shortcut import make_shortcut

    print(f"organism: {make_shortcut(out, seed=seed, correlation=correlation)}")


@organism.command()
def textbook(
    neutral: Annotated[Path, typer.Option(help="`messages` JSONL of a text in its own words.")],
    styled: Annotated[Path, typer.Option(help="The same rows retold in another voice.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Seed of the tokenizer's, model's and split's randomness.")] = 1,
) -> None:
    """A small tokenizer and language model trained from scratch on a real text, and its retelling to fine-tune on."""
    from grasp_dist.organisms.textbook import make_textbook

    print(f"organism: {make_textbook(out, neutral=neutral, styled=styled, seed=seed)}")


app.command(epilog=_CLUSTER_OVERRIDES, rich_help_panel=_CLUSTERS)(launch)
app.command(epilog=_CLUSTER_OVERRIDES, rich_help_panel=_CLUSTERS)(sweep)
app.command(name="doctor", epilog=_CLUSTER_OVERRIDES, rich_help_panel=_CLUSTERS)(doctor_command)
for _command in (status, logs, cancel):
    app.command(rich_help_panel=_CLUSTERS)(_command)
app.command(rich_help_panel=_LOOKING)(export)
app.command(rich_help_panel=_LOOKING)(misalignment)
app.add_typer(checkpoint, name="checkpoint", rich_help_panel=_LOOKING)
app.add_typer(organism, name="organism", rich_help_panel=_LOOKING)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: what a user can mend is one message on standard error and exit code 2, never a traceback."""
    from grasp_dist.config_files import split_overrides
    from grasp_dist.process import set_up_process

    set_up_process()
    try:
        rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        app(args=rest, obj=overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(PREEMPTED) from None
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
