"""How well masked tokens are predicted, with masks that are the same in every evaluation."""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True, kw_only=True)
class MaskedSettings:
    """How predictions of masked tokens are scored.

    Args:
        batch_size: Rows at once.
        seed: Of the choice of the masked tokens.
        usage_rows: Rows over which the use of the scales is averaged.
    """

    batch_size: int = 8
    seed: int = 0
    usage_rows: int = 16


@torch.inference_mode()
def masked_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    mask_probability: float,
    settings: MaskedSettings,
) -> dict[str, float]:
    """Perplexity and accuracy over the masked tokens.

    The perplexity is ``exp`` of the mean ``-log p`` of a masked token given all others; it is not
    the perplexity of a text, and not comparable with a causal model's.
    """
    model.eval()
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=mask_probability, seed=settings.seed
    )
    nll = right = count = 0
    steps = range(0, len(rows), settings.batch_size)
    for start in tqdm(steps, desc="Scoring masked tokens", delay=2):
        some = range(start, min(start + settings.batch_size, len(rows)))
        batch = collator([rows[i] for i in some])
        labels = batch.pop("labels").to(model.device)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        masked = labels != -100
        logits, labels = logits[masked].float(), labels[masked]
        nll += cross_entropy(logits, labels, reduction="sum").double().item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    return {
        "masked_perplexity": math.exp(nll / count),
        "masked_accuracy": 100 * right / count,
        "masked_tokens": count,
    }
