"""Exported files: run as others would run them, and held against the model."""

import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import CLASSES, batch, student, teacher
from test_cli import call, mistake

from avadclip_fast.data import DataError
from avadclip_fast.engine import export
from avadclip_fast.engine.calibrate import Calibration, Head
from avadclip_fast.engine.export import METADATA, TOLERANCE, ExportError, export_model

ort = pytest.importorskip("onnxruntime", reason="the onnx extra is absent: no export was tested")
pytest.importorskip("onnxscript", reason="the onnx extra is absent: no export was tested")

CALIBRATION = Calibration(Head(0.5, 0.3), Head(2.0, 0.4), 17)
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def heard():
    """A student of the sound alone that standardises it, in the authors' form but for the prompt."""
    form = {"padding": "official", "prompt": "paper", "window": 5}
    model = student(modality="audio", standardize=["audio"], **form)
    model.standardize["audio"].mean.fill_(0.3)
    model.standardize["audio"].std.fill_(2.0)
    return model


def moving():
    """A teacher that takes sight with its motion, with the authors' padding and another fusion."""
    form = {"padding": "official", "fusion": "cross_attention"}
    model = teacher(layers=1, motion=True, standardize=["visual"], **form)
    model.standardize["visual"].std.fill_(1.4)
    return model


class Doubled(torch.nn.Module):
    """In place of a temporal encoder."""

    def forward(self, x, lengths=None):
        return x + x


MODELS = {
    "teacher": lambda: teacher(layers=1),
    "student of sound": heard,
    "teacher of motion": moving,
}


@pytest.fixture(scope="module")
def plain():
    """A student that no test changes."""
    return student().eval()


@pytest.fixture(scope="module")
def _traced():
    return functools.cache(export.trace)


@pytest.fixture
def traced_once(_traced, monkeypatch) -> None:
    """Has a model traced once, whatever is written of it: that takes as long as writing."""
    monkeypatch.setattr(export, "trace", _traced)


def expected(model, streams, lengths):
    """Scores by the model itself, on its whole length, those of normal past lengths."""
    rows = streams[0].shape[1]
    whole = [torch.zeros(len(x), 24, x.shape[2]) for x in streams]
    for x, full in zip(streams, whole, strict=True):
        for b, n in enumerate(lengths):
            full[b, :n] = x[b, :n]
    with torch.no_grad():
        out = model(*whole, lengths)
    anomaly = torch.sigmoid(out.anomaly_logits / CALIBRATION.binary.temperature)[:, :rows]
    probabilities = torch.softmax(out.class_logits / CALIBRATION.align.temperature, -1)[:, :rows]
    for b, n in enumerate(lengths):
        anomaly[b, n:] = probabilities[b, n:] = 0
        probabilities[b, n:, 0] = 1  # normal
    return anomaly.numpy(), probabilities.numpy()


def inputs_of(model, lengths, rows):
    """Of the model's streams, with 50 for padding."""
    visual, audio, _, lengths = batch(lengths, rows, seed=5)
    visual = torch.cat([visual, audio], -1)[..., : model.width_of("visual")]
    streams = [visual, audio][: len(model.streams())]
    for x in streams:
        for b, n in enumerate(lengths):
            x[b, n:] = 50
    return streams, lengths


def assert_is_the_model(run, model):
    """Batches of 1 and more, and T of 1, odd and whole: other data than what export itself checks with."""
    for lengths, rows in (([1], 1), ([2], 2), ([13], 17), ([24, 3, 11, 1, 17], 24), ([7, 6], 7)):
        streams, lengths = inputs_of(model, lengths, rows)
        found = run(*streams, lengths)
        assert len(found) == 2
        for x, y in zip(found, expected(model, streams, lengths), strict=True):
            np.testing.assert_allclose(np.asarray(x), y, rtol=0, atol=TOLERANCE / 10)  # widths of 32 round less


def onnx_session(path: Path):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return session, lambda *x: session.run(None, {k: v.numpy() for k, v in zip(names, x, strict=True)})


@pytest.mark.parametrize("kind", MODELS)
def test_onnx_and_torch_are_the_model(kind, tmp_path, traced_once):
    model = MODELS[kind]().eval()
    assert export_model(model, tmp_path / "new" / "m.onnx", calibration=CALIBRATION, every=4) < TOLERANCE / 10
    session, run = onnx_session(tmp_path / "new" / "m.onnx")
    assert_is_the_model(run, model)
    streams = list(model.streams())
    assert [(x.name, x.shape) for x in session.get_inputs()] == [
        *((name, ["batch", "snippets", model.width_of(name)]) for name in streams),
        ("lengths", ["batch"]),
    ]
    assert [(x.name, x.shape) for x in session.get_outputs()] == [
        ("anomaly", ["batch", "snippets"]),
        ("probabilities", ["batch", "snippets", 3]),
    ]
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts["classes"] == CLASSES and facts["inputs"] == [*streams, "lengths"] and facts["every"] == 4
    assert facts["threshold"] == {"align": 0.3, "binary": 0.4}
    assert facts["temperature"] == {"align": 0.5, "binary": 2.0}
    assert (facts["length"], facts["width"], facts["model"]) == (24, 32, type(model).__name__)
    assert facts["motion"] == model.motion

    assert export_model(model, tmp_path / "m.pt2", calibration=CALIBRATION, every=4) < TOLERANCE / 10
    extra = {METADATA: ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert_is_the_model(program.module(), model)
    assert json.loads(extra[METADATA]) == facts
    assert not [name for name in program.state_dict if "text." in name or "token" in name], "the text side is constant"

    streams, lengths = inputs_of(model, [24, 25], 25)
    with pytest.raises(AssertionError, match="24"):
        program.module()(*streams, lengths)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="24"):
        run(*streams, lengths)


def test_the_graph_is_plain_and_the_model_stays_as_it_is():
    model = teacher().eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    program = export.trace(model, CALIBRATION)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(p.requires_grad for p in model.mlp2.parameters())
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.softmax.int" in ops and not [op for op in ops if "avadclip" in op]


def test_a_model_of_the_default_sizes_is_traced():
    """Width 512 and 256 snippets, where layers choose by the number of rows, which must not fix the batch size."""
    model = teacher(width=512, text_width=512, length=256, layers=1).eval()
    program = export.trace(model)
    streams, lengths = torch.randn(2, 3, 5, 512), torch.tensor([5, 1, 2])
    with torch.no_grad():
        expected = export.Scores(model).eval()(*streams, lengths)
    for x, y in zip(program.module()(*streams, lengths), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=TOLERANCE)


def test_a_model_of_single_snippets_is_exported(tmp_path, traced_once):
    model = teacher(layers=1, length=1).eval()
    for name in ("m.pt2", "m.onnx"):
        assert export_model(model, tmp_path / name) < TOLERANCE / 10


def test_what_cannot_be_traced_is_told_in_a_line(tmp_path, monkeypatch):
    class Constraint(Exception):
        """As of a private module of torch."""

    def fail(*_, **__):
        raise Constraint("\n  Constraints violated (batch)!\n  more\n")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ExportError, match=r"cannot trace this AVadCLIPStudent: Constraints violated \(batch\)!$") as of:
        export.trace(student().eval())
    assert isinstance(of.value.__cause__, Constraint)
    with pytest.raises(ExportError, match="Constraints"):
        export_model(student(), tmp_path / "m.pt2")
    assert not (tmp_path / "m.pt2").exists()


# What a user of a package without this library does; a module of this library may not even be looked for.
ALONE = """
import json, sys
sys.modules["avadclip_fast"] = None
import numpy as np, torch
path, kind = sys.argv[1:3]
if kind == "aoti":
    run = torch._inductor.aoti_load_package(path)
    facts = {name: json.loads(value) for name, value in run.get_metadata().items() if not name.startswith("AOTI_")}
else:
    extra = {"metadata.json": ""}
    run = torch.export.load(path, extra_files=extra).module()
    facts = json.loads(extra["metadata.json"])
given = np.load(sys.argv[3])
for case in range(int(given["cases"])):
    found = run(*(torch.from_numpy(given[f"{case}/{i}"]) for i in range(len(facts["inputs"]))))
    for name, x in zip(facts["outputs"], found):
        assert np.abs(x.detach().numpy() - given[f"{case}/{name}"]).max() < 1e-5, (case, name)
print(json.dumps(facts))
try:
    run(*(torch.from_numpy(given[f"long/{i}"]) for i in range(len(facts["inputs"]))))
except (RuntimeError, AssertionError) as error:
    print("refused", file=sys.stderr)
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["torch", "aoti"])
def test_packages_run_where_the_library_is_not(kind, tmp_path, plain, traced_once):
    if kind == "aoti" and COMPILER is None:
        pytest.skip("no C++ compiler: AOTInductor was not tested")
    model = plain
    export_model(model, tmp_path / "m.pt2", kind, CALIBRATION)
    given = {"cases": 4}
    for case, (lengths, rows) in enumerate([([1], 1), ([13], 13), ([24, 7, 1], 24), ([2, 5], 9)]):
        streams, lengths = inputs_of(model, lengths, rows)
        named = zip(("anomaly", "probabilities"), expected(model, streams, lengths), strict=True)
        given |= {f"{case}/{i}": x.numpy() for i, x in enumerate((*streams, lengths))}
        given |= {f"{case}/{name}": x for name, x in named}
    streams, lengths = inputs_of(model, [30, 2], 30)
    given |= {f"long/{i}": x.numpy() for i, x in enumerate((*streams, lengths))}
    np.savez(tmp_path / "given.npz", **given)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "m.pt2", kind, tmp_path / "given.npz"],
        cwd=tmp_path, env={**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["classes"] == CLASSES and facts["threshold"]["align"] == 0.3
    # torch 2.11's AOTInductor prints why before it raises
    assert "refused" in done.stderr and re.search(r"\b24\b", done.stderr)


def damaged(how: str) -> export.Scores:
    """The student's scores with something wrong in them."""
    model = student().eval()
    with torch.no_grad():
        weight = model.temporal.aggregator.gc3.weight
        if how == "weights":
            weight.mul_(1.01)
        elif how == "nan":
            weight[0] = torch.nan
    scores = export.Scores(model, Calibration() if how == "temperature" else CALIBRATION).eval()
    if how == "lengths":
        forward = scores.forward
        scores.forward = lambda *inputs: forward(*inputs[:-1], torch.full_like(inputs[-1], 24))
    return scores


@pytest.mark.parametrize("how", ["temperature", "weights", "lengths", "nan", "not at all"])
def test_the_check_finds_what_is_wrong(how):
    difference = export.largest_difference(damaged(how), student().eval(), CALIBRATION)
    if how == "not at all":
        assert difference < TOLERANCE / 10
    else:
        assert not difference <= 5 * TOLERANCE


def test_a_wrong_file_is_not_written(tmp_path, monkeypatch, plain, traced_once):
    """What was there before stays, and nothing is left beside it."""
    right = export.trace
    monkeypatch.setattr(export, "trace", lambda model, calibration: right(plain, calibration))
    (tmp_path / "m.pt2").write_bytes(b"earlier")
    with pytest.raises(ExportError, match=r"m\.pt2 was not written: as torch, its scores differ .* 0\.0001 is allowed"):
        export_model(student(seed=1), tmp_path / "m.pt2", calibration=CALIBRATION)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"earlier"]


def test_drawn_videos_are_clear_of_the_threshold_on_both_sides():
    model, cosines = student().eval(), []

    def look(_, inputs):
        x = torch.nn.functional.normalize(inputs[0][0].double(), dim=-1)
        cosines.append((x @ x.T)[~torch.eye(len(x), dtype=bool)])

    model.temporal.aggregator.simAdj.register_forward_pre_hook(look)
    video, scores = export._draw(model, CALIBRATION, 23, np.random.default_rng(0))
    assert video.snippets == len(scores.anomaly) == 23 and not video.visual[0, 23:].any()
    margins = [(x - 0.7).abs().min() for x in cosines]
    assert max(margins) > 1e-4
    assert all(0.02 < (x > 0.7).double().mean() < 0.98 for x in cosines)


def test_an_encoder_of_ones_own_is_exported(tmp_path):
    """It was asked for its similarity graph."""
    model = student().eval()
    model.temporal = Doubled()
    export_model(model, tmp_path / "own.pt2")
    assert (tmp_path / "own.pt2").is_file()


def test_by_the_command_line(tmp_path, capsys):
    folder = tmp_path / "run" / "model"
    model = student().eval()
    model.save_pretrained(folder)
    CALIBRATION.save(folder)
    path = tmp_path / "m.pt2"
    assert call("export", tmp_path / "run", "-o", path, "--every", 16) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    extra = {METADATA: ""}
    assert_is_the_model(torch.export.load(path, extra_files=extra).module(), model)
    assert json.loads(extra[METADATA])["every"] == 16

    for name, options in (("m.bin", ()), ("m", ()), ("m.pt2", ("--format", "onnx")), ("m.onnx", ("--format", "aoti"))):
        said = mistake(capsys, "export", tmp_path / "run", "-o", tmp_path / name, *options)
        assert f"{name}: export writes NAME.onnx, or NAME.pt2" in said
    said = mistake(capsys, "export", tmp_path / "run", "-o", tmp_path / "n.pt2", "--classes", "A=normal,B1=brawl")
    assert f"run: --classes is of an official .pth; this model knows {', '.join(CLASSES)}: leave it out" in said
    assert "no model at" in mistake(capsys, "export", tmp_path / "nowhere.pth", "-o", path)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "m.pt2"}


def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "trace", None)
    (tmp_path / "m.pt2").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"m\.pt2 is a folder; give the name of a file$"):
        export_model(student(), tmp_path / "m.pt2")
    for every in (0, -1, 1.5, "16"):
        with pytest.raises(ExportError, match="every must be a snippet's number of frames"):
            export_model(student(), tmp_path / "n.pt2", every=every)
    with pytest.raises(DataError, match=r"file: cannot be made: File exists$"):
        export_model(student(), tmp_path / "file" / "m.pt2")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'avadclip_fast\[onnx"):
        export_model(student(), tmp_path / "m.onnx")
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    # Torch's own patch: what monkeypatch undoes by deletion is not there again for the tests after this one.
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ExportError, match="aoti needs a C\\+\\+ compiler, and there is none: install g"):
            export_model(student(), tmp_path / "m.pt2", "aoti")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiler_that_fails_is_quoted(wrapped, tmp_path, monkeypatch, plain, traced_once):
    from torch._inductor import cpp_builder, exc

    failure = exc.CppCompileError(["g++", "-O1", "a.cpp"], "In file included:\n  a.cpp:1: error: no such header\nmore")

    def compile_(*_, **__):
        raise exc.InductorError(failure, None) if wrapped else failure

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_)
    with pytest.raises(ExportError, match=r"compiler failed: a\.cpp:1: error: no such header$"):
        export_model(plain, tmp_path / "m.pt2", "aoti")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_while_it_is_compiled_is_told(tmp_path, monkeypatch, plain, traced_once):
    from torch._inductor import cpp_builder, exc

    def compile_(*_, **__):
        raise exc.InductorError(OSError(errno.ENOSPC, "No space left on device"), None)

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_)
    with pytest.raises(OSError, match=r"No space left on device: '.+m\.pt2'$"):
        export_model(plain, tmp_path / "m.pt2", "aoti")


def test_onnx_runtime_sends_nothing_of_a_check(tmp_path):
    """Since 1.32 it numbers the machine, in the home folder, and sends what is run to its maker."""
    onnx, helper = pytest.importorskip("onnx"), pytest.importorskip("onnx.helper")
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "a.onnx")
    (home := tmp_path / "home").mkdir()
    hidden = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    own = {name: value for name, value in os.environ.items() if name not in hidden} | {"HOME": str(home)}
    code = "import sys; from avadclip_fast.engine import export; export._load_onnx(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.onnx"], env=own, check=True, timeout=100)
    assert not list(home.rglob("*"))
