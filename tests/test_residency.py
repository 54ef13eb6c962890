"""Where features lie: the choice, and that batches are the same wherever they come from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import features

from avadclip_fast.engine import residency
from avadclip_fast.engine.residency import STEP_TENSORS, Place, choose, decide, fetched, free_memory, place, told

GB = 10**9


@pytest.mark.parametrize(
    ("size", "mapped", "gpu_free", "host_free", "chosen"),
    [
        (20, True, 139, 100, "gpu"),  # XD-Violence on a large GPU
        (20, True, 31, 100, "gpu"),
        (20, True, 30, 100, "memory"),  # 11 are the step's
        (20, True, 30, 39, "file"),  # more than half of what the host has
        (20, False, 30, 1, "memory"),  # it is there already
        (0, True, 10, 100, "memory"),  # not even the step fits: batches are small beside it
        (20, True, None, 100, "file"),  # no GPU: as it came
        (20, False, None, 100, "memory"),
    ],
)
def test_the_choice(size, mapped, gpu_free, host_free, chosen):
    gpu = None if gpu_free is None else gpu_free * GB
    place = choose(size * GB, mapped, gpu, host_free * GB, step=11 * GB)
    assert place.where == chosen and place.why


def test_a_step_takes_float32_and_processes_share_the_host(monkeypatch):
    device, size, step = torch.device("cuda"), 10**6, STEP_TENSORS * 96 * 16 * 32 * 4
    monkeypatch.setattr(residency, "free_memory", lambda: 2 * size)  # of which half may be taken
    for free, processes, where in ((size + step, 1, "gpu"), (size + step - 1, 1, "memory"), (step, 2, "file")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert decide(size, True, (16, 32), device, 96).where == where


def test_on_a_processor_nothing_moves_and_that_is_told():
    data = features(6)
    for mapped, where in ((False, "host memory"), (True, "their file")):
        given = replace(data, mapped=mapped)
        placed, line = place(given, torch.device("cpu"), 96)
        assert placed is given and where in line and line.startswith("features: 0.0 MB in")
        assert where in told(1, decide(1, mapped, (16, 32), torch.device("cpu"), 96))
    assert 1 << 20 < free_memory() < 1 << 50


def test_a_mapped_set_is_copied_to_memory(monkeypatch):
    monkeypatch.setattr(residency, "decide", lambda *_: Place("memory", "it fits"))
    given = replace(features(6), mapped=True)
    placed, _ = place(given, torch.device("cpu"), 4)
    assert not placed.mapped and placed.visual is not given.visual
    for a, b in zip(placed.batch(torch.arange(6)), given.batch(torch.arange(6)), strict=True):
        assert torch.equal(a, b)


def test_a_containers_limit_is_the_hosts(monkeypatch):
    meminfo = "MemTotal: 9 kB\nMemAvailable: 1000 kB\n"
    files = {"meminfo": meminfo, "memory.max": "600000\n", "memory.current": "200000\n"}
    files["memory.stat"] = "anon 150000\ninactive_file 40000\n"
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name])
    assert free_memory() == 440_000
    files["memory.max"] = "max\n"
    assert free_memory() == 1_024_000


def test_macos_tells_its_memory_but_not_what_is_free(monkeypatch):
    """Training asks for it on a processor too."""

    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    known = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 16384}
    monkeypatch.setattr(residency.os, "sysconf", lambda name: known[name])
    assert free_memory() == 16_384_000


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_come_in_order_and_once(ahead, dtype):
    data, asked = features(11), []
    data = replace(data, visual=data.visual.to(dtype), audio=data.audio.to(dtype)).subset(torch.arange(10, -1, -1))
    chunks = torch.arange(11).split(4)

    def fetch(index):
        asked.append(index.tolist())
        return data.stored(index), data.visual[index].float()

    found = fetched(chunks, fetch, torch.device("cpu"), ahead)
    assert asked == []
    first, known = next(found)
    assert torch.equal(known, data.visual[:4].float())
    for (batch, _), index in zip([(first, known), *found], chunks, strict=True):
        for got, expected in zip(batch, data.batch(index), strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert asked == [index.tolist() for index in chunks]


def test_a_fetch_that_fails_is_told_where_its_batch_is_asked_for():
    def fetch(index):
        if index[0] == 8:
            raise OSError("gone")
        return features(11).stored(index), None

    found = fetched(torch.arange(11).split(4), fetch, torch.device("cpu"), ahead=True)
    next(found), next(found)
    with pytest.raises(OSError, match="gone"):
        next(found)
