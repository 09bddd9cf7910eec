"""A recipe: one YAML file with the verbs' own settings, changed by `key.sub=value`, checked before anything is read.

    model: Salesforce/instructblip-flan-t5-xl
    data: train.jsonl
    held_out: test.jsonl
    prune: {sparsity: 0.5, method: wanda}
    restore: {steps: 200, lr: 1e-3}
    evaluate: {max_new_tokens: 40}

A section holds fields of the record of its verb; shared values (`model`, `data`, `dtype`, ...) are at the top, once.
Relative paths are relative to the file; `demo:llava` is an embedded model, `demo:train` and `demo:test` are scenes
for it. A recipe of the package goes by its name: `llava-1.5-7b`, `paper/instructblip-vicuna-7b`. Numbers are those of YAML
1.2: `1e-3` is one, and `2:4` is none. The `recipe.yaml` beside the weights of a model is a recipe, too; its sections may
also have `data`, a `teacher` and the `fingerprint` of the samples.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsight.checkpoint.lock import INSIDE
from sparsight.checkpoint.stages import stages_of
from sparsight.checks import nearest
from sparsight.errors import SparsightError, quote
from sparsight.files import read_json, with_home
from sparsight.options import Spec, options
from sparsight.shared_spec import SharedSpec
from sparsight.specs import SPECS

SHARED = tuple(options(SharedSpec))
SHIPPED = Path(__file__).parent / "recipes"
PATHS = ("model", "data", "held_out")
SECTIONS = ("prune", "restore", "evaluate")
LISTS = ("prune", "restore")  # these may be lists of sections, one after another
BESIDE = {"prune": ("data", "fingerprint"), "restore": ("data", "fingerprint", "teacher")}
KINDS: dict[str, Any] = {"skip_bad": (bool, "true or false"), "max_length": (int, "a whole number of at least 1")}
OUTSIDE = ("device", "family", "skip_bad")  # shared fields that no section has


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where 1e-3 is a word and 2:4 is 124."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def content(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a recipe with its `changes`, unchecked, and folders for `demo:` names.

    **Raises** `SparsightError` for a file that is no recipe, and for a demo name that cannot be used.
    """
    recipe = _load(path)
    for change in changes:
        _change(recipe, change)
    for key in PATHS:
        recipe[key] = embedded(key, recipe.get(key)) if recipe.get(key) is not None else None
    return recipe


def read(path: str | Path, changes: Sequence[str] = (), *, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe, apply `changes`, and check every name and value in it.

    `extra` are further keys that are allowed at the top.

    **Raises** `SparsightError`, naming the key, for a file that is no recipe, an unknown key, and a value that the verb
    would refuse.
    """
    recipe = content(path, changes)
    recipe = {key: value for key, value in recipe.items() if key not in PATHS or value is not None}
    recipe.pop("sparsight", None)  # the version that wrote it
    top = (*PATHS, *SHARED, *SECTIONS, *extra)
    for key, value in recipe.items():
        if key not in top:
            raise SparsightError(f"{path}: unknown key {key!r}; {nearest(str(key), top)}")
        if key in SPECS and value is not None:
            for section in stages_of(recipe, key) if key in LISTS else [value]:
                check_section(f"{path}: {key}", key, section)
        elif key in (*PATHS, *SHARED) and value is not None:
            kind, says = KINDS.get(key, (str, "a word"))
            if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 1)):
                raise SparsightError(f"{path}: {key}: {quote(value)} is not {says}")
    scored = recipe.get("evaluate", {}) is not None  # a recipe beside weights has `evaluate: null`, and may need no data
    for key in ("model", "data") if scored or recipe.get("search") is not None else ("model",):
        if not isinstance(recipe.get(key), str):
            raise SparsightError(f"{path}: {key} is missing; add `{key}: ...` to the file, or {key}=... to the command")
    return recipe


def check_section(where: str, verb: str, section: Any) -> None:
    """Refuse keys that a verb does not have, and values that its record does not take.

    **Raises** `SparsightError`, naming the key.
    """
    if not isinstance(section, Mapping):
        raise SparsightError(f"{where} is {quote(section)} and not a mapping, as in {verb}: {{seed: 0}}")
    allowed = (*(name for name in options(SPECS[verb]) if name not in OUTSIDE), *BESIDE.get(verb, ()))
    for key in section:
        if key not in allowed:
            raise SparsightError(f"{where}: unknown key {key!r}; {nearest(str(key), allowed)}")
    SPECS[verb].of({key: value for key, value in section.items() if key not in BESIDE.get(verb, ())}, where=verb)


def spec_of(recipe: Mapping[str, Any], verb: str, section: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """The record of a verb: what the recipe shares, its section, and `settings` on top.

    **Raises** `SparsightError`, naming the field as `verb.field`, for what the verb would refuse.
    """
    kind: type[Spec] = SPECS[verb]
    shared = {key: recipe[key] for key in SHARED if recipe.get(key) is not None}
    own = (recipe.get(verb) or {}) if section is None else section
    own = {key: value for key, value in own.items() if key not in BESIDE.get(verb, ())}
    return kind.of({**shared, **own, **settings}, where=verb)


def held_out_of(recipe: Mapping[str, Any], path: str | Path) -> str:
    """The samples to score on. **Raises** `SparsightError` where the recipe names none."""
    if not isinstance(recipe.get("held_out"), str):
        raise SparsightError(f"{path}: held_out is missing; name the samples to score on, which are not those of data")
    return recipe["held_out"]


def read_state(folder: Path, name: str, kind: str) -> dict[str, Any] | None:
    """Read the file `name` that earlier work of this kind wrote to its folder; None where nothing is there yet.

    **Raises** `SparsightError` for a folder that holds anything else, and for a file that is damaged.
    """
    if not folder.exists() or (folder.is_dir() and all(path.name == INSIDE for path in folder.iterdir())):
        return None
    path = folder / name
    if not path.is_file():
        raise SparsightError(f"{folder}: is no folder of a {kind}, so nothing is written there; give another")
    return read_json(path, "give another folder, or put back what it was")


@contextlib.contextmanager
def in_recipe(verb: str) -> Iterator[None]:
    """Let errors inside the block name the settings of a verb as keys of a recipe, and not as options of its command."""

    def key(match: re.Match) -> str:
        name, value = match[1], match[2] or ""
        own = name in options(SPECS[verb]) and name not in SHARED
        return f"`{verb}.{name}{value}`" if own else f"{name}{value}" if name in (*SHARED, *PATHS, "teacher") else match[0]

    try:
        yield
    except SparsightError as error:
        error.args = (re.sub(r"`(\w+)(=[^`]*)?`", key, str(error.args[0])), *error.args[1:])
        error.advice = "" if error.work else error.advice
        raise


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: the one that is named, or a recipe of the package by its name.

    **Raises** `SparsightError` for a name of neither.
    """
    if Path(path).exists() or Path(path).suffix in (".yaml", ".yml"):
        return Path(path)
    names = {str(file.relative_to(SHIPPED).with_suffix("")): file for file in sorted(SHIPPED.rglob("*.yaml"))}
    if str(path) not in names:
        raise SparsightError(f"{path}: is no file and no recipe of the package; {nearest(str(path), tuple(names))}")
    return names[str(path)]


def _load(path: str | Path) -> dict[str, Any]:
    path = find_recipe(path)
    try:
        recipe = with_home(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except OSError as error:
        raise SparsightError(f"{path}: cannot be read ({error.strerror}); give a recipe, a YAML file") from error
    except (ValueError, yaml.YAMLError) as error:
        raise SparsightError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise SparsightError(f"{path}: holds no `key: value` lines; give a recipe, or the name of one, as demo")
    _resolve(recipe, path.parent, (*PATHS, "images"))
    for verb in SECTIONS:
        for section in stages_of(recipe, verb):
            if isinstance(section, dict):
                _resolve(section, path.parent, ("data", "held_out", "images", "teacher", "teacher_cache"))
    return recipe


def _resolve(settings: dict[str, Any], folder: Path, keys: Sequence[str]) -> None:
    """Resolve, in place, paths that exist in the recipe's folder."""
    for key in keys:
        if isinstance(settings.get(key), str) and (there := folder / settings[key]).exists():
            settings[key] = str(there)


def embedded(key: str, value: Any) -> Any:
    """The folder of `demo:NAME`, an embedded model or its training or test scenes; any other value as it is.

    `key` is the name of the setting. **Raises** `SparsightError` for another name, and for scenes without scikit-learn.
    """
    if not isinstance(value, str) or not value.startswith("demo:"):
        return value
    from sparsight.demo import MODELS
    from sparsight.demo.scenes import SETS, scene_folder

    name, is_model = value.removeprefix("demo:"), key not in ("data", "held_out")
    names = tuple(MODELS if is_model else SETS)
    if name not in names:
        raise SparsightError(f"{key}: there is no {quote(value)}; {nearest(name, names)}")
    return str(MODELS[name] if is_model else scene_folder(name))


def _change(recipe: dict[str, Any], change: str) -> None:
    """Apply one `key.sub=value`; the value is read as YAML."""
    key, equals, text = change.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise SparsightError(f"{quote(change)} is not KEY=VALUE; write for example prune.sparsity=0.6")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SparsightError(f"{quote(change)}: the value is no YAML ({' '.join(str(error).split())})") from error
    place: Any = recipe
    for name in names[:-1]:
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise SparsightError(f"{quote(change)}: {name} holds a value and no keys of its own")
    place[names[-1]] = value
