"""A byte-level BPE tokenizer: made, loaded, and its tokens turned back into bytes."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PADDING = "<|padding|>"
START = "<|startoftext|>"
MASK = "<|mask|>"

_LONG = 5_000_000
"""Characters whose merges take about two seconds to learn: more of them get a progress bar."""


def make_tokenizer(
    folder: str | None, texts: Iterable[str], vocab_size: int, framed: bool = False
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder, or without one train it on ``texts``; framed if asked for."""
    if folder is None:
        return train_tokenizer(texts, vocab_size, framed)
    tokenizer = load_tokenizer(folder)
    return frame(tokenizer) if framed else tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, framed: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer; nothing is unknown to it, and decoding gives the text back exactly.

    Args:
        texts: What to learn merges from: the training part only.
        vocab_size: Tokens, at least every byte and the special ones; a short text may not fill
            them.
        framed: Have START and MASK too, and frame texts as :func:`frame` does.
    """
    special = [END, PADDING, START, MASK] if framed else [END, PADDING]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size must be at least {256 + len(special)} (256 bytes, {', '.join(special)}), "
            f"got {vocab_size}"
        )
    texts, first, num_characters = iter(texts), [], 0
    while num_characters <= _LONG and (text := next(texts, None)) is not None:
        first.append(text)
        num_characters += len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=num_characters > _LONG,
    )
    tokenizer.train_from_iterator(chain(first, texts), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, padding_side="left"
    )
    if not framed:
        return made
    made.add_special_tokens({"cls_token": START, "mask_token": MASK})
    return frame(made)


def frame(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make ``tokenizer(text)`` frame its text: ``START text END``, pairs ``START a END b END``.

    A tokenizer that has its own frame keeps it. START is its cls, bos or eos token, whichever it
    has first, so that no token is added that a trained model has not seen. Padding goes right.
    """
    tokenizer.padding_side = "right"
    if tokenizer.num_special_tokens_to_add(pair=True):
        return tokenizer
    end = str(tokenizer.eos_token)
    start = str(tokenizer.cls_token or tokenizer.bos_token or end)
    tokenizer.cls_token, tokenizer.sep_token = start, end
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B {end}",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in {start, end}],  # pyright: ignore[reportArgumentType]
    )
    return tokenizer


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a byte-level tokenizer that was saved in a folder.

    Raises:
        ValueError: There is none, it cannot be read, is not byte-level or marks no end of text.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(
            f"tokenizer folder {str(folder)!r} has no tokenizer.json; give a folder that "
            "save_pretrained of a tokenizer made, or leave data.tokenizer out to train one"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # The tokenizers library raises Exception itself.
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
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


@lru_cache(maxsize=4)
def backend(
    tokenizer_json: str, max_length: int | None = None, stride: int | None = None
) -> Tokenizer:
    """The tokenizers library's object, out of all that the cache of tokenised rows depends on.

    Args:
        tokenizer_json: ``tokenizer.backend_tokenizer.to_str()``.
        max_length: Cut to so many tokens, of a pair the second text only if ``stride`` is given.
        stride: Tokens that successive windows of what was cut share.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if max_length is not None:
        strategy = "longest_first" if stride is None else "only_second"
        tokenizer.enable_truncation(max_length, stride=stride or 0, strategy=strategy)
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
