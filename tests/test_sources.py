import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dpo_jax.data import sources, specs
from dpo_jax.types import InputError

ROWS = [{"prompt": f"p{i}", "chosen": f'line\none, "{i}"', "rejected": "ü"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,chosen,rejected\n" + "".join(f'p{i},"line\none, ""{i}""",ü\n' for i in range(3))
TEXTS = {"chosen": "c", "rejected": "r"}
TALK = {name: [{"role": "user", "content": name}] for name in ("prompt", "chosen", "rejected")} | {
    "tools": [{"name": "look"}]
}
VIEWED = [{"row_idx": 0, "row": ROWS[0], "truncated_cells": []}, {"row_idx": 1, "row": ROWS[1], "truncated_cells": []}]
MESSAGES = {"messages": [{"role": "user", "content": "p"}], "chosen": {"role": "assistant", "content": "c"}}


def write(path, content):
    """Writes text or bytes as they are (compressed for .gz and .zst), a list of rows as Parquet or CSV."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes):
        compress = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
        path.write_bytes(compress(content))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, content[0])
            writer.writeheader()
            writer.writerows(content)
    return str(path)


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def read_one(spec, split="train"):
    (source,) = sources.read(str(spec), split=split)
    return source


def failure(spec, split="train"):
    """The error of reading a specification to its end."""
    with pytest.raises(InputError) as caught:
        for source in sources.read(str(spec), split=split):
            list(source.rows)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", LINES, (1, 2, 3)),
        ("b.jsonl", "\ufeff" + LINES.replace("\n", "\n\n"), (1, 3, 5)),
        ("c.jsonl.gz", LINES, (1, 2, 3)),
        ("d.json", LINES, (1, 2, 3)),
        ("e.json", " " + json.dumps(ROWS, indent=1), (1, 2, 3)),
        ("f.parquet", ROWS, (1, 2, 3)),
        ("g.CSV", ROWS, (2, 4, 6)),
        ("h.jsonl.zst", LINES, (1, 2, 3)),
        ("i.json.gz", json.dumps(ROWS), (1, 2, 3)),
        (
            "j.csv.zst",
            "prompt,chosen,rejected\n" + "".join(f'p{i},"line\none, ""{i}""",ü\n' for i in range(3)),
            (2, 4, 6),
        ),
        ("k.jsonl", json.dumps(ROWS, indent=1), (1, 2, 3)),
    ],
)
def test_read_gives_the_rows_of_every_kind_of_file_with_their_places_each_time(tmp_path, name, content, numbers):
    path = write(tmp_path / name, content)
    source = read_one(path)
    for _ in range(2):
        rows = list(source.rows)
        assert [row.fields for row in rows] == ROWS
        assert [row.place for row in rows] == [f"{path}:{number}" for number in numbers]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ({"version": "1.0", "data": ROWS}, ROWS),
        ({"mine": ROWS, "tags": ["a"]}, ROWS),
        ({"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]}, ROWS),
        ({name: [row[name] for row in ROWS] for name in ROWS[0]}, ROWS),
        ({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}, ROWS),
        (ROWS[0], ROWS[:1]),
        (MESSAGES, [MESSAGES]),
        ({"license": "mit", "name": "n", "tools": [], "data": ROWS}, ROWS),
        (TALK, [TALK]),
        ({"prompt": "p", **TEXTS, "data": [TEXTS]}, [{"prompt": "p", **TEXTS, "data": [TEXTS]}]),
        ({"a": [{"role": "user"}], "b": [{"role": "user"}]}, [{"a": [{"role": "user"}], "b": [{"role": "user"}]}]),
    ],
)
def test_read_finds_the_rows_in_one_object(tmp_path, content, rows, indent):
    path = write(tmp_path / "a.json", json.dumps(content, indent=indent))
    assert [row.fields for row in read_one(path).rows] == rows
    assert [row.place for row in read_one(path).rows] == [f"{path}:{i + 1}" for i in range(len(rows))]


def test_read_asks_which_of_several_lists_has_the_rows(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=1))
    assert "under the keys 'train', 'test'" in failure(path).got


def test_read_takes_patterns_of_files_in_order_each_with_the_weight(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("train-2.jsonl", "train-1.jsonl", "test-1.jsonl", "deep/train-3.jsonl"):
        write(tmp_path / name, LINES)
    found = sources.read(f"{tmp_path}/train-*.jsonl*0.5,{tmp_path}/**/train-?.jsonl", split="train")
    names = [(Path(source.name).name, source.weight) for source in found]
    assert names[:2] == [("train-1.jsonl", 0.5), ("train-2.jsonl", 0.5)]
    assert names[2:] == [("train-3.jsonl", 1.0), ("train-1.jsonl", 1.0), ("train-2.jsonl", 1.0)]
    pattern = f"{tmp_path}/none-*.jsonl"
    error = failure(pattern)
    assert error.place == pattern and "no file matches" in error.got


def test_read_takes_a_name_that_looks_like_a_pattern_as_the_file_it_is(tmp_path):
    assert read_one(write(tmp_path / "a[1].jsonl", LINES)).name.endswith("a[1].jsonl")


def test_read_takes_folders_that_datasets_wrote_and_the_split_asked_for(tmp_path):
    every, last = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[2:])
    every.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": every, "test": last}).save_to_disk(tmp_path / "two")
    assert [row.fields for row in read_one(tmp_path / "one").rows] == ROWS
    assert [row.fields for row in read_one(tmp_path / "two", split="test").rows] == ROWS[2:]
    error = failure(tmp_path / "two", split="eval")
    assert error.got == "no split 'eval', but train, test" and error.remedy.endswith(f" {tmp_path / 'two' / 'train'}.")
    assert [row.fields for row in read_one(tmp_path / "two" / "train").rows] == ROWS


def test_read_takes_several_parts_each_with_its_weight(tmp_path):
    a, b = write(tmp_path / "a.jsonl", LINES), write(tmp_path / "b.parquet", ROWS[:1])
    found = sources.read(f"{a}, {b}*0.5,{a}*2", split="train")
    assert [(source.name, source.weight) for source in found] == [(a, 1.0), (b, 0.5), (a, 2.0)]
    assert [len(list(source.rows)) for source in found] == [3, 1, 3]


def test_read_leaves_out_keys_that_arrow_fills_in_at_any_depth(tmp_path):
    rows = [{"a": [{"b": {"c": "1"}}], "d": None}, {"a": [{"b": {"e": "2"}}], "d": "3"}]
    path = write(tmp_path / "a.parquet", rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "b")
    assert [row.fields for row in read_one(path).rows] == rows
    assert [row.fields for row in read_one(tmp_path / "b").rows] == rows


def test_digest_follows_the_content_and_not_where_it_lies(tmp_path):
    first, same = write(tmp_path / "a.jsonl", LINES), write(tmp_path / "b.jsonl", LINES)
    other = write(tmp_path / "c.jsonl", LINES.replace("p2", "p9"))
    digests = [read_one(path).digest for path in (first, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_digest_of_a_dataset_is_that_of_its_values(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "a")
    datasets.Dataset.from_list([ROWS[2], *ROWS]).select([1, 2, 3]).save_to_disk(tmp_path / "b")
    whole.select([0, 2, 1]).save_to_disk(tmp_path / "c")
    digests = [read_one(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_digest_of_a_dataset_does_not_depend_on_how_arrow_holds_it(monkeypatch):
    table = pyarrow.Table.from_pylist(ROWS)
    held = [
        datasets.Dataset(table),
        datasets.Dataset(pyarrow.concat_tables([table.slice(0, 1), table.slice(1)])),
        datasets.Dataset(table).cast_column("prompt", datasets.Value("string")),  # leaves a note in the metadata
    ]
    digests = set()
    for data in held:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, data=data, **__: data)
        digests.add(read_one("owner/name").digest)
    assert len(digests) == 1


def test_rows_are_read_lazily(tmp_path):
    source = read_one(write(tmp_path / "a.jsonl", LINES + "{broken\n"))
    rows = iter(source.rows)
    assert [next(rows).fields for _ in ROWS] == ROWS
    with pytest.raises(InputError, match=r"a\.jsonl:4: broken JSON at column 2"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "place", "got"),
    [
        ("a.jsonl", LINES + '\n{"prompt": 1,}\n', ":5", "broken JSON"),
        ("b.jsonl", LINES + "[1, 2]\n", ":4", "a list in place of a row"),
        ("c.jsonl", LINES.encode() + b'{"a": "\xff"}\n', ":4", "byte 8 is not UTF-8"),
        ("d.json", '[{"a": 1},\n{"a"}]', "", "line 2, column"),
        ("e.json", '[{"a": 1}, "b"]', ":2", "text in place of a row"),
        ("n.jsonl", LINES + "null\n", ":4", "null in place of a row"),
        ("o.jsonl", '{"a": 1,\n{"a": 2}\n', ":1", "broken JSON at column 9"),
        ("p.csv", "a;b\nx;y\n", ":2", "';' between fields"),
        ("q.csv", b"a,b\nx,\xe9\n", ":2", "bytes that are not UTF-8, such as 0xe9"),
        ("f.json", '{\n"a": 1,\n}', "", "line 3, column 1"),
        ("m.jsonl", '{"a": 1,}\n{"a": 2}\n', ":1", "broken JSON at column 9"),
        ("g.csv", 'a,b\nx,"y\nz"\nx\n', ":4", "number of fields"),
        ("h.csv", "a,b\nx,y,z\n", ":2", "number of fields"),
        ("k.jsonl", LINES + '{"a": ' + "9" * 5000 + "}\n", ":4", "too long a number"),
        ("l.jsonl", LINES + '{"a": ' + "[" * 100_000 + "\n", ":4", "nested too deeply"),
        ("i.txt", LINES, "", "extension '.txt'"),
        ("j", LINES, "", "without an extension"),
        ("a.json", json.dumps({"system": "s", "tools": [1], "data": ROWS}), "", "'system', 'tools' beside the rows"),
        ("h.json", json.dumps({"prompt": "p", "data": [TEXTS, TEXTS]}), "", "'prompt' beside the rows"),
        ("b.json", json.dumps({"rows": VIEWED, "partial": True}), "", "a part of the data set (partial)"),
        (
            "c.json",
            json.dumps({"rows": [*VIEWED, {**VIEWED[0], "truncated_cells": ["chosen"]}]}),
            ":3",
            "viewer with cut values in 'chosen'",
        ),
        ("g.json", json.dumps({"prompt": ["a"], "chosen": ["b", "c"]}), "", "lengths: 'prompt' 1, 'chosen' 2"),
        ("p.jsonl", LINES + '{"prompt": "a", "x": {"b": 1, "b": 2}}\n', ":4", "an object with the key 'b' twice"),
        ("q.json", '[\n {"a": 1,\n "a": 2}\n]', "", "an object with the key 'a' twice"),
        ("r.csv", "prompt,chosen,chosen\na,b,c\n", ":1", "several columns with the name 'chosen'"),
        ("s.csv", CSV.encode("utf-16"), "", "text in UTF-16"),
        ("t.jsonl.gz", LINES.encode("utf-16"), "", "text in UTF-16"),
    ],
)
def test_read_says_where_a_file_is_broken(tmp_path, name, content, place, got):
    path = write(tmp_path / name, content)
    error = failure(path)
    assert error.place == f"{path}{place}"
    assert got in error.got
    assert error.expected and error.remedy


def test_read_says_which_line_of_a_truncated_stream_is_missing(tmp_path):
    many = "".join(json.dumps({"chosen": str(i) * 50}) + "\n" for i in range(5000))
    whole = gzip.compress(many.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    zipped = zstd(many.encode())
    (tmp_path / "a.jsonl.zst").write_bytes(zipped[: len(zipped) // 2])
    for name, kind in (("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")):
        error = failure(tmp_path / name)
        assert f"damaged {kind}" in error.got
        assert 1 < int(error.place.rpartition(":")[2]) < 5000


def test_read_takes_csv_with_a_column_that_has_no_name(tmp_path):
    # As pandas writes its index.
    path = write(tmp_path / "a.csv", ",prompt,chosen,rejected\n0,p,c,r\n")
    assert [row.fields for row in read_one(path).rows] == [{"": "0", "prompt": "p", "chosen": "c", "rejected": "r"}]


def test_read_says_that_a_file_cannot_be_opened(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", LINES)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read" in failure(path).got


def test_read_says_that_parquet_text_is_not_utf8(tmp_path):
    column = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"chosen": column}), tmp_path / "a.parquet")
    assert "not readable as Parquet" in failure(tmp_path / "a.parquet").got


def test_read_says_that_a_parquet_file_is_truncated(tmp_path):
    whole = Path(write(tmp_path / "whole.parquet", ROWS)).read_bytes()
    write(tmp_path / "a.parquet", whole[:-20])
    assert "not readable as Parquet" in failure(tmp_path / "a.parquet").got


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.json", "[]"), ("d.csv", "a,b\n"), ("e.csv", "")]
)
def test_read_refuses_files_without_rows(tmp_path, name, content):
    path = write(tmp_path / name, content)
    error = failure(path)
    assert (error.place, error.got) == (path, "no rows")


@pytest.mark.parametrize("name", ["none.jsonl", "no/such.parquet", "/no/such", "none"])
def test_read_says_that_a_file_is_missing_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    error = failure(name)
    assert error.place == name and "no such file" in error.got


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_read_refuses_weights_that_are_no_number_above_zero(tmp_path, weight):
    path = write(tmp_path / "a.jsonl", LINES)
    error = failure(f"{path}*{weight}")
    assert repr(weight) in error.got and "above 0" in error.expected


def test_read_refuses_parts_without_a_source(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    for spec in ("", f"{path},", f"{path},,{path}", "*2"):
        assert "without a source" in failure(spec).got


def test_read_names_the_files_in_a_folder_of_other_things(tmp_path):
    assert "none that can be read" in failure(tmp_path).remedy
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "more/a.jsonl",
        ".git/b.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    error = failure(tmp_path)
    assert "save_to_disk" in error.got
    assert error.remedy.endswith(f": {tmp_path}/data/train-*.parquet, {tmp_path}/more/a.jsonl.")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/na.me-2:test", ("owner/na.me-2", None, "test")),
        ("owner/name:config:test", ("owner/name", "config", "test")),
    ],
)
def test_read_loads_hub_ids_with_their_config_and_split(monkeypatch, name, expected):
    asked = []

    def load_dataset(path, config, *, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_one(f"{name}*3")
    assert asked == [expected]
    assert (source.name, source.weight) == (name, 3.0)
    assert [(row.place, row.fields) for row in source.rows] == [(f"{name}:{i + 1}", row) for i, row in enumerate(ROWS)]


def test_read_says_why_a_hub_id_cannot_be_loaded(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = failure("owner/name")
    assert "no such file or folder, and not a Hub data set" in error.got and "the network is down" in error.got


def test_names_in_a_specification_begin_sets_and_label_sources(tmp_path, monkeypatch):
    spec = "helpful=a.jsonl,b-*.parquet*0.5,harmless = c.jsonl"
    assert specs.sets_of(spec) == {"helpful": "a.jsonl,b-*.parquet*0.5", "harmless": "c.jsonl"}
    assert specs.sets_of("a.jsonl,b.jsonl") == {"": "a.jsonl,b.jsonl"}
    parts = specs.parts_of(f"x/train.jsonl,y/train.csv.gz,own/name:test,{spec}")
    assert [part.label for part in parts] == ["x-train", "y-train", "own-name-test", "helpful", "helpful", "harmless"]
    assert [part.label for part in specs.parts_of("d/a.jsonl,d/train-*.parquet*2,*.csv")] == ["a", "train", "data"]
    assert [part.label for part in specs.parts_of("d/a.jsonl,d/a.csv")] == ["d-a.jsonl", "d-a.csv"]
    (tmp_path / "lr=1.jsonl").write_text("")  # a file by that name is one, and so is a pattern that matches
    monkeypatch.chdir(tmp_path)
    assert [specs.parts_of(each)[0].source for each in ("lr=1.jsonl", "lr=*.jsonl")] == ["lr=1.jsonl", "lr=*.jsonl"]


@pytest.mark.parametrize(
    ("spec", "got"),
    [("a=x.jsonl,a=y.jsonl", "two sets with the name 'a'"), ("x.jsonl,a=y.jsonl", "a part without a name before 'a'")],
)
def test_names_of_evaluation_sets_that_are_unclear_are_refused(spec, got):
    with pytest.raises(InputError, match=f"config.data.eval: {got}"):
        specs.sets_of(spec)
