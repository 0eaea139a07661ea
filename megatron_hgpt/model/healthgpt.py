"""HealthGPT: frozen CLIP tower, one adapter per task, and a Megatron GPT whose linears carry two H-LoRA plugins.

One model holds both tasks; a micro-batch carries its task, which picks vision depth, adapter and plugin.
Shapes: b samples, s tokens (padded), n images, p image tokens, h hidden size, T tensor-parallel size, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from megatron_hgpt.backbone.shape import BackboneShape
from megatron_hgpt.config import HLoRAPluginConfig, RunConfig
from megatron_hgpt.errors import DataError
from megatron_hgpt.hlora.layer_spec import TaskRouting, hlora_block_spec
from megatron_hgpt.model.context_parallel import shard
from megatron_hgpt.model.language_model import LanguageModel
from megatron_hgpt.rounding import ceil_div
from megatron_hgpt.samples import TASKS, MicroBatch, Task
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.adapter import VisionAdapter
from megatron_hgpt.vision.clip import HVPTower

if TYPE_CHECKING:
    from megatron.core.inference.contexts import StaticInferenceContext

logger = logging.getLogger(__name__)


class HealthGPT(MegatronModule):
    """The model, or the part of it that one pipeline stage (or one of its interleaved chunks) holds.

    Args:
        config: the run's configuration.
        transformer: Megatron's configuration of the backbone.
        shape: the backbone's sizes.
        plugins: the H-LoRA plugins to hang on every linear.
        device: where parameters live.
        pre_process: holds tower, adapters and embedding: the first stage.
        post_process: holds the final norm and the head: the last stage.
        vp_stage: number of the chunk under the interleaved schedule.
        with_tower: False where every micro-batch carries features from the cache.
    """

    def __init__(
        self,
        config: RunConfig,
        transformer: TransformerConfig,
        shape: BackboneShape,
        plugins: dict[Task, HLoRAPluginConfig],
        device: torch.device,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        with_tower: bool = True,
    ) -> None:
        super().__init__(config=transformer)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False  # Megatron's pipeline schedules read it
        self.shape = shape
        self.plugins = plugins
        self.vocabulary = Vocabulary.from_config(config.model)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.adapters = nn.ModuleDict()
        self.tower: HVPTower | None = None
        if pre_process:
            if with_tower:
                self.tower = HVPTower.from_config(config.model.vision, list(plugins) or list(TASKS))
                self.tower.to(device=device, dtype=transformer.params_dtype)
            width = self.tower.hidden_size if self.tower is not None else config.model.vision.hf_config["hidden_size"]
            for task in plugins or TASKS:
                self.adapters[task.value] = VisionAdapter(
                    width, shape.hidden_size, dtype=transformer.params_dtype, device=device
                )
        self.language_model = LanguageModel(
            transformer,
            hlora_block_spec(transformer, shape, plugins, vp_stage),
            vocab_size=self.vocabulary.padded_size,
            max_sequence_length=config.model.max_seq_length,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            scatter_embedding_sequence_parallel=False,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            vocabulary=self.vocabulary,
        )

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None] | torch.Tensor | None) -> None:
        """Hidden states from the previous pipeline stage (Megatron's schedules call this)."""
        self.language_model.set_input_tensor(input_tensor)

    def image_features(self, pixel_values: torch.Tensor, task: Task) -> torch.Tensor:
        """Adapted features [n, p, h] of images [n, 3, height, width].

        The frozen tower computes each image once: the images are split over the tensor- and context-parallel ranks
        and the features gathered. The adapter then runs on all of them, alike on every rank.

        Raises:
            DataError: the model was built without its tower.
        """
        if self.tower is None:
            raise DataError("pictures reached a model without its tower; unset data.feature_cache, or use it for them")
        group = parallel_state.get_tensor_and_context_parallel_group()
        size, rank = group.size(), group.rank()
        pixel_values = pixel_values.to(self.config.params_dtype)
        if size == 1:
            features = self.tower(pixel_values, task)
        else:
            num_images = pixel_values.shape[0]
            per_rank = ceil_div(num_images, size)
            padded = torch.cat([pixel_values, pixel_values[:1].expand(per_rank * size - num_images, -1, -1, -1)])
            mine = self.tower(padded[rank * per_rank : (rank + 1) * per_rank], task).contiguous()
            gathered = mine.new_empty(per_rank * size, *mine.shape[1:])
            torch.distributed.all_gather_into_tensor(gathered, mine, group=group)
            features = gathered[:num_images]
        return self._adapt(features, task)

    @property
    def layer_offset(self) -> int:
        """Transformer layers before this part, on earlier pipeline stages."""
        return get_transformer_layer_offset(self.config, self.vp_stage)

    @property
    def pg_tp(self) -> torch.distributed.ProcessGroup:
        """The tensor-parallel group."""
        return self.language_model.pg_collection.tp

    def embed(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        image_mask: torch.Tensor | None,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Word embeddings with image features spliced in: [s, b, h], or [s/T, b, h] under sequence parallelism."""
        embedded = self.language_model.embedding(input_ids=tokens, position_ids=position_ids)  # [s, b, h]
        if features is not None and image_mask is not None:
            num_slots, num_features = int(image_mask.sum()), features.shape[0] * features.shape[1]
            if num_slots != num_features:
                raise DataError(f"{num_slots} image positions in the tokens but {num_features} image features")
            by_sample = embedded.transpose(0, 1)
            merged = by_sample.masked_scatter(image_mask.unsqueeze(-1), features.to(embedded.dtype))
            embedded = merged.transpose(0, 1).contiguous()
        if torch.is_grad_enabled() and not embedded.requires_grad:
            # A recomputed block whose input needs no gradient never runs backward, and H-LoRA inside gets none.
            embedded.requires_grad_()
        if self.config.sequence_parallel:
            # This rank's part is a view: without a copy the first layer would keep all T parts alive.
            embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded, group=self.pg_tp).clone()
        return embedded

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Losses of the supervised positions [m], fp32, in (token, sample) order; hidden states before the last stage.

        Every pipeline stage is given the whole micro-batch: its task decides the plugin everywhere. Context-parallel
        ranks each return the losses at their own positions.
        """
        routing = TaskRouting.of_batch(batch)
        features = self._features_of(batch) if self.pre_process else None
        context = parallel_state.get_context_parallel_group()
        if context.size() > 1:
            batch, index = shard(batch, context.rank(), context.size())
            features = None if features is None else features.flatten(0, 1)[index].unsqueeze(1)
        embedded = None
        if self.pre_process:
            embedded = self.embed(batch.tokens, batch.position_ids, batch.image_mask, features)
        return self.language_model(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=None,
            decoder_input=embedded,
            labels=batch.labels,
            packed_seq_params=routing,
        )

    def _features_of(self, batch: MicroBatch) -> torch.Tensor | None:
        """Adapted features [n, p, h] of the micro-batch's images, each at the depth and with the adapter of its task.

        Features from the cache need the adapter only. None without images.
        """
        cached = batch.image_features
        images = batch.pixel_values if cached is None else cached.to(self.config.params_dtype)
        adapt = self.image_features if cached is None else self._adapt
        if not images.shape[0]:
            return None
        if batch.task is not None:
            return adapt(images, batch.task)
        parts, places = [], []
        for task in batch.tasks:
            mine = [i for i, image_task in enumerate(batch.image_tasks) if image_task is task]
            if mine:
                parts.append(adapt(images[mine], task))
                places += mine
        order = torch.tensor(places, device=images.device).argsort()
        return torch.cat(parts)[order]

    def _adapt(self, features: torch.Tensor, task: Task) -> torch.Tensor:
        adapted: torch.Tensor = self.adapters[task.value](features)
        return adapted

    def decode(
        self,
        tokens: torch.Tensor,
        task: Task,
        context: StaticInferenceContext,
        position: int,
        *,
        image_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass with a KV cache: the prompt first, then one token at a time.

        Args:
            tokens: [b, t] the tokens that are not yet in the cache.
            task: of the whole batch.
            context: megatron.core's StaticInferenceContext, advanced by the caller.
            position: tokens already in the cache.
            image_mask, pixel_values: as in `MicroBatch`, with the prompt only.

        Returns:
            [b, 1, V] logits of the last position, on every tensor-parallel rank; -inf at padded rows.
        """
        features = None
        if pixel_values is not None and pixel_values.shape[0]:
            features = self.image_features(pixel_values, task)
        position_ids = torch.arange(position, position + tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.language_model(
            input_ids=tokens,
            position_ids=position_ids,
            attention_mask=None,
            decoder_input=self.embed(tokens, position_ids, image_mask, features),
            inference_context=context,
            packed_seq_params=TaskRouting.of(task, context.max_sequence_length),
            runtime_gather_output=True,
        )
