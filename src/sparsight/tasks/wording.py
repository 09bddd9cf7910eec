"""How models of each type are asked, and how they write, as their papers and published evaluations have it.

Sources of the texts: LLaVA, docs/Evaluation.md, which lmms-eval has taken over as its default; LAVIS, projects/blip2/eval
and projects/instructblip; VLMEvalKit, vlm/qwen2_vl/prompt.py, vlm/qwen3_vl/prompt.py and vlm/smolvlm.py; the prefixes of
PaliGemma's model card. LAVIS ranks the options of a question, so its text for letters is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsight.data.sample import Sample, Wording
from sparsight.errors import SparsightError, quote

SHORT, LETTER, CAPTION, YES_NO = "short", "letter", "caption", "yes_no"  # what a question asks for

_QUESTION, _OPTIONS = "{question}", "{options}"
_QWEN = f"Question: {_QUESTION}\nOptions:\n{_OPTIONS}\nPlease select the correct answer from the options above."
_BLIP = {
    SHORT: f"Question: {_QUESTION} Short answer:",
    LETTER: f"Question: {_QUESTION} Options: {_OPTIONS} Answer:",
    CAPTION: "A short image caption.",
    YES_NO: f"Question: {_QUESTION} Short answer:",
}
_QWEN2 = {
    SHORT: f"{_QUESTION}\nPlease try to answer the question with short words or phrases if possible.",
    LETTER: _QWEN,
    YES_NO: f"{_QUESTION} Please answer yes or no.",
}
_QWEN3 = _QWEN2 | {SHORT: f"{_QUESTION}\nPlease answer concisely with short words or phrases when possible."}
_SMOLVLM = {
    SHORT: f"{_QUESTION}\nGive a very brief answer.",
    LETTER: f"Question: {_QUESTION}\nChoices:\n{_OPTIONS}\nAnswer with the letter.",
    YES_NO: f"{_QUESTION}\nGive a very brief answer.",
}
WORDS: dict[str, dict[str, str]] = {  # by model type; LLaVA's for every other
    "": {
        SHORT: f"{_QUESTION}\nAnswer the question using a single word or phrase.",
        LETTER: f"{_QUESTION}\n{_OPTIONS}\nAnswer with the option's letter from the given choices directly.",
        CAPTION: "Provide a one-sentence caption for the provided image.",
        YES_NO: f"{_QUESTION}\nAnswer the question using a single word or phrase.",
    },
    "instructblip": _BLIP,
    "blip-2": _BLIP | {CAPTION: "a photo of"},
    "paligemma": {
        SHORT: f"answer en {_QUESTION}",
        LETTER: f"answer en {_QUESTION}\n{_OPTIONS}",
        CAPTION: "caption en",
        YES_NO: f"answer en {_QUESTION}",
    },
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "smolvlm": _SMOLVLM,
    "idefics3": _SMOLVLM,
}


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: beams, the exponent of the length that a beam's score is divided by, the most tokens."""

    beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int = 16


_BEAMS = {SHORT: Decoding(5, -1.0, 10), LETTER: Decoding(5, -1.0, 10), CAPTION: Decoding(5, 1.0, 30)}
_GREEDY = {SHORT: Decoding(), LETTER: Decoding(), CAPTION: Decoding(max_new_tokens=64)}
DECODING: dict[str, dict[str, Decoding]] = {"": _GREEDY, "instructblip": _BEAMS, "blip-2": _BEAMS}


def decoding(asks: str, model_type: str) -> Decoding:
    """How a model of a type writes answers of a kind."""
    ways = DECODING.get(model_type, DECODING[""])
    return ways.get(asks, ways[SHORT])


def wording(asks: str, words: Mapping[str, str], prompt: str | None = None) -> Wording:
    """The wording of a kind of question by model type; a task's own `words`, and `prompt` for all types, come first."""
    if prompt is not None:
        return Wording({"": prompt})
    texts = {kind: own[asks] for kind, own in WORDS.items() if asks in own}
    return Wording({**texts, **words})


def check_prompt(prompt: str, asks: str) -> None:
    """Refuse a prompt of the user's that would lose the question or its options. **Raises** `SparsightError`."""
    fields = set(re.findall(r"\{\w*\}", prompt))
    needs = {CAPTION: set(), LETTER: {_QUESTION, _OPTIONS}}.get(asks, {_QUESTION})
    if not prompt.strip():
        raise SparsightError("`prompt`: is empty; write the text to ask in")
    if needs - fields:
        raise SparsightError(
            f"`prompt`: {quote(prompt)} lacks {' and '.join(sorted(needs - fields))}; without it the model cannot know "
            "what is asked"
        )
    if fields - needs:
        allowed = " and ".join(sorted(needs)) or "no field in braces, since a caption answers no question"
        raise SparsightError(f"`prompt`: there is no {sorted(fields - needs)[0]} here; write {allowed}")


def prompts_of(samples: Sequence[Sample], model_type: str) -> list[str]:
    """The texts that samples are asked in, each once, in their order."""
    return list(dict.fromkeys(sample.wording.text(model_type) for sample in samples if sample.wording is not None))
