"""Energon's metadatasets: sets by weight and by repetitions, nested and cut; and what is refused of them."""

from dataclasses import replace

import pytest
import yaml

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.sources.open import open_blend, open_records
from tests.data.material import write_jsonl
from tests.data.shard_files import sample, write_shards

DATA = replace(DataConfig(), media_format="verbatim")


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two folders of shards (samples 0 to 3, and 4 held out; 10 and 11) and a file of records (20 to 24)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def named(*numbers):
        return [(str(n), {"json": sample(n)}) for n in numbers]

    split = {"train": ["000000.tar", "000001.tar"], "val": ["000002.tar"]}
    write_shards(tmp_path / "a", [named(0, 1), named(2, 3), named(4)], split)
    write_shards(tmp_path / "b", [named(10, 11)])
    write_jsonl(tmp_path / "c.jsonl", [sample(n) for n in range(20, 25)])
    return tmp_path


def metadataset(folder, train, name="mix.yaml", kind="MetadatasetV2", **splits):
    content = {"__module__": "megatron.energon", "__class__": kind, "splits": {"train": train, **splits}}
    (folder / name).write_text(yaml.safe_dump(content))
    return str(folder / name)


def ids(source):
    return [int(source.record(n).sample_id[1:]) for n in range(len(source))]


def test_weights_are_shares_of_the_samples_of_a_run(sets):
    blend = open_blend(DATA, [metadataset(sets, {"blend": [{"path": "a", "weight": 3}, {"path": "./c.jsonl"}]})])
    assert ids(blend.records) == [0, 1, 2, 3, 20, 21, 22, 23, 24]
    assert (blend.sizes, blend.weights) == ((4, 5), (3.0, 1.0))


def test_weights_of_a_nested_blend_are_shares_of_its_own_weight(sets):
    metadataset(
        sets, {"blend": [{"path": "a", "weight": 2}, {"path": "b", "weight": 6, "subflavors": {"x": 1}}]}, "inner.yaml"
    )
    blend = open_blend(
        DATA, [metadataset(sets, {"blend": [{"path": "inner.yaml", "weight": 4}, {"path": "c.jsonl", "weight": 1}]})]
    )
    assert blend.sizes == (4, 2, 5) and blend.weights == (1.0, 3.0, 1.0)


def test_repetitions_say_how_often_a_sample_comes_in_an_epoch(sets):
    metadataset(sets, {"blend_epochized": [{"path": "b", "repetitions": 2}, {"path": "c.jsonl"}]}, "inner.yaml")
    mix = {"blend_epochized": [{"path": "inner.yaml", "repetitions": 2}, {"path": "a"}]}
    blend = open_blend(DATA, [metadataset(sets, mix)])
    assert sorted(ids(blend.records)) == sorted([0, 1, 2, 3] + [10, 11] * 4 + [20, 21, 22, 23, 24] * 2)
    assert (blend.sizes, blend.weights) == ((22,), ())


def test_parts_and_ranges_of_sets_are_those_of_energon(sets):
    mix = {
        "blend_epochized": [
            {"path": "a", "split_part": "val"},
            {"path": "c.jsonl", "subset": {"range": [1, "end"]}},
            {"path": "a", "subset": {"range": ["50%", "100%"]}},
        ],
        "subset": {"range": ["0%", "50%"]},
    }
    path = metadataset(sets, mix, val={"path": "a"})
    with pytest.raises(RecordError, match="records 0 to 0 of 1 are no part"):
        open_records(DATA, [path])
    mix["blend_epochized"].pop(0)
    path = metadataset(sets, mix, val={"path": "a"})
    assert ids(open_records(DATA, [path])) == [21, 22, 2] and ids(open_records(DATA, [path], "val")) == [4]


def test_no_other_part_stands_for_one_that_a_metadataset_names(sets):
    assert len(open_records(DATA, [metadataset(sets, {"path": "b"}, val={"path": "b"})], "val")) == 2
    for node in ({"path": "b", "split_part": "val"}, {"blend": [{"path": "b"}], "split_part": "val"}):
        with pytest.raises(RecordError, match="no shard is in the part 'val'; parts with shards are train"):
            open_records(DATA, [metadataset(sets, {"path": "a"}, val=node)], "val")


def test_a_metadataset_of_the_first_version_and_one_beside_a_file_are_read(sets):
    path = metadataset(sets, {"path": "b"})
    assert ids(open_records(DATA, [path, str(sets / "c.jsonl")])) == [10, 11, 20, 21, 22, 23, 24]
    first = metadataset(
        sets, {"datasets": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]}, kind="Metadataset"
    )
    assert open_blend(DATA, [first]).weights == (1.0, 2.0)
    with pytest.raises(RecordError, match=r"mix\.yaml: gives weights, and other paths stand beside it; name it alone"):
        open_blend(DATA, [first, str(sets / "c.jsonl")])


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"blend": []}, "splits.train.blend: must be a list with at least one set; an empty blend gives no sample"),
        ({"join": [{"path": "a"}]}, "splits.train: needs one of 'path', 'blend' and 'blend_epochized', found 'join'"),
        ({"path": "a", "blend": [{"path": "a"}]}, "needs one of"),
        ({"path": "a", "aux": {"videos": "b"}}, "splits.train.aux: media in other sets are not read"),
        ({"path": "a", "split_config": "x.yaml"}, "'split_config' is not read here"),
        ({"path": "a", "shuffle_over_epochs_multiplier": 4}, "every epoch is shuffled as a whole"),
        ({"path": 3}, "splits.train.path: must be a path, found 3"),
        ({"path": "a", "split_part": 3}, "split_part: must be the name of a part"),
        ({"blend": [{"path": "a", "weight": 0}]}, r"blend\[0\].weight: must be a number above 0, found 0"),
        ({"blend": [{"path": "a", "weight": float("nan")}]}, "must be a number above 0, found nan"),
        ({"blend": [{"path": "a", "weight": float("inf")}]}, "must be a number above 0, found inf"),
        ({"blend": [{"path": "a", "repetitions": 2}]}, "weights and repetitions cannot be mixed"),
        (
            {"blend": [{"blend_epochized": [{"path": "a", "repetitions": 2}]}]},
            "weights and repetitions cannot be mixed",
        ),
        ({"blend_epochized": [{"blend": [{"path": "a"}]}]}, "weights and repetitions cannot be mixed"),
        (
            {"blend_epochized": [{"path": "a", "repetitions": 1.5}]},
            "a whole number from 1 to 1000, found 1.5; a part of a set",
        ),
        ({"path": "a", "subset": {"range": ["75%", "25%"]}}, "must be {range: .*} with ascending shares"),
        ({"path": "a", "subset": {"range": ["1", "2"]}}, "must be {range"),
        ({"path": "a", "subset": {"range": [0, 9]}}, "records 0 to 9 of 4 are no part of them; change 'subset'"),
        ({"path": "mix.yaml"}, "metadatasets name each other more than 16 deep"),
        ({"path": "gone.yaml"}, "gone.yaml: cannot be read: No such file"),
        ({"path": "gone"}, "gone: there is no such file or folder"),
        ("text", "splits.train: must be an object"),
    ],
)
def test_what_is_not_read_of_a_metadataset_is_refused_by_place_and_cure(sets, train, words):
    with pytest.raises(RecordError, match=words):
        open_blend(DATA, [metadataset(sets, train)])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("!!python/object/apply:os.system ['touch owned']", "not YAML that can be read"),
        ("[" * 5_000, "not YAML that can be read"),
        ("- a", "must be a metadataset of Energon"),
        ("__class__: CrudeWebdataset", "__class__ is 'CrudeWebdataset'; a metadataset of Energon"),
        ("__class__: MetadatasetV2\nsplits: {val: {path: a}}", "splits has no part 'train'; it has val"),
    ],
)
def test_a_yaml_file_that_is_no_metadataset_is_refused(sets, content, words):
    (sets / "mix.yaml").write_text(content)
    with pytest.raises(RecordError, match=words):
        open_blend(DATA, [str(sets / "mix.yaml")])
    assert not (sets / "owned").exists()
