"""Is it still learning? The answer on curves whose answer is known."""

import math

import pytest

from mae.report.trend import fitted, still_learning


def curve(value, count=200, lr=lambda share: 1e-3, key="loss"):
    """Lines of metrics of a run of `count` log points; `value` and `lr` are functions of the share done."""
    return [{"step": 10 * (k + 1), key: value((k + 1) / count), "lr": lr((k + 1) / count)} for k in range(count)]


def cosine(share: float) -> float:
    return 5e-4 * (1 + math.cos(math.pi * share))


def noise(share: float, size: float) -> float:
    return size * math.sin(1e6 * share * share)


def test_a_loss_that_falls_is_extrapolated_by_its_slope():
    text = still_learning(curve(lambda share: 1 - 0.5 * share + noise(share, 0.001)))
    assert text.startswith("Yes: over the last tenth of the run the training loss falls by 0.05 (10 %)")
    assert "at this slope would bring it down by 0.05 more, to 0.45" in text and "expect less" in text


def test_no_loss_is_extrapolated_below_zero():
    answer = still_learning(curve(lambda share: 1.0 if share < 0.9 else 1.0 - 9.9 * (share - 0.9)))
    assert "which no loss does: the curve must flatten." in answer and "-0" not in answer
    assert still_learning(curve(lambda share: 0.0)).startswith("No: over the last tenth")


def test_a_flat_loss_is_no():
    text = still_learning(curve(lambda share: 0.5 + noise(share, 0.0005)))
    assert text == "No: over the last tenth of the run the training loss changes by less than 0.5 %."


def test_a_rising_loss_is_no():
    assert still_learning(curve(lambda share: 0.5 + 0.2 * share)).startswith(
        "No: over the last tenth of the run the training loss rises by 0.02 (2.9 %)."
    )


def test_noise_hides_a_slope():
    text = still_learning(curve(lambda share: 0.5 - 0.01 * share + noise(share, 0.1)))
    assert text.startswith("Cannot tell: over the last tenth") and "its noise alone can do that" in text


def test_too_few_points_are_said_with_the_keys_that_give_more():
    text = still_learning(curve(lambda share: 1 - share / 2, count=20))
    assert text.startswith("Cannot tell: the last tenth of the run has 0 points of the validation loss and 3")
    assert "task.eval_every_epochs or task.log_every_steps" in text
    assert still_learning([{"step": 4, "val/knn_20": 3.0}]) == ""


@pytest.mark.parametrize("falls", [0.0, 0.5])
def test_a_rate_that_has_decayed_is_no_proof(falls):
    text = still_learning(curve(lambda share: 1 - falls * share, lr=cosine))
    assert text.startswith("Yes:" if falls else "Cannot tell: the training loss is flat")
    assert (
        "the learning rate has decayed to 0.84 % of its peak" in text
        and "A run of more task.epochs would show it." in text
    )


def test_validation_counts_where_it_has_enough_points():
    training = curve(lambda share: 0.5 + noise(share, 0.1))
    validation = curve(lambda share: 1 - 0.5 * share, count=200, key="val/loss")
    assert "the validation loss falls" in still_learning([*training, *validation])
    assert "Cannot tell" in still_learning([*training, *validation[19::20]])


def test_the_line_is_least_squares():
    line = fitted([0, 1, 2, 3], [1, 3, 2, 4])
    assert line.change == pytest.approx(2.4) and line.level == pytest.approx(3.7)
    assert line.error == pytest.approx(3 * math.sqrt(1.8 / 2 / 5))  # as scipy.stats.linregress gives
