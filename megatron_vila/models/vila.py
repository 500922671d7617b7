"""VILA on Megatron-Core: vision tower and projector on the first pipeline stage, GPT over all stages, fused head on the last.

Legend: s tokens of a CP rank (S/cp), t = s/tp tokens of a rank under Megatron sequence parallelism, N visual tokens made
here, n supervised tokens held here, H hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_vila.config.schema import Config
from megatron_vila.models.decoder.decoder import run_decoder
from megatron_vila.models.decoder.lora import set_trainable
from megatron_vila.models.decoder.saved import HostStore
from megatron_vila.models.initialize import initialize_language_model
from megatron_vila.models.language import build_language_model, transformer_config
from megatron_vila.models.loss import HeadOutput, Vocabulary, fused_head
from megatron_vila.models.shard import RowShard
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import VisionTower
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB


class VilaModel(MegatronModule):
    """One rank's part of the model.

    Every tp x cp rank of the first stage has the whole vision tower and projector, and encodes its own frames. Under tensor
    parallelism their parameters carry Megatron's ``sequence_parallel`` mark, so that ``finalize_model_grads`` sums their
    gradients over tp (DDP sums over dp x cp). Initial weights follow from ``train.seed`` and do not depend on the grid.
    """

    def __init__(self, config: Config, topology: ParallelTopology, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config=transformer_config(config.model, topology, dtype))
        model, grid = config.model, topology.grid
        self.topology = topology
        self.vocab_size = model.llm.vocab_size
        """rows of the tables that ids reach; the others are padding"""
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = topology.is_first_stage, topology.is_last_stage
        self.share_embeddings_and_output_weights = model.llm.tie_embeddings
        if self.pre_process:
            torch.manual_seed(config.train.seed)
            self.vision = VisionTower(model.vision, model.init_std)
            self.projector = Projector(model.projector, model.vision, model.llm.hidden_size, model.init_std)
            self.vision.to(device=device, dtype=dtype)
            self.projector.to(device=device, dtype=dtype)
            self.vision.set_trainable(config.optim.vision.trainable)
            self.projector.requires_grad_(config.optim.projector.trainable)
            for parameter in (*self.vision.parameters(), *self.projector.parameters()):
                parameter.sequence_parallel = grid.tp > 1  # type: ignore[attr-defined]
        self.llm = build_language_model(
            model,
            self.config,
            topology,
            device,
            mlp_tile=config.memory.mlp_tile,
            ulysses_chunks=config.parallel.ulysses_chunks,
            deterministic=config.train.deterministic,
        )
        self.memory = config.memory
        self.host = HostStore(int(config.memory.offload_gib * GIB), device)
        initialize_language_model(
            self.llm,
            seed=config.train.seed,
            std=model.init_std,
            num_layers=model.llm.num_layers,
            layer_offset=get_transformer_layer_offset(self.config, vp_stage=None, pp_rank=topology.place.pp),
            tp=grid.tp,
            tp_rank=topology.place.tp,
        )
        self.llm.to(device=device, dtype=dtype)
        set_trainable(self.llm, model.lora, config.optim.llm.trainable)
        rows = self.llm.vocab_size // grid.tp
        first = rows * topology.place.tp
        self.vocabulary = Vocabulary(first, max(0, min(rows, model.llm.vocab_size - first)), topology.tp)

    def set_input_tensor(self, input_tensor) -> None:
        """Megatron's pipeline schedules hand over the previous stage's output here."""
        self.llm.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """For Megatron's gradient sum of tied embeddings over the first and last stage."""
        return self.llm.shared_embedding_or_output_weight()

    def forward(self, shard: RowShard, made_NH: torch.Tensor | None) -> torch.Tensor | HeadOutput:
        """``hidden``, and on the last stage ``loss`` of it; the schedule passes an earlier stage's hidden states to the next."""
        hidden_t1H = self.hidden(shard, made_NH)
        return self.loss(hidden_t1H, shard) if self.post_process else hidden_t1H

    def hidden(self, shard: RowShard, made_NH: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [t, 1, H] after the layers of this stage and, on the last one, the final norm.

        ``made_NH`` are the N visual tokens that tower and projector made of this rank's frames, in row order; None after the
        first stage. Collectives: the stage-2 all-to-all over tp x cp, Megatron's over tp, MM-SP's over ulysses and ring in each
        layer.
        """
        embeddings = None if made_NH is None else self.embed(shard, made_NH)
        return run_decoder(self.llm.decoder, embeddings, shard.params, self.memory, self.host)

    def loss(self, hidden_t1H: torch.Tensor, shard: RowShard) -> HeadOutput:
        """Output layer and cross-entropy of the last stage's hidden states at supervised positions. Collectives over tp."""
        tied = self.share_embeddings_and_output_weights
        weight = self.llm.shared_embedding_or_output_weight() if tied else self.llm.output_layer.weight
        selected_nH = hidden_t1H.squeeze(1).index_select(0, shard.selected_n)
        return fused_head(selected_nH, weight, shard.labels_n, shard.counts, self.vocabulary)

    def embed(self, shard: RowShard, made_NH: torch.Tensor) -> torch.Tensor:
        """Token embeddings of this rank [t, 1, H], visual tokens in their places. First stage only. Collectives: Megatron's over
        tp, then the stage-2 all-to-all over tp x cp."""
        text_tH = self.llm.embedding(input_ids=shard.token_ids_1s, position_ids=None).squeeze(1)
        merged_tH = text_tH.index_copy(0, shard.reshard.slots, shard.reshard(made_NH).to(text_tH.dtype))
        if torch.is_grad_enabled() and not merged_tH.requires_grad:
            # Attention's backward pass is collective, so it must run on every rank, even if everything below is frozen.
            merged_tH.requires_grad_()
        return merged_tH.unsqueeze(1)
