"""Projectors against small independent ones written with plain indices."""

import math

import pytest
import torch

from megatron_vila.config.schema import ProjectorConfig, VisionConfig
from megatron_vila.models.vision.projector import Projector, SpaceToChannel
from megatron_vila.plan.geometry import patches_per_side, tokens_per_square

TYPES = ("mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix", "linear", "mlp2x_gelu")
CHANNELS, HIDDEN = 6, 10


def vision(side: int, channels: int = CHANNELS) -> VisionConfig:
    return VisionConfig(hidden_size=channels, image_size=side * 4 + 3, patch_size=4)


def build(type: str, side: int, token_order: str = "row_major") -> Projector:
    """A float64 projector whose biases and norms are not trivial either."""
    torch.manual_seed(5)
    projector = Projector(ProjectorConfig(type, token_order), vision(side), HIDDEN, 0.3).double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return projector


def features(frames: int, side: int) -> torch.Tensor:
    return torch.randn(frames, side * side, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centered = x - x.mean()
    return centered / ((centered**2).mean() + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def cell_vectors(frame_PC: torch.Tensor, side: int, rate: int, column_major: bool) -> list[torch.Tensor]:
    """Patch vectors of each cell joined row by row, zeros outside the map, in token order."""
    cells = math.ceil(side / rate)
    order = [(row, column) for row in range(cells) for column in range(cells)]
    if column_major:
        order = [(row, column) for column in range(cells) for row in range(cells)]
    zero = torch.zeros(frame_PC.shape[1], dtype=frame_PC.dtype)

    def patch(row: int, column: int) -> torch.Tensor:
        return frame_PC[row * side + column] if row < side and column < side else zero

    return [
        torch.cat([patch(row * rate + i, column * rate + j) for i in range(rate) for j in range(rate)])
        for row, column in order
    ]


def independent(type: str, side: int, token_order: str, weights: dict, features_FPC: torch.Tensor) -> torch.Tensor:
    """The projector of the published models, one token after the other."""

    def token(x: torch.Tensor) -> torch.Tensor:
        if type == "linear":
            return linear(x, weights, "layers")
        if type == "mlp2x_gelu":
            return linear(gelu(linear(x, weights, "layers.0")), weights, "layers.2")
        x = gelu(linear(layer_norm(x, weights, "layers.1"), weights, "layers.2"))
        if type != "mlp_downsample_3x3_fix":
            return linear(x, weights, "layers.4")
        return linear(gelu(linear(layer_norm(x, weights, "layers.4"), weights, "layers.5")), weights, "layers.7")

    rate = {"linear": 1, "mlp2x_gelu": 1, "mlp_downsample_3x3_fix": 3}.get(type, 2)
    column_major = token_order == "legacy_column_major"
    return torch.stack(
        [torch.stack([token(x) for x in cell_vectors(frame, side, rate, column_major)]) for frame in features_FPC]
    )


@pytest.mark.parametrize("side", [4, 5, 6, 7])
@pytest.mark.parametrize(
    ("type", "token_order"), [*((type, "row_major") for type in TYPES), ("mlp_downsample", "legacy_column_major")]
)
def test_tokens_and_gradients_equal_those_of_an_independent_projector(type, token_order, side):
    projector, features_FPC = build(type, side, token_order), features(2, side).requires_grad_()
    tokens_FTH = projector(features_FPC)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in projector.named_parameters()}
    copied_FPC = features_FPC.detach().clone().requires_grad_()
    expected_FTH = independent(type, side, token_order, weights, copied_FPC)
    torch.testing.assert_close(tokens_FTH, expected_FTH, rtol=1e-12, atol=1e-12)
    mixing = torch.linspace(-1, 1, tokens_FTH.numel(), dtype=torch.float64).view_as(tokens_FTH)
    (tokens_FTH * mixing).sum().backward()
    (expected_FTH * mixing).sum().backward()
    torch.testing.assert_close(features_FPC.grad, copied_FPC.grad, rtol=1e-11, atol=1e-12)
    for name, parameter in projector.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("column_major", "expected"),
    [
        (False, [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]),
        (True, [[1, 2, 5, 6], [9, 10, 13, 14], [3, 4, 7, 8], [11, 12, 15, 16]]),
    ],
)
def test_patches_of_a_4x4_map_join_in_the_order_of_the_published_models(column_major, expected):
    patches_FPC = torch.arange(1.0, 17.0).view(1, 16, 1)
    assert SpaceToChannel(4, 2, column_major)(patches_FPC)[0].tolist() == expected


def test_a_27x27_map_is_padded_to_28x28_with_zeros_at_the_bottom_and_at_the_right():
    tokens_FTK = SpaceToChannel(27, 2, column_major=False)(torch.ones(2, 729, 3)).view(2, 14, 14, 4, 3)
    padded = (tokens_FTK == 0).all(dim=-1)
    assert not padded[:, :13, :13].any()
    assert padded[:, :13, 13].eq(torch.tensor([False, True, False, True])).all()
    assert padded[:, 13, :13].eq(torch.tensor([False, False, True, True])).all()
    assert padded[:, 13, 13].eq(torch.tensor([False, True, True, True])).all()


@pytest.mark.parametrize("type", TYPES)
def test_no_frames_give_every_parameter_and_the_features_gradients_of_exact_zeros(type):
    projector = build(type, 5)
    with torch.no_grad():
        next(projector.parameters()).fill_(float("inf"))
    features_FPC = features(0, 5).requires_grad_()
    tokens_FTH = projector(features_FPC)
    assert tokens_FTH.shape == (0, tokens_per_square(vision(5), ProjectorConfig(type)), HIDDEN)
    tokens_FTH.sum().backward()
    assert features_FPC.grad.shape == features_FPC.shape
    for name, parameter in projector.named_parameters():
        assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize("type", TYPES)
def test_weight_names_are_those_of_the_published_files(type):
    indices = {
        "mlp_downsample_3x3_fix": ("layers.1", "layers.2", "layers.4", "layers.5", "layers.7"),
        "linear": ("layers",),
        "mlp2x_gelu": ("layers.0", "layers.2"),
    }.get(type, ("layers.1", "layers.2", "layers.4"))
    assert set(build(type, 4).state_dict()) == {f"{index}.{kind}" for index in indices for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("type", "hidden", "count"), [("mlp_downsample", 4096, 35_668_992), ("mlp_downsample_3x3_fix", 3584, 61_101_440)]
)
def test_parameter_count_is_that_of_the_published_projectors(type, hidden, count):
    with torch.device("meta"):
        projector = Projector(ProjectorConfig(type), VisionConfig(), hidden, 0.02)
    assert sum(parameter.numel() for parameter in projector.parameters()) == count


@pytest.mark.parametrize(
    ("image_size", "type", "side", "tokens"),
    [
        (384, "mlp_downsample", 27, 196),
        (448, "mlp_downsample", 32, 256),
        (448, "mlp_downsample_2x2_fix", 32, 256),
        (448, "mlp_downsample_3x3_fix", 32, 121),
        (384, "mlp_downsample_3x3_fix", 27, 81),
        (384, "linear", 27, 729),
        (384, "mlp2x_gelu", 27, 729),
    ],
)
def test_a_frame_becomes_as_many_tokens_as_in_the_published_models(image_size, type, side, tokens):
    config = VisionConfig(image_size=image_size)
    assert patches_per_side(config) == side
    assert tokens_per_square(config, ProjectorConfig(type)) == tokens


def test_initial_weights_follow_from_the_seed_and_the_standard_deviation_alone():
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(Projector(ProjectorConfig(), vision(6, channels=64), 128, 0.02).state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
        assert torch.equal(weight, weights[2][name]) == (weight.dim() == 1), name
    assert abs(weights[0]["layers.2.weight"].std() - 0.02) < 1e-3
    assert weights[0]["layers.1.weight"].eq(1).all() and weights[0]["layers.2.bias"].eq(0).all()


def test_features_of_another_tower_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 25, 6\) but was built for \[frames, 16, 6\]"):
        build("mlp_downsample", 4)(features(2, 5))
