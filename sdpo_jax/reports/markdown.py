"""Escapes text from files and paths for Markdown."""

import re


def plain(text: object) -> str:
    """One line without tags, links, code, emphasis or cells; unprintable characters become "�".

    Underscores stay: inside names of files and keys they are not markup.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line)


def fenced(text: str) -> str:
    """A code block with a fence longer than any run of backticks in `text`."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
