"""The models in transformers' pipelines, with a tokenizer made here."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

WORDS = ["<pad>", "<eos>", "<mask>", "<unk>", "it", "was", "the", "best", "of", "times", "worst"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        padding_side="left",
    )


def test_text_generation(tiny, tokenizer):
    model = tiny.lm(vocab_size=len(WORDS), eos_token_id=1)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["it was", "it was the best of"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batch = [out[0]["generated_text"] for out in generate(prompts, batch_size=2, **options)]
    assert batch == alone
    assert all(t.startswith(p) and t != p for t, p in zip(alone, prompts, strict=True))


def test_fill_mask(tiny, tokenizer):
    model = tiny.mlm(vocab_size=len(WORDS))
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    answers = fill("it was the <mask> of times", top_k=3)
    assert len(answers) == 3
    assert answers[0]["score"] >= answers[1]["score"]
    assert answers[0]["sequence"].startswith("it was the")


def test_text_classification(tiny, tokenizer):
    labels = {0: "bad", 1: "good", 2: "neither"}
    model = tiny.classifier(vocab_size=len(WORDS), causal=False, id2label=labels)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = ["it was the best of times", "worst"]
    batch = classify(texts, batch_size=2, top_k=None)
    for text, scores in zip(texts, batch, strict=True):
        assert {score["label"] for score in scores} == set(labels.values())
        assert sum(score["score"] for score in scores) == pytest.approx(1)
        assert scores[0]["label"] == classify(text)[0]["label"]
        assert scores[0]["score"] == pytest.approx(classify(text)[0]["score"], rel=1e-4)
