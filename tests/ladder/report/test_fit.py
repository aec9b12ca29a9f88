"""Test the fit of losses with known truths: what it recovers, how wide its intervals are, and what it refuses."""

import math

import numpy as np
import pytest

from lrnn.ladder.report.fit import Points, fit

SIZES = {"15m": 15_420_000, "30m": 30_270_000, "60m": 61_580_000, "120m": 124_000_000}
BASE = ("delta", "positive")
OFFSETS = {BASE: 0.0, ("delta", "negative"): -0.012, ("hybrid", "positive"): -0.03, ("hybrid", "negative"): -0.03}
SHAPE = {"E": 1.6, "A": 480.0, "a": 0.4, "B": 11_000.0, "b": 0.45}


def loss(n, d, kind, shape=SHAPE):
    return shape["E"] + shape["A"] / n ** shape["a"] + shape["B"] / d ** shape["b"] + OFFSETS[kind]


def points(
    sizes=("15m", "30m", "60m"),
    ratios=(20,),
    seeds=(0, 1, 2),
    kinds=tuple(OFFSETS),
    noise=0.002,
    shared_noise=0.002,
    trial=0,
):
    """Return points whose seeds share part of their noise over kinds, as those of a ladder do."""
    rng = np.random.default_rng(trial)
    found = []
    for size in sizes:
        for ratio in ratios:
            n, d = SIZES[size], ratio * SIZES[size]
            shared = {seed: shared_noise * rng.normal() for seed in seeds}
            for kind in kinds:
                by_seed = {seed: loss(n, d, kind) + shared[seed] + noise * rng.normal() for seed in seeds}
                found.append(Points((size, d), kind, n, d, by_seed))
    return found


def holds(estimate, truth):
    return estimate.low <= truth <= estimate.high


def test_full_form_without_noise():
    """Nine places tell all five parameters apart, and the prediction is the truth."""
    found = fit(points(tuple(SIZES), (5, 20, 80), noise=1e-9, shared_noise=1e-9), BASE, resamples=5)
    assert found.form == "full" and found.why == ""
    for name, value in SHAPE.items():
        assert found.shape[name].value == pytest.approx(value, rel=0.02), name
    for kind, offset in OFFSETS.items():
        if kind != BASE:
            assert found.offsets[kind].value == pytest.approx(offset, abs=1e-6)
    assert found.between_ranges["delta"].value == pytest.approx(-0.012, abs=1e-6)
    assert found.between_ranges["hybrid"].value == pytest.approx(0, abs=1e-6)
    kind = ("delta", "negative")
    assert found.predict(kind, 1.3e9, 1e11).value == pytest.approx(loss(1.3e9, 1e11, kind), abs=2e-3)
    assert found.freedom == 4 * 3 * 4 - 5 - 3


def test_full_form_with_noise():
    """With the noise of seeds, the truth lies in the intervals."""
    found = fit(points(tuple(SIZES), (5, 20, 80)), BASE, resamples=60)
    for name in ("E", "a", "b"):
        assert holds(found.shape[name], SHAPE[name]), name
    kind = ("delta", "negative")
    assert holds(found.predict(kind, 1.3e9, 1e11), loss(1.3e9, 1e11, kind))
    assert holds(found.between_ranges["delta"], -0.012)
    assert 0.0005 < found.residual < 0.003


def test_one_ratio_is_fitted_along_its_path():
    """With D = 20 N, parameters and tokens are one variable. Both exponents are 0.4 here, so that there is a truth."""
    shape = SHAPE | {"b": 0.4}
    along = [
        Points(
            p.level, p.kind, p.parameters, p.tokens, {s: loss(p.parameters, p.tokens, p.kind, shape) for s in (0, 1)}
        )
        for p in points(noise=0, shared_noise=0)
    ]
    found = fit(along, BASE, resamples=5)
    assert found.form == "path" and found.predict is None
    assert "20 tokens per parameter" in found.why
    assert set(found.shape) == {"E", "A", "a"}
    assert found.shape["a"].value == pytest.approx(0.4, abs=1e-3)
    assert found.shape["A"].value == pytest.approx(480 + 11_000 / 20**0.4, rel=0.01)
    assert found.shape["E"].value == pytest.approx(1.6, abs=1e-3)


@pytest.mark.parametrize(
    "given, why",
    [
        (points(("15m", "30m")), "three sizes, and there are 2"),
        (points(("15m", "30m", "60m"), kinds=(BASE,))[:2] + points(("60m",), (40,), kinds=(BASE,)), "pairs of size"),
    ],
)
def test_fewer_places_have_levels_alone(given, why):
    found = fit(given, BASE, resamples=5)
    assert found.form == "levels" and why in found.why
    assert found.shape == {} and found.predict is None


def test_what_cannot_be_fitted():
    """One place has nothing to fit; an arm that shares no size with others has an offset that nothing shows."""
    assert "nothing to fit" in fit(points(("15m",)), BASE)
    apart = points(("15m", "30m"), kinds=(BASE,)) + points(("60m",), kinds=(("hybrid", "negative"),))
    assert "share no size" in fit(apart, BASE)


def test_losses_without_a_slope_are_not_determined():
    """Where losses do not fall with size, there is no exponent, and none is reported as if there were."""
    flat = [Points(p.level, p.kind, p.parameters, p.tokens, {0: 3.0, 1: 3.001}) for p in points()]
    found = fit(flat, BASE, resamples=5)
    assert found.form == "path" and not found.shape["a"].determined


def test_single_seeds_have_no_interval():
    found = fit(points(seeds=(0,)), BASE)
    assert all(math.isnan(e.low) and math.isnan(e.high) for e in [*found.offsets.values(), *found.shape.values()])


def test_a_size_with_one_seed_borrows_the_noise_of_others():
    """Its loss is as unsure as that of any single run, so the exponent is less sure than with three seeds there."""

    def width(given):
        exponent = fit(given, BASE, resamples=50).shape["a"]
        return exponent.high - exponent.low

    widths = []
    for trial in range(4):
        three = points(trial=trial)
        one = [
            Points(p.level, p.kind, p.parameters, p.tokens, {0: p.by_seed[0]}) if p.level[0] == "30m" else p
            for p in three
        ]
        widths.append((width(one), width(three)))
    wide, narrow = np.mean(widths, axis=0)
    assert wide > 1.2 * narrow


def test_a_single_seed_borrows_pairs():
    """Noise that all kinds of a seed share is not in the offset, even where sizes with one seed borrow it."""
    three = points(noise=0.0003, shared_noise=0.006)
    one = [
        Points(p.level, p.kind, p.parameters, p.tokens, {0: p.by_seed[0]}) if p.level[0] == "30m" else p for p in three
    ]
    offset = fit(one, BASE, resamples=50).between_ranges["delta"]
    assert holds(offset, -0.012) and offset.high - offset.low < 0.0012


def test_a_spoilt_run_does_not_bend_the_shape():
    """One point of four that is 0.5 nats off moves the offset of its kind by less than 0.01, not by a quarter of it."""
    given = points(tuple(SIZES), noise=0, shared_noise=0)
    spoilt = given[5]
    given[5] = Points(spoilt.level, spoilt.kind, spoilt.parameters, spoilt.tokens, {0: spoilt.by_seed[0] + 0.5})
    assert spoilt.kind == ("delta", "negative")
    found = fit(given, BASE, resamples=1)
    assert found.offsets["delta", "negative"].value == pytest.approx(-0.012, abs=0.01)
    assert found.offsets["hybrid", "negative"].value == pytest.approx(-0.03, abs=1e-4)


def test_coverage_of_offsets():
    """The interval of the offset between ranges holds the truth about as often as it says.

    Without the factor of Student's quantile, it does so in 85% of trials.
    """
    trials = 150
    offsets = [fit(points(("15m", "30m"), trial=i), BASE, resamples=80).between_ranges["delta"] for i in range(trials)]
    assert 0.88 < np.mean([holds(offset, -0.012) for offset in offsets]) <= 0.99
