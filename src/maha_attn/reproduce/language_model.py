"""The kind ``language_model``: train on the books, score the held-out ones, look at the fusion."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from maha_attn.data.corpus import Rows, make_rows, make_tokenizer, read_texts
from maha_attn.data.tokenizer import token_bytes
from maha_attn.evaluation.adaptivity import weight_variation
from maha_attn.evaluation.documents import document_units, score_documents, split_documents
from maha_attn.evaluation.evaluate import stream
from maha_attn.experiments.statistics import bits_per_byte, bootstrap_error
from maha_attn.explain.attention import explain_text
from maha_attn.models import MahaConfig, MahaForCausalLM
from maha_attn.reproduce.job import Clock, Job
from maha_attn.training.recipe import Recipe, load_recipe, recipe_parser
from maha_attn.training.run_folder import RunFolder, create_run, resume_run
from maha_attn.training.train import train_model

SENTENCE_TOKENS = 32
"""Length of the held-out passage whose attention is kept."""


@dataclass(frozen=True)
class Text:
    """What every row of a table learns from and is judged by."""

    rows: Rows
    documents: list[NDArray[np.int64]]
    units: list[dict[str, int]]
    fingerprint: str


def train_language_model(job: Job, clock: Clock) -> dict[str, Any] | None:
    """Train, evaluate, and return the result; None: stopped by the clock, to be continued."""
    recipe = job_recipe(job)
    text = _text(json.dumps(recipe.settings["data"]), recipe.model.vocab_size)
    run = _run_folder(job, recipe)
    callback = _Watch(clock)
    with _peak_memory(job.device) as peak:
        model = train_model(
            recipe.model,
            recipe.train,
            text.rows,
            run,
            resume=run.last_checkpoint() is not None,
            callbacks=[callback],
        )
    if callback.stopped:
        shutil.rmtree(run.model)
        return None
    clock.show(1, 1, "evaluating")
    result = _evaluate(model, recipe, text)
    curve = _loss_curve(run, recipe)
    result["metrics"] |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_s": curve.pop("tokens_per_s"),
        "peak_bytes": peak[0],
        "final_loss": curve["loss"][-1],
    }
    for checkpoint in run.path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {
        **result,
        "settings": recipe.settings,
        "data": {
            "fingerprint": text.fingerprint,
            "train_tokens": curve["tokens"][-1],
            "documents": len(text.documents),
        },
        "curves": curve,
    }


def job_recipe(job: Job) -> Recipe:
    """The complete settings of a run: its recipe, what differs, its seed, its device."""
    recipe = _recipe(job, job.row)
    if job.experiment.match_parameters is not None:
        reference = _recipe(job, job.experiment.match_parameters)
        width = matched_width(recipe.model, count_parameters(reference.model))
        recipe.model.intermediate_size = width
        recipe.settings["model"]["intermediate_size"] = width
    return recipe


@cache
def _parser() -> Any:
    """Made once: it takes seconds."""
    return recipe_parser()


def _recipe(job: Job, row: str) -> Recipe:
    """A row's settings as `load_recipe` reads them."""
    experiment = job.experiment
    assert experiment.recipe is not None
    settings = experiment.merged(row, job.budget) | {
        "train.output_dir": str(job.folder),
        "train.seed": job.seed,
        "train.disable_tqdm": True,
        "train.report_to": "none",
    }
    if job.device.type == "cpu":
        settings |= {"train.use_cpu": True, "train.bf16": False, "train.optim": "adamw_torch"}
    overrides = [f"--{name}={_literal(value)}" for name, value in settings.items()]
    return load_recipe(_parser(), experiment.recipe, overrides)


def _literal(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def count_parameters(config: MahaConfig) -> int:
    """Parameters of a language model, none of them made."""
    with torch.device("meta"):
        return sum(p.numel() for p in MahaForCausalLM(config).parameters())


def matched_width(config: MahaConfig, parameters: int) -> int:
    """The ``intermediate_size``, a multiple of 8, that comes closest to a number of parameters.

    Raises:
        ValueError: Even the narrowest feed-forward part leaves more than 2 % too many.
    """
    counts = []
    for width in (8, 16):
        sized = MahaConfig(**{**config.to_dict(), "intermediate_size": width})
        counts.append(count_parameters(sized))
    width = max(8, 8 * round((parameters - counts[0]) / (counts[1] - counts[0]) + 1))
    found = counts[0] + (width // 8 - 1) * (counts[1] - counts[0])
    if abs(found - parameters) > 0.02 * parameters:
        raise ValueError(
            f"no feed-forward width gives {parameters:,} parameters within 2 %: the closest, "
            f"{width}, gives {found:,}"
        )
    return width


@lru_cache(maxsize=1)
def _text(data: str, vocab_size: int) -> Text:
    """Read, tokenise and pack once for all rows of a process."""
    from maha_attn.data.corpus import DataSettings

    settings = DataSettings(**json.loads(data))
    texts = read_texts(settings)
    tokenizer = make_tokenizer(settings, texts, vocab_size)
    rows = make_rows(texts, tokenizer, settings.sequence_length)
    documents = split_documents(stream(rows.held_out), cast(int, tokenizer.eos_token_id))
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for part in (*texts.train, *texts.held_out):
        digest.update(part.encode())
    return Text(
        rows,
        documents,
        document_units(documents, token_bytes(tokenizer), settings.sequence_length),
        digest.hexdigest(),
    )


def _run_folder(job: Job, recipe: Recipe) -> RunFolder:
    """The folder of an interrupted run that these settings can continue, or a new one."""
    if RunFolder(job.folder).last_checkpoint() is not None:
        try:
            return resume_run(str(job.folder), recipe.settings)
        except ValueError:
            pass  # Of other settings: begun anew.
    return create_run(str(job.folder), recipe.settings, overwrite=True)


class _Watch(TrainerCallback):
    """Shows progress, and has a checkpoint written when the time is up."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.stopped = clock, False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step, unless it is the last one."""
        losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        note = next((f"loss {loss:.3f}" for loss in losses), "")
        self.clock.show(state.global_step, state.max_steps, note)
        if self.clock.is_up and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Most memory allocated meanwhile, in bytes, as the one item of a list; None on a CPU."""
    found: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found[0] = torch.cuda.max_memory_allocated(device)


def _loss_curve(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """What training logged: ``tokens`` seen, ``loss``, and the median ``tokens_per_s``.

    The Trainer waits for the device whenever it logs, so the time between two lines is that of the
    work; the median leaves out the first ones and those in which a checkpoint was written.
    """
    train = recipe.train
    per_step = recipe.settings["data"]["sequence_length"]
    per_step *= train.train_batch_size * train.gradient_accumulation_steps
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    speeds = [
        (after["step"] - before["step"]) * per_step / (after["elapsed_s"] - before["elapsed_s"])
        for before, after in pairwise(lines)
        if after["elapsed_s"] > before["elapsed_s"]
    ]
    return {
        "tokens": [line["step"] * per_step for line in lines],
        "loss": [line["loss"] for line in lines],
        "tokens_per_s": float(np.median(speeds)) if speeds else None,
    }


def _evaluate(model: PreTrainedModel, recipe: Recipe, text: Text) -> dict[str, Any]:
    """Scores of the held-out books, the fusion's weights on them, attention on one passage."""
    length, settings, bf16 = recipe.data.sequence_length, recipe.evaluation, recipe.train.bf16
    scores = score_documents(model, text.documents, text.units, length, settings.batch_size, bf16)
    documents, first = scores["documents"], text.documents[0]
    tokens, words, nll = (
        math.fsum(d[name] for d in documents) for name in ("tokens", "words", "nll")
    )
    error = bootstrap_error(lambda i: bits_per_byte([documents[k] for k in i]), len(documents))
    passage = first[:SENTENCE_TOKENS].tolist()
    return {
        "metrics": {
            "bits_per_byte": bits_per_byte(documents),
            "bits_per_byte_error": None if math.isnan(error) else error,
            "perplexity": math.exp(nll / tokens),
            "word_perplexity": math.exp(nll / words),
        },
        **scores,
        "fusion": weight_variation(model, first, length, settings.usage_rows, bf16),
        "attention": explain_text(model, text.rows.tokenizer, passage, bf16),
    }
