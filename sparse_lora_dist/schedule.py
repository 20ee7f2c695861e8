"""step -> how much is kept: pure functions that methods share."""


def cubic_keep(step: int, *, begin: int, end: int, final: float) -> float:
    """Fraction kept at ``step``: 1 up to ``begin``, ``final`` from ``end`` on, cubic in between.

    keep = final + (1 - final) * (1 - (step - begin) / (end - begin))^3

    RoseLoRA, arXiv:2406.10777; the same curve as AdaLoRA's budget, arXiv:2303.10512.
    """
    if step <= begin:
        return 1.0
    if step >= end:
        return final
    left = 1.0 - (step - begin) / (end - begin)
    return final + (1.0 - final) * left**3
