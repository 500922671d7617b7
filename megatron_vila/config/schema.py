"""Every configuration key, with its type, default and meaning.

A YAML file and dotted overrides fill these dataclasses (``config/load.py``); ``plan/validate.py`` checks what one key
alone cannot; ``docs/configuration.md`` is printed from the ``help`` texts. No other place holds a default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_vila.config.text_rules import DEFAULT_CLOCK


def key(default: Any, help: str) -> Any:
    """A dataclass field with its documentation."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class VisionConfig:
    """The SigLIP vision tower."""

    hidden_size: int = key(1152, "width of the tower")
    num_layers: int = key(27, "layers in the checkpoint, the unused last ones included")
    num_heads: int = key(16, "attention heads")
    ffn_hidden_size: int = key(4304, "width of the feed-forward layer")
    image_size: int = key(384, "side of the square input in pixels")
    patch_size: int = key(14, "side of a patch in pixels; left-over pixels at the right and bottom are not seen")
    select_layer: int = key(
        -2,
        "hidden state used as features, counted as transformers counts hidden_states (-2: last layer but one)",
    )
    use_head: bool = key(True, "the checkpoint carries SigLIP's pooling head (carried, never run)")
    layer_norm_eps: float = key(1e-6, "epsilon of the tower's LayerNorms")
    frame_micro_batch: int = key(
        0, "frames encoded at once on a rank; 0: as many as an eighth of the GPU's memory holds, 64 at most (16 on a CPU)"
    )
    recompute: bool = key(
        False, "recompute each frame micro-batch in the backward pass instead of keeping its activations"
    )


@dataclass
class ProjectorConfig:
    """What turns patch features into LLM tokens."""

    type: str = key(
        "mlp_downsample", "mlp_downsample, mlp_downsample_2x2_fix, mlp_downsample_3x3_fix, linear or mlp2x_gelu"
    )
    token_order: str = key(
        "row_major",
        "order of mlp_downsample's tokens: row_major (NVILA, Qwen2-LongVILA) or legacy_column_major (VILA-1.5, Llama-3-LongVILA)",
    )


@dataclass
class LanguageConfig:
    """The language model: Llama-3 and Qwen2 shapes."""

    num_layers: int = key(32, "decoder layers")
    hidden_size: int = key(4096, "width")
    num_heads: int = key(32, "query heads")
    num_kv_heads: int = key(8, "key/value heads (grouped-query attention)")
    head_dim: int | None = key(None, "size of a head; null: hidden_size / num_heads")
    ffn_hidden_size: int = key(14336, "width of the SwiGLU layer")
    vocab_size: int = key(128257, "rows of the embedding table in the checkpoint; padded inside for tensor parallelism")
    norm_eps: float = key(1e-5, "epsilon of RMSNorm")
    qkv_bias: bool = key(False, "bias on the query, key and value projections (Qwen2)")
    tie_embeddings: bool = key(False, "the output layer shares the embedding table")
    rope_theta: float = key(500000.0, "base of the rotary embedding")
    rope_scaling_factor: float = key(1.0, "linear position scaling: positions are divided by it")
    max_positions: int = key(8192, "longest document that the model is meant for")


@dataclass
class LoraConfig:
    """Low-rank updates of the language model's linear layers, whose own weights are frozen then."""

    rank: int = key(0, "inner size of an update; 0: no LoRA")
    alpha: float = key(16.0, "an update is scaled by alpha / rank")
    targets: list[str] = key(
        ["qkv", "proj"], "linear layers with an update: qkv and proj (attention), fc1 and fc2 (MLP)"
    )
    also_train: list[str] = key(
        [], "other weights of the language model that learn beside the updates: embeddings, norms"
    )


@dataclass
class ModelConfig:
    """The whole VILA model."""

    name: str = key("custom", "name in logs and tables")
    vision: VisionConfig = field(default_factory=VisionConfig, metadata={"help": "vision tower"})
    projector: ProjectorConfig = field(default_factory=ProjectorConfig, metadata={"help": "projector"})
    llm: LanguageConfig = field(default_factory=LanguageConfig, metadata={"help": "language model"})
    lora: LoraConfig = field(default_factory=LoraConfig, metadata={"help": "low-rank updates"})
    init_std: float = key(0.02, "standard deviation of random initial weights")
    attention: str = key(
        "auto",
        "attention kernel: auto, fa4, cudnn, flash2 (CUDA), cpu, or reference (float64, slow, the truth)",
    )


@dataclass
class MemoryConfig:
    """What is kept between the forward and the backward pass, and where."""

    recompute: str = key(
        "none",
        "decoder layers: none (everything is kept), attention_output (everything but attention is recomputed) or full (attention "
        "too)",
    )
    block_layers: int = key(
        1,
        "with attention_output: layers whose inputs are rebuilt from one kept input (more: less memory, one more MLP pass)",
    )
    recompute_layers: int = key(
        0, "layers of each pipeline stage under the recompute policy, the first ones; the others keep everything; 0: all"
    )
    mlp_tile: int = key(
        0, "tokens of an MLP tile, whose inner values exist only one tile at a time; 0: the whole MLP at once"
    )
    offload_gib: float = key(0.0, "host memory per rank (GiB) for what recompute keeps, the earliest layers first")


@dataclass
class ParallelConfig:
    """The process grid. Data parallel size = world size / (tp * pp * ulysses * ring)."""

    tp: int = key(1, "tensor parallel size; above 1 it includes Megatron sequence parallelism")
    pp: int = key(1, "pipeline parallel size; the vision tower lives on the first stage")
    ulysses: int = key(1, "ranks of the head all-to-all of MM-SP; keep tp * ulysses inside a node")
    ring: int = key(1, "ranks of the zigzag ring of MM-SP, across nodes")
    gpus_per_node: int = key(8, "ranks of one node, to tell which groups cross nodes")
    ulysses_chunks: int = key(
        1, "chunks of heads in which the all-to-all travels, one under the attention of another; each takes its memory in turn"
    )


@dataclass
class DataConfig:
    """Samples, pictures and text."""

    train: list[str] = key(
        [],
        "training samples: JSON or JSONL files, WebDataset shards (tar files, Energon's or VILA's folders), addresses of such "
        "folders "
        "(s3://, https:// ...), or one of Energon's metadataset YAML files",
    )
    weights: list[float] = key(
        [],
        "share of each entry of data.train in the samples of a run, in any unit; each entry has epochs of its own then; empty: "
        "every sample once an epoch",
    )
    eval: list[str] = key([], "held-out samples, named as in data.train; empty: no evaluation")
    media_dir: str = key(
        "", "folder of the image and video paths; empty: paths are relative to each JSON file's folder"
    )
    tokenizer: str = key("", "folder of a Hugging Face tokenizer with a chat template")
    num_frames: int = key(8, "most frames taken from a video")
    fps: float = key(0.0, "most frames per second of video; 0: num_frames spread uniformly")
    fps_rule: str = key(
        "spread",
        "with fps above 0: spread (num_frames over the whole video, as LongVILA) or first (one every 1 / fps seconds from the "
        "start, num_frames at most, as VILA's main branch)",
    )
    image_aspect: str = key("resize", "resize (to the square) or pad (to a square with the mean color, then resize)")
    media_format: str = key(
        "vila",
        "where media stand: vila (before the first human turn; markers are taken out with their line break and turns are "
        "stripped, as in VILA's own training) or verbatim (at their markers, the text as it is)",
    )
    template: str = key(
        "",
        "chat template: empty (the tokenizer's own), or a prompt of VILA's: llama_3 (Llama-3-LongVILA, VILA-1.5 8B), vicuna_v1 "
        "(VILA-1.5 3B and 13B), hermes-2 (VILA-1.5 40B)",
    )
    template_clock: str = key(
        DEFAULT_CLOCK, "date, or date and time, that a chat template sees as now (2024-07-26 or 2024-07-26T12:30)"
    )
    parse_control_tokens: bool = key(
        False,
        "read control tokens (such as <|im_end|>) that are written in turns of a conversation as tokens; false: they are text",
    )
    bad_records: str = key(
        "skip",
        "records that break the format: skip (told at the start, then they count as broken samples) or stop (the run ends)",
    )
    max_broken: float = key(
        0.05,
        "largest share of the samples drawn that may be broken, judged from the 500th on and at the end; above it the run "
        "saves and ends; 1: never",
    )
    ignore_fields: list[str] = key(
        [],
        "fields of records and their turns, and parts of samples in shards, that are not looked at though they look like "
        "media or change what is learned",
    )
    cache_dir: str = key(
        "",
        "folder of a node that keeps pieces of remote shards; empty: ~/.cache/megatron_vila/pieces (XDG_CACHE_HOME is respected)",
    )
    cache_gib: float = key(64.0, "most GiB that the pieces in data.cache_dir take")
    frame_separator_ids: list[int] = key([], "token ids written after each video frame")
    image_separator_ids: list[int] = key([], "token ids written after each image")
    packing: bool = key(False, "pack several samples into one row of at most train.seq_length tokens")
    over_long: str = key(
        "truncate",
        "sample longer than train.seq_length: truncate (fewer frames, evenly) or drop; both are counted",
    )
    shuffle: bool = key(True, "shuffle the samples of each epoch by (train.seed, epoch)")
    workers: int = key(0, "threads that decode on a rank; 0: its cores of the node, less one or two where there are many")
    video_decoder: str = key(
        "auto",
        "what decodes videos: cpu (cores), nvdec (the GPU's video engines what they can, cores the rest), auto (cores, with "
        "engines while rows are late)",
    )
    prefetch: int = key(4, "rows decoded ahead on a rank, as far as host_memory_gib has room for their pixels")
    host_memory_gib: float = key(
        0.0, "most decoded pixels that a rank holds, in GiB; 0: a quarter of its share of the node's memory"
    )


@dataclass
class PartConfig:
    """Training of one part of the model."""

    trainable: bool = key(True, "train this part")
    lr: float | None = key(None, "peak learning rate of this part; null: optim.lr")


@dataclass
class OptimConfig:
    """Adam with Megatron's distributed optimizer."""

    lr: float = key(2e-5, "peak learning rate")
    min_lr: float = key(0.0, "learning rate at the end of a cosine schedule")
    schedule: str = key("cosine", "cosine or constant, after the warm-up")
    warmup_steps: int = key(0, "steps of linear warm-up; used if above 0, else warmup_fraction")
    warmup_fraction: float = key(0.03, "part of train.steps spent in linear warm-up")
    weight_decay: float = key(0.0, "decoupled weight decay (not on norms and biases)")
    beta1: float = key(0.9, "Adam beta1")
    beta2: float = key(0.999, "Adam beta2")
    eps: float = key(1e-8, "Adam epsilon")
    clip_grad: float = key(1.0, "largest global gradient norm; 0: no clipping")
    grad_reduce_fp32: bool = key(True, "accumulate and reduce gradients in float32 (bf16 training)")
    offload_fraction: float = key(0.0, "share of the optimizer state (0 to 1) that lives in host memory")
    vision: PartConfig = field(default_factory=PartConfig, metadata={"help": "vision tower"})
    projector: PartConfig = field(default_factory=PartConfig, metadata={"help": "projector"})
    llm: PartConfig = field(default_factory=PartConfig, metadata={"help": "language model"})


@dataclass
class TrainConfig:
    """The training run."""

    steps: int = key(100, "optimizer steps of the run")
    global_batch_size: int = key(1, "rows of one optimizer step over all data-parallel ranks and micro-batches")
    seq_length: int = key(8192, "most tokens of a row before padding")
    seed: int = key(1234, "seed of the data order and of random initial weights")
    precision: str = key("auto", "auto (bf16 on GPU, fp32 on CPU), bf16, fp32 or fp64")
    deterministic: bool = key(False, "deterministic kernels, nothing compiled: bitwise equal runs in the same layout")
    on_nan: str = key(
        "stop",
        "loss or gradient not finite: stop (after saving nothing) or skip (the update is dropped and counted)",
    )
    max_skips: int = key(10, "skipped updates in a row after which the run stops all the same")
    log_every: int = key(1, "steps between progress lines")
    eval_every: int = key(0, "steps between evaluations on data.eval; 0: only at the end")
    timeout_minutes: float = key(30.0, "how long ranks wait for one that does not come before the run ends and names it")
    output: str = key("runs/default", "folder of checkpoints, metrics.jsonl, TensorBoard files and plots")


@dataclass
class ProfileConfig:
    """Traces of single steps."""

    steps: list[int] = key([], "steps (from 1) that are traced with torch's profiler into train.output/traces, as Chrome traces")
    ranks: list[int] = key([0], "ranks that write a trace")


@dataclass
class CheckpointConfig:
    """Saving and loading."""

    save: bool = key(True, "save checkpoints; false for benchmarks")
    save_every: int = key(0, "steps between checkpoints; 0: only at the end")
    keep: int = key(2, "checkpoints kept, the newest ones; 0: all")
    resume: bool | str = key(
        True,
        "continue from the newest checkpoint of train.output if there is one; newest_whole: from the newest one whose files are "
        "all undamaged, which says what was passed over",
    )
    load: str = key("", "checkpoint (folder of a step, or a run's folder) whose weights start a new run")


@dataclass
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={"help": "model"})
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata={"help": "process grid"})
    memory: MemoryConfig = field(default_factory=MemoryConfig, metadata={"help": "memory"})
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "data"})
    optim: OptimConfig = field(default_factory=OptimConfig, metadata={"help": "optimizer"})
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "training"})
    profile: ProfileConfig = field(default_factory=ProfileConfig, metadata={"help": "profiling"})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata={"help": "checkpoints"})
