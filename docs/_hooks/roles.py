"""MkDocs hook: turn the Sphinx roles of docstrings (``:func:`name```) into links.

A role becomes a link to the object where the site documents it, and plain code elsewhere.
"""

import re

_ROLE = re.compile(r":(?:func|class|mod|data|attr|meth|exc):(?:<code>|`)(~?)([\w.]+)(?:</code>|`)")


def on_page_content(html: str, **_: object) -> str:
    return _ROLE.sub(_link, html)


def _link(match: re.Match[str]) -> str:
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'
