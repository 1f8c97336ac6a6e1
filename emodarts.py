"""emoDARTS: joint differentiable architecture search of a CNN and a sequential network (SeqNN)
for speech emotion recognition, in one file that needs torch alone.

    net = Network(classes=4)                                   # no genotype: the supernet
    architect = Architect(net, loss)                           # moves the alphas
    genotype = derive(net)                                     # reads the alphas
    net = Network(classes=4, genotype=genotype)                # the derived network, to be trained from scratch

The problem is bi-level: find the alphas (which operation stands on which edge) that are best on validation
data when the weights w are those that are best on training data *for these alphas*:

    alpha* = argmin_alpha L_val(w*(alpha), alpha)     s.t.     w*(alpha) = argmin_w L_train(w, alpha)

Read on in this order: operations, MixedOp (a choice made continuous), Cell (a graph of mixed operations), Genotype
(the choice made discrete again), Network (cells from MFCC map to logits), derive, Architect (the hypergradient).

Shapes: a map is (N, C, F, T) = batch, channels, feature axis, time axis; a sequence is (N, T, D) = batch, time, width.

[P]  Rajapakshe et al., "emoDARTS: Joint Optimisation of CNN & Sequential Neural Network Architectures for Superior
     Speech Emotion Recognition", IEEE Access 12, 2024 (arXiv 2403.14083)
[D]  Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019 (arXiv 1806.09055)
[G]  Dong, Yang, "Searching for a Robust Neural Architecture in Four GPU Hours", CVPR 2019 (arXiv 1910.04465)
"""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import nn
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
        return F.avg_pool2d(x, 1, 2)  # x[:, :, ::2, ::2], whose gradient would not be channels_last: slow on CPU


class BothGrids(nn.Module):
    """(N, C, F, T) -> (N, 2C, ceil(F / 2), ceil(T / 2)): the even grid, and behind it the one between its points."""

    def forward(self, x):
        between = F.pad(x, (-1, x.shape[3] % 2, -1, x.shape[2] % 2))  # from 1 on; odd sizes: ceil(size / 2)
        return torch.cat([F.avg_pool2d(x, 1, 2), F.avg_pool2d(between, 1, 2)], dim=1)


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
    if stride == dilation == 2:  # only the even grid is ever looked at: the same numbers, several times faster on CPU
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
# All end in a layer norm, as CNN operations end in BN, and start with weights that keep a signal's size at any depth:
# otherwise lstm_4 begins at a hundredth of what a skip adds, and alpha measures how loud an operation is.


def recurrent_layers(layer, width, layers, **more):
    """nn.LSTM or nn.RNN. Gate by gate, input weights are Xavier's, recurrent ones orthogonal; the forget gate's bias is
    1, others are 0."""
    rnn = layer(width, width, layers, batch_first=True, **more)
    for name, p in rnn.named_parameters():
        gates = p.detach().chunk(len(p) // width)  # of an LSTM: input, forget, cell, output
        for k, gate in enumerate(gates):
            if "weight_ih" in name:
                nn.init.xavier_uniform_(gate)
            elif "weight_hh" in name:
                nn.init.orthogonal_(gate)
            else:
                nn.init.constant_(gate, float("bias_ih" in name and len(gates) == 4 and k == 1))
    return rnn


class Recurrent(nn.Module):
    """`lstm_k`, `rnn_k`: k stacked layers, one direction."""

    def __init__(self, width, affine, *, layer, layers):
        super().__init__()
        self.rnn = recurrent_layers(layer, width, layers)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)

    def forward(self, x):
        return self.norm(self.rnn(x)[0])


class RecurrentAttention(nn.Module):
    """`lstm_att_k`, `rnn_att_k`: k stacked bidirectional layers, then additive attention over time.

    With h_t the output at frame t and q the last output of both directions (each 2D wide):
        a = softmax over t of  v . tanh(W [h_t, q]),      context = sum_t a_t h_t,      y_t = P [h_t, context]
    """

    def __init__(self, width, affine, *, layer, layers):
        super().__init__()
        self.rnn = recurrent_layers(layer, width, layers, bidirectional=True)
        self.score = nn.Sequential(nn.Linear(4 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        self.project = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)

    def forward(self, x):  # (N, T, D)
        h, _ = self.rnn(x)  # (N, T, 2D): the forward half ends with the last frame, the backward half with the first
        forward, backward = h.chunk(2, dim=2)
        q = torch.cat([forward[:, -1:], backward[:, :1]], dim=2).expand_as(h)  # (N, 1, 2D) -> (N, T, 2D)
        a = self.score(torch.cat([h, q], dim=2)).softmax(dim=1)  # (N, T, 1), sums to 1 over T
        context = (a * h).sum(dim=1, keepdim=True).expand_as(h)  # (N, 1, 2D) -> (N, T, 2D)
        return self.norm(self.project(torch.cat([h, context], dim=2)))  # (N, T, 4D) -> (N, T, D)


# name -> constructor(width, affine)
SEQ_OPS = {
    "none": lambda width, affine: Zero(),
    "skip_connect": lambda width, affine: nn.Identity(),
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


class MixedOp(nn.Module):
    """An edge that is not yet decided: every candidate operation, weighted by the softmax of its alpha [D eq. 2],

        o_bar(x) = sum_o softmax(alpha)_o * o(x)

    `ops`: name -> module; all return the same shape. `weight`: softmax(alpha), shape (len(ops),). Without `weight` the
    edge is decided and holds one operation. `drawn`: number of the only operation that is computed, see
    `Network.relaxed`. `call(op, x)` computes an operation; `Cell` has a faster way than op(x).
    """

    def __init__(self, ops):
        super().__init__()
        self.ops = nn.ModuleDict(ops)

    def forward(self, x, weight=None, drawn=None, call=nn.Module.__call__):
        ops = list(self.ops.values())
        if weight is None:
            return call(ops[0], x)
        if drawn is not None:
            return weight[drawn] * call(ops[drawn], x)
        y = None
        for w, name, op in zip(weight, self.ops, ops):
            if name != "none":  # adds nothing; its alpha still counts, as it takes its share of the softmax
                out = call(op, x)
                y = w * out if y is None else y.addcmul_(w, out)  # y + w * out without a copy of y
        return y


class Cell(nn.Module):
    """A directed acyclic graph. States 0 and 1 are the outputs of the two cells before; state i >= 2 (a node) is the
    sum of its incoming edges, i.e. sum_j edge_ji(state j), j < i; the output is the concatenation of the nodes.

    `wiring`: for each node the list of its edges (j, names of the candidate operations): many names before the search
    has decided, one after. The cell does not care which. `make(name, j)` builds an operation for an edge that starts
    at state j. Edge and operation keep their names in `state_dict`, so a derived cell's keys are among the supernet's.
    """

    concat = 1  # the axis of C in (N, C, F, T)
    recompute, recompute_edge_by_edge = False, False

    def __init__(self, kind, wiring, make, before=(nn.Identity, nn.Identity)):
        super().__init__()
        self.kind = kind
        self.before = nn.ModuleList(make_input() for make_input in before)
        self.edges = nn.ModuleDict()
        self.leaving = [[] for _ in range(len(wiring) + 2)]  # of state j: its edges (i, j, row of the alphas)
        for i, node in enumerate(wiring, start=2):
            for j, names in node:
                self.leaving[j].append((i, j, len(self.edges)))
                self.edges[f"{j}_{i}"] = MixedOp({name: make(name, j) for name in names})
        for edges in self.leaving:
            share([op for i, j, _ in edges for op in self.edges[f"{j}_{i}"].ops.values()])

    def forward(self, s0, s1, weight=None, drawn=None, p_drop=0.0):
        """`weight` and `drawn`: lists over the edges, ordered by node, then predecessor, of what `MixedOp` takes.
        `p_drop`: the share of utterances for which an edge of a derived cell is dropped in training (drop-path)."""
        states = [self.before[0](s0), self.before[1](s1)]
        arrived = [[] for _ in self.leaving]  # at state i: edge_ji(state j), in the order of j
        for j, edges in enumerate(self.leaving):
            if j >= 2:
                states.append(reduce(torch.add, arrived[j]))
            for (i, _, _), y in zip(edges, self.leave(edges, states[j], weight, drawn, p_drop)):
                arrived[i].append(y)
        return torch.cat(states[2:], dim=self.concat)

    def leave(self, edges, x, *choice):
        """State j -> the outputs of the edges that leave it. With `recompute` only the state is kept, and its edges are
        computed again on the way back: less memory, more time, the same bits."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self.along(edges, x, *choice)
        outputs = []
        for part in [[edge] for edge in edges] if self.recompute_edge_by_edge else [edges]:
            ops = nn.ModuleList(self.edges[f"{j}_{i}"] for i, j, _ in part)
            outputs += checkpoint(  # the second time BN leaves its statistics alone: a batch counts once
                self.along, part, x, *choice, use_reentrant=False,
                context_fn=lambda: (nullcontext(), without_statistics(ops)),
            )
        return outputs

    def along(self, edges, x, weight, drawn, p_drop):
        call = partial(shared_call, known={})
        outputs = []
        for i, j, row in edges:
            edge = self.edges[f"{j}_{i}"]
            y = edge(x, weight and weight[row], drawn and drawn[row], call)
            if weight is None and self.training and p_drop > 0 and "skip_connect" not in edge.ops:
                y = drop_path(y, p_drop)  # never of a skip, which keeps the path alive
            outputs.append(y)
        return outputs


def share(ops):
    """Operations on edges that leave one state and begin alike get one module for it, as long as it has no weights: the
    ReLU, the grid, pooling with the BN behind it while that has no scale. Computed once, a step is 1.3 times faster."""
    begun = {}
    for op in ops:
        for k, module in enumerate(op if isinstance(op, nn.Sequential) else ()):
            if any(True for _ in module.parameters()):
                break
            op[k] = begun.setdefault(repr(op[: k + 1]), module)


def shared_call(op, x, known):
    """op(x). `known` remembers what modules before the first weights have returned for this x: module -> output."""
    begins = True
    for module in op if isinstance(op, nn.Sequential) else (op,):
        begins = begins and not any(True for _ in module.parameters())
        if begins and module not in known:
            known[module] = module(x)
        x = known[module] if begins else module(x)
    return x


def drop_path(x, p):
    """Zeroes an edge's output for a random share `p` of the utterances, and scales the others by 1 / (1 - p)."""
    return x * F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), p)


@contextmanager
def without_statistics(net):
    """Inside, batch norm in training mode normalises by the batch as always, but leaves its statistics alone."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum, m.num_batches_tracked = 0.0, None  # they become 1 * themselves + 0 * the batch's; nobody counts
    try:
        yield
    finally:
        for m, momentum, count in kept:
            m.momentum, m.num_batches_tracked = momentum, count


class CNNCell(Cell):
    """(N, c0, F0, T0), (N, c1, F, T) -> (N, nodes * c, F, T), or (N, nodes * c, ceil(F / 2), ceil(T / 2)) if `reduce`.

    A reduction cell (`kind` "reduce") has stride 2 on the edges that leave its two inputs. After a reduction cell the
    older input is still twice as large (`halve_s0`) and is halved on the way in.
    """

    def __init__(self, kind, wiring, c0, c1, c, halve_s0, affine):
        def make(name, j):
            stride = 2 if kind == "reduce" and j < 2 else 1
            return CNN_OPS[name](c, stride, affine)

        before = factorized_reduce if halve_s0 else conv_1x1
        super().__init__(kind, wiring, make, (partial(before, c0, c, affine), partial(conv_1x1, c1, c, affine)))


class SeqCell(Cell):
    """(N, T, D), (N, T, D) -> (N, T, D). Adaptive average pooling brings the nodes * D features back to D."""

    concat = 2  # the axis of D in (N, T, D)
    recompute_edge_by_edge = True  # they have nothing in common, and one at a time takes less memory

    def __init__(self, wiring, width, affine):
        super().__init__("seq", wiring, lambda name, j: SEQ_OPS[name](width, affine))
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
        for kind, cell in self.cells().items():
            object.__setattr__(self, kind, checked_cell(kind, cell))  # lists, as JSON has them, become tuples

    def cells(self):
        """{kind: cell} of the cells that are there."""
        return {kind: cell for kind, cell in vars(self).items() if cell is not None}

    def to_json(self):
        return "{\n  " + ",\n  ".join(f'"{kind}": {json.dumps(cell)}' for kind, cell in self.cells().items()) + "\n}\n"

    @classmethod
    def from_json(cls, text):
        try:
            return cls(**json.loads(text))
        except (TypeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"genotype: expected a JSON object with the cells normal, reduce, seq ({error})") from None

    def __str__(self):
        lines = []
        for kind, cell in self.cells().items():
            lines.append(f"{kind} cell (0, 1: the outputs of the two cells before)")
            for i, node in enumerate(cell, start=2):
                lines.append(f"  {i} = " + " + ".join(f"{op}({j})" for op, j in node))
            lines.append(f"  output = [{', '.join(str(i) for i in range(2, len(cell) + 2))}]")
        return "\n".join(lines)


def checked_cell(kind, cell):
    """A cell of a genotype as tuples; ValueError for what is none."""
    known = SEQ_OPS if kind == "seq" else CNN_OPS
    try:
        nodes = tuple(tuple((op, j) for op, j in node) for node in cell)
    except (TypeError, ValueError):
        nodes = ()
    if not nodes or not all(nodes):
        raise ValueError(
            f"genotype, {kind} cell: expected a list of nodes, each a list of edges [operation, predecessor], "
            f"at least one of each, found {cell!r:.80}"
        )
    for i, node in enumerate(nodes, start=2):
        where = f"genotype, {kind} cell, node {i}"
        for op, j in node:
            if not isinstance(op, str) or op not in known:
                raise ValueError(f"{where}: unknown operation {op!r:.80}; known: {', '.join(known)}")
            if type(j) is not int or not 0 <= j < i:
                raise ValueError(f"{where}: no predecessor {j!r:.80}; known: {', '.join(map(str, range(i)))}")
        if len({j for _, j in node}) < len(node):
            raise ValueError(f"{where}: the same predecessor stands twice; each of its edges needs its own")
    return nodes


# ---------------------------------------------------------------------------------------------------------------------
# The network, in both of its lives.

RELAXATIONS = ("softmax", "sample")


class Frames(nn.Module):
    """(N, C, F, T) -> (N, T, D), what the SeqNN hears of each frame: the mean over F, D = C, as in the paper; with a
    `width` all of its C x F features through a linear layer, D = width, LayerNorm and dropout. T stays."""

    def __init__(self, c, f, width=None, dropout=0.3):
        super().__init__()
        self.project = None
        if width:
            self.project = nn.Sequential(nn.Linear(c * f, width), nn.LayerNorm(width), nn.Dropout(dropout))

    def forward(self, x):
        if self.project is None:
            return x.mean(dim=2).transpose(1, 2)  # (N, C, F, T) -> (N, C, T) -> (N, T, C)
        return self.project(x.flatten(1, 2).transpose(1, 2))  # (N, C, F, T) -> (N, C F, T) -> (N, T, C F) -> (N, T, D)


class Network(nn.Module):
    """MFCC map -> CNN cells -> SeqNN cells -> logits. Without `genotype` the supernet (every edge is a mixed operation,
    and there are alphas), with one the derived network (every edge is the operation that was found, no alphas).

    classes      number of emotions
    features     F of the maps
    channels     channels of the first CNN cell; each of the (at most two) reduction cells doubles them
    cnn_cells    at least 1; reduction cells stand at 1/3 and 2/3 of the depth
    seq_cells    0 gives the CNN-only search of 2023
    nodes        nodes a cell, of the supernet; a genotype brings its own
    stem_stride  2 halves the input map before the first cell
    seq_width    D of the SeqNN, to which `Frames` projects; None, the paper's, is the mean over F
    seq_space    candidate operations of the SeqNN, a key of SEQ_SPACES; of the supernet
    relaxation   "softmax" or "sample", see `relaxed`; of the supernet
    dropout      after each cell; `Frames` has its own
    recompute    cells keep their states only, see `Cell.leave`
    amp          mixed precision: bfloat16 where torch.autocast says so; weights, alphas and logits stay float32
    fixed        a Genotype of the cells that the search leaves as they are; of the supernet

    The defaults are the paper's scale. Raises ValueError for sizes that cannot be, and for a genotype without a cell
    that these sizes need. Attributes: `drop_path`, the share of edges dropped in training (0 at first); `draws`, the
    torch.Generator of sampled operations (None: torch's own).
    """

    def __init__(self, *, classes=4, features=128, channels=8, cnn_cells=4, seq_cells=4, nodes=4, stem_stride=1,
                 seq_width=None, seq_space="all", relaxation="softmax", dropout=0.3, recompute=False, amp=False,
                 fixed=None, genotype=None):
        super().__init__()
        for name, size, least in (("classes", classes, 1), ("features", features, 1), ("channels", channels, 1),
                                  ("cnn_cells", cnn_cells, 1), ("seq_cells", seq_cells, 0), ("nodes", nodes, 1),
                                  ("stem_stride", stem_stride, 1), ("seq_width", seq_width or 1, 1)):
            if size < least:
                raise ValueError(f"{name} is {size}, expected at least {least}")
        for name, value, known in (("seq_space", seq_space, SEQ_SPACES), ("relaxation", relaxation, RELAXATIONS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        self.relaxation, self.draws, self.amp, self.nodes, self.drop_path = relaxation, None, amp, nodes, 0.0
        self.dropout = nn.Dropout(dropout)
        reductions = {cnn_cells // 3, 2 * cnn_cells // 3}
        kinds = ["reduce" if k in reductions else "normal" for k in range(cnn_cells)] + ["seq"] * seq_cells
        wiring = self.wire(kinds, genotype, fixed or Genotype(), seq_space)
        affine = genotype is not None
        c, f = channels, -(-features // stem_stride)
        before = [(3 * c, f), (3 * c, f)]  # channels and F of the two outputs before
        self.stem = nn.Sequential(nn.Conv2d(1, 3 * c, 3, stem_stride, padding=1, bias=False), nn.BatchNorm2d(3 * c))
        self.cnn = nn.ModuleList()
        for k, kind in enumerate(kinds[:cnn_cells]):
            if kind == "reduce":
                c, f = 2 * c, -(-f // 2)
            halve_s0 = k > 0 and kinds[k - 1] == "reduce"
            self.cnn.append(CNNCell(kind, wiring[kind], before[0][0], before[1][0], c, halve_s0, affine))
            before = [before[1], (len(wiring[kind]) * c, f)]
        width = seq_width or before[1][0]
        heard = before if seq_cells else before[1:]  # a network without SeqNN cells has no use for the older output
        self.hear = nn.ModuleList(Frames(*size, seq_width) for size in heard)
        self.seq = nn.ModuleList(SeqCell(wiring["seq"], width, affine) for _ in range(seq_cells))
        for cell in (*self.cnn, *self.seq):
            cell.recompute = recompute
        self.head = nn.Linear(width, classes)

    def wire(self, kinds, genotype, fixed, seq_space):
        """-> the wiring of each kind of cell, see `Cell`. Makes the alphas of those that are to be searched."""
        self.fixed = (genotype or fixed).cells()  # cells that are decided
        self.candidates = {}  # of the others, the operations to choose from
        self.alpha = nn.ParameterDict()  # one for all cells of a kind, (edges, operations), nearly uniform at first
        wiring = {kind: [[(j, (op,)) for op, j in node] for node in cell] for kind, cell in self.fixed.items()}
        for kind in ("normal", "reduce", "seq"):
            if kind in kinds and kind not in self.fixed:
                names = self.candidates[kind] = SEQ_SPACES[seq_space] if kind == "seq" else tuple(CNN_OPS)
                wiring[kind] = [[(j, names) for j in range(i)] for i in range(2, self.nodes + 2)]
                self.alpha[kind] = nn.Parameter(1e-3 * torch.randn(sum(map(len, wiring[kind])), len(names)))
        if genotype is not None and self.candidates:
            raise ValueError(f"the genotype has no {' and no '.join(self.candidates)} cell, which this depth needs; "
                             f"it has: {', '.join(self.fixed) or 'none'}")
        return wiring

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

    def relaxed(self, kind):
        """The choice on each edge, made continuous: -> (weights, drawn), each a list over the edges, see `MixedOp`.

        softmax  softmax(alpha), and all operations are computed [D eq. 2]
        sample   in training: one operation is drawn from the softmax and computed alone [G eq. 3, straight-through
                 Gumbel]. With g_o = -log(-log u_o), u uniform, and p = softmax(alpha + g), it is k = argmax p, which is
                 o with probability softmax(alpha)_o; its weight is 1 going forward and p_k on the way back
        """
        if kind not in self.alpha:
            return None, None
        alpha = self.alpha[kind]
        if self.relaxation == "softmax" or not self.training:
            return list(alpha.softmax(dim=-1)), None
        gumbel = -torch.empty(alpha.shape).exponential_(generator=self.draws).log()  # drawn on the CPU for any device
        p = (alpha + gumbel.to(alpha)).softmax(dim=-1)
        weight = (F.one_hot(p.argmax(dim=-1), p.shape[1]) - p).detach() + p
        return list(weight), p.argmax(dim=-1).tolist()

    def through(self, cells, s0, s1):
        """(output of the cell before last, output of the last cell) before these cells -> the same behind them."""
        choices = {kind: self.relaxed(kind) for kind in dict.fromkeys(cell.kind for cell in cells)}
        for cell in cells:
            s0, s1 = s1, self.dropout(cell(s0, s1, *choices[cell.kind], self.drop_path))
        return s0, s1

    def frames(self, x):
        """The CNN half: (N, 1, F, T) -> its last two outputs as sequences in time, each (N, T', D)."""
        x = self.stem(x)  # (N, 3 channels, F, T)
        s0, s1 = self.through(self.cnn, x, x)
        s1 = self.hear[-1](s1)
        s0 = self.hear[0](s0) if len(self.seq) else s1
        if s0.shape != s1.shape:  # the older output may be longer, or at depths other than 4 narrower
            s0 = F.adaptive_avg_pool2d(s0, s1.shape[1:])
        return s0, s1

    def classify(self, s0, s1):
        """The SeqNN half: (N, T, D), (N, T, D) -> logits (N, classes)."""
        _, s1 = self.through(self.seq, s0, s1)
        return self.head(s1.mean(dim=1))  # (N, T, D) -> (N, D) -> (N, classes)


@contextmanager
def decided(net, genotype):
    """Inside, a supernet computes with its own weights what the derived network would: the alphas say the genotype."""
    searched = [p.detach().clone() for p in net.alphas()]
    try:
        for kind, names in net.candidates.items():
            edges = {(i, j): op for i, node in enumerate(genotype.cells()[kind], start=2) for op, j in node}
            chosen = [names.index(edges.get((i, j), "none")) for i in range(2, net.nodes + 2) for j in range(i)]
            one_hot = F.one_hot(torch.tensor(chosen), len(names)).to(net.alpha[kind])
            set_to([net.alpha[kind]], [one_hot.log()])  # log 1 and log 0: 0 and -inf
        yield
    finally:
        set_to(net.alphas(), searched)


def derive(net):
    """Supernet -> Genotype [D section 2.4]. The strength of an edge is its largest softmax weight over the operations
    other than `none`; each node keeps its two strongest edges, each with its strongest operation.

    Softmax weights, not raw alphas: a raw alpha says nothing about its share among the others on its edge.
    """
    cells = dict(net.fixed)
    for kind, names in net.candidates.items():
        weight = net.alpha[kind].detach().softmax(dim=-1).cpu()
        weight[:, names.index("none")] = -1  # never the strongest
        strength, strongest = weight.max(dim=-1)
        nodes, row = [], 0
        for i in range(2, net.nodes + 2):  # node i: rows of its edges from 0 to i - 1
            kept = strength[row : row + i].topk(2).indices.sort().values.tolist()
            nodes.append([(names[strongest[row + j]], j) for j in kept])
            row += i
        cells[kind] = nodes
    return Genotype(**cells)


def random_genotype(net):
    """Uniformly drawn from a supernet's space: what a search has to beat. Two edges a node, as `derive` keeps them."""
    cells = dict(net.fixed)
    for kind, names in net.candidates.items():
        names = [name for name in names if name != "none"]
        nodes = []
        for i in range(2, net.nodes + 2):
            pair = torch.randperm(i)[:2].sort().values.tolist()
            nodes.append([(names[torch.randint(len(names), ())], j) for j in pair])
        cells[kind] = nodes
    return Genotype(**cells)


def expected_parameters(net):
    """Number of weights on a supernet's edges, each operation counted with its softmax(alpha): differentiable, ()."""
    total = torch.zeros((), device=next(net.parameters()).device)
    for cell in (*net.cnn, *net.seq):
        if cell.kind in net.alpha:
            edges = cell.edges.values()
            sizes = [[sum(map(torch.numel, op.parameters())) for op in edge.ops.values()] for edge in edges]
            total = total + (net.alpha[cell.kind].softmax(dim=-1) * torch.tensor(sizes).to(total)).sum()
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The architect: how the alphas move.


class Architect:
    """Moves the alphas of a supernet along the hypergradient, i.e. the gradient of L_val(w*(alpha), alpha), where w*
    is approximated by one step of plain gradient descent, w' = w - xi * dL_train/dw [D eq. 6-8]:

        dL_val(w')/dalpha - xi * (dL_train(w+)/dalpha - dL_train(w-)/dalpha) / (2 eps)
        w+- = w +- eps * dL_val/dw',     eps = 0.01 / ||dL_val/dw'||

    order=1 sets xi = 0: one pass over the validation batch, and neither a copy nor a gradient of the weights.
    order=2 takes four passes; while it lasts it holds one copy of the weights and one gradient.

    `loss(logits, target)` -> scalar. A batch is a pair (x, target). Weights and BN buffers are bit for bit the same
    after a step as before. `penalty()` -> scalar, a function of the alphas alone that is added to L_val.
    `reduce(loss, gradients)` -> both, summed over processes that share each batch: `loss` then returns the summand of
    this process, and all processes move the alphas by the same bits.
    """

    def __init__(self, net, loss, *, order=1, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3, penalty=None,
                 reduce=None):
        if order not in (1, 2):
            raise ValueError(f"order is {order!r}, expected 1 or 2")
        if order == 2 and net.relaxation == "sample":
            raise ValueError("order 2 goes with relaxation softmax: each of its passes would draw another network")
        self.net, self.loss, self.order, self.penalty, self.reduce = net, loss, order, penalty, reduce
        self.weights = net.weights()
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
        with without_statistics(self.net), held_fixed(self.weights):
            return self.gradient(val, self.net.alphas())

    def second_order(self, val, train, xi):
        """[D eq. 7], with the finite difference of [D eq. 8]. -> L_val(w'), a gradient for each alpha."""
        w, alphas = self.weights, self.net.alphas()
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
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else [], enabled=masks is not None):
            if masks is not None:
                torch.manual_seed(masks)
            loss = self.loss(self.net(x), target)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)  # 0 for what a drawn `none` cuts off
        return self.reduce(loss.detach(), gradients) if self.reduce else (loss.detach(), gradients)


@contextmanager
def held_fixed(parameters):
    """Inside, these are constants: autograd computes no gradient of theirs, and keeps nothing on their behalf."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@torch.no_grad()
def set_to(w, base, direction=None, step=0.0):
    """w := base + step * direction, in place, parameter by parameter."""
    for k, p in enumerate(w):
        p.copy_(base[k] if direction is None else base[k] + step * direction[k])
