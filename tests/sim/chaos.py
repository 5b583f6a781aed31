"""Faults for the simulated device, drawn from a world's own generator."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.engine.shards import CopyShard, Shard
from tests.sim.simulated_device import DeviceFault, Task
from tests.sim.world import World


@dataclass
class Chaos:
    """What goes wrong in a world, and how often. `install(world)` once, before its first step.

    copies: of copies' phases, the share that fails. rows: of sampled rows, the share whose logits are no numbers.
    card, at_step: the first step of this card with a number no smaller fails, and with it the card; None: no card does.
    text: of that failure; by default one that the other card survives.
    """

    copies: float = 0.0
    rows: float = 0.0
    card: int | None = None
    at_step: int = 0
    text: str = "no memory for this step"

    def install(self, world: World) -> None:
        self._world = world
        self._card_failed = False
        world.may_fail = self.rows > 0
        world.executor.fails, world.executor.spoils = self._fails, self._spoils

    def _fails(self, task: Task) -> Exception | None:
        shard, rng = task.job.shard, self._world.rng
        if isinstance(shard, CopyShard):
            return DeviceFault("the link is down") if rng.random() < self.copies else None
        if self._card_failed or shard.card != self.card or shard.step < self.at_step:
            return None
        self._card_failed = True
        return DeviceFault(self.text)

    def _spoils(self, shard: Shard, row: int) -> bool:
        return self._world.rng.random() < self.rows
