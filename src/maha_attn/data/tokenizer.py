"""A byte-level BPE tokenizer: made, and its tokens turned back into bytes."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PADDING = "<|padding|>"
MIN_VOCAB_SIZE = 256 + 2
"""Every byte is a token, so that any text can be written; then END and PADDING."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer; nothing is unknown to it, and decoding gives the text back exactly.

    Args:
        texts: What to learn merges from: the training part only.
        vocab_size: Tokens, at least 258; a short text may not fill them.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes, {END} and {PADDING}), "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, padding_side="left"
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a byte-level tokenizer that was saved in a folder.

    Raises:
        ValueError: There is none, or it is not byte-level or marks no end of text.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(
            f"tokenizer folder {str(folder)!r} has no tokenizer.json; give a folder that "
            "save_pretrained of a tokenizer made, or leave data.tokenizer out to train one"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        raise ValueError(
            f"the tokenizer in {str(folder)!r} is not byte-level, so its tokens have no bytes to "
            "count; leave data.tokenizer out to train one that is"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer in {str(folder)!r} has no eos_token to end a document")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    return tokenizer


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes that each token of a byte-level tokenizer stands for; none for special tokens."""
    byte_of = _byte_of_character()
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [
        b"" if i in special else bytes(byte_of[character] for character in token)
        for i, token in enumerate(tokens)
    ]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable alphabet of the 256 bytes: printable ones as they are, others from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
