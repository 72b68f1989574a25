"""Models of idle windows: that they are probabilities, follow their data, and say that age helps where it does."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi.placement import Learned, LogNormals, Window
from rfaas_mpi.placement.survival import DAINT, PROMETHEUS_FIB, PROMETHEUS_VAR, cohort_stretch

FITS = (PROMETHEUS_FIB, PROMETHEUS_VAR, DAINT)
LEARNED = Learned().observe([Window(float(age), cohort_size=size) for age in range(5, 400, 7) for size in (1, 3, 20)])
MODELS = (*FITS, Learned(), LEARNED)


def hazard(model, age: float, cohort: int = 1) -> float:
    return model.ends_within(age, 1.0, cohort)


@given(model=st.sampled_from(MODELS), age=st.floats(0, 1e7), some=st.floats(0, 1e6), more=st.floats(0, 1e6),
       cohort=st.integers(0, 100))
def test_the_risk_is_a_probability_and_grows_with_time(model, age, some, more, cohort):
    short, long = model.ends_within(age, some, cohort), model.ends_within(age, some + more, cohort)
    assert 0.0 <= short <= long + 1e-12 and long <= 1.0
    assert model.ends_within(age, 0.0, cohort) == pytest.approx(0.0, abs=1e-12)


@given(model=st.sampled_from(MODELS), age=st.floats(0, 7000), one=st.floats(0, 500), two=st.floats(0, 500))
def test_to_live_through_two_times_is_to_live_through_one_and_then_the_other(model, age, one, two):
    both = 1.0 - model.ends_within(age, one + two)
    assert both == pytest.approx((1 - model.ends_within(age, one)) * (1 - model.ends_within(age + one, two)), abs=1e-6)


@given(model=st.sampled_from(FITS), young=st.floats(0, 1e5), older=st.floats(0, 1e5), for_s=st.floats(0, 3600))
def test_an_older_window_is_not_riskier_where_the_hazard_falls(model, young, older, for_s):
    # The premise is checked, not assumed: the hazard of a mixture of log-normals has its ups, too.
    young, older = sorted((young, older))
    grid = [young + (older + for_s - young) * step / 200 for step in range(201)]
    hazards = [hazard(model, age) for age in grid]
    if all(after <= before + 1e-12 for before, after in pairwise(hazards)):
        assert model.ends_within(older, for_s) <= model.ends_within(young, for_s) + 1e-6


def test_the_hazard_of_the_published_traces_does_fall_after_the_first_minutes():
    for model in (PROMETHEUS_FIB, PROMETHEUS_VAR):
        risks = [model.ends_within(age, 60.0) for age in (60, 120, 300, 600, 1200)]
        assert risks == sorted(risks, reverse=True) and risks[0] > 1.5 * risks[-1]


def test_the_fits_have_the_medians_that_were_published():
    # Median idle times: 2 minutes on Prometheus, 5 minutes on Piz Daint.
    assert 60 < _median(PROMETHEUS_FIB) < 180 and 60 < _median(PROMETHEUS_VAR) < 180
    assert 270 < _median(DAINT) < 330


def _median(model: LogNormals) -> float:
    low, high = 0.0, 1e5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if model.survival(middle) > 0.5 else (low, middle)
    return low


def test_larger_cohorts_end_sooner_up_to_sixteen():
    stretches = [cohort_stretch(size) for size in (1, 2, 4, 8, 16)]
    assert stretches == sorted(stretches, reverse=True)
    assert cohort_stretch(16) == cohort_stretch(999) and cohort_stretch(0) == cohort_stretch(1)
    # 124 s are the median of all: of those alone 149 s, of those in large cohorts 62 s.
    assert 137 < 124 * stretches[0] < 161 and 31 < 124 * stretches[-1] < 93
    for model in MODELS:
        assert model.ends_within(30, 60, 16) > model.ends_within(30, 60, 1)


def test_an_age_beyond_every_window_ever_seen_is_no_error():
    for model in MODELS:
        assert 0 <= model.ends_within(1e12, 60.0) < 0.2
        assert model.ends_within(1e12, math.inf) == pytest.approx(1.0)


def test_what_was_learned_outweighs_the_prior_in_the_end():
    chance = random.Random(5)
    # Exponential windows of 1000 s, whatever the cohort: a constant hazard that the prior knows nothing of.
    windows = [Window(chance.expovariate(1 / 1000)) for _ in range(20_000)]
    model = Learned().observe(windows)
    for age in (0.0, 60.0, 500.0, 2000.0):
        assert model.ends_within(age, 100.0) == pytest.approx(1 - math.exp(-0.1), rel=0.1)
    assert Learned().ends_within(0.0, 100.0) > 0.3


def test_little_was_learned_from_little():
    before, after = Learned(), Learned().observe([Window(100.0)])
    assert after.ends_within(60, 60) == pytest.approx(before.ends_within(60, 60), rel=0.25)
    assert after != before


def test_an_unknown_cluster_is_taken_for_the_prior():
    for age in (0.0, 30.0, 60.0, 120.0, 300.0, 600.0):
        assert Learned().ends_within(age, 60.0) == pytest.approx(PROMETHEUS_FIB.ends_within(age, 60.0), abs=0.12)


def test_windows_that_are_still_open_count_as_survivors():
    open_ones = Learned().observe([Window(600.0, ended=False)] * 50)
    assert open_ones.ends_within(0, 300) < 0.5 * Learned().ends_within(0, 300)
    # What nobody saw of a window says nothing: seen from 300 s on, it tells only of later ages.
    late = Learned().observe([Window(600.0, ended=False, seen_from_s=300.0)] * 50)
    assert late.ends_within(0, 100) == Learned().ends_within(0, 100)
    assert late.ends_within(300, 100) < Learned().ends_within(300, 100)


def test_what_was_seen_long_ago_fades():
    old = Learned().observe([Window(600.0, ended=False)] * 50)
    faded = old.observe([], keep=0.0)
    assert faded.ends_within(0, 300) == Learned().ends_within(0, 300) > old.ends_within(0, 300)


@pytest.mark.parametrize("window", [Window(1.0, seen_from_s=2.0), Window(-1.0), Window(1.0, seen_from_s=-1.0)])
def test_a_window_that_ends_before_it_begins_is_refused(window):
    with pytest.raises(ValueError, match="ends before it begins"):
        Learned().observe([window])


@pytest.mark.parametrize("parts", [((0.5, 1.0, 1.0),), ((1.0, 0.0, 1.0),), ((1.0, 1.0, 0.0),), ()])
def test_a_mixture_that_is_none_is_refused(parts):
    with pytest.raises(ValueError):
        LogNormals(parts)
