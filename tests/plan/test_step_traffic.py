"""The predicted traffic of a step, against arithmetic of its own on a machine that nobody has."""

import re

import numpy as np
import pytest

from megatron_vila.config.load import load_config
from megatron_vila.explain.__main__ import main
from megatron_vila.explain.sample import made_up_document
from megatron_vila.explain.step import full_document
from megatron_vila.explain.text import duration, size
from megatron_vila.plan import traffic
from megatron_vila.plan.flops import model_flops
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.hardware import PRESETS, Machine
from megatron_vila.plan.row import pack
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.sizes import parameter_count
from megatron_vila.plan.step_traffic import Load, step_flop_seconds, step_traffic

NVLINK, NETWORK, PEAK = 11e9, 3e9, 7e12
ODD = Machine(
    "an odd one", 10**12, PEAK, host_bytes=10**12, gpus_per_node=3, nvlink_gpus=6, nvlink=NVLINK, network=NETWORK
)
"""NVLink joins two of its nodes. With two ranks on a node, these are four."""

SETTINGS = [
    *("parallel.tp=2", "parallel.ulysses=2", "parallel.ring=2", "parallel.pp=2", "parallel.gpus_per_node=2"),
    *("model.llm.num_layers=6", "train.global_batch_size=6", "optim.vision.trainable=false", "optim.llm.trainable=false"),
]
GRID = GridShape(tp=2, ulysses=2, ring=2, dp=2, pp=2)
ROWS = 3  # of a replica: 6 of two
LAYERS = 3  # of a stage
FRAMES, TEXT = 8, 32


def plan_of(config, frames=FRAMES, text=TEXT):
    document = made_up_document(config, frames, text)
    return RowPlan.of(pack([document], GRID.document_multiple, GRID.row_multiple), GRID)


def told(config):
    return {each.name: each for each in step_traffic(config, plan_of(config), ODD)}


@pytest.mark.parametrize(("policy", "again", "ring_again"), [("none", 0, 0), ("attention_output", 2, 0), ("full", 2, 2)])
def test_the_traffic_of_a_step_is_that_of_the_formulas(policy, again, ring_again):
    recompute = [f"memory.recompute={policy}", *["memory.recompute_layers=2"] * (policy != "none")]
    config = load_config("tiny", [*SETTINGS, *recompute])
    llm, tokens, wide = config.model.llm, 64, 2
    assert plan_of(config).row.length == tokens and wide == 2, "bf16"
    head = llm.hidden_size // llm.num_heads
    found = told(config)
    # Each rank sends its slice to the other one: 4 collectives forward, 6 backward.
    a_slice = tokens // 8 * llm.hidden_size * wide
    tensor = ROWS * a_slice * (4 * (LAYERS + again) + 6 * LAYERS)
    # q and the output of the other rank's query heads, k and v of its key/value heads, of the S/4 tokens held.
    heads = 2 * llm.num_heads // 4 + 2 * max(llm.num_kv_heads // 4, 1)
    ulysses = ROWS * tokens // 4 * heads * head * wide * (2 * LAYERS + again)
    # k and v of S/2 tokens to the ring rank before; home goes what half of those and all of those have come to.
    kv = 2 * tokens // 2 * head * wide * max(llm.num_kv_heads // 4, 1)
    ring = ROWS * kv * ((LAYERS + ring_again) + 1.5 * LAYERS)
    hidden = tokens // 8 * llm.hidden_size * wide
    trained = parameter_count(config.model)["projector"] * (4 + 2)
    for name, nvlink, network in [
        ("TP gather and scatter", tensor, 0),
        ("Ulysses all-to-all", ulysses, 0),
        ("ring K/V", 0, ring),
        ("pipeline", 0, ROWS * 2 * hidden),
        # Of the 8 ranks that hold the same weights NVLink joins two each.
        ("gradients and new weights", trained / 2, trained / 2 * 3 / 4),
    ]:
        each = found.pop(name)
        assert (each.nvlink, each.network) == (nvlink, network), name
        assert each.seconds == pytest.approx(max(nvlink / NVLINK, network / NETWORK)), name
    assert [*found] == ["stage-2 re-shard"]


def test_re_shard_is_predicted_from_where_frames_are_encoded_and_their_tokens_live():
    config = load_config("tiny", SETTINGS)
    plan = plan_of(config)
    sent = np.zeros((8, 8), dtype=int)
    for encoder, (unit, start) in enumerate(zip(plan.row.units, plan.row.frame_starts.tolist(), strict=True)):
        for place in range(start, start + unit.tokens):
            chunk = place // (64 // 8)
            cp_rank, tp_rank = (chunk, 0) if chunk < 4 else (7 - chunk, 1)
            sent[encoder, tp_rank + 2 * cp_rank] += config.model.llm.hidden_size * 2
    np.fill_diagonal(sent, 0)
    near = np.arange(8)[:, None] // 4 == np.arange(8)[None] // 4
    nvlink, network = (max(part.sum(0).max(), part.sum(1).max()) for part in (sent * near, sent * ~near))
    each = told(config)["stage-2 re-shard"]
    assert nvlink and network, "both links are used"
    assert (each.nvlink, each.network) == (2 * ROWS * nvlink, 2 * ROWS * network), "there and back"
    assert each.seconds == pytest.approx(2 * ROWS * max(nvlink / NVLINK, network / NETWORK))
    frozen = load_config("tiny", [*SETTINGS, "optim.projector.trainable=false", "optim.llm.trainable=true"])
    assert told(frozen)["stage-2 re-shard"].nvlink == ROWS * nvlink, "no gradient goes back to frozen parts"


def test_flop_time_is_that_of_all_ranks_at_their_peak():
    config = load_config("tiny", SETTINGS)
    plan = plan_of(config)
    of_a_row = model_flops([len(made_up_document(config, FRAMES, TEXT))], 0, plan.row.units, config.model, config.optim).total
    assert step_flop_seconds(config, plan, PEAK) == pytest.approx(6 * of_a_row / (32 * PEAK))


def test_ranks_that_nvlink_joins_are_those_of_a_domain():
    machine = PRESETS["gb200"]
    assert (machine.joined_ranks(4), machine.joined_ranks(2), machine.joined_ranks(1)) == (72, 36, 18)
    assert PRESETS["h100"].joined_ranks(64) == 8 and PRESETS["h100"].joined_ranks(4) == 4
    assert Machine("unknown", 1).joined_ranks(5) == 5


def test_explain_tells_each_kind_with_its_link_its_time_and_what_is_assumed(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "odd", ODD)
    arguments = ["tiny", "world_size=32", f"frames={FRAMES}", f"text={TEXT}", "--gpu", "odd", *SETTINGS]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    config = load_config("tiny", SETTINGS)
    computing = step_flop_seconds(config, plan_of(config), PEAK)
    shown = text[text.index("Traffic of one step, predicted for an odd one") :]
    for each in told(config).values():
        cells = [size(round(n)) if n else "-" for n in (each.nvlink, each.network)]
        cells += [duration(each.seconds), f"{100 * each.seconds / computing:.1f} %"]
        (line,) = [line for line in shown.splitlines() if line.startswith(each.name + "  ")]
        assert re.split(r"\s{2,}", line.strip()) == [each.name, *cells]
    prose = " ".join(shown.split())
    assert "A prediction, nothing is measured. One step: 6 rows of 64 tokens with 8 frames each." in prose
    assert "NVLink moves 11 GB/s and the network 3 GB/s for each GPU in each direction, NVLink joins 4 ranks" in prose


def test_without_a_sample_the_rows_of_the_prediction_are_full(capsys):
    config = load_config("tiny", ["train.seq_length=1023"])
    document = full_document(config)
    assert len(document) == 1023 and len(document.frames) == 255
    assert main(["tiny", "--gpu", "h100", "train.seq_length=1023"]) == 0
    assert "of 1 023 tokens with 255 frames each" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_predicted_where_the_links_are_not_known(capsys):
    assert main(["tiny", "--gpu", "80GB"]) == 0
    text = capsys.readouterr().out
    assert "predicted for a machine whose links are known: --gpu a100, b200" in text and "Traffic of one step" not in text


def test_a_time_has_three_digits():
    times = [0.0000012345, 0.012345, 0.12345, 0.9999, 1.0, 12.345, 123456.0]
    assert [duration(t) for t in times] == ["0.00123 ms", "12.3 ms", "123 ms", "1.00 s", "1.00 s", "12.3 s", "123456 s"]


def test_the_busiest_rank_may_be_one_that_receives():
    sent = traffic.Sent(np.arange(3)[None], np.array([[[0, 0, 5], [0, 0, 7], [1, 2, 0]]]))
    assert Load.of(sent, np.zeros(3, dtype=int)) == Load(nvlink=12, network=0)
    assert Load.of(sent, np.array([0, 1, 1])) == Load(nvlink=7, network=5)
