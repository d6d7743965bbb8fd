import jax.numpy as jnp

from mae_jax.runtime.timing import STEPS_BEFORE, Profiler


def traced_steps(tmp_path, monkeypatch, *, steps, start, end):
    """The steps of a run that lie between the trace's beginning and its end."""
    events = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: events.append("stop"))
    profiler = Profiler(tmp_path, steps, start)
    for step in range(start, end):
        profiler.before_step(step, jnp.ones(2))
        events.append(step)
    profiler.close()
    if "start" not in events:
        assert "stop" not in events
        return []
    assert events.count("start") == events.count("stop") == 1
    return events[events.index("start") + 1 : events.index("stop")]


def test_exactly_the_steps_asked_for_are_traced_after_the_first_ones(tmp_path, monkeypatch):
    assert traced_steps(tmp_path, monkeypatch, steps=2, start=10, end=30) == [10 + STEPS_BEFORE, 11 + STEPS_BEFORE]


def test_a_run_that_ends_before_has_what_there_was_and_a_run_without_profile_nothing(tmp_path, monkeypatch):
    assert traced_steps(tmp_path, monkeypatch, steps=9, start=0, end=STEPS_BEFORE + 2) == [3, 4]
    assert traced_steps(tmp_path, monkeypatch, steps=9, start=0, end=1) == []
    assert traced_steps(tmp_path, monkeypatch, steps=0, start=0, end=9) == []


def test_the_trace_is_written(tmp_path):
    profiler = Profiler(tmp_path, 1, 0)
    for step in range(STEPS_BEFORE + 2):
        profiler.before_step(step, jnp.ones(2))
    assert list(tmp_path.rglob("*.xplane.pb"))
