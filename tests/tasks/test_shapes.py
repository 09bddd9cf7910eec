"""Every benchmark in every shape that it is published in becomes the right samples."""

import json

import pytest

from sparsight.data import read
from sparsight.errors import SparsightError
from sparsight.tasks import TASKS

from shapes import HUB, OFFICIAL, SIZE, gqa, mmbench, picture, pope, put, seed, vqav2

TEN = ("red",) * 6 + ("dark red",) * 3 + ("",)
# per form: split, the number of samples, and of the first one its question, answers, kind and options
RIGHT = {
    "vqav2": ("validation", 2, "What color is 0?", TEN, "other", ()),
    "okvqa": ("validation", 2, "What color is 0?", TEN, "other", ()),
    "gqa": ("testdev", 2, "Is 0 red?", ("yes",), "", ()),
    "nocaps": ("validation", 2, "caption", tuple(f"a picture {k} of 0" for k in range(3)), "in-domain", ()),
    "coco": ("validation", 2, "caption", tuple(f"a picture {k} of 0" for k in range(3)), "in-domain", ()),
    "coco/karpathy": ("test", 2, "caption", tuple(f"a test picture {k}" for k in range(5)), "", ()),
    "coco/lavis": ("test", 2, "caption", tuple(f"a {k}" for k in "abcde"), "", ()),
    "flickr30k": ("test", 2, "caption", tuple(f"a test picture {k}" for k in range(5)), "", ()),
    "flickr30k/token": ("", 2, "caption", tuple(f"A picture {k} ." for k in range(5)), "", ()),
    "textvqa": ("validation", 2, "what says 0?", TEN, "", ()),
    "vizwiz": ("validation", 2, "What is 0?", TEN, "other", ()),
    "pope": ("test", 4, "Is there a 0 in the image?", ("yes",), "random", ()),
    "mme": ("test", 6, "Is 1 red?", ("yes",), "code_reasoning", ()),
    "scienceqa": ("test", 2, "Which is it?", ("B",), "natural science", ("red", "blue", "green")),
    "chartqa": ("test", 2, "How many?", ("12.5",), "human", ()),
    "docvqa": ("validation", 2, "What is the date 0?", ("May 1", "1 May"), "", ()),
    "mmbench": ("", 2, 'Look.\nWhich "one" is red?', ("B",), "perception", ("left", "right")),
    "seed": ("test", 2, "How many?", ("C",), "Instances Counting", ("one", "two", "three", "four")),
    "ai2d": ("test", 2, "What falls in 0?", ("C",), "", ("sun", "moon", "rain", "snow")),
}
RIGHT_HUB = {
    "vqav2": ("validation", 2, "What color?", TEN, "other", ()),
    "okvqa": ("val2014", 2, "What color?", TEN, "other", ()),
    "gqa": ("testdev", 2, "Is it red?", ("yes",), "", ()),
    "nocaps": ("validation", 2, "caption", ("a", "b"), "in-domain", ()),
    "coco": ("val", 2, "caption", ("a", "b"), "", ()),
    "flickr30k": ("test", 2, "caption", ("a", "b"), "", ()),
    "textvqa": ("validation", 2, "What color?", TEN, "", ()),
    "vizwiz": ("val", 2, "What is it?", TEN, "other", ()),
    "pope": ("test", 3, "Is there a cat?", ("yes",), "popular", ()),
    "mme": ("test", 2, "Is it red?", ("yes",), "existence", ()),
    "scienceqa": ("test", 2, "Which?", ("B",), "natural science", ("red", "blue")),
    "chartqa": ("test", 2, "How many?", ("12.5",), "human", ()),
    "docvqa": ("validation", 2, "What date?", ("May 1",), "", ()),
    "mmbench": ("dev", 2, "Which?", ("B",), "p", ("left", "right")),
    "seed": ("test", 2, "How many?", ("C",), "5", ("1", "2", "3", "4")),
    "mmmu": ("validation", 2, "Which of <image 2> and <image 1>?", ("B",), "Art_Theory", ("the first", "the second")),
    "ai2d": ("test", 2, "What falls?", ("B",), "", ("sun", "rain")),
}


def facts(samples):
    first = samples[0]
    return samples.split, len(samples), first.prompt, first.answers, first.kind, first.options


def first_image(sample):
    return sample.load_images()[0]


@pytest.mark.parametrize("form", OFFICIAL)
def test_files_of_a_release(form, tmp_path):
    OFFICIAL[form](tmp_path)
    samples = read(tmp_path, task=form.split("/")[0])
    assert facts(samples) == RIGHT[form]
    assert first_image(samples[0]).size == SIZE
    assert len({sample.id for sample in samples}) == len(samples)
    assert samples.task == samples.facts["task"] == form.split("/")[0]


@pytest.mark.parametrize("name", HUB)
def test_tables_as_on_the_hub(name, tmp_path):
    HUB[name](tmp_path)
    samples = read(tmp_path, task=name)
    assert facts(samples) == RIGHT_HUB[name]
    assert len({sample.id for sample in samples}) == len(samples)
    expected = picture(1 if name == "gqa" else 0)  # GQA's first question is about the second picture
    assert first_image(samples[0]).tobytes() == expected.tobytes()


def test_every_task_is_in_the_forms():
    assert {form.split("/")[0] for form in OFFICIAL} == set(TASKS) - {"mmmu"}  # which has no files of its own
    assert set(HUB) == set(TASKS)


def test_pictures_of_mmmu_stand_in_the_order_of_their_numbers(tmp_path):
    HUB["mmmu"](tmp_path)
    two, one = read(tmp_path, task="mmmu")
    assert [image.tobytes() for image in two.load_images()] == [picture(i).tobytes() for i in (0, 1)]
    assert (len(one.images), one.options, one.answers) == (1, (), ("2.5",))
    assert one.in_words_of("llava").prompt == "<image 1> x=?\nAnswer the question using a single word or phrase."


def test_questions_of_science_without_a_picture(tmp_path):
    HUB["scienceqa"](tmp_path)
    _, text = read(tmp_path, task="scienceqa")
    assert text.images == ()
    assert text.in_words_of("llava").prompt == (
        "Context: It rains.\nWhy?\nA. so\nB. thus\nC. hence\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert len(read(tmp_path / "ScienceQA-IMG", task="scienceqa")) == 1


def test_a_tsv_with_options_for_other_tasks(tmp_path):
    mmbench(tmp_path)
    for task in ("seed", "ai2d", "scienceqa", "mmmu"):
        samples = read(tmp_path / "MMBench_DEV_EN.tsv", task=task)
        assert [sample.options for sample in samples] == [("left", "right"), ("left", "right", "top")]
        assert [sample.answers for sample in samples] == [("B",), ("A",)]
        assert first_image(samples[1]).size == SIZE  # its image is that of the first row


def test_a_prompt_of_ones_own(tmp_path):
    vqav2(tmp_path)
    (sample, _) = read(tmp_path, task="vqav2", prompt="Q: {question} A:")
    assert {sample.in_words_of(kind).prompt for kind in ("llava", "instructblip")} == {"Q: What color is 0? A:"}


def test_words_by_type_of_model(tmp_path):
    vqav2(tmp_path)
    (sample, _) = read(tmp_path, task="vqav2")
    assert sample.in_words_of("instructblip").prompt == "Question: What color is 0? Short answer:"
    assert sample.in_words_of("paligemma").prompt == "answer en What color is 0?"
    assert sample.in_words_of("llava").prompt == "What color is 0?\nAnswer the question using a single word or phrase."
    assert sample.in_words_of("llava").in_words_of("paligemma") == sample.in_words_of("llava")  # asked once


def test_the_wording_is_no_part_of_the_fingerprint(tmp_path):
    vqav2(tmp_path)
    plain, own = read(tmp_path, task="vqav2"), read(tmp_path, task="vqav2", prompt="{question}")
    assert plain.fingerprint == own.fingerprint


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"task": "vqav"}, r"`task`: unknown task 'vqav'; did you mean vqav2\?"),
        ({"task": "vqav2", "split": "test"}, "no split 'test' with answers"),
        ({"task": "okvqa"}, "has no 'OpenEnded_mscoco_val2014_questions.json', as the release of OK-VQA has"),
        ({"task": "mmmu"}, "MMMU is published as parquet files, and there are none here"),
        ({"task": "mme"}, "has no folders such as existence"),
        ({"task": "vqav2", "prompt": "Answer:"}, r"`prompt`: 'Answer:' lacks {question}"),
        ({"task": "vqav2", "prompt": "{question} {options}"}, r"`prompt`: there is no {options} here"),
        ({"prompt": "{question}"}, "`task`: is missing"),
    ],
)
def test_what_is_refused(settings, line, tmp_path):
    vqav2(tmp_path)
    with pytest.raises(SparsightError, match=line):
        read(tmp_path, **settings)


def test_a_single_file_of_a_release_is_refused(tmp_path):
    """The files beside it would be read in its place, whatever it is."""
    gqa(tmp_path)
    for name in ("val_balanced_questions.json", "testdev_balanced_questions.json"):
        path = tmp_path / "questions1.2" / name
        with pytest.raises(SparsightError) as error:
            read(path, task="gqa", images=tmp_path / "images")
        line = f"{path}: is one file of a release; give its folder, with the pictures, or a .parquet or .tsv file"
        assert str(error.value) == line


def test_mme_is_read_whole(tmp_path):
    HUB["mme"](tmp_path)
    with pytest.raises(SparsightError, match="`samples`: mme scores questions about an image together"):
        read(tmp_path, task="mme", limit=1)


def test_a_question_without_answers_and_a_missing_picture(tmp_path):
    pope(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000001.jpg").unlink()
    with pytest.raises(SparsightError, match=r"image 'COCO_val2014_000000000001\.jpg' does not exist"):
        read(tmp_path, task="pope")
    assert len(read(tmp_path, task="pope", skip_bad=True)) == 2
    HUB["vqav2"](tmp_path / "hub")
    with pytest.raises(SparsightError, match="has no answer to score by; those of some splits of VQAv2 are not published"):
        read(tmp_path / "hub", task="vqav2", split="test")


def test_a_file_in_another_form(tmp_path):
    put(tmp_path / "SEED-Bench.json", {"questions": [{"question": "?"}]})
    with pytest.raises(SparsightError, match=r"is not as SEED-Bench is published \(KeyError: 'data_type'\)"):
        read(tmp_path, task="seed")
    seed(tmp_path)
    content = json.loads((tmp_path / "SEED-Bench.json").read_text())
    content["questions"][0]["answer"] = "E"
    put(tmp_path / "SEED-Bench.json", content)
    with pytest.raises(SparsightError, match="its answer 'E' is none of its 4 options"):
        read(tmp_path, task="seed")


def test_images_in_another_folder(tmp_path):
    vqav2(tmp_path / "a")
    (tmp_path / "a/val2014").rename(tmp_path / "coco")
    assert len(read(tmp_path / "a", task="vqav2", images=tmp_path / "coco")) == 2


@pytest.mark.parametrize("name", ["mmbench", "seed", "mmmu", "ai2d", "gqa"])
def test_without_the_task_nothing_is_dropped_in_silence(name, tmp_path):
    """Five forms whose pictures or options an ordinary source does not have a place for."""
    HUB[name](tmp_path)
    folder = tmp_path / {"mmbench": "en", "gqa": "testdev_balanced_instructions"}.get(name, "data")
    split = {"mmbench": "dev", "mmmu": "validation", "gqa": "testdev"}.get(name, "test")
    with pytest.raises(SparsightError, match="name the benchmark with `task`"):
        read(next(folder.glob(f"{split}*.parquet")), held_out=True)
