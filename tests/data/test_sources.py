import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsight.data import Sample, Turn, read
from sparsight.data.images import BadRecord, StoredImage, in_memory
from sparsight.errors import SparsightError

import zoo


@pytest.fixture
def folder(tmp_path):
    """A folder with the images a.png, b.jpg, sub/c.png, broken.png and cut.jpg, and a secret.png beside it."""
    home = tmp_path / "data"
    (home / "sub").mkdir(parents=True)
    a, b, c = zoo.images(3)
    a.save(home / "a.png")
    b.save(home / "b.jpg")
    c.save(home / "sub" / "c.png")
    a.save(tmp_path / "secret.png")
    (home / "broken.png").write_bytes((home / "a.png").read_bytes()[:200])
    content = (home / "b.jpg").read_bytes()
    (home / "cut.jpg").write_bytes(content[: len(content) // 2])
    return home


def write(folder, *records, name="data.jsonl"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


GOOD = {"image": "a.png", "prompt": "what?", "answer": "red"}


def test_flat_records(folder):
    path = write(
        folder,
        {"image": "a.png", "prompt": " what? ", "answer": "red ", "id": "x", "kind": "vqa"},
        {"images": ["a.png", "sub/c.png"], "prompt": "both?", "answers": ["no", "yes", "no"]},
        "",
        {"prompt": "no picture", "answer": "right", "image": None, "id": 7},
        {"file_name": "b.jpg", "prompt": "like datasets", "answer": "ok"},
    )
    got = read(path)
    assert list(got) == [
        Sample("x", (folder / "a.png",), (Turn("what?", ("red",)),), "vqa"),
        Sample("2", (folder / "a.png", folder / "sub" / "c.png"), (Turn("both?", ("no", "yes", "no")),)),
        Sample("7", (), (Turn("no picture", ("right",)),)),
        Sample("5", (folder / "b.jpg",), (Turn("like datasets", ("ok",)),)),
    ]
    assert got.skipped == []
    assert got[1].prompt == "both?"
    assert got[1].answers == ("no", "yes", "no")
    assert got[1].turns[-1].answer == "no"
    assert got[0].load_images()[0].mode == "RGB"


def test_a_tie_takes_the_first_answer():
    assert Turn("?", ("b", "a", "a", "b", "c")).answer == "b"


def test_llava_conversations(folder):
    talk = [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes"},
    ]
    behind = [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "red"}]
    path = write(folder, {"image": "a.png", "conversations": talk}, {"image": "a.png", "conversations": behind, "model": ""})
    first, second = read(path)
    assert first.turns == (Turn("what?", ("red",)), Turn("sure?", ("yes",)))
    assert second.turns == (Turn("what?\n<image>", ("red",)),)


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_messages_with_image_parts(folder, key):
    ask = [{"type": "image", key: "a.png"}, {"type": "text", "text": "what?"}]
    later = [{"type": "text", "text": "and "}, {"type": "image", key: "b.jpg"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    path = write(
        folder,
        {"messages": [{"role": "user", "content": ask}, answer]},
        {"messages": [{"role": "user", "content": ask}, answer, {"role": "user", "content": later}, answer]},
        {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}, ask[1]]}, answer]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "red"}]},
    )
    one, two, three, four = read(path)
    assert one.turns == three.turns == (Turn("what?", ("red",)),)
    assert one.images == three.images == (folder / "a.png",)
    assert [turn.prompt for turn in two.turns] == ["<image>what?", "and <image>?"]
    assert two.images == (folder / "a.png", folder / "b.jpg")
    assert four == Sample("4", (), (Turn("hello", ("red",)),))


BAD = [
    ("{", "not JSON"),
    ("[1]", "expected an object, got a list"),
    ('"text"', "expected an object, got a string"),
    ('{"prompt": "\\ud800", "answer": "x"}', "surrogate"),
    ({**GOOD, "image": "none.png"}, "image 'none.png' does not exist"),
    ({**GOOD, "image": "broken.png"}, "image 'broken.png' cannot be read"),
    ({**GOOD, "image": "cut.jpg"}, "image 'cut.jpg' cannot be read: image file is truncated"),
    ({**GOOD, "image": "sub"}, "image 'sub' does not exist"),
    ({**GOOD, "image": "data.jsonl"}, "image 'data.jsonl' cannot be read"),
    ({**GOOD, "image": "../secret.png"}, "image path '../secret.png' leaves the folder"),
    ({**GOOD, "image": "sub/../a.png"}, "leaves the folder"),
    ({**GOOD, "image": "/etc/passwd"}, "is absolute"),
    ({**GOOD, "image": "C:\\x.png"}, "is an address"),
    ({**GOOD, "image": "\\\\host\\x.png"}, "is absolute"),
    ({**GOOD, "image": "https://example.org/x.png"}, "only files beside the data"),
    ({**GOOD, "image": "x" * 5000}, "cannot be read"),
    ({**GOOD, "image": "a\0.png"}, "must be a relative path"),
    ({**GOOD, "image": 3}, "must be a relative path, got a number"),
    ({**GOOD, "image": ""}, "must be a relative path, got an empty string"),
    ({"images": "a.png", "prompt": "q", "answer": "a"}, "'images' must be a list, got a string"),
    ({**GOOD, "images": ["a.png"]}, "'image' and 'images' cannot stand together"),
    ({**GOOD, "answer": ""}, "empty answer"),
    ({**GOOD, "answer": " \n"}, "empty answer"),
    ({**GOOD, "answer": 3}, "an answer must be a string, got a number"),
    ({**GOOD, "answer": "an <image>"}, "cannot hold <image>"),
    ({"prompt": "q", "answers": []}, "non-empty list of strings, got an empty list"),
    ({"prompt": "q", "answers": "red"}, "got a string"),
    ({"prompt": "q", "answers": ["red", None]}, "an answer must be a string, got nothing"),
    ({**GOOD, "answers": ["red"]}, "'answer' and 'answers' cannot stand together"),
    ({"prompt": "q"}, "missing 'answer' (or 'answers')"),
    ({"answer": "a"}, "missing 'prompt'"),
    ({"promt": "q", "answer": "a"}, "unknown key 'promt'; did you mean 'prompt'?"),
    ({**GOOD, "Kind": "vqa"}, "unknown key 'Kind'; did you mean 'kind'?"),
    ({**GOOD, "prompt": ""}, "empty prompt"),
    ({**GOOD, "prompt": "<image>"}, "empty prompt"),
    ({**GOOD, "prompt": ["q"]}, "'prompt' must be a string, got a list"),
    ({**GOOD, "prompt": "<image> and <image>?"}, "2 <image> in the prompts but 1 image"),
    ({"prompt": "<image>?", "answer": "a"}, "1 <image> in the prompts but 0 images"),
    ({**GOOD, "id": ""}, "'id' must be"),
    ({**GOOD, "id": True}, "'id' must be"),
    ({**GOOD, "kind": 2}, "'kind' must be a string"),
    ({"messages": [], "conversations": []}, "cannot stand together"),
    ({"messages": []}, "'messages' must be a non-empty list"),
    ({"messages": [{"role": "system", "content": "x"}]}, "'messages' must end with an answer of 'assistant'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "must end with an answer"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0]: the text must be a string or a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part must be a text or an image"),
    ({"messages": ["x"]}, "messages[0] must be an object"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "'from' must be 'human', got 'gpt'"),
    ({"conversations": [{"from": "human", "value": ["x"]}]}, "the text must be a string, got a list"),
    ({"conversations": [{"from": "human", "value": "x"}], "answer": "y"}, "cannot stand together"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_record_names_file_line_and_reason(folder, record, reason):
    path = write(folder, GOOD, "", record, GOOD)
    with pytest.raises(SparsightError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert reason in message
    assert "\n" not in message
    got = read(path, skip_bad=True)
    assert [sample.id for sample in got] == ["1", "4"]
    assert got.skipped == [(str(path), 3, message.removeprefix(f"{path}:3: "))]


def test_links_may_stay_but_not_leave(folder):
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    names = ["in.png", "out.png", "up/secret.png", "loop.png"]
    got = read(write(folder, *({**GOOD, "image": name} for name in names)), skip_bad=True)
    assert [sample.id for sample in got] == ["1"]
    assert [line for _, line, _ in got.skipped] == [2, 3, 4]
    assert all("leaves the folder" in reason for _, _, reason in got.skipped[:2])


def test_a_linked_data_folder_is_a_data_folder(folder, tmp_path):
    write(folder, GOOD)
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link" / "data.jsonl")[0].images == (tmp_path / "link" / "a.png",)


def test_an_image_cut_short_names_its_sample(folder):
    """As a file may be that changed after it was read."""
    with Image.open(folder / "cut.jpg") as image:
        image.verify()  # which is why reading does not trust it
    sample = Sample("x", (folder / "cut.jpg",), (Turn("what?", ("red",)),))
    with pytest.raises(SparsightError, match=r"sample 'x': cannot decode .*cut\.jpg"):
        sample.load_images()


def test_an_image_in_memory_is_decoded_when_it_is_read(folder):
    with Image.open(folder / "cut.jpg") as image, pytest.raises(BadRecord, match="cannot be read: image file is truncated"):
        in_memory(image)


def test_llava_json_list_counts_lines(folder):
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": "x", "image": "a.png", "conversations": talk}, {"image": "a.png", "conversations": talk[:1]}]
    path = folder / "data.json"
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    line = path.read_text().split("\n").index("  {", 2) + 1
    with pytest.raises(SparsightError, match=rf"data\.json:{line}: 'conversations' must end"):
        read(path)
    assert [sample.id for sample in read(path, skip_bad=True)] == ["x"]
    for text, reason in [
        ("{}", "a list of records"),
        ("[\n{},\n{]", ":3: not JSON"),
        ("[{}\n{}]", ":2: not JSON"),
        ("[", ":1: not JSON"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SparsightError, match=reason):
            read(path, skip_bad=True)


def test_folder_with_metadata(folder):
    write(folder, {"file_name": "a.png", "prompt": "q", "answer": "a"}, name="metadata.jsonl")
    assert read(folder)[0].images == (folder / "a.png",)
    with pytest.raises(SparsightError, match=r"needs metadata\.jsonl"):
        read(folder / "sub")


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "./none", "/none", "a/b/c"])
def test_a_missing_source(name):
    with pytest.raises(SparsightError, match="no such file or folder"):
        read(name)


def test_no_samples_and_wrong_files(folder):
    with pytest.raises(SparsightError, match="no samples"):
        read(write(folder, ""))
    with pytest.raises(SparsightError, match="no samples; all 1 records are bad"):
        read(write(folder, "{"), skip_bad=True)
    with pytest.raises(SparsightError, match=r"must end in \.jsonl or \.json"):
        read(folder / "a.png")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(SparsightError, match="not UTF-8"):
        read(folder / "latin.jsonl")
    with pytest.raises(SparsightError, match="limit must be"):
        read(write(folder, GOOD), limit=0)


def test_limit_takes_the_first_or_always_the_same_choice(folder):
    path = write(folder, *({**GOOD, "id": f"n{i}"} for i in range(20)))
    assert [sample.id for sample in read(path, limit=3)] == ["n0", "n1", "n2"]
    chosen = [sample.id for sample in read(path, limit=5, seed=1)]
    assert chosen == [sample.id for sample in read(path, limit=5, seed=1)]
    assert chosen == sorted(chosen, key=lambda name: int(name[1:]))
    assert chosen != [sample.id for sample in read(path, limit=5, seed=2)]
    assert [sample.id for sample in read(path, limit=99, seed=1)] == [f"n{i}" for i in range(20)]


def test_limit_counts_good_samples(folder):
    path = write(folder, GOOD, "{", GOOD, GOOD)
    got = read(path, limit=2, skip_bad=True)
    assert [sample.id for sample in got] == ["1", "3"]
    assert len(got.skipped) == 1


def test_fingerprint_is_of_the_content(folder, tmp_path):
    path = write(folder, GOOD, {**GOOD, "image": "b.jpg"})
    first = read(path)
    moved = folder.rename(tmp_path / "elsewhere")
    assert read(moved / "data.jsonl").fingerprint == first.fingerprint
    assert read(moved / "data.jsonl", limit=1).fingerprint != first.fingerprint
    (moved / "b.jpg").write_bytes((moved / "a.png").read_bytes())
    assert read(moved / "data.jsonl").fingerprint != first.fingerprint


@pytest.fixture
def table(folder):
    import datasets

    columns = {
        "image": [str(folder / "a.png"), str(folder / "b.jpg"), str(folder / "broken.png")],
        "question": ["one?", "two?", "three?"],
        "answers": [[{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]] * 3,
        "question_id": [1, 2, 3],
    }
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column("image", datasets.Image())


def test_saved_dataset(folder, table, tmp_path):
    import datasets

    table.select([0, 1]).save_to_disk(tmp_path / "one")
    got = read(tmp_path / "one")
    assert [sample.turns for sample in got] == [(Turn(q, ("red", "blue")),) for q in ("one?", "two?")]
    assert got[0].id == "0"
    assert got[0].load_images()[0].size == zoo.images(3)[0].size
    assert got.fingerprint == read(tmp_path / "one").fingerprint
    datasets.DatasetDict({"test": table.select([1])}).save_to_disk(tmp_path / "parts")
    assert [sample.prompt for sample in read(tmp_path / "parts", split="test")] == ["two?"]
    with pytest.raises(SparsightError, match="no split 'train'; it has 'test'"):
        read(tmp_path / "parts")


def test_saved_dataset_with_a_broken_image(folder, table, tmp_path):
    table.save_to_disk(tmp_path / "one")
    with pytest.raises(SparsightError, match=r"one:2: the image of 200 bytes cannot be read: "):
        read(tmp_path / "one")
    got = read(tmp_path / "one", skip_bad=True)
    assert len(got) == 2
    assert len(got.skipped) == 1


def test_parquet_folder(table, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "flat").mkdir()
    table.select([0, 1]).to_parquet(tmp_path / "flat" / "train-00000-of-00001.parquet")
    assert [sample.prompt for sample in read(tmp_path / "flat")] == ["one?", "two?"]


@pytest.mark.parametrize("several", [False, True])
def test_pictures_of_parquet_files_that_datasets_did_not_write_stay_on_disk(several, tmp_path, monkeypatch):
    """Without its metadata a picture is a struct of bytes and path."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for i, image in enumerate(zoo.images(3)):
        image.save(tmp_path / f"{i}.png")
        picture = {"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": f"{i}.png"}
        rows.append({"image": [picture] * 2 if several else picture, "prompt": f"{i}?", "answer": "red"})
    (tmp_path / "flat").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "flat" / "train-00000-of-00001.parquet")
    got = read(tmp_path / "flat")
    assert {type(picture) for sample in got for picture in sample.images} == {StoredImage}
    assert [len(sample.images) for sample in got] == [1 + several] * 3
    for sample, image in zip(got, zoo.images(3), strict=True):
        assert sample.load_images()[-1].tobytes() == image.tobytes()


def test_dataset_names(monkeypatch):
    with pytest.raises(SparsightError, match="nobody/nothing: cannot load this dataset: "):
        read("nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SparsightError, match=r"pip install 'sparsight\[data\]'"):
        read("nobody/nothing")


def test_reading_needs_no_torch():
    code = "import sys, sparsight.data.sources, sparsight.data; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and "<image>" not in text
)
turns = st.builds(Turn, texts.map(str.strip), st.lists(texts.map(str.strip), min_size=1, max_size=3).map(tuple))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(turns, texts, st.booleans()), min_size=1, max_size=5), st.booleans())
def test_any_text_survives_jsonl(folder, rows, ascii_only):
    lines = []
    for turn, identity, image in rows:
        record = {"prompt": turn.prompt, "answers": list(turn.answers), "id": identity}
        lines.append(json.dumps(record | ({"image": "a.png"} if image else {}), ensure_ascii=ascii_only))
    got = read(write(folder, *lines))
    assert [(sample.turns[0], sample.id, bool(sample.images)) for sample in got] == rows


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
known = "image images file_name prompt answer answers messages conversations id kind"
keys = st.sampled_from(known.split())
talk = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), st.just("user") | st.just("human") | json_values)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=20) | st.dictionaries(keys, json_values | talk, max_size=5).map(json.dumps), max_size=4))
def test_no_input_raises_anything_but_our_error(folder, lines):
    path = folder / "any.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:
        got = read(path, skip_bad=True)
    except SparsightError:
        return
    assert len(got) + len(got.skipped) <= sum(len(line.split("\n")) for line in lines)
