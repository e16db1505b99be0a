"""What the doctor says of machines that are fit and of those that are not."""

import os
import resource
from collections import namedtuple

import pytest

from rl_buffer import doctor


def found(what):
    (finding,) = (finding for finding in doctor.examine() if finding.what == what)
    return finding


def test_every_line_has_a_status_and_what_is_not_well_says_what_to_do():
    findings = list(doctor.examine())
    lines = {
        "processor",
        "CPUs",
        "memfd",
        "pidfd",
        "memory",
        "/dev/shm",
        "huge pages",
        "descriptors",
        "Python",
        "torch",
    }
    assert lines <= {finding.what for finding in findings}
    for finding in findings:
        assert finding.status in ("ok", "warn", "fail")
        assert finding.found
        assert finding.status == "ok" or finding.advice


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("what", "where", "value", "status", "advice"),
    [
        ("processor", "platform.machine", lambda: "aarch64", "fail", "x86-64"),
        ("memory", "available_memory_nbytes", lambda: 100 << 20, "warn", "docker run --memory"),
        ("/dev/shm", "shutil.disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20), "warn", "--shm-size"),
        ("descriptors", "resource.getrlimit", lambda _: (256, 1024), "warn", "ulimit -Hn"),
        ("CPUs", "os.sched_getaffinity", lambda _: {3}, "warn", "taskset"),
        ("CPUs", "_cgroup_cpus", lambda: 0.5, "warn", "--cpus"),
    ],
)
def test_what_is_too_little_is_seen(monkeypatch, what, where, value, status, advice):
    monkeypatch.setattr(f"rl_buffer.doctor.{where}", value)
    finding = found(what)
    assert finding.status == status
    assert advice in finding.advice


def test_a_kernel_without_pidfd_or_memfd_fails(monkeypatch):
    def refuse(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert (found("pidfd").status, found("memfd").status) == ("fail", "fail")
    assert "not implemented" in found("pidfd").found


def test_a_check_that_cannot_be_made_is_a_warning_and_the_others_go_on(monkeypatch):
    def break_(_):
        raise FileNotFoundError("/dev/shm")

    monkeypatch.setattr("rl_buffer.doctor.shutil.disk_usage", break_)
    findings = list(doctor.examine())
    assert [finding.what for finding in findings if finding.status == "warn"] == ["memory"]
    assert any(finding.what == "Python" for finding in findings)


def test_a_missing_package_fails_and_a_missing_extra_warns(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor, "_OPTIONAL_PACKAGES", {"no-such-extra": "rl-buffer top"})
    assert found("no-such-package").status == "fail"
    assert found("no-such-extra") == doctor.Finding(
        "warn", "no-such-extra", "not installed", "pip install no-such-extra, for rl-buffer top"
    )


def test_no_limit_of_descriptors_is_enough(monkeypatch):
    infinity = resource.RLIM_INFINITY
    monkeypatch.setattr("rl_buffer.doctor.resource.getrlimit", lambda _: (1024, infinity))
    assert found("descriptors").status == "ok"
