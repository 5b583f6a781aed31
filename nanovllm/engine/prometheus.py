"""`LLM.stats()` as a Prometheus page, and the server that shows it. Needs prometheus-client, an optional extra.

Nothing is counted here: a page is made of one `stats()` when it is asked for. Names are vLLM's, under `nanovllm:`,
where it has one for the same thing. What it calls a request is one answer here: a request of n answers counts n times.
Labels have few values, none of which comes from a caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nanovllm.shown import shortened, shown

Stats = Mapping[str, Any]
Values = Mapping[Any, float]  # by the label's value, or a tuple of them

PREFIX = "nanovllm:"
# Of the histograms' buckets, which of them are shown: each 1.43 of the last, 95 µs to 103 s.
BOUNDS = range(230, 933, 18)
WAITING = {"copying": "copy", "ready": "slot", "evacuated": "moved"}  # queues of `stats()`, and why they wait
STEP_KINDS = ("prefill", "decode", "mixed")
STAGES = ("attention", "ffn")  # StageA and StageF
MODES = ("disabled", "sequential", "static", "auto")
HISTOGRAMS = {
    "ttft_ms": ("time_to_first_token_seconds", "From arrival to the first token."),
    "inter_token_ms": ("inter_token_latency_seconds", "Between two tokens of an answer."),
    "e2e_ms": ("e2e_request_latency_seconds", "From arrival to the last token, of answers that ended by themselves."),
    "queue_ms": ("request_queue_time_seconds", "From arrival to admission, of the same answers."),
    "prefill_ms": ("request_prefill_time_seconds", "From admission to the first token, of the same answers."),
    "decode_ms": ("request_decode_time_seconds", "From the first token to the last one, of the same answers."),
}


class MetricsPage(Collector):
    """A collector over one engine. `read_stats`: `LLM.stats`, or what does the same."""

    def __init__(self, read_stats: Callable[[], Stats]) -> None:
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        for families in (_queues, _answers, _tokens, _cards, _copies, _pipeline):
            yield from families(stats)


class MetricsServer:
    """The page over HTTP at `http://host:port/metrics`, from a thread of its own, until `close`.

    port: 0: a free one; afterwards the one that it has. host: the address to listen on. `ValueError` for an address
    that cannot be had.
    """

    def __init__(self, read_stats: Callable[[], Stats], port: int, host: str) -> None:
        if type(port) is not int or not 0 <= port < 1 << 16:
            raise ValueError(f"port={shown(port)} must be an integer from 0 (any free one) to {(1 << 16) - 1}")
        if not isinstance(host, str) or not host:
            raise ValueError(f"host={shown(host)} must be an address to listen on, as '127.0.0.1'")
        registry = CollectorRegistry()
        registry.register(MetricsPage(read_stats))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, ValueError) as error:  # ValueError: a null character in it
            raise ValueError(
                f"no metrics server at host={shown(host)}, port={port}: {shortened(str(error))}"
            ) from error
        self.host, self.port = host, self._server.server_port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop listening. A second call does nothing."""
        if self.running:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _gauge(name: str, text: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, text, labels=labels), values)


def _counter(name: str, text: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    """`name` without "_total", which the page adds."""
    return _filled(CounterMetricFamily(PREFIX + name, text, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels if isinstance(labels, tuple) else (labels,), value)
    return family


def _histogram(name: str, text: str, histogram: Stats) -> Metric:
    totals = list(accumulate(histogram["counts"]))
    buckets = [(f"{histogram['upper'][i] / 1e3:.6g}", totals[i]) for i in BOUNDS]
    family = HistogramMetricFamily(PREFIX + name, text)
    family.add_metric((), [*buckets, ("+Inf", totals[-1])], histogram["sum"] / 1e3)
    return family


def _queues(stats: Stats) -> Iterator[Metric]:
    waiting = {reason: stats[queue] for queue, reason in WAITING.items()}
    paused = stats["prefill_paused"]
    waiting |= {"capacity": stats["waiting"] * (not paused), "back_pressure": stats["waiting"] * paused}
    running = stats["prefilling"] + stats["decoding"]
    yield _gauge("num_requests_running", "Answers that are prefilled or decoded.", {(): running})
    yield _gauge("num_requests_waiting", "Answers that wait, for whatever reason.", {(): sum(waiting.values())})
    text = (
        "Answers that wait: for blocks (capacity), for a backlog to shrink (back_pressure), for their blocks on the "
        "decode card (copy), for a place in a batch (slot), for room on the card they had to leave (moved)."
    )
    yield _gauge("num_requests_waiting_by_reason", text, waiting, ("reason",))
    text = "Seconds for which prompts waited for the decode card's backlog to shrink."
    yield _counter("back_pressure_seconds", text, {(): stats["back_pressure_seconds"]})
    moved = {"evacuated": stats["evacuations"], "recomputed": stats["recomputes"]}
    text = "Answers that left a full decode card: moved to card 0, or dropped and computed again."
    yield _counter("num_preemptions", text, moved, ("kind",))


def _answers(stats: Stats) -> Iterator[Metric]:
    finished = stats["requests"]["finished"]
    yield _counter("request_success", "Answers that ended, aborts and errors too.", finished, ("finished_reason",))
    text = (
        "Failures. engine: its loop ended, everybody who waited was told. card: one was given up, the other goes on. "
        "copy: one was given up, its prompts are prefilled again. tokenizer, logits: one request failed because of it."
    )
    yield _counter("errors", text, stats["errors"], ("kind",))
    again = {(): stats["prefilled_again"]}
    yield _counter("num_prefilled_again", "Answers whose prompt was prefilled again because of a failure.", again)
    for key, (name, text) in HISTOGRAMS.items():
        yield _histogram(name, text, stats["requests"][key])


def _tokens(stats: Stats) -> Iterator[Metric]:
    prompt, cached = stats["prompt_tokens"], stats["cached_tokens"]
    yield _counter("prompt_tokens", "Tokens of admitted prompts.", {(): prompt})
    # Prefixes are looked up where a prompt is prefilled, and nowhere else: none comes from another card's cache.
    sources = {"computed": prompt - cached, "cached": cached, "pulled": 0}
    text = "Of them: computed, found in the prefix cache, or pulled from another card's (nothing is, so far)."
    yield _counter("prompt_tokens_by_source", text, sources, ("source",))
    yield _counter("generation_tokens", "Tokens sampled for somebody.", {(): stats["sampled_tokens"]})


def _cards(stats: Stats) -> Iterator[Metric]:
    cards = _card_names(stats)
    blocks = {card: stats[f"card{card}_blocks"] for card in cards}
    used = {card: 1 - blocks[card]["free"] / blocks[card]["total"] for card in cards}
    yield _gauge("kv_cache_usage_perc", "Share of a card's KV blocks that have an owner, 0 to 1.", used, ("card",))
    kinds = [(card, kind) for card in cards for kind in STEP_KINDS]
    steps = {(card, kind): stats[f"card{card}"][f"{kind}_steps"] for card, kind in kinds}
    seconds = {(card, kind): stats[f"card{card}"][f"{kind}_seconds"] for card, kind in kinds}
    yield _counter("card_steps", "Steps of a card, by what was in them.", steps, ("card", "kind"))
    yield _counter("card_step_seconds", "Seconds of the card's own time that they took.", seconds, ("card", "kind"))


def _card_names(stats: Stats) -> list[str]:
    return ["0", "1"] if "card1" in stats else ["0"]


def _copies(stats: Stats) -> Iterator[Metric]:
    cards, labels = _card_names(stats), ("src", "dst")
    routes = [(src, dst) for src in cards for dst in cards]
    none = {"copied_bytes": 0, "copy_seconds": 0.0}
    copies = {route: stats["copies_by_route"].get("to".join(route), none) for route in routes}
    moved_bytes = {route: of["copied_bytes"] for route, of in copies.items()}
    seconds = {route: of["copy_seconds"] for route, of in copies.items()}
    rates = {route: moved_bytes[route] / seconds[route] / 1e9 if seconds[route] else 0.0 for route in routes}
    yield _counter("mirrored_bytes", "Bytes of KV blocks copied from card to card, or within one.", moved_bytes, labels)
    yield _counter("copy_seconds", "Seconds that these copies took.", seconds, labels)
    yield _gauge("copy_gigabytes_per_second", "The one over the other, since the start.", rates, labels)
    yield _counter("copy_retries", "Copies that failed and were tried again.", {(): stats["copy_retries"]})
    yield _gauge("copies_in_flight", "Copies that are planned and have not ended.", {(): stats["copies_in_flight"]})
    text = "From the end of a prompt's prefill until the decode card held all of it."
    yield _histogram("exposed_copy_seconds", text, stats["exposed_copy_ms"])


def _pipeline(stats: Stats) -> Iterator[Metric]:
    """All of it, zeros where no decode pipeline was asked for."""
    pipeline, labels = stats["pipeline"], ("stage",)
    green = pipeline.get("green", {})
    sms = {stage: green.get(f"{stage}_sm_granted", 0) for stage in STAGES}
    card_sms = sum(sms.values()) + green.get("idle_sms", 0)
    mode = pipeline.get("mode_running", "disabled")
    latency = {stage: pipeline.get(f"avg_{stage}_time_ms", 0.0) / 1e3 for stage in STAGES}
    share = {stage: count / card_sms if card_sms else 0.0 for stage, count in sms.items()}
    busy = {stage: green.get(f"{stage}_busy_share") or 0.0 for stage in STAGES}
    yield _gauge("pipeline_mode", "1 for how decode steps run.", {each: each == mode for each in MODES}, ("mode",))
    text = "Seconds of a decode step's attention stages (StageA) or FFN stages (StageF): moving average of timed steps."
    yield _gauge("stage_latency_seconds", text, latency, labels)
    yield _gauge("sm_share", "Share of the decode card's SMs that a stage's partition has.", share, labels)
    yield _gauge("sm_busy_fraction", "Share of timed steps for which the partition ran its stages.", busy, labels)
    yield _counter("pipeline_rebalances", "Moves to another split of SMs.", {(): green.get("switches", 0)})
    fallbacks = {"pipeline": pipeline.get("fallbacks", 0), "lending": int(stats["lending_failed"])}
    fallbacks |= {"one_card": int(stats["degraded"] is not None)}
    yield _counter("fallbacks", "What was asked for and could not be had, and what runs instead.", fallbacks, ("kind",))
