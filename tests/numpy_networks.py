"""The networks once more, in float64 numpy, one architecture at a time: what the Linen modules are tested against."""

import numpy as np
from scipy.signal import upfirdn


def silu(x):
    return x / (1 + np.exp(-x))


def dense(p, x):
    return x @ np.float64(p["map"]["kernel"]) + np.float64(p["map"]["bias"])


def conv(p, x, around=1):
    """3x3 convolution of an image on a black plane, cut `around - 1` pixels outside of the image."""
    x = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    h, w, k = x.shape[1] - 2, x.shape[2] - 2, np.float64(p["kernel"])
    return sum(x[:, i : i + h, j : j + w] @ k[i, j] for i in range(3) for j in range(3)) + p["bias"]


def group_norm(p, x, epsilon):
    groups = min(32, x.shape[-1] // 4)
    parts = x.reshape(*x.shape[:-1], groups, -1)
    axes = (1, 2, 4)
    centered = parts - parts.mean(axes, keepdims=True)
    normed = centered / np.sqrt(parts.var(axes, keepdims=True) + epsilon)
    return normed.reshape(x.shape) * p["scale"] + p["bias"]


def resize(x, how, filter_, trim=None):
    """Up or down by two along both axes with scipy; `trim`, the first kept entry, defaults to centred."""
    taps = np.array(filter_) / sum(filter_)
    margin = len(taps) // 2 - 1
    for axis in (1, 2):
        n = x.shape[axis]
        if how == "up":
            x = np.take(upfirdn(2 * taps, x, 2, 1, axis), margin + np.arange(2 * n), axis)
        else:
            start, count = (len(taps) - 1 - margin, n // 2) if trim is None else (trim, (n - 2) // 2)
            x = np.take(upfirdn(taps, x, 1, 1, axis), start + 2 * np.arange(count), axis)
    return x


def heads_attention(q, k, v, width):
    """[B,N,C] softmax attention in heads of `width` channels."""
    out = np.zeros_like(v)
    for start in range(0, v.shape[-1], width):
        part = slice(start, start + width)
        logits = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(width)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
    return out


def sinusoids(c, dim, last):
    angle = c[:, None] * 10_000.0 ** (-np.arange(dim // 2) / last)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def unet_block(p, x, emb, net, resample=""):
    adm = net.arch == "adm"
    epsilon = 1e-5 if adm else 1e-6
    filter_ = (1, 3, 3, 1) if net.arch == "ncsnpp" else (1, 1)
    shrink = 1.0 if adm else np.sqrt(0.5)

    def change(v):
        return resize(v, resample, filter_) if resample else v

    h = conv(p["conv0"], change(silu(group_norm(p["norm0"], x, epsilon))))
    affine = dense(p["emb"], emb)[:, None, None]
    if adm:
        scale, shift = np.split(affine, 2, -1)
        h = silu(group_norm(p["norm1"], h, epsilon) * (scale + 1) + shift)
    else:
        h = silu(group_norm(p["norm1"], h + affine, epsilon))
    h = conv(p["conv1"], h)
    x = change(x)
    x = ((dense(p["skip"], x) if "skip" in p else x) + h) * shrink
    if "attention" in p:
        b, s, _, c = x.shape
        a = p["attention"]
        normed = group_norm(a["norm"], x, epsilon).reshape(b, s * s, c)
        q, k, v = np.split(dense(a["qkv"], normed), 3, -1)
        attended = heads_attention(q, k, v, net.head_channels or c)
        x = (x + dense(a["out"], attended).reshape(x.shape)) * shrink
    return x


def unet(p, net, x, c_noise, cond):
    """Raw output of DDPM++, NCSN++ or ADM for two levels of `net.blocks` blocks."""
    if net.arch == "ncsnpp":
        angle = 2 * np.pi * c_noise[:, None] * np.float64(p["noise"]["frequency"])
        emb = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    else:
        emb = sinusoids(c_noise, net.channels, net.channels // 2 - 1)
    if net.arch == "adm":
        emb = silu(dense(p["emb1_map"], silu(dense(p["emb0_map"], emb))) + cond)
    else:
        emb = silu(dense(p["emb1_map"], silu(dense(p["emb0_map"], emb + cond))))

    top, low = x.shape[1], x.shape[1] // 2
    image = x
    x = conv(p["conv_in"], x)
    skips = [x]
    for i in range(net.blocks):
        x = unet_block(p[f"enc{top}_{i}"], x, emb, net)
        skips.append(x)
    x = unet_block(p[f"enc{low}_down"], x, emb, net, "down")
    if net.arch == "ncsnpp":
        wide = conv(p[f"enc{low}_pyramid"], image, around=2)
        x = (x + resize(wide, "down", (1, 3, 3, 1), trim=3)) * np.sqrt(0.5)
    skips.append(x)
    for i in range(net.blocks):
        x = unet_block(p[f"enc{low}_{i}"], x, emb, net)
        skips.append(x)
    x = unet_block(p[f"mid{low}_0"], x, emb, net)
    x = unet_block(p[f"mid{low}_1"], x, emb, net)
    for i in range(net.blocks + 1):
        x = unet_block(p[f"dec{low}_{i}"], np.concatenate([x, skips.pop()], -1), emb, net)
    x = unet_block(p[f"dec{top}_up"], x, emb, net, "up")
    for i in range(net.blocks + 1):
        x = unet_block(p[f"dec{top}_{i}"], np.concatenate([x, skips.pop()], -1), emb, net)
    assert not skips
    return conv(p["conv_out"], silu(group_norm(p["norm_out"], x, 1e-5 if net.arch == "adm" else 1e-6)))


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(p, x, width):
    parts = x.reshape(*x.shape[:-1], -1, width)
    return (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]).reshape(x.shape)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dit(p, net, x, c_noise, cond):
    """Raw output of a DiT, its blocks unrolled."""
    patch, c = net.patch, net.channels
    emb = silu(dense(p["emb0_map"], sinusoids(c_noise, 256, 127)))
    emb = silu(dense(p["emb1_map"], emb) + cond)
    b, h, w, image_channels = x.shape
    rows, columns = h // patch, w // patch
    tokens = np.zeros((b, rows * columns, c))
    for i in range(rows):
        for j in range(columns):
            piece = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(b, -1)
            omega = 10_000.0 ** (-np.arange(c // 4) / (c // 4))
            place = np.concatenate([f(k * omega) for k in (i, j) for f in (np.sin, np.cos)])
            tokens[:, i * columns + j] = dense(p["patch_in"], piece) + place
    x = tokens
    for depth in range(net.blocks):
        q = {name: _row(leaf, depth) for name, leaf in p["blocks"].items()}
        a = q["attention"]
        width = net.head_channels or c
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(dense(q["modulation"], emb)[:, None], 6, -1)
        query, key, value = np.split(dense(a["qkv"], layer_norm(x) * (1 + scale1) + shift1), 3, -1)
        query, key = rms_norm(a["norm_q"], query, width), rms_norm(a["norm_k"], key, width)
        x = x + gate1 * dense(a["out"], heads_attention(query, key, value, width))
        hidden = gelu(dense(q["mlp_in"], layer_norm(x) * (1 + scale2) + shift2))
        x = x + gate2 * dense(q["mlp_out"], hidden)
    shift, scale = np.split(dense(p["modulation_out"], emb)[:, None], 2, -1)
    pieces = dense(p["patch_out"], layer_norm(x) * (1 + scale) + shift)
    out = np.zeros((b, h, w, image_channels))
    for i in range(rows):
        for j in range(columns):
            piece = pieces[:, i * columns + j].reshape(b, patch, patch, image_channels)
            out[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = piece
    return out


def _row(tree, index):
    return {k: _row(v, index) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree)[index]
