"""Faults of what guards a run: files from anywhere, records that are not meant so, stops, resumes that make no sense."""

from .fault import Fault

MEDIA = "tests/data/test_media.py"
PLACEMENT = "tests/data/test_placement.py"
STOPPED = ("tests/training/test_exit.py", "-k", "stop_that_was_saved")
FAILING_EVALUATION = ("tests/training/test_exit.py", "-k", "due_at_the_step")

FAULTS = [
    Fault(
        "a folder, a pipe or a device passes for a file",
        "megatron_vila/data/media.py",
        "if not stat.S_ISREG(status.st_mode):",
        "if False:",
        (MEDIA, "-k", "no_regular_file"),
    ),
    Fault(
        "a picture may have any number of pixels",
        "megatron_vila/data/media.py",
        "if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:",
        "if max(width, height) > MAX_SIDE:",
        (MEDIA, "-k", "over_the_budget"),
    ),
    Fault(
        "videos are shown as they are stored",
        "megatron_vila/data/video.py",
        "turn = UPRIGHT.get(_orientation(frame))",
        "turn = None",
        ("tests/data/test_orientation.py", "-k", "eight_orientations"),
    ),
    Fault(
        "what an unforeseen exception says is not told as the file's",
        "megatron_vila/data/media.py",
        "    except Exception as error:\n        text = getattr",
        "    except OSError as error:\n        text = getattr",
        (MEDIA, "-k", "any_exception"),
    ),
    Fault(
        "markers in answers and in text samples are markers",
        "megatron_vila/data/placement.py",
        "return tuple(_marked(turns, _as_words)), ()",
        "return tuple(turns), ()",
        (PLACEMENT, "-k", "words_are_text"),
    ),
    Fault(
        "a resumed run may place media by another rule than the one that it had",
        "megatron_vila/checkpoint/resume.py",
        'before="verbatim",',
        "",
        ("tests/checkpoint/test_resume_settings.py", "-k", "another_format"),
    ),
    Fault(
        "a run in which most samples are broken goes on",
        "megatron_vila/training/guards.py",
        "if drawn < at_least or broken <= config.data.max_broken * drawn:",
        "if True:",
        ("tests/training/test_bad_input.py", "-k", "too_many_broken"),
    ),
    Fault(
        "samples that were drawn before a resume are forgotten",
        "megatron_vila/training/trainer.py",
        "self.counts |= {name: n for",
        "dict.fromkeys(self.counts, 0) | {name: n for",
        ("tests/training/test_bad_input.py", "-k", "too_many_broken"),
    ),
    Fault(
        "a run that was told to stop and saved ends as a finished one",
        "megatron_vila/train.py",
        "return exit_codes.STOPPED if goes_on else",
        "return exit_codes.FINISHED if goes_on else",
        STOPPED,
    ),
    Fault(
        "an evaluation runs before the save that is due at its step",
        "megatron_vila/training/trainer.py",
        "                if saving.save and (finished",
        """                if not self.stopped_by:
                    self._do_tasks(data, is_last=finished)
                if saving.save and (finished""",
        FAILING_EVALUATION,
    ),
    Fault(
        "the content of a checkpoint's files is not checked",
        "megatron_vila/checkpoint/files.py",
        'if _sum_of_range(folder / name, begin, end) == info["sums"]["files"][name][block]:',
        "if True:",
        ("tests/checkpoint/test_damaged_checkpoint.py", "-k", "flipped_byte"),
    ),
    Fault(
        "a checkpoint may hold more than tensors and plain values",
        "megatron_vila/checkpoint/files.py",
        'torch.load(file, weights_only=True, map_location="cpu")',
        'torch.load(file, weights_only=False, map_location="cpu")',
        ("tests/checkpoint/test_hostile_checkpoint.py", "-k", "runs_code_at_any_door"),
    ),
    Fault(
        "a piece of a tensor may lie beyond the end of its file",
        "megatron_vila/checkpoint/tensors.py",
        " or begin + length > files[file]:",
        ":",
        ("tests/checkpoint/test_hostile_checkpoint.py", "-k", "forged_checkpoint_is_refused"),
    ),
    Fault(
        "a folder has as many writers as like",
        "megatron_vila/training/lock.py",
        "        if alive:\n",
        "        if False:\n",
        ("tests/training/test_lock.py", "-k", "living_owner"),
    ),
    Fault(
        "any process with the owner's number is the owner",
        "megatron_vila/training/lock.py",
        "alive = _born(owner.pid) == owner.born",
        "alive = _born(owner.pid) > 0",
        ("tests/training/test_lock.py", "-k", "given_again"),
    ),
]
