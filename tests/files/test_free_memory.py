"""Limits of control groups: both versions, of the own group and of all above it."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from neuralink_cli.files import free_memory
from neuralink_cli.files.free_memory import allowed_by_groups, available_memory, remark_if_short


def group(folder: Path, version: int, limit: object, used: int, reclaimable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 7\n{names[2]} {reclaimable}\n")


def listed(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "cgroup").write_text("".join(line + "\n" for line in lines))
    return tmp_path / "cgroup"


def test_version_2_with_limits_above(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    group(mount / "jobs/mine", 2, "max", 100, 0)
    group(mount / "jobs", 2, 5000, 1000, 200)
    assert list(allowed_by_groups(listed(tmp_path, "0::/jobs/mine"), mount)) == [4200]
    (mount / "jobs/mine/memory.high").write_text("700\n")
    assert list(allowed_by_groups(listed(tmp_path, "0::/jobs/mine"), mount)) == [600, 4200]


def test_version_1_beside_other_controllers(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    group(mount / "memory/docker/abc", 1, 9000, 1000, 500)
    group(mount / "memory/docker", 1, 8000, 1000, 0)
    groups = listed(tmp_path, "4:cpu,cpuacct:/docker/abc", "3:memory:/docker/abc", "0::/system.slice")
    assert list(allowed_by_groups(groups, mount)) == [8500, 7000]


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_sees_only_its_own_group(tmp_path: Path, version: int) -> None:
    """The path is that outside the container; the mount has the group itself as its root."""
    mount = tmp_path / "mount"
    group(mount / "memory" if version == 1 else mount, version, 4000, 1000, 0)
    groups = listed(tmp_path, "3:memory:/docker/abc" if version == 1 else "0::/docker/abc")
    assert list(allowed_by_groups(groups, mount)) == [3000]


def test_groups_that_say_nothing(tmp_path: Path) -> None:
    assert list(allowed_by_groups(tmp_path / "missing", tmp_path)) == []
    group(tmp_path / "mount", 2, "unlimited?", 1, 1)
    assert list(allowed_by_groups(listed(tmp_path, "0::/", "1:name=systemd:/x"), tmp_path / "mount")) == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory().available
    monkeypatch.setattr(free_memory, "allowed_by_groups", lambda: iter([10**18, 12345]))
    assert available_memory() == 12345
    monkeypatch.setattr(free_memory, "allowed_by_groups", lambda: iter([-5]))
    assert available_memory() == 0
    monkeypatch.setattr(free_memory, "allowed_by_groups", lambda: iter([]))
    assert available_memory() == pytest.approx(free, rel=0.5)


def test_a_run_that_may_need_more_than_it_may_take_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = SimpleNamespace(rss=100 << 20, vms=300 << 20)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: taken))
    monkeypatch.setattr(free_memory, "available_memory", lambda: 50 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    remark_if_short(150 << 20)
    assert not caplog.records
    remark_if_short((150 << 20) + 1)
    assert "may need 52.4 MB more memory, of which 52.4 MB are free here" in caplog.text
    # Addresses may be fewer than the memory of the machine.
    caplog.clear()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (320 << 20, 320 << 20))
    remark_if_short(120 << 20)
    assert not caplog.records
    remark_if_short(150 << 20)
    assert "of which 21.0 MB are free here" in caplog.text
