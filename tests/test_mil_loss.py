"""mil_loss and mil_align_loss: every backend against the reference, the reference against loops, certain scores."""

import math

import pytest
import torch
from op_tests import OpTests

from avadclip_fast import BackendError, MILAlignLoss, MILLoss, ops


def top_mean(scores, divisor):
    best = sorted((float(s) for s in scores), reverse=True)[: len(scores) // divisor + 1]
    return sum(best) / len(best)


class TestMILLoss(OpTests):
    op = "mil_loss"
    free = {("logits", 1), ("labels", 1)}
    loose = ("labels",)

    def oracle(self, logits, labels, lengths, divisor):
        total = 0.0
        for b, n in enumerate(lengths):
            p = top_mean([1 / (1 + math.exp(-x)) for x in logits[b, :n]], divisor)
            target = 1 - labels[b, 0]
            total -= target * max(math.log(p), -100) + (1 - target) * max(math.log(1 - p), -100)
        return total / len(lengths)

    @pytest.mark.parametrize("logit", [-200.0, 200.0], ids=["p=0", "p=1"])
    @pytest.mark.parametrize("normal", [0.0, 1.0], ids=["abnormal", "normal"])
    def test_certain_scores_are_finite(self, case, backend, device, logit, normal):
        logits, lengths = torch.full((1, 4), logit, device=device), torch.tensor([4], device=device)
        labels = torch.tensor([[normal, 1 - normal]], device=device)
        out, grads = self.run({"logits": logits, "labels": labels, "lengths": lengths}, backend)
        wrong = (logit > 0) == (normal == 1)
        torch.testing.assert_close(out.cpu(), torch.tensor(100.0 if wrong else 0.0))  # log is clamped at -100
        assert grads["logits"].isfinite().all()

    def test_logarithms_are_clamped_in_float64_too(self, case, backend, device):
        """Where 1e-87 is a number, and its logarithm below -100."""
        given = {"dtype": torch.float64, "device": device}
        arguments = {"logits": torch.full((1, 4), -200.0, **given), "labels": torch.tensor([[0.0, 1.0]], **given)}
        try:
            assert self.call({**arguments, "lengths": torch.tensor([4], device=device)}, backend).item() == 100
        except BackendError as error:
            pytest.skip(str(error))

    def test_ties_go_to_the_lowest_row(self, case, backend, device):
        logits, lengths = torch.zeros(1, 5, device=device), torch.tensor([5], device=device)
        arguments = {"logits": logits, "labels": torch.tensor([[0.0, 1.0]], device=device), "lengths": lengths}
        _, grads = self.run({**arguments, "divisor": 4}, backend)  # k = 2
        assert (grads["logits"].cpu() != 0).tolist() == [[True, True, False, False, False]]

    def test_nan_shows(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        arguments["logits"][0, 0] = float("nan")
        assert self.call(arguments, backend).isnan()


class TestMILAlignLoss(OpTests):
    op = "mil_align_loss"
    free = {("logits", 1)}
    loose = ("labels", "alpha")

    def oracle(self, logits, labels, lengths, alpha, divisor):
        total, classes = 0.0, range(logits.shape[2])
        for b, n in enumerate(lengths):
            s = [top_mean(logits[b, :n, c], divisor) for c in classes]
            p = [math.exp(x) / sum(math.exp(z) for z in s) for x in s]
            y = [labels[b, c] / sum(labels[b]) for c in classes]
            ce = -sum(y[c] * math.log(p[c]) for c in classes)
            pt = sum(y[c] * p[c] for c in classes)
            focal = sum(y[c] * alpha[c] for c in classes) * (1 - pt) ** 2 * ce
            total += (ce + focal) / 2
        return total / len(lengths)

    def test_certain_scores_are_finite(self, case, backend, device):
        for right in (0, 1):
            logits = torch.zeros(1, 4, 2, device=device)
            logits[..., right] = 3000.0  # more than exp takes in float64
            out, grads = self.run(
                {
                    "logits": logits,
                    "labels": torch.tensor([[1.0, 0.0]], device=device),
                    "lengths": torch.tensor([4], device=device),
                    "alpha": torch.full((2,), 0.25, device=device),
                },
                backend,
            )
            # right: ce = 0; wrong: ce = 3000, focal = 0.25 · 3000
            torch.testing.assert_close(out.cpu(), torch.tensor(0.0 if right == 0 else (3000 + 750) / 2))
            assert all(grad.isfinite().all() for grad in grads.values())

    def test_of_no_video_alpha_has_no_slope(self, case, backend, device):
        logits, labels, alpha = (torch.zeros(shape, device=device) for shape in ((0, 4, 2), (0, 2), (2,)))
        lengths = torch.zeros(0, dtype=torch.long, device=device)
        out, grads = self.run({"logits": logits, "labels": labels, "lengths": lengths, "alpha": alpha}, backend)
        assert out.isnan() and (grads["alpha"] == 0).all()

    def test_integer_labels(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        expected, grads = self.run(arguments, backend)
        out, same = self.run({**arguments, "labels": arguments["labels"].long()}, backend)
        assert torch.equal(out, expected) and torch.equal(same["logits"], grads["logits"])


@pytest.mark.parametrize("loss", [ops.mil_loss, lambda *a: MILAlignLoss(2)(*a)], ids=["mil_loss", "mil_align_loss"])
def test_lengths_are_needed(loss):
    logits = torch.zeros(1, 4) if loss is ops.mil_loss else torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="lengths must be an int32 or int64 tensor, got NoneType"):
        loss(logits, torch.ones(1, 2), None)


@pytest.mark.parametrize("wrong", [[[2.0, 0.0]], [[255, 0]], [[-1.0, 1.0]]])
def test_normal_is_no_count(wrong):
    with pytest.raises(ValueError, match=r"labels of class 0, normal, must lie in 0\.\.1, got"):
        MILLoss()(torch.zeros(1, 4), torch.tensor(wrong), torch.tensor([4]))


@pytest.mark.parametrize("backend", ["reference", None])
def test_alpha_is_a_number_of_any_dtype(backend):
    """float32 logits give a float32 loss, on every backend."""
    losses = [MILAlignLoss(2, 1, 4, backend).to(dtype) for dtype in (torch.float32, torch.float64)]
    given = torch.randn(1, 4, 2), torch.tensor([[1, 0]]), torch.tensor([4])
    one, two = (loss(*given) for loss in losses)
    assert one.dtype == two.dtype == torch.float32 and one == two
    two.backward()
    assert losses[1].alpha.grad.dtype == torch.float64


def test_labels_have_a_class():
    logits, lengths = torch.zeros(1, 4), torch.tensor([4])
    with pytest.raises(ValueError, match=r"mil_loss: labels must have a class.*got \[1, 0\]"):
        ops.mil_loss(logits, torch.zeros(1, 0), lengths)
    with pytest.raises(ValueError, match=r"mil_align_loss: labels must have a class.*got \[1, 0\]"):
        ops.mil_align_loss(logits[..., None][..., :0], torch.zeros(1, 0), lengths, torch.zeros(0))


def test_alpha_learns():
    loss = MILAlignLoss(2)
    loss(torch.randn(1, 4, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([4])).backward()
    assert loss.alpha.grad[0] == 0 and loss.alpha.grad[1] > 0


def test_modules_begin_with_the_authors_numbers():
    """Of 64 snippets, the mean of 64 // 16 + 1 counts; each class weighs 0.25 at first."""
    logits, labels, lengths = torch.randn(2, 64, 2), torch.eye(2), torch.tensor([64, 64])
    assert MILLoss()(logits[..., 0], labels, lengths) == ops.mil_loss(logits[..., 0], labels, lengths, 16)
    align, alpha = MILAlignLoss(2), torch.full((2,), 0.25)
    assert torch.equal(align.alpha, alpha)
    assert align(logits, labels, lengths) == ops.mil_align_loss(logits, labels, lengths, alpha, 16)
