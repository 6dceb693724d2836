"""Runs: from a pretrained model, with several seeds, by LoRA, stopped early; what cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from maha_attn.cli import main
from maha_attn.data.tokenizer import train_tokenizer
from maha_attn.evaluation.answering import answer_questions
from maha_attn.evaluation.spans import span_scores
from maha_attn.tasks import runs

from .conftest import Mistake, Train

PRETRAINED = ("--pretrained", "runs/mlm")


def test_fine_tuning_starts_from_the_pretrained_weights(train: Train, tmp_path: Path) -> None:
    train("sst.yaml", *PRETRAINED, "--train.learning_rate=0")
    before = load_file("runs/mlm/model/model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    carried = [name for name in before if name.startswith("model.")]
    assert carried
    assert set(after) - set(carried) == {"score.weight"}
    for name in carried:
        assert torch.equal(before[name], after[name]), name


def test_the_pretrained_model_takes_the_place_of_the_recipes(train: Train, tmp_path: Path) -> None:
    train("ende.yaml")  # its recipe alone
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "pretrained: null" in recipe
    train("sst.yaml", "--overwrite", *PRETRAINED)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"}
    assert config["causal"] is False
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "causal: false" in recipe
    tokenizer = (tmp_path / "run" / "model" / "tokenizer.json").read_text()
    assert tokenizer == Path("runs/mlm/model/tokenizer.json").read_text()


def test_saved_classifier_works_in_a_pipeline(train: Train, tmp_path: Path) -> None:
    train("sst.yaml", "--data.labels=[negative,positive]")
    folder = str(tmp_path / "run" / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    classify = pipeline("text-classification", model=model, tokenizer=folder, device="cpu")
    (found,) = classify("good film")  # pyright: ignore
    assert found["label"] in ("negative", "positive")


def test_what_is_soon_done_shows_no_bar(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train("sst.yaml", "--data.max_length=100")  # of which nothing is in the cache yet
    assert "|" not in capsys.readouterr().err


def test_seeds_give_runs_and_a_summary(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("sst.yaml", "--seeds=1,2,3")
    folder = tmp_path / "run"
    metrics = [
        json.loads((folder / f"seed-{s}" / "evaluation.json").read_text())["metrics"]
        for s in (1, 2, 3)
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == [1, 2, 3]
    found = summary["metrics"]["validation"]["accuracy"]
    values = torch.tensor([m["validation"]["accuracy"] for m in metrics])
    assert found["values"] == values.tolist()
    assert found["mean"] == pytest.approx(values.mean().item())
    assert found["std"] == pytest.approx(values.std().item())
    assert "Mean and standard deviation over seeds 1, 2, 3" in capsys.readouterr().out
    weights = [
        load_file(folder / f"seed-{s}/model/model.safetensors")["score.weight"] for s in (1, 2)
    ]
    assert not torch.equal(*weights)
    # What is finished is kept, what is missing is made.
    (folder / "seed-1" / "marker").touch()
    train("sst.yaml", "--seeds=1,4", "--resume")
    assert (folder / "seed-1" / "marker").exists()
    assert json.loads((folder / "summary.json").read_text())["seeds"] == [1, 4]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_lora_trains_updates_and_the_head_alone(train: Train, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train("sst.yaml", *PRETRAINED, "--lora.rank=2", "--train.learning_rate=0.1")
    before = load_file("runs/mlm/model/model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert set(after) == {name for name in before if name.startswith("model.")} | {"score.weight"}
    changed = {
        name for name in before if name in after and not torch.equal(before[name], after[name])
    }
    projections = {name for name in before if name.endswith("_proj.weight") or "_proj." in name}
    assert changed == projections
    for name in changed:  # at most rank 2
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2
    checkpoint = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert all("lora_" in name or "score" in name for name in checkpoint)


@pytest.mark.parametrize("logging_steps", [1, 100])  # seen in a line, or at the end
def test_a_diverged_run_stops(
    train: Train, tmp_path: Path, logging_steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train(
            "sst.yaml",
            *("--train.max_steps=10", "--train.learning_rate=1e30", "--train.max_grad_norm=0"),
            *(f"--train.logging_steps={logging_steps}", "--train.optim=sgd"),
        )
    assert ended.value.code == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 10
    said = capsys.readouterr().err
    assert "training diverged: the loss is nan after step" in said
    assert "lower train.learning_rate (now 1e+30)" in said
    assert not (tmp_path / "run" / "model").exists()


def test_stopping_early(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(
        "sst.yaml",
        *("--train.max_steps=50", "--train.learning_rate=0", "--train.early_stopping_patience=2"),
        *("--train.eval_strategy=steps", "--train.eval_steps=1", "--train.save_steps=1"),
        *("--train.load_best_model_at_end=true", "--train.metric_for_best_model=accuracy"),
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3
    best = next(line for line in map(json.loads, lines) if "eval_accuracy" in line)
    line = f"Stopped early at step 3: accuracy was best at step 1 ({best['eval_accuracy']:.4g})"
    assert capsys.readouterr().out.count(line) == 1


def test_translating_a_prompt(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train("ende.yaml")
    assert "bleu" in found["metrics"]["validation"]
    assert found["signatures"]["bleu_signature"].startswith("nrefs:1|")
    capsys.readouterr()
    main(["generate", str(tmp_path / "run"), "a dog 3", "--num_beams=2"])
    assert "a dog 3" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "found"), [("sst", "'label': "), ("mlm", "'token_str': "), ("qa", "Answer(text=")]
)
def test_what_writes_no_text_says_how_to_use_it(
    recipe: str, found: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(f"{recipe}.yaml")
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path / "run"), "a film"])
    _, advice = capsys.readouterr().err.strip().split("writes no text; use it in Python: ")
    exec(advice, {})
    assert found in capsys.readouterr().out


def test_answering_questions_as_evaluation_does(train: Train, tmp_path: Path) -> None:
    found = train("qa.yaml", "--train.max_steps=40", "--train.learning_rate=0.01")
    folder = tmp_path / "run" / "model"
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path("qa.jsonl").read_text().splitlines()]
    questions, contexts = ([row[name] for row in rows] for name in ("question", "context"))
    answers = answer_questions(
        model, tokenizer, questions, contexts, max_length=64, stride=8, batch_size=2
    )
    scores = span_scores(answers, [row["answers"]["text"] for row in rows])
    assert scores == pytest.approx(found["metrics"]["validation"])
    for answer, context in zip(answers, contexts, strict=True):
        assert answer.start is not None
        assert context.startswith(answer.text, answer.start)
    # One window, or many that overlap.
    (long,) = answer_questions(
        model, tokenizer, questions[:1], [contexts[0] * 9], max_length=64, stride=8
    )
    assert long.text
    with pytest.raises(ValueError, match="must be two lists of the same length, got str and list"):
        answer_questions(model, tokenizer, "Who?", contexts)
    with pytest.raises(ValueError, match="questions, row 2, field 'context': is empty"):
        answer_questions(model, tokenizer, questions[:2], [contexts[0], ""])


def test_model_and_tokenizer_of_a_run_belong_together(train: Train, tmp_path: Path) -> None:
    train("sst.yaml")
    run = runs.RunFolder(tmp_path / "run")
    train_tokenizer(["other text"], 270, framed=True).save_pretrained(run.model)
    with pytest.raises(
        ValueError, match=r"tokenizer has \d+ tokens and the model in .* they do not"
    ):
        runs.load_model(run)


def other_tokenizer(folder: Path, vocab_size: int) -> str:
    train_tokenizer(["xyxy zwzw " * 50], vocab_size, framed=True).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_is_not_the_pretrained_models(mistake: Mistake, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other", 264)
    line = mistake("sst.yaml", *PRETRAINED, f"--data.tokenizer={other}")
    assert "the tokenizer has 264 tokens and the model in runs/mlm/model has vocab_size" in line


def test_a_tokenizer_of_the_same_size_with_other_tokens(mistake: Mistake, tmp_path: Path) -> None:
    size = json.loads(Path("runs/mlm/model/config.json").read_text())["vocab_size"]
    train_tokenizer(["yz".join(map(chr, range(97, 123))) * 9], size, framed=True).save_pretrained(
        tmp_path / "other"
    )
    line = mistake("sst.yaml", *PRETRAINED, f"--data.tokenizer={tmp_path / 'other'}")
    assert "the tokenizer has other tokens than the model in runs/mlm/model" in line


def test_a_pretrained_model_of_another_kind(train: Train, mistake: Mistake, tmp_path: Path) -> None:
    train("ende.yaml", f"--train.output_dir={tmp_path / 'ende'}")
    line = mistake("sst.yaml", "--pretrained", str(tmp_path / "ende"))
    assert "ende' holds a model of type 'maha-seq2seq', whose weights have no place in a" in line
    line = mistake("ende.yaml", *PRETRAINED)
    assert "'runs/mlm' holds a model of type 'maha', whose weights have no place in a Maha" in line


def test_a_causal_model_is_no_start_for_a_task_that_sees_all(
    mistake: Mistake, tmp_path: Path
) -> None:
    shutil.copytree("runs/mlm/model", tmp_path / "causal")
    config = tmp_path / "causal" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"causal": True}))
    assert "is causal, and in this task every token sees all" in mistake(
        "sst.yaml", "--pretrained", str(tmp_path / "causal")
    )


def test_a_pretrained_model_without_all_its_weights(mistake: Mistake, tmp_path: Path) -> None:
    shutil.copytree("runs/mlm/model", tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    whole = load_file(weights)
    save_file({n: w for n, w in whole.items() if "norm" not in n}, weights, {"format": "pt"})
    line = mistake("sst.yaml", "--pretrained", str(tmp_path / "part"))
    assert "3 of the weights that its config.json describes, model.layers.0." in line
    save_file(whole | {"model.norm.weight": torch.ones(5)}, weights, {"format": "pt"})
    line = mistake("sst.yaml", "--pretrained", str(tmp_path / "part"))
    assert "1 of the weights that its config.json describes, model.norm.weight" in line
    weights.write_bytes(weights.read_bytes()[:-9])
    line = mistake("sst.yaml", "--pretrained", str(tmp_path / "part"))
    assert "model.safetensors is damaged or no safetensors file" in line


def test_a_head_for_other_classes_begins_anew(train: Train, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train("sst.yaml", f"--train.output_dir={first}")
    train("sst.yaml", "--data.labels=[bad,good,fine]", "--pretrained", str(first))
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert after["score.weight"].shape[0] == 3


def test_a_model_is_not_judged_by_other_classes(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("sst.yaml", "--data.labels=[bad,good]")
    stored = tmp_path / "run" / "recipe.yaml"
    text = stored.read_text()
    assert "  - good\n" in text
    stored.write_text(text.replace("  - good\n", "  - good\n  - fine\n"))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(tmp_path / "run")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (
        "the data have the classes bad, good, fine, and the model was trained for bad, good" in said
    )


def test_the_decoder_is_the_pretrained_ones(train: Train, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train("ende.yaml", "--model.num_decoder_layers=2", f"--train.output_dir={first}")
    train("ende.yaml", "--pretrained", str(first), "--train.learning_rate=0")
    before, after = (
        load_file(folder / "model" / "model.safetensors") for folder in (first, tmp_path / "run")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sst.yaml --pretrained nowhere", "pretrained 'nowhere' holds no model"),
        ("sst.yaml --pretrained runs/mlm --model.hidden_size=64", "model.hidden_size is 64 in the"),
        (
            "sst.yaml --data.columns.text=sentence",
            "sst.jsonl (data.train) has no column 'sentence'",
        ),
        (
            "sst.yaml --data.labels=[bad,good,fine] --data.max_length=4",
            "sst.jsonl, row 3, field 'text': the row has 6",
        ),
        ("sst.yaml --data.validation=book.txt", "book.txt (data.validation) has no column 'label'"),
        ("sst.yaml --data.columns.label=text", "data.columns must name different columns"),
        ("sst.yaml --variant=gpu", "no variant 'gpu'; there are none"),
        ("sst.yaml --seeds=1,a", "invalid seeds value: '1,a'"),
        ("sst.yaml --seeds=1,2,1", "seeds must differ, got 1, 2, 1"),
        ("sst.yaml --model.causal=true", "model.causal is false in every MahaForSequenceClassifi"),
        ("sst.yaml --train.metric_for_best_model=acc", "must be one of accuracy, f1, loss, majo"),
        ("sst.yaml --train.learning_rate=-1", "train.learning_rate must be at least 0, got -1"),
        (
            "sst.yaml --train.per_device_train_batch_size=0",
            "train.per_device_train_batch_size must be at least 1, got 0",
        ),
        ("sst.yaml --lora.rank=2", "lora.rank adapts a pretrained model: give --pretrained"),
        ("sst.yaml --lora.rank=0", "lora.rank must be at least 1, got 0"),
        (
            "sst.yaml --pretrained runs/mlm --lora.rank=2 --lora.targets=[nope]",
            "No modules were targeted for adaptation",
        ),
        ("mlm.yaml --data.mask_probability=2", "data.mask_probability must lie between 0 and 1"),
        ("mlm.yaml --generation.num_beams=0", "generation.num_beams must be at least 1, got 0"),
        ("mlm.yaml --data.mask_probability=x", "data.mask_probability"),
        ("ende.yaml --data.limit=0", "data.limit must be at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(
    mistake: Mistake, arguments: str, message: str
) -> None:
    assert message in mistake(*arguments.split())


def test_unknown_task(mistake: Mistake, place: Path) -> None:
    (place / "bad.yaml").write_text("task: parsing\ndata: {train: a}")
    assert "task must be one of language_modeling, masked" in mistake("bad.yaml")


@pytest.mark.parametrize(
    ("recipe", "changes", "named"),
    [
        ("sst.yaml", ["--model.layer_types=[mamba2]"], "mamba2 has no bidirectional form"),
        ("sst.yaml", ["--model.layer_types=[performer]"], "performer would take padding for text"),
        (
            "sst.yaml",
            ["--model.layer_types=[linformer]", "--model.max_position_embeddings=8"],
            "linformer is made for rows of one length; set model.max_position_embeddings (now 8)",
        ),
    ],
)
def test_a_model_that_cannot_do_its_task(
    mistake: Mistake, recipe: str, changes: list[str], named: str
) -> None:
    assert named in mistake(recipe, "--model.num_hidden_layers=1", *changes)
