"""How far an accuracy may be off because so few images were classified."""

from mae.report.members import Member, Sweep, lower_is_better

CONFIDENCE = 0.95


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
    finished = [m for m in sweep.members if m.record.state == "finished" and metric in m.results and m is not best]
    return [member for member in finished if member.results[metric] >= low]


def verdict(sweep: Sweep) -> str | None:
    """Whether the best member stands out: a sentence, or None where no interval is known."""
    best, metric = sweep.best, sweep.metric
    if best is None or metric is None or metric not in best.images or lower_is_better(metric) or "seed" in sweep.keys:
        return None
    images = best.images[metric]
    low, high = interval(best.results[metric], images)
    limits = f"interval of {images:,} images ({low:.1f} to {high:.1f} %)"
    names = [member.name for member in rivals(sweep)]
    if not names:
        return f"{best.name} is best; no other member lies within its {limits}."
    several = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"{best.name} is best; {several} lie{'s' * (len(names) == 1)} within its {limits}."
