"""lm-evaluation-harness on a model of ours, offline: its numbers are those of our own scoring."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from maha_attn.cli import main
from maha_attn.data.tokenizer import load_tokenizer
from maha_attn.evaluation.perplexity import score_tokens
from maha_attn.models import MahaForCausalLM

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


RECIPE = """
model: {vocab_size: 280, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,
        num_attention_heads: 2, num_scales: 2, window: 4, initializer_range: 0.6}
data: {train: [book.txt], sequence_length: 16}
train: {max_steps: 1, per_device_train_batch_size: 2, use_cpu: true, report_to: none,
        disable_tqdm: true, output_dir: run}
generation: {max_new_tokens: 1}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, its text and a task."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "book.txt").write_text("The cat sat on the mat; a dog ran.\n" * 30)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    )
    (tmp_path / "local_text.yaml").write_text(TASK.format(file=tmp_path / "texts.jsonl"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_saved_model_on_a_local_task(place: Path) -> None:
    main(["train", "recipe.yaml"])
    main(["eval", "run", "--harness_tasks=[local_text.yaml]", "--batch_size=2"])
    found = json.loads((place / "run" / "evaluation.json").read_text())["harness"]["local_text"]
    model = MahaForCausalLM.from_pretrained(place / "run" / "model").eval()
    tokenizer = load_tokenizer(place / "run" / "model")
    end = tokenizer.eos_token_id
    nll = sum(
        score_tokens(model, np.array([end, *tokenizer.encode(text)]), 99).nll.sum()
        for text in TEXTS
    )
    words, num_bytes = sum(len(t.split()) for t in TEXTS), sum(len(t.encode()) for t in TEXTS)
    assert found["bits_per_byte,none"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-5)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(nll / words), rel=1e-4)


def test_a_task_of_functions(place: Path) -> None:
    (place / "functions.py").write_text("def target(row):\n    return row['text'][::-1]\n")
    text = (place / "local_text.yaml").read_text().replace("local_text", "backwards")
    text = text.replace('doc_to_target: "{{text}}"', "doc_to_target: !function functions.target")
    (place / "backwards.yaml").write_text(text)
    main(["train", "recipe.yaml", "--evaluation.harness_tasks=[backwards.yaml]"])
    found = json.loads((place / "run" / "evaluation.json").read_text())["harness"]
    assert found["backwards"]["bits_per_byte,none"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "'nowhere.yaml' does not exist"),
        ("no_such", "no task 'no_such'"),
        ("recipe.yaml", "'recipe.yaml' names no task"),
    ],
)
def test_unknown_tasks_are_told_before_training(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "recipe.yaml", f"--evaluation.harness_tasks=[{name}]"])
    assert message in capsys.readouterr().err
    assert not (place / "run").exists()
