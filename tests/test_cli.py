"""The command line as a user drives it: what it prints, how it exits, and one clear line for everything wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import warnings

import pytest
import yaml

import sparsight
from sparsight import SparsightError, anatomy, api, load
from sparsight.errors import Notice

import zoo


def refused(result, *says):
    """Exit code 2 and one line that says what was given, what is allowed, and what to do."""
    code, out, err = result
    assert code == 2, (out, err)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sparsight: ")
    for words in says:
        assert words in err
    return True


def test_help_is_light():
    """Under a second even on a busy machine, because nothing heavy is imported; that is what is asserted."""
    heavy = "('torch', 'transformers', 'numpy')"
    code = f"import sys, sparsight, sparsight.cli.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "sparsight", "--help"], capture_output=True, text=True, check=True)
    print(f"help in {time.perf_counter() - began:.2f} s")
    for verb in ("inspect", "plan", "prune", "restore", "eval", "verify", "demo"):
        assert f"\n  {verb} " in done.stdout


def test_version(run):
    assert run("--version") == (0, "0.1.0\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["diff", "A"], "diff: b is missing (folder of another model, as the dense one); see sparsight diff --help"),
        (["run"], "run: recipe is missing (YAML file); see sparsight run --help"),
        (["merge"], "No such command 'merge'; give one of inspect, plan, prune, restore, eval, verify, ask, diff, "),
        (["prun"], "No such command 'prun'. Did you mean 'prune', 'run'?"),
    ],
)
def test_what_is_missing_on_the_command_line_is_said(words, line, run):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"sparsight: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("inspect nowhere", "nowhere: no such folder; give the folder of a model or a hub name such as owner/model"),
        ("verify nowhere", "nowhere: no such folder"),
        ("bench nowhere", "nowhere: no such folder"),
        ("diff nowhere b", "nowhere: no such folder"),
        ("unpack nowhere out", "nowhere: no such folder"),
        ("eval owner/model --data no.jsonl", "no.jsonl: no such file or folder"),
        ("restore owner/model out --data no.parquet", "no.parquet: "),
        ("prune owner/model full", "full: exists and is not empty; choose another folder, or add --overwrite"),
        ("ask owner/model no.png why", "--image: no.png is no file; give a picture"),
        ("pack owner/model full", "full: exists and is not empty"),
        ("pack full full", "full: holds what is read (full); give another folder to write to"),
        ("prune owner/model full --data full/x", "full: holds what is read (full/x)"),
        (f"ask owner/model {'why' * 100} why", "--image: whywhy"),
    ],
)
def test_what_is_not_there_is_said_before_torch_is_imported(words, line, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    script = """
import sys
from sparsight.cli.app import main
try:
    main()
finally:
    print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert done.stderr.startswith(f"sparsight: {line}")
    assert done.stderr.count("\n") == 1


def test_prune_imports_no_trainer(zoo_folder, tmp_path):
    """Nor does plan; together they are half a second that only trackers and restoration need."""
    script = """
import sys
import sparsight
sparsight.plan(sys.argv[1], sparsity=0.5)
sparsight.prune(sys.argv[1], sys.argv[2], method="magnitude", sparsity=0.5)
print(sorted({"peft", "transformers.trainer_callback"} & set(sys.modules)))
"""
    words = [sys.executable, "-c", script, zoo_folder("llava"), tmp_path / "sparse"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_a_name_of_data_that_is_too_long_is_said_in_one_line(suffix, run, tmp_path, zoo_folder):
    name = f"{'long' * 100}.{suffix}"
    assert refused(
        run("prune", zoo_folder("llava"), tmp_path / "out", "--data", name), f"sparsight: {name[:100]}", "cannot be read"
    )


def test_inspect(run, zoo_folder):
    code, out, _ = run("inspect", zoo_folder("llava"), "--layers")
    assert code == 0
    for words in ("vision", "connector", "language", "output head", "model.language_model.layers.1.mlp.down_proj"):
        assert words in out
    facts = json.loads(run("inspect", zoo_folder("llava"), "--json")[1])
    assert facts["components"]["language"]["layers"] == 21
    assert facts["family"].startswith("vision=model.vision_tower.encoder.layers,")


def test_plan_changes_nothing(run, zoo_folder, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in zoo_folder("llava").iterdir()}
    code, out, _ = run("plan", zoo_folder("llava"), "--sparsity", "vision=0.5,language=0.6")
    assert code == 0
    assert "50.00%" in out
    assert "all layers" in out
    facts = json.loads(run("plan", zoo_folder("llava"), "--pattern", "2:4", "--json")[1])
    rows = {row["component"]: row for row in facts["components"]}
    assert rows["language"]["zeros"] * 2 == rows["language"]["parameters"]
    assert set(facts["layers"].values()) == {"2:4"}
    assert {p: p.stat().st_mtime_ns for p in zoo_folder("llava").iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_plan_says_that_zeros_stay(run, zoo_folder):
    """A plan of fewer zeros than there are on record ends with those, and the user hears of it before pruning."""
    assert run("prune", zoo_folder("llava"), "sparse", "--method", "magnitude", "--sparsity", "language=0.6")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        code, _, err = run("plan", "sparse", "--sparsity", "0.4")
    assert code == 0
    assert "sparse: is sparse already, and zeros stay zeros: " in err
    assert "planned at 40.0%, 21 layers in all; ask for more zeros, or start from the dense original" in err
    for fine in ("0.6", "vision=0.3", "language=0.7"):
        assert run("plan", "sparse", "--sparsity", fine)[0] == 0  # without a notice


def test_every_verb_on_the_command_line(run, zoo_folder, scenes, tmp_path):
    code, out, err = run("prune", zoo_folder("llava"), "sparse", "--data", scenes, "--pattern", "2:4", "--samples", 8)
    assert code == 0
    assert "50.00%" in out
    assert "wrote sparse" in out
    assert "prune: 5/5" in err
    code, out, _ = run(
        "restore", "sparse", "restored", "--data", scenes, "--steps", 2, "--batch-size", 4, "--rank", 2, "--quiet"
    )
    assert code == 0
    assert "Teacher shared" in out
    code, out, _ = run("verify", "restored", "--against", "sparse")
    assert (code, "no zero of sparse was lost" in out) == (0, True)
    code, out, _ = run(
        "eval",
        "restored",
        "--data",
        scenes,
        "--predictions",
        "p.jsonl",
        "--json-file",
        "s.json",
        "--max-new-tokens",
        3,
        "--json",
    )
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "s.json").read_text())
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 12
    code, out, _ = run("verify", zoo_folder("llava"), "--against", "sparse")
    assert code == 1
    assert "model.language_model.layers.1.mlp.down_proj" in out
    assert "zeros lost" in out
    assert refused(run("prune", zoo_folder("llava"), "sparse", "--data", scenes), "not empty", "--overwrite")
    assert run("prune", zoo_folder("llava"), "sparse", "--method", "random", "--overwrite")[0] == 0


@pytest.mark.gpu
def test_every_verb_on_a_gpu(run, zoo_folder, scenes):
    where = ("--data", scenes, "--device", "cuda", "--quiet")
    assert run("prune", zoo_folder("llava"), "sparse", "--pattern", "2:4", "--samples", 8, *where)[0] == 0
    code, out, _ = run("restore", "sparse", "restored", "--steps", 2, "--batch-size", 4, *where)
    assert code == 0
    assert "Teacher shared" in out
    assert run("verify", "sparse")[0] == 0
    code, out, _ = run("verify", "restored", "--against", "sparse")
    assert (code, "no zero of sparse was lost" in out) == (0, True)
    assert run("eval", "restored", "--max-new-tokens", 2, *where)[0] == 0


def test_inspect_and_plan_need_no_processor(run, zoo_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copy(zoo_folder("llava") / name, tmp_path / "bare")
    assert run("inspect", "bare")[0] == 0
    assert run("plan", "bare")[0] == 0
    assert refused(run("eval", "bare", "--data", "nowhere.jsonl"), "nowhere.jsonl")


def test_verify_needs_no_processor(run, zoo_folder, tmp_path):
    assert run("prune", zoo_folder("llava"), "sparse", "--method", "magnitude", "--quiet")[0] == 0
    for path in (tmp_path / "sparse").iterdir():
        if path.name not in ("config.json", "model.safetensors", "sparsity.json"):
            path.unlink()
    assert run("verify", "sparse")[0] == 0
    assert run("verify", "sparse", "--against", "sparse")[0] == 0


def test_names_that_look_like_markup_are_printed_as_they_are(run, zoo_folder, tmp_path):
    out_ = "out[/x] [bold] :star:"
    code, out, _ = run("prune", zoo_folder("llava"), out_, "--method", "magnitude", "--quiet")
    assert code == 0
    assert f"wrote {out_}\n" in out
    code, out, _ = run("verify", out_, "--against", out_)
    assert code == 0
    assert out.startswith(f"verified {out_}: ")


def test_eval_takes_beams_and_tells_the_model_s_name_as_it_is(run, zoo_folder, scenes, tmp_path):
    (tmp_path / "model[").mkdir()
    (tmp_path / "model[/x]").symlink_to(zoo_folder("llava"))
    words = ("eval", "model[/x]", "--data", scenes, "--max-new-tokens", 4, "--quiet")
    code, out, _ = run(*words, "--beams", 2, "--predictions", "two.jsonl")
    assert code == 0
    assert out.startswith("model[/x] on 12 samples")
    assert run(*words, "--beams", 1, "--predictions", "one.jsonl")[0] == 0
    one, two = ((tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("one", "two"))
    assert len(one) == len(two) == 12
    assert one != two, "beams found nothing else"
    assert refused(run(*words, "--beams", 0), "--beams", "at least 1")


UNWRITABLE = ["no/such/x", ".", "x" * 300, "loop", "locked/x", "/proc/x.json", "/dev/full"]


@pytest.mark.parametrize("path", UNWRITABLE)
@pytest.mark.parametrize("option", ["--json-file", "--predictions"])
def test_files_that_cannot_be_written_are_known_before_the_work(option, path, run, zoo_folder, scenes, tmp_path):
    if path.startswith("/") and not sys.platform.startswith("linux"):
        pytest.skip("a place of Linux")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "locked").write_text("")  # a file where a folder should be
    before = sorted(tmp_path.iterdir())
    began = run("eval", "./nowhere", "--data", scenes, option, path)  # the model comes later: it is not even missed
    assert refused(began, f"{option}: {path} cannot be written (", "give a file in a folder that exists")
    assert sorted(tmp_path.iterdir()) == before


def test_files_to_write_are_neither_the_data_nor_each_other(run, zoo_folder, scenes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    whole = (data / "metadata.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(data / "metadata.jsonl")
    (tmp_path / "twin").hardlink_to(data / "metadata.jsonl")
    for given in ("data", "data/metadata.jsonl"):
        words = ("eval", zoo_folder("llava"), "--data", given)
        for option in ("--json-file", "--predictions"):
            for path in ("data/metadata.jsonl", "link", "twin"):
                assert refused(run(*words, option, path), f"{option}: {path} holds the samples of --data")
    assert refused(run(*words, "--json-file", "x", "--predictions", "./data/../x"), "--predictions", "--json-file, too")
    assert (data / "metadata.jsonl").read_bytes() == whole
    (tmp_path / "old.json").write_text("kept", encoding="utf-8")
    assert run("eval", "./nowhere", "--data", data, "--json-file", "old.json")[0] == 2
    assert (tmp_path / "old.json").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("option", ["--json-file", "--predictions"])
def test_a_file_that_fails_at_the_end_costs_no_scores(option, run, zoo_folder, scenes, tmp_path, monkeypatch):
    from sparsight import api

    score = api.evaluate

    def vanish(*args, **kwargs):
        result = score(*args, **kwargs)
        (tmp_path / "folder").rmdir()
        return result

    monkeypatch.setattr(api, "evaluate", vanish)
    (tmp_path / "folder").mkdir()
    words = ("eval", zoo_folder("llava"), "--data", scenes, "--samples", 2, "--max-new-tokens", 1, "--quiet", "--json")
    code, out, err = run(*words, option, "folder/x")
    assert code == 2
    assert json.loads(out)["metrics"]
    assert err == (
        f"sparsight: {option}: folder/x cannot be written (No such file or directory); give a file in a folder that exists\n"
    )


BAD = {
    "method": (["--method", "wonda"], ["'wonda'", "did you mean wanda?", "magnitude"]),
    "policy": (["--policy", "owel"], ["'owel'", "uniform"]),
    "component": (["--sparsity", "vison=0.5"], ["'vison'", "did you mean vision?"]),
    "pattern 4:2": (["--pattern", "4:2"], ["'4:2'", "0 < n < m"]),
    "pattern 0:4": (["--pattern", "0:4"], ["'0:4'", "0 < n < m"]),
    "pattern word": (["--pattern", "rows"], ["'rows'", "row, tensor or n:m"]),
    "sparsity 1.0": (["--sparsity", "1.0"], ["1 is not a sparsity", "below 1"]),
    "sparsity -0.1": (["--sparsity", "-0.1"], ["-0.1 is not a sparsity"]),
    "sparsity 50%": (["--sparsity", "50%"], ["'50%' is not a number", "as in 0.5"]),
    "propagate": (["--propagate", "blocks"], ["'blocks'", "did you mean block?"]),
    "samples": (["--samples", "0"], ["--samples", "at least 1"]),
    "samples word": (["--samples", "many"], ["--samples", "integer"]),
    "dtype": (["--dtype", "bf16"], ["'bf16'", "bfloat16"]),
    "device": (["--device", "tpu9"], ["'tpu9'", "cpu"]),
    "device mps": (["--device", "mps"], ["'mps'", "cpu, cuda, cuda:N or auto"]),
    "device meta": (["--device", "meta"], ["'meta'", "cpu, cuda, cuda:N or auto"]),
    "ignore": (["--ignore", "q_porj"], ["'q_porj' matches no layer"]),
    "family": (["--family", "vision=nowhere,language=nowhere"], ["no module 'nowhere'", "--family vision="]),
    "no such option": (["--sparsty", "0.5"], ["--sparsty", "--sparsity"]),
    "resume": (["--resume"], ["no interrupted work"]),
    "refine": (["--refine", "swap"], ["--refine", "'swap'", "did you mean swaps?"]),
    "update": (["--update", "cg"], ["--update", "'cg'", "allowed: pcg"]),
    "reconstruct": (["--reconstruct", "-2"], ["--reconstruct", "-2", "0 or more"]),
    "tokens": (["--tokens", "texts"], ["--tokens", "'texts'", "did you mean text?"]),
    "permute": (["--permute"], ["--permute", "n:m", "leave it out"]),
    "solver and refine": (["--method", "sparsegpt", "--refine", "swaps"], ["--refine", "add --update pcg"]),
    "preset and refine": (["--method", "dsnot", "--refine", "swaps"], ["--refine", "--method wanda --refine swaps"]),
    "preset and policy": (["--method", "ecoflap", "--policy", "owl"], ["--policy", "--method wanda --policy owl"]),
    "layer and reconstruct": (["--propagate", "layer", "--reconstruct", "1"], ["--reconstruct", "use block"]),
    "dense targets": (["--dense-targets"], ["--dense-targets", "add --update pcg, or use --method alps"]),
    "mix without a policy": (["--pattern", "2:4", "--sparsity", "0.3"], ["--policy"]),
    "one component alone": (
        ["--sparsity", "0.9", "--policy", "vision-only"],
        ["vision-only cannot carry", "ask for less"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_of_prune(case, run, zoo_folder, scenes, tmp_path):
    words, says = BAD[case]
    assert refused(run("prune", zoo_folder("llava"), "out", "--data", scenes, *words), *says)
    assert list(tmp_path.iterdir()) == []


BAD_RESTORE = {
    "adapter": (["--adapter", "spareselora"], ["did you mean sparselora?"]),
    "rank": (["--rank", "vision=0"], ["vision=0", "at least 1"]),
    "one rank": (["--rank", "0"], ["vision=0", "at least 1"]),
    "no rank": (["--rank", "eight"], ["--rank", "vision=4,connector=2,language=8"]),
    "rank component": (["--rank", "text=4"], ["unknown component 'text'"]),
    "kl": (["--kl", "2"], ["--kl: 2"]),
    "lr": (["--lr", "-1"], ["--lr: -1"]),
    "steps": (["--steps", "-1"], ["--steps: -1"]),
    "scheduler": (["--scheduler", "cosin"], ["did you mean cosine?"]),
    "teacher": (["--teacher", "./nowhere"], ["nowhere", "no such folder"]),
    "teacher mode": (["--teacher-mode", "cache"], ["--teacher-mode", "did you mean cached?"]),
    "tune": (["--tune", "text"], ["--tune", "'text'", "vision, connector, language"]),
    "tune nothing": (["--tune", ""], ["--tune", "names no component"]),
    "divergence": (["--divergence", "jsd"], ["--divergence", "did you mean js?"]),
    "temperature": (["--temperature", "0"], ["--temperature: 0"]),
    "hidden": (["--hidden", "-1"], ["--hidden: -1"]),
    "reduction": (["--reduction", "papers"], ["--reduction", "did you mean paper?"]),
    "paper and cache": (
        ["--reduction", "paper", "--teacher-mode", "cached"],
        ["--teacher-mode", "every position", "shared"],
    ),
    "warmup": (["--warmup", "2"], ["--warmup: 2"]),
    "reconstruct": (["--reconstruct", "-1"], ["--reconstruct", "0 or more"]),
    "held out": (["--held-out", "99"], ["--held-out: 99 of 12 samples"]),
    "held out data": (["--held-out", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "patience": (["--patience", "2"], ["--patience", "--held-out"]),
    "patience 0": (["--held-out", "2", "--patience", "0"], ["--patience: 0"]),
    "tracker": (["--report-to", "tensorbord"], ["--report-to", "'tensorbord'", "did you mean tensorboard?"]),
    "precision": (["--mixed-precision", "bf-16"], ["--mixed-precision", "did you mean bf16?"]),
    "fp16 on a CPU": (["--mixed-precision", "fp16"], ["--mixed-precision", "needs a GPU"]),
    "cache in OUT": (["--teacher-cache", "out/teacher"], ["--teacher-cache", "lies in OUT"]),
    "adapter of fitted layers": (["--save-adapter", "--reconstruct", "1"], ["--save-adapter", "leave it or --reconstruct"]),
    "kl without teacher": (["--kl", "0", "--reconstruct", "2", "--teacher", "./nowhere"], ["nowhere", "no such folder"]),
}


@pytest.mark.parametrize("case", BAD_RESTORE)
def test_bad_settings_of_restore(case, run, zoo_folder, scenes, tmp_path_factory, tmp_path):
    sparse = tmp_path_factory.mktemp("sparse") / "sparse"
    assert run("prune", zoo_folder("llava"), sparse, "--method", "magnitude", "--quiet")[0] == 0
    words, says = BAD_RESTORE[case]
    assert refused(run("restore", sparse, "out", "--data", scenes, "--quiet", *words), *says)
    assert list(tmp_path.iterdir()) == []


def test_scipy_is_asked_for_by_the_permutation_alone(zoo_folder, tmp_path):
    code = (
        "import sys; sys.modules.update({'scipy': None, 'scipy.optimize': None}); "
        f"sys.argv = ['sparsight', 'prune', {str(zoo_folder('llava'))!r}, 'out', '--method', 'magnitude', '--quiet']; "
        "from sparsight.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plan_lists_what_every_layer_gets(run, zoo_folder, scenes):
    words = (
        "plan",
        zoo_folder("llava"),
        "--policy",
        "owl",
        "--sparsity",
        "0.6",
        "--data",
        scenes,
        "--samples",
        8,
        "--quiet",
    )
    code, out, err = run(*words, "--layers")
    assert code == 0, err
    rows = [line for line in out.splitlines() if ".layers." in line]
    model, _ = load(zoo_folder("llava"))
    assert len(rows) == len([x for c in ("vision", "language") for x in anatomy(model).component(c)])
    got = {line.split()[-1] for line in rows}
    assert len(got) > 2  # not uniform
    assert all(40 < float(share.rstrip("%")) < 80 for share in got), got
    assert refused(run("plan", zoo_folder("llava"), "--policy", "owl"), "--policy: owl needs calibration samples")


COMPOSED = {
    "solver": ["--method", "sparsegpt", "--propagate", "layer"],
    "all steps": [
        "--method",
        "ria",
        "--refine",
        "swaps",
        "--update",
        "pcg",
        "--reconstruct",
        "1",
        "--pattern",
        "2:4",
        "--permute",
    ],
    "preset": ["--method", "ecoflap", "--sparsity", "0.4"],
    "policy and tokens": ["--method", "alps", "--policy", "owl", "--tokens", "balanced"],
    "a mix of 2:4 and dense": ["--pattern", "2:4", "--sparsity", "0.3", "--policy", "owl"],
}


@pytest.mark.parametrize("case", COMPOSED)
def test_composed_methods_write_what_they_say(case, run, zoo_folder, scenes, tmp_path):
    words = COMPOSED[case]
    where = ("--data", scenes, "--samples", 8, "--quiet", "--json")
    code, out, err = run("prune", zoo_folder("llava"), "sparse", *words, *where)
    assert code == 0, err
    facts = json.loads(out)
    named = {"solver": "sparsegpt", "all steps": "permute + ria + swaps + pcg + reconstruct 1", "preset": "ecoflap"}
    assert facts["method"] == named.get(case, facts["method"])
    entries = facts["layers"].values()
    got = sum(x["zeros"] for x in entries) / sum(x["shape"][0] * x["shape"][1] for x in entries)
    if case == "a mix of 2:4 and dense":
        assert {x["pattern"] for x in entries} == {"2:4"}  # of a part of the layers
        model, _ = load(zoo_folder("llava"))
        size = sum(x.weight.numel() for c in ("vision", "language") for x in anatomy(model).component(c))
        assert sum(x["zeros"] for x in entries) / size == pytest.approx(0.3, abs=0.005)  # whole layers of a tiny model
    else:
        assert got == pytest.approx(0.4 if case == "preset" else 0.5, abs=2e-4)
    recipe = yaml.safe_load((tmp_path / "sparse" / "recipe.yaml").read_text())["prune"]
    assert recipe["policy"] == {"preset": "ecoflap", "policy and tokens": "owl", "a mix of 2:4 and dense": "owl"}.get(
        case, "uniform"
    )
    assert run("verify", "sparse")[0] == 0


def test_what_is_missing_or_no_path_is_named(run, zoo_folder, scenes, tmp_path):
    model = zoo_folder("llava")
    code, _, said = run("eval", model)
    assert code == 2
    assert said == "sparsight: --data: is missing; give held-out samples\n"
    calls = {
        "out": lambda: api.prune(model, 5, data=scenes),
        "teacher": lambda: api.restore(model, "y", data=scenes, teacher=5),
        "held_out": lambda: api.search(model, "s", data=scenes, held_out=5),
        "recipe": lambda: api.run({"model": model}, "r"),
        "method": lambda: sparsight.save(model, "z", method=5),
    }
    for field, call in calls.items():
        with pytest.raises(SparsightError, match=rf"`{field}`: (int|dict) is no name; give a path or a name, as text"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_bad_models_and_folders(run, zoo_folder, scenes, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    llava = zoo_folder("llava")
    assert refused(run("prune", "empty", "out", "--data", scenes), "empty: no config.json")
    assert refused(run("prune", "./nowhere", "out", "--data", scenes), "./nowhere: no such folder")
    assert refused(run("inspect", "file"), "file: is a file")
    assert refused(run("prune", llava, "file", "--data", scenes), "file: is a file")
    assert refused(run("prune", llava, "out"), "--data", "needs calibration samples")
    assert refused(run("restore", llava, "out", "--data", scenes), "--teacher")
    assert refused(run("restore", llava, "out", "--data", scenes, "--teacher", llava), "holds no zeros")
    assert refused(run("verify", llava), "no sparsity.json", "--against")
    assert refused(run("eval", llava, "--data", scenes, "--predictions", "no/such/p.jsonl"), "--predictions")
    assert refused(run("nonsense"), "nonsense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_another_architecture_as_teacher(run, zoo_folder, scenes, tmp_path_factory, tmp_path):
    sparse = tmp_path_factory.mktemp("sparse") / "sparse"
    run("prune", zoo_folder("llava"), sparse, "--method", "magnitude", "--quiet")
    words = ("restore", sparse, "out", "--data", scenes, "--teacher", zoo_folder("gemma3"))
    assert refused(run(*words), "not the same architecture")
    assert list(tmp_path.iterdir()) == []


def test_bad_data(run, zoo_folder, scenes, tmp_path_factory, tmp_path):
    data = shutil.copytree(scenes, tmp_path_factory.mktemp("data") / "bad")
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace("2.png", "../2.png")
    lines[4] = "{broken"
    (data / "5.png").write_bytes(b"not a picture")
    zoo.images(1)[0].save(data / "7.png", "JPEG")
    (data / "7.png").write_bytes((data / "7.png").read_bytes()[:-200])  # cut short
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    prune = ("prune", zoo_folder("llava"), "out", "--data", data, "--sparsity", "0.5")
    assert refused(run("eval", zoo_folder("llava"), "--data", data), "metadata.jsonl:3:", "leaves the folder")
    assert refused(run(*prune), "metadata.jsonl:")
    assert list(tmp_path.iterdir()) == []
    code, out, _ = run(*prune, "--skip-bad")
    assert code == 0
    assert "Left out 4 broken samples" in out
    code, out, _ = run("eval", zoo_folder("llava"), "--data", data, "--skip-bad", "--max-new-tokens", 1)
    assert (code, "Left out 4 broken samples" in out) == (0, True)
    (data / "metadata.jsonl").write_text("")
    assert refused(run("eval", zoo_folder("llava"), "--data", data), "no samples")
    assert refused(run("eval", zoo_folder("llava"), "--data", "nowhere.jsonl"), "nowhere.jsonl")


def test_a_family_of_the_user_s_own_is_in_the_record(run, zoo_folder, scenes, tmp_path):
    own = "vision=model.vision_tower.encoder.layers,language=model.language_model.layers"
    words = ("prune", zoo_folder("llava"), "out", "--data", scenes, "--samples", 4, "--quiet")
    assert run(*words, "--family", own)[0] == 0
    assert run("verify", "out")[0] == 0
    restore = ("restore", "out", "again", "--data", scenes, "--steps", 1, "--batch-size", 2, "--quiet")
    assert run(*restore)[0] == 0
    for folder in ("out", "again"):
        assert json.loads((tmp_path / folder / "sparsity.json").read_text())["family"] == own
    assert refused(run("inspect", "out", "--family", "vision=model.nowhere"), "no module 'model.nowhere'", "found: --family")


def test_inspect_says_by_which_mark_a_part_was_found(run, zoo_folder):
    code, out, _ = run("inspect", zoo_folder("llava"))
    assert code == 0
    assert "'projector' in `multi_modal_projector`" in out
    facts = json.loads(run("inspect", zoo_folder("llava"), "--json")[1])
    marks = {mark["path"]: mark for mark in facts["found"]}
    assert marks["model.language_model.layers"]["component"] == "language"
    assert "'language'" in marks["model.language_model.layers"]["reason"]
    assert facts["missing"] == []
