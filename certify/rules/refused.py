"""Operations that have no Lipschitz constant, or none worth having, and why."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F

from certify.rules.registry import refuse

refuse(
    "it divides by a deviation that depends on the input: not Lipschitz, or not tightly; "
    "BatchNorm has a rule",
    nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LocalResponseNorm, nn.RMSNorm, F.layer_norm, F.group_norm, F.instance_norm,
    F.local_response_norm, F.rms_norm, F.normalize, nn.CosineSimilarity, F.cosine_similarity,
)  # fmt: skip
refuse(
    "it multiplies tensors that depend on the input: not Lipschitz on unbounded inputs",
    nn.MultiheadAttention, F.multi_head_attention_forward, F.scaled_dot_product_attention,
    nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder,
    nn.TransformerDecoderLayer, nn.Bilinear, F.bilinear, nn.GLU, F.glu, torch.bmm, "bmm",
    nn.LSTM, nn.GRU,
)  # fmt: skip
refuse(
    "not Lipschitz on unbounded inputs; for a square write x * x, and pass a domain",
    torch.square, "square", torch.pow, "pow", operator.pow,
)  # fmt: skip
refuse(
    "a softmax only shrinks margins; certify the logits before it",
    nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, F.softmax, F.log_softmax, torch.softmax,
    torch.log_softmax, "softmax", "log_softmax", F.softmin,
)  # fmt: skip
refuse(
    "it is not continuous",
    nn.Hardshrink, F.hardshrink, torch.sign, "sign", torch.round, "round", torch.floor, "floor",
    torch.ceil, "ceil", torch.where, "where", torch.argmax, "argmax", torch.gather, "gather",
    torch.heaviside, torch.trunc, "trunc", operator.floordiv, operator.mod,
)  # fmt: skip
refuse(
    "its slope is not bounded",
    torch.exp, "exp", torch.sqrt, "sqrt", torch.log, "log", torch.rsqrt, "rsqrt",
    torch.reciprocal, "reciprocal", torch.tan, torch.sinh, torch.cosh, torch.asin, torch.acos,
)  # fmt: skip
refuse(
    "it is random, also in evaluation",
    F.gumbel_softmax, torch.bernoulli,
)  # fmt: skip
