"""A trained run, ready to answer and draw: model, weights, tokenizer and VQGAN from one checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_hgpt import distributed
from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.inference.generator import Generator
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.text.templates import template_of
from megatron_hgpt.vision.vqgan import VQGAN


@dataclass(kw_only=True, slots=True)
class LoadedRun:
    """What inference and evaluation work with."""

    config: RunConfig
    context: DistributedContext
    generator: Generator
    vqgan: VQGAN | None
    """None where the run names no VQGAN; drawing then stops at indices."""

    def require_vqgan(self) -> VQGAN:
        """The VQGAN.

        Raises:
            ConfigError: the run names none.
        """
        if self.vqgan is None:
            raise ConfigError("model.vq.path is not set: images cannot be encoded or decoded without the VQGAN")
        return self.vqgan


def load_run(run: Path, *, tensor_parallel: int = 1, overrides: list[str] | None = None) -> LoadedRun:
    """Load the newest checkpoint of a run (or a given checkpoint folder) at any tensor-parallel size.

    Processes beyond `tensor_parallel` are data-parallel replicas.

    Args:
        run: run folder, or one ``step_*`` folder.
        tensor_parallel: ranks that share the model.
        overrides: ``key=value`` for the stored configuration, e.g. a moved ``model.backbone``.

    Raises:
        CheckpointError, ConfigError: nothing to load, or it does not fit.
    """
    from megatron_hgpt import cpu_platform

    cpu_platform.install_if_needed()
    from megatron_hgpt.build import build_model
    from megatron_hgpt.checkpoint import load_weights, resolve_folder
    from megatron_hgpt.text.tokenizer import TextTokenizer

    folder = resolve_folder(run)
    config = load_resolved(folder / "resolved_config.yaml", overrides or [])
    config.parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel)
    context = distributed.initialize(config.parallel, config.training.seed)
    model = build_model(config, context.device)
    load_weights([model], config, [str(folder)])
    tokenizer = TextTokenizer.load(str(config.model.tokenizer or config.model.backbone))
    generator = Generator(
        model,
        tokenizer,
        template=template_of(config.model),
        num_indices=config.model.vq.indices,
        system_prompt=config.model.system_prompt,
        max_image_side=config.data.max_image_side,
    )
    vqgan = VQGAN.load(Path(config.model.vq.path), context.device) if config.model.vq.path else None
    return LoadedRun(config=config, context=context, generator=generator, vqgan=vqgan)
