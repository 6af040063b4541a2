"""Keeps the book of GPU slots: which expert of which layer is in which, over ids only.

A policy watches what the router chooses and says what each expert is worth keeping; the cache
gives out the slots, holds the capacities and the pins, and asks the policy whom to evict. Neither
moves any data: the caller copies what it admits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from planner.decide.policy import Ids, Policy, Values
from planner.errors import CapacityError


class Lookup(NamedTuple):
    """The activated experts of one step, by whether they were resident; each ascending."""

    hits: tuple[int, ...]
    misses: tuple[int, ...]


class ExpertCache:
    """The resident experts of every layer, and the slot of each.

    Parameters
    ----------
    policy
        Says what is worth keeping.
    capacities
        Slots of each layer, ``[L]``; they are numbered from 0 through all layers.

    Raises
    ------
    CapacityError
        When there is not one capacity per layer, or one is negative or above E.

    Notes
    -----
    Any slot may serve any layer. They are given out in the order in which they became free, so
    that the one that a device is most likely done with comes first. A resident is in flight from
    then until its copy has landed (``landed``); who moves no data need not say so.
    """

    def __init__(self, policy: Policy, capacities: Sequence[int]) -> None:
        self._policy = policy
        self._unlearned: tuple[int, Any, ArrayLike, int] | None = None
        self.capacities = self._checked(capacities)
        policy.opened(self.capacities)
        self._residents: list[dict[int, int]] = [{} for _ in capacities]
        self._free = deque(range(sum(capacities)))
        self._in_flight: list[set[int]] = [set() for _ in capacities]
        # The residents the other way round, [L, E]: who cannot be evicted, not there or pinned.
        self._fixed = np.ones((policy.layers, policy.experts), np.bool_)
        self._pins: list[Counter[int]] = [Counter() for _ in capacities]
        self._in_use: tuple[int, frozenset[int]] = (-1, frozenset())

    @property
    def policy_name(self) -> str:
        """Of the policy that says what is worth keeping."""
        return self._policy.name

    def _policy_of(self, layer: int) -> Policy:
        """Who says what is worth keeping, knowing of every step of this layer so far."""
        if self._unlearned is not None and self._unlearned[0] == layer:
            self.learn()
        return self._policy

    def learn(self) -> None:
        """Tell the policy of the last step, unless it knows: whoever has time does it early."""
        if self._unlearned is not None:
            layer, ids, weights, tokens = self._unlearned
            self._unlearned = None
            self._policy.observe_one(
                layer, np.asarray(ids, np.int64), np.asarray(weights, np.float64), tokens
            )

    def _checked(self, capacities: Sequence[int]) -> tuple[int, ...]:
        if len(capacities) != self._policy.layers:
            raise CapacityError(
                f"{len(capacities)} capacities for {self._policy.layers} layers",
                hint="give each MoE layer its number of slots",
            )
        for layer, capacity in enumerate(capacities):
            if not 0 <= capacity <= self._policy.experts:
                raise CapacityError(
                    f"layer {layer} has {capacity} slots for {self._policy.experts} experts",
                    hint="a layer has from 0 slots to one per expert",
                )
        return tuple(capacities)

    def residency(self, layer: int) -> frozenset[int]:
        """Return the experts in this layer's slots."""
        return frozenset(self._residents[layer])

    def slots(self, layer: int) -> Mapping[int, int]:
        """Return the slot of every resident of this layer: a view, which changes with the cache."""
        return self._residents[layer]

    def value(self, layer: int) -> Values:
        """Return what the policy thinks each expert is worth keeping, ``[E]``."""
        return self._policy_of(layer).value_one(layer)

    def step(
        self, layer: int, ids: Ids | Iterable[int], weights: ArrayLike, tokens: int = 1
    ) -> Lookup:
        """Take the router's choice: look it up, protect it, learn from it before anybody asks.

        What was chosen is not evicted before ``release`` or the next step, of this layer or
        another; pin what must stay for longer.

        Parameters
        ----------
        ids, weights, tokens
            As one row of ``Policy.observe``.
        """
        self.learn()
        self._unlearned = (layer, ids, weights, tokens)
        activated = frozenset(ids.tolist() if isinstance(ids, np.ndarray) else ids)
        held, ascending = self._residents[layer], sorted(activated)
        self._in_use = (layer, activated)
        return Lookup(
            tuple([expert for expert in ascending if expert in held]),
            tuple([expert for expert in ascending if expert not in held]),
        )

    def release(self) -> None:
        """End the current step: what it used may be evicted."""
        self._in_use = (-1, frozenset())

    def admit(self, layer: int, expert: int, evicting: int | None = None) -> int | None:
        """Give ``expert`` a slot: a free one, or that of ``evicting`` or whom the policy chooses.

        Returns
        -------
        int or None
            The expert that was evicted for it, or None when a slot was free.

        Raises
        ------
        CapacityError
            When it is resident already, or every slot, or that of ``evicting``, is pinned or in
            use.
        """
        held = self._residents[layer]
        if expert in held:
            raise CapacityError(
                f"layer {layer}: expert {expert} is resident already",
                hint="look it up before admitting it",
            )
        evicted = None
        if len(held) >= self.capacities[layer]:
            evicted = self.victim(layer, expert) if evicting is None else evicting
            if evicted is None or (evicting is not None and evicting not in self.evictable(layer)):
                who = f"all {self.capacities[layer]} are" if evicting is None else f"{evicting} is"
                raise CapacityError(
                    f"layer {layer}: no slot for expert {expert}, {who} pinned or in use",
                    hint="compute it on the CPU, or give the layer more slots",
                )
        self._give(layer, expert, evicted)
        return evicted

    def _give(self, layer: int, expert: int, evicted: int | None) -> None:
        """Give ``expert`` a slot, that of ``evicted`` being free from now on, if there is one."""
        policy, fixed = self._policy_of(layer), self._fixed[layer]
        held, in_flight = self._residents[layer], self._in_flight[layer]
        if evicted is not None:
            self._free.append(held.pop(evicted))
            in_flight.discard(evicted)
            fixed[evicted] = True
            policy.evicted(layer, evicted)
        held[expert] = self._free.popleft()
        in_flight.add(expert)
        fixed[expert] = expert in self._pins[layer]
        policy.admitted(layer, expert)

    def drop(self, layer: int, expert: int) -> None:
        """Take a resident expert's slot back: what was to be in it never arrived.

        Raises
        ------
        CapacityError
            When it is not resident, or pinned.
        """
        if expert not in self._residents[layer] or expert in self._pins[layer]:
            state = "pinned" if expert in self._pins[layer] else "not resident"
            raise CapacityError(
                f"layer {layer}: cannot drop expert {expert}, it is {state}",
                hint="drop what was admitted, and unpin it before",
            )
        self._free.append(self._residents[layer].pop(expert))
        self._in_flight[layer].discard(expert)
        self._fixed[layer, expert] = True
        self._policy_of(layer).evicted(layer, expert)

    def landed(self, layer: int, expert: int) -> None:
        """Learn that the copy of a resident has arrived in its slot.

        Raises
        ------
        CapacityError
            When none was on its way.
        """
        try:
            self._in_flight[layer].remove(expert)
        except KeyError:
            raise CapacityError(
                f"layer {layer}: no copy of expert {expert} is on its way",
                hint="admit it first; a copy lands once",
            ) from None

    def in_flight(self) -> list[tuple[int, int]]:
        """Return layer and id of every resident whose copy has not landed."""
        return [(layer, e) for layer, ids in enumerate(self._in_flight) for e in sorted(ids)]

    def favourites(self, layer: int) -> list[int]:
        """Return whom the policy would have in the layer's free slots, the most valued first."""
        held, free = self._residents[layer], self.free(layer)
        if not free:
            return []
        order = np.argsort(-self.value(layer), kind="stable").tolist()
        return [expert for expert in order[: self.capacities[layer]] if expert not in held][:free]

    def victim(self, layer: int, incoming: int) -> int | None:
        """Return whom a full layer would evict for ``incoming``; None when it may evict no one."""
        policy = self._policy_of(layer)
        if policy.evicts_least:
            fixed = self._fixed[layer]
            stepping, chosen = self._in_use
            if stepping == layer:
                fixed = fixed.copy()
                fixed[list(chosen)] = True
            value = np.where(fixed, np.inf, policy.value_one(layer))
            least = int(value.argmin())
            if value[least] < np.inf:
                return least
        candidates = self.evictable(layer)
        return policy.victim(layer, incoming, candidates) if candidates else None

    def evictable(self, layer: int) -> list[int]:
        """Return the residents that are neither pinned nor part of the current step, ascending."""
        stepping, chosen = self._in_use
        free = self._residents[layer].keys() - self._pins[layer].keys()
        return sorted(free - chosen if stepping == layer else free)

    def free(self, layer: int) -> int:
        """How many slots hold no expert."""
        return self.capacities[layer] - len(self._residents[layer])

    def has_room(self, layer: int) -> bool:
        """Whether a slot is free or can be freed."""
        return self.free(layer) > 0 or bool(self.evictable(layer))

    def worth_admitting(self, layer: int, expert: int) -> bool:
        """Whether ``expert`` is worth more than whom it would evict; always, into a free slot."""
        return self._offer(layer, expert)[0]

    def offer(self, layer: int, expert: int) -> tuple[bool, int | None]:
        """Give ``expert`` a slot if that is worth it.

        Returns
        -------
        bool, int or None
            Whether it got one, and whom it evicted.
        """
        worth, evicted = self._offer(layer, expert)
        if worth:
            self._give(layer, expert, evicted)
        return worth, evicted

    def offer_each(self, layer: int, experts: Iterable[int]) -> list[tuple[int, int | None]]:
        """Offer a slot to one expert after the other; return who got one, and whom it evicted."""
        kept: list[tuple[int, int | None]] = []
        value, least = None, 0.0
        for expert in experts:
            # Whom the layer would evict is the same while nothing changes.
            if value is not None and value[expert] <= least:
                continue
            worth, evicted = self.offer(layer, expert)
            value = None
            if worth:
                kept.append((expert, evicted))
            elif self._policy.evicts_least:
                value = self.value(layer)
                least = np.inf if evicted is None else value[evicted]
        return kept

    def _offer(self, layer: int, expert: int) -> tuple[bool, int | None]:
        if len(self._residents[layer]) < self.capacities[layer]:
            return True, None
        evicted = self.victim(layer, expert)
        if evicted is None:
            return False, None
        value = self.value(layer)
        return bool(value[expert] > value[evicted]), evicted

    def pin(self, layer: int, expert: int) -> None:
        """Forbid evicting a resident expert until as many ``unpin`` calls.

        Raises
        ------
        CapacityError
            When it is not resident.
        """
        if expert not in self._residents[layer]:
            raise CapacityError(
                f"layer {layer}: cannot pin expert {expert}, it is not resident",
                hint="admit it first",
            )
        self._pins[layer][expert] += 1
        self._fixed[layer, expert] = True

    def unpin(self, layer: int, expert: int) -> None:
        """Take back one ``pin``.

        Raises
        ------
        CapacityError
            When it is not pinned.
        """
        pins = self._pins[layer]
        if not pins[expert]:
            raise CapacityError(
                f"layer {layer}: expert {expert} is not pinned", hint="unpin once for each pin"
            )
        pins[expert] -= 1
        if not pins[expert]:
            del pins[expert]
            self._fixed[layer, expert] = False

    def pinned(self, layer: int, expert: int) -> bool:
        """Whether a pin holds the expert in its slot."""
        return expert in self._pins[layer]

    def check_integrity(self) -> None:
        """Raise if the book contradicts itself.

        Every slot is free or one resident's, no layer holds more than its slots, and who is pinned
        or in flight is resident.

        Raises
        ------
        CapacityError, AssertionError
            Naming the layer, or the slots.
        """
        taken = [slot for held in self._residents for slot in held.values()]
        slots = sorted([*taken, *self._free])
        assert slots == list(range(sum(self.capacities))), f"slots twice or lost: {slots}"
        for layer, held in enumerate(self._residents):
            free = np.flatnonzero(~self._fixed[layer]).tolist()
            assert free == sorted(held.keys() - self._pins[layer].keys()), (layer, free)
            assert self._in_flight[layer] <= held.keys(), (layer, self._in_flight[layer])
            lost = sorted(expert for expert in self._pins[layer] if expert not in held)
            if len(held) > self.capacities[layer] or lost:
                raise CapacityError(
                    f"layer {layer} holds {len(held)} experts in {self.capacities[layer]} slots "
                    f"and lost the pinned experts {lost}",
                    hint="this is a defect of the cache: please report it",
                )
