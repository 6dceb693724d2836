"""Continuing a text, or translating one."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How text is continued.

    Args:
        prompt: The text to continue or to translate.
        max_new_tokens: Tokens to add.
        temperature: Of the sampling; 0 takes the likeliest token each time.
        top_p: Sample among the likeliest tokens of this much probability.
        num_beams: Beams of the search for the likeliest text; 1 for none.
        seed: Of the sampling.
    """

    prompt: str = "It was"
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types do not say."""
        for name, low, high in (
            *(("max_new_tokens", 1, None), ("num_beams", 1, None)),
            *(("temperature", 0, None), ("top_p", 0, 1)),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"generation.{name} must be {bounds}, got {value}")

    def arguments(self) -> dict[str, Any]:
        """What ``generate`` takes."""
        sampling = (
            {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            if self.temperature > 0
            else {"do_sample": False}
        )
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, **sampling}


@torch.inference_mode()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    settings: GenerationSettings,
) -> list[str]:
    """What the model makes of each prompt; a causal model's texts begin with it."""
    if not all(prompts):
        raise ValueError("the prompt must be some text to continue, got none")
    set_seed(settings.seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.eval().generate(  # pyright: ignore[reportCallIssue]
        **inputs.to(model.device), **settings.arguments()
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True)
