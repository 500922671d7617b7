"""A gloo thread that outlives its run aborts the process now and then: processes are asked what they still have at their end."""

from pathlib import Path

HOOK = Path(__file__).parent / "exit_hook"  # for PYTHONPATH


def left_of_groups(folder: Path, processes: int) -> set[str]:
    """Threads of process groups that any process still had when Python ended; at least ``processes`` have to have told."""
    told = [file.read_text().split("\n") for file in folder.glob("*.threads")]
    assert len(told) >= processes
    return {name for names in told for name in names if "gloo" in name}
