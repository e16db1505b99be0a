"""Figures of a server for Prometheus: from `client.info()`, asked for at each scrape, so that nothing runs in between.

Needs prometheus_client: pip install rl_buffer[prometheus].
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rl_buffer.client import Client, connect
from rl_buffer.errors import InvalidInput, RLBufferError

_TIMEOUT_S = 5.0  # of a scrape; Prometheus itself waits 10

# (key in info()["tables"][name], metric, help); an absent key has no sample. A name that ends in _total is a counter.
_OF_TABLES = (
    ("size", "items", "Items that can be sampled, or rollout fragments that are finished."),
    ("capacity", "capacity_items", "Items that the table keeps."),
    ("reserved_rows", "reserved_rows", "Rows that writers hold and have not committed."),
    ("inserts", "inserts_total", "Items committed."),
    ("samples", "samples_total", "Draws granted to samplers, or fragments handed out."),
    ("deletes", "deletes_total", "Items evicted or cleared, or fragments dropped for too much lag."),
    ("stale_updates", "stale_updates_total", "Priorities that came after their item was overwritten."),
    ("overtaken_rows", "overtaken_rows_total", "Drawn rows that were overwritten before they were gathered."),
    ("samples_per_insert", "samples_per_insert_ratio", "Draws per item since the table began."),
)
_OF_LIMITERS = (  # (key in "limiter", metric, help); no bound has no sample
    ("cursor", "cursor_draws", "Draws that the inserts so far have earned, less those granted."),
    ("min_diff", "min_diff_draws", "The cursor below which sampling waits."),
    ("max_diff", "max_diff_draws", "The cursor above which inserting waits."),
)
# (key in "sampled_items", metric, help): a sample for each quantile.
_OF_SAMPLED_ITEMS = (
    ("age_steps", "sampled_item_age_items", "Items inserted since, of the items drawn last."),
    ("age_s", "sampled_item_age_seconds", "Time since their commit, of the items drawn last."),
    ("times_sampled", "sampled_item_uses", "How often they were drawn, of the items drawn last."),
    ("version_lag", "sampled_item_version_lag", "Parameter versions published since, of the items drawn last."),
)
_QUANTILES = {"p50": "0.5", "p90": "0.9", "p99": "0.99", "max": "1"}
_OF_CLIENTS = (
    ("inserts", "inserts_total", "Items committed by the client."),
    ("samples", "samples_total", "Draws or fragments granted to the client."),
    ("reserved_rows", "reserved_rows", "Rows that its writers hold and have not committed."),
    ("reading", "reading_fragments", "Rollout fragments that its readers hold."),
)


def metrics_of(info: Mapping[str, Any]) -> Iterator[Metric]:
    """All metrics of one answer of `client.info()`."""
    for key, name, help_text in (
        ("num_messages", "messages_total", "Messages that the server handled."),
        ("num_refused", "refused_total", "Messages and clients that it refused."),
        ("num_undelivered", "undelivered_total", "Answers to clients that did not read."),
    ):
        yield _family(f"rl_buffer_{name}", help_text, (), [((), info[key])])
    tables = info["tables"]
    for key, name, help_text in _OF_TABLES:
        samples = [((table,), figures[key]) for table, figures in tables.items() if key in figures]
        yield _family(f"rl_buffer_table_{name}", help_text, ("table",), samples)
    waits = [((table,), len(figures["waits"])) for table, figures in tables.items()]
    yield _family("rl_buffer_table_waits", "Queues of the table in which somebody waits.", ("table",), waits)
    stuck = [((table,), float(bool(figures["stuck"]))) for table, figures in tables.items()]
    yield _family("rl_buffer_table_stuck", "1 if nobody who waits at the table can move.", ("table",), stuck)
    limiters = {table: figures["limiter"] for table, figures in tables.items() if "limiter" in figures}
    for key, name, help_text in _OF_LIMITERS:
        samples = [((table,), limiter[key]) for table, limiter in limiters.items() if limiter[key] is not None]
        yield _family(f"rl_buffer_table_limiter_{name}", help_text, ("table",), samples)
    for key, name, help_text in _OF_SAMPLED_ITEMS:
        of_tables = ((table, figures["sampled_items"][key]) for table, figures in tables.items())
        yield _family(f"rl_buffer_table_{name}", help_text, ("table", "quantile"), _quantiles(of_tables))
    priorities = [(table, figures["priorities"]) for table, figures in tables.items() if figures["priorities"]]
    help_text = "Sampling masses, (|TD error| + epsilon)^alpha, of a random part of the items."
    yield _family("rl_buffer_table_priority", help_text, ("table", "quantile"), _quantiles(priorities))
    shares = [((table,), figures["top_1_percent_share"]) for table, figures in priorities]
    help_text = "Share of all mass that the hundredth of the items with the largest has."
    yield _family("rl_buffer_table_priority_top_1_percent_share_ratio", help_text, ("table",), shares)
    versions = [((name,), version) for name, version in info["parameters"].items()]
    yield _family("rl_buffer_parameters_version", "Newest published version.", ("parameters",), versions)
    yield from _metrics_of_clients(info["clients"])


def _metrics_of_clients(clients: list[dict[str, Any]]) -> Iterator[Metric]:
    connected = sum(client["connected"] for client in clients)
    yield _family("rl_buffer_clients", "Clients that are attached.", (), [((), connected)])
    labels = ("client", "pid")
    for key, name, help_text in _OF_CLIENTS:
        sums: dict[tuple[str, ...], float] = defaultdict(float)  # a process may have several clients of one name
        for client in clients:
            sums[client["name"], str(client["pid"])] += client[key]
        yield _family(f"rl_buffer_client_{name}", help_text, labels, sums.items())
    silent: dict[tuple[str, ...], float] = {}
    for client in clients:
        who = (client["name"], str(client["pid"]))
        silent[who] = min(client["last_message_s"], silent.get(who, float("inf")))
    help_text = "Time since the client's last message; one that has nothing to do sends none."
    yield _family("rl_buffer_client_last_message_age_seconds", help_text, labels, silent.items())


def _quantiles(of_tables: Iterable[tuple[str, Mapping[str, float] | None]]) -> Iterator[tuple[tuple[str, ...], float]]:
    for table, spread in of_tables:
        for key, quantile in _QUANTILES.items():
            if spread is not None and key in spread:
                yield (table, quantile), spread[key]


def _family(
    name: str, help_text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, help_text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


class ServerCollector(Collector):
    """Asks the server at an address whenever it is scraped; `rl_buffer_up` says whether one answered."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()  # scrapes come in threads
        self._client: Client | None = None

    def describe(self) -> list[Metric]:
        """Nothing beforehand: the registry need not scrape to know names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        info = None
        with self._lock, contextlib.suppress(RLBufferError, OSError):
            info = self._ask()
        yield _family("rl_buffer_up", "1 if the server answered this scrape.", (), [((), float(info is not None))])
        if info is not None:
            yield from metrics_of(info)

    def _ask(self) -> dict[str, Any]:
        try:
            if self._client is None:
                self._client = connect(self._address, _TIMEOUT_S, name="rl-buffer metrics")
            return self._client.info()
        except (RLBufferError, OSError):
            self.close()  # the next scrape looks for another server
            raise

    def close(self) -> None:
        """Detach."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


@contextlib.contextmanager
def serve_metrics(address: str, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Answer http://host:port/metrics inside the block; its value is the port, which 0 lets the system choose.

    Raises:
        InvalidInput: the port cannot be had.
    """
    collector, registry = ServerCollector(address), CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise InvalidInput(
            f"metrics cannot be served at {host}:{port}: {error}; choose another --metrics-port"
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        collector.close()
