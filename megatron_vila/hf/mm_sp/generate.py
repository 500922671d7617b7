"""``model.generate`` while MM-SP is on: the prompt is read in chunks by all ranks, then Transformers' own loop decodes.

Everything of that loop stays (logits processors, stopping criteria, streamers, stop strings). It gets a cache that holds the
prompt already, but for its last token. The ranks that share a prompt compute each token alike; scores, answers of stopping
criteria and random numbers are those of the first of them, so that all choose the same tokens and stop together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megatron_vila.hf.mm_sp.arguments import Settings, check_alike, check_generate, summary
from megatron_vila.hf.mm_sp.cache import ShardedCache
from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.hf.mm_sp.groups import MMSPGroups
from megatron_vila.hf.mm_sp.language import keeps_its_cache, sliding_window
from megatron_vila.hf.mm_sp.prompt import Prompt, common_tokens
from megatron_vila.parallel.agreement import gathered
from megatron_vila.plan.chunks import tokens_of_chunk

T = TypeVar("T")
_MOST_AHEAD = 4096
"""Decoded tokens for which there is room from the start; more get it as they come."""


@dataclass(frozen=True)
class Generator:
    """``generate`` of ``model``, around its ``stock`` one. ``new_cache`` makes an empty cache, ``device`` tells where the model
    computes."""

    model: PreTrainedModel
    stock: Callable[..., Any]
    groups: MMSPGroups
    collator: ShardCollator
    new_cache: Callable[[], ShardedCache]
    device: Callable[[], torch.device]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **call: Any,
    ):
        """What the stock ``generate`` returns for one prompt, on every rank of the group ``sample``; all give it the same.

        Collective over ``sample``, and with data-parallel replicas over ``everyone``. Raises ``ValueError``, before any rank
        waits for another one, for what MM-SP cannot do, for a prompt that cannot be read and for ranks whose arguments differ.
        """
        if inputs is not None:
            call = {"input_ids": inputs} | call
        settings = Settings(self.model.generation_config, generation_config, call)
        text = self.model.config.get_text_config()
        window = sliding_window(text)
        self._together(lambda: check_generate(call, settings, self.collator.adapter, window))
        check_alike(gathered(summary(call, settings), self.groups.sample))
        ids_1L, cache = call["input_ids"].to(self.device()), call.get("past_key_values")
        cache = self.new_cache() if cache is None else cache
        adapter = self.collator.adapter
        media = {} if adapter is None else {key: call.pop(key, None) for key in adapter.keys}
        for key in () if adapter is None else adapter.ignored:
            call.pop(key, None)
        prompt = self._together(lambda: self._unread(ids_1L, media, cache, settings["prefill_chunk_size"] or 0))
        cache.expect(0 if prompt is None else prompt.kept(cache), min(settings.new_tokens(ids_1L.shape[1]), _MOST_AHEAD))
        self._read(prompt, cache, {} if adapter is None else {name: call.pop(name, None) for name in adapter.options})
        if adapter is not None:
            adapter.start_decoding(self.model, cache.next_position, cache.get_seq_length())
        call |= {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L), "past_key_values": cache}
        call |= self._of_first_rank(logits_processor, stopping_criteria, settings["max_time"])
        if call.get("synced_gpus") is None:
            call["synced_gpus"] = self.groups.grid.dp > 1 and isinstance(self.model, FSDPModule)
        with keeps_its_cache(text), _random_numbers_of_first(self.groups.sample, ids_1L.device):
            return self.stock(generation_config=generation_config, **call)

    def _unread(
        self, ids_1L: torch.Tensor, media: dict[str, Any], cache: ShardedCache, chunk_tokens: int
    ) -> Prompt | None:
        """What the model has to read before the last token; None if the cache holds all of it. Drops from the cache what does not
        belong to this prompt."""
        ids_L = ids_1L[0].cpu().numpy()
        first = common_tokens(ids_L[:-1], cache.token_ids)
        cache.keep(first)
        if first == len(ids_L) - 1:
            if given := [key for key, value in media.items() if value is not None]:
                raise ValueError(f"{', '.join(given)} come after the {first} tokens in the cache; leave out those it holds")
            return None
        sample = {"input_ids": ids_L[first:-1]} | {key: value for key, value in media.items() if value is not None}
        chunk_tokens = tokens_of_chunk(chunk_tokens, self.groups.grid)
        return Prompt.of(self.collator, sample, first, cache.next_position, chunk_tokens)

    def _read(self, prompt: Prompt | None, cache: ShardedCache, options: dict[str, Any]) -> None:
        """Fill the cache. All replicas call the model equally often, as FSDP2 needs it: one with less to read reads single tokens
        into a cache that is thrown away."""
        chunks = 0 if prompt is None else len(prompt.chunks)
        rounds = self._most(chunks)
        if prompt is not None:
            self._read_chunks(prompt, cache, options)
        visual = () if self.collator.adapter is None else self.collator.adapter.token_ids
        token = {"input_ids": [next(token for token in range(len(visual) + 1) if token not in visual)]}
        for _ in range(rounds - chunks):
            idle, scratch = Prompt.of(self.collator, token, 0, 0, 1), self.new_cache()
            scratch.expect(idle.kept(scratch), 1)
            self._read_chunks(idle, scratch, options)

    def _read_chunks(self, prompt: Prompt, cache: ShardedCache, options: dict[str, Any]) -> None:
        for chunk, coming in zip(prompt.chunks, prompt.batches(), strict=True):
            batch = self._together(coming.result)
            self.model(**batch, **options, past_key_values=cache)
            ids = prompt.sample.document.token_ids[chunk.first : chunk.stop]
            cache.commit(torch.from_numpy(ids), prompt.positions(chunk))

    def _most(self, rounds: int) -> int:
        """The largest number of the replicas. With dp > 1 an all-reduce over ``everyone``."""
        if self.groups.grid.dp == 1:
            return rounds
        most = torch.tensor(rounds, device=self.device())
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.groups.everyone)
        return int(most)

    def _together(self, action: Callable[[], T]) -> T:
        """The result of ``action`` on this rank; if it raises on any, ``ValueError`` with that reason on all that call the model
        together. Collective over them."""
        group = self.groups.sample if self.groups.grid.dp == 1 else self.groups.everyone
        try:
            result, told, failure = action(), None, None
        except Exception as error:
            told, failure = str(error) or type(error).__name__, error
        bad = {rank: text for rank, text in enumerate(gathered(told, group)) if text is not None}
        if failure is not None:
            raise failure
        if bad:
            rank, text = next(iter(bad.items()))
            raise ValueError(f"rank {rank} of {group.size()} failed: {text}")
        return result

    def _of_first_rank(
        self,
        processors: LogitsProcessorList | None,
        criteria: StoppingCriteriaList | None,
        max_time: float | None,
    ) -> dict[str, Any]:
        """The arguments of the stock ``generate`` that make scores and stops those of the first rank of ``sample``."""
        stops = StoppingCriteriaList(criteria or [])
        if max_time is not None:  # clocks differ
            stops.append(MaxTimeCriteria(max_time))
        return {
            "logits_processor": LogitsProcessorList([*(processors or []), _FirstScores(self.groups.sample)]),
            "stopping_criteria": StoppingCriteriaList([_FirstStops(stops, self.groups.sample)]),
            "max_time": None,
        }


@dataclass
class _FirstScores(LogitsProcessor):
    """The scores of the first rank of ``group``, on all of them. A broadcast."""

    group: dist.ProcessGroup

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return _of_first(scores, self.group)


@dataclass
class _FirstStops(StoppingCriteria):
    """Whether ``criteria`` stop generation on the first rank of ``group``, on all of them. A broadcast."""

    criteria: StoppingCriteriaList
    group: dist.ProcessGroup

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> Any:
        stops = self.criteria(input_ids, scores, **kwargs) if self.criteria else input_ids.new_zeros(1, dtype=torch.bool)
        return _of_first(stops.to(torch.uint8), self.group).bool()


@contextmanager
def _random_numbers_of_first(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """All ranks draw what the first one of ``group`` draws on ``device``; after that the others go on with their own numbers."""
    read, write = torch.get_rng_state, torch.set_rng_state
    if device.type == "cuda":
        read, write = partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)
    own = read()
    write(_of_first(own.to(device), group).cpu())
    try:
        yield
    finally:
        if group.rank() != 0:
            write(own)


def _of_first(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A copy of ``values`` of the first rank of ``group``. A broadcast."""
    values = values.clone(memory_format=torch.contiguous_format)
    dist.broadcast(values, group=group, group_src=0)
    return values
