"""Verbs that look at models and write nothing: one question, and the difference of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from sparsight.arguments import places
from sparsight.errors import LINE, SparsightError
from sparsight.files import is_there
from sparsight.options import Argument
from sparsight.specs import EvaluateSpec

AnyModel = Annotated[Any, Argument("Folder of a model, or a hub name.", required=True)]
Other = Annotated[Any, Argument("Folder of another model, as the dense one.", required=True)]


def ask(
    model: AnyModel,
    image: Annotated[Any, Argument("Picture to ask about.", required=True)],
    question: Annotated[str, Argument("The question.", required=True)],
    *,
    against: Annotated[Any, "Another model, as the dense one, to answer the same."] = None,
    processor: Any = None,
    max_new_tokens: Annotated[int, "Longest answer, in tokens."] = 64,
    beams: Annotated[int, "Beams; 1 is greedy."] = 1,
    dtype: Annotated[str, "float32, bfloat16, float16 or auto, the dtype that is stored."] = "auto",
    device: Annotated[str, "cpu, cuda, cuda:N, or auto: spread over the GPUs."] = "cpu",
) -> dict[str, Any]:
    """Ask MODEL one question about a picture, and another model beside it.

    Either may be a folder, a hub name or a model in memory with its `processor`. The question is asked as it stands.
    Returns {"question", "answers": [{"model", "answer", "seconds"}]}.

    **Raises** `SparsightError`, one line, for a picture, a model or a setting that cannot be used.
    """
    if not question.strip():
        raise SparsightError("`question`: is empty; ask something")
    if isinstance(image, str | Path) and not (is_there(image) and Path(image).is_file()):  # before torch is imported
        raise SparsightError(f"`image`: {str(image)[:LINE]} is no file; give a picture")
    model, against = places(model=model, against=against)
    spec = EvaluateSpec(max_new_tokens=max_new_tokens, beams=beams, dtype=dtype, device=device)
    from sparsight.evaluation.ask import answer

    models = [model] if against is None else [model, against]
    return {"question": question, "answers": [answer(each, image, question, spec, processor) for each in models]}


def diff(
    a: AnyModel, b: Other, *, family: Annotated[str | None, "Where an unknown model type keeps its blocks."] = None
) -> dict[str, Any]:
    """Compare the zeros and the kept weights of two models, A and B, per component, block and layer.

    Overlap is the zeros of both over the zeros of either. Drift is the distance of the weights that both keep, relative to
    those of A. Both models are in memory at once. Returns {"components", "blocks", "layers"} with the counts of zeros.

    **Raises** `SparsightError` for models of other layers.
    """
    a, b = places(model=a, against=b)
    from sparsight.checkpoint.diff import diff

    return diff(a, b, family=family)
