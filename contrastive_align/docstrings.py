"""What a docstring says of each option, for the command line's help."""

import re


def option_texts(docstring: str) -> dict[str, str]:
    """Return what the ``Args`` of a class's docstring say of each option.

    >>> option_texts('''A config.
    ...
    ...     Args:
    ...         beta (`float`, defaults to `0.1`):
    ...             Of the implied
    ...             reward.
    ... ''')
    {'beta': 'Of the implied reward.'}
    """
    entries = re.findall(r"^ {8}(\w+(?:,\s+\w+)*)(?: \(.*\))?:\n((?: {12}.*\n)+)", docstring, re.MULTILINE)
    texts: dict[str, str] = {}
    for names, text in entries:
        texts |= dict.fromkeys(re.split(r",\s+", names), " ".join(re.sub(r":\w+:`~?|`", "", text).split()))
    return texts
