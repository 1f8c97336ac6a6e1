"""Oracles: each test compares with something independent, and fails when the code is wrong."""
import copy
import csv
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import count, cycle, product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch.nn.utils import parameters_to_vector as flat

import emodarts
import features
import train
from emodarts import CNN_OPS, SEQ_OPS, Architect, Cell, Genotype, MixedOp, Network
from emodarts import derive, entropy, expected_parameters, random_genotype, without_statistics
from features import CLASSES, CORPORA, Data, Fold, InputError, Settings, code_digest, folds, halves
from features import load, lock, poisoned, read_corpus, read_wav, with_frames

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
HERE = Path(__file__).parent
SMALL = dict(channels=4, bands=24, cnn_cells=3, seq_cells=1, nodes=2, stem_stride=2)
close = torch.testing.assert_close

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def batch(n, f=24, t=32, dtype=torch.float32):
    return torch.randn(n, 1, f, t, dtype=dtype), torch.arange(n) % 4

# emodarts.py
TINY_NET = dict(SMALL, channels=2, cnn_cells=1, seq_space="rnn_att")  # 8 and 4 operations an edge
SKIPS = (("skip_connect", 0),), (("skip_connect", 1),)
RECURRENT = [name for name in SEQ_OPS if name not in ("none", "skip_connect")]

def whole_cell(nodes, ops):
    ops = cycle(ops)  # on all edges, in turn
    return tuple(tuple((next(ops), j) for j in range(i)) for i in range(2, nodes + 2))

@torch.no_grad()
def used(module, x):
    """In evaluation mode, with running statistics that are not the initial ones."""
    for mode in (True, True, True, False):
        module.train(mode)(x)
    return module

def derived_from(supernet, genotype, **sizes):
    """With the supernet's weights and statistics; only norms have more, scales 1 and shifts 0."""
    net = Network(**sizes, genotype=genotype).double()
    missing, _ = net.load_state_dict(supernet.state_dict(), strict=False)
    kinds = [type(m) for m in (*net.cnn.modules(), *net.seq.modules())]
    assert len(missing) == 2 * (kinds.count(nn.BatchNorm2d) + kinds.count(nn.LayerNorm))
    return net

def hypergradient(net, *batches, order=1):
    """-> loss and gradients that a step hands to Adam, whose beta of 0 keeps the last ones."""
    adam = dict(lr=0.0, betas=(0.0, 0.999), weight_decay=0.0)
    architect = Architect(net, F.cross_entropy, order=order, **adam)
    loss = architect.step(*batches)
    return loss, [architect.optimizer.state[alpha]["exp_avg"] for alpha in net.alphas()]

def test_mixed_op_and_cell_work_where_their_text_is_copied_to():
    text, there = inspect.getsource(MixedOp) + inspect.getsource(Cell), {"__name__": "elsewhere"}
    exec("import torch\nimport torch.nn.functional as F\nfrom torch import nn\n" + text, there)
    (s0, s1), alpha = torch.randn(2, 2, 3, 4), torch.randn(3)
    mixed = there["MixedOp"]({"a": nn.Linear(4, 4), "b": nn.Tanh(), "c": nn.Identity()})
    (a, b, c), op = alpha.exp() / alpha.exp().sum(), mixed.ops["a"]
    y = mixed(s0, dict(zip(mixed.ops, alpha.softmax(-1))))
    close(y, a * op(s0) + b * s0.tanh() + c * s0)
    op.forward = None  # what is not chosen is not computed
    close(mixed(s0, {"b": 2.0}), 2 * s0.tanh())
    cell = there["Cell"]("own", [[(1, "b")], [(0, "b"), (2, "b")]], lambda name, j: nn.Tanh())
    close(cell(s0, s1), torch.cat([s1.tanh(), s0.tanh() + s1.tanh().tanh()], dim=1))
    with pytest.raises(ValueError):  # too few choices
        cell(s0, s1, [{"b": 2.0}])

def test_drop_path_drops_whole_utterances_and_never_a_skip():
    """Nor in evaluation, nor on edges that are not decided. It reaches all cells, as dropout."""
    ones, wiring = torch.ones(20_000, 2, 3), [[(0, ["own"]), (1, ["skip_connect"])]]
    cell = Cell("own", wiring, lambda name, j: nn.Identity())
    y = cell(ones, ones, p_drop=0.3) - ones
    assert torch.equal(y, y[:, :1, :1].expand_as(y)) and 0.28 < (y == 0).float().mean() < 0.32
    close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.7))
    close(cell(ones, ones, [{"own": 1.0}, {"skip_connect": 1.0}], 1.0), 2 * ones)
    close(cell.eval()(ones, ones, p_drop=0.3), 2 * ones)
    cells = [[[(op, 0)]] for op in ("sep_conv_3x3", "dil_conv_3x3", "lstm_1")]
    net, (x, _) = Network(**SMALL, genotype=Genotype(*cells)), batch(4)
    for net.drop_path, net.dropout.p in ((1.0, 0.0), (0.0, 1.0)):
        assert not any(s.any() for s in net.frames(x))
        close(net(x), net.head.bias.expand(4, 4))

@pytest.mark.parametrize("space, count", [("lstm", 74_319_852), ("rnn", 18_839_532)])
def test_paper_scale_has_the_published_number_of_weights(space, count, monkeypatch):
    monkeypatch.setattr(nn.init, "orthogonal_", lambda gate: gate)  # slow, for nothing
    with torch.device("meta"):
        net = Network(seq_space=space)
    assert sum(p.numel() for p in net.cnn.parameters()) == 345_312
    assert sum(p.numel() for p in net.weights()) == count

@pytest.mark.parametrize("name", [name for name in CNN_OPS if "conv" in name])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_look_where_their_names_say(name, stride):
    """ReLU, depthwise, pointwise, BN; twice if separable, else once and dilated by 2."""
    op, x, kernel = CNN_OPS[name](4, stride, False), torch.randn(3, 4, 9, 8), int(name[-1])
    (*weights,), y, dilation = op.parameters(), x, 1 if "sep" in name else 2
    strides = [stride, 1] if "sep" in name else [stride]
    for depthwise, pointwise, s in zip(weights[::2], weights[1::2], strides, strict=True):
        padding = dilation * (kernel - 1) // 2
        y = F.conv2d(y.relu(), depthwise, None, s, padding, dilation, groups=4)
        y = F.batch_norm(F.conv2d(y, pointwise), None, None, training=True)
    assert depthwise.shape == (4, 1, kernel, kernel)
    close(op(x), y)

@pytest.mark.parametrize("stride", [1, 2])
def test_pooling_leaves_out_what_is_padded(stride):
    z = torch.randn(3, 4, 7, 8)
    windows = F.pad(z, (1, 1, 1, 1), value=math.nan).unfold(2, 3, stride).unfold(3, 3, stride)
    mean, largest = windows.nanmean((4, 5)), windows.nan_to_num(-math.inf).amax((4, 5))
    for name, y in (("avg_pool_3x3", mean), ("max_pool_3x3", largest)):
        y = F.batch_norm(y, None, None, training=True)
        close(CNN_OPS[name](4, stride, False)(z), y)

def test_a_skip_with_stride_2_is_two_strided_convolutions():
    op, x = CNN_OPS["skip_connect"](4, 2, False), torch.randn(3, 4, 7, 8)
    even, odd = next(op.parameters()).chunk(2)
    shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
    halves = F.conv2d(x.relu(), even, stride=2), F.conv2d(shifted.relu(), odd, stride=2)
    close(op(x), F.batch_norm(torch.cat(halves, dim=1), None, None, training=True))
    assert CNN_OPS["skip_connect"](4, 1, False)(x) is x
    op = emodarts.conv_1x1(4, 6, False)  # before a cell
    y = F.conv2d(x.relu(), *op.parameters())
    close(op(x), F.batch_norm(y, None, None, training=True))

@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_operations_begin_gate_by_gate_and_as_loud_as_a_skip(name):
    op, lstm = SEQ_OPS[name](64, True), name.startswith("lstm")
    assert 1 / 1.2 < op(torch.randn(256, 16, 64)).std(dim=(0, 1)).mean() < 1.2
    for parameter, p in op.rnn.named_parameters():
        for k, gate in enumerate(p.detach().split(64)):  # input, forget, cell, output
            if "weight_hh" in parameter:  # orthogonal
                close(gate @ gate.T, torch.eye(64), atol=1e-5, rtol=0)
            elif "weight_ih" in parameter:  # uniform, within Xavier's limits
                assert 0.95 < gate.abs().max() / math.sqrt(6 / sum(gate.shape)) <= 1
            else:
                assert (gate == float(lstm and "bias_ih" in parameter and k == 1)).all()

@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_operations_by_hand(name):
    op, x = SEQ_OPS[name](6, True).double(), torch.randn(3, 7, 6).double()
    lstm, attentive = name.startswith("lstm"), "_att_" in name
    assert type(op.rnn) is (nn.LSTM if lstm else nn.RNN)
    assert op.rnn.num_layers == int(name[-1]) and op.rnn.bidirectional == attentive
    op.norm.weight.data.normal_()
    op.norm.bias.data.normal_()
    for n in range(3):
        h, last = op.rnn(x[n])
        if attentive:
            last = last[0] if lstm else last  # (2 * layers, D): layer by layer, both directions
            q, (W, _, v) = torch.cat([last[-2], last[-1]]), op.score
            e = [v(torch.tanh(W(torch.cat([h_t, q])))).exp() for h_t in h]
            c = sum(e_t / sum(e) * h_t for e_t, h_t in zip(e, h))
            h = torch.stack([op.project(torch.cat([h_t, c])) for h_t in h])
        close(op(x)[n], F.layer_norm(h, (6,), op.norm.weight, op.norm.bias))

@pytest.mark.parametrize("cnn_cells", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("seq_cells, nodes, channels, bands, t, seq_width", [
    (0, 1, 2, 13, 37, 3), (1, 3, 3, 41, 9, None), (2, 1, 4, 1, 5, 6), (3, 2, 1, 33, 8, 5),
])
def test_free_sizes(cnn_cells, seq_cells, nodes, channels, bands, t, seq_width):
    sizes = dict(classes=7, channels=channels, bands=bands, cnn_cells=cnn_cells, nodes=nodes,
                 seq_cells=seq_cells, seq_width=seq_width, stem_stride=1 + seq_cells % 2)
    net, (x, _) = Network(**sizes, seq_space="rnn_att"), batch(2, bands, t)
    logits = net(x)
    logits.sum().backward()
    assert logits.shape == (2, 7) and all(p.grad is not None for p in net.parameters())
    reductions = {k for k, cell in enumerate(net.cnn) if cell.kind == "reduce"}
    assert reductions == {cnn_cells // 3, 2 * cnn_cells // 3}
    found = derive(net)
    assert (found.normal is None, found.seq is None) == (cnn_cells < 3, seq_cells == 0)
    assert Network(**sizes, genotype=found)(x).shape == (2, 7)

def test_a_network_without_cnn_cells_by_hand():
    sizes = dict(bands=9, cnn_cells=0, seq_cells=1, seq_width=6, stem_stride=2)
    cell = (("skip_connect", 0), ("rnn_2", 1)), (("skip_connect", 2), ("skip_connect", 1))
    net, (x, _) = Network(**sizes, genotype=Genotype(seq=cell)).eval(), batch(2, f=9, t=5)
    s0, s1 = [], []
    for states, (linear, norm, _) in zip((s0, s1), (frames.project for frames in net.bridge)):
        states += [norm(linear.weight @ x_t + linear.bias) for x_t in x[1, 0].T]
    s0, s1 = torch.stack(s0), torch.stack(s1)
    s2 = s0 + net.seq[0].edges["1_2"].ops["rnn_2"](s1[None])[0]
    both = torch.cat([s2, s2 + s1], dim=1)  # neighbours of a node are averaged
    close(net(x)[1], net.head(sum(both[:, 0::2] + both[:, 1::2]) / 2 / 5))
    z = torch.randn(2, 3, 9, 5)  # (N, C, F, T): without a width the mean over F
    close(emodarts.Frames(3, 9)(z), torch.einsum("ncft->ntc", z) / 9)

def test_a_derived_network_exports_with_a_free_batch_size_and_without_a_warning():
    cnn = [[("dil_conv_3x3", 0), ("skip_connect", 1)]]  # with stride 2 both look at grids first
    genotype = Genotype(reduce=cnn, seq=[[("lstm_1", 0), ("rnn_att_1", 1)]])
    net = Network(channels=2, bands=5, cnn_cells=1, seq_cells=1, seq_width=2, genotype=genotype)
    used(net, batch(3, 5, 4)[0]).drop_path = 0.5  # which is for training
    free = {0: torch.export.Dim("n")}
    with warnings.catch_warnings(action="error"):
        exported = torch.export.export(net, batch(3, 5, 4)[:1], dynamic_shapes=[free], strict=True)
    for x, _ in (batch(n, 5, 4) for n in (1, 2, 7)):
        close(exported.module()(x), net(x))

@pytest.mark.parametrize("more", [{}, {"seq_width": 6}, {"genotype": Genotype(*[SKIPS] * 3)}])
@torch.no_grad()
def test_utterances_do_not_mix(more):
    x, order = torch.randn(17, 1, 24, 32), torch.randperm(17)
    net = used(Network(**SMALL, **more), x)
    alone = torch.cat([net(x[k : k + 1]) for k in range(17)])
    for some in (order[:2], order[:16], order):
        close(net(x[some]), alone[some], rtol=0, atol=1e-5)

@pytest.mark.parametrize("name", ["skip_connect", *RECURRENT])
def test_the_order_of_frames_counts_exactly_when_an_operation_is_recurrent(name):
    seq = [[(name, 0), ("skip_connect", 1)], [("skip_connect", 0), ("skip_connect", 2)]]
    net = Network(**SMALL, genotype=Genotype(SKIPS, SKIPS, seq)).double().eval()
    s0, s1 = torch.randn(2, 3, 12, 32).double()
    change = (net.classify(s0.roll(5, dims=1), s1) - net.classify(s0, s1)).abs().max()
    assert change < 1e-12 if name == "skip_connect" else change > 1e-6

@pytest.mark.parametrize("kind, older, newer", [
    ("normal", (6, 12, 9), (6, 12, 9)), ("normal", (6, 11, 10), (6, 6, 5)),  # after a reduction
    ("reduce", (6, 12, 9), (6, 12, 9)), ("reduce", (6, 13, 16), (6, 7, 8)),
    ("seq", (7, 6), (7, 6)),
])
def test_a_cell_is_its_plain_definition(kind, older, newer):
    """Node i is the sum over j < i of the weighted operations on state j, with its gradients."""
    names = tuple(SEQ_OPS if kind == "seq" else CNN_OPS)
    wiring = [[(j, names) for j in range(i)] for i in (2, 3, 4)]
    if kind == "seq":
        cell = emodarts.SeqCell(wiring, 6, False)
    else:
        cell = emodarts.CNNCell(kind, wiring, 6, 6, 4, older != newer, False)
    inputs = [torch.randn(3, *shape).double().requires_grad_() for shape in (older, newer)]
    weights = torch.randn(9, len(names)).double().softmax(1).requires_grad_()
    states, rows = [before(s) for before, s in zip(cell.double().before, inputs)], iter(weights)
    for i in (2, 3, 4):
        states.append(0)
        for j in range(i):
            for name, w in zip(names, next(rows)):
                states[i] = states[i] + w * cell.edges[f"{j}_{i}"].ops[name](states[j])
    theirs = torch.cat(states[2:], dim=2 if kind == "seq" else 1)
    if kind == "seq":  # 3 * D features -> D: means of neighbours
        theirs = theirs.unflatten(2, (6, 3)).mean(3)
    ours = cell(*inputs, [dict(zip(names, row)) for row in weights])
    leaves, direction = [*inputs, weights, *cell.parameters()], torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, leaves, direction)
    close((ours, *torch.autograd.grad(ours, leaves, direction)), (theirs, *expected))

@pytest.mark.parametrize("genotype", [
    Genotype(*(whole_cell(4, ops) for ops in (CNN_OPS, CNN_OPS, SEQ_OPS))),
    Genotype(*[[[("skip_connect", 1)]] * 4] * 3),  # `none` on the other edges
])
def test_a_supernet_with_one_hot_alphas_is_the_derived_network(genotype):
    sizes = dict(SMALL, channels=1, nodes=4)
    net, (x, _) = Network(**sizes).double(), batch(4, t=16, dtype=torch.float64)
    mixed = used(net, x)(x)
    for kind, names in net.candidates.items():
        chosen = []
        for i, node in enumerate(genotype.cells()[kind], start=2):
            found = {j: op for op, j in node}
            chosen += [names.index(found.get(j, "none")) for j in range(i)]
        net.alpha[kind].data = F.one_hot(torch.tensor(chosen), len(names)).double().log()
    derived = derived_from(net, genotype, **sizes)
    assert not torch.allclose(mixed, net(x)) and entropy(net) == 0
    for mode in (False, True):
        close(net.train(mode)(x), derived.train(mode)(x))

def test_derivation_ranks_edges_by_softmax_weight():
    net = Network(**SMALL, seq_space="lstm_att")
    net.alpha["seq"].data = torch.tensor([  # none, skip, lstm_att_1, lstm_att_2
        [0.0, 1.0, 0.0, 0.0],  # 0 -> 2: skip
        [0.0, 0.0, 0.0, 2.0],  # 1 -> 2: lstm_att_2
        [5.0, 6.0, 5.9, 5.8],  # 0 -> 3: the largest raw alpha, and the smallest share: 0.33
        [9.0, 2.0, 0.0, 0.0],  # 1 -> 3: `none` takes nearly all, does not count; skip has 0.0009
        [0.0, 0.0, 1.5, 0.0],  # 2 -> 3: 0.60
    ])
    first = ("skip_connect", 0), ("lstm_att_2", 1)
    assert derive(net).seq == (first, (("skip_connect", 0), ("lstm_att_1", 2)))
    net.alpha["seq"].data[3] = torch.tensor([0.0, 3.0, 0.0, 0.0])  # raw 3 < 6, share 0.87 > 0.33
    assert derive(net).seq == (first, (("skip_connect", 1), ("lstm_att_1", 2)))
    for value in (math.nan, math.inf, -math.inf):
        net.alpha["reduce"].data[3, 1] = value
        with pytest.raises(ValueError, match="not finite"):
            derive(net)

def test_entropy_by_hand():
    net = Network(**TINY_NET)
    assert entropy(net) == pytest.approx(1, abs=1e-5)  # a search begins undecided
    for rest, expected in ((0.0, 1), (-1e4, (1 / 3 + 1 / 2) / 2)):  # of log 8 and of log 4
        for alpha in net.alphas():  # -1e4: a weight that underflows adds nothing
            alpha.data.fill_(rest)[:, :2] = 0.0
        assert entropy(net) == pytest.approx(expected)

@pytest.mark.parametrize("says, cells", [
    ("JSON", ["os", "[" * 100_000, '{"nromal": [[["skip_connect", 0]]]}']),
    ("list of nodes", ["3", "[]", "[[]]", '[["lstm_1", 0]]', '[[["lstm_1", 0, 1]]]']),
    ("node 2.*known operations: none, skip_connect, lstm_1",
     ['[[["lstm_9", 0]]]', '[[["sep_conv_3x3", 0]]]', '[[[["x"], 0]]]', "[[[null, 0]]]"]),
    ("node 3.*predecessors from 0 to 2", [f'[[["none", 1]], [["none", {j}]]]'
                                          for j in ("3", "-1", "true", "null", "0.0", "[0]")]),
    ("each once", ['[[["none", 0], ["lstm_1", 0]]]']),
])
def test_genotypes_that_cannot_be_are_refused(says, cells):
    for cell in cells:
        with pytest.raises(ValueError, match=says):
            Genotype.from_json(cell if says == "JSON" else '{"seq": %s}' % cell)

@pytest.mark.parametrize("says, make", [
    ("seq_width", partial(Network, cnn_cells=0)), ("bands is 0", partial(Network, bands=0)),
    ("seq_cells is -1", partial(Network, seq_cells=-1)),
    ("'gru', expected one of all, lstm, rnn, lstm_att, rnn_att", partial(Network, seq_space="gru")),
    ("'hard', expected one of softmax, sample", partial(Network, relaxation="hard")),
    ("reduce, seq.* are: normal", lambda: Network(genotype=Genotype(normal=SKIPS))),
    ("fixed", lambda: Network(genotype=Genotype(*[SKIPS] * 3), fixed=Genotype(seq=SKIPS[:1]))),
    ("softmax", lambda: Architect(Network(**TINY_NET, relaxation="sample"), None, order=2)),
    ("`train`", lambda: Architect(Network(**TINY_NET), None, order=2).step(batch(4))),
    (r"(2, 1, 32, 24).*\(N, 1, 24, T\)", lambda: Network(**TINY_NET)(batch(2, 32, 24)[0])),
])
def test_what_cannot_be_is_refused(says, make):
    with pytest.raises(ValueError, match=says):
        make()

def test_a_genotype_survives_json_and_reads_as_sums():
    genotype = Genotype(seq=[[["lstm_1", 0], ["rnn_2", 1]], [["skip_connect", 2]]])
    for each in (genotype, random_genotype(Network(**SMALL)), Genotype()):
        assert Genotype.from_json(each.to_json()) == each
    lines = str(genotype).splitlines()
    assert lines[1:] == ["  2 = lstm_1(0) + rnn_2(1)", "  3 = skip_connect(2)"]

def test_random_genotypes_are_uniform_over_the_space():
    net, counts = Network(**TINY_NET), Counter()
    for _ in range(600):
        first, second = random_genotype(net).seq
        counts.update(op for op, _ in first + second)
        counts.update([tuple(j for _, j in second)])
    operations = dict.fromkeys(("skip_connect", "rnn_att_1", "rnn_att_2"), 800)  # of 4 edges each
    pairs = dict.fromkeys(((0, 1), (0, 2), (1, 2)), 200)
    assert counts == pytest.approx(operations | pairs, rel=0.15)

class Noise(nn.Module):
    def forward(self, x):
        return torch.randn_like(x)

def test_a_search_avoids_noise(monkeypatch):
    """Half of the candidates put noise in the place of their input; a class is a louder band."""
    cnn = {name: CNN_OPS[name] for name in ("skip_connect", "avg_pool_3x3")}
    cnn |= dict.fromkeys("ab", lambda c, s, affine: nn.Sequential(nn.AvgPool2d(1, s), Noise()))
    seq = {name: SEQ_OPS[name] for name in ("skip_connect", "rnn_1")}
    seq |= dict.fromkeys("ab", lambda width, affine: Noise())
    monkeypatch.setattr(emodarts, "CNN_OPS", cnn)
    monkeypatch.setattr(emodarts, "SEQ_OPS", seq)
    monkeypatch.setitem(emodarts.SEQ_SPACES, "all", tuple(seq))
    sizes, found = dict(bands=8, channels=4, cnn_cells=1, seq_cells=1, nodes=3, seq_width=8), []
    for _ in range(2):
        net = Network(**sizes, relaxation="sample")
        optimizer = torch.optim.Adam(net.weights(), 0.01)
        architect = Architect(net, F.cross_entropy, lr=0.05)
        for _ in range(70):
            (x, y), (x_val, y_val) = (batch(32, 8, 8) for _ in range(2))
            for each in (x, x_val):
                each[torch.arange(32), 0, 2 * y] += 1.5
            architect.step((x_val, y_val))
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        for cell in derive(net).cells().values():
            found += [op in "ab" for node in cell for op, _ in node]
    assert len(found) == 24 and scipy.stats.binom.cdf(sum(found), 24, 0.5) < 1e-3, sum(found)

@pytest.mark.parametrize("searched", [("normal", "reduce"), ("seq",)])
def test_an_ablation_searches_the_other_cells_only(searched):
    kinds, sizes = {"normal", "reduce", "seq"}, dict(TINY_NET, cnn_cells=3)
    given = Genotype(**dict.fromkeys(kinds - {*searched}, SKIPS))
    net = Network(**sizes, fixed=given)
    for genotype in (derive(net), random_genotype(net)):
        assert given.cells().items() <= genotype.cells().items() and {*genotype.cells()} == kinds
        assert not Network(**sizes, fixed=given, genotype=genotype).alphas()
    _, found = hypergradient(net, batch(4), batch(4), 0.1, order=2)
    assert tuple(net.alpha) == searched and all(g.norm() > 0 and g.isfinite().all() for g in found)

def test_a_sampled_pass_is_the_derived_network_of_what_was_drawn():
    """In logits and gradients. All cells of a kind draw the same; each pass draws anew."""
    sizes, (x, target) = dict(SMALL, nodes=3), batch(4, dtype=torch.float64)
    net, genotypes, drawn = Network(**sizes, relaxation="sample").double(), set(), {}
    relaxed = net.relaxed
    net.relaxed = lambda kind: drawn.update({kind: relaxed(kind)}) or drawn[kind]
    for _ in range(3):
        net.zero_grad()
        logits = net(x)
        cells = {kind: whole_cell(3, [op for (op,) in drawn[kind]]) for kind in drawn}
        genotypes.add(Genotype(**cells))
        derived = derived_from(net, Genotype(**cells), **sizes)
        close(logits, derived(x))
        (logits + derived(x)).square().sum().backward()
        theirs = {k: p.grad for k, p in derived.named_parameters() if p.grad is not None}
        for name, p in net.named_parameters():
            if not name.startswith("alpha."):  # what was not drawn is not touched
                close(p.grad, theirs.get(name))
    assert len(genotypes) == 3
    alpha = net.alpha["seq"].data
    for row, choice in zip(alpha.exp(), net.eval().relaxed("seq")):  # in evaluation all, but `none`
        close(torch.stack([*choice.values()]), row[1:] / row.sum())
    alpha.fill_(-1000.0)[:, 0] = 0.0  # every edge of the SeqNN draws `none`
    assert not any(g.any() for g in hypergradient(net.train(), (x, target))[1])

def test_the_gradient_of_a_draw_is_the_straight_through_one():
    """With p = softmax(alpha + g), g Gumbel noise, d drawn, dL/dalpha_k is <dL/dy, o_d(x)> p_d
    (delta_dk - p_k). By the Gumbel-max theorem argmax(alpha + g) is d with softmax(alpha)_d."""
    net, generator = Network(**SMALL, relaxation="sample").double(), torch.Generator()
    alpha, x = net.alpha["seq"], torch.randn(3, 4, 32).double()
    alpha.data.normal_()
    torch.manual_seed(5), generator.manual_seed(5)
    for _ in range(2):  # each draw of a generator is a new one
        noise = -torch.empty(alpha.shape).exponential_(generator=generator).log()
        p = (alpha + noise).softmax(dim=1).detach()
        choices, drawn = net.relaxed("seq"), p.argmax(dim=1)
        names = [net.candidates["seq"][d] for d in drawn]
        assert [list(choice) for choice in choices] == [[name] for name in names]
    for row, edge in enumerate(net.seq[0].edges.values()):
        dL_dy, expected, d = torch.randn_like(x), torch.zeros_like(alpha), drawn[row]
        y, z = edge(x, choices[row]), edge.ops[names[row]](x)
        expected[row] = (dL_dy * z).sum() * p[row, d] * (F.one_hot(d, len(SEQ_OPS)) - p[row])
        close(y, z)
        close(torch.autograd.grad(y, alpha, dL_dy, retain_graph=True), (expected,))

def test_second_order_term_is_the_exact_one(monkeypatch):
    """Without kinks, and LayerNorm behind tanh, whose curvature costs 1 to 7 %."""
    monkeypatch.setattr(nn, "ReLU", nn.Softplus)
    monkeypatch.setitem(CNN_OPS, "max_pool_3x3", CNN_OPS["avg_pool_3x3"])
    sizes = dict(channels=2, cnn_cells=3, seq_cells=1, nodes=1, seq_space="lstm_att", dropout=0.3)
    net, xi = Network(**sizes, bands=12).double(), 0.1
    names = [name for name, _ in net.named_parameters() if not name.startswith("alpha.")]
    val, train = (batch(6, 12, 16, torch.float64) for _ in range(2))
    torch.manual_seed(1)
    masks = int(torch.randint(2**62, ()))  # the architect's first draw
    with without_statistics(net):
        with torch.random.fork_rng():
            torch.manual_seed(masks)
            loss = F.cross_entropy(net(train[0]), train[1])
        d_train = torch.autograd.grad(loss, net.weights(), create_graph=True)
        unrolled = [w - xi * g for w, g in zip(net.weights(), d_train)]  # w', of alpha
        logits = torch.func.functional_call(net, dict(zip(names, unrolled)), val[0])
    loss = F.cross_entropy(logits, val[1])
    total = flat(torch.autograd.grad(loss, net.alphas(), retain_graph=True))
    v = torch.autograd.grad(loss, unrolled, retain_graph=True)
    exact = flat(torch.autograd.grad(unrolled, net.alphas(), v))  # what flows through w'
    torch.manual_seed(1)
    value, ours = hypergradient(net, val, train, xi, order=2)
    assert value == pytest.approx(loss.item())
    assert (flat(ours) - total).norm() < 0.01 * exact.norm()  # measured 0.001

@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("frozen", ["none", "cnn", "alpha.reduce", ""])
def test_first_order_by_hand_with_adam_and_the_expected_size_in_the_loss(order, frozen):
    """The second with xi = 0 too. Frozen weights and alphas, some or all, are constants."""
    x, target = batch(4, dtype=torch.float64)
    net = Network(**dict(TINY_NET, cnn_cells=2)).double()
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
        p.grad = torch.ones_like(p)  # of a backward pass of the caller's
    twin, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    free = [alpha for alpha in twin.alphas() if alpha.requires_grad]
    optimizer = torch.optim.Adam(free or [x], 3e-4, (0.5, 0.999), weight_decay=1e-3)
    architect = Architect(net, None, order=order)
    architect.loss = lambda *pair: F.cross_entropy(*pair) + expected_parameters(net) / 1e6
    for _ in range(2):  # the first step of Adam says nothing of its betas
        with without_statistics(twin):
            loss, size = F.cross_entropy(twin(x), target), 0
        for cell in [*twin.cnn, *twin.seq]:
            for p, edge in zip(twin.alpha[cell.kind].exp(), cell.edges.values(), strict=True):
                for p_o, op in zip(p, edge.ops.values(), strict=True):
                    size += p_o / p.sum() * len(flat([x[:0, 0, 0, 0], *op.parameters()]))
        close(expected_parameters(net), size)
        loss += size / 1e6
        for alpha, g in zip(free, torch.autograd.grad(loss, free) if free else []):
            alpha.grad = g
        optimizer.step()
        assert architect.step((x, target), (x, target), 0.0) == pytest.approx(loss.item())
        close(flat(net.alphas()), flat(twin.alphas()), rtol=0, atol=1e-8)
    net.alpha.load_state_dict({k: before[f"alpha.{k}"] for k in net.alpha})
    close(net.state_dict(), before, rtol=0, atol=0)
    assert all(alpha.grad is None for alpha in net.alphas())
    assert all(p.requires_grad != name.startswith(frozen) for name, p in net.named_parameters())

@pytest.mark.parametrize("how, order, at", [
    *product(["raises", "nan", "gradient"], [1], [1]), ("inf", 1, 1), ("inf", 2, 2),
    ("half", 1, 0), ("other", 1, 0),
    *product(["raises", "nan"], [2], [1, 2, 3, 4]), *product(["gradient"], [2], [2, 3, 4]),
])
def test_an_alpha_step_that_fails_in_any_pass_moves_nothing(how, order, at):
    """Bit for bit: weights, statistics, alphas, Adam's state. (inf: a loss of finite gradient.)"""
    net, free = Network(**TINY_NET), []  # of each pass: whether the weights are free

    def loss(logits, target):
        loss, nothing = F.cross_entropy(logits, target), 0 * net.alpha["seq"].sum()
        free.append(any(p.requires_grad for p in net.weights()))
        if len(free) != at:
            return loss
        if how == "raises":
            raise ZeroDivisionError
        if how == "gradient":
            return loss + nothing.sqrt()  # 0, with a gradient of 0 times infinity
        return loss + math.inf if how == "inf" else loss * math.nan

    architect = Architect(net, F.cross_entropy, order=order)
    architect.step(batch(4), batch(4), 0.1)
    architect.loss = loss
    net.alpha.to(torch.float16 if how == "half" else torch.float32)
    if how == "other":  # than those which Adam moves
        net.load_state_dict(net.state_dict(), assign=True)
    before = copy.deepcopy([net.state_dict(), *architect.optimizer.state.values()])
    with pytest.raises(ZeroDivisionError if how == "raises" else ValueError):
        architect.step(batch(4), batch(4), 0.1)
    passes = at if how in ("raises", "half", "other") else order**2
    assert free == [order == 2] * passes
    after = [net.state_dict(), *architect.optimizer.state.values()]
    close(after, before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())

def test_a_callers_autocast_changes_no_bit_of_the_second_order():
    found, batches, rough = [], [batch(4), batch(4)], partial(torch.autocast, "cpu", torch.bfloat16)
    for block in (nullcontext(), rough(), rough(enabled=False), None):
        torch.manual_seed(1)
        net = Network(**TINY_NET)
        if block:  # a network with autocast inside; without it L_val differs, by little
            net.forward = rough()(net.forward)
            net.head.register_forward_hook(lambda module, x, logits: logits.float())
        with block or nullcontext():
            found.append(hypergradient(net, *batches, 1.0, order=2))
    close(found[1:3], [found[0], found[0]], rtol=0, atol=0)
    assert found[3][0] != found[0][0] == pytest.approx(found[3][0], rel=0.1)

@pytest.mark.parametrize("reduce, says", [
    (None, "own.*12, 16"),  # one operation of an edge
    ([[("own", 0), ("max_pool_3x3", 1)]], "reduce cell.*own.*12, 16.*max_pool_3x3.*6, 8"),
])
def test_operations_of_ones_own_that_differ_in_shape_are_named(reduce, says, monkeypatch):
    monkeypatch.setitem(SEQ_OPS, "own", lambda width, affine: nn.Identity())
    assert "own" in Network(**SMALL).candidates["seq"]
    monkeypatch.setitem(CNN_OPS, "own", lambda c, stride, affine: nn.Identity())  # no stride
    with pytest.raises(ValueError, match=says):
        Network(**SMALL, fixed=Genotype(reduce=reduce))(batch(2)[0])

# A text is evaluated late: a process that has asked for a GPU cannot fork.
@pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")
@pytest.mark.parametrize("relaxation, order", [("softmax", 2), ("sample", 1)])
def test_a_gpu_only_rounds(relaxation, order):
    found, batches = [], [batch(4, dtype=torch.float64) for _ in range(2)]
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        net = Network(**SMALL, relaxation=relaxation).double()
        net.to(device, memory_format=torch.channels_last)
        pairs = [(x.to(device), target.to(device)) for x, target in batches]
        found.append([hypergradient(net, *pairs, 0.1, order=order), net(pairs[0][0])])
    close(found[1], found[0], rtol=1e-7, atol=1e-9, check_device=False)

# features.py
SHORT, HEAD, PCM = Settings("mfcc-8", 1.0), "path,label,speaker\n", b"\1\0" * 800
SPLIT = "path,label,speaker,split\nax.wav,x,a,train\nay.wav,y,a,train\nbx.wav,x,b,validation\n"
SPLIT += "by.wav,y,b,validation\ncx.wav,x,c,test\ncy.wav,y,c,test\n"

def tree(root, files, empty=()):
    """Writes {path below the root: text or bytes} and empty files. -> root"""
    for name, content in [*files.items(), *((name, b"") for name in empty)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root

def riff(x, kind=1, bits=16, channels=1, rate=16000, first=None, block=None, extra=b"",
         size=None, before=b"", after=b""):
    """A wav file of samples, or of bytes as they are; with other chunks, and false sizes."""
    if not isinstance(x, bytes) and kind == 3:
        x = x.astype(f"<f{bits // 8}").tobytes()
    elif not isinstance(x, bytes):  # the lower bytes come first; 8 bits have no sign
        whole = np.round(x * 2.0 ** (bits - 1) + 128 * (bits == 8)).astype("<i8")
        x = whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()
    block = block or channels * bits // 8
    form = struct.pack("<HHIIHH", first or kind, channels, rate, rate * block, block, bits)
    if first == 0xFFFE:  # extensible
        guid = bytes.fromhex("000000001000800000aa00389b71")
        form += struct.pack("<HHIH", 22, bits, 0, kind) + guid
    form += extra
    chunk = b"fmt " + struct.pack("<I", len(form)) + form + b"\0" * (len(form) % 2)
    size, padding = (len(x), b"\0" * (len(x) % 2)) if size is None else (size, b"")
    data = b"data" + struct.pack("<I", size) + x + padding
    return b"RIFF\0\0\0\0WAVE" + chunk + before + data + after

def speakers(listing):
    """Of each fold: those of training, validation and each test set."""
    found, who = [], np.array([u.speaker for u in listing.utterances])
    for fold in folds(listing):
        sides = fold.sides().values()
        found.append([{name.split()[0] for name in who[members]} for members in sides])
    return found

def check(root, dataset, wanted, groups, tested=None, **choice):
    """-> Listing of {name: label}, where that is a class; a group tests, the next one validates."""
    listing, turns, everyone = read_corpus(dataset, root, **choice), [], {*sum(groups, [])}
    some = {*wanted.values()} if choice.get("classes") else {*CLASSES}
    found = sorted((u.path.name, u.label) for u in listing.utterances)
    assert found == sorted(item for item in wanted.items() if item[1] in some - {None})
    for k in tested or range(len(groups)):
        test, validation = {*groups[k]}, {*groups[(k + 1) % len(groups)]}
        turns.append([everyone - test - validation, validation, test])
    assert speakers(listing) == turns
    return listing

def emodb(root, n, sounds={}):
    """n sounds of 0.1 s, but every seventh of 2.5 s, of three speakers; and others."""
    files = {f"wav/{name}.wav": content for name, content in sounds.items()}
    random = np.random.default_rng(0)
    for k in range(n):
        sound = random.standard_normal(1600 if k % 7 else 40_000) * 0.1 * (1 + k % 3)
        files[f"wav/{k % 3 + 3:02}a{k // 4:02}{'WFNT'[k % 4]}a.wav"] = riff(sound)
    return read_corpus("emodb", tree(root, files))

EMOTIONS = "neutral calm happy sad angry fear disgust surprise".split()
ACTORS = [f"{k:02}" for k in range(1, 25)]

@pytest.mark.parametrize("depth", ["", "a/b/"])
@pytest.mark.parametrize("dataset, form, groups, codes", [
    ("emodb", "{}a01{}a.WAV", [["03"], ["08"], ["10"]],
     dict(W="angry", F="happy", N="neutral", T="sad", A="fear", E="disgust", L="boredom")),
    ("ravdess", "03-01-{1}-01-02-01-{0}.wav", [ACTORS[k : k + 4] for k in range(0, 24, 4)],
     {f"0{n}": name for n, name in enumerate(EMOTIONS, start=1)}),
    ("crema-d", "{}_DFA_{}_XX.wav", [["1001", "1018"], ["1019"], ["1037"], ["1072"], ["1091"]],
     dict(ANG="angry", DIS="disgust", FEA="fear", HAP="happy", NEU="neutral", SAD="sad")),
    ("nemo", "{}_{}_1.wav", [["EB0"], ["EC0"], ["WR0"]],
     dict(anger="angry", fear="fear", happiness="happy", neutral="neutral", surprised="surprise")),
])
def test_free_corpora(tmp_path, depth, dataset, form, groups, codes):
    wanted, table = {}, "file_id\temotion\traw_text\tspeaker_id\tgender\tage\r\n"
    for speaker, code in product(sum(groups, []), codes):
        wanted[form.format(speaker, code)] = codes[code]
    for name in [*wanted, "WR0_fear_9.wav"] if dataset == "nemo" else []:
        table += f'{name}\t{name.split("_")[1]}\t"Tak, tak\t{name[:3]}\tmale\t23\r\n'
    names = [*wanted, ".DS_Store", "notes.wav", "03-02-05-01-01-01-01.wav", "x_anger_1.wav"]
    names += [f"._{min(wanted)}", f".git/{min(wanted)}", *(f"again/{name}" for name in wanted)]
    tree(tmp_path, {f"{depth}data.tsv": table}, [f"{depth}samples/{name}" for name in names])
    every = check(tmp_path, dataset, wanted, groups, classes="all")
    assert every.classes == tuple(sorted({*wanted.values()}))
    assert check(tmp_path, dataset, wanted, groups).classes == CLASSES

def test_iemocap(tmp_path, capsys):
    codes = dict(ang="angry", hap="happy", exc="happy", neu="neutral", sad="sad", fru="frustrated")
    files, wanted, paper, names = {}, {}, {}, []  # {name: class}, also in the paper's protocol
    for s, scene in product("12345", ("impro04", "script01_1b")):
        dialog, text = f"Ses0{s}F_{scene}", "% [START_TIME - END_TIME] TURN_NAME EMOTION\n"
        folder = f"a/Session{s}/dialog"
        for n, (code, who) in enumerate(product([*codes, "xxx", "oth"], "FM")):
            name = f"{dialog}_{who}{n:03}.wav"  # the last letter speaks
            text += f"[6.2 - 8.2]\t{name[:-4]}\t{code}\t[2.5, 2.5, 2.5]\r\nC-E2:\tNeutral;\t()\r\n"
            names.append(f"a/Session{s}/sentences/wav/{dialog}/{name}")
            wanted[name] = codes.get(code)
            paper[name] = wanted[name] if scene == "impro04" and code != "exc" else None
        names += [f"{folder}/wav/{dialog}.wav", f"{folder}/transcriptions/{dialog}.txt"]
        files[f"{folder}/EmoEvaluation/Categorical/{dialog}_e1.txt"] = text.replace("ang", "sad")
        files[f"{folder}/EmoEvaluation/._{dialog}.txt"] = text.replace("ang", "sad")
        files[f"{folder}/EmoEvaluation/{dialog}.txt"] = (text + "\xe9").encode("latin-1")
    tree(tmp_path, files, names)
    sessions = [[f"{s}F", f"{s}M"] for s in range(1, 6)]
    check(tmp_path, "iemocap", wanted, sessions, classes="all")
    check(tmp_path, "iemocap", wanted, sessions)
    pairs = [[f"{s}M", f"{s % 5 + 1}F"] for s in range(1, 6)]
    check(tmp_path, "iemocap", paper, pairs, protocol="paper")
    (tmp_path / "a/Session3/sentences/wav/Ses03F_impro04/Ses03F_impro04_F000.wav").unlink()
    capsys.readouterr()
    assert len(read_corpus("iemocap", tmp_path).utterances) == 99
    assert ": 1 of 160 labels have no recording" in capsys.readouterr().err

def msp_improv(root, name="Evaluation.txt"):
    names, text, rated, read = [], "", {}, {}
    codes = dict(A="angry", H="happy", N="neutral", S="sad")
    for s, who, letter, condition in product(range(1, 7), "FM", "AHNS", "RST"):
        stem, heard = f"IMPROV-S01{letter}-{who}{s:02}-{condition}-FM01", letter
        if letter == "S":
            heard = {"T": "X", "S": "O", "R": "N"}[condition]
        names += [f"a/session{s}/S01{letter}/MSP-{stem}.{kind}" for kind in ("wav", "avi")]
        text += f"UTD-{stem}.avi; {heard}; A:3.3; V:NaN; D:3.0 ; N:3.666667;\r\n"
        text += "WORKER00000001; Angry; Angry,Frustrated; A:3.000000; V:2.000000;\r\n\r\n"
        rated[f"MSP-{stem}.wav"] = codes.get(heard)
        read[f"MSP-{stem}.wav"] = codes[letter] if condition == "R" else None  # as intended
    return tree(root, {f"a/{name}": text}, names) / "a" / name, rated, read

@pytest.mark.parametrize("name", ["Evalution.txt", "labels/evaluation.TXT"])
def test_msp_improv(tmp_path, name):
    _, rated, read = msp_improv(tmp_path, name)
    sessions = [[f"F{s:02}", f"M{s:02}"] for s in range(1, 7)]
    listing = check(tmp_path, "msp-improv", rated, sessions)
    assert listing.classes == CLASSES  # four, though nobody is sad: a training needs all
    with pytest.raises(InputError, match="fold 1 has no train utterance of class sad"):
        folds(listing, chosen=[1])
    check(tmp_path, "msp-improv", read, sessions, tested=(0, 1, 2, 4), protocol="paper")

def msp_podcast(root, labels="Labels/labels_consensus.csv", validation="Development"):
    """Speakers 4 and 7 are in test sets, 4 in both; 3 validates. -> the table"""
    text = "FileName,EmoClass,SpkrID,Split_Set\r\nMSP-PODCAST_t_0002.wav,N,9,Test3\r\n"
    names = ["a/Audios/MSP-PODCAST_t_0001.wav", "a/Audios/._MSP-PODCAST_0000_6500.wav"]
    sides = f"Train Train Train {validation} Test1 Test1 Test1 Test2 Test2 Test2".split()
    for k, who in enumerate("1 2 Unknown 3 4 7 Unknown 4 5 6".split()):
        for code, n in product("AHNSUFDCOX", range(3)):
            names.append(f"a/Audios/part{k % 2}/MSP-PODCAST_{k:04}_{ord(code):02}{n:03}.wav")
            text += f"{names[-1][-26:]},{code},{who},{sides[k]}\r\n"
    return tree(root, {f"a/{labels}": "\ufeff" + text}, names) / "a" / labels

@pytest.mark.parametrize("form", [(), ("labels_Concensus.csv", "Validation")])
def test_msp_podcast_has_one_fold(tmp_path, form, capsys):
    table = msp_podcast(tmp_path, *form)
    assert len(read_corpus("msp-podcast", tmp_path, classes="all").classes) == 8
    listing = read_corpus("msp-podcast", tmp_path)
    assert sorted(u.label for u in listing.utterances) == sorted(30 * CLASSES)
    assert [*folds(listing)[0].sides()] == ["train", "validation", "test1", "test2"]
    unknown = [u.speaker for u in listing.utterances if "Unknown" in u.speaker]
    assert len({*unknown}) == 2 * 12  # each recording's may be somebody else
    parts = [{"1", "2", "Unknown"}, {"3"}, {"4", "7", "Unknown"}, {"4", "5", "6"}]
    assert speakers(listing) == [parts]
    # Of those who train, let 1 be 4 now and then, who also tests, and 2 be 3, who validates.
    text = table.read_text().replace(",1,Train", ",4,Train", 5).replace(",2,Train", ",3,Train", 6)
    table.write_text(text)
    left_out = len(re.findall(r",[AHNS],[34],Train", text))
    capsys.readouterr()
    assert speakers(read_corpus("msp-podcast", tmp_path))[0][:2] == parts[:2]
    assert f": {left_out} utterances of speakers who" in capsys.readouterr().err

def test_msp_podcast_in_the_papers_protocol(tmp_path, monkeypatch):
    """Pools what is not for validation; a side has at most so many, drawn without global state."""
    msp_podcast(tmp_path)
    state = features.random.getstate()
    listing = read_corpus("msp-podcast", tmp_path, protocol="paper")
    whole = folds(listing)
    assert [sides[2] for sides in speakers(listing)] == [{k} for k in "124567"]  # no Unknown, no 3
    monkeypatch.setitem(CORPORA, "msp-podcast", replace(CORPORA["msp-podcast"], at_most=7))
    assert folds(listing) == folds(listing)
    assert features.random.getstate() == state
    for before, after in zip(whole, folds(listing)):
        for everyone, some in zip(before.sides().values(), after.sides().values()):
            assert len(some) == 7 and set(some) < set(everyone) and some != everyone[:7]

def test_a_wrong_root_is_refused_and_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset in CORPORA:
        with pytest.raises(InputError, match="^[^\n]*nowhere[^\n]*$"):
            read_corpus(dataset, "nowhere")
    with pytest.raises(InputError, match="unknown dataset 'iemocop'; known: smoke, emodb"):
        read_corpus("iemocop")
    assert os.listdir(".") == [] and len(read_corpus("smoke").utterances) == 96
    assert len(read_corpus("smoke", "data/smoke").utterances) == 96

@pytest.mark.parametrize("dataset, row, change", [
    ("nemo", 1, ("\ta", "\ts")), ("nemo", 1, ("\tA", "\tB")), ("msp-improv", 0, ("; A;", "; H;")),
    ("msp-podcast", 2, (",A,", ",H,")), ("msp-podcast", 2, ("Train", "Test3"))])
def test_a_row_that_stands_twice_counts_once(tmp_path, dataset, row, change, capsys):
    """And is refused, if it has two labels, speakers or splits."""
    text = "file_id\temotion\tspeaker_id\nx.wav\tang\tA\ny.wav\tsad\tB"
    table = tree(tmp_path, {"data.tsv": text}, ["samples/x.wav", "samples/y.wav"]) / "data.tsv"
    if dataset == "msp-improv":
        table = msp_improv(tmp_path)[0]
    elif dataset == "msp-podcast":
        table = msp_podcast(tmp_path)
    before, text = read_corpus(dataset, tmp_path).utterances, table.read_text().rstrip()
    row = "\n" + text.split("\n")[row]
    table.write_text(text + row)
    capsys.readouterr()
    assert read_corpus(dataset, tmp_path).utterances == before
    assert ": 1 labels of recordings that stand twice" in capsys.readouterr().err
    table.write_text(text + row.replace(*change))
    with pytest.raises(InputError, match="^[^\n]* has two (label|speaker|split)s, .* and .*$"):
        read_corpus(dataset, tmp_path)
    table.write_text(text)
    copy = tree(tmp_path, {f"other/{table.name}": text}) / "other" / table.name
    assert read_corpus(dataset, tmp_path).utterances == before
    copy.write_text(text + row.replace(*change))
    with pytest.raises(InputError, match=f"{table}.* differ"):
        read_corpus(dataset, tmp_path)

def test_links_are_recordings_that_stand_twice_and_folders_are_visited_once(tmp_path, capsys):
    names = [f"wav/0{s}a01{code}a.wav" for s, code in product("345", "WFNT")]
    tree(tmp_path, {}, [*names, "wav/._03a01Wa.wav", ".git/03a01Wa.wav"])
    before = read_corpus("emodb", tmp_path)
    for name in ("loop", "wav/loop", "wav/up"):
        (tmp_path / name).symlink_to(tmp_path)
    assert len(features.below(tmp_path, ".*", depth=9)) == 12
    capsys.readouterr()
    (tmp_path / "wav/03a02Wa.wav").symlink_to("03a01Wa.wav")
    assert read_corpus("emodb", tmp_path).digest == before.digest
    assert ": 1 labels of recordings that stand twice" in capsys.readouterr().err
    (tmp_path / "wav/03a02Fa.wav").symlink_to("03a01Wa.wav")
    with pytest.raises(InputError, match="has two labels, W and F"):
        read_corpus("emodb", tmp_path)

def test_csv(tmp_path):
    wanted = {f"{s}{label}.wav": label for s, label in product("abc", ("zen", "awe"))}
    few = [f"sounds/{name},{label},{name[0]}" for name, label in wanted.items()]
    many = [f"{s}_{n}.wav,{'xy'[n % 2]},{s}" for s in range(12) for n in range(s + 1)]
    names = [row.split(",")[0] for row in few + many + SPLIT.split()]
    file = tree(tmp_path, {"mine.csv": HEAD + "\n".join(few)}, names) / "mine.csv"
    listing = check(file, "csv", wanted, [["a"], ["b"], ["c"]], classes="all")
    assert listing.classes == ("awe", "zen")
    assert listing.name(listing.utterances[0]) == "sounds/aawe.wav"
    file.write_text(HEAD + "\n".join(many))
    sizes = [len(fold.sides()["test"]) for fold in folds(read_corpus("csv", file))]
    assert len(sizes) == 5 and sum(sizes) == 78 and max(sizes) - min(sizes) <= 4
    file.write_text(SPLIT)
    assert speakers(read_corpus("csv", file)) == [[{"a"}, {"b"}, {"c"}]]
    file.write_text(SPLIT.replace("validation", "train"))  # two parts, if nobody validates
    (fold,) = folds(read_corpus("csv", file), validate=False)
    assert [*map(len, fold.sides().values())] == [4, 0, 2]

@pytest.mark.parametrize("given, error", [
    ("", r"has the columns \[\]; expected \['path', 'label', 'speaker'\]"),
    ('"path,label,speaker"\n', r"has the columns \['path,label,speaker'\]"),  # as Excel may
    (HEAD, "found 0 labels, and mine.csv"),
    (HEAD + '"new\nline.wav",,1\n', "line 2: has no label"),
    (HEAD + "g,x,1\n", "line 2: has no recording"),
    (HEAD + 'a.wav,x,1\n"b.wav,x,1\nc.wav,x,1\n', "line 3: not a row .*quote"),
    (HEAD + "ax.wav,x,1\n./ax.wav,y,2\n", "line 3: has the recording ax.wav of line 2"),
    (SPLIT + "d.wav,x,d,dev\n", "line 8: has the split 'dev'; known"),
    (SPLIT + "d.wav,x,a,test\n", "speaker a is in train and in test"),
    (SPLIT.replace(",a,", ",Unknown,") + "d.wav,x,Unknown,test\n", "speaker Unknown is in train"),
    (SPLIT.replace("speaker,", "split,speaker,"), "columns .*'label', 'split', 'speaker'"),
    (SPLIT.replace("test", "train"), "found part.s. train, validation; expected train, valid"),
    (HEAD + "ax.wav,x,s03\nay.wav,y,S3\n", "speakers 'S3' and 's03'"),
    (HEAD + "ax.wav,x,a  b\nay.wav,y,a b\n", "speakers 'a  b' and 'a b'"),
    (HEAD + "ax.wav,x,\uff53\uff11\nay.wav,y,s1\u200b\n", "speakers 's1.*' and '\uff53\uff11'"),
    (HEAD + "ax.wav,Sad,1\nay.wav,sad,2\n", "labels 'Sad' and 'sad'"),
])
def test_errors_in_a_csv_are_one_line(tmp_path, given, error):
    names = ["d.wav", *(row.split(",")[0] for row in SPLIT.split()[1:])]
    file = tree(tmp_path, {"mine.csv": given}, names) / "mine.csv"
    with pytest.raises(InputError, match=f"^[^\n]*{error}[^\n]*$"):
        folds(read_corpus("csv", file))

@pytest.mark.parametrize("before", ["", "sep=;\n", ";;\r\n \n", "SEP=;\r\n\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("separator", ";,\t")
def test_a_csv_as_people_save_it(tmp_path, before, encoding, separator):
    names = ["a b.wav", "new\nline.wav", "\u0142.wav", "sub/c.wav"]
    text = before + 'Path;LABEL;Speaker\n"a b.wav"; x; "1"\n;;\n\n"new\nline.wav";y;2\n'
    text += "\u0142.wav;x;3\nsub\\c.wav;y;1\n"
    file = tree(tmp_path, {}, names) / "mine.csv"
    file.write_bytes(text.replace(";", separator).encode(encoding))
    utterances = [*features.index_csv(file)]
    assert [u.path.relative_to(tmp_path).as_posix() for u in utterances] == names
    assert "".join(u.label + u.speaker for u in utterances) == "x1y2x3y1"

def test_letters_with_accents_may_be_two_characters(tmp_path):
    one, two = "\u00e9", "e\u0301"
    rows = f"{one}1.wav,{one},{one}\n{two}2.wav,x,{two}\nd.wav,{two},d\n"
    names = [f"{two}1.wav", f"{one}2.wav", "d.wav"]
    listing = read_corpus("csv", tree(tmp_path, {"mine.csv": HEAD + rows}, names) / "mine.csv")
    assert {u.speaker for u in listing.utterances} == {one, "d"} and len(listing.classes) == 2
    assert sorted(map(listing.name, listing.utterances)) == ["d.wav", f"{one}1.wav", f"{one}2.wav"]

def clips(root, folder="a"):
    """A csv of six clips of one size, of which the begin and the middle are silent."""
    names = [f"{s}{n}.wav" for s, n in product("abc", "xy")]
    sounds = {f"{folder}/{name}": riff(bytes(19998) + name.encode()) for name in names}
    text = HEAD + "".join(f"{name},{name[1]},{name[0]}\n" for name in names)
    return tree(root, sounds | {f"{folder}/mine.csv": text}) / folder / "mine.csv"

def test_the_digest_of_a_csv_is_that_of_its_content(tmp_path, monkeypatch):
    file = clips(tmp_path)
    text, digest = file.read_text(), read_corpus("csv", file).digest
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "link.csv").symlink_to("a/mine.csv")
    monkeypatch.chdir(tmp_path)
    for content in (text, re.sub("(?m)^(?=..?.wav)", f"{tmp_path}/b/", text)):
        file.write_text(content)
        for path in (file, "a/mine.csv", "b/mine.csv", tmp_path / "link.csv"):
            assert read_corpus("csv", path).digest == digest
    assert read_corpus("csv", clips(tmp_path, "else/where")).digest == digest
    digests = set()
    for folder in ("in/c", "out/c"):  # recordings that do not lie below
        other = clips(tmp_path, folder)
        listed = tree(other.parent.parent, {"b/own.csv": re.sub("(?m)^(?=..?.wav)", "../c/", text)})
        digests.add(read_corpus("csv", listed / "b/own.csv").digest)
    assert len(digests) == 1
    told = {digest}
    for old, new in ((",x,a", ",y,a"), (",x,b", ",x,c"), (",x,", ",w,"), ("by.wav,y,b\n", "")):
        file.write_text(text.replace(old, new))
        told.add(read_corpus("csv", file).digest)
    file.write_text(text)
    # Other samples, as many, of which the second differ at the end alone; and what is no sound.
    for content in (riff(b"_" * 20_004), riff(bytes(20_004)), b"no sound", b"no other"):
        file.with_name("ax.wav").write_bytes(content)
        told.add(read_corpus("csv", file).digest)
    assert len(told) == 9

@pytest.mark.parametrize("speaker", "bc")
def test_one_recording_is_on_one_side_whatever_it_is_called(tmp_path, monkeypatch, speaker):
    file = clips(tmp_path)
    shutil.copy(file.with_name("bx.wav"), file.with_name("copy.wav"))
    tree(file.parent, {name: "<html>" * 99 for name in ("e.wav", "f.wav")})  # no recordings
    file.write_text(file.read_text() + f"copy.wav,x,{speaker}\ne.wav,x,b\nf.wav,x,c\n")
    told = pytest.raises(InputError, match="one recording, .*(bx.wav|copy.wav), is in .* and in ")
    listing, looks = read_corpus("csv", file), Mock(side_effect=features.print_of)
    monkeypatch.setattr(features, "print_of", looks)
    for _ in range(2):
        with told if speaker == "c" else nullcontext():
            folds(listing)
    assert looks.call_count == 9  # each file once

@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("first", [None, 0xFFFE])
def test_every_wav_is_read_and_its_windows_lose_nothing(tmp_path, kind, bits, first):
    path, lengths = tmp_path / "a.wav", [(16000, n) for n in (9, 800, 8000, 8001, 20001)]
    lengths += [(rate, rate) for rate in (8000, 22050, 24000, 44100, 48000)]
    for channels, (rate, n) in product((1, 2, 5), lengths):
        tone = np.sin(2 * np.pi * 500.7 * np.arange(n) / rate)
        several = np.outer(tone, 0.1 * np.arange(1, channels + 1)).ravel()
        path.write_bytes(riff(several, kind, bits, channels, rate, first))
        samples = read_wav(path)
        assert samples.shape == (n * 16000 / rate,) and samples.dtype == np.float32
        tone = np.sin(2 * np.pi * 500.7 * np.arange(len(samples)) / 16000)
        difference, bound = np.abs(samples - 0.05 * (channels + 1) * tone), 2.0**-bits + 1e-7
        assert rate != 16000 or difference.max() <= bound
        assert difference[200:-200].max(initial=0) < 2 * bound + 2e-3
        cut = features.windows(samples, Settings(window=0.5))
        whole = np.resize(samples, max(8000, len(samples)))  # a short one is repeated
        last = cut[-1][cut.size - whole.size :]  # overlaps the one before
        assert np.array_equal(np.concatenate([*cut[:-1], last]), whole)

@pytest.mark.parametrize("content, samples", [
    *((riff(PCM, size=size), 800) for size in (0xFFFFFFFF, 0x7FFFF000, 0, 1600)),
    *((riff(PCM, before=b"LIST\3\0\0\0abc" + pad), 800) for pad in (b"", b"\0", b"\xff")),
    (riff(PCM, before=b"LIST\1\0\0\0afact\4\0\0\0abcd", after=b"LIST\2\0\0\0ab"), 800),
    (riff(b"Abc1" + PCM, size=0), 802), (riff(b"Abc1\4\0\0\0" + PCM, size=0), 804),  # no chunks
    (riff(PCM + b"\1"), 800), (riff(PCM, bits=12, block=2), 800), (riff(PCM, extra=b"\0"), 800),
    (riff(PCM, first=0xFFFE, extra=b"\0\0\0"), 800), (riff(np.array([0, 9.9]), 3, 64), 2),
    (riff(PCM, bits=24, block=4), 400),  # 24 bits in 32 are usual, 8 and 16 are not
    (riff(PCM, block=4), "16 bits, 4 bytes a frame; expected 2"),
    (riff(PCM, bits=8, block=2), "2 bytes a frame; expected 1"),
    (riff(PCM, 3, 32, 2, block=16), "16 bytes a frame; expected 8"),
    (riff(PCM, block=1), "16 bits, 1 bytes a frame"), (riff(PCM, size=1602), "1600 of 1602"),
    (riff(b""), "0 bytes of sound"), (riff(b"", after=b"LIST\4\0\0\0abcd"), "0 bytes of sound"),
    (b"RIFF\0\0\0\0WAVE", "no data chunk"), (riff(PCM, 7), "cannot be decoded"),
    (b"RIFF\0\0\0\0WAVEdata\2\0\0\0ab", "0 channels"), (riff(PCM, rate=0), " 0 Hz"),
    (b"RF64" + riff(PCM)[4:], "not a wav file"), (b"version https://git-lfs", "git lfs pull"),
    *((riff(np.array([0, x]), 3, 32), "float samples") for x in (np.nan, np.inf, 1e30, -11)),
])
def test_what_writers_of_wavs_leave(tmp_path, content, samples):
    path = tree(tmp_path, {"a.wav": content}) / "a.wav"
    if isinstance(samples, int):
        assert len(read_wav(path)) == samples
    else:
        with pytest.raises(InputError, match=f"a.wav: [^\n]*{samples}"):
            read_wav(path)

def test_features_are_torchaudios():
    samples = np.random.default_rng(0).standard_normal(308_800).astype(np.float32) * 0.1
    samples[:154_400] *= 1e-6  # the clamp at 80 dB counts, in each window by itself
    mel, oracle = dict(n_fft=1024, hop_length=250), torchaudio.transforms
    log_mel = [oracle.MelSpectrogram(16000, n_mels=64, **mel), oracle.AmplitudeToDB(top_db=80)]
    mfcc = oracle.MFCC(16000, 128, log_mels=False, melkwargs=mel | {"n_mels": 128})
    for name, function in (("mfcc-128", mfcc), ("log-mel-64", torch.nn.Sequential(*log_mel))):
        windows = torch.from_numpy(features.windows(samples, Settings()))
        for window, found in zip(windows, features.maps_of(samples, Settings(name)), strict=True):
            expected = function(window)[:, :512].unflatten(1, (128, 4)).amax(dim=2)
            torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=2**-10)
    assert Settings().shape == (128, 128) and Settings("log-mel-64", 4.0).shape == (64, 64)
    names = ("mfcc", "mfcc-0", "mel-64", "log-mel-064", "mfcc-128 ", "log-mel-" + "9" * 5000)
    pools = ("npy-5", 4.0), ("npy-5", 5.0, 2), ("npy-0", 4.0, 2), ("mfcc-8", 1.0, 2)
    for wrong in (*product(names, [8.0]), *product(["mfcc-8"], (0.1, np.nan, 1e300)), *pools):
        with pytest.raises(InputError, match="expected mfcc-N or log-mel-N"):
            Settings(*wrong)

def npy(x, save=np.save):
    save(file := io.BytesIO(), x)
    return file.getvalue()

def test_frames_by_hand(tmp_path):
    """Windows of 6 frames, of which 2 are averaged; the last one ends with the recording."""
    listing, random, windows = emodb(tmp_path, 8), np.random.default_rng(0), []
    for n, u in enumerate(listing.utterances):  # of 4 to 25 frames
        frames = random.normal(5, 3, (4 + 3 * n, 3)).astype(("<f2", "<f4", "<f8", ">f4")[n % 4])
        content = npy(np.asfortranarray(frames) if n % 2 else frames)
        name = listing.name(u).replace(".wav", ".npy")
        tree(tmp_path, {name: content, f"own/{name}": content})
        x, last = np.concatenate([frames] * 2), max(len(frames), 6) - 6
        starts = [*range(0, last, 6), last]
        windows.append([[(x[t] + x[t + 1]) / 2 for t in range(i, i + 6, 2)] for i in starts])
    own = with_frames(listing, tmp_path / "own")
    assert own.digest == with_frames(listing).digest != listing.digest
    data = Data(own, Settings("npy-3", 6.0, 2), cache=tmp_path / "c")
    data.standardise_by([0, 1, 2])
    seen = np.concatenate(windows[:3]).reshape(-1, 3)
    for n, expected in enumerate(windows):
        found = data.maps(data.windows([n])[0])[:, 0].mT
        expected = (np.array(expected) - seen.mean(axis=0)) / seen.std(axis=0)
        np.testing.assert_allclose(found, expected, atol=0.02)
    assert features.mean_std([torch.ones(2, 3, 4)])[1].tolist() == [1, 1, 1]  # what is constant
    tiny = torch.tensor([1e-6, 3e-6]).expand(5, 3, 2)
    close(features.mean_std([tiny]), (torch.full((3,), 2e-6), torch.full((3,), 1e-6)))

def test_frames_that_cannot_be_used_are_named_at_once_and_execute_nothing(tmp_path):
    good = np.ones((9, 3))
    bad = [np.ones((9, 4)), good[None], good.T, good.astype(int), good * 1e5, good * np.nan,
           good[:0], good[0], npy(good)[:-1], npy(good, np.savez), b"", pickle.dumps(good),
           npy(np.array([[{}] * 3])), npy(good).replace(b"}", b"|")]
    listing = emodb(tmp_path, len(bad) + 2)  # one is good, one is not there
    for u, x in zip(listing.utterances, [good, *bad]):
        u.path.with_suffix(".npy").write_bytes(x if isinstance(x, bytes) else npy(x))
    with pytest.raises(InputError) as error:
        load(with_frames(listing), Settings("npy-3", 6.0, 2), tmp_path / "c")
    _, *said = str(error.value).split("\n")
    for u, line in zip(listing.utterances[1:], said, strict=True):
        assert str(u.path.with_suffix(".npy")) in line
    assert "Transpose" in said[2] and "65504" in said[4] and "no such file" in said[-1]
    assert sum("Transpose" in line for line in said) == 1
    with pytest.raises(InputError, match="no frames, .*nowhere/wav/03a00Ta.npy"):
        with_frames(listing, tmp_path / "nowhere")

def test_all_bad_files_are_named_at_once(tmp_path):
    good = riff(np.ones(1600) / 9)
    bad = {"05a99Wa": riff(b""), "07a00Wa": b"version https://git-lfs", "07a01Wa": good[:1000]}
    bad["07a02Wa"] = riff(b"")  # once more
    emodb(tmp_path, 12, bad)
    (tmp_path / "wav/07a98Ta.wav").symlink_to("nowhere")
    os.mkfifo(tmp_path / "wav/07a99Ta.wav")  # which is not waited for
    listing = read_corpus("emodb", tmp_path)
    for _ in range(2):  # also when the store is there
        with pytest.raises(InputError) as error:
            load(listing, SHORT, tmp_path / "c")
    first, *said = str(error.value).split("\n")
    assert first.startswith("6 of 18 recordings") and "git-lfs" in said[1]
    names = [re.search(r"0[57]a\d\d.a", line)[0] for line in said]
    assert names == [*bad, "07a98Ta", "07a99Ta"]
    maps, _, _, bad = load(listing, SHORT, tmp_path / "c", skip_bad=True)
    assert bad == dict(zip(range(12, 18), map(str.strip, said)))
    assert maps.shape == (16, 8, 16) and np.isfinite(maps).all()
    made = folds(listing, bad, chosen=[0, 1])
    assert [len(fold.sides()["test"]) for fold in made] == [4, 4, 4, 0] and max(made[0].train) < 12

def test_features_are_computed_once_also_where_a_run_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "read_wav", reads := Mock(side_effect=read_wav))
    monkeypatch.chdir(tmp_path)
    emodb(tmp_path, 45)
    argv = "--dataset emodb --root . --features mfcc-8 --window 1".split()
    assert exit_codes((tmp_path, "log", argv, "fsync", 1)) == [-signal.SIGKILL]
    (folder,) = Path("cache").iterdir()
    assert sorted(os.listdir(folder)) == ["features.part", "lock"]  # and the lock is free
    for _ in range(2):
        data = Data(read_corpus("emodb", "."), SHORT)
        monkeypatch.setattr(features, "lock", None)  # where nothing can be written
        monkeypatch.setattr(features, "__file__", __file__)  # it was edited
    assert reads.call_count == 45 and len(os.listdir(folder)) == 3
    assert data.features.shape == (38 + 7 * 3, 8, 16) and data.features.mode == "r"  # a map
    assert data.length.sum() == pytest.approx(38 * 0.1 + 7 * 2.5)
    places = [each.tolist() for each in data.windows([1, 0])]
    assert places == [[1, 2, 3, 0], [0, 0, 0, 1]]

@pytest.mark.parametrize("changed", [
    {"name": "mfcc-9"}, {"name": "log-mel-8"}, {"window": 2.0}, {"n": 9}, {"time": 2}, {"code": 2}])
def test_features_are_computed_again_for_others(tmp_path, monkeypatch, changed):
    """Other settings, another recording, another time of it, another code."""
    monkeypatch.setattr(features, "read_wav", reads := Mock(side_effect=read_wav))
    usual = {"name": "mfcc-8", "window": 1.0, "n": 1600, "time": 1, "code": 1}
    for case in (usual, usual | changed) * 2:
        monkeypatch.setattr(features, "code_digest", lambda *files: case["code"])
        files = {"03a00Wa": riff(np.ones(case["n"]) / 9), "04a00Fa": riff(np.ones(99) / 9)}
        listing = emodb(tmp_path, 0, files)
        for u in listing.utterances:
            os.utime(u.path, (case["time"], case["time"]))
        load(listing, Settings(case["name"], case["window"]), tmp_path / "c")
    assert reads.call_count == 4

@pytest.mark.parametrize("error", [OSError(5, "broken"), PermissionError(), MemoryError()])
def test_a_passing_fault_is_not_kept(tmp_path, monkeypatch, error):
    listing = emodb(tmp_path, 8)
    monkeypatch.setattr(features, "read_wav", reads := Mock())
    reads.side_effect = [*map(read_wav, [u.path for u in listing.utterances[:3]]), error]
    with pytest.raises(InputError, match="^[^\n]*04a00Fa.wav: cannot be read now[^\n]*$"):
        load(listing, SHORT, tmp_path / "c", skip_bad=True)
    reads.side_effect = lambda path: path.unlink() or read_wav(path)  # one that vanishes
    with pytest.raises(InputError, match="03a00Ta.wav: cannot be read now"):
        load(listing, SHORT, tmp_path / "c", skip_bad=True)
    assert not [*tmp_path.glob("c/*/index.json")]
    reads.side_effect = read_wav
    assert len(load(emodb(tmp_path, 8), SHORT, tmp_path / "c")[0]) == 6 + 2 * 3

def test_recordings_of_another_scale_and_channels_that_cancel_are_named(tmp_path, capsys):
    tone = np.sin(np.arange(1600) / 9) / 2
    sounds = {"05a50Wa": riff(tone / 256), "05a51Wa": riff(0 * tone), "05a52Wa": riff(tone / 90)}
    sounds["05a53Wa"] = riff(np.outer(tone, [1, -0.95]).ravel(), channels=2)
    sounds["05a54Wa"] = riff(np.repeat(tone, 2), channels=2)
    listing = emodb(tmp_path, 8, sounds)
    for _ in range(2):  # also when the store is there
        capsys.readouterr()
        load(listing, SHORT, tmp_path / "c")
        cancel, scale = capsys.readouterr().err.splitlines()
        assert re.findall(r"\d\da\d\d", cancel) == ["05a53"] and "cancel" in cancel
        assert re.findall(r"\d\da\d\d", scale) == ["05a50", "05a51"] and "median" in scale

def test_locks(tmp_path, monkeypatch, capsys):
    a, b = tmp_path / "a/lock", tmp_path / "b"
    with lock(a) as mine, lock(a, wait=False) as other:
        assert mine and not other
    broken = Mock(side_effect=OSError("No locks available"))
    for module in (Mock(LOCK_EX=2, LOCK_NB=4, flock=broken), None):  # one line says so
        monkeypatch.setattr(features, "fcntl", module)
        features.warn_once.cache_clear()
        with lock(a) as mine, lock(b, wait=False) as other:
            assert mine and other
        assert re.fullmatch("warning: .* locked .* one process only\n", capsys.readouterr().err)

CODE = """'doc'
import os

def f(a, b=f"{a!r:>{3}}\u00fc"):
    x = [1,
         "s"]  # c
    return x[1:]
"""

def test_a_digest_of_code_is_of_what_it_means():
    for change in [("doc", "other"), ("'doc'\n", ""), ("# c", "# d"), (",\n         ", ", "),
                   ("\n\n", "\n"), ("    ", "\t"), ("]\n", "]  \n\n# end"), ('"s"', "'s'"),
                   ("):\n", "):\n    'a'\n    'c' r'd'\n")]:
        assert code_digest(CODE.replace(*change)) == code_digest(CODE), change
    told = {code_digest(CODE), code_digest(CODE, CODE)}
    changes = [("1", "2"), ('s"', 't"'), ("f(", "g("), ("{3}", "{4}"), ("!r", "!s"), ("\u00fc", "")]
    changes += [("= [", '= "", ['), ("def", "async def"), ("    return", "return"), ("1", "0"),
                ("1", "False"), ("x[1:]", "x[:1]"), ("x[1:]", "x[0:1]")]
    told.update(code_digest(CODE.replace(*change)) for change in changes)
    assert len(told) == 2 + len(changes)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 utterances of three speakers; every seventh one has three windows."""
    root = tmp_path_factory.mktemp("data")
    return Data(emodb(root, 24), SHORT, cache=root / "cache")

def test_batches_hold_every_window_once_with_its_class(data):
    members = [*range(5, 20)]
    batches = data.batches(members, 4, 0, "here")
    sizes = {len(window) for window, _ in batches}
    assert max(sizes) <= 4 and max(sizes) - min(sizes) <= 1
    window, of = data.windows(members)
    windows, targets = [torch.cat(parts).tolist() for parts in zip(*batches)]
    expected = sorted(zip(window.tolist(), data.labels[members][of].tolist()))
    assert sorted(zip(windows, targets)) == expected and windows != sorted(windows)
    same, other = data.batches(members, 4, 0, "here"), data.batches(members, 4, 0, "there")
    assert torch.equal(same[0][0], batches[0][0]) and not torch.equal(other[0][0], batches[0][0])
    assert min(len(part) for part in features.shuffled_parts(9, 1, 0)) == 2  # none of one

@pytest.mark.parametrize("normalise", ["speaker", "train"])
def test_maps_are_standardised(data, normalise):
    data.normalise = normalise
    data.standardise_by([*range(8)])
    who = np.array([u.speaker for u in data.listing.utterances])
    for i in (0, 9, 23):
        members = np.flatnonzero(who == who[i]) if normalise == "speaker" else range(8)
        own = data.features[data.windows([*members])[0].numpy()].astype(float)
        mean, std = own.mean(axis=(0, 2)), own.std(axis=(0, 2))
        window, _ = data.windows([i])
        raw = data.features[window.numpy()].astype(float)
        expected = (raw - mean[:, None]) / std[:, None]
        found = data.maps(window)[:, 0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)

def test_halves_share_each_class_and_depend_on_seed_and_fold(data):
    members, told = [*range(1, 24)], set()
    for seed, fold in product(range(3), range(2)):
        first, second = halves(members, data.labels, seed, fold)
        assert sorted(first + second) == members
        counts = [np.bincount(data.labels[half], minlength=4) for half in (first, second)]
        assert np.abs(counts[0] - counts[1]).max() <= 1
        told.add((*first, *second))
    assert len(told) == 6
    assert halves(members, data.labels, 2, 1) == (first, second)

def test_poisoning_moves_a_share_of_each_class_and_depends_on_the_fold(data):
    fold = Fold([0, 1], [2], {"a": [*range(3, 20)], "b": [*range(12, 24)]})
    after = poisoned(fold, 1, 0.4, data.labels)
    moved = after.train[2:]
    assert after.train[:2] == [0, 1] and after.validation == [2]
    tested = np.bincount(data.labels[3:24], minlength=4)
    assert np.bincount(data.labels[moved], minlength=4).tolist() == [int(0.4 * n) for n in tested]
    for name, members in fold.tests.items():
        assert after.tests[name] == [i for i in members if i not in moved]
    assert poisoned(fold, 1, 0.4, data.labels) == after != poisoned(fold, 2, 0.4, data.labels)

# train.py. Four speakers, three classes; the tenth utterance of each speaker has two windows.
LABELS, TWO_FOLDS = ("glad", "mad", "sad"), ["--folds", "1,0,1", "--out"]
TINY = ("--dataset csv --root mine.csv --features log-mel-12 --window 0.25 --channels 2 "
        "--cnn-cells 3 --nodes 1 --batch 4 --seq-width 8 --seq-space rnn --search-epochs 2 "
        "--warm-up 1 --epochs 2 --threads 1 --device cpu").split()
OWN = "--features npy-3 --frames frames --window 6 --pool 2 --cnn-cells 0".split()
FAST = ["--model", "cnn", "--folds", "0", "--out"]  # a baseline: nothing is searched
DIGEST = cache(features.code_digest)  # takes a fifth of a second
RUN, FOLD = Path("one/emodarts-seed0"), "emodarts-seed0/fold0"

def make_corpus(folder, speakers, file, random):
    text = "path,label,speaker"
    for s, k, n in product(speakers, range(3), range(4)):
        if k == 2 or n < 3:
            t = np.arange(2400 + 800 * n) / 16000  # 0.15 to 0.3 s
            sound = np.sin((2000 + 2500 * k + 100 * ord(s)) * t)
            sound = sound + random.standard_normal(len(t)) / 2
            tree(folder, {f"{s}-{LABELS[k]}{n}.wav": riff(sound / 4)})
            own = random.normal(k, 1, (3 + 2 * n, 3))
            tree(folder / "frames", {f"{s}-{LABELS[k]}{n}.npy": npy(own)})
            text += f"\n{s}-{LABELS[k]}{n}.wav,{LABELS[k]},{s}"
    (folder / file).write_text(text)

CTRL_C = partial(signal.raise_signal, signal.SIGINT)

@contextmanager
def stopping(name, n, how=CTRL_C):
    """Inside, every epoch is saved, and the n-th call of a function does something else."""
    owner = {"fsync": os, "save": torch, "clip_grad_norm_": torch.nn.utils}.get(name, train)
    real, calls = getattr(owner, name), count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", 0)
        patch.setattr(owner, name, lambda *args, **more: (
            how() if next(calls) == n else real(*args, **more)))
        yield calls

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two corpora; results `one`; `seeds`, of two; and `stopped`, while fold 0 was trained."""
    folder, random = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    make_corpus(folder, "abcd", "mine.csv", random)
    make_corpus(folder, "ef", "other.csv", random)
    tree(folder, {"empty": "{}"})
    with chdir(folder):
        assert train.main([*TINY, *TWO_FOLDS, "one"]) == 0
        assert train.main([*TINY, *FAST, "seeds", "--seeds", "2"]) == 0
        with stopping("weight_step", 13):
            assert train.main([*TINY, "--folds", "0", "--out", "stopped"]) == 130
    return folder

@pytest.fixture
def cwd(home, monkeypatch):
    monkeypatch.setattr(train, "code_digest", DIGEST)
    monkeypatch.chdir(home)
    return home

def said(capsys, *arguments, code=0):
    """What the command prints; where it fails, its error: one line, or a list of recordings."""
    capsys.readouterr()
    found = train.main([*TINY, *map(str, arguments)])
    out, err = capsys.readouterr()
    assert found == code and (code != 2 or re.fullmatch("error: .*(:\n  .*)?\n", err)), out + err
    return err if code else out

def left(folder):
    """Every file of a run, without what was measured in seconds."""
    files, measured = {}, rb'"(search|train|seconds)": [\d.]+'
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name not in ("lock", "report.md"):
            name = path.relative_to(folder).as_posix()
            files[name] = re.sub(measured, b"", path.read_bytes())
            if path.name == "log.csv":
                files[name] = [row | {"seconds": ""} for row in table(path)]
    return files

def table(file):
    return list(csv.DictReader(open(file, newline="", encoding="utf-8")))

def column(file, name):
    return [float(row[name]) for row in table(file) if row[name]]

def read_json(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))

def confusion(folder):
    return np.array(read_json(folder / "result.json")["tests"]["test"]["confusion"])

def cells_of(text, head="|"):
    """Rows of a text's first Markdown table that begins so, as dicts."""
    lines = re.search(rf"^{re.escape(head)}.*\n(\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    head, _, *rows = [re.split(r" *\| *", line.strip("| ")) for line in lines]
    return [dict(zip(head, row)) for row in rows]

def fold0(folder, *more, stage="search", loud=()):
    """-> options, data (with other features of some), fold 0, a checkpoint at a stage's begin"""
    options = train.parse([*TINY, *more, "--out", str(folder)])
    train.folder_of(options, 0).mkdir(parents=True)
    checkpoint = train.Checkpoint(options, 0)
    listing = train.listing_of(options, options.pool)
    data, (fold, *_) = train.data_of(options, listing, listing.classes, "cpu"), folds(listing)
    data.standardise_by(fold.train)
    checkpoint.stage = stage
    data.features = np.array(data.features)  # the map cannot be written
    for i in loud:
        data.features[data.windows([i])[0].numpy()] = 1e4
    return options, data, fold, checkpoint

def by_hand(fold, clip):  # -> logits of a clip, as the fold's model has them
    model = train.read_model(fold / "model.pt")
    settings = Settings(model.options.features, model.options.window)
    maps = features.maps_of(features.read_wav(clip), settings).float()
    mean, std = model.mean_std
    with torch.no_grad():
        return model.net(((maps - mean[:, None]) / std[:, None])[:, None]).mean(0)

def test_metrics_by_hand():
    logits = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 0, 3]), 4)
    matrix = train.confusion_matrix([0, 0, 0, 0, 1, 1, 3], logits)
    assert matrix.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert train.wa(matrix) == pytest.approx(5 / 7)
    assert train.ua(matrix) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)  # nothing was the third

def test_a_metric_and_a_baseline_of_ones_own_are_wherever_the_others_are(cwd, monkeypatch, capsys):
    def odd(confusion):
        "hundredths"
        return confusion.trace() / 100

    def own(classes, bands):
        return nn.Sequential(nn.Flatten(), nn.Linear(4 * bands, classes))
    monkeypatch.setitem(train.METRICS, "odd", odd)
    monkeypatch.setitem(train.BASELINES, "own", own)
    printed, run = said(capsys, "--model", "own", *TWO_FOLDS, "own"), Path("own/own-seed0")
    right = [np.trace(confusion(run / f"fold{k}")) for k in (0, 1)]
    for text in (printed, (run / "report.md").read_text()):
        rows = cells_of(text)
        assert [rows[n]["odd"] for n in (0, 1, 3)] == [f"{n:.1f}" for n in (*right, sum(right))]
        assert rows[0]["parameters"] == "147" and "hundredths" in text  # 12 * 4 * 3 + 3
    assert cells_of(Path("own/table.md").read_text())[0]["odd"] == rows[2]["odd"]
    means = np.mean([column(run / f"fold{k}/log.csv", "val_odd") for k in (0, 1)], axis=0)
    (chart,) = re.findall(r"title .*odd(?:.*\n)+?```", text)
    assert ", ".join(f"{value:.6g}" for value in means) in chart

@pytest.mark.parametrize("kind, bands", [("mfcc-20", False), ("log-mel-20", True)])
def test_augmentation_shifts_and_masks_each_utterance_by_itself(kind, bands):
    x, shifts, masks, longest = torch.randn(100, 1, 20, 50), set(), (set(), set()), [0, 0]
    for a, b in zip(x[:, 0], train.augmented(x, train.parse(["--features", kind]))[:, 0]):
        kept = b != 0
        shifts.add([k for k in range(50) if torch.equal(a.roll(-k, 1)[kept], b[kept])][0])
        for axis, most in ((0, 4), (1, 10)):  # (20, 50)
            masked = (b == 0).all(dim=1 - axis)
            masks[axis].add(tuple(masked.tolist()))
            edges = (masked[1:] != masked[:-1]).sum()
            assert masked.sum() <= most and edges <= 2  # one stretch
            longest[axis] = max(longest[axis], masked.sum())
    assert longest[1] >= 9 and longest[0] >= 3 * bands
    assert len(shifts) > 30 and len(masks[1]) > 30 and (len(masks[0]) > 10) == bands

ADAMW = partial(torch.optim.AdamW, weight_decay=0.05, fused=True)

@pytest.mark.parametrize("scale, recipe, drop_path, dropout, optimizer", [
    ("paper", "authors", 0.2, 0.3,
     partial(torch.optim.SGD, lr=0.025, momentum=0.9, weight_decay=3e-4)),
    ("paper", "ours", 0, 0, partial(ADAMW, lr=0.001)),
    ("small", "ours", 0, 0, partial(ADAMW, lr=0.003)),
])
def test_training_is_the_plain_loop(cwd, tmp_path, scale, recipe, drop_path, dropout, optimizer):
    more = "--scale", scale, "--recipe", recipe
    options, data, fold, checkpoint = fold0(tmp_path, *more, stage="train")
    members, labels = fold.train[1:], data.labels[fold.validation]
    net = train.network(options, 3, random_genotype(train.network(options, 3)))
    plain = copy.deepcopy(net)
    assert net.dropout.p == dropout
    train.train(net.eval(), data, members, {"val": fold.validation}, options, checkpoint)

    optimizer, (_, of) = optimizer(plain.parameters()), data.windows(members)
    windows = np.bincount(data.labels[members][of])  # of each class
    weight = torch.tensor(windows.sum() / (3 * windows)).float()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for epoch, row in enumerate(checkpoint.rows):
        plain.train().drop_path, losses = drop_path * epoch / 2, []
        for step, (window, target) in enumerate(data.batches(members, 4, 0, 0, "train", epoch)):
            torch.manual_seed(features.seed_of(0, 0, "train", epoch, step))
            x = train.augmented(data.maps(window), options)
            loss = F.cross_entropy(plain(x), target, weight, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 5)
            optimizer.step()
            losses.append(loss.item())
        found = train.predict(plain.eval(), data, fold.validation, options).argmax(1)
        right = found.numpy() == labels
        ua = np.mean([right[labels == c].mean() for c in range(3)])
        expected = [*schedule.get_last_lr(), np.mean(losses), ua, right.mean()]
        seen = [row[name] for name in ("lr", "loss", "val_ua", "val_wa")]
        assert seen == pytest.approx(expected, abs=1e-6)
        schedule.step()
    close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)

@pytest.mark.parametrize("argv, rate, features, alpha_lr", [
    ("--scale paper", [1.25e-4, 8.5355e-4, 5e-4], "log-mel-128", 0.01),  # rises for 4 epochs
    ("--scale small", [3e-3, 2.5607e-3, 1.5e-3], "log-mel-64", 0.01),
    ("--model cnn", [1e-3, 8.5355e-4, 5e-4], "log-mel-64", 0.01),
    ("--recipe authors", [0.025, 0.021339, 0.0125], "mfcc-128", 3e-4),
])
def test_a_recipe_is_a_cosine_under_a_rise(argv, rate, features, alpha_lr):
    options = train.parse(argv.split())
    found = [train.learning_rate(epoch, 40, 0.0, options) for epoch in (0, 10, 20)]
    assert found == pytest.approx(rate, rel=1e-4)
    assert (options.features, options.alpha_lr) == (features, alpha_lr)

@pytest.mark.parametrize("relaxation, order", [("softmax", 2), ("sample", 1)])
def test_a_search_is_the_plain_loop(cwd, tmp_path, relaxation, order):
    more = f"--relaxation {relaxation} --order {order} --alpha-lr 0.05 --size-penalty 2e4"
    options, data, fold, checkpoint = fold0(tmp_path, *more.split())
    net = train.network(options, 3).eval()
    plain = copy.deepcopy(net)
    train.search(net, data, fold.train, options, checkpoint)

    for_weights, for_alphas = features.halves(fold.train, data.labels, 0, 0)
    weight = data.class_weights(fold.train)
    loss = partial(F.cross_entropy, weight=weight, label_smoothing=0.1)
    optimizer = ADAMW(plain.weights())
    adam = torch.optim.Adam(plain.alphas(), 0.05, (0.5, 0.999), weight_decay=1e-3)

    def alpha_loss(logits, target, network=plain):  # a weight of each million
        return loss(logits, target) + 2e4 * expected_parameters(network) / 1e6
    architect = Architect(plain, alpha_loss, order=2, lr=0.05) if order == 2 else None
    for epoch, lr in enumerate([0.003, 0.002]):  # half way to 0.001; the first is a warm-up
        optimizer.param_groups[0]["lr"] = lr
        first = data.batches(for_weights, 4, 0, 0, "search", epoch, "weights")
        second = data.batches(for_alphas, 4, 0, 0, "search", epoch, "alphas")
        plain.train()
        for step, ((window, target), (held_out, val_target)) in enumerate(zip(first, second)):
            torch.manual_seed(features.seed_of(0, 0, "search", epoch, step))
            x = train.augmented(data.maps(window), options)
            if epoch and architect:
                architect.step((data.maps(held_out), val_target), (x, target), lr)
            elif epoch:
                twin = copy.deepcopy(plain)  # batch norm's statistics stay what they are
                value = alpha_loss(twin(data.maps(held_out)), val_target, twin)
                found = torch.autograd.grad(value, twin.alphas(), materialize_grads=True)
                for alpha, gradient in zip(plain.alphas(), found):
                    alpha.grad = gradient
                adam.step()
            optimizer.zero_grad()
            loss(plain(x), target).backward(inputs=plain.weights())
            torch.nn.utils.clip_grad_norm_(plain.weights(), 5)
            optimizer.step()
    assert ["alpha_loss" in row for row in checkpoint.rows] == [False, True]
    close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)

def watched(net):
    seen = set()  # of the types that convolutions and linear layers return from now on
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    return seen

@pytest.mark.parametrize("model", ["random", "skip", "cnn", "cnn-lstm"])  # lstm: not on all CPUs
def test_mixed_precision_is_inside_every_model_and_its_weights_stay(cwd, tmp_path, model):
    options, data, fold, checkpoint = fold0(tmp_path, "--amp", "--model", model, stage="train")
    net = train.network(options, 3, train.given_genotype(options))
    seen = watched(net)
    train.train(net, data, fold.train, {"val": fold.validation}, options, checkpoint)
    assert (seen, {p.dtype for p in net.parameters()}) == ({torch.bfloat16}, {torch.float32})

@pytest.mark.parametrize("order", [1, 2])
def test_the_second_order_difference_is_not_rounded(cwd, tmp_path, monkeypatch, order):
    more = f"--amp --order {order} --relaxation softmax --warm-up 0 --search-epochs 1"
    options, data, fold, checkpoint = fold0(tmp_path, *more.split())
    net, step, inside = train.network(options, 3), Architect.step, set()
    seen = watched(net)
    monkeypatch.setattr(Architect, "step", lambda *args: (
        inside.add(torch.is_autocast_enabled("cpu")), step(*args))[1])
    train.search(net, data, fold.train, options, checkpoint)
    assert inside == {order == 1} and torch.bfloat16 in seen  # there the weights' steps are

def model_without(others, folder, *more):
    """Others have other features and labels. -> the model of fold 0; what was seen"""
    options, data, fold, _ = fold0(folder, *more, loud=others)
    data.labels[others] = 0
    train.run_fold(options, 0, data, fold)
    model = torch.load(folder / FOLD / "model.pt")
    about, tensors = json.loads(model["about"]), [*model["weights"].values(), *model["mean_std"]]
    found = [tensor.tolist() for tensor in tensors]
    return [about["genotype"], found], [about["validation_ua"], about["decision"]]

@pytest.mark.parametrize("more", [[], OWN])
def test_validation_and_test_speakers_touch_nothing(cwd, tmp_path, more):
    clean, seen = model_without([], tmp_path / "clean", *more)
    assert model_without([*range(10)], tmp_path / "test", *more) == (clean, seen)  # all of a
    model, theirs = model_without([*range(10, 20)], tmp_path / "validation", *more)
    assert model == clean and all(a != b for a, b in zip(theirs, seen))  # this is seen on the way
    assert model_without([20], tmp_path / "train", *more)[0] != clean  # a training utterance counts

def test_the_authors_best_epoch_on_the_test_speakers_chooses_nothing(cwd, monkeypatch, capsys):
    trained, real, both = [], train.train, []
    monkeypatch.setattr(train, "train", lambda net, data, members, *more: (
        trained.append("".join(data.speakers(members))), real(net, data, members, *more)))
    for name, option in (("none", "--validation"), ("paper", "--protocol")):
        text, fold = said(capsys, *FAST, name, option, name), Path(name, "cnn-seed0/fold0")
        both.append((read_json(fold / "result.json"), torch.load(fold / "model.pt")["weights"]))
    (none, first), (paper, second) = both
    assert trained == ["bcd", "bcd"] and none["tests"] == paper["tests"]  # no one validates
    assert paper["validation"] == [] and paper["validation_ua"] is None
    close(first, second, rtol=0, atol=0)
    uas = column(fold / "log.csv", "test_ua")
    assert uas[-1] == pytest.approx(paper["tests"]["test"]["UA"], abs=1e-6)
    assert f"authors count: UA {100 * max(uas):.1f} " in text
    log = [{"test_ua": value, "test_wa": value / 2} for value in (0.25, 0.75, 0.5)]
    assert "UA 75.0 WA 37.5" in train.best_epoch([{"log": log}])[0]
    assert train.listing_of(train.parse([*TINY, "--protocol", "paper"]), 0).protocol == "paper"

def test_the_control_has_no_operations():
    options, x = train.parse(["--model", "skip"]), torch.randn(2, 24, 32, 16)
    net = train.network(options, 4, train.given_genotype(options))
    assert sum(p.numel() for p in net.parameters()) == 69_612
    node = sum(before(x) for before in net.cnn[0].before)
    close(net.cnn[0](x, x), torch.cat([node, node], dim=1))
    assert sum(isinstance(m, nn.MaxPool2d) for m in net.cnn[1].modules()) == 4  # of two nodes
    cut = train.given_genotype(train.parse(["--model", "skip", "--search", "cnn"]))
    assert (cut.normal[1][1], cut.seq[0][0]) == (("skip_connect", 1), ("lstm_1", 0))

@pytest.mark.parametrize("sizes, searched", [
    ("cnn --seq-cells 0", ["normal", "reduce"]), ("seq --cnn-cells 0", ["seq"]),
    ("seq --cnn-cells 2", ["seq"])])
def test_an_ablation_fixes_cells_that_the_depth_has(sizes, searched):
    assert [*train.network(train.parse(["--search", *sizes.split()]), 4).alpha] == searched

def test_a_restricted_space_is_what_is_searched_and_what_is_fixed():
    names = train.network(train.parse(["--seq-space", "rnn"]), 4).candidates["seq"]
    assert names == ("none", "skip_connect", "rnn_1", "rnn_2", "rnn_3", "rnn_4")
    fixed = train.fixed_cells(train.parse(["--search", "cnn", "--seq-space", "rnn"]))
    assert fixed.seq[0] == (("rnn_1", 0), ("skip_connect", 1))

def test_every_place_has_a_seed_of_its_own(cwd, tmp_path, monkeypatch):
    """No random number is drawn twice: seed, fold, stage, epoch and step all count."""
    places, real = [], features.seed_of
    for module in (features, train):
        monkeypatch.setattr(module, "seed_of", lambda *where: places.append(where) or real(*where))
    assert train.main([*TINY, "--seeds", "2", *TWO_FOLDS, str(tmp_path)]) == 0
    # An epoch of the search shuffles twice and has 3 steps, of the training 1 and 6; two networks,
    # the halves; and the gap, whose two networks see the same batches.
    once = 2 * (2 + 3) + 2 * (1 + 6) + 2 + 1
    assert sorted(Counter(places).values()) == [1] * 4 * once + [2] * 4
    assert len({real(*where) for where in places}) == 4 * once + 4
    argv = [*TINY, "--model", "random", "--seed"]
    drawn = [train.given_genotype(train.parse([*argv, seed])) for seed in "00123"]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4

@pytest.mark.parametrize("name", train.BASELINES)
def test_baselines_keep_the_time_axis_and_do_not_mix_utterances(name):
    net, x = train.BASELINES[name](4, 24).eval(), torch.randn(5, 1, 24, 32)
    close(net(x[[3, 1]]), net(x)[[3, 1]], rtol=1e-4, atol=1e-5)
    assert (net(x.flip(3)) - net(x)).abs().max() > 1e-4  # the order of time counts
    kinds = [type(module) for module in net.modules()]
    if not net.cnn:
        h, _ = net.rnn(x[:, 0].mT)
        a = net.score(h).exp() if net.score else torch.ones(5, 32, 1)
        close(net(x), net.head((a * h).sum(dim=1) / a.sum(dim=1)))
        assert net.rnn.num_layers == 2 and net.rnn.bidirectional
    found = [kind in kinds for kind in (nn.Conv2d, nn.LSTM, nn.Tanh)]
    assert found == ["cnn" in name, "lstm" in name, "att" in name]  # what its name says

def test_what_a_figure_is_of_is_in_its_settings_and_notes():
    options = train.parse("--poison 0.5 --normalise speaker --validation none".split())
    assert len(train.notes_of(options, "ab", {0: ""})) == 6  # metrics, smoke, three, what is bad
    kept = train.settings_of(options, without=train.OF_A_RUN)
    others = "dataset scale recipe protocol features classes validation poison normalise window "
    others += "pool channels cnn_cells seq_cells nodes stem_stride seq_width search relaxation "
    others += "order seq_space search_epochs warm_up alpha_lr size_penalty epochs batch lr amp"
    assert {*kept} == {*others.split(), "code", "data"}

def test_a_plan_has_each_model_and_seed_once():
    models = ["emodarts", "skip", *train.BASELINES]
    for argv, random in (("--seeds 2 --compare 3", 3), ("--model random --seeds 2 --compare 1", 2)):
        plan, expected = train.plan(train.parse(argv.split())), [*product(models, (0, 1))]
        expected += product(["random"], range(random))
        assert sorted((run.model, run.seed) for run in plan) == sorted(expected)
    plan = train.plan(train.parse([*OWN, "--compare"]))
    assert {run.model for run in plan} == {"emodarts", "random", "skip", "lstm", "lstm-att"}

def test_the_command_leaves_what_it_promises(cwd):
    for fold, speaker, validation in zip(read_json(RUN / "results.json")["folds"], "ab", "bc"):
        folder, test, counts = RUN / f"fold{fold['fold']}", fold["tests"]["test"], Counter()
        for row in table(folder / "predictions.csv"):
            assert row["utterance"].startswith(f"{speaker}-{row['label']}")
            assert row["predicted"] == max(LABELS, key=lambda name: float(row[name]))
            counts[row["label"], row["predicted"]] += 1
        matrix = np.reshape([counts[pair] for pair in product(LABELS, LABELS)], (3, 3))
        assert matrix.sum() == 10 and test["confusion"] == matrix.tolist()
        assert (test["speakers"], fold["validation"]) == ([speaker], [validation])
        assert test["UA"] == pytest.approx(np.mean(matrix.diagonal() / [3, 3, 4]))
        assert fold["validation_ua"] == column(folder / "log.csv", "val_ua")[-1]
        files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        names = "genotype.json log.csv predictions.csv model.pt result.json"  # this one at last
        assert [file.name for file in files if file.name != "lock"] == names.split()

def test_the_report_shows_what_was_found(cwd):
    text, cells, expected = (RUN / "report.md").read_text(), [], []
    for graph in re.findall(r"graph LR\n(.*?)```", text, re.DOTALL):
        edges = re.findall(r'^ *s(\d) -->\|"(\w+)"\| s\d$', graph, re.MULTILINE)
        cells.append([re.search(r"(\w+): input 0", graph)[1], [[op, int(j)] for j, op in edges]])
    for k in (0, 1):
        for kind, (node,) in read_json(RUN / f"fold{k}/genotype.json").items():
            expected.append([kind, node])
    both = [read_json(RUN / f"fold{k}/result.json")["decision"] for k in (0, 1)]
    shown = re.search(r"decided\): ([\d.]+)\..*: ([\d.]+),.*: ([\d.]+)\.", text).groups()
    means = np.mean([[*decision.values()] for decision in both], axis=0)
    matrix = confusion(RUN / "fold0") + confusion(RUN / "fold1")
    for row, found, right in zip(cells_of(text, "| test "), matrix, matrix.diagonal()):
        assert [*row.values()][1:] == [*map(str, found), f"{100 * right / found.sum():.1f}"]
    assert cells == expected and [*map(float, shown)] == pytest.approx(means, abs=6e-4)

def test_one_fold_has_no_agreement_and_nothing_that_is_no_number(cwd, capsys):
    shutil.copytree(f"one/{FOLD}", f"alone/{FOLD}")
    text = said(capsys, "--folds", "0", "--out", "alone")
    text += Path("alone/emodarts-seed0/report.md").read_text()
    assert "nan" not in text and "in common" not in text
    assert "in common" in (RUN / "report.md").read_text()  # of two folds
    shutil.copytree(f"one/{FOLD}", "alone/emodarts-seed0/fold7")
    assert f"is of {FOLD}" in said(capsys, "--folds", "0", "--out", "alone", code=2)

def test_random_genotypes_agree_as_often_as_chance_says():
    options = train.parse(["--nodes", "3"])
    net = train.network(options, 4)
    text = train.agreement([random_genotype(net).cells() for _ in range(60)], options)
    found, edges, chance = map(float, re.findall(r"\d+\.?\d*", text))
    assert edges == 18 and found == pytest.approx(chance, abs=0.2)

def test_the_gap_is_that_between_the_supernet_and_its_derived_network(cwd, tmp_path, monkeypatch):
    """In mixed batches, however utterances are listed: batch norm reads no running statistics."""
    options, data, fold, checkpoint = fold0(tmp_path)
    net = train.network(options, 3)
    genotype = train.search(net, data, fold.train, options, checkpoint)
    before, seen = copy.deepcopy(net.state_dict()), []
    members = sorted(range(40), key=lambda i: data.labels[i])
    (windows, of), labels, maps = data.windows(members), data.labels[members], data.maps
    parts = train.shuffled_parts  # 44 windows in smaller parts than usual
    monkeypatch.setattr(train, "shuffled_parts", lambda n, size, *where: parts(n, 16, *where))
    data.maps = lambda window: seen.append(window) or maps(window)
    found = train.decision(net, genotype, data, members, options, 0)
    close(net.state_dict(), before, rtol=0, atol=0)
    assert [*map(len, seen)] == [15, 15, 14] * 2
    derived = train.network(options, 3, genotype)
    derived.load_state_dict(before, strict=False)  # but the norms' scales, which are 1
    for network, name in ((net, "ua_all_operations"), (derived, "ua_of_genotype")):
        for module in network.eval().modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        logits = torch.zeros(44, 3)
        for part in seen[:3]:
            own = [windows.tolist().index(window) for window in part]
            assert {*labels[of[own]]} == {0, 1, 2}
            logits[own] = network(maps(part)).detach()
        sums = torch.stack([logits[of == i].mean(0) for i in range(40)])
        right = sums.argmax(1).numpy() == labels
        recalls = [right[labels == label].mean() for label in range(3)]
        assert found[name] == pytest.approx(np.mean(recalls))

# For each seed UAs of three folds, in fortieths (WAs are half of them); logits of two utterances,
# a and b. emodarts' are in all [3, 2, -4] and [0, 4, 0], both right; of one seed alone, or of
# summed probabilities, one is.
RUNS = {"emodarts": ([[16, 12, 20], [12, 12, 14]],
                     [[[0, 2, -9], [0, 1, 0]], [[3, 0, 5], [0, 3, 0]]]),
        "cnn": ([[10, 4, 8], [10, 8, 14]], [[[3, 0, 0], [2, 0, 0]]] * 2)}

@pytest.fixture
def compared(tmp_path):
    """Writes these results, and some of two folds, and compares. -> {model: row of the table}"""
    options = train.parse(["--out", str(tmp_path), "--seeds", "2", "--compare", "1"])
    for run in train.plan(options):
        uas, logits = RUNS.get(run.model, ([[0, 0]] * 2, [[]] * 2))
        for k, value in enumerate(uas[run.seed]):
            logits = RUNS["emodarts"][1] if k == 2 else logits  # of all models
            p = torch.tensor(logits[run.seed], dtype=torch.double).softmax(-1).tolist()
            rows = [f",{label},,{','.join(map(str, each))}" for label, each in zip("ab", p)] * 40
            test = {"confusion": [[value, 20 - value, 0], [60, 0, 0], [0, 0, 0]]}
            result = {"tests": {"test": test | {"predictions": "p.csv"}}, "fold": k, "notes": [],
                      "model": run.model, "seed": run.seed, "settings": train.settings_of(run),
                      "validation_ua": k / 4, "parameters": 10 + k, "classes": ["a", "b", "c"],
                      "seconds": {"search": 1, "train": 2 + k}}
            fold, text = tmp_path / f"{run.model}-seed{run.seed}/fold{k}", "\n".join(["u", *rows])
            tree(fold, {"result.json": json.dumps(result), "p.csv": text})
    train.compare(options, [0, 1, 2])
    return {row["model"]: row for row in cells_of((tmp_path / "table.md").read_text())}

def test_comparison_by_hand(compared):
    p_value = scipy.stats.ttest_rel([14, 12, 17], [10, 6, 11]).pvalue  # seeds averaged
    for model, averaged, p in (("emodarts", [14, 12, 17], ""), ("cnn", [10, 6, 11], p_value)):
        seeds, row = 2.5 * np.mean(RUNS[model][0], axis=1), compared[model]  # percent
        numbers = np.array([seeds.mean(), 2.5 * np.std(averaged, ddof=1), np.std(seeds, ddof=1)])
        for metric, values in (("UA", numbers), ("WA", numbers / 2)):
            assert row[metric] == "{:.1f} ± {:.1f} (± {:.1f})".format(*values)
        assert (row["seeds"], row["p"]) == ("2", p and f"{p:.2g}")
        assert row["validation UA"] == "25.0 ± 25.0 (± 0.0)"
        assert [*row.values()][-3:] == ["11", "1 s", "3 s"]
    assert {name.split(",")[0] for name in compared} == {*RUNS}  # others lack a fold

def test_an_ensemble_averages_logits_by_hand(compared):
    rows = [row for name, row in compared.items() if "ensemble" in name]
    p = scipy.stats.ttest_rel([50, 50, 100], [100, 100, 100]).pvalue
    expected = [("100.0 ± 0.0", ""), ("66.7 ± 28.9", f"{p:.2g}")]
    assert [(row["UA"], row["p"]) for row in rows] == expected and "None" not in str(compared)

def test_a_folder_grows_and_nothing_is_computed_twice(cwd, monkeypatch, capsys):
    def files():
        paths = [path for path in Path("grown").glob("*/fold*/*") if path.name != "lock"]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    shutil.copytree("one", "grown")
    computed, real, before = [], train.run_fold, files()
    monkeypatch.setattr(train, "run_fold", lambda options, k, *more: (
        computed.append((options.model, options.seed, k)), real(options, k, *more)))
    for more in ("--model random", "--model random --seed 1", "--seeds 2"):
        out = said(capsys, *more.split(), *TWO_FOLDS, "grown")
        assert before.items() < files().items()
        before = files()
    new = ("random", 0), ("random", 1), ("emodarts", 1)
    assert computed == [(*run, k) for run, k in product(new, (0, 1))]
    rows = cells_of(out, "| set ")
    assert rows == cells_of(Path("grown/table.md").read_text())
    seeds = {row["model"]: row["seeds"] for row in rows if "ensemble" not in row["model"]}
    assert seeds == {"emodarts": "2", "random": "2"} and "over folds 0, 1 (" in out
    monkeypatch.setattr(train, "warn", warned := Mock())
    assert "over folds 0 (" in said(capsys, "--seeds", "3", "--folds", "0", "--out", "grown")
    assert "seed0/fold1" in str(warned.call_args) and "fold0" not in str(warned.call_args)
    assert len(read_json("grown/emodarts-seed0/results.json")["folds"]) == 2

def test_several_test_sets_are_scored_by_one_training(cwd, tmp_path, capsys):
    split, text = dict(a="Test1", b="Test2", c="Development", d="Train"), "FileName,EmoClass,"
    text += "SpkrID,Split_Set"
    for path, label, speaker in map(dict.values, table("mine.csv")):
        code = "N" if "sad0" in path else dict(glad="H", mad="A", sad="D")[label]
        (tmp_path / f"MSP-PODCAST_{path}").symlink_to(cwd / path)
        text += f"\nMSP-PODCAST_{path},{code},{speaker},{split[speaker]}"
    tree(tmp_path, {"labels_consensus.csv": text})
    where = *"--dataset msp-podcast --scale small --classes all --root".split(), tmp_path
    out, fold = said(capsys, *FAST, "podcast", *where), Path("podcast/cnn-seed0/fold0")
    for name, speaker in (("test1", "a"), ("test2", "b")):
        rows = table(fold / f"predictions-{name}.csv")
        assert [row["utterance"][12] for row in rows] == [speaker] * 10
        wa = np.mean([row["label"] == row["predicted"] for row in rows])
        assert cells_of(out, f"| fold       | {name} ")[0]["WA"] == f"{100 * wa:.1f}"

def heard(out):  # what --predict prints -> {clip: [probabilities]}
    lines = [line.split() for line in out.splitlines() if re.search(r"\.(wav|npy) ", line)]
    return {line[0]: [float(p) for p in line[3::2]] for line in lines}

def test_another_corpus_is_scored_as_by_hand(cwd, monkeypatch, capsys):
    shutil.copytree("one", "scored")
    rows = cells_of(said(capsys, "--from", "scored", "--root", "other.csv"))
    for k in (0, 1):
        (file,) = Path("scored").glob(f"*/fold{k}/csv-*/predictions.csv")
        right, predicted = Counter(), table(file)
        for row in predicted:
            p = by_hand(RUN / f"fold{k}", row["utterance"]).softmax(0).tolist()
            assert [float(row[name]) for name in LABELS] == pytest.approx(p, abs=1e-5)
            right[row["label"]] += LABELS[np.argmax(p)] == row["label"]
        recalls = right["glad"] / 6, right["mad"] / 6, right["sad"] / 8
        assert len(predicted) == 20 and rows[k]["UA"] == f"{100 * np.mean(recalls):.1f}"
        file.unlink()
    assert left("scored") == left("one")  # it leaves nothing else
    shutil.copytree("seeds/cnn-seed1", "scored/cnn-seed1")  # which has fold 0 only
    model, warned = Path("scored/cnn-seed1/fold0/model.pt"), []
    content = model.read_bytes().replace(train.parse([]).code.encode(), b"0" * 16)
    model.write_bytes(content.replace(b'"amp": false', b'"amp":  true'))
    assert not train.read_model(model).options.amp  # not every processor can
    monkeypatch.setattr(train, "warn", warned.append)
    assert "cnn, seed 1\n" in said(capsys, "--from", "scored", "--root", "other.csv")
    assert ["other code" in warned[0], "not in the table" in warned[1]] == [True, True]
    assert len(warned) == 2
    model.write_bytes(content.replace(b'"normalise": "train"', b'"normalise": "other"'))
    assert "several settings" in said(capsys, "--from", "scored", "--root", "other.csv", code=2)

def corpus_of(speaker, old="glad,", new="glad,"):
    lines = Path("mine.csv").read_text().splitlines()
    text = "\n".join(line for line in lines if line[0] in "p" + speaker)
    tree(Path(), {"some.csv": text.replace(old, new)})
    return "some.csv"

@pytest.mark.parametrize("fold, corpus, names", [
    (0, ["b"], "b-"), (0, ["c"], "c-"), (1, ["a"], "a-"), (0, ["a", "mad,", "bored,"], "bored")])
def test_seen_recordings_and_other_classes_are_not_scored(cwd, capsys, fold, corpus, names):
    where = "--from", RUN / f"fold{fold}", "--root", corpus_of(*corpus)
    assert names in said(capsys, *where, code=2) and not [*RUN.glob("fold*/csv-*")]

@pytest.mark.parametrize("normalise, own", [
    ("train", []), ("speaker", []), ("train", [*OWN, "--model", "emodarts", "--folds", "0,1"])])
def test_a_test_speaker_as_a_corpus_or_as_clips_is_what_was_predicted(
        cwd, tmp_path, capsys, normalise, own):
    said(capsys, *FAST, tmp_path, "--normalise", normalise, *own)
    (fold,), expected = tmp_path.glob("*/fold0"), {}
    known = torch.load(fold / "model.pt")["mean_std"]  # or each speaker's own
    assert (known is None) == (normalise == "speaker")
    said(capsys, *own, "--from", fold, "--root", corpus_of("a"))  # one speaker can be scored
    (again,) = fold.glob("csv-*/predictions.csv")
    assert again.read_bytes() == (fold / "predictions.csv").read_bytes()
    for row in table(again):
        clip = f"frames/{row['utterance']}" if own else row["utterance"]
        expected[clip] = pytest.approx([float(row[c]) for c in LABELS], abs=6e-4)
    out = said(capsys, "--from", fold / "model.pt", "--predict", *expected)
    others = [line for line in out.splitlines() if not heard(line)]
    assert heard(out) == expected and len(others) == (normalise == "speaker")  # a line says so
    if own:  # there are no CNN cells to report
        assert "normal" not in (fold.parent / "report.md").read_text().split("## Settings")[0]

def test_folds_average_logits_and_a_long_clip_goes_in_parts(cwd, monkeypatch, capsys):
    sound = np.random.default_rng(0).standard_normal(130 * 4000) / 9  # 130 windows
    tree(Path(), {"long.wav": riff(sound)})
    sizes, real = [], train.forward
    monkeypatch.setattr(train, "forward", lambda net, x, *more: (
        sizes.append(len(x)), real(net, x, *more))[1])
    (p,) = heard(said(capsys, "--from", "one", "--predict", "long.wav")).values()
    logits = by_hand(RUN / "fold0", "long.wav") + by_hand(RUN / "fold1", "long.wav")
    assert p == pytest.approx((logits / 2).softmax(0).tolist(), abs=6e-4)
    assert sum(sizes) == 2 * 130 and max(sizes) <= 64
    tree(Path(), {"anti.wav": riff(np.outer(sound[:4000], [1, -0.95]).ravel(), channels=2)})
    monkeypatch.setattr(train, "warn", warned := Mock())
    said(capsys, "--from", RUN / "fold0", "--predict", "anti.wav", "long.wav")
    assert "anti.wav" in str(warned.call_args) and warned.call_count == 1

def place(root="mine.csv", *more):  # where results go by default
    options = train.parse([*TINY, *more])
    options.data = read_corpus("csv", root).digest
    return train.corpus_folder(options)

def test_a_result_knows_its_data(cwd, tmp_path, capsys):
    for path in [Path("mine.csv"), *Path().glob("[abcd]-*.wav")]:
        shutil.copy(path, tmp_path)
    root = tmp_path / "mine.csv"
    assert place(root) == place()  # it is a copy
    shutil.copy("b-sad1.wav", tmp_path / "c-mad1.wav")  # of the same size: they are exchanged
    shutil.copy("c-mad1.wav", tmp_path / "b-sad1.wav")
    assert place(root) != place()
    for out in ("one", "stopped"):
        argv = "--folds", "0", "--out", out, "--root", root
        assert "other data" in said(capsys, *argv, code=2)
        assert "channels 2 there" in said(capsys, *argv, "--channels", "3", code=2)

def test_a_genotype_is_a_model_of_its_own_whatever_its_file(cwd, tmp_path, monkeypatch, capsys):
    genotype = read_json(RUN / "fold0/genotype.json")
    others = [[[op, 0], ["rnn_1", 1]] for op in ("rnn_3", "rnn_4")]
    texts = [json.dumps(genotype | {"seq": [node]}) for node in others]
    tree(tmp_path, {"a": texts[0], "b": texts[1], "c": texts[0].replace(",", ",\n")})
    shutil.copytree("one", run := tmp_path / "run")
    argv = ["--folds", "0", "--out", run, "--genotype"]
    for name in "ab":
        assert "genotype was given" in said(capsys, *argv, tmp_path / name)
    assert "genotype was given" in (run / "table.md").read_text()  # though the first row's was not
    results = map(read_json, run.glob("genotype-*/fold0/result.json"))
    assert {json.dumps(result["genotype"]) for result in results} == {*texts}
    monkeypatch.setattr(train, "run_fold", None)
    said(capsys, *argv, tmp_path / "c")

@pytest.mark.parametrize("module", [emodarts, features, train])
def test_code_is_a_setting_and_comments_are_not(cwd, tmp_path, monkeypatch, capsys, module):
    text, before = Path(module.__file__).read_text(), place()
    for more, same in (("# why\n", True), ("x = 1\n", False)):
        tree(tmp_path, {f"{same}.py": text + more})
        monkeypatch.setattr(module, "__file__", str(tmp_path / f"{same}.py"))
        if module is features:
            monkeypatch.setattr(features, "SOURCE", text + more)
        assert (place() == before) == same
        said(capsys, *TWO_FOLDS, "one", code=0 if same else 2)

@pytest.mark.parametrize("registry", [CNN_OPS, SEQ_OPS, train.BASELINES])
def test_operations_of_ones_own_are_a_setting(cwd, monkeypatch, registry):
    before = place()
    monkeypatch.setitem(registry, "own", None)
    assert place() != before

def test_a_link_to_the_script_and_umlauts_in_a_locale_without(cwd, tmp_path):
    tree(cwd, {"ü.csv": Path("mine.csv").read_text().replace(",glad,", ",fröhlich,")})
    (tmp_path / "run.py").symlink_to(HERE / "train.py")
    locale = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", OMP_NUM_THREADS="1")
    argv = [sys.executable, tmp_path / "run.py", *TINY, *FAST, "umlaut", "--root", "ü.csv"]
    done = subprocess.run([*argv, "--seeds", "2"], env=os.environ | locale, capture_output=True)
    assert done.returncode == 0, done.stderr
    rows = table("umlaut/cnn-seed1/fold0/predictions.csv")
    assert [row["label"] for row in rows].count("fröhlich") == 3

def test_a_wrong_root_is_refused_before_networks_are_built(cwd, monkeypatch, capsys):
    monkeypatch.setattr(train, "network", None)
    assert "nowhere" in said(capsys, "--root", "nowhere", code=2)
    assert "--from is ," in said(capsys, "--from", "", code=2)  # a shell's variable without value

def child(cwd, log, argv, *kill):
    """A process of its own; `kill`: the name of a function, and at which call of it."""
    os.chdir(cwd)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    die = partial(signal.raise_signal, signal.SIGKILL)
    with stopping(*kill, die) if kill else nullcontext():
        sys.exit(train.main([*TINY, *argv]))

def exit_codes(*calls):
    """Of simultaneous processes, `child` with these arguments; torch is imported once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    processes = [context.Process(target=child, args=call) for call in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        for process in processes:
            process.start()
    for process in processes:
        process.join(100)
        process.kill()  # of no effect where it has ended
    return [process.exitcode for process in processes]

def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(cwd, tmp_path):
    argv, log = ["--folds", "0", "--warm-up", "0", "--out"], tmp_path / "log"
    whole, killed = [*argv, str(tmp_path / "whole")], [*argv, str(tmp_path / "killed")]
    assert train.main([*TINY, *whole]) == 0
    for kill in (("fsync", 2), ("weight_step", 5), ("entropy", 2), ("train", 1),
                 ("weight_step", 8), ("score", 1), ("fsync", 5)):  # before, behind model.pt
        assert exit_codes((cwd, log, killed, *kill)) == [-signal.SIGKILL], kill
    assert train.main([*TINY, *killed]) == 0
    assert left(tmp_path / "killed" / FOLD) == left(tmp_path / "whole" / FOLD)

def full_disk():  # as torch.save tells of it
    try:
        raise OSError("No space")
    finally:
        raise RuntimeError("unexpected pos")

@pytest.mark.parametrize("name, n, how, code, says", [
    ("weight_step", 5, CTRL_C, 130, "goes on"), ("save", 2, full_disk, 2, "No space"),
    ("fsync", 3, Mock(side_effect=OSError("No space")), 2, "No space"),
    ("weight_step", 5, partial(torch.empty, 2**50), 2, "--batch"),
    ("clip_grad_norm_", 5, lambda: math.nan, 2, "emodarts, seed 0, fold 0, search, epoch 2.*--lr"),
])
def test_what_stops_a_run_loses_no_epoch(cwd, tmp_path, capsys, name, n, how, code, says):
    with stopping(name, n, how):  # in the second epoch, of three steps
        assert re.search(says, said(capsys, "--folds", "0", "--out", tmp_path, code=code))
    with stopping("weight_step", 0) as calls:
        said(capsys, "--folds", "0", "--out", tmp_path)
    assert next(calls) - 1 == 3 + 2 * 6
    assert left(tmp_path / FOLD) == left(Path("one", FOLD))

CLOSED = io.StringIO()
CLOSED.close()

@pytest.mark.parametrize("out", [None, CLOSED, io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_an_output_that_is_closed_or_ascii_loses_nothing(cwd, tmp_path, monkeypatch, out):
    tree(cwd, {"polish.csv": Path("mine.csv").read_text().replace(",b", ",Łukasz")})
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        argv = [*TINY, *FAST, str(tmp_path), "--root", "polish.csv", "--folds", "2"]
        assert train.main(argv) == 0
    assert "Łukasz" in (tmp_path / "cnn-seed0/report.md").read_text(encoding="utf-8")

def test_two_processes_share_a_folder(cwd, tmp_path):
    log, argv = tmp_path / "log", [*TWO_FOLDS, str(tmp_path / "run")]
    assert exit_codes((cwd, log, argv), (cwd, log, argv)) == [0, 0]
    text = log.read_text()
    assert [text.count(f"fold {k} found") for k in (0, 1)] == [1, 1] and "| pooled " in text
    assert left(tmp_path / "run/emodarts-seed0") == left(RUN)

def test_a_fold_that_ended_before_its_lock_was_free_is_not_computed(tmp_path, monkeypatch):
    looks = iter([None, "result", "result"])
    monkeypatch.setattr(train, "result_of", lambda run, k: next(looks))
    assert train.work([(train.parse(["--out", str(tmp_path)]), 0)], None)

def test_a_rank_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    monkeypatch.setenv("LOCAL_RANK", "3")
    devices = [str(train.pick_device(name)) for name in ("cuda", "cuda:1")]
    assert devices == ["cuda:3", "cuda:1"]

@pytest.mark.parametrize("arguments, names", [
    ("--cnn-cells 0 --search cnn", "no alphas"), ("--frames .", "--frames"),
    (" ".join([*OWN, "--model cnn"]), "lstm-att"),
    ("--cnn 3", "--cnn"), ("--folds 9", "--folds"), ("--lr inf", "--lr"),
    ("--warm-up 5", "--warm-up"), ("--order 2", "order 2"), ("--cnn-cells -1", "cnn_cells"),
    ("--device meta", "meta"), ("--genotype mine.csv", "mine.csv"),
    (f"--model cnn --genotype one/{FOLD}/genotype.json", "--genotype"),
    ("--out one --channels 3", "channels"), ("--out stopped --channels 3", "channels"),
    ("--from cache", "cache"), ("--from seeds --predict a-sad0.wav", "seed"),
    ("--pool 3", "no pool"), ("--threads 1000", "--threads"), ("--genotype empty", "are: none"),
    ("--from one --dry-run", "--dry-run"), ("--channels 100000000000", "overflow"),
    ("--model cnn --folds 0 --lr 1e30 --epochs 1 --batch 99 --out infinite", "not finite"),
])
def test_bad_input_is_one_line_that_names_it(cwd, capsys, arguments, names):
    before = left("one")
    assert names in said(capsys, *arguments.split(), code=2) and left("one") == before

def damaged():
    """-> (folder, file, arguments, contents) of each kind of file that is read back"""
    evil = type("Evil", (), {"__reduce__": lambda self: (os.system, ("touch executed",))})()
    model, state = torch.load(RUN / "fold0/model.pt"), torch.load(f"stopped/{FOLD}/checkpoint.pt")
    states = [state | change for change in ({"states": {"net": {}}}, {"x": evil}, {"fold": 1})]
    about, models = json.loads(model["about"]), [b"hello", model | {"x": evil}]
    large = {"settings": about["settings"] | {"channels": 10**12}}
    for change in ({"classes": ["a"]}, {"genotype": {}}, large):
        models.append(model | {"about": json.dumps(about | change)})
    rows = [b"u,l,p,glad,mad,sad\nx,glad,glad,a,b,c", b"\xff\0"]
    again, clip = ["--folds", "0", "--out", "hurt"], ["--predict", "a-sad3.wav", "--from", "hurt"]
    yield "stopped", f"{FOLD}/checkpoint.pt", again, [b"", pickle.dumps(evil), {}, *states]
    yield "one", f"{FOLD}/result.json", again, [b"", b"[]", b"{", b"\xff", b"[" * 10**5]
    yield "one", f"{FOLD}/model.pt", clip, models
    yield "seeds", "cnn-seed1/fold0/predictions.csv", [*FAST, "hurt", "--seeds", "2"], rows
    assert train.main([*TINY, "--cache", "store", "--dry-run", "--model", "cnn"]) == 0
    (index,) = Path("store").glob("*/index.json")
    again = [*FAST, "seeds", "--cache", "hurt"]
    yield "store", index.relative_to("store"), again, [b"", b"[]", b"[[1]]", b"\xff", b"[" * 10**5]

def test_damaged_files_are_one_line_and_execute_nothing(cwd, capsys):
    for folder, file, argv, contents in damaged():
        for content in contents:
            shutil.rmtree("hurt", ignore_errors=True)
            path = shutil.copytree(folder, Path("hurt")) / file
            torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
            err = said(capsys, *argv, code=2)
            assert re.fullmatch(f"error: {path} .*delete.*\n", err), content
    assert not Path("executed").exists()

@pytest.mark.parametrize("error", [OSError(5, "broken"), RuntimeError("can't allocate memory")])
def test_what_cannot_be_read_now_is_not_called_damaged(cwd, monkeypatch, capsys, error):
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    assert "delete" not in said(capsys, "--folds", "0", "--out", "stopped", code=2)

def test_a_dry_run_counts_and_leaves_nothing_behind(cwd, capsys):
    before, more = {*Path().rglob("*")}, "--search-epochs 3 --epochs 5".split()
    out = said(capsys, *more, *"--folds 1,2 --seeds 2 --dry-run".split())
    assert {path for path in Path().rglob("*") if "cache" not in path.parts} <= before
    assert str(place("mine.csv", *more)) in out and " 44 windows of 0.25 s" in out
    assert re.search(r"fold 1 +train a, d \(20\), validation c \(10\), test b \(10\)\n", out)
    poisoned = said(capsys, "--model", "cnn", "--dry-run", "--poison", "0.5")
    assert "train a, b, d (24), validation c (10), test b (6)" in poisoned
    # Two seeds, two folds: 22 windows, 6 batches of four; of a half's 11 or 10, three.
    total, steps = 0.0, {"alpha": 4 * 2 * 3, "weight": 4 * 3 * 3, "training": 4 * 5 * 6}
    for kind, n in steps.items():
        total += n * float(re.search(rf"{kind} step: {n:,} of (\S+) s, \S+ GB\n", out)[1])
    assert total == pytest.approx(float(re.search(r"in all +(\S+) s", out)[1]), rel=0.02, abs=0.7)
    assert " windows of 6 frames" in said(capsys, *OWN, "--dry-run", "--folds", "0")
    assert " 0 s (0.0 h)" in said(capsys, *TWO_FOLDS, "one", "--dry-run")  # all is there

@pytest.mark.parametrize("name, others", [
    ("emodarts", ""), ("features", "numpy scipy torchaudio"),
    ("train", "emodarts features numpy scipy torchaudio")])
def test_imports(name, others):
    lines = re.findall(r"(?m)^(?:import|from) (\w+)", (HERE / f"{name}.py").read_text())
    assert {*lines} - sys.stdlib_module_names == {"torch", *others.split()}

def test_readmes_commands_and_example_are_those_that_run():
    readme, script = (HERE / "README.md").read_text(), (HERE / ".ci/run").read_text()
    run, test = re.findall(r"^pip install .*$", readme, re.MULTILINE)
    assert re.findall(r"^(pip .*) \|\| exit 1$", script, re.MULTILINE) == [test, run]
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], there := {})  # our own file
    assert isinstance(there["genotype"], Genotype)
    code = re.search(r"\n\n(    import .*?)\n\n\S", emodarts.__doc__, re.DOTALL)[1]
    exec("if True:\n" + code.replace("range(3)", "range(1)"), there)
    assert there["net"](there["x"]).shape == (32, 4)
