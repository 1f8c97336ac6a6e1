"""Tests are oracles: each compares with something independent (an exact gradient, a count from the literature, another
formulation, a second run) and fails when the code is wrong.

    python -m pytest test_emodarts.py
"""

import ast
import csv
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import signal
import statistics
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F
import torchaudio
from scipy.io import wavfile
from torch import nn

import emodarts
import features
import train
from emodarts import CNN_OPS, SEQ_OPS, SEQ_SPACES, Architect, Genotype, MixedOp, Network, derive
from features import CORPORA, InputError, Listing, Settings, Utterance, folds, load, read_corpus

HERE = Path(__file__).parent
SMALL = dict(channels=4, cnn_cells=3, seq_cells=1, nodes=2, stem_stride=2)


def batch(n, f=24, t=32, dtype=torch.float32):
    return torch.randn(n, 1, f, t, dtype=dtype), torch.arange(n) % 4


def random_genotype(nodes=2, kinds=("normal", "reduce", "seq")):
    """Drawn uniformly from the space, `none` excepted."""

    def draw(options):
        return options[torch.randint(len(options), ()).item()]

    def cell(ops):
        ops = [op for op in ops if op != "none"]
        return [[(draw(ops), j) for j in sorted(torch.randperm(i)[:2].tolist())] for i in range(2, nodes + 2)]

    return Genotype(**{kind: cell(SEQ_OPS if kind == "seq" else CNN_OPS) for kind in kinds})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Operations and sizes


@pytest.mark.parametrize("space, count", [("lstm", 74_319_852), ("rnn", 18_839_532)])
def test_paper_scale_has_the_published_number_of_weights(space, count):
    with torch.device("meta"):
        net = Network(seq_space=space)
    assert sum(p.numel() for p in net.cnn.parameters()) == 345_312
    assert sum(p.numel() for p in net.weights()) == count


def test_names_and_spaces():
    assert len(CNN_OPS) == 8 and len(SEQ_OPS) == 14
    assert {name: len(ops) for name, ops in SEQ_SPACES.items()} == {"all": 14, "lstm": 6, "rnn": 6, "lstm_att": 4, "rnn_att": 4}
    assert all({"none", "skip_connect"} <= set(ops) <= set(SEQ_OPS) for ops in SEQ_SPACES.values())


def test_parameters_are_split_without_overlap_and_alphas_are_saved():
    net = Network(**SMALL)
    w, alphas = {id(p) for p in net.weights()}, {id(p) for p in net.alphas()}
    assert len(alphas) == 3 and not w & alphas and w | alphas == {id(p) for p in net.parameters()}
    assert {"alpha.normal", "alpha.reduce", "alpha.seq"} <= set(net.state_dict())
    assert not Network(**SMALL, genotype=random_genotype()).alphas()


@pytest.mark.parametrize("name", CNN_OPS)
@pytest.mark.parametrize("size", [(7, 9), (8, 6), (1, 5), (1, 1)])
def test_cnn_operations_agree_in_size(name, size):
    for stride in (1, 2):
        out = CNN_OPS[name](4, stride, False).eval()(torch.randn(3, 4, *size))
        assert out.shape == (3, 4, *(-(-s // stride) for s in size))


@pytest.mark.parametrize("cnn_cells", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("seq_cells, nodes, channels, f, t", [(0, 1, 2, 13, 37), (1, 3, 3, 40, 9), (2, 1, 4, 1, 5), (3, 2, 1, 33, 8)])
def test_free_sizes(cnn_cells, seq_cells, nodes, channels, f, t):
    sizes = dict(classes=7, channels=channels, cnn_cells=cnn_cells, seq_cells=seq_cells, nodes=nodes, seq_space="rnn")
    net = Network(**sizes)
    x, _ = batch(2, f, t)
    assert net(x).shape == (2, 7)
    genotype = derive(net)
    assert (genotype.seq is None) == (seq_cells == 0) and (genotype.normal is None) == (cnn_cells < 3)
    assert Network(**sizes, genotype=genotype)(x).shape == (2, 7)


def test_sizes_that_cannot_be_are_refused():
    for name in ("channels", "cnn_cells", "nodes", "stem_stride", "bands"):
        with pytest.raises(ValueError, match=name):
            Network(**{name: 0})
    with pytest.raises(ValueError, match="lstm, rnn, lstm_att, rnn_att"):
        Network(seq_space="gru")
    with pytest.raises(ValueError, match="bands is 3, and the map behind the CNN cells has 2 rows"):
        Network(**SMALL, bands=3, seq_space="rnn")(batch(2, 16, 16)[0])


def test_bands_are_means_of_parts_of_the_frequency_axis():
    """Against the map behind the last cells, averaged by numpy; 5 rows in two bands are 3 and 2."""
    maps = []
    net = Network(**SMALL, bands=2, genotype=random_genotype()).eval()
    for cell in net.cnn:
        cell.register_forward_hook(lambda module, inputs, output: maps.append(output.detach().numpy()))
    seen = net.frames(batch(2, 39, 24)[0])
    assert maps[-1].shape[2] == 5 and seen[0].shape == seen[1].shape == (2, maps[-1].shape[3], 2 * maps[-1].shape[1])
    expected = np.concatenate([maps[-1][:, :, :3].mean(2), maps[-1][:, :, 3:].mean(2)], 1).transpose(0, 2, 1)
    np.testing.assert_allclose(seen[1].detach().numpy(), expected, atol=1e-6)
    assert net(batch(2, 39, 24)[0]).shape == (2, 4)




# ---------------------------------------------------------------------------------------------------------------------
# What the published code gets wrong: utterances must not see each other, frames must


def used(module, *inputs):
    """In evaluation mode, with running statistics that are not the initial ones."""
    with torch.no_grad():
        for _ in range(3):
            module.train()(*inputs)
    return module.eval()


def assert_independent(f, x):
    with torch.no_grad():
        alone = torch.cat([f(x[k : k + 1]) for k in range(len(x))])
        for n in (1, 2, 16, 17):
            torch.testing.assert_close(f(x[:n]), alone[:n], rtol=0, atol=1e-5)
        order = torch.randperm(len(x))
        torch.testing.assert_close(f(x[order]), alone[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CNN_OPS)
@pytest.mark.parametrize("stride", [1, 2])
def test_cnn_operations_do_not_mix_utterances(name, stride):
    x = torch.randn(17, 4, 9, 8)
    assert_independent(used(CNN_OPS[name](4, stride, True), x), x)


@pytest.mark.parametrize("name", SEQ_OPS)
def test_seq_operations_do_not_mix_utterances(name):
    x = torch.randn(17, 11, 6)
    assert_independent(used(SEQ_OPS[name](6), x), x)


@pytest.mark.parametrize("derived", [False, True])
def test_networks_do_not_mix_utterances(derived):
    x, _ = batch(17)
    net = Network(**SMALL, genotype=random_genotype() if derived else None)
    assert_independent(used(net, x), x)


@pytest.mark.parametrize("name", [name for name in SEQ_OPS if name != "none"])
def test_order_of_frames_counts_exactly_when_an_operation_is_recurrent(name):
    genotype = Genotype(**{**vars(random_genotype()), "seq": [[(name, 0), ("skip_connect", 1)], [("skip_connect", 0), ("skip_connect", 2)]]})
    net = Network(**SMALL, genotype=genotype).double().eval()
    with torch.no_grad():
        s0, s1 = net.frames(batch(3, dtype=torch.float64)[0])
        assert s0.shape == s1.shape == (3, 4, 32)  # 32 frames, halved by the stem and by two reductions; 4 * 4 channels * 2 nodes
        order = torch.tensor([2, 0, 3, 1])
        change = (net.classify(s0[:, order], s1[:, order]) - net.classify(s0, s1)).abs().max()
    assert change < 1e-12 if name == "skip_connect" else change > 1e-6


def test_time_axis_of_the_input_is_the_time_axis_of_the_sequence():
    net = Network(channels=2, cnn_cells=1, seq_cells=1, nodes=1, seq_space="rnn").eval()
    x, _ = batch(1, 16, 64)
    changed = x.clone()
    changed[..., 60:] += 1  # the last frames change, the first ones of the sequence do not
    with torch.no_grad():
        (_, before), (_, after) = net.frames(x), net.frames(changed)
    differs = (before != after).any(dim=2)[0]
    assert before.shape[1] == 32 and differs[-1] and not differs[:16].any()


# ---------------------------------------------------------------------------------------------------------------------
# Mixed operation, genotype, derivation


def test_mixed_operation_is_the_weighted_sum():
    ops = {name: SEQ_OPS[name](5) for name in SEQ_OPS}
    x, alpha = torch.randn(2, 7, 5), torch.randn(len(ops))
    share = torch.exp(alpha) / torch.exp(alpha).sum()
    expected = torch.stack([p * op(x) for p, op in zip(share, ops.values())]).sum(0)
    torch.testing.assert_close(MixedOp(ops)(x, alpha.softmax(0)), expected)


def test_mixed_operation_works_where_it_is_copied_to():
    there = {"nn": nn, "__name__": "elsewhere"}
    exec(inspect.getsource(MixedOp), there)  # nothing else of the file
    ops, x = {"none": nn.Identity(), "linear": nn.Linear(3, 3), "same": nn.Identity()}, torch.randn(2, 3)
    y = there["MixedOp"](ops)(x, torch.tensor([0.5, 0.2, 0.3]))
    torch.testing.assert_close(y, 0.2 * ops["linear"](x) + 0.3 * x)


@pytest.mark.parametrize("training", [False, True])
def test_supernet_with_one_hot_alphas_is_the_derived_network(training):
    sizes = dict(SMALL, cnn_cells=4, seq_cells=2, nodes=3, dropout=0.0)
    genotype = random_genotype(nodes=3)
    supernet, x = Network(**sizes).double(), batch(5, dtype=torch.float64)[0]
    used(supernet, x)
    with torch.no_grad():
        for kind, alpha in supernet.alpha.items():
            names = list(supernet.candidates[kind])
            chosen = {(i, j): op for i, node in enumerate(getattr(genotype, kind), 2) for op, j in node}
            edges = [(i, j) for i in range(2, 5) for j in range(i)]
            assert len(edges) == len(alpha)
            for row, edge in zip(alpha, edges):  # exp(-1000) is 0: the softmax is exactly one-hot
                row.fill_(0.0)[names.index(chosen.get(edge, "none"))] = 1000.0
    net = Network(**sizes, genotype=genotype).double()
    there = supernet.state_dict()
    missing = set(net.state_dict()) - set(there)
    assert all(name.split(".")[-1] in ("weight", "bias") and there[name.rsplit(".", 1)[0] + ".running_mean"].dim() == 1 for name in missing)
    net.load_state_dict({name: there[name] for name in net.state_dict() if name in there}, strict=False)  # BN scale 1, shift 0
    torch.testing.assert_close(net.train(training)(x), supernet.train(training)(x), rtol=1e-10, atol=1e-10)


def test_derivation_ranks_edges_by_softmax_weight():
    net = Network(channels=2, cnn_cells=1, seq_cells=1, nodes=2, seq_space="lstm_att")  # none, skip, lstm_att_1, lstm_att_2
    with torch.no_grad():
        net.alpha["seq"].copy_(
            torch.tensor(
                [
                    [0.0, 1.0, 0.0, 0.0],  # 0 -> 2: skip
                    [0.0, 0.0, 0.0, 2.0],  # 1 -> 2: lstm_att_2
                    [5.0, 6.0, 5.9, 5.8],  # 0 -> 3: the largest raw alpha, and the smallest share: 0.33
                    [9.0, 2.0, 0.0, 0.0],  # 1 -> 3: `none` takes nearly all, does not count; skip has 0.0009
                    [0.0, 0.0, 1.5, 0.0],  # 2 -> 3: 0.60
                ]
            )
        )
    assert derive(net).seq == ((("skip_connect", 0), ("lstm_att_2", 1)), (("skip_connect", 0), ("lstm_att_1", 2)))
    with torch.no_grad():
        net.alpha["seq"][3] = torch.tensor([0.0, 3.0, 0.0, 0.0])  # raw 3.0 < 6.0, share 0.87 > 0.33
    assert derive(net).seq[1] == (("skip_connect", 1), ("lstm_att_1", 2))  # by raw alpha it would be 0 and 1


def test_genotype_round_trip():
    for kinds in (("normal", "reduce", "seq"), ("reduce",), ("reduce", "seq")):
        genotype = random_genotype(3, kinds)
        assert Genotype.from_json(genotype.to_json()) == genotype
        assert set(json.loads(genotype.to_json())) == set(kinds)


NODE = [["skip_connect", 0], ["skip_connect", 1]]


@pytest.mark.parametrize(
    "text, says",
    [
        ("__import__('os')", "not a JSON text"),
        ("[" * 100_000, "not a JSON text"),
        ("[1, 2]", "expected an object"),
        (json.dumps({"nromal": [NODE]}), "unknown cell 'nromal'; known: normal, reduce, seq"),
        (json.dumps({"seq": []}), "at least one node"),
        (json.dumps({"seq": [[]]}), "seq cell, node 2: expected a list of at least one edge"),
        (json.dumps({"seq": [["lstm_1", 0]]}), r"expected an edge \[operation, predecessor\], found 'lstm_1'"),
        (json.dumps({"seq": [[["lstm_9", 0]]]}), "node 2: unknown operation 'lstm_9'; known: none, skip_connect, lstm_1"),
        (json.dumps({"normal": [[["lstm_1", 0]]]}), "normal cell, node 2: unknown operation 'lstm_1'; known: none, max_pool_3x3"),
        (json.dumps({"normal": [[[["x"], 0]]]}), "unknown operation"),
        (json.dumps({"reduce": [NODE, [["skip_connect", 3]]]}), "reduce cell, node 3: predecessor 3 does not exist; known: 0, 1, 2"),
        (json.dumps({"reduce": [[["skip_connect", -1]]]}), "predecessor -1 does not exist"),
        (json.dumps({"reduce": [[["skip_connect", True]]]}), "predecessor True does not exist"),
        (json.dumps({"reduce": [[["skip_connect", 0], ["max_pool_3x3", 0]]]}), "same predecessor"),
    ],
)
def test_broken_genotypes_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        Genotype.from_json(text)


def test_genotype_without_a_needed_cell_is_refused():
    with pytest.raises(ValueError, match="no seq cell.*3 CNN and 1 SeqNN.*it has: normal, reduce"):
        Network(**SMALL, genotype=random_genotype(2, ("normal", "reduce")))
    Network(**{**SMALL, "seq_cells": 0}, genotype=random_genotype(2, ("normal", "reduce")))


# ---------------------------------------------------------------------------------------------------------------------
# The architect


def smooth(net):
    """Without the kinks of ReLU and max pooling, where a finite difference says little."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, child.stride, 1))
    return net


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def second_order_terms(net, architect, val, train, xi):
    """-> (the architect's second-order term, the exact one, eps), without the part dL_val(w')/dalpha that both share."""
    names = [name for name, _ in net.named_parameters() if not name.startswith("alpha.")]
    torch.manual_seed(1)
    masks = int(torch.randint(2**62, ()))  # the architect's first draw
    with torch.random.fork_rng():
        torch.manual_seed(masks)
        g = torch.autograd.grad(architect.loss(net(train[0]), train[1]), net.weights(), create_graph=True)
    unrolled = [w - xi * g_w for w, g_w in zip(net.weights(), g)]  # w', a function of alpha
    val_loss = architect.loss(torch.func.functional_call(net, dict(zip(names, unrolled)), (val[0],)), val[1])
    exact_d_alpha = torch.autograd.grad(val_loss, net.alphas(), retain_graph=True)
    v = torch.autograd.grad(val_loss, unrolled, retain_graph=True)
    # The exact term is the part of dL_val/dalpha that flows through w': a vector-Jacobian product.
    exact = flat(torch.autograd.grad(unrolled, net.alphas(), v))
    torch.manual_seed(1)
    _, total = architect.second_order(val, train, xi)
    first_part = flat(exact_d_alpha) - exact
    return flat(total) - first_part, exact, 0.01 / flat(v).norm()


def test_second_order_term_is_the_exact_one():
    net = smooth(Network(channels=2, cnn_cells=3, seq_cells=1, nodes=1)).double().train()
    assert net.dropout.p == 0.3
    with torch.no_grad():
        for alpha in net.alphas():
            alpha.normal_()
    architect = Architect(net, F.cross_entropy, order=2)
    val, train_batch = batch(6, 12, 16, torch.float64), batch(6, 12, 16, torch.float64)

    def error(term, exact):
        return ((term - exact).norm() / exact.norm()).item()

    with emodarts.without_statistics(net):
        term, exact, eps = second_order_terms(net, architect, val, train_batch, xi=0.1)
    assert error(term, exact) < 0.01
    assert error(term * (2 * eps) / 2.0 * eps, exact) > 0.9  # the published code's `/ 2. * eps`

    fixed = architect.gradient
    architect.gradient = lambda batch, parameters, masks=None: fixed(batch, parameters)  # masks drawn afresh each time
    with emodarts.without_statistics(net):
        term, exact, _ = second_order_terms(net, architect, val, train_batch, xi=0.1)
    assert error(term, exact) > 0.5


def test_first_order_is_the_plain_gradient():
    net = Network(**SMALL).train()
    val, twin = batch(4), Network(**SMALL).train()
    twin.load_state_dict(net.state_dict())
    torch.manual_seed(2)
    F.cross_entropy(twin(val[0]), val[1]).backward()
    torch.manual_seed(2)
    _, gradient = Architect(net, F.cross_entropy).first_order(val)
    torch.testing.assert_close(flat(gradient), flat([alpha.grad for alpha in twin.alphas()]))
    assert all(w.requires_grad and w.grad is None for w in net.weights())


@pytest.mark.parametrize("order", [1, 2])
def test_an_alpha_step_leaves_weights_and_statistics_alone(order):
    net = used(Network(**SMALL), batch(4)[0]).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    architect = Architect(net, F.cross_entropy, order=order)
    architect.step(batch(4), batch(4), xi=0.1)
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]) != name.startswith("alpha."), name
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("derived", [False, True])
def test_recomputation_changes_no_bit(derived):
    genotype, gradients, states, (x, target) = random_genotype() if derived else None, [], [], batch(4)
    for recompute in (False, True):
        torch.manual_seed(3)
        net = Network(**SMALL, recompute=recompute, genotype=genotype).train()
        net.drop_path = 0.2
        for _ in range(2):
            net.zero_grad()
            F.cross_entropy(net(x), target).backward()
        gradients.append([p.grad for p in net.parameters()])
        if not derived:
            architect = Architect(net, F.cross_entropy)
            gradients[-1] += [*architect.first_order((x, target))[1], *architect.second_order((x, target), (x, target), 0.1)[1]]
        states.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and all(torch.equal(states[0][name], t) for name, t in states[1].items())
    assert int(states[1]["stem.1.num_batches_tracked"]) == 2
    assert {int(t) for name, t in states[1].items() if name.endswith("num_batches_tracked")} == {2}


def plain_operation(op, x):
    """What CNN operations are by definition: a dilated convolution with stride 2 as such, the reducing skip connection as
    two 1x1 convolutions with stride 2."""
    modules = [m for m in op if not isinstance(m, emodarts.EvenGrid)] if isinstance(op, nn.Sequential) else [op]
    for m in modules:
        if isinstance(m, emodarts.BothGrids):
            even, odd = (c[:, :, None, None] for c in op[2].weight[:, :, 0, 0].chunk(2))
            padded = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
            x = torch.cat([F.conv2d(x, even, stride=2), F.conv2d(padded, odd, stride=2)], dim=1)
        elif isinstance(m, nn.Conv2d) and len(modules) < len(op):
            k = m.kernel_size[0]
            x = F.conv2d(x, m.weight, stride=2, padding=2 * (k // 2), dilation=2, groups=m.groups) if k > 1 else m(x)
        elif not (isinstance(m, nn.Conv2d) and m.groups == 2 and isinstance(op[1], emodarts.BothGrids)):
            x = m(x)
    return x


@pytest.mark.parametrize("kind, size", [("normal", (12, 9)), ("reduce", (12, 9)), ("reduce", (7, 16))])
def test_a_cell_is_its_plain_definition(kind, size):
    """Node i is the sum over j < i of the softmax-weighted operations on state j, each edge by itself: outputs, gradients."""
    nodes = 3
    wiring = [[(j, tuple(CNN_OPS)) for j in range(i)] for i in range(2, nodes + 2)]
    cell = emodarts.CNNCell(kind, wiring, 6, 6, 4, False, affine=False).double().train()
    s0, s1 = (torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(sum(range(2, nodes + 2)), len(CNN_OPS), dtype=torch.float64).softmax(1).requires_grad_()
    leaves = [s0, s1, weight, *cell.parameters()]

    def plain():
        states, rows = [before(s) for before, s in zip(cell.before, (s0, s1))], iter(weight)
        for i in range(2, nodes + 2):
            edges = [(states[j], next(rows), cell.edges[f"{j}_{i}"].ops.values()) for j in range(i)]
            states.append(sum(w * plain_operation(op, x) for x, row, ops in edges for w, op in zip(row, ops)))
        return torch.cat(states[2:], dim=1)

    ours, theirs = cell(s0, s1, weight), plain()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * direction).sum(), leaves) for y in (ours, theirs)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_edges_share_is_computed_once_and_counted_once():
    net, calls = Network(**SMALL), []
    for m in net.modules():
        if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)):
            m.register_forward_hook(lambda *_: calls.append(1))
    net.train()(batch(4)[0])
    assert len(calls) == 3 * 3 * 2  # cells, states with edges, kinds of pooling
    assert {int(t) for name, t in net.state_dict().items() if name.endswith("num_batches_tracked")} == {1}


def test_mixed_precision_keeps_weights_alphas_and_logits_in_float32():
    net = Network(**SMALL, dropout=0.0).train()
    x, target = batch(8)
    exact = net(x)
    loss, gradient = Architect(net, F.cross_entropy).first_order((x, target))
    net.amp = True
    rough = net(x)
    _, roughly = Architect(net, F.cross_entropy).first_order((x, target))
    assert rough.dtype == torch.float32 and all(g.dtype == torch.float32 for g in roughly)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert 1e-5 < (rough - exact).abs().max() < 0.1  # bfloat16 has 8 bits: it was used, and it is no other function
    assert F.cosine_similarity(flat(gradient), flat(roughly), dim=0) > 0.9


def test_random_genotypes_are_uniform():
    net, counts = Network(channels=2, cnn_cells=1, seq_cells=1, nodes=2, seq_space="rnn_att"), Counter()
    for _ in range(600):
        genotype = emodarts.random_genotype(net)
        counts.update(op for node in genotype.seq for op, _ in node)
        counts.update([tuple(j for _, j in genotype.seq[1])])
    assert set(counts) == {"skip_connect", "rnn_att_1", "rnn_att_2", (0, 1), (0, 2), (1, 2)}
    for name, n in counts.items():  # expected: 2,400 edges over 3 operations, 600 nodes over 3 pairs; 5 standard deviations
        expected = 200 if isinstance(name, tuple) else 800
        assert abs(n - expected) < 5 * math.sqrt(expected * 2 / 3)


def test_expected_parameters_and_the_penalty():
    genotype = random_genotype()
    net = Network(**SMALL)
    uniform = statistics.mean  # of a uniform softmax: the mean over the operations, summed over the edges
    with torch.no_grad():
        for alpha in net.alpha.values():
            alpha.zero_()
    by_hand = sum(
        uniform([sum(p.numel() for p in op.parameters()) for op in edge.ops.values()]) for cell in (*net.cnn, *net.seq) for edge in cell.edges.values()
    )
    assert emodarts.expected_parameters(net).item() == pytest.approx(by_hand)
    # Nothing but the penalty: the alphas move towards fewer weights, in both orders.
    for order in (1, 2):
        net = Network(**SMALL)
        architect = Architect(net, lambda logits, target: 0 * logits.sum(), order=order, lr=0.1, penalty=lambda: emodarts.expected_parameters(net) / 1e6)
        before = emodarts.expected_parameters(net).item()
        for _ in range(3):
            architect.step(batch(4), batch(4), xi=0.01)
        assert emodarts.expected_parameters(net).item() < 0.95 * before


@pytest.mark.parametrize("searched, fixed", [("cnn", "seq"), ("seq", "normal reduce")])
def test_an_ablation_searches_the_other_cells_only(searched, fixed):
    net = train.network(train.parse(["--search", searched, "--channels", "2", "--cnn-cells", "3"]), 4)
    assert set(net.alpha) == {"normal", "reduce", "seq"} - set(fixed.split())
    given = train.FIXED[searched](2)
    for genotype in (derive(net), emodarts.random_genotype(net)):
        for kind in ("normal", "reduce", "seq"):
            assert (getattr(genotype, kind) == getattr(given, kind)) == (kind in fixed)
    net.train()(batch(4)[0]).sum().backward()
    assert all(p.grad is not None for p in net.weights())


def test_an_alpha_step_that_fails_leaves_the_weights_alone():
    net = Network(**SMALL).train()
    before = [w.clone() for w in net.weights()]
    calls = []

    def loss(logits, target):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return F.cross_entropy(logits, target)

    with pytest.raises(RuntimeError):
        Architect(net, loss, order=2).step(batch(4), batch(4), xi=0.1)
    assert all(torch.equal(w, b) for w, b in zip(net.weights(), before))


# ---------------------------------------------------------------------------------------------------------------------
# Corpora, folds, features


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def tone(path, seconds=0.3, rate=16000, frequency=440):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, (16000 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.int16))
    return path


def labels(listing):
    return {u.path.name: u.label for u in listing.utterances}


def speakers(listing, fold):
    """(train, validation, test) as sets of speakers."""
    return tuple({listing.utterances[i].speaker for i in side} for side in (fold.train, fold.validation, fold.test))


@pytest.mark.parametrize("depth", ["", "wav", "a/b/wav"])
def test_emodb(tmp_path, depth):
    root = tmp_path / depth
    names = [f"{s}a01{letter}a.wav" for s in ("03", "08", "10") for letter in "WFNTAEL"]
    touch(*(root / name for name in names), root / "._03a01Wa.wav", root / ".DS_Store", root / "03a02Wb.WAV", root / "notes.wav")
    four = read_corpus("emodb", tmp_path)
    assert labels(four)["03a01Wa.wav"] == "angry" and labels(four)["03a02Wb.WAV"] == "angry"
    assert Counter(u.label for u in four.utterances) == {"angry": 4, "happy": 3, "neutral": 3, "sad": 3}
    assert [speakers(four, fold) for fold in folds(four)] == [({"10"}, {"08"}, {"03"}), ({"03"}, {"10"}, {"08"}), ({"08"}, {"03"}, {"10"})]
    everything = read_corpus("emodb", tmp_path, classes="all")
    assert everything.classes == ("angry", "boredom", "disgust", "fear", "happy", "neutral", "sad")
    assert labels(everything)["03a01Aa.wav"] == "fear" and len(everything.utterances) == 22


def test_ravdess(tmp_path):
    for copy in ("audio_speech_actors_01-24", "."):  # everything is there twice
        for actor, emotion in itertools.product(range(1, 25), range(1, 9)):
            touch(tmp_path / "RAVDESS" / copy / f"Actor_{actor:02}" / f"03-01-{emotion:02}-01-02-01-{actor:02}.wav")
    touch(tmp_path / "RAVDESS" / "Actor_01" / "03-02-05-01-01-01-01.wav")  # a song
    four = read_corpus("ravdess", tmp_path)
    assert Counter(u.label for u in four.utterances) == {"angry": 24, "happy": 24, "neutral": 24, "sad": 24}
    assert labels(four)["03-01-05-01-02-01-18.wav"] == "angry" and labels(four)["03-01-01-01-02-01-18.wav"] == "neutral"
    made = folds(four)
    assert len(made) == 6 and speakers(four, made[0])[1:] == ({"05", "06", "07", "08"}, {"01", "02", "03", "04"})
    assert speakers(four, made[5])[1:] == ({"01", "02", "03", "04"}, {"21", "22", "23", "24"})
    assert read_corpus("ravdess", tmp_path, classes="all").classes == (
        "angry", "calm", "disgust", "fear", "happy", "neutral", "sad", "surprise")  # fmt: skip


def test_crema_d(tmp_path):
    codes = dict(ANG="angry", DIS="disgust", FEA="fear", HAP="happy", NEU="neutral", SAD="sad")
    for actor, code in itertools.product(range(1001, 1092), codes):
        touch(tmp_path / "AudioWAV" / f"{actor}_DFA_{code}_XX.wav")
    touch(tmp_path / "AudioWAV" / "1040_ITH_SAD_X.wav")
    listing = read_corpus("crema-d", tmp_path, classes="all")
    assert labels(listing) == {p.name: codes[p.name[9:12]] for p in (tmp_path / "AudioWAV").iterdir()}
    tested = [speakers(listing, fold)[2] for fold in folds(listing)]
    assert [(min(s), max(s), len(s)) for s in tested] == [
        ("1001", "1018", 18), ("1019", "1036", 18), ("1037", "1054", 18), ("1055", "1072", 18), ("1073", "1091", 19)]  # fmt: skip


def iemocap(root):
    codes = ("ang", "hap", "exc", "neu", "sad", "fru", "xxx", "oth")
    for s in range(1, 6):
        session = root / f"Session{s}"
        for dialog in (f"Ses0{s}F_impro04", f"Ses0{s}M_script01_1b"):
            text = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            for (n, code), who in itertools.product(enumerate(codes), "FM"):
                turn = f"{dialog}_{who}{n:03}"
                touch(session / "sentences/wav" / dialog / f"{turn}.wav", session / "sentences/wav" / dialog / f"._{turn}.wav")
                text += [f"[6.2901 - 8.2357]\t{turn}\t{code}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()", "A-E3:\tval 3; \xe9", ""]
            touch(session / "dialog/wav" / f"{dialog}.wav", session / "dialog/EmoEvaluation/Categorical" / f"{dialog}_e1_cat.txt")
            label_file = session / "dialog/EmoEvaluation" / f"{dialog}.txt"
            label_file.write_bytes("\r\n".join(text).encode("latin-1"))
            (label_file.parent / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07")
            touch(session / "dialog/transcriptions" / f"{dialog}.txt")  # the same name as the label file's


@pytest.mark.parametrize("depth", ["", "IEMOCAP_full_release", "IEMOCAP_full_release_withoutVideos/IEMOCAP_full_release"])
def test_iemocap(tmp_path, depth):
    iemocap(tmp_path / depth)
    standard = read_corpus("iemocap", tmp_path)
    assert Counter(u.label for u in standard.utterances) == {"angry": 20, "happy": 40, "neutral": 20, "sad": 20}
    speaker = {u.path.stem: u.speaker for u in standard.utterances}
    assert speaker["Ses01F_impro04_M000"] == "1M" and speaker["Ses05M_script01_1b_F003"] == "5F"  # the last letter, not the first
    assert [speakers(standard, fold)[1:] for fold in folds(standard)] == [
        ({f"{s % 5 + 1}F", f"{s % 5 + 1}M"}, {f"{s}F", f"{s}M"}) for s in range(1, 6)]  # fmt: skip
    assert "frustrated" in read_corpus("iemocap", tmp_path, classes="all").classes

    paper = read_corpus("iemocap", tmp_path, protocol="paper")
    assert Counter(u.label for u in paper.utterances) == dict.fromkeys(features.CLASSES, 10)  # exc and scripts dropped
    assert all("_impro" in u.path.name for u in paper.utterances)
    pairs = [{"1M", "2F"}, {"2M", "3F"}, {"3M", "4F"}, {"4M", "5F"}, {"5M", "1F"}]
    assert [speakers(paper, fold)[2] for fold in folds(paper)] == pairs
    assert [speakers(paper, fold)[1] for fold in folds(paper)] == pairs[1:] + pairs[:1]


def test_labels_without_recordings_are_counted(tmp_path, capsys):
    iemocap(tmp_path)
    (tmp_path / "Session3/sentences/wav/Ses03F_impro04/Ses03F_impro04_F000.wav").unlink()
    assert len(read_corpus("iemocap", tmp_path).utterances) == 99
    assert "1 of 160 labels have no recording" in capsys.readouterr().err
    with pytest.raises(InputError, match="1 of 160"):
        read_corpus("iemocap", tmp_path, strict=True)
    for path in tmp_path.rglob("*.wav"):
        path.unlink()
    with pytest.raises(InputError, match="160 labels, and not one of their recordings"):
        read_corpus("iemocap", tmp_path)


def msp_improv(root, label_file):
    text, wavs = [], 0
    for s, who, letter, condition in itertools.product(range(1, 7), "FM", "AHNS", "RST"):
        stem = f"IMPROV-S01{letter}-{who}{s:02}-{condition}-FM01"
        touch(root / f"session{s}/S01{letter}/{condition}/MSP-{stem}.wav", root / f"session{s}/S01{letter}/{condition}/MSP-{stem}.avi")
        rated = {"T": "X", "S": "O", "R": "N"}[condition] if letter == "S" else letter
        text += [
            f"UTD-{stem}.avi; {rated}; A:3.333333; V:NaN; D:3.000000 ; N:3.666667;",
            "WORKER00000001; Angry; Angry,Frustrated; A:3.000000; V:2.000000; D:3.000000; N:4.000000;",
            "",
        ]
        wavs += 1
    label_file.parent.mkdir(parents=True, exist_ok=True)
    label_file.write_bytes("\r\n".join(text).encode())
    return wavs


@pytest.mark.parametrize("name", ["Evalution.txt", "Evaluation.txt", "labels/evaluation.TXT", "Labels/Evalution.txt"])
def test_msp_improv(tmp_path, name):
    root = tmp_path / "a/MSP-IMPROV"
    wavs = msp_improv(root / "Audio", root / name)
    standard = read_corpus("msp-improv", tmp_path)
    assert Counter(u.label for u in standard.utterances) == {"angry": 36, "happy": 36, "neutral": 48}  # no sad: they were rated otherwise
    assert standard.classes == features.CLASSES and wavs == 144
    assert all(u.path.suffix == ".wav" and u.speaker == u.path.stem[16:19] for u in standard.utterances)
    assert [speakers(standard, fold)[2] for fold in folds(standard)] == [{f"F{s:02}", f"M{s:02}"} for s in range(1, 7)]

    paper = read_corpus("msp-improv", tmp_path, protocol="paper")
    assert Counter(u.label for u in paper.utterances) == dict.fromkeys(features.CLASSES, 12)  # the intended emotion
    assert all("-R-" in u.path.name for u in paper.utterances)
    sides = [speakers(paper, fold) for fold in folds(paper)]
    assert [(validation, test) for _, validation, test in sides] == [
        ({f"F{v:02}", f"M{v:02}"}, {f"F{t:02}", f"M{t:02}"}) for t, v in ((1, 2), (2, 3), (3, 4), (5, 6))]  # fmt: skip
    assert all(len(train) == 8 for train, _, _ in sides)


def msp_podcast(root, label_file, validation="Development", each=3):
    text = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    speakers_of = {"Train": (1, 2, "Unknown"), validation: (3,), "Test1": (4, 7, "Unknown"), "Test2": (4, 5, 6)}
    for k, (split, speaker) in enumerate((split, speaker) for split, them in speakers_of.items() for speaker in them):
        for code, n in itertools.product("AHNSUFDCOX", range(each)):
            name = f"MSP-PODCAST_{k:04}_{ord(code):02}{n:03}.wav"
            touch(root / f"part{k % 2}" / name)
            text.append(f"{name},{code},2.2,4.0,2.6,{speaker},Male,{split}")
    touch(root / "MSP-PODCAST_test3_0001.wav", root / "._MSP-PODCAST_0000_6500.wav")  # no row
    text.append("MSP-PODCAST_test3_0002.wav,N,2.2,4.0,2.6,9,Male,Test3")
    label_file.parent.mkdir(parents=True, exist_ok=True)
    label_file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(text).encode())


@pytest.mark.parametrize(
    "name, audio, validation",
    [("Labels/labels_consensus.csv", "Audios", "Development"), ("Labels/Labels_Concensus.csv", "Audio", "Validation"),
     ("labels_concensus.csv", "Audios", "Validation"), ("labels_consensus.csv", "Audio", "Development")],
)  # fmt: skip
def test_msp_podcast(tmp_path, name, audio, validation):
    root = tmp_path / "MSP-PODCAST-Publish-1.11"
    msp_podcast(root / audio, root / name, validation)
    standard = read_corpus("msp-podcast", tmp_path)
    assert Counter(u.label for u in standard.utterances) == dict.fromkeys(features.CLASSES, 30)
    test1, test2 = folds(standard)
    assert (test1.train, test1.validation) == (test2.train, test2.validation)
    assert speakers(standard, test1) == ({"1", "2", "Unknown"}, {"3"}, {"4", "7", "Unknown"})
    assert speakers(standard, test2)[2] == {"4", "5", "6"}
    store = SimpleNamespace(seconds=np.ones(120), features=np.ones(120), bad={})
    said = "\n".join(features.describe(standard, folds(standard), store))
    assert "speakers  7: 1, 2, 3, 4, 5, 6, 7\n" in said and "unknown   24 utterances" in said
    assert len(read_corpus("msp-podcast", tmp_path, classes="all").classes) == 8

    paper = read_corpus("msp-podcast", tmp_path, protocol="paper")
    assert {u.speaker for u in paper.utterances} == {"1", "2", "4", "5", "6", "7"}  # neither Unknown nor Development


def test_msp_podcast_speakers_of_two_sets_stay_in_the_test_set(tmp_path, capsys):
    msp_podcast(tmp_path / "Audio", tmp_path / "labels_consensus.csv")
    text = (tmp_path / "labels_consensus.csv").read_text()
    # Speaker 4, of both test sets, also trains; speaker 3, who validates, as well.
    (tmp_path / "labels_consensus.csv").write_text(text.replace(",1,Male,Train", ",4,Male,Train", 5).replace(",2,Male,Train", ",3,Male,Train", 6))
    listing = read_corpus("msp-podcast", tmp_path)
    left_out = sum(f",{c},2.2,4.0,2.6,{s},Male,Train" in line for line in (tmp_path / "labels_consensus.csv").read_text().splitlines() for c in "AHNS" for s in (3, 4))
    assert left_out > 5 and f"warning: msp-podcast: {left_out} utterances" in capsys.readouterr().err
    for fold in folds(listing):
        train, validation, test = (side - {"Unknown"} for side in speakers(listing, fold))
        assert not train & validation and not train & test and not validation & test and train == {"1", "2"}


def test_msp_podcast_paper_is_five_equal_groups_and_never_too_large(tmp_path, monkeypatch):
    text = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    for n in range(600):
        touch(tmp_path / "Audios" / f"MSP-PODCAST_{n:04}.wav")
        text.append(f"MSP-PODCAST_{n:04}.wav,{'AHNS'[n % 4]},1,1,1,{n % 40},Male,{('Train', 'Test1', 'Test2')[n % 40 % 3]}")
    (tmp_path / "labels_consensus.csv").write_text("\n".join(text))
    monkeypatch.setattr(features.random, "random", None)  # nothing global is drawn from
    listing = read_corpus("msp-podcast", tmp_path, protocol="paper")
    made = folds(listing)
    assert [len(fold.test) for fold in made] == [120] * 5 and [len(fold.train) for fold in made] == [360] * 5
    smaller = replace(CORPORA["msp-podcast"], paper=features.Protocol(features.paper_msp_podcast, at_most=100))
    monkeypatch.setitem(CORPORA, "msp-podcast", smaller)
    thinned = folds(listing)
    assert thinned == folds(listing)
    for whole, thin in zip(made, thinned):
        assert [len(side) for side in (thin.train, thin.validation, thin.test)] == [100] * 3
        assert set(thin.train) < set(whole.train) and set(thin.test) < set(whole.test)


def test_a_seventh_corpus_is_a_function_and_a_row(tmp_path, monkeypatch):
    def index(root):
        for path in features.below(root, r"\w_\w\.wav"):
            yield features.Utterance(path, path.stem[2], path.stem[0], group=path.stem[0])

    touch(*(tmp_path / f"{speaker}_{code}.wav" for speaker in "PQR" for code in "hsx"))
    monkeypatch.setitem(CORPORA, "seventh", features.Corpus(index, "free", "files named like P_h.wav", {"h": "happy", "s": "sad"}))
    listing = read_corpus("seventh", tmp_path)
    assert len(listing.utterances) == 6 and len(folds(listing)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# One's own corpus


def own(tmp_path, header, *rows):
    for row in rows:
        tone(tmp_path / "sounds" / row.split(",")[0].removeprefix("sounds/")) if ".wav" in row else None
    path = tmp_path / "mine.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_csv_leaves_one_speaker_out(tmp_path):
    rows = [f"sounds/{s}{label}.wav,{label},{s}" for s in "abc" for label in ("zen", "awe")]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker", *rows))
    assert listing.classes == ("awe", "zen") and listing.root == tmp_path
    assert [speakers(listing, fold) for fold in folds(listing)] == [({"c"}, {"b"}, {"a"}), ({"a"}, {"c"}, {"b"}), ({"b"}, {"a"}, {"c"})]


def test_csv_of_many_speakers_has_five_folds(tmp_path):
    rows = [f"sounds/{s}_{n}.wav,{'xy'[n % 2]},{s}" for s in range(12) for n in range(s + 1)]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker", *rows))
    sizes = [len(fold.test) for fold in folds(listing)]
    assert len(sizes) == 5 and sum(sizes) == 78 and max(sizes) - min(sizes) <= 4


def test_csv_with_an_official_split(tmp_path):
    rows = [f"sounds/{s}{label}.wav,{label},{s},{split}" for s, split in zip("abc", ("train", "validation", "test")) for label in "xy"]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker,split", *rows))
    assert [speakers(listing, fold) for fold in folds(listing)] == [({"a"}, {"b"}, {"c"})]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker,split", *rows, "sounds/d.wav,x,a,test"))
    with pytest.raises(InputError, match="speaker a is in train and in test"):
        folds(listing)
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker,split", *rows[:4]))
    with pytest.raises(InputError, match="found 2 part.*: train, validation; a fold needs three"):
        folds(listing)


@pytest.mark.parametrize(
    "text, said",
    [
        ("path,label\na.wav,x\n", "no column speaker"),
        ("", "no column path, label, speaker; found nothing"),
        ("path,label,speaker\ngone.wav,x,1\n", "names 1 files that are not there: gone.wav"),
        ("path,label,speaker\ngone.wav,,1\n", "gone.wav has no label"),
        ("path,label,speaker,split\na.wav,x,1,dev\n", "unknown split 'dev' of a.wav; known: train, validation, test"),
        ("path,label,speaker\n", "has a header and no row"),
    ],
)
def test_csv_errors(tmp_path, text, said):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_corpus("csv", tmp_path / "mine.csv")
    assert said in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Counts and messages


def test_counts_are_compared(tmp_path, capsys):
    tree = [f"{n // 20 + 3:02}a{n % 20:02}{letter}a.wav" for letter, many in zip("WFNT", (127, 71, 79, 62)) for n in range(many)]
    touch(*(tmp_path / "wav" / name for name in tree))
    read_corpus("emodb", tmp_path, strict=True)  # the four-class part
    assert capsys.readouterr().err == ""
    (tmp_path / "wav" / tree[0]).unlink()
    assert len(read_corpus("emodb", tmp_path).utterances) == 338
    said = capsys.readouterr().err
    assert "found 126 angry" in said and "expected 127 angry" in said
    with pytest.raises(InputError, match="found 126 angry.*expected 127 angry"):
        read_corpus("emodb", tmp_path, strict=True)


def test_each_known_version_of_msp_podcast_fits(tmp_path, monkeypatch):
    msp_podcast(tmp_path / "Audios", tmp_path / "labels_consensus.csv")
    splits = {"train": 90, "validation": 30, "test1": 90, "test2": 90}
    versions = {"four": {k: n * 4 // 10 for k, n in splits.items()}, "any": {f"{k} of any label": n for k, n in splits.items()}}
    for version, numbers in versions.items():
        expected = {"other": {"train": 1}, version: numbers}
        monkeypatch.setitem(CORPORA, "msp-podcast", replace(CORPORA["msp-podcast"], expected=expected))
        read_corpus("msp-podcast", tmp_path, strict=True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--dataset", "iemocop"], "'iemocop'; known: smoke, emodb, ravdess, crema-d, iemocap, msp-improv, msp-podcast, csv"),
        (["--dataset", "iemocap"], "it holds strange.txt); looked for folders Session1 to Session5"),
        (["--dataset", "emodb", "--root", "nowhere"], "no such folder"),
        (["--dataset", "ravdess", "--protocol", "paper"], "these have: iemocap, msp-improv, msp-podcast"),
        (["--dataset", "emodb", "--protocol", "papers"], "known: standard, paper"),
        (["--dataset", "emodb", "--classes", "five"], "known: four, all"),
        (["--dataset", "csv"], "no file"),
        (["--workers", "0"], "expected at least 1"),
    ],
)
def test_input_errors_are_one_line(tmp_path, capsys, arguments, said):
    touch(tmp_path / "strange.txt")
    assert features.main(["--root", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


def test_index_as_json(tmp_path, capsys):
    for s, letter in itertools.product((3, 8, 9), "WT"):
        tone(tmp_path / "wav" / f"{s:02}a01{letter}a.wav")
    arguments = {"--dataset": "emodb", "--root": tmp_path, "--cache": tmp_path / "c", "--json": tmp_path / "i.json"}
    assert features.main([str(part) for pair in arguments.items() for part in pair]) == 0
    index = json.loads((tmp_path / "i.json").read_text())
    assert index["dataset"] == "emodb" and len(index["utterances"]) == 6
    assert {"path": "wav/08a01Ta.wav", "label": "sad", "speaker": "08", "fold": 1}.items() <= index["utterances"][2].items()
    assert "corpus    found 3 angry" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def riff(kind, channels, rate, bits, data, extensible=False, extra=False):
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, kind) + b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    chunks = [(b"fmt ", form), (b"data", data)]
    if extra:
        chunks = [(b"JUNK", b"\0" * 28), chunks[0], (b"LIST", b"INFOabc\0"), chunks[1], (b"LIST", b"INFO")]
    body = b"".join(name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for name, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def encode(x, kind, bits):
    if kind == 3:
        return x.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(x * 128 + 128).astype(np.uint8).tobytes()
    whole = np.round(x * 2.0 ** (bits - 1)).astype("<i8")
    return whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()  # little-endian: the lower bytes


@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("extensible, extra", [(False, False), (True, False), (False, True)])
def test_every_sample_format_is_read(tmp_path, kind, bits, extensible, extra):
    x = 0.5 * np.sin(np.arange(1601) / 20)
    (tmp_path / "a.wav").write_bytes(riff(kind, 1, 16000, bits, encode(x, kind, bits), extensible, extra))
    samples = features.read_wav(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and np.abs(samples - x).max() <= max(2.0**-bits, 1e-7)


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_channels_and_rates(tmp_path, channels, rate):
    t = np.arange(rate) / rate
    x = np.stack([k * 0.1 * np.sin(2 * np.pi * 500 * t) for k in range(channels)], axis=1)
    (tmp_path / "a.wav").write_bytes(riff(1, channels, rate, 24, encode(x.ravel(), 1, 24)))
    samples = features.read_wav(tmp_path / "a.wav")
    expected = 0.1 * (channels - 1) / 2 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)
    assert len(samples) == 16000 and np.abs(samples - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("seconds", [0.5, 8.0, 19.3])
@pytest.mark.parametrize("kind", ["mfcc", "log-mel"])
def test_features_are_torchaudios(seconds, kind):
    rng = np.random.default_rng(0)
    samples = (rng.standard_normal(int(16000 * seconds)) * 0.1).astype(np.float32)
    samples[: len(samples) // 2] *= 1e-6  # the clamp at 80 dB counts
    mel, bands = dict(n_fft=1024, hop_length=250), 128 if kind == "mfcc" else 64
    if kind == "mfcc":
        transform = torchaudio.transforms.MFCC(16000, bands, log_mels=False, melkwargs=mel | {"n_mels": 128})
    else:
        mels = torchaudio.transforms.MelSpectrogram(16000, n_mels=bands, **mel)
        transform = torch.nn.Sequential(mels, torchaudio.transforms.AmplitudeToDB(top_db=80))
    for window in features.windows(samples, Settings()):
        oracle = transform(torch.from_numpy(window))[:, :512].reshape(bands, 128, 4).amax(dim=2)
        ours = features.transform(Settings(bands, kind=kind))(torch.from_numpy(window))
        assert ours.shape == (bands, 128) and (ours - oracle).abs().max() < 1e-3


def emodb(root, **sounds):
    """An EMO-DB of twelve files, with `sounds` (name: bytes) among them."""
    for s, letter in itertools.product((3, 8, 9), "WFNT"):
        tone(root / "wav" / f"{s:02}a01{letter}a.wav", frequency=100 * s)
    for name, data in sounds.items():
        (root / "wav" / f"{name}.wav").write_bytes(data)
    return read_corpus("emodb", root)


def test_silence_and_less_than_a_frame(tmp_path):
    x = np.zeros(1600)
    zero, one = riff(1, 1, 16000, 16, encode(x, 1, 16)), riff(1, 1, 44100, 16, b"\x01\x00")
    sounds = {"03a02Wa": zero, "03a02Fa": one}
    for padding in ("repeat", "zero"):
        store = load(emodb(tmp_path, **sounds), Settings(padding=padding), tmp_path / "cache")
        assert store.features.dtype == np.float16 and np.isfinite(store.features).all() and not store.bad


def test_all_bad_files_are_named_at_once(tmp_path):
    good = riff(1, 1, 16000, 16, encode(np.zeros(1600), 1, 16))
    sounds = {
        "03a02Wa": b"",
        "03a02Fa": b"RIFF",
        "03a02Na": good[:1000],
        "03a02Ta": riff(1, 1, 16000, 16, b""),
        "08a02Wa": riff(3, 1, 16000, 32, np.array([0, np.nan], "<f4").tobytes()),
        "08a02Fa": riff(3, 1, 16000, 32, np.array([0, np.inf], "<f4").tobytes()),
        "08a02Na": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        "08a02Ta": b"some text that is no sound",
        "09a02Wa": riff(1, 0, 16000, 16, b"\0\0"),
        "09a02Fa": riff(1, 1, 0, 16, b"\0\0"),
        "09a02Na": good[:20],
    }
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav/09a02Ta.wav").symlink_to("nowhere")
    listing = emodb(tmp_path, **sounds)
    with pytest.raises(InputError) as error:
        load(listing, cache=tmp_path / "cache")
    lines = str(error.value).split("\n")
    assert lines[0].startswith("12 of 24 recordings") and "--skip-bad" in lines[0]
    said = {re.search(r"\d\da\d\d[A-Z]a", line)[0]: line for line in lines[1:]}
    assert "git-lfs" in said["08a02Na"] and "truncated" in said["03a02Na"] and said.keys() == {*sounds, "09a02Ta"}

    store = load(listing, cache=tmp_path / "cache", skip_bad=True)
    assert sorted(listing.utterances[i].path.stem for i in store.bad) == sorted([*sounds, "09a02Ta"])
    made = folds(listing, store.bad)
    assert sum(len(fold.test) for fold in made) == 12 and not {i for fold in made for i in fold.train} & set(store.bad)
    window, of = store.windows_of(made[0].train)
    assert len(window) == len(made[0].train) and len(store.features) == 12
    with pytest.raises(InputError, match="12 of 24"):  # also when the store is there
        load(listing, cache=tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# The store


def corpus_of(root, files):
    for n in range(files):
        tone(root / "wav" / f"{n % 3 + 3:02}a{n // 4:02}{'WFNT'[n % 4]}a.wav", 0.1 if n % 40 else 17, frequency=100 + n)
    return read_corpus("emodb", root)


def content(cache):
    (folder,) = Path(cache).iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_stopped_goes_on(tmp_path, monkeypatch):
    listing = corpus_of(tmp_path, 100)
    store = load(listing, cache=tmp_path / "whole")
    assert len(store.features) == 100 + 3 * 2 and store.seconds.max() == 17 and isinstance(store.features, np.memmap)

    class Stop(Exception):
        pass

    def stop(text):
        if text.startswith("features 64"):
            raise Stop

    with pytest.raises(Stop):
        load(listing, cache=tmp_path / "stopped", progress=stop)
    (part,) = (tmp_path / "stopped").iterdir()
    for name, more in (("features.npy", b"half a chunk"), ("journal", b"[[1, 0.1, nu")):  # killed while it wrote
        with open(part / name, "ab") as file:
            file.write(more)
    said = []
    load(listing, cache=tmp_path / "stopped", progress=said.append)
    assert said[0].startswith("features 96/100") and content(tmp_path / "stopped") == content(tmp_path / "whole")
    monkeypatch.setattr(features, "read_wav", None)  # a store that is there is not computed again
    assert (load(listing, cache=tmp_path / "whole").features == store.features).all()


def test_workers_that_were_killed_and_started_again_write_the_same_bytes(tmp_path):
    listing = corpus_of(tmp_path, 130)
    load(listing, cache=tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(features.__file__).parent)!r})\n"
        "import features\n"
        "if __name__ == '__main__':\n"
        "    features.POOLED = 0\n"
        "    die = lambda text: text.startswith('features 64') and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    listing = features.read_corpus('emodb', {str(tmp_path)!r})\n"
        f"    features.load(listing, cache={str(tmp_path / 'killed')!r}, workers=2, progress=die)\n"
    )
    killed = subprocess.run([sys.executable, script], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL and [path.suffix for path in (tmp_path / "killed").iterdir()] == [".part"]
    said = []
    load(listing, cache=tmp_path / "killed", progress=said.append)
    assert said[0].startswith("features 96/130") and content(tmp_path / "killed") == content(tmp_path / "whole")


def test_features_are_computed_once_for_each_setting(tmp_path, monkeypatch):
    read, reads, listing = features.read_wav, [], emodb(tmp_path)
    monkeypatch.setattr(features, "read_wav", lambda path: reads.append(path) or read(path))

    def files_read(**settings):
        reads.clear()
        load(listing, Settings(**{"coefficients": 8, "window": 1.0, **settings}), tmp_path / "cache")
        return len(reads)

    assert [files_read(), files_read()] == [12, 0]
    for other in ({"coefficients": 9}, {"window": 2.0}, {"padding": "zero"}):
        assert [files_read(**other), files_read(**other), files_read()] == [12, 0, 0], other
    tone(tmp_path / "wav" / "03a01Wa.wav", 0.4)  # a recording that was changed
    assert [files_read(), files_read()] == [12, 0]


@pytest.mark.parametrize(
    "name, data", [("store.json", b"[]"), ("store.json", b"{"), ("features.npy", b""), ("features.npy", b"\x93NUMPY garbage")]
)
def test_a_store_that_is_not_one_is_refused(tmp_path, name, data):
    listing = emodb(tmp_path)
    load(listing, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="does not hold the features of 12 utterances; delete it"):
        load(listing, cache=tmp_path / "cache")


def test_a_store_of_pickles_is_refused(tmp_path):
    listing = emodb(tmp_path)
    load(listing, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    np.save(folder / "features.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="delete it"):
        load(listing, cache=tmp_path / "cache")


def test_windows_lose_nothing():
    settings = Settings(window=1.0)
    for length in (10, 15999, 16000, 16001, 32000, 40000):
        samples = np.arange(length, dtype=np.float32)
        cut = features.windows(samples, settings)
        assert cut.shape[1] == 16000 and set(cut.ravel()) == set(samples)
        assert len(cut) == max(1, -(-length // 16000)) and (length < 16000 or cut[-1, -1] == length - 1)
        assert length > 16000 or np.array_equal(cut[0, :length], samples)
    short = features.windows(np.ones(10, np.float32), Settings(window=1.0, padding="zero"))
    assert short.shape == (1, 16000) and short.sum() == 10


def test_mfcc_against_its_definition():
    """Power spectrum, triangular mel bands, decibels within 80 of the loudest, orthonormal DCT-II, maxima of 4 frames."""
    samples = np.random.default_rng(0).standard_normal(32000) * np.linspace(1, 0, 32000) ** 8
    padded = np.pad(samples, 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    power = np.abs(np.stack([np.fft.rfft(window * padded[t : t + 1024]) for t in range(0, 32001, 250)])) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)  # Hz, equally spaced in mel
    hz, (low, mid, high) = np.linspace(0, 8000, 513)[:, None], (edges[:-2], edges[1:-1], edges[2:])
    bands = np.maximum(0, np.minimum((hz - low) / (mid - low), (high - hz) / (high - mid)))
    assert (bands.sum(0) > 0).all()  # no mel band is empty
    db = 10 * np.log10(np.maximum(power @ bands, 1e-10))
    cepstra = scipy.fft.dct(np.maximum(db, db.max() - 80), norm="ortho").T[:, :-1]  # (128, 4 * 32): the frame centred on the end is dropped
    settings = Settings(window=2.0)
    expected = cepstra.reshape(128, 32, 4).max(axis=2)
    assert settings.shape == expected.shape and Settings().shape == (128, 128)
    np.testing.assert_allclose(features.transform(settings)(torch.tensor(samples, dtype=torch.float32)).numpy(), expected, atol=0.02)
    fewer = features.transform(Settings(coefficients=20, window=2.0))(torch.tensor(samples, dtype=torch.float32))
    np.testing.assert_allclose(fewer.numpy(), expected[:20], atol=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Search, training, test


def test_metrics_by_hand():
    labels, predicted = [0, 0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 1, 0, 3]
    confusion = train.confusion_matrix(labels, predicted, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert train.wa(confusion) == pytest.approx(5 / 7)
    assert train.ua(confusion) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)  # no utterance is neutral


def test_summary_by_hand():
    runs = []
    for k, confusion in enumerate(([[8, 2], [5, 5]], [[1, 0], [0, 3]], [[0, 6], [2, 2]])):
        confusion = np.array(confusion)
        runs.append({"trained_as": k, "ua": train.ua(confusion), "wa": train.wa(confusion), "confusion": confusion.tolist()})
    assert [run["ua"] for run in runs] == [0.65, 1.0, 0.25] and [run["wa"] for run in runs] == [13 / 20, 1.0, 0.2]
    whole = train.summary(runs)
    assert whole["ua"]["mean"] == pytest.approx(1.9 / 3) and whole["wa"]["mean"] == pytest.approx(1.85 / 3)
    assert whole["ua"]["std"] == pytest.approx(statistics.stdev([0.65, 1.0, 0.25]))
    assert whole["wa"]["pooled"] == pytest.approx(19 / 34) and whole["ua"]["pooled"] == pytest.approx((9 / 17 + 10 / 17) / 2)
    assert train.summary(runs[:1])["ua"]["std"] is None


def test_halves_are_stratified_and_complete():
    labels = np.array([0] * 21 + [1] * 10 + [2] * 7 + [3] * 2)
    w, alpha = train.halves(list(range(40)), labels)
    assert sorted(w + alpha) == list(range(40)) and abs(len(w) - len(alpha)) <= 1
    assert np.abs(np.bincount(labels[w]) - np.bincount(labels[alpha])).max() <= 1


def tiny_options(*more):
    sizes = "--channels 2 --cnn-cells 2 --seq-cells 1 --nodes 1 --stem-stride 4 --bands 1 --search-epochs 2 --warm-up 0 --epochs 2 --seq-space rnn"
    return train.parse([*sizes.split(), *more])


def tiny_data(poison=(), normalise="train"):
    """Utterances of five speakers, the last of them with two windows each; `poison`ed utterances are NaN."""
    utterances = [Utterance(Path(f"{s}{c}{n}"), c, s, group=s) for s in "abcde" for c in features.CLASSES for n in range(2)]
    first = np.concatenate([[0], np.cumsum([2 if u.speaker == "e" else 1 for u in utterances])])
    maps = np.random.default_rng(0).standard_normal((first[-1], 16, 16)).astype(np.float32)
    for i in poison:
        maps[first[i] : first[i + 1]] = np.nan
    store = features.Store(maps, first, np.ones(len(utterances)), bad={})
    listing = Listing("emodb", "standard", Path(), features.CLASSES, utterances, "")
    return listing, train.Data(listing, store, listing.classes, normalise, torch.device("cpu"))


def test_validation_and_test_speakers_touch_nothing():
    """With their features replaced by NaN, search and training end with the same alphas and weights, bit for bit."""
    options = tiny_options()

    def states(poison):
        listing, data = tiny_data(poison)
        fold = folds(listing)[1]
        data.standardise_by(fold.train)
        train.seed(options, 1, 0)
        supernet = train.network(options, 4)
        train.search(supernet, data, fold.train, options, lambda **row: None)
        net = train.network(options, 4, derive(supernet))
        train.train(net, data, fold.train, fold.validation, options, lambda **row: None)
        return fold, {**{"super." + n: t for n, t in supernet.state_dict().items()}, **net.state_dict()}

    fold, clean = states(())
    _, poisoned = states(fold.validation + fold.test)
    assert all(torch.isfinite(t).all() and torch.equal(t, poisoned[name]) for name, t in clean.items())
    with pytest.raises(train.NotFinite):  # the oracle sees something: a training utterance does matter
        states(fold.train[:1])


def test_a_search_augments_the_maps_that_move_weights_and_no_others(monkeypatch):
    """Every map is marked by its sum; which half it is of says `halves`."""
    listing, data = tiny_data()
    members, seen = folds(listing)[0].train, {"weights": [], "alphas": []}
    data.standardise_by(members)
    torch.manual_seed(0)
    parts = dict(zip(seen, train.halves(members, data.labels)))
    real, step = train.augmented, train.Architect.step
    monkeypatch.setattr(train, "augmented", lambda x, options: seen["weights"].extend(x.sum((1, 2, 3)).tolist()) or real(x, options))
    monkeypatch.setattr(train.Architect, "step", lambda self, val, batch, xi: seen["alphas"].extend(val[0].sum((1, 2, 3)).tolist()) or step(self, val, batch, xi=xi))
    options = tiny_options("--masks", "2")
    supernet = train.network(options, 4)
    torch.manual_seed(0)
    train.search(supernet, data, members, options, lambda **row: None)
    for half, utterances in parts.items():
        maps = data.batch(torch.from_numpy(data.store.windows_of(utterances)[0])).sum((1, 2, 3)).tolist()
        assert len(maps) > 4 and {f"{total:.3f}" for total in maps} == {f"{total:.3f}" for total in seen[half]}


def test_batches_hold_every_window_once_and_standardisation_is_the_training_speakers():
    listing, data = tiny_data()
    members = [i for i, u in enumerate(listing.utterances) if u.speaker in "de"]
    data.standardise_by(members)
    seen = [(x, target) for x, target in data.batches(members, 5)]
    x, target = (torch.cat(parts) for parts in zip(*seen))
    assert x.shape == (24, 1, 16, 16) and max(len(t) for _, t in seen) - min(len(t) for _, t in seen) <= 1
    torch.testing.assert_close(x.mean(dim=(0, 1, 3)), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(dim=(0, 1, 3), correction=0), torch.ones(16), atol=1e-5, rtol=0)
    window, of = data.store.windows_of(members)
    by_map = {data.batch(torch.tensor([w])).sum().item(): data.labels[members[k]] for w, k in zip(window, of)}
    assert len(by_map) == 24 and all(by_map[x[k : k + 1].sum().item()] == target[k] for k in range(24))


def test_an_utterance_is_the_mean_of_its_windows():
    listing, data = tiny_data()
    data.standardise_by(range(len(listing.utterances)))
    net = train.network(tiny_options(), 4, random_genotype(1, ("reduce", "seq")))
    logits = train.predict(net, data, [39, 0], batch=2)
    with torch.no_grad():
        expected = [net(data.batch(torch.tensor(w))).mean(0) for w in ([46, 47], [0])]
    np.testing.assert_allclose(logits, torch.stack(expected), atol=1e-6)


def test_select_best_keeps_the_latest_of_the_best_epochs(monkeypatch):
    listing, data = tiny_data()
    fold = folds(listing)[0]
    data.standardise_by(fold.train)
    net = train.network(tiny_options(), 4, random_genotype(1, ("reduce", "seq")))
    # Right for the first n of the eight validation utterances: validation UA 1/4, 3/4, 3/4, 2/4 over the epochs.
    right, states = iter([2, 6, 6, 4]), []

    def predict(net, data, utterances):
        states.append({name: t.clone() for name, t in net.state_dict().items()})
        answer, n = data.labels[utterances].copy(), next(right)
        answer[n:] = (answer[n:] + 1) % 4
        return np.eye(4)[answer]

    monkeypatch.setattr(train, "predict", predict)
    options = tiny_options("--select", "best", "--epochs", "4", "--lr", "0.1")
    epoch = train.train(net, data, fold.train, fold.validation, options, lambda **row: None)
    assert epoch == 3 and all(torch.equal(t, states[2][name]) for name, t in net.state_dict().items())
    assert not torch.equal(states[2]["head.weight"], states[3]["head.weight"])


@pytest.mark.parametrize("model", train.BASELINES)
def test_baselines_keep_the_time_axis_and_do_not_mix_utterances(model):
    net = train.Baseline(model, 4, 24).eval()
    x = batch(5, 24, 32)[0]
    torch.testing.assert_close(net(x[[3, 1]]), net(x)[[3, 1]], rtol=1e-4, atol=1e-5)
    assert (net(x.flip(3)) - net(x)).abs().max() > 1e-4  # the order of time counts
    assert train.Baseline(model, 4, 24)(batch(2, 24, 100)[0]).shape == (2, 4)


def test_augmentation_shifts_and_masks_each_utterance_by_itself():
    x = torch.randn(200, 1, 20, 50)
    y = train.augmented(x, train.parse(["--masks", "0"]))
    shifts = set()
    for a, b in zip(x[:, 0], y[:, 0]):
        (k,) = [k for k in range(50) if torch.equal(a.roll(-k, 1), b)]
        shifts.add(k)
    assert len(shifts) > 40 and torch.equal(train.augmented(x, train.parse(["--masks", "0", "--no-shift"])), x)
    for kind, axes in (("mfcc", (2,)), ("log-mel", (1, 2))):
        y = train.augmented(x, train.parse(["--masks", "1", "--no-shift", "--features", kind]))[:, 0]
        for axis in (1, 2):
            masked = (y == 0).all(dim=3 - axis)  # (N, axis)
            assert (masked.sum(1) <= masked.shape[1] // 5).all() and (masked.sum(1) > 0).any() == (axis in axes)
            edges = (masked[:, 1:] != masked[:, :-1]).sum(1)
            assert (edges <= 2).all() and (axis not in axes or len({tuple(m) for m in masked.tolist()}) > 20)  # one stretch, of one's own
        assert torch.equal(y[y != 0], x[:, 0][y != 0])


def test_multiply_accumulates():
    """Convolutions and linear layers against torch's counter, recurrent ones by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    net = Network(channels=4, cnn_cells=3, seq_cells=0, nodes=2, stem_stride=2, genotype=random_genotype(kinds=("normal", "reduce"))).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 1, 20, 32))
    assert train.macs(net, (20, 32)) == counter.get_total_flops() // 2
    lstm = train.Baseline("lstm", 4, 20)  # two layers, two directions, four gates, width 64; 10 frames
    assert train.macs(lstm, (20, 10)) == 10 * 2 * 4 * 64 * ((20 + 64) + (128 + 64)) + 128 * 4
    rnn = nn.Sequential(nn.Flatten(1, 2), emodarts.Recurrent(32, layer=nn.RNN, layers=2))
    assert train.macs(rnn, (20, 32)) == 20 * 2 * 2 * 32 * 32


def test_what_has_nothing_to_learn_is_held_back():
    """For a share of the utterances pooling and skipping add nothing, for the others they add more: the same mean."""
    ops = {name: emodarts.CNN_OPS[name](4, 1, False) for name in ("none", "skip_connect", "dil_conv_3x3")}
    edge, x, weight = MixedOp(ops).train(), torch.randn(400, 4, 3, 5), torch.tensor([0.2, 0.5, 0.3])
    with emodarts.without_statistics(edge):
        rest = weight[2] * ops["dil_conv_3x3"](x)
        share = ((edge(x, weight, p_drop=0.3) - rest) / x).mean(dim=(1, 2, 3))
    dropped = share.abs() < 1e-3
    assert 80 < dropped.sum() < 160  # 120 +- 4 standard deviations
    torch.testing.assert_close(share[~dropped], torch.full_like(share[~dropped], 0.5 / 0.7), rtol=1e-2, atol=0)
    assert torch.equal(edge.eval()(x, weight, p_drop=0.3), edge(x, weight))


def test_the_alphas_wait_for_the_weights():
    listing, data = tiny_data()
    fold = folds(listing)[0]
    data.standardise_by(fold.train)
    moved = []
    for warm_up in ("2", "1"):
        options, rows = tiny_options("--warm-up", warm_up), []
        net = train.network(options, 4)
        before = [alpha.detach().clone() for alpha in net.alphas()]
        train.search(net, data, fold.train, options, lambda **row: rows.append(row))
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, net.alphas())))
        assert ["alpha_loss" in row for row in rows] == [warm_up == "0", warm_up != "2"]
    assert moved == [False, True]


def test_poison_moves_a_share_of_the_test_speakers():
    listing, data = tiny_data()
    fold = folds(listing)[0]
    moved = train.poisoned(fold, train.parse(["--poison", "0.5"]), data.labels)
    assert moved.validation == fold.validation and sorted(moved.train + moved.test) == sorted(fold.train + fold.test)
    assert Counter(data.labels[moved.test]) == {0: 1, 1: 1, 2: 1, 3: 1}  # of two a class


def test_comparison_by_hand(tmp_path, capsys):
    """Three folds of two utterances, two seeds: means, deviations, the paired test, the ensemble, the choice by validation."""
    logits = {"emodarts-seed0": [[2, 0], [1, 0]], "emodarts-seed1": [[0, 1], [0, 3]], "cnn-seed0": [[3, 0], [2, 0]], "cnn-seed1": [[3, 0], [2, 0]]}
    ua_of = {"emodarts-seed0": [0.8, 0.6, 1.0], "emodarts-seed1": [0.6, 0.6, 0.7], "cnn-seed0": [0.5, 0.2, 0.4], "cnn-seed1": [0.5, 0.4, 0.7]}
    validation = {"emodarts-seed0": [0.1, 0.9, 0.1], "emodarts-seed1": [0.2, 0.1, 0.2]}
    for name, values in ua_of.items():
        entries = []
        for k, value in enumerate(values):
            (tmp_path / name / f"fold{k}").mkdir(parents=True)
            p = torch.tensor(logits[name], dtype=torch.float64).softmax(1)
            rows = [f"u{n},{label},x,{a:.9g},{b:.9g}" for n, (label, (a, b)) in enumerate(zip("ab", p.tolist()))]
            (tmp_path / name / f"fold{k}" / "predictions.csv").write_text("\n".join(["utterance,label,predicted,a,b", *rows]))
            about = {"parameters": 10, "macs": 2e6, "peak_gb": 1.0, "seconds": {"search": 1, "training": 2}}
            entries.append({"fold": k, "ua": value, "wa": value / 2, "validation_ua": validation.get(name, [0] * 3)[k], **about})
        (tmp_path / name / "results.json").write_text(json.dumps({"folds": entries, "notes": ["a note"]}))
    options = train.parse(["--compare", "--seeds", "2"])
    train.compared(options, tmp_path, [("emodarts", 0), ("cnn", 0), ("emodarts", 1), ("cnn", 1)])
    rows = {row["model"]: row for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]}
    ours, theirs = [0.7, 0.6, 0.85], [0.5, 0.3, 0.55]
    assert rows["emodarts"]["ua"] == pytest.approx(statistics.mean(ours)) and rows["cnn"]["wa"] == pytest.approx(statistics.mean(theirs) / 2)
    assert rows["emodarts"]["ua_std_folds"] == pytest.approx(statistics.stdev(ours))
    assert rows["emodarts"]["ua_std_seeds"] == pytest.approx(statistics.stdev([0.8, 1.9 / 3]))
    assert rows["cnn"]["p"] == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue) and rows["emodarts"]["p"] is None
    # Summed logits: [2, 1], [1, 3]: both right, though each seed alone has one wrong.
    assert rows["emodarts, ensemble"]["ua"] == 1.0
    assert rows["cnn, ensemble"]["ua"] == 0.5 and rows["cnn, ensemble"]["p"] is None  # three times the same difference: 0.5
    assert rows["emodarts, best seed by validation"]["ua"] == pytest.approx(statistics.mean([0.6, 0.6, 0.7]))
    said = capsys.readouterr().out
    assert "a note" in said and said.index("| emodarts") < said.index("| cnn") and all(line in said for line in (tmp_path / "comparison.md").read_text().splitlines())


def test_parts_of_a_comparison_that_others_compute_are_left_for_later(tmp_path, monkeypatch):
    """... and the searches come first; when what another process worked on is done, it is not computed again."""
    calls, busy = [], iter([["fold0 (process 1)"], []])

    def run_one(options, work, argv, stop, again):
        calls.append(Path(options.out).name)
        return next(busy) if calls[-1] == "emodarts-seed0" else []

    listing = tiny_data()[0]
    monkeypatch.setattr(train, "run_one", run_one)
    monkeypatch.setattr(train, "check", lambda options: (listing, [0, 1], torch.device("cpu")))
    monkeypatch.setattr(train, "compared", lambda options, folder, plan: calls.append(len(plan)))
    train.run(["--compare", "--seeds", "2", "--randoms", "1", "--out", str(tmp_path)], None)
    assert calls[:2] == ["emodarts-seed0", "emodarts-seed1"] and len(set(calls)) == 12 and calls[-2:] == ["emodarts-seed0", 11]


def command(*arguments, cwd, code=0):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real command, twice with one seed."""
    cwd = tmp_path_factory.mktemp("run")
    sizes = "--channels 2 --cnn-cells 3 --nodes 1 --stem-stride 4 --search-epochs 1 --warm-up 0 --epochs 2 --seq-space rnn --features mfcc --coefficients 40 --window 2"
    outs = [command(HERE / "train.py", *sizes.split(), "--out", out, cwd=cwd).stdout for out in ("one", "two")]
    return cwd, outs


def test_the_command_leaves_what_it_promises(finished):
    cwd, (out, _) = finished
    results = json.loads((cwd / "one" / "results.json").read_text())
    assert [fold["test"] for fold in results["folds"]] == [["03"], ["04"]]
    assert "pooled" in out and "reduce cell" in out and "smoke test" in out
    pooled = np.zeros((4, 4), int)
    for fold in results["folds"]:
        folder = cwd / "one" / f"fold{fold['fold']}"
        genotype = Genotype.from_json((folder / "genotype.json").read_text())
        assert json.loads(genotype.to_json()) == fold["genotype"]
        rows = list(csv.DictReader(open(folder / "predictions.csv")))
        assert len(rows) == 28 and {row["utterance"][4:6] for row in rows} == set(fold["test"])
        right = {c: [row["predicted"] == c for row in rows if row["label"] == c] for c in features.CLASSES}
        assert fold["wa"] == pytest.approx(sum(map(sum, right.values())) / 28)
        assert fold["ua"] == pytest.approx(np.mean([np.mean(r) for r in right.values()]))
        pooled += np.array(fold["confusion"])
        log = list(csv.DictReader(open(folder / "log.csv")))
        assert [(row["stage"], row["epoch"]) for row in log] == [("search", "1"), ("train", "1"), ("train", "2")]
    assert results["wa"]["pooled"] == pytest.approx(pooled.trace() / 56)
    values = [fold["ua"] for fold in results["folds"]]
    assert results["ua"]["mean"] == pytest.approx(np.mean(values))
    assert results["ua"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    settings = json.loads((cwd / "one" / "settings.json").read_text())
    assert settings["options"]["seed"] == 0 and settings["torch"] == torch.__version__ and "commit" in settings


def test_the_model_file_is_whole(finished):
    """Model, features and statistics in one file, loaded without executing anything, give the predictions again."""
    cwd, _ = finished
    model = torch.load(cwd / "one" / "fold1" / "model.pt", weights_only=True)
    net = Network(classes=len(model["classes"]), genotype=Genotype.from_json(model["genotype"]), **model["sizes"])
    net.load_state_dict(model["weights"])
    net.eval()
    settings = Settings(**model["features"])
    for row in list(csv.DictReader(open(cwd / "one" / "fold1" / "predictions.csv")))[:5]:
        cut = features.windows(features.read_wav(cwd / "data" / "smoke" / row["utterance"]), settings)
        maps = torch.stack([features.transform(settings)(torch.from_numpy(window)) for window in cut])  # (W, F, T)
        with torch.no_grad():
            p = net(((maps - model["statistics"]["mean"]) / model["statistics"]["std"])[:, None]).mean(0).softmax(0)
        np.testing.assert_allclose(p, [float(row[c]) for c in model["classes"]], atol=1e-4)


def test_a_second_corpus_is_tested_with_the_same_model(finished, monkeypatch, capsys):
    """A csv that names the recordings of fold 0's test speaker must give fold 0's own figures again."""
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    letters = {"W": "angry", "F": "happy", "N": "neutral", "T": "sad"}
    names = sorted(path.name for path in (cwd / "data" / "smoke" / "wav").glob("03*.wav"))
    (cwd / "three.csv").write_text("path,label,speaker\n" + "".join(f"data/smoke/wav/{n},{letters[n[5]]},03\n" for n in names))
    options = json.loads((cwd / "one" / "settings.json").read_text())["command"].split()[2:-1]
    for normalise in ("train", "speaker"):
        more = ["--folds", "0", "--test-dataset", "csv", "--test-root", "three.csv", "--normalise", normalise]
        assert train.main([*options[:-1], "--out", f"cross-{normalise}", *more]) == 0
        results = json.loads((cwd / f"cross-{normalise}" / "results.json").read_text())
        assert results["cross"]["folds"][0]["confusion"] == results["folds"][0]["confusion"]
        assert ("unlabelled audio" in capsys.readouterr().out) == (normalise == "speaker") == bool(results["notes"][1:])
        assert results["protocol"] == "standard" and results["normalise"] == normalise
    probabilities = [(cwd / run / "fold0" / "predictions.csv").read_text() for run in ("one", "cross-train", "cross-speaker")]
    assert probabilities[0] == probabilities[1] != probabilities[2]


def test_both_test_sets_of_msp_podcast_are_scored_by_one_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    msp_podcast(tmp_path / "Audio", tmp_path / "labels_consensus.csv", each=1)
    for k, path in enumerate(features.below(tmp_path / "Audio", r".*\.wav")):
        tone(path, 0.2, frequency=200 + 10 * k)
    sizes = "--channels 2 --cnn-cells 2 --nodes 1 --stem-stride 4 --search-epochs 1 --warm-up 0 --epochs 1 --seq-space rnn --window 1 --batch 4"
    assert train.main(["--dataset", "msp-podcast", "--root", ".", "--scale", "small", "--out", "run", *sizes.split()]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    test1, test2 = results["folds"]
    assert (test1["name"], test2["name"]) == ("test1", "test2") and test1["trained_as"] == test2["trained_as"] == 0
    assert test1["genotype"] == test2["genotype"] and results["ua"] == {"mean": None, "std": None, "pooled": None}
    assert (tmp_path / "run" / "fold0" / "model.pt").exists() and not (tmp_path / "run" / "fold1" / "model.pt").exists()
    tests = torch.load(tmp_path / "run" / "fold0" / "model.pt", weights_only=True)["test"]
    assert [(test["name"], test["ua"], test["wa"]) for test in tests] == [(fold["name"], fold["ua"], fold["wa"]) for fold in results["folds"]]


def test_a_bad_recording_stops_the_run_before_training_or_is_named_in_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = ["path,label,speaker"]
    for k, (speaker, label) in enumerate(itertools.product("abc", ("calm", "tense"))):
        for n in range(2):
            rows.append(f"{tone(Path(f'{speaker}{label}{n}.wav'), 0.2, frequency=200 + 50 * k)},{label},{speaker}")
    Path("bcalm2.wav").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    Path("mine.csv").write_text("\n".join([*rows, "bcalm2.wav,calm,b"]))
    sizes = "--channels 2 --cnn-cells 2 --nodes 1 --stem-stride 4 --search-epochs 1 --warm-up 0 --epochs 1 --seq-space rnn --window 1 --batch 2"
    arguments = ["--dataset", "csv", "--root", "mine.csv", "--out", "run", *sizes.split()]
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert "1 of 13 recordings" in said and "bcalm2.wav: a git-lfs stub" in said and not list(Path("run").glob("fold*"))
    assert train.main([*arguments, "--skip-bad", "--out", "run2"]) == 0
    results = json.loads(Path("run2/results.json").read_text())
    assert results["classes"] == ["calm", "tense"] and len(results["skipped"]) == 1 and "bcalm2.wav" in results["skipped"][0]
    assert sum(np.sum(fold["confusion"]) for fold in results["folds"]) == 12


def test_statistics_of_each_speaker():
    listing, data = tiny_data(normalise="speaker")
    data.standardise_by(None)
    for speaker in "abcde":
        window, _ = data.store.windows_of([i for i, u in enumerate(listing.utterances) if u.speaker == speaker])
        x = data.batch(torch.from_numpy(window))
        torch.testing.assert_close(x.mean(dim=(0, 1, 3)), torch.zeros(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std(dim=(0, 1, 3), correction=0), torch.ones(16), atol=1e-5, rtol=0)


def without_seconds(value):
    if isinstance(value, dict):
        return {name: without_seconds(v) for name, v in value.items() if name not in ("seconds", "peak_gb")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def test_the_same_seed_gives_the_same_run(finished):
    cwd, _ = finished
    one, two = (without_seconds(json.loads((cwd / run / "results.json").read_text())) for run in ("one", "two"))
    assert one == two
    for fold in ("fold0", "fold1"):
        for file in ("genotype.json", "predictions.csv"):
            assert (cwd / "one" / fold / file).read_bytes() == (cwd / "two" / fold / file).read_bytes()
        logs = [[without_seconds(row) for row in csv.DictReader(open(cwd / run / fold / "log.csv"))] for run in ("one", "two")]
        assert logs[0] == logs[1]
        models = [torch.load(cwd / run / fold / "model.pt", weights_only=True)["weights"] for run in ("one", "two")]
        assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())
    for fold in one["folds"]:  # but the two folds, with random streams of their own, differ
        assert fold["genotype"] == two["folds"][fold["fold"]]["genotype"]
    assert one["folds"][0]["confusion"] != one["folds"][1]["confusion"] or one["folds"][0]["genotype"] != one["folds"][1]["genotype"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--dataset", "emodb"), "no utterance of emodb in data/emodb.*--root DIR"),
        (("--dataset", "emodb", "--root", "nowhere"), "no such folder"),
        (("--dataset", "enterface"), "invalid choice: 'enterface'"),
        (("--folds", "7"), "--folds is '7', expected numbers from 0 to 5"),
        (("--folds", "one"), "--folds is 'one'"),
        (("--epochs", "0"), "--epochs is 0, expected at least 1"),
        (("--cnn-cells", "0"), "cnn_cells is 0, expected at least 1"),
        (("--coefficients", "200"), "200 coefficients; expected 1 to 128"),
        (("--window", "0.1"), "multiple of 0.0625 s"),
        (("--device", "quantum"), "--device quantum cannot be used here"),
        (("--search", "seq", "--seq-cells", "0"), "--search seq leaves nothing to search"),
        (("--search-epochs", "3", "--warm-up", "3"), "--warm-up is 3, expected less than --search-epochs, 3"),
        (("--model", "cnn", "--genotype", "one/fold0/genotype.json"), "--genotype goes with --model emodarts, found --model cnn"),
        (("--genotype", "nowhere.json"), "--genotype nowhere.json: .*No such file"),
        (("--poison", "1"), "--poison is 1.0, expected at least 0 and less than 1"),
        (("--benchmark", "--channels", "0"), "channels is 0, expected at least 1"),
        (("--benchmark", "--json", "nowhere/b.json"), "--json is nowhere/b.json, in a folder that does not exist"),
        (("--out", "one"), "one holds a run with other settings: .*channels .2 there, 8 here"),
    ],
)
def test_bad_input_is_one_clear_line(finished, monkeypatch, capsys, arguments, says):
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    before = (cwd / "one" / "results.json").read_bytes()
    try:
        code = train.main(arguments)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and re.search(says, capsys.readouterr().err.splitlines()[-1])
    assert (cwd / "one" / "results.json").read_bytes() == before


def test_the_command_ends_with_code_2(tmp_path):
    error = command(HERE / "train.py", "--dataset", "emodb", cwd=tmp_path, code=2).stderr
    assert error.startswith("error: no utterance of emodb in data/emodb") and error.count("\n") == 1


def test_the_reference_needs_torch_alone():
    """emodarts.py imports torch and the standard library, nothing else."""
    imported = set()
    for node in ast.walk(ast.parse((HERE / "emodarts.py").read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        imported |= {name.split(".")[0] for name in names}
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_ci_runs_readmes_two_commands():
    commands = re.findall(r"^pip install .*$", (HERE / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2 and "python train.py" in commands[0] and "pytest" in commands[1]
    script = (HERE / ".ci" / "run").read_text().splitlines()
    assert [line for line in script if line.startswith("pip")] == [f"{command} || exit 1" for command in reversed(commands)]


# ---------------------------------------------------------------------------------------------------------------------
# For people


def said(capsys, *arguments, code=0):
    assert train.main([*map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def predictions(file):
    return {row["utterance"]: [float(row[c]) for c in features.CLASSES] for row in csv.DictReader(open(file))}


def test_predict_gives_what_the_test_gave(finished, monkeypatch, capsys):
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    rows = predictions("one/fold0/predictions.csv")
    clips = [f"data/smoke/{name}" for name in rows]
    out = said(capsys, "--predict", *clips, "--from", "one/fold0/model.pt", "--json", "first.json")
    first = json.loads(Path("first.json").read_text())
    second = json.loads(said(capsys, "--predict", *clips, "--from", "one/fold1", "--json", "-"))
    both = json.loads(said(capsys, "--predict", *clips, "--from", "one", "--json", "-"))
    assert (first["models"], second["models"], both["models"]) == (1, 1, 2) and both["classes"] == list(features.CLASSES)
    lines = [line for line in out.splitlines() if line.startswith("data")]
    long = 0
    for name, clip, line, a, b in zip(rows, first["clips"], lines, second["clips"], both["clips"]):
        for answers in ((clip, a, b), *zip(clip["windows"], a["windows"], b["windows"])):
            p, q, mean = ([c["probabilities"][name] for name in features.CLASSES] for c in answers)
            np.testing.assert_allclose(mean, np.add(p, q) / 2, atol=1e-12)
        p = [clip["probabilities"][name] for name in features.CLASSES]
        np.testing.assert_allclose(p, rows[name], atol=2e-6)
        assert clip["path"] == f"data/smoke/{name}" and line.split()[:2] == [clip["path"], clip["label"]]
        assert [float(v) for v in re.findall(r"0\.\d{3}|1\.000", line.split(clip["label"], 1)[1])] == [round(v, 3) for v in p]
        assert clip["label"] == features.CLASSES[np.argmax(p)]
        length = wavfile.read(clip["path"])[1].size / 16000
        times = [(w["start"], w["end"]) for w in clip["windows"]]
        np.testing.assert_allclose(times, [(0, min(2, length))] + [(length - 2, length)] * (length > 2), atol=1e-9)
        assert clip["seconds"] == pytest.approx(length)
        long += length > 2
    assert 0 < long < 28 and len(out.splitlines()) == 28 + 2 * long
    # A window of a long clip is heard as the same sound alone is.
    clip = next(clip for clip in first["clips"] if clip["seconds"] > 2.1)
    wavfile.write("end.wav", 16000, wavfile.read(clip["path"])[1][-32000:])
    alone = json.loads(said(capsys, "--predict", "end.wav", "--from", "one/fold0/model.pt", "--json", "-"))["clips"][0]
    assert alone["probabilities"] == pytest.approx(clip["windows"][1]["probabilities"], abs=1e-6)


def remade(change, source="one/fold0/model.pt", file="changed.pt"):
    model = torch.load(source, weights_only=True)
    change(model)
    torch.save(model, file)
    return file


def test_a_model_without_statistics_takes_those_of_the_clips(finished, monkeypatch, capsys):
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    remade(lambda model: (model.update(statistics=None, normalise="speaker"), model["features"].pop("kind")))  # older models have no kind
    clips = sorted(map(str, Path("data/smoke/wav").glob("05*.wav")))
    assert train.main(["--predict", *clips, "--from", "changed.pt", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert "28 clips are taken as one speaker's" in err and err.count("\n") == 1
    model = torch.load("changed.pt", weights_only=True)
    net = Network(classes=4, genotype=Genotype.from_json(model["genotype"]), **model["sizes"])
    net.load_state_dict(model["weights"])
    transform = features.transform(Settings(40, 2.0))
    maps = [torch.stack([transform(torch.from_numpy(w)) for w in features.windows(features.read_wav(clip), Settings(40, 2.0))]) for clip in clips]
    every = torch.cat(maps).numpy().astype(np.float64)
    for x, clip in zip(maps, json.loads(out)["clips"]):
        x = (x.numpy() - every.mean((0, 2))[:, None]) / every.std((0, 2))[:, None]
        with torch.no_grad():
            p = net.eval()(torch.from_numpy(x).float()[:, None]).mean(0).softmax(0)
        np.testing.assert_allclose(p, list(clip["probabilities"].values()), atol=2e-3)  # as the features are rounded to float16


def test_the_model_says_what_it_is(finished, monkeypatch, capsys):
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    out, results = said(capsys, "--from", "one"), json.loads(Path("one/results.json").read_text())
    assert re.findall(r"^one/.*", out, re.MULTILINE) == ["one/fold0/model.pt", "one/fold1/model.pt"]
    for fold, text in zip(results["folds"], out.split("one/fold")[1:]):
        rows = list(csv.DictReader(open(f"one/fold{fold['fold']}/predictions.csv")))
        recalls = [np.mean([r["predicted"] == c for r in rows if r["label"] == c]) for c in features.CLASSES]
        assert f"{fold['name']}: UA {100 * np.mean(recalls):.1f}, WA {100 * np.mean([r['predicted'] == r['label'] for r in rows]):.1f} of 28" in text
        assert f"torch {torch.__version__}" in text and "angry, happy, neutral, sad" in text and "smoke, protocol standard" in text
        assert f"{fold['parameters']:,}" in text and "40 mfcc, windows of 2 s" in text
        assert fold["macs"] == 4 * train.macs(train.read_model(Path(f"one/fold{fold['fold']}/model.pt"))["net"], (40, 32))  # of 8 s
        for kind, cell in fold["genotype"].items():
            assert all(f"{op}({j})" in text.split(f"{kind} cell")[1].split("output =")[0] for node in cell for op, j in node)


def test_models_and_clips_that_cannot_be_used_are_one_clear_line(finished, monkeypatch, capsys):
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    clip, good = "data/smoke/wav/03a01Fa.wav", Path("one/fold0/model.pt").read_bytes()
    weights = torch.load("one/fold0/model.pt", weights_only=True)["weights"]
    nan = {name: t * math.nan if t.is_floating_point() else t for name, t in weights.items()}
    other = Network(**SMALL, genotype=random_genotype()).state_dict()
    for name, change in {
        "code": dict(classes=Evil()), "format": dict(format="emodarts-9"), "classes": dict(classes=["a", "b"]), "escape": dict(classes=["a", "b", "c", "\x1b[2J"]),
        "weights": dict(weights=other), "nan": dict(weights=nan),
        "genotype": dict(genotype='{"seq": [[["lstm_9", 0]]]}'), "large genotype": dict(genotype=json.dumps(dict.fromkeys(("reduce", "normal", "seq"), [NODE] * 2000))),
        "huge": dict(sizes={**SMALL, "bands": 2, "dropout": 0.3, "cnn_cells": 10**9}), "wide": dict(sizes={**SMALL, "bands": 2, "dropout": 0.3, "channels": 10**12}),
        "low": dict(features={"coefficients": 1, "window": 2.0}, statistics={"mean": torch.zeros(1, 1), "std": torch.ones(1, 1)}),
        "window": dict(features={"coefficients": 40, "window": 1e9}), "kind": dict(features={"coefficients": 40, "kind": "raw"}),
        "new": dict(features={"coefficients": 40, "pitch": 1}), "fraction": dict(features={"coefficients": 40.0}),
        "statistics": dict(statistics={"mean": torch.zeros(40, 1), "std": torch.zeros(40, 1)}), "no statistics": dict(statistics=None),
        "tests": dict(test=[{"name": "a", "ua": "b"}]), "trained": dict(trained_on=None), "list": None,
    }.items():  # fmt: skip
        file = Path(remade(lambda model: model.clear() if change is None else model.update(change), file=f"{name}.pt"))
        started = time.perf_counter()
        for arguments in (("--from", file), ("--from", file, "--predict", clip)):
            err = said(capsys, *arguments, code=2)
            assert err.startswith(f"error: {file} is damaged") and err.count("\n") == 1 and "name a run folder" in err and "\x1b" not in err, err
        assert time.perf_counter() - started < 5, name
    for name, content in {"cut": good[:-1000], "flipped": good[:3000] + b"x" + good[3001:], "text": b"hello", "pickle": pickle.dumps(Evil())}.items():
        Path(name).write_bytes(content)
        err = said(capsys, "--predict", clip, "--from", name, code=2)
        assert err.startswith(f"error: {name} is damaged") and err.count("\n") == 1, err
    assert not Path("executed").exists()
    Path("mixed/fold0").mkdir(parents=True)
    Path("mixed/fold1").mkdir()
    Path("mixed/fold0/model.pt").write_bytes(good)
    remade(lambda model: model.update(classes=model["classes"][::-1]), file="mixed/fold1/model.pt")
    for arguments, says in (
        (("--from", "nowhere"), "nowhere, where no model is; expected a run folder"), (("--from", "data"), "where no model is"),
        (("--from", "mixed", "--predict", clip), "differ in their classes"), (("--predict", clip), "--predict CLIP ... needs --from RUN"),
        (("--from", "one", "--json", "a"), "--json goes with both"), (("--from", "one", "--predict", "nowhere.wav"), "nowhere.wav: no such file"),
        (("--from", "one", "--predict", "text"), "text: not a readable wav"), (("--from", "one", "--predict", clip, "--json", "no/where"), "No such file"),
    ):  # fmt: skip
        err = said(capsys, *arguments, code=2)
        assert err.startswith("error: ") and says in err and err.count("\n") == 1, err
    err = said(capsys, "--from", "one", "--predict", "text", clip, "nowhere.wav", code=2)  # all of them at once
    assert "2 of 3 clips" in err and "text" in err and "nowhere.wav" in err


def test_agreement_by_hand():
    cells = [
        [[["lstm_1", 0], ["lstm_2", 1]], [["rnn_1", 0], ["rnn_1", 2]]],
        [[["lstm_1", 0], ["lstm_1", 1]], [["rnn_2", 0], ["rnn_1", 1]]],
        [[["lstm_1", 0], ["lstm_2", 1]], [["rnn_1", 0], ["rnn_1", 1]]],
    ]
    assert train.agreement(cells) == {
        (0, 2): {"lstm_1": 3}, (1, 2): {"lstm_1": 1, "lstm_2": 2}, (0, 3): {"rnn_1": 2, "rnn_2": 1}, (1, 3): {"rnn_1": 2}, (2, 3): {"rnn_1": 1},
    }  # fmt: skip


def test_the_report_shows_what_was_found(finished, tmp_path):
    """Graphs are parsed back; tables and curves are compared with the files that they are made of."""
    cwd, _ = finished
    folder, settings = tmp_path / "run", json.loads((cwd / "one" / "settings.json").read_text())
    assert (cwd / "one" / "report.md").exists()
    results = json.loads((cwd / "one" / "results.json").read_text())
    found = [fold["genotype"] for fold in results["folds"]]
    skips = {kind: [[["skip_connect", 0], ["skip_connect", 1]]] for kind in found[0]}
    results["folds"] = [{**results["folds"][k], "fold": n, "trained_as": n, "genotype": g} for n, (k, g) in enumerate([(0, found[0]), (1, skips), (1, skips)])]
    results["classes"][0] = "an|gry<script>"
    folder.mkdir()
    for n, k in enumerate((0, 1, 1)):
        (folder / f"fold{n}").mkdir()
        (folder / f"fold{n}" / "log.csv").write_bytes((cwd / "one" / f"fold{k}" / "log.csv").read_bytes())
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "results.json").write_text(json.dumps(results))
    train.write_report(folder)
    text = (folder / "report.md").read_text()
    graphs, open_part = re.findall(r"```mermaid\n(graph LR.*?)```", text, re.DOTALL), text.split("<details>")[0]
    cells = [(re.search(r"(\w+): input 0", g)[1], {(int(j), int(i), op) for j, op, i in re.findall(r'^ *s(\d+) -->\|"(\w+)"\| s(\d+)$', g, re.M)}) for g in graphs]
    expected = [(kind, {(j, i, op) for i, node in enumerate(cell, 2) for op, j in node}) for g in (skips, found[0]) for kind, cell in g.items()]
    assert cells == expected and open_part.count("graph LR") == len(skips) and "folds 1, 2" in open_part  # the most frequent one stands first and open
    assert all(set(re.findall(r"s(\d+) --> out", g)) == {"2"} for g in graphs)
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    for fold in results["folds"]:
        assert [str(fold["fold"]), fold["name"], fold["validation"][0], "28", f"{100 * fold['ua']:.1f}", f"{100 * fold['wa']:.1f}"] in rows
    pooled = sum(np.array(fold["confusion"]) for fold in results["folds"])
    assert ["**sad**", *map(str, pooled[3]), f"{100 * pooled[3, 3] / pooled[3].sum():.1f}"] in rows
    assert ["1", *["2 of 2"] * len(skips)] in rows and "<script>" not in text and r"an\|gry\<script\>" in text
    assert text.count("| **any: kept** | 100 | 100 |\n| kept by chance | 100 | 100 |") == len(skips)
    for kind in skips:
        table = text.split(f"### {kind} cell")[1].split("**any")[0]
        skipped = [1 + 1 + (found[0][kind][0][j][0] == "skip_connect") for j in (0, 1)]
        assert f"| `skip_connect` | {100 * skipped[0] / 3:.0f} | {100 * skipped[1] / 3:.0f} |" in table
    logs = [[row for row in csv.DictReader(open(folder / f"fold{n}" / "log.csv"))] for n in range(3)]
    (points,) = re.findall(r"UA of the validation.*?line \[(.*?)\]", text, re.DOTALL)
    means = [100 * np.mean([float(log[1 + epoch]["val_ua"]) for log in logs]) for epoch in (0, 1)]
    assert [float(v) for v in points.split(", ")] == pytest.approx(means, rel=1e-3)
    assert f"mean {np.mean([float(log[0]['entropy']) for log in logs]):.5f}" in text
    assert "    " + settings["command"] in text and all(f"| {train.plain(name)} |" in text for name in settings["options"])
    seconds = results["folds"][0]["seconds"]
    assert ["0", f"{results['folds'][0]['parameters']:,}", f"{seconds['search']:,.0f}", f"{seconds['training']:,.0f}"] in rows
    (folder / "fold0" / "log.csv").write_text("stage,loss\nsearch,x\n")
    with pytest.raises(InputError, match="log.csv is damaged.*delete it, and the report goes without it"):
        train.write_report(folder)


def test_a_finished_run_writes_its_report_again(finished, monkeypatch, capsys):
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    before = Path("one/report.md").read_bytes()
    Path("one/report.md").unlink()
    argv = json.loads(Path("one/settings.json").read_text())["command"].split()[2:]
    loud = said(capsys, *argv).splitlines()
    assert Path("one/report.md").read_bytes() == before
    assert said(capsys, *argv, "--quiet").splitlines() == loud[1:] and loud[0].startswith("one is finished")


def test_a_quiet_run_prints_its_results_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = "--channels 2 --cnn-cells 2 --nodes 1 --seq-cells 0 --stem-stride 4 --search-epochs 1 --warm-up 0 --epochs 1 --window 0.5 --folds 0"
    lines = said(capsys, *sizes.split(), "--quiet", "--out", "run").splitlines()
    assert lines[0] == "smoke, protocol standard" and lines[1].startswith("fold ") and lines[2].startswith("0 ") and len(lines) == 8, lines


def test_a_dry_run_counts_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = dict(channels=3, cnn_cells=3, seq_cells=2, nodes=2, stem_stride=4, bands=2)
    argv = [word for name, size in sizes.items() for word in ("--" + name.replace("_", "-"), str(size))]
    state = torch.get_rng_state()
    out = said(capsys, *argv, *"--dry-run --window 1 --seq-space rnn --search-epochs 3 --warm-up 0 --epochs 5 --folds 1,2 --batch 8".split())
    assert not list(tmp_path.iterdir()) and torch.equal(torch.get_rng_state(), state)
    counts = Counter()
    for name, p in Network(**sizes, seq_space="rnn").named_parameters():
        counts[name.split(".")[0]] += p.numel()
    rest = counts["stem"] + counts["head"]
    assert f"{sum(counts.values()) - counts['alpha']:,} weights: CNN cells (3) {counts['cnn']:,}, SeqNN cells (2) {counts['seq']:,}, the rest {rest:,}" in out
    listing = read_corpus("smoke", "elsewhere")
    store = load(listing, Settings(40, 1.0), cache="cache")
    parts, windows = folds(listing), np.diff(store.first)
    assert f"{len(store.features)} windows of 1 s, 6 speakers" in out and f"{store.seconds.sum() / 60:.1f} minutes" in out
    search = sum(3 * math.ceil(windows[parts[k].train[0::2]].sum() / 8) for k in (1, 2))
    training = sum(5 * math.ceil(windows[parts[k].train].sum() / 8) for k in (1, 2))
    assert f"{search:,} search steps" in out and f"{training:,} training steps" in out
    (number, unit), (a, b) = re.search(r"about (\S+) (s|min|h) on cpu", out).groups(), re.findall(r"steps of (\S+) s", out)
    unit, steps = {"s": 1, "min": 60, "h": 3600}[unit], search * float(a) + training * float(b)  # as fast as the machine is now
    assert 0.8 * steps - unit < float(number) * unit < 2 * steps + unit
    assert re.findall(r"^fold (\d)", out, re.M) == ["1", "2"] and "test 04 (28), validation 05 (28), training 112" in out
    assert "--recompute" in out and "--folds 0" in out and "--nodes 1" in out and "--seq-space" not in out and "--order" not in out


def test_paper_scale_without_a_gpu_is_warned_of_and_counts_as_published(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "estimate", lambda *args: (7 * 3600, {"search": (1, 60.0), "training": (1, 9.0)}, None))
    assert train.main("--scale paper --seq-space lstm --dry-run --device cpu --order 2".split()) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: paper scale without a GPU") and err.count("\n") == 1
    assert "74,319,852 weights: CNN cells (4) 345,312," in out and "about 7.0 h on cpu" in out and "peak memory unknown" in out
    assert "both: --stem-stride 2, --order 1, --nodes 3, --channels 4" in out


@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 24), (3, 64)])
@pytest.mark.parametrize("extra", [False, True])
def test_windows_are_counted_from_the_header(tmp_path, kind, bits, extra):
    paths = [tmp_path / f"{n}.wav" for n in range(5)]
    for path, length in zip(paths, (800, 8000, 8400, 24000, 44000)):
        path.write_bytes(riff(kind, 2, 16000, bits, encode(np.zeros(2 * length), kind, bits), False, extra))
    paths += [tmp_path / "none.wav", tmp_path / "text.wav"]
    paths[-1].write_bytes(b"fmt \0")
    listing = Listing("csv", "standard", tmp_path, ("a", "b"), [Utterance(path, "a", "s") for path in paths], "")
    windows, seconds = train.lengths(listing, 0.5)
    assert windows.tolist() == [len(features.windows(features.read_wav(p), Settings(window=0.5))) for p in paths[:5]] + [1, 1]
    assert seconds == pytest.approx([0.05, 0.5, 0.525, 1.5, 2.75, 0, 0], abs=0.01)


def test_help_shows_every_default_in_groups_that_fit_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    assert all(group.count("\n") < 50 for group in groups) and len(groups) > 6
    text = " ".join("\n".join(groups).split())
    for f in train.fields(train.Options):
        flag = "--" + f.name.strip("_").replace("_", "-")
        about = re.search(rf" {flag}(?:, --no-{flag[2:]})? (.*?)(?= --[a-z]|$)", text.split("options: -h")[1])[1]
        assert "default" in about or f"small: {train.SCALES['small'].get(f.name)}" in about or f.metadata["group"] == "use", f.name


def test_readmes_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 25
    names = {}
    exec(example, names)  # our own file
    assert isinstance(names["genotype"], Genotype) and not names["net"].alphas() and names["net"](names["x"][:2]).shape == (2, 4)


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost

DRIVER = """
import os, signal, sys, threading
sys.path.insert(0, {here!r})
import features, train
where, number, *argv = sys.argv[1:]
number = getattr(signal, number)
train.SAVE_EVERY = 0 if where else 30  # after every step
if where.startswith("after "):  # seconds after the folder was made
    lock = train.lock
    def timed(folder, **more):
        timer = threading.Timer(float(where.split()[1]), os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
        return lock(folder, **more)
    train.lock = timed
elif where:
    module, name, n = where.split()
    module, calls = dict(features=features, train=train, os=os)[module], []
    real = getattr(module, name)
    def deadly(*args, **more):
        calls.append(1)
        if len(calls) == int(n):
            os.kill(os.getpid(), number)
        return real(*args, **more)
    setattr(module, name, deadly)
sys.exit(train.main(argv))
"""
TINY = (
    "--dataset emodb --root corpus --folds 0,1 --window 0.5 --coefficients 8 --channels 2 --cnn-cells 3 --seq-cells 1 --nodes 2 --stem-stride 2 --bands 1 "
    "--seq-space rnn_att --search-epochs 2 --warm-up 0 --epochs 2 --batch 4 --lr 0.1 --order 2 --select best --threads 1 --deterministic"
).split()  # fmt: skip


def drive(cwd, out, where="", number="SIGKILL"):
    script = cwd / "driver.py"
    script.write_text(DRIVER.format(here=str(HERE)))
    argv = [*TINY, "--out", out, "--cache", f"cache-{out}"]
    return subprocess.run([sys.executable, script, where, number, *argv], cwd=cwd, capture_output=True, text=True)


def left_behind(cwd, out, features=True):
    """Every file of a run and of its features, without what was measured in seconds."""
    files = {}
    for folder in (cwd / out, cwd / f"cache-{out}") if features else (cwd / out,):
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in ("lock", "settings.json", "report.md"):
                content = path.read_bytes()
                if path.name == "log.csv":
                    content = [without_seconds(row) for row in csv.DictReader(content.decode().splitlines())]
                elif path.name == "results.json":
                    content = without_seconds(json.loads(content))
                files[str(path.relative_to(folder))] = content
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("undisturbed")
    for n, s, letter in itertools.product(range(4), (3, 8, 9), "WFNT"):
        tone(cwd / "corpus" / f"{s:02}a{n:02}{letter}a.wav", 0.2, frequency=100 * s + 37 * n + 10 * ord(letter))
    done = drive(cwd, "whole")
    assert done.returncode == 0 and done.stderr.startswith("warning: emodb: found 12 angry"), done.stdout + done.stderr
    return cwd, done.stdout


def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(undisturbed):
    cwd, _ = undisturbed
    random = np.random.default_rng(5)
    for where, number in (
        ("features read_wav 40", "SIGKILL"),
        ("train weight_step 2", "SIGKILL"),  # search: the alphas of this step have moved
        ("train weight_step 1", "SIGTERM"),  # the last step of the epoch
        ("os fsync 2", "SIGKILL"),  # in the middle of writing a checkpoint
        ("train train 1", "SIGKILL"),  # between search and training
        ("train weight_step 5", "SIGINT"),  # training
        ("train weight_step 3", "SIGKILL"),
        ("train score 1", "SIGKILL"),
        *((f"after {seconds}", "SIGKILL") for seconds in random.uniform(0.1, 0.6, 3)),
    ):
        died = drive(cwd, "killed", where, number)
        code = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}[number]
        assert died.returncode == code or where.startswith("after") and died.returncode == 0, f"{where}: {died.returncode}{died.stdout}{died.stderr}"
        if code > 0:
            assert f"stopped by {number}" in died.stderr and "--out killed" in died.stderr.splitlines()[-1]
    done = drive(cwd, "killed")
    assert done.returncode == 0, done.stdout + done.stderr
    whole, killed = left_behind(cwd, "whole"), left_behind(cwd, "killed")
    assert whole.keys() == killed.keys() and "fold1/model.pt" in whole
    for name, content in whole.items():
        assert killed[name] == content, name


def test_a_finished_run_prints_its_table_and_trains_nothing(undisturbed, monkeypatch, capsys):
    cwd, said = undisturbed
    monkeypatch.chdir(cwd)
    before = left_behind(cwd, "whole")
    for module, name in ((features, "load"), (train, "fit"), (train, "write")):
        monkeypatch.setattr(module, name, None)
    assert train.main([*TINY, "--out", "whole"]) == 0
    first, *again = capsys.readouterr().out.splitlines()
    assert first.startswith("whole is finished") and again == said.splitlines()[-len(again) :] and any("pooled" in line for line in again)
    assert left_behind(cwd, "whole") == before


def test_processes_share_a_run_folder(undisturbed):
    """Two processes find fold 0 taken: one of them computes fold 1, and both wait. When fold 0 is free one of them takes
    it, both print the table, and all files are those of a single process."""
    cwd, said_alone = undisturbed
    (cwd / "shared" / "fold0").mkdir(parents=True)
    held = train.lock(cwd / "shared" / "fold0")
    outs = [cwd / "first.txt", cwd / "second.txt"]
    processes = [subprocess.Popen([sys.executable, cwd / "driver.py", "", "SIGKILL", *TINY, "--out", "shared", "--cache", "cache-shared"], cwd=cwd,
                                  stdout=open(out, "w"), stderr=subprocess.DEVNULL) for out in outs]  # fmt: skip
    waits, deadline = "waits for what others compute: ", time.time() + 120
    while not all(waits in out.read_text() for out in outs) and time.time() < deadline:
        time.sleep(0.1)
    held.close()
    assert [process.wait(120) for process in processes] == [0, 0]
    said = [out.read_text() for out in outs]
    assert [sum(text.count(f"fold {k}: found in") for text in said) for k in (0, 1)] == [1, 1]
    assert all(f"shared/fold0 (process {os.getpid()} on " in re.search(waits + ".*", text)[0] for text in said)
    table = [line.split("  ")[0] for line in said_alone.splitlines()[-8:]]  # without seconds
    assert all([line.split("  ")[0] for line in text.replace("shared", "whole").splitlines()[-8:]] == table for text in said)
    assert left_behind(cwd, "shared") == left_behind(cwd, "whole")


@pytest.fixture
def stopped(undisturbed, monkeypatch, capsys):
    """A run whose disk was full after the training of its first fold, and how to start it again. -> (folder, function)."""
    cwd, _ = undisturbed
    monkeypatch.chdir(cwd)
    real = os.fsync

    def full(file):
        if "checkpoint" not in os.readlink(f"/proc/self/fd/{file}") and (cwd / "stopped/fold0/model.pt").exists():
            raise OSError(28, "No space left on device")
        real(file)

    def again():
        code = train.main([*TINY[:-1], "--out", "stopped", "--cache", "cache-whole"])
        return code, capsys.readouterr().err.replace("warning: emodb", "\0").split("\n", 1)[1]

    if not (cwd / "stopped/fold0/checkpoint.pt").exists():
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", full)
            code, err = again()
        assert code == 1 and err.startswith("error: [Errno 28] No space left on device; what was saved is whole") and err.count("\n") == 1
    return cwd / "stopped", again


def test_a_full_disk_leaves_the_old_file(tmp_path):
    file, before = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    train.write(file, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for content in (bytes(20_000), lambda out: torch.save(torch.zeros(20_000), out)):  # the second fails within torch
            with pytest.raises(OSError, match="File too large"):
                train.write(file, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_files_that_are_not_what_they_should_be_are_one_clear_line(stopped, capsys):
    folder, again = stopped
    file = folder / "fold0" / "checkpoint.pt"
    good = file.read_bytes()

    def saved(change=lambda state: None, **how):
        state, out = torch.load(file, weights_only=True), io.BytesIO()
        change(state)
        torch.save(state, out, **how)
        return out.getvalue()

    def parts(name, **new):
        return saved(lambda state: state["parts"][name].update(new))

    def zipped(method, data=b"\0" * 2**20):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            archive.writestr("archive/data.pkl", data)
        return out.getvalue()

    bias = torch.zeros(4)
    other = Network(**SMALL, genotype=random_genotype()).state_dict()
    hostile = {
        "empty": b"", "text": b"hello", "cut": good[:-1000], "half": good[: len(good) // 2], "flipped": good[:5000] + b"x" + good[5001:],
        "pickle": pickle.dumps(Evil()), "pickle in a zip": zipped(zipfile.ZIP_STORED, pickle.dumps(Evil())), "bomb": zipped(zipfile.ZIP_DEFLATED),
        "code": saved(lambda state: state.update(run=Evil())), "old format": saved(_use_new_zipfile_serialization=False),
        "another run": saved(lambda state: state.update(run="0")), "list": saved(lambda state: state.clear()),
        "another network": saved(lambda state: state["parts"].update(net=other)), "shape": parts("net", **{"head.bias": torch.zeros(5)}),
        "type": parts("net", **{"head.bias": bias.double()}), "number": parts("net", **{"head.bias": 0.0}),
        "sparse": parts("net", **{"head.bias": bias.to_sparse()}), "meta": parts("net", **{"head.bias": bias.to("meta")}),
        "momentum": parts("optimizer", state={0: {"momentum_buffer": bias}}), "who": parts("optimizer", state={10**6: {}}),
        "groups": parts("optimizer", param_groups=[]), "schedule": parts("schedule", T_max="many"),
        "random": saved(lambda state: state["now"][0].zero_()), "no random": saved(lambda state: state.update(begin=[])),
        "epoch": saved(lambda state: state.update(epoch=-1)), "stage": saved(lambda state: state.update(stage="test")),
        "rows": saved(lambda state: state.update(rows=[{"stage": "search", "seconds": "a"}])), "best": saved(lambda state: state.update(best_weights=None)),
        "genotype": saved(lambda state: state.update(genotype='{"seq": [[["lstm_9", 0]]]}')),
        "large genotype": saved(lambda state: state.update(genotype=json.dumps({"seq": [NODE] * 1000}))),
        "half a genotype": saved(lambda state: state.update(genotype=json.dumps({"seq": [NODE] * 2}))),
    }  # fmt: skip
    for name, content in hostile.items():
        file.write_bytes(content)
        code, err = again()
        assert code == 2 and re.fullmatch(r"error: stopped/fold0/checkpoint.pt is .*; delete it, and its fold starts anew\n", err), (name, err)
    assert not Path("executed").exists() and not (folder / "results.json").exists()
    file.write_bytes(good)
    assert again()[0] == 0  # and the right file goes on
    assert left_behind(folder.parent, "stopped", False) == left_behind(folder.parent, "whole", False)

    results = json.loads((folder / "results.json").read_text())
    for name, change in {
        "list": "[]", "cut": "{", "deep": "[" * 100_000, "latin": b"\xff", "number": "1" * 5000, "another run": {"folds": [{**results["folds"][0], "fold": 7}]},
        "accuracy": {"folds": [{**results["folds"][0], "ua": 1.5}]}, "confusion": {"folds": [{**results["folds"][0], "confusion": [[10**30] * 4] * 4}]},
        "genotype": {"folds": [{**results["folds"][0], "genotype": {"seq": 1}}]}, "name": {"folds": [{**results["folds"][0], "name": None}]},
    }.items():  # fmt: skip
        content = json.dumps({**results, **change}) if isinstance(change, dict) else change
        for file in ("results.json", "settings.json") if name in ("list", "cut", "deep", "latin", "number") else ("results.json",):
            good = (folder / file).read_bytes()
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
            code, err = again()
            (folder / file).write_bytes(good)
            assert code == 2 and err.startswith(f"error: stopped/{file} is damaged") and err.count("\n") == 1, (name, err)


def test_numbers_that_no_step_can_be_made_with_stop_the_run(undisturbed, monkeypatch, capsys):
    cwd, _ = undisturbed
    monkeypatch.chdir(cwd)
    argv = [*TINY[:-1], "--out", "broken", "--cache", "cache-whole"]
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    assert train.main(argv) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"fold 0, search, epoch 2, step 2, learning rate 0.002: the norm of the gradient is nan", said)
    assert len(set(re.findall(r"wav/?\S*|09a\d\d[WFNT]a\.wav", said))) == 8 and (cwd / "broken/fold0/not-finite.pt").exists()
    checkpoint = (cwd / "broken/fold0/checkpoint.pt").read_bytes()
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), MemoryError()):

        def clip(*args, error=error):
            raise error

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        assert train.main(argv) == 1, capsys.readouterr().err
        said = capsys.readouterr().err.splitlines()[-1]
        assert str(error)[:40] in said and "--batch" in said and (cwd / "broken/fold0/checkpoint.pt").read_bytes() == checkpoint


def test_everything_that_cannot_work_is_said_at_once(undisturbed, monkeypatch, capsys):
    cwd, _ = undisturbed
    monkeypatch.chdir(cwd)
    (cwd / "corpus/08a00Ta.wav").rename(cwd / "kept")
    (cwd / "file").touch()
    for n in range(4):
        (cwd / f"corpus/09a{n:02}Ta.wav").rename(cwd / f"sad{n}")
    arguments = "--epochs 0 --batch 9 --lr nan --cnn-cells 0 --window 0.1 --device quantum --out file/run --dropout 1 --folds 0"
    try:
        code = train.main([*TINY, *arguments.split()])
    finally:
        (cwd / "kept").rename(cwd / "corpus/08a00Ta.wav")
        for n in range(4):
            (cwd / f"sad{n}").rename(cwd / f"corpus/09a{n:02}Ta.wav")
    said = capsys.readouterr().err
    for text in ("--epochs is 0", "--batch is 9, and half of a training set only 6", "--lr is nan", "cnn_cells is 0", "multiple of 0.0625", "--device quantum",
                 "--out is file/run, where nothing can be written", "--dropout is 1.0", "fold 0: no training utterance is sad", "9 things cannot work"):  # fmt: skip
        assert text in said, (text, said)
    assert code == 2 and said.count("error:") == 1


def mutated(random, content, tokens=(b"",)):
    """Bytes with a few random changes: bits, cuts, repetitions, numbers at their limits, and tokens that the format knows."""
    content = bytearray(content)
    for _ in range(random.integers(1, 5)):
        at, n = int(random.integers(len(content) + 1)), int(random.integers(1, 9))
        new = [bytes(random.integers(0, 256, n, dtype=np.uint8)), b"", bytes(content[:at][-50:]), b"\xff" * n, b"\0" * n, b"\x7f" + b"\xff" * 3]
        new += [tokens[random.integers(len(tokens))]] * 3
        content[at : at + n * int(random.integers(2))] = new[random.integers(len(new))]
        if random.integers(8) == 0:
            del content[at:]
    return bytes(content)


def test_no_mutated_file_gets_more_than_an_answer(tmp_path, capsys):
    """2,700 mutants of genotypes, label files, tables, sounds and checkpoints: used or refused, quickly and within the memory."""
    random, counts = np.random.default_rng(0), Counter()

    def feed(kind, many, content, tokens, read, refusals=InputError):
        read(content)
        for _ in range(many):
            mutant, started = mutated(random, content, tokens), time.perf_counter()
            try:
                read(mutant)
                counts[f"{kind}: used"] += 1
            except refusals:
                counts[f"{kind}: refused"] += 1
            assert time.perf_counter() - started < 5, mutant

    text = random_genotype(3).to_json().encode()
    tokens = [b"[", b"[" * 985, b"]", b"{", b'"', b",", b"null", b"true", b"-1", b"1" * 5000, b"1e999", b"NaN", b'"seq":', b"\\ud800", *(f'"{o}"'.encode() for o in SEQ_OPS)]
    feed("genotype", 900, text, tokens, lambda mutant: str(Genotype.from_json(mutant.decode("latin-1"))), ValueError)

    iemocap(tmp_path / "iemocap")
    msp_improv(tmp_path / "msp-improv", tmp_path / "msp-improv/Evalution.txt")
    msp_podcast(tmp_path / "msp-podcast", tmp_path / "msp-podcast/labels_consensus.csv", each=1)
    own(tmp_path / "csv", "path,label,speaker,split", *(f"sounds/{s}{c}.wav,{c},{s},{split}" for s, split in zip("abc", ("train", "validation", "test")) for c in "xy"))
    label_files = {
        "iemocap": ("Session1/dialog/EmoEvaluation/Ses01F_impro04.txt", 60), "msp-improv": ("Evalution.txt", 40),
        "msp-podcast": ("labels_consensus.csv", 100), "csv": ("mine.csv", 300),
    }  # fmt: skip
    tokens = [b",", b";", b"\t", b"\n", b"\r", b'"', b"\0", b"A" * 5000, b'"' + b"x" * 140_000, b"/", b"..", b"Train", b"[", b"\xd9\xa3", b"\xc5\xbf", b"Unknown"]
    for dataset, (name, many) in label_files.items():
        path = tmp_path / dataset / name

        def read(mutant, dataset=dataset, path=path):
            path.write_bytes(mutant)
            for protocol in ("standard", "paper")[: 1 + (dataset != "csv")]:
                folds(read_corpus(dataset, path if dataset == "csv" else tmp_path / dataset, "all", protocol))

        feed(dataset, many, path.read_bytes(), tokens, read)

    def read(mutant):
        (tmp_path / "a.wav").write_bytes(mutant)
        samples = features.read_wav(tmp_path / "a.wav")
        assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()

    tokens = [b"RF64", b"RIFX", b"data", b"fmt ", b"ds64", struct.pack("<I", 2**32 - 1), struct.pack("<I", 999_983), struct.pack("<H", 65535), b"\0\0", b"\xfe\xff"]
    tracemalloc.start()
    for kind, bits, extensible in ((1, 8, False), (1, 16, True), (1, 24, False), (3, 32, True), (3, 64, False)):
        sound = riff(kind, 1 + bits // 32, 16000, bits, encode(np.sin(np.arange(42)) / 2, kind, bits), extensible, not extensible)
        feed("wav", 160, sound, tokens, read)
    assert tracemalloc.get_traced_memory()[1] < 2e8  # no header is believed that announces gigabytes
    tracemalloc.stop()

    file, options = tmp_path / "fold0" / "checkpoint.pt", train.parse([*TINY, "--cnn-cells", "1", "--seq-cells", "0", "--nodes", "1"])
    file.parent.mkdir()
    keep, net = train.Keeper(torch.device("cpu"), "run", file), train.network(options, 4)
    optimizer = torch.optim.SGD(net.weights(), 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    next(keep.epochs(2, net=net, optimizer=optimizer, schedule=schedule))
    keep.save(file)
    with zipfile.ZipFile(file) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in inside if name.endswith("data.pkl"))

    def read(mutant, whole=False):
        out = io.BytesIO(mutant)
        if not whole:  # the archive is as it should be, and the mutant is the pickle in it
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for name, content in inside.items():
                    archive.writestr(name, mutant if name == pickled else content)
        file.write_bytes(out.getvalue())
        keep = train.Keeper(torch.device("cpu"), "run", file)
        next(keep.epochs(2, net=net, optimizer=optimizer, schedule=schedule))

    tokens = [b"\x8c\x03abc", b"J\xff\xff\xff\x7f", b"K\x00", b"N", b"}", b"]", b"(", b"t", b"R", b"0", b"2", b"\x8b\xff\xff\xff\x7f", b"cos\nsystem\n", b"ctorch\nfloat32\n", b"q\x01"]
    feed("checkpoint", 200, file.read_bytes(), [b"PK\3\4", b"PK\1\2"], lambda mutant: read(mutant, whole=True))
    feed("pickle", 300, inside[pickled], tokens, read)
    assert sum(counts.values()) == 2700
    assert min(counts[f"{kind}: {answer}"] for kind in ("genotype", *label_files, "wav", "pickle") if kind != "iemocap" for answer in ("used", "refused")) > 0, counts


# ---------------------------------------------------------------------------------------------------------------------
# Many processes that share each step


def shared(order, size):
    """Some steps of search and training in float64, without dropout, BN in evaluation mode; the classes are not balanced."""
    options = tiny_options(*f"--dropout 0 --drop-path 0 --no-shift --masks 0 --search-epochs 1 --epochs 1 --size-penalty 9 --clip 1 --order {order}".split(),
                           "--batch", str(size))  # fmt: skip
    listing, data = tiny_data()
    single = SimpleNamespace(batch=data.batch, class_weights=data.class_weights)
    data.batch, data.class_weights = lambda windows: single.batch(windows).double(), lambda members: single.class_weights(members).double()
    fold = folds(listing)[1]
    members = [i for i in fold.train if i % 3 or i % 8 < 2]
    data.standardise_by(members)
    train.seed(options, 1, 0)
    alphas, logged, step = [], [], train.weight_step

    def spy(net, *args):
        alphas.append([a.detach().clone() for a in getattr(net, "alphas", list)()])
        return step(net, *args)

    def still(net):
        nn.Module.train(net.double(), False)
        net.train = lambda mode=True: net
        return net

    supernet = still(train.network(options, 4))
    train.weight_step = spy
    train.search(supernet, data, members, options, lambda **row: logged.append([row["loss"], row["alpha_loss"]]))
    torch.manual_seed(1)
    net = still(train.network(options, 4, random_genotype(1)))
    train.train(net, data, members, fold.validation, options, lambda **row: logged.append([row["loss"], row["val_ua"]]))
    train.weight_step = step
    return {"alphas": alphas, "logged": torch.tensor(logged), "supernet": supernet.state_dict(), "net": net.state_dict()}


def tiny_net():
    torch.manual_seed(0)
    return train.network(tiny_options(), 4)


def shared_by(rank, world, folder, cases):
    torch.set_num_threads(1)
    train.meet("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save([shared(*case) for case in cases], folder / f"rank{rank}.pt")
    keep = train.Keeper(torch.device("cpu"))
    keep.parts = {"net": tiny_net()}
    keep.pause()
    with torch.no_grad():
        keep.parts["net"].alpha["seq"][0, 0] += 1e-7 * rank
    with pytest.raises(train.Apart):
        keep.pause()
    torch.distributed.destroy_process_group()
    assert "gloo" not in "".join(task.read_text() for task in Path("/proc/self/task").glob("*/comm"))  # no thread is left


@pytest.mark.parametrize("world, cases", [(2, [(1, 3), (2, 3)]), (3, [(1, 4), (2, 2)])])  # batches of 2 leave the third rank none
def test_ranks_that_share_the_steps_end_where_one_process_ends(tmp_path, world, cases):
    torch.multiprocessing.spawn(shared_by, (world, tmp_path, cases), world)
    seen = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    for n, case in enumerate(cases):
        alone = shared(*case)
        assert len(alone["alphas"]) > 8 and not torch.equal(alone["alphas"][0][0], alone["alphas"][2][0])
        for rank in seen:
            torch.testing.assert_close(rank[n], alone, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(rank[n]["alphas"], seen[0][n]["alphas"], atol=0, rtol=0)  # after every step, the same bits


def test_synchronised_batch_norm_is_in_its_place():
    """On GPUs only; here it can be seen that edges still share what they shared, and that files and predictions are the same."""
    net, x = tiny_net().eval(), torch.randn(2, 1, 16, 16)
    norms, keys, y = [id(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)], list(net.state_dict()), net(x)
    train.synchronised(net)
    assert [id(m) for m in net.modules() if isinstance(m, nn.SyncBatchNorm)] == norms and list(net.state_dict()) == keys
    assert torch.equal(net(x), y)


RANKS = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch, train
train.SAVE_EVERY = 0
calls, real = [], train.weight_step
def deadly(*args):
    calls.append(1)
    if (os.environ["RANK"], len(calls)) == ("1", 3) and sys.argv[1] == "faults":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return real(*args)
train.weight_step = deadly
sys.exit(train.main(sys.argv[2:]))
"""


def torchrun(cwd, out, *more, faults="", restarts=0, code=0):
    (cwd / "ranks.py").write_text(RANKS.format(here=str(HERE)))
    launch = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {restarts} ranks.py".split()
    argv = [*launch, faults, *TINY, "--out", out, "--cache", f"cache-{out}", *more]
    return command(*argv, cwd=cwd, code=code)


def test_ranks_take_whole_folds_where_there_are_enough(undisturbed):
    cwd, _ = undisturbed
    done = torchrun(cwd, "folds")
    assert left_behind(cwd, "folds") == left_behind(cwd, "whole")
    assert done.stdout.count("pooled") == 1 and done.stderr.count("warning: emodb") == 1
    assert re.search(r"^rank [01]: fold 0: found in", done.stdout, re.M) and re.search(r"^ranks +2, each takes folds of its own", done.stdout, re.M)


def test_a_rank_that_dies_is_named_and_the_restarted_job_ends_as_if_it_had_not(undisturbed):
    """It is killed, and then has no memory; each time the job goes on from the last checkpoint."""
    cwd, _ = undisturbed
    undied = torchrun(cwd, "steps", "--folds", "0")
    assert undied.stdout.count("fold 0: found in") == undied.stdout.count("pooled") == 1 and "2, which share each step" in undied.stdout
    died = torchrun(cwd, "died", "--folds", "0", faults="faults", restarts=2)
    errors = [line for line in died.stderr.splitlines() if re.match(r"rank \d: error", line)]
    assert len(errors) == 1 and errors[0].startswith("rank 1: error: CUDA out of memory") and "Traceback" not in died.stderr, died.stderr
    assert left_behind(cwd, "steps") == left_behind(cwd, "died")
    log = list(csv.DictReader(open(cwd / "steps" / "fold0" / "log.csv")))
    assert [(row["stage"], row["epoch"]) for row in log] == [("search", "1"), ("search", "2"), ("train", "1"), ("train", "2")]
