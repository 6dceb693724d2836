"""Continuing a text."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from maha_attn.training.recipe import GenerationSettings


@torch.inference_mode()
def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: GenerationSettings
) -> str:
    """The prompt and what the model makes of it; the same settings give the same text."""
    if not settings.prompt:
        raise ValueError("the prompt must be some text to continue, got none")
    set_seed(settings.seed)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        if settings.temperature > 0
        else {"do_sample": False}
    )
    inputs = tokenizer(settings.prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.eval().generate(  # pyright: ignore[reportCallIssue]
        **inputs.to(model.device), max_new_tokens=settings.max_new_tokens, **sampling
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
