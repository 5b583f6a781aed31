"""The metrics page: every name, the same numbers as `stats()`, and a server that stops with its engine."""

from __future__ import annotations

import gc
import json
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm import DEMO_MODEL, LLM, EngineDeadError, SamplingParams
from nanovllm.engine.prometheus import MODES, MetricsPage
from tests.cpu.test_green_ctx import FakeDriver
from tests.cpu.test_pipeline_start import OPTIONS, driver
from tests.cpu.tiny import make_llm, settle, write_config

__all__ = ["driver"]  # a fixture

LATENCIES = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
)
NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "back_pressure_seconds_total",
    "num_preemptions_total",
    "request_success_total",
    "errors_total",
    "num_prefilled_again_total",
    "prompt_tokens_total",
    "prompt_tokens_by_source_total",
    "generation_tokens_total",
    "kv_cache_usage_perc",
    "card_steps_total",
    "card_step_seconds_total",
    "mirrored_bytes_total",
    "copy_seconds_total",
    "copy_gigabytes_per_second",
    "copies_in_flight",
    "copy_retries_total",
    "pipeline_mode",
    "stage_latency_seconds",
    "sm_share",
    "sm_busy_fraction",
    "pipeline_rebalances_total",
    "fallbacks_total",
    *(f"{name}_{part}" for name in (*LATENCIES, "exposed_copy_seconds") for part in ("bucket", "count", "sum")),
}
TWO = {"enable_two_gpu_pd": True}
UNSEEN = {"num_requests_waiting", "prompt_tokens_total", "card_steps_total", "copy_gigabytes_per_second"}  # in others
DASHBOARD = json.loads((Path(__file__).parents[2] / "docs/grafana.json").read_text())


class Page(dict[tuple[str, ...], float]):
    """Values by name, without its prefix, and label values in the order of their labels' names."""

    def __init__(self, text: str) -> None:
        for family in text_string_to_metric_families(text):
            assert family.documentation
            for name, labels, value, *_ in family.samples:
                assert name.startswith("nanovllm:"), name
                key = (name.removeprefix("nanovllm:"), *(labels[label] for label in sorted(labels)))
                assert key not in self, f"{key} twice"
                self[key] = value

    @property
    def names(self) -> set[str]:
        return {name for name, *_ in self}


def scrape(url: str) -> Page:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return Page(reply.read().decode())


def page_of(stats: dict[str, Any]) -> Page:
    registry = CollectorRegistry()
    registry.register(MetricsPage(lambda: stats))
    return Page(generate_latest(registry).decode())


def run(llm: LLM) -> dict[str, Any]:
    """Three answers, and two of one prompt whose prefix is known by then."""
    llm.generate([[5 + i] * 70 for i in range(3)], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
    llm.generate([5] * 70, SamplingParams(max_tokens=1, n=2, ignore_eos=True), use_tqdm=False)
    settle(llm)
    return llm.stats()


@pytest.mark.parametrize("options", [{}, TWO, TWO | {"enable_decode_pipeline": True}, {"overlap": False}], ids=str)
def test_every_name_is_there_with_the_numbers_of_stats(options: dict[str, Any]) -> None:
    with LLM(DEMO_MODEL, device="cpu", num_kvcache_blocks=50, **options) as llm:
        stats, page = run(llm), scrape(llm.start_metrics_server().url)
    assert page.names == NAMES
    assert page["request_success_total", "length"] == 5
    assert page["prompt_tokens_total",] == 4 * 70
    assert page["prompt_tokens_by_source_total", "cached"] == stats["cached_tokens"] == 64
    assert page["prompt_tokens_by_source_total", "computed"] == 4 * 70 - 64
    assert page["generation_tokens_total",] == stats["sampled_tokens"] == 3 * 9 + 2
    assert page["time_to_first_token_seconds_count",] == 5
    assert page["time_to_first_token_seconds_bucket", "+Inf"] == 5
    assert page["inter_token_latency_seconds_count",] == 3 * 8
    assert page["inter_token_latency_seconds_sum",] == stats["requests"]["inter_token_ms"]["sum"] / 1e3
    cards = {key[1] for key in page if key[0] == "kv_cache_usage_perc"}
    assert cards == ({"0", "1"} if "enable_two_gpu_pd" in options else {"0"})
    assert page["card_steps_total", "0", "prefill"] == stats["card0"]["prefill_steps"] > 0
    assert page["card_step_seconds_total", max(cards), "decode"] == stats[f"card{max(cards)}"]["decode_seconds"] > 0
    if len(cards) == 2:
        route = stats["copies_by_route"]["0to1"]
        assert page["mirrored_bytes_total", "1", "0"] == route["copied_bytes"] > 0  # labels by name: dst, src
        rate = route["copied_bytes"] / route["copy_seconds"] / 1e9
        assert page["copy_gigabytes_per_second", "1", "0"] == pytest.approx(rate)
    asked = "enable_decode_pipeline" in options
    assert page["fallbacks_total", "pipeline"] == asked  # a CPU has no partitions
    assert page["fallbacks_total", "lending"] == 0
    assert page["fallbacks_total", "one_card"] == page["copy_retries_total",] == page["num_prefilled_again_total",] == 0
    assert {mode: page["pipeline_mode", mode] for mode in MODES} == {
        mode: mode == ("sequential" if asked else "disabled") for mode in MODES
    }


@pytest.fixture(scope="module")
def idle_stats() -> Iterator[dict[str, Any]]:
    with LLM(DEMO_MODEL, device="cpu", num_kvcache_blocks=50, enable_two_gpu_pd=True) as llm:
        yield run(llm)


def test_waiting_by_reason_adds_up(idle_stats: dict[str, Any]) -> None:
    queues = {"waiting": 1, "prefilling": 2, "copying": 4, "ready": 8, "decoding": 16, "evacuated": 32}
    for paused in (False, True):
        page = page_of(idle_stats | queues | {"prefill_paused": paused})
        assert page["num_requests_running",] == 2 + 16 and page["num_requests_waiting",] == 1 + 4 + 8 + 32
        found = {key[1]: value for key, value in page.items() if key[0] == "num_requests_waiting_by_reason"}
        waits = {"capacity": 1 - paused, "back_pressure": paused, "copy": 4, "slot": 8, "moved": 32}
        assert found == waits


def test_a_running_pipeline(idle_stats: dict[str, Any]) -> None:
    green = {"attention_sm_granted": 40, "ffn_sm_granted": 88, "idle_sms": 4, "switches": 3}
    busy = {"attention_busy_share": 0.7, "ffn_busy_share": 0.9}
    times = {"avg_attention_time_ms": 2.5, "avg_ffn_time_ms": 5.0}
    page = page_of(idle_stats | {"pipeline": {"mode_running": "auto", "fallbacks": 0, "green": green | busy, **times}})
    assert (page["sm_share", "attention"], page["sm_share", "ffn"]) == (40 / 132, 88 / 132)
    assert (page["sm_busy_fraction", "attention"], page["sm_busy_fraction", "ffn"]) == (0.7, 0.9)
    assert (page["stage_latency_seconds", "attention"], page["stage_latency_seconds", "ffn"]) == (0.0025, 0.005)
    assert page["pipeline_rebalances_total",] == 3 and page["pipeline_mode", "auto"] == 1


def test_sms_that_could_not_be_lent_are_a_fallback(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path), **TWO, lend_sms=(60, 72)) as llm:
        for lends in (True, False):
            llm.decode_runner.lends = lends
            assert page_of(llm.stats())["fallbacks_total", "lending"] == (not lends)


def test_a_split_of_an_engine(driver: FakeDriver) -> None:
    options: dict[str, Any] = OPTIONS | {"decode_pipeline": "static", "decode_attention_sm": 40}
    with LLM(DEMO_MODEL, **options) as llm:
        llm.generate([[5] * 30] * 4, SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
        page = scrape(llm.start_metrics_server().url)
    assert page.names == NAMES and page["pipeline_mode", "static"] == 1 and page["fallbacks_total", "pipeline"] == 0
    assert (page["sm_share", "attention"], page["sm_share", "ffn"]) == (40 / 132, 92 / 132)


def test_buckets_are_cumulative_and_bound_what_they_count(idle_stats: dict[str, Any]) -> None:
    histogram = idle_stats["requests"]["e2e_ms"]
    counts = [1] * len(histogram["counts"])
    ones = idle_stats | {"requests": idle_stats["requests"] | {"e2e_ms": histogram | {"counts": counts}}}
    found = [(key[1], value) for key, value in page_of(ones).items() if key[0] == "e2e_request_latency_seconds_bucket"]
    assert len(found) > 30 and found[-1] == ("+Inf", len(counts))
    for bound, value in found[:-1]:
        assert value == sum(upper_ms <= float(bound) * 1e3 * 1.0001 for upper_ms in histogram["upper"])


def test_the_server_listens_on_loopback_and_ends_with_its_engine(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path)) as llm:
        server = llm.start_metrics_server()
        assert server.host == "127.0.0.1" and server.url == f"http://127.0.0.1:{server.port}/metrics"
        assert server._server.server_address[0] == "127.0.0.1"
        with pytest.raises(ValueError, match=f"{server.url} is served already"):
            llm.start_metrics_server()
        assert scrape(server.url).names == NAMES
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url, timeout=10)
    server.close()  # again
    with pytest.raises(EngineDeadError):
        llm.start_metrics_server()


def test_a_closed_server_makes_room_for_another(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path)) as llm:
        first = llm.start_metrics_server()
        first.close()
        assert scrape(llm.start_metrics_server().url).names == NAMES


def test_two_engines_have_a_page_each(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    with make_llm(folder) as one, make_llm(folder) as other:
        urls = one.start_metrics_server().url, other.start_metrics_server().url
        one.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        assert [scrape(url)["generation_tokens_total",] for url in urls] == [3, 0]


def test_a_forgotten_engine_is_not_kept_by_its_page(tmp_path: Path) -> None:
    llm = make_llm(write_config(tmp_path))
    server, gone = llm.start_metrics_server(), weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None and not server.running


def test_a_page_may_be_asked_for_at_any_time(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path), **TWO) as llm:
        url, done, totals = llm.start_metrics_server().url, threading.Event(), []

        def read() -> None:
            while not done.is_set():
                totals.append(scrape(url)["generation_tokens_total",])

        reader = threading.Thread(target=read)
        reader.start()
        llm.generate([[1] * 40] * 30, SamplingParams(max_tokens=40, ignore_eos=True), use_tqdm=False)
        done.set()
        reader.join()
        assert totals == sorted(totals) and scrape(url)["generation_tokens_total",] == 1200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": -1}, "port=-1 must be an integer from 0"),
        ({"port": 65536}, "port=65536 must be an integer from 0"),
        ({"port": "9090"}, "port='9090' must be an integer"),
        ({"port": True}, "port=True must be an integer"),
        ({"host": ""}, "host='' must be an address"),
        ({"host": None}, "host=None must be an address"),
        ({"host": "203.0.113.1"}, "no metrics server at host='203.0.113.1', port=0: "),
    ],
)
def test_addresses_that_cannot_be_had(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with make_llm(write_config(tmp_path)) as llm:
        with pytest.raises(ValueError) as caught:
            llm.start_metrics_server(**arguments)
        assert message in str(caught.value)
        llm.start_metrics_server().close()  # nothing is left of it


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path)) as llm, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"no metrics server at host='127.0.0.1', port={port}: "):
            llm.start_metrics_server(port)


def test_without_prometheus_client_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "nanovllm.engine.prometheus")
    with make_llm(write_config(tmp_path)) as llm:
        with pytest.raises(RuntimeError, match=r"pip install 'nanovllm\[metrics\]'") as caught:
            llm.start_metrics_server()
        assert isinstance(caught.value.__cause__, ImportError) and llm.stats()["sampled_tokens"] == 0


def test_the_dashboard_asks_for_what_there_is(idle_stats: dict[str, Any]) -> None:
    registry = CollectorRegistry()
    registry.register(MetricsPage(lambda: idle_stats))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    labels = {sample.name: set(sample.labels) | {"instance"} for family in families for sample in family.samples}
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    queries = [(target["expr"], target["legendFormat"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries += [(variable["query"], "") for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    asked: set[str] = set()
    for expression, legend in queries:
        names = re.findall(r"nanovllm:\w+", expression)
        assert names and set(names) <= set(labels), f"{expression} asks for what is not there"
        asked |= {name.removeprefix("nanovllm:") for name in names}
        known = set.intersection(*(labels[name] for name in names))
        used = re.findall(r"by \((\w+)\)|\{(\w+)=~|\{\{(\w+)\}\}", expression + legend)
        assert {label for groups in used for label in groups if label} <= known, expression
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
        assert set(re.findall(r"\$(\w+)", expression)) <= {*variables, "__rate_interval"}
    unseen = {name for name in NAMES - asked if not name.endswith(("_bucket", "_sum", "_count"))}
    assert unseen == UNSEEN


def test_the_dashboard_has_room_for_its_panels() -> None:
    panels = DASHBOARD["panels"]
    cells = [
        (x, y)
        for box in (panel["gridPos"] for panel in panels)
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len({panel["id"] for panel in panels}) == len(panels) and len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24  # columns
