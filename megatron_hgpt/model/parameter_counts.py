"""Parameters per group, by arithmetic on the shapes: what a dry run prints without building anything."""

from __future__ import annotations

from collections.abc import Collection

from megatron_hgpt.backbone.shape import BackboneShape, read_backbone
from megatron_hgpt.config import HLoRAPluginConfig, ModelConfig
from megatron_hgpt.parameters import ADAPTER_GROUPS
from megatron_hgpt.text.vocabulary import Vocabulary


def count_hlora(shape: BackboneShape, plugin: HLoRAPluginConfig) -> int:
    """A plugin on every linear of the LLM: per linear A [r, in], R [k, in], B [out, r].

    A fused linear of Phi has one A and R; Qwen and Llama have one per HF linear.
    """
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.ffn_size
    if shape.fused_qkv:
        linears = [(hidden, query + 2 * key), (query, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    else:
        linears = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, ffn), (hidden, ffn)]
        linears.append((ffn, hidden))
    rank, experts = plugin.lora_rank, plugin.num_experts
    per_layer = sum((rank + experts) * n_in + n_out * rank for n_in, n_out in linears)
    return shape.num_layers * per_layer


def _count_backbone(shape: BackboneShape) -> int:
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden = shape.hidden_size
    attention = hidden * (query + 2 * key) + query * hidden + (query + 2 * key if shape.qkv_bias else 0)
    return shape.num_layers * (attention + 3 * hidden * shape.ffn_size + 2 * hidden) + hidden


def _count_tower(config: dict[str, int]) -> int:
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    patch = config["patch_size"]
    embeddings = hidden + 3 * patch * patch * hidden + ((config["image_size"] // patch) ** 2 + 1) * hidden
    block = 4 * (hidden * hidden + hidden) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
    return embeddings + 4 * hidden + layers * block  # a norm before and one after the blocks


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of the whole (unsharded) model by group; the tower is counted with all its blocks."""
    shape, vocabulary = read_backbone(model.hf_config), Vocabulary.from_config(model)
    vision = model.vision.hf_config
    hidden = shape.hidden_size
    adapter = vision.get("hidden_size", 0) * hidden + hidden + hidden * hidden + hidden
    counts = {
        "backbone": _count_backbone(shape),
        "embeddings": vocabulary.padded_size * hidden,
        "head": vocabulary.padded_size * hidden,
        "tower": _count_tower(vision) if vision else 0,
    }
    for adapter_group, task in ADAPTER_GROUPS.items():
        plugin = model.hlora.of(task)
        if plugin is not None:
            counts[adapter_group] = adapter
            counts[f"hlora_{task.value}"] = count_hlora(shape, plugin)
    return counts


def count_trained(model: ModelConfig, trainable: Collection[str]) -> dict[str, int]:
    """How many of each group's parameters (`count_parameters`) train; of vocabulary rows perhaps only the new ones.

    Args:
        model: decides the sizes.
        trainable: groups of a stage (`Stage.trainable`).
    """
    counts, vocabulary = count_parameters(model), Vocabulary.from_config(model)
    trained = {group: count if group in trainable else 0 for group, count in counts.items()}
    for group in ("embeddings", "head"):
        if "vocabulary" in trainable:
            trained[group] = counts[group]
        elif "new_rows" in trainable:
            trained[group] = (vocabulary.size - vocabulary.text_size) * (counts[group] // vocabulary.padded_size)
    return trained
