"""One run described by nested dataclasses; see `megatron_hgpt.config_io` for YAML, presets and dotted overrides.

Numbers carry their unit in the name or in the docstring; choices and ranges are part of a field's type (`Literal`,
`Annotated` with one of `megatron_hgpt.bounds`) and are checked by `config_io` when a value is read. Nothing here starts
a process group or touches a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_hgpt.bounds import Above, AtMost, Below, Within
from megatron_hgpt.errors import ConfigError

if TYPE_CHECKING:
    from megatron_hgpt.samples import Task

TemplateName = Literal["phi3_instruct", "phi4_instruct", "qwen_2", "smollm2", "plain"]
StageName = Literal[
    "stage1_comprehension",
    "stage1_generation",
    "stage1_joint",
    "stage2",
    "stage3_comprehension",
    "stage3_generation",
    "stage3_joint",
]
Precision = Literal["bf16", "fp32", "fp8"]
Recompute = Literal["selective", "full"]
Implementation = Literal["auto", "local", "transformer_engine"]
Place = Literal["none", "cpu"]


def _resolved(name: str, value: int | None) -> int:
    if value is None:
        raise ConfigError(f"{name} is not known: set it, or name the folder that says it")
    return value


@dataclass(kw_only=True, slots=True)
class HLoRAPluginConfig:
    """One H-LoRA plugin (spec section 5)."""

    lora_rank: Annotated[int, Within(1, 2**16)] = 64
    """Total rank r over all experts; must be a multiple of `num_experts`."""
    alpha: Annotated[float, Above(0), AtMost(10**6)] = 128.0
    """Scale is alpha / lora_rank * num_experts."""
    num_experts: Annotated[int, Within(1, 1024)] = 4
    """k: every expert is active for every token, weighted by the router."""
    dropout: Annotated[float, Below(0, 1)] = 0.05
    """Probability, on the rank axis, after A. A stage may set its own (stage-1 comprehension: 0)."""


PLUGIN_SIZES = ("lora_rank", "alpha", "num_experts")
"""Options of a plugin that belong together: other models have others."""


@dataclass(kw_only=True, slots=True)
class HLoRAConfig:
    """The two plugins of one model; None leaves a plugin out."""

    comprehension: HLoRAPluginConfig | None = field(default_factory=HLoRAPluginConfig)
    generation: HLoRAPluginConfig | None = field(default_factory=lambda: HLoRAPluginConfig(lora_rank=256, alpha=512.0))

    def of(self, task: Task) -> HLoRAPluginConfig | None:
        """The plugin of a task."""
        return self.comprehension if task == "comprehension" else self.generation


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """The frozen CLIP tower and the depths that HVP reads (spec section 2)."""

    tower: str | None = None
    """Folder of a Hugging Face `CLIPVisionModel` (config.json + safetensors); None initialises at random, loudly."""
    hf_config: dict[str, Any] = field(default_factory=dict)
    """Sizes of the tower, with config.json's names; read from `tower`, with which what stands here must agree."""
    comprehension_hidden_state: Annotated[int, Within(-1000, 1000)] = -2
    """Index into HF `hidden_states` for the abstract-grained features."""
    generation_hidden_state: Annotated[int, Within(-1000, 1000)] = 1
    """Index into HF `hidden_states` for the concrete-grained features."""

    @property
    def num_image_tokens(self) -> int:
        """Patch features of one image."""
        return (int(self.hf_config["image_size"]) // int(self.hf_config["patch_size"])) ** 2


@dataclass(kw_only=True, slots=True)
class VQConfig:
    """The VQGAN whose codebook indices are the image tokens (spec section 4)."""

    path: str | None = None
    """Folder with `model.yaml` and `last.ckpt` in taming-transformers' layout; needed to encode and to decode."""
    num_codes: Annotated[int, Within(0, 2**20)] | None = None
    """Codebook entries, and so the number of `<idx_*>` tokens; None takes those of `path`, without one 8192."""
    num_indices: Annotated[int, Within(0, 2**16)] | None = None
    """Indices of one image in raster order; None takes those of `path`, without one 1024 (32 x 32)."""

    @property
    def codes(self) -> int:
        """`num_codes` of a resolved configuration.

        Raises:
            ConfigError: it was not resolved (`model_folders.resolve_model`).
        """
        return _resolved("model.vq.num_codes", self.num_codes)

    @property
    def indices(self) -> int:
        """`num_indices` of a resolved configuration; raises as `codes`."""
        return _resolved("model.vq.num_indices", self.num_indices)


@dataclass(kw_only=True, slots=True)
class VocabularyConfig:
    """Text ids, then `<start_index>`, `<idx_0>` …, `<end_index>`, `<pixel_newline>`, then padding."""

    text_size: Annotated[int, Within(1, 2**22)] | None = None
    """Text ids, and the id of the first VQ token; None takes the tokenizer's highest id + 1."""
    pad_to_multiple: Annotated[int, Within(1, 2**16)] = 1024
    """Embedding and head rows are padded to this multiple: one size for every tensor-parallel size."""

    @property
    def text_ids(self) -> int:
        """`text_size` of a resolved configuration.

        Raises:
            ConfigError: it was not resolved (`model_folders.resolve_model`).
        """
        return _resolved("model.vocabulary.text_size", self.text_size)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Everything that fixes the shape and the frozen weights of the model."""

    backbone: str | None = None
    """Folder of a Hugging Face causal LM (config.json + safetensors); None initialises at random, loudly."""
    hf_config: dict[str, Any] = field(default_factory=dict)
    """Content of the backbone's config.json; read from `backbone`, with which what stands here must agree."""
    tokenizer: str | None = None
    """Folder of the tokenizer; None means the backbone's folder."""
    template: TemplateName | None = None
    """How a conversation becomes text. None: plain in stage1_comprehension, in every other stage `chat_template`."""
    chat_template: TemplateName | None = None
    """The template that the backbone was made for; None tells it from the tokenizer."""
    system_prompt: str | None = None
    """System message of the template; None means the template's own."""
    max_seq_length: Annotated[int, Within(1, 2**20)] = 2048
    """Tokens of one sample after the image features are spliced in; longer samples are truncated and counted."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    vq: VQConfig = field(default_factory=VQConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    hlora: HLoRAConfig = field(default_factory=HLoRAConfig)
    transformer_impl: Implementation = "auto"
    """Layers of the language model: local, transformer_engine (needs a GPU), or auto: the latter where it runs."""
    transformer_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron.core's TransformerConfig set verbatim (an unknown name is refused)."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Process layout; data parallel size is world size / (tensor * pipeline * context)."""

    tensor_model_parallel_size: Annotated[int, Within(1, 4096)] = 1
    """T: ranks that share one layer."""
    sequence_parallel: bool = False
    """Shard activations over T outside the linears; needs T > 1."""
    pipeline_model_parallel_size: Annotated[int, Within(1, 4096)] = 1
    """Pipeline stages. Tower, adapters and embedding are on the first, the head on the last."""
    virtual_pipeline_model_parallel_size: Annotated[int, Within(2, 4096)] | None = None
    """Model chunks per pipeline stage (interleaved 1F1B); None is one, plain 1F1B."""
    num_layers_in_first_pipeline_stage: Annotated[int, Within(1, 4096)] | None = None
    """Layers on the first stage, which also runs the tower; None splits evenly."""
    num_layers_in_last_pipeline_stage: Annotated[int, Within(1, 4096)] | None = None
    """Layers on the last stage, which also runs the head; None splits evenly."""
    context_parallel_size: Annotated[int, Within(1, 4096)] = 1
    """Ranks that share one sequence."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data parallel ranks (ZeRO-1)."""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """What runs forward, backward and the optimizer step (docs/engines.md)."""

    name: Literal["megatron", "deepspeed"] = "megatron"
    """megatron, or deepspeed: ZeRO over data-parallel ranks, without tensor, pipeline and context parallelism."""
    zero_stage: Literal[1, 2, 3] = 2
    """deepspeed only. 1 shards AdamW's state over the ranks, 2 the reduced gradients as well, 3 also the weights."""
    offload_optimizer: Place = "none"
    """deepspeed only: none, or cpu to keep AdamW's state, and to update, in host memory."""
    offload_parameters: Place = "none"
    """deepspeed with zero_stage 3 only: none, or cpu to keep the shards of the weights in host memory."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """deepspeed only: fields of DeepSpeed's JSON set verbatim; what other sections decide is refused."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Training data: folders written by `hgpt preprocess`."""

    train: list[str] = field(default_factory=list)
    """Dataset folders (each with manifest.json); samples of all of them form one epoch."""
    validation: list[str] = field(default_factory=list)
    """Held-out dataset folders; empty means no validation loss."""
    mixture: dict[str, Annotated[float, Within(0, 10**6)]] = field(default_factory=dict)
    """Task -> weight of its micro-batches; empty means in proportion to the samples of each task."""
    packing: Literal["none", "by_task", "mixed"] = "none"
    """none pads samples to the longest of their micro-batch; by_task packs samples of one task into rows; mixed packs
    samples of both tasks together. A packed row is one micro-batch, and batch sizes count rows."""
    pack_length: Annotated[int, Within(1, 2**20)] | None = None
    """Tokens of a packed row at most; None takes model.max_seq_length."""
    shuffle: bool = True
    """Draw a new order of the samples in every epoch, from the seed; false keeps that of the datasets."""
    num_workers: Annotated[int, Within(0, 256)] = 2
    """Threads that decode and preprocess images ahead, per rank; 0 does it inline."""
    max_image_side: Annotated[int, Within(0, 2**14)] = 0
    """Pixels: larger pictures are shrunk to it before the tower's own preprocessing, in the datasets and in inference
    alike; 0 keeps every picture as it is. A dataset records it, and one that was written with another is refused."""
    feature_cache: str | None = None
    """Sub-folder of every dataset folder with the tower's features (hgpt cache-features); None runs the tower."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule (spec section 6); None takes the stage table's value."""

    lr: Annotated[float, Within(0, 100)] | None = None
    """Peak learning rate of H-LoRA, embeddings, head, or (stage-1 comprehension) the adapter."""
    adapter_lr: Annotated[float, Within(0, 100)] | None = None
    """Peak learning rate of the vision adapters where they train beside other groups."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """What the learning rate does after warm-up."""
    warmup_ratio: Annotated[float, Within(0, 1)] | None = None
    """Share of the steps spent in linear warm-up."""
    min_lr_ratio: Annotated[float, Within(0, 1)] = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""
    weight_decay: Annotated[float, Within(0, 100)] = 0.0
    """AdamW's decoupled decay of all trained parameters; must be 0 while training.new_rows=rows."""
    adam_beta1: Annotated[float, Below(0, 1)] = 0.9
    """Decay of the mean of gradients per step."""
    adam_beta2: Annotated[float, Below(0, 1)] = 0.999
    """Decay of the mean of squared gradients per step."""
    adam_eps: Annotated[float, Within(0, 1)] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Within(0, 10**6)] = 1.0
    """Global gradient norm; 0 turns clipping off."""
    cpu_offload: bool = False
    """Keep AdamW's moments in host memory and update there: 8 bytes less per trained parameter, slower steps."""
    megatron_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron.core's OptimizerConfig set verbatim (an unknown name is refused)."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How long and how wide to train."""

    stage: StageName = "stage3_joint"
    """What is trained, on which samples. stage1_comprehension: the abstract adapter. stage1_generation: the concrete
    adapter, the generation plugin, the image tokens' rows. stage2: embeddings and head, on both tasks.
    stage3_comprehension, stage3_generation: the task's plugin and adapter. *_joint: both tasks in one run."""
    num_steps: Annotated[int, Within(1, 10**9)] | None = None
    """Optimizer steps; None lets num_epochs decide. At most one of the two is set."""
    num_epochs: Annotated[float, Above(0), AtMost(10**6)] | None = None
    """Passes over the training samples; with neither set there is one."""
    micro_batch_size: Annotated[int, Within(1, 4096)] = 1
    """Samples per forward pass and data-parallel rank."""
    global_batch_size: Annotated[int, Within(1, 2**16)] | None = None
    """Samples per optimizer step over all ranks; None takes the stage table's value."""
    precision: Precision = "bf16"
    """bf16 or fp32 for parameters and activations, or fp8: as bf16, with the frozen GEMMs in FP8 (Transformer Engine).
    The router softmax and the loss are fp32 always."""
    seed: Annotated[int, Within(0, 2**31 - 1)] = 1234
    """Seeds initialisation (by parameter name), data order and dropout."""
    train_adapters_in_stage2: bool = False
    """The paper's text and table disagree; default frozen."""
    new_rows: Literal["rows", "full", "none"] = "rows"
    """Stage-1 generation: train the new vocabulary rows only (rows), all rows (full) or none."""
    recompute: Recompute | None = None
    """Activations that are computed again in backward instead of kept; None keeps all."""
    validation_interval_steps: Annotated[int, Within(0, 10**9)] = 0
    """Optimizer steps between validations on data.validation; 0 validates after the last step only."""
    validation_samples: Annotated[int, Within(1, 10**9)] | None = None
    """Samples per task at most in one validation; None takes all."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Where training state goes and what it starts from."""

    directory: str | None = None
    """Folder of step_* checkpoints; None means <output_dir>/checkpoints."""
    save_interval_steps: Annotated[int, Within(1, 10**9)] = 500
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, Within(0, 10**6)] = 2
    """Newest checkpoints kept, and the newest healthy one; 0 keeps all."""
    async_save: bool = False
    """Go on training while a thread per rank writes a copy; the folder gets its name a few steps later."""
    resume: bool = True
    """Continue from the newest complete checkpoint in `directory` when there is one."""
    init_from: list[str] = field(default_factory=list)
    """Checkpoints of earlier stages whose weights (not optimizer) are loaded in order before training."""


@dataclass(kw_only=True, slots=True)
class AnomalyConfig:
    """What becomes of a step whose loss or gradient is not finite, and of a loss that jumps (docs/operations.md)."""

    not_finite: Literal["stop", "skip", "rollback"] = "skip"
    """stop ends the run; skip leaves out the update of that step; rollback goes back to the newest healthy checkpoint
    and on with the samples behind the bad step."""
    max_skips: Annotated[int, Within(0, 10**6)] = 3
    """Steps in a row that may be left out; one more stops the run."""
    max_rollbacks: Annotated[int, Within(0, 10**6)] = 3
    """Times that a run may go back; one more stops it."""
    spike: Literal["warn", "stop", "rollback"] = "warn"
    """What a loss spike does: a line on the console, or as `not_finite`."""
    spike_factor: Annotated[float, Above(1), AtMost(10**6)] = 3.0
    """A loss above this many times the median of the last 50 steps is a spike, 1 nat above it at least."""


@dataclass(kw_only=True, slots=True)
class TimeoutsConfig:
    """Seconds after which waiting ends; each is told in docs/operations.md."""

    step_warning_s: Annotated[float, Above(0), AtMost(10**7)] = 60.0
    """A step without progress: the console names the rank, where it stands and the remedy. Below `step_limit_s`."""
    step_limit_s: Annotated[float, Above(0), AtMost(10**7)] = 900.0
    """A step without progress: the run ends on every rank, and the launcher starts it again."""
    start_s: Annotated[float, Above(0), AtMost(10**7)] = 1800.0
    """From the start of a process to its first step, weights read."""
    loader_s: Annotated[float, Above(0), AtMost(10**7)] = 600.0
    """Waiting for one step's samples."""
    save_s: Annotated[float, Above(0), AtMost(10**7)] = 1800.0
    """Writing one checkpoint; an asynchronous one is then given up and training goes on."""
    collective_s: Annotated[float, Above(0), AtMost(10**7)] = 1800.0
    """A collective of torch.distributed that not every rank joins: a last resort, not below `step_limit_s`."""


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How `hgpt train` looks after the processes it starts; under a torchrun of your own, its options count."""

    max_restarts: Annotated[int, Within(0, 10**6)] = 3
    """Times that a failed run is started again from its newest healthy checkpoint without progress in between."""
    restart_backoff_s: Annotated[float, Within(0, 10**7)] = 10.0
    """Pause before the first restart; each further one without progress waits twice as long, 300 s at most."""
    grace_s: Annotated[float, Above(0), AtMost(10**7)] = 270.0
    """From a signal to stop until processes that have not saved and ended are killed."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is shown and written while training."""

    interval_steps: Annotated[int, Within(1, 10**9)] = 10
    """Optimizer steps between records on the console, in metrics.jsonl and in TensorBoard; the first and the last step
    always get one."""
    tensorboard: bool = True
    """Write the figures to <output_dir>/tensorboard as well."""
    sample_images_interval_steps: Annotated[int, Within(0, 10**9)] = 0
    """Optimizer steps between sample images in TensorBoard; 0 draws none."""
    num_sample_images: Annotated[int, Within(1, 256)] = 4
    """Images drawn each time."""
    progress_bar: bool = True
    """Show a moving bar where the console is a terminal; elsewhere there are lines."""
    wandb_project: str | None = None
    """Project of Weights & Biases that the run is logged to; None logs nothing there."""
    mlflow_experiment: str | None = None
    """Experiment of MLflow that the run is logged to; None logs nothing there."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One training run of one stage."""

    name: str = "run"
    """What the run is called in its messages and in trackers."""
    output_dir: str = "runs/run"
    """Everything the run writes: checkpoints, TensorBoard, metrics.jsonl, resolved config."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
