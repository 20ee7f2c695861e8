"""Schedules: what fraction of the entries or how many components are kept at a step, and how a run
is split into stages.

A *stage* is a part of a run with its own learning-rate schedule.
"""

from bisect import bisect_left


def cubic_keep(step: int, *, begin: int, end: int, final: float) -> float:
    """Return the fraction of entries to keep at ``step``, in [final, 1].

    It is 1 up to step ``begin`` and ``final`` from step ``end`` on. In between:

        keep = final + (1 - final) * (1 - (step - begin) / (end - begin))^3

    Source: RoseLoRA, arXiv:2406.10777; the same curve as AdaLoRA's budget, arXiv:2303.10512.

    Args:
        step: Optimizer step.
        begin: Last step at which everything is kept.
        end: Step from which on the fraction is ``final``; above ``begin``.
        final: Fraction kept at the end, in [0, 1].
    """
    if step <= begin:
        return 1.0
    if step >= end:
        return final
    left = 1.0 - (step - begin) / (end - begin)
    return final + (1.0 - final) * left**3


def cubic_budget(step: int, *, begin: int, end: int, first: int, last: int) -> int:
    """Return the number of rank-1 components that all sites together keep at ``step``.

    It is ``first`` up to step ``begin`` and ``last`` from step ``end`` on. In between:

        budget = floor(last + (first - last) * (1 - (step - begin) / (end - begin))^3)

    Source: AdaLoRA, arXiv:2303.10512, equation 13.

    Args:
        step: Optimizer step.
        begin: Last step at which the budget is ``first``.
        end: Step from which on the budget is ``last``; above ``begin``.
        first: Number of components at the start.
        last: Number of components at the end, at most ``first``.
    """
    if step <= begin:
        return first
    if step >= end:
        return last
    left = 1.0 - (step - begin) / (end - begin)
    return int(last + (first - last) * left**3)


def equal_stages(total_steps: int, num_stages: int) -> tuple[int, ...]:
    """Split a run into ``num_stages`` stages whose lengths differ by at most 1 step.

    Args:
        total_steps: Optimizer steps of the run.
        num_stages: Number of stages.

    Returns:
        Last step of each stage, counted from 1.
    """
    return tuple(total_steps * (i + 1) // num_stages for i in range(num_stages))


def warmed_up_stages(
    total_steps: int, num_stages: int, *, warmup_steps: int, asked: str
) -> tuple[int, ...]:
    """Split a run into equal stages, each long enough for a warm-up of its own.

    Args:
        total_steps: Optimizer steps of the run.
        num_stages: Number of stages.
        warmup_steps: Warm-up steps of each stage.
        asked: Start of the error message: the option that sets the number of stages, and its value.

    Returns:
        Last step of each stage, counted from 1.

    Raises:
        ValueError: A stage would be shorter than the warm-up, or have no step.
    """
    most = total_steps // max(1, warmup_steps)
    if num_stages > most:
        raise ValueError(
            f"{asked}, which makes {num_stages} stages, but the run has {total_steps} steps and a "
            f"stage needs at least {max(1, warmup_steps)} (--warmup_steps is {warmup_steps}). At "
            f"most {most} stages fit"
        )
    return equal_stages(total_steps, num_stages)


def stage_at(step: int, stages: tuple[int, ...]) -> int:
    """Return the index of the stage that ``step`` lies in.

    Args:
        step: Optimizer step, counted from 1.
        stages: Last step of each stage, ascending.

    Returns:
        Index from 0. A step after the end of the run gives the last stage.
    """
    return min(bisect_left(stages, step), len(stages) - 1)
