"""Search, derive, train, test: emoDARTS end to end, speaker-independent.

    python train.py                                         # the smoke test: no data, no GPU, under three minutes
    python train.py --dataset emodb --root /data/emodb      # EMO-DB, leave one speaker out
    python train.py --dry-run                               # what would happen, and what it would cost
    python train.py --predict a.wav b.wav --from runs/NAME  # what the models of a run hear in clips
    python train.py --help                                  # every option with its default

For each fold: the search sees the training speakers only, one half of their utterances for the weights, the other for
the alphas; the derived network is trained from scratch on all of them; the validation speakers are looked at, and
choose only with --select best; the test speakers are scored once, when everything is chosen.
"""

import argparse
import csv
import errno
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from scipy import stats
from torch import distributed, nn

import features
from emodarts import Architect, Genotype, Network, SEQ_SPACES, derive, expected_parameters, random_genotype, ranks, reduced
from features import CORPORA, InputError, fcntl

try:
    import resource
except ImportError:  # Windows has no such thing
    resource = None

# ---------------------------------------------------------------------------------------------------------------------
# Options: one dataclass, the command line is made from it.

# A scale fixes sizes, never the hardware.
SCALES = {
    "paper": dict(
        features="mfcc", coefficients=128, window=8.0, channels=8, cnn_cells=4, seq_cells=4, nodes=4, stem_stride=1, bands=1, dropout=0.3, drop_path=0.2,
        search_epochs=50, search_optimizer="sgd", search_lr=0.025, search_decay=3e-4, alpha_lr=3e-4, hold_back=0.0, warm_up=0, epochs=100,
    ),
    "small": dict(
        features="log-mel", coefficients=64, window=4.0, channels=8, cnn_cells=2, seq_cells=1, nodes=2, stem_stride=2, bands=2, dropout=0.0, drop_path=0.0,
        search_epochs=12, search_optimizer="adamw", search_lr=0.003, search_decay=0.05, alpha_lr=3e-3, hold_back=0.0, warm_up=4, epochs=30,
    ),
}  # fmt: skip


BASELINES = ("cnn", "lstm", "cnn-lstm", "cnn-lstm-att")
MODELS = ("emodarts", "random", *BASELINES)


def option(default, text, group, kind=None, choices=None):
    """A field whose comment is also its help text. `default` None: taken from the corpus or the scale."""
    return field(default=default, metadata=dict(text=text, group=group, kind=kind or type(default), choices=choices))


@dataclass
class Options:
    dataset: str = option("smoke", "the corpus", "data", choices=CORPORA)
    root: str = option(None, "its folder, or the file of csv (default: data/DATASET)", "data", str)
    classes: str = option("four", "angry, happy, neutral and sad, or all that the corpus labels", "data", choices=("four", "all"))
    protocol: str = option("standard", "folds and labels: the corpus' own, or the emoDARTS authors'", "data", choices=("standard", "paper"))
    strict: bool = option(False, "refuse a corpus with other counts than the known ones", "data")
    skip_bad: bool = option(False, "go on without recordings that cannot be used; results name them", "data")
    test_dataset: str = option(None, "test every fold's model on the whole of this corpus, too (default: none)", "data", str, CORPORA)
    test_root: str = option(None, "its folder (default: data/TEST_DATASET)", "data", str)
    cache: str = option("cache", "folder of the computed features", "data")
    workers: int = option(None, "processes that compute features (default: one a core)", "data", int)
    folds: str = option(None, "folds to run, such as 0,3 (default: all; of smoke 0,1)", "data", str)
    padding: str = option("repeat", "of utterances shorter than a window", "data", choices=("repeat", "zero"))
    poison: float = option(0.0, "share of the test speakers' utterances that trains instead: no longer speaker-independent", "data")
    normalise: str = option(
        "train", "statistics: of the training speakers, or of each speaker, which uses the test speaker's unlabelled audio", "data",
        choices=("train", "speaker"),
    )  # fmt: skip

    scale: str = option(None, "sizes of everything below that has no default (default: small; of the paper's corpora paper)", "sizes", str, SCALES)
    features: str = option(None, "MFCCs, or the logarithmic mel spectrum", "sizes", str, ("mfcc", "log-mel"))
    window: float = option(None, "seconds of a window; longer utterances become several", "sizes", float)
    coefficients: int = option(None, "MFCCs, of 128 mel bands; or mel bands", "sizes", int)
    channels: int = option(None, "channels of the first CNN cell", "sizes", int)
    cnn_cells: int = option(None, "CNN cells", "sizes", int)
    seq_cells: int = option(None, "SeqNN cells; 0 searches a CNN only", "sizes", int)
    nodes: int = option(None, "nodes a cell", "sizes", int)
    stem_stride: int = option(None, "2 halves the map before the first cell", "sizes", int)
    bands: int = option(None, "parts of the frequency axis whose means the SeqNN sees; the paper's is the whole", "sizes", int)
    dropout: float = option(None, "after each cell", "sizes", float)
    drop_path: float = option(None, "share of edge outputs dropped at the end of training, growing from 0", "sizes", float)
    search_epochs: int = option(None, "epochs of the search", "sizes", int)
    hold_back: float = option(None, "share dropped of what pools and skips while searching: a remedy for collapse", "sizes", float)
    warm_up: int = option(None, "of which the first ones move the weights only", "sizes", int)
    epochs: int = option(None, "epochs of the final training", "sizes", int)

    model: str = option("emodarts", "what is trained: the searched network, a random one of the same space, or one designed by hand", "search", choices=MODELS)
    search: str = option("joint", "cells that are searched; the others are fixed ones that README names", "search", choices=("joint", "cnn", "seq"))
    genotype: str = option(None, "file of a genotype to train, without a search (default: search)", "search", str)
    order: int = option(1, "order of the hypergradient", "search", choices=(1, 2))
    seq_space: str = option("all", "candidate operations of the SeqNN", "search", choices=SEQ_SPACES)
    alpha_lr: float = option(None, "learning rate of the alphas (Adam)", "search", float)
    alpha_decay: float = option(1e-3, "weight decay of the alphas", "search")
    search_optimizer: str = option(None, "of the weights while searching", "search", str, ("adamw", "sgd"))
    search_lr: float = option(None, "learning rate of the weights while searching, cosine", "search", float)
    lr_min: float = option(0.001, "where that cosine ends; in training it ends at 0", "search")
    search_decay: float = option(None, "weight decay of the weights while searching", "search", float)
    size_penalty: float = option(0.0, "added to the alphas' loss for each million of expected weights", "search")

    batch: int = option(16, "batch size, of search and training", "training")
    optimizer: str = option("adamw", "of the training", "training", choices=("adamw", "sgd"))
    lr: float = option(None, "learning rate of the training, cosine (default: 0.003; of baselines 0.001)", "training", float)
    momentum: float = option(0.9, "of SGD", "training")
    decay: float = option(0.05, "weight decay of the training", "training")
    clip: float = option(5.0, "largest norm of the weights' gradient", "training")
    label_smoothing: float = option(0.1, "of search and training", "training")
    shift: bool = option(True, "shift the maps that train weights in time, around the end", "training")
    masks: int = option(1, "masked stretches of time in such a map; of log-mel also as many of bands", "training")
    select: str = option("last", "epoch that counts: the last, or the best validation UA (ties: the latest)", "training", choices=("last", "best"))

    out: str = option(None, "folder of the run (default: runs/DATASET-SCALE-KEY, the key made of the settings)", "run", str)
    seed: int = option(0, "seed of everything random", "run")
    seeds: int = option(1, "number of seeds: a run with each, and their ensemble", "run")
    compare: bool = option(False, "runs emodarts, the baselines and random genotypes, and compares them", "run")
    randoms: int = option(10, "how many random genotypes are compared, one seed each", "run")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU when there is one", "run")
    recompute: bool = option(False, "compute edges again on the way back: much less memory, a little slower, the same numbers", "run")
    amp: bool = option(False, "mixed precision (bfloat16): other roundings; pays on a GPU", "run")
    threads: int = option(None, "CPU threads (default: torch's)", "run", int)
    deterministic: bool = option(False, "deterministic algorithms only; README names what a GPU has none for", "run")
    benchmark: bool = option(False, "what a step costs on this machine at these sizes, for every SeqNN space, and nothing else", "run")
    dry_run: bool = option(False, "say what would happen and what it would cost, measured here, and write nothing", "run")
    quiet: bool = option(False, "print results, warnings and errors only", "run")

    predict: list = option(None, "clips (wav files) to recognise, with --from", "use", list)
    from_: str = option(None, "a run folder, whose models answer together, or one model file; alone: what it says of itself", "use", str)
    json: str = option(None, "file for the figures of --benchmark, or the answers of --predict; - prints those and nothing else", "use", str)


COLUMNS = ("stage", "epoch", "lr", "loss", "alpha_loss", "entropy", "skips_normal", "skips_reduce", "skips_seq", "val_ua", "val_wa", "seconds")  # of log.csv
NETWORK_SIZES = ("channels", "cnn_cells", "seq_cells", "nodes", "stem_stride", "bands", "dropout")
# What a result does not depend on, up to rounding; these may differ when a run folder is used again.
NOT_SETTINGS = (
    "out", "root", "test_root", "cache", "workers", "device", "recompute", "threads", "deterministic", "dry_run", "quiet", "predict", "from_", "json",
    "benchmark", "seeds", "compare", "randoms",
)  # fmt: skip


def parse(argv):
    """Command line -> Options, with everything that depends on corpus and scale filled in."""
    parser = argparse.ArgumentParser(
        usage="python train.py [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = {}
    for f in fields(Options):
        about = f.metadata
        group = groups.setdefault(about["group"], parser.add_argument_group(about["group"]))
        text = about["text"] + (f" (default: {f.default})" if f.default is not None else "")
        if f.name in SCALES["paper"]:
            text += " (" + ", ".join(f"{scale}: {sizes[f.name]}" for scale, sizes in SCALES.items()) + ")"
        flag = "--" + f.name.strip("_").replace("_", "-")
        if about["kind"] is bool:
            shown = " (default: on)" if f.default else " (default: off)"
            group.add_argument(flag, action=argparse.BooleanOptionalAction if f.default else "store_true", default=f.default, help=about["text"] + shown)
        elif about["kind"] is list:
            group.add_argument(flag, nargs="+", metavar="CLIP", help=text)
        else:
            metavar = None if about["choices"] else f.name.strip("_").upper()
            group.add_argument(flag, dest=f.name, type=about["kind"], choices=about["choices"], default=f.default, metavar=metavar, help=text)
    options = Options(**vars(parser.parse_args(argv)))
    options.scale = options.scale or CORPORA[options.dataset].scale
    options.folds = options.folds or CORPORA[options.dataset].folds
    for name, size in SCALES[options.scale].items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    return options


def attempt(problems, f, *args):
    """f(*args), or None and one more problem."""
    try:
        return f(*args)
    except (InputError, ValueError) as error:
        problems.append(str(error))


def refuse(problems):
    if problems:
        raise InputError("\n  ".join([f"{len(problems)} things cannot work:"] * (len(problems) > 1) + problems))


def check_options(options):
    """-> what cannot work whatever the corpus, as texts, and the device."""
    problems = []

    least = {"search_epochs": 1, "epochs": 1, "batch": 2, "seed": 0, "threads": 1, "workers": 1}
    least |= dict.fromkeys(("lr", "search_lr", "lr_min", "alpha_lr", "alpha_decay", "momentum", "decay", "search_decay", "clip"), 0)
    least |= {"warm_up": 0, "size_penalty": 0, "masks": 0, "seeds": 1, "randoms": 0}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not smallest <= value < math.inf:  # nor is NaN
            problems.append(f"--{name.replace('_', '-')} is {value}, expected at least {smallest}")
    for name in ("dropout", "drop_path", "hold_back", "label_smoothing", "poison"):
        if not 0 <= getattr(options, name) < 1:
            problems.append(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 0 and less than 1")
    with torch.device("meta"):
        net = attempt(problems, network, options, 2)
        attempt(problems, given_genotype, options)
    if searches(options) and net and not net.candidates:
        problems.append(f"--search {options.search} leaves nothing to search in a network of {options.seq_cells} SeqNN cells")
    if searches(options) and options.warm_up >= options.search_epochs:
        problems.append(f"--warm-up is {options.warm_up}, expected less than --search-epochs, {options.search_epochs}: the alphas would never move")
    if options.genotype is not None and options.model != "emodarts":
        problems.append(f"--genotype goes with --model emodarts, found --model {options.model}")
    settings = attempt(problems, feature_settings, options)
    if net and settings:
        with torch.device("meta"), torch.no_grad():
            attempt(problems, net.eval().frames, torch.empty(1, 1, *settings.shape))
    return problems, attempt(problems, pick_device, options.device)


def check(options):
    """Refuses what cannot work, before any work and all of it in one message. -> the corpus, the folds to run, the device."""
    problems, device = check_options(options)
    for name, folder in (("out", out_folder(options)), ("cache", Path(options.cache))):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            problems.append(f"--{name} is {folder}, where nothing can be written: {there} is no folder that you may write to")
    listing = attempt(problems, features.read_corpus, options.dataset, options.root, options.classes, options.protocol, options.strict)
    parts = listing and attempt(problems, features.folds, listing) or []
    chosen = list(range(len(parts)))
    if options.folds and parts:
        if set(re.split(r"\s*,\s*", options.folds.strip())) <= set(map(str, chosen)):
            chosen = sorted({int(k) for k in options.folds.split(",")})
        else:
            problems.append(f"--folds is {options.folds!r:.80}, expected numbers from 0 to {len(parts) - 1} with commas between them")
            chosen = []
    for k in chosen:
        missing = set(listing.classes) - {listing.utterances[i].label for i in parts[k].train}
        if missing:
            problems.append(f"fold {k}: no training utterance is {', '.join(sorted(missing))}; every class needs one in every training set")
    # An utterance has one window at least: where many have more, a larger batch would work, and is refused all the same.
    half = min((len(parts[k].train) // 2 for k in chosen), default=math.inf)
    if options.batch > half:
        problems.append(f"--batch is {options.batch}, and half of a training set only {half} utterances; the search takes a batch of each half")
    refuse(problems)
    return listing, chosen, device


def network(options, classes, genotype=None):
    sizes = {name: getattr(options, name) for name in NETWORK_SIZES}
    return Network(
        classes=classes, seq_space=options.seq_space, recompute=options.recompute, amp=options.amp, fixed=FIXED[options.search](options.nodes),
        genotype=genotype, **sizes,
    )  # fmt: skip


def chain(nodes, first, second):
    """A cell in which each node reads the two states before it."""
    return tuple(((first, i), (second, i + 1)) for i in range(nodes))


# What an ablation does not search.
FIXED = {
    "joint": lambda nodes: None,
    "cnn": lambda nodes: Genotype(seq=chain(nodes, "lstm_1", "skip_connect")),
    "seq": lambda nodes: Genotype(chain(nodes, "sep_conv_3x3", "sep_conv_3x3"), chain(nodes, "max_pool_3x3", "sep_conv_3x3")),
}


def given_genotype(options):
    """What --genotype names, None without it. Builds the network once, so that a genotype that does not fit is refused."""
    if options.genotype is None:
        return None
    try:
        genotype = Genotype.from_json(Path(options.genotype).read_text())
        network(options, 2, genotype)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"--genotype {options.genotype}: {error}") from None
    return genotype


class Baseline(nn.Module):
    """Hand-designed networks with the time axis kept: (N, 1, F, T) -> logits (N, classes).

    cnn: three convolutions with pooling, one more, mean over the map. lstm: two bidirectional layers over the frames,
    mean over time. cnn-lstm: the three convolutions, one bidirectional layer, mean over time; cnn-lstm-att: additive
    attention over time instead of the mean.
    """

    def __init__(self, kind, classes, bands, dropout=0.3, width=64):
        super().__init__()
        self.kind, c = kind, 1
        self.cnn, frame = nn.Sequential(), bands
        if kind != "lstm":
            for out, pool in ((16, 2), (32, 2), (64, (2, 1))):  # F is halved three times, T twice
                block = nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(pool, ceil_mode=True)
                self.cnn.extend([*block, nn.Dropout2d(0.1)])
                c, frame = out, out * -(-bands // 8)
        if kind == "cnn":
            self.top = nn.Sequential(nn.Conv2d(c, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU())
        else:
            layers = 2 if kind == "lstm" else 1
            self.rnn = nn.LSTM(frame, width, layers, batch_first=True, bidirectional=True, dropout=dropout * (layers > 1))
        self.score = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1)) if kind == "cnn-lstm-att" else None
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, classes))

    def weights(self):
        return list(self.parameters())

    def forward(self, x):
        x = self.cnn(x)
        if self.kind == "cnn":
            return self.head(self.top(x).mean(dim=(2, 3)))
        h, _ = self.rnn(x.flatten(1, 2).transpose(1, 2))  # (N, C, F, T) -> (N, C F, T) -> (N, T, C F) -> (N, T, 2 width)
        a = 1 / h.shape[1] if self.score is None else self.score(h).softmax(dim=1)  # (N, T, 1)
        return self.head((a * h).sum(dim=1))


def final_network(options, classes, genotype):
    """The network that is trained and tested."""
    if genotype is None:
        return Baseline(options.model, classes, options.coefficients)
    return network(options, classes, genotype)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Data:
    """The windows of a corpus: on the device when they fit there, otherwise read from the memory map batch by batch.

    `classes` are those of the network. Before the first batch, `standardise_by` (or `standardise_like`) must say whose
    statistics count.
    """

    def __init__(self, listing, store, classes, normalise, device):
        self.listing, self.store, self.normalise, self.device = listing, store, normalise, device
        self.classes, self.labels = classes, np.array([classes.index(u.label) for u in listing.utterances])
        self.drawn = ()
        self.features = torch.from_numpy(store.features)  # (windows, F, T) float16
        if device.type == "cuda" and store.features.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
            self.features = self.features.to(device)
        # Mean of x and of x^2 over the time of each window: all windows are equally long, so that the statistics of any
        # set of windows are means of these. One pass over the store, whatever the number of folds.
        # 64 windows at a time fit into a core's cache, which makes it ten times faster than 512.
        parts = (self.features[k : k + 64].float() for k in range(0, len(self.features), 64))
        self.moments = torch.cat([torch.stack([x.mean(2), x.square().mean(2)], 1).cpu() for x in parts])  # (windows, 2, F)

    def statistics(self, utterances):
        """-> mean and deviation of each coefficient over the utterances, (F,) each."""
        window, _ = self.store.windows_of(utterances)
        mean, square = self.moments[torch.from_numpy(window)].double().mean(0)  # (2, F)
        return mean.float(), (square - mean**2).clamp(min=1e-10).sqrt().float()

    def standardise_by(self, train):
        """Statistics of the training utterances, or with normalise="speaker" of each speaker's own."""
        self.row = torch.zeros(len(self.features), dtype=torch.long)  # of each window in `mean` and `std`
        if self.normalise == "speaker":
            own = {}
            for i, u in enumerate(self.listing.utterances):
                if i not in self.store.bad:
                    own.setdefault(u.speaker, []).append(i)
            for k, members in enumerate(own.values()):
                self.row[torch.from_numpy(self.store.windows_of(members)[0])] = k
            statistics = [self.statistics(members) for members in own.values()]
        else:
            statistics = [self.statistics(train)]
        self.mean, self.std = (torch.stack(part).to(self.device) for part in zip(*statistics))  # (1 or speakers, F)

    def standardise_like(self, other):
        """For another corpus: the statistics that a model was trained with."""
        if self.normalise == "speaker":
            self.standardise_by(None)
        else:
            self.row, self.mean, self.std = torch.zeros(len(self.features), dtype=torch.long), other.mean, other.std

    def batch(self, windows):
        """Indices of windows -> (N, 1, F, T)."""
        x = self.features[windows.to(self.features.device)].to(self.device, torch.float32)
        row = self.row[windows].to(self.device)
        return ((x - self.mean[row][:, :, None]) / self.std[row][:, :, None])[:, None]

    def batches(self, utterances, steps, skip=0):
        """All windows of `utterances`, shuffled, in `steps` batches of equal size: pairs (x, target). The order is drawn at
        once; the first `skip` batches are left out. `drawn` says of which utterances the last two batches were. Where ranks
        share a batch, x is this rank's part, perhaps an empty one, and `target` that of the whole."""
        window, of = self.store.windows_of(utterances)
        target = torch.from_numpy(self.labels[utterances][of])
        rounds = -(-steps // len(window))
        order = torch.cat([torch.randperm(len(window)) for _ in range(rounds)])
        rank, world = ranks()

        def made():
            for part in order.tensor_split(steps)[skip:]:
                self.drawn = (*self.drawn, [utterances[i] for i in of[part.numpy()]])[-2:]
                yield self.batch(torch.from_numpy(window)[part.tensor_split(world)[rank]]), target[part].to(self.device)

        return made()

    def steps(self, utterances, batch):
        return -(-len(self.store.windows_of(utterances)[0]) // batch)

    def class_weights(self, utterances):
        """Inverse class frequencies, (classes,); their mean over the utterances is 1."""
        counts = np.bincount(self.labels[utterances], minlength=len(self.classes))
        if not counts.all():
            missing = ", ".join(c for c, n in zip(self.classes, counts) if n == 0)
            raise InputError(f"no training utterance is {missing}; every class needs one in every training set")
        return torch.tensor(len(utterances) / (len(self.classes) * counts), dtype=torch.float32, device=self.device)


def halves(utterances, labels):
    """Two halves of the training utterances, stratified by class: one for the weights, one for the alphas."""
    shuffled = [utterances[k] for k in torch.randperm(len(utterances))]
    by_class = sorted(shuffled, key=lambda i: labels[i])  # a stable sort: the order within a class stays random
    return by_class[0::2], by_class[1::2]


def poisoned(fold, options, labels):
    """Moves a share of each class of the test utterances to the training set: the paper's "dataset poisoning"."""
    rng, moved = np.random.default_rng(options.seed), []
    for label in set(labels[fold.test]):
        members = [i for i in fold.test if labels[i] == label]
        moved += rng.permutation(members)[: int(options.poison * len(members))].tolist()
    return replace(fold, train=fold.train + moved, test=[i for i in fold.test if i not in moved])


def seed(options, fold, stage):
    """Each stage of each fold has its own random stream, so that running fold 3 alone gives what running all gives."""
    torch.manual_seed(int(np.random.SeedSequence([options.seed, fold, stage]).generate_state(1)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: always from one confusion matrix over a whole test fold.


def confusion_matrix(labels, predicted, classes):
    """(classes, classes), rows the true classes, columns the predicted ones. `classes`: how many there are."""
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def ua(confusion):
    """Unweighted accuracy: the mean of the recalls of the classes that are present."""
    present = confusion.sum(axis=1) > 0
    return float((confusion.diagonal()[present] / confusion.sum(axis=1)[present]).mean())


def wa(confusion):
    """Weighted accuracy: correct / all."""
    return float(confusion.trace() / confusion.sum())


@torch.no_grad()
def predict(net, data, utterances, batch=64):
    """Logits of whole utterances, (utterances, classes): the mean over their windows."""
    net.eval()
    window, of = data.store.windows_of(utterances)
    logits = torch.cat([net(data.batch(part)) for part in torch.from_numpy(window).split(batch)]).cpu().double()
    total = torch.zeros(len(utterances), logits.shape[1], dtype=logits.dtype).index_add_(0, torch.from_numpy(of), logits)
    return (total / torch.bincount(torch.from_numpy(of))[:, None]).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Many processes. Folds are shared by whoever runs the same command, with no communication but files; the ranks of
# `torchrun`, where they are more than there are folds, share each step of all folds (`ranks`, data parallel).


def torchrun():
    """-> (number of this process, number of processes) of torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share_steps(options, device):
    """From here on `ranks` are those of torchrun."""
    rank, world = torchrun()
    if device.type == "cuda":
        if world > (options.batch + 1) // 2:  # batches of equal size can be half of --batch; SyncBatchNorm waits for every rank
            raise InputError(f"{world} ranks share batches of --batch {options.batch}, and each needs a part; give --batch {2 * world}, or fewer ranks")
        torch.cuda.set_device(device)
    patience = timedelta(minutes=30)  # with a rank that hangs; one that ends is noticed at once
    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=patience))
        store = own_store(store, rank, world, time.time() + patience.total_seconds())
        meet("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the {world} ranks do not find each other ({str(error).splitlines()[0]})") from None


def meet(backend, **how):
    """`init_process_group`, whose threads `destroy_process_group` can end. An optimizer's first step imports torch._dynamo, and
    that keeps the group for good when there is one (torch 2.11): its threads then meet the interpreter's end, and may abort it."""
    importlib.import_module("torch._dynamo")
    distributed.init_process_group(backend, **how)


def own_store(store, rank, world, deadline):
    """The part of torchrun's store that belongs to this start of the ranks. After a restart (torch 2.11) the store still holds
    the addresses of processes that are dead; so the first rank answers each rank's own number with one for all."""
    mine = os.urandom(8).hex()

    def read(key):
        return store.get(key).decode() if store.check([key]) else ""

    store.set(f"here {rank}", mine)
    while time.time() < deadline:
        for r in range(1, world) if rank == 0 else ():
            store.set(f"answer {r}", f"{read(f'here {r}')} {mine}")
        asked, _, common = read(f"answer {rank}").partition(" ")
        if rank and asked == mine:
            store.set(f"ready {rank}", common)
            return distributed.PrefixStore(common, store)
        if not rank and all(read(f"ready {r}") == mine for r in range(1, world)):
            return distributed.PrefixStore(mine, store)
        time.sleep(0.05)
    raise ValueError("one did not come")


def agreed(f, *args):
    """f(*args). Where ranks share the steps, the first one alone calls it, and all get what it returns."""
    rank, world = ranks()
    out = [f(*args) if rank == 0 else None]
    if world > 1:
        distributed.broadcast_object_list(out)
    return out[0]


def synchronised(net):
    """Batch norm over the whole of a batch that ranks share, on GPUs: torch has it for nothing else, and on a CPU each rank
    normalises by its own part. In place, as edges share modules."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__, module.process_group = nn.SyncBatchNorm, None
    return net


def lost(error):
    """Whether the error is that of a collective, i.e. most likely of another rank."""
    return ranks()[1] > 1 and Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts[-3:-1] == ("torch", "distributed")


def hold(seconds):
    """Lets another rank speak first: torchrun ends this one as soon as that one has ended with its error."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# What outlives the process: files that are whole or not there, a checkpoint from which the next process goes on with the
# very next step, a lock, and signals that wait for the end of a step. What is read back is not trusted: it is loaded
# without executing anything and must have the form of what is expected.

SAVE_EVERY = 30  # seconds between two checkpoints of an unfinished stage; times the seconds that one takes, where it takes more than one
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write(file, content):
    """Writes bytes, or what the function `content` writes. Whenever the process dies, the file is the old one or the new one.
    Of ranks that share the steps the first one alone writes."""
    if ranks()[0]:
        return
    part = file.with_name(file.name + ".part")
    try:
        with open(part, "wb") as out:
            out.write(content) if isinstance(content, bytes) else content(out)
            out.flush()
            os.fsync(out.fileno())
    except Exception as error:  # a full disk: make room again; torch hides what the disk said
        part.unlink(missing_ok=True)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    os.replace(part, file)


class InUse(InputError):
    """Another process works on the fold."""


def lock(folder, wait=False):
    """-> an open file. Until it is closed no other process gets it; the lock of a dead process is free."""
    locked = open(folder / "lock", "a+", errors="replace")
    if fcntl:  # Windows has no such lock; there, two processes are not kept apart
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            locked.seek(0)
            who = re.sub(r"[^\w .-]", "", locked.read(80))
            locked.close()
            raise InUse(f"{folder} (process {who})") from None
    locked.truncate(0)
    locked.write(f"{os.getpid()} on {platform.node()}")
    locked.flush()
    return locked


class Stopped(BaseException):
    """A signal asked the process to end. Like KeyboardInterrupt no Exception: nobody shall take it for an error of his own."""


class Stop:
    """Handles SIGTERM and Ctrl-C: at once, or after the step when there is one (`later`). A second one does not wait, but
    where ranks share the steps: torchrun passes Ctrl-C on to processes that have had it."""

    signal, later = None, False

    def __call__(self, number, frame):
        first, self.signal = self.signal is None, number
        if not ((first or ranks()[1] > 1) and self.later):
            raise Stopped(number)


def out_of_memory(error):
    return isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(error)) is not None


@contextmanager
def untrusted(file, remedy):
    """Inside, a file is read and checked. Whatever it provokes (a hostile one may provoke anything) is an InputError."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or isinstance(error, OSError) and error.errno in DISK_FULL:  # no reason to delete anything
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is damaged or not of this run ({why:.150}); {remedy}") from None


def must(true, otherwise="not the contents expected"):
    """An assertion that `python -O` does not drop."""
    if not true:
        raise ValueError(otherwise)


def loaded(file):
    """What torch.save wrote, read without executing anything."""
    with open(file, "rb") as raw, zipfile.ZipFile(raw) as archive:
        inside = archive.infolist()
        raw.seek(0)  # torch.load takes what begins otherwise for an older format, which trusts the lengths that it is told
        must(raw.read(4) == b"PK\3\4" and all(entry.compress_type == zipfile.ZIP_STORED for entry in inside), "not written by torch.save")
        must(sum(entry.file_size for entry in inside) <= file.stat().st_size and archive.testzip() is None, "changed or cut off")
    return torch.load(file, map_location="cpu", weights_only=True)


def alike(found, expected):
    """Whether what a file holds has the form of `expected`: types, names, lengths, shapes."""
    if isinstance(expected, torch.Tensor):
        there = isinstance(found, torch.Tensor) and (found.shape, found.dtype, found.layout, found.device.type)
        return there == (expected.shape, expected.dtype, torch.strided, "cpu")
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[name], v) for name, v in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(alike, found, expected))
    return True


def form(part):
    """What the state of an optimiser looks like after its first step; before that it holds nothing, and afterwards nothing
    for a weight that never had a gradient."""
    held = ("step", "exp_avg", "exp_avg_sq") if isinstance(part, torch.optim.Adam) else ("momentum_buffer",)
    weights = part.param_groups[0]["params"]
    return {i: {name: torch.zeros(()) if name == "step" else w.detach() for name in held} for i, w in enumerate(weights)}


class Keeper:
    """Where the search or the training of a fold stands, in memory and in `file`: networks and optimisers (`parts`), random
    generators, epoch, step, sums of the epoch so far, the best epoch so far, the rows of the log, the seconds spent.
    `run` names run and fold, so that the file of another one is refused. Without a file nothing is saved.

    When a stage goes on within an epoch, the random state is first that of the epoch's `begin`, so that the orders of its
    batches are drawn again, and then that of `now`. Where ranks share the steps, each has a state of its own (for dropout)
    that is drawn anew for each step, from one that all have in common.
    """

    KEPT = ("run", "stage", "genotype", "epoch", "step", "begin", "sums", "best", "best_weights", "rows", "seconds")

    def __init__(self, device, run="", file=None, stop=None):
        self.device, self.run, self.file, self.stop = device, run, file, stop or Stop()
        self.stage, self.genotype, self.epoch, self.step, self.begin = "search", "", 0, 0, self.random()
        self.sums, self.best, self.best_weights = {"loss": 0.0, "alpha_loss": 0.0}, {"ua": -1.0, "epoch": 0}, None
        self.rows, self.seconds, self.parts, self.found = [], {"search": 0.0, "train": 0.0}, {}, None
        self.saved, self.wait = time.perf_counter(), SAVE_EVERY
        if file and file.exists():
            with self.untrusted():
                self.found = self.read()
                self.stage, self.genotype, self.rows = (self.found[name] for name in ("stage", "genotype", "rows"))

    def untrusted(self):
        return untrusted(self.file, "delete it, and its fold starts anew")

    def state(self):
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {name: getattr(self, name) for name in self.KEPT} | {"now": self.random(), "parts": parts}

    def read(self):
        """What needs no network is checked here, the rest in `restore`."""
        found, mine = loaded(self.file), self.state()
        must(type(found) is dict and found.keys() == mine.keys())
        must(found["run"] == self.run, "of another run or fold")
        must(all(alike(found[name], mine[name]) for name in ("stage", "genotype", "epoch", "step", "sums", "best", "seconds")))
        must(found["stage"] in self.seconds and found["epoch"] >= 0 and found["step"] >= 0)
        must(all(row["stage"] in self.seconds and type(row["seconds"]) is float for row in found["rows"]))
        return found

    def restore(self, total):
        for name, part in self.parts.items():
            theirs, mine = self.found["parts"][name], part.state_dict()
            if isinstance(part, torch.optim.Optimizer):
                expected = form(part)
                mine["state"] = {i: expected[i] for i in theirs["state"]}
            must(alike({**theirs}, {**mine}), f"its {name} is that of another network")
            part.load_state_dict(theirs)
        best, weights = self.found["best"], self.found["best_weights"]
        must(weights is None if best["epoch"] == 0 else alike(weights, {**self.parts["net"].state_dict()}), "its best weights are those of another network")
        must(self.found["epoch"] <= total)
        for name in self.KEPT:
            setattr(self, name, self.found[name])
        self.now, self.found = self.found["now"], None
        self.set_random(self.now)  # refused here where it cannot be
        self.set_random(self.begin)

    def random(self):
        return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])

    def set_random(self, states):
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:  # there is one if the run was on a GPU before
            torch.cuda.set_rng_state(states[1], self.device)

    def epochs(self, total, **parts):
        """The epochs that are left of this stage, whose `parts` are new or, from the file, as they were."""
        self.parts, self.mark = parts, time.perf_counter()
        if self.found:
            with self.untrusted():
                self.restore(total)
        else:
            self.begin = self.random()
        self.stop.later = True
        while self.epoch < total:
            yield self.epoch
            self.epoch, self.step, self.sums, self.begin = self.epoch + 1, 0, dict.fromkeys(self.sums, 0.0), self.random()
            self.pause(self.epoch == total)
        self.stop.later = False

    def steps(self, batches):
        """The batches that are left of this epoch, i.e. made with the first `step` skipped."""
        rank, world = ranks()
        if world > 1:
            drawn, common = int(torch.randint(2**62, ())), self.random()
        elif self.step:
            self.set_random(self.now)
        for batch in batches:
            if world > 1:
                torch.manual_seed(drawn + self.step * world + rank)
            yield batch
            self.step += 1
            self.pause()
        if world > 1:
            self.set_random(common)

    def pause(self, last=False):
        """Between two steps: saves if it is time."""
        signal, due = self.together(self.stop.signal or 0, last or time.perf_counter() - self.saved >= self.wait)
        if self.file and (signal or due):
            self.save(self.file)
        if signal:
            raise Stopped(signal)

    def together(self, signal, due):
        """Where ranks share the steps: the signal that any of them has got, and whether it is time on the first one's clock.
        Refuses to go on when their alphas, or the last of their weights, are no longer the same bits."""
        rank, world = ranks()
        if world == 1:
            return signal, due
        held = [*getattr(self.parts["net"], "alphas", list)(), self.parts["net"].weights()[-1]]
        bits = torch.cat([p.detach().flatten().view(torch.int32) for p in held]).long()
        mark = (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()[None]
        state = torch.cat([torch.tensor([signal, due and rank == 0], device=mark.device), mark, -mark])
        distributed.all_reduce(state, distributed.ReduceOp.MAX)
        signal, due, highest, lowest = state.tolist()
        if highest != -lowest:
            raise Apart(f"{self.run}, {self.stage}, epoch {self.epoch + 1}, step {self.step}: the ranks' alphas or weights differ, which a fault of "
                        "this program or of a machine must have done; the last checkpoint is whole")  # fmt: skip
        return signal, due

    def save(self, file):
        now = time.perf_counter()
        self.seconds[self.stage], self.mark = self.seconds[self.stage] + now - self.mark, now
        write(file, lambda out: torch.save(self.state(), out))
        self.saved = time.perf_counter()
        self.wait = SAVE_EVERY * max(1, self.saved - now)

    def found_genotype(self, genotype):
        """The search is over."""
        self.stage, self.genotype, self.epoch, self.step = "train", genotype.to_json() if genotype else "", 0, 0


# ---------------------------------------------------------------------------------------------------------------------
# Search and training


def search(net, data, train, options, log, keep=None):
    """Moves alphas and weights in turn. The network is a supernet; `train` are the training speakers' utterances. -> Genotype."""
    keep = keep or Keeper(data.device)
    w_half, alpha_half = halves(train, data.labels)
    steps, class_weights = data.steps(w_half, options.batch), data.class_weights(train)

    def loss(logits, target):
        return cross_entropy(logits, target, class_weights, options.label_smoothing)

    def penalty():
        return options.size_penalty * expected_parameters(net) / 1e6

    architect = Architect(
        net, loss, order=options.order, lr=options.alpha_lr, weight_decay=options.alpha_decay, penalty=penalty if options.size_penalty else None
    )
    optimizer = optimizer_of(options.search_optimizer, net, options.search_lr, options.search_decay, options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.search_epochs, options.lr_min)
    net.drop_path = options.hold_back
    for epoch in keep.epochs(options.search_epochs, net=net, optimizer=optimizer, schedule=schedule, alphas=architect.optimizer):
        started, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        net.train()
        batches = zip(data.batches(w_half, steps, keep.step), data.batches(alpha_half, steps, keep.step))
        for (x, target), val in keep.steps(batches):
            x = augmented(x, options)
            if epoch >= options.warm_up:  # without, operations that have nothing to learn are ahead
                keep.sums["alpha_loss"] += finite(architect.step(val, (x, target), xi=lr))
            keep.sums["loss"] += weight_step(net, loss(logits_of(net, x, data), target), optimizer, options.clip)
        schedule.step()
        log(
            stage="search", epoch=epoch + 1, lr=lr, loss=keep.sums["loss"] / steps, **({"alpha_loss": keep.sums["alpha_loss"] / steps} if epoch >= options.warm_up else {}),
            entropy=entropy(net), **skips(derive(net)), seconds=time.perf_counter() - started,
        )  # fmt: skip
    return derive(net)


def optimizer_of(name, net, lr, decay, options):
    if name == "sgd":
        return torch.optim.SGD(net.weights(), lr, options.momentum, weight_decay=decay)
    return torch.optim.AdamW(net.weights(), lr, weight_decay=decay, fused=True)  # fused: the same numbers up to rounding, faster


def skips(genotype):
    """Number of skip connections of each cell."""
    cells = {kind: cell for kind, cell in vars(genotype).items() if cell is not None}
    return {f"skips_{kind}": sum(op == "skip_connect" for node in cell for op, _ in node) for kind, cell in cells.items()}


def train(net, data, train, validation, options, log, keep=None):
    """Trains a derived network from scratch. -> epoch that counts."""
    keep = keep or Keeper(data.device)
    steps, class_weights = data.steps(train, options.batch), data.class_weights(train)
    lr = options.lr if options.lr is not None else 0.001 if options.model in BASELINES else 0.003
    optimizer = optimizer_of(options.optimizer, net, lr, options.decay, options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    for epoch in keep.epochs(options.epochs, net=net, optimizer=optimizer, schedule=schedule):
        started, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        net.train()
        net.drop_path = options.drop_path * epoch / options.epochs
        for x, target in keep.steps(data.batches(train, steps, keep.step)):
            loss = cross_entropy(logits_of(net, augmented(x, options), data), target, class_weights, options.label_smoothing)
            keep.sums["loss"] += weight_step(net, loss, optimizer, options.clip)
        schedule.step()
        seen = confusion_matrix(data.labels[validation], predict(net, data, validation).argmax(1), len(data.classes))
        log(
            stage="train", epoch=epoch + 1, lr=lr, loss=keep.sums["loss"] / steps, val_ua=ua(seen), val_wa=wa(seen),
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        if options.select == "best" and ua(seen) >= keep.best["ua"]:
            keep.best = {"ua": ua(seen), "epoch": epoch + 1}
            keep.best_weights = {name: t.clone() for name, t in net.state_dict().items()}
    if options.select == "best":
        net.load_state_dict(keep.best_weights)
        return keep.best["epoch"]
    return options.epochs


def augmented(x, options):
    """Standardised maps (N, 1, F, T), each with its own shift and masks; a mask is filled with the mean, 0."""
    if options.shift:
        t = torch.arange(x.shape[3]) + torch.randint(x.shape[3], (len(x), 1))  # (N, T)
        x = x.gather(3, (t % x.shape[3]).to(x.device)[:, None, None].expand_as(x))
    for axis in (3, 2) if options.features == "log-mel" else (3,):  # a mask over MFCCs would not be one of bands
        for _ in range(options.masks):
            x = torchaudio.functional.mask_along_axis_iid(x, x.shape[axis] // 5, 0.0, axis)
    return x


def cross_entropy(logits, target, weight, smoothing=0.0):
    """The class-weighted mean over a batch. Where ranks share it, this rank's summand: `logits` of its part, `target` of all."""
    rank, world = ranks()
    if world == 1:
        return F.cross_entropy(logits, target, weight, label_smoothing=smoothing)
    mine = target.tensor_split(world)[rank]
    return F.cross_entropy(logits, mine, weight, reduction="sum", label_smoothing=smoothing) / weight[target].sum()


def logits_of(net, x, data):
    """net(x); of an empty part of a batch without running the network."""
    return net(x) if len(x) else x.new_zeros(0, len(data.classes), requires_grad=True)


def weight_step(net, loss, optimizer, clip):
    """One step of the weights, and of nothing else: -> the loss, a float. In a search the alphas get no gradient."""
    w = net.weights()
    loss.backward(inputs=w)
    if ranks()[1] > 1:  # clipped is the gradient of the whole batch
        loss, gradients = reduced(loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in w])
        for p, g in zip(w, gradients):
            p.grad = torch.empty_like(p).copy_(g)  # in the memory format of the weight
    norm = torch.nn.utils.clip_grad_norm_(w, clip)
    value = finite(loss.item())
    finite(norm.item(), "norm of the gradient")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # now, as it is as large as the weights, and the alphas' step needs no such thing
    return value


def finite(value, what="loss"):
    if not math.isfinite(value):
        raise NotFinite(f"the {what} is {value}")
    return value


class NotFinite(Exception):
    """A number that no step can be made with."""


class Apart(Exception):
    """Ranks that share the steps do not hold the same network any more."""


def entropy(net):
    """Mean entropy of the edges' softmax weights as a share of the largest possible: 1 undecided, 0 decided."""
    parts = []
    for alpha in net.alphas():
        p = alpha.detach().softmax(dim=1)
        parts.append(-(p * p.log()).sum(dim=1) / math.log(p.shape[1]))
    return torch.cat(parts).mean().item()


def fit(k, fold, data, options, folder, progress, keep):
    """Search, derive and train for one fold; never touches its test speakers. Writes genotype.json and log.csv.
    -> (the network, what model.pt holds, what results.json says of it)."""
    data.standardise_by(fold.train)
    reset_peak(data.device)
    shared_on_gpu = ranks()[1] > 1 and data.device.type == "cuda"
    with open(os.devnull if ranks()[0] else folder / "log.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS)
        rows.writeheader()
        with keep.untrusted():
            rows.writerows(keep.rows)
        progress.count(keep.rows)
        if keep.found and keep.found["epoch"] < progress.length[keep.stage]:
            progress.say(f"fold {k}: goes on with {keep.stage}, epoch {keep.found['epoch'] + 1}, step {keep.found['step'] + 1}")

        def log(**row):
            keep.rows.append({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()})
            rows.writerow(keep.rows[-1])
            file.flush()
            progress.epoch(k, row)

        try:
            genotype = None
            if keep.stage == "search" and searches(options):
                seed(options, k, 0)
                supernet = network(options, len(data.classes)).to(data.device, memory_format=torch.channels_last)
                supernet = synchronised(supernet) if shared_on_gpu else supernet
                genotype = search(supernet, data, fold.train, options, log, keep)
                keep.found_genotype(genotype)
                progress.say(f"fold {k}: found in {keep.seconds['search']:.0f} s\n{genotype}")
            elif keep.stage == "search":
                keep.found_genotype(given_genotype(options) or drawn_genotype(options))
            if keep.genotype:
                with keep.untrusted(), torch.device("meta"):  # a small one and a network of it, before a large one takes the memory
                    genotype = Genotype.from_json(keep.genotype)
                    must(options.genotype or all(len(cell) == options.nodes for cell in vars(genotype).values() if cell), "a genotype of another size")
                    network(options, 2, genotype)
                write(folder / "genotype.json", keep.genotype.encode())

            seed(options, k, 1)
            net = final_network(options, len(data.classes), genotype).to(data.device, memory_format=torch.channels_last)
            net = synchronised(net) if shared_on_gpu else net
            epoch = train(net, data, fold.train, fold.validation, options, log, keep)
        except NotFinite as error:
            keep.save(folder / "not-finite.pt")
            names = ", ".join(data.listing.name(data.listing.utterances[i]) for members in data.drawn[-2 if keep.stage == "search" else -1 :] for i in members)
            raise NotFinite(
                f"fold {k}, {keep.stage}, epoch {keep.epoch + 1}, step {keep.step + 1}, learning rate "
                f"{keep.parts['optimizer'].param_groups[0]['lr']:g}: {error}. {folder / 'not-finite.pt'} holds the state, for a look at it; "
                f"a checkpoint from before it stays. Look into the batch, or try a smaller --lr or --alpha-lr with another --out. Batch: {names}"
            ) from None

    model = {
            "format": "emodarts-1",
            "sizes": {name: getattr(options, name) for name in NETWORK_SIZES},
            "model": options.model,
            "genotype": keep.genotype,
            "classes": list(data.classes),
            "features": asdict(feature_settings(options)),
            "normalise": options.normalise,
            "statistics": None if options.normalise == "speaker" else {"mean": data.mean.cpu().T, "std": data.std.cpu().T},  # (F, 1)
            "weights": {name: t.cpu().contiguous() for name, t in net.state_dict().items()},
            "trained_on": {
                "dataset": options.dataset, "protocol": options.protocol, "poison": options.poison, "epoch": epoch,
                "speakers": speakers(data.listing, fold.train), "validation": speakers(data.listing, fold.validation),
            },
    }  # fmt: skip
    return net, model, {
        "validation": speakers(data.listing, fold.validation),
        "epoch": epoch,
        "validation_ua": next(row["val_ua"] for row in reversed(keep.rows) if (row["stage"], row["epoch"]) == ("train", epoch)),
        "genotype": json.loads(keep.genotype or "null"),
        "parameters": sum(p.numel() for p in net.weights()),
        "macs": round(macs(net, feature_settings(options).shape) * 8 / options.window),  # of 8 seconds
        "peak_gb": round(peak_memory(data.device) or 0, 2),
        "seconds": {"search": round(keep.seconds["search"], 1), "training": round(keep.seconds["train"], 1)},
    }


def searches(options):
    return options.model == "emodarts" and options.genotype is None


def drawn_genotype(options):
    """The random genotype of a seed, the same one for all folds; None for the baselines."""
    if options.model != "random":
        return None
    torch.manual_seed(options.seed)
    with torch.device("meta"):
        supernet = network(options, 2)
    return random_genotype(supernet)


def score(net, data, members, file):
    """Scores utterances once, and writes a row for each. -> what results.json says of them."""
    logits = predict(net, data, members)
    confusion = confusion_matrix(data.labels[members], logits.argmax(1), len(data.classes))
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    out = io.StringIO(newline="")
    rows = csv.writer(out)
    rows.writerow(["utterance", "label", "predicted", *data.classes])
    for i, p in zip(members, probabilities):
        u = data.listing.utterances[i]
        rows.writerow([data.listing.name(u), u.label, data.classes[p.argmax()], *(f"{v:.9g}" for v in p)])
    write(file, out.getvalue().encode(errors="surrogateescape"))
    return {"test": speakers(data.listing, members), "ua": ua(confusion), "wa": wa(confusion), "confusion": confusion.tolist()}


def feature_settings(options):
    return features.Settings(options.coefficients, options.window, options.padding, options.features)


def speakers(listing, members):
    return sorted({listing.utterances[i].speaker for i in members})


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


class Progress:
    """One line an epoch; on a terminal the line overwrites the one before, and says how much time is left."""

    def __init__(self, options, chosen):
        rank, world = torchrun()
        self.terminal, self.quiet = sys.stdout.isatty() and world == 1, options.quiet or ranks()[0] > 0
        self.prefix, self.sharing = (f"rank {rank}: ", world) if world > ranks()[1] else ("", 1)
        self.length = {"search": options.search_epochs if searches(options) else 0, "train": options.epochs}
        self.begin(len(chosen))
        self.seconds = {"search": [], "train": []}
        self.folds = chosen

    def begin(self, folds):
        """So many folds are not finished yet."""
        self.left = {stage: epochs * folds for stage, epochs in self.length.items()}

    def count(self, rows):
        for row in rows:
            self.left[row["stage"]] -= 1
            self.seconds[row["stage"]].append(row["seconds"])

    def epoch(self, k, row):
        self.count([row])
        stage = row["stage"]
        text = f"fold {k} ({self.folds.index(k) + 1}/{len(self.folds)})  {stage:6} {row['epoch']:3}/{self.length[stage]}  {self.time_left():>6} left"
        if stage == "search":
            text += f"  loss {row['loss']:.3f}" + (f", alphas' {row['alpha_loss']:.3f}" if "alpha_loss" in row else "") + f"  entropy {row['entropy']:.3f}"
        else:
            text += f"  loss {row['loss']:.3f}  validation UA {100 * row['val_ua']:5.1f}"
        self.say(text, passing=True)

    def time_left(self):
        """Epochs left times what an epoch took; before the first training epoch half a search epoch is assumed."""
        mean = {stage: sum(s) / len(s) if s else None for stage, s in self.seconds.items()}
        mean["train"] = mean["train"] or 0.5 * mean["search"]
        return duration(sum(max(0, self.left[stage]) * (mean[stage] or 0) for stage in self.left) / self.sharing)

    def say(self, text, passing=False):
        if self.quiet:
            return
        if self.terminal:
            text = text[: shutil.get_terminal_size().columns - 1] if passing else text  # a line that wraps cannot be overwritten
            print("\r\033[K" + text, end="" if passing else "\n", flush=True)
        else:
            print(text and self.prefix + text, flush=True)


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def summary(runs):
    """Mean, standard deviation (ddof 1; none of a single fold) and pooled value of UA and WA over folds, in 0..1. None of
    them where folds share a training, as MSP-Podcast's Test1 and Test2 do: those are reported apart."""
    pooled = sum(np.array(run["confusion"]) for run in runs)
    out = {}
    for name, metric in (("ua", ua), ("wa", wa)):
        values = [run[name] for run in runs]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out[name] = {"mean": float(np.mean(values)), "std": std, "pooled": metric(pooled)}
        if len({run["trained_as"] for run in runs}) < len(runs):
            out[name] = dict.fromkeys(out[name])
    return out


def table(runs):
    """The table that a run ends with, in percent."""

    def names(people):
        return " ".join(people) if len(people) < 5 else f"{len(people)} speakers"

    wide = max(10, *(len(names(run["validation"])) for run in runs), *(len(run["name"]) for run in runs))
    yield f"{'fold':6} {'test':{wide}} {'validation':{wide}} {'utterances':>10} {'UA':>6} {'WA':>6} {'parameters':>11} {'search':>8} {'training':>8}"
    for run in runs:
        yield (
            f"{run['fold']:<6} {run['name']:{wide}} {names(run['validation']):{wide}} {np.sum(run['confusion']):>10} "
            f"{100 * run['ua']:6.1f} {100 * run['wa']:6.1f} {run['parameters']:>11,} "
            f"{run['seconds']['search']:>6.0f} s {run['seconds']['training']:>6.0f} s"
        )
    whole = summary(runs)
    for name in ("mean", "std", "pooled"):
        values = (whole[metric][name] for metric in ("ua", "wa"))
        yield f"{name:{wide * 2 + 19}}" + " ".join(f"{'-':>6}" if v is None else f"{100 * v:6.1f}" for v in values)


# ---------------------------------------------------------------------------------------------------------------------
# For people: what a run will cost, what it has found, what its models hear


def lengths(listing, window):
    """Windows and seconds of each utterance, (utterances,) each, from the headers of the wav files alone."""
    seconds = np.zeros(len(listing.utterances))
    for i, u in enumerate(listing.utterances):
        try:
            with open(u.path, "rb") if os.path.isfile(u.path) else io.BytesIO() as file:
                head = file.read(4096)
            rate, data = head.index(b"fmt ") + 16, head.index(b"data") + 4  # where bytes per second and the length of the sound stand
            rate, length = (int.from_bytes(head[at : at + 4], "little") for at in (rate, data))
            seconds[i] = min(length, os.path.getsize(u.path) - data - 4) / rate
        except (OSError, ValueError, ZeroDivisionError):
            pass  # what is wrong with it is said when it is read
    return np.ceil(seconds / window).clip(min=1).astype(int), seconds


def peak_memory(device):
    """Most memory held since `reset_peak`, GB: on a GPU by tensors, on a CPU by the process. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if Path("/proc/self/status").exists():  # resource's figure begins with that of the parent process, on Linux
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes, on macOS


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def estimate(options, windows, parts, chosen, classes, device, patience):
    """One step of each kind with noise of the real size, again and again until `patience` seconds are over; the fastest
    counts, as the first ones are slower. -> seconds that the chosen folds will take, {kind: (steps, seconds of one)}, peak memory so far."""
    steps = {"training": 0, "validation": 0, "search": 0}
    # MSP-Podcast's folds have one training in common.
    for train, validation in {(tuple(parts[k].train), tuple(parts[k].validation)) for k in chosen}:
        for stage, epochs, members in (
            ("training", options.epochs, train), ("validation", options.epochs, validation), ("search", options.search_epochs, train[0::2])
        ):  # fmt: skip
            steps[stage] += epochs * -(-int(windows[list(members)].sum()) // options.batch)
    reset_peak(device)
    size = -(-options.batch // ranks()[1])
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same networks on all ranks
        if searches(options):
            supernet = network(options, classes).to(device, memory_format=torch.channels_last)
            architect, genotype = Architect(supernet, F.cross_entropy, order=options.order), derive(supernet)
        else:
            supernet, genotype = None, given_genotype(options) or drawn_genotype(options)
        derived = final_network(options, classes, genotype).to(device, memory_format=torch.channels_last)
        batch = torch.randn(size, 1, *feature_settings(options).shape, device=device), torch.arange(size, device=device) % classes

        def weights_move(net):
            optimizer = optimizer_of(options.search_optimizer if net is supernet else options.optimizer, net, 1e-3, 0, options)

            def step():
                if net is supernet:
                    architect.step(batch, batch, xi=options.search_lr)
                loss = F.cross_entropy(net(batch[0]), batch[1])
                loss.backward(inputs=net.weights())
                reduced(loss.detach(), [p.grad for p in net.weights() if p.grad is not None])
                optimizer.step()
                optimizer.zero_grad()

            return step

        seconds = {}
        look = torch.no_grad()(lambda: derived(batch[0]))
        for stage, step in (("training", weights_move(derived)), ("validation", look), ("search", supernet and weights_move(supernet))):
            if step is None:
                steps[stage] = seconds[stage] = 0
                continue
            begun = time.perf_counter()
            while not seconds.get(stage) or agreed(lambda: time.perf_counter() - begun < patience):
                started = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[stage] = min(seconds.get(stage, math.inf), time.perf_counter() - started)
    return sum(steps[stage] * seconds[stage] for stage in steps), {stage: (steps[stage], seconds[stage]) for stage in steps}, peak_memory(device)


def outlook(options, listing, parts, chosen, device, patience):
    """Five lines: what is about to happen, and what it will cost on this device."""
    windows, seconds = lengths(listing, options.window)
    yield (
        f"corpus    {options.dataset}, protocol {options.protocol}: {len(listing.utterances)} utterances, {seconds.sum() / 60:.1f} minutes, "
        f"{windows.sum()} windows of {options.window:g} s, {len({u.speaker for u in listing.utterances})} speakers, {len(listing.classes)} classes"
    )
    sizes = {side: [len(getattr(parts[k], side)) for k in chosen] for side in ("train", "validation", "test")}
    sides = (f"{side} {min(n)}" + f" to {max(n)}" * (min(n) < max(n)) for side, n in sizes.items())
    yield f"folds     {len(chosen)} of {len(parts)} at {options.scale} scale, utterances of each: {', '.join(sides)}; into {out_folder(options)}"
    with torch.device("meta"):
        net = network(options, len(listing.classes))
    cnn, seq, every = (sum(p.numel() for p in part) for part in (net.cnn.parameters(), net.seq.parameters(), net.weights()))
    yield f"network   {options.model}, no search" if not searches(options) else (
        f"supernet  {every:,} weights: CNN cells ({options.cnn_cells}) {cnn:,}, SeqNN cells ({options.seq_cells}) {seq:,}, the rest {every - cnn - seq:,}; "
        f"{sum(a.numel() for a in net.alphas())} alphas"
    )
    total, steps, peak = estimate(options, windows, parts, chosen, len(listing.classes), device, patience)
    kinds = ", ".join(f"{steps[stage][0]:,} {stage} steps of {steps[stage][1]:.2g} s" for stage in ("search", "training"))
    rank, world = torchrun()
    if world > 1 and not options.dry_run:
        yield f"ranks     {world}, " + ("which share each step" if ranks()[1] > 1 else "each takes folds of its own; the cost is that of one rank alone")
    yield f"cost      about {duration(total)} on {device} ({kinds}); peak memory {f'about {peak:.1f} GB' if peak else 'unknown'}"
    both = [f"--{name.replace('_', '-')} {less}" for name, high, less in (
        ("stem_stride", options.stem_stride == 1, 2), ("order", options.order == 2, 1), ("seq_space", options.seq_space == "all", "rnn"),
        ("nodes", options.nodes > 1, options.nodes - 1), ("channels", options.channels > 1, options.channels // 2),
    ) if high]  # fmt: skip
    time_only = ["--folds 0"] * (len(chosen) > 1) + ["fewer --search-epochs and --epochs"] + ["a GPU"] * (device.type == "cpu")
    memory = ["--recompute"] * (not options.recompute) + [f"--batch {options.batch // 2}"] * (options.batch > 3)
    yield "to lower  " + "; ".join(f"{what}: {', '.join(names)}" for what, names in (("time", time_only), ("memory", memory), ("both", both)) if names)


def dry_run(options, listing, chosen, device):
    parts = features.folds(listing)
    for line in outlook(options, listing, parts, chosen, device, patience=1):
        print(line, flush=True)
    print(*(line for k, line in enumerate(features.describe_folds(listing, parts)) if k in chosen), sep="\n")
    print("a dry run: nothing was written")


# report.md: made of results.json, settings.json and log.csv, of nothing else

CURVES = (  # title, unit, stage and column of log.csv, factor, top of the axis (None: the largest value)
    ("search: loss of the weights", "loss", "search", "loss", 1, None),
    ("search: loss of the alphas", "loss", "search", "alpha_loss", 1, None),
    ("search: entropy of the alphas (1: undecided, 0: decided)", "entropy", "search", "entropy", 1, 1),
    ("training: loss", "loss", "train", "loss", 1, None),
    ("training: UA of the validation speakers", "percent", "train", "val_ua", 100, 100),
)  # fmt: skip


def plain(text):
    """For Markdown, in which a corpus' names may mean something."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&$!])", r"\\\1", " ".join(str(text).split()))


def grid(head, rows):
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [head, ["---"] * len(head), *rows])


def folded(title, text):
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def graph(kind, cell):
    """A cell as a Mermaid graph: states 0 and 1 are its inputs, the others its nodes."""
    lines = ["```mermaid", "graph LR", f'    s0(["{kind}: input 0"])', '    s1(["input 1"])']
    for i, node in enumerate(cell, start=2):
        lines += [f'    s{i}["node {i}"]', *(f'    s{j} -->|"{op}"| s{i}' for op, j in node), f'    s{i} --> out(["output"])']
    return "\n".join([*lines, "```"])


def agreement(cells):
    """Of the same cell of several genotypes: {(from, to): {operation: in how many}}."""
    seen = {(j, i): {} for i in range(2, 2 + max(map(len, cells))) for j in range(i)}
    for cell in cells:
        for i, node in enumerate(cell, start=2):
            for op, j in node:
                seen[j, i][op] = seen[j, i].get(op, 0) + 1
    return seen


def read_curves(folder, trained):
    """{(stage, column): for each epoch the values of the folds}; without a log there are none."""
    seen = {}
    for file in (folder / f"fold{k}" / "log.csv" for k in trained):
        if not file.exists():
            continue
        with untrusted(file, "delete it, and the report goes without it"), open(file, newline="") as rows:
            for row in csv.DictReader(rows):
                for _, _, stage, column, _, _ in CURVES:
                    if row["stage"] == stage and row[column]:  # the alphas have no loss while the weights warm up
                        seen.setdefault((stage, column), {}).setdefault(int(row["epoch"]), []).append(finite(float(row[column])))
    return {name: [values for _, values in sorted(epochs.items())] for name, epochs in seen.items()}


def write_report(folder):
    with untrusted(folder / "settings.json", "give another --out"):
        settings = json.loads((folder / "settings.json").read_text())
        options, command = dict(settings.pop("options")), str(settings.pop("command"))
        candidates = {"normal": 7, "reduce": 7, "seq": len(SEQ_SPACES[options["seq_space"]]) - 1}
    damaged = "move it away, and the run starts anew"
    with untrusted(folder / "results.json", damaged):
        results = json.loads((folder / "results.json").read_text())
        runs, classes, whole = results["folds"], list(map(plain, results["classes"])), summary(results["folds"])
        trained, counts = [run for run in runs if run["trained_as"] == run["fold"]], {}
    curves = read_curves(folder, [run["fold"] for run in trained])
    with untrusted(folder / "results.json", damaged):
        decided = [run for run in trained if run["genotype"]]  # none of a hand-designed network
        for run in decided:
            counts.setdefault(json.dumps(run["genotype"]), []).append(run["fold"])

        def percent(value):
            return "-" if value is None else f"{100 * value:.1f}"

        def score_table(runs):
            rows = [
                [r["fold"], plain(r["name"]), plain(features.listed(r["validation"])), np.sum(r["confusion"]), percent(r["ua"]), percent(r["wa"])] for r in runs
            ]  # fmt: skip
            rows += [[name, "", "", "", *(percent(summary(runs)[metric][name]) for metric in ("ua", "wa"))] for name in ("mean", "std", "pooled")]
            return grid(["fold", "test", "validation", "utterances", "UA", "WA"], rows)

        pooled = sum(np.array(run["confusion"]) for run in runs)
        shares = [
            [f"**{name}**", *row, percent(row[c] / row.sum()) if row.sum() else "-"] for c, (name, row) in enumerate(zip(classes, pooled))
        ]
        text = [
            f"# {plain(results['dataset'])}, protocol {plain(results['protocol'])}: "
            + ", ".join(f"{metric.upper()} {percent(whole[metric]['mean'])} ± {percent(whole[metric]['std'])}" for metric in ("ua", "wa")),
            f"Percent; mean and standard deviation over folds, of which {len(runs)} finished. Made by",
            "    " + " ".join(command.split()), *map(plain, results["notes"]),
            "## Results", score_table(runs),
            *(["### Tested on the whole of " + plain(results["cross"]["dataset"]), score_table(results["cross"]["folds"])] if "cross" in results else []),
            "## Confusion", "Rows: what it was. Columns: what it was taken for. All folds together.", grid(["", *classes, "recall, %"], shares),
        ]  # fmt: skip
        if decided:
            text += ["## What the search found" if options["model"] == "emodarts" else "## The genotype",
                     "The most frequent genotype first. An edge is labelled with its operation; inputs 0 and 1 are the outputs of the two cells before."]  # fmt: skip
        for n, (genotype, members) in enumerate(sorted(counts.items(), key=lambda item: -len(item[1]))):
            title = f"fold{'s' * (len(members) > 1)} {', '.join(map(str, members))}"
            graphs = "\n\n".join(graph(kind, cell) for kind, cell in json.loads(genotype).items())
            text += [f"### Genotype of {title}\n\n{graphs}"] if n == 0 else [folded(f"Genotype of {title}", graphs)]
        kinds = list(decided[0]["genotype"]) if decided else []
        chosen = [[r["fold"], [[op for node in r["genotype"][kind] for op, _ in node] for kind in kinds]] for r in decided]
        skips = [[k, *(f"{ops.count('skip_connect')} of {len(ops)}" for ops in cells)] for k, cells in chosen]
        text += decided and ["### Skip connections", "A search that collapses chooses `skip_connect` nearly everywhere. Edges that are one, in each cell:",
                 grid(["fold", *kinds], skips), "## How much the folds agree"]  # fmt: skip
        if ("search", "entropy") in curves:
            last = curves["search", "entropy"][-1]
            text.append(f"Entropy of the alphas at the end of the search, as a share of the largest possible (1: undecided, 0: decided): "
                        f"mean {np.mean(last):.5f}, from {min(last):.5f} to {max(last):.5f} over the folds.")  # fmt: skip
        if decided:
            text.append(f"In how many of {len(decided)} genotypes, in percent, an edge was kept, and with which operation. A node keeps two of its edges.")
        for kind in kinds:
            seen = agreement([run["genotype"][kind] for run in decided])
            ops = sorted({op for found in seen.values() for op in found}, key=lambda op: (-sum(found.get(op, 0) for found in seen.values()), op))
            rows = {f"`{op}`": [100 * found.get(op, 0) / len(decided) for found in seen.values()] for op in ops}
            rows |= {"**any: kept**": [100 * sum(found.values()) / len(decided) for found in seen.values()]}
            rows |= {"kept by chance": [200 / i for _, i in seen], "each by chance": [200 / i / candidates[kind] for _, i in seen]}
            head = ["edge", *(f"{j} → {i}" for j, i in seen)]
            text += [f"### {kind} cell", grid(head, [[name, *(f"{share:.0f}" if share else "" for share in row)] for name, row in rows.items()])]
        text.append("## Learning curves\n\nMeans over the folds, epoch by epoch.")
        for title, unit, stage, column, factor, top in CURVES:
            values = [factor * np.mean(v) for v in curves.get((stage, column), [])]
            if len(values) > 1:
                axes = f'    x-axis "epoch" 1 --> {len(values)}\n    y-axis "{unit}" 0 --> {top or 1.1 * max(values) or 1:.4g}\n'
                points = ", ".join(f"{v:.4g}" for v in values)  # bars, as the first colour of the light theme is too light for a line
                text.append(f'```mermaid\nxychart-beta\n    title "{title}"\n{axes}    bar [{points}]\n    line [{points}]\n```')
        costs = [[r["fold"], f"{r['parameters']:,}", *(f"{r['seconds'][s]:,.0f}" for s in ("search", "training"))] for r in trained]
        total = ["all", "", *(f"{sum(r['seconds'][s] for r in trained):,.0f}" for s in ("search", "training"))]
        text += ["## Cost", grid(["fold", "parameters", "search, s", "training, s"], [*costs, total]), "## Settings"]
        values = [[plain(name), plain(v)] for name, v in (options | settings).items()]
        text.append(folded("Every option, and the versions", grid(["setting", "value"], values)))
        content = ("\n\n".join(text) + "\n").encode(errors="replace")
    if not (folder / "report.md").exists() or (folder / "report.md").read_bytes() != content:
        write(folder / "report.md", content)


# A model that is used again


def read_model(file):
    """-> what model.pt holds, checked, and as "net" its network."""
    with untrusted(file, "name a run folder, or a model.pt that this program wrote"):
        must(file.is_file(), "no file")
        model = loaded(file)
        must(type(model) is dict and model.get("format") == "emodarts-1", "no model of emoDARTS")
        classes, sizes, statistics = model["classes"], model["sizes"], model["statistics"]
        must(type(classes) is list and len({*classes}) == len(classes) > 1 and all(type(c) is str and c.isprintable() for c in classes))
        settings = features.Settings(**model["features"])
        must(alike(asdict(settings), asdict(features.Settings())) and settings.window < 1e4, "not the settings of features")
        must(sizes.keys() == {*NETWORK_SIZES}, "not the sizes of a network")
        must(all(type(n) is (float if name == "dropout" else int) for name, n in sizes.items()), "not the sizes of a network")
        # Each cell and each node has weights of its own in the file: a small file cannot ask for a huge network.
        genotype, count = model["genotype"] and Genotype.from_json(model["genotype"]), len(model["weights"])
        must(not genotype or sizes["cnn_cells"] + sizes["seq_cells"] + max(len(cell) for cell in vars(genotype).values() if cell) <= count, "a genotype of another size")
        with torch.device("meta"):
            if genotype:
                net = Network(classes=len(classes), genotype=genotype, **sizes)
            else:
                must(model.get("model") in BASELINES, "of no model that is known here")
                net = Baseline(model["model"], len(classes), settings.coefficients)
            must(alike(model["weights"], {**net.state_dict()}), "its weights are those of another network")
            if genotype:
                net.eval().frames(torch.empty(1, 1, settings.coefficients, 8))  # a map may have too few rows
        must(all(w.isfinite().all() for w in model["weights"].values()), "its weights are not finite")
        must(statistics is None or alike(statistics, dict.fromkeys(("mean", "std"), torch.empty(settings.coefficients, 1))))
        must(statistics is None or statistics["mean"].isfinite().all() and (statistics["std"] > 0).all(), "its statistics are none")
        must((statistics is None) == (model["normalise"] == "speaker"))
        model["features"] = asdict(settings)
        model["net"] = net.to_empty(device="cpu").eval()
        net.load_state_dict(model["weights"])
        model["said"] = list(describe_model(model))
        must(all(line.isprintable() for line in model["said"]))
    return model


def read_models(place):
    """Of one file, or of all folds of a run folder, in order."""
    place = Path(place)
    files = sorted([*place.glob("model.pt"), *place.glob("fold*/model.pt")], key=lambda file: (len(str(file)), file))
    if not files and not os.path.isfile(place):
        raise InputError(f"--from is {place}, where no model is; expected a run folder with fold0/model.pt in it, or such a file")
    models = {file: read_model(file) for file in files or [place]}
    for name in ("classes", "features", "normalise"):
        if len({json.dumps(model[name]) for model in models.values()}) > 1:
            raise InputError(f"the models in {place} differ in their {name}, and can give no common answer; name one of them with --from")
    return models


def describe_model(model):
    """What the file says of itself; a file of an older version says less."""
    about, heard, version = model["trained_on"], features.Settings(**model["features"]), model.get("version", {})
    speakers = features.listed(about["speakers"], 24)
    if about.get("poison"):
        yield "  note      not speaker-independent: it was trained with utterances of its test speakers"
    yield f"  corpus    {about['dataset']}, protocol {about['protocol']}: trained for {int(about['epoch'])} epochs with speakers {speakers}"
    for test in model.get("test", []):
        yield f"  test      {test['name']}: UA {100 * test['ua']:.1f}, WA {100 * test['wa']:.1f} of {int(test['utterances'])} utterances"
    yield f"  classes   {', '.join(model['classes'])}"
    yield f"  hears     {heard.coefficients} {heard.kind}, windows of {heard.window:g} s, padding {heard.padding}, statistics: {model['normalise']}"
    yield f"  weights   {sum(p.numel() for p in model['net'].parameters()):,}; {', '.join(f'{name} {v}' for name, v in version.items() if v) or 'version unknown'}"
    if model["genotype"]:
        yield from ("  " + line for line in str(Genotype.from_json(model["genotype"])).splitlines())
    else:
        yield f"  model     {model['model']}, designed by hand"


@torch.no_grad()
def hear(models, paths, device):
    """-> for each clip what --json writes of it. Several models: the mean of their probabilities."""
    settings, maps, clips, bad = features.Settings(**models[0]["features"]), [], [], []
    for path in paths:
        try:
            samples = features.read_wav(path)
        except (InputError, OSError) as error:
            bad.append(str(error))
            continue
        cut, seconds = features.windows(samples, settings), len(samples) / features.RATE
        x = torch.stack([features.transform(settings)(torch.from_numpy(window)) for window in cut])
        maps.append(x.half().float())  # (W, F, T), rounded as the features that the model was trained with
        starts = [min(n * settings.window, max(0, seconds - settings.window)) for n in range(len(cut))]
        clips.append({"path": os.fsencode(path).decode(errors="replace"), "seconds": seconds, "starts": starts})
    if bad:
        raise InputError("\n  ".join([f"{len(bad)} of {len(paths)} clips cannot be used:"] * (len(paths) > 1) + bad))
    every, window = torch.cat(maps), torch.zeros(sum(map(len, maps)), len(models[0]["classes"]), dtype=torch.double)
    clip = torch.zeros(len(maps), window.shape[1], dtype=torch.double)
    for model in models:
        if model["statistics"]:
            mean, std = model["statistics"]["mean"], model["statistics"]["std"]
        else:  # one speaker's
            mean, square = every.mean((0, 2), dtype=torch.double), every.double().square().mean((0, 2))
            mean, std = mean.float()[:, None], (square - mean**2).clamp(min=1e-10).sqrt().float()[:, None]
        net = model["net"].to(device)
        logits = torch.cat([net(((x - mean) / std)[:, None].to(device)).cpu().double() for x in every.split(64)])
        window += logits.softmax(1) / len(models)
        clip += torch.stack([part.mean(0).softmax(0) for part in logits.split(list(map(len, maps)))]) / len(models)

    def answer(p):
        return {"label": models[0]["classes"][p.argmax()], "probabilities": dict(zip(models[0]["classes"], p.tolist()))}

    for about, p, parts in zip(clips, clip, window.split(list(map(len, maps)))):
        times = [{"start": start, "end": min(start + settings.window, about["seconds"])} for start in about.pop("starts")]
        about |= answer(p) | {"windows": [time | answer(q) for time, q in zip(times, parts)]}
    return clips


def use(options):
    """--from RUN, with --predict or alone."""
    if not options.from_ or options.json and not options.predict:
        raise InputError("--predict CLIP ... needs --from RUN, a run folder or a model file; --json goes with both")
    device, models = pick_device(options.device), read_models(options.from_)
    if not options.predict:
        for file, model in models.items():
            print(file, *model["said"], sep="\n")
        return
    clips = hear(list(models.values()), options.predict, device)
    about = {"from": options.from_, "models": len(models), "classes": next(iter(models.values()))["classes"], "clips": clips}
    if next(iter(models.values()))["normalise"] == "speaker" and not options.quiet:
        print(f"note: these {len(clips)} clips are taken as one speaker's and normalised by their own statistics", file=sys.stderr)
    if options.json == "-":
        return print(json.dumps(about, indent=1))
    wide = max(len(clip["path"]) for clip in clips)

    def line(name, answer):
        each = "  ".join(f"{c} {p:.3f}" for c, p in answer["probabilities"].items())
        return f"{name:{wide}}  {answer['label']:{max(map(len, about['classes']))}}  {each}"

    for clip in clips:
        print(line(clip["path"], clip))
        for part in clip["windows"] if len(clip["windows"]) > 1 else ():
            print(line(f"  {part['start']:.1f} to {part['end']:.1f} s", part))
    if options.json:
        write(Path(options.json), (json.dumps(about, indent=1) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds, several models, the same folds


def compared(options, folder, plan):
    """One row for each model of `plan`: [(model, seed)]; prints them, writes comparison.json and comparison.md."""
    runs = {}  # model -> one array a seed of its folds' UA and WA, (folds, 2)
    entries = {}
    for model, number in plan:
        place = folder / f"{model}-seed{number}"
        with untrusted(place / "results.json", "delete its folder, and that part is run again"):
            results = json.loads((place / "results.json").read_text())
            entries.setdefault(model, []).append(results["folds"])
            runs.setdefault(model, []).append(np.array([[run["ua"], run["wa"]] for run in results["folds"]]))
    notes, first = results["notes"], plan[0][0]
    if options.seeds > 1:  # both come with the seeds for nothing: the mean of their logits, and the choice of the validation speakers
        best = [max(seeds, key=lambda run: run["validation_ua"]) for seeds in zip(*entries[first])]
        runs |= {f"{first}, best seed by validation": [np.array([[run["ua"], run["wa"]] for run in best])]}
        for model in [model for model, numbers in entries.items() if len(numbers) >= options.seeds]:
            places = [folder / f"{model}-seed{number}" for number in range(options.seed, options.seed + options.seeds)]
            runs |= {f"{model}, ensemble": [ensemble(places, entries[model])]}
    rows, names = [], list(dict.fromkeys([first, *(name for name in runs if name.startswith(first)), *runs]))
    for name in names:
        values, folds_ = np.stack(runs[name]), entries.get(name)  # (seeds, folds, 2)
        by_fold = values.mean(axis=0)  # a paired test averages the seeds of a fold first
        row = {"model": name, "seeds": len(values)}
        for k, metric in enumerate(("ua", "wa")):
            row[metric] = by_fold[:, k].mean()
            row[f"{metric}_std_folds"] = by_fold[:, k].std(ddof=1) if len(by_fold) > 1 else None
            row[f"{metric}_std_seeds"] = values.mean(axis=1)[:, k].std(ddof=1) if len(values) > 1 else None
        model, comma, way = name.partition(", ")
        rival = first if model == first else first + comma + way  # an ensemble's is the ensemble
        difference = by_fold[:, 0] - np.stack(runs[rival]).mean(axis=0)[:, 0]
        row["p"] = float(stats.ttest_1samp(difference, 0).pvalue) if len(difference) > 1 and np.ptp(difference) > 1e-12 else None
        if folds_:
            row |= {name: float(np.mean([[run[name] for run in seed] for seed in folds_])) for name in ("validation_ua", "parameters", "macs")}
            row |= {stage: float(np.mean([[run["seconds"][stage] for run in seed] for seed in folds_])) for stage in ("search", "training")}
            row["peak_gb"] = max(run["peak_gb"] for seed in folds_ for run in seed)
        rows.append({name: float(v) if isinstance(v, np.floating) else v for name, v in row.items()})
    print("", *comparison(rows, first), *notes, sep="\n")
    about = {"command": shlex.join(["python", "train.py", *sys.argv[1:]]), "settings": settings_of(options), **versions(), "notes": notes, "rows": rows}
    write(folder / "comparison.json", (json.dumps(about, indent=1) + "\n").encode())
    write(folder / "comparison.md", "\n".join([*comparison(rows, first), "", *notes, ""]).encode())
    print(f"the same as JSON and Markdown, and all runs, are in {folder}")


def comparison(rows, first):
    """Lines of a Markdown table, in percent."""

    def percent(row, metric):
        spread = [f" ± {100 * row[f'{metric}_std_{of}']:.1f}" if row[f"{metric}_std_{of}"] is not None else "" for of in ("folds", "seeds")]
        return f"{100 * row[metric]:.1f}{spread[0]}" + (f" ({spread[1][1:]})" if spread[1] else "")

    heads = ["model", "seeds", "UA", "WA", "validation UA", f"p against {first}", "parameters", "MACs", "search", "training", "peak"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        cells = [row["model"], str(row["seeds"]), percent(row, "ua"), percent(row, "wa"), "", "" if row["p"] is None else f"{row['p']:.2g}"]
        if "macs" in row:
            cells[4] = f"{100 * row['validation_ua']:.1f}"
            cells += [f"{row['parameters']:,.0f}", f"{row['macs'] / 1e6:,.1f} M", f"{row['search']:.0f} s", f"{row['training']:.0f} s", f"{row['peak_gb']:.2f} GB"]
        yield "| " + " | ".join(cells + [""] * (len(heads) - len(cells))) + " |"
    yield ""
    yield "UA and WA in percent: mean over folds ± standard deviation over folds (± over seeds); p: paired t-test over folds, seeds averaged first, an ensemble against the ensemble; MACs: of 8 s"


def ensemble(places, entries):
    """-> UA and WA of each fold, (folds, 2), when the seeds' logits are averaged. The predictions hold probabilities: their
    logarithms are the logits up to a constant for each utterance, which changes nothing."""
    out = []
    for runs in zip(*entries):
        tables = []
        for place, run in zip(places, runs):
            with untrusted(place, "delete it, and that part is run again"):
                tables.append(list(csv.DictReader(open(place / f"fold{run['fold']}" / "predictions.csv", newline="", errors="surrogateescape"))))
        classes = list(tables[0][0])[3:]
        labels = np.array([classes.index(row["label"]) for row in tables[0]])
        logits = sum(np.log(np.maximum([[float(row[c]) for c in classes] for row in table], 1e-300)) for table in tables)
        confusion = confusion_matrix(labels, logits.argmax(1), len(classes))
        out.append([ua(confusion), wa(confusion)])
    return np.array(out)


@torch.no_grad()
def macs(net, shape):
    """Multiply-accumulates for one window (F, T): of convolutions, linear and recurrent layers; those of the others are
    few. Recurrent layers by formula: torch's own counter sees nothing of an LSTM on a CPU."""
    count = 0

    def add(module, inputs, output):
        nonlocal count
        if isinstance(module, nn.Conv2d):
            count += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            count += output[0].numel() * module.in_features
        else:  # (1, T, D): each frame goes through each weight matrix once
            count += inputs[0].shape[1] * sum(w.numel() for name, w in module.named_parameters() if name.startswith("weight"))

    kinds = (nn.Conv2d, nn.Linear, nn.RNNBase)
    hooks = [module.register_forward_hook(add) for module in net.modules() if isinstance(module, kinds)]
    net.eval()(torch.zeros(1, 1, *shape, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return count


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark: what a step costs on this machine.


def measure(options, order):
    """Seconds and memory of a search step with a hypergradient of this order (0: of a training step of a derived network),
    on random maps. -> a dict. To be called in a process of its own: on a CPU the peak is that of the whole process."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    net = network(options, 4)
    net = (net if order else network(options, 4, derive(net))).to(device, memory_format=torch.channels_last)
    batch = torch.randn(options.batch, 1, *feature_settings(options).shape, device=device), torch.arange(options.batch, device=device) % 4
    optimizer = optimizer_of(options.search_optimizer if order else options.optimizer, net, 1e-3, 0, options)
    architect = order and Architect(net, F.cross_entropy, order=order)
    steps = {
        "alpha": order and (lambda: architect.step(batch, batch, xi=options.search_lr)),
        "weight": lambda: weight_step(net, F.cross_entropy(net(batch[0]), batch[1]), optimizer, options.clip),
        "inference": not order and (lambda: net.eval()(batch[0][:1])),
    }
    before, seconds, started = peak_memory(device), {name: [] for name, step in steps.items() if step}, time.perf_counter()
    while len(seconds["weight"]) < 4 or len(seconds["weight"]) < 12 and time.perf_counter() - started < 20:  # the first one warms up
        for name, times in seconds.items():
            with torch.set_grad_enabled(name != "inference"):
                if gpu:
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    events[0].record()
                start = time.perf_counter()
                steps[name]()
                if gpu:
                    events[1].record()
                    torch.cuda.synchronize(device)
                times.append(events[0].elapsed_time(events[1]) / 1000 if gpu else time.perf_counter() - start)
        net.train()
    medians = {f"{name}_seconds": float(np.median(times[1:])) for name, times in seconds.items()}
    weights = sum(p.numel() for p in net.weights())
    return {"weights": weights, **medians, "runs": len(seconds["weight"]) - 1, "peak_gb": peak_memory(device), "before_gb": before}


def benchmark(options):
    """Prints a line as it is measured, and writes all figures to --json."""
    problems, device = check_options(options)
    if options.json and not Path(options.json).absolute().parent.is_dir():
        problems.append(f"--json is {options.json}, in a folder that does not exist; make it first")
    refuse(problems)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {options.threads or torch.get_num_threads()} threads"
    ways = "".join(f", --{name}" for name in ("recompute", "amp") if getattr(options, name))
    print(f"{options.scale} scale{ways}, batch {options.batch}, map {' x '.join(map(str, feature_settings(options).shape))}, on {machine}, torch {torch.__version__}")
    print(f"{'network':22} {'weights':>11} {'order':>5} {'alpha step':>11} {'weight step':>12} {'search step':>12} {'peak':>9}", flush=True)
    rows = []
    parts = {"CNN cells alone": replace(options, seq_cells=0)} | {f"supernet, {space}": replace(options, seq_space=space) for space in SEQ_SPACES}
    for name, part in (parts | {"derived": options}).items():
        for order in (1, 2) if name in parts else (0,):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                row = {"network": name, "order": order, **process.submit(measure, part, order).result()}
            rows.append(row)
            if order:
                times = row["alpha_seconds"], row["weight_seconds"], row["alpha_seconds"] + row["weight_seconds"]
                print(f"{name:22} {row['weights']:>11,} {order:>5} {times[0]:>9.3f} s {times[1]:>10.3f} s {times[2]:>10.3f} s {row['peak_gb'] or math.nan:>6.2f} GB", flush=True)
            else:
                print(f"derived network (of an undecided search): {row['weights']:,} weights, training step {row['weight_seconds']:.3f} s, peak "
                      f"{row['peak_gb'] or math.nan:.2f} GB, inference {1000 * row['inference_seconds']:.1f} ms an utterance")  # fmt: skip
    if options.json:
        about = {"machine": machine, "settings": settings_of(options), "recompute": options.recompute, **versions(), "rows": rows}
        write(Path(options.json), (json.dumps(about, indent=1) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------


def settings_of(options):
    return {name: v for name, v in asdict(options).items() if name not in NOT_SETTINGS}


def key_of(options):
    return hashlib.sha256(json.dumps(settings_of(options), sort_keys=True).encode()).hexdigest()[:8]


def out_folder(options):
    return Path(options.out or Path("runs", f"{options.dataset}-{options.scale}-{key_of(options)}"))


def run_folder(options, settings):
    """Makes the folder of the run. One that already holds a run with other settings is refused: nothing is lost."""
    mine, folder = settings_of(options), out_folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, wait=True):
        check_settings(folder, mine, settings)
    return folder


def check_settings(folder, mine, settings):
    if (folder / "settings.json").exists():
        with untrusted(folder / "settings.json", "give another --out, or delete the folder"):
            theirs = json.loads((folder / "settings.json").read_text())["options"]
            differ = [f"{name} ({theirs.get(name)!s:.80} there, {v} here)" for name, v in mine.items() if theirs.get(name) != v]
        if differ:
            raise InputError(f"{folder} holds a run with other settings: {', '.join(differ)}; give another --out")
    elif (folder / "results.json").exists():
        raise InputError(f"{folder} holds a results.json and no settings.json that would say of what; give another --out")
    else:  # those that the run was begun with stay
        write(folder / "settings.json", (json.dumps(settings, indent=1) + "\n").encode())


def finished(file, options, chosen, classes):
    """-> what results.json says of the folds that are finished: [their entries, those of the other corpus, notes]."""
    if not file.exists():
        return [], [], []
    with untrusted(file, "move it away, and the run starts anew"):
        results = json.loads(file.read_text())
        runs, cross, notes = results["folds"], results["cross"]["folds"] if options.test_dataset else [], results["notes"]
        done = [run["fold"] for run in runs]
        for entries in (runs, cross) if options.test_dataset else (runs,):
            must([run["fold"] for run in entries] == [k for k in chosen if k in done], "not the folds of this run")
        for run in (*runs, *cross):
            confusion = np.array(run["confusion"])
            must(confusion.shape == (len(classes),) * 2 and confusion.dtype.kind == "i" and confusion.min() >= 0, "not a confusion matrix")
            must((run["ua"], run["wa"]) == (ua(confusion), wa(confusion)), "its accuracies are not those of its confusion matrix")
            names = [run["name"], *run["validation"], *run["test"], *notes]
            must(all(isinstance(name, str) for name in names) and run["trained_as"] in chosen, "not the entry of a fold")
            numbers = (run["parameters"], run["macs"], run["peak_gb"], run["validation_ua"], run["epoch"], run["seconds"]["search"], run["seconds"]["training"])
            must(all(type(number) in (int, float) and 0 <= number < 1e15 for number in numbers), "not the entry of a fold")
            must(run["genotype"] is None or Genotype.from_json(json.dumps(run["genotype"])))
    return runs, cross, notes


def report(options, folder, runs, cross, notes):
    for checkpoint in folder.glob("fold*/checkpoint.pt*"):  # of a process that was killed before it removed it
        checkpoint.unlink()
    print(f"{options.dataset}, protocol {options.protocol}", *table(runs), *notes, sep="\n")
    if cross:
        print(f"\ntested on the whole of {options.test_dataset}", *table(cross), sep="\n")
    print(f"report.md, results, genotypes, logs, models and predictions are in {folder}")


def versions():
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "torchaudio": torchaudio.__version__, "commit": commit}


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of torchrun: each process of a machine takes a GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); cpu always can") from None
    return torch.device(name)


def run(argv, stop):
    options, (rank, world) = parse(argv), torchrun()
    if options.threads:
        torch.set_num_threads(options.threads)
    if rank and (options.benchmark or options.predict or options.from_ or options.json or options.dry_run):
        return  # one process is enough
    if options.benchmark:
        return benchmark(options)
    if options.predict or options.from_ or options.json:
        return use(options)
    with ExitStack() as stack:
        if rank:  # warnings are said once
            stack.enter_context(redirect_stderr(io.StringIO()))
        if options.dry_run and options.dataset == "smoke":  # it is generated where it is not there
            options.root = options.root or stack.enter_context(tempfile.TemporaryDirectory())
        listing, chosen, device = check(options)
        if options.scale == "paper" and device.type == "cpu":
            print("warning: paper scale without a GPU; one step may take minutes, and the run weeks", file=sys.stderr, flush=True)
        if options.dry_run:
            return dry_run(options, listing, chosen, device)
        other = second_corpus(options, listing)
    if options.compare:
        plan = [(model, options.seed + n) for n in range(options.seeds) for model in MODELS if model != "random"]
        plan += [("random", options.seed + n) for n in range(options.randoms)]
    else:
        plan = [(options.model, options.seed + n) for n in range(options.seeds)]
    folder, left = out_folder(options), [options]
    if len(plan) > 1:
        left = [replace(options, model=model, seed=number, out=str(folder / f"{model}-seed{number}"),
                        genotype=options.genotype if model == options.model else None) for model, number in plan]  # fmt: skip
        left.sort(key=lambda part: not searches(part))  # the longest first: nobody shall wait for them at the end
    trainings = len(chosen) if options.poison else len(set(trained_as(features.folds(listing), chosen).values()))
    if trainings * len(plan) < world:
        share_steps(options, device)
    progress = Progress(options, chosen)

    @cache
    def data_of(second):
        """The corpus, or the second one. All models and seeds have it in common."""
        which = other if second else listing
        store = features.load(
            which, feature_settings(options), options.cache, options.workers, options.skip_bad,
            lambda text: progress.terminal and progress.say(text, passing=True),
        )  # fmt: skip
        return Data(which, store, listing.classes, options.normalise, device)

    again, pause = False, 0.5
    while left:
        theirs, parts, left = [], left, []
        for part in parts:
            if len(plan) > 1 and not again and rank == 0:
                print(f"\n{part.model}, seed {part.seed}", flush=True)
            others = run_one(part, (listing, other, chosen, device, data_of), argv, stop, again)
            theirs, left = theirs + others, left + [part] * bool(others)
        if left:  # the same command was started more than once, or by torchrun: the processes share the work
            if not again:
                progress.say(f"waits for what others compute: {', '.join(theirs)}")
            pause = min(2 * pause, 15)
            time.sleep(pause)
        again = True
    if len(plan) > 1 and rank == 0:
        compared(options, folder, plan)


def second_corpus(options, listing):
    if not options.test_dataset:
        return None
    other = features.read_corpus(options.test_dataset, options.test_root, options.classes, strict=options.strict)
    if not set(other.classes) <= set(listing.classes):
        raise InputError(
            f"{options.test_dataset} has the classes {', '.join(other.classes)}, and {options.dataset} those to train on: "
            f"{', '.join(listing.classes)}; every class that is tested must be trained"
        )
    return other


def trained_as(parts, chosen):
    """{fold: the first one that has the same training}: MSP-Podcast's test sets are scored by one and the same network."""
    return {k: next(j for j in chosen if (parts[j].train, parts[j].validation) == (parts[k].train, parts[k].validation)) for k in chosen}


def run_one(options, work, argv, stop, again=False):
    """All folds of one model with one seed, in a folder of their own. -> which of them other processes compute, as texts."""
    if options.deterministic:  # where a GPU has no deterministic algorithm, torch warns and names the operation
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=work[3].type != "cpu")
    settings = {"options": asdict(options), "command": shlex.join(["python", "train.py", *argv]), **versions()}
    return folds_of(options, *work, agreed(run_folder, options, settings), settings, stop, again)


def folds_of(options, listing, other, chosen, device, data_of, folder, settings, stop, again):
    """Computes the folds that are not finished and that no other process computes; reports when all are there."""
    classes, speaks = listing.classes, torchrun()[0] == 0
    there = partial(finished, folder / "results.json", options, chosen, classes)
    runs, cross, notes = agreed(there)
    if len(runs) < len(chosen):
        theirs = compute(options, listing, other, chosen, device, data_of, folder, settings, stop, there, speaks and not again and not options.quiet)
        if theirs:
            return theirs
    elif speaks and not again and not options.quiet:
        print(f"{folder} is finished; to run it again, remove it or give another --out")
    if speaks:
        with lock(folder, wait=True):
            write_report(folder)
            report(options, folder, *there())
    return []


def compute(options, listing, other, chosen, device, data_of, folder, settings, stop, there, speaks):
    """Fold by fold, each under a lock of its own. -> the folds that were left out, as other processes compute them."""
    classes, progress = listing.classes, Progress(options, chosen)
    with torch.device("meta"):
        checkpoint = 8 * sum(p.numel() for p in network(options, len(classes)).weights())  # with a momentum for each weight
    maps = 2 * len(listing.utterances) * math.prod(feature_settings(options).shape)
    if checkpoint + maps > 1e9 and speaks:
        print(f"writes at least {maps / 1e6:,.0f} MB of features to {options.cache}, unless they are there, and to {folder} checkpoints of "
              f"{checkpoint / 1e6:,.0f} MB, at times two, removed with each finished fold; {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free")  # fmt: skip

    done = [run["fold"] for run in agreed(there)[0]]
    if agreed(lambda: speaks):  # ranks that share the steps share those that are measured
        for line in outlook(options, listing, features.folds(listing), [k for k in chosen if k not in done], device, patience=0.1):
            if speaks:
                print(line, flush=True)

    data, other = data_of(False), other and data_of(True)
    parts = features.folds(listing, data.store.bad)
    if options.poison:
        parts = [poisoned(part, options, data.labels) for part in parts]
    notes = []
    if options.dataset == "smoke":
        notes.append("smoke is a smoke test with generated sounds, not speech: its figures say nothing about a network")
    if options.normalise == "speaker":
        notes.append("normalised by each speaker's own statistics, which uses the test speakers' unlabelled audio")
    if options.poison:
        notes.append(f"not speaker-independent: {100 * options.poison:g} % of the test speakers' utterances were trained on")
    if data.store.bad:
        notes.append(f"{len(data.store.bad)} recordings cannot be used and were skipped; results.json names them")
    for note in notes if speaks else ():
        print(note, flush=True)

    about_all = {
        "dataset": options.dataset, "protocol": options.protocol, "classes": list(classes), "normalise": options.normalise,
        "skipped": list(data.store.bad.values()), "notes": notes,
    }  # fmt: skip

    def add(entry, cross_entry):
        """One more fold in results.json, to which other processes add theirs. -> all that are there."""
        with lock(folder, wait=True):
            runs, cross, _ = there()
            runs, cross = (sorted(entries, key=lambda run: run["fold"]) for entries in ([*runs, entry], cross + cross_entry))
            results = {**about_all, **summary(runs), "folds": runs}
            if other:
                results["cross"] = {"dataset": options.test_dataset, **summary(cross), "folds": cross}
            write(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
            write_report(folder)
            return runs

    same, theirs = trained_as(parts, chosen), []
    for first in dict.fromkeys(same.values()):
        place = folder / f"fold{first}"
        with ExitStack() as until_done:

            def take():
                """-> who computes these folds already, and the folds that are finished."""
                place.mkdir(exist_ok=True)
                if {k for k in chosen if same[k] == first} <= {run["fold"] for run in there()[0]}:
                    return "", there()[0]
                try:
                    until_done.enter_context(lock(place))
                except InUse as error:
                    return str(error), []
                return "", there()[0]  # another process may have just finished

            busy, runs = agreed(take)
            theirs += [busy] if busy else []
            members = [k for k in chosen if same[k] == first and k not in [run["fold"] for run in runs]]
            if busy or not members:
                continue
            progress.begin(len(chosen) - len(runs))
            keep = Keeper(device, f"{key_of(options)}, fold {first}", place / "checkpoint.pt", stop)
            net, model, about = fit(first, parts[first], data, options, place, progress, keep)
            about["trained_as"] = first
            model["version"] = {name: str(settings[name]) for name in ("commit", "python", "torch", "torchaudio")}
            for k in members:
                into = folder / f"fold{k}"
                agreed(partial(into.mkdir, exist_ok=True))
                # Everything is chosen: the test speakers are scored, once.
                entry, cross_entry = {"fold": k, "name": parts[k].name, **about, **score(net, data, parts[k].test, into / "predictions.csv")}, []
                tests = [run for run in [*runs, entry] if run["trained_as"] == first]
                model["test"] = [{"name": t["name"], "utterances": int(np.sum(t["confusion"])), "ua": t["ua"], "wa": t["wa"]} for t in tests]
                write(place / "model.pt", lambda out: torch.save(model, out))
                if other:
                    other.standardise_like(data)
                    all_of_it = [i for i in range(len(other.labels)) if i not in other.store.bad]
                    file = into / f"predictions-{options.test_dataset}.csv"
                    cross_entry = [{"fold": k, "name": options.test_dataset, **about, **score(net, other, all_of_it, file)}]
                runs = agreed(add, entry, cross_entry)
            agreed((place / "checkpoint.pt").unlink, True)
    if torchrun()[0] == 0:
        progress.say("")
    return theirs


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    stop, (rank, world) = Stop(), torchrun()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def complain(error, more=""):
        print(f"rank {rank}: " * (world > 1) + f"error: {error}{more}", file=sys.stderr, flush=True)

    try:
        run(argv, stop)
        if ranks()[1] > 1:
            distributed.destroy_process_group()
        return 0
    except Stopped as stopped:
        if rank == 0:
            command = "the same command under torchrun" if world > 1 else shlex.join(["python", "train.py", *argv])
            print(f"\nstopped by {signal.Signals(stopped.args[0]).name}; this goes on from here:\n  {command}", file=sys.stderr)
        return 128 + stopped.args[0]
    except InputError as error:
        if rank and ranks()[1] == 1:  # of the command line or the corpus, most likely: the first rank says the same
            hold(1)
        complain(error)
        return 2
    except (NotFinite, Apart) as error:
        if ranks()[0]:  # all ranks meet it in the same step, and the first one saves
            hold(30)
            return 1
        complain(error)
        return 1
    except OSError as error:
        full = error.errno in DISK_FULL
        complain(error, "; what was saved is whole: make room, and the same command goes on" * full)
        return 1 if full else 2
    except (MemoryError, RuntimeError) as error:
        if lost(error):
            hold(5)
            if stop.signal is None:  # otherwise the launcher has ended the job, and the rank that failed has said why
                complain(f"has lost the other ranks ({str(error).splitlines()[0]})")
            return 1
        if not out_of_memory(error):
            raise
        complain(str(error).splitlines()[0] if str(error) else "out of memory", " The last checkpoint is whole. Less memory is taken by a smaller "
                 "--batch, --channels, --nodes, --cnn-cells or --seq-cells, a restricted --seq-space, and --order 1")  # fmt: skip
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
