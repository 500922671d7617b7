"""Faults of the page that shows samples."""

from .fault import Fault

TOKENS, COMMAND, BROWSER = (("tests/view/" + name,) for name in ("test_tokens.py", "test_command.py", "test_browser.py"))

FAULTS = [
    Fault(
        "a page does not escape what samples hold",
        "megatron_vila/explain/view/page.py",
        "autoescape=True",
        "autoescape=False",
        COMMAND,
    ),
    Fault(
        "a page lets any script run",
        "megatron_vila/explain/view/page.html.jinja",
        "script-src '{{ script_hash }}'",
        "script-src 'unsafe-inline'",
        BROWSER,
    ),
    Fault(
        "a page marks the token before the one that is trained",
        "megatron_vila/explain/view/tokens.py",
        "trained_L = np.concatenate([[False], document.labels[:-1] != IGNORE])",
        "trained_L = document.labels != IGNORE",
        TOKENS,
    ),
    Fault(
        "a page shows half characters",
        "megatron_vila/explain/view/tokens.py",
        'whole = len(text) > len(known) and not text.endswith("\\ufffd")',
        "whole = True",
        TOKENS,
    ),
    Fault(
        "a page shows the first pictures of a video, not those spread over it",
        "megatron_vila/explain/view/pictures.py",
        "thin_out(np.arange(len(units)), most).tolist()",
        "range(min(most, len(units)))",
        COMMAND,
    ),
    Fault(
        "a page shows the same step of a run again and again",
        "megatron_vila/explain/view/rows.py",
        "state = plan.after",
        "pass",
        COMMAND,
    ),
]
