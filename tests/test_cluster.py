"""`avadclip-fast extract --engine ray`, on a cluster of two nodes in this machine."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from deadly import FLAGS
from test_cli import call, mistake
from videos import make_video

from avadclip_fast.media import cluster
from avadclip_fast.media.encoders import Encoders
from avadclip_fast.media.errors import MediaError
from avadclip_fast.media.extract import Source
from avadclip_fast.media.features import Sampling

pytest.importorskip("av")
ray = pytest.importorskip("ray", reason="the ray extra is absent: no cluster was tested")

THREADS = ["--visual-encoder", "deadly:Grey", "--audio-encoder", "deadly:Loudness", "-q"]
RAY = ["--engine", "ray", "--visual-encoder", "deadly:Deadly", *THREADS[2:]]


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A cluster of two nodes, and the folder where its workers leave their flags."""
    from ray.cluster_utils import Cluster

    flags = tmp_path / "flags"
    flags.mkdir()
    monkeypatch.setenv(FLAGS, str(flags))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handler = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield flags
    nodes.shutdown()
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def films(tmp_path):
    """Six, of which a Deadly encoder dies once, at the third."""
    folder = tmp_path / "films"
    folder.mkdir()
    for i in range(6):
        level = 220 if i == 2 else 30 * i
        make_video(folder / f"{i}.mkv", frames=40, audio=i % 2, tone=(0.3, 1), grey=lambda _, level=level: level)
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)  # where module:factory is looked for
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "")  # so that what extract sets is put back
        monkeypatch.delenv(name)


def features(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.npy")}


def test_killed_workers_lose_nothing(two_nodes, films, tmp_path, capsys, monkeypatch):
    """One video kills its worker once, and is done again; one kills each, and is told; one is none."""
    monkeypatch.setattr(cluster, "RETRIES", 1)
    by_threads, by_ray = tmp_path / "threads", tmp_path / "ray"
    assert call("extract", films, "-o", by_threads, *THREADS) == 0
    expected = features(by_threads)
    assert len(expected) == 9  # 6 of sight, 3 of sound
    make_video(films / "white.mkv", frames=40, grey=lambda _: 255)
    (films / "text.mkv").write_text("no video")
    capsys.readouterr()
    assert call("extract", films, "-o", by_ray, *RAY) == 1
    assert (two_nodes / "killed").exists()
    said = capsys.readouterr()
    assert said.out.startswith("6 extracted, 0 were there, 2 failed\n")
    text, white = said.err.splitlines()  # and not a word of Ray's
    assert text.startswith(f"failed: {films / 'text.mkv'}: not a video")
    assert white.startswith(f"failed: {films / 'white.mkv'}: its worker process died, 2 times over")
    record = json.loads((by_ray / "extract.json").read_text())
    assert record["done"] == list("012345") and record["skipped"] == [] and len(record["failed"]) == 2
    assert features(by_ray) == expected and not list(by_ray.rglob("*.tmp"))
    assert (by_ray / "list.csv").read_text() == (by_threads / "list.csv").read_text()
    assert not ray.is_initialized()
    # what one engine did, another need not do
    (films / "white.mkv").unlink(), (films / "text.mkv").unlink()
    assert call("extract", films, "-o", by_ray, "--visual-encoder", "deadly:Deadly", *THREADS[2:]) == 0
    assert capsys.readouterr().out.startswith("0 extracted, 6 were there, 0 failed")
    settings = json.loads((by_ray / "done" / "0.json").read_text())["settings"]
    chosen = Encoders("deadly:Deadly", "openai", "none", device="cpu")
    assert cluster._task(Source(films / "0.mkv", "0"), by_ray, Sampling(), chosen, settings) == ("skipped", "")


class Counting:
    """What `cluster._run` uses of Ray: tasks end, one after the other, when they are waited for."""

    exceptions = ray.exceptions

    def __init__(self, processors, interrupted_after=None):
        self.processors, self.left = processors, interrupted_after
        self.tasks, self.most, self.cancelled, self.awaited = 0, 0, [], 0

    def cluster_resources(self):
        return {"CPU": float(self.processors)}

    def remote(self, source, *_):
        self.tasks += 1
        return self.tasks

    def wait(self, running, num_returns=1, timeout=None):
        self.most = max(self.most, len(running))
        self.awaited = num_returns
        if self.left is not None and timeout == cluster.LOOK:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return running[:1], running[1:]

    def get(self, task):
        return "done", ""

    def cancel(self, task):
        self.cancelled.append(task)


def run(fake, sources, until=lambda: False):
    tally = cluster.Tally()
    cluster._run(fake, fake, [Source(Path(f"{i}.mkv"), f"{i}") for i in range(sources)], (), tally, until)
    return tally.record()


def test_tasks_in_flight_are_bounded():
    fake = Counting(4)
    assert len(run(fake, 1000)["done"]) == 1000 and fake.tasks == 1000 and fake.most == 8
    assert run(Counting(0), 3)["done"] == ["0", "1", "2"]  # machines are still to come
    assert run(Counting(4), 0) == {"done": [], "skipped": [], "failed": []}
    fake = Counting(8)
    lose = lambda: vars(fake).update(processors=1 if fake.tasks > 20 else 8)  # noqa: E731  a machine
    assert len(run(fake, 100, until=lose)["done"]) == 100


def test_an_interrupt_calls_off_what_runs():
    fake = Counting(2, interrupted_after=5)
    with pytest.raises(KeyboardInterrupt):
        run(fake, 100)
    assert fake.tasks == 9 and fake.cancelled == [6, 7, 8, 9]  # and none that has ended
    assert fake.awaited == 4  # so that none leaves a temporary file


def test_being_asked_to_end_calls_off_what_runs_and_keeps_what_is_done():
    fake = Counting(2)
    record = run(fake, 100, until=lambda: fake.tasks >= 9)
    assert len(record["done"]) == 6 and fake.cancelled == [7, 8, 9]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ray.exceptions.RayTaskError("f", "Traceback:\n  ...\nTypeError: x", TypeError("x")),
            "RayTaskError: TypeError: x",
        ),
        (ray.exceptions.RayError("the machine is gone\nIts logs:"), "RayError: the machine is gone"),
        (ray.exceptions.RayError(), "RayError: "),
    ],
    ids=["a traceback ends with its cause", "others begin with it", "none"],
)
def test_a_lost_task_is_told_in_a_line_and_costs_no_other(error, told):
    def get(task):
        if task == 1:
            raise error
        return "done", ""

    fake = Counting(4)
    fake.get = get
    assert run(fake, 3) == {
        "done": ["1", "2"],
        "skipped": [],
        "failed": [{"source": "0.mkv", "reason": f"0.mkv: {told}"}],
    }


def test_encoders_are_loaded_once_a_process():
    chosen = Encoders("deadly:Grey", "openai", "none", device="cpu")
    same = Encoders("deadly:Grey", "openai", "none", device="cpu")
    assert cluster._loaded(chosen)[0] is cluster._loaded(same)[0]


def test_weights_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("openai", "random", "https://host/w.pt", "/w.pt"):
        assert cluster._absolute(given) == given
    assert cluster._absolute("w.pt") == str(tmp_path / "w.pt")


def test_the_gpu_that_was_lent(monkeypatch):
    class Context:
        def get_accelerator_ids(self):
            return {"GPU": ["3"]}

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    for visible, device in ((None, "cuda:3"), ("", "cuda:3"), ("2,3", "cuda:1")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cluster._lent() == device
    monkeypatch.setattr(cluster, "_loaded", lambda encoders: pytest.fail(encoders.device))
    chosen = Encoders("deadly:Grey", "openai", "none", device="cuda")
    with pytest.raises(pytest.fail.Exception, match="cuda:1"):
        cluster._task(Source(Path("a.mkv"), "a"), Path("out"), Sampling(), chosen, {})


@pytest.mark.parametrize(
    ("wanted", "gpus", "given"), [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda")]
)
def test_each_video_takes_a_gpu_where_there_are_some(wanted, gpus, given, monkeypatch):
    asked, sent, fake = [], [], Counting(4)
    fake.is_initialized, fake.cluster_resources = lambda: True, lambda: {"CPU": 4.0, "GPU": gpus}
    fake.remote = lambda **options: asked.append(options) or (lambda _: task)
    task = SimpleNamespace(remote=lambda *arguments: sent.append(arguments) or 1)
    monkeypatch.setattr(cluster, "import_ray", lambda: fake)
    chosen = Encoders("deadly:Grey", "w.pt", "none", device=wanted)
    found = cluster.extract([Source(Path("a.mkv"), "a")], "out", Sampling(), chosen, {})
    assert found["done"] == ["a"]
    (options,), ((source, output, _, encoders, _),) = asked, sent
    assert (options["num_gpus"], encoders.device) == (int(given == "cuda"), given)
    assert (options["max_retries"], options["max_calls"]) == (cluster.RETRIES, 0)  # workers keep their encoders
    assert (options["runtime_env"] is not None) == (given == "cuda")  # Ray is to hide none of a worker's GPUs
    assert all(Path(path).is_absolute() for path in (source.path, output, encoders.visual_weights))


def test_a_gpu_that_a_cluster_lacks_is_told(monkeypatch):
    fake = Counting(4)
    fake.is_initialized = lambda: True
    monkeypatch.setattr(cluster, "import_ray", lambda: fake)
    with pytest.raises(MediaError, match="device 'cuda' is not available: the Ray cluster has no GPU"):
        cluster.extract([], "out", Sampling(), Encoders("deadly:Grey", "openai", "none", device="cuda"), {})


def test_a_cluster_that_is_started_here_prints_and_sends_nothing():
    asked = []
    cluster._connect(SimpleNamespace(init=lambda **options: asked.append(options)))
    assert asked == [{"log_to_driver": False, "logging_level": logging.ERROR}]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_mistakes_are_told_once(films, tmp_path, capsys, monkeypatch):
    wrong = ["extract", films, "-o", tmp_path / "out", "--engine", "ray"]
    missing = ["--visual-encoder", "deadly:Grey", "--audio-weights", tmp_path / "none.pt", "-q"]
    assert "none.pt: no such file" in mistake(capsys, *wrong, *missing)
    assert "device 'cuda:1' with Ray" in mistake(capsys, *wrong, *THREADS, "--device", "cuda:1")
    for address in ("nothing://here", "here"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert "no Ray cluster" in mistake(capsys, *wrong, *THREADS)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'pip install "avadclip_fast[ray]"' in mistake(capsys, *wrong, *THREADS)
    assert not ray.is_initialized() and not list(tmp_path.rglob("*.npy"))
