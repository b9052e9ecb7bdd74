"""How far an accuracy may be off because so few images were classified."""

from collections.abc import Sequence

from mae.report.members import Member, Sweep, lower_is_better

CONFIDENCE = 0.95
SEEDS_SENTENCE = "Another seed may differ by more: sweep seed=0,1,2 too."


def interval(percent: float, images: int) -> tuple[float, float]:
    """Wilson's interval of 95 % around an accuracy, both in percent (Wilson, 1927; Brown, Cai and DasGupta, 2001)."""
    from scipy.stats import binomtest  # half a second to import

    limits = binomtest(round(percent / 100 * images), images).proportion_ci(CONFIDENCE, method="wilson")
    return 100 * float(limits.low), 100 * float(limits.high)


def rivals(sweep: Sweep) -> list[Member]:
    """The finished members whose main result lies within the best one's interval.

    Empty where the result is no accuracy of a known number of images, or where several seeds say more.
    """
    best, metric = sweep.best, sweep.metric
    if best is None or metric is None or metric not in best.images or lower_is_better(metric) or "seed" in sweep.keys:
        return []
    low, _ = interval(best.results[metric], best.images[metric])
    return [member for member in sweep.finished(metric) if member is not best and member.results[metric] >= low]


def verdict(sweep: Sweep) -> str | None:
    """Whether the best member stands out, in a sentence or two; None where no interval is known, or of one member."""
    best, metric = sweep.best, sweep.metric
    if best is None or metric is None or metric not in best.images or lower_is_better(metric) or "seed" in sweep.keys:
        return None
    if len(sweep.finished(metric)) < 2:
        return None
    images = best.images[metric]
    low, high = interval(best.results[metric], images)
    limits = f"interval of {images:,} images ({low:.1f} to {high:.1f} %)"
    classes = best.cfg.data.num_classes
    if classes and low <= 100 / classes:
        return (
            f"No member has learned: {best.name} is best, and {100 / classes:.3g} %, what guessing among {classes} "
            f"classes gives, lies within its {limits}. Train longer before you compare."
        )
    members = rivals(sweep)
    equal = [member.name for member in members if member.results[metric] == best.results[metric]]
    others = [member.name for member in members if member.name not in equal]
    verb, whose = ("are", "their") if equal else ("is", "its")
    near = f"{enumerated(others)} lie{'s' * (len(others) == 1)}" if others else "no other member lies"
    return f"{enumerated([best.name, *equal])} {verb} best; {near} within {whose} {limits}. {SEEDS_SENTENCE}"


def enumerated(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
