import pytest
import torch

from plates.device import decide_precision, largest_batch, read_behind, set_up_process

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "backbone", "device", "best", "decided"),
    [
        ("auto", "resnet18", "cuda", ["bf16", "fp16", "bf16"], "fp16"),  # a T4 beside A10Gs
        ("auto", "resnet18", "cuda", ["bf16", "bf16"], "bf16"),
        ("auto", "resnet18", "cpu", ["bf16", "fp32"], "fp32"),
        ("auto", "efficientnet_lite0", "cuda", ["bf16"], "fp16"),
        ("auto", "efficientnet_lite0", "cpu", ["bf16"], "fp32"),
        ("bf16", "efficientnet_lite0", "cpu", ["fp32"], "bf16"),
        ("auto", "timm/test_vit", "cpu", ["bf16"], "fp32"),
        ("auto", "timm/test_vit", "cuda", ["bf16"], "bf16"),
        ("auto", "timm/test_vit", "cuda", ["bf16", "fp16"], "fp32"),
        ("fp16", "resnet18", "cpu", ["bf16"], "fp16"),
    ],
)
def test_a_group_has_the_precision_of_its_least_able_device(asked, backbone, device, best, decided):
    assert decide_precision(asked, backbone, device, best) == decided


@pytest.mark.parametrize(("precision", "has_tf32"), [("fp32", False), ("bf16", True), ("fp16", True)])
def test_tf32_is_off_in_fp32_alone(precision, has_tf32):
    """In convolutions torch has it on by default. The second call is that of another run in the same process."""
    for _ in range(2):
        set_up_process(CPU, precision, torch.get_num_threads())
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == has_tf32
        assert torch.get_float32_matmul_precision() == ("high" if has_tf32 else "highest")


def test_a_batch_takes_at_most_half_of_the_free_memory():
    assert largest_batch(1 << 20, 100 << 20) == 32
    assert largest_batch(1, 1 << 40) == 256
    assert largest_batch(1 << 40, 1 << 20) == 1


def test_results_are_read_in_order_two_batches_behind_the_device():
    given = []

    def outputs():
        for number in range(5):
            given.append(number)
            yield torch.tensor([number])

    seen = [(int(values), len(given)) for values in read_behind(outputs())]
    assert seen == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]
