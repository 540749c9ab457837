"""How a server answered many callers at once, and the statistics of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

ENGINES: Final = ("dumont", "generate", "vllm")
DIRECT: Final = "direct"
SERVICES: Final = "services"
HEADERS: Final = (
    "model", "engine", "path", "streams", "prompt", "answer", "tokens/s",
    "first token p50", "p99", "a token p50", "p99", "remarks",
)  # fmt: skip
# Share of a core. A load generator that uses more may itself limit the result.
BUSY_CLIENT: Final = 0.85
SECONDS_DIGITS: Final = 5


@dataclass(frozen=True)
class Stream:
    """One answer as its caller saw it.

    Args:
        sent: when the request was sent, by the monotonic clock.
        arrivals: when messages came, and how many tokens each had.
        reason: why there was no whole answer; empty when there was one.
        tier: how the instance was started, where that was told.
    """

    sent: float
    arrivals: tuple[tuple[float, int], ...]
    reason: str = ""
    tier: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens arrived."""
        return sum(count for _, count in self.arrivals)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Stream:
        """A stream from what a load generator wrote."""
        arrivals = tuple((float(at), int(count)) for at, count in told["arrivals"])
        return cls(told["sent"], arrivals, told.get("reason", ""), told.get("tier", ""))


@dataclass(frozen=True)
class Wave:
    """Requests that were sent at the same moment; ``client_load``: cores that the busiest generator used."""

    streams: tuple[Stream, ...]
    client_load: float = 0.0


@dataclass(frozen=True)
class Case:
    """The load: how many answers at once, and the tokens of each prompt and each answer."""

    streams: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Percentiles:
    """The median and the 99th percentile of some values."""

    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """The percentiles of some values; None if there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(*(ordered[min(len(ordered) - 1, int(part * len(ordered)))] for part in (0.5, 0.99)))


@dataclass(frozen=True)
class Row:
    """The result of one engine and path under one load.

    Args:
        tokens_per_s: of all streams together, from the first request to the last token; the median of the
            rounds.
        first_token: seconds from a request to its first token.
        inter_token: seconds that a token took after the first message: a message's distance from the one
            before, shared among its tokens.
        inter_message: those distances themselves: how long a reader waits.
        failed: answers that did not come whole, by reason.
        client_load: cores that the busiest load generator used.
        tiers: how the instance was started, and for how many answers that was told.
    """

    model: str
    engine: str
    path: str
    case: Case
    rounds: int
    tokens_per_s: float
    first_token: Percentiles | None
    inter_token: Percentiles | None
    inter_message: Percentiles | None
    failed: Mapping[str, int] = field(default_factory=dict)
    client_load: float = 0.0
    tiers: Mapping[str, int] = field(default_factory=dict)


def row(model: str, engine: str, path: str, case: Case, waves: Sequence[Wave]) -> Row:
    """The row of the rounds of one load."""
    streams = [stream for wave in waves for stream in wave.streams]
    speeds = sorted(filter(None, map(_tokens_per_second, waves)))
    return Row(
        model=model,
        engine=engine,
        path=path,
        case=case,
        rounds=len(waves),
        tokens_per_s=speeds[len(speeds) // 2] if speeds else 0.0,
        first_token=Percentiles.of([s.arrivals[0][0] - s.sent for s in streams if s.arrivals]),
        inter_token=Percentiles.of(
            [seconds / count for s in streams for seconds, count in _gaps(s) for _ in range(count)]
        ),
        inter_message=Percentiles.of([seconds for s in streams for seconds, _ in _gaps(s)]),
        failed=Counter(stream.reason for stream in streams if stream.reason),
        client_load=max((wave.client_load for wave in waves), default=0.0),
        tiers=Counter(stream.tier for stream in streams if stream.tier),
    )


def _tokens_per_second(wave: Wave) -> float:
    answered = [stream for stream in wave.streams if stream.arrivals]
    if not answered:
        return 0.0
    began = min(stream.sent for stream in wave.streams)
    ended = max(stream.arrivals[-1][0] for stream in answered)
    return sum(stream.tokens for stream in answered) / (ended - began)


def _gaps(stream: Stream) -> list[tuple[float, int]]:
    """Seconds between messages, and the tokens that came after each."""
    pairs = zip(stream.arrivals, stream.arrivals[1:], strict=False)
    return [(later - earlier, count) for (earlier, _), (later, count) in pairs if count]


def document(row: Row) -> dict[str, Any]:
    """A row as JSON."""
    return {
        "engine": row.engine,
        "streams": row.case.streams,
        "tokens_per_s": round(row.tokens_per_s, 1),
        "first_token": _percentiles(row.first_token),
        "inter_token": _percentiles(row.inter_token),
        "path": row.path,
        "model": row.model,
        "prompt_tokens": row.case.prompt_tokens,
        "answer_tokens": row.case.answer_tokens,
        "inter_message": _percentiles(row.inter_message),
        "rounds": row.rounds,
        "failed": dict(row.failed),
        "client_load": round(row.client_load, 2),
        **({"tiers": dict(row.tiers)} if row.tiers else {}),
    }


def _percentiles(value: Percentiles | None) -> dict[str, float] | None:
    if value is None:
        return None
    return {"p50": round(value.p50, SECONDS_DIGITS), "p99": round(value.p99, SECONDS_DIGITS)}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table with the columns of ``HEADERS``."""
    case = row.case
    return (
        row.model, row.engine, row.path, str(case.streams), str(case.prompt_tokens), str(case.answer_tokens),
        f"{row.tokens_per_s:,.0f}", *_pair(row.first_token), *_pair(row.inter_token), remarks(row),
    )  # fmt: skip


def _pair(value: Percentiles | None) -> tuple[str, str]:
    return ("", "") if value is None else (_seconds(value.p50), _seconds(value.p99))


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def remarks(row: Row) -> str:
    """What a reader must know to judge a row; usually empty."""
    told = [f"{count} failed: {reason}" for reason, count in sorted(row.failed.items())]
    told += [f"from {tier}" for tier in sorted(row.tiers) if tier != "resident"]
    if row.client_load > BUSY_CLIENT:
        told.append(f"the client is the bound ({row.client_load:.2f} cores)")
    return "; ".join(told)
