"""The tokenizer: exact, deterministic, and byte for byte accountable."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from maha_attn.data.tokenizer import (
    END,
    PADDING,
    load_tokenizer,
    make_tokenizer,
    token_bytes,
    train_tokenizer,
)

TEXT = "the cat sat on the mat; the café’s cat — naïve — sat there. " * 20
TOKENIZER = train_tokenizer([TEXT], 300)
BYTES_OF = token_bytes(TOKENIZER)


@given(st.text())
def test_tokens_stand_for_exactly_the_bytes_of_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert b"".join(BYTES_OF[i] for i in ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_training_is_deterministic_and_merges_what_is_frequent() -> None:
    again = train_tokenizer([TEXT], 300)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert 258 < len(again) <= 300
    assert len(TOKENIZER.encode(" the")) == 1


def test_special_tokens_differ_and_have_no_bytes() -> None:
    special = TOKENIZER.convert_tokens_to_ids([END, PADDING])
    assert [TOKENIZER.eos_token_id, TOKENIZER.pad_token_id] == special == [0, 1]
    assert BYTES_OF[:2] == [b"", b""]


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258.*got 257"):
        train_tokenizer([TEXT], 257)


def test_load_equals_saved_and_refuses_others(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good").encode(TEXT) == TOKENIZER.encode(TEXT)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="not byte-level"):
        load_tokenizer(tmp_path / "words")


def test_frame() -> None:
    framed = train_tokenizer([TEXT], 300, framed=True)
    start, end = framed.cls_token_id, framed.eos_token_id
    assert framed.mask_token_id not in (None, start, end, framed.pad_token_id)
    one, other = (framed.encode(text, add_special_tokens=False) for text in ("the cat", "sat"))
    assert framed("the cat").input_ids == [start, *one, end]
    assert framed("the cat", "sat").input_ids == [start, *one, end, *other, end]
    assert framed.decode(framed("the cat").input_ids, skip_special_tokens=True) == "the cat"


def test_frame_of_a_tokenizer_without_start_adds_no_token(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    framed = make_tokenizer(str(tmp_path), [], 0, framed=True)
    assert len(framed) == len(TOKENIZER)
    assert framed.cls_token_id == framed.eos_token_id
    framed.save_pretrained(tmp_path / "again")
    again = make_tokenizer(str(tmp_path / "again"), [], 0, framed=True)
    assert again("a", "b").input_ids == framed("a", "b").input_ids
