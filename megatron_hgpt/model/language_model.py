"""The language model: Megatron's GPTModel with a head that runs only where it is needed.

Shapes: b samples, s tokens (padded), h hidden size, T tensor-parallel size, V padded vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

from megatron_hgpt.samples import IGNORE_INDEX
from megatron_hgpt.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from megatron.core.inference.contexts import BaseInferenceContext


class LanguageModel(GPTModel):
    """GPTModel whose head runs at supervised positions only and never sees padded vocabulary rows."""

    def __init__(self, *args: Any, vocabulary: Vocabulary, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary = vocabulary
        self._mark_sharded_weights()
        if self.post_process:
            # The head's input is gathered and selected here, so the head itself works on whole tokens.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.pg_collection.tp.size() > 1

    def _mark_sharded_weights(self) -> None:
        """Flag sharded weights, which Megatron does only where it also initialises them.

        Without the flag the gradient norm counts a sharded weight on one tensor-parallel rank only.
        """
        axes = {tensor_parallel.VocabParallelEmbedding: 0, tensor_parallel.ColumnParallelLinear: 0,
                tensor_parallel.RowParallelLinear: 1}  # fmt: skip
        for module in self.modules():
            for cls, axis in axes.items():
                if isinstance(module, cls) and not hasattr(module.weight, "tensor_model_parallel"):
                    tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, axis, 1)

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *_: object,
        labels: torch.Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        **__: object,
    ) -> torch.Tensor:
        """Losses [number of supervised positions] with labels, logits [b, s or 1, V] without (in inference)."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if labels is None:
            if inference_context is not None and inference_context.materialize_only_last_token_logits:
                hidden_states = hidden_states[-1:]
            logits, _ = self.output_layer(hidden_states, runtime_gather_output=True)
            return self.mask_padding(logits, first_row=0).transpose(0, 1)
        # [s, b, h] -> [supervised, 1, h]: on a comprehension sample this skips most of the logits.
        supervised = labels.T != IGNORE_INDEX
        logits, _ = self.output_layer(hidden_states[supervised].unsqueeze(1))
        rows = logits.shape[-1]
        logits = self.mask_padding(logits.float(), first_row=self.pg_collection.tp.rank() * rows)
        return vocab_parallel_cross_entropy(logits, labels.T[supervised].unsqueeze(1)).squeeze(1)

    def mask_padding(self, logits: torch.Tensor, first_row: int) -> torch.Tensor:
        """-inf at padded vocabulary rows: a zero row has logit 0, which would leak into every softmax."""
        num_true = self.vocabulary.size - first_row
        if num_true >= logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= num_true
        return logits.masked_fill(padding, float("-inf"))
