"""lm-evaluation-harness on a model of ours, offline: its numbers are those of our own scoring."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from maha_attn.data.tokenizer import train_tokenizer
from maha_attn.evaluation.perplexity import token_nll
from maha_attn.models import MahaConfig, MahaForCausalLM

pytest.importorskip("lm_eval", reason="needs the extra lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # The harness's own.

TEXTS = ["the cat sat on the mat", "a dog — naïve — ran"]
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


def test_local_task_agrees_with_our_perplexity(tmp_path: Path) -> None:
    from maha_attn.evaluation.harness import run_harness

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = tmp_path / "local_text.yaml"
    task.write_text(TASK.format(file=file))
    tokenizer = train_tokenizer(TEXTS, 280)
    torch.manual_seed(0)
    config = MahaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_scales=2,
        window=4,
        initializer_range=0.6,
    )
    model = MahaForCausalLM(config).eval()
    found = run_harness(model, tokenizer, [str(task)], batch_size=2)["local_text"]
    end = tokenizer.eos_token_id
    nll = sum(
        token_nll(model, np.array([end, *tokenizer.encode(text)]), 99).sum() for text in TEXTS
    )
    words, num_bytes = sum(len(t.split()) for t in TEXTS), sum(len(t.encode()) for t in TEXTS)
    assert found["bits_per_byte,none"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-5)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(nll / words), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere.yaml", "'nowhere.yaml' does not exist"), ("no_such", "no task 'no_such'")],
)
def test_unknown_task(name: str, message: str) -> None:
    from maha_attn.evaluation.harness import run_harness

    with pytest.raises(ValueError, match=message):
        run_harness(None, None, [name], 1)  # pyright: ignore[reportArgumentType]
