"""A HealthGPT small enough for a test, with everything real: both plugins, both adapters, tower, VQ vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.config import (
    CheckpointConfig,
    HLoRAConfig,
    HLoRAPluginConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
    VocabularyConfig,
    VQConfig,
)
from megatron_hgpt.data.collate import ExpandedSample, collate_packed
from megatron_hgpt.model.initialization import generator_for
from megatron_hgpt.parameters import canonical_name
from megatron_hgpt.samples import IGNORE_INDEX, EncodedSample, MicroBatch, Task

TEXT_SIZE, NUM_CODES, NUM_INDICES = 96, 16, 4
IMAGE_SIZE, NUM_IMAGE_TOKENS = 16, 4


def write_backbone(folder: Path, family: str = "phi3", num_layers: int = 2) -> Path:
    """A tiny random backbone folder; heads and KV heads allow TP 1, 2 and 4."""
    from megatron_hgpt.demo import checkpoints

    writers: dict[str, Callable[..., None]] = {
        "phi3": checkpoints.write_tiny_phi3,
        "llama": checkpoints.write_tiny_llama,
    }
    writers[family](
        folder, text_vocab_size=TEXT_SIZE, hidden_size=64, num_layers=num_layers, num_heads=4, num_kv_heads=4, ffn=96,
        initializer_range=0.1,
    )  # fmt: skip
    return folder


def tiny_config(backbone: Path, output_dir: Path, **sections: Any) -> RunConfig:
    """A run of a 2-layer model; `sections` replaces whole sections such as ``parallel``."""
    plugin: dict[str, Any] = {"num_experts": 4, "dropout": 0.0}
    config = RunConfig(
        name="tiny",
        output_dir=str(output_dir),
        model=ModelConfig(
            backbone=str(backbone),
            hf_config=json.loads((backbone / "config.json").read_text()),
            max_seq_length=64,
            vision=VisionConfig(
                hf_config={
                    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "image_size": IMAGE_SIZE, "patch_size": 8,
                }
            ),
            vocabulary=VocabularyConfig(text_size=TEXT_SIZE, pad_to_multiple=64),
            vq=VQConfig(num_codes=NUM_CODES, num_indices=NUM_INDICES),
            template="phi3_instruct",
            hlora=HLoRAConfig(
                comprehension=HLoRAPluginConfig(lora_rank=8, alpha=16.0, **plugin),
                generation=HLoRAPluginConfig(lora_rank=16, alpha=32.0, **plugin),
            ),
        ),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=5e-3, adapter_lr=5e-3, warmup_ratio=0.0, schedule="constant"),
        training=TrainingConfig(num_steps=5, precision="fp32", micro_batch_size=2, global_batch_size=8),
        checkpoint=CheckpointConfig(save_interval_steps=1000),
    )  # fmt: skip
    for name, value in sections.items():
        setattr(config, name, value)
    return config


def make_micro_batch(name: str, task: Task, *, num_samples: int = 2, length: int = 24) -> MicroBatch:
    """A random but reproducible micro-batch with one image per sample and uneven supervision."""
    generator = generator_for(f"{name}/{task.value}", 11)
    tokens = torch.randint(0, TEXT_SIZE, (num_samples, length), generator=generator)
    image_mask = torch.zeros(num_samples, length, dtype=torch.bool)
    image_mask[:, 2 : 2 + NUM_IMAGE_TOKENS] = True
    labels = torch.full((num_samples, length), IGNORE_INDEX)
    low, high = (0, TEXT_SIZE) if task is Task.COMPREHENSION else (TEXT_SIZE + 1, TEXT_SIZE + 1 + NUM_CODES)
    for row in range(num_samples):
        count = 4 + 3 * row
        labels[row, 10 : 10 + count] = torch.randint(low, high, (count,), generator=generator)
        tokens[row, 11 : 11 + count] = labels[row, 10 : 10 + count]
    tokens[image_mask] = 0
    return MicroBatch(
        task=task,
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(length).expand(num_samples, length),
        image_mask=image_mask,
        pixel_values=torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        sample_ids=[f"{name}/{row}" for row in range(num_samples)],
        num_supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        num_content_tokens=tokens.numel(),
    )


def pack_micro_batches(batches: Sequence[MicroBatch], *, pad_to_multiple: int = 1) -> MicroBatch:
    """The samples of padded micro-batches as one packed row, each cut behind its last label: the losses stay."""
    samples = []
    for batch in batches:
        assert batch.task is not None
        for row, sample_id in enumerate(batch.sample_ids):
            length = int((batch.labels[row] != IGNORE_INDEX).nonzero().max()) + 1
            expanded = ExpandedSample(
                sample_id=sample_id,
                tokens=batch.tokens[row, :length],
                labels=batch.labels[row, :length],
                image_mask=batch.image_mask[row, :length],
                pixel_values=[batch.pixel_values[row]],
                features=[],
                is_truncated=False,
            )
            stored = EncodedSample(
                sample_id=sample_id, task=batch.task, tokens=expanded.tokens, loss_mask=expanded.image_mask, images=[]
            )
            samples.append((stored, expanded))
    return collate_packed(samples, image_size=IMAGE_SIZE, pad_to_multiple=pad_to_multiple)


class FixedLoader:
    """Stands for the real loader: micro-batches named by (step, index), split over data-parallel ranks like it does.

    With packing the same samples come as rows: a micro-batch each (by_task), or two, of both tasks where the stage
    has both (mixed).
    """

    steps_per_epoch = 100

    def __init__(
        self,
        tasks: tuple[Task, ...],
        *,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        packing: str = "none",
        pad_to_multiple: int = 1,
    ) -> None:
        self.tasks, self.num_micro_batches = tasks, num_micro_batches
        self.dp_rank, self.dp_size, self.step = dp_rank, dp_size, 0
        self.per_row = {"none": 0, "by_task": 1, "mixed": 2}[packing]
        self.pad_to_multiple = pad_to_multiple

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches."""
        batches = [
            make_micro_batch(f"step {self.step} micro-batch {i}", self.tasks[(self.step + i) % len(self.tasks)])
            for i in range(self.num_micro_batches)
        ]
        if self.per_row:
            groups = [batches[i : i + self.per_row] for i in range(0, len(batches), self.per_row)]
            batches = [pack_micro_batches(group, pad_to_multiple=self.pad_to_multiple) for group in groups]
        self.step += 1
        return batches[self.dp_rank :: self.dp_size]

    def state_dict(self) -> dict[str, int]:
        """Position."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position."""
        self.step = state["step"]


def make_b_nonzero(model: Any) -> None:
    """Draw every B at random by name: with B = 0 a wrong gate or gradient stays invisible at first."""
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b." not in name:
                continue
            shape = list(parameter.shape)
            is_sharded = getattr(parameter, "tensor_model_parallel", False)
            if is_sharded:
                shape[0] *= size
            full = torch.randn(shape, generator=generator_for(canonical_name(name, model.layer_offset), 5)) * 0.05
            parameter.copy_(full.chunk(size)[rank] if is_sharded else full)
