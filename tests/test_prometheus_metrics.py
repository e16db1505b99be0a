"""Metrics of a server: names with units, a help text each, values of `info`, and what is said while there is none."""

import math
import urllib.request

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import rl_buffer as rb
from rl_buffer.prometheus_metrics import ServerCollector, metrics_of, serve_metrics

SPEC = rb.TransitionSpec(obs=rb.Field((1,)), action=rb.Field((), "int64"))
TABLES = {
    "replay": rb.ReplayTable(SPEC, 1_000, rb.Prioritized()),
    "uniform": rb.ReplayTable(SPEC, 10),
    "rollout": rb.RolloutTable(SPEC, num_steps=2, num_envs=1),
}
# The last word of a name that has no _total, _ratio, _seconds or _version.
UNITS = {"up", "items", "rows", "waits", "uses", "lag", "priority", "clients", "fragments", "draws", "stuck"}


def parsed(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def scraped(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return parsed(generate_latest(registry).decode())


def value(families, name, **labels):
    (found,) = (s.value for family in families.values() for s in family.samples if (s.name, s.labels) == (name, labels))
    return found


@pytest.fixture
def server(serve):
    return serve(TABLES)


def test_metrics_are_what_info_says(server, connect):
    client = connect(server, name="actor-0")
    client.publish_parameters({"w": np.zeros(1)})
    client.parameters()
    with client.writer("replay", num_envs=1) as writer, client.sampler("replay", 20, prefetch=0) as sampler:
        for number in range(100):
            writer.add([number], 0, 1.0, False, [number])
        writer.flush()
        sampler.sample()
        collector = ServerCollector(server.address)
        families, info = scraped(collector), client.info()
        collector.close()
    assert value(families, "rl_buffer_up") == 1
    assert value(families, "rl_buffer_table_items", table="replay") == 100
    assert value(families, "rl_buffer_table_inserts_total", table="replay") == 100
    assert value(families, "rl_buffer_table_samples_total", table="replay") == 20
    assert value(families, "rl_buffer_table_samples_per_insert_ratio", table="replay") == 0.2
    assert value(families, "rl_buffer_table_capacity_items", table="rollout") == 16
    assert value(families, "rl_buffer_table_limiter_cursor_draws", table="replay") == 80
    assert value(families, "rl_buffer_table_stuck", table="replay") == 0
    items = info["tables"]["replay"]["sampled_items"]
    for quantile, key in (("0.5", "p50"), ("0.9", "p90"), ("1", "max")):
        labels = {"table": "replay", "quantile": quantile}
        assert value(families, "rl_buffer_table_sampled_item_age_items", **labels) == items["age_steps"][key]
        assert value(families, "rl_buffer_table_sampled_item_version_lag", **labels) == 0
        assert value(families, "rl_buffer_table_priority", **labels) == 1.0
    share = value(families, "rl_buffer_table_priority_top_1_percent_share_ratio", table="replay")
    assert share == pytest.approx(0.01)
    assert value(families, "rl_buffer_parameters_version", parameters="policy") == 1
    (session,) = info["clients"][:1]
    labels = {"client": "actor-0", "pid": str(session["pid"])}
    assert value(families, "rl_buffer_client_inserts_total", **labels) == 100
    assert value(families, "rl_buffer_client_samples_total", **labels) == 20
    assert 0 <= value(families, "rl_buffer_client_last_message_age_seconds", **labels) < 60
    assert value(families, "rl_buffer_clients") == 2  # this one, and who asks


def test_every_metric_has_help_and_says_its_unit_and_no_series_comes_twice(server, connect):
    for _ in range(2):  # of the same name, in the same process
        connect(server, name="twin")
    collector = ServerCollector(server.address)
    families = scraped(collector)
    collector.close()
    for family in families.values():
        assert family.documentation.endswith("."), family.name
        is_counter = family.type == "counter"
        last = family.name.rpartition("_")[2]
        assert is_counter or last in UNITS | {"ratio", "seconds", "version"}, family.name
        series = [(sample.name, tuple(sample.labels.items())) for sample in family.samples]
        assert len(series) == len(set(series))
        assert not any(math.isnan(sample.value) for sample in family.samples)


def test_without_a_server_only_up_is_said_and_the_next_one_is_found(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("rl_buffer.prometheus_metrics._TIMEOUT_S", 0.2)
    address = f"ipc://{tmp_path}/s"
    collector = ServerCollector(address)
    assert list(scraped(collector)) == ["rl_buffer_up"]
    monkeypatch.setattr("rl_buffer.prometheus_metrics._TIMEOUT_S", 30.0)
    with rb.BufferServer(TABLES, address):
        assert value(scraped(collector), "rl_buffer_up") == 1
    monkeypatch.setattr("rl_buffer.prometheus_metrics._TIMEOUT_S", 0.2)
    families = scraped(collector)
    assert list(families) == ["rl_buffer_up"]
    assert value(families, "rl_buffer_up") == 0
    with rb.BufferServer(TABLES, address):
        monkeypatch.setattr("rl_buffer.prometheus_metrics._TIMEOUT_S", 30.0)
        assert value(scraped(collector), "rl_buffer_up") == 1
        collector.close()


def test_they_are_served_on_loopback_and_a_port_that_is_taken_is_refused(server):
    with serve_metrics(server.address, 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30.0) as answer:
            assert value(parsed(answer.read().decode()), "rl_buffer_up") == 1
        with pytest.raises(rb.InvalidInput, match=rf"127.0.0.1:{port}: .*; choose another --metrics-port"):
            serve_metrics(server.address, port).__enter__()


def test_metrics_can_be_made_of_every_answer_without_a_client(server, connect):
    assert list(metrics_of(connect(server).info()))
