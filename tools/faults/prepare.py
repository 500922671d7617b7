"""Faults of the preparation of data: frames, times, shards, going on after a kill."""

from .fault import Fault

MEDIA, SETS = ("tests/data/test_prepare_video.py",), ("tests/data/test_prepare.py",)

FAULTS = [
    Fault(
        "times of prepared frames are rounded up",
        "megatron_vila/data/prepare/frames.py",
        "math.floor(s * ticks + 1e-9)",
        "math.ceil(s * ticks)",
        MEDIA,
    ),
    Fault(
        "frames are prepared by the other rule for a rate",
        "megatron_vila/data/prepare/frames.py",
        'fps_rule="first"',
        'fps_rule="spread"',
        MEDIA,
    ),
    Fault(
        "prepared colors are not said to be those of BT.709",
        "megatron_vila/data/prepare/transcode.py",
        "codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG",
        "pass",
        MEDIA,
    ),
    Fault(
        "a medium of several records is removed after the first of them",
        "megatron_vila/data/prepare/part.py",
        "if self._uses[name] <= 0:",
        "if True:",
        SETS,
    ),
    Fault(
        "a preparation that goes on does all records again",
        "megatron_vila/data/prepare/part.py",
        "first = steps[-1].end if steps else records.start",
        "first = records.start",
        SETS,
    ),
    Fault(
        "a shard is written in its place, not renamed when it is whole",
        "megatron_vila/data/prepare/shard.py",
        "os.replace(self._temporary, self.path)",
        'open(self.path, "wb").write(self._temporary.read_bytes())',
        SETS,
    ),
    Fault(
        "a preparation goes on with other options",
        "megatron_vila/data/prepare/state.py",
        'if different := plan.options.difference(begun["options"]):',
        "if False:",
        SETS,
    ),
    Fault(
        "a clip of a video that is taken as it is is lost",
        "megatron_vila/data/prepare/sample.py",
        'if outcome.kind == "original" else None',
        "if False else None",
        SETS,
    ),
]
