"""Control groups: which are found where, and how version 2 is written. The real ones are used by the other
tests of this folder; version 2 is played with folders here, as a machine has its controllers in one version
alone."""

from __future__ import annotations

import os

import pytest

from sandboxes.bubblewrap import cgroups


def test_mounts_and_groups_of_this_process_are_read():
    assert all(path.startswith("/") for path in cgroups._own_groups().values())
    for point, root in cgroups._mounts().values():
        assert point.is_dir()
        assert root.startswith("/")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with version 2 alone: this process is in /user/session."""
    session = tmp_path / "user" / "session"
    session.mkdir(parents=True)
    for folder in (tmp_path, session):
        (folder / "cgroup.subtree_control").write_text("cpu memory pids\n")
    monkeypatch.setattr(cgroups, "_mounts", lambda: {"": (tmp_path, "/")})
    monkeypatch.setattr(cgroups, "_own_groups", lambda: {"": "/user/session"})
    # A folder is removed with the files in it, as the kernel does it.
    monkeypatch.setattr(cgroups.Cgroup, "remove", lambda group: True)
    return tmp_path


def test_version_2_is_written_as_the_kernel_reads_it(machine):
    hierarchy = cgroups.detect()
    assert (hierarchy.version, hierarchy.bases["memory"]) == (2, machine / "user" / "session")
    group = hierarchy.create("k2rl-1-2-3")
    (group.folders["memory"] / "memory.swap.max").touch()
    group.limit(1000, 20)
    group.join()
    read = {path.name: path.read_text() for path in group.folders["memory"].iterdir()}
    assert read["memory.max"] == "1000"
    assert read["memory.swap.max"] == "0"
    assert read["cgroup.procs"] == "0"
    group.events.write_text("low 0\nmax 7\noom 2\noom_kill 3\n")
    assert cgroups.oom_kills(group.events) == 3


def test_controllers_that_are_not_handed_down_are_asked_for(machine):
    control = machine / "user" / "session" / "cgroup.subtree_control"
    control.write_text("")
    assert cgroups.detect().version == 2
    assert control.read_text() in ("+memory", "+memory +pids")


def test_where_the_own_group_cannot_have_children_the_topmost_is_tried(machine):
    (machine / "user" / "session" / "cgroup.subtree_control").unlink()
    assert cgroups.detect().bases["memory"] == machine


def test_nowhere(machine):
    for folder in (machine, machine / "user" / "session"):
        (folder / "cgroup.subtree_control").unlink()
    with pytest.raises(cgroups.NoCgroupsError, match="No such file"):
        cgroups.detect()


def test_a_container_sees_a_part_of_the_hierarchy(tmp_path):
    assert cgroups._folder((tmp_path, "/docker/abc"), "/docker/abc/x") == tmp_path / "x"
    assert cgroups._folder((tmp_path, "/docker/abc"), "/docker/abc") == tmp_path
    assert cgroups._folder((tmp_path, "/"), "/a/b") == tmp_path / "a" / "b"


def test_a_group_names_its_keeper():
    assert cgroups.keeper_lives(cgroups.group_name(7))
    assert not cgroups.keeper_lives(f"{cgroups.PREFIX}{os.getpid()}-1-7")  # this pid, of another time
    assert not cgroups.keeper_lives(f"{cgroups.PREFIX}{2**22 + 1}-1-7")
