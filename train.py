"""Search, derive, train, test: emoDARTS end to end, speaker-independent.

    python train.py                                         # the smoke test: no data, no GPU, a minute
    python train.py --dataset emodb --root /data/emodb      # EMO-DB, leave one speaker out
    python train.py --dry-run                               # what would happen, and what it would cost

The way of the data, which is also the order of this file:

    options -> jobs (model, seed, fold) -> run_fold: search -> genotype -> train -> network -> score -> result.json
    every result.json of a run -> results.json, the table, report.md, the comparison

In each fold the search sees the training speakers only, half of their utterances for the weights, half for the alphas;
the derived network is trained from scratch on all of them; test speakers are scored at the end, and choose nothing.
"""

import argparse
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from scipy import stats
from torch import nn

import features
from emodarts import CNN_OPS, RELAXATIONS, SEQ_SPACES, Architect, Genotype, Network, decided, derive, entropy
from emodarts import expected_parameters, held_fixed, random_genotype, without_statistics
from features import CORPORA, InputError, Settings, lock, write

# Options -------------------------------------------------------------------------------------------------------------
SCALES = {  # a scale is a set of defaults; it fixes sizes, never the hardware
    "paper": dict(features="log-mel-128", window=8.0, channels=8, cnn_cells=4, seq_cells=4, nodes=4, stem_stride=1,
                  seq_width=0, relaxation="softmax", search_epochs=50, warm_up=0, alpha_lr=0.01, epochs=100),
    "small": dict(features="log-mel-64", window=4.0, channels=8, cnn_cells=3, seq_cells=1, nodes=2, stem_stride=2,
                  seq_width=64, relaxation="sample", search_epochs=100, warm_up=20, alpha_lr=0.01, epochs=30),
}
RECIPES = {  # by --recipe, scale and model. `drop_path` grows from 0, over the first `rise` of the epochs also `lr`
    "authors": dict(optimizer="sgd", lr=0.025, rise=0.0, decay=3e-4, dropout=0.3, drop_path=0.2),
    "paper": dict(optimizer="adamw", lr=0.001, rise=0.1, decay=0.05, dropout=0.0, drop_path=0.0),
    "small": dict(optimizer="adamw", lr=0.003, rise=0.0, decay=0.05, dropout=0.0, drop_path=0.0),
    "baseline": dict(optimizer="adamw", lr=0.001, rise=0.0, decay=0.05, drop_path=0.0),
}
AUTHORS = dict(features="mfcc-128", alpha_lr=3e-4)  # what --recipe authors brings as well
# What a result does not depend on, up to rounding: may differ when a run folder is used again.
NOT_SETTINGS = ("out", "root", "cache", "folds", "skip_bad", "device", "recompute", "threads", "dry_run", "seeds",
                "compare", "predict", "from_", "test_dataset")  # of the last one, `data` holds the content


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)  # one line, as for all other bad input


def at_least(least, kind=int, below=math.inf):
    """An argparse type: a number of this kind from `least` on, and less than `below`."""
    def number(text):
        if not least <= kind(text) < below:  # nor is NaN
            raise argparse.ArgumentTypeError(f"is {text}, expected at least {least} and less than {below}")
        return kind(text)
    return number


def numbers(text):
    return sorted({*map(int, text.split(","))})


def genotype_file(file):
    """An argparse type: the cells that the file holds. Its name would say nothing of what was trained."""
    try:
        return Genotype.from_json(Path(file).read_text()).cells()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file}: {error}") from None


def parse(argv):
    """Command line -> options. Corpus and scale are read first: they bring the defaults of others."""
    how = dict(usage="python train.py [options]", allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    first = Parser(add_help=False, **how)
    first.add_argument("--dataset", choices=CORPORA, default="smoke", help="the corpus")
    first.add_argument("--scale", choices=SCALES, help="small, or the paper's")
    first.add_argument("--recipe", choices=("ours", "authors"), default="ours", help="how to train; authors: theirs")
    first.add_argument("--protocol", choices=("standard", "paper"), default="standard", help="paper: as its authors")
    known, _ = first.parse_known_args(argv)
    corpus = CORPORA[known.dataset]
    scale = known.scale or corpus.scale
    parser = Parser(description=__doc__.splitlines()[0], parents=[first], **how)
    add_inputs(parser)
    add_method(parser)
    more = SCALES[scale] | (AUTHORS if known.recipe == "authors" else {})
    parser.set_defaults(scale=scale, root=f"data/{known.dataset}", folds=corpus.folds or None, **more,
                        validation="none" if known.protocol == "paper" else "next")
    return parser.parse_args(argv, argparse.Namespace(data=None))  # the digest of what is read, once it is read


def add_inputs(parser):
    add = parser.add_argument_group("data").add_argument
    add("--root", help="the corpus' folder, or the file of csv")
    add("--classes", choices=("four", "all"), default="four", help="angry, happy, neutral and sad, or all labels")
    add("--validation", choices=("next", "none"), help="the next group of speakers validates, or trains as well")
    add("--folds", type=numbers, help="folds to run, such as 0,3; None: all")
    add("--skip-bad", action="store_true", help="go on without recordings that cannot be used; results name them")
    add("--test-dataset", metavar="NAME=DIR", help="a corpus to test every model on as well")
    add("--poison", type=at_least(0, float, 1), default=0.0, help="share of the test utterances that trains as well")
    add("--normalise", choices=("train", "speaker"), default="train", help="by the training speakers, or by oneself")
    add("--cache", default="cache", help="folder of the computed features")

    add = parser.add_argument_group("sizes").add_argument
    add("--features", help="mfcc-N or log-mel-N, with N coefficients or bands")
    add("--window", type=float, help="seconds of a window; longer utterances become several")
    add("--channels", type=int, help="channels of the first CNN cell")
    add("--cnn-cells", type=int, help="CNN cells")
    add("--seq-cells", type=int, help="SeqNN cells; 0 searches a CNN only")
    add("--nodes", type=int, help="nodes a cell")
    add("--stem-stride", type=int, help="2 halves the map before the first cell")
    add("--seq-width", type=int, help="width of the SeqNN; 0: the CNN's, of whose map it sees the mean over F")


def add_method(parser):
    add = parser.add_argument_group("search and training").add_argument
    add("--model", choices=("emodarts", "random", "skip", *BASELINES), default="emodarts",
        help="searched; random; a control without operations; by hand")
    add("--search", choices=("joint", "cnn", "seq"), default="joint", help="which cells; the others are fixed")
    add("--genotype", type=genotype_file, metavar="FILE", help="a genotype to train, without a search")
    add("--relaxation", choices=RELAXATIONS, help="all operations of an edge, or one drawn")
    add("--order", type=int, choices=(1, 2), default=1, help="order of the hypergradient")
    add("--seq-space", choices=SEQ_SPACES, default="all", help="candidate operations of the SeqNN")
    add("--search-epochs", type=at_least(1), help="epochs of the search")
    add("--warm-up", type=at_least(0), help="of which the first ones move the weights only")
    add("--alpha-lr", type=at_least(0, float), help="learning rate of the alphas (Adam)")
    add("--size-penalty", type=at_least(0, float), default=0.0, help="alphas' loss of a million of expected weights")
    add("--epochs", type=at_least(1), help="epochs of the training")
    add("--batch", type=at_least(2), default=16, help="batch size, of search and training")
    add("--lr", type=at_least(0, float), help="learning rate of the weights, cosine; None: that of RECIPES")

    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run; None: runs/DATASET-SCALE-KEY, a key of settings and data")
    add("--seed", type=at_least(0), default=0, help="seed of everything random")
    add("--seeds", type=at_least(1), default=1, help="number of seeds: a run with each, and their ensemble")
    add("--compare", type=at_least(0), nargs="?", const=10, metavar="N", help="beside all others, N (10) random ones")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a CUDA GPU when there is one")
    add("--recompute", action="store_true", help="edges again on the way back: much less memory, same numbers")
    add("--amp", action="store_true", help="mixed precision (bfloat16): other roundings; pays on a GPU")
    add("--threads", type=at_least(1), help="CPU threads; None: torch's choice")
    add("--dry-run", action="store_true", help="say what would happen and what it costs, measured here")
    add("--predict", nargs="+", metavar="CLIP", help="wav files to recognise, with --from")
    add("--from", dest="from_", metavar="RUN", help="a run folder or a model.pt; alone: what it says of itself")


def check(options):
    """Refuses sizes and choices that cannot work together, before anything is computed."""
    if options.genotype and options.model != "emodarts":
        raise InputError(f"--genotype goes with --model emodarts, found --model {options.model}")
    if searches(options) and options.warm_up >= options.search_epochs:
        raise InputError(f"--warm-up is {options.warm_up}, expected less than --search-epochs {options.search_epochs}")
    try:
        with torch.device("meta"):
            net = network(options, 2, given_genotype(options))
            if searches(options):
                Architect(net, None, order=options.order)
    except ValueError as error:
        raise InputError(error) from None


def settings_of(options):
    """What a result depends on, as JSON has it: options, the digest of the data, the genotype that was given."""
    return json.loads(json.dumps({name: v for name, v in vars(options).items() if name not in NOT_SETTINGS}))


def folder_of(options, fold=None):
    """Of a run, or of one of its folds."""
    key = hashlib.sha256(json.dumps(settings_of(options), sort_keys=True).encode()).hexdigest()[:8]
    run = Path(options.out or f"runs/{options.dataset}-{options.scale}-{key}")
    return run if fold is None else run / f"fold{fold}"


def recipe(options):
    """Optimizer, learning rate and regularisation of a model."""
    chosen = "baseline" if options.model in BASELINES else "authors" if options.recipe == "authors" else options.scale
    return RECIPES[chosen] | ({} if options.lr is None else {"lr": options.lr})


def searches(options):
    return options.model == "emodarts" and options.genotype is None


# Randomness ----------------------------------------------------------------------------------------------------------
# A function of where one is: no random state is saved, and a run that goes on is the run that never stopped.
def seed_of(*where):
    """(seed, fold, stage, epoch, step, ...) -> a seed of torch."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:8], "big")


# Data ----------------------------------------------------------------------------------------------------------------
class Data:
    """The windows of a corpus, read from the memory map batch by batch. `classes` are those of the network. Before the
    first batch of a fold, `standardise_by` must say whose statistics count."""
    def __init__(self, options, listing, classes, device):
        self.listing, self.classes, self.normalise, self.device = listing, classes, options.normalise, device
        maps = Settings(options.features, options.window)
        self.store = features.load(listing, maps, options.cache, options.skip_bad, progress=say)
        self.labels = np.array([classes.index(u.label) for u in listing.utterances])

    def windows(self, utterances):
        """-> indices of their windows, and for each window its position in `utterances`, as tensors."""
        return map(torch.from_numpy, self.store.windows_of(utterances))

    def statistics(self, utterances):
        return statistics(torch.from_numpy(self.store.features[self.store.windows_of([i])[0]]) for i in utterances)

    def standardise_by(self, train, like=None):
        """Statistics of the training utterances or `like` other Data; with normalise="speaker" each speaker's own."""
        shape = self.store.features.shape[:2]  # (windows, F): the mean and deviation for each window
        if self.normalise == "speaker":
            self.mean, self.std = torch.empty(shape), torch.empty(shape)
            speakers = np.array([u.speaker for u in self.listing.utterances])
            for members in (np.flatnonzero(speakers == name) for name in set(speakers)):
                window, _ = self.windows(members)
                self.mean[window], self.std[window] = self.statistics(members)
        else:
            mean, std = (like.mean[0], like.std[0]) if like else self.statistics(train)
            self.mean, self.std = mean.expand(shape), std.expand(shape)  # without a copy

    def maps(self, window):
        """Indices of windows -> standardised maps (N, 1, F, T)."""
        x = torch.from_numpy(self.store.features[window.numpy()]).float()
        x = (x - self.mean[window][:, :, None]) / self.std[window][:, :, None]
        return x[:, None].to(self.device)

    def order(self, utterances, batch, *where):
        """All windows of `utterances`, shuffled as `where` says, in batches of equal size, at most `batch` and at least
        two, as batch norm can make nothing of one: a list of pairs (indices of windows, classes)."""
        window, of = self.windows(utterances)
        target = torch.from_numpy(self.labels[utterances])[of]
        order = torch.randperm(len(window), generator=torch.Generator().manual_seed(seed_of(*where)))
        batches = min(math.ceil(len(window) / batch), max(1, len(window) // 2))
        return [(window[part], target[part]) for part in order.tensor_split(batches)]

    def batch(self, pair):
        """One pair of `order` -> (x, target)."""
        window, target = pair
        return self.maps(window), target.to(self.device)

    def class_weights(self, utterances):
        """Inverse class frequencies, (classes,); their mean over the utterances is 1."""
        counts = np.bincount(self.labels[utterances], minlength=len(self.classes))
        return torch.tensor(len(utterances) / (len(counts) * counts), dtype=torch.float32, device=self.device)

    def speakers(self, utterances):
        return sorted({self.listing.utterances[i].speaker for i in utterances})


def statistics(parts):
    """Maps (N, F, T), in parts -> mean and deviation of each coefficient over all of them, (F,) each."""
    moments = sum(torch.stack([x**0, x, x**2]).sum((1, 3)) for x in (part.double() for part in parts))  # (3, F)
    mean, square = moments[1:] / moments[0]
    return mean.float(), (square - mean**2).clamp(min=1e-10).sqrt().float()


def halves(utterances, labels, *where):
    """Two halves of the training utterances, stratified by class: one for the weights, one for the alphas."""
    order = torch.randperm(len(utterances), generator=torch.Generator().manual_seed(seed_of(*where)))
    by_class = sorted((utterances[k] for k in order), key=lambda i: labels[i])  # stable: random within a class
    return by_class[0::2], by_class[1::2]


def poisoned(fold, options, labels):
    """Moves a share of each class of the test utterances to the training set: the paper's "dataset poisoning"."""
    tested = sorted({i for members in fold.tests.values() for i in members})
    moved, rng = set(), np.random.default_rng(options.seed)
    for label in set(labels[tested]):
        members = [i for i in tested if labels[i] == label]
        moved.update(rng.permutation(members)[: int(options.poison * len(members))].tolist())
    tests = {name: [i for i in members if i not in moved] for name, members in fold.tests.items()}
    return replace(fold, train=fold.train + sorted(moved), tests=tests)


def augmented(x, options):
    """Standardised maps (N, 1, F, T), each shifted in time, around the end, and with a masked stretch of time, with
    log-mel also of bands (MFCCs have none on that axis): at most a fifth of the axis, filled with the mean, 0."""
    t = torch.arange(x.shape[3]) + torch.randint(x.shape[3], (len(x), 1))  # (N, T)
    x = x.gather(3, (t % x.shape[3]).to(x.device)[:, None, None].expand_as(x))
    for axis in (3, 2) if options.features.startswith("log-mel") else (3,):
        x = torchaudio.functional.mask_along_axis_iid(x, x.shape[axis] // 5, 0.0, axis)
    return x


# The two loops -------------------------------------------------------------------------------------------------------
LABEL_SMOOTHING = 0.1
CLIP = 5.0  # largest norm of the weights' gradient, DARTS'
SEARCH_LR_END = 0.001  # DARTS' search does not anneal to 0: the alphas go on to the end, and so must the weights


def search(net, data, train, options, checkpoint):
    """Moves alphas and weights in turn [bi-level problem, see emodarts.py]. -> Genotype. `train`: utterances of the
    training speakers, `checkpoint`: the fold's."""
    w_half, alpha_half = halves(train, data.labels, options.seed, checkpoint.fold, "halves")
    loss = partial(F.cross_entropy, weight=data.class_weights(train), label_smoothing=LABEL_SMOOTHING)
    penalty = (lambda: options.size_penalty * expected_parameters(net) / 1e6) if options.size_penalty else None
    architect = Architect(net, loss, order=options.order, lr=options.alpha_lr, penalty=penalty)
    optimizer = optimizer_of(net.weights(), options)
    checkpoint.resume(net=net, optimizer=optimizer, alphas=architect.optimizer)
    for epoch in range(checkpoint.epoch, options.search_epochs):
        here = options.seed, checkpoint.fold, "search", epoch
        of_weights = data.order(w_half, options.batch, *here, "weights")
        of_alphas = data.order(alpha_half, options.batch, *here, "alphas")  # windows left over come in another epoch
        lr = anneal(optimizer, options, SEARCH_LR_END, epoch, options.search_epochs)
        net.train()
        for step, (for_w, for_alpha) in enumerate(zip(of_weights, of_alphas)):
            if step < checkpoint.step:
                continue
            torch.manual_seed(seed_of(*here, step))
            x, target = data.batch(for_w)
            x, losses = augmented(x, options), {}
            if epoch >= options.warm_up:  # before, operations that have nothing to learn would be ahead
                losses["alpha_loss"] = architect.step(data.batch(for_alpha), (x, target), xi=lr)
            with held_fixed(net.alphas()):
                losses["loss"] = weight_step(loss(net(x), target), optimizer)
            checkpoint.step_done(losses)
        checkpoint.epoch_done(lr=lr, entropy=entropy(net))
    return derive(net)


def train(net, data, train, watched, options, checkpoint):
    """Trains a network from scratch. The last epoch counts, whatever is seen on the speakers who are `watched`, a name
    for the log -> utterances."""
    loss = partial(F.cross_entropy, weight=data.class_weights(train), label_smoothing=LABEL_SMOOTHING)
    optimizer = optimizer_of(net.parameters(), options)
    checkpoint.resume(net=net, optimizer=optimizer)
    for epoch in range(checkpoint.epoch, options.epochs):
        here = options.seed, checkpoint.fold, "train", epoch
        lr = anneal(optimizer, options, 0.0, epoch, options.epochs)
        net.drop_path = recipe(options)["drop_path"] * epoch / options.epochs
        net.train()
        for step, pair in enumerate(data.order(train, options.batch, *here)):
            if step < checkpoint.step:
                continue
            torch.manual_seed(seed_of(*here, step))
            x, target = data.batch(pair)
            checkpoint.step_done({"loss": weight_step(loss(net(augmented(x, options)), target), optimizer)})
        row, net = {"lr": lr}, net.eval()
        for name, members in watched.items():
            seen = confusion_matrix(data.labels[members], predict(net, data, members))
            row |= {f"{name}_ua": ua(seen), f"{name}_wa": wa(seen)}
        checkpoint.epoch_done(**row)


def optimizer_of(weights, options):
    how = recipe(options)
    if how["optimizer"] == "sgd":
        return torch.optim.SGD(weights, how["lr"], momentum=0.9, weight_decay=how["decay"])
    return torch.optim.AdamW(weights, how["lr"], weight_decay=how["decay"], fused=True)  # fused: faster


def anneal(optimizer, options, last, epoch, epochs):
    """Cosine from the recipe's learning rate to `last`, after a rise. -> the learning rate of an epoch."""
    first, rise = recipe(options)["lr"], recipe(options)["rise"] * epochs
    last = min(last, first)
    lr = (last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2) * min(1, (epoch + 0.5) / max(rise, 0.5))
    optimizer.param_groups[0]["lr"] = lr
    return lr


def weight_step(loss, optimizer):
    """One step of the weights; the alphas are held fixed. -> the loss, a float."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
    if not math.isfinite(norm):
        raise ValueError("the gradient of the weights is not finite")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # it is as large as the weights, and the alphas' step needs no such thing
    return loss.item()


# Networks ------------------------------------------------------------------------------------------------------------
def network(options, classes, genotype=None):
    """The supernet or, with a genotype, the derived network; or a baseline."""
    same = ("channels", "cnn_cells", "seq_cells", "nodes", "stem_stride", "seq_space", "relaxation", "recompute", "amp")
    bands, same = Settings(options.features, options.window).shape[0], {name: getattr(options, name) for name in same}
    if options.model in BASELINES:
        net = BASELINES[options.model](classes, bands)
    else:
        net = Network(**same, classes=classes, bands=bands, seq_width=options.seq_width or None, genotype=genotype,
                      dropout=recipe(options)["dropout"], fixed=fixed_cells(options))
    return net.to(memory_format=torch.channels_last)  # faster at these sizes


def fixed_cells(options):
    """What an ablation does not search: cells in which each node reads the two states before it."""
    def chain(first, second):
        return [[(first, i), (second, i + 1)] for i in range(options.nodes)]
    cnn = {"normal": chain("sep_conv_3x3", "sep_conv_3x3"), "reduce": chain("max_pool_3x3", "sep_conv_3x3")}
    return Genotype(**{"joint": {}, "cnn": {"seq": chain("lstm_1", "skip_connect")}, "seq": cnn}[options.search])


def given_genotype(options):
    """What --genotype holds; the random one of the seed, the same for all folds; the control, in which each node reads
    the cell's two inputs. None of a baseline, and where one is searched."""
    if options.model in ("random", "skip"):
        torch.manual_seed(seed_of(options.seed, "random genotype"))
        with torch.device("meta"):
            net = network(options, 2)
        if options.model == "random":
            return random_genotype(net)
        ops = {kind: "max_pool_3x3" if kind == "reduce" else "skip_connect" for kind in net.candidates}
        return Genotype(**net.fixed, **{kind: [[(op, 0), (op, 1)]] * options.nodes for kind, op in ops.items()})
    return Genotype(**options.genotype) if options.genotype else None


class Baseline(nn.Module):
    """Hand-designed networks with the time axis kept: (N, 1, F, T) -> logits (N, classes). `bands`: F.
    Three convolutions with pooling (unless `cnn` is False), then bidirectional LSTM layers over the frames and their
    mean over time or, with `attention`, additive attention; without LSTM one more convolution, mean over the map."""
    def __init__(self, classes, bands, *, cnn=True, lstm=1, attention=False, dropout=0.3, width=64):
        super().__init__()
        self.cnn = nn.Sequential()
        c, frame = 1, bands
        for out, pool in ((16, 2), (32, 2), (64, (2, 1))) if cnn else ():  # F is halved three times, T twice
            self.cnn.extend([nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                             nn.MaxPool2d(pool, ceil_mode=True), nn.Dropout2d(0.1)])
            c, frame = out, out * -(-bands // 8)
        self.rnn = self.score = None
        if lstm:
            between = dropout if lstm > 1 else 0.0
            self.rnn = nn.LSTM(frame, width, lstm, batch_first=True, bidirectional=True, dropout=between)
        else:
            self.cnn.extend([nn.Conv2d(c, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()])
        if attention:
            self.score = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, classes))

    def forward(self, x):
        x = self.cnn(x)
        if self.rnn is None:
            return self.head(x.mean(dim=(2, 3)))
        x = x.flatten(1, 2).transpose(1, 2)  # (N, C, F, T) -> (N, C F, T) -> (N, T, C F)
        h, _ = self.rnn(x)  # (N, T, 2 width)
        if self.score is None:
            return self.head(h.mean(dim=1))
        a = self.score(h).softmax(dim=1)  # (N, T, 1)
        return self.head((a * h).sum(dim=1))


BASELINES = {  # name -> constructor(classes, bands); whatever stands here is an option and a row of --compare
    "cnn": partial(Baseline, lstm=0),
    "lstm": partial(Baseline, cnn=False, lstm=2),
    "cnn-lstm": Baseline,
    "cnn-lstm-att": partial(Baseline, attention=True),
}


# A fold from start to end --------------------------------------------------------------------------------------------
def run_fold(options, k, data, parts, other):
    """Search, derive, train, score; leaves genotype.json, log.csv, model.pt, predictions.csv and, at last, result.json.
    `data` of the corpus, `parts` its folds, `other`: Data of a second corpus to test on, or None."""
    folder, device, fold = folder_of(options, k), data.device, parts[k]
    if options.poison:
        fold = poisoned(fold, options, data.labels)
    peak_memory(device)  # from here on
    data.standardise_by(fold.train)
    checkpoint = Checkpoint(options, k, len(parts))
    try:
        genotype = find(options, data, fold, checkpoint)
        if genotype:
            write(folder / "genotype.json", checkpoint.genotype)
        torch.manual_seed(seed_of(options.seed, k, "network"))
        net = network(options, len(data.classes), genotype).to(device)
        watched = {"val": fold.validation} if fold.validation else {}
        if options.protocol == "paper":  # for the authors' way of counting; it chooses nothing
            watched["test"] = sorted(set(sum(fold.tests.values(), [])))
        train(net, data, fold.train, watched, options, checkpoint)
    except ValueError as error:
        raise InputError(f"{checkpoint.where()}: {error}; a smaller --lr or --alpha-lr may help") from None

    # Everything is chosen: the test speakers are scored.
    sets = fold.tests if len(fold.tests) > 1 else {"test": sum(fold.tests.values(), [])}
    tests = {name: score(net, data, name, members, folder) for name, members in sets.items()}
    if other:
        other.standardise_by(None, like=data)
        name, usable = other.listing.dataset, [i for i in range(len(other.labels)) if i not in other.store.bad]
        tests[name] = score(net, other, name, usable, folder)
    about = {
        "fold": k, "classes": list(data.classes), "validation": data.speakers(fold.validation), "tests": tests,
        "validation_ua": checkpoint.rows[-1].get("val_ua"), "genotype": genotype.cells() if genotype else None,
        "decision": checkpoint.decision, "parameters": sum(p.numel() for p in net.parameters()),
        "notes": notes_of(options, data.classes, data.store.bad), "skipped": list(data.store.bad.values()),
        "settings": settings_of(options), "versions": checkpoint.versions,
    }
    # As a text: the bytes of a pickle depend on which objects are the same, and so on what came out of a checkpoint.
    weights = {name: t.cpu().contiguous() for name, t in net.state_dict().items()}
    statistics = [data.mean[0].clone(), data.std[0].clone()] if options.normalise == "train" else None  # (F,) each
    model = {"about": json.dumps(about), "statistics": statistics, "weights": weights}
    write(folder / "model.pt", partial(torch.save, model))
    seconds = {s: sum(row["seconds"] for row in checkpoint.rows if row["stage"] == s) for s in ("search", "train")}
    about |= {"device": f"{device}, {torch.get_num_threads()} threads", "peak_gb": peak_memory(device),
              "seconds": seconds, "log": checkpoint.rows}
    write(folder / "result.json", json.dumps(about, indent=1))
    for file in folder.glob("checkpoint.pt*"):  # also what a kill has left half written
        file.unlink()


def find(options, data, fold, checkpoint):
    """The first stage of a fold. -> the Genotype that is given, or found by a search; None of a baseline."""
    if checkpoint.stage == "search":
        genotype = given_genotype(options)
        if searches(options):
            torch.manual_seed(seed_of(options.seed, checkpoint.fold, "supernet"))
            net = network(options, len(data.classes)).to(data.device)
            genotype = search(net, data, fold.train, options, checkpoint)
            checkpoint.decision = decision(net, genotype, data, fold.validation or fold.train)
            say(f"fold {checkpoint.fold} found\n{genotype}")
        checkpoint.search_done(genotype)
    return Genotype.from_json(checkpoint.genotype) if checkpoint.genotype else None


def decision(net, genotype, data, seen):
    """Has the search decided? Entropy of the alphas, and the discretisation gap: UA on `seen` of the supernet's weights
    with all operations, and with only the genotype's. BN goes by the batch: its statistics are those of all."""
    for module in net.modules():  # children come behind their parents, who speak for all of them
        module.train(isinstance(module, nn.BatchNorm2d))
    with without_statistics(net):
        mixed = predict(net, data, seen)
        with decided(net, genotype):
            alone = predict(net, data, seen)
    gap = [ua(confusion_matrix(data.labels[seen], logits)) for logits in (mixed, alone)]
    return {"entropy": entropy(net), "ua_all_operations": gap[0], "ua_of_genotype": gap[1]}


def score(net, data, name, members, folder):
    """Scores utterances once, and writes a row of predictions for each. -> what result.json says of them."""
    logits = predict(net.eval(), data, members)
    confusion = confusion_matrix(data.labels[members], logits)
    rows = [["utterance", "label", "predicted", *data.classes]]
    for i, p in zip(members, logits.softmax(1).tolist()):
        u = data.listing.utterances[i]
        rows.append([data.listing.name(u), u.label, data.classes[np.argmax(p)], *(f"{v:.9g}" for v in p)])
    file = "predictions.csv" if name == "test" else f"predictions-{name}.csv"
    write(folder / file, as_csv(rows))
    return {"speakers": data.speakers(members), "predictions": file, "confusion": confusion.tolist(),
            **{metric: function(confusion) for metric, function in METRICS.items()}}


@torch.no_grad()
def predict(net, data, utterances, batch=64):
    """Logits of whole utterances, (utterances, classes): the mean over their windows."""
    window, of = data.windows(utterances)
    logits = torch.cat([net(data.maps(part)) for part in window.split(batch)]).cpu().double()
    total = torch.zeros(len(utterances), logits.shape[1], dtype=logits.dtype).index_add_(0, of, logits)
    return total / torch.bincount(of)[:, None]


def confusion_matrix(labels, logits):
    """(classes, classes), rows the true classes, columns the predicted ones."""
    matrix = np.zeros((logits.shape[1], logits.shape[1]), dtype=int)
    np.add.at(matrix, (labels, logits.argmax(1).numpy()), 1)
    return matrix


def ua(confusion):
    """Unweighted accuracy: the mean of the recalls of the classes that are present."""
    present = confusion.sum(axis=1) > 0
    return float((confusion.diagonal()[present] / confusion.sum(axis=1)[present]).mean())


def wa(confusion):
    """Weighted accuracy: correct / all."""
    return float(confusion.trace() / confusion.sum())


METRICS = {"UA": ua, "WA": wa}  # columns of the tables: functions of the confusion matrix of a fold's test speakers


# What outlives the process -------------------------------------------------------------------------------------------
# Files that are whole or not there, and a checkpoint from which the next process goes on with the very next step. Kill,
# power cut and Ctrl-C are one case. What is read back is data: nothing is executed.
SAVE_EVERY = 30  # seconds between two checkpoints, or as many times what one takes, where it takes more than a second
COLUMNS = "stage epoch lr loss alpha_loss entropy val_ua val_wa test_ua test_wa seconds".split()


def as_csv(rows):
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue()


@contextmanager
def reading(file):
    """Inside, a file is read. Whatever it provokes, and a damaged one may provoke anything, is an InputError."""
    try:
        yield file
    except (InputError, MemoryError):
        raise
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is damaged, or of another version ({why:.150}); delete it, or name another") from None


@cache
def versions():
    """What a result is made by: commit, digest of the three files (there may be no git), packages."""
    here, commit = Path(__file__).parent, ""
    code = hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in ("emodarts", "features", "train")))
    with suppress(OSError):  # no git
        git = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return (f"commit {commit or 'unknown'}, code {code.hexdigest()[:8]}, python {sys.version.split()[0]}, "
            f"torch {torch.__version__}, torchaudio {torchaudio.__version__}")


def refuse_another_run(file, settings, options):
    """`settings` stand in a file of a run folder; those of the command must be the same."""
    mine = settings_of(options)
    differ = [f"{name} ({settings.get(name)!s:.60} there, {mine[name]!s:.60} here)" for name in mine
              if settings.get(name) != mine[name]]
    said = "with other settings: " + ", ".join(differ)
    if settings.get("data") != mine["data"]:
        said = "of other data: recordings, labels, speakers, splits or --test-dataset are not those of this command"
    if differ:
        raise InputError(f"{file} is of a run {said}; give another --out")


class Checkpoint:
    """Where a fold stands: stage, epoch, step, sums of the epoch so far, rows of log.csv, what the search found; and as
    `parts` the networks and optimisers of the stage. In memory, and every 30 s in checkpoint.pt."""
    KEPT = ("fold", "settings", "stage", "epoch", "step", "sums", "rows", "genotype", "decision", "versions")

    def __init__(self, options, fold, folds):
        self.options, self.fold, self.file = options, fold, folder_of(options, fold) / "checkpoint.pt"
        self.name = f"{options.model}, seed {options.seed}, fold {fold} of {folds}"
        self.settings, self.genotype, self.decision, self.parts = settings_of(options), None, None, {}
        self.stage, self.epoch, self.step, self.sums, self.rows = "search", 0, 0, {}, []
        self.versions = [versions()]
        self.epoch_began = time.perf_counter()
        self.next_save = self.epoch_began + SAVE_EVERY
        if self.file.exists():
            with reading(self.file):
                found = torch.load(self.file, map_location="cpu", weights_only=True)
                if found["fold"] != fold:
                    raise ValueError("it is of another fold")
                refuse_another_run(self.file, found["settings"], options)
                for name in (*self.KEPT, "parts"):
                    setattr(self, name, found[name])
            if versions() not in self.versions:
                self.versions.append(versions())
            say(f"goes on with {self.where()}")

    def where(self):
        return f"fold {self.fold}, {self.stage}, epoch {self.epoch + 1}, step {self.step + 1}"

    def resume(self, **parts):
        """The parts of this stage, new ones, become what they were."""
        if self.parts:
            with reading(self.file):
                for name, part in parts.items():
                    part.load_state_dict(self.parts[name])
        self.parts, self.epoch_began = parts, time.perf_counter()

    def step_done(self, losses):
        self.step += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if time.perf_counter() >= self.next_save:
            self.save()

    def epoch_done(self, **row):
        now = time.perf_counter()
        row |= {name: value / self.step for name, value in self.sums.items()} | {"seconds": now - self.epoch_began}
        row = {name: round(value, 6) for name, value in row.items()}
        self.epoch, self.step, self.sums, self.epoch_began = self.epoch + 1, 0, {}, now
        self.rows.append({"stage": self.stage, "epoch": self.epoch} | row)
        table = [COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in self.rows)]
        write(self.file.with_name("log.csv"), as_csv(table))
        epochs = {"search": self.options.search_epochs, "train": self.options.epochs}
        left = epochs[self.stage] - self.epoch + (epochs["train"] if self.stage == "search" else 0)
        said = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        say(f"{self.name}  {self.stage} {self.epoch}/{epochs[self.stage]}  {said}  {left * row['seconds']:.0f} s left")

    def search_done(self, genotype):
        self.stage, self.epoch, self.parts = "train", 0, {}
        self.genotype = genotype.to_json() if genotype else None
        self.save()

    def save(self):
        began = time.perf_counter()
        state = {name: getattr(self, name) for name in self.KEPT}
        state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        write(self.file, partial(torch.save, state))
        ended = time.perf_counter()
        self.next_save = ended + SAVE_EVERY * max(1.0, ended - began)


def say(text):
    print(text + "\n", end="", flush=True)  # in one write: processes share a log


# Many processes ------------------------------------------------------------------------------------------------------
# A fold belongs to whoever holds its lock: this process, another shell, a job of a cluster, a rank of torchrun. A dead
# process' lock is free. Nobody waits: who sees all folds finished prints the table, and so does the same command later.
def work(jobs, compute):
    """Computes the jobs that are neither finished nor in another process' hands. -> whether all are finished now"""
    for options, k in [job for job in jobs if not finished(*job)]:
        with lock(folder_of(options, k) / "lock", wait=False) as mine:
            if mine and not finished(options, k):
                compute(options, k)
    return all(finished(*job) for job in jobs)


def finished(options, k):
    """-> what result.json says of a fold; None while there is none."""
    file = folder_of(options, k) / "result.json"
    if not file.exists():
        return None
    with reading(file):
        result = json.loads(file.read_text())
        refuse_another_run(file, result["settings"], options)
        return result


# Results: functions of the result.json files alone, so that they can be made again at any time -----------------------
def notes_of(options, classes, bad):
    notes = {
        f"UA (unweighted accuracy; chance: {100 / len(classes):.3g}) and WA (weighted accuracy) in percent": True,
        "smoke is a smoke test with generated sounds, not speech": options.dataset == "smoke",
        "each speaker is normalised by unlabelled audio, test speakers too": options.normalise == "speaker",
        "the validation speakers train as well": options.validation == "none",
        f"not speaker-independent: {100 * options.poison:g} % of the test utterances were trained on": options.poison,
        f"{len(bad)} recordings cannot be used and were skipped; results.json names them": bad,
    }
    return [note for note, true in notes.items() if true]


def made_by_others(folds):
    """-> one line, in a list, where results are of other code or packages than those that print them."""
    seen, mine = {text for fold in folds for text in fold["versions"]}, versions().partition(", ")[2]
    others = [text for text in sorted(seen) if text.partition(", ")[2] != mine]  # a commit may change README alone
    return [f"made by other code than today's: {'; '.join(others)}"] if others else []


def metrics_of(runs, name):
    """Folds of each seed -> {metric: (seeds, folds)} on a set of test speakers."""
    confusions = [[np.array(fold["tests"][name]["confusion"]) for fold in folds] for folds in runs]
    return {metric: np.array([[of(c) for c in seed] for seed in confusions]) for metric, of in METRICS.items()}


def percent(value):
    return f"{100 * value:.1f}"


def spread(values):
    """(seeds, folds) -> mean ± standard deviation (ddof 1) over folds (± over seeds), in percent."""
    text = percent(values.mean())
    for axis, form in enumerate((" ± {}", " (± {})")):
        if values.shape[1 - axis] > 1:
            text += form.format(percent(values.mean(axis=axis).std(ddof=1)))
    return text


def markdown(head, rows):
    """A table in Markdown, aligned for those who read it as it is."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    wide = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in wide])
    return "\n".join("| " + " | ".join(map(str.ljust, line, wide)) + " |" for line in lines)


def table(folds, name, cell=str):
    """What a run ends with: a row for each fold; mean, standard deviation (ddof 1) and pooled value of the metrics."""
    rows, values = [], metrics_of([folds], name)
    confusion = np.sum([fold["tests"][name]["confusion"] for fold in folds], axis=0)
    for n, fold in enumerate(folds):
        test, costs = fold["tests"][name], [f"{seconds:.0f} s" for seconds in fold["seconds"].values()]
        speakers = [cell(features.listed(names, 4)) for names in (test["speakers"], fold["validation"])]
        rows.append([fold["fold"], *speakers, np.sum(test["confusion"]), *(percent(v[0, n]) for v in values.values()),
                     f"{fold['parameters']:,}", *costs])
    rows.append(["mean ± std", "", "", "", *map(spread, values.values()), "", "", ""])
    rows.append(["pooled", "", "", "", *(percent(metric(confusion)) for metric in METRICS.values()), "", "", ""])
    text = markdown(["fold", name, "validation", "utterances", *METRICS, "parameters", "search", "training"], rows)
    if name == "test" and "test_ua" in folds[0]["log"][-1]:
        best = [np.mean([max(row.get(column, 0) for row in fold["log"]) for fold in folds])
                for column in ("test_ua", "test_wa")]
        text += "\n\nbest epoch on the test speakers, as the authors count: UA {}, WA {}".format(*map(percent, best))
    return text


def finish(options, chosen):
    """Of a run whose folds are finished: writes results.json and report.md, then prints the table."""
    folds, folder = [finished(options, k) for k in chosen], folder_of(options)
    write(folder / "results.json", json.dumps({"settings": settings_of(options), "folds": folds}))
    write(folder / "report.md", report(folds, options))
    print(f"\n{options.dataset}, protocol {options.protocol}: {options.model}, seed {options.seed}")
    print(*(table(folds, name) for name in folds[0]["tests"]), *folds[0]["notes"], *made_by_others(folds), sep="\n")
    print(f"report.md, results, genotypes, logs, models and predictions are in {folder}")


def compare(options, runs, chosen):
    """A row for each model, and for the ensemble of its seeds, which are tested against the first one, resp. its
    ensemble. Writes results.json, with the figures of each seed and fold, and comparison.md; then prints the table."""
    models, rows, reference = {}, [], {}  # model -> the folds of each seed
    for run in runs:
        models.setdefault(run.model, []).append([finished(run, k) | {"folder": folder_of(run, k)} for k in chosen])
    for model in [model for model, seeds in models.items() if len(seeds) > 1]:
        models[f"{model}, ensemble"] = [[ensemble(fold) for fold in zip(*models[model][: options.seeds])]]
    for name in models[options.model][0][0]["tests"]:
        for model, seeds in models.items():
            values, folds = metrics_of(seeds, name), sum(seeds, [])
            first = reference.setdefault((name, "ensemble" in model), values)
            difference = values["UA"].mean(axis=0) - first["UA"].mean(axis=0)  # over seeds: what is paired are folds
            differs = len(difference) > 1 and np.ptp(difference) > 1e-12
            p = f"{stats.ttest_1samp(difference, 0).pvalue:.2g}" if differs else ""
            rows.append({"set": name, "model": model, "seeds": len(seeds), "p": p})
            rows[-1] |= {metric: spread(value) for metric, value in values.items()}
            rows[-1] |= {f"{metric} of seeds, folds": value.tolist() for metric, value in values.items()}
            if "ensemble" not in model:
                seconds = [np.mean([fold["seconds"][stage] for fold in folds]) for stage in ("search", "train")]
                if options.validation == "next":
                    seen = np.array([[fold["validation_ua"] for fold in of_seed] for of_seed in seeds])
                    rows[-1] |= {"validation UA": spread(seen), "validation UA of seeds, folds": seen.tolist()}
                rows[-1] |= {
                    "weights": f"{np.mean([fold['parameters'] for fold in folds]):,.0f}",
                    "search": f"{seconds[0]:.0f} s", "training": f"{seconds[1]:.0f} s",
                    "peak": f"{max((fold['peak_gb'] for fold in folds if fold['peak_gb']), default=math.nan):.2f} GB"}
    everything, folder = [fold for seeds in models.values() for fold in sum(seeds, [])], folder_of(options)
    heads = [head for head, value in rows[0].items() if not isinstance(value, list)]
    text = "\n\n".join([
        markdown(heads, [[row.get(head, "") for head in heads] for row in rows]),
        "Mean ± standard deviation over folds (± over seeds); p: paired t-test of UA over folds against the first row, "
        "of ensembles against the first of them, seeds averaged first",
        *everything[0]["notes"], *made_by_others(everything)])
    about = {"settings": settings_of(options), "versions": everything[0]["versions"], "rows": rows}
    write(folder / "results.json", json.dumps(about, indent=1))
    write(folder / "comparison.md", text + "\n")
    print(f"\n{text}\n\nthe same as comparison.md and results.json, and all runs, are in {folder}")


def ensemble(seeds):
    """The same fold of several seeds -> the fold when their logits are averaged. The predictions hold probabilities:
    their logarithms are the logits up to a constant for each utterance, which changes nothing."""
    tests = {}
    for name in seeds[0]["tests"]:
        logits = 0
        for fold in seeds:
            with reading(fold["folder"] / fold["tests"][name]["predictions"]) as file:
                rows = list(csv.reader(io.StringIO(file.read_text(errors="surrogateescape"), newline="")))[1:]
                logits += np.log(np.maximum(np.array([row[3:] for row in rows], dtype=float), 1e-300))
        labels = [fold["classes"].index(row[1]) for row in rows]
        tests[name] = {"confusion": confusion_matrix(labels, torch.from_numpy(logits))}
    return seeds[0] | {"tests": tests}


# report.md -----------------------------------------------------------------------------------------------------------
def report(folds, options):
    """Made of the results alone. -> Markdown, with Mermaid graphs."""
    text = [f"# {plain(options.dataset)}, protocol {options.protocol}: {options.model}, seed {options.seed}"]
    text += ["## Results", *map(plain, folds[0]["notes"])]
    text += [table(folds, name, plain) for name in folds[0]["tests"]]
    text += ["## Confusion", "Rows: what it was. Columns: what it was taken for. All folds together."]
    for name in folds[0]["tests"]:
        classes = [*map(plain, folds[0]["classes"])]
        m = np.sum([fold["tests"][name]["confusion"] for fold in folds], axis=0)
        rows = [[c, *m[k], percent(m[k, k] / m[k].sum()) if m[k].any() else "-"] for k, c in enumerate(classes)]
        text.append(markdown([name, *classes, "recall, %"], rows))
    if folds[0]["decision"]:
        entropies, both, alone = (np.mean([fold["decision"][key] for fold in folds]) for key in folds[0]["decision"])
        text += ["## Has the search decided?", f"Entropy of the alphas at the end (1: undecided, 0: decided): "
                 f"{entropies:.4f}. Validation UA (training UA where nobody validates) of the supernet's weights with "
                 f"all operations {percent(both)}, with those of the genotype alone {percent(alone)}. "
                 f"{agreement([f['genotype'] for f in folds], options)}"]
    if folds[0]["genotype"]:  # none of a baseline
        text += ["## The genotypes", "An edge is labelled with its operation; inputs 0 and 1 are the outputs of the "
                 "two cells before. A search that collapses has `skip_connect` nearly everywhere."]
        for fold in folds:
            text += [f"### Fold {fold['fold']}", *(graph(kind, cell) for kind, cell in fold["genotype"].items())]
    text += ["## Learning curves", "Means over the folds, epoch by epoch.", *curves(folds)]
    made_by = sorted({("made by", text) for fold in folds for text in fold["versions"]})
    settings = [[name, plain(value)] for name, value in [*made_by, *settings_of(options).items()]]
    return "\n\n".join([*text, "## Settings", markdown(["setting", "value"], settings)]) + "\n"


def plain(text):
    """For Markdown, in which a corpus' names may mean something."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&$!])", r"\\\1", " ".join(str(text).split()))


def agreement(genotypes, options):
    """How many searched edges (operation and predecessor) two folds have in common, on average over pairs of folds, and
    how many two random genotypes would: each keeps 2 of a node's i predecessors and one of n operations."""
    fixed, spaces = fixed_cells(options).cells(), {"seq": SEQ_SPACES[options.seq_space]}
    edges = [{(kind, i, *edge) for kind, cell in genotype.items() if kind not in fixed
              for i, node in enumerate(cell, start=2) for edge in node} for genotype in genotypes]
    common = np.mean([len(a & b) for a, b in itertools.combinations(edges, 2)] or [math.nan])
    by_chance = sum(2 / i / len(set(spaces.get(kind, CNN_OPS)) - {"none"}) for kind, i, *_ in edges[0])
    return f"Two folds have {common:.1f} of {len(edges[0])} edges in common, two random genotypes {by_chance:.1f}."


def graph(kind, cell):
    """A cell as a Mermaid graph: states 0 and 1 are its inputs, the others its nodes."""
    lines = ["```mermaid", "graph LR", f'    s0(["{kind}: input 0"])', '    s1(["input 1"])']
    for i, node in enumerate(cell, start=2):
        lines.append(f'    s{i}["node {i}"]')
        lines += [f'    s{j} -->|"{op}"| s{i}' for op, j in node]
        lines.append(f'    s{i} --> out(["output"])')
    return "\n".join([*lines, "```"])


def curves(folds):
    """Each begins with the first epoch that has a value: in the warm-up the alphas have no loss."""
    columns = {"loss": "loss of the weights", "alpha_loss": "loss of the alphas", "val_ua": "validation UA",
               "entropy": "entropy of the alphas (1: undecided, 0: decided)"}
    for stage, column in itertools.product(("search", "train"), columns):
        logs = [[row for row in fold["log"] if row["stage"] == stage and column in row] for fold in folds]
        values = [np.mean([row[column] for row in epoch]) for epoch in zip(*logs)]
        if len(values) > 1:
            first, points = logs[0][0]["epoch"], ", ".join(f"{value:.6g}" for value in values)
            yield (f'```mermaid\nxychart-beta\n    title "{stage}: {columns[column]}"\n    x-axis {first} --> '
                   f"{first + len(values) - 1}\n    line [{points}]\n```")  # Mermaid's own y-axis shows what moves


# What it will cost ---------------------------------------------------------------------------------------------------
def peak_memory(device):
    """Most memory held since it was asked last, GB: on a GPU by tensors, on Linux by the process; None: unknown."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
        return round(peak, 3)
    peak = None
    with suppress(OSError):
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
        Path("/proc/self/clear_refs").write_text("5")
    return peak and round(peak, 3)


def steps_of(options, classes, device):
    """-> for each kind of step its name and a function that makes one, with noise of the real size. One by one: a
    supernet is gone before its derived network's steps are measured."""
    x = torch.randn(options.batch, 1, *Settings(options.features, options.window).shape, device=device)
    batch = x, torch.arange(options.batch, device=device) % classes

    def weight(net, optimizer, constants=()):
        with held_fixed(constants):
            weight_step(F.cross_entropy(net(batch[0]), batch[1]), optimizer)
    genotype = given_genotype(options)
    if searches(options):
        net = network(options, classes).to(device)
        genotype = derive(net)
        for name, part in {"supernet": net, "CNN cells": net.cnn, "SeqNN cells": net.seq}.items():
            print(f"weights   {name}: {sum(p.numel() for p in part.parameters()):,}")
        yield "alpha step", partial(Architect(net, F.cross_entropy, order=options.order).step, batch, batch, 1e-3)
        yield "weight step", partial(weight, net, optimizer_of(net.weights(), options), net.alphas())
    net = network(options, classes, genotype).to(device)
    yield "training step", partial(weight, net, optimizer_of(net.parameters(), options))


def seconds_of(step, device):
    """Median of the later steps: the first ones are slower, and with sampled operations no two are alike."""
    times = []
    while len(times) < 5 or (len(times) < 30 and sum(times) < 30):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return float(np.median(times[len(times) // 2 :]))


def dry_run(options, runs, data, parts, device):
    """Says what there is, what would happen, and what it costs, measured with a network of each model here. `parts`:
    number -> Fold"""
    listing, store, count = data.listing, data.store, np.diff(data.store.first)
    labels = ", ".join(f"{n} {name}" for name, n in zip(data.classes, np.bincount(data.labels)))
    print(f"corpus    {options.dataset}, protocol {options.protocol}: {len(listing.utterances)} utterances ({labels}), "
          f"{store.seconds.sum() / 60:.1f} minutes, {count.sum()} windows of {options.window:g} s")
    for k, fold in parts.items():
        sides = (f"{side} {features.listed(data.speakers(who))} ({len(who)})" for side, who in fold.sides().items())
        print(f"fold {k:<4} ", ", ".join(sides))
    whole, half = (sum(math.ceil(count[f.train[::n]].sum() / options.batch) for f in parts.values()) for n in (1, 2))
    number = {"alpha step": half * (options.search_epochs - options.warm_up),
              "weight step": half * options.search_epochs, "training step": whole * options.epochs}
    total, peak = 0.0, 0.0
    for model in dict.fromkeys(run.model for run in runs):
        same = [run for run in runs if run.model == model]
        for kind, step in steps_of(same[0], len(data.classes), device):
            peak_memory(device)
            seconds, held, n = seconds_of(step, device), peak_memory(device), len(same) * number[kind]
            total, peak = total + n * seconds, max(peak, held or 0)
            print(f"cost      {model}, {kind}: {n:,} of {seconds:.3g} s, {held or math.nan:.3g} GB")
    print(f"in all    {total:,.0f} s ({total / 3600:.1f} h) on {device}, peak memory {peak or math.nan:.3g} GB\n"
          f"a dry run: no fold was computed; a run goes to {folder_of(options)}")


# A model that is used again ------------------------------------------------------------------------------------------
def read_model(file):
    """-> what model.pt says of itself, its network, statistics, feature settings."""
    with reading(file):
        model = torch.load(file, map_location="cpu", weights_only=True)
        about = json.loads(model["about"])
        options = argparse.Namespace(**about["settings"], recompute=False)
        genotype = Genotype(**about["genotype"]) if about["genotype"] else None
        with torch.device("meta"):  # whatever sizes a file announces, memory is taken for the weights that it holds
            net = network(options, len(about["classes"]), genotype).eval()
        net.load_state_dict(model["weights"], assign=True)
        return about, net, model["statistics"], Settings(options.features, options.window)


@torch.no_grad()
def use(options):
    """--from RUN: what its models recognise in the clips of --predict, by the mean of their logits; without clips, what
    they say of themselves, a JSON each."""
    run = Path(options.from_ or "")
    files = [*run.glob("model.pt"), *sorted(run.glob("fold*/model.pt"))] if run.is_dir() else [run]
    if not options.from_ or not files:
        raise InputError(f"--from is {options.from_}, expected a run folder with fold0/model.pt, or a model.pt")
    models = [read_model(file) for file in files]
    if not options.predict:
        return print(*(json.dumps(about, indent=1) for about, *_ in models), sep="\n")
    classes, settings = models[0][0]["classes"], models[0][3]  # all folds of a run have the same
    clips = {}  # path -> (W, F, T), rounded as in training
    for path in options.predict:
        clips[path] = features.maps_of(features.read_wav(path), settings).float()
    own = statistics(clips.values())  # of a model that was normalised by speaker all clips are one speaker's
    for path, maps in clips.items():
        logits = []
        for _, net, by, _ in models:
            mean, std = by or own
            logits.append(net(((maps - mean[:, None]) / std[:, None])[:, None]).double().mean(0))
        p = torch.stack(logits).mean(0).softmax(0)
        said = "  ".join(f"{name} {value:.3f}" for name, value in zip(classes, p))
        print(f"{path}  {classes[p.argmax()]}  {said}")


# The command ---------------------------------------------------------------------------------------------------------
def plan(options):
    """Options of a command's runs, one for each model and seed; those with a search first, as they take longest."""
    seeds = range(options.seed, options.seed + options.seeds)
    models = [options.model, *(("emodarts", "skip", *BASELINES) if options.compare is not None else ())]
    runs = [(model, seed) for model in dict.fromkeys(models) for seed in seeds]
    runs += [("random", options.seed + n) for n in range(options.compare or 0)]
    folder, made = folder_of(options), []
    for model, seed in runs if len(runs) > 1 else ():
        more = {"model": model, "seed": seed, "out": f"{folder}/{model}-seed{seed}"}
        made.append(argparse.Namespace(**vars(options) | more | ({} if model == options.model else {"genotype": None})))
    return made or [options]


def pick_device(name):
    rank, world, local = (os.environ.get(key, "") for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank or world or local:  # of torchrun: each process of a machine takes a GPU, and folds as any other shell does
        if not (f"{rank}{world}{local}".isdecimal() and rank and world and int(rank) < int(world)):
            raise InputError(f"the environment has RANK {rank!r}, WORLD_SIZE {world!r}, LOCAL_RANK {local!r}; expected "
                             "numbers as torchrun gives them, or none of them: unset them")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local or 0}"
    try:
        torch.ones(1, device=name).tolist()
    except Exception as error:  # what torch raises depends on the device
        raise InputError(f"--device {name} cannot be used here ({str(error):.150}); cpu always can") from None
    return torch.device(name)


def read_data(options):
    """-> listings of the corpus and of the second one to test on (or None). A result depends on what they hold."""
    listing = features.read_corpus(options.dataset, options.root, options.classes, options.protocol)
    options.data, second = listing.digest, None
    if options.test_dataset:
        name, _, root = options.test_dataset.partition("=")
        second = features.read_corpus(name, root or None, options.classes)
        if not set(second.classes) <= set(listing.classes):
            raise InputError(f"{name} has classes that {options.dataset} has not; what is tested must be trained")
        options.data += f", {name} {second.digest}"
    return listing, second


def run(options):
    with suppress(AttributeError, TypeError):  # glibc gives memory back and asks for it again, a tenth of a step's time
        for parameter, value in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, its largest, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.predict or options.from_:
        return use(options)
    device = pick_device(options.device)
    for each in {each.model: each for each in plan(options)}.values():
        check(each)
    listing, second = read_data(options)
    validate = options.validation == "next"
    runs, parts = plan(options), features.folds(listing, (), (), validate)
    chosen = options.folds or list(range(len(parts)))
    if not set(chosen) <= set(range(len(parts))):
        raise InputError(f"--folds is {chosen}, expected numbers from 0 to {len(parts) - 1}")
    for each, k in itertools.product(runs, range(len(parts))):
        finished(each, k)  # also of folds that are not asked for: a folder holds one run
    data = Data(options, listing, listing.classes, device)
    parts = features.folds(listing, data.store.bad, chosen, validate)
    if options.dry_run:
        return dry_run(options, runs, data, {k: parts[k] for k in chosen}, device)
    other = second and Data(options, second, listing.classes, device)
    for k in chosen if second else ():
        trained = parts[k].train + (sum(parts[k].tests.values(), []) if options.poison else [])
        features.check_apart(k, ("train", listing, trained), ("--test-dataset", second, range(len(other.labels))))
    jobs = [(each, k) for each in runs for k in chosen]
    if not work(jobs, lambda options, k: run_fold(options, k, data, parts, other)):
        return say("other processes have the other folds; the last one prints the table, as this command does then")
    with lock(folder_of(options) / "lock"):  # another process may end at the same moment
        for each in runs:
            finish(each, chosen)
        if len(runs) > 1:
            compare(options, runs, chosen)


def main(argv=None):
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # what it has no letter for
    try:
        run(parse(argv))
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        memory = re.search("out of memory|can't allocate memory", str(error)) or isinstance(error, MemoryError)
        if isinstance(error, RuntimeError) and not memory:
            raise
        more = "; --relaxation sample, --recompute, smaller --batch, --channels and --nodes take less" if memory else ""
        print(f"error: {error}{more}", file=sys.stderr, flush=True)
        if isinstance(error, BrokenPipeError):  # nobody reads on; the interpreter would try once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


if __name__ == "__main__":
    sys.exit(main())
