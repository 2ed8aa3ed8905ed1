"""The range loss as a training loop uses it."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from onnxq.errors import UsageError  # noqa: E402
from onnxq.train import KINDS, R2Loss, ranges_of, weights_of  # noqa: E402

torch.set_num_threads(1)


class Net(nn.Module):
    """Conv, depthwise, transposed and linear layers; two BatchNorms fold, the third sits behind a sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=0.1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.after = nn.BatchNorm2d(8, eps=0.1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.up_norm = nn.BatchNorm2d(6, eps=0.1)
        self.head = nn.Linear(6, 5)
        for norm in (self.norm, self.after, self.up_norm):
            norm.running_var.uniform_(0.2, 3)
            nn.init.uniform_(norm.weight, -2, 2)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        y = self.after(self.deep(y) + y)
        return self.head(torch.relu(self.up_norm(self.up(y))).mean((2, 3)))


def ratio(values):
    return np.abs(values).max() / values.std()


def test_the_layers_and_their_norms_are_found():
    net = Net()
    found = {weight.name: weight for weight in weights_of(net)}
    assert list(found) == ["first", "deep", "up", "head"]
    assert [found[name].axis for name in found] == [0, 0, 1, 0]
    assert [name for name in found if found[name].depthwise] == ["deep"]
    assert found["first"].norm is net.norm
    assert found["deep"].norm is None
    assert found["up"].norm is net.up_norm


@pytest.mark.parametrize("pair", [("first", "norm"), ("up", "up_norm")])
def test_a_folded_weight_gives_what_layer_and_norm_give(pair):
    net = Net().eval()
    layer, norm = (getattr(net, name) for name in pair)
    weight = next(weight for weight in weights_of(net) if weight.name == pair[0])
    x = torch.randn(2, layer.in_channels, 9, 9)
    with torch.no_grad():
        wanted = norm(layer(x)) - norm(layer(torch.zeros_like(x)))
        plain = layer.weight.clone()
        layer.weight.copy_(weight.read())
        found = layer(x) - layer(torch.zeros_like(x))
        layer.weight.copy_(plain)
    torch.testing.assert_close(found, wanted)
    weight.read().sum().backward()
    assert norm.weight.grad.abs().min() > 0
    assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("per_channel", [False, True])
def test_linf_is_the_sum_of_largest_magnitudes_over_deviations(per_channel):
    net = Net()
    loss = R2Loss(net, "linf", strength=0.25, per_channel=per_channel)
    wanted = 0.0
    for weight in weights_of(net):
        values = weight.read().detach().numpy()
        rows = np.moveaxis(values, weight.axis, 0) if per_channel else [values]
        wanted += np.mean([ratio(row) for row in rows])
    assert loss().item() == pytest.approx(0.25 * wanted, rel=1e-5)
    raw = sum(float(weight.read().detach().abs().max()) for weight in weights_of(net, fold=False))
    assert R2Loss(net, "linf", strength=1.0, normalise=False, fold=False)().item() == pytest.approx(raw, rel=1e-6)
    folded = sum(float(weight.read().detach().abs().max()) for weight in weights_of(net))
    assert R2Loss(net, "linf", strength=1.0, normalise=False)().item() == pytest.approx(folded, rel=1e-6)


def test_margin_is_the_mean_of_the_top_share():
    net = nn.Linear(40, 5)
    values = net.weight.detach().numpy()
    top = np.sort(np.abs(values).ravel())[::-1][:20].mean() / values.std()
    assert R2Loss(net, "margin", strength=1.0, top=0.1)().item() == pytest.approx(top, rel=1e-5)
    learned = R2Loss(net, "margin", strength=1.0, top=0.1, learn=True)
    assert learned().item() == pytest.approx(top, rel=1e-5)
    rows = [np.sort(np.abs(row))[::-1][:4].mean() / row.std() for row in values]
    loss = R2Loss(net, "margin", strength=1.0, top=0.1, per_channel=True)
    assert loss().item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_soft_min_max_at_its_start():
    net = nn.Linear(40, 5)
    values = net.weight.detach().numpy().astype(np.float64)
    values = values / values.std()
    high, low = np.exp(4 * values), np.exp(-4 * values)
    wanted = (values * high).sum() / high.sum() - (values * low).sum() / low.sum() + np.exp(-4)
    for learn in (False, True):
        loss = R2Loss(net, "soft-min-max", strength=1.0, learn=learn)
        assert loss().item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["margin", "soft-min-max"])
def test_what_is_learned_is_a_parameter_and_moves(kind, per_channel):
    net = Net()
    loss = R2Loss(net, kind, strength=1.0, learn=True, per_channel=per_channel)
    rows = [8, 8, 3, 5] if per_channel else [1] * 4
    assert [len(value) for value in loss.parameters()] == rows
    assert not {id(value) for value in loss.parameters()} & {id(value) for value in net.parameters()}
    before = loss.learned()
    assert list(before) == ["first", "deep", "up", "head"]
    if kind == "soft-min-max":
        assert all(float(value.min()) == pytest.approx(4.0) for value in before.values())
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.05)
    start = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < start
    after = loss.learned()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(float(value.min()) > (1.0 if kind == "soft-min-max" else 0.0) for value in after.values())
    assert not R2Loss(net, kind).learned()
    assert not R2Loss(net, "linf", learn=True).learned()


@pytest.mark.parametrize("kind", KINDS)
def test_scale_makes_no_difference_when_normalised_and_does_otherwise(kind):
    net = nn.Linear(30, 6)
    loss, raw = R2Loss(net, kind, per_channel=True), R2Loss(net, kind, normalise=False)
    before, before_raw = loss().item(), raw().item()
    with torch.no_grad():
        net.weight *= 7.0
    assert loss().item() == pytest.approx(before, rel=1e-5)
    assert raw().item() > 1.5 * before_raw
    loss().backward()
    assert float((net.weight.grad * net.weight.detach()).sum()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_descent_narrows_weights_and_raises_their_sqnr(kind):
    torch.manual_seed(0)
    net = nn.Linear(64, 32, bias=False)
    nn.init.normal_(net.weight)
    loss = R2Loss(net, kind, strength=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)

    def sqnr():
        weight = net.weight.detach()
        step = weight.abs().max() / 7
        return float(
            10 * torch.log10(weight.square().mean() / (torch.round(weight / step) * step - weight).square().mean())
        )

    before, seen = sqnr(), []
    for _ in range(100):
        seen.append(loss.ranges()[0].per_tensor)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    means = np.asarray(seen).reshape(10, 10).mean(axis=1)
    assert (np.diff(means) < 0).all()
    assert sqnr() > before + 1.0


def test_dead_channels_are_not_blown_up():
    net = nn.Linear(50, 4, bias=False)
    with torch.no_grad():
        net.weight[1] *= 1e-8
        net.weight[2] = 0
    R2Loss(net, "linf", strength=1.0, per_channel=True)().backward()
    live = net.weight.grad[0].abs().max()
    assert torch.isfinite(net.weight.grad).all()
    assert net.weight.grad[1].abs().max() < 20 * live
    assert net.weight.grad[2].abs().max() == 0


def test_the_log_has_both_ratios_of_every_layer():
    net = Net()
    found = {entry.name: entry for entry in R2Loss(net).ranges()}
    for weight in weights_of(net):
        values = weight.read().detach().numpy()
        rows = np.moveaxis(values, weight.axis, 0)
        assert found[weight.name].per_tensor == pytest.approx(ratio(values), rel=1e-5)
        assert found[weight.name].per_channel == pytest.approx(np.median([ratio(row) for row in rows]), rel=1e-5)
    with torch.no_grad():
        net.head.weight[1:] = 0.5
    entry = ranges_of(weights_of(net))[-1]
    assert entry.per_channel == pytest.approx(ratio(net.head.weight[0].detach().numpy()), rel=1e-5)
    with torch.no_grad():
        net.head.weight[:] = 0
    assert (ranges_of(weights_of(net))[-1].per_tensor, ranges_of(weights_of(net))[-1].per_channel) == (0.0, 0.0)


def test_warming_up():
    net = nn.Linear(9, 3)
    loss = R2Loss(net, "linf", warm_up=0.1)
    assert loss().item() == 0.0
    loss.step(0.09)
    assert loss().item() == 0.0
    loss.step(0.1)
    assert loss().item() == R2Loss(net, "linf")().item() > 0
    assert "factor" not in loss.state_dict()


def test_depthwise_layers_may_be_left_out():
    net = Net()
    with_them, without = (R2Loss(net, "linf", strength=1.0, depthwise=depthwise) for depthwise in (True, False))
    deep = next(entry for entry in with_them.ranges() if entry.name == "deep")
    assert with_them().item() - without().item() == pytest.approx(deep.per_tensor, rel=1e-4)
    with pytest.raises(UsageError, match="depthwise"):
        R2Loss(nn.Conv2d(4, 4, 3, groups=4), depthwise=False)


def test_half_precision_is_measured_in_single():
    net = nn.Linear(64, 8).half()
    loss = R2Loss(net, "soft-min-max")
    assert loss().dtype == torch.float32
    loss().backward()
    assert torch.isfinite(net.weight.grad).all()


def test_models_that_cannot_be_traced_are_said_and_pairs_can_be_named():
    class Odd(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.warns(UserWarning, match="fold="):
        assert next(iter(weights_of(Odd()))).norm is None
    net = Odd()
    assert next(iter(weights_of(net, {"first": "norm"}))).norm is net.norm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_of(net, fold=False)
    for pair in ({"norm": "first"}, {"first": "head"}, {"first": "none"}):
        with pytest.raises(UsageError, match="fold"):
            weights_of(net, pair)


def test_a_layer_or_norm_that_runs_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.layer(self.norm(self.layer(x)))

    assert weights_of(Twice())[0].norm is None


@pytest.mark.parametrize("change", [{"kind": "l2"}, {"strength": -1.0}, {"top": 0.0}, {"top": 1.5}, {"warm_up": 1.0}])
def test_wrong_settings_are_refused(change):
    with pytest.raises(UsageError):
        R2Loss(nn.Linear(3, 2), **change)
    with pytest.raises(UsageError, match="no linear"):
        R2Loss(nn.ReLU())


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_whole(kind):
    net = nn.Linear(12, 4)
    loss = R2Loss(net, kind, per_channel=True, learn=True, warm_up=0.5)
    compiled = torch.compile(lambda: loss(), backend="eager", fullgraph=True)
    assert compiled().item() == 0.0
    loss.step(0.5)
    assert compiled().item() == pytest.approx(loss().item())
    compiled().backward()
    assert net.weight.grad is not None
