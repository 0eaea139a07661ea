"""The model on Transformer Engine's layers trains, saves and loads like the one on local layers.

On tests/fake_te, which says what that proves and what it does not. The ranks put it on their import path before
megatron.core is imported; everything of megatron.core and of this package is real.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hgpt.config import CheckpointConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import make_micro_batch, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

# fp32, as in test_training_parity: another order of sums, amplified by Adam where a gradient is near zero.
RELATIVE = 1e-5
NUM_STEPS, SAVED_AT = 6, 3
LOCAL, TE = "local", "transformer_engine"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 + SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2 + SP, tasks packed together": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """The stand-in counts as installed, and this process as one with a GPU."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "fake_te"))
    from megatron_hgpt.backbone import implementation

    with mock.patch.object(implementation, "transformer_engine_problem", return_value=None):
        yield


def make_config(backbone: Path, folder: Path, parallel: dict[str, Any], impl: str, precision: str = "fp32") -> Any:
    training = TrainingConfig(
        stage="stage3_joint", num_steps=NUM_STEPS, precision=precision, micro_batch_size=2, global_batch_size=8
    )
    config = tiny_config(
        backbone, folder, parallel=ParallelConfig(**parallel), training=training,
        checkpoint=CheckpointConfig(save_interval_steps=SAVED_AT),
    )  # fmt: skip
    config.model.transformer_impl = impl
    return config


def train(
    backbone: Path, folder: Path, parallel: dict[str, Any], impl: str, last_step: int, packing: str = "none"
) -> list[float]:
    """(loss, gradient norm) of the steps up to `last_step`, from the newest checkpoint in `folder` if there is one."""
    with stand_in():
        from megatron_hgpt import distributed
        from megatron_hgpt.hooks.base import Hook

        context = distributed.initialize(ParallelConfig(**parallel), seed=1)
        config = make_config(backbone, folder, parallel, impl)
        curve: list[float] = []

        class Recorder(Hook):
            def on_step_end(self, state: Any, record: Any) -> None:
                curve.extend((record.loss, record.grad_norm))

        build_trainer(config, context, total_steps=last_step, packing=packing, hooks=[Recorder()]).fit()
        return curve


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3")


@pytest.fixture(scope="module")
def local_run(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Folder and curve of the local layers on one rank; its checkpoints are those of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("local")
    return folder, run_ranks(train, 1, backbone, folder, {}, LOCAL, NUM_STEPS, fresh=True)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_is_that_of_the_local_layers(
    layout: str, backbone: Path, local_run: tuple[Path, list[float]], tmp_path: Path
) -> None:
    world_size, parallel = LAYOUTS[layout]
    expected = local_run[1][: 2 * SAVED_AT]
    packing = "mixed" if "packed" in layout else "none"
    for curve in run_ranks(train, world_size, backbone, tmp_path, parallel, TE, SAVED_AT, packing, fresh=True):
        assert curve == pytest.approx(expected, rel=RELATIVE)
    if layout == "TP2 + SP":  # its checkpoint goes on with local layers
        resumed = run_ranks(train, 1, backbone, tmp_path, {}, LOCAL, NUM_STEPS, fresh=True)[0]
        assert resumed == pytest.approx(local_run[1][2 * SAVED_AT :], rel=RELATIVE)


def test_a_checkpoint_of_local_layers_resumes_on_transformer_engine(
    backbone: Path, local_run: tuple[Path, list[float]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoints" / f"step_{SAVED_AT:08d}"
    shutil.copytree(local_run[0] / "checkpoints" / checkpoint.name, checkpoint)
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for curve in run_ranks(train, 2, backbone, tmp_path, parallel, TE, NUM_STEPS, fresh=True):
        assert curve == pytest.approx(local_run[1][2 * SAVED_AT :], rel=RELATIVE)


def compare_models(backbone: Path, folder: Path) -> None:
    """Names, groups, weights, gradients, checkpoint keys and Hugging Face export of both specs, on one rank."""
    with stand_in():
        from megatron.core.transformer.identity_op import IdentityOp

        from megatron_hgpt import distributed
        from megatron_hgpt.backbone.names import unfused_name
        from megatron_hgpt.build import build_model, freeze_except
        from megatron_hgpt.convert.huggingface import export_backbone
        from megatron_hgpt.hlora import te_linear
        from megatron_hgpt.parameters import group_of
        from megatron_hgpt.testing.models import make_b_nonzero

        context = distributed.initialize(ParallelConfig(), seed=1)
        models = {impl: build_model(make_config(backbone, folder, {}, impl), context.device) for impl in (LOCAL, TE)}
        layer = models[TE].language_model.decoder.layers[0]
        assert isinstance(layer.input_layernorm, IdentityOp) and isinstance(layer.pre_mlp_layernorm, IdentityOp)
        assert type(layer.self_attention.linear_qkv) is te_linear.HLoRATELayerNormColumnParallelLinear
        assert type(layer.mlp.linear_fc2) is te_linear.HLoRATERowParallelLinear

        mine = dict(models[LOCAL].named_parameters())
        fused = {unfused_name(name): (name, p) for name, p in models[TE].named_parameters()}
        assert set(mine) == set(fused)
        assert {name for name, (own, _) in fused.items() if own != name} == {
            f"language_model.decoder.layers.{i}.{norm}.weight"
            for i in range(2)
            for norm in ("input_layernorm", "pre_mlp_layernorm")
        }
        for name, parameter in mine.items():
            own, other = fused[name]
            assert group_of(own) == group_of(name)
            assert torch.equal(parameter, other), name
            for flag in ("sequence_parallel", "tensor_model_parallel", "partition_dim"):
                assert getattr(parameter, flag, False) == getattr(other, flag, False), (name, flag)

        keys = {
            impl: {
                tensor.key
                for name, tensor in model.language_model.sharded_state_dict(prefix="language_model.").items()
                if "_extra_state" not in name
            }
            for impl, model in models.items()
        }
        assert keys[LOCAL] == keys[TE]
        exports = [
            export_backbone([dict(m.language_model.named_parameters())], m.shape, m.vocabulary) for m in models.values()
        ]
        assert exports[0].keys() == exports[1].keys()
        assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])

        for task in Task:
            losses, gradients = {}, {}
            for impl, model in models.items():
                make_b_nonzero(model)
                freeze_except([model], ["hlora_comprehension", "hlora_generation", "abstract_adapter"])
                model.zero_grad()
                losses[impl] = model(make_micro_batch("compare", task))
                losses[impl].sum().backward()
                gradients[impl] = {unfused_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
            torch.testing.assert_close(losses[TE], losses[LOCAL], rtol=RELATIVE, atol=RELATIVE)
            assert gradients[TE].keys() == gradients[LOCAL].keys()
            for name, gradient in gradients[LOCAL].items():
                # Entries near zero are differences of sums: their error is that of the largest entries.
                torch.testing.assert_close(
                    gradients[TE][name], gradient, rtol=1e-4, atol=float(gradient.abs().max()) * RELATIVE, msg=name
                )


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_both_specs_are_the_same_model(family: str, tmp_path: Path) -> None:
    run_ranks(compare_models, 1, write_backbone(tmp_path / family, family), tmp_path, fresh=True)


def count_fp8_calls(backbone: Path, folder: Path) -> tuple[set[tuple[str, bool]], set[tuple[str, bool]], str]:
    """Which base GEMMs ran under the FP8 autocast, in training and in evaluation, and the recipe."""
    with stand_in():
        from megatron_hgpt import distributed
        from megatron_hgpt.build import build_model

        context = distributed.initialize(ParallelConfig(), seed=1)
        model = build_model(make_config(backbone, folder, {}, TE, precision="fp8"), context.device)
        assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
        import transformer_engine.pytorch as te

        recipes = []
        multiply = te._Linear._multiply

        def watch(linear: Any, x: torch.Tensor) -> torch.Tensor:
            recipes.append(te.fp8.FP8GlobalStateManager.recipe)
            return multiply(linear, x)

        calls = []
        with mock.patch.object(te._Linear, "_multiply", watch):
            for is_training in (True, False):
                te.QUANTISED_CALLS.clear()
                model.train(is_training)(make_micro_batch("fp8", Task.COMPREHENSION, length=32))
                calls.append(set(te.QUANTISED_CALLS))
        return calls[0], calls[1], f"{type(recipes[0]).__name__} {recipes[0].fp8_format.name}"


def test_frozen_gemms_are_fp8_in_training_and_bf16_in_evaluation(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "phi3")
    training, evaluation, recipe = run_ranks(count_fp8_calls, 1, backbone, tmp_path, fresh=True)[0]
    linears = ("HLoRATELayerNormColumnParallelLinear", "HLoRATERowParallelLinear")
    assert training == {(name, True) for name in linears}
    assert evaluation == {(name, False) for name in linears}
    assert recipe == "Float8CurrentScaling HYBRID"


def attend_packed() -> float:
    """Largest difference between packed attention and attention on each sequence alone."""
    with stand_in():
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.transformer_config import TransformerConfig

        from megatron_hgpt import distributed
        from megatron_hgpt.hlora.layer_spec import layer_modules

        distributed.initialize(ParallelConfig(), seed=1)
        config = TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0
        )
        attention: Any = layer_modules(TE).core_attention
        core = attention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
        lengths = (5, 3, 8)
        offsets = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
        q, k, v = (torch.randn(16, heads, 4) for heads in (4, 2, 2))
        packing = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=8, max_seqlen_kv=8
        )
        packed = core(q, k, v, None, AttnMaskType.causal, packed_seq_params=packing)
        alone = [
            core(*(t.unsqueeze(1) for t in parts), None, AttnMaskType.causal).squeeze(1)
            for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        return float((packed - torch.cat(alone)).abs().max())


def test_the_attention_takes_packed_sequences() -> None:
    assert run_ranks(attend_packed, 1, fresh=True)[0] < 1e-6
