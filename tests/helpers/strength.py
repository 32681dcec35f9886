"""How many examples Hypothesis tries."""

from hypothesis import settings

FULL = 100
"""Percent of the examples that a test asks for."""

# A busy machine is no failure, hence no deadline.
settings.register_profile('full', max_examples=FULL, deadline=None)
settings.register_profile('fast', max_examples=FULL // 5, deadline=None)


def examples(number: int) -> settings:
    """So many with ``--full``, and a fifth of them without."""
    return settings(max_examples=number * settings().max_examples // FULL)
