"""What a run does beside training: two tasks, each told by its own name."""

from dataclasses import dataclass

from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.failing.failures import Reporter
from megatron_vila.training.evaluate import HeldOut
from megatron_vila.training.metrics import MetricsLogger
from megatron_vila.training.roles import TaskName, Watcher
from megatron_vila.training.run_watch import RunWatch
from megatron_vila.training.summary import read_metrics
from megatron_vila.training.trainer import Trainer
from tests.ranks import pool
from tests.training.real_run import overrides


@dataclass
class Probe:
    """After each step, the norm of a weight."""

    doing: Reporter
    name = TaskName("probe of the weights", "probe")

    def warnings(self, data):
        return []

    def is_due(self, step, is_last):
        return not is_last

    def run(self, forward, data):
        assert self.doing.doing() == "step 1, in the probe of the weights"
        return {"norm": float(next(forward.model.parameters()).detach().norm())}

    def remarks(self, results):
        return []

    def summary(self, results):
        return {}


class Phases(Watcher):
    def __init__(self):
        self.seen, self.messages = [], []

    def at(self, step, phase):
        self.seen.append((step, phase))

    def result(self, step, task, results):
        self.messages.append((step, task.word, sorted(results)[0]))


def _run(rank, settings):
    config = load_config("tiny", settings)
    reporter, phases = Reporter(), Phases()
    try:
        with RunWatch(1.0, reporter) as watch:
            watchers = [watch, phases, MetricsLogger(config.train.output, config.train.log_every)]
            Trainer(config, [Probe(reporter), HeldOut(config)], watchers).run()
    finally:
        accelerator.set_deterministic(False)
    return phases.seen, phases.messages


def test_each_task_is_told_by_its_own_name_while_it_runs_and_in_what_it_leaves(videos, tmp_path):
    settings = ["train.steps=2", "train.eval_every=1", f"data.eval=[{videos / 'eval_3.json'}]", "checkpoint.save=false"]
    seen, messages = pool.run(1, _run, overrides(videos, tmp_path / "run", *settings))[0]
    tasks = [(step, phase) for step, phase in seen if phase.startswith("in the ") and "pass" not in phase]
    assert tasks == [(1, "in the probe of the weights"), (1, "in the evaluation"), (2, "in the evaluation")]
    assert [(step, word) for step, word, _ in messages] == [
        (1, "probe of the weights"), (1, "evaluation"), (2, "evaluation"),
    ]  # fmt: skip
    written = read_metrics(tmp_path / "run")[1]
    assert [record["step"] for record in written] == [1, 2]
    assert ["probe_norm" in record for record in written] == [True, False]
    assert all("eval_accuracy" in record for record in written)
