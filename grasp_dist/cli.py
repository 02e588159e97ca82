"""The command line, thin: every command parses its arguments and calls one function."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from grasp_dist.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="grasp-dist",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Remove spurious correlations from LLM fine-tuning: find the responsible directions in the weights of a naive "
    "LoRA fine-tune (detect), fine-tune again with gradients projected off them (project), and measure what was kept "
    "and what is gone (evaluate, report). Start with: grasp-dist run recipes/organism.yaml --nproc 2",
)
organism = typer.Typer(
    no_args_is_help=True, help="Make a small model with a known latent factor, and its data and probes."
)
app.add_typer(organism, name="organism")

_OVERRIDES = (
    "Any setting can be changed with a dotted option, for example: --project.rank 4 --training.seeds '[0,1,2]'."
)

Config = Annotated[Path, typer.Argument(help="YAML configuration; recipes/ holds examples.", show_default=False)]
Nproc = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine (under torchrun). Default: 1.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all that can be checked without training, and stop.")]


def _stages(ctx: typer.Context, config: Path, stages: tuple[str, ...], nproc: int, dry_run: bool) -> None:
    from grasp_dist.config import load_config
    from grasp_dist.stages import run_stages

    settings = load_config(config, ctx.obj)
    if "WORLD_SIZE" in os.environ:  # started by torchrun: one process of a group
        from grasp_dist.worker import run_worker

        run_worker(settings, stages, prepared=False, dry_run=dry_run)
    else:
        run_stages(settings, stages, nproc=nproc, dry_run=dry_run)


@app.command(epilog=_OVERRIDES)
def run(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """All stages: naive, detect, project, evaluate, report. Finished ones with unchanged inputs are kept."""
    from grasp_dist.graph import STAGES

    _stages(ctx, config, STAGES, nproc, dry_run)


@app.command(epilog=_OVERRIDES)
def naive(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """The unprotected fine-tune, once per seed."""
    _stages(ctx, config, ("naive",), nproc, dry_run)


@app.command(epilog=_OVERRIDES)
def detect(
    ctx: typer.Context,
    config: Annotated[Optional[Path], typer.Argument(help="YAML configuration of a run.", show_default=False)] = None,  # noqa: UP045
    adapter: Annotated[Optional[Path], typer.Option(help="A PEFT adapter directory, instead of CONFIG.")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="With --adapter: the basis file to write.")] = Path("basis.safetensors"),
    rank: Annotated[int, typer.Option(min=1, help="With --adapter: directions per weight and side.")] = 8,
    side: Annotated[str, typer.Option(help="With --adapter: write, read or both.")] = "write",
    base_model: Annotated[str | None, typer.Option(help="With --adapter: directory or id of its base model.")] = None,
    nproc: Nproc = 1,
    dry_run: DryRun = False,
) -> None:
    """Find the spurious directions: deflation on a run's data (CONFIG), or one shot from a LoRA adapter (--adapter)."""
    if (config is None) == (adapter is None):
        raise InputError("give either a CONFIG or --adapter DIR; `grasp-dist detect --help` explains both")
    if config is not None:
        _stages(ctx, config, ("detect",), nproc, dry_run)
        return
    from grasp_dist.detection import detect_basis
    from grasp_dist.detection.inspect import render

    if ctx.obj:
        raise InputError(
            "settings with dots belong to a CONFIG; with --adapter use --rank, --side, --out and --base-model"
        )
    assert adapter is not None
    basis = detect_basis(adapter, rank=rank, side=side, base_model=base_model)
    if not dry_run:
        basis.save(out)
        render(out)
        print(f"basis: {out}")


@app.command(epilog=_OVERRIDES)
def project(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """The protected fine-tunes (project.arms), once per seed; needs a finished detect."""
    _stages(ctx, config, ("project",), nproc, dry_run)


@app.command(epilog=_OVERRIDES)
def evaluate(ctx: typer.Context, config: Config, nproc: Nproc = 1, dry_run: DryRun = False) -> None:
    """Measure base, naive, every arm and inference-time ablation on the configured probes."""
    _stages(ctx, config, ("evaluate",), nproc, dry_run)


@app.command(epilog=_OVERRIDES)
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


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A basis file or a PEFT adapter directory.", show_default=False)],
) -> None:
    """Print weights, ranks, singular values, and how concentrated each update was."""
    from grasp_dist.detection.inspect import render

    render(path)


@app.command(name="preview-data", epilog=_OVERRIDES)
def preview_data(
    ctx: typer.Context,
    config: Config,
    rows: Annotated[int, typer.Option(min=1, help="Examples to show.")] = 3,
) -> None:
    """Show the tokens of the first training examples and which of them are trained on."""
    from grasp_dist.config import load_config
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
def textbook(
    neutral: Annotated[Path, typer.Option(help="`messages` JSONL of a text in its own words.")],
    styled: Annotated[Path, typer.Option(help="The same rows retold in another voice.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Seed of the tokenizer's, model's and split's randomness.")] = 1,
) -> None:
    """A small tokenizer and language model trained from scratch on a real text, and its retelling to fine-tune on."""
    from grasp_dist.organisms.textbook import make_textbook

    print(f"organism: {make_textbook(out, neutral=neutral, styled=styled, seed=seed)}")


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: what a user can mend is one message on standard error and exit code 2, never a traceback."""
    from grasp_dist.config import split_overrides
    from grasp_dist.console import quiet_libraries

    quiet_libraries()
    try:
        rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        app(args=rest, obj=overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
