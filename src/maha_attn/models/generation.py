"""How ``generate`` comes by a cache."""

from abc import abstractmethod
from typing import Any

from transformers import Cache, GenerationMixin


class MahaGenerationMixin(GenerationMixin):
    """Generation with the cache that the model makes itself."""

    @abstractmethod
    def new_cache(self, capacity: int = 0) -> Cache:
        """An empty cache for this model, with room for ``capacity`` tokens from the start."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give ``generate`` a new cache; the base class checks one that the caller gave.

        On a GPU it holds room for the longest output from the start: steps by kernels take no time
        for it. Composed ones would look at all of it.
        """
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "cache_implementation must be None: MAHA has one cache of its own, got "
                f"{generation_config.cache_implementation!r}"
            )
        if generation_config.is_assistant:
            raise ValueError("a MAHA model cannot be an assistant model: its cache does not rewind")
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not generation_config.use_cache:
            raise ValueError("use_cache must be True to continue from past_key_values")
        if cache is None and generation_config.use_cache:
            on_gpu = self.device.type == "cuda"  # pyright: ignore[reportAttributeAccessIssue]
            model_kwargs["past_key_values"] = self.new_cache(max_cache_length if on_gpu else 0)
            return None
        base: Any = super()
        return base._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
