"""`LLM`: what users call. Checks and tokenises in the caller's thread, then reads one queue a call."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanovllm import IMPORT_STARTED_S
from nanovllm.admission import Limits, Prompt, as_params, as_prompts, check_request, check_token_ids
from nanovllm.config import Config
from nanovllm.engine.cards import STARTUP_PARTS, build_runners, resolve_devices, timed
from nanovllm.engine.detokenizer import StopWatcher
from nanovllm.engine.executor import InlineExecutor, ThreadedExecutor
from nanovllm.engine.interpreter import collect_all_again, keep_pauses_short
from nanovllm.engine.llm_engine import EngineDeadError, LLMEngine, OutputQueue
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Request
from nanovllm.engine.trace import record_trace
from nanovllm.increments import Increment
from nanovllm.models.loader import resolve_model
from nanovllm.models.model_config import load_model_config
from nanovllm.outputs import RequestOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.shown import shown
from nanovllm.tokenizer import Message, Tokenizer

if TYPE_CHECKING:
    from nanovllm.engine.prometheus import MetricsServer

logger = logging.getLogger("nanovllm")

LONGEST_PAST_S = 10**9  # of an arrival
IMPORT_S = time.perf_counter() - IMPORT_STARTED_S  # torch, nearly all of it, unless the program had it already


class LLM:
    """A Qwen3 model on one card, or prefill on one card and decode on another (`enable_two_gpu_pd=True`).

    `model`: a local folder in Hugging Face format, or a hub id. Keywords: see `Config`. Every method may be called
    from any thread. Mistakes raise `ValueError` (`FileNotFoundError` for missing files) before any work.

    Close it, or use it in a `with`: as long as one is open, garbage collections do not look at what there was when it
    was made, and would not find it in a cycle of references.

    `startup`: wall-clock seconds of what came before this object was ready, by part: `import_s` (once a process:
    from the begin of `import nanovllm` to the end of this file's imports), `tokenizer_s`, `devices_s` (CUDA contexts),
    `weights_s`, `kv_pool_s`, `compile_s`, `capture_s`, `reserve_s` (memory of steps), and `total_s`, which also counts
    what is none of these.
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any) -> None:
        started = time.perf_counter()
        self.startup = startup = dict.fromkeys(STARTUP_PARTS, 0.0) | {"import_s": IMPORT_S}
        self.config = config = Config.from_kwargs(os.fspath(model) if isinstance(model, os.PathLike) else model, kwargs)
        devices = resolve_devices(config)
        folder = resolve_model(config.model, config.revision)
        self.model_config = load_model_config(folder)
        self.max_model_len = min(config.max_model_len, self.model_config.max_context_tokens)
        if self.max_model_len < config.max_model_len:
            logger.info("max_model_len=%d is cut to the model's %d", config.max_model_len, self.max_model_len)
        with timed(startup, "tokenizer_s"):
            self.tokenizer = Tokenizer(folder)
        runners = build_runners(config, folder, self.model_config, self.max_model_len, devices, startup)
        self.prefill_runner: ModelRunner = runners[0]
        self.decode_runner: ModelRunner = runners[-1]
        self._limits = Limits(
            self.model_config.vocab_size,
            self.max_model_len,
            config.kvcache_block_size,
            tuple(runner.kv_cache.num_blocks for runner in runners),
        )
        self._arrivals = itertools.count()
        self._arrival_lock = threading.Lock()
        self._hash_seed = secrets.randbits(64)
        self._steps = OutputQueue()
        self._steps_lock = threading.Lock()
        self._engine = _start_engine(config, runners)
        # Also runs at interpreter exit. The engine's threads hold no reference to this object.
        self._finalizer = weakref.finalize(self, _stop_engine, self._engine)
        self._metrics_server: MetricsServer | None = None
        self._metrics_lock, self._close_lock = threading.Lock(), threading.RLock()
        startup["total_s"] = IMPORT_S + time.perf_counter() - started
        parts = ", ".join(f"{part.removesuffix('_s')} {startup[part]:.2f}" for part in STARTUP_PARTS)
        logger.info("ready in %.2f s: %s", startup["total_s"], parts)

    # -- whole answers

    def generate(
        self,
        prompts: str | list[str] | list[int] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs in the order of the prompts. Interrupted, it aborts what it has begun."""
        items = as_prompts(prompts)
        requests = self._checked(items, as_params(sampling_params, len(items)))
        with tqdm(total=len(requests), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as bar:
            rates = _Rates(self._engine)
            for _ in self._finished(requests):
                bar.set_postfix_str(rates.text(), refresh=False)
                bar.update(1)
        return [RequestOutput(request, self.tokenizer) for request in requests]

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the checkpoint's chat template."""
        many = isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], (list, tuple))
        conversations = messages if many else [messages]
        for conversation in conversations:
            if not _is_conversation(conversation):
                raise ValueError(
                    f"a conversation must be a list of messages with role and content, got {shown(conversation)}"
                )
        if not isinstance(chat_template_kwargs, (Mapping, type(None))):
            raise ValueError(f"chat_template_kwargs must be a mapping, got {shown(chat_template_kwargs)}")
        texts = [self.tokenizer.apply_chat_template(c, chat_template_kwargs or {}) for c in conversations]  # type: ignore[arg-type]
        return self.generate(texts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamOutput]:
        """Yield the answer piece by piece as it grows. Closing the iterator aborts the request.

        The prompt is checked at the call, not at the first piece.
        """
        queue = OutputQueue()
        request = self._submit(prompt, sampling_params, queue)
        increments = self._increments(request, queue)
        next(increments)  # into its `try`: from now on, whatever ends the iterator aborts the request
        return increments

    # -- one step at a time

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, arrived_s: float | None = None) -> str:
        """Queue a request for `step()` or `take_finished()`; returns its id.

        arrived_s: when it arrived, in seconds of `time.perf_counter()`, left out: now. Its metrics count from there;
        its place in the queue does not depend on it.
        """
        return self._submit(prompt, params, self._steps, arrived_s).request_id

    def step(self) -> list[RequestOutput]:
        """Requests of `add_request` that advanced or ended since the last call; waits for one. [] if none is left."""
        with self._steps_lock:  # two threads that wait for the same last request would leave one waiting
            outputs = self._news(self._steps.take(0))
            while not outputs and self._engine.has_unfinished(self._steps):
                outputs = self._news(self._engine.wait(self._steps))
            return outputs

    def take_finished(self) -> list[RequestOutput]:
        """Requests of `add_request` that ended since this or `step()` last told of an end. Waits for none of them, but
        for a `step()` that another thread is in.

        For callers with many requests and no use for pieces: looks at each request that advanced once, however many
        tokens it made. Runs nothing: without `overlap` only `step()` does.
        """
        with self._steps_lock:
            return self._news([request for request in self._steps.take(0) if request.finished])

    def abort(self, request_id: str) -> None:
        """End a request soon, from any thread; unknown and finished ids are left alone."""
        if not isinstance(request_id, str):
            raise ValueError(f"request_id must be a string, as add_request returns it, got {shown(request_id)}")
        self._engine.abort(request_id)

    def has_unfinished(self) -> bool:
        """Whether a request of `add_request` has not ended, or has news that `step()` has not returned yet."""
        return self._engine.has_unfinished(self._steps)

    def stats(self) -> dict[str, Any]:
        """Now: queue lengths, blocks by card, `lent_sms`: (decode, prompts), `degraded`: why one card goes on alone,
        `lending_failed`: whether SMs were to be lent and are not.
        Since the start: tokens, steps, device seconds, busy share by card, copies, moves, pauses, prompt tokens, cached
        ones, answers by end, latencies, errors by kind, what was tried or prefilled again; the pipeline's own."""
        return _stats(self._engine, self.decode_runner)

    def start_metrics_server(self, port: int = 0, host: str = "127.0.0.1") -> MetricsServer:
        """Serve `stats()` to Prometheus over HTTP, from this machine only unless `host` says otherwise; until `close`.

        port: 0: a free one; `.port` and `.url` of what is returned say which. `RuntimeError` without prometheus-client,
        `ValueError` for an address that cannot be had, or if this engine's page is served already.
        """
        server_class = _metrics_server_class()
        with self._metrics_lock:
            if not self._finalizer.alive:
                raise EngineDeadError("the engine has stopped: closed")
            if self._metrics_server is not None and self._metrics_server.running:
                raise ValueError(f"port={port}: {self._metrics_server.url} is served already; close that server first")
            server = server_class(partial(_stats, self._engine, self.decode_runner), port, host)  # keeps no LLM alive
            self._metrics_server = server
        weakref.finalize(self, server.close)
        logger.info("metrics: %s", server.url)
        return server

    def trace(self, path: str | os.PathLike[str]) -> AbstractContextManager[None]:
        """`with llm.trace("run.json"):` records every step and copy that completes inside, for ui.perfetto.dev.

        Written when the block is left, also by an exception; an existing file is replaced. `ValueError` before the
        block begins if the path cannot be written or another trace of this engine is on; `OSError` at its end if the
        disk is full.
        """
        runners = dict.fromkeys((self.prefill_runner, self.decode_runner))  # one card plays both roles
        return record_trace(self._engine, path, [runner.device for runner in runners])

    def close(self) -> None:
        """Stop the engine. Callers that still wait get `EngineDeadError`. Safe to call twice, from two threads too, and
        again after Ctrl-C."""
        with self._close_lock:
            self._engine.close()
            if self._finalizer.detach() is not None:
                _collect_again(self.config)
            with self._metrics_lock:
                if self._metrics_server is not None:
                    self._metrics_server.close()
            if self._engine.may_use_cards:  # else this would hang, or fail, too
                self.decode_runner.close_pipeline()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside

    def _checked(self, prompts: list[Any], params: list[SamplingParams]) -> list[Request]:
        """Check everything first: either all prompts become requests or none."""
        checked = [self._check(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        return [self._make_request(*arguments) for arguments in checked]

    def _submit(
        self, prompt: Prompt, params: SamplingParams | None, queue: OutputQueue, arrived_s: float | None = None
    ) -> Request:
        _check_arrival(arrived_s)
        (request,) = self._checked([prompt], as_params(params, 1))
        if arrived_s is not None:
            request.timeline.arrived = arrived_s
        self._engine.submit(request, queue)
        return request

    def _check(self, prompt: Any, params: SamplingParams) -> tuple[str | None, list[int], SamplingParams, int]:
        text = prompt if isinstance(prompt, str) else None
        ids = check_token_ids(prompt if text is None else self.tokenizer.encode(text), self._limits)
        if params.stop and not self.tokenizer.available:
            raise ValueError(f"stop={shown(params.stop)} needs a tokenizer, and this checkpoint has none")
        return text, ids, params, check_request(ids, params, self._limits)

    def _make_request(self, text: str | None, ids: list[int], params: SamplingParams, max_tokens: int) -> Request:
        with self._arrival_lock:
            arrival = next(self._arrivals)
        request = Request(
            str(arrival),
            arrival,
            text,
            ids,
            params,
            max_tokens=max_tokens,
            eos_token_ids=self.model_config.eos_token_ids,
            engine_seed=self.config.seed,
            hash_seed=self._hash_seed,
        )
        for sequence in request.sequences if request.stop_strings else ():
            sequence.watcher = StopWatcher(
                self._decoder(params), request.stop_strings, params.include_stop_str_in_output
            )
        return request

    def _decoder(self, params: SamplingParams) -> Any:
        tokenizer = self.tokenizer  # not `self`: the engine's thread keeps this function
        return lambda ids: tokenizer.decode(ids, params.skip_special_tokens)

    def _news(self, advanced: list[Request]) -> list[RequestOutput]:
        """Views of requests whose end was not told yet: a view may have seen an end that is announced only now."""
        outputs = []
        for request in advanced:
            if not request.end_was_told:
                outputs.append(RequestOutput(request, self.tokenizer))
                request.end_was_told = outputs[-1].finished
        return outputs

    def _finished(self, requests: list[Request]) -> Iterator[Request]:
        """Submit the requests and yield each as it ends; whatever stops the reader aborts the rest."""
        queue, left = OutputQueue(only_ends=True), set(requests)
        try:
            for request in requests:
                self._engine.submit(request, queue)
            while left:
                for request in self._engine.wait(queue):
                    if request.finished and request in left:
                        left.remove(request)
                        yield request
        finally:
            for request in left:
                self._engine.abort(request.request_id)

    def _increments(self, request: Request, queue: OutputQueue) -> Iterator[StreamOutput]:
        pieces = [Increment(index, self._decoder(request.params)) for index in range(request.params.n)]
        try:
            yield StreamOutput("", [])  # taken by `stream`
            finished = False
            while not finished:
                self._engine.wait(queue)
                output = RequestOutput(request, self.tokenizer)
                finished = output.finished
                for piece, completion in zip(pieces, output.outputs, strict=True):
                    yield from piece.of(completion, self.tokenizer.available)
        finally:
            self._engine.abort(request.request_id)


def _check_arrival(arrived_s: Any) -> None:
    if arrived_s is None:
        return
    number = isinstance(arrived_s, (int, float)) and not isinstance(arrived_s, bool)
    now_s = time.perf_counter()
    if not number or not now_s - LONGEST_PAST_S <= arrived_s <= now_s:  # what is no float, too, ends here
        raise ValueError(
            f"arrived_s={shown(arrived_s)} must be seconds of time.perf_counter(), not beyond its now, {now_s:.3f}, "
            f"nor more than {LONGEST_PAST_S} before it"
        )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(message, Mapping) for message in value)


class _Rates:
    """Tokens per second of each card since the bar began, for its postfix."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._started = time.perf_counter()
        self._before = self._now()

    def _now(self) -> list[tuple[int, int]]:
        return [(card.prefill_tokens, card.decode_tokens) for card in self._engine.metrics.cards]

    def text(self) -> str:
        seconds = time.perf_counter() - self._started
        pairs = zip(self._now(), self._before, strict=True)
        rates = [((now[0] - old[0]) / seconds, (now[1] - old[1]) / seconds) for now, old in pairs]
        return ", ".join(f"card {i}: prefill {p:.0f} decode {d:.0f} tok/s" for i, (p, d) in enumerate(rates))


def _metrics_server_class() -> type[MetricsServer]:
    try:
        from nanovllm.engine.prometheus import MetricsServer  # here: it is an optional extra
    except ImportError as error:
        message = f"metrics need prometheus-client ({error}): pip install 'nanovllm[metrics]'"
        raise RuntimeError(message) from error
    return MetricsServer


def _stats(engine: LLMEngine, decode_runner: ModelRunner) -> dict[str, Any]:
    """A card that was given up runs nothing any more, and the other one has neither a pipeline nor lent SMs."""
    lost, pipeline = engine.faults.lost_card, decode_runner.get_pipeline_statistics()
    decode_card = len(engine.metrics.cards) - 1  # at the start; the scheduler's is the one that goes on
    if pipeline and lost == decode_card:
        pipeline |= {"mode_running": "sequential", "fallback_cause": engine.faults.cause, "fallbacks": 1}
        pipeline |= {"attention_sm": 0, "ffn_sm": 0, "green": {}}
    lends = decode_runner.lends and lost is None
    failed, sms = engine.config.lend_sms is not None and not lends, decode_runner.lent_sms if lends else None
    return engine.stats() | {"pipeline": pipeline, "lent_sms": sms, "lending_failed": failed}


def _start_engine(config: Config, runners: list[ModelRunner]) -> LLMEngine:
    cards = dict(enumerate(runners))
    num_blocks = tuple(runner.kv_cache.num_blocks for runner in runners)
    scheduler = Scheduler(config, num_blocks, runners[0].prefill_token_s, runners[-1].lends)
    if not config.overlap:
        return LLMEngine(config, scheduler, lambda notify: InlineExecutor(cards))
    engine = LLMEngine(config, scheduler, lambda notify: ThreadedExecutor(cards, notify))
    engine.start()
    keep_pauses_short()
    return engine


def _stop_engine(engine: LLMEngine) -> None:
    try:
        engine.close()
    finally:
        _collect_again(engine.config)


def _collect_again(config: Config) -> None:
    """Once for each engine: what was frozen at its start is collected again."""
    if config.overlap:
        collect_all_again()
