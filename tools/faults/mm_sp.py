"""Faults of MM-SP under stock models of transformers: units, positions, features of the tower, windows, soft caps."""

from .fault import Fault

_TEST = "tests/hf/test_mm_sp_qwen.py"
_ADAPTER = "megatron_vila/hf/mm_sp/adapters/qwen_vl.py"
ROW = (_TEST, "-k", "float64")
_ADAPTERS = "megatron_vila/hf/mm_sp/adapters"
_LANGUAGE, _VISION = "tests/hf/test_mm_sp_language.py", "tests/hf/test_mm_sp_vision_models.py"
TEXT, MORE_VISION = (_LANGUAGE, "-k", "float64"), (_VISION, "-k", "float64")

FAULTS = [
    Fault(
        "m-rope takes the height of a picture for its width",
        _ADAPTER,
        "made[:, 0].numpy() + first",
        "made[[0, 2, 1], 0].numpy() + first",
        (_TEST, "-k", "positions_are_those"),
    ),
    Fault(
        "features of earlier layers of the tower go to the wrong layers",
        _ADAPTER,
        "for level in levels[1:]]",
        "for level in levels[:0:-1]]",
        ROW,
    ),
    Fault(
        "the parts of a video are read in reversed order",
        _ADAPTER,
        "medium.first_row + number * h * w",
        "medium.first_row + (t - 1 - number) * h * w",
        ROW,
    ),
    Fault(
        "units are dealt by their number and not by their patches",
        _ADAPTER,
        "self._tokens(medium.grid), h * w, is_video",
        "self._tokens(medium.grid), 1, is_video",
        (_TEST, "-k", "dealt"),
    ),
    Fault(
        "seconds between the frames of a video are forgotten",
        _ADAPTER,
        'seconds = sample.get("second_per_grid_ts")',
        "seconds = None",
        (_TEST, "-k", "positions_are_those"),
    ),
    Fault(
        "a rank without pictures does not run the tower",
        "megatron_vila/hf/mm_sp/vision.py",
        "(blank,), options)[:0])",
        "(blank,), options)[:0].detach())",
        (_TEST, "-k", "touches"),
    ),
    Fault(
        "an answer counts positions by the tokens of its prompt",
        "megatron_vila/hf/mm_sp/cache.py",
        "max(self.next_position, int(positions_n.max(initial=-1)) + 1)",
        "self._tokens + len(ids_n)",
        (_TEST, "-k", "generated"),
    ),
    Fault(
        "replicas encode in as many rounds as each needs itself",
        "megatron_vila/hf/mm_sp/vision.py",
        "most = tuple(of_all.tolist())",
        "pass",
        (_TEST, "-k", "replica and fsdp-"),
    ),
    Fault(
        "a sliding window is one token longer",
        "megatron_vila/plan/windows.py",
        "distance - window + 1)",
        "distance - window)",
        TEXT,
    ),
    Fault(
        "blocks of a sliding window overwrite each other's gradients",
        "megatron_vila/parallel/windows.py",
        "total.index_add_(0, tokens, grad.to(wide))",
        "total[tokens] = grad.to(wide)",
        TEXT,
    ),
    Fault(
        "a soft cap of logits has no gradient of its own",
        "megatron_vila/models/loss.py",
        "return dlogits_PW if soft_cap is None else dlogits_PW * (1 - (logits_PW / soft_cap) ** 2)",
        "return dlogits_PW",
        TEXT,
    ),
    Fault(
        "the loss is capped as if it were logits",
        "megatron_vila/hf/mm_sp/loss.py",
        "self._soft_cap if labels_n is None else None",
        "self._soft_cap",
        TEXT,
    ),
    Fault(
        "scores have the usual scale in every model",
        "megatron_vila/hf/mm_sp/language_attention.py",
        "scale = query.shape[-1] ** -0.5 if scaling is None else scaling",
        "scale = query.shape[-1] ** -0.5",
        TEXT,
    ),
    Fault(
        "Phi-3 drops its cache",
        "megatron_vila/hf/mm_sp/language.py",
        "setattr(text, _DROPS_CACHE_AT, sys.maxsize)",
        "pass",
        (_LANGUAGE, "-k", "text_and_logits"),
    ),
    Fault(
        "visual tokens of VILA are learned",
        f"{_ADAPTERS}/vila.py",
        "def unlearned(",
        "def others(",
        MORE_VISION,
    ),
    Fault(
        "pictures of LLaVA-NeXT-Video are pooled as frames are",
        f"{_ADAPTERS}/llava_next_video.py",
        "model.vision_resampler(part) if unit.is_video else part",
        "model.vision_resampler(part)",
        MORE_VISION,
    ),
    Fault(
        "weights that a rank's pictures do not use get no gradient there",
        f"{_ADAPTERS}/llava_next_video.py",
        "return torch.cat(made) + 0 * always",
        "return torch.cat(made)",
        (_VISION, "-k", "fsdp2"),
    ),
    Fault(
        "SmolVLM2 sees the padding of a tile",
        f"{_ADAPTERS}/smolvlm.py",
        "mask[number, :height, :width] = True",
        "mask[number] = True",
        MORE_VISION,
    ),
    Fault(
        "tokens that a video of VideoLLaMA 3 leaves out are taken for the first ones",
        f"{_ADAPTERS}/video_llama_3.py",
        "torch.tensor(kept)",
        "torch.arange(len(kept))",
        MORE_VISION,
    ),
    Fault(
        "ranks encode again at different points of the backward pass",
        "megatron_vila/hf/mm_sp/vision.py",
        "partial(_to_the_end, encode)",
        "encode",
        (_VISION, "-k", "fsdp2"),
    ),
    Fault(
        "tiles of InternVL are mixed up",
        f"{_ADAPTERS}/internvl.py",
        "Piece(self.blank(), start, pixels, number)",
        "Piece(self.blank(), start, pixels, len(starts) - 1 - number)",
        MORE_VISION,
    ),
]
