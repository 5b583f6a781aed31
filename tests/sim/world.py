"""The real engine loop over the simulated device: what random tests and the state machine drive."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.admission import Limits, check_request
from nanovllm.config import Config
from nanovllm.engine.llm_engine import EngineDeadError, LLMEngine, OutputQueue
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Request
from nanovllm.sampling_params import SamplingParams
from tests.sim.simulated_device import EOS, VOCABULARY, DeviceFault, SimulatedExecutor, expected_tokens

SLOS_MS = (None, None, 3.5, 12.0, 25.0, 80.0)  # of cards whose rows take a millisecond each


def tiny_config(block_size: int = 4, **kwargs) -> Config:
    """A configuration for tests; block sizes below the public ones make every boundary frequent."""
    config = Config("simulated", **kwargs)
    object.__setattr__(config, "kvcache_block_size", block_size)
    return config


@dataclass
class World:
    """One engine, one executor, the requests so far, and the checks that hold at any time."""

    config: Config
    num_blocks: tuple[int, ...]
    rng: random.Random
    lends: bool = False

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config, self.num_blocks, lends=self.lends)
        self.executor = SimulatedExecutor(self.scheduler.managers, self.rng)
        self.engine = LLMEngine(self.config, self.scheduler, lambda notify: self.executor)
        self.queue = OutputQueue()
        self.requests: list[Request] = []
        self.aborted: set[str] = set()
        self.check_books = True
        self.may_fail = False  # whether requests may end with an error
        self.cause: DeviceFault | None = None  # why the engine has ended

    def fits(self, prompt: list[int], params: SamplingParams) -> bool:
        """Whether admission would let it in."""
        try:
            check_request(prompt, params, Limits(VOCABULARY, 1 << 20, self.scheduler.block_size, self.num_blocks))
        except ValueError:
            return False
        return True

    def add(self, prompt: list[int], params: SamplingParams) -> Request | None:
        if self.cause is not None or not self.fits(prompt, params):
            return None
        number = len(self.requests)
        request = Request(
            str(number), number, None, prompt, params, max_tokens=params.max_tokens or 1, eos_token_ids=(EOS,)
        )
        self.engine.submit(request, self.queue)
        self.requests.append(request)
        return request

    def abort(self, request: Request) -> None:
        self.aborted.add(request.request_id)
        self.engine.abort(request.request_id)

    def step(self) -> bool:
        """One engine iteration, then the checks."""
        if self.cause is not None:
            return False
        try:
            progressed = self.engine.step()
        except DeviceFault as error:  # what its thread does then
            self.cause, progressed = error, True
            self.engine._die(error)
        self.executor.poison_free_blocks()
        if self.check_books:
            self.scheduler.check_integrity()
        self._read()
        return progressed

    def _read(self) -> None:
        try:
            self.queue.take(0)
        except EngineDeadError:
            assert self.cause is not None

    def run_to_idle(self) -> None:
        """Drain everything; a plan that stops moving is an error."""
        for _ in range(200_000):
            moved = self.executor.advance()
            if not self.step() and not moved:
                break
        self.engine._forget_rest()  # what closing does
        self.check_idle()

    def check_idle(self) -> None:
        """Exactly zero of everything, and every answer right."""
        scheduler = self.scheduler
        assert scheduler.idle and not scheduler.lent_steps, f"stuck: {scheduler.describe()}"
        assert self.executor.num_in_flight == 0 and not self.engine.has_unfinished()
        for manager in scheduler.managers.values():
            assert manager.num_free_blocks == manager.num_blocks, "a block is still owned"
            assert manager.num_retired_blocks == 0
        for batch in scheduler.batches.values():
            assert len(batch.free_slots) == self.config.max_num_seqs and batch.num_living == 0
        for request in self.requests:
            self.check_answer(request)
        exposed = sum(self.engine.metrics.exposed_copy_ms.as_dict()["counts"])
        assert exposed == sum(request.timeline.resident is not None for request in self.requests), "not once each"

    def check_answer(self, request: Request) -> None:
        stop_ids = {*request.eos_token_ids, *request.params.stop_token_ids}
        for sequence in request.sequences:
            expected = expected_tokens(request.prompt_token_ids, sequence.seed, request.max_tokens, stop_ids)
            got = sequence.tokens[sequence.num_prompt_tokens :].tolist()
            if sequence.finish_reason is None:
                assert self.cause is not None and got == expected[: len(got)]
            elif sequence.finish_reason == "abort":
                assert request.request_id in self.aborted and got == expected[: len(got)]
            elif sequence.finish_reason == "error":
                assert self.may_fail and sequence.error and got == expected[: len(got)]
            else:
                assert got == expected, f"request {request.request_id}: {got} instead of {expected}"
                assert sequence.finish_reason == ("stop" if got[-1] in stop_ids else "length")


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    """Prompts from few families, so that prefixes are shared, also exactly at block boundaries."""
    family = rng.randrange(3)
    stem = [1 + (family * 7 + i) % (VOCABULARY - 1) for i in range(rng.randrange(longest))]
    return stem + [rng.randrange(1, VOCABULARY) for _ in range(rng.choice([0, 0, 1, 3]))] or [1]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3]),
        max_tokens=rng.choice([1, 2, 5, 13, 21]),
        stop_token_ids=rng.sample(range(1, VOCABULARY), rng.choice([0, 0, 2])),
        ignore_eos=rng.random() < 0.3,
    )


def random_world(seed: int) -> World:
    """A random configuration, often with pools so tiny that evacuation and back-pressure happen."""
    rng = random.Random(seed)
    two = rng.random() < 0.8
    high = rng.choice([2, 3, 6])
    config = tiny_config(
        block_size=rng.choice([2, 4]),
        enable_two_gpu_pd=two,
        max_num_seqs=rng.choice([1, 2, 3, 5, 8]),
        max_num_batched_tokens=rng.choice([3, 8, 64]),
        enable_prefix_caching=rng.random() < 0.8,
        overlap=rng.random() < 0.85,
        run_ahead=rng.choice([None, 1, 2, 3, 4]),
        pd_roles=rng.choice(["elastic", "elastic", "strict"]),
        itl_slo_ms=rng.choice(SLOS_MS),
        decode_backlog_high=high,
        decode_backlog_low=high - 1 - rng.randrange(high - 1),
    )
    pools = tuple(rng.choice([6, 10, 16, 40]) for _ in range(2 if two else 1))
    return World(config, pools, rng)


def lending_world(seed: int) -> World:
    """Two cards of which the second lends SMs; small steps, so that prompts queue and take several chunks."""
    rng = random.Random(seed)
    config = tiny_config(
        block_size=rng.choice([2, 4]),
        enable_two_gpu_pd=True,
        max_num_seqs=rng.choice([2, 3, 5, 8]),
        max_num_batched_tokens=rng.choice([2, 4, 8]),
        enable_prefix_caching=rng.random() < 0.7,
        run_ahead=rng.choice([None, 1, 2, 3]),
        itl_slo_ms=rng.choice([None, None, 12.0]),
    )
    return World(config, tuple(rng.choice([10, 16, 40]) for _ in range(2)), rng, lends=True)


def run_random(
    seed: int,
    num_requests: int = 25,
    prepare: Callable[[World], None] = lambda world: None,
    make_world: Callable[[int], World] = random_world,
) -> World:
    """Requests and aborts at random moments, everything in random order, then drain and check."""
    world = make_world(seed)
    prepare(world)
    rng = world.rng
    left = num_requests
    while left:
        if rng.random() < (0.6 if world.lends else 0.15):
            world.add(random_prompt(rng, 20), random_params(rng))
            left -= 1
        if rng.random() < 0.03 and world.requests:
            world.abort(rng.choice(world.requests))
        if world.lends and world.scheduler.lent_steps and rng.random() < 0.1:  # of what a lent step computes just now
            step = rng.choice(sorted(world.scheduler.lent_steps))
            world.abort(rng.choice(world.scheduler.launched_prefills[1][step])[0].leader.request)
        for _ in range(rng.choice([0, 1, 2, 5])):
            world.executor.advance()
        world.step()
    world.run_to_idle()
    return world
