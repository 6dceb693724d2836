"""Classification of whole sequences: the backbone, pooled, and a projection onto the labels."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from maha_attn.models.backbone import MahaModel, MahaPreTrainedModel
from maha_attn.models.configuration import MahaConfig
from maha_attn.models.outputs import MahaSequenceClassifierOutput


class MahaForSequenceClassification(MahaPreTrainedModel):
    """One label, several labels or a number for each row.

    The backbone is as ``config.causal`` says, so that a checkpoint of either language model is
    fine-tuned as it was pretrained; a model that is trained for classification alone does better
    with ``causal=False``.

    Args:
        config: ``num_labels``, ``problem_type`` and ``classifier_pooling`` count here.

    Raises:
        ValueError: ``classifier_pooling`` is ``first`` in a causal model, where the first token
            knows nothing of the others.
    """

    def __init__(self, config: MahaConfig) -> None:
        super().__init__(config)
        default = "last" if config.causal else "mean"
        self.pooling = config.classifier_pooling or default
        if config.causal and self.pooling == "first":
            raise ValueError(
                "classifier_pooling must be 'last' or 'mean' in a causal model, whose first token "
                "sees no other; got 'first' (or set causal=False)"
            )
        self.model = MahaModel(config)
        assert config.num_labels is not None
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_fusion_weights: bool = False,
        **kwargs: Any,
    ) -> MahaSequenceClassifierOutput:
        """Classify each row.

        ``labels`` are ``[B]`` class numbers, or floating point: ``[B]`` numbers with one label,
        ``[B, num_labels]`` of 0 and 1 where several may hold (``config.problem_type`` says which,
        and is set by the first labels if None). The loss is a mean over labels, or with
        ``num_items_in_batch`` their sum divided by it. Everything else is as in
        :meth:`MahaModel.forward`; without an ``attention_mask`` every token is real.

        Returns:
            ``logits`` ``[B, num_labels]``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_fusion_weights=output_fusion_weights,
            **{"use_cache": False, **kwargs},
        )
        logits = self.score(pool(outputs.last_hidden_state, attention_mask, self.pooling))
        return MahaSequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            fusion_weights=outputs.fusion_weights,
        )

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """The library's loss, which takes ``num_items_in_batch`` for class numbers alone."""
        loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        count = kwargs.get("num_items_in_batch")
        if count is None or self.config.problem_type == "single_label_classification":
            return loss
        return loss * labels.numel() / count


def pool(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One vector a row: the ``mean`` of its real tokens, or the ``first`` or ``last`` of them.

    Args:
        hidden_states: ``[B, N, D]``.
        attention_mask: ``[B, N]``, nonzero at real tokens; None: all are.
        pooling: ``mean``, ``first`` or ``last``.

    Returns:
        ``[B, D]``, zero for a row with no real token.
    """
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
    real = attention_mask != 0
    place = real.cumsum(1)
    if pooling == "first":
        real = real & (place == 1)
    elif pooling == "last":
        real = real & (place == place[:, -1:])
    total = torch.where(real[..., None], hidden_states, 0).sum(1)
    return total / real.sum(1, keepdim=True).clamp(min=1)
