"""How long passes take, from a clock that the test holds."""

from __future__ import annotations

from megatron_prune.pruning.forecast import Forecast
from megatron_prune.runtime.reporting import log, progress_bar, watched


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_second_layer_tells_of_the_whole_and_of_what_follows():
    clock, said = Clock(), []
    forecast = Forecast({"measuring": 100.0, "re-fitting": 450.0}, 10, said.append, clock)
    forecast("measuring", 0, 1000)
    for at, done in ((9.0, 99), (10.0, 100), (15.0, 199)):  # what is done once, and less than a second layer
        clock.now = at
        forecast("measuring", done, 1000)
    assert not said
    clock.now = 16.0
    forecast("measuring", 200, 1000)
    clock.now = 60.0
    forecast("measuring", 1000, 1000)
    assert said == ["measuring: about 1 min 04 s in all, by how it begins; at its rate about 4 min 48 s for re-fitting"]
    forecast("re-fitting", 0, 50)
    for at, done in ((61.0, 5), (91.0, 10)):  # the first layer is counted before it is fitted
        clock.now = at
        forecast("re-fitting", done, 50)
    assert said[1:] == ["re-fitting: about 4 min 31 s in all, by how it begins"]


def test_sampling_says_nothing_of_other_passes_and_other_work_is_left_alone():
    clock, said = Clock(), []
    forecast = Forecast({"measuring": 5.0, "sampling": 1.0}, 2, said.append, clock)
    for label in ("measuring", "sampling", "scoring"):
        for done in (0, 5, 10):
            forecast(label, done, 10)
            clock.now += 3.0
    assert said == ["measuring: about 6.0 s in all, by how it begins", "sampling: about 6.0 s in all, by how it begins"]


def test_progress_that_is_shown_is_watched():
    seen = []
    with log_at_info(), watched(lambda *told: seen.append(told)):
        for shown in (True, False):
            with progress_bar("work", 10, shown=shown) as advance:
                advance(4)
                advance(6)
    with log_at_info(), progress_bar("work", 10, shown=True) as advance:
        advance(10)
    assert seen == [("work", 0, 10), ("work", 4, 10), ("work", 10, 10)]


class log_at_info:
    def __enter__(self) -> None:
        self.level = log.level
        log.setLevel("INFO")

    def __exit__(self, *_: object) -> None:
        log.setLevel(self.level)
