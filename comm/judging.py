"""What the table of all ranks says: who is waited for, who left too early, which phase hangs.

Looks at numbers only, without clock, socket or MLX. A rank waits while its main thread stays at
one place after its first operation. Time in a declared long phase does not count as waiting; the
phase itself must report progress or move on some rank (see `progress.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from comm.progress import WITHOUT_BOUND

PROBE_SECONDS = 3.0  # before the time-out, for the ranks' answers to be here by then
LEFT_SECONDS = 25.0  # with the ticks of rank and judge, the job ends within 30


@dataclass
class RankStatus:
    """What is known of one rank.

    Attributes:
        host: The host's name.
        number: How many operations it has issued.
        operation: The last of them.
        idle_seconds: How long its main thread has been at the same place, without a report.
        phase: The declared long phase it is in, or "".
        needs_others: The last operation is one that other ranks take part in.
        left: It has said goodbye.
        lost_peer: MLX told it that a neighbour is gone.
        silent_addresses: Ring addresses of the next rank that did not answer when last tried.
    """

    host: str
    number: int = 0
    operation: str = "start"
    idle_seconds: float = 0.0
    phase: str = ""
    needs_others: bool = False
    left: bool = False
    lost_peer: bool = False
    silent_addresses: list[str] = field(default_factory=list)


class Judge:
    """Adds up how long each rank waits.

    Args:
        timeout_seconds: How long a rank may wait.
        phase_timeout_seconds: How long a long phase may go without progress on any rank.
        interval_seconds: A rank that stays at one place for less does not wait.
    """

    def __init__(
        self, timeout_seconds: float, phase_timeout_seconds: float, interval_seconds: float
    ):
        self.timeout_seconds = timeout_seconds
        self.phase_timeout_seconds = phase_timeout_seconds
        self._interval_seconds = interval_seconds
        self._waited: dict[int, float] = {}

    def reason_to_end(
        self, table: Sequence[RankStatus], ranks: Sequence[int], elapsed: float
    ) -> str | None:
        """Why the job must end now, or None.

        Args:
            table: The status of every rank.
            ranks: Those whose status is up to date.
            elapsed: Seconds since the last call.
        """
        present = [rank for rank in ranks if not table[rank].left]
        in_phase = [rank for rank in present if table[rank].phase]
        waited = {}
        for rank in present:
            status = table[rank]
            if status.number and status.idle_seconds >= self._interval_seconds:
                waited[rank] = self._waited.get(rank, 0.0) + (0.0 if in_phase else elapsed)
        self._waited = waited
        return (
            self._lost(table)
            or self._left_early(table)
            or self._long_wait(table)
            or self._still_phase(table, present, in_phase)
        )

    def must_probe(self, table: Sequence[RankStatus]) -> bool:
        """Whether every rank waits and the time-out is near, so that the cables must be tried."""
        longest = max(self._waited.values(), default=0.0)
        start = max(self.timeout_seconds - PROBE_SECONDS, self.timeout_seconds / 2)
        return self._all_wait(table) and longest > start

    def _all_wait(self, table: Sequence[RankStatus]) -> bool:
        return len(self._waited) == len(table)

    def _lost(self, table: Sequence[RankStatus]) -> str | None:
        left = _left(table)
        if left and any(status.lost_peer for status in table):
            return f"{rank_names(table, left)} ended early, while others still needed it"
        return None

    def _left_early(self, table: Sequence[RankStatus]) -> str | None:
        for rank, seconds in self._waited.items():
            behind = [other for other in _left(table) if table[other].number < table[rank].number]
            limit = min(LEFT_SECONDS, self.timeout_seconds)
            if behind and table[rank].needs_others and seconds > limit:
                names = rank_names(table, behind)
                return f"{names} ended early; a collective has waited {seconds:.0f} s for it"
        return None

    def _long_wait(self, table: Sequence[RankStatus]) -> str | None:
        longest = max(self._waited.values(), default=0.0)
        if longest <= self.timeout_seconds:
            return None
        if self._all_wait(table) and any(status.silent_addresses for status in table):
            return f"a collective has waited {longest:.0f} s: {_cut_cables(table)}"
        fewest = min(status.number for status in table)
        late = [rank for rank, status in enumerate(table) if status.number == fewest]
        return f"a collective has waited {longest:.0f} s for {rank_names(table, late)}{_also_left(table, late)}"

    def _still_phase(
        self, table: Sequence[RankStatus], present: list[int], in_phase: list[int]
    ) -> str | None:
        if any(table[rank].phase in WITHOUT_BOUND for rank in in_phase) or not in_phase:
            return None
        # One that moves may be what the others wait for.
        still = min(table[rank].idle_seconds for rank in present)
        if still <= self.phase_timeout_seconds:
            return None
        fewest = min(table[rank].number for rank in in_phase)
        late = [rank for rank in in_phase if table[rank].number == fewest]
        names = rank_names(table, late) + _also_left(table, late)
        return f"the phase {table[late[0]].phase!r} has not moved for {still:.0f} s on {names}"


def rank_names(table: Sequence[RankStatus], ranks: Sequence[int]) -> str:
    """As in "rank 0 (studio) and rank 1 (mini)"."""
    return " and ".join(f"rank {rank} ({table[rank].host})" for rank in ranks)


def _cut_cables(table: Sequence[RankStatus]) -> str:
    pairs = []
    for rank, status in enumerate(table):
        following = rank_names(table, [(rank + 1) % len(table)])
        for address in status.silent_addresses:
            name = rank_names(table, [rank])
            pairs.append(f"{name} gets no answer from {following} at {address}")
    return " and ".join(pairs)


def _also_left(table: Sequence[RankStatus], named: Sequence[int]) -> str:
    """The ranks that have left and are not named yet, as the rest of a sentence."""
    left = [rank for rank in _left(table) if rank not in named]
    return f", and {rank_names(table, left)} has left" if left else ""


def _left(table: Sequence[RankStatus]) -> list[int]:
    return [rank for rank, status in enumerate(table) if status.left]
