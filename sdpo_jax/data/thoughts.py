"""Marks that reasoning models and their chat formats put around thoughts."""

import re

_WORD = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
_OPEN = re.compile(
    rf"<({_WORD})>|\[THINK\]|◁think▷|<\|(?:START_THINKING|begin_of_thought)\|>"
    r"|<\|channel\|>(?:analysis|commentary)",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"</{_WORD}>|\[/THINK\]|◁/think▷|<\|(?:END_THINKING|end_of_thought)\|>"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)


def after(text: str) -> str:
    """The answer after a model's thoughts, or "" if they do not end.

    Servers return both in one text, some without the opening mark.
    """
    answer = _CLOSE.split(text)[-1]
    return "" if _OPEN.search(answer) else answer


def opened(text: str) -> str:
    """The opening mark of a thought that a text does not close, or ""."""
    marks = [*_OPEN.finditer(_CLOSE.split(text)[-1])]
    return marks[-1][0] if marks else ""
