"""Checks of numbers that moves and samplers are given."""

from __future__ import annotations

from mdgraft._errors import InvalidInputError


def checked_count(name: str, value: int, least: int = 1) -> int:
    """An integer of at least so many; anything else raises `InvalidInputError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name}: got {value!r}, wanted an integer of at least {least}")
    return value


def checked_trajectory(n_steps: int, jitter: float) -> tuple[int, float]:
    """Steps of a trajectory, and the fraction by which its time step varies."""
    if not 0.0 <= jitter < 1.0:
        raise InvalidInputError(f"jitter: got {jitter!r}, wanted a fraction of the time step")
    return checked_count("n_steps", n_steps), float(jitter)
