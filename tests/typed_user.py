"""A program that uses the public interface, for mypy --strict and not to be run: what a user's type checker sees.

`assert_type` fails where an annotation is missing, since what is not annotated is Any. Each line that ends in `type:
ignore` is wrong, and mypy has to say so: with Any in its place there would be nothing to ignore, which is an error too.
"""

from typing import assert_type

import numpy as np
from torch import Tensor

import avadclip_fast
from avadclip_fast import (
    AVadCLIP,
    AVadCLIPStudent,
    AVFusion,
    AVPrompt,
    BackendError,
    DistanceGraph,
    MILAlignLoss,
    MILLoss,
    PromptSimilarity,
    SimilarityGraph,
    TemporalAggregator,
    TopKMean,
    UncertaintyDistillationLoss,
    UncertaintyHead,
    WindowAttention,
    data,
    objective,
    ops,
    use_backend,
)
from avadclip_fast.models import CheckpointError, Output, TextWeightsError


def modules(x: Tensor, lengths: Tensor, labels: Tensor) -> None:
    """torch says that calling a module gives Any; forward() is what tells."""
    assert_type(AVFusion(512, mode="gated").forward(x, x, lengths), Tensor)
    assert_type(AVPrompt(512, prompt="paper").forward(x, x, x, lengths), Tensor)
    assert_type(AVPrompt().prompts(x, x, x), Tensor)
    assert_type(DistanceGraph(2.0).forward(x, lengths), Tensor)
    assert_type(MILAlignLoss(7, alpha=0.25).forward(x, labels, lengths), Tensor)
    assert_type(MILLoss(16).forward(x, labels, lengths), Tensor)
    assert_type(PromptSimilarity(0.07, backend="reference").forward(x, x), Tensor)
    assert_type(SimilarityGraph(0.7).forward(x, x, lengths), tuple[Tensor, Tensor])
    assert_type(TemporalAggregator(512, padding="official").forward(x, lengths), Tensor)
    assert_type(TopKMean(16).forward(x, lengths), Tensor)
    assert_type(UncertaintyDistillationLoss().forward(x, x, x, lengths), Tensor)
    assert_type(UncertaintyHead(512).forward(x, lengths), tuple[Tensor, Tensor | None])
    assert_type(WindowAttention(512, window=64).forward(x, lengths=lengths), Tensor)

    AVFusion("512")  # type: ignore[arg-type]
    AVFusion(512, fusion="gated")  # type: ignore[call-arg]
    AVPrompt(512, prompt=True)  # type: ignore[arg-type]
    PromptSimilarity(temperature="cold")  # type: ignore[arg-type]
    MILLoss().forward(x, labels)  # type: ignore[call-arg]
    SimilarityGraph().forward(x, x, 3)  # type: ignore[arg-type]
    AVFusion(512).forward(x, x).no_such_name()  # type: ignore[attr-defined]


def functions(x: Tensor, lengths: Tensor, labels: Tensor) -> None:
    assert_type(ops.add_act(x, x, "relu"), Tensor)
    assert_type(ops.attention_pool(x, x, lengths), Tensor)
    assert_type(ops.distance_graph(x, 2.0, lengths, backend="reference"), Tensor)
    assert_type(ops.distill_loss(x, x, x, lengths), Tensor)
    assert_type(ops.gated_fusion(x, x, x, x, x, x, x, x), Tensor)
    assert_type(ops.linear_act(x, x, x, "gelu", residual=x, norm=(x, x), dilation=2, causal=True), Tensor)
    assert_type(ops.mil_align_loss(x, labels, lengths, x), Tensor)
    assert_type(ops.mil_loss(x, labels, lengths), Tensor)
    assert_type(ops.pack_rows(x, lengths), Tensor)
    assert_type(ops.prefix_attention(x, prefix=11, rows=13, heads=8), Tensor)
    assert_type(ops.prompt_similarity(x, x), Tensor)
    assert_type(ops.similarity_graph(x, x), tuple[Tensor, Tensor])
    assert_type(ops.topk_mean(x, lengths), Tensor)
    assert_type(ops.uniform_pool(x, lengths, rows=256), Tensor)
    assert_type(ops.unpack_rows(x, lengths, rows=256), Tensor)
    with use_backend("reference"):
        assert_type(ops.window_attention(x, x, x, window=4, heads=2, residual=x), Tensor)

    ops.linear_act(x, x, activation=1)  # type: ignore[arg-type]
    ops.uniform_pool(x, lengths)  # type: ignore[call-arg]
    use_backend(0)  # type: ignore[arg-type]


def models(visual: Tensor, audio: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    teacher = AVadCLIP(
        ["normal", "fighting"], window=4, text_weights="random", standardize=("audio", "visual"), motion=True
    )
    out = teacher.forward(visual, audio, lengths)
    assert_type(out, Output)
    assert_type(teacher.fuse(visual, None, lengths), Tensor)
    assert_type(teacher.encode_text(), Tensor)

    student = AVadCLIPStudent.beside(teacher)
    assert_type(student, AVadCLIPStudent)
    assert_type(student.infer(visual, lengths=lengths), Output)
    seen = student.forward(visual, lengths, uncertain=True)
    assert_type(seen.class_logits, Tensor)
    assert_type(seen.log_variance, Tensor | None)

    assert_type(AVadCLIP.from_official("teacher.pth"), AVadCLIP)
    teacher.to_official("back.pth", image_tower="teacher.pth")
    assert_type(AVadCLIP.from_pretrained("folder"), AVadCLIP)

    AVadCLIP(classes=3)  # type: ignore[arg-type]
    AVadCLIP(["normal"], colour="red")  # type: ignore[call-arg]
    AVadCLIPStudent(["normal"], modality=2)  # type: ignore[arg-type]
    teacher.forward(visual)  # type: ignore[call-arg]
    objective(teacher, visual, labels, lengths)  # type: ignore[arg-type]
    losses = objective(student, seen, labels, lengths, teacher_features=out.features)
    assert_type(losses, dict[str, Tensor])
    return losses["total"]


def lists(path: str) -> np.ndarray:
    rows = data.read_list(path, audio=False)
    assert_type(rows, list[data.Row])
    assert_type(data.FeatureSet.load(rows, data.XD_VIOLENCE, 256), data.FeatureSet)
    assert_type(data.FeatureSet.open(path, data.XD_VIOLENCE, 256), tuple[data.FeatureSet, list[data.Row]])
    data.read_list(path, sound=True)  # type: ignore[call-arg]
    return data.frame_vector(data.read_annotations(path), [("v=S-7rRLrxnVQ__#1_label_B4-0-0", 3040)])


def errors(error: Exception) -> bool:
    avadclip_fast.AVFusoin()  # type: ignore[attr-defined]
    return isinstance(error, BackendError | CheckpointError | TextWeightsError | data.DataError | data.LabelError)
