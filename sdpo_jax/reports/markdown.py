"""Text from files and paths within Markdown, shown as it is whatever marks it holds."""

import re


def plain(text: object) -> str:
    """One line that makes no tag, link, code, emphasis or cell; what is not printable is "�".

    An underscore is left: within the names of files and keys it marks nothing.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line)


def fenced(text: str) -> str:
    """A block of code, its fence longer than any run of backticks in `text`."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
