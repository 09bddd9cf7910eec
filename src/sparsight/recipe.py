"""A recipe: one YAML file with the verbs' own keywords, changed by `key.sub=value`, checked before anything is read.

    model: Salesforce/instructblip-flan-t5-xl
    data: train.jsonl
    held_out: test.jsonl
    prune: {sparsity: 0.5, method: wanda}
    restore: {steps: 200, lr: 1e-3}
    evaluate: {max_new_tokens: 40}

A section holds the keywords of the verb of its name; what the whole run shares (`model`, `data`, `dtype`, ...) stands
outside, once. Relative paths are relative to the file; `demo:llava` is an embedded model,
`demo:train` and `demo:test` are scenes for it. Numbers are those of YAML 1.2: `1e-3` is one, and `2:4` is none.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsight.data import read as read_data
from sparsight.errors import SparsightError
from sparsight.plan.budget import nearest
from sparsight.settings import check_seed, check_whole

SHARED = ("model", "data", "held_out", "dtype", "device", "family", "skip_bad")
OWN = ("progress", "overwrite", "resume", "record")  # of a run, not of a recipe
PATHS = ("model", "data", "held_out")


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


def read(
    path: str | Path, changes: Sequence[str] = (), *, sections: Sequence[str], extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a recipe, apply `changes`, and check every name in it.

    `sections` are verbs whose keywords may stand in the section of their name, `extra` what else may stand at the top.

    **Raises** `SparsightError`, naming the key, for a file that is no recipe and for a name that nothing has.
    """
    recipe = _load(path)
    for change in changes:
        _change(recipe, change)
    for key in PATHS:
        recipe[key] = _embedded(key, recipe.get(key)) if recipe.get(key) is not None else None
    recipe = {key: value for key, value in recipe.items() if key not in PATHS or value is not None}
    top = (*SHARED, *sections, *extra)
    for key, value in recipe.items():
        if key not in top:
            raise SparsightError(f"{path}: unknown key {key!r}; {nearest(str(key), top)}")
        if key in sections:
            check_section(f"{path}: {key}", key, value)
    for key, value in recipe.items():
        if key in SHARED and not isinstance(value, bool if key == "skip_bad" else str) and value is not None:
            raise SparsightError(f"{path}: {key}: {value!r} is not {'true or false' if key == 'skip_bad' else 'a word'}")
    for key in ("model", "data"):
        if not isinstance(recipe.get(key), str):
            raise SparsightError(f"{path}: {key} is missing; add `{key}: ...` to the file, or {key}=... to the command")
    return recipe


def check_section(where: str, verb: str, value: Any) -> None:
    """Refuse keywords that the verb does not have; nothing at all is a section too."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise SparsightError(f"{where} is {value!r} and not a mapping, as in {verb}: {{seed: 0}}")
    allowed = keywords(verb)
    for key in value:
        if key not in allowed:
            raise SparsightError(f"{where}: unknown key {key!r}; {nearest(str(key), allowed)}")
        check_kind(f"{where}: {key}", verb, key, value[key])


def check_kind(where: str, verb: str, name: str, value: Any) -> None:
    """Refuse what is of no kind that the verb's keyword takes: yes and no, a word, a list of words."""
    from sparsight import verbs

    kind = str(inspect.signature(getattr(verbs, verb)).parameters[name].annotation)
    words = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
    if kind == "bool" and not isinstance(value, bool):
        raise SparsightError(f"{where}: {value!r} is neither true nor false")
    if (kind.startswith("str") or kind == "Any") and "Mapping" not in kind and "Sequence" not in kind:
        fits = value is None or isinstance(value, str)
    elif "Sequence[str]" in kind:
        fits = words or isinstance(value, str) or value is None
    elif kind.startswith(("int", "float")) and "str" not in kind:
        fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    else:
        fits = True
    if not fits:
        wanted = "a list of words" if "Sequence" in kind else "a number" if kind.startswith(("int", "float")) else "a word"
        raise SparsightError(f"{where}: {value!r} is not {wanted}")


def keywords(verb: str) -> tuple[str, ...]:
    """What a verb's section may hold."""
    from sparsight import verbs

    parameters = inspect.signature(getattr(verbs, verb)).parameters.values()
    given = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    taken = {*SHARED, *OWN, "teacher"} - {"held_out"}  # what a restoration holds out is not what is scored at the end
    return tuple(name for name in given if name not in taken)


def check_values(recipe: Mapping[str, Any]) -> None:
    """Refuse numbers and names of the sections that their verbs would refuse later, before anything is computed."""
    from sparsight.restore.run import check_keywords

    whole = {"prune": ("samples", "batch_size"), "evaluate": ("samples", "batch_size", "max_new_tokens", "beams")}
    for section, names in whole.items():
        for name in names:
            value = (recipe.get(section) or {}).get(name)
            check_whole(f"{section}.{name}", value, optional=True)
    for section in ("prune", "evaluate"):
        check_seed((recipe.get(section) or {}).get("seed", 0))
    if recipe.get("restore") is not None:
        check_keywords(recipe["restore"], recipe.get("device") or "cpu")
        if isinstance(held := recipe["restore"].get("held_out"), str):
            read_data(held, limit=1)


def told(folder: Path, name: str, kind: str) -> dict[str, Any] | None:
    """What earlier work of this kind wrote to the file `name` of its folder; None where nothing is there yet.

    **Raises** `SparsightError` for a folder that holds anything else, and for a file that is damaged.
    """
    if not folder.exists() or (folder.is_dir() and all(path.name == ".lock" for path in folder.iterdir())):
        return None
    path = folder / name
    if not path.is_file():
        raise SparsightError(f"{folder}: is no folder of a {kind}, so nothing is written there; give another")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SparsightError(f"{path}: is damaged ({error}); give another folder, or put back what it was") from error


def _load(path: str | Path) -> dict[str, Any]:
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SparsightError(f"{path}: cannot be read ({error.strerror}); give a recipe, a YAML file") from error
    except (ValueError, yaml.YAMLError) as error:
        raise SparsightError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise SparsightError(f"{path}: holds no `key: value` lines; give a recipe, such as those in recipes/")
    for key in PATHS:
        value = recipe.get(key)
        if isinstance(value, str) and (there := Path(path).parent / value).exists():
            recipe[key] = str(there)
    restore = recipe.get("restore")
    for key in ("held_out", "teacher_cache"):
        value = restore.get(key) if isinstance(restore, dict) else None
        if isinstance(value, str) and (there := Path(path).parent / value).exists():
            restore[key] = str(there)  # type: ignore[index]
    return recipe


def _embedded(key: str, value: Any) -> Any:
    """`demo:NAME` is an embedded model, or its scenes: those to learn from, and those to be tested on."""
    if not isinstance(value, str) or not value.startswith("demo:"):
        return value
    from sparsight.demo import MODELS
    from sparsight.demo.scenes import SETS, kept

    name = value.removeprefix("demo:")
    known = tuple(MODELS if key == "model" else SETS)
    if name not in known:
        raise SparsightError(f"{key}: there is no {value!r}; {nearest(name, known)}")
    return str(MODELS[name] if key == "model" else kept(name))


def _change(recipe: dict[str, Any], change: str) -> None:
    """Apply one `key.sub=value`; the value is read as YAML."""
    key, equals, text = change.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise SparsightError(f"{change!r} is not KEY=VALUE; write for example prune.sparsity=0.6")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SparsightError(f"{change!r}: the value is no YAML ({' '.join(str(error).split())})") from error
    place: Any = recipe
    for name in names[:-1]:
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise SparsightError(f"{change!r}: {name} holds a value and no keys of its own")
    place[names[-1]] = value
