"""The records that the settings of the verbs have in common."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from sparsight.checks import check_paths
from sparsight.options import Option, Spec, count


@dataclass(frozen=True, kw_only=True)
class FamilySpec(Spec):
    """Where the blocks of an unknown model are."""

    verb: ClassVar[str] = "inspect"

    family: Annotated[
        str | None, Option("Where an unknown model type keeps its blocks: vision=PATH,language=PATH.", cost=True)
    ] = None


@dataclass(frozen=True, kw_only=True)
class SharedSpec(FamilySpec):
    """The settings that a recipe shares between its verbs."""

    lowered: ClassVar[tuple[str, ...]] = ("batch_size",)  # what needs memory

    dtype: Annotated[
        str, Option("One of {names}; auto is the dtype that is stored.", ("sparsight.model.load:DTYPES",), cost=True)
    ] = "auto"
    device: Annotated[
        str,
        Option(
            "cpu, cuda, cuda:N, or auto: the GPUs that there are, over which a model to restore or to score is spread.",
            work=False,
        ),
    ] = "cpu"
    skip_bad: Annotated[bool, Option("Leave broken samples out, and count them.", cost=True, work=False)] = False
    images: Annotated[
        Any, Option("Folder that images may lie in, too; absolute paths must lie below it.", cost=True, work=False)
    ] = None
    max_length: Annotated[
        int | None, count("Most tokens of a sample, images included. [default: those that the model takes]", work=None)
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_paths(images=self.images)

    @property
    def less_memory(self) -> tuple[str, bool]:
        """What to do where memory runs out, and whether interrupted work can go on with it."""
        lower = [f"`{name}` (it is {n})" for name in self.lowered if (n := getattr(self, name)) is not None and n > 1]
        parts = [f"lower {' or '.join(lower)}"] if lower else []
        parts += ["use `dtype=bfloat16`"] if self.dtype not in ("bfloat16", "float16") else []
        return ", ".join([*parts, "or leave long samples out by `max_length` with `skip_bad`"]), False
