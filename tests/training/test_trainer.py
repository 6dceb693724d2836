"""The Trainer resumes bit for bit whatever it trains, and in whatever way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    set_seed,
)

from maha_attn.data.tokenizer import train_tokenizer
from maha_attn.models import MahaConfig, MahaForCausalLM, MahaForMaskedLM
from maha_attn.training import checkpoint as disk
from maha_attn.training.arguments import RunArguments
from maha_attn.training.trainer import RunTrainer

Make = Callable[..., RunTrainer]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["one two three"], 258)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Make:
    """Make a Trainer of sixteen steps, six an epoch, as a fresh process would."""

    def trainer(
        name: str, masked: bool = False, lora: bool = False, patience: int = 0, **options: Any
    ) -> RunTrainer:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(2, 30, (48,), generator=generator).tolist()
        rows = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
        dataset = Dataset.from_dict({"input_ids": rows})
        arguments = RunArguments(
            **{
                "output_dir": str(tmp_path / name),
                **{"max_steps": 16, "save_steps": 4, "logging_steps": 3, "learning_rate": 1e-2},
                **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
                **{"use_cpu": True, "report_to": "none", "disable_tqdm": True},
                **options,
            }
        )
        set_seed(arguments.seed)
        config = MahaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_scales=2,
            window=4,
            pad_token_id=tokenizer.pad_token_id,
        )
        model: Any = MahaForMaskedLM(config) if masked else MahaForCausalLM(config)
        if lora:
            peft = pytest.importorskip("peft")
            targets = {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.2}
            model = peft.get_peft_model(model, peft.LoraConfig(**targets))
        return RunTrainer(
            belongs_to={},
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(8)),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=masked),
            processing_class=tokenizer,
            callbacks=[EarlyStoppingCallback(patience)] if patience else [],
        )

    return trainer


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"masked": True},
        {"masked": True, "dataloader_num_workers": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"lora": True, "weight_decay": 0.1},
        {"bf16": True, "gradient_checkpointing": True},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3, "optim": "adafactor"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=lambda options: " ".join(options),
)
def test_resumed_equals_uninterrupted(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    make("whole", **options).train_on(None)
    cut_off = shutil.ignore_patterns("checkpoint-12", "checkpoint-16")
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=cut_off)
    torch.manual_seed(99)
    make("run", **options).train_on(tmp_path / "run" / "checkpoint-8")
    files = [
        json.loads((tmp_path / name / "checkpoint-16" / "manifest.json").read_text())["files"]
        for name in ("run", "whole")
    ]
    if "eval_strategy" in options:  # how fast each was stands in its state
        for manifest in files:
            del manifest["trainer_state.json"]
    assert files[0] == files[1]


def test_masks_change_with_the_epoch_and_the_rows(make: Make) -> None:
    collate = make("run", masked=True).repeatable
    rows = [{"input_ids": list(range(100))}]
    first = collate(rows)["input_ids"]
    torch.manual_seed(7)
    assert torch.equal(collate(rows)["input_ids"], first)
    assert not torch.equal(
        collate([{"input_ids": list(range(1, 101))}])["input_ids"][:, :-1], first
    )
    collate.epoch = 1
    assert not torch.equal(collate(rows)["input_ids"], first)


def test_early_stopping_counts_on(make: Make, tmp_path: Path) -> None:
    options = {
        **{"patience": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
        **{"load_best_model_at_end": True, "learning_rate": 1e-20, "max_steps": 9},
    }
    trainer = make("run", **options)
    trainer.train_on(None)
    assert trainer.state.global_step == 4  # the first was the best
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = make("run", **options)
    again.train_on(tmp_path / "run" / "checkpoint-3")
    assert again.state.global_step == 4


def test_a_finished_run_is_not_trained_further(make: Make, tmp_path: Path) -> None:
    make("run", max_steps=4).train_on(None)
    again = make("run", max_steps=4)
    again.train_on(tmp_path / "run" / "checkpoint-4")
    assert again.state.global_step == 4


def test_save_total_limit_keeps_the_newest(make: Make, tmp_path: Path) -> None:
    make("run", save_total_limit=1, save_steps=2, max_steps=6).train_on(None)
    assert [path.name for path in disk.checkpoints(tmp_path / "run")] == ["checkpoint-6"]


def test_weights_of_another_model_are_refused(make: Make, tmp_path: Path) -> None:
    make("run", max_steps=4).train_on(None)
    other = make("run", max_steps=4, masked=True)
    other.model = MahaForCausalLM(MahaConfig(**{**other.model.config.to_dict(), "vocab_size": 7}))
    with pytest.raises(disk.RunError, match="are not those of this model"):
        other._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-4"))


def test_a_process_trains_on_one_gpu_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = RunArguments(output_dir=str(tmp_path), per_device_train_batch_size=4)
    assert arguments.device is not None  # It counts the GPUs.
    monkeypatch.setattr(arguments, "_n_gpu", 3)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 4
