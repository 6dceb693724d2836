"""Training a causal language model: our model and rows, transformers' Trainer, a run folder."""

from typing import cast

from transformers import DataCollatorForLanguageModeling, set_seed

from maha_attn.data.corpus import Rows
from maha_attn.models import MahaConfig, MahaForCausalLM
from maha_attn.training.arguments import RunArguments
from maha_attn.training.checkpoint import full_disk_explained
from maha_attn.training.distributed import shard
from maha_attn.training.identity import identify_data, identify_settings
from maha_attn.training.metrics import MetricsFile
from maha_attn.training.run_folder import RunFolder
from maha_attn.training.trainer import RunTrainer


def train_model(
    config: MahaConfig,
    arguments: RunArguments,
    rows: Rows,
    run: RunFolder,
    resume: bool = False,
) -> MahaForCausalLM:
    """Train a model and save it with its tokenizer in the run folder.

    Args:
        config: The model; the size of its vocabulary and its special tokens become the tokenizer's.
        arguments: The Trainer's. It takes a GPU where there is one.
        rows: The text.
        run: Where metrics, checkpoints and the model go.
        resume: Continue from the run's last complete checkpoint, where there is one.

    Raises:
        RunError: The checkpoint is damaged or belongs to another run, or the disk is full.
    """
    tokenizer = rows.tokenizer
    config.vocab_size = len(tokenizer)
    config.eos_token_id = cast(int, tokenizer.eos_token_id)
    config.pad_token_id = cast(int, tokenizer.pad_token_id)
    set_seed(arguments.seed)
    model = MahaForCausalLM(config)
    if arguments.shard:
        shard(model, arguments.device)
    trainer = RunTrainer(
        belongs_to=identify_settings(run.settings())
        | identify_data(rows.train, tokenizer, arguments),
        model=model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[MetricsFile(run.metrics)],
    )
    with full_disk_explained(run.path):
        trainer.train_on(run.last_checkpoint() if resume else None)
        trainer.save_to(run.model)
    return MahaForCausalLM.from_pretrained(run.model) if arguments.shard else model
