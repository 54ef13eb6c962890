"""Frozen weights in the dtype of autocast, converted when they change instead of in every call."""

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops._dispatch import transformed

# weight -> dtype -> (its state when it was converted, the result). Beside the modules, so that neither state dicts nor
# copies nor pickles hold it; a weight that is gone takes its entry along.
_lowered = WeakTensorKeyDictionary()


def release(module: nn.Module) -> None:
    """Forgets the weights of a module whose tensors are about to be swapped for others.

    With `torch.__future__.set_swap_module_params_on_conversion` on, torch swaps them in conversions and in
    load_state_dict, and refuses to while there are weak references to them.
    """
    if torch.__future__.get_swap_module_params_on_conversion():
        for weight in module.parameters():
            _lowered.pop(weight, None)


def lowered(weight: Tensor) -> Tensor:
    """A frozen weight in the dtype of autocast; without autocast, or if it needs a gradient, the weight itself.

    weight: any shape, floating point, -> the same shape
    The result is cached. After the weight moves or changes in place, the next call updates the result, in place too: a
    CUDA graph may read it, and sees the change from that call on. Writing to `weight.data` goes unnoticed by torch.
    """
    device = weight.device.type
    if weight.requires_grad or device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return weight
    if torch.compiler.is_compiling() or transformed() or type(weight) not in (Tensor, nn.Parameter):
        return weight  # what is traced or wrapped has no address
    if weight.is_inference():  # torch does not count its changes
        return weight
    dtype = torch.get_autocast_dtype(device)
    # An address is not enough: what replaces a tensor may lie where it lay. A storage that is referred to stays itself.
    state = (StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), weight._version)
    kept = _lowered.setdefault(weight, {})
    before, result = kept.get(dtype, (None, None))
    if before == state:
        return result
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return weight  # what is made in a capture is filled by the graph alone
    with torch.inference_mode(False), torch.no_grad():
        if result is not None and (result.device, result.shape) == (weight.device, weight.shape):
            result.copy_(weight)
        else:
            result = weight.to(dtype, copy=True)
    kept[dtype] = (state, result)
    return result
