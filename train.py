"""Search, derive, train, test: emoDARTS end to end, speaker-independent.

    python train.py                                         # the smoke test: no data, no GPU, one to three minutes
    python train.py --dataset emodb --root /data/emodb      # EMO-DB, leave one speaker out
    python train.py --dataset emodb --root /data/emodb --compare --seeds 3      # beside baselines and random genotypes
    python train.py --dry-run                               # what would happen, and what it would cost
    python train.py --predict a.wav b.wav --from runs/NAME  # what the models of a run hear in clips

The way of the data, which is also the order of this file:

    options -> jobs (model, seed, fold) -> run_fold: search -> genotype -> train -> network -> score -> result.json
    every result.json of a run -> results.json, the table, report.md, the comparison

In each fold the search sees the training speakers only, one half of their utterances for the weights, the other for the
alphas; the derived network is trained from scratch on all of them; the validation speakers are looked at; the test
speakers are scored once, when everything is chosen.
"""

import argparse
import csv
import ctypes
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from scipy import stats
from scipy.special import softmax
from torch import distributed, nn

import features
from emodarts import CNN_OPS, RELAXATIONS, SEQ_SPACES, Architect, Genotype, Network, decided, derive
from emodarts import expected_parameters, held_fixed, random_genotype, without_statistics
from features import CORPORA, InputError, lock

# Options: the command line is made from one dataclass; a scale fixes sizes, never the hardware -----------------------
SCALES = {  # defaults of the options of these names
    "paper": dict(
        features="mfcc-128", window=8.0, channels=8, cnn_cells=4, seq_cells=4, nodes=4, stem_stride=1,
        seq_width=0, relaxation="softmax", search_epochs=50, warm_up=0, alpha_lr=3e-4, epochs=100,
    ),
    "small": dict(
        features="log-mel-64", window=4.0, channels=8, cnn_cells=3, seq_cells=1, nodes=2, stem_stride=2,
        seq_width=64, relaxation="sample", search_epochs=100, warm_up=20, alpha_lr=0.01, epochs=30,
    ),
}
RECIPES = {  # of search and training; the paper's is the authors'. `drop_path` grows from 0 over the training
    "paper": dict(optimizer="sgd", lr=0.025, decay=3e-4, dropout=0.3, drop_path=0.2),
    "small": dict(optimizer="adamw", lr=0.003, decay=0.05, dropout=0.0, drop_path=0.0),
    "baseline": dict(optimizer="adamw", lr=0.001, decay=0.05, drop_path=0.0),
}
BASELINES = ("cnn", "lstm", "cnn-lstm", "cnn-lstm-att")
MODELS = ("emodarts", "random", *BASELINES)


def option(default, text, group, least=None, below=math.inf, kind=None, **more):
    """A field of Options: its default (None: of corpus or scale), help text, group, range, type, more of argparse."""
    about = dict(text=text, group=group, least=least, below=below, kind=kind or type(default), more=more)
    return field(default=default, metadata=about)


@dataclass
class Options:
    dataset: str = option("smoke", "the corpus", "data", choices=CORPORA)
    root: str = option(None, "its folder, or the file of csv (default: data/DATASET)", "data", kind=str)
    classes: str = option("four", "angry, happy, neutral and sad, or all labels", "data", choices=("four", "all"))
    protocol: str = option("standard", "the corpus', or the emoDARTS authors'", "data", choices=("standard", "paper"))
    skip_bad: bool = option(False, "go on without recordings that cannot be used; results name them", "data")
    test_dataset: str = option(None, "NAME or NAME=DIR: a corpus to test every model on as well", "data", kind=str)
    cache: str = option("cache", "folder of the computed features", "data")
    folds: str = option(None, "folds to run, such as 0,3 (default: all; of smoke 0,1)", "data", kind=str)
    poison: float = option(0.0, "share of the test utterances that trains: not speaker-independent", "data", 0, 1)
    normalise: str = option("train", "whose statistics: the training speakers', or each speaker's own, which uses the "
                            "test speaker's unlabelled audio", "data", choices=("train", "speaker"))

    scale: str = option(None, "small, or the paper's, for its corpora", "sizes", choices=tuple(SCALES), kind=str)
    features: str = option(None, "mfcc-N or log-mel-N, with N coefficients or bands", "sizes", kind=str)
    window: float = option(None, "seconds of a window; longer utterances become several", "sizes", kind=float)
    channels: int = option(None, "channels of the first CNN cell", "sizes", 1, kind=int)
    cnn_cells: int = option(None, "CNN cells", "sizes", 1, kind=int)
    seq_cells: int = option(None, "SeqNN cells; 0 searches a CNN only", "sizes", 0, kind=int)
    nodes: int = option(None, "nodes a cell", "sizes", 1, kind=int)
    stem_stride: int = option(None, "2 halves the map before the first cell", "sizes", 1, kind=int)
    seq_width: int = option(None, "width of the SeqNN; 0: the CNN's, of whose map it sees the mean over F", "sizes", 0,
                            kind=int)

    model: str = option("emodarts", "searched, random, or designed by hand", "search", choices=MODELS)
    search: str = option("joint", "which cells; the others are fixed", "search", choices=("joint", "cnn", "seq"))
    genotype: str = option(None, "file of a genotype to train, without a search", "search", kind=str)
    relaxation: str = option(None, "all operations, or one drawn", "search", choices=RELAXATIONS, kind=str)
    order: int = option(1, "order of the hypergradient", "search", choices=(1, 2))
    seq_space: str = option("all", "candidate operations of the SeqNN", "search", choices=tuple(SEQ_SPACES))
    search_epochs: int = option(None, "epochs of the search", "search", 1, kind=int)
    warm_up: int = option(None, "of which the first ones move the weights only", "search", 0, kind=int)
    alpha_lr: float = option(None, "learning rate of the alphas (Adam)", "search", 0, kind=float)
    size_penalty: float = option(0.0, "added to the alphas' loss for a million of expected weights", "search", 0)

    epochs: int = option(None, "epochs of the training", "training", 1, kind=int)
    batch: int = option(16, "batch size, of search and training", "training", 2)
    lr: float = option(None, "learning rate of the weights, cosine (default: RECIPES)", "training", 0, kind=float)
    augment: bool = option(True, "shift and mask the maps that move weights", "training")

    out: str = option(None, "folder of the run (default: runs/DATASET-SCALE-KEY of the settings)", "run", kind=str)
    seed: int = option(0, "seed of everything random", "run", 0)
    seeds: int = option(1, "number of seeds: a run with each, and their ensemble", "run", 1)
    compare: int = option(None, "also run the baselines and N random genotypes (10), and compare", "run", 0, kind=int,
                          nargs="?", const=10, metavar="N")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU when there is one", "run")
    recompute: bool = option(False, "compute edges again on the way back: much less memory, same numbers", "run")
    amp: bool = option(False, "mixed precision (bfloat16): other roundings; pays on a GPU", "run")
    threads: int = option(None, "CPU threads (default: torch's)", "run", 1, kind=int)
    dry_run: bool = option(False, "say what would happen and what it costs, measured here; write nothing", "run")

    predict: list = option(None, "wav files to recognise, with --from", "use", kind=str, nargs="+", metavar="CLIP")
    from_: str = option(None, "a run folder or a model file; alone: what it says of itself", "use", kind=str)
    json: str = option(None, "file for what --predict or --dry-run says; - prints it", "use", kind=str)


# What a result does not depend on, up to rounding: may differ when a run folder is used again.
NOT_SETTINGS = {"out", "root", "cache", "device", "recompute", "threads", "dry_run", "seeds", "compare", "predict",
                "from_", "json"}


def flag(name):
    return "--" + name.strip("_").replace("_", "-")


def parse(argv):
    """Command line -> Options, with everything that depends on corpus and scale filled in."""
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser = argparse.ArgumentParser(usage="python train.py [options]", description=__doc__, formatter_class=form)
    groups = {}
    for f in fields(Options):
        about = f.metadata
        group = groups.setdefault(about["group"], parser.add_argument_group(about["group"]))
        text = about["text"]
        if f.name in SCALES["paper"]:
            text += " (" + ", ".join(f"{scale}: {sizes[f.name]}" for scale, sizes in SCALES.items()) + ")"
        elif f.default is not None:
            text += f" (default: {f.default})"
        if about["kind"] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            metavar = None if "choices" in about["more"] else flag(f.name)[2:].upper()
            how = dict(type=about["kind"], metavar=metavar) | about["more"]
        group.add_argument(flag(f.name), dest=f.name, default=f.default, help=text, **how)
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


def check(options):
    """Refuses, in one message, all that cannot work. -> (device, listing, its folds, numbers of those to run, listing
    of --test-dataset)"""
    problems = []
    for f in fields(Options):
        value, least = getattr(options, f.name), f.metadata["least"]
        if least is not None and value is not None and not least <= value < f.metadata["below"]:  # nor is NaN
            upper = f" and less than {f.metadata['below']}" if f.metadata["below"] < math.inf else ""
            problems.append(f"{flag(f.name)} is {value}, expected at least {least}{upper}")
    attempt(problems, feature_settings, options)
    net = None
    if not problems:  # a network would say the same again
        with torch.device("meta"):
            net = attempt(problems, network, options, 2)
        attempt(problems, given_genotype, options)
    if options.genotype and options.model != "emodarts":
        problems.append(f"--genotype goes with --model emodarts, found --model {options.model}")
    if options.json and not options.dry_run:
        problems.append("--json goes with --dry-run, --predict or --from; a run leaves results.json in its folder")
    if searches(options) and net and not net.candidates:
        problems.append(f"--search {options.search} leaves nothing to search with --seq-cells {options.seq_cells}")
    if searches(options) and options.order == 2 and options.relaxation == "sample":
        problems.append("--order 2 goes with --relaxation softmax: each of its passes would draw another network")
    if searches(options) and options.warm_up >= options.search_epochs:
        problems.append(f"--warm-up is {options.warm_up}, expected less than --search-epochs, {options.search_epochs}")
    device = attempt(problems, pick_device, options.device)
    corpus = options.dataset, options.root, options.classes, options.protocol
    listing = attempt(problems, features.read_corpus, *corpus)
    parts = attempt(problems, features.folds, listing) if listing else None
    chosen = attempt(problems, chosen_folds, options.folds, len(parts)) if parts else []
    other = None
    if listing and not options.dry_run:  # which would have to generate the smoke test
        other = attempt(problems, second_corpus, options, listing.classes)
    for k in chosen or []:
        missing = set(listing.classes) - {listing.utterances[i].label for i in parts[k].train}
        if missing:
            problems.append(f"fold {k}: no training utterance is {', '.join(sorted(missing))}; every class needs one")
        half = len(parts[k].train) // 2
        if options.batch > half and any(searches(run) for run in plan(options)):
            problems.append(f"--batch is {options.batch}, and half of fold {k}'s training set {half} utterances; the "
                            "search takes a batch of each half")
    if len(problems) > 1:
        problems.insert(0, f"{len(problems)} things cannot work:")
    if problems:
        raise InputError("\n  ".join(problems))
    return device, listing, parts, chosen, other


def chosen_folds(text, number):
    """"0,3" -> [0, 3]; all of them without a text."""
    if not text:
        return list(range(number))
    chosen = re.split(r"\s*,\s*", text.strip())
    if not set(chosen) <= set(map(str, range(number))):
        raise InputError(f"--folds is {text!r:.80}, expected numbers from 0 to {number - 1} with commas between them")
    return sorted(set(map(int, chosen)))


def feature_settings(options):
    return features.Settings.named(options.features, window=options.window)


def settings_of(options):
    """What a result depends on."""
    return {name: value for name, value in asdict(options).items() if name not in NOT_SETTINGS}


def key_of(options):
    return hashlib.sha256(json.dumps(settings_of(options), sort_keys=True).encode()).hexdigest()[:8]


def out_folder(options):
    return Path(options.out or Path("runs", f"{options.dataset}-{options.scale}-{key_of(options)}"))


def recipe(options):
    """Optimizer, learning rate and regularisation of a model."""
    chosen = RECIPES["baseline" if options.model in BASELINES else options.scale]
    return chosen if options.lr is None else chosen | {"lr": options.lr}


def searches(options):
    return options.model == "emodarts" and options.genotype is None


# Randomness ----------------------------------------------------------------------------------------------------------
# A function of where one is: no random state is ever saved, a run that goes on at any step is the run that never
# stopped, and processes agree by construction.
def place(*where):
    """(seed, fold, stage, epoch, step, ...) -> a seed of torch."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:8], "big")


def generator(*where):
    return torch.Generator().manual_seed(place(*where))


# Data ----------------------------------------------------------------------------------------------------------------
class Data:
    """The windows of a corpus: on the device when they fit there, otherwise read from the memory map batch by batch.

    `classes` are those of the network. Before the first batch, `standardise_by` must say whose statistics count.
    """

    def __init__(self, listing, store, classes, normalise, device):
        self.listing, self.store, self.classes, self.normalise, self.device = listing, store, classes, normalise, device
        self.labels = np.array([classes.index(u.label) for u in listing.utterances])
        self.features = torch.from_numpy(store.features)  # (windows, F, T) float16
        if device.type == "cuda" and store.features.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
            self.features = self.features.to(device)
        # Mean of x and of x^2 over the time of each window: all windows are equally long, so that the statistics of any
        # set of windows are means of these. 64 windows at a time fit into a core's cache: ten times faster than 512.
        parts = (self.features[k : k + 64].float() for k in range(0, len(self.features), 64))
        self.moments = torch.cat([torch.stack([x.mean(2), x.square().mean(2)], 1).cpu() for x in parts])  # (W, 2, F)

    def windows(self, utterances):
        """-> indices of their windows, and for each window its place in `utterances`, as tensors."""
        window, of = self.store.windows_of(utterances)
        return torch.from_numpy(window), torch.from_numpy(of)

    def statistics(self, utterances):
        """-> mean and deviation of each coefficient over the utterances, (F,) each."""
        mean, square = self.moments[self.windows(utterances)[0]].double().mean(0)  # (2, F)
        return mean.float(), (square - mean**2).clamp(min=1e-10).sqrt().float()

    def standardise_by(self, train, like=None):
        """Statistics of the training utterances or `like` other Data; with normalise="speaker" each speaker's own."""
        sets = [train]
        self.row = torch.zeros(len(self.features), dtype=torch.long)  # of each window in `mean` and `std`
        if self.normalise == "speaker":
            names = np.array([u.speaker for u in self.listing.utterances])
            sets = [np.flatnonzero(names == name) for name in np.unique(names)]
            for k, members in enumerate(sets):
                self.row[self.windows(members)[0]] = k
        elif like:
            self.mean, self.std = like.mean, like.std
            return
        statistics = [self.statistics(members) for members in sets]
        self.mean, self.std = (torch.stack(part).to(self.device) for part in zip(*statistics))  # (sets, F)

    def maps(self, window):
        """Indices of windows -> standardised maps (N, 1, F, T)."""
        x = self.features[window.to(self.features.device)].to(self.device, torch.float32)
        row = self.row[window].to(self.device)
        return ((x - self.mean[row][:, :, None]) / self.std[row][:, :, None])[:, None]

    def order(self, utterances, steps, *where):
        """All windows of `utterances`, shuffled as `where` says, in `steps` batches of equal size: a list of pairs
        (indices of windows, classes). Where there are too few for so many steps, they come again."""
        window, of = self.windows(utterances)
        target = torch.from_numpy(self.labels[utterances])[of]
        shuffle = partial(torch.randperm, len(window), generator=generator(*where))
        order = torch.cat([shuffle() for _ in range(-(-steps // len(window)))])
        return [(window[part], target[part]) for part in order.tensor_split(steps)]

    def batch(self, pair):
        """One pair of `order` -> (x, target). Where ranks share a batch, x is this rank's part, `target` all's."""
        rank, world = ranks()
        window, target = pair
        return self.maps(window.tensor_split(world)[rank]), target.to(self.device)

    def steps(self, utterances, batch):
        return -(-len(self.windows(utterances)[0]) // batch)

    def names(self, pair):
        """Of the recordings in a batch."""
        members = np.searchsorted(self.store.first, pair[0].numpy(), side="right") - 1
        return ", ".join(self.listing.name(self.listing.utterances[i]) for i in members)

    def class_weights(self, utterances):
        """Inverse class frequencies, (classes,); their mean over the utterances is 1."""
        counts = np.bincount(self.labels[utterances], minlength=len(self.classes))
        if not counts.all():
            missing = ", ".join(c for c, n in zip(self.classes, counts) if n == 0)
            raise InputError(f"no training utterance that can be used is {missing}; every class needs one")
        return torch.tensor(len(utterances) / (len(counts) * counts), dtype=torch.float32, device=self.device)

    def speakers(self, utterances):
        return sorted({self.listing.utterances[i].speaker for i in utterances})


def halves(utterances, labels, *where):
    """Two halves of the training utterances, stratified by class: one for the weights, one for the alphas."""
    shuffled = [utterances[k] for k in torch.randperm(len(utterances), generator=generator(*where))]
    by_class = sorted(shuffled, key=lambda i: labels[i])  # a stable sort: the order within a class stays random
    return by_class[0::2], by_class[1::2]


def poisoned(fold, options, labels):
    """Moves a share of each class of the test utterances to the training set: the paper's "dataset poisoning"."""
    rng = np.random.default_rng(options.seed)
    tested = sorted({i for members in fold.tests.values() for i in members})
    moved = set()
    for label in set(labels[tested]):
        members = [i for i in tested if labels[i] == label]
        moved.update(rng.permutation(members)[: int(options.poison * len(members))].tolist())
    tests = {name: [i for i in members if i not in moved] for name, members in fold.tests.items()}
    return replace(fold, train=fold.train + sorted(moved), tests=tests)


def augmented(x, options):
    """Standardised maps (N, 1, F, T), each shifted in time, around the end, by an amount of its own, and with a masked
    stretch of time; log-mel also with a masked stretch of bands (over MFCCs it would not be one of bands). A mask is at
    most a fifth of its axis long and filled with the mean, 0."""
    if not options.augment:
        return x
    t = torch.arange(x.shape[3]) + torch.randint(x.shape[3], (len(x), 1))  # (N, T)
    x = x.gather(3, (t % x.shape[3]).to(x.device)[:, None, None].expand_as(x))
    for axis in (3, 2) if options.features.startswith("log-mel") else (3,):
        x = torchaudio.functional.mask_along_axis_iid(x, x.shape[axis] // 5, 0.0, axis)
    return x


# The two loops -------------------------------------------------------------------------------------------------------
LABEL_SMOOTHING = 0.1
CLIP = 5.0  # largest norm of the weights' gradient, DARTS'
SEARCH_LR_END = 0.001  # DARTS' search does not anneal to 0: the alphas go on to the end, and so must the weights


def search(net, data, train, options, keep):
    """Moves alphas and weights in turn [bi-level problem, see emodarts.py]. -> Genotype. `train`: utterances of the
    training speakers, `keep`: the Keeper of the fold."""
    w_half, alpha_half = halves(train, data.labels, options.seed, keep.fold, "halves")
    steps = data.steps(w_half, options.batch)
    loss = partial(cross_entropy, weight=data.class_weights(train))
    penalty = partial(size_penalty, net, options.size_penalty) if options.size_penalty else None
    architect = Architect(net, loss, order=options.order, lr=options.alpha_lr, penalty=penalty, reduce=reduced)
    optimizer, first_lr = optimizer_of(net, options), recipe(options)["lr"]
    keep.resume(net=net, optimizer=optimizer, alphas=architect.optimizer)
    for epoch in range(keep.epoch, options.search_epochs):
        here = options.seed, keep.fold, "search", epoch
        batches = zip(data.order(w_half, steps, *here, "weights"), data.order(alpha_half, steps, *here, "alphas"))
        lr = anneal(optimizer, first_lr, min(first_lr, SEARCH_LR_END), epoch / options.search_epochs)
        net.train()
        for step, (for_w, for_alpha) in enumerate(batches):
            if step < keep.step:
                continue
            torch.manual_seed(place(*here, step, ranks()[0]))
            net.draws = generator(*here, step, "operations")  # the same on all ranks
            x, target = data.batch(for_w)
            x = augmented(x, options)
            if epoch >= options.warm_up:  # before, operations that have nothing to learn would be ahead
                value = architect.step(data.batch(for_alpha), (x, target), xi=lr)
                keep.sums["alpha_loss"] += finite(value, "loss of the alphas", for_alpha, data, keep)
            with held_fixed(net.alphas()):
                value = weight_step(loss(net(x), target), optimizer)
            keep.sums["loss"] += finite(value, "loss", for_w, data, keep)
            keep.step_done()
        keep.epoch_done(lr=lr, steps=steps, entropy=entropy(net), **skips(derive(net)))
    return derive(net)


def train(net, data, train, validation, options, keep):
    """Trains a network from scratch. The last epoch counts; the validation speakers are only looked at."""
    steps = data.steps(train, options.batch)
    weight = data.class_weights(train)
    optimizer = optimizer_of(net, options)
    keep.resume(net=net, optimizer=optimizer)
    for epoch in range(keep.epoch, options.epochs):
        here = options.seed, keep.fold, "train", epoch
        lr = anneal(optimizer, recipe(options)["lr"], 0.0, epoch / options.epochs)
        net.drop_path = recipe(options)["drop_path"] * epoch / options.epochs
        net.train()
        for step, pair in enumerate(data.order(train, steps, *here)):
            if step < keep.step:
                continue
            torch.manual_seed(place(*here, step, ranks()[0]))
            x, target = data.batch(pair)
            x = augmented(x, options)
            value = weight_step(cross_entropy(net(x), target, weight), optimizer)
            keep.sums["loss"] += finite(value, "loss", pair, data, keep)
            keep.step_done()
        seen = confusion_matrix(data.labels[validation], predict(net, data, validation).argmax(1), len(data.classes))
        keep.epoch_done(lr=lr, steps=steps, val_ua=ua(seen), val_wa=wa(seen))


def optimizer_of(net, options):
    how = recipe(options)
    if how["optimizer"] == "sgd":
        return torch.optim.SGD(net.weights(), how["lr"], momentum=0.9, weight_decay=how["decay"])
    return torch.optim.AdamW(net.weights(), how["lr"], weight_decay=how["decay"], fused=True)  # fused: faster


def anneal(optimizer, first, last, done):
    """Cosine from `first` to `last`, a function of the share that is done. -> the learning rate."""
    lr = last + (first - last) * (1 + math.cos(math.pi * done)) / 2
    optimizer.param_groups[0]["lr"] = lr
    return lr


def cross_entropy(logits, target, weight):
    """Class-weighted mean over a batch; of a shared one this rank's summand: `logits` of its part, `target` of all."""
    rank, world = ranks()
    mine = target.tensor_split(world)[rank]
    loss = F.cross_entropy(logits, mine, weight, reduction="sum", label_smoothing=LABEL_SMOOTHING)
    return loss / weight[target].sum()


def weight_step(loss, optimizer):
    """One step of the weights, and of nothing else: -> the loss, a float, NaN where the gradient is not finite."""
    w = optimizer.param_groups[0]["params"]
    loss.backward(inputs=w)
    moved = [p for p in w if p.grad is not None]  # those of operations that were drawn: the same on all ranks
    value = loss.detach()
    if ranks()[1] > 1:  # clipped is the gradient of the whole batch
        value, gradients = reduced(value, [p.grad for p in moved])
        for p, g in zip(moved, gradients):
            p.grad.copy_(g)
    norm = torch.nn.utils.clip_grad_norm_(moved, CLIP)
    if not math.isfinite(norm):
        return math.nan
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # it is as large as the weights, and the alphas' step needs no such thing
    return value.item()


class NotFinite(Exception):
    """A number that no step can be made with."""


def finite(value, what, pair, data, keep):
    if not math.isfinite(value):
        raise NotFinite(f"fold {keep.fold}, {keep.stage}, epoch {keep.epoch + 1}, step {keep.step + 1}: the {what} is "
                        "not finite. The last checkpoint is from before. Look into the batch, or try a smaller --lr or "
                        f"--alpha-lr with another --out. Batch: {data.names(pair)}")
    return value


def size_penalty(net, factor):
    return factor * expected_parameters(net) / 1e6


def entropy(net):
    """Mean entropy of the edges' softmax weights as a share of the largest possible: 1 undecided, 0 decided."""
    shares = []
    for alpha in net.alphas():
        p = alpha.detach().softmax(dim=1)
        shares.append(-(p * p.log()).sum(dim=1) / math.log(p.shape[1]))
    return torch.cat(shares).mean().item()


def skips(genotype):
    """Number of skip connections of each cell: a search that collapses has little else."""
    return {f"skips_{kind}": json.dumps(cell).count("skip_connect") for kind, cell in genotype.cells().items()}


# Networks ------------------------------------------------------------------------------------------------------------
def network(options, classes, genotype=None):
    return Network(classes=classes, seq_space=options.seq_space, relaxation=options.relaxation,
                   recompute=options.recompute, amp=options.amp, fixed=fixed_cells(options), genotype=genotype,
                   **network_sizes(options))


def network_sizes(options):
    """What model.pt says of its network."""
    sizes = {name: getattr(options, name) for name in ("channels", "cnn_cells", "seq_cells", "nodes", "stem_stride")}
    return sizes | {"seq_width": options.seq_width or None, "features": feature_settings(options).coefficients,
                    "dropout": RECIPES[options.scale]["dropout"]}


def fixed_cells(options):
    """What an ablation does not search: cells in which each node reads the two states before it."""

    def chain(first, second):
        return [[(first, i), (second, i + 1)] for i in range(options.nodes)]

    if options.search == "cnn":
        return Genotype(seq=chain("lstm_1", "skip_connect"))
    if options.search == "seq":
        return Genotype(chain("sep_conv_3x3", "sep_conv_3x3"), chain("max_pool_3x3", "sep_conv_3x3"))
    return Genotype()


def given_genotype(options):
    """What --genotype names, or the random one of the seed, the same for all folds; None without either."""
    if options.model == "random":
        torch.manual_seed(place(options.seed, "random genotype"))
        with torch.device("meta"):
            supernet = network(options, 2)
        return random_genotype(supernet)
    if options.genotype is None:
        return None
    try:
        genotype = Genotype.from_json(Path(options.genotype).read_text())
        with torch.device("meta"):
            network(options, 2, genotype)  # refuses one that does not fit
    except (OSError, ValueError) as error:
        raise InputError(f"--genotype {options.genotype}: {error}") from None
    return genotype


class Baseline(nn.Module):
    """Hand-designed networks with the time axis kept: (N, 1, F, T) -> logits (N, classes). `bands`: F.

    cnn: three convolutions with pooling, one more, mean over the map. lstm: two bidirectional layers over the frames,
    mean over time. cnn-lstm: the three convolutions, one bidirectional layer, mean over time; cnn-lstm-att: additive
    attention over time instead of the mean. A baseline to add is a kind here and a name in BASELINES.
    """

    def __init__(self, kind, classes, bands, dropout=0.3, width=64):
        super().__init__()
        self.kind = kind
        self.cnn = nn.Sequential()
        c, frame = 1, bands
        for out, pool in ((16, 2), (32, 2), (64, (2, 1))):  # F is halved three times, T twice
            if kind != "lstm":
                self.cnn.extend([nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                                 nn.MaxPool2d(pool, ceil_mode=True), nn.Dropout2d(0.1)])
                c, frame = out, out * -(-bands // 8)
        if kind == "cnn":
            convolution = nn.Conv2d(c, 2 * width, 3, padding=1, bias=False)
            self.top = nn.Sequential(convolution, nn.BatchNorm2d(2 * width), nn.ReLU())
        else:
            layers = 2 if kind == "lstm" else 1
            between = dropout if layers > 1 else 0.0
            self.rnn = nn.LSTM(frame, width, layers, batch_first=True, bidirectional=True, dropout=between)
        if kind == "cnn-lstm-att":
            self.score = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, classes))

    def weights(self):
        return list(self.parameters())

    def forward(self, x):
        x = self.cnn(x)
        if self.kind == "cnn":
            return self.head(self.top(x).mean(dim=(2, 3)))
        x = x.flatten(1, 2).transpose(1, 2)  # (N, C, F, T) -> (N, C F, T) -> (N, T, C F)
        h, _ = self.rnn(x)  # (N, T, 2 width)
        if self.kind != "cnn-lstm-att":
            return self.head(h.mean(dim=1))
        a = self.score(h).softmax(dim=1)  # (N, T, 1)
        return self.head((a * h).sum(dim=1))


def final_network(options, classes, genotype):
    """The network that is trained and tested."""
    if options.model in BASELINES:
        return Baseline(options.model, classes, feature_settings(options).coefficients)
    return network(options, classes, genotype)


def placed(net, device):
    """On the device, channels last, which is faster at these sizes. Where ranks share a batch on GPUs, batch norm goes
    over the whole of it (torch has that for GPUs only); in place, as edges share modules."""
    if ranks()[1] > 1 and device.type == "cuda":
        for module in net.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__, module.process_group = nn.SyncBatchNorm, None
    return net.to(device, memory_format=torch.channels_last)


# A fold from start to end --------------------------------------------------------------------------------------------
@dataclass
class Job:
    """One fold of one model with one seed."""

    options: Options
    fold: int
    folder: Path  # of the fold

    def finished(self):
        return (self.folder / "result.json").exists()


def run_fold(job, data, parts, other, progress):
    """Search, derive, train, score; leaves genotype.json, log.csv, model.pt, predictions.csv and, at last, result.json.
    `data` of the corpus, `parts` its folds, `other`: Data of a second corpus to test on, or None."""
    options, device, fold = job.options, data.device, parts[job.fold]
    if options.poison:
        fold = poisoned(fold, options, data.labels)
    reset_peak(device)
    data.standardise_by(fold.train)
    keep = Keeper(job, progress)
    if keep.stage == "search":
        genotype = given_genotype(options)
        if searches(options):
            torch.manual_seed(place(options.seed, job.fold, "supernet"))
            supernet = placed(network(options, len(data.classes)), device)
            genotype = search(supernet, data, fold.train, options, keep)
            keep.decision = decision(supernet, genotype, data, fold.validation)
            progress.say(f"fold {job.fold}: found in {keep.seconds['search']:.0f} s\n{genotype}")
            del supernet  # the training has no use for its memory
        keep.search_done(genotype)
    genotype = keep.genotype
    if genotype:
        write(job.folder / "genotype.json", genotype.to_json().encode())
    torch.manual_seed(place(options.seed, job.fold, "network"))
    net = placed(final_network(options, len(data.classes), genotype), device)
    train(net, data, fold.train, fold.validation, options, keep)

    # Everything is chosen: the test speakers are scored, once.
    tests = [score(net, data, name, members, job.folder) for name, members in fold.tests.items()]
    if other:
        other.standardise_by(None, like=data)
        usable = [i for i in range(len(other.labels)) if i not in other.store.bad]
        tests.append(score(net, other, other.listing.dataset, usable, job.folder, of_another=True))
    about = {
        "fold": job.fold,
        "validation": data.speakers(fold.validation),
        "validation_ua": keep.rows[-1]["val_ua"],
        "decision": keep.decision,
        "tests": tests,
        "genotype": genotype.cells() if genotype else None,
        "parameters": sum(p.numel() for p in net.weights()),
        "macs": round(macs(net, feature_settings(options).shape) * 8 / options.window),  # of 8 seconds
        "peak_gb": round(peak_memory(device) or 0, 2),
        "seconds": {stage: round(seconds, 1) for stage, seconds in keep.seconds.items()},
    }
    write(job.folder / "model.pt", partial(torch.save, model_of(options, data, fold, genotype, net, tests)))
    write(job.folder / "result.json", as_json(about))
    if ranks()[0] == 0:  # also what a kill has left half written
        for file in job.folder.glob("checkpoint.pt*"):
            file.unlink()


def model_of(options, data, fold, genotype, net, tests):
    """What model.pt holds: all that it takes to use the network, and what it says of itself."""
    settings, statistics = feature_settings(options), None
    if options.normalise != "speaker":
        statistics = {"mean": data.mean.cpu().T.contiguous(), "std": data.std.cpu().T.contiguous()}  # (F, 1)
    said = [f"trained   {options.dataset}, protocol {options.protocol}, {options.epochs} epochs, speakers "
            + features.listed(data.speakers(fold.train), 24)]
    said += [f"test      {test['name']}: UA {percent(test['ua'])}, WA {percent(test['wa'])} of "
             f"{np.sum(test['confusion'])} utterances" for test in tests]
    said += [f"note      {note}" for note in notes_of(options, data.store.bad)]
    said += [f"classes   {', '.join(data.classes)}",
             f"hears     {options.features}, windows of {options.window:g} s, statistics: {options.normalise}",
             f"network   {options.model}, {sum(p.numel() for p in net.weights()):,} weights",
             "versions  " + ", ".join(f"{name} {version}" for name, version in versions().items()),
             *str(genotype or "").splitlines()]
    return {
        "format": "emodarts-2",
        "model": options.model,
        "sizes": network_sizes(options),
        "genotype": genotype.to_json() if genotype else None,
        "classes": list(data.classes),
        "features": asdict(settings),
        "statistics": statistics,
        "weights": {name: t.cpu().contiguous() for name, t in net.state_dict().items()},
        "said": said,
    }


def score(net, data, name, members, folder, of_another=False):
    """Scores utterances once, and writes a row of predictions for each. -> what result.json says of them. `set` names
    the test sets that are averaged over folds."""
    logits = predict(net, data, members)
    confusion = confusion_matrix(data.labels[members], logits.argmax(1), len(data.classes))
    official = of_another or data.listing.utterances[members[0]].split
    out = io.StringIO(newline="")
    rows = csv.writer(out)
    rows.writerow(["utterance", "label", "predicted", *data.classes])
    for i, p in zip(members, softmax(logits, axis=1)):
        u = data.listing.utterances[i]
        rows.writerow([data.listing.name(u), u.label, data.classes[p.argmax()], *(f"{v:.9g}" for v in p)])
    file = f"predictions-{name}.csv" if official else "predictions.csv"
    write(folder / file, out.getvalue().encode(errors="surrogateescape"))
    return {"name": name, "set": name if official else "test", "speakers": data.speakers(members), "ua": ua(confusion),
            "wa": wa(confusion), "confusion": confusion.tolist(), "predictions": file}


@torch.no_grad()
def predict(net, data, utterances, batch=64, statistics=True):
    """Logits of whole utterances, (utterances, classes): the mean over their windows. Without `statistics` batch norm
    goes by the batch."""
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not statistics:  # also SyncBatchNorm
            module.train()
    window, of = data.windows(utterances)
    logits = torch.cat([net(data.maps(part)) for part in window.split(batch)]).cpu().double()
    total = torch.zeros(len(utterances), logits.shape[1], dtype=logits.dtype).index_add_(0, of, logits)
    return (total / torch.bincount(of)[:, None]).numpy()


def decision(net, genotype, data, validation):
    """Has the search decided? Entropy of the alphas, and the discretisation gap: validation UA of the supernet's
    weights with all operations, and with only the genotype's. BN goes by the batch: its statistics are those of all."""
    with without_statistics(net):
        mixed = predict(net, data, validation, statistics=False)
        with decided(net, genotype):
            alone = predict(net, data, validation, statistics=False)
    labels, classes = data.labels[validation], len(data.classes)
    gap = [ua(confusion_matrix(labels, logits.argmax(1), classes)) for logits in (mixed, alone)]
    return {"entropy": entropy(net), "ua_all_operations": gap[0], "ua_of_genotype": gap[1]}


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


# What outlives the process -------------------------------------------------------------------------------------------
# Files that are whole or not there, and a checkpoint from which the next process goes on with the very next step. Kill,
# power cut and Ctrl-C are one case. What is read back is data: nothing is executed.
ANEW = "delete it, and its fold starts anew"
SAVE_EVERY = 30  # seconds between two checkpoints, or as many times what one takes, where it takes more than a second
COLUMNS = ("stage", "epoch", "lr", "loss", "alpha_loss", "entropy", "skips_normal", "skips_reduce", "skips_seq",
           "val_ua", "val_wa", "seconds")  # of log.csv


def write(file, content):
    """Writes bytes, or what the function `content` writes: all of it or, when the process dies, nothing. Of ranks that
    share the steps the first one alone writes."""
    if ranks()[0]:
        return
    part = file.with_name(file.name + ".part")
    try:
        with open(part, "wb") as out:
            if callable(content):
                content(out)
            else:
                out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except Exception as error:  # a full disk: make room again; torch hides what the disk said
        part.unlink(missing_ok=True)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    os.replace(part, file)


@contextmanager
def reading(file, remedy):
    """Inside, a file is read. Whatever it provokes, and a hostile one may provoke anything, is an InputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError):  # no reason to delete anything
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is damaged or not of this program's version ({why:.150}); {remedy}") from None


def load_file(file):
    """What torch.save wrote. Its check sums are looked at, which torch.load does not do."""
    with zipfile.ZipFile(file) as archive:
        if archive.testzip():
            raise ValueError("its check sums are wrong")
    return torch.load(file, map_location="cpu", weights_only=True)


class Keeper:
    """Where a fold stands: stage, epoch, step, sums of the epoch so far, rows of log.csv, seconds; and, as `parts`, the
    networks and optimisers of the stage. In memory, and every 30 s in checkpoint.pt."""

    KEPT = ("key", "stage", "epoch", "step", "sums", "genotype", "decision", "rows", "seconds")

    def __init__(self, job, progress):
        self.job, self.fold, self.progress, self.file = job, job.fold, progress, job.folder / "checkpoint.pt"
        self.key = f"{key_of(job.options)}, fold {job.fold}"
        self.stage, self.epoch, self.step, self.rows = "search", 0, 0, []
        self.genotype = self.decision = None
        self.sums = {"loss": 0.0, "alpha_loss": 0.0, "seconds": 0.0}
        self.seconds = {"search": 0.0, "train": 0.0}
        self.parts, self.wait = {}, SAVE_EVERY
        self.saved = self.mark = time.perf_counter()
        if self.file.exists():
            with reading(self.file, ANEW):
                found = load_file(self.file)
                if found["key"] != self.key:
                    raise ValueError("of another run or fold")
                for name in (*self.KEPT, "parts"):
                    setattr(self, name, found[name])
                self.genotype = Genotype.from_json(self.genotype) if self.genotype else None
                where = f"{self.stage}, epoch {self.epoch + 1}, step {self.step + 1}"
            progress.say(f"fold {self.fold}: goes on with {where}")

    def resume(self, **parts):
        """The parts of this stage, new ones, become what they were."""
        if self.parts:
            with reading(self.file, ANEW):
                for name, part in parts.items():
                    part.load_state_dict(self.parts[name])
        self.parts, self.mark = parts, time.perf_counter()

    def step_done(self):
        self.step += 1
        if time.perf_counter() - self.saved >= self.wait:
            self.save()

    def epoch_done(self, lr, steps, **row):
        self.tick()
        row |= {"stage": self.stage, "epoch": self.epoch + 1, "lr": lr, "loss": self.sums["loss"] / steps}
        if self.sums["alpha_loss"]:  # of an epoch in which the alphas moved
            row["alpha_loss"] = self.sums["alpha_loss"] / steps
        row["seconds"] = self.sums["seconds"]
        self.rows.append({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()})
        self.epoch, self.step, self.sums = self.epoch + 1, 0, dict.fromkeys(self.sums, 0.0)
        out = io.StringIO(newline="")
        table = csv.DictWriter(out, COLUMNS)
        table.writeheader()
        table.writerows(self.rows)
        write(self.job.folder / "log.csv", out.getvalue().encode())
        self.progress.epoch(self.job, self.rows[-1])

    def search_done(self, genotype):
        self.tick()
        self.stage, self.epoch, self.parts = "train", 0, {}
        self.genotype = genotype
        self.save()

    def tick(self):
        now = time.perf_counter()
        self.seconds[self.stage] += now - self.mark
        self.sums["seconds"] += now - self.mark
        self.mark = now

    def save(self):
        self.tick()
        state = {name: getattr(self, name) for name in self.KEPT}
        state["genotype"] = self.genotype.to_json() if self.genotype else None
        state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        write(self.file, partial(torch.save, state))
        self.saved = time.perf_counter()
        self.wait = SAVE_EVERY * max(1.0, self.saved - self.mark)


# Many processes ------------------------------------------------------------------------------------------------------
# A fold belongs to whoever holds its lock, be that another shell, a job of a cluster or a rank of torchrun; where
# torchrun has more ranks than there are jobs, all of them share each step (data parallel).
def torchrun():
    """-> (number of this process, number of processes) of torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def ranks():
    """-> (number of this rank, number of ranks) that share each step; (0, 1) where none do."""
    there = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)


def share_steps(options, device):
    """From here on `ranks` are those of torchrun."""
    rank, world = torchrun()
    if options.batch < 2 * world:  # batches of equal size can be half of --batch
        raise InputError(f"{world} ranks share batches of --batch {options.batch}, and each needs a part; give --batch "
                         f"{2 * world}, or fewer ranks")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # An optimizer's first step imports this, and it keeps a process group that it finds for good (torch 2.11): the
    # group's threads would then meet the interpreter's end, and may abort it.
    importlib.import_module("torch._dynamo")
    store, rank, world = next(distributed.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store outlives a restart, with the addresses of the dead
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def reduced(loss, gradients):
    """-> their sums over all ranks, by one all_reduce of one buffer: the same bits on every rank."""
    if ranks()[1] == 1:
        return loss, gradients
    flat = torch.cat([t.reshape(-1) for t in (loss, *gradients)])  # (1 + number of parameters,)
    distributed.all_reduce(flat)
    loss, *parts = flat.split([1, *(g.numel() for g in gradients)])
    return loss[0], [part.view_as(g) for part, g in zip(parts, gradients)]


def agreed(value):
    """What the first of the ranks that share the steps says."""
    out = [value]
    if ranks()[1] > 1:
        distributed.broadcast_object_list(out)
    return out[0]


def work(jobs, compute, progress):
    """Computes the jobs that are neither finished nor in another process' hands, until all of them are finished."""
    pause = 0.5
    while left := agreed([job for job in jobs if not job.finished()]):
        took = 0
        for job in left:
            job.folder.mkdir(parents=True, exist_ok=True)
            with lock(job.folder / "lock", wait=False) if ranks()[0] == 0 else nullcontext() as mine:
                if agreed(mine and not job.finished()):
                    compute(job)
                    took += 1
        if not took:
            if pause == 0.5:
                progress.say(f"waits for {len(left)} folds that other processes compute")
            pause = min(2 * pause, 15)
            time.sleep(pause)


class Progress:
    """One line an epoch, with the time left; on a terminal it overwrites the one before."""

    def __init__(self, jobs):
        rank, world = torchrun()
        self.sharing = world if ranks()[1] == 1 else 1  # processes that are known to take folds of their own
        self.prefix = f"rank {rank}: " if self.sharing > 1 else ""
        self.terminal = sys.stdout.isatty() and world == 1
        self.jobs, self.seconds = jobs, {}  # (model, stage) -> seconds of each epoch so far

    def epoch(self, job, row):
        options, stage = job.options, row["stage"]
        self.seconds.setdefault((options.model, stage), []).append(row["seconds"])
        if stage == "search":
            total, seen = options.search_epochs, f"entropy {row['entropy']:.3f}"
        else:
            total, seen = options.epochs, f"validation UA {100 * row['val_ua']:5.1f}"
        self.say(f"{options.model}, seed {options.seed}, fold {job.fold}  {stage:6} {row['epoch']:3}/{total}  "
                 f"{duration(self.left(job, row)):>6} left  loss {row['loss']:.3f}  {seen}", passing=True)

    def left(self, job, row):
        """Seconds left: epochs times what an epoch took, of a kind not seen yet as long as of the fastest kind."""
        mean = {kind: float(np.mean(seconds)) for kind, seconds in self.seconds.items()}
        total = 0.0
        for other in self.jobs:
            options = other.options
            epochs = {"search": options.search_epochs * searches(options), "train": options.epochs}
            if other == job:
                epochs["search"] *= row["stage"] == "search"
                epochs[row["stage"]] -= row["epoch"]
            if not other.finished():
                fastest = min(mean.values())
                total += sum(n * mean.get((options.model, stage), fastest) for stage, n in epochs.items())
        return total / self.sharing

    def say(self, text, passing=False):
        if ranks()[0]:
            return
        if self.terminal and passing:  # what wraps could not be overwritten
            print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            text += "\n"  # in the same write: ranks share a log
            print("\r\033[K" * self.terminal + self.prefix + text, end="", flush=True)


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# Results: functions of the result.json files alone, so that they can be made again at any time -----------------------
def results_of(options, listing, chosen, bad):
    """-> what results.json holds of a run whose folds are finished."""
    folds = []
    for k in chosen:
        file = out_folder(options) / f"fold{k}" / "result.json"
        with reading(file, ANEW):
            folds.append(json.loads(file.read_text()))
            for test in folds[-1]["tests"]:
                confusion = np.array(test["confusion"])
                if (test["ua"], test["wa"]) != (ua(confusion), wa(confusion)):
                    raise ValueError("its accuracies are not those of its confusion matrix")
    sets = {test["set"]: summary(tests_of(folds, test["set"])) for test in folds[0]["tests"]}
    return {"dataset": options.dataset, "protocol": options.protocol, "classes": list(listing.classes),
            "notes": notes_of(options, bad), "skipped": list(bad.values()), "sets": sets,
            "decided": list(decided_text(folds, options)), "folds": folds}


def notes_of(options, bad):
    notes = []
    if options.dataset == "smoke":
        notes.append("smoke is a smoke test with generated sounds, not speech: its figures say nothing about a network")
    if options.normalise == "speaker":
        notes.append("normalised by each speaker's own statistics, which uses the test speakers' unlabelled audio")
    if options.poison:
        notes.append(f"not speaker-independent: {100 * options.poison:g} % of the test utterances were trained on")
    if bad:
        notes.append(f"{len(bad)} recordings cannot be used and were skipped; results.json names them")
    return notes


def tests_of(folds, name):
    """The tests of each fold on the set of this name."""
    return [test for fold in folds for test in fold["tests"] if test["set"] == name]


def summary(tests):
    """Mean, standard deviation (ddof 1; none of a single fold) and pooled value of UA and WA over folds, in 0..1."""
    pooled = sum(np.array(test["confusion"]) for test in tests)
    out = {}
    for name, metric in (("ua", ua), ("wa", wa)):
        values = [test[name] for test in tests]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out[name] = {"mean": float(np.mean(values)), "std": std, "pooled": metric(pooled)}
    return out


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def table(results):
    """The table that a run ends with, in percent; one for each set of test speakers."""
    for name, whole in results["sets"].items():
        rows = []
        for fold, test in zip(results["folds"], tests_of(results["folds"], name)):
            seconds = [f"{fold['seconds'][stage]:.0f} s" for stage in ("search", "train")]
            rows.append([fold["fold"], test["name"], features.listed(fold["validation"], 4), np.sum(test["confusion"]),
                         percent(test["ua"]), percent(test["wa"]), f"{fold['parameters']:,}", *seconds])
        for key in ("mean", "std", "pooled"):
            rows.append([key, "", "", "", percent(whole["ua"][key]), percent(whole["wa"][key]), "", "", ""])
        yield ["fold", "test", "validation", "utterances", "UA", "WA", "parameters", "search", "training"], rows


def as_json(about):
    return (json.dumps(about, indent=1) + "\n").encode()


def markdown(head, rows):
    """A table in Markdown, aligned for those who read it as it is."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    wide = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in wide])
    return "\n".join("| " + " | ".join(map(str.ljust, line, wide)) + " |" for line in lines)


def finish(options, listing, chosen, bad):
    """Of a run whose folds are finished: writes results.json and report.md, prints the table. -> the results."""
    folder, results = out_folder(options), results_of(options, listing, chosen, bad)
    write(folder / "results.json", as_json(results))
    write(folder / "report.md", report(folder, results, options).encode(errors="replace"))
    print(f"\n{options.dataset}, protocol {options.protocol}: {options.model}, seed {options.seed}")
    for head, rows in table(results):
        print(markdown(head, rows))
    print(*results["notes"], f"report.md, results, genotypes, logs, models and predictions are in {folder}", sep="\n")
    return results


def compare(options, runs, results):
    """A row for each model, and for the ensemble of its seeds. Prints the table, and writes it as comparison.md and,
    with UA and WA of each seed and fold, as comparison.json. The others are tested against the first model."""
    models = {}  # model -> its (options, results), one a seed
    for run, result in zip(runs, results):
        models.setdefault(run.model, []).append((run, result))
    first, rows, notes = runs[0].model, [], list(results[0]["notes"])
    for name in results[0]["sets"]:
        values = {model: accuracies(seeds, name) for model, seeds in models.items()}  # (seeds, folds, 2)
        together = {model: ensemble(seeds[: options.seeds], name) for model, seeds in models.items() if len(seeds) > 1}
        for model, seeds in models.items():
            rows.append({"set": name, "model": model, **against(values[model], values[first]), **costs(seeds)})
            if model in together:
                about = against(together[model], together.get(first, values[first]))
                rows.append({"set": name, "model": f"{model}, ensemble", **about})
        if "random" in values and first != "random":
            better = (values["random"][..., 0].mean(axis=1) > values[first][..., 0].mean()).sum()
            notes.append(f"{name}: {better} of {len(values['random'])} random genotypes have a higher UA than {first}")
    heads = [head for head in rows[0] if head not in ("ua", "wa")]
    text = "\n\n".join([
        markdown(heads, [[row.get(head, "") for head in heads] for row in rows]),
        "UA and WA in percent: mean over folds ± standard deviation over folds (± over seeds); p: paired t-test over "
        f"folds against {first}, seeds averaged first, an ensemble against the ensemble; MACs: of 8 s", *notes,
    ])
    folder = out_folder(options)
    about = {"command": command(), "settings": settings_of(options), "versions": versions(), "notes": notes}
    write(folder / "comparison.json", as_json(about | {"rows": rows}))
    write(folder / "comparison.md", (text + "\n").encode())
    print(f"\n{text}\n\nthe same as JSON and Markdown, and all runs, are in {folder}")


def accuracies(seeds, name):
    """UA and WA on a set of test speakers, (seeds, folds, 2)."""
    tests = [tests_of(result["folds"], name) for _, result in seeds]
    return np.array([[(test["ua"], test["wa"]) for test in of_folds] for of_folds in tests])


def against(values, reference):
    """(seeds, folds, 2) of a model, and of what it is tested against -> cells of its row. Seeds are averaged first."""
    difference = (values.mean(axis=0) - reference.mean(axis=0))[:, 0]
    p = ""
    if len(difference) > 1 and np.ptp(difference) > 1e-12:
        p = f"{stats.ttest_1samp(difference, 0).pvalue:.2g}"
    return {"seeds": len(values), "UA": spread(values[..., 0]), "WA": spread(values[..., 1]), "p": p,
            "ua": values[..., 0].tolist(), "wa": values[..., 1].tolist()}


def spread(values):
    """(seeds, folds) -> mean ± standard deviation (ddof 1) over folds (± over seeds), in percent."""
    of_folds, of_seeds = values.mean(axis=0), values.mean(axis=1)
    text = percent(values.mean())
    if len(of_folds) > 1:
        text += f" ± {percent(of_folds.std(ddof=1))}"
    if len(of_seeds) > 1:
        text += f" (± {percent(of_seeds.std(ddof=1))})"
    return text


def costs(seeds):
    """What the runs of a model took, on average over folds and seeds."""
    folds = [fold for _, result in seeds for fold in result["folds"]]
    mean = {key: np.mean([fold[key] for fold in folds]) for key in ("validation_ua", "parameters", "macs")}
    seconds = {stage: np.mean([fold["seconds"][stage] for fold in folds]) for stage in ("search", "train")}
    return {"validation UA": percent(mean["validation_ua"]), "weights": f"{mean['parameters']:,.0f}",
            "MACs": f"{mean['macs'] / 1e6:,.1f} M", "search": f"{seconds['search']:.0f} s",
            "training": f"{seconds['train']:.0f} s", "peak": f"{max(fold['peak_gb'] for fold in folds):.2f} GB"}


def ensemble(seeds, name):
    """-> UA and WA of each fold, (1, folds, 2), when the seeds' logits are averaged. The predictions hold
    probabilities: their logarithms are the logits up to a constant for each utterance, which changes nothing."""
    out = []
    for folds in zip(*(result["folds"] for _, result in seeds)):
        logits = 0
        for (run, _), fold in zip(seeds, folds):
            (test,) = tests_of([fold], name)
            file = out_folder(run) / f"fold{fold['fold']}" / test["predictions"]
            with reading(file, "delete the result.json beside it, and its fold starts anew"):
                rows = list(csv.reader(io.StringIO(file.read_text(errors="surrogateescape"), newline="")))
                classes = rows[0][3:]
                labels = np.array([classes.index(row[1]) for row in rows[1:]])
                logits += np.log(np.maximum(np.array([row[3:] for row in rows[1:]], dtype=float), 1e-300))
        confusion = confusion_matrix(labels, logits.argmax(1), len(classes))
        out.append([ua(confusion), wa(confusion)])
    return np.array(out)[None]


# report.md -----------------------------------------------------------------------------------------------------------
CURVES = (  # title, stage and column of log.csv, factor, top of the axis (None: the largest value)
    ("search: loss of the weights", "search", "loss", 1, None),
    ("search: loss of the alphas", "search", "alpha_loss", 1, None),
    ("search: entropy of the alphas (1: undecided, 0: decided)", "search", "entropy", 1, 1),
    ("training: loss", "train", "loss", 1, None),
    ("training: UA of the validation speakers, percent", "train", "val_ua", 100, 100),
)


def report(folder, results, options):
    """Made of results.json, log.csv and the settings alone. -> Markdown, with Mermaid graphs."""
    folds = results["folds"]
    title = f"# {plain(results['dataset'])}, protocol {results['protocol']}: {options.model}, seed {options.seed}"
    text = [title, "Percent; mean and standard deviation over folds.", *map(plain, results["notes"]), "## Results"]
    text += [markdown(head, rows) for head, rows in table(results)]
    text += ["## Confusion", "Rows: what it was. Columns: what it was taken for. All folds together."]
    for name in results["sets"]:
        pooled = sum(np.array(test["confusion"]) for test in tests_of(folds, name))
        recalls = [percent(row[c] / row.sum()) if row.sum() else "-" for c, row in enumerate(pooled)]
        heads = [name, *map(plain, results["classes"]), "recall, %"]
        text.append(markdown(heads, [[c, *row, r] for c, row, r in zip(heads[1:], pooled, recalls)]))
    genotypes = {fold["fold"]: fold["genotype"] for fold in folds if fold["genotype"]}  # none of a baseline
    if genotypes:
        text += ["## Has the search decided?", *results["decided"], "## The genotypes",
                 "An edge is labelled with its operation; inputs 0 and 1 are the outputs of the two cells before. A "
                 "search that collapses has `skip_connect` nearly everywhere."]
    for k, genotype in genotypes.items():
        graphs = "\n\n".join(graph(kind, cell) for kind, cell in genotype.items())
        text.append(f"<details><summary>Fold {k}</summary>\n\n{graphs}\n\n</details>")
    text.append("## Learning curves\n\nMeans over the folds, epoch by epoch.")
    for title, stage, column, factor, top in CURVES:
        values = [factor * v for v in curve(folder, folds, stage, column)]
        if len(values) > 1:
            axes = f'    x-axis 1 --> {len(values)}\n    y-axis 0 --> {top or 1.1 * max(values) or 1:.4g}'
            points = ", ".join(f"{v:.4g}" for v in values)
            text.append(f'```mermaid\nxychart-beta\n    title "{title}"\n{axes}\n    line [{points}]\n```')
    settings = [[name, plain(value)] for name, value in (settings_of(options) | versions()).items()]
    text += ["## Settings", f"    {command()}", markdown(["setting", "value"], settings)]
    return "\n\n".join(text) + "\n"


def plain(text):
    """For Markdown, in which a corpus' names may mean something."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&$!])", r"\\\1", " ".join(str(text).split()))


def curve(folder, folds, stage, column):
    """The mean of the folds at each epoch. The alphas have no loss while the weights warm up."""
    values = []
    for fold in folds:
        file = folder / f"fold{fold['fold']}" / "log.csv"
        with reading(file, "delete its fold's folder, and the fold starts anew"):
            rows = csv.DictReader(io.StringIO(file.read_text()))
            values.append([float(row[column]) for row in rows if row["stage"] == stage and row[column]])
    return [np.mean(epoch) for epoch in zip(*values)]


def graph(kind, cell):
    """A cell as a Mermaid graph: states 0 and 1 are its inputs, the others its nodes."""
    lines = ["```mermaid", "graph LR", f'    s0(["{kind}: input 0"])', '    s1(["input 1"])']
    for i, node in enumerate(cell, start=2):
        lines.append(f'    s{i}["node {i}"]')
        lines += [f'    s{j} -->|"{op}"| s{i}' for op, j in node]
        lines.append(f'    s{i} --> out(["output"])')
    return "\n".join([*lines, "```"])


def agreement(genotypes, options):
    """Searched edges that two folds' genotypes have in common (predecessor and operation), on average over all pairs
    of folds; the same of random genotypes; and the share of 1,000 random sets that agree as much."""
    rng, folds, draws = np.random.default_rng(0), len(genotypes), 1000
    common, edges, chance = 0, 0, np.zeros(draws)
    for kind, cell in genotypes[0].items():
        if kind in fixed_cells(options).cells():
            continue
        ops = SEQ_SPACES[options.seq_space] if kind == "seq" else tuple(CNN_OPS)
        for i in range(2, 2 + len(cell)):
            found = Counter((op, j) for genotype in genotypes for op, j in genotype[kind][i - 2])
            common += sum(n * (n - 1) / 2 for n in found.values())
            edges += len(cell[i - 2])
            kept = rng.random((draws, folds, i)).argsort(axis=2) < 2  # two predecessors, each pair equally likely
            op = rng.integers(len(ops) - 1, size=kept.shape)  # never `none`
            for k in range(len(ops) - 1):
                n = (kept & (op == k)).sum(axis=1)
                chance += (n * (n - 1) / 2).sum(axis=1)
    pairs = folds * (folds - 1) / 2
    return {"edges": edges, "common": common / pairs, "chance": chance.mean() / pairs,
            "p": float((1 + (chance >= common).sum()) / (1 + draws))}


def decided_text(folds, options):
    """What `decision` and `agreement` found, in sentences."""
    searched = [fold["decision"] for fold in folds if fold["decision"]]
    if searched:
        mean = {key: np.mean([decision[key] for decision in searched]) for key in searched[0]}
        yield (f"Entropy of the alphas at the end (1: undecided, 0: decided): {mean['entropy']:.4f}. Validation UA of "
               f"the supernet's weights with all operations {percent(mean['ua_all_operations'])}, with those of the "
               f"genotype alone {percent(mean['ua_of_genotype'])}.")
    if len(searched) > 1:
        found = agreement([fold["genotype"] for fold in folds], options)
        yield (f"Two folds' genotypes have {found['common']:.1f} of {found['edges']} edges in common, random ones "
               f"{found['chance']:.1f}; {100 * found['p']:.2g} % of random sets agree as much.")


# What it will cost ---------------------------------------------------------------------------------------------------
def peak_memory(device):
    """Most memory held since `reset_peak`, GB: on a GPU by tensors, on a CPU by the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not Path("/proc/self/status").exists():
        return None
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def macs(net, shape):
    """Multiply-accumulates for one window (F, T), of convolutions, linear and recurrent layers: at each position of the
    output each entry of a weight matrix once. (torch's own counter sees nothing of an LSTM on a CPU.)"""
    counts = []

    def add(module, inputs, output):
        y = output[0] if isinstance(output, tuple) else output
        width = y.shape[1] if isinstance(module, nn.Conv2d) else y.shape[-1]
        counts.append(y.numel() // width * sum(w.numel() for w in module.parameters() if w.dim() > 1))

    counted = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.RNNBase))]
    hooks = [module.register_forward_hook(add) for module in counted]
    net.eval()(torch.zeros(1, 1, *shape, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def steps_of(options, windows, parts, classes, device):
    """-> for each kind of step: its name, a function that makes one, with noise of the real size, and how many a run
    makes. One after the other: a supernet is gone before its derived network's steps are measured."""
    x = torch.randn(options.batch, 1, *feature_settings(options).shape, device=device)
    batch = x, torch.arange(options.batch, device=device) % classes
    loss = partial(cross_entropy, weight=torch.ones(classes, device=device))
    sides = [(fold.train[::2], fold.train, fold.validation) for fold in parts]
    batches = [[math.ceil(windows[members].sum() / options.batch) for members in fold] for fold in sides]
    halves, wholes, looks = np.sum(batches, axis=0).tolist()

    def weight(net, optimizer, constants=()):
        with held_fixed(constants):
            weight_step(loss(net(batch[0]), batch[1]), optimizer)

    genotype = given_genotype(options)
    if searches(options):
        net = placed(network(options, classes), device)
        genotype = derive(net)
        yield ("alpha step", partial(Architect(net, loss, order=options.order).step, batch, batch, 1e-3),
               halves * (options.search_epochs - options.warm_up))
        yield ("weight step", partial(weight, net, optimizer_of(net, options), net.alphas()),
               halves * options.search_epochs)
    net = placed(final_network(options, classes, genotype), device)
    yield "training step", partial(weight, net, optimizer_of(net, options)), wholes * options.epochs
    yield "look", torch.no_grad()(partial(net, batch[0])), looks * options.epochs


def seconds_of(step, device):
    """Median seconds of the later steps: the first ones are slower, and with sampled operations no two are alike."""
    times = []
    while len(times) < 5 or (len(times) < 30 and sum(times) < 30):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return float(np.median(times[len(times) // 2 :]))


def gigabytes(peak):
    return f"{peak:.3g} GB" if peak else "? GB"  # where the system does not say


def dry_run(options, runs, listing, parts, chosen, device):
    """Says what would happen and what it costs, measured with a network of each model here. -> the same for machines"""
    about_folds = list(features.describe_folds(listing, parts))
    parts = [parts[k] for k in chosen]
    windows, lengths = features.lengths(listing, options.window)
    print(f"corpus    {options.dataset}, protocol {options.protocol}: {len(listing.utterances)} utterances, "
          f"{lengths.sum() / 60:.1f} minutes, {windows.sum()} windows of {options.window:g} s")
    with torch.device("meta"):
        net = network(options, len(listing.classes))
    for name, part in {"supernet": net, "CNN cells": net.cnn, "SeqNN cells": net.seq}.items():
        print(f"weights   {name}: {sum(p.numel() for p in part.parameters()):,}")
    seconds, peaks, total = {}, {}, 0.0  # of a step of each kind
    for model in dict.fromkeys(run.model for run in runs):
        same = [run for run in runs if run.model == model]
        for kind, step, number in steps_of(same[0], windows, parts, len(listing.classes), device):
            kind = f"{model}, {kind}"
            reset_peak(device)
            seconds[kind] = seconds_of(step, device)
            peaks[kind] = peak_memory(device) or 0.0
            total += len(same) * number * seconds[kind]
            print(f"cost      {kind}: {len(same) * number:,} of {seconds[kind]:.3g} s, {gigabytes(peaks[kind])}")
    peak = max(peaks.values())
    print(f"in all    about {duration(total)} on {device}, peak memory {gigabytes(peak)}",
          *(about_folds[k] for k in chosen), sep="\n")
    print(f"a dry run: nothing was written; a run goes to {out_folder(options)}")
    return {"command": command(), "settings": settings_of(options), "device": str(device), "versions": versions(),
            "threads": torch.get_num_threads(), "seconds_of_a_step": seconds, "peak_gb_of_a_step": peaks,
            "seconds": total, "peak_gb": peak}


def answer(file, about):
    """To --json FILE, or for - to the standard output."""
    if file == "-":
        print(as_json(about).decode(), end="")
    elif file:
        write(Path(file), as_json(about))


# A model that is used again ------------------------------------------------------------------------------------------
def read_model(file):
    """-> what model.pt holds, and as "net" its network."""
    with reading(file, "name a run folder, or a model.pt that this program wrote"):
        model = load_file(file)
        if model["format"] != "emodarts-2":
            raise ValueError(f"format {model['format']!r}, expected emodarts-2")
        settings, classes, sizes = features.Settings(**model["features"]), model["classes"], model["sizes"]
        with torch.device("meta"):  # whatever sizes a file announces, memory is taken for the weights that it holds
            if model["model"] in BASELINES:
                net = Baseline(model["model"], len(classes), settings.coefficients)
            else:
                net = Network(classes=len(classes), genotype=Genotype.from_json(model["genotype"]), **sizes)
        net.load_state_dict(model["weights"], assign=True)
        with torch.no_grad():
            if not net.eval()(torch.zeros(1, 1, *settings.shape)).isfinite().all():
                raise ValueError("its weights are not finite")
    return model | {"net": net}


def read_models(place):
    """{file: model} of one file, or of all folds of a run folder, in order."""
    files = [Path(place)]
    if files[0].is_dir():
        files = sorted([*files[0].glob("model.pt"), *files[0].glob("fold*/model.pt")], key=lambda f: (len(str(f)), f))
    if not (files and files[0].is_file()):
        raise InputError(f"--from is {place}, where no model is; expected a run folder with fold0/model.pt, or a file")
    models = {file: read_model(file) for file in files}
    for name in ("classes", "features"):
        if len({json.dumps(model[name]) for model in models.values()}) > 1:
            raise InputError(f"the models in {place} differ in their {name}; name one of them")
    return models


@torch.no_grad()
def hear(models, paths, device):
    """-> for each clip what --json writes of it. Several models: the mean of their probabilities. A model without
    statistics (--normalise speaker) takes all clips as one speaker's."""
    settings, classes = features.Settings(**models[0]["features"]), models[0]["classes"]
    clips, bad = {}, []
    for path in paths:
        try:
            samples = features.read_wav(path)
            cut = [features.transform(settings)(torch.from_numpy(w)) for w in features.windows(samples, settings)]
            clips[path] = torch.stack(cut).half().float(), len(samples) / features.RATE  # rounded as in training
        except (InputError, OSError) as error:
            bad.append(str(error))
    if bad:
        raise InputError("\n  ".join([f"{len(bad)} of {len(paths)} clips cannot be used:", *bad]))
    everything = torch.cat([maps for maps, _ in clips.values()]).double()  # (W, F, T)
    mean, square = everything.mean((0, 2)), everything.square().mean((0, 2))
    own = {"mean": mean.float()[:, None], "std": (square - mean**2).clamp(min=1e-10).sqrt().float()[:, None]}
    answers = []
    for path, (maps, seconds) in clips.items():
        logits = []  # of each model, (W, classes)
        for model in models:
            by = model["statistics"] or own
            x = ((maps - by["mean"]) / by["std"])[:, None]
            logits.append(torch.cat([model["net"].to(device)(part.to(device)).cpu().double() for part in x.split(64)]))
        logits = torch.stack(logits)  # (models, W, classes)
        about = {"path": str(path), "seconds": seconds, **opinion(logits.mean(1), classes), "windows": []}
        for n in range(len(maps)):  # the last window ends with the clip
            start = max(0.0, min(n * settings.window, seconds - settings.window))
            times = {"start": start, "end": min(start + settings.window, seconds)}
            about["windows"].append(times | opinion(logits[:, n], classes))
        answers.append(about)
    return answers


def opinion(logits, classes):
    """(models, classes) -> the mean of the models' probabilities, and the class that it names."""
    p = logits.softmax(1).mean(0)
    return {"label": classes[p.argmax()], "probabilities": dict(zip(classes, p.tolist()))}


def use(options):
    """--from RUN, with --predict or alone."""
    if not options.from_:
        raise InputError("--predict CLIP ... needs --from RUN, a run folder or a model file")
    device, models = pick_device(options.device), read_models(options.from_)
    if not options.predict:
        for file, model in models.items():
            print(file, *model["said"], sep="\n  ")
        return
    clips = hear(list(models.values()), options.predict, device)
    if not next(iter(models.values()))["statistics"]:
        print(f"note: the {len(clips)} clips are taken as one speaker's, with statistics of their own", file=sys.stderr)
    answer(options.json, {"from": options.from_, "models": len(models), "clips": clips})
    if options.json == "-":
        return
    for clip in clips:
        lines = {clip["path"]: clip}
        if len(clip["windows"]) > 1:
            lines |= {f"  {part['start']:.1f} to {part['end']:.1f} s": part for part in clip["windows"]}
        for name, said in lines.items():
            probabilities = "  ".join(f"{c} {p:.3f}" for c, p in said["probabilities"].items())
            print(f"{name}  {said['label']}  {probabilities}")


# The command ---------------------------------------------------------------------------------------------------------
def plan(options):
    """Options of a command's runs, one for each model and seed; those with a search first, as they take longest."""
    seeds = range(options.seed, options.seed + options.seeds)
    runs = [(options.model, seed) for seed in seeds]
    if options.compare is not None:
        runs += [(model, seed) for model in ("emodarts", *BASELINES) if model != options.model for seed in seeds]
        runs += [("random", options.seed + n) for n in range(options.compare)]
    if len(runs) == 1:
        return [options]
    made = []
    for model, seed in runs:
        genotype = options.genotype if model == options.model else None
        out = str(out_folder(options) / f"{model}-seed{seed}")
        made.append(replace(options, model=model, seed=seed, genotype=genotype, out=out))
    return made


def claim(options):
    """Makes the folder of a run; refuses one that already holds a run with other settings: nothing is lost."""
    folder, mine = out_folder(options), settings_of(options)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    with lock(folder / "lock", wait=True):
        if not file.exists():  # those that the run was begun with stay
            return write(file, as_json({"options": mine, "command": command(), "versions": versions()}))
        with reading(file, "give another --out, or delete the folder"):
            there = json.loads(file.read_text())["options"]
            differ = [f"{name} ({there.get(name)!s:.80} there, {value} here)" for name, value in mine.items()
                      if there.get(name) != value]
    if differ:
        raise InputError(f"{folder} holds a run with other settings: {', '.join(differ)}; give another --out")


def command():
    return shlex.join(["python", "train.py", *sys.argv[1:]])


@cache
def versions():
    commit = ""
    if shutil.which("git"):
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = {"torch": torch.__version__, "torchaudio": torchaudio.__version__}
    return {"python": sys.version.split()[0], **packages, "commit": commit}


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of torchrun: each process of a machine takes a GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({why}); cpu always can") from None
    return torch.device(name)


def second_corpus(options, classes):
    """Listing of --test-dataset NAME=DIR; None without it."""
    if not options.test_dataset:
        return None
    name, _, root = options.test_dataset.partition("=")
    other = features.read_corpus(name, root or None, options.classes)
    unknown = set(other.classes) - set(classes)
    if unknown:
        raise InputError(f"{name} has the classes {', '.join(sorted(unknown))}, and {options.dataset} does not; what "
                         "is tested must be trained")
    return other


def run(argv):
    options = parse(argv)
    if platform.libc_ver()[0] == "glibc":  # it gives freed memory back and asks for it again, a tenth of a step's time
        for parameter, value in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, its largest, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.predict or options.from_:
        return use(options)
    with tempfile.TemporaryDirectory() as scratch:
        if options.dry_run and options.dataset == "smoke":  # it is generated where it is not there
            options.root = options.root or scratch
        device, listing, parts, chosen, other = check(options)
        runs = plan(options)
        if options.dry_run:
            with redirect_stdout(sys.stderr if options.json == "-" else sys.stdout):
                about = dry_run(options, runs, listing, parts, chosen, device)
            return answer(options.json, about)
    jobs = [Job(part, k, out_folder(part) / f"fold{k}") for part in runs for k in chosen]
    if len(jobs) < torchrun()[1]:
        share_steps(options, device)
    for part in runs:
        claim(part)
    out_folder(options).mkdir(parents=True, exist_ok=True)
    progress = Progress(jobs)
    data = load(options, listing, listing.classes, device, progress)
    other = other and load(options, other, listing.classes, device, progress)
    parts = features.folds(listing, data.store.bad)
    for note in notes_of(options, data.store.bad):
        progress.say(note)
    work(jobs, partial(run_fold, data=data, parts=parts, other=other, progress=progress), progress)
    if torchrun()[0] == 0:
        with lock(out_folder(options) / "lock", wait=True):  # another shell may end at the same moment
            results = [finish(part, listing, chosen, data.store.bad) for part in runs]
            if len(runs) > 1:
                compare(options, runs, results)
    if ranks()[1] > 1:
        distributed.destroy_process_group()


def load(options, listing, classes, device, progress):
    """-> Data of a corpus, whose features are computed if they are not there."""
    store = features.load(listing, feature_settings(options), options.cache, skip_bad=options.skip_bad,
                          progress=lambda text: progress.terminal and progress.say(text, passing=True))
    return Data(listing, store, classes, options.normalise, device)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    rank, world = torchrun()
    name = f"rank {rank}: error" if world > 1 else "error"
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        print(f"\nstopped; this goes on from here:\n  {shlex.join(['python', 'train.py', *argv])}", file=sys.stderr)
        return 130
    except (InputError, OSError, NotFinite) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, NotFinite) else 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        why = (str(error).splitlines() or [""])[0]
        print(f"{name}: out of memory ({why:.200}); the last checkpoint is whole. Less is taken by --relaxation "
              "sample, --recompute, a smaller --batch, --channels or --nodes", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
