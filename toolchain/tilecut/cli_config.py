"""The options of `PruneConfig` on the command line, shared by the commands that cut. No torch, no pydantic before they are read.

A command says `@takes_config` and has a parameter `options`: in its place stand the parameters of `read_options`, and it
is called with what that returns. `make_config` makes the config of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilecut.cli_inputs import named_fractions, named_numbers, names

if TYPE_CHECKING:
    from tilecut.config import PruneConfig

BUDGET, SHAPE, METHOD, WHERE, RECOVERY = "Budget", "What may be cut", "How to choose", "Where and when", "Training after the cut"
# A budget of another kind takes the place of the preset's sparsity.
OTHER_BUDGETS = ("max_macs", "max_params", "max_bytes", "max_latency_ms", "num_heads_keep", "attention_sparsity")


def _option(help: str, panel: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **limits)


def read_options(
    preset: Annotated[str, _option("edge, cloud or hybrid; the other options override it", BUDGET)] = "hybrid",
    max_macs: Annotated[int | None, _option("MACs of the whole model", BUDGET)] = None,
    max_params: Annotated[int | None, _option("parameters of the whole model", BUDGET)] = None,
    max_bytes: Annotated[int | None, _option("bytes of the whole model's weights", BUDGET)] = None,
    attention_sparsity: Annotated[float | None, _option("fraction of the attention's MACs that goes", BUDGET)] = None,
    num_heads_keep: Annotated[int | None, _option("heads that every attention keeps", BUDGET)] = None,
    kinds: Annotated[str | None, _option("comma-separated: heads,neurons,hidden,layers,experts.. (docs/kinds.md)", SHAPE)] = None,
    vocabulary: Annotated[str | None, _option("a file of texts whose words stay, with kind vocab", SHAPE)] = None,
    keep: Annotated[
        list[str] | None, _option("a group that is not cut, a kind, or a pattern: '*layer.0.*'; may be repeated", SHAPE)
    ] = None,
    min_units: Annotated[
        list[str] | None, _option("GROUP=N: fewest units that it keeps, by name, kind or pattern; may be repeated", SHAPE)
    ] = None,
    max_units: Annotated[list[str] | None, _option("GROUP=N: most units that it keeps; may be repeated", SHAPE)] = None,
    rotate: Annotated[bool | None, _option("cut the hidden width along its principal components", SHAPE)] = None,
    uniform: Annotated[bool | None, _option("groups of one kind and size keep equally many units", SHAPE)] = None,
    block: Annotated[int | None, _option("widths are multiples of this and of the target's block", SHAPE)] = None,
    adapt_block: Annotated[
        float | None, _option("take the largest block that loses no more than this fraction, e.g. 0.1", SHAPE)
    ] = None,
    power_of_two_heads: Annotated[bool | None, _option("head counts are powers of two", SHAPE)] = None,
    tokens: Annotated[
        list[str] | None,
        _option("LAYER=FRACTION of the tokens that stays behind it, by number or name; or 'search'; may be repeated", SHAPE),
    ] = None,
    tokens_restored: Annotated[
        str | None, _option("mean or own: what outputs hold in the places of removed tokens", SHAPE)
    ] = None,
    quantize: Annotated[str | None, _option("int8, int8-static, int4, int4:128 or fp16, on edge", SHAPE)] = None,
    method: Annotated[str | None, _option("table, fisher, or the name of an importance", METHOD)] = None,
    importance: Annotated[str | None, _option("the order in which units go, for --method table", METHOD)] = None,
    outputs: Annotated[str | None, _option("comma-separated: outputs that count when losses are measured", METHOD)] = None,
    mixture: Annotated[float | None, _option("fraction of general text in the calibration, 0 to 1", METHOD)] = None,
    reconstruct: Annotated[bool | None, _option("refit weights in closed form", METHOD)] = None,
    seed: Annotated[int | None, _option("of every random choice", METHOD)] = None,
    batch: Annotated[int | None, _option("rows at which MACs and latency are counted", WHERE)] = None,
    sequence: Annotated[int | None, _option("tokens at which MACs and latency are counted", WHERE)] = None,
    threads: Annotated[int | None, _option("CPU threads of one run, for latency", WHERE)] = None,
    cache: Annotated[str | None, _option("folder of cost tables; '' keeps none", WHERE)] = None,
    offload: Annotated[str | None, _option("folder for weights and activations that memory cannot hold", WHERE)] = None,
    finetune: Annotated[bool, _option("train the pruned model to follow the dense one", RECOVERY, "--finetune")] = False,
    finetune_epochs: Annotated[int | None, _option("passes over the calibration data, after every cut", RECOVERY)] = None,
    finetune_steps: Annotated[int | None, _option("cuts on the way to the budget", RECOVERY)] = None,
    finetune_lr: Annotated[float | None, _option("step size of AdamW", RECOVERY)] = None,
    finetune_floor: Annotated[float | None, _option("stop at the cut before the cosine falls below this", RECOVERY)] = None,
    finetune_labels: Annotated[bool, _option("train on the labels too", RECOVERY, "--finetune-labels")] = False,
    precision: Annotated[str | None, _option("fp32 or bf16", RECOVERY)] = None,
    checkpoint: Annotated[str | None, _option("folder to save to and to resume from", RECOVERY)] = None,
) -> dict[str, Any]:
    """What was given, by field of `PruneConfig`, and `preset`."""
    at = {"batch": batch, "sequence": sequence, "threads": threads}
    training = {
        "epochs": finetune_epochs,
        "steps": finetune_steps,
        "learning_rate": finetune_lr,
        "floor": finetune_floor,
        "labels": "task" if finetune_labels else None,
        "precision": precision,
        "checkpoint": checkpoint,
    }
    trained = _given(training)
    return {
        "preset": preset,
        **_given(
            {
                "max_macs": max_macs,
                "max_params": max_params,
                "max_bytes": max_bytes,
                "attention_sparsity": attention_sparsity,
                "num_heads_keep": num_heads_keep,
                "kinds": tuple(names(kinds)) if kinds is not None else None,
                "vocabulary": vocabulary,
                "keep": tuple(keep) if keep else None,
                "min_units": named_numbers("--min-units", min_units) if min_units else None,
                "max_units": named_numbers("--max-units", max_units) if max_units else None,
                "rotate": rotate,
                "uniform": uniform,
                "block": block,
                "adapt_block": adapt_block,
                "power_of_two_heads": power_of_two_heads,
                "tokens": _tokens(tokens) if tokens else None,
                "tokens_restored": tokens_restored,
                "quantize": quantize,
                "method": method,
                "importance": importance,
                "outputs": tuple(names(outputs)) if outputs is not None else None,
                "mixture": mixture,
                "reconstruct": reconstruct,
                "seed": seed,
                "at": _given(at) or None,
                "cache": cache,
                "offload": offload,
                "finetune": trained if trained or finetune else None,
            }
        ),
    }


def _tokens(given: list[str]) -> dict[str, float] | str:
    return "search" if given == ["search"] else named_fractions("--tokens", given)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def make_config(options: Mapping[str, Any], **more: Any) -> PruneConfig:
    """The preset's config with what was given put over it; `more` are further fields, None where not given.

    Raises:
        ConfigError: no such preset, or a value that a field does not take.
    """
    from tilecut.config import PruneConfig, find_config

    given = {**options, **_given(more)}
    base = find_config(given.pop("preset"))
    assert base is not None
    held = base.model_dump()
    if any(name in given for name in OTHER_BUDGETS) and "sparsity" not in given:
        held.pop("sparsity")
    if "adapt_block" in given:
        held.pop("block")
    return PruneConfig(**{**held, **given})


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the parameters of `read_options` in the place of its parameter `options`."""
    own = inspect.signature(command, eval_str=True)
    shared = inspect.signature(read_options, eval_str=True).parameters
    merged = []
    for parameter in own.parameters.values():
        merged += shared.values() if parameter.name == "options" else [parameter]

    def called(**values: Any) -> None:
        command(options=read_options(**{name: values.pop(name) for name in shared}), **values)

    # typer reads these.
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {p.name: p.annotation for p in merged}
    called.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    return called
