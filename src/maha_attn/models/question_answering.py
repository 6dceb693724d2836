"""Extractive question answering: where in the text the answer begins and ends."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from maha_attn.models.backbone import MahaModel, MahaPreTrainedModel
from maha_attn.models.configuration import MahaConfig
from maha_attn.models.outputs import MahaQuestionAnsweringOutput


class MahaForQuestionAnswering(MahaPreTrainedModel):
    """The backbone and two scores a token: that the answer begins, that it ends there.

    The backbone is as ``config.causal`` says. A causal one must name an answer's first token before
    it has seen the rest: set ``causal=False``, or fine-tune a masked language model.

    Args:
        config: Of the backbone.
    """

    def __init__(self, config: MahaConfig) -> None:
        super().__init__(config)
        self.model = MahaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_fusion_weights: bool = False,
        **kwargs: Any,
    ) -> MahaQuestionAnsweringOutput:
        """Find the answer of each row.

        ``start_positions`` and ``end_positions`` ``[B]`` are the slots of the answer's first and
        last token; one at ``N`` or beyond is left out of the loss, the mean of both cross-entropies
        over the ``N`` slots. Everything else is as in :meth:`MahaModel.forward`.

        Returns:
            ``start_logits`` and ``end_logits`` ``[B, N]``, the lowest number of their dtype at
            padding, so that it takes no part in a softmax over them.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_fusion_weights=output_fusion_weights,
            **{"use_cache": False, **kwargs},
        )
        logits = self.qa_outputs(outputs.last_hidden_state)
        if attention_mask is not None:
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(attention_mask[..., None] == 0, lowest)
        start_logits, end_logits = (x.contiguous() for x in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(
                start_logits, end_logits, start_positions, end_positions, **kwargs
            )
        return MahaQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            fusion_weights=outputs.fusion_weights,
        )
