"""What an engine does to the interpreter while it lives, and what it leaves behind."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest

from nanovllm.engine.interpreter import SWITCH_INTERVAL_S, collect_all_again, keep_pauses_short
from tests.cpu.tiny import make_llm, write_model


def test_collections_do_not_look_at_what_was_loaded(tmp_path: Path) -> None:
    with make_llm(write_model(tmp_path), enable_two_gpu_pd=True):
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10
    assert gc.get_freeze_count() == 0


def test_what_is_left_of_an_engine_is_found_beside_another(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with make_llm(folder):
        second = make_llm(folder)
        model = weakref.ref(second.decode_runner.model)
        with make_llm(folder, overlap=False):
            pass
        assert gc.get_freeze_count() > 0, "it froze nothing"
        second.close()
        del second
        gc.collect()
        assert model() is None


@pytest.mark.parametrize("closed", [True, False])
def test_a_model_is_collected_after_its_engine(tmp_path: Path, closed: bool) -> None:
    llm = make_llm(write_model(tmp_path))
    parts = [weakref.ref(llm.decode_runner), weakref.ref(llm.decode_runner.model)]
    if closed:
        llm.close()
    del llm
    gc.collect()
    assert [part() for part in parts] == [None, None]


def test_the_switch_interval_is_only_made_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", asked.append)
    for interval in (0.005, 0.0001):
        monkeypatch.setattr(sys, "getswitchinterval", lambda interval=interval: interval)
        keep_pauses_short()
    collect_all_again()
    assert asked == [SWITCH_INTERVAL_S, 0.0001]
