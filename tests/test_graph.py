"""Steps recorded as CUDA graphs: the same numbers as plain ones. Without a GPU a stand-in plays the graph's part."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import small_models
import torch
from op_tests import ON_GPU
from test_evaluate import videos
from test_train import CLASSES, SMALL, features, killed, same, teacher, weights

from avadclip_fast import AVadCLIP, AVadCLIPStudent, data
from avadclip_fast.engine import evaluate, graph, loop, residency, step, teacher_cache, train
from avadclip_fast.engine.recipe import Recipe, RecipeError
from avadclip_fast.engine.residency import Place

RECIPE = Recipe(epochs=3, batch_size=6, lr=1e-3, milestones=(1,), temporal_lr=0.3, noise=0.5, distill_weight=1e-2)
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


def let_a_processor_record(patch: pytest.MonkeyPatch) -> list:
    """A replay calls again what was recorded. Returns a list that gets an entry for each recording."""
    found = []

    def capture(function, pool):
        found.append(pool)
        result = torch.empty(0)

        def replay():
            now = function()
            result.resize_(now.shape).copy_(now)

        return replay, result, (0, 1)

    def rehearse(function):
        for _ in range(graph.REHEARSALS):
            function()

    patch.setattr(graph, "capture", capture)
    patch.setattr(graph, "rehearse", rehearse)
    for where in (train, evaluate):
        patch.setattr(where, "recordable", lambda device: True)
    adamw = step.adamw  # with a tensor for a rate, as every GPU has it
    patch.setattr(train, "adamw", lambda model, recipe, device, graph: adamw(model, recipe, device, True))
    return found


@pytest.fixture
def recordings(request, monkeypatch):
    return [] if "cuda" in request.node.name else let_a_processor_record(monkeypatch)


def run(kind, folder, data, recipe, device, **how):
    torch.manual_seed(0)
    guide = teacher()
    model = AVadCLIP(CLASSES, **SMALL) if kind == "teacher" else AVadCLIPStudent.beside(guide)
    known = None if kind == "teacher" else guide
    return train.fit(model, data, recipe, folder, teacher=known, device=device, progress=False, **how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", ["teacher", "distilled"])
def test_recorded_steps_give_the_same_numbers(kind, resident, device, recordings, monkeypatch, tmp_path):
    def begin(loop):
        loop.resident, loop.longest = resident, 16

    monkeypatch.setattr(loop.Loop, "__post_init__", begin)
    if device == "cuda" and not resident:
        monkeypatch.setattr(residency, "decide", lambda *_: Place("memory", "to be sent"))
    data = features(17)  # two batches of 6 and one of 5
    plain = run(kind, tmp_path / "plain", data, RECIPE, device, graph=False)
    assert recordings == []
    recorded = run(kind, tmp_path / "recorded", data, RECIPE, device, graph=True)
    assert recorded == plain and same(weights(tmp_path / "recorded"), weights(tmp_path / "plain"))
    if device == "cpu":
        assert recordings == [None, (0, 1)]  # one a size, in one pool


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [teacher_cache.CACHE_LIMIT, 0], ids=["memory", "file"])
@pytest.mark.parametrize("padding", ["masked", "official"])
def test_teacher_features_are_replays(padding, limit, device, recordings, monkeypatch, tmp_path):
    """Of full blocks, once there are enough of them; the last one, which is smaller, is a plain pass."""
    monkeypatch.setattr(teacher_cache, "CACHE_BLOCK", 3)
    monkeypatch.setattr(teacher_cache, "CACHE_LIMIT", limit)
    monkeypatch.setattr(teacher_cache, "RECORDED", 4)
    torch.manual_seed(0)
    guide = AVadCLIP(CLASSES, **SMALL, padding=padding).eval().to(device)
    passes, plain = [], teacher_cache.teacher_features

    def noted(teacher, batch, precision):
        passes.append(len(batch.lengths))
        return plain(teacher, batch, precision)

    monkeypatch.setattr(teacher_cache, "teacher_features", noted)

    def cache(data, graph):
        passes.clear()
        folder, place = tmp_path / f"{len(data)} {graph}", torch.device(device)
        folder.mkdir()
        source, _ = residency.place(data, place, 6)
        return teacher_cache.kept_features(guide, data, source, {}, folder, place, 6, False, graph)[0].cpu()

    few, many = features(11), features(13)
    expected = cache(many, graph=False)
    assert passes == [3, 3, 3, 3, 1]
    torch.testing.assert_close(cache(many, graph=True), expected, rtol=0 if device == "cuda" else 1e-4, atol=1e-6)
    assert passes.count(1) == 1 and len(passes) == 1 + (3 if device == "cuda" else graph.REHEARSALS + 4)
    cache(few, graph=True)
    assert passes == [3, 3, 3, 2]
    assert device == "cuda" or len(recordings) == 1


def test_a_recorded_run_goes_on_as_one_that_was_never_cut(recordings, monkeypatch, tmp_path):
    monkeypatch.setattr(loop.Loop, "__post_init__", lambda loop: vars(loop).update(resident=True, longest=16))
    data, recipe = features(17), replace(RECIPE, checkpoint_every=1)
    run("distilled", tmp_path / "whole", data, recipe, "cpu", graph=True)
    with killed(lambda number, *_: number == 6):  # in the second epoch
        run("distilled", tmp_path / "cut", data, recipe, "cpu", graph=True)
    run("distilled", tmp_path / "cut", data, recipe, "cpu", graph=True, resume=True)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_recording_leaves_what_it_changes_as_it_was(recordings):
    weight, moments = torch.ones(3), {}

    def function(x):
        moments.setdefault("sum", torch.zeros(3)).add_(x)
        return weight.add_(moments["sum"]).sum()[None]

    step = graph.StepGraph(function, lambda: [weight, *moments.values()])
    step.record(given := torch.full((3,), 2.0))
    assert weight.tolist() == [1, 1, 1] and moments["sum"].tolist() == [0, 0, 0]
    step.record(torch.full((3,), 5.0))  # the same shape: there already
    assert len(recordings) == 1
    assert step(torch.full((3,), 3.0)).tolist() == [12] and given.tolist() == [2, 2, 2]
    step.record(torch.ones(1))  # another shape, when there is something to lose
    assert weight.tolist() == [4, 4, 4] and moments["sum"].tolist() == [3, 3, 3]
    assert step(torch.ones(1)).tolist() == [24]
    step.record(torch.ones(1, dtype=torch.float64))  # which a graph of float32 would round
    assert len(recordings) == 3


def test_a_graph_is_recorded_on_the_gpu_of_its_inputs(recordings, monkeypatch):
    """Whichever is the current one: `eval --device cuda:1` got every pass of an empty graph alike."""
    inside = []

    @contextlib.contextmanager
    def noted(device):
        inside.append(device.type)
        yield
        inside.append("left")

    plain = graph.capture
    monkeypatch.setattr(graph, "current", noted)
    monkeypatch.setattr(graph, "capture", lambda *given: inside.append("captured") or plain(*given))
    graph.StepGraph(lambda x: inside.append("ran") or x + 1).record(torch.ones(3))
    assert inside == ["cpu", "ran", "ran", "captured", "left"]


def test_each_gpu_has_a_stream_for_its_captures(monkeypatch):
    """torch's own is on the GPU of a process's first capture, and one on another GPU would record nothing."""
    streams = []

    def capturing(recorded, pool, stream, capture_error_mode):
        streams.append((stream, pool))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None, pool=lambda: (0, 1)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: [device])
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    graph._capturing.cache_clear()
    try:
        for device in (0, 1, 1, 0):
            monkeypatch.setattr(torch.cuda, "current_device", lambda: device)  # noqa: B023
            graph.capture(lambda: None, None)
    finally:
        graph._capturing.cache_clear()
    assert [stream for stream, _ in streams] == [[0], [1], [1], [0]]
    assert streams[0][0] is streams[3][0] and streams[1][0] is streams[2][0]  # graphs of a pool share it


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize(("make", "silent"), [("teacher", False), ("teacher", True), ("student", False)])
def test_passes_of_scoring_are_replays(make, silent, padding, device, recordings):
    model = getattr(small_models, make)(padding=padding).to(device)
    plain = list(evaluate.stream_scores(model, videos(), device, silent=silent, chunks=100))
    assert recordings == []  # all in the first pass
    packed = evaluate.stream_scores(model, videos(), device, silent=silent, chunks=3)
    for of, expected in zip(packed, plain, strict=True):
        assert of.name == expected.name
        np.testing.assert_allclose(of.anomaly, expected.anomaly, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of.probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)
    if device == "cpu":
        assert recordings == [None]  # one shape for all


def test_ranks_score_in_the_shapes_of_one_process(recordings, monkeypatch, tmp_path):
    """In others, the scores would not be equal to the bit: a GPU picks its kernels by shape."""
    data.make_synthetic(tmp_path, videos=0, test_videos=24, min_snippets=16, max_snippets=20, width=32)
    rows, model, shapes = data.read_list(tmp_path / "test.csv"), small_models.teacher(), set()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, *rest: shapes.add(x.shape) or forward(x, *rest))
    evaluate.score_rows(model, rows, progress=False)
    monkeypatch.setattr(evaluate.distributed, "world", lambda: 2)
    monkeypatch.setattr(evaluate.distributed, "total", lambda x: x)
    for rank in (0, 1):
        monkeypatch.setattr(evaluate.distributed, "rank", lambda: rank)  # noqa: B023
        evaluate.score_rows(model, rows, progress=False)
    assert shapes == {(evaluate.PACKED_CHUNKS, 24, 32)}


def test_what_is_asked_for_and_cannot_be_is_told(tmp_path):
    with pytest.raises(RecipeError, match="CUDA graph: this needs a GPU"):
        run("teacher", tmp_path, features(6), RECIPE, "cpu", graph=True)


@ON_GPU[0]
@ON_GPU[1]
@pytest.mark.parametrize("kind", ["teacher", "distilled"])
def test_a_step_makes_the_host_wait_for_nothing(kind):
    device, model = torch.device("cuda"), teacher().cuda()
    data = features(6)
    batch = data.batch(torch.arange(6)).to(device)
    known = None
    if kind == "distilled":
        known = teacher_cache.teacher_features(model, batch)
        model = AVadCLIPStudent.beside(model).cuda()
    optimizer = step.adamw(model, RECIPE, device)
    step.train_step(model, optimizer, batch, known, RECIPE)  # allocates, compiles, makes the moments
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.train_step(model, optimizer, batch, known, RECIPE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU[0]
@ON_GPU[1]
def test_the_text_side_is_a_branch_of_the_graph():
    """A side stream's work joins: the class features are right in every replay, and so are their gradients."""
    from avadclip_fast.streams import aside

    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    main = torch.randn(64, 64, device="cuda")

    def function(scale):
        beside = aside("text", lambda: (x * scale).tanh())
        seen = main @ main
        (gradient,) = torch.autograd.grad((seen * beside()).sum(), x)
        return gradient

    step = graph.StepGraph(function, lambda: [])
    step.record(torch.ones((), device="cuda"))
    for scale in (0.5, 2.0):
        scale = torch.tensor(scale, device="cuda")
        torch.testing.assert_close(step(scale), function(scale))
