"""Text encoder and text-conditional U-Net once more, in float64 numpy, from their papers and docstrings."""

import itertools

import numpy as np
from numpy_networks import conv, dense, gelu, group_norm, silu, sinusoids, unet_block


def layer_norm(p, x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def project(p, x):
    """A map without bias."""
    assert set(p["map"]) == {"kernel"}
    return x @ np.float64(p["map"]["kernel"])


def look(query, key, value, width):
    """[B,Q,C] attention of Q positions to K others, in heads of `width` channels."""
    heads = []
    for start in range(0, query.shape[-1], width):
        q, k, v = (a[..., start : start + width] for a in (query, key, value))
        logits = np.einsum("bqd,bkd->bqk", q, k) / np.sqrt(width)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(heads, -1)


def encode(p, tokens):
    """Embeddings [B,L,E] of tokens [B,L]; every position by itself, over the positions up to it."""
    x = np.float64(p["tokens"]["embedding"])[tokens] + np.float64(p["positions"])
    length, width = x.shape[1:]
    head = 32 if width % 32 == 0 else width
    for index in range(sum(name.startswith("block") for name in p)):
        b = p[f"block{index}"]
        query, key, value = np.split(dense(b["attention"]["qkv"], layer_norm(b["norm0"], x)), 3, -1)
        rows = [look(query[:, i : i + 1], key[:, : i + 1], value[:, : i + 1], head) for i in range(length)]
        x = x + dense(b["attention"]["out"], np.concatenate(rows, 1))
        x = x + dense(b["mlp_out"], gelu(dense(b["mlp_in"], layer_norm(b["norm1"], x))))
    return layer_norm(p["norm_out"], x)


def cross_attention(p, x, text, head, epsilon):
    """Pixels [B,H,W,C] look at tokens [B,L,E], residual."""
    b, h, w, c = x.shape
    query = project(p["to_query"], group_norm(p["norm"], x, epsilon).reshape(b, h * w, c))
    seen = look(query, project(p["to_key"], text), project(p["to_value"], text), head or query.shape[-1])
    return x + dense(p["out"], seen).reshape(x.shape)


def feed_forward(p, x, epsilon):
    """Residual GEGLU; the second half of the first map decides how much of the first half passes."""
    hidden = dense(p["mlp_in"], group_norm(p["norm"], x, epsilon))
    width = hidden.shape[-1] // 2
    return x + dense(p["mlp_out"], hidden[..., :width] * gelu(hidden[..., width:]))


def text_unet(p, net, x, c_noise, text):
    """Raw output of DDPM++ or ADM with text; the noise level alone enters the embedding."""
    adm = net.arch == "adm"
    epsilon, shrink = (1e-5, 1.0) if adm else (1e-6, np.sqrt(0.5))
    emb = sinusoids(c_noise, net.channels, net.channels // 2 - 1)
    emb = silu(dense(p["emb1_map"], silu(dense(p["emb0_map"], emb))))
    used = set()

    def block(name, x, resample=""):
        used.add(name)
        x = unet_block(p[name], x, emb, net, resample)
        if "cross" in p[name]:
            x = cross_attention(p[name]["cross"], x, text, net.head_channels, epsilon) * shrink
            x = feed_forward(p[name]["feed"], x, epsilon) * shrink
        return x

    levels = [x.shape[1] >> level for level in range(len(net.mults))]
    x = conv(p["conv_in"], x)
    skips = [x]
    for side in levels:
        if side != levels[0]:
            x = block(f"enc{side}_down", x, "down")
            skips.append(x)
        for i in range(net.blocks):
            x = block(f"enc{side}_{i}", x)
            skips.append(x)
    for side in reversed(levels):
        if side == levels[-1]:
            x = block(f"mid{side}_1", block(f"mid{side}_0", x))
        else:
            x = block(f"dec{side}_up", x, "up")
        for i in range(net.blocks + 1):
            x = block(f"dec{side}_{i}", np.concatenate([x, skips.pop()], -1))
    assert not skips
    assert {name for name in p if name.startswith(("enc", "mid", "dec"))} == used
    return conv(p["conv_out"], silu(group_norm(p["norm_out"], x, epsilon)))


def denoise(params, net, xt, sigma, tokens):
    """EDM's estimate of x0 (arXiv 2206.00364, table 1) of xt [B,H,W,C] at noise levels sigma [B] under tokens [B,L]."""
    s = sigma[:, None, None, None]
    text = encode(params["embedding"], tokens)
    raw = text_unet(params["net"], net, xt / np.sqrt(s**2 + 0.25), np.log(sigma) / 4, text)
    return 0.25 / (s**2 + 0.25) * xt + 0.5 * s / np.sqrt(s**2 + 0.25) * raw


def euler(params, net, noise, tokens, levels, guidance=1.0, empty=None):
    """Images from unit noise by Euler steps down the noise levels, the last of which is 0; `empty` [L] is the null caption."""
    u = levels[0] * noise
    for sigma, target in itertools.pairwise(levels):
        every = np.full(len(u), sigma)
        x0 = denoise(params, net, u, every, tokens)
        if guidance != 1:
            null = denoise(params, net, u, every, np.tile(empty, (len(u), 1)))
            x0 = null + guidance * (x0 - null)
        u = u + (target - sigma) * (u - x0) / sigma
    return u
