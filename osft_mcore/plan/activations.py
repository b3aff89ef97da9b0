"""What an update's forward pass keeps for its backward pass on one rank, and what both need beside.

Sizes are bytes of one rank. In comments: H hidden, N query heads and G key-value heads of the rank,
D head dim, F feed-forward units of the rank, V vocabulary rows of the rank, t positions of a
micro-batch, T of them that predict a response token, e bytes of a number of the model's dtype.
"""

from dataclasses import dataclass

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import Recompute
from osft_mcore.loss.linear import CHUNK_ELEMENTS, LEAST_CHUNK
from osft_mcore.loss.projection import BLOCK_ROWS
from osft_mcore.plan.stages import Stage

FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The sizes of a forward pass on one rank: with cp > 1 its share."""

    rows: int
    positions: int
    """Of a row, padding included."""
    responses: int
    """Positions of all rows that predict a response token."""

    @property
    def tokens(self) -> int:
        """All positions."""
        return self.rows * self.positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """How the layers compute."""

    itemsize: int
    """Bytes of a weight and of an activation: 2 or 4."""
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    packed: bool = False
    """Sequences lie end to end in one row."""
    recompute: Recompute = "none"
    recompute_loss: bool = False
    transformer_engine: bool = False
    """Transformer Engine's layers on a GPU, read from its source; else Megatron-Core's local ones
    on a CPU, measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Of one rank in an update, in bytes."""

    kept: int
    """For the backward passes of all micro-batches that are under way."""
    loss: int
    """Logits of a chunk, gradients of hidden states and output weight; the loss's while."""
    backward: int
    """Beside the kept ones, one layer's backward pass or the embedding's; never with `loss`."""

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        return self.kept + max(self.loss, self.backward)


def activations(
    shape: ModelShape, stage: Stage, layers: Layers, batch: MicroBatch, *, num_micro_batches: int
) -> Activations:
    """Of a rank of `stage`, when it needs most; every micro-batch is as large as `batch`."""
    layer = kept_by_layer(shape, layers, batch)
    num_passes, num_layers = passes_under_way(stage, num_micro_batches)
    kept = num_layers * layer
    if stage.is_last:
        # The final norm; hidden states that the loss has taken.
        kept += _norm(shape, layers, batch)
    else:
        # What goes to the next stage stays until its gradient comes.
        kept += num_passes * _hidden(shape, layers, batch)
    if stage.is_first:
        kept += num_passes * batch.tokens * 8
    kept += num_passes * batch.positions * shape.head_dim * FP32
    return Activations(
        kept=kept,
        loss=_loss(shape, stage, layers, batch) if stage.is_last else 0,
        backward=_backward(shape, stage, layers, batch, layer=layer),
    )


def passes_under_way(stage: Stage, num_micro_batches: int) -> tuple[int, int]:
    """Forward passes of model chunks that wait for their backward pass, and layers in them.

    1F1B: as many micro-batches as stages from here on. Interleaved (Megatron-Core's
    get_pp_rank_microbatches): two for every stage that follows, and a group for every chunk but
    the last.
    """
    pp, vpp = stage.num_stages, len(stage.chunks)
    if vpp == 1:
        num = min(num_micro_batches, pp - stage.pp_rank)
        return num, num * stage.chunks[0]
    num = min(num_micro_batches * vpp, 2 * (pp - stage.pp_rank - 1) + (vpp - 1) * pp + 1)
    # Chunks take groups of pp micro-batches in turn.
    return num, sum(stage.chunks[at // pp % vpp] for at in range(num))


def kept_by_layer(shape: ModelShape, layers: Layers, batch: MicroBatch) -> int:
    """Bytes that one layer keeps of one micro-batch."""
    if layers.recompute == "full":
        return _hidden(shape, layers, batch)
    return _attention(shape, layers, batch) + (
        0 if layers.recompute == "selective" else _mlp(shape, layers, batch)
    )


def _hidden(shape: ModelShape, layers: Layers, batch: MicroBatch) -> int:
    """t H, which sequence parallelism cuts."""
    tokens = -(-batch.tokens // layers.tp) if layers.sequence_parallel else batch.tokens
    return tokens * shape.hidden * layers.itemsize


def _norm(shape: ModelShape, layers: Layers, batch: MicroBatch) -> int:
    """A norm's input, output, and one number a token; torch's on a CPU also what it normalised.

    That and the input are fp32 there.
    """
    hidden = _hidden(shape, layers, batch)
    numbers = hidden // (shape.hidden * layers.itemsize) * FP32
    if layers.transformer_engine:
        return 2 * hidden + numbers
    return hidden + hidden // layers.itemsize * 2 * FP32 + numbers


def _attention(shape: ModelShape, layers: Layers, batch: MicroBatch) -> int:
    """Both norms and everything but the MLP: 3 (N + G) D, and a number a head."""
    t, e, d = batch.tokens, layers.itemsize, shape.head_dim
    n = shape.num_heads // layers.tp
    g = max(1, shape.num_kv_heads // layers.tp)
    # q, k and v as one; q and k with their positions; the answer.
    kept = t * (3 * n + 3 * g) * d * e
    if layers.cp == 1 or layers.transformer_engine:
        kept += t * n * FP32
        if layers.packed and not layers.transformer_engine:
            # The answers of the sequences once more, joined.
            kept += t * n * d * e
    if shape.qk_norm:
        kept += t * (n + g) * FP32
        if layers.transformer_engine:
            kept += t * (n + g) * d * e
        else:
            # The input is a copy where it has to be fp32, or lies between keys and values.
            copied = n + g if e < FP32 else n if g > 1 else 0
            kept += t * (n + g + copied) * d * FP32
    if not layers.transformer_engine:
        # Cosines and sines for q and k, which all rows share.
        kept += batch.positions * 4 * d * e
    return kept + 2 * _norm(shape, layers, batch)


def _mlp(shape: ModelShape, layers: Layers, batch: MicroBatch) -> int:
    """5 F: gate and up, silu of gate, up plus its offset of 0, and their product."""
    return batch.tokens * 5 * (shape.ffn // layers.tp) * layers.itemsize


def _backward(
    shape: ModelShape, stage: Stage, layers: Layers, batch: MicroBatch, *, layer: int
) -> int:
    """Above all that is kept, at the worst moment of the last layer's, or of the embedding."""
    e, units = layers.itemsize, batch.tokens * (shape.ffn // layers.tp) * layers.itemsize
    again = 0
    if layers.recompute == "selective":
        again = _mlp(shape, layers, batch)
    elif layers.recompute == "full":
        again = _attention(shape, layers, batch) + _mlp(shape, layers, batch)
    # Gradients of the product and of its two factors, or fc2's weight beside the first of them;
    # when it comes to fc1's weight, activations of the MLP are gone.
    weight = stage.layer_weight * e
    in_layer = max(2 * units, units + weight // 2, weight - 3 * units)
    # Hidden states, their gradient, the residual's; whole where sequence parallelism gathers.
    hidden = 2 * _hidden(shape, layers, batch) + batch.tokens * shape.hidden * e
    if stage.is_last:
        # The final norm has let go of its own.
        hidden -= _norm(shape, layers, batch)
    # The embedding's gradient is dense. By then the layers of its pass are gone.
    embedding = stage.embedding * e - stage.chunks[0] * layer
    return max(again + in_layer + hidden, embedding)


def _loss(shape: ModelShape, stage: Stage, layers: Layers, batch: MicroBatch) -> int:
    """See loss/linear.py: two buffers of logits, hidden states, and gradients in fp32."""
    h, e, rows = shape.hidden, layers.itemsize, stage.output // shape.hidden
    t = batch.responses
    chunk = min(max(LEAST_CHUNK, CHUNK_ELEMENTS // max(rows, 1)), t)
    size = 2 * chunk * rows * FP32 + t * h * e + chunk * h * FP32
    if layers.sequence_parallel:
        size += batch.tokens * h * e
    gradients = t * h * FP32
    if not layers.recompute_loss:
        gradients += stage.output * FP32
    if e < FP32:
        if layers.transformer_engine:
            # The product is made aside, then added; the gradient of logits in bf16 comes first.
            size += stage.output * FP32 + chunk * rows * e
        else:
            block = min(rows, BLOCK_ROWS)
            size += block * h * FP32 + chunk * block * FP32 + chunk * h * FP32
    return size + gradients
