"""The controller's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0, 8.0, 20.0, 60.0, 300.0)


class Metrics:
    """Counters and histograms in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.starts = Counter(
            "dumont_controller_starts",
            "Starts by tier and outcome.",
            ["tier", "outcome"],
            registry=self.registry,
        )
        self.fallbacks = Counter(
            "dumont_controller_fallbacks",
            "Attempts of a tier that failed, by reason; the next tier was attempted.",
            ["tier", "reason"],
            registry=self.registry,
        )
        self.captures = Counter(
            "dumont_controller_captures", "Captures by outcome.", ["outcome"], registry=self.registry
        )
        self.actions = Counter(
            "dumont_controller_actions",
            "Parks, stops, deletions and restarts by outcome.",
            ["action", "outcome"],
            registry=self.registry,
        )
        self.yields = Counter(
            "dumont_controller_yields",
            "Instances that made room for others, by how, and whether they were in use.",
            ["how", "use"],
            registry=self.registry,
        )
        self.reconciler_errors = Counter(
            "dumont_controller_reconciler_errors",
            "Plans of the reconciler that failed because of a defect; each is repeated after a wait.",
            registry=self.registry,
        )
        self.phases = Histogram(
            "dumont_controller_phase_seconds",
            "Seconds of each named step of a start.",
            ["phase"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.requests = Counter(
            "dumont_controller_requests",
            "Requests by method, the tier that answered and outcome.",
            ["method", "tier", "outcome"],
            registry=self.registry,
        )
