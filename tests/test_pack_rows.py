"""pack_rows and unpack_rows: every backend against the reference, the reference against loops, there and back."""

import numpy as np
import pytest
import torch
from op_tests import OpTests

from avadclip_fast import ops


class TestPackRows(OpTests):
    op = "pack_rows"
    free = {("padded", 1), ("padded", 2)}

    def oracle(self, padded, lengths):
        return np.concatenate([padded[b, :n] for b, n in enumerate(lengths)])

    def test_there_and_back(self, case, backend, device):
        arguments = self.make(case, backend, device=device)
        padded, lengths = arguments["padded"], arguments["lengths"]
        back = ops.unpack_rows(self.call(arguments, backend), lengths, padded.shape[1], backend=backend)
        for b, n in enumerate(lengths):
            assert torch.equal(back[b, :n], padded[b, :n]) and (back[b, n:] == 0).all()


class TestUnpackRows(OpTests):
    op = "unpack_rows"
    packed = True
    free = {("packed", 0), ("packed", 1)}

    def oracle(self, packed, lengths, rows):
        out, first = np.zeros((len(lengths), rows, packed.shape[1])), 0
        for b, n in enumerate(lengths):
            out[b, :n] = packed[first : first + n]
            first += n
        return out


def test_refuses_a_total_that_is_not_the_sum():
    with pytest.raises(ValueError, match="lengths must sum to the number of rows, 5, got 4"):
        ops.pack_rows(torch.zeros(2, 3, 2), torch.tensor([1, 3]), total=5)
