"""Published forms of records, one by one: what is read, what is ignored and counted, what is refused."""

import json

import pytest

from sparsight.data import Sample, Turn, read
from sparsight.errors import QUOTED, SparsightError, first_line, quote

import zoo

ASK, SAY = {"role": "user", "content": "how many?"}, {"role": "assistant", "content": "4"}
RULES = "Answer in one word."


@pytest.fixture
def folder(tmp_path):
    for name, image in zip(("a.png", "b.png"), zoo.images(2), strict=True):
        image.save(tmp_path / name)
    return tmp_path


def write(folder, *records, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder / name


def write_json(folder, content, name="data.json"):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder / name


SYSTEM = {
    "openai": {"messages": [{"role": "system", "content": RULES}, ASK, SAY]},
    "developer": {"messages": [{"role": "developer", "content": RULES}, ASK, SAY]},
    "parts": {"messages": [{"role": "system", "content": [{"type": "text", "text": RULES}]}, ASK, SAY]},
    "key of messages": {"system": f" {RULES} ", "messages": [ASK, SAY]},
    "key of sharegpt": {
        "system": RULES,
        "conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "4"}],
    },
    "turn of sharegpt": {
        "conversations": [
            {"from": "system", "value": RULES},
            {"from": "user", "value": "how many?"},
            {"from": "assistant", "value": "4"},
        ]
    },
    "flat": {"system": RULES, "prompt": "how many?", "answer": "4"},
}


@pytest.mark.parametrize("form", SYSTEM)
def test_a_system_text_is_read(folder, form):
    (sample,) = read(write(folder, {"image": "a.png", **SYSTEM[form]}))
    assert sample == Sample("1", (folder / "a.png",), (Turn("how many?", ("4",)),), system=RULES)


def test_several_system_turns_are_one_text_and_none_is_none(folder):
    two = [{"role": "system", "content": "one"}, {"role": "system", "content": "two"}, ASK, SAY]
    empty = [{"role": "system", "content": " "}, ASK, SAY]
    got = read(write(folder, {"messages": two}, {"messages": empty}, {"system": None, "messages": [ASK, SAY]}))
    assert [sample.system for sample in got] == ["one\n\ntwo", "", ""]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"system": RULES, "messages": [{"role": "system", "content": RULES}, ASK, SAY]}, "cannot stand together"),
        ({"messages": [ASK, {"role": "system", "content": RULES}, SAY]}, "got 'system'; a system turn must stand first"),
        ({"system": 3, "messages": [ASK, SAY]}, "'system' must be a string, got a number"),
        ({"system": "look at <image>", "messages": [ASK, SAY]}, "a system text cannot hold <image>"),
        ({"messages": [{"role": "tool", "content": "x"}, SAY]}, "'role' must be 'user', got 'tool'"),
    ],
)
def test_a_system_text_that_cannot_be_told_is_refused(folder, record, reason):
    with pytest.raises(SparsightError, match=reason):
        read(write(folder, record))


@pytest.mark.parametrize("answers", ["gpt", "assistant", "chatgpt", "bing", "bard", "model"])
@pytest.mark.parametrize("asks", ["human", "user"])
def test_synonyms_of_roles_in_both_forms(folder, asks, answers):
    talk = [(asks, "one?"), (answers, "1"), (asks, "two?"), (answers, "2")]
    pairs = [[("from", "value")], [("role", "content")]]
    records = [
        {form: [{who: role, text: value} for role, value in talk]}
        for form in ("messages", "conversations")
        for ((who, text),) in pairs
    ]
    got = read(write(folder, *records))
    assert all(sample.turns == (Turn("one?", ("1",)), Turn("two?", ("2",))) for sample in got)


def test_the_fingerprint_has_the_system_text_and_nothing_new_without_one(folder):
    plain = read(write(folder, {"messages": [ASK, SAY]})).fingerprint
    assert plain == read(write(folder, {"prompt": "how many?", "answer": "4"})).fingerprint
    prints = {read(write(folder, {"system": text, "messages": [ASK, SAY]})).fingerprint for text in ("", "a", "b")}
    assert plain in prints
    assert len(prints) == 3


def test_other_keys_are_ignored_and_counted(folder):
    flat = {"image": "a.png", "prompt": "how many?", "answer": "4"}
    got = read(
        write(
            folder,
            {**flat, "url": "x", "source": "coco", "width": 3},
            {**flat, "source": "vg", "url": None},
            {
                "conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "4"}],
                "model": "x",
                "question": "?",
            },
        )
    )
    assert dict(got.ignored) == {"source": 2, "url": 1, "width": 1, "question": 1}
    assert got.facts == {"ignored_keys": got.ignored}
    assert [sample.turns for sample in got] == [(Turn("how many?", ("4",)),)] * 3


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("promt", "prompt"),
        ("prompts", "prompt"),
        ("Prompt", "prompt"),
        ("pormpt", "prompt"),
        ("imgae", "image"),
        ("Image", "image"),
        ("anwser", "answer"),
        ("answerss", "answers"),
        ("message", "messages"),
        ("converstions", "conversations"),
        ("sytem", "system"),
        ("file_nam", "file_name"),
        ("questoin", "question"),
        ("ID", "id"),
    ],
)
def test_a_misspelt_key_is_refused(folder, key, meant):
    record = {"prompt": "how many?", "answer": "4", key: "x"}
    if meant in record:
        record.pop(meant)
    with pytest.raises(SparsightError, match=rf"unknown key '{key}'; did you mean '{meant}"):
        read(write(folder, record))


@pytest.mark.parametrize(
    "key", ["image_size", "question_id", "answer_type", "question_type", "ids", "kinds_of", "height", "tags"]
)
def test_a_key_of_another_meaning_is_not_taken_for_a_misspelt_one(folder, key):
    assert dict(read(write(folder, {"prompt": "how many?", "answer": "4", key: 1})).ignored) == {key: 1}


@pytest.mark.parametrize("key", ["image_path", "image_url", "image_id", "img", "img_path", "picture"])
def test_another_name_of_an_image_is_not_ignored_where_there_is_no_image(folder, key):
    flat = {"prompt": "how many?", "answer": "4", key: "a.png"}
    for record in (flat, {"messages": [ASK, SAY], key: "a.png"}):
        with pytest.raises(SparsightError, match=f"'{key}' without 'image'; say which file it is"):
            read(write(folder, record))
    assert dict(read(write(folder, {**flat, "image": "b.png"})).ignored) == {key: 1}


@pytest.mark.parametrize("key", ["image", "images", "image_url", "video", "file_name"])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_images_beside_the_text_of_a_message_are_refused(folder, form, key):
    turns = [{**ASK, key: ["a.png"]}, SAY]
    if form == "conversations":
        turns = [{"from": "human", "value": "?!", key: "a.png"}, {"from": "gpt", "value": "4"}]
    with pytest.raises(SparsightError, match=rf"{form}\[0\]: '{key}' beside the text; put images into"):
        read(write(folder, {form: turns}))


def test_other_keys_of_messages_and_parts_are_counted(folder):
    part = {"type": "image", "image": "a.png", "resized_height": 28}
    asks = {"role": "user", "images": [], "content": [part, {"type": "text", "text": "how many?", "detail": "high"}]}
    talk = {"messages": [asks, {**SAY, "weight": 0}, ASK, {**SAY, "weight": 1, "tool_calls": None}]}
    assert dict(read(write(folder, talk, talk)).ignored) == {"messages.content.resized_height": 2, "messages.weight": 2}


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"image": "a.png", "prompt": "?!", "answer": "4", "answer": "5"}', "answer"),
        ('{"image": "a.png", "image": "b.png", "prompt": "?!", "answer": "4"}', "image"),
        (
            '{"messages": [{"role": "user", "content": "?!", "content": "!!"}, {"role": "assistant", "content": "4"}]}',
            "content",
        ),
    ],
)
def test_a_key_that_stands_twice_is_refused(folder, line, key):
    for name, text in (("x.jsonl", line), ("x.json", f"[{line}]"), ("y.json", f'{{"data": [{line}]}}')):
        (folder / name).write_text(text)
        with pytest.raises(SparsightError, match=f"the key '{key}' stands twice"):
            read(folder / name)


def test_what_carries_more_than_images_is_refused(folder):
    flat = {"prompt": "how many?", "answer": "4"}
    for key in ("video", "audios"):
        with pytest.raises(SparsightError, match=f"'{key}': only images and texts are read"):
            read(write(folder, {**flat, key: ["x.mp4"]}))
    assert len(read(write(folder, {**flat, "video": None, "audio": []}))) == 1
    with pytest.raises(SparsightError, match="'image_id' without 'image'; say which file it is"):
        read(write(folder, {**flat, "image_id": 7}))


def test_empty_answers_among_others_are_left_out(folder):
    people = [{"answer": "4", "answer_id": 1}, {"answer": " ", "answer_id": 2}, {"answer": "four", "answer_id": 3}]
    got = read(write(folder, {"prompt": "?!", "answers": ["4", "4", "", "four"]}, {"prompt": "?!", "answers": people}))
    assert [sample.answers for sample in got] == [("4", "4", "four"), ("4", "four")]
    assert got.facts == {"empty_answers": 2, "without_images": 2}
    for answers, reason in ((["", " "], "all 2 answers are empty"), ([""], "empty answer")):
        with pytest.raises(SparsightError, match=reason):
            read(write(folder, {"prompt": "?!", "answers": answers}))


def test_question_is_a_name_of_prompt(folder):
    assert read(write(folder, {"question": "how many?", "answers": ["4"]}))[0].prompt == "how many?"
    with pytest.raises(SparsightError, match="'prompt' and 'question' cannot stand together"):
        read(write(folder, {"question": "how many?", "prompt": "how many?", "answer": "4"}))


VQA = {
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_id": 10,
            "image_id": 1,
            "answers": [{"answer": "red"}, {"answer": "blue"}],
            "multiple_choice_answer": "red",
        },
        {"question_id": 11, "image_id": 2, "multiple_choice_answer": "two"},
    ],
}
QUESTIONS = {
    "questions": [
        {"question_id": 10, "image_id": 1, "question": "what color?"},
        {"question_id": 11, "question": "how many?"},
    ]
}
TURNS = [(Turn("what color?", ("red", "blue")),), (Turn("how many?", ("two",)),)]


def test_vqa_annotations_with_their_questions(folder):
    for number, name in ((1, "a.png"), (2, "b.png")):
        (folder / f"COCO_val2014_{number:012d}.jpg").write_bytes((folder / name).read_bytes())
    annotations = write_json(folder, VQA, "v2_val_annotations.json")
    with pytest.raises(SparsightError, match="holds annotations without the questions") as caught:
        read(annotations)
    assert "file names" not in str(caught.value)
    questions = write_json(folder, QUESTIONS, "v2_OpenEnded_val_questions.json")
    got = read(annotations)
    assert [sample.turns for sample in got] == TURNS
    assert [sample.id for sample in got] == ["10", "11"]
    assert got[0].images == (folder / "COCO_val2014_000000000001.jpg",)
    with pytest.raises(SparsightError, match="holds questions without answers"):
        read(questions)


def test_vqa_annotations_in_one_file(folder):
    listed = {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]}
    whole = {**VQA, **QUESTIONS, **listed}
    assert [sample.turns for sample in read(write_json(folder, whole))] == TURNS
    bare = {"info": {}, "annotations": VQA["annotations"]}
    with pytest.raises(SparsightError, match=r"without the questions .* and without the images' file names") as caught:
        read(write_json(folder, bare))
    assert "\n" not in str(caught.value)


def test_coco_captions_are_one_sample_per_image(folder):
    said = [
        {"image_id": 7, "caption": "a dog"},
        {"image_id": 8, "caption": "a cat"},
        {"image_id": 7, "caption": "a small dog"},
    ]
    content = {"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}], "annotations": said}
    first, second = read(write_json(folder, content))
    assert first == Sample("7", (folder / "a.png",), (Turn("Describe the image.", ("a dog", "a small dog")),), "caption")
    assert second.answers == ("a cat",)
    with pytest.raises(SparsightError, match="holds captions without the images' file names"):
        read(write_json(folder, {"annotations": said}))


def test_ids_that_tables_wrote_as_floats_are_whole_numbers(folder):
    files = [{"id": 1.0, "file_name": "a.png"}, {"id": 2.0, "file_name": "b.png"}]
    said = [{"image_id": i, "caption": f"picture {i}"} for i in (1, 2.0)]
    got = read(write_json(folder, {"images": files, "annotations": said}))
    assert [(sample.id, sample.images, sample.answers) for sample in got] == [
        ("1", (folder / "a.png",), ("picture 1",)), ("2", (folder / "b.png",), ("picture 2.0",))
    ]  # fmt: skip
    questions = [{"question_id": float(i), "question": f"question {i}?"} for i in (1, 2)]
    asked = [{"question_id": float(i), "image_id": 1, "answers": ["x"]} for i in (1, 2)]
    got = read(write_json(folder, {"images": files, "questions": questions, "annotations": asked}))
    assert [(sample.id, sample.prompt) for sample in got] == [("1", "question 1?"), ("2", "question 2?")]


FILES = [{"id": 1, "file_name": "a.png"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"images": FILES, "annotations": [{"caption": "x"}, {"caption": "y"}]}, "'image_id' must be .* got nothing"),
        ({"images": FILES, "annotations": [{"image_id": True, "caption": "x"}]}, "'image_id' must be .* got true or false"),
        ({"images": FILES, "annotations": [{"image_id": 1.5, "caption": "x"}]}, "'image_id' must be .* got a number"),
        (
            {"images": [*FILES, {"id": 1, "file_name": "b.png"}], "annotations": [{"image_id": 1, "caption": "x"}]},
            "'images': 'id' 1 stands for two: 'a.png' and 'b.png'",
        ),
        (
            {
                "images": FILES,
                "questions": [{"question_id": 1, "question": word} for word in ("one?", "two?")],
                "annotations": [{"question_id": 1, "image_id": 1, "answers": ["x"]}],
            },
            r"'question_id' 1 stands for two: 'one\?' and 'two\?'",
        ),
        ({"data": [{"question": "?!"}, None]}, "'data' must be a list of objects, got nothing among them"),
    ],
)
def test_annotations_that_do_not_say_what_they_belong_to(folder, content, reason):
    with pytest.raises(SparsightError, match=reason):
        read(write_json(folder, content))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (
            "x.json",
            '[{"prompt": "?!", "answer": "4"}]\n[{"prompt": "??", "answer": "5"}]',
            r"json:2: a \.json file holds one list",
        ),
        ("x.json", '[{"prompt": "?!", "answer": "4"}] end', r"json:1: a \.json file holds one list"),
        ("x.json", '{"prompt": "?!"}\n{"prompt": "??"}', r"json:2: .* for one record a line use \.jsonl"),
        ("x.jsonl", '[{"prompt": "?!", "answer": "4"}]', r"got a list; a list of records belongs in a \.json file"),
        ("x.jsonl", '[\n{"prompt": "?!", "answer": "4"}\n]', r"jsonl:1: not JSON: .* belongs in a \.json file"),
        ("x.jsonl", '{"prompt": "?!", "answer": "4"},', "jsonl:1: not JSON: Extra data.* holds one whole object"),
    ],
)
def test_nothing_behind_the_end_is_left_out(folder, name, text, reason):
    (folder / name).write_text(text)
    with pytest.raises(SparsightError, match=reason):
        read(folder / name)


def test_textvqa_and_docvqa(folder):
    (folder / "x1.jpg").write_bytes((folder / "a.png").read_bytes())
    rows = [
        {"question": "how many?", "image_id": "x1", "answers": ["4"], "image_width": 3},
        {"question": "why?", "image": "b.png", "answers": ["so"]},
    ]
    first, second = read(write_json(folder, {"dataset_name": "textvqa", "data": rows}))
    assert (first.images, second.images) == ((folder / "x1.jpg",), (folder / "b.png",))
    assert (first.answers, second.prompt) == (("4",), "why?")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "must hold a list of records"),
        ({"a": [], "b": 1}, r"got the keys \['a', 'b'\]"),
        ({"annotations": 3}, "'annotations' must be a list of objects, got a number"),
        ({"annotations": [3]}, "'annotations' must be a list of objects"),
        ({"annotations": [{"bbox": []}], "images": []}, "neither 'answers' nor a 'caption'"),
        ({"data": {}}, "'data' must be a list of objects, got an object"),
        ({"annotations": [{"answers": ["x"], "question_id": [1], "image_id": {}}]}, "without the questions"),
    ],
)
def test_other_objects_are_refused_in_one_line(folder, content, reason):
    with pytest.raises(SparsightError, match=reason) as caught:
        read(write_json(folder, content))
    assert "\n" not in str(caught.value)


def test_where_all_are_bad_the_reasons_are_counted(folder):
    flat = {"prompt": "how many?", "answer": "4"}
    bad = [{**flat, "image": f"no{i}.png"} for i in range(4)] + [{**flat, "answer": ""}] * 2 + [{"prompt": "?"}]
    with pytest.raises(SparsightError) as caught:
        read(write(folder, *bad), skip_bad=True)
    assert str(caught.value).endswith(
        "no samples; all 7 records are bad: image 'no0.png' does not exist; name another folder with "
        "`images` (4); empty answer (2); "
        "missing 'answer' (or 'answers')"
    )
    many = (
        [{**flat, "answer": i} for i in range(3)]
        + [{**flat, "promt": 1}]
        + [3, "x", {"prompt": 1, "answer": "4"}, {**flat, "id": ""}, {**flat, "kind": 1}]
    )
    with pytest.raises(
        SparsightError, match=r"all 9 records are bad: an answer must be a string, got a number \(3\); .* for other reasons"
    ):
        read(write(folder, *many), skip_bad=True)


LONG = "x" * 5000
LONG_RECORDS = [
    {"prompt": "?!", "answer": "4", "image": LONG},
    {"prompt": "?!", "answer": "4", "image": "/" + LONG},
    {"prompt": "?!", "answer": "4", "image": "http://" + LONG},
    {"prompt": "?!", "answer": "4", "image": "data:image/png;base64," + LONG},
    {"prompt": "?!", "answer": "4", "image": {"bytes": LONG}},
    {"prompt": "?!", "answer": "4", "image": {"path": "../" + LONG}},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": LONG}]}]},
    {"messages": [{"role": LONG, "content": "x"}]},
    {"messages": [{"role": {"a": LONG}, "content": "x"}]},
    {"conversations": [{"from": [LONG], "value": "x"}]},
]


@pytest.mark.parametrize("record", LONG_RECORDS, ids=range(len(LONG_RECORDS)))
def test_a_line_quotes_at_most_80_characters(folder, record):
    path = write(folder, record)
    with pytest.raises(SparsightError) as caught:
        read(path)
    assert "x" * 81 not in str(caught.value)
    assert len(str(caught.value)) < 320 + len(str(path))


def test_quotes_and_first_lines_are_short():
    for value in ("x", "'", LONG, b"x" * 500, list(range(900)), {"a": LONG}, LONG[:79], LONG[:78]):
        assert len(quote(value)) <= QUOTED
    assert quote("ab") == "'ab'"
    assert quote(LONG) == f"'{'x' * 75}...'"
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError(LONG))) == 200
