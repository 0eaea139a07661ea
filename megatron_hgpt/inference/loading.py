"""A trained run, ready to answer and draw: model, weights, tokenizer and VQGAN from one checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hgpt import distributed
from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.config_io import load_config
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.inference.generator import Generator
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.vision.vqgan import VQGAN


@dataclass(kw_only=True, slots=True)
class LoadedRun:
    """What inference and evaluation work with."""

    config: RunConfig
    context: DistributedContext
    generator: Generator
    _vqgan: VQGAN | None = None

    def require_vqgan(self) -> VQGAN:
        """The VQGAN, read when it is first asked for: a run that was moved without it can still answer.

        Raises:
            ConfigError: the run names none, or its folder is not here.
            CheckpointError: it cannot be read.
        """
        if self._vqgan is None:
            path = self.config.model.vq.path
            if path is None or not Path(path).is_dir():
                state = "is not set" if path is None else f"={path} is not a folder"
                raise ConfigError(f"model.vq.path {state}: pictures need the VQGAN; add model.vq.path=FOLDER")
            self._vqgan = VQGAN.load(Path(path), self.context.device)
        return self._vqgan


def load_run(run: str | Path, *, overrides: Sequence[str] = ()) -> LoadedRun:
    """Load the newest whole checkpoint of a run (or a given checkpoint folder) at any tensor-parallel size.

    The layout that the run was trained with does not count: one process holds the model, or
    `parallel.tensor_model_parallel_size` of them where the overrides say so. Others are data-parallel replicas.

    Args:
        run: run folder, or one ``step_*`` folder.
        overrides: ``key=value`` for the stored configuration, e.g. a moved ``model.backbone``.

    Raises:
        CheckpointError, ConfigError: nothing to load, or it does not fit.
    """
    from megatron_hgpt import cpu_platform

    cpu_platform.install_if_needed()
    from megatron_hgpt.build import build_model
    from megatron_hgpt.checkpoint import load_opened, open_checkpoint
    from megatron_hgpt.text.tokenizer import TextTokenizer

    # The processes choose the checkpoint together, and so before its configuration, with the seed, is known.
    layout = layout_of_overrides(overrides)
    context = distributed.initialize(layout, RunConfig().training.seed)
    opened = open_checkpoint(Path(run))
    config = load_resolved(opened.folder / "resolved_config.yaml", overrides)
    config.parallel = layout
    distributed.seed_everything(context, config.training.seed)
    model = build_model(config, context.device)
    load_opened([model], config, [opened])
    tokenizer = TextTokenizer.load(str(config.model.tokenizer or config.model.backbone))
    generator = Generator.of(model, tokenizer, config)
    return LoadedRun(config=config, context=context, generator=generator)


def layout_of_overrides(overrides: Sequence[str]) -> ParallelConfig:
    """The layout that the overrides name, whatever the run was trained with.

    Raises:
        ConfigError: pipeline stages or context ranks, which generation does not have.
    """
    asked = load_config(overrides=[item for item in overrides if item.startswith("parallel.")]).parallel
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(asked, name) != 1:
            raise ConfigError(f"parallel.{name}={getattr(asked, name)}: a loaded run has every layer and token; set 1")
    return ParallelConfig(tensor_model_parallel_size=asked.tensor_model_parallel_size)
