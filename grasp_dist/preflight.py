"""Everything that can be found wrong before any training: paths, data, modules, probes, bases, ranks, disk. Ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_dist.basis import SpuriousBasis, model_reference
from grasp_dist.config import RunConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.protected import check_basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grasp_dist.training.examples import Example

__all__ = ["preflight"]

# Rows that are tokenised to see that the data is usable; the whole set is read when training starts.
_SAMPLE_ROWS = 256


def preflight(config: RunConfig, stages: tuple[str, ...], *, full_fine_tunes: int = 0) -> None:
    """Raise `InputError` for the first thing that would stop the stages; loads no weights and trains nothing.

    full_fine_tunes: how many of them are still to be written, for the check of the disk.
    """
    from grasp_dist.architecture import linear_modules, logical_shape, resolve_modules
    from grasp_dist.training.data import load_examples
    from grasp_dist.training.loop import num_steps
    from grasp_dist.training.model import load_tokenizer, meta_model
    from grasp_dist.training.parallel import Parallel

    if config.track is not None:
        from grasp_dist.training.tracking import check_tracker

        check_tracker(config.track)
    tokenizer = load_tokenizer(config.model)
    model = meta_model(config.model)
    shapes = {f"{name}.weight": logical_shape(module) for name, module in linear_modules(model).items()}
    limit = min(config.data.limit or _SAMPLE_ROWS, _SAMPLE_ROWS)
    examples = load_examples(config.data.model_copy(update={"limit": limit}), tokenizer)

    trainings = {"training": config.training}
    trainings |= {f"project.arms.{arm}.training": config.arm_training(arm) for arm in config.project.arms}
    for where, training in trainings.items():
        try:
            chosen = resolve_modules(model, training.modules)
        except InputError as error:
            raise InputError(f"{where}.modules: {error}") from None
        if training.method == "lora":
            _check_lora_rank(where, training, {name: shapes[f"{name}.weight"] for name in chosen})

    detect = config.detect
    if detect.method == "file":
        _check_given(config, detect.basis, shapes, rank=config.project.rank, where=f"detect.basis {detect.basis}")
    elif detect.method == "one_shot":
        _check_one_shot(config)
    else:
        _check_rounds(config, num_steps(config.training, len(examples)))
    if detect.screen is not None:
        from grasp_dist.evaluation.screening import half_of, read_prompts

        read_prompts(detect.screen, tokenizer)
        half_of(examples, 0, detect.seed)
    if config.project.check is not None:
        from grasp_dist.evaluation.screening import read_prompts

        read_prompts(config.project.check, tokenizer, where="project.check")
    if detect.adapter:
        from grasp_dist.detection import detect_basis

        check_basis(
            detect_basis(detect.adapter, rank=detect.rank, side=detect.side),
            shapes,
            where=f"detect.adapter {detect.adapter}",
        )
    for arm, settings in config.project.arms.items():
        if settings.data is not None:
            try:
                load_examples(config.arm_data(arm).model_copy(update={"limit": limit}), tokenizer)
            except InputError as error:
                raise InputError(f"project.arms.{arm}.data: {error}") from None
        if settings.basis not in ("detected", "random", "one_shot", "none"):
            rank = settings.rank or config.project.rank
            _check_given(config, settings.basis, shapes, rank=rank, where=f"project.arms.{arm}.basis {settings.basis}")
        elif settings.basis != "none":
            _check_found(config, arm)
        if settings.basis == "one_shot":
            _check_one_shot(config)
        if settings.alternative is not None:
            try:
                _check_alternative(config, settings.alternative, model, examples, tokenizer)
            except InputError as error:
                raise InputError(f"project.arms.{arm}.alternative: {error}") from None
    if "evaluate" in stages:
        if not config.evaluate.measures():
            raise InputError(
                "evaluate.probes is empty, so nothing would be measured; docs/probes.md shows how to add some"
            )
        from grasp_dist.evaluation.probes import prepare

        prepare(config.evaluate.probes, tokenizer)
        if config.evaluate.harness is not None:
            from grasp_dist.evaluation.harness import Harness

            Harness(config.evaluate.harness, tokenizer, Parallel("none", 0, 1, next(model.parameters()).device)).check()
        for asked in config.evaluate.questions:
            from grasp_dist.evaluation.misalignment.question_sets import check_questions

            try:
                check_questions(asked, model, tokenizer)
            except InputError as error:
                raise InputError(f"evaluate.questions, {asked.name}: {error}") from None
    if {"naive", "project"} & set(stages):
        _check_disk(config, sum(parameter.numel() for parameter in model.parameters()), full_fine_tunes)


def _check_given(
    config: RunConfig, path: str | None, shapes: dict[str, tuple[int, int]], *, rank: int | None, where: str
) -> None:
    """A basis that the user brings: its fit, its content, and the base model that it says it is of."""
    basis = SpuriousBasis.load(str(path))
    check_basis(basis, shapes, where=where)
    if rank is not None:
        basis.truncate(rank)
    basis.check()
    basis.check_model(**model_reference(config.model.path, config.model.revision))


def _check_alternative(
    config: RunConfig, settings: Any, model: PreTrainedModel, examples: list[Example], tokenizer: Any
) -> None:
    from grasp_dist.architecture import decoder_layers
    from grasp_dist.baselines.residual_stream import check_layers
    from grasp_dist.baselines.settings import SafeLora, ShiftDirections
    from grasp_dist.baselines.training import examples_of, shifted_layers

    check_layers(model, shifted_layers(settings, len(decoder_layers(model))))
    width = model.config.get_text_config().hidden_size
    if isinstance(settings, ShiftDirections) and settings.rank > width:
        raise InputError(f"rank is {settings.rank}, and the residual stream has {width} dimensions")
    if isinstance(settings, SafeLora) and not (Path(settings.unaligned) / "config.json").is_file():
        raise InputError(f"unaligned {settings.unaligned} is no model directory (it has no config.json)")
    limit = min(config.data.limit or _SAMPLE_ROWS, _SAMPLE_ROWS)
    examples_of(settings, examples, config.data.model_copy(update={"limit": limit}), tokenizer, seed=0)


def _check_lora_rank(where: str, training: TrainingConfig, shapes: dict[str, tuple[int, int]]) -> None:
    for name, shape in shapes.items():
        if training.lora.rank > min(shape):
            raise InputError(
                f"{where}.lora.rank is {training.lora.rank}, but {name} is {shape[0]} x {shape[1]}; use at most "
                f"{min(shape)}"
            )


def _check_rounds(config: RunConfig, steps: int) -> None:
    detect = config.detect
    if detect.method == "warm" and detect.steps_per_round is None and config.training.steps and steps < detect.rounds:
        raise InputError(
            f"detect.rounds is {detect.rounds}, but the naive fine-tune has {steps} steps; lower it, or set "
            "detect.steps_per_round"
        )


def _check_one_shot(config: RunConfig) -> None:
    detect, lora = config.detect, config.training.lora.rank
    if not detect.adapter and detect.rank > lora:
        raise InputError(
            f"detect.rank is {detect.rank}, but a LoRA update of rank training.lora.rank {lora} has {lora} directions; "
            f"use at most {lora}"
        )


def _check_found(config: RunConfig, arm: str) -> None:
    """That the arm's rank is one that its detection will find."""
    detect, settings = config.detect, config.project.arms[arm]
    rank, where = settings.rank, f"project.arms.{arm}.rank"
    if rank is None:
        rank, where = config.project.rank, f"project.rank (for the arm {arm})"
    if rank is None or (detect.method == "file" and settings.basis != "one_shot"):
        return
    found = detect.rounds * detect.directions_per_round
    if settings.basis == "one_shot" or detect.method == "one_shot":
        found = detect.rank
    if rank > found:
        raise InputError(
            f"{where} is {rank}, but detection will find {found} directions per weight and side; "
            "lower it, or raise detect.rounds, detect.directions_per_round or detect.rank"
        )


def _check_disk(config: RunConfig, num_parameters: int, full_fine_tunes: int) -> None:
    need = 4 * num_parameters * full_fine_tunes + (64 << 20)
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{folder} has {free / 2**30:.1f} GiB free, and this run will write up to {need / 2**30:.1f} GiB "
            f"({full_fine_tunes} full fine-tunes); free some space, choose another run_dir, or drop the full arms"
        )
