"""The vision tower against transformers' own hidden states, and what MM-SP asks of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import SiglipVisionModel

from megatron_vila.config.schema import ProjectorConfig, VisionConfig
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import (
    FrameEncoder,
    VisionTower,
    encode_frames,
    scale_pixels,
    siglip_config,
)
from megatron_vila.plan.budgets import frames_at_once
from tests.gpu import needs_a_gpu
from tests.ranks import pool

SMALL = VisionConfig(
    hidden_size=24, num_layers=4, num_heads=2, ffn_hidden_size=40, image_size=30, patch_size=4, frame_micro_batch=2
)
LAYER_WEIGHTS = [
    f"{part}.{kind}"
    for part in (
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        "self_attn.k_proj",
        "self_attn.out_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
    for kind in ("weight", "bias")
]
HEAD_WEIGHTS = [
    "probe",
    "attention.in_proj_weight",
    "attention.in_proj_bias",
    *(
        f"{part}.{kind}"
        for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
]


def build_tower(config: VisionConfig, seed: int = 1, std: float = 0.2) -> VisionTower:
    """A float64 tower whose biases and norms are not trivial either."""
    torch.manual_seed(seed)
    tower = VisionTower(config, std).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def pictures(frames: int, config: VisionConfig = SMALL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(frames, 3, config.image_size, config.image_size, generator=generator, dtype=torch.float64) * 2 - 1


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def features_and_gradients(config: VisionConfig, frames: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tower = build_tower(config)
    features_FPC = tower(pictures(frames, config))
    weights = torch.linspace(-1, 1, features_FPC.numel(), dtype=torch.float64).view_as(features_FPC)
    (features_FPC * weights).sum().backward()
    return features_FPC.detach(), gradients(tower)


@pytest.mark.parametrize("select_layer", [-1, -2, -3, 0, 1, 4])
@pytest.mark.parametrize(("image_size", "patch_size"), [(24, 4), (26, 4), (30, 4)])
def test_features_and_gradients_equal_the_hidden_states_of_transformers(image_size, patch_size, select_layer):
    config = replace(SMALL, image_size=image_size, patch_size=patch_size, select_layer=select_layer)
    features_FPC, found = features_and_gradients(config, frames=3)
    reference = SiglipVisionModel(siglip_config(config)).double()
    getattr(reference, "vision_model", reference).load_state_dict(build_tower(config).vision_model.state_dict())
    states = reference(pixel_values=pictures(3, config), output_hidden_states=True).hidden_states
    assert features_FPC.shape == (3, (image_size // patch_size) ** 2, 24)
    torch.testing.assert_close(features_FPC, states[select_layer], rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, features_FPC.numel(), dtype=torch.float64).view_as(features_FPC)
    (states[select_layer] * weights).sum().backward()
    expected = gradients(getattr(reference, "vision_model", reference))
    assert {name.removeprefix("vision_model.") for name in found} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"vision_model.{name}"], gradient, rtol=1e-11, atol=1e-11)


def test_pixels_that_do_not_fill_a_patch_are_not_seen():
    tower, pixels = build_tower(SMALL), pictures(1)
    changed = pixels.clone()
    changed[..., 28:, :] = 9
    changed[..., 28:] = 9
    assert torch.equal(tower(pixels), tower(changed))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frame_micro_batch", [1, 3, 5, 16])
def test_micro_batches_of_frames_and_recompute_change_no_feature_and_no_gradient(frame_micro_batch, recompute):
    whole_FPC, whole = features_and_gradients(replace(SMALL, frame_micro_batch=5), frames=5)
    config = replace(SMALL, frame_micro_batch=frame_micro_batch, recompute=recompute)
    features_FPC, found = features_and_gradients(config, frames=5)
    torch.testing.assert_close(features_FPC, whole_FPC, rtol=1e-12, atol=1e-12)
    assert set(found) == set(whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_recompute_encodes_each_frame_again_in_the_backward_pass_one_micro_batch_at_a_time():
    tower = build_tower(replace(SMALL, recompute=True))
    sizes = []
    tower.vision_model.encoder.layers[0].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    loss = tower(pictures(5)).sum()
    assert sizes == [2, 2, 1]
    loss.backward()
    assert sorted(sizes) == [1, 1, 2, 2, 2, 2]


def test_recompute_keeps_nothing_but_the_pictures():
    def kept_bytes(recompute: bool) -> int:
        tower = build_tower(replace(SMALL, recompute=recompute))
        own = {parameter.data_ptr() for parameter in tower.parameters()}
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features_FPC = tower(pictures(4))
        features_FPC.sum().backward()
        return sum(kept.values())

    assert kept_bytes(recompute=True) <= pictures(4).nbytes < kept_bytes(recompute=False) / 4


def test_pictures_of_another_float_type_are_cast_to_the_tower_s():
    tower, pixels = build_tower(SMALL), pictures(2).float()
    assert torch.equal(tower(pixels), tower(pixels.double()))


BYTES = torch.arange(256, dtype=torch.uint8)
SCALED = torch.from_numpy(np.arange(256, dtype=np.float32) * np.float32(2 / 255) - np.float32(1))
"""Each byte scaled to -1..1, rounded to float32 after the product and after the difference."""


def test_each_byte_of_a_picture_becomes_its_one_float_from_minus_one_to_one():
    assert torch.equal(scale_pixels(BYTES), SCALED) and SCALED[0] == -1 and SCALED[-1] == 1
    assert torch.equal(scale_pixels(BYTES.expand(33, 256)), SCALED.expand(33, 256))
    exact = (BYTES.double() / 255 - 0.5) / 0.5
    assert (SCALED.double() - exact).abs().max() < 2e-7
    assert scale_pixels(SCALED) is SCALED


@needs_a_gpu
def test_a_gpu_scales_each_byte_as_the_host_does():
    assert torch.equal(scale_pixels(BYTES.cuda()).cpu(), SCALED)
    assert torch.equal(scale_pixels(BYTES.cuda().expand(999, 256)).cpu(), SCALED.expand(999, 256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("recompute", [False, True])
def test_bytes_give_a_tower_what_their_floats_give_to_the_bit(dtype, recompute):
    shape = (5, 3, SMALL.image_size, SMALL.image_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    found = []
    for given in (pixels, SCALED[pixels.int()]):
        tower = build_tower(replace(SMALL, recompute=recompute)).to(dtype)
        features_FPC = tower(given)
        features_FPC.float().square().sum().backward()
        found.append([features_FPC, *gradients(tower).values()])
    assert all(torch.equal(bytes_, floats) for bytes_, floats in zip(*found, strict=True))


def test_whole_numbers_that_are_no_bytes_are_refused():
    with pytest.raises(TypeError, match="uint8 .0 to 255., or floats from -1 to 1, not torch.int64"):
        build_tower(SMALL)(torch.zeros(1, 3, 30, 30, dtype=torch.int64))


@needs_a_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_pictures_on_the_host_give_a_gpu_what_those_on_it_give(recompute):
    found = []
    for device in ("cpu", "cuda"):
        tower = build_tower(replace(SMALL, recompute=recompute)).to("cuda", torch.bfloat16)
        features_FPC = tower(pictures(5).float().to(device))
        features_FPC.float().square().sum().backward()
        found.append([features_FPC, *gradients(tower).values()])
    assert all(torch.equal(host, gpu) for host, gpu in zip(*found, strict=True))


def test_a_tower_on_a_cpu_is_not_compiled_where_there_is_cuda(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    with monkeypatch.context() as machine:
        machine.setattr(torch.cuda, "is_available", lambda: True)
        tower = build_tower(SMALL)
    assert tower(pictures(2)).shape == (2, 49, 24)


def test_a_rank_without_frames_gives_every_trainable_parameter_a_gradient_of_exact_zeros():
    tower = build_tower(SMALL)
    with torch.no_grad():
        tower.vision_model.embeddings.position_embedding.weight.fill_(float("nan"))
    features_FPC = tower(pictures(0))
    assert features_FPC.shape == (0, 49, 24) and features_FPC.dtype == torch.float64
    features_FPC.sum().backward()
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or (parameter.grad == 0).all(), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frames", [0, 5])
def test_tower_and_projector_in_one_pass_equal_one_after_the_other(frames, recompute):
    def run(together: bool):
        tower = build_tower(replace(SMALL, recompute=recompute))
        projector = Projector(ProjectorConfig(), SMALL, 20, 0.2).double()
        pixels = pictures(frames)
        tokens_FTD = encode_frames(tower, projector, pixels) if together else projector(tower(pixels))
        tokens_FTD.square().sum().backward()
        return tokens_FTD.detach(), gradients(tower) | gradients(projector)

    (tokens_FTD, found), (expected_FTD, expected) = run(together=True), run(together=False)
    assert tokens_FTD.shape == (frames, 16, 20) and set(found) == set(expected)
    torch.testing.assert_close(tokens_FTD, expected_FTD, rtol=1e-12, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("learns", "recompute", "ahead"), [(False, False, True), (True, True, True), (True, False, False)],
    ids=["frozen", "recomputed", "kept"],
)  # fmt: skip
def test_the_next_frames_are_encoded_ahead_and_once_where_the_tower_keeps_nothing(learns, recompute, ahead):
    batches = pictures(7).split([2, 4, 1])

    def run(step):
        tower = build_tower(replace(SMALL, recompute=recompute))
        tower.set_trainable(learns)
        projector = Projector(ProjectorConfig(), SMALL, 20, 0.2).double()
        encoded = []
        tower.vision_model.embeddings.register_forward_hook(lambda _, inputs, output: encoded.append(len(output)))
        return [step(tower, projector, encoded), gradients(tower) | gradients(projector)]

    def one_after_the_other(tower, projector, encoded):
        for batch in batches:
            encode_frames(tower, projector, batch).square().sum().backward()

    def with_the_next(tower, projector, encoded):
        encoder, seen = FrameEncoder(tower, projector), []
        for batch, following in zip(batches, (*batches[1:], None), strict=True):
            tokens_FTD = encoder(batch)
            if following is not None:
                encoder.start(following)
            seen.append(sum(encoded))
            tokens_FTD.square().sum().backward()
            encoded[:] = [seen[-1]]  # less what the backward pass encodes again
        return seen

    (seen, found), (_, expected) = run(with_the_next), run(one_after_the_other)
    assert seen == ([6, 7, 7] if ahead else [2, 6, 7])
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_frames_encoded_ahead_are_left_where_others_come():
    tower = build_tower(SMALL)
    tower.set_trainable(False)
    projector = Projector(ProjectorConfig(), SMALL, 20, 0.2).double()
    encoder = FrameEncoder(tower, projector)
    ahead, other = pictures(5).split([2, 3])
    encoder(ahead)
    encoder.start(ahead)
    assert torch.equal(encoder(other), encode_frames(tower, projector, other))
    assert torch.equal(encoder(ahead), encode_frames(tower, projector, ahead))


def test_a_frozen_tower_builds_no_graph_but_its_projector_still_learns():
    tower = build_tower(SMALL)
    tower.set_trainable(False)
    projector = Projector(ProjectorConfig(), SMALL, 20, 0.2).double()
    for frames in (0, 3):
        assert not tower(pictures(frames)).requires_grad
        encode_frames(tower, projector, pictures(frames)).sum().backward()
        assert len(gradients(projector)) == 6 and not gradients(tower)


def test_only_the_parameters_that_features_depend_on_can_be_trained():
    tower = build_tower(SMALL)
    carried = ("vision_model.encoder.layers.3.", "vision_model.post_layernorm.", "vision_model.head.")
    for trainable in (True, False, True):
        tower.set_trainable(trainable)
        for name, parameter in tower.named_parameters():
            assert parameter.requires_grad == (trainable and not name.startswith(carried)), name


@pytest.mark.parametrize("use_head", [True, False])
def test_weight_names_are_those_of_the_published_files(use_head):
    tower = VisionTower(replace(SMALL, use_head=use_head), 0.02)
    expected = [
        f"embeddings.{name}" for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
    ]
    expected += [f"encoder.layers.{layer}.{name}" for layer in range(4) for name in LAYER_WEIGHTS]
    expected += ["post_layernorm.weight", "post_layernorm.bias"]
    expected += [f"head.{name}" for name in HEAD_WEIGHTS] if use_head else []
    assert set(tower.state_dict()) == {f"vision_model.{name}" for name in expected}


@pytest.mark.parametrize(
    ("image_size", "use_head", "published_megabytes"),
    [(384, True, 856.45), (448, False, 826.65)],
)
def test_parameter_count_is_that_of_the_published_towers(image_size, use_head, published_megabytes):
    with torch.device("meta"):
        model = SiglipVisionModel(siglip_config(VisionConfig(image_size=image_size, use_head=use_head)))
    assert abs(sum(p.numel() for p in model.parameters()) * 2 / 1e6 - published_megabytes) < 0.1


def test_initial_weights_follow_from_the_seed_and_the_standard_deviation_alone():
    torch.manual_seed(3)
    first = VisionTower(SMALL, 0.02)
    torch.manual_seed(3)
    second = VisionTower(SMALL, 0.02)
    torch.manual_seed(4)
    third = VisionTower(SMALL, 0.02)
    for name, weight in first.state_dict().items():
        assert weight.device.type == "cpu" and torch.equal(weight, second.state_dict()[name]), name
        if weight.dim() > 1:
            assert not torch.equal(weight, third.state_dict()[name]), name
    matrices = torch.cat([p.flatten() for name, p in first.named_parameters() if p.dim() > 1 and "bias" not in name])
    assert abs(matrices.std() - 0.02) < 5e-4 and abs(matrices.mean()) < 5e-4
    torch.manual_seed(3)
    names = sorted(name for name, p in first.named_parameters() if p.dim() > 1)
    for name in names:
        parameter = first.get_parameter(name)
        assert torch.equal(parameter, torch.empty_like(parameter).normal_(0, 0.02)), name


def test_bfloat16_stays_close_to_float64():
    tower = build_tower(SMALL, std=0.05)
    exact_FPC = tower(pictures(3))
    rough_FPC = tower.bfloat16()(pictures(3))
    assert rough_FPC.dtype == torch.bfloat16
    assert (rough_FPC.double() - exact_FPC).norm() < 0.02 * exact_FPC.norm()


def test_pictures_of_another_size_are_refused_with_the_cure():
    tower = build_tower(SMALL)
    with pytest.raises(ValueError, match="vision.image_size=30 needs .frames, 3, 30, 30.; resize the pictures"):
        tower(torch.zeros(1, 3, 28, 28))


def test_frames_of_a_micro_batch_follow_the_memory_unless_they_are_set():
    """SigLIP so400m keeps 0.63 GiB of a frame in bfloat16, a layer of it 26 MB."""
    so400m = VisionConfig()
    sizes = [frames_at_once(so400m, learns, 2, gib * 2**30) for learns in (True, False) for gib in (0, 4, 80, 140, 10**4)]
    assert sizes == [16, 1, 15, 27, 64, 16, 20, 64, 64, 64]
    assert frames_at_once(replace(so400m, frame_micro_batch=5), True, 2, 80 * 2**30) == 5


def _overlapped_steps(rank: int, frames_of_rank: tuple[int, ...]) -> list[torch.Tensor]:
    """Gradients of three steps under Megatron's DDP with overlapped reduction; frames are dealt over the ranks."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(context_parallel_size=len(frames_of_rank))
    try:
        tower = build_tower(SMALL)
        tower.projector = Projector(ProjectorConfig(), SMALL, 20, 0.2).double()
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        options = DistributedDataParallelConfig(overlap_grad_reduce=True, average_in_collective=False)
        model = DistributedDataParallel(config, options, tower)
        model.broadcast_params()
        start = sum(frames_of_rank[:rank])
        for _ in range(3):
            model.zero_grad_buffer()
            part = pictures(sum(frames_of_rank))[start : start + frames_of_rank[rank]]
            encode_frames(tower, tower.projector, part).square().sum().backward()
            model.finish_grad_sync()
        return [p.main_grad.clone() for _, p in sorted(tower.named_parameters()) if p.requires_grad]
    finally:
        parallel_state.destroy_model_parallel()


def test_overlapped_gradient_reduction_is_exact_when_a_rank_has_no_frames():
    idle, even = (pool.run(2, _overlapped_steps, frames) for frames in ((3, 0), (1, 2)))
    for mine, other, dealt in zip(idle[0], idle[1], even[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
        torch.testing.assert_close(mine, dealt, rtol=1e-11, atol=1e-12)
