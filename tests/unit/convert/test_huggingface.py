"""The weight table without Megatron: shards are plain modules with GPTModel's names (parity tests use the real one)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hgpt.backbone.shape import BackboneShape, read_backbone
from megatron_hgpt.convert.huggingface import export_backbone, load_backbone
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.text.vocabulary import Vocabulary

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 24, 8, 4, 6, 2
TEXT = 20
VOCABULARY = Vocabulary(text_size=TEXT, num_codes=5, pad_to_multiple=16)  # 28 true rows, 32 padded
ARCHITECTURES = {"phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def hf_config(family: str, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[family]],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **changes,
    }


def hf_tensors(family: str, seed: int = 0, rows: int = TEXT + 3) -> dict[str, torch.Tensor]:
    """Random bf16 weights under transformers' names; more rows than text ids, as Phi-3 has."""
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, HIDDEN),
        "lm_head.weight": (rows, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        sizes[prefix + "input_layernorm.weight"] = sizes[prefix + "post_attention_layernorm.weight"] = (HIDDEN,)
        sizes[prefix + "self_attn.o_proj.weight"] = (HIDDEN, query)
        sizes[prefix + "mlp.down_proj.weight"] = (HIDDEN, FFN)
        if family == "phi3":
            sizes[prefix + "self_attn.qkv_proj.weight"] = (query + 2 * key, HIDDEN)
            sizes[prefix + "mlp.gate_up_proj.weight"] = (2 * FFN, HIDDEN)
            continue
        for name, out in (("q", query), ("k", key), ("v", key)):
            sizes[f"{prefix}self_attn.{name}_proj.weight"] = (out, HIDDEN)
            if family == "qwen2":
                sizes[f"{prefix}self_attn.{name}_proj.bias"] = (out,)
        sizes[prefix + "mlp.gate_proj.weight"] = sizes[prefix + "mlp.up_proj.weight"] = (FFN, HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}


def write(folder: Path, family: str, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(family, **changes)))
    save_file(tensors, folder / "model.safetensors")
    return folder


class Shard(torch.nn.Module):
    """One rank's parameters, NaN until they are loaded, with GPTModel's dotted names."""

    def __init__(
        self, shape: BackboneShape, tp: int = 1, *, layers: range = range(LAYERS), first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        query, key, rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, VOCABULARY.padded_size // tp
        if first:
            self._add("embedding.word_embeddings.weight", rows, HIDDEN)
        for local in range(len(layers)):
            prefix = f"decoder.layers.{local}."
            self._add(prefix + "input_layernorm.weight", HIDDEN)
            self._add(prefix + "pre_mlp_layernorm.weight", HIDDEN)
            self._add(prefix + "self_attention.linear_qkv.weight", (query + 2 * key) // tp, HIDDEN)
            if shape.qkv_bias:
                self._add(prefix + "self_attention.linear_qkv.bias", (query + 2 * key) // tp)
            self._add(prefix + "self_attention.linear_proj.weight", HIDDEN, query // tp)
            self._add(prefix + "mlp.linear_fc1.weight", 2 * FFN // tp, HIDDEN)
            self._add(prefix + "mlp.linear_fc2.weight", HIDDEN, FFN // tp)
            self._add(prefix + "mlp.linear_fc2.hlora.comprehension.lora_p", 4, 8)
        if last:
            self._add("decoder.final_layernorm.weight", HIDDEN)
            self._add("output_layer.weight", rows, HIDDEN)

    def _add(self, name: str, *size: int) -> None:
        module: torch.nn.Module = self
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(leaf, torch.nn.Parameter(torch.full(size, torch.nan, dtype=torch.bfloat16)))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if ".hlora." not in name}


def load(folder: Path, family: str, tp: int = 1, **changes: Any) -> list[dict[str, torch.Tensor]]:
    """The weights of every tensor-parallel rank."""
    shape = read_backbone(hf_config(family, **changes))
    shards = []
    for rank in range(tp):
        shard = Shard(shape, tp)
        load_backbone(shard, folder, shape, VOCABULARY, tp_rank=rank, tp_size=tp)
        shards.append(shard.weights())
    return shards


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_import_and_export_are_bit_exact_in_bf16(tmp_path: Path, family: str, tp: int) -> None:
    tensors = hf_tensors(family)
    shards = load(write(tmp_path, family, tensors), family, tp)
    shape = read_backbone(hf_config(family))
    exported = export_backbone(shards, shape, VOCABULARY)
    assert set(exported) == set(tensors)
    for name, tensor in exported.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert tensor.shape == (VOCABULARY.size, HIDDEN)
            assert torch.equal(tensor[:TEXT], tensors[name][:TEXT])
        else:
            assert torch.equal(tensor, tensors[name]), name
    # What was exported, with its (by now trained) VQ rows, is read back as it was.
    exported["lm_head.weight"][TEXT:] = torch.arange(8.0).bfloat16().unsqueeze(1)
    again = export_backbone(load(write(tmp_path / "out", family, exported), family, tp), shape, VOCABULARY)
    assert all(torch.equal(again[name], exported[name]) for name in exported)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_qkv_rows_alternate_per_kv_group(tmp_path: Path, tp: int) -> None:
    tensors = hf_tensors("qwen2")
    shards = load(write(tmp_path, "qwen2", tensors), "qwen2", tp)
    per_group = HEADS // KV_HEADS
    for kind in ("weight", "bias"):
        q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.{kind}"] for name in "qkv")
        for rank, shard in enumerate(shards):
            rows = []
            for group in range(rank * KV_HEADS // tp, (rank + 1) * KV_HEADS // tp):
                for head in range(group * per_group, (group + 1) * per_group):
                    rows.append(q[head * HEAD_DIM : (head + 1) * HEAD_DIM])
                rows.append(k[group * HEAD_DIM : (group + 1) * HEAD_DIM])
                rows.append(v[group * HEAD_DIM : (group + 1) * HEAD_DIM])
            assert torch.equal(shard[f"decoder.layers.1.self_attention.linear_qkv.{kind}"], torch.cat(rows))


def test_every_rank_holds_its_gate_above_its_up_and_its_columns_of_the_rest(tmp_path: Path) -> None:
    tensors = hf_tensors("llama")
    gate, up = tensors["model.layers.0.mlp.gate_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    down, proj = tensors["model.layers.0.mlp.down_proj.weight"], tensors["model.layers.0.self_attn.o_proj.weight"]
    for rank, shard in enumerate(load(write(tmp_path, "llama", tensors), "llama", 2)):
        rows, columns = slice(rank * 12, rank * 12 + 12), slice(rank * 24, rank * 24 + 24)
        assert torch.equal(shard["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([gate[rows], up[rows]]))
        assert torch.equal(shard["decoder.layers.0.mlp.linear_fc2.weight"], down[:, rows])
        assert torch.equal(shard["decoder.layers.0.self_attention.linear_proj.weight"], proj[:, columns])
        assert torch.equal(shard["decoder.final_layernorm.weight"], tensors["model.norm.weight"])


def test_fused_and_separate_checkpoints_meet_in_the_same_shards(tmp_path: Path) -> None:
    apart = hf_tensors("llama")
    stems = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    fused = {name: tensor for name, tensor in apart.items() if name.split(".")[-2] not in stems}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        fused[prefix + "self_attn.qkv_proj.weight"] = torch.cat(
            [apart[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
        )
        fused[prefix + "mlp.gate_up_proj.weight"] = torch.cat(
            [apart[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        )
    left = load(write(tmp_path / "apart", "llama", apart), "llama", 2)
    right = load(write(tmp_path / "fused", "phi3", fused), "phi3", 2)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tp", [1, 4])
def test_new_rows_are_each_matrix_s_own_mean_of_the_text_rows_and_padding_is_zero(tmp_path: Path, tp: int) -> None:
    tensors = hf_tensors("phi3")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][TEXT:] = 1000.0  # padding of the published file, which must not count
    shards = load(write(tmp_path, "phi3", tensors), "phi3", tp)
    for megatron, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        rows = torch.cat([shard[megatron] for shard in shards])
        assert rows.shape == (32, HIDDEN)
        assert torch.equal(rows[:TEXT], tensors[name][:TEXT])
        # The exact mean, rounded once to bf16.
        mean = tensors[name][:TEXT].double().mean(0).bfloat16()
        assert torch.equal(rows[TEXT:28], mean.expand(8, -1))
        assert not rows[28:].any()


def test_a_tied_head_becomes_a_copy_and_comes_out_untied(tmp_path: Path) -> None:
    tensors = hf_tensors("llama")
    head = tensors.pop("lm_head.weight")
    folder = write(tmp_path / "tied", "llama", tensors, tie_word_embeddings=True)
    # The tie flag is the file's business: a model configured without it loads the same.
    for tied in (True, False):
        (weights,) = load(folder, "llama", tie_word_embeddings=tied)
        assert torch.equal(weights["output_layer.weight"], weights["embedding.word_embeddings.weight"])
        exported = export_backbone([weights], read_backbone(hf_config("llama", tie_word_embeddings=tied)), VOCABULARY)
        assert torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    # Some files hold the tied head a second time; transformers does not read it, nor do we.
    folder = write(tmp_path / "twice", "llama", {**tensors, "lm_head.weight": head}, tie_word_embeddings=True)
    (again,) = load(folder, "llama")
    assert torch.equal(again["output_layer.weight"], weights["output_layer.weight"])


def test_pipeline_stages_take_their_own_layers(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", hf_tensors("llama"))
    shape = read_backbone(hf_config("llama"))
    (whole,) = load(folder, "llama")
    first = Shard(shape, layers=range(1), last=False)
    last = Shard(shape, layers=range(1, 2), first=False)
    load_backbone(first, folder, shape, VOCABULARY, tp_rank=0, tp_size=1)
    load_backbone(last, folder, shape, VOCABULARY, tp_rank=0, tp_size=1, layer_offset=1)
    assert all(torch.equal(value, whole[name]) for name, value in first.weights().items())
    for name, value in last.weights().items():
        assert torch.equal(value, whole[name.replace("layers.0.", "layers.1.")])


def test_plugin_parameters_are_left_alone(tmp_path: Path) -> None:
    shape = read_backbone(hf_config("llama"))
    shard = Shard(shape)
    load_backbone(shard, write(tmp_path, "llama", hf_tensors("llama")), shape, VOCABULARY, tp_rank=0, tp_size=1)
    for name, parameter in shard.named_parameters():
        assert bool(parameter.isnan().all()) is (".hlora." in name), name


def test_tensors_spread_over_several_files(tmp_path: Path) -> None:
    tensors = hf_tensors("llama")
    (whole,) = load(write(tmp_path / "one", "llama", tensors), "llama")
    folder = write_sharded(tmp_path / "two", tensors)
    (spread,) = load(folder, "llama")
    assert all(torch.equal(spread[name], whole[name]) for name in whole)


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write(folder, "llama", {})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def fails(folder: Path, message: str, family: str = "llama", **changes: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder, family, **changes)


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    tensors = hf_tensors("llama")
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    load(write(tmp_path / "buffers", "llama", {**tensors, **computed}), "llama")
    fewer = {name: t for name, t in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    fails(write(tmp_path / "a", "llama", fewer), r"missing \['model.layers.1.mlp.up_proj.weight'\] \(1\)")
    more = {**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(HEAD_DIM)}
    fails(write(tmp_path / "b", "llama", more), r"unexpected \['model.layers.0.self_attn.q_norm.weight'\] \(1\)")
    headless = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    fails(write(tmp_path / "c", "llama", headless), r"missing \['lm_head.weight'\]")
    fails(write(tmp_path / "d", "phi3", tensors), "missing .*qkv_proj", family="phi3")


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    for i, (name, size) in enumerate(
        {
            "model.layers.0.self_attn.o_proj.weight": (HIDDEN, 50),  # of the wrong shape
            "model.layers.0.self_attn.k_proj.weight": (23, HIDDEN),  # cannot be cut into groups
            "model.layers.1.mlp.up_proj.weight": (FFN, HIDDEN + 1),  # cannot be joined to gate
            "model.norm.weight": (1,),  # would broadcast
        }.items()
    ):
        tensors = {**hf_tensors("llama"), name: torch.zeros(size)}
        fails(write(tmp_path / str(i), "llama", tensors), f"{name} .*do not fit")


def test_fewer_rows_than_text_ids_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", hf_tensors("llama", rows=TEXT - 1))
    fails(folder, "model.embed_tokens.weight has 19 rows but model.vocabulary.text_size=20")


def test_a_model_parameter_without_a_source_is_refused(tmp_path: Path) -> None:
    shape = read_backbone(hf_config("llama"))
    shard = Shard(dataclasses.replace(shape, qkv_bias=True))
    folder = write(tmp_path, "llama", hf_tensors("llama"))
    with pytest.raises(CheckpointError, match="fills no value for 2 parameters .*linear_qkv.bias"):
        load_backbone(shard, folder, shape, VOCABULARY, tp_rank=0, tp_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}, "num_heads=8, model.hf_config gives 4"),
        ({"rms_norm_eps": 1e-6}, "rms_eps=1e-05, model.hf_config gives 1e-06"),
        ({"rope_theta": 5e5}, "rope_theta=10000.0, model.hf_config gives 500000.0"),
    ],
)
def test_a_folder_of_another_model_is_refused_although_its_tensors_would_fit(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fails(write(tmp_path, "llama", hf_tensors("llama")), message, **changes)


def test_a_float_that_went_through_fp32_is_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", hf_tensors("llama"), rms_norm_eps=9.999999747378752e-06)
    load(folder, "llama")


def test_unreadable_folders(tmp_path: Path) -> None:
    fails(tmp_path, "cannot read .*config.json")
    tensors = hf_tensors("llama")
    folder = write(tmp_path / "pickle", "llama", tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, "neither model.safetensors nor .*convert it with transformers' save_pretrained")
    folder = write(tmp_path / "cut", "llama", tensors)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-64])
    fails(folder, "is not a readable safetensors file")
    folder = write(tmp_path / "scaled", "llama", tensors, rope_scaling={"type": "linear", "factor": 2.0})
    fails(folder, "rope_scaling=.* is not supported")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot read"),
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ("../one/model.safetensors", "is not a file of"),
        ("absent.safetensors", "is not a file of"),
        (7, "is not a file of"),
        ("model-1-of-2.safetensors", "does not hold"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    tensors = hf_tensors("llama")
    write(tmp_path / "one", "llama", tensors)
    folder = write_sharded(tmp_path / "two", tensors)
    path = folder / "model.safetensors.index.json"
    if message in ("cannot read", "holds a list", "has no weight_map"):
        path.write_text(index)
    else:
        weight_map = json.loads(path.read_text())["weight_map"]
        held = load_file(folder / "model-1-of-2.safetensors")
        path.write_text(json.dumps({"weight_map": {n: f if n in held else index for n, f in weight_map.items()}}))
    fails(folder, message)


def test_export_names_what_a_shard_lacks(tmp_path: Path) -> None:
    shards = load(write(tmp_path, "llama", hf_tensors("llama")), "llama", 2)
    del shards[1]["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(CheckpointError, match="lacks decoder.layers.1.mlp.linear_fc2.weight"):
        export_backbone(shards, read_backbone(hf_config("llama")), VOCABULARY)
