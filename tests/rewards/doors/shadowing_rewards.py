"""A module that gives a builtin's name another meaning, and a name that another module has as well."""

from foreign_rewards import aliased


def sum(numbers):
    """No sum at all."""
    return -1.0


def shadowed(completions, **kwargs):
    return [sum([1, 2]) for _ in completions]


def parsed(text):
    return text


def two_meanings(completions, **kwargs):
    return [parsed(number) for number in aliased(completions)]


def imports_a_file(completions, **kwargs):
    from foreign_rewards import tag_shares

    return tag_shares(completions)
