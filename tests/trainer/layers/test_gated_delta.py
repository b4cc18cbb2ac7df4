"""The chunk-parallel gated delta rule against a token-by-token loop in float64 and against mlx-lm's own."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.gated_delta import gated_delta_ops, gated_delta_update as mlx_lm_update

from trainer.layers.decay import unit_lower_inverse
from trainer.layers.gated_delta import gated_delta_rule, gated_delta_update

NAMES = ("q", "k", "v", "log_gate", "beta", "state")


def loop(q, k, v, log_gate, beta, state, mask=None, segments=None):
    """One token after the other, in the dtype of the arguments."""
    repeats = v.shape[2] // q.shape[2]
    q, k = mx.repeat(q, repeats, 2), mx.repeat(k, repeats, 2)
    gate = mx.exp(log_gate)
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None and t:
            state = mx.where((segments[:, t] != segments[:, t - 1])[:, None, None, None], 0, state)
        decay = gate[:, t, :, None, None] if gate.ndim == 3 else gate[:, t, :, None, :]
        new = state * decay
        delta = (v[:, t] - (new * k[:, t, :, None]).sum(-1)) * beta[:, t, :, None]
        new = new + delta[..., None] * k[:, t, :, None]
        y = (new * q[:, t, :, None]).sum(-1)
        if mask is not None:
            keep = mask[:, t, None, None]
            y, new = mx.where(keep, y, 0), mx.where(keep[..., None], new, state)
        outputs.append(y)
        state = new
    return mx.stack(outputs, 1), state


def inputs(B, T, Hk, Hv, Dk, Dv, channel=False, strongest=0.5, seed=0):
    mx.random.seed(seed)
    unit = lambda x: x / mx.linalg.norm(x, axis=-1, keepdims=True)
    q, k = unit(mx.random.normal((B, T, Hk, Dk))) * Dk**-0.5, unit(mx.random.normal((B, T, Hk, Dk)))
    log_gate = -strongest * mx.random.uniform(shape=(B, T, Hv, Dk) if channel else (B, T, Hv)) ** 3
    beta = mx.sigmoid(mx.random.normal((B, T, Hv)))
    return [q, k, mx.random.normal((B, T, Hv, Dv)), log_gate, beta, mx.random.normal((B, Hv, Dv, Dk))]


def value_and_grads(fn, arrays):
    """A scalar that uses every output differently, and its gradient for every argument."""

    def scalar(*arrays):
        y, state = fn(*arrays)
        weigh = lambda x: mx.cos(mx.arange(x.size).astype(x.dtype)).reshape(x.shape)
        return (y * weigh(y)).sum() + (state * weigh(state)).sum()

    with mx.stream(mx.cpu):
        out = mx.value_and_grad(scalar, argnums=tuple(range(len(arrays))))(*arrays)
        mx.eval(out)
    return out


def assert_close(fn, reference, arrays, tolerance=1e-5):
    value, grads = value_and_grads(fn, arrays)
    expected, expected_grads = value_and_grads(reference, [x.astype(mx.float64) for x in arrays])
    assert abs(value.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
    for name, got, want in zip(NAMES, grads, expected_grads):
        with mx.stream(mx.cpu):
            error = (mx.abs(got.astype(mx.float64) - want).max() / mx.abs(want).max()).item()
        assert error <= tolerance, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("channel", [False, True], ids=["scalar", "channel"])
@pytest.mark.parametrize("T", [1, 3, 64, 150])
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)], ids=["equal", "grouped"])
def test_equals_loop(channel, T, heads):
    """Catches wrong chunk borders, a wrong padding of the last chunk, and key heads summed over the wrong value
    heads.
    """
    assert_close(gated_delta_rule, loop, inputs(2, T, *heads, 8, 6, channel))


@pytest.mark.parametrize("channel", [False, True], ids=["scalar", "channel"])
def test_strong_decay(channel):
    """Catches quotients or differences of running products: gates between 1 and exp(-20) in the same chunk."""
    assert_close(gated_delta_rule, loop, inputs(1, 160, 1, 2, 8, 8, channel, strongest=20.0))


@pytest.mark.parametrize("channel", [False, True], ids=["scalar", "channel"])
def test_every_gate_strong(channel):
    """Catches a gradient of the gates made of large terms that should cancel: here all true entries are about
    1e-9.
    """
    arrays = inputs(1, 96, 1, 2, 8, 8, channel)
    arrays[3] = mx.full(arrays[3].shape, -20.0)
    assert_close(gated_delta_rule, loop, arrays)


@pytest.mark.parametrize("channel", [False, True], ids=["scalar", "channel"])
def test_repeated_keys(channel):
    """Catches an unstable inverse: one key written again and again with full strength, as in a row of equal
    tokens.
    """
    q, k, v, log_gate, beta, state = inputs(1, 128, 1, 2, 8, 8, channel)
    arrays = [q, mx.broadcast_to(k[:, :1], k.shape), v, log_gate * 1e-3, mx.ones_like(beta), state]
    assert_close(gated_delta_rule, loop, arrays)


@pytest.mark.parametrize("channel", [False, True], ids=["scalar", "channel"])
def test_mask_and_segments(channel):
    """Catches padding that changes the state, and documents that see their neighbours' state (also at chunk
    borders).
    """
    mask = mx.arange(100)[None] < mx.array([100, 61])[:, None]
    segments = mx.array([[1] * 32 + [2] * 7 + [3] * 61, [1] * 5 + [2] * 59 + [0] * 36])
    run = lambda *x: gated_delta_rule(*x, mask=mask, segments=segments)
    reference = lambda *x: loop(*x, mask=mask, segments=segments)
    assert_close(run, reference, inputs(2, 100, 2, 4, 8, 8, channel))


def test_documents_equal_separate_runs():
    """Catches a reset that is only approximate: outputs of a packed document are those of the document alone."""
    q, k, v, log_gate, beta, _ = inputs(1, 90, 1, 2, 8, 8)
    packed, _ = gated_delta_rule(q, k, v, log_gate, beta, segments=mx.array([[1] * 37 + [2] * 53]))
    alone, _ = gated_delta_rule(*[x[:, 37:] for x in (q, k, v, log_gate, beta)])
    assert mx.abs(packed[:, 37:] - alone).max().item() < 1e-6


def numpy_gradients(q, k, v, log_gate, beta, state, dy, d_state):
    """One head, token by token in float64, with the backward pass written out: gradients in the order of
    ``NAMES``.
    """
    gate = np.exp(log_gate)
    states, grads = [state], [np.zeros_like(x) for x in (q, k, v, log_gate, beta)]
    for t in range(len(q)):
        state = state * gate[t]
        states.append(state + np.outer(beta[t] * (v[t] - state @ k[t]), k[t]))
        state = states[-1]
    dq, dk, dv, d_log, d_beta = grads
    for t in reversed(range(len(q))):
        decayed = states[t] * gate[t]
        error = v[t] - decayed @ k[t]
        d_state = d_state + np.outer(dy[t], q[t])
        dq[t] = states[t + 1].T @ dy[t]
        d_written = d_state @ k[t]
        d_beta[t] = d_written @ error
        dv[t] = beta[t] * d_written
        dk[t] = d_state.T @ (beta[t] * error) - decayed.T @ dv[t]
        d_state = d_state - np.outer(dv[t], k[t])
        d_log[t] = (d_state * decayed).sum(0) if log_gate.shape[1] > 1 else (d_state * decayed).sum()
        d_state = d_state * gate[t]
    return [*grads, d_state]


@pytest.mark.parametrize("channel", [False, True], ids=["scalar", "channel"])
def test_long_sequence(channel):
    """Catches errors that grow with the number of chunks: gradients of 8192 tokens."""
    arrays = inputs(1, 8192, 1, 1, 4, 4, channel, strongest=2.0)
    dy, d_state = mx.random.normal((1, 8192, 1, 4)), mx.random.normal((1, 1, 4, 4))
    _, grads = mx.vjp(gated_delta_rule, arrays, [dy, d_state])
    arrays[3], arrays[4] = arrays[3].reshape(1, 8192, 1, -1), arrays[4][..., None]
    flat = [np.array(x).astype(np.float64)[0] for x in [*arrays, dy, d_state]]
    flat = [x[0] if x.ndim == 3 and x.shape[0] == 1 else x[:, 0] for x in flat]
    for name, got, want in zip(NAMES, grads, numpy_gradients(*flat)):
        error = np.abs(np.array(got).reshape(want.shape) - want).max() / np.abs(want).max()
        assert error <= 1e-5, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("options", [{}, {"lower_bound": -5.0}, {"allow_neg_eigval": True}], ids=str)
def test_update_equals_mlx_lm(options):
    """Catches another meaning of mlx-lm's arguments (gate formula, beta range, default state)."""
    q, k, v, _, b, _ = inputs(2, 70, 2, 4, 8, 8)
    a, A_log, dt_bias = mx.random.normal((2, 70, 4)), mx.random.normal((4,)), mx.random.normal((4,))
    arrays = [q, k, v, a, b, A_log, dt_bias]
    value, grads = value_and_grads(lambda *x: gated_delta_update(*x, **options), arrays)
    expected, expected_grads = value_and_grads(lambda *x: mlx_lm_update(*x, use_kernel=False, **options), arrays)
    assert abs(value.item() - expected.item()) < 1e-4
    for got, want in zip(grads, expected_grads):
        assert (mx.abs(got - want).max() / mx.abs(want).max()).item() < 1e-5


def test_half_precision_state_is_float32():
    """Catches a state carried in the activations' dtype: bfloat16 inputs give float32 states, outputs in
    bfloat16.
    """
    arrays = [x.astype(mx.bfloat16) for x in inputs(1, 100, 1, 2, 8, 8)]
    y, state = gated_delta_rule(*arrays)
    q, k, v, log_gate = [x.astype(mx.float32) for x in arrays[:4]]
    expected, _ = gated_delta_ops(q, k, v, mx.exp(log_gate), *arrays[4:])
    assert (y.dtype, state.dtype) == (mx.bfloat16, mx.float32)
    assert mx.abs(y - expected).max().item() < 2e-2


def test_inverse():
    """Catches a wrong block in the inverse of a unit lower triangular matrix."""
    mx.random.seed(0)
    lower = mx.tril(mx.random.normal((3, 32, 32)), -1) * 0.3
    product = unit_lower_inverse(lower) @ (mx.eye(32) + lower)
    assert mx.abs(product - mx.eye(32)).max().item() < 1e-4


def test_heads_that_do_not_divide():
    """Catches a silent reshape of 3 value heads over 2 key heads."""
    with pytest.raises(ValueError, match="3 value heads"):
        gated_delta_rule(*inputs(1, 4, 2, 2, 4, 4)[:2], *inputs(1, 4, 3, 3, 4, 4)[2:5])
