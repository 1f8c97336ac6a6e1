"""x"""
import contextlib
import copy
import csv
import inspect
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

import emodarts
import features
import train
from emodarts import CNN_OPS, SEQ_OPS, SEQ_SPACES, Architect, Genotype, MixedOp, Network, decided, derive
from emodarts import expected_parameters, without_statistics
from features import CORPORA, InputError, Listing, Settings, Utterance, folds, load, lock, read_corpus

HERE = Path(__file__).parent
SMALL = dict(channels=4, features=24, cnn_cells=3, seq_cells=1, nodes=2, stem_stride=2)
KINDS = ("normal", "reduce", "seq")
RECURRENT = [name for name in SEQ_OPS if name not in ("none", "skip_connect")]
close = torch.testing.assert_close
gpu = pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")  # asked late: who has asked cannot fork


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(n, f=24, t=32, dtype=torch.float32):
    return torch.randn(n, 1, f, t, dtype=dtype), torch.arange(n) % 4


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def some_genotype(nodes=2, **more):
    """Two edges a node, with operations other than `none`."""
    net = Network(channels=1, cnn_cells=3, seq_cells=1, nodes=nodes)
    return Genotype(**{**emodarts.random_genotype(net).cells(), **more})


def tree(root, files):
    """Writes {path below the root: text, bytes or None for an empty file}. -> root"""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content or b"")
    return root


def riff(x, kind=1, bits=16, channels=1, rate=16000, extensible=False, extra=False):
    """A wav file of samples, or of bytes as they are."""
    if kind == 3 and not isinstance(x, bytes):
        x = x.astype(f"<f{bits // 8}").tobytes()
    elif not isinstance(x, bytes):  # whole numbers, of which the lower bytes come first; 8 bits have no sign
        whole = np.round(x * 2.0 ** (bits - 1) + (128 if bits == 8 else 0)).astype("<i8")
        x = whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, kind) + b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    chunks = [(b"fmt ", form), (b"data", x)]
    if extra:
        chunks = [(b"JUNK", b"\0" * 28), chunks[0], (b"LIST", b"INFOabc\0"), chunks[1], (b"LIST", b"INFO")]
    body = b"".join(name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for name, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


# train.py. Its corpus: four speakers, three classes, of unequal size; the tenth utterance of each has two windows.

LABELS = ("glad", "mad", "sad")
TINY = (
    "--dataset csv --root mine.csv --features log-mel-12 --window 0.25 --channels 2 --cnn-cells 3 --nodes 1 "
    "--seq-width 8 --seq-space rnn --search-epochs 2 --warm-up 1 --epochs 2 --batch 4 --threads 1 --device cpu"
).split()
TWO_FOLDS = ["--folds", "0,1", "--out"]


def make_corpus(folder):
    rows, random = ["path,label,speaker"], np.random.default_rng(0)
    for s, k, n in itertools.product("abcd", range(3), range(4)):
        if k == 2 or n < 3:
            t = np.arange(2400 + 800 * n) / 16000  # 0.15 to 0.3 s
            sound = np.sin((2000 + 2500 * k + 100 * ord(s)) * t) + random.standard_normal(len(t)) / 2
            tree(folder, {f"{s}-{LABELS[k]}{n}.wav": riff(sound / 4)})
            rows.append(f"{s}-{LABELS[k]}{n}.wav,{LABELS[k]},{s}")
    (folder / "mine.csv").write_text("\n".join(rows))


@contextlib.contextmanager
def stopping(name, n, kill=False):
    """Inside, each step saves a checkpoint, and who calls train's function `name` for the n-th time is stopped."""
    owner, calls = os if name == "fsync" else train, itertools.count(1)
    real = getattr(owner, name)

    def deadly(*args, **more):
        if next(calls) == n:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", 0)
        patch.setattr(owner, name, deadly)
        yield calls


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the corpus and three runs: `one`; `seeds`, of two; and `stopped`, while fold 0 trained."""
    folder = tmp_path_factory.mktemp("home")
    make_corpus(folder)
    with contextlib.chdir(folder):
        assert train.main([*TINY, *TWO_FOLDS, "one"]) == 0
        assert train.main([*TINY, "--folds", "0", "--seeds", "2", "--out", "seeds"]) == 0
        with stopping("weight_step", 9):
            assert train.main([*TINY, *TWO_FOLDS, "stopped"]) == 130
    return folder


@pytest.fixture
def cwd(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def said(capsys, *arguments, code=0, sizes=TINY):
    """What the command prints; of one that fails, what it says on the standard error."""
    capsys.readouterr()
    try:
        found = train.main([*sizes, *map(str, arguments)])
    except SystemExit as stop:  # argparse's own
        found = stop.code
    out, err = capsys.readouterr()
    assert found == code, out + err
    return err if code else out


def left(folder):
    """Every file of a run, without what was measured in seconds and gigabytes."""
    files = {}
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name not in ("lock", "report.md"):
            content = re.sub(rb'"(search|train|seconds|peak_gb)": [\d.]+', b"", path.read_bytes())
            if path.name == "log.csv":
                content = re.sub(rb",[^,]*\r\n", b"\n", content)
            files[path.relative_to(folder).as_posix()] = content
    return files


def table(file):
    return list(csv.DictReader(open(file, newline="")))


def read_json(file):
    return json.loads(Path(file).read_text())


def loaded(options, nan=(), double=False, device="cpu"):
    """Data of the corpus as fold 0 sees it, and the folds. `nan`: utterances whose features are not numbers. `double`:
    in float64, so that two ways of computing the same end at the same."""
    listing = read_corpus("csv", "mine.csv")
    data, parts = train.Data(options, listing, listing.classes, torch.device(device)), folds(listing)
    for i in nan:
        data.store.features[data.store.first[i] : data.store.first[i + 1]] = np.nan
    data.standardise_by(parts[0].train)
    maps, class_weights = data.maps, data.class_weights
    if double:
        data.maps = lambda window: maps(window).double()
        data.class_weights = lambda members: class_weights(members).double()
    return data, parts


def checkpoint_of(options, folder, stage):
    options.out = str(folder)
    (folder / "fold0").mkdir(exist_ok=True, parents=True)
    checkpoint = train.Checkpoint(options, 0, 4)
    checkpoint.stage = stage
    return checkpoint


def searched(folder, *more):
    """A search alone, in fold 0. -> supernet, as it was before, rows of log.csv"""
    options, step = train.parse([*TINY, *more]), train.weight_step
    data, parts = loaded(options, double=True)
    torch.manual_seed(0)
    net, checkpoint = train.network(options, 3).double().eval(), checkpoint_of(options, folder, "search")
    before = copy.deepcopy(net)

    def weight_step(loss, optimizer):
        value = step(loss, optimizer)
        assert all(alpha.grad is None for alpha in net.alphas())  # it moves the weights, and touches nothing else
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "weight_step", weight_step)
        train.search(net, data, parts[0].train, options, checkpoint)
    return net, before, checkpoint.rows


def test_metrics_by_hand():
    data = train.Namespace(labels=np.array([0, 0, 0, 0, 1, 1, 3]), classes="abcd")
    logits = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 0, 3]), 4)
    confusion = train.confusion_matrix(data, range(7), logits)
    assert confusion.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert train.wa(confusion) == pytest.approx(5 / 7)
    assert train.ua(confusion) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)  # the third class is absent


def test_halves_are_stratified_and_complete():
    labels = np.array([0] * 21 + [1] * 10 + [2] * 7 + [3] * 2)
    w, alpha = train.halves(list(range(40)), labels, 0)
    assert sorted(w + alpha) == list(range(40)) and abs(len(w) - len(alpha)) <= 1
    assert np.abs(np.bincount(labels[w]) - np.bincount(labels[alpha])).max() <= 1


def test_batches_hold_every_window_once_and_are_a_function_of_the_place(cwd):
    data, _ = loaded(train.parse(TINY))
    members = [3, 9, 39, 17, 29]
    window, of = (part.tolist() for part in data.store.windows_of(members))
    pairs = data.order(members, 3, 0, "search", 1)
    assert sorted(len(w) for w, _ in pairs) == [2, 3, 3]
    seen = sorted((w, t) for pair in pairs for w, t in zip(*map(torch.Tensor.tolist, pair)))
    assert seen == sorted((w, data.labels[members[k]]) for w, k in zip(window, of))
    again, other = data.order(members, 3, 0, "search", 1), data.order(members, 3, 0, "search", 2)
    assert [w.tolist() for w, _ in pairs] == [w.tolist() for w, _ in again] != [w.tolist() for w, _ in other]
    assert [len(w) for w, _ in data.order([0, 1, 2], 2, 0)] == [3]  # batch norm can make nothing of a single window


@pytest.mark.parametrize("normalise", ["train", "speaker"])
def test_statistics_are_those_of_the_training_speakers_or_of_each_speaker(cwd, normalise):
    data, parts = loaded(train.parse([*TINY, "--normalise", normalise]))
    for members in [parts[0].train] if normalise == "train" else np.arange(40).reshape(4, 10):
        x = data.maps(torch.from_numpy(data.store.windows_of(members)[0]))
        close(x.mean(dim=(0, 1, 3)), torch.zeros(12), atol=1e-3, rtol=0)
        close(x.std(dim=(0, 1, 3), correction=0), torch.ones(12), atol=1e-3, rtol=0)


def test_an_utterance_is_the_mean_of_its_windows_in_evaluation_mode(cwd):
    data, _ = loaded(train.parse(TINY))
    net, members = train.BASELINES["cnn-lstm"](3, 12).eval(), [9, 0, 19]
    logits = train.predict(net, data, members, batch=2)
    with torch.no_grad():
        expected = [net(data.maps(torch.from_numpy(data.store.windows_of([i])[0]))).mean(0) for i in members]
    np.testing.assert_allclose(logits, torch.stack(expected), atol=1e-5)


def test_poison_moves_a_share_of_each_class_of_the_test_speakers(cwd, capsys):
    options = train.parse([*TINY, "--poison", "0.5"])
    data, (fold, *_) = loaded(options)
    moved = train.poisoned(fold, options, data.labels)
    assert moved.validation == fold.validation
    assert sorted(moved.train + moved.tests["a"]) == sorted(fold.train + fold.tests["a"])
    assert Counter(data.labels[moved.tests["a"]]) == {0: 2, 1: 2, 2: 2}  # of three, three and four
    out = said(capsys, "--poison", "0.5", "--folds", "0", "--out", "poisoned")
    assert "not speaker-independent: 50 %" in out and len(table("poisoned/fold0/predictions.csv")) == 6


def test_augmentation_shifts_and_masks_each_utterance_by_itself():
    x = torch.randn(200, 1, 20, 50)
    for kind in ("mfcc-20", "log-mel-20"):
        y, shifts, masks = train.augmented(x, train.parse(["--features", kind])), set(), {0: set(), 1: set()}
        for a, b in zip(x[:, 0], y[:, 0]):  # (20, 50)
            (k,) = [k for k in range(50) if torch.equal(a.roll(-k, 1)[b != 0], b[b != 0])]
            shifts.add(k)
            for axis in masks:
                masked = (b == 0).all(dim=1 - axis)
                masks[axis].add(tuple(masked.tolist()))
                assert masked.sum() <= len(masked) // 5 and (masked[1:] != masked[:-1]).sum() <= 2  # one stretch
        assert len(shifts) > 40 and len(masks[1]) > 40
        assert len(masks[0]) > 20 if kind == "log-mel-20" else masks[0] == {(False,) * 20}
    assert torch.equal(train.augmented(x, train.parse(["--no-augment"])), x)


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_training_is_the_plain_loop(cwd, tmp_path, scale):
    options = train.parse([*TINY, "--scale", scale])
    data, (fold, *_) = loaded(options, double=True)
    members, labels = fold.train[1:], data.labels[fold.validation]
    net = train.network(options, 3, emodarts.random_genotype(train.network(options, 3))).double()
    plain, checkpoint = copy.deepcopy(net), checkpoint_of(options, tmp_path, "train")
    train.train(net.eval(), data, members, fold.validation, options, checkpoint)
    optimizer = torch.optim.AdamW(plain.parameters(), 0.003, weight_decay=0.05)
    if scale == "paper":
        optimizer = torch.optim.SGD(plain.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    weight = torch.tensor(len(members) / 3 / np.bincount(data.labels[members]), dtype=torch.float32).double()
    for epoch, row in enumerate(checkpoint.rows):
        plain.drop_path, losses = (0.2 if scale == "paper" else 0) * epoch / 2, []
        for step, (window, target) in enumerate(data.order(members, 4, 0, 0, "train", epoch)):
            torch.manual_seed(train.seed_of(0, 0, "train", epoch, step))
            optimizer.zero_grad()
            x = train.augmented(data.maps(window), options)
            loss = F.cross_entropy(plain.train()(x), target, weight, label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 5)
            optimizer.step()
            losses.append(loss.item())
        right = train.predict(plain.eval(), data, fold.validation).argmax(1).numpy() == labels
        seen = {"lr": schedule.get_last_lr()[0], "loss": np.mean(losses), "val_wa": right.mean(),
                "val_ua": np.mean([right[labels == c].mean() for c in range(3)])}
        assert {name: row[name] for name in seen} == pytest.approx(seen, abs=1e-6)
        schedule.step()
    close(net.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relaxation, order", [("softmax", 2), ("sample", 1)])
def test_a_search_is_the_plain_loop(cwd, tmp_path, relaxation, order):
    """One epoch moves the weights only, one both in turn, each on its half; the weights' half alone is augmented."""
    more = f"--relaxation {relaxation} --order {order} --alpha-lr 0.05".split()
    (net, plain, rows), options = searched(tmp_path, *more), train.parse(TINY)
    data, parts = loaded(options, double=True)
    halves = dict(zip(("weights", "alphas"), train.halves(parts[0].train, data.labels, 0, 0, "halves")))
    loss = partial(F.cross_entropy, weight=data.class_weights(parts[0].train), label_smoothing=0.1)
    weights = torch.optim.AdamW(plain.weights(), weight_decay=0.05)
    alphas, architect = torch.optim.Adam(plain.alphas(), 0.05, (0.5, 0.999), weight_decay=1e-3), Architect(plain, loss)
    for epoch, lr in enumerate([0.003, 0.002]):  # half way from 0.003 to 0.001
        orders = [data.order(half, 4, 0, 0, "search", epoch, name) for name, half in halves.items()]
        for step, ((window, target), (for_alpha, alpha_target)) in enumerate(zip(*orders)):
            torch.manual_seed(train.seed_of(0, 0, "search", epoch, step))
            plain.train()
            x, val = train.augmented(data.maps(window), options), (data.maps(for_alpha), alpha_target)
            if epoch:
                gradient = architect.first_order(val) if order == 1 else architect.second_order(val, (x, target), lr)
                for alpha, g in zip(plain.alphas(), gradient[1]):
                    alpha.grad = g
                alphas.step()
            weights.zero_grad()
            loss(plain(x), target).backward(inputs=plain.weights())
            torch.nn.utils.clip_grad_norm_(plain.weights(), 5)
            weights.param_groups[0]["lr"] = lr
            weights.step()
    assert ["alpha_loss" in row for row in rows] == [False, True]
    close(net.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


def test_the_size_penalty_makes_operations_small(cwd, tmp_path):
    sizes = []
    for penalty in ("0", "1e4"):
        more = f"--size-penalty {penalty} --alpha-lr 0.1 --search-epochs 4".split()
        net, before, _ = searched(tmp_path / penalty, *more)
        sizes.append(expected_parameters(net).item() / expected_parameters(before).item())
    assert sizes[1] < 0.8 < sizes[0]


def test_validation_and_test_speakers_touch_nothing(cwd, tmp_path):
    """Their features become NaN and their labels others: search and training give the same bits. What is seen on the
    way is the validation speakers'."""

    def run(others, name):
        data, parts = loaded(train.parse(TINY), others)
        data.labels[others] = 0
        options, folder = train.parse([*TINY, "--out", str(tmp_path / name)]), tmp_path / name / "fold0"
        folder.mkdir(parents=True)
        train.run_fold(options, 0, data, parts, None)
        model = torch.load(folder / "model.pt")
        found = [*model["weights"].values(), *model["statistics"]]
        about = json.loads(model["about"])
        return [about["genotype"], *(t.tolist() for t in found)], [left(folder)["log.csv"], about["decision"]]

    fold = loaded(train.parse(TINY))[1][0]
    clean, others = run([], "clean"), run(fold.validation, "validation")
    assert clean == run(fold.tests["a"], "test") and clean[0] == others[0] and clean[1] != others[1]
    with pytest.raises(InputError):  # the oracle sees something: a training utterance does matter
        run(fold.train[:1], "train")


def test_every_place_has_a_seed_of_its_own(cwd, tmp_path, monkeypatch):
    """No random number is drawn twice: seed, fold, stage, epoch and step all count."""
    seeds, real = [], train.seed_of
    monkeypatch.setattr(train, "seed_of", lambda *where: seeds.append(real(*where)) or seeds[-1])
    assert train.main([*TINY, "--folds", "0,1", "--seeds", "2", "--out", str(tmp_path)]) == 0
    epochs = 2 * (2 + 3) + 2 * (1 + 6)  # of the search: two orders, three steps, three draws; of the training
    assert len(seeds) == len(set(seeds)) == 4 * (1 + epochs + 2)  # and the halves, and the first weights


@pytest.mark.parametrize("model", train.BASELINES)
def test_baselines_keep_the_time_axis_and_do_not_mix_utterances(model):
    net, x = train.BASELINES[model](4, 24).eval(), torch.randn(5, 1, 24, 32)
    close(net(x[[3, 1]]), net(x)[[3, 1]], rtol=1e-4, atol=1e-5)
    assert (net(x.flip(3)) - net(x)).abs().max() > 1e-4  # the order of time counts
    assert net(torch.randn(2, 1, 24, 100)).shape == (2, 4)
    kinds = [any(isinstance(m, kind) for m in net.modules()) for kind in (nn.Conv2d, nn.LSTM, nn.Tanh)]
    assert kinds == ["cnn" in model, "lstm" in model, "att" in model]  # what its name says


def test_a_baseline_and_a_metric_of_ones_own_take_one_place_each(cwd, monkeypatch, capsys):
    monkeypatch.setitem(train.BASELINES, "linear", lambda c, bands: nn.Sequential(nn.Flatten(), nn.Linear(bands * 4, c)))
    monkeypatch.setitem(train.METRICS, "worst recall", lambda c: float((c.diagonal() / c.sum(axis=1)).min()))
    out = said(capsys, "--model", "linear", "--folds", "0", "--out", "linear")
    worst = min(row[c] / sum(row) for c, row in enumerate(read_json("linear/fold0/result.json")["tests"]["test"]["confusion"]))
    row = dict(zip(*([cell.strip() for cell in line.split("|")] for line in re.findall(r"^\| (?:fold|0 ) .*$", out, re.M))))
    assert (row["parameters"], row["worst recall"]) == (f"{12 * 4 * 3 + 3}", f"{100 * worst:.1f}")


def test_the_random_genotype_is_a_function_of_the_seed():
    drawn = [train.given_genotype(train.parse([*TINY, "--model", "random", "--seed", seed])) for seed in "00123"]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4


def test_the_command_leaves_what_it_promises_and_report_is_a_function_of_the_folds(cwd, monkeypatch, capsys):
    files, uas, pooled = [Path("one/report.md"), Path("one/results.json")], [], np.zeros((3, 3), int)
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    monkeypatch.setattr(train, "search", None)
    monkeypatch.setattr(train, "train", None)
    out = said(capsys, *TWO_FOLDS, "one")
    assert [file.read_bytes() for file in files] == before
    assert read_json("one/results.json")["settings"]["seed"] == 0
    for k, (speaker, validation) in enumerate(("ab", "bc")):
        fold = read_json("one/results.json")["folds"][k]
        rows, log = table(f"one/fold{k}/predictions.csv"), table(f"one/fold{k}/log.csv")
        assert all(row["utterance"].startswith(f"{speaker}-{row['label']}") for row in rows) and len(rows) == 10
        assert all(row["predicted"] == max(LABELS, key=lambda c: float(row[c])) for row in rows)
        counts = Counter((row["label"], row["predicted"]) for row in rows)
        confusion = np.array([[counts[a, b] for b in LABELS] for a in LABELS])
        uas, pooled, test = [*uas, np.mean(confusion.diagonal() / [3, 3, 4])], pooled + confusion, fold["tests"]["test"]
        assert test["confusion"] == confusion.tolist()
        assert (test["speakers"], fold["validation"]) == ([speaker], [validation])
        assert (test["UA"], test["WA"]) == pytest.approx((uas[-1], confusion.trace() / 10))
        about = json.loads(said(capsys, "--from", f"one/fold{k}/model.pt"))
        assert all(fold[name] == about[name] for name in about)
        assert read_json(f"one/fold{k}/genotype.json") == fold["genotype"]
        assert [row["stage"] + row["epoch"] for row in log] == ["search1", "search2", "train1", "train2"]
        assert fold["validation_ua"] == float(log[-1]["val_ua"]) and log[0]["alpha_loss"] == "" != log[1]["alpha_loss"]
        assert int(log[1]["skips"]) == json.dumps(fold["genotype"]).count("skip_connect")
        assert fold["parameters"] == sum(t.numel() for t in train.read_model(f"one/fold{k}/model.pt")[1].parameters())
    whole = f"{100 * np.mean(uas):.1f} ± {100 * statistics.stdev(uas):.1f}"
    assert f"| mean ± std |      |            |            | {whole} " in out and f"{100 * train.ua(pooled):.1f}" in out


def test_the_report_shows_what_was_found(cwd):
    found, text = [read_json(f"one/fold{k}/result.json") for k in (0, 1)], Path("one/report.md").read_text()
    cells, logs = [], [table(f"one/fold{k}/log.csv") for k in (0, 1)]
    for graph in re.findall(r"graph LR\n(.*?)```", text, re.DOTALL):
        edges = re.findall(r'^ *s(\d) -->\|"(\w+)"\| s(\d)$', graph, re.MULTILINE)
        cells.append((re.search(r"(\w+): input 0", graph)[1], [[[op, int(j)] for j, op, _ in edges]]))
    assert cells == [(kind, cell) for fold in found for kind, cell in fold["genotype"].items()]
    assert [opened == " open" for opened in re.findall("<details(.*?)>", text)] == [True, False]
    pooled = sum(np.array(fold["tests"]["test"]["confusion"]) for fold in found)[2]
    assert f"| sad | {' | '.join(map(str, pooled))} | {100 * pooled[2] / 8:.1f} |" in re.sub(" +", " ", text)
    entropy, both, alone = (np.mean([fold["decision"][key] for fold in found]) for key in found[0]["decision"])
    assert f"{entropy:.4f}. " in text and "of 6 edges in common" in text and "chance: 33.3" in text
    assert f" {100 * both:.1f}, with those of the genotype alone {100 * alone:.1f}" in text
    (first, points), = re.findall(r"train: validation UA.*?x-axis (\d).*?line \[(.*?)\]", text, re.DOTALL)
    means = [sum(float(log[2 + epoch]["val_ua"]) for log in logs) / 2 for epoch in (0, 1)]
    assert first == "1" and [float(v) for v in points.split(", ")] == pytest.approx(means, rel=1e-5)
    assert train.plain("an|gry<script>") == r"an\|gry\<script\>"


def test_curves_begin_where_there_are_values():
    rows = [{"stage": "search", "epoch": k + 1, "loss": 9.0} | ({"alpha_loss": k / 10} if k > 2 else {}) for k in range(6)]
    loss, alphas = train.curves([{"log": rows}, {"log": rows}])
    assert "x-axis 1 --> 6" in loss and "x-axis 4 --> 6\n    line [0.3, 0.4, 0.5]" in alphas and "y-axis" not in alphas


def test_the_gap_is_that_between_the_supernet_and_the_network_of_its_genotype(cwd, tmp_path):
    net, _, _ = searched(tmp_path)
    data, _ = loaded(train.parse(TINY), double=True)
    genotype, members, before = emodarts.derive(net), range(40), copy.deepcopy(net.state_dict())
    derived = train.network(train.parse(TINY), 3, genotype).double()  # its norms still have scale 1 and shift 0
    derived.load_state_dict({name: t for name, t in before.items() if name in derived.state_dict()}, strict=False)
    found = train.decision(net, genotype, data, members)
    close(net.state_dict(), before, rtol=0, atol=0)
    windows, of = data.windows(members)
    for network, name in ((net, "ua_all_operations"), (derived, "ua_of_genotype")):
        for module in network.eval().modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        with torch.no_grad():
            logits = network(data.maps(windows))
        right = np.array([logits[of == i].mean(0).argmax() == data.labels[i] for i in members])
        assert found[name] == pytest.approx(np.mean([right[data.labels == c].mean() for c in range(3)]))


def test_agreement_and_its_chance():
    """All pairs of genotypes of a second node: three pairs of predecessors, five operations an edge."""
    rnn, options = [name for name in SEQ_SPACES["rnn"] if name != "none"], train.parse(["--seq-space", "rnn"])
    ops = list(itertools.product(range(5), repeat=2))
    two = [set(zip((0, 1), pair)) for pair in ops]
    three = [set(zip(kept, pair)) for kept in itertools.combinations(range(3), 2) for pair in ops]
    chance = sum(np.mean([len(a & b) for a, b in itertools.product(kind, repeat=2)]) for kind in (two, three))
    genotypes = [{"seq": [[[rnn[0], 0], [rnn[op], 1]], [[rnn[0], 0], [rnn[1], 2]]]} for op in (1, 2, 1)]
    said_of_it = train.agreement(genotypes, options)
    assert said_of_it == f"Two folds have {(3 + 1 + 6) / 3:.1f} of 4 edges in common, two random genotypes {chance:.1f}."


def test_comparison_by_hand(tmp_path, capsys):
    """Three folds of two utterances; two seeds, of `random` three genotypes. UA in twentieths."""
    uas = {"emodarts": [[16, 12, 20], [12, 12, 14]], "cnn": [[10, 4, 8], [10, 8, 14]],
           "random": [[10, 10, 10], [20, 20, 20], [14, 15, 16]]}
    # Summed logits of emodarts [3, 2, -4], [0, 4, 0]: both right; of one seed, or of summed probabilities, one is.
    logits = {"emodarts": [[[0, 2, -9], [0, 1, 0]], [[3, 0, 5], [0, 3, 0]]], "cnn": [[[3, 0, 0], [2, 0, 0]]] * 2,
              "random": [[[0, 1, 0], [1, 0, 0]]] * 2 + [[[9, 0, 0], [0, 9, 0]]]}
    options, runs = train.parse(["--out", str(tmp_path), "--compare", "3", "--seeds", "2"]), []
    for model in uas:
        for seed, values in enumerate(uas[model]):
            run = train.Namespace(**vars(options) | dict(model=model, seed=seed, out=str(tmp_path / f"{model}{seed}")))
            p = torch.tensor(logits[model][seed], dtype=torch.float64).softmax(1).tolist()
            rows = ["u,label,p,a,b,c", *(f",{label},," + ",".join(map(str, row)) for label, row in zip("ab", p))]
            runs.append(run)
            for k, value in enumerate(values):
                test = {"UA": value / 20, "WA": value / 40, "predictions": "p.csv"}
                entry = {"fold": k, "tests": {"test": test}, "validation_ua": k / 4, "parameters": 10 + k, "peak_gb": k / 2,
                         "classes": list("abc"), "seconds": {"search": 1, "train": 2 + k}, "notes": ["a note"],
                         "settings": train.settings_of(run), "versions": [train.versions()]}
                tree(Path(run.out), {f"fold{k}/result.json": json.dumps(entry), f"fold{k}/p.csv": "\n".join(rows)})
    train.compare(options, runs, [0, 1, 2])
    text = re.sub(" +", " ", (tmp_path / "comparison.md").read_text())
    rows = {row["model"]: row for row in read_json(tmp_path / "results.json")["rows"]}
    ours, theirs = [14, 12, 17], [10, 6, 11]  # seeds averaged
    p = f"{scipy.stats.ttest_rel(ours, theirs).pvalue:.2g}"
    for model, averaged, p in (("emodarts", ours, ""), ("cnn", theirs, p)):
        seeds = [5 * statistics.mean(values) for values in uas[model]]  # percent
        mean, of_folds, of_seeds = statistics.mean(seeds), 5 * statistics.stdev(averaged), statistics.stdev(seeds)
        row = [rows[model][name] for name in ("seeds", "p", "UA", "WA", "weights", "search", "training", "peak")]
        assert row == [2, p, f"{mean:.1f} ± {of_folds:.1f} (± {of_seeds:.1f})",
                       f"{mean / 2:.1f} ± {of_folds / 2:.1f} (± {of_seeds / 2:.1f})", "11", "1 s", "3 s", "1.00 GB"]
        assert rows[model]["UA of seeds, folds"] == [[value / 20 for value in of_seed] for of_seed in uas[model]]
        assert rows[model]["validation UA"].startswith("25.0") and f"| {model} | 2 | {p} | {row[2]}".replace("  ", " ") in text
    assert [rows[f"{m}, ensemble"]["UA"] for m in uas] == ["100.0 ± 0.0", "50.0 ± 0.0", "0.0 ± 0.0"]
    assert "a note" in text and "| random, ensemble | 1 |" in text


def test_several_test_sets_are_scored_by_one_training(cwd, tmp_path, capsys):
    rows, split = ["FileName,EmoClass,SpkrID,Split_Set"], dict(a="Test1", b="Test2", c="Development", d="Train")
    for row in table("mine.csv"):
        code = "N" if row["path"][2:6] == "sad0" else dict(glad="H", mad="A", sad="S")[row["label"]]
        (tmp_path / f"MSP-PODCAST_{row['path']}").symlink_to(cwd / row["path"])
        rows.append(f"MSP-PODCAST_{row['path']},{code},{row['speaker']},{split[row['speaker']]}")
    (tmp_path / "labels_consensus.csv").write_text("\n".join(rows))
    out = said(capsys, *f"--dataset msp-podcast --scale small --root {tmp_path} --out podcast".split())
    fold = read_json("podcast/fold0/result.json")
    assert [*fold["tests"]] == ["test1", "test2"]
    for (name, test), speaker in zip(fold["tests"].items(), "ab"):
        predicted = table(f"podcast/fold0/predictions-{name}.csv")
        assert (test["speakers"], len(predicted)) == ([speaker], 10)
        assert {row["utterance"][12] for row in predicted} == {speaker}
        assert f"| fold       | {name} " in out and f"{100 * test['UA']:.1f}" in out


@pytest.mark.parametrize("normalise", ["train", "speaker"])
def test_a_second_corpus_is_tested_with_the_same_model(cwd, normalise, capsys):
    """A table of the recordings of fold 0's test speaker: fold 0's own figures again."""
    Path("a.csv").write_text("\n".join(line for line in Path("mine.csv").read_text().splitlines() if line[0] in "pa"))
    out = said(capsys, "--folds", "0", "--test-dataset", "csv=a.csv", "--normalise", normalise, "--out", normalise)
    own, other = (Path(f"{normalise}/fold0/predictions{name}.csv").read_bytes() for name in ("", "-csv"))
    assert own == other and ("unlabelled audio" in out) == (normalise == "speaker")
    assert (own == Path("one/fold0/predictions.csv").read_bytes()) == (normalise == "train")
    assert [*read_json(f"{normalise}/fold0/result.json")["tests"]] == ["test", "csv"]
    rows = table(f"{normalise}/fold0/predictions.csv")  # and as clips: a model without statistics takes theirs
    heard = said(capsys, "--predict", *(row["utterance"] for row in rows), "--from", f"{normalise}/fold0/model.pt")
    for row, line in zip(rows, heard.splitlines(), strict=True):
        path, label, *rest = line.split()
        assert (path, label, rest[::2]) == (row["utterance"], row["predicted"], list(LABELS))
        assert [float(p) for p in rest[1::2]] == pytest.approx([float(row[c]) for c in LABELS], abs=6e-4)


def test_several_models_of_a_run_are_averaged(cwd, capsys):
    """Their logits, which are log p up to a constant."""
    alone = [said(capsys, "--predict", "b-sad3.wav", "--from", f"one/fold{k}").split() for k in (0, 1)]
    p = np.exp(np.mean([np.log([float(v) for v in line[3::2]]) for line in alone], axis=0))
    both = said(capsys, "--predict", "b-sad3.wav", "--from", "one").split()
    assert [float(v) for v in both[3::2]] == pytest.approx(p / p.sum(), abs=3e-3) and both[1] == LABELS[p.argmax()]
    assert said(capsys, "--from", "one").count('"settings"') == 2


def test_what_was_trained_on_is_not_tested_on(cwd, capsys):
    """Neither under another name, nor by another table; fold 0 trains on c and d."""
    text = Path("mine.csv").read_text()
    Path("d.csv").write_text("\n".join(line for line in text.splitlines() if line[0] in "pd"))
    assert "d-" in one_line(capsys, "--folds", "0", "--test-dataset", "csv=d.csv", "--out", "apart")
    said(capsys, "--folds", "2", "--test-dataset", "csv=d.csv", "--out", "apart2")  # where d validates
    shutil.copy("c-mad0.wav", "copy.wav")
    Path("copy.csv").write_text(text + "\ncopy.wav,mad,a")
    assert re.search("copy.wav.*c-mad0.wav|c-mad0.wav.*copy.wav", one_line(capsys, "--root", "copy.csv", "--out", "copy"))
    assert not Path("apart").exists() and not Path("copy").exists()


def test_bad_recordings_stop_the_run_before_the_training_or_are_named(cwd, capsys):
    """--skip-bad may be added later: it is no setting. Folds are numbered by the listing, whatever is skipped."""
    Path("stub.wav").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    Path("bad.csv").write_text(Path("mine.csv").read_text() + "\nstub.wav,sad,a")
    where = "--root bad.csv --folds 0 --out bad".split()
    assert "1 of 41 recordings cannot be used" in said(capsys, *where, code=2) and not list(Path("bad").glob("fold*"))
    assert "1 recordings cannot be used and were skipped" in said(capsys, *where, "--skip-bad")
    assert "stub.wav: a git-lfs stub" in read_json("bad/results.json")["folds"][0]["skipped"][0]
    assert len(table("bad/fold0/predictions.csv")) == 10
    lines = [line.replace("a-", "gone/a-") for line in Path("mine.csv").read_text().splitlines()]
    tree(Path(), {"gone.csv": "\n".join(lines), **{line.split(",")[0]: b"" for line in lines if "gone/" in line}})
    where = ["--root", "gone.csv", "--skip-bad", "--out", "gone-run", "--folds"]
    for k in "03":  # a tests, a validates
        assert f"fold {k}" in one_line(capsys, *where, k) and not Path("gone-run").exists()
    assert re.search(r"fold 1 .*test b ", said(capsys, *where, "1", "--dry-run"))
    said(capsys, *where, "1")
    assert {row["utterance"][0] for row in table("gone-run/fold1/predictions.csv")} == {"b"}


def test_a_result_knows_its_data(cwd, capsys, tmp_path):
    """Other labels, recordings, speakers, genotypes: another folder by default, a refusal where --out is the same."""
    shutil.copytree(cwd, tmp_path / "x", ignore=lambda folder, names: [n for n in names if n[-3:] not in ("wav", "csv")])
    root, sizes = tmp_path / "x/mine.csv", [*TINY[:2], *TINY[4:], "--folds", "0"]
    text, run = root.read_text(), lambda *more, **how: said(capsys, "--root", root, *more, sizes=sizes, **how)
    folder = lambda out: re.search("are in (.*)|goes to (.*)", out)[0]
    first, second = run("--out", "mine"), run()
    assert folder(second) == folder(said(capsys, "--folds", "0", "--dry-run")).replace("goes to", "are in")  # a copy's
    wavs = (tmp_path / "x/b-sad1.wav", tmp_path / "x/c-mad1.wav")
    sounds = [wav.read_bytes() for wav in wavs]
    with stopping("weight_step", 2):
        run("--out", "unfinished", code=130)
    for change, undo in (
        (lambda: root.write_text(text.replace("a-sad0.wav,sad", "a-sad0.wav,mad")), lambda: root.write_text(text)),
        (lambda: root.write_text(text.replace(",a\n", ",A\n")), lambda: root.write_text(text)),
        (lambda: root.write_text(text.replace("d-mad0.wav,mad,d\n", "")), lambda: root.write_text(text)),
        (lambda: [w.write_bytes(x) for w, x in zip(wavs, sounds[::-1])],  # as long as before
         lambda: [w.write_bytes(x) for w, x in zip(wavs, sounds)]),
    ):
        change()
        for out in ("mine", "unfinished"):
            assert "of other data" in run("--out", out, code=2)
        assert "of other data" in run("--out", "mine", "--folds", "1", code=2)  # nor another fold beside it
        assert folder(run("--dry-run")) not in (folder(second), folder(second).replace("are in", "goes to"))
        undo()
    assert run("--out", "mine").endswith(first[first.index("\ncsv,"):])
    two = ["--test-dataset", f"csv={tmp_path}/two.csv", "--out", "second", "--folds", "0"]
    lines = [line.replace("a-", f"{tmp_path}/x/a-") for line in text.splitlines() if line[0] in "pa"]
    (tmp_path / "two.csv").write_text("\n".join(lines))
    run(*two)
    (tmp_path / "two.csv").write_text("\n".join(lines[:-1]))
    assert "of other data" in run(*two, code=2)


def test_a_result_knows_its_genotype(cwd, capsys, tmp_path):
    genotype, argv = read_json("one/fold0/genotype.json"), ["--folds", "0", "--genotype"]
    tree(tmp_path, {"a.json": json.dumps(genotype), "b.json": json.dumps(genotype, indent=7)})
    first = said(capsys, *argv, tmp_path / "a.json")
    assert said(capsys, *argv, tmp_path / "b.json") in first  # the same genotype, spaced otherwise: nothing to compute
    genotype["seq"][0][0][0] = "skip_connect" if genotype["seq"][0][0][0] != "skip_connect" else "rnn_1"
    tree(tmp_path, {"a.json": json.dumps(genotype)})
    assert re.search("are in (.*)", said(capsys, *argv, tmp_path / "a.json"))[0] not in first
    said(capsys, *argv, tmp_path / "b.json", "--out", "given")
    assert "genotype" in one_line(capsys, *argv, tmp_path / "a.json", "--out", "given")


def test_a_result_says_what_code_made_it(cwd, capsys, monkeypatch):
    theirs, report = train.versions(), Path("one/report.md").read_text()
    assert "other code" not in said(capsys, *TWO_FOLDS, "one") and train.plain(theirs) in report
    commit, code, packages = theirs.split(", ", 2)
    monkeypatch.setattr(train, "versions", lambda: f"commit 1234567, {code}, {packages}")  # README alone is another
    assert "other code" not in said(capsys, *TWO_FOLDS, "one")
    monkeypatch.setattr(train, "versions", lambda: f"{commit}, code 12345678, {packages}")
    assert f"made by other code than today's: {theirs}\n" in said(capsys, *TWO_FOLDS, "one")
    assert Path("one/report.md").read_text() == report
    shutil.copytree("stopped", "continued")
    said(capsys, *TWO_FOLDS, "continued")  # fold 0 was begun by the other code
    assert [len(fold["versions"]) for fold in read_json("continued/results.json")["folds"]] == [2, 1]


def test_an_output_that_cannot_say_all_letters_or_is_closed_loses_nothing(cwd, monkeypatch, capsys):
    Path("polish.csv").write_text(Path("mine.csv").read_text().replace(",b", ",Łukasz"))
    argv = [*TINY, "--root", "polish.csv", "--folds", "2", "--seeds", "2", "--out", "polish"]
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert train.main(argv) == 0
    out.flush()
    assert b"u0141ukasz" in out.buffer.getvalue() and Path("polish/comparison.md").exists()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert train.main(argv) == 0


@pytest.fixture(scope="module")
def forks():
    """Starts processes that need not import torch again, nor torch._dynamo, as an optimizer's first step does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        multiprocessing.forkserver.ensure_running()
    return context


def child(cwd, log, argv, environment={}, name=None, n=0):
    """A process of its own. It is killed when it calls train's function `name` for the n-th time."""
    os.chdir(cwd)
    os.environ |= environment
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    with stopping(name, n, kill=True) if name else contextlib.nullcontext():
        code = train.main([*TINY, *argv])
    sys.exit(code)


def started(forks, *calls, function=child):
    processes = [forks.Process(target=function, args=call) for call in calls]
    for process in processes:
        process.start()
    return processes


def ended(processes):
    for process in processes:
        process.join(100)
        process.kill()  # of no effect where it has ended
    return [process.exitcode for process in processes]


def ranks(forks, *arguments):
    """Exit codes of two ranks, in an environment as torchrun makes it."""
    calls = [(*arguments, {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}) for rank in "01"]
    return ended(started(forks, *calls))


@pytest.mark.parametrize("more", ["", "--scale paper --order 2 --seq-space lstm_att"])  # AdamW, sampling; SGD, softmax
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(cwd, tmp_path, forks, more):
    argv, whole, killed, log = [*more.split(), *TWO_FOLDS], tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert train.main([*TINY, *argv, str(whole)]) == 0
    kills = [("weight_step", 2), ("fsync", 2), ("weight_step", 4), ("entropy", 1), ("train", 1),
             ("weight_step", 5), ("score", 1), ("peak_memory", 2), ("peak_memory", 2)]  # before and behind model.pt
    kills += [("weight_step", int(n)) for n in np.random.default_rng(1).integers(1, 9, 2)] + [("fsync", 9)]
    for kill in kills:
        assert ended(started(forks, (cwd, log, [*argv, str(killed)], {}, *kill))) == [-signal.SIGKILL]
    assert ended(started(forks, (cwd, log, [*argv, str(killed)]))) == [0]
    assert left(killed) == left(whole)
    places = re.findall(r"goes on with fold 0, (\w+), epoch (\d+), step (\d+)", log.read_text())
    assert [" ".join(place) for place in places] == [  # the very next step each time
        "search 1 2", "search 1 3", "search 2 3", "search 2 4", "train 1 1", "train 1 5", "train 2 7", "train 2 7",
        "train 2 7"]


def test_ctrl_c_says_what_goes_on_and_no_step_is_made_twice(cwd, capsys):
    with stopping("weight_step", 5) as calls:
        err = said(capsys, "--folds", "0", "--out", "interrupted", code=130)
        assert "goes on from here" in err
        assert train.main([*TINY, "--folds", "0", "--out", "interrupted"]) == 0
    one, same, other = (left(f"{run}/fold0") for run in ("one", "interrupted", "seeds/emodarts-seed1"))
    assert next(calls) - 1 == 2 * 3 + 2 * 6 + 1 and one == same  # a fold is a function of its seed
    assert all(one[name] != other[name] for name in ("log.csv", "model.pt", "predictions.csv"))


def test_a_checkpoint_is_that_of_its_fold(cwd, capsys):
    Path("foreign/fold1").mkdir(parents=True)
    shutil.copy("stopped/fold0/checkpoint.pt", "foreign/fold1")
    assert "it is of another fold" in said(capsys, *TWO_FOLDS, "foreign", code=2)


def test_a_full_disk_leaves_the_old_file_and_is_one_line(cwd, tmp_path, monkeypatch, capsys):
    file, before = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    train.write(file, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for content in ("x" * 20_000, partial(torch.save, torch.zeros(20_000))):  # and within torch
            with pytest.raises((OSError, RuntimeError)):
                train.write(file, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes() == b"old"
    monkeypatch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert said(capsys, "--out", "full", code=2) == "error: [Errno 28] No space left on device\n"


def test_processes_share_a_run_folder(cwd, tmp_path, capsys):
    """Fold 0 is taken: the command computes fold 1 and says so; given again when fold 0 is free, it does the rest."""
    argv = [*TWO_FOLDS, str(tmp_path / "shared")]
    with features.lock(tmp_path / "shared/fold0/lock"):
        assert "other processes have the other folds" in said(capsys, *argv)
    assert not (tmp_path / "shared/fold0/log.csv").exists()
    assert said(capsys, *argv).count("| pooled ") == 1 and left(tmp_path / "shared") == left("one")


def test_ranks_take_whole_folds(cwd, tmp_path, forks):
    argv, log = [*TWO_FOLDS, str(tmp_path / "ranks")], tmp_path / "log"
    assert ranks(forks, cwd, log, argv) == [0, 0]
    assert left(tmp_path / "ranks") == left("one")
    text = log.read_text()
    assert text.count("\n| pooled ") >= 1 and [text.count(f"fold {k} found") for k in (0, 1)] == [1, 1]


@gpu
@pytest.mark.parametrize("more", ["", "--amp --recompute", "--scale paper --order 2 --seq-space lstm_att"])
def test_a_run_on_a_gpu_goes_on_where_it_was_stopped(cwd, tmp_path, capsys, more):
    """Not bit for bit, as some backward passes add in no fixed order."""
    argv, logs = ["--device", "cuda", "--folds", "0", *more.split(), "--out"], []
    for name, stops in (("whole", ()), ("stopped", (2, 4, 5, 3))):
        for n in stops:
            with stopping("weight_step", n):
                said(capsys, *argv, tmp_path / name, code=130)
        said(capsys, *argv, tmp_path / name)
        logs.append([float(row["loss"]) for row in table(tmp_path / name / "fold0/log.csv")])
    assert logs[1] == pytest.approx(logs[0], rel=0.03)  # a step lost, or made twice, is a sixth of an epoch


def one_line(capsys, *arguments, code=2):
    err = said(capsys, *arguments, code=code)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("arguments, says", [
    ("--test-dataset emodb=nowhere", "no utterance of emodb in nowhere"),
    ("--test-dataset smoke", "smoke has classes that csv has not; what is tested must be"),
    ("--root nowhere.csv", "no file nowhere.csv"),
    ("--folds 9", r"--folds is .9., expected numbers from 0 to 3"),
    ("--features log-mel-200", "200 coefficients; expected 1 to 128"),
    ("--device quantum", "--device quantum cannot be used here"),
    ("--device meta", "--device meta cannot be used here"),
    ("--window 1e300", "1e\\+300"),
    ("--lr inf", "argument --lr: is inf, expected at least 0 and less than inf"),
    ("--epochs 0", "argument --epochs: is 0, expected at least 1"),
    ("--epochs x", "argument --epochs: invalid"),
    ("--poison 1", "argument --poison: is 1, expected at least 0 and less than 1"),
    ("--folds a", "argument --folds: invalid numbers value: 'a'"),
    ("--cnn 3", "unrecognized arguments: --cnn 3"),
    ("--search seq --seq-cells 0", "alpha"),
    ("--order 2", "order 2 goes with relaxation softmax"),
    ("--cnn-cells 0", "cnn_cells is 0, expected at least 1"),
    ("--warm-up 5", "--warm-up is 5, expected less than"),
    ("--genotype nowhere.json", "--genotype: nowhere.json: .*No such file|--genotype: .*No such file.*nowhere.json"),
    ("--genotype mine.csv", "--genotype: mine.csv: genotype: expected a JSON object"),
    ("--model cnn --genotype one/fold0/genotype.json", "--genotype goes with --model emodarts, found --model cnn"),
    ("--out one --folds 0,1 --channels 3", "of a run with other settings: channels .2 there, 3 here"),
    ("--from nowhere", "nowhere is damaged, or .*No such file"),
    ("--from cache", "--from is cache, expected a run folder with fold0/model.pt"),
    ("--predict a-sad0.wav", "--from is None, expected a run folder"),
    ("--predict mine.csv --from one/fold0/model.pt", "mine.csv: not a .*wav"),
])
def test_bad_input_is_one_clear_line(cwd, capsys, arguments, says):
    before = left("one")
    assert re.search(says, one_line(capsys, *arguments.split())) and left("one") == before


@pytest.mark.parametrize("environment", [
    dict(RANK="a", WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="0"), dict(WORLD_SIZE="2"), dict(RANK="1"),
    dict(RANK="2", WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="x"), dict(RANK="-1", WORLD_SIZE="1"),
])
def test_an_environment_that_is_not_torchruns_is_one_clear_line(cwd, capsys, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert all(name in one_line(capsys, "--out", "environment") for name in environment)
    assert not Path("environment").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_damaged_files_are_one_clear_line_and_execute_nothing(cwd, capsys):
    """Refused with the name of the file; a mutant that has changed only what nobody reads is used as the right one."""

    model, checkpoint = torch.load("one/fold0/model.pt"), torch.load("stopped/fold0/checkpoint.pt")
    text = [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b"{}"]
    binary = [b"hello", *text, pickle.dumps(Evil()), {}]
    about = json.loads(model["about"])
    altered = [{"classes": ["a"]}, {"settings": about["settings"] | {"channels": 10**12}}, {"genotype": {}}]
    damaged = {
        "hurt/fold0/checkpoint.pt": [*binary, checkpoint | {"parts": {"net": {}}}, checkpoint | {"x": Evil()}],
        "hurt/fold1/result.json": text,
        "used/fold0/model.pt": [*binary, model | {"x": Evil()},
                                *(model | {"about": json.dumps(about | change)} for change in altered)],
        "twice/emodarts-seed1/fold0/predictions.csv": [b"u,l,p,glad,mad,sad\nx,glad,glad,a,b,c", b"\xff\0"],
    }
    runs = {"hurt": [*TWO_FOLDS, "hurt"], "twice": ["--folds", "0", "--seeds", "2", "--out", "twice"], "used": ["--predict", "a-sad3.wav", "--from", "used/fold0/model.pt"]}
    for file, contents in damaged.items():
        folder = file.split("/")[0]
        for content in contents:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree({"hurt": "stopped", "used": "one", "twice": "seeds"}[folder], folder)
            if folder == "hurt":
                shutil.copytree("one/fold1", "hurt/fold1", dirs_exist_ok=True)
            torch.save(content, file) if isinstance(content, dict) else Path(file).write_bytes(content)
            code = train.main([*TINY, *runs[folder]])
            out, err = capsys.readouterr()
            assert code == 2, (content, err)
            assert re.fullmatch(f"error: {file} .*delete.*\n", err), (content, err)
    assert not Path("executed").exists()


def test_numbers_that_no_step_can_be_made_with_stop_the_run(cwd, monkeypatch, capsys):
    real, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    with stopping("weight_step", 99), monkeypatch.context() as patch:
        norms = (math.nan if n == 5 else 1 for n in calls)  # the fifth is none
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: real(*args) * next(norms))
        err = one_line(capsys, "--folds", "0", "--out", "broken")
    assert "fold 0, search, epoch 2, step 2: the gradient of the weights is not finite" in err and "--lr" in err
    with stopping("weight_step", 99), monkeypatch.context() as patch:
        patch.setattr(train.Data, "batch", lambda data, pair: (data.maps(pair[0]) * math.nan, pair[1]))
        assert "fold 0, search, epoch 2, step 2" in one_line(capsys, "--folds", "0", "--out", "broken")  # of the alphas
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.empty(2**50))
        assert re.search("memory.*--batch|--batch.*memory", one_line(capsys, "--folds", "0", "--out", "broken"))
    assert "goes on with fold 0, search, epoch 2, step 2" in said(capsys, "--folds", "0", "--out", "broken")
    assert left("broken/fold0") == left("one/fold0")


def test_a_dry_run_counts_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY[4:], *"--window 1 --search-epochs 3 --epochs 5 --folds 1,2 --batch 8 --seq-space all".split()]
    out = said(capsys, *argv, "--dry-run", sizes=[])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    listing = read_corpus("smoke")
    net = Network(bands=12, channels=2, cnn_cells=3, nodes=1, seq_cells=1, seq_width=8, stem_stride=2)
    for name, part in {"supernet": net, "CNN cells": net.cnn, "SeqNN cells": net.seq}.items():
        assert f"{name}: {sum(p.numel() for p in part.parameters()):,}\n" in out
    windows, _ = features.lengths(listing, 1.0)
    half, whole = (sum(math.ceil(windows[fold.train[::n]].sum() / 8) for fold in folds(listing)[1:3]) for n in (2, 1))
    total = 0.0
    for kind, n in {"alpha step": 2 * half, "weight step": 3 * half, "training step": 5 * whole}.items():
        total += n * float(re.search(rf"{kind}: {n:,} of (\S+) s, \S+ GB\n", out)[1])
    assert total == pytest.approx(float(re.search(r"in all    (\S+) s", out)[1]), rel=0.02, abs=1)
    assert re.search(r"fold 1 +holds out 04: test 04 \(28\), validation 05 \(28\), training 112", out)
    assert "fold 0" not in out


def test_what_is_imported():
    more = {"numpy", "scipy", "torchaudio"}
    for name, allowed in {"emodarts": set(), "features": more, "train": more | {"emodarts", "features"}}.items():
        lines = re.findall(r"^(?:import|from) (\w+)", (HERE / f"{name}.py").read_text(), re.MULTILINE)
        assert {*lines} - set(sys.stdlib_module_names) == allowed | {"torch"}


def test_readmes_commands_and_example_are_those_that_run():
    readme, script = (HERE / "README.md").read_text(), (HERE / ".ci" / "run").read_text()
    run, test = re.findall(r"^pip install .*$", readme, re.MULTILINE)
    assert "python train.py" in run and "pytest" in test
    assert re.findall(r"^pip install .*$", script, re.MULTILINE) == [f"{command} || exit 1" for command in (test, run)]
    names = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)  # our own file
    assert isinstance(names["genotype"], Genotype) and names["net"](names["x"][:2]).shape == (2, 4)
