"""VQA accuracy: the score of an answer grows with the number of people who gave it.

With ten people's answers, leave out each of them in turn and score min(matches among the other nine / 3, 1); the mean
of the ten is the accuracy (Antol et al., "VQA: Visual Question Answering", 2015). Texts are compared after a
normalisation of punctuation, number words, articles and contractions. Rules and tables are those of the official
evaluation, https://github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py.

Two differences, both without effect on the official data. The official code leaves people's answers as they are when
they all agree, and else strips only their punctuation, since they come already normalised; here both sides are always
normalised. And it always asks for three matches, which one to three answers can never give; here it is
min(3, answers - 1) matches, and a single answer is right or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
            "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_ARTICLES = {"a", "an", "the"}

# Right spellings of the first list, whose wrong ones lack the apostrophe; wrong:right pairs of all others.
_WITHOUT_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_OTHERS = """
couldn'tve:couldn't've couldnt've:couldn't've hadnt've:hadn't've hadn'tve:hadn't've hed've:he'd've he'dve:he'd've
itd've:it'd've it'dve:it'd've mightnt've:mightn't've mightn'tve:mightn't've ow's'at:'ow's'at 'ows'at:'ow's'at
'ow'sat:'ow's'at shed've:she'd've she'dve:she'd've shouldnt've:shouldn't've shouldn'tve:shouldn't've
somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've someoned've:someone'd've
someone'dve:someone'd've somethingd've:something'd've something'dve:something'd've thered've:there'd've
there'dve:there'd've theyd've:they'd've they'dve:they'd've wed've:we'd've we'dve:we'd've whod've:who'd've
who'dve:who'd've wouldnt've:wouldn't've wouldn'tve:wouldn't've yall'll:y'all'll y'allll:y'all'll
yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd've:you'd've you'dve:you'd've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITHOUT_APOSTROPHE.split()}
_CONTRACTIONS |= dict(pair.split(":") for pair in _OTHERS.split())

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # not a decimal point


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score a prediction against people's answers, in [0, 1]; an answer of two people is listed twice."""
    text = normalise(prediction)
    matches = [normalise(answer) == text for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    enough = min(3, len(matches) - 1)
    total = sum(matches)
    return sum(min((total - match) / enough, 1.0) for match in matches) / len(matches)


def normalise(text: str) -> str:
    """Return an answer in the form in which answers are compared."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    tight = bool(_COMMA_IN_NUMBER.search(text))
    spaced = text
    for mark in _PUNCTUATION:  # a mark beside a space goes, one between words parts them
        beside = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if beside or tight else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", spaced).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
