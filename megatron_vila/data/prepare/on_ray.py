"""The parts of a preparation as tasks of Ray Data, on all machines of a cluster. They share the file system of the output."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from megatron_vila.busy import counted
from megatron_vila.data.prepare.finish import require_energon
from megatron_vila.data.prepare.run import Task, begin, cores, do_parts, only_finish
from megatron_vila.data.prepare.tally import Tally
from megatron_vila.errors import UserError


def prepare_on_ray(task: Task) -> Tally:
    """Do all parts of ``task``, each as a task that takes ``task.processes`` cores of a machine; then finish.

    The cluster is that of ``RAY_ADDRESS``, else this machine is one. Raises ``UserError``.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError("--ray needs Ray, which is not installed; pip install megatron-vila[ray]") from error
    require_energon()
    begin(task)  # what is wrong is told here, once
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    each = max(1, min(task.processes or 1, int(ray.cluster_resources().get("CPU", 1))))
    parts = ray.data.from_items(
        [{"part": part} for part in range(task.options.parts)], override_num_blocks=task.options.parts
    )
    work = parts.map(_do_part, fn_kwargs={"task": replace(task, processes=each)}, num_cpus=each)
    with counted("parts", task.options.parts) as on_part:
        for row in work.iter_rows():
            if row["problem"]:
                raise UserError(f"part {row['part']}: {row['problem']}")
            on_part()
    return only_finish(task)


def _do_part(row: dict[str, Any], task: Task) -> dict[str, Any]:
    """In a worker of Ray. What a user can cure is handed back: Ray would try it again and bury it in traces."""
    part = int(row["part"])
    try:
        source, plan, output = begin(task)
        do_parts(task, source, plan, output, (part,), lambda: None)
        return {"part": part, "problem": "", "cores": cores()}
    except (UserError, OSError) as error:
        return {"part": part, "problem": str(error), "cores": cores()}
