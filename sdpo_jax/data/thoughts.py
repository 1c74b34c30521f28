"""Marks that models and their chat formats put around thoughts."""

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
    """What a model says after its thoughts; nothing where they do not end.

    Servers give them before the answer in one text, some without the mark that opens them.
    """
    said = _CLOSE.split(text)[-1]
    return "" if _OPEN.search(said) else said


def opened(text: str) -> str:
    """The mark of a thought that a text opens and does not close, or ""."""
    marks = [*_OPEN.finditer(_CLOSE.split(text)[-1])]
    return marks[-1][0] if marks else ""
