"""emoDARTS: joint differentiable architecture search of a CNN and a sequential network (SeqNN)
for speech emotion recognition, in one file that needs torch alone.

    net = Network(classes=4)                                   # no genotype: the supernet
    architect = Architect(net, loss)                           # moves the alphas
    genotype = derive(net)                                     # reads the alphas
    net = Network(classes=4, genotype=genotype)                # the derived network, to be trained from scratch

The problem is bi-level: find the alphas (which operation stands on which edge) that are best on validation
data when the weights w are those that are best on training data *for these alphas*:

    alpha* = argmin_alpha L_val(w*(alpha), alpha)     s.t.     w*(alpha) = argmin_w L_train(w, alpha)

Read on in this order: operations, MixedOp (a choice made continuous), Cell (a graph of mixed operations),
Genotype (the choice made discrete again), Network (cells from MFCC map to logits), derive, Architect (the hypergradient).

Shapes: a map is (N, C, F, T) = batch, channels, feature axis, time axis; a sequence is (N, T, D) = batch, time, width.

[P]  Rajapakshe et al., "emoDARTS: Joint Optimisation of CNN & Sequential Neural Network Architectures for Superior
     Speech Emotion Recognition", IEEE Access 12, 2024 (arXiv 2403.14083)
[D]  Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019 (arXiv 1806.09055)
"""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# CNN operations: (N, C, F, T) -> (N, C, ceil(F / stride), ceil(T / stride)). All paths through a cell must agree in
# size, for odd sizes too, hence "ceil" everywhere. `affine`: whether batch norm (BN) learns a scale and a shift. While
# searching it does not: a learned scale would undo what alpha says about the operation.


class Zero(nn.Module):
    """`none`: no connection. Zeros of the shape that the other operations return."""

    def __init__(self, stride=1):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])


class EvenGrid(nn.Module):
    """(N, C, F, T) -> (N, C, ceil(F / 2), ceil(T / 2)): every other row and column."""

    def forward(self, x):
        return x[:, :, ::2, ::2]


class BothGrids(nn.Module):
    """(N, C, F, T) -> (N, 2C, ceil(F / 2), ceil(T / 2)): the even grid, and behind it the one between its points."""

    def forward(self, x):
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))  # odd sizes: both grids get ceil(size / 2)
        return torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], dim=1)


def factorized_reduce(c_in, c_out, affine):
    """`skip_connect` with stride 2: (N, C_in, F, T) -> (N, C_out, ceil(F / 2), ceil(T / 2)), C_out even.

    Half of the output channels look at the even grid, half at the odd one. The grids come first: a 1x1 convolution with
    stride 2 is the same, and corrupts memory on CPU with channels_last (torch 2.11).
    """
    convolution = nn.Conv2d(2 * c_in, c_out, 1, groups=2, bias=False)
    return nn.Sequential(nn.ReLU(), BothGrids(), convolution, nn.BatchNorm2d(c_out, affine=affine))


def conv_1x1(c_in, c_out, affine):
    """Brings an input of a cell to the cell's channels: (N, C_in, F, T) -> (N, C_out, F, T)."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine))


def dil_conv(c, stride, affine, *, kernel, dilation=2):
    """ReLU, depthwise kernel x kernel, pointwise 1x1, BN."""
    grid = []
    if stride == dilation == 2:  # then only the even grid is ever looked at: the same numbers, several times faster on CPU
        grid, stride, dilation = [EvenGrid()], 1, 1
    return nn.Sequential(
        nn.ReLU(),
        *grid,
        nn.Conv2d(c, c, kernel, stride, dilation * (kernel // 2), dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        nn.BatchNorm2d(c, affine=affine),
    )


def sep_conv(c, stride, affine, *, kernel):
    """(ReLU, depthwise kernel x kernel, pointwise 1x1, BN) twice, without dilation."""
    half = partial(dil_conv, kernel=kernel, dilation=1)
    return nn.Sequential(*half(c, stride, affine), *half(c, 1, affine))


def pool(c, stride, affine, *, layer):
    return nn.Sequential(layer(3, stride, padding=1), nn.BatchNorm2d(c, affine=affine))


def skip(c, stride, affine):
    return nn.Identity() if stride == 1 else factorized_reduce(c, c, affine)


# name -> constructor(channels, stride, affine)
CNN_OPS = {
    "none": lambda c, stride, affine: Zero(stride),
    "max_pool_3x3": partial(pool, layer=nn.MaxPool2d),
    "avg_pool_3x3": partial(pool, layer=partial(nn.AvgPool2d, count_include_pad=False)),
    "skip_connect": skip,
    "sep_conv_3x3": partial(sep_conv, kernel=3),
    "sep_conv_5x5": partial(sep_conv, kernel=5),
    "dil_conv_3x3": partial(dil_conv, kernel=3),
    "dil_conv_5x5": partial(dil_conv, kernel=5),
}


# ---------------------------------------------------------------------------------------------------------------------
# SeqNN operations: (N, T, D) -> (N, T, D). The recurrence runs over time, within an utterance; never over the batch.


class Recurrent(nn.Module):
    """`lstm_k`, `rnn_k`: k stacked layers, one direction."""

    def __init__(self, width, *, layer, layers):
        super().__init__()
        self.rnn = layer(width, width, layers, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class RecurrentAttention(nn.Module):
    """`lstm_att_k`, `rnn_att_k`: k stacked bidirectional layers, then additive attention over time.

    With h_t the output at frame t and q the final hidden state of both directions (each 2D wide):
        a = softmax over t of  v . tanh(W [h_t, q]),      context = sum_t a_t h_t,      y_t = P [h_t, context]
    """

    def __init__(self, width, *, layer, layers):
        super().__init__()
        self.rnn = layer(width, width, layers, batch_first=True, bidirectional=True)
        self.score = nn.Sequential(nn.Linear(4 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        self.project = nn.Linear(4 * width, width)

    def forward(self, x):  # (N, T, D)
        h, last = self.rnn(x)  # h (N, T, 2D); last (2 * layers, N, D), for an LSTM a pair of it and the cell state
        last = last[0] if isinstance(last, tuple) else last
        q = torch.cat([last[-2], last[-1]], dim=1)[:, None].expand_as(h)  # (N, 2D) -> (N, T, 2D)
        a = self.score(torch.cat([h, q], dim=2)).softmax(dim=1)  # (N, T, 1), sums to 1 over T
        context = (a * h).sum(dim=1, keepdim=True).expand_as(h)  # (N, 1, 2D) -> (N, T, 2D)
        return self.project(torch.cat([h, context], dim=2))  # (N, T, 4D) -> (N, T, D)


# name -> constructor(width)
SEQ_OPS = {
    "none": lambda width: Zero(),
    "skip_connect": lambda width: nn.Identity(),
    **{f"lstm_{k}": partial(Recurrent, layer=nn.LSTM, layers=k) for k in (1, 2, 3, 4)},
    **{f"rnn_{k}": partial(Recurrent, layer=nn.RNN, layers=k) for k in (1, 2, 3, 4)},
    **{f"lstm_att_{k}": partial(RecurrentAttention, layer=nn.LSTM, layers=k) for k in (1, 2)},
    **{f"rnn_att_{k}": partial(RecurrentAttention, layer=nn.RNN, layers=k) for k in (1, 2)},
}

# The paper's restricted spaces: one family of operations each, plus `none` and `skip_connect`.
SEQ_SPACES = {"all": tuple(SEQ_OPS)}
for _family, _depths in {"lstm": 4, "rnn": 4, "lstm_att": 2, "rnn_att": 2}.items():
    SEQ_SPACES[_family] = ("none", "skip_connect", *(f"{_family}_{k + 1}" for k in range(_depths)))


# ---------------------------------------------------------------------------------------------------------------------
# The mixed operation, and the cell: a graph of them.


def drop_path(x, p):
    """Zeroes an edge's or an operation's output for a random share `p` of the utterances, and scales the others by 1 / (1 - p)."""
    keep = torch.empty(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    return x * keep / (1 - p)


def through(op, x, known):
    """op(x). `known` remembers what the modules before the first weights have returned for this x, as several operations
    have them in common (`Cell.share`)."""
    begins = True
    for module in op if isinstance(op, nn.Sequential) else (op,):
        begins = begins and not any(True for _ in module.parameters())
        if begins:
            if module not in known:
                known[module] = module(x)
            x = known[module]
        else:
            x = module(x)
    return x


class MixedOp(nn.Module):
    """An edge that is not yet decided: every candidate operation, weighted by the softmax of its alpha [D eq. 2],

        o_bar(x) = sum_o softmax(alpha)_o * o(x)

    `ops`: name -> module; all return the same shape. `weight`: softmax(alpha), shape (len(ops),). Without `weight` the
    edge is decided and holds one operation. `known`: see `through`. `p_drop`: while training, the share of utterances for
    which an operation that has nothing to learn is dropped. Such operations are good from the first step, long before the
    convolutions are, and a search that is not held back ends with little else (Chen et al., "P-DARTS", ICCV 2019).
    """

    AHEAD = ("max_pool_3x3", "avg_pool_3x3", "skip_connect")

    def __init__(self, ops):
        super().__init__()
        self.ops = nn.ModuleDict(ops)

    def forward(self, x, weight=None, known=None, p_drop=0.0):
        if weight is None:
            (op,) = self.ops.values()
            return op(x) if known is None else through(op, x, known)
        y = None  # `none` adds nothing to the sum; its alpha still counts, as it takes its share of the softmax
        for w, (name, op) in zip(weight, self.ops.items()):
            if name != "none":
                out = op(x) if known is None else through(op, x, known)
                if self.training and p_drop > 0 and name in self.AHEAD:
                    out = drop_path(out, p_drop)
                y = w * out if y is None else y.addcmul_(w, out)  # y + w * out without a copy of y
        return y


@contextmanager
def without_statistics(net):
    """Inside, batch norm in training mode normalises by the batch as always, but updates copies of its running statistics."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [(m, name, getattr(m, name)) for m in norms for name in ("running_mean", "running_var", "num_batches_tracked")]
    for m, name, statistic in kept:
        setattr(m, name, statistic.clone())
    try:
        yield
    finally:
        for m, name, statistic in kept:
            setattr(m, name, statistic)


class Cell(nn.Module):
    """A directed acyclic graph. States 0 and 1 are the outputs of the two cells before; state i >= 2 (a node) is the
    sum of its incoming edges, i.e. sum_j edge_ji(state j), j < i; the output is the concatenation of the nodes.

    `wiring`: for each node the list of its edges (j, names of the candidate operations): many names before the search
    has decided, one after. The cell does not care which. `make(name, j)` builds an operation for an edge that starts
    at state j. Edge and operation keep their names in `state_dict`, so a derived cell's keys are among the supernet's.
    """

    concat = 1  # the axis of C in (N, C, F, T)
    recompute, shares = False, True

    def __init__(self, kind, wiring, make, before=(nn.Identity, nn.Identity)):
        super().__init__()
        self.kind = kind
        self.before = nn.ModuleList(make_input() for make_input in before)
        self.edges = nn.ModuleDict()
        self.leaving = [[] for _ in range(len(wiring) + 2)]  # of each state j, its edges: (node i, row of the alphas)
        for i, node in enumerate(wiring, start=2):
            for j, names in node:
                self.leaving[j].append((i, len(self.edges)))
                self.edges[f"{j}_{i}"] = MixedOp({name: make(name, j) for name in names})
        for j in range(len(self.leaving)):
            self.share(j)

    def share(self, j):
        """Of the edges that leave state j, operations that begin alike get one module for it as long as it has no
        parameters: the ReLU, the grid, pooling with the BN that follows while it has no scale."""
        begun = {}
        for i, _ in self.leaving[j]:
            for op in self.edges[f"{j}_{i}"].ops.values():
                for k, module in enumerate(op if isinstance(op, nn.Sequential) else ()):
                    if any(True for _ in module.parameters()):
                        break
                    op[k] = begun.setdefault(repr(op[: k + 1]), module)

    def forward(self, s0, s1, weight=None, p_drop=0.0):
        """`weight`: softmax(alpha), (edges, operations), edges ordered by node, then predecessor; None when derived. `p_drop`:
        while searching that of `MixedOp`, of a decided cell the share of utterances for which an edge is dropped (drop-path)."""
        states = [before(s) for before, s in zip(self.before, (s0, s1))]
        arrived = [[] for _ in self.leaving]
        for j, edges in enumerate(self.leaving):
            if j >= 2:
                states.append(reduce(torch.add, arrived[j]))
            outputs = []
            for part in [edges] if self.shares else [[edge] for edge in edges]:
                if self.recompute and torch.is_grad_enabled():  # keep the state only, and compute its edges again on the way back
                    outputs += checkpoint(  # the second time BN leaves its statistics alone: a batch counts once
                        self.leave, part, j, states[j], weight, p_drop, use_reentrant=False,
                        context_fn=lambda: (nullcontext(), without_statistics(self)),
                    )  # fmt: skip
                else:
                    outputs += self.leave(part, j, states[j], weight, p_drop)
            for (i, _), y in zip(edges, outputs):
                if weight is None and self.training and p_drop > 0 and "skip_connect" not in self.edges[f"{j}_{i}"].ops:  # a skip keeps the path alive
                    y = drop_path(y, p_drop)
                arrived[i].append(y)
        return torch.cat(states[2:], dim=self.concat)

    def leave(self, edges, j, x, weight, p_drop):
        """State j -> the outputs of edges that leave it. What they have in common is computed once."""
        known = {}
        return [self.edges[f"{j}_{i}"](x, None if weight is None else weight[row], known, p_drop) for i, row in edges]


class CNNCell(Cell):
    """(N, c0, F0, T0), (N, c1, F, T) -> (N, nodes * c, F, T), or (N, nodes * c, ceil(F / 2), ceil(T / 2)) if `reduce`.

    A reduction cell (`kind` "reduce") has stride 2 on the edges that leave its two inputs. After a reduction cell the
    older input is still twice as large (`halve_s0`) and is halved on the way in.
    """

    def __init__(self, kind, wiring, c0, c1, c, halve_s0, affine):
        super().__init__(
            kind,
            wiring,
            lambda name, j: CNN_OPS[name](c, 2 if kind == "reduce" and j < 2 else 1, affine),
            before=(partial(factorized_reduce if halve_s0 else conv_1x1, c0, c, affine), partial(conv_1x1, c1, c, affine)),
        )


class SeqCell(Cell):
    """(N, T, D), (N, T, D) -> (N, T, D). Adaptive average pooling brings the nodes * D features back to D."""

    concat = 2  # the axis of D in (N, T, D)
    shares = False  # its operations have nothing in common, and less memory is taken when edges are computed again one by one

    def __init__(self, wiring, width):
        super().__init__("seq", wiring, lambda name, j: SEQ_OPS[name](width))
        self.width = width

    def forward(self, *args):
        return F.adaptive_avg_pool1d(super().forward(*args), self.width)  # (N, T, nodes * D) -> (N, T, D)


# ---------------------------------------------------------------------------------------------------------------------
# The genotype: what a search has found.


@dataclass(frozen=True)
class Genotype:
    """A decided architecture: one graph for all normal CNN cells, one for all reduction cells, one for all SeqNN cells.
    A cell is None when the network's depth does not use it.

    A cell is a tuple of nodes, a node a tuple of edges, an edge a pair (operation, predecessor); predecessors 0 and 1
    are the cell's inputs, 2 its first node. Raises ValueError when that is not what it is given.
    """

    normal: tuple = None
    reduce: tuple = None
    seq: tuple = None

    def __post_init__(self):
        for kind in ("normal", "reduce", "seq"):
            if getattr(self, kind) is not None:
                object.__setattr__(self, kind, self._checked(kind, getattr(self, kind)))

    @staticmethod
    def _checked(kind, cell):
        known = SEQ_OPS if kind == "seq" else CNN_OPS
        if not isinstance(cell, (list, tuple)) or not cell:
            raise ValueError(f"genotype, {kind} cell: expected a list of at least one node, found {cell!r:.80}")
        nodes = []
        for i, node in enumerate(cell, start=2):
            where = f"genotype, {kind} cell, node {i}"
            if not isinstance(node, (list, tuple)) or not node:
                raise ValueError(f"{where}: expected a list of at least one edge, found {node!r:.80}")
            for edge in node:
                if not isinstance(edge, (list, tuple)) or len(edge) != 2:
                    raise ValueError(f"{where}: expected an edge [operation, predecessor], found {edge!r:.80}")
                op, j = edge
                if not isinstance(op, str) or op not in known:
                    raise ValueError(f"{where}: unknown operation {op!r:.80}; known: {', '.join(known)}")
                if type(j) is not int or not 0 <= j < i:
                    raise ValueError(f"{where}: predecessor {j!r:.80} does not exist; known: {', '.join(map(str, range(i)))}")
            if len({j for _, j in node}) < len(node):
                raise ValueError(f"{where}: the same predecessor stands twice; each of its edges needs its own")
            nodes.append(tuple((op, j) for op, j in node))
        return tuple(nodes)

    def to_json(self):
        cells = (f'"{kind}": {json.dumps(cell)}' for kind, cell in asdict(self).items() if cell is not None)
        return "{\n  " + ",\n  ".join(cells) + "\n}\n"

    @classmethod
    def from_json(cls, text):
        try:
            cells = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"genotype: not a JSON text ({error})") from None
        if not isinstance(cells, dict):
            raise ValueError(f"genotype: expected an object with the cells normal, reduce, seq, found {cells!r:.80}")
        for kind in cells:
            if kind not in ("normal", "reduce", "seq"):
                raise ValueError(f"genotype: unknown cell {kind!r:.80}; known: normal, reduce, seq")
        return cls(**cells)

    def __str__(self):
        lines = []
        for kind, cell in asdict(self).items():
            if cell is not None:
                lines.append(f"{kind} cell (0, 1: the outputs of the two cells before)")
                for i, node in enumerate(cell, start=2):
                    lines.append(f"  {i} = " + " + ".join(f"{op}({j})" for op, j in node))
                lines.append(f"  output = [{', '.join(str(i) for i in range(2, len(cell) + 2))}]")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The network, in both of its lives.


class Network(nn.Module):
    """MFCC map -> CNN cells -> SeqNN cells -> logits. Without `genotype` the supernet (every edge is a mixed operation,
    and there are alphas), with one the derived network (every edge is the operation that was found, no alphas).

    classes      number of emotions
    channels     channels of the first CNN cell; each of the (at most two) reduction cells doubles them
    cnn_cells    at least 1; reduction cells stand at 1/3 and 2/3 of the depth
    seq_cells    0 gives the CNN-only search of 2023
    nodes        nodes a cell, of the supernet; a genotype brings its own
    stem_stride  2 halves the input map before the first cell
    bands        the SeqNN sees the mean of each of so many parts of the frequency axis; 1, the paper's, does not tell low from high
    seq_space    candidate operations of the SeqNN, a key of SEQ_SPACES; of the supernet
    dropout      after each cell
    recompute    cells keep their states only, edges are computed again on the way back: less memory, more time, same gradients
    fixed        a Genotype of the cells that the search leaves as they are; of the supernet
    amp          mixed precision: bfloat16 where torch.autocast says so; weights, alphas and logits stay float32

    The defaults are the paper's scale. Raises ValueError for sizes that cannot be, and for a genotype without a cell
    that these sizes need. `drop_path`, an attribute, is the share dropped in training, of what `Cell` says (0 at first).
    """

    def __init__(
        self, *, classes=4, channels=8, cnn_cells=4, seq_cells=4, nodes=4, stem_stride=1, bands=1, seq_space="all", dropout=0.3,
        recompute=False, amp=False, fixed=None, genotype=None,
    ):  # fmt: skip
        super().__init__()
        for name, size, least in (
            ("classes", classes, 1), ("channels", channels, 1), ("cnn_cells", cnn_cells, 1),
            ("seq_cells", seq_cells, 0), ("nodes", nodes, 1), ("stem_stride", stem_stride, 1), ("bands", bands, 1),
        ):  # fmt: skip
            if size < least:
                raise ValueError(f"{name} is {size}, expected at least {least}")
        if seq_space not in SEQ_SPACES:
            raise ValueError(f"unknown seq_space {seq_space!r}; known: {', '.join(SEQ_SPACES)}")
        reductions = {cnn_cells // 3, 2 * cnn_cells // 3}
        kinds = ["reduce" if k in reductions else "normal" for k in range(cnn_cells)]
        needed = [kind for kind in ("normal", "reduce") if kind in kinds] + ["seq"] * (seq_cells > 0)
        there = {kind: cell for kind, cell in vars(genotype or fixed or Genotype()).items() if cell is not None}
        self.fixed, self.candidates = there, {}  # cells that are decided; of the others, the operations to choose from
        for kind in needed:
            if kind not in there and genotype is not None:
                raise ValueError(
                    f"the genotype has no {kind} cell, which a network of {cnn_cells} CNN and {seq_cells} SeqNN cells "
                    f"needs; it has: {', '.join(there) or 'none'}"
                )
            if kind not in there:
                self.candidates[kind] = SEQ_SPACES[seq_space] if kind == "seq" else tuple(CNN_OPS)
        every = {kind: [[(j, (op,)) for op, j in node] for node in cell] for kind, cell in there.items()}
        for kind, names in self.candidates.items():
            every[kind] = [[(j, names) for j in range(i)] for i in range(2, nodes + 2)]

        affine = genotype is not None
        c, c0, c1 = channels, 3 * channels, 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(1, c1, 3, stem_stride, padding=1, bias=False), nn.BatchNorm2d(c1))
        self.cnn = nn.ModuleList()
        for k, kind in enumerate(kinds):
            c = 2 * c if kind == "reduce" else c
            self.cnn.append(CNNCell(kind, every[kind], c0, c1, c, k > 0 and kinds[k - 1] == "reduce", affine))
            c0, c1 = c1, len(every[kind]) * c
        c1 = bands * c1
        self.seq = nn.ModuleList(SeqCell(every["seq"], c1) for _ in range(seq_cells))
        for cell in (*self.cnn, *self.seq):
            cell.recompute = recompute
        self.head = nn.Linear(c1, classes)
        self.dropout = nn.Dropout(dropout)
        self.drop_path, self.amp, self.nodes, self.bands = 0.0, amp, nodes, bands
        # One alpha for all cells of a kind, (edges, operations), nearly uniform at first.
        self.alpha = nn.ParameterDict()
        for kind, names in self.candidates.items():
            self.alpha[kind] = nn.Parameter(1e-3 * torch.randn(sum(map(len, every[kind])), len(names)))

    def weights(self):
        """The parameters w of the lower level: all but the alphas."""
        return [p for name, p in self.named_parameters() if not name.startswith("alpha.")]

    def alphas(self):
        """The parameters of the upper level; empty for a derived network."""
        return list(self.alpha.values())

    def forward(self, x):
        """(N, 1, F, T) -> logits (N, classes)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.classify(*self.frames(x))
        return logits.float() if self.amp else logits

    def frames(self, x):
        """The CNN half: (N, 1, F, T) -> its last two outputs as sequences in time, each (N, T', D)."""
        s0 = s1 = self.stem(x)  # (N, 3 channels, F, T)
        weight = {kind: alpha.softmax(dim=-1) for kind, alpha in self.alpha.items()}
        for cell in self.cnn:
            s0, s1 = s1, self.dropout(cell(s0, s1, weight.get(cell.kind), self.drop_path))
        if s1.shape[2] < self.bands:
            raise ValueError(f"bands is {self.bands}, and the map behind the CNN cells has {s1.shape[2]} rows; expected at most as many")
        parts = [[part.mean(dim=2) for part in s.tensor_split(self.bands, dim=2)] for s in (s0, s1)]  # (N, C, F, T) -> bands of (N, C, T)
        s0, s1 = (torch.cat(means, dim=1).transpose(1, 2) for means in parts)  # -> (N, T, bands C): F is averaged, T stays
        if s0.shape != s1.shape:  # at depths other than 4 the older output may be longer or narrower
            s0 = F.adaptive_avg_pool2d(s0, s1.shape[1:])
        return s0, s1

    def classify(self, s0, s1):
        """The SeqNN half: (N, T, D), (N, T, D) -> logits (N, classes)."""
        weight = {kind: alpha.softmax(dim=-1) for kind, alpha in self.alpha.items()}
        for cell in self.seq:
            s0, s1 = s1, self.dropout(cell(s0, s1, weight.get(cell.kind), self.drop_path))
        return self.head(s1.mean(dim=1))  # (N, T, D) -> (N, D) -> (N, classes)


def derive(net):
    """Supernet -> Genotype [D section 2.4]. The strength of an edge is its largest softmax weight over the operations
    other than `none`; each node keeps its two strongest edges, each with its strongest operation.

    Softmax weights, not raw alphas: a raw alpha says nothing about its share among the others on its edge.
    """
    cells = dict(net.fixed)
    for kind, names in net.candidates.items():
        weight = net.alpha[kind].detach().softmax(dim=-1).tolist()
        nodes, row = [], 0
        while row < len(weight):
            edges = []
            for j in range(len(nodes) + 2):  # node i = len(nodes) + 2 has the predecessors 0 .. i - 1
                op = max((name for name in names if name != "none"), key=lambda name: weight[row + j][names.index(name)])
                edges.append((weight[row + j][names.index(op)], j, op))
            row += len(edges)
            strongest = sorted(edges, key=lambda edge: -edge[0])[:2]
            nodes.append(tuple((op, j) for _, j, op in sorted(strongest, key=lambda edge: edge[1])))
        cells[kind] = tuple(nodes)
    return Genotype(**cells)


def random_genotype(net):
    """Uniformly drawn from the space of a supernet: what a search has to beat. Two predecessors a node, as `derive` has them."""
    cells = dict(net.fixed)
    for kind, names in net.candidates.items():
        names = [name for name in names if name != "none"]
        pairs = [torch.randperm(i)[:2].sort().values.tolist() for i in range(2, net.nodes + 2)]
        cells[kind] = tuple(tuple((names[torch.randint(len(names), ())], j) for j in pair) for pair in pairs)
    return Genotype(**cells)


def expected_parameters(net):
    """Number of weights on a supernet's edges, each operation counted with its softmax(alpha): differentiable, ()."""
    total = torch.zeros((), device=next(net.parameters()).device)
    for cell in (*net.cnn, *net.seq):
        if cell.kind in net.alpha:
            sizes = [[sum(p.numel() for p in op.parameters()) for op in edge.ops.values()] for edge in cell.edges.values()]
            total = total + (net.alpha[cell.kind].softmax(dim=-1) * torch.tensor(sizes).to(total)).sum()
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The architect: how the alphas move.


def ranks():
    """-> (number of this rank, number of ranks) that share each batch; (0, 1) without torch.distributed."""
    there = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)


def reduced(loss, gradients):
    """-> their sums over all ranks, by one all_reduce of one buffer: the same bits on every rank."""
    if ranks()[1] == 1:
        return loss, gradients
    flat = torch.cat([t.reshape(-1) for t in (loss, *gradients)])  # (1 + number of parameters,)
    distributed.all_reduce(flat)
    loss, *parts = flat.split([1, *(g.numel() for g in gradients)])
    return loss[0], [part.view_as(g) for part, g in zip(parts, gradients)]


class Architect:
    """Moves the alphas of a supernet along the hypergradient, i.e. the gradient of L_val(w*(alpha), alpha), where w*
    is approximated by one step of plain gradient descent, w' = w - xi * dL_train/dw [D eq. 6-8]:

        dL_val(w')/dalpha - xi * (dL_train(w+)/dalpha - dL_train(w-)/dalpha) / (2 eps)
        w+- = w +- eps * dL_val/dw',     eps = 0.01 / ||dL_val/dw'||

    order=1 sets xi = 0: one pass over the validation batch, and neither a copy nor a gradient of the weights.
    order=2 takes four passes; while it lasts it holds one copy of the weights and one gradient.

    `loss(logits, target)` -> scalar. A batch is a pair (x, target). Weights and BN buffers are bit for bit the same
    after a step as before. `penalty()` -> scalar, a function of the alphas alone that is added to L_val.

    Where torch.distributed is initialised, the ranks share each batch: x is this rank's part of it (it may be empty),
    `loss` returns this rank's summand of the loss of the whole, and all ranks move the alphas by the same bits.
    """

    def __init__(self, net, loss, *, order=1, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3, penalty=None):
        if order not in (1, 2):
            raise ValueError(f"order is {order!r}, expected 1 or 2")
        self.net, self.loss, self.order, self.penalty = net, loss, order, penalty
        self.optimizer = torch.optim.Adam(net.alphas(), lr=lr, betas=betas, weight_decay=weight_decay)

    def step(self, val, train=None, xi=0.0):
        """Moves the alphas once; returns L_val (of w, or of w' when order=2), a float.

        `val` comes from the half of the training data that is kept for the alphas. Order 2 also needs `train`, the
        batch of the coming weight step, and `xi`, that step's learning rate.
        """
        loss, gradient = self.first_order(val) if self.order == 1 else self.second_order(val, train, xi)
        for alpha, g in zip(self.net.alphas(), gradient):
            alpha.grad = g
        if self.penalty:
            self.penalty().backward(inputs=self.net.alphas())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def first_order(self, val):
        """dL_val(w, alpha)/dalpha, w held fixed. -> L_val, a gradient for each alpha."""
        weights = self.net.weights()
        with without_statistics(self.net):
            try:
                for w in weights:
                    w.requires_grad_(False)  # autograd then computes and keeps nothing on their behalf
                return self.gradient(val, self.net.alphas())
            finally:
                for w in weights:
                    w.requires_grad_(True)

    def second_order(self, val, train, xi):
        """[D eq. 7], with the finite difference of [D eq. 8]. -> L_val(w'), a gradient for each alpha."""
        w, alphas = self.net.weights(), self.net.alphas()
        w_before = [p.detach().clone() for p in w]
        # The three passes over the training batch must be the same function of (w, alpha): with fresh dropout masks
        # the difference of the last two would be that of the masks, blown up by 1 / (2 eps).
        masks = int(torch.randint(2**62, ()))
        with without_statistics(self.net):
            try:
                set_to(w, w_before, self.gradient(train, w, masks)[1], -xi)  # w'
                loss, both = self.gradient(val, alphas + w)
                d_alpha, d_w = both[: len(alphas)], both[len(alphas) :]
                norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in d_w])).item()
                eps = 0.01 / max(norm, 1e-12)  # a gradient of zeros has no second-order term
                set_to(w, w_before, d_w, eps)  # w+
                _, plus = self.gradient(train, alphas, masks)
                set_to(w, w_before, d_w, -eps)  # w-
                _, minus = self.gradient(train, alphas, masks)
            finally:
                set_to(w, w_before)
        return loss, [d - xi * (p - m) / (2 * eps) for d, p, m in zip(d_alpha, plus, minus)]

    def gradient(self, batch, parameters, masks=None):
        """Loss of a batch and its gradients. `masks`: seed of the dropout masks; without one they are drawn afresh."""
        x, target = batch
        if not len(x):
            return reduced(x.new_zeros(()), [torch.zeros_like(p) for p in parameters])
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else [], enabled=masks is not None):
            if masks is not None:
                torch.manual_seed(masks)
            loss = self.loss(self.net(x), target)
        return reduced(loss.detach(), torch.autograd.grad(loss, parameters))


@torch.no_grad()
def set_to(w, base, direction=None, step=0.0):
    """w := base + step * direction, in place, parameter by parameter."""
    for k, p in enumerate(w):
        p.copy_(base[k] if direction is None else base[k] + step * direction[k])
