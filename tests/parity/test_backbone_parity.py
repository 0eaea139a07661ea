"""Tiny Phi-3, Llama and Qwen2 made with transformers: Megatron's GPTModel with H-LoRA hung on gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_hgpt.config import ModelConfig, ParallelConfig, TrainingConfig, VocabularyConfig, VQConfig
from megatron_hgpt.testing.distributed import run_ranks

# fp32 sums of 64 to 128 products in another order, through 3 layers; logits are of order 1.
TOLERANCE = 2e-5
TEXT = 96


def megatron_logits(cases: dict[str, str], tp: int, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Logits [b, s, V] of each folder's model, gathered over tensor parallelism, and its export."""
    from megatron_hgpt import distributed

    distributed.initialize(ParallelConfig(tensor_model_parallel_size=tp), seed=1)
    from megatron.core import parallel_state

    from megatron_hgpt.backbone.shape import read_backbone
    from megatron_hgpt.backbone.transformer import transformer_config
    from megatron_hgpt.config import HLoRAPluginConfig
    from megatron_hgpt.convert.huggingface import load_backbone
    from megatron_hgpt.hlora.layer_spec import TaskRouting, hlora_block_spec
    from megatron_hgpt.model.language_model import LanguageModel
    from megatron_hgpt.samples import Task
    from megatron_hgpt.text.vocabulary import Vocabulary

    results = {}
    for name, folder in cases.items():
        shape = read_backbone(json.loads((Path(folder) / "config.json").read_text()))
        model_config = ModelConfig(
            vocabulary=VocabularyConfig(text_size=TEXT, pad_to_multiple=64), vq=VQConfig(num_codes=5), max_seq_length=32
        )
        vocabulary = Vocabulary.from_config(model_config)
        parallel = ParallelConfig(tensor_model_parallel_size=tp)
        config = transformer_config(shape, model_config, parallel, TrainingConfig(precision="fp32"))
        plugins = {Task.COMPREHENSION: HLoRAPluginConfig(lora_rank=8, num_experts=4)}
        model = LanguageModel(
            config, hlora_block_spec(config, shape, plugins), vocab_size=vocabulary.padded_size, max_sequence_length=32,
            position_embedding_type="rope", rotary_base=shape.rope_theta, vocabulary=vocabulary,
            scatter_embedding_sequence_parallel=False,
        )  # fmt: skip
        rank = parallel_state.get_tensor_model_parallel_rank()
        load_backbone(model, folder, shape, vocabulary, tp_rank=rank, tp_size=tp)
        tokens = torch.tensor(ids)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = model(tokens, positions, None, packed_seq_params=TaskRouting.of(None, tokens.shape[1]))
        results[name] = logits.numpy()
        results[f"{name} state"] = {key: p.detach().numpy() for key, p in model.named_parameters()}
    return results


def write_unusual_llama(folder: Path) -> None:
    """A value of its own wherever the others agree with Megatron's default: head size, theta, epsilon, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TEXT, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-3, initializer_range=0.1, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0}, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from megatron_hgpt.demo import checkpoints

    root = tmp_path_factory.mktemp("backbones")
    common = {"text_vocab_size": TEXT, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "ffn": 96,
              "initializer_range": 0.1}  # fmt: skip
    checkpoints.write_tiny_phi3(root / "phi3", num_kv_heads=4, **common)
    checkpoints.write_tiny_phi3(root / "phi3 with a window", num_kv_heads=2, sliding_window=5, **common)
    checkpoints.write_tiny_llama(root / "llama", num_kv_heads=2, **common)
    checkpoints.write_tiny_qwen2(root / "qwen2", num_kv_heads=2, **common)
    write_unusual_llama(root / "llama, tied, wide heads")
    return {path.name: str(path) for path in sorted(root.iterdir())}


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_equal_transformers_and_weights_come_back_bit_exact(folders: dict[str, str], tp: int) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_hgpt.backbone.shape import read_backbone
    from megatron_hgpt.convert.huggingface import export_backbone
    from megatron_hgpt.text.vocabulary import Vocabulary

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, TEXT, (2, 24), generator=generator)
    ranks = run_ranks(megatron_logits, tp, folders, tp, ids.tolist())
    vocabulary = Vocabulary(text_size=TEXT, num_codes=5, pad_to_multiple=64)
    for name, folder in folders.items():
        settings = {"dtype": torch.float32, "attn_implementation": "eager"}
        reference = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
        with torch.no_grad():
            expected = reference(ids).logits
        for rank in ranks:
            logits = torch.from_numpy(rank[name])
            torch.testing.assert_close(logits[..., :TEXT], expected, rtol=0, atol=TOLERANCE)
            assert torch.isinf(logits[..., vocabulary.size :]).all()
            # Every VQ row is the mean row: one logit for all of them.
            new = logits[..., TEXT : vocabulary.size]
            torch.testing.assert_close(new, new[..., :1].expand_as(new))
        shards = [{k: torch.from_numpy(v) for k, v in rank[f"{name} state"].items()} for rank in ranks]
        shape = read_backbone(json.loads((Path(folder) / "config.json").read_text()))
        exported = export_backbone(shards, shape, vocabulary)
        original = reference.state_dict()
        assert set(exported) == set(original)
        for key, value in exported.items():
            assert torch.equal(value[: original[key].shape[0]], original[key]), key
