"""Checkpoints: the official format there and back, our own folder, and what cannot be read or does not fit."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from malice import Call
from open_clip.pretrained import get_pretrained_url
from safetensors.torch import load_file, save_file
from small_models import CLASSES, SIZES, TOKENS, batch, student, teacher

from avadclip_fast import AVadCLIP, AVadCLIPStudent
from avadclip_fast.data import DataError
from avadclip_fast.engine.evaluate import load_model
from avadclip_fast.models import CheckpointError, TextWeightsError, checkpoints, text
from avadclip_fast.models.checkpoints import official_state

both = pytest.mark.parametrize(("make", "cls"), [(teacher, AVadCLIP), (student, AVadCLIPStudent)])


def same(one, two) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def settings() -> dict:
    return {"classes": CLASSES, "class_tokens": TOKENS}


@pytest.fixture
def official(tmp_path):
    """A teacher, and the path of its official checkpoint."""
    model = teacher(padding="official")
    model.to_official(tmp_path / "teacher.pth")
    return model, tmp_path / "teacher.pth"


# The official format


@both
def test_official_comes_back_bit_exact(make, cls, settings, tmp_path):
    model = make(padding="official", window=6, layers=3, text_layers=2).eval()
    model.to_official(tmp_path / "model.pth")
    again = cls.from_official(tmp_path / "model.pth", window=6, **settings)
    assert same(model, again) and not again.training
    assert again.padding == "official"
    assert len(again.temporal.resblocks) == 3 and len(again.text.transformer.resblocks) == 2
    assert again.temporal.positions.num_embeddings == 24
    visual, audio, _, lengths = batch([9, 16], 16)
    streams = (visual, audio) if make is teacher else (visual,)
    assert torch.equal(model(*streams, lengths).class_logits, again(*streams, lengths).class_logits)


def test_the_folder_of_an_official_checkpoint_is_made(tmp_path):
    """Unless nothing is written."""
    student(padding="official").to_official(tmp_path / "new" / "folder" / "s.pth")
    assert (tmp_path / "new" / "folder" / "s.pth").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot be made: File exists$"):
        student(padding="official").to_official(tmp_path / "file" / "s.pth")
    with pytest.raises(CheckpointError):
        student(prompt="paper").to_official(tmp_path / "other" / "s.pth")
    assert not (tmp_path / "other").exists()


def test_a_module_that_the_official_code_lacks_is_refused(tmp_path):
    model = student(padding="official")
    model.head = torch.nn.Linear(3, 1)
    with pytest.raises(CheckpointError, match=r"no place for:\n  head.weight\n  head.bias$"):
        model.to_official(tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_official_lists_each_convolution_twice(official):
    state = torch.load(official[1], weights_only=True)
    for level in range(3):
        for conv, alias in (("conv1", "net.0"), ("conv2", "net.4")):
            for part in ("bias", "weight_g", "weight_v"):
                name = f"temporalconvnet.network.{level}."
                assert torch.equal(state[f"{name}{conv}.{part}"], state[f"{name}{alias}.{part}"])


@both
def test_official_names_are_the_authors(make, cls, shared):
    np = pytest.importorskip("numpy")
    path = shared / "parity" / "golden_small.npz"
    if not path.exists():
        pytest.skip("../shared/parity/golden_small.npz is absent: the authors' names were not compared")
    kind = make.__name__
    names = {str(key).split(" ")[0] for key in np.load(path)[f"{kind}/keys"]}
    ours = set(official_state(make(text_layers=2, layers=2 if make is teacher else 1).state_dict()))
    assert ours == {name for name in names if not name.startswith("clipmodel.visual.")}


def test_the_image_tower_goes_along(official, settings, tmp_path):
    model, path = official
    tower = {
        "visual.proj": torch.randn(4, 2),
        "visual.ln_pre.weight": torch.randn(4),
        "ln_final.weight": torch.randn(4),
    }
    save_file(tower, tmp_path / "clip.safetensors")
    model.to_official(path, image_tower=tmp_path / "clip.safetensors")
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["clipmodel.visual.proj"], tower["visual.proj"])
    assert torch.equal(state["clipmodel.ln_final.weight"], model.text.ln_final.weight)  # only the tower is taken
    assert same(model, AVadCLIP.from_official(path, window=4, **settings))
    # From an official checkpoint too, and a file without one is refused.
    model.to_official(tmp_path / "again.pth", image_tower=path)
    assert "clipmodel.visual.proj" in torch.load(tmp_path / "again.pth", weights_only=True)
    parallel = {f"module.{name}": x for name, x in state.items()}  # as from_official takes it
    torch.save({"model_state_dict": parallel}, tmp_path / "parallel.pth")
    model.to_official(tmp_path / "again.pth", image_tower=tmp_path / "parallel.pth")
    assert "clipmodel.visual.proj" in torch.load(tmp_path / "again.pth", weights_only=True)
    other = teacher(text_weights=str(tmp_path / "parallel.pth"))
    assert torch.equal(other.text.token_embedding.weight, model.text.token_embedding.weight)
    save_file({"ln_final.weight": torch.zeros(4)}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="none.safetensors holds no image tower"):
        model.to_official(path, image_tower=tmp_path / "none.safetensors")


def test_the_training_form_is_taken(official, settings, tmp_path):
    model, path = official
    state = torch.load(path, weights_only=True)
    torch.save({"epoch": 3, "model_state_dict": state, "ap": 0.5}, tmp_path / "last.pth")
    assert same(model, AVadCLIP.from_official(tmp_path / "last.pth", **settings))
    assert same(model, AVadCLIP.from_official({f"module.{k}": v for k, v in state.items()}, **settings))


def test_half_precision_is_widened(official, settings):
    state = {k: v.half() for k, v in torch.load(official[1], weights_only=True).items()}
    model = AVadCLIP.from_official(state, **settings)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_torchs_second_weight_norm(official, settings):
    model, path = official
    state = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for name, tensor in torch.load(path, weights_only=True).items()
    }
    assert "temporalconvnet.network.0.conv1.parametrizations.weight.original0" in state
    assert same(model, AVadCLIP.from_official(state, **settings))


@pytest.mark.parametrize(
    ("make", "settings", "wrong"),
    [
        (teacher, {"fusion": "add"}, "fusion is 'add'"),
        (teacher, {"prompt": "paper"}, "prompt is 'paper'"),
        (student, {"modality": "audio"}, "modality is 'audio'"),
        (teacher, {"heads": 2}, "heads is 2"),
        (student, {"standardize": ["visual"], "motion": True}, "standardises its inputs"),
    ],
)
def test_what_the_official_code_does_not_compute_is_refused(make, settings, wrong, tmp_path):
    make(**settings).save_pretrained(tmp_path / "ours")
    model = (AVadCLIP if make is teacher else AVadCLIPStudent).from_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=wrong):
        model.to_official(tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


def test_padding_that_the_official_code_does_not_mask_is_told(tmp_path, caplog):
    for padding, told in (("official", 0), ("masked", 1)):
        teacher(padding=padding).to_official(tmp_path / "model.pth")
        assert len(caplog.records) == told
    assert "do not fill its 24 rows" in caplog.text


def test_every_difference_is_listed(official, settings):
    state = torch.load(official[1], weights_only=True)
    del state["mlp2.c_fc.bias"]
    state["gc2.weight"] = torch.zeros(3, 5)
    state["mlp1.extra"] = torch.zeros(2)
    with pytest.raises(CheckpointError) as raised:
        AVadCLIP.from_official(state, **settings)
    message = str(raised.value)
    assert "does not fit AVadCLIP" in message
    assert "missing: mlp2.c_fc.bias [128]" in message
    assert "unknown: prompt.mlp1.extra [2]" in message
    assert "shape: temporal.aggregator.gc2.weight is [3, 5], the model has [16, 16]" in message
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [("clipmodel.transformer", "129 text_layers"), ("temporal", "129 layers")],
    ids=["text", "temporal"],
)
def test_a_checkpoint_that_names_more_blocks_than_any_model_has(official, settings, name, said):
    state = torch.load(official[1], weights_only=True)
    state |= {f"{name}.resblocks.{i}.x": torch.zeros(1) for i in range(129)}
    with pytest.raises(CheckpointError, match=f"the checkpoint names {said}; up to 128 are read"):
        AVadCLIP.from_official(state, **settings)


def test_foreign_names_are_listed(official, settings):
    state = torch.load(official[1], weights_only=True) | {"backbone.conv": torch.zeros(1), "gc5.weight": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"(?s)not an official AVadCLIP checkpoint.*backbone\.conv\n  gc5\.weight"
    ):
        AVadCLIP.from_official(state, **settings)


def test_a_teacher_is_no_student(official, settings):
    with pytest.raises(
        CheckpointError, match=r"(?s)of an AVadCLIP does not fit AVadCLIPStudent.*missing: uncertainty.*unknown: audio"
    ):
        AVadCLIPStudent.from_official(official[1], **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_is_float32_whatever_it_was_saved_in(tmp_path, dtype):
    saved = teacher().to(dtype)
    saved.save_pretrained(tmp_path)
    loaded = AVadCLIP.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.float()) for p, q in zip(loaded.parameters(), saved.parameters(), strict=True))


def test_the_folder_of_a_run_leads_to_its_model(tmp_path):
    teacher().save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match="did you mean .*run/model"):
        AVadCLIP.from_pretrained(tmp_path / "run", classes=CLASSES)


def test_the_number_of_names_must_fit(official):
    """Else the file is named, and what gives it others: XD-Violence's are taken where nobody gave any."""
    state = torch.load(official[1], weights_only=True)
    with pytest.raises(CheckpointError, match="the checkpoint has 3 classes, 2 names are given: normal, fight; "):
        AVadCLIP.from_official(state, ["normal", "fight"], class_tokens=TOKENS[:2])
    with pytest.raises(CheckpointError, match="teacher.pth has 3 classes, 7 names are given: normal, .*by --classes"):
        AVadCLIP.from_official(official[1])


def test_what_is_no_checkpoint(settings, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    for source, message in (
        (tmp_path / "absent.pth", "no checkpoint .*absent.pth"),
        (tmp_path / "text.pth", "text.pth cannot be read as weights: not a PyTorch weights file"),
        (tmp_path / "empty.pth", "empty.pth cannot be read as weights: not a PyTorch weights file"),
        (tmp_path / "list.pth", "list.pth holds a list, not a state dict"),
        ({}, "not an AVadCLIP checkpoint: temporal.positions.weight is missing"),
        ({"model_state_dict": {}}, "not an AVadCLIP checkpoint"),
        ({"model_state_dict": [1]}, "holds a list, not a state dict"),
    ):
        with pytest.raises(CheckpointError, match=message):
            AVadCLIP.from_official(source, **settings)
    with pytest.raises(TextWeightsError, match="text.pth cannot be read: not a PyTorch weights file"):
        teacher(text_weights=str(tmp_path / "text.pth"))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.tensor(1.0), r"temporal.positions.weight is \[\]"),
        (torch.ones(1).expand(10**8, 32), "frame_position_embeddings.weight does not hold the numbers of its shape"),
        (torch.empty(10**8, 32, device="meta"), "frame_position_embeddings.weight does not hold"),
        (torch.ones(2, 32).to_sparse(), "frame_position_embeddings.weight does not hold"),
        (torch.ones(24, 32, dtype=torch.int32), "dtype: temporal.positions.weight is torch.int32"),
    ],
    ids=["scalar", "repeated", "meta", "sparse", "integers"],
)
def test_a_checkpoint_of_tensors_that_are_no_weights(official, settings, tensor, said):
    state = torch.load(official[1], weights_only=True)
    torch.save(state | {"frame_position_embeddings.weight": tensor}, official[1])
    with pytest.raises(CheckpointError, match=f"(?s)teacher.pth.*{said}"):
        AVadCLIP.from_official(official[1], **settings)


def test_a_checkpoint_takes_no_memory_beyond_its_bytes(official, settings):
    """Of zeros, a compressed one could take a thousand times as much."""
    path = official[1]
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as plain, zipfile.ZipFile(path, "w") as packed:
        for part in plain.namelist():
            packed.writestr(part, plain.read(part), zipfile.ZIP_DEFLATED)
    torch.load(path, weights_only=True)  # which reads it
    for load in (lambda: AVadCLIP.from_official(path, **settings), lambda: teacher(text_weights=str(path))):
        with pytest.raises((CheckpointError, TextWeightsError), match="teacher.pth cannot be read.*it is compressed"):
            load()


def test_a_truncated_checkpoint(official, settings):
    path = official[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="teacher.pth cannot be read as weights: .+"):
        AVadCLIP.from_official(path, **settings)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["zip", "plain"])
def test_code_in_a_checkpoint_is_refused_and_not_run(write, settings, tmp_path):
    write({"alpha": Call(open, str(tmp_path / "ran"), "w")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth cannot be read as weights"):
        AVadCLIP.from_official(tmp_path / "evil.pth", **settings)
    with pytest.raises(TextWeightsError, match="evil.pth cannot be read"):
        teacher(text_weights=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


# Our own folder


@both
def test_our_folder_comes_back_bit_exact(make, cls, tmp_path):
    model = make(padding="official", prompt="paper", window=6, heads=2).eval()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    again = cls.from_pretrained(tmp_path)
    assert same(model, again) and not again.training
    assert (again.padding, again.prompt.prompt, again.classes) == ("official", "paper", CLASSES)
    assert (again.temporal.resblocks[0].attn.window, again.temporal.resblocks[0].attn.heads) == (6, 2)
    visual, audio, _, lengths = batch([9, 16], 16)
    streams = (visual, audio) if make is teacher else (visual,)
    assert torch.equal(model(*streams, lengths).class_logits, again(*streams, lengths).class_logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": np.int64(8)},
        {"dropout": np.float32(0.5)},
        {"motion": np.bool_(True), "standardize": ["visual"]},
        {"standardize": {"audio", "visual"}},
        {"standardize": frozenset(["audio"])},
        {"standardize": {"audio": 1}.keys()},
        {"classes": dict(enumerate(CLASSES)).values()},
        {"classes": dict.fromkeys(CLASSES)},
        {"classes": dict.fromkeys(CLASSES).keys()},
        {"classes": map(str, CLASSES)},
        {"classes": np.array(CLASSES)},
        {"class_tokens": [np.array(tokens) for tokens in TOKENS]},
        {"class_tokens": [torch.tensor(tokens) for tokens in TOKENS]},
    ],
    ids=lambda settings: f"{type(next(iter(settings.values()))).__name__}",
)
def test_our_folder_keeps_settings_that_json_has_no_form_of(settings, tmp_path):
    """They were left out of config.json: the model came back with the default, or not at all."""
    model = teacher(**settings).eval()
    model.save_pretrained(tmp_path)
    again = AVadCLIP.from_pretrained(tmp_path)
    assert same(model, again) and again.classes == CLASSES and again.motion == model.motion
    assert again.temporal.window == model.temporal.window
    assert again.audio.network[0].dropout == model.audio.network[0].dropout
    assert json.loads((tmp_path / "config.json").read_text())["window"] == model.temporal.window


class Named(AVadCLIP):
    """A model of a user's own, which passes on what it does not know."""

    def __init__(self, classes, name="", **settings):
        super().__init__(classes, **settings)
        self.name = name


def test_a_subclass_that_passes_settings_on_comes_back(tmp_path):
    model = Named(CLASSES, name="mine", class_tokens=TOKENS, **SIZES)
    model.save_pretrained(tmp_path / "model")
    again = Named.from_pretrained(tmp_path / "model")
    assert type(again) is Named and again.name == "mine" and same(model, again)
    again.to_official(tmp_path / "official.pth")  # whose padding is the default, which config.json has not
    assert same(model, Named.from_official(tmp_path / "official.pth", CLASSES, class_tokens=TOKENS))


class Recurrent(torch.nn.Module):
    """A temporal encoder of a user's own."""

    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.GRU(width, width, batch_first=True)

    def forward(self, x, lengths=None):
        return self.layer(x)[0]


class Own(Named):
    def __init__(self, classes, **settings):
        super().__init__(classes, **settings)
        self.temporal = Recurrent(self.width)


def test_a_subclass_with_a_temporal_encoder_of_its_own_comes_back(tmp_path):
    """It was asked for the type of its position rows, and on loading for their number."""
    model = Own(CLASSES, class_tokens=TOKENS, **SIZES).eval()
    model.save_pretrained(tmp_path)
    again, (visual, audio, _, lengths) = Own.from_pretrained(tmp_path), batch([24, 5], 24)
    assert same(model, again)
    torch.testing.assert_close(again(visual, audio, lengths).features, model(visual, audio, lengths).features)


def test_a_subclass_names_its_arguments():
    """Its settings were saved as "args", which no model takes on loading."""
    with pytest.raises(TypeError, match=r"^Unnamed.__init__ takes \*args, .* by name, as in \(self, classes, "):

        class Unnamed(AVadCLIP):
            def __init__(self, *args, **settings):
                super().__init__(*args, **settings)


def test_our_folder_loads_without_open_clip(tmp_path):
    """Names were tokenised once, when the model was made: the folder holds their codes."""
    pytest.importorskip("open_clip")
    model = teacher(class_tokens=None)
    model.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['open_clip'] = None\n"
        "from avadclip_fast import AVadCLIP\n"
        f"model = AVadCLIP.from_pretrained({str(tmp_path)!r})\n"
        "print(model.classes, model.text.tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{CLASSES} {model.text.tokens}"


def test_other_names_are_tokenised_when_our_folder_is_loaded(tmp_path):
    """The stored codes are of the stored names: under new ones, the scores would be those of the old."""
    pytest.importorskip("open_clip")
    teacher().save_pretrained(tmp_path)
    names = ["normal", "riot", "shooting"]
    again = AVadCLIP.from_pretrained(tmp_path, classes=names)
    assert again.classes == names and again.text.tokens == text.tokenize(names)
    assert AVadCLIP.from_pretrained(tmp_path, classes=names, class_tokens=TOKENS[::-1]).text.tokens == TOKENS[::-1]
    assert AVadCLIP.from_pretrained(tmp_path, classes=CLASSES).text.tokens == TOKENS


def test_a_saved_model_neither_fetches_nor_draws_text_weights(tmp_path, monkeypatch):
    teacher(text_weights="random").save_pretrained(tmp_path)
    monkeypatch.setattr(text.TextEncoder, "load", None)
    AVadCLIP.from_pretrained(tmp_path)


def test_a_loaded_model_saves_again(official, settings, tmp_path):
    """official -> ours -> official, without a bit lost."""
    model, path = official
    AVadCLIP.from_official(path, **settings).save_pretrained(tmp_path / "ours")
    AVadCLIP.from_pretrained(tmp_path / "ours").to_official(tmp_path / "again.pth")
    before, after = (torch.load(p, weights_only=True) for p in (path, tmp_path / "again.pth"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_teachers_folder_is_no_students(tmp_path):
    teacher().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds an AVadCLIP; load it with AVadCLIP.from_pretrained"):
        AVadCLIPStudent.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["missing", "./missing", "../missing", "runs/missing/model", "missing/", "/no/missing"]
)
def test_a_missing_folder_is_not_asked_of_the_hub(name, monkeypatch):
    """Which is tried again for half a minute where there is no network."""
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", None)
    with pytest.raises(CheckpointError, match=f"^no folder {name}; a model on the Hub is given as user/name$"):
        AVadCLIP.from_pretrained(name)


def test_a_file_is_no_folder(official):
    with pytest.raises(CheckpointError, match="teacher.pth is a file, not a folder; .* from_official"):
        AVadCLIP.from_pretrained(official[1])


def test_what_the_hub_does_not_give_is_told_by_its_name(tmp_path):
    with pytest.raises(CheckpointError, match="no folder runs/missing, and no model of that name from the Hub: .+"):
        AVadCLIP.from_pretrained("runs/missing", local_files_only=True, cache_dir=tmp_path)


def test_a_truncated_folder(tmp_path):
    teacher().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    for content in (path.read_bytes()[: path.stat().st_size // 2], b"", None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.safetensors cannot be read: .+"):
            AVadCLIP.from_pretrained(tmp_path)


def test_a_folder_without_its_config(tmp_path):
    teacher().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"classes":')
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON: Expecting value"):
        AVadCLIP.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json, which tells the model's classes"):
        AVadCLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": 10**9}, "does not fit config.json: layers is 2, not 1000000000"),
        ({"length": 10**8}, "does not fit config.json: length is 24, not 100000000"),  # 13 GB
        ({"layers": "2"}, "does not fit config.json: layers is 2, not '2'"),
        ({"heads": 3}, "config.json does not describe a model of this library: .*heads"),
        ({"window": 2.5}, "config.json does not describe .*window"),
        ({"classes": [1, 2, 3]}, "config.json does not describe"),
        ({"classes": 3}, "config.json does not describe"),
        ({"class_tokens": [[1, 10**6]] * 3}, "config.json does not describe .*class_tokens must be ids"),
        ({"class_tokens": [[]] * 3}, "config.json does not describe .*class_tokens must be ids"),
        ([1], "config.json holds no settings"),
        ("[" * 100_000, "config.json is not JSON"),
        (b"\xff", "config.json is not JSON"),
    ],
    ids=str,
)
def test_a_config_that_describes_no_model(saved, wrong, said):
    path = saved / "config.json"
    before = path.read_bytes()
    if isinstance(wrong, dict):
        wrong = json.dumps(json.loads(before) | wrong)
    path.write_bytes(wrong if isinstance(wrong, bytes) else str(wrong).encode())
    try:
        for load, told in ((AVadCLIP.from_pretrained, said), (load_model, "")):
            with pytest.raises(CheckpointError, match=f"(?s){saved}.*{told}"):
                load(saved)
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    teacher().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"torch_dtype": torch.bfloat16}, "config.json with the given torch_dtype does not describe a model .*"),
        ({"heads": 3}, "config.json with the given heads does not describe a model .*heads must divide"),
        ({"length": 512}, "does not fit config.json with the given length: length is 24, not 512"),
    ],
    ids=str,
)
def test_settings_given_that_do_not_fit_are_not_blamed_on_the_folder(saved, wrong, said):
    with pytest.raises(CheckpointError, match=said):
        AVadCLIP.from_pretrained(saved, **wrong)


def test_a_config_leads_to_no_other_file(saved, monkeypatch):
    """Nothing but its own weights is read, whoever wrote it: not the path in it, nor CLIP's by default."""
    path = saved / "config.json"
    monkeypatch.setattr(text, "read_weights", None)
    monkeypatch.setattr(text, "openai_weights", None)
    kept = json.loads(path.read_text())
    del kept["text_weights"]
    for settings in (kept, kept | {"text_weights": "openai"}, kept | {"text_weights": str(path)}):
        path.write_text(json.dumps(settings))
        assert AVadCLIP.from_pretrained(saved).settings()["text_weights"] is None


def test_weights_of_integers(tmp_path):
    """They would be taken for floats: a quantised model's names and shapes fit."""
    model = teacher()
    model.save_pretrained(tmp_path)
    state = {name: x.contiguous().to(torch.int8) for name, x in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="dtype: classifier.weight is torch.int8, weights are floating point"):
        AVadCLIP.from_pretrained(tmp_path)


def test_a_folder_of_other_weights(tmp_path):
    teacher().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors") | {"alpha": torch.zeros(3)}
    del state["classifier.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit AVadCLIP.*missing: classifier.bias \[1\].*unknown: alpha"
    ):
        AVadCLIP.from_pretrained(tmp_path)
    save_file({"alpha": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is not an AVadCLIP checkpoint: .* is missing"):
        AVadCLIP.from_pretrained(tmp_path)


def test_saving_never_leaves_half_a_file(tmp_path, monkeypatch):
    """Where writing fails, what was there stays."""
    model = teacher()
    model.to_official(tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        model.to_official(tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("full", ["model.safetensors", "config.json"])
def test_a_model_stays_where_another_cannot_be_saved_over_it(full, tmp_path, monkeypatch):
    """Of the mixin, config.json is removed before the weights are written: on a full disk no model was left."""
    model = teacher()
    model.save_pretrained(tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args, **named):
        raise OSError("disk full")

    monkeypatch.setattr("avadclip_fast.models.checkpoints.save" if full == "model.safetensors" else "json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        teacher(1, window=8).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert same(model, AVadCLIP.from_pretrained(tmp_path))


def test_a_kill_while_a_model_is_saved_over_another_leaves_that(tmp_path, monkeypatch):
    """Wherever it comes until the new one is on the disk: its files take seconds to write, and are then renamed."""
    teacher().save_pretrained(tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    before, looked = {file.name: file.read_bytes() for file in tmp_path.iterdir()}, []

    def at(module, name):
        plain = getattr(module, name)

        def call(*given, **named):
            looked.append({name: (tmp_path / name).read_bytes() for name in before if (tmp_path / name).exists()})
            return plain(*given, **named)

        monkeypatch.setattr(module, name, call)

    at(checkpoints, "save")
    at(os, "fsync")
    teacher(1).save_pretrained(tmp_path)
    assert looked[:3] == [before] * 3
    assert not (tmp_path / "calibration.json").exists()


# CLIP's text weights


@pytest.fixture
def clip(tmp_path):
    """A text side, and its frozen weights as a file of CLIP's."""
    encoder = text.TextEncoder(TOKENS, 16, 64, 1)
    encoder.randomize(seed=5)
    state = {k: v.contiguous() for k, v in encoder.state_dict().items() if not k.startswith("prompt.")}
    save_file(state | {"visual.proj": torch.zeros(2, 2)}, tmp_path / "clip.safetensors")
    return encoder, tmp_path / "clip.safetensors"


def test_text_weights_from_each_kind_of_file(clip, official, tmp_path):
    encoder, path = clip
    state = torch.load(official[1], weights_only=True)
    torch.save({k: v for k, v in encoder.state_dict().items() if not k.startswith("prompt.")}, tmp_path / "plain.pt")
    for source in (path, str(path), tmp_path / "plain.pt"):
        other = text.TextEncoder(TOKENS, 16, 64, 1)
        other.load(source)
        assert torch.equal(other.text_projection, encoder.text_projection)
    model = teacher(text_weights=str(official[1]))  # an official AVadCLIP checkpoint holds them too
    assert torch.equal(model.text.token_embedding.weight, state["clipmodel.token_embedding.weight"])


# TorchScript is deprecated, but OpenAI's file is what it is.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*TorchScript archive.*:UserWarning")
def test_text_weights_from_openais_archive(clip, tmp_path, monkeypatch):
    """OpenAI's own file is a TorchScript archive, in float16."""
    encoder, _ = clip

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, x in encoder.state_dict().items():
                if not name.startswith("prompt."):
                    self.add_weight(name.split("."), x.half())

        def add_weight(self, path, x):
            owner = self
            for part in path[:-1]:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(path[-1], torch.nn.Parameter(x, requires_grad=False))

        def forward(self):
            return 0

    path = tmp_path / "ViT-B-16.pt"
    torch.jit.script(Archive()).save(path)
    other = text.TextEncoder(TOKENS, 16, 64, 1)
    with pytest.raises(TextWeightsError, match="ViT-B-16.pt cannot be read: holds code"):
        other.load(path)
    assert text.OPENAI_URL == get_pretrained_url("ViT-B-16", "openai") and text.OPENAI_SHA256 in text.OPENAI_URL
    monkeypatch.setattr(text, "OPENAI_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    other.load(path)
    assert torch.equal(other.text_projection, encoder.text_projection.half().float())
    content, load = path.read_bytes(), torch.jit.load

    def replaced(file, **options):
        path.write_bytes(b"other code, after the check")
        return load(file, **options)

    monkeypatch.setattr(torch.jit, "load", replaced)
    other.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(TextWeightsError, match="holds code"):
        other.load(path)


def test_absent_text_weights():
    with pytest.raises(TextWeightsError, match="text weights: no file nowhere.pt; give 'openai', 'random' or the path"):
        teacher(text_weights="nowhere.pt")


def test_misshapen_text_weights(clip):
    _, path = clip
    with pytest.raises(TextWeightsError) as raised:
        text.TextEncoder(TOKENS, 16, 64, 2).load(path)
    assert "transformer.resblocks.1.ln_1.weight: expected [64], found none" in str(raised.value)
    with pytest.raises(TextWeightsError, match=r"text_projection: expected \[64, 32\], found \[64, 16\]"):
        text.TextEncoder(TOKENS, 32, 64, 1).load(path)


def test_text_weights_that_cannot_be_read(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(TextWeightsError, match="list.pt holds a list, not a state dict"):
        text.TextEncoder(TOKENS, 16, 64, 1).load(tmp_path / "list.pt")
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(TextWeightsError, match=f"{name} cannot be read"):
            text.TextEncoder(TOKENS, 16, 64, 1).load(tmp_path / name)


def test_no_network(monkeypatch):
    pretrained = pytest.importorskip("open_clip.pretrained")

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained, "download_pretrained_from_url", refuse)
    with pytest.raises(
        TextWeightsError, match=r"could not be fetched \(OSError: no route to host\).*https://\S+/ViT-B-16.pt .*random"
    ):
        teacher(text_weights="openai")


def test_openai_means_clips_vit_b_16(monkeypatch, clip):
    pretrained = pytest.importorskip("open_clip.pretrained")
    asked = []
    monkeypatch.setattr(pretrained, "download_pretrained_from_url", lambda url: asked.append(url) or str(clip[1]))
    text.TextEncoder(TOKENS, 16, 64, 1).load("openai")
    assert len(asked) == 1 and asked[0].endswith("ViT-B-16.pt")


def test_no_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(TextWeightsError, match="class names need open_clip's tokenizer: pip install open_clip_torch"):
        teacher(class_tokens=None)
