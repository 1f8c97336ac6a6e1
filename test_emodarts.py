"""Tests are oracles: each compares with something independent (an exact gradient, a count from the literature, another
formulation, a second run) and fails when the code is wrong.

    python -m pytest test_emodarts.py
"""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from scipy.io import wavfile
from torch import nn

import emodarts
import features
import train
from emodarts import CNN_OPS, SEQ_OPS, SEQ_SPACES, Architect, Genotype, MixedOp, Network, derive
from features import InputError, Utterance

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
    for name in ("channels", "cnn_cells", "nodes", "stem_stride"):
        with pytest.raises(ValueError, match=name):
            Network(**{name: 0})
    with pytest.raises(ValueError, match="lstm, rnn, lstm_att, rnn_att"):
        Network(seq_space="gru")


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


def write_wav(path, samples, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples)


def tone(seconds, rate=16000):
    return (8000 * np.sin(2 * np.pi * 220 * np.arange(int(seconds * rate)) / rate)).astype(np.int16)


def test_emodb_index(tmp_path, capsys):
    names = {"03a01Wa": "angry", "08b02Fb": "happy", "16a07Nc": "neutral", "10b10Td": "sad", "03a02Fa": "happy"}
    for name in [*names, "03a01Aa", "03a01Ea", "08a01Lb"]:  # fear, disgust and boredom are dropped
        write_wav(tmp_path / "EmoDB" / "wav" / f"{name}.wav", tone(0.1))
    (tmp_path / "EmoDB" / "wav" / "._03a01Wa.wav").write_bytes(b"AppleDouble")
    (tmp_path / "EmoDB" / "wav" / "notes.txt").write_text("")
    for root in (tmp_path, tmp_path / "EmoDB", tmp_path / "EmoDB" / "wav"):
        _, found = features.read_corpus("emodb", root)
        assert {u.path.stem: u.label for u in found} == names
        assert all(u.speaker == u.path.name[:2] == u.group for u in found)
    assert "1 angry, 2 happy, 1 neutral, 1 sad; expected 127 angry" in capsys.readouterr().err
    with pytest.raises(InputError, match="looked for files named like 03a01Wa.wav.*--root"):
        features.read_corpus("emodb", tmp_path / "nothing")
    with pytest.raises(InputError, match="known: smoke, emodb"):
        features.read_corpus("enterface")


def test_no_speaker_is_on_two_sides():
    people = [f"{k:02}" for k in (3, 8, 9, 10, 11)]
    utterances = [Utterance(Path(f"{n}.wav"), "sad", p, group=p) for n in range(4) for p in people]
    parts = features.folds(utterances)
    assert [utterances[fold.test[0]].speaker for fold in parts] == people
    assert [utterances[fold.validation[0]].speaker for fold in parts] == people[1:] + people[:1]
    for fold in parts:
        sides = [{utterances[i].speaker for i in side} for side in (fold.train, fold.validation, fold.test)]
        assert not sides[0] & sides[1] and not sides[1] & sides[2] and not sides[0] & sides[2]
        assert sorted(fold.train + fold.validation + fold.test) == list(range(len(utterances)))
    with pytest.raises(InputError, match="needs three"):
        features.folds(utterances[:2])


def test_windows_lose_nothing():
    settings = features.Settings(window=1.0)
    for length in (10, 15999, 16000, 16001, 32000, 40000):
        samples = np.arange(length, dtype=np.float32)
        cut = features.windows(samples, settings)
        assert cut.shape[1] == 16000 and set(cut.ravel()) == set(samples)
        assert len(cut) == max(1, -(-length // 16000)) and (length < 16000 or cut[-1, -1] == length - 1)
        assert length > 16000 or np.array_equal(cut[0, :length], samples)
    short = features.windows(np.ones(10, np.float32), features.Settings(window=1.0, padding="zero"))
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
    settings = features.Settings(window=2.0)
    expected = cepstra.reshape(128, 32, 4).max(axis=2)
    assert settings.shape == expected.shape and features.Settings().shape == (128, 128)
    np.testing.assert_allclose(features.mfcc(settings)(torch.tensor(samples, dtype=torch.float32)).numpy(), expected, atol=0.02)
    fewer = features.mfcc(features.Settings(coefficients=20, window=2.0))(torch.tensor(samples, dtype=torch.float32))
    np.testing.assert_allclose(fewer.numpy(), expected[:20], atol=0.02)


def test_features_are_computed_once_for_each_setting(tmp_path, monkeypatch):
    for name, seconds in (("03a01Wa", 0.5), ("08a01Fa", 2.5), ("09a01Na", 0.01)):
        write_wav(tmp_path / "wav" / f"{name}.wav", tone(seconds))
    root, found = features.read_corpus("emodb", tmp_path)
    settings = features.Settings(coefficients=8, window=1.0)
    store = features.load(root, found, settings, tmp_path / "cache")
    assert store.features.shape == (5, 8, 16) and store.seconds.tolist() == [0.5, 2.5, 0.01] and np.isfinite(store.features).all()
    window, of = store.windows_of([2, 1])
    assert window.tolist() == [4, 1, 2, 3] and of.tolist() == [0, 1, 1, 1]

    reads = []
    read = features.read_wav
    monkeypatch.setattr(features, "read_wav", lambda path: reads.append(path) or read(path))
    again = features.load(root, found, settings, tmp_path / "cache")
    assert not reads and np.array_equal(again.features, store.features)
    for other in ({"coefficients": 9}, {"window": 2.0}, {"padding": "zero"}):
        reads.clear()
        features.load(root, found, features.Settings(**{"coefficients": 8, "window": 1.0, **other}), tmp_path / "cache")
        assert len(reads) == 3, other
    reads.clear()
    write_wav(tmp_path / "wav" / "03a01Wa.wav", tone(0.6))
    features.load(root, found, settings, tmp_path / "cache")
    assert len(reads) == 3
    for file in (tmp_path / "cache").glob("*/store.json"):
        file.write_text("{}")
    with pytest.raises(InputError, match="delete it"):
        features.load(root, found, settings, tmp_path / "cache")


@pytest.mark.parametrize("dtype, full", [(np.int16, 32767), (np.int32, 2**31 - 1), (np.float32, 1.0), (np.uint8, 255)])
def test_wav_formats_mean_the_same(tmp_path, dtype, full):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    scaled = np.round(wave * 127 + 128) if dtype == np.uint8 else wave * full
    write_wav(tmp_path / "x.wav", np.stack([scaled, scaled], axis=1).astype(dtype), 48000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    got = features.read_wav(tmp_path / "x.wav")
    assert got.shape == (16000,) and np.abs(got - expected)[100:-100].max() < 0.01


def test_bad_audio_says_why(tmp_path):
    write_wav(tmp_path / "whole.wav", tone(1))
    whole = (tmp_path / "whole.wav").read_bytes()
    not_a_number = np.full(100, np.nan, np.float32)
    for name, content, says in (
        ("stub", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("text", b"hello", "not a readable wav"),
        ("empty", b"", "not a readable wav"),
        ("truncated", whole[:2000], "truncated"),
        ("header", whole[:44], "truncated|no samples|not a readable wav"),
    ):
        (tmp_path / f"{name}.wav").write_bytes(content)
        with pytest.raises(InputError, match=says):
            features.read_wav(tmp_path / f"{name}.wav")
    write_wav(tmp_path / "nan.wav", not_a_number)
    with pytest.raises(InputError, match="not finite"):
        features.read_wav(tmp_path / "nan.wav")


def test_silence_gives_finite_features():
    assert torch.isfinite(features.mfcc(features.Settings())(torch.zeros(128000))).all()


# ---------------------------------------------------------------------------------------------------------------------
# Search, training, test


def test_metrics_by_hand():
    labels, predicted = [0, 0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 1, 0, 3]
    confusion = train.confusion_matrix(labels, predicted)
    assert confusion.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert train.wa(confusion) == pytest.approx(5 / 7)
    assert train.ua(confusion) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)  # no utterance is neutral


def test_halves_are_stratified_and_complete():
    labels = np.array([0] * 21 + [1] * 10 + [2] * 7 + [3] * 2)
    w, alpha = train.halves(list(range(40)), labels)
    assert sorted(w + alpha) == list(range(40)) and abs(len(w) - len(alpha)) <= 1
    assert np.abs(np.bincount(labels[w]) - np.bincount(labels[alpha])).max() <= 1


def tiny_options(*more):
    sizes = "--channels 2 --cnn-cells 2 --seq-cells 1 --nodes 1 --stem-stride 4 --search-epochs 2 --epochs 2 --seq-space rnn"
    return train.parse([*sizes.split(), *more])


def tiny_data(poison=()):
    """Utterances of five speakers, the last of them with two windows each; `poison`ed utterances are NaN."""
    utterances = [Utterance(Path(f"{s}{c}{n}"), c, s, group=s) for s in "abcde" for c in features.CLASSES for n in range(2)]
    first = np.concatenate([[0], np.cumsum([2 if u.speaker == "e" else 1 for u in utterances])])
    maps = np.random.default_rng(0).standard_normal((first[-1], 16, 16)).astype(np.float32)
    for i in poison:
        maps[first[i] : first[i + 1]] = np.nan
    store = features.Store(maps, first, np.ones(len(utterances)))
    return utterances, train.Data(store, [features.CLASSES.index(u.label) for u in utterances], torch.device("cpu"))


def test_validation_and_test_speakers_touch_nothing():
    """With their features replaced by NaN, search and training end with the same alphas and weights, bit for bit."""
    options = tiny_options()

    def states(poison):
        utterances, data = tiny_data(poison)
        fold = features.folds(utterances)[1]
        data.standardise_by(fold.train)
        train.seed(options, 1, 0)
        supernet = train.network(options)
        train.search(supernet, data, fold.train, options, lambda **row: None)
        net = train.network(options, derive(supernet))
        train.train(net, data, fold.train, fold.validation, options, lambda **row: None)
        return fold, {**{"super." + n: t for n, t in supernet.state_dict().items()}, **net.state_dict()}

    fold, clean = states(())
    _, poisoned = states(fold.validation + fold.test)
    assert all(torch.isfinite(t).all() and torch.equal(t, poisoned[name]) for name, t in clean.items())
    _, broken = states(fold.train[:1])  # the oracle sees something: a training utterance does matter
    assert not torch.isfinite(broken["head.weight"]).all()


def test_batches_hold_every_window_once_and_standardisation_is_the_training_speakers():
    utterances, data = tiny_data()
    members = [i for i, u in enumerate(utterances) if u.speaker in "de"]
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
    utterances, data = tiny_data()
    data.standardise_by(range(len(utterances)))
    net = train.network(tiny_options(), random_genotype(1, ("reduce", "seq")))
    logits = train.predict(net, data, [39, 0], batch=2)
    with torch.no_grad():
        expected = [net(data.batch(torch.tensor(w))).mean(0) for w in ([46, 47], [0])]
    np.testing.assert_allclose(logits, torch.stack(expected), atol=1e-6)


def test_select_best_keeps_the_latest_of_the_best_epochs(monkeypatch):
    utterances, data = tiny_data()
    fold = features.folds(utterances)[0]
    data.standardise_by(fold.train)
    net = train.network(tiny_options(), random_genotype(1, ("reduce", "seq")))
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


def command(*arguments, cwd, code=0):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real command, twice with one seed."""
    cwd = tmp_path_factory.mktemp("run")
    sizes = "--channels 2 --cnn-cells 3 --nodes 1 --stem-stride 4 --search-epochs 1 --epochs 2 --seq-space rnn --window 2"
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
        assert len(rows) == 40 and {row["utterance"][:2] for row in rows} == set(fold["test"])
        right = {c: [row["predicted"] == c for row in rows if row["label"] == c] for c in features.CLASSES}
        assert fold["wa"] == pytest.approx(sum(map(sum, right.values())) / 40)
        assert fold["ua"] == pytest.approx(np.mean([np.mean(r) for r in right.values()]))
        pooled += np.array(fold["confusion"])
        log = list(csv.DictReader(open(folder / "log.csv")))
        assert [(row["stage"], row["epoch"]) for row in log] == [("search", "1"), ("train", "1"), ("train", "2")]
    assert results["wa"]["pooled"] == pytest.approx(pooled.trace() / 80)
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
    settings = features.Settings(**model["features"])
    for row in list(csv.DictReader(open(cwd / "one" / "fold1" / "predictions.csv")))[:5]:
        cut = features.windows(features.read_wav(cwd / "data" / "smoke" / "wav" / row["utterance"]), settings)
        maps = torch.stack([features.mfcc(settings)(torch.from_numpy(window)) for window in cut])  # (W, F, T)
        with torch.no_grad():
            p = net(((maps - model["mean"]) / model["std"])[:, None]).mean(0).softmax(0)
        np.testing.assert_allclose(p, [float(row[c]) for c in model["classes"]], atol=1e-4)


def without_seconds(value):
    if isinstance(value, dict):
        return {name: without_seconds(v) for name, v in value.items() if name != "seconds"}
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


def test_index_as_json(finished):
    cwd, _ = finished
    out = command(HERE / "features.py", "--json", "index.json", cwd=cwd).stdout
    assert "60 angry, 60 happy, 60 neutral, 60 sad" in out and "6: 03 04 05 06 07 08" in out
    index = json.loads((cwd / "index.json").read_text())
    assert index["dataset"] == "smoke" and len(index["utterances"]) == 240
    for row in index["utterances"]:
        assert row["fold"] == int(row["speaker"]) - 3 and row["label"] in features.CLASSES and (cwd / "data" / "smoke" / row["path"]).is_file()


def test_the_reference_needs_torch_alone():
    """emodarts.py imports torch and the standard library, nothing else."""
    imported = set()
    for node in ast.walk(ast.parse((HERE / "emodarts.py").read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        imported |= {name.split(".")[0] for name in names}
    assert imported - set(sys.stdlib_module_names) == {"torch"}
