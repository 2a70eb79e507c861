import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_deqkan.engines import PrepareBatchKspace

KSPACE = torch.randn(2, 3, 4, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 1, 1, 5, dtype=torch.bool)
MAPS = torch.ones(2, 3, 4, 5, dtype=torch.complex64)
IMAGE = torch.ones(2, 2, 4, 5)


def test_everything_present():
    batch = {"kspace": KSPACE, "mask": MASK, "sensitivity_maps": MAPS, "image": IMAGE, "slice": [1, 2]}
    inputs, target, args, kwargs = PrepareBatchKspace()(batch)
    assert torch.equal(inputs, KSPACE)
    assert torch.equal(target, IMAGE)
    assert args == ()
    assert set(kwargs) == {"mask", "sensitivity_maps"}
    assert torch.equal(kwargs["mask"], MASK)
    assert torch.equal(kwargs["sensitivity_maps"], MAPS)


def test_what_is_absent_is_left_to_the_network():
    inputs, target, args, kwargs = PrepareBatchKspace()({"kspace": KSPACE, "mask": None})
    assert torch.equal(inputs, KSPACE)
    assert (target, args, kwargs) == (None, (), {})


def test_moved_to_the_device():
    inputs, target, _, kwargs = PrepareBatchKspace()({"kspace": KSPACE, "image": IMAGE, "mask": MASK}, device="meta")
    assert {value.device.type for value in (inputs, target, kwargs["mask"])} == {"meta"}


def test_wrong_batches_are_named():
    with pytest.raises(KeyError, match=r"needs the key 'kspace'; got \['image'\]"):
        PrepareBatchKspace()({"image": IMAGE})
    with pytest.raises(TypeError, match="`mask` must be a torch"):
        PrepareBatchKspace()({"kspace": KSPACE, "mask": [1, 0]})


def test_reaches_the_network_by_name_through_monais_engine():
    class Network(nn.Module):
        def forward(self, kspace, mask=None, sensitivity_maps=None):
            assert sensitivity_maps is None
            return (kspace * mask).abs()

    outputs = []
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"kspace": KSPACE, "mask": ~MASK}],
        network=Network(),
        prepare_batch=PrepareBatchKspace(),
        decollate=False,
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output["pred"]))
    evaluator.run()
    assert torch.equal(outputs[0], torch.zeros(2, 3, 4, 5))
