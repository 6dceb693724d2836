"""How ``generate`` comes by a cache."""

from abc import abstractmethod
from typing import Any

from transformers import Cache, GenerationMixin


class MahaGenerationMixin(GenerationMixin):
    """Generation with the cache that the model makes itself."""

    @abstractmethod
    def new_cache(self) -> Cache:
        """An empty cache for this model."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` a new cache; the base class checks one that the caller gave."""
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
            model_kwargs["past_key_values"] = self.new_cache()
            return None
        base: Any = super()
        return base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
