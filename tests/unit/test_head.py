import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from plates.head import HeadSettings, epoch_order, fit_heads

V, N, F, C, EPOCHS, BATCH = 3, 13, 10, 3, 12, 4


def data():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(V, N, F, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    initial = (torch.randn(C, F, generator=generator) * 0.1, torch.zeros(C))
    return features, labels, initial


def fit_with_torch_optim(features, labels, initial, settings: HeadSettings, seed: int, class_weights=None):
    """The plain loop that one head must equal: by torch a weighted mean is divided by the batch's weights. Its losses
    are not weighted."""
    class_weights = class_weights and torch.tensor(class_weights)
    head = nn.Linear(F, C)
    head.load_state_dict({"weight": initial[0], "bias": initial[1]})
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.step_size, settings.gamma)
    indices = torch.tensor(list(settings.indices))
    losses = []
    for epoch in range(EPOCHS):
        order = indices[epoch_order(seed, epoch, torch.zeros(len(indices)))]
        total = 0.0
        for batch in order.split(BATCH):
            logits = head(features[epoch % V][batch])
            loss = cross_entropy(logits, labels[batch], weight=class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += cross_entropy(logits, labels[batch], reduction="sum").item()
        scheduler.step()
        losses.append(total / len(indices))
    return head, losses


@pytest.mark.parametrize("class_weights", [None, (0.2, 1.0, 7.0)])
def test_many_heads_equal_torch_optim_one_by_one(class_weights):
    """Differing schedules and folds; folds of 13, 9 and 5 images do not step equally often."""
    features, labels, initial = data()
    settings = [
        HeadSettings(lr=1e-2, step_size=4, gamma=0.1, indices=range(N)),
        HeadSettings(lr=0.1, step_size=1, gamma=0.9, indices=[0, 2, 4, 6, 8, 10, 12, 1, 3]),
        HeadSettings(lr=1e-3, step_size=100, gamma=1.0, indices=[5, 7, 9, 11, 12]),
    ]
    heads = fit_heads(features, labels, settings, initial, epochs=EPOCHS, global_batch_size=BATCH, seed=3,
                      class_weights=class_weights)  # fmt: skip
    for index, one in enumerate(settings):
        head, losses = fit_with_torch_optim(features, labels, initial, one, 3, class_weights)
        assert (heads.weight[index] - head.weight).abs().max() < 1e-5
        assert (heads.bias[index] - head.bias).abs().max() < 1e-5
        assert [row["train/loss"] for row in heads.history(index)] == pytest.approx(losses, abs=1e-5)


def test_one_head_is_the_case_of_one():
    features, labels, initial = data()
    one = HeadSettings(lr=1e-2, step_size=4, gamma=0.5, indices=range(N))
    other = HeadSettings(lr=1.0, step_size=1, gamma=1.0, indices=range(5))
    alone = fit_heads(features, labels, [one], initial, epochs=EPOCHS, global_batch_size=BATCH, seed=0)
    beside = fit_heads(features, labels, [other, one], initial, epochs=EPOCHS, global_batch_size=BATCH, seed=0)
    assert torch.allclose(alone.weight[0], beside.weight[1], atol=1e-6)


def test_a_class_of_weight_2_is_as_its_images_twice():
    """In batches of all images; weights of one size change nothing."""
    features, labels, initial = data()
    twice = torch.cat([torch.arange(N), torch.where(labels == 1)[0]])

    def fit(indices: torch.Tensor, class_weights: tuple[float, ...] | None) -> torch.Tensor:
        one = HeadSettings(lr=0.1, step_size=5, gamma=0.5, indices=range(len(indices)))
        chosen = (features[:, indices], labels[indices], [one], initial)
        return fit_heads(*chosen, epochs=EPOCHS, global_batch_size=99, seed=0, class_weights=class_weights).weight

    weighted, listed = fit(torch.arange(N), (3.0, 6.0, 3.0)), fit(twice, None)
    torch.testing.assert_close(weighted, listed, atol=1e-5, rtol=0)
    assert torch.equal(fit(torch.arange(N), (4.0, 4.0, 4.0)), fit(torch.arange(N), None))
    assert (weighted - fit(torch.arange(N), None)).abs().max() > 0.01


def test_an_epoch_goes_through_eight_row_groups_at_a_time():
    groups = torch.arange(200) // 10
    orders = [epoch_order(0, epoch, groups) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(200))
        seen = [set(groups[order[start : start + 80]].tolist()) for start in (0, 80, 160)]
        assert [len(window) for window in seen] == [8, 8, 4]
        assert groups[order[:80]].tolist() != sorted(groups[order[:80]].tolist())
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert len({tuple(groups[order[:80]].unique().tolist()) for order in orders}) == 3


def test_few_row_groups_are_shuffled_as_a_folder_is():
    assert torch.equal(epoch_order(1, 2, torch.arange(40) // 5), epoch_order(1, 2, torch.zeros(40)))


def test_evaluation_scores_every_epoch():
    features, labels, initial = data()
    one = HeadSettings(lr=1e-2, step_size=4, gamma=0.5, indices=range(N))
    heads = fit_heads(
        features, labels, [one], initial, epochs=2, global_batch_size=BATCH, seed=0, evaluation=(features[0], labels)
    )
    logits = heads.logits(features[0])[0]
    assert len(heads.history(0)) == 2
    last = heads.history(0)[-1]
    assert last["val/loss"] == pytest.approx(float(cross_entropy(logits, labels)), abs=1e-6)
    assert last["val/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
