"""What two runs must share to stand in one table, and a run with its recipe to be up to date."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maha_attn.experiments.definition import Experiment, experiments
from maha_attn.experiments.results import RefusedError, Result

PARAMETERS_WITHIN = 0.02
"""Rows count as equally large within this share."""
_SEED_AND_PLACES = ("train.seed", "train.output_dir", "train.run_name", "pretrained")
_NO_MATTER = (
    *("train.logging_", "train.log_", "train.disable_tqdm", "train.report_to", "train.project"),
    *("train.dataloader_num_workers", "train.dataloader_p", "train.trackio", "train.hub_"),
    *("train.save_", "train.push_to_hub", "train.ddp_", "train.use_cpu", "train.gradient_checkp"),
    *("train.per_device_eval_batch_size", "evaluation.batch_size", "data.num_proc"),
    *("model.backend", "model.loss_chunk", "model.recompute", "model.use_cache"),
    *("model.transformers_version", "lora.alpha", "lora.dropout", "lora.targets"),
)
"""Beginnings of the names of settings that change how, or how fast, the same thing is computed."""
_BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def matter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that bear on a result, by dotted names.

    Left out: seed and places, what is logged and saved, and what computes the same differently. A
    batch is cut as memory has it, so ``train.rows_a_step`` stands for both of its factors. How text
    is generated bears on translations alone.
    """
    flat: dict[str, Any] = {}
    for section, options in json.loads(json.dumps(settings)).items():
        inner = options.items() if isinstance(options, dict) else [(None, options)]
        flat |= {f"{section}.{name}" if name else section: value for name, value in inner}
    if all(name in flat for name in _BATCH):
        flat["train.rows_a_step"] = flat[_BATCH[0]] * flat[_BATCH[1]]
    left_out = (*_SEED_AND_PLACES, *_NO_MATTER, *_BATCH)
    if flat.get("task") != "translation":
        left_out += ("generation.",)
    return {name: value for name, value in flat.items() if not name.startswith(left_out)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs in two results of :func:`matter`: ``train.max_steps was 254 and is 300``.

    An option that only one side knows is of another version of the code, and is left out.
    """
    return [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def check_comparable(results: Sequence[Result], experiment: Experiment) -> None:
    """Refuse rows of one table that differ in what is no row's own.

    That is data, budget, class of device, every setting that matters but those in which the rows
    are defined to differ, and, where they are to be matched, the number of parameters by over 2 %.

    Raises:
        RefusedError: Naming what differs and in which files.
    """
    for name in ("data", "budget", "device_class"):
        fields = [(r[name]["fingerprint"] if name == "data" else r[name], r) for r in results]
        _require_one(name, fields)
    known = [(matter(r["settings"]), _own(r["row"], experiment), r) for r in results]
    for name in dict.fromkeys(name for settings, _, _ in known for name in settings):
        having = [(s[name], own, r) for s, own, r in known if name in s]
        _require_one(name, [(value, r) for value, own, r in having if name not in own])
        for row in {r["row"] for _, own, r in having if name in own}:
            _require_one(name, [(value, r) for value, _, r in having if r["row"] == row])
    _check_parameters(results, experiment)


def _require_one(name: str, values: Iterable[tuple[Any, Result]]) -> None:
    """All values are the same."""
    found: list[tuple[Any, Path]] = []
    for value, result in values:
        if value not in [other for other, _ in found]:
            found.append((value, result.path))
    if len(found) > 1:
        where = "; ".join(f"{value} in {path}" for value, path in found)
        raise RefusedError(f"rows of one table differ in {name}: {where}")


def _own(row: str, experiment: Experiment) -> set[str]:
    """The settings in which a row may differ from others, by dotted names."""
    chain = [experiment]
    if experiment.pretrained is not None:
        chain.append(experiments()[experiment.pretrained])
    own: set[str] = set()
    for source in chain:
        if (defined := source.rows.get(row)) is not None:
            own |= defined.settings.keys()
            own |= {"model.layer_types"} if defined.attention else set()
        own |= {"model.intermediate_size"} if source.match_parameters else set()
    if experiment.kind != "training":
        own |= {"attentions", "directions"}
    return own


def _check_parameters(results: Sequence[Result], experiment: Experiment) -> None:
    """Every row is as large as the one that all are matched with, where it is among them."""
    base = experiment.pretrained and experiments()[experiment.pretrained].match_parameters
    reference = experiment.match_parameters or base
    sizes = [(r["metrics"].get("parameters"), r) for r in results]
    wanted = next((size for size, r in sizes if r["row"] == reference and size), None)
    for size, result in sizes:
        if wanted and size and abs(size - wanted) > PARAMETERS_WITHIN * wanted:
            raise RefusedError(
                f"rows of one table differ in parameters by more than {PARAMETERS_WITHIN:.0%}: "
                f"{reference} has {wanted:,}, {result.path} {size:,}"
            )
