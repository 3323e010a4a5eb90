"""RAT+ language models (arXiv 2602.18196) for transformers, in plain torch.

    o, q, k, v, g = projections of norm(x)
    gate_t = sigmoid(g_t)                             one gate a channel, shared by k and v
    k~_t = gate_t k~_{t-1} + (1 - gate_t) k_t         likewise v~; fp32 state; over the whole sequence
    a_t  = attention(rope(q_t), rope(k~), v~)         over the keys that the pattern (D, W, I) leaves visible
    x    = x + W_out (a_t * sigmoid(o_t)),   x = x + W_down gelu(W_up norm(x))

The same weights are read under any pattern: ``model.set_pattern("D=16,W=256,I=4")``, or ``pattern=…`` in any call. The cache keeps what the
pattern may still show, not every key: initial tokens, a ring of the last W, every D-th token, and the fp32 state of the averages.

Tokens that ``attention_mask`` marks with 0 do not exist, wherever they stand: they are not seen, do not move the averages, and have no
position. So left padding and right padding change nothing. Positions always count the real tokens before a token.

Self-contained: needs torch and transformers only. Written for clarity; a GPU runs it, but without kernels of its own.

Shapes: B sequences, T tokens, S keys or cache slots, H heads, K channels of a head, R = K / 2 rotary angles, C = H K width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_ratplus import HeadGroup, Pattern, RATPlusConfig, resolve_pattern

_FUTURE = 1 << 40  # the position of padding and of empty slots: no query looks that far ahead
_CHUNK = 512  # queries computed at a time: bounds the memory of masks and of a prompt's activations


# ---- the parts of the mixer -----------------------------------------------------------------------------------------------


def visible(q_positions_BT: Tensor, k_positions_BS: Tensor, pattern: Pattern) -> Tensor:
    """The mask rule: bool (B, T, S). A token sees at least itself, and so does padding, for whose output nobody asks."""
    i, j = q_positions_BT[:, :, None], k_positions_BS[:, None, :]
    seen = (i - j <= pattern.window) | (j < pattern.initial)
    if pattern.dilation != -1:
        seen = seen | ((j + 1) % pattern.dilation == 0)
    return seen & (j <= i)


def rotary_tables(positions_BT: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, 1, R) in fp32; the angles in float64, because fp32 ones are wrong by 1e-2 at position 131072."""
    pairs_R = torch.arange(head_dim // 2, dtype=torch.float64, device=positions_BT.device)
    angles_BT1R = positions_BT.double()[..., None, None] * base ** (-2.0 * pairs_R / head_dim)
    return angles_BT1R.cos().float(), angles_BT1R.sin().float()


def rotate(x_BTHK: Tensor, rotary: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Channel i turns with channel i + R, in fp32 at least; the result in ``dtype``."""
    cos, sin = rotary
    first, second = x_BTHK.to(_wide(x_BTHK.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)


def gated_average(kv_BTXC: Tensor, g_BTC: Tensor, state_BXC: Tensor) -> Tensor:
    """s_t = gate_t s_{t-1} + (1 - gate_t) x_t of keys and values (X = 2), which share the gate; fp32 at least, (B, T, X, C).

    By doubling: after the step of distance n every token has averaged the last 2 n. No division, so no gate is too small.
    """
    g_BT1C = g_BTC.to(state_BXC.dtype)[:, :, None]
    decay_BT1C = torch.sigmoid(g_BT1C)
    average_BTXC = torch.sigmoid(-g_BT1C) * kv_BTXC.to(state_BXC.dtype)  # sigmoid(-g) is 1 - gate without its rounding
    distance = 1
    while distance < g_BTC.shape[1]:
        carried = decay_BT1C[:, distance:] * average_BTXC[:, :-distance]
        average_BTXC = torch.cat((average_BTXC[:, :distance], average_BTXC[:, distance:] + carried), dim=1)
        longer = decay_BT1C[:, distance:] * decay_BT1C[:, :-distance]
        decay_BT1C = torch.cat((decay_BT1C[:, :distance], longer), dim=1)
        distance *= 2
    return average_BTXC + decay_BT1C * state_BXC[:, None]


def attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, seen_BTS: Tensor | None) -> Tensor:
    """Softmax attention over the keys marked in ``seen_BTS``; None is causal."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    mask = None if seen_BTS is None else seen_BTS[:, None]
    out_BHTK = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out_BHTK.transpose(1, 2)


def attend_to_itself(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, positions_BT: Tensor, pattern: Pattern, padded: bool
) -> Tensor:
    """Attention of a whole sequence, some queries at a time and only to keys that one of them sees."""
    if pattern.dilation == 1 and not padded:
        return attend(q_BTHK, k_BTHK, v_BTHK, None)
    parts = []
    for start in range(0, q_BTHK.shape[1], _CHUNK):
        end = min(start + _CHUNK, q_BTHK.shape[1])
        seen_BTS = visible(positions_BT[:, start:end], positions_BT[:, :end], pattern)
        keys_S = seen_BTS.flatten(0, 1).any(dim=0).nonzero()[:, 0]
        parts.append(attend(q_BTHK[:, start:end], k_BTHK[:, keys_S], v_BTHK[:, keys_S], seen_BTS[:, :, keys_S]))
    return torch.cat(parts, dim=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the cache ------------------------------------------------------------------------------------------------------------


class Slots:
    """Keys and values (B, H, S, K) of known positions (B, S). Slot 0 is never read: what is not to be kept is written there."""

    def __init__(self, batch: int, heads: int, like: Tensor) -> None:
        self.positions = torch.full((batch, 1), _FUTURE, dtype=torch.int64, device=like.device)
        self.k = like.new_zeros(batch, heads, 1, like.shape[-1])
        self.v = like.new_zeros(batch, heads, 1, like.shape[-1])

    def grow(self, count: int, most: int) -> None:
        """Make room for at least ``count`` entries, and for some more, but for ``most`` at most."""
        room = self.positions.shape[1] - 1
        if count <= room:
            return
        more = min(most, max(count, room + room // 4 + 16)) - room
        self.positions = functional.pad(self.positions, (0, more), value=_FUTURE)
        self.k, self.v = (functional.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))

    def write(self, slots_BT: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, positions_BT: Tensor) -> None:
        """Keep each token in its slot, or nowhere where that is 0."""
        index_BHTK = slots_BT[:, None, :, None].expand(-1, k_BTHK.shape[2], -1, k_BTHK.shape[3])
        self.k.scatter_(2, index_BHTK, k_BTHK.transpose(1, 2))
        self.v.scatter_(2, index_BHTK, v_BTHK.transpose(1, 2))
        self.positions.scatter_(1, slots_BT, positions_BT)
        self.positions[:, 0] = _FUTURE

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, S, H, K) and positions (B, S)."""
        return self.k.transpose(1, 2), self.v.transpose(1, 2), self.positions

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.positions, self.k, self.v = (x.index_select(0, rows) for x in (self.positions, self.k, self.v))


class GroupCache:
    """What the heads of one pattern in one layer keep: the first I tokens, the last W in a ring, and every D-th from I on.

    A D-th token is kept at once, beside the ring; each query reads the ring within its window, and the other two behind it.
    """

    def __init__(self, group: HeadGroup, batch: int, like: Tensor) -> None:
        self.pattern = group.pattern
        self.initial, self.ring, self.far = (Slots(batch, len(group.heads), like) for _ in range(3))

    def extend(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        """Attention of new tokens to what is kept and to each other."""
        behind_BT1 = (positions_BT - self.pattern.window)[..., None]
        kept = [part.tensors() for part in (self.initial, self.far, self.ring)]
        before_BTS = [(positions_BS[:, None] < behind_BT1) for _, _, positions_BS in kept[:2]]
        ring_BTS = (kept[2][2][:, None] >= behind_BT1) & (kept[2][2][:, None] != _FUTURE)
        seen_BTS = torch.cat((*before_BTS, ring_BTS, visible(positions_BT, positions_BT, self.pattern)), dim=2)
        k_BSHK = torch.cat([k for k, _, _ in kept] + [k_BTHK], dim=1)
        v_BSHK = torch.cat([v for _, v, _ in kept] + [v_BTHK], dim=1)
        return attend(q_BTHK, k_BSHK, v_BSHK, seen_BTS)

    def append(self, k_BTHK: Tensor, v_BTHK: Tensor, positions_BT: Tensor, lengths_B: Tensor, longest: int) -> None:
        """Keep what the pattern may still show of new tokens; sequences then have ``lengths_B`` tokens, ``longest`` at most."""
        dilation, window, initial = self.pattern
        real_BT = positions_BT < _FUTURE
        new = (k_BTHK, v_BTHK, positions_BT)
        if initial:
            self.initial.grow(min(initial, longest), initial)
            self.initial.write(torch.where(positions_BT < initial, positions_BT + 1, 0), *new)
        if window:
            self.ring.grow(min(window, longest), window)
            size = self.ring.positions.shape[1] - 1  # less than the window while no position has reached it
            kept_BT = real_BT & (positions_BT >= lengths_B[:, None] - window)
            self.ring.write(torch.where(kept_BT, positions_BT % size + 1, 0), *new)
        if dilation != -1:
            self.far.grow(max(0, longest // dilation - initial // dilation), _FUTURE)
            kept_BT = real_BT & ((positions_BT + 1) % dilation == 0) & (positions_BT >= initial)
            self.far.write(torch.where(kept_BT, (positions_BT + 1) // dilation - initial // dilation, 0), *new)


class LayerCache:
    """The head groups of one layer, and the fp32 state (B, 2, C) of its averages before rotary."""

    def __init__(self, groups: list[HeadGroup], like_BTHK: Tensor) -> None:
        batch, _, heads, channels = like_BTHK.shape
        self.groups = [GroupCache(group, batch, like_BTHK) for group in groups]
        self.state_BXC = like_BTHK.new_zeros(batch, 2, heads * channels, dtype=_wide(like_BTHK.dtype))


class RATPlusCache(Cache):
    """The sparse cache of a batch. ``columns`` counts the tokens read, padding included; ``lengths_B`` the real ones of each sequence."""

    is_compileable = False
    is_croppable = False

    def __init__(self, pattern: list[list[HeadGroup]], batch: int, device: torch.device) -> None:
        self.layers: list[Any] = []  # the base class's, which holds every key
        self.pattern = pattern
        self.columns = 0
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._of_layer: dict[int, LayerCache] = {}

    @property
    def bytes(self) -> int:
        """Memory held by keys, values and states."""
        held = [x for slots in self._slots() for x in (slots.k, slots.v)] + [layer.state_BXC for layer in self._of_layer.values()]
        return sum(x.numel() * x.element_size() for x in held)

    def of_layer(self, index: int, like_BTHK: Tensor) -> LayerCache:
        """What a layer keeps, on the device and in the dtype of its keys."""
        if index not in self._of_layer:
            self._of_layer[index] = LayerCache(self.pattern[index], like_BTHK)
        return self._of_layer[index]

    def get_seq_length(self, layer_idx: int = 0, cache_position: Any = None) -> int:
        """Tokens read, padding included."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows as far as it is asked to."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in the order of ``beam_idx``, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        indices = indices.to(self.lengths_B.device)
        self.lengths_B = self.lengths_B.index_select(0, indices)
        for slots in self._slots():
            slots.select(indices.to(slots.k.device))
        for layer in self._of_layer.values():
            layer.state_BXC = layer.state_BXC.index_select(0, indices.to(layer.state_BXC.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        rows = torch.arange(len(self.lengths_B), device=self.lengths_B.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Refused: the averages and what the ring has dropped cannot be taken back."""
        raise NotImplementedError("the cache of a RAT+ model cannot be cropped")

    def _slots(self) -> list[Slots]:
        groups = [group for layer in self._of_layer.values() for group in layer.groups]
        return [slots for group in groups for slots in (group.initial, group.ring, group.far)]


# ---- the model ------------------------------------------------------------------------------------------------------------


class RATPlusRMSNorm(nn.Module):
    """y = x / rms(x) * weight in fp32; the result in the dtype of the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x_BTC.to(_wide(x_BTC.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(self.weight.dtype)


class RATPlusMixer(nn.Module):
    """Gated averages of keys and values, attention under a pattern, output gate."""

    def __init__(self, config: RATPlusConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.index, self.heads, self.recurrence = index, config.num_attention_heads, config.recurrence
        self.norm = RATPlusRMSNorm(width, config.rms_norm_eps)
        self.o, self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(5))
        if self.recurrence:
            self.g = nn.Linear(width, width, bias=False)

    def forward(self, x_BTC: Tensor, sight: Sight, groups: list[HeadGroup], cache: RATPlusCache | None) -> Tensor:
        """(B, T, C) in the dtype of the matrices; the residual is added by the caller."""
        x_BTC = self.norm(x_BTC)
        q_BTHK, k_BTHK, v_BTHK = (linear(x_BTC).unflatten(-1, (self.heads, -1)) for linear in (self.q, self.k, self.v))
        dtype, own_cache = q_BTHK.dtype, None if cache is None else cache.of_layer(self.index, q_BTHK)
        if self.recurrence:
            k_BTHK, v_BTHK = self._average(k_BTHK, v_BTHK, self.g(x_BTC), sight.padding_BT, own_cache)
        q_BTHK, k_BTHK = (rotate(x_BTHK, sight.rotary, dtype) for x_BTHK in (q_BTHK, k_BTHK))
        mixed_BTHK = self._attend(q_BTHK, k_BTHK, v_BTHK.to(dtype), sight, groups, own_cache)
        return self.out(mixed_BTHK.flatten(-2) * torch.sigmoid(self.o(x_BTC)))

    def _average(
        self, k_BTHK: Tensor, v_BTHK: Tensor, g_BTC: Tensor, padding_BT: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """The averages of keys and values, fp32 at least, going on from the cache's state."""
        if padding_BT is not None:
            g_BTC = g_BTC.masked_fill(padding_BT[..., None], float("inf"))  # a gate of exactly 1 holds the state
        kv_BTXC = torch.stack((k_BTHK.flatten(-2), v_BTHK.flatten(-2)), dim=2)
        state_BXC = kv_BTXC.new_zeros(kv_BTXC[:, 0].shape, dtype=_wide(g_BTC.dtype)) if cache is None else cache.state_BXC
        averages_BTXC = gated_average(kv_BTXC, g_BTC, state_BXC)
        if cache is not None:
            cache.state_BXC = averages_BTXC[:, -1].clone()  # not a view, which would keep the whole chunk
        averages_BTXHK = averages_BTXC.unflatten(-1, (self.heads, -1))
        return averages_BTXHK[:, :, 0], averages_BTXHK[:, :, 1]

    def _attend(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, sight: Sight, groups: list[HeadGroup], cache: LayerCache | None
    ) -> Tensor:
        """Each group of heads under its pattern: (B, T, H, K)."""
        mixed_BTHK = torch.empty_like(q_BTHK)
        for index, (pattern, heads) in enumerate(groups):
            own = list(heads)
            q, k, v = (x_BTHK[:, :, own] for x_BTHK in (q_BTHK, k_BTHK, v_BTHK))
            if cache is None:
                mixed_BTHK[:, :, own] = attend_to_itself(q, k, v, sight.positions_BT, pattern, sight.padding_BT is not None)
            else:
                mixed_BTHK[:, :, own] = cache.groups[index].extend(q, k, v, sight.positions_BT)
                cache.groups[index].append(k, v, sight.positions_BT, sight.lengths_B, sight.longest)
        return mixed_BTHK


class RATPlusFeedForward(nn.Module):
    """down(gelu(up(norm(x)))) with the exact GELU; the residual is added by the caller."""

    def __init__(self, config: RATPlusConfig) -> None:
        super().__init__()
        self.norm = RATPlusRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) in the dtype of the matrices."""
        return self.down(functional.gelu(self.up(self.norm(x_BTC))))


class RATPlusLayer(nn.Module):
    """Mixer and feed-forward network, each with its residual."""

    def __init__(self, config: RATPlusConfig, index: int) -> None:
        super().__init__()
        self.mixer = RATPlusMixer(config, index)
        self.ffn = RATPlusFeedForward(config)

    def forward(self, x_BTC: Tensor, sight: Sight, groups: list[HeadGroup], cache: RATPlusCache | None) -> Tensor:
        """(B, T, C) in the dtype of the residual stream."""
        x_BTC = x_BTC + self.mixer(x_BTC, sight.on(x_BTC.device), groups, cache)
        return x_BTC + self.ffn(x_BTC)


class Sight(NamedTuple):
    """Where the tokens of a chunk stand. ``longest`` bounds the tokens of a sequence, these included, without asking the device."""

    positions_BT: Tensor  # of padding: _FUTURE
    padding_BT: Tensor | None  # None: there is none
    rotary: tuple[Tensor, Tensor]  # cos and sin, (B, T, 1, R)
    lengths_B: Tensor  # real tokens of each sequence, these included
    longest: int

    @classmethod
    def of(
        cls, config: RATPlusConfig, real_BT: Tensor | None, shape: torch.Size, device: torch.device, cache: RATPlusCache | None
    ) -> Sight:
        """Tokens (B, T) behind those in the cache; ``real_BT`` marks those that are no padding."""
        counted_BT = torch.ones(shape, dtype=torch.int64, device=device) if real_BT is None else real_BT.long()
        before_B = torch.zeros_like(counted_BT[:, 0]) if cache is None else cache.lengths_B
        positions_BT = before_B[:, None] + counted_BT.cumsum(dim=1) - 1
        return cls(
            positions_BT if real_BT is None else positions_BT.masked_fill(~real_BT, _FUTURE),
            None if real_BT is None else ~real_BT,
            rotary_tables(positions_BT, config.head_dim, config.rope_base),
            before_B + counted_BT.sum(dim=1),
            shape[1] + (0 if cache is None else cache.columns),
        )

    def on(self, device: torch.device) -> Sight:
        """The same on the device of a layer."""
        if self.positions_BT.device == device:
            return self
        cos, sin = self.rotary
        padding_BT = None if self.padding_BT is None else self.padding_BT.to(device)
        rotary = (cos.to(device), sin.to(device))
        return Sight(self.positions_BT.to(device), padding_BT, rotary, self.lengths_B.to(device), self.longest)


class RATPlusPreTrainedModel(PreTrainedModel):
    """What transformers needs to know."""

    config_class = RATPlusConfig
    base_model_prefix = "model"
    _no_split_modules = ["RATPlusLayer"]
    _supports_sdpa = True
    _is_stateful = True  # no assisted generation: a cache that has dropped keys cannot be cropped

    def _init_weights(self, module: nn.Module) -> None:
        """Matrices ~ N(0, initializer_range^2), norms 1."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, RATPlusRMSNorm):
            nn.init.ones_(module.weight)


class RATPlusModel(RATPlusPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: RATPlusConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RATPlusLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RATPlusRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, which is also the head."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace it."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RATPlusCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pattern: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Final hidden states (B, T, C) of token ids (B, T), which follow what ``past_key_values`` holds.

        ``attention_mask``, (B, T) or with the columns before these (B, past + T), is 0 where there is no token. ``pattern`` reads the model
        by another pattern than its own, for this call. Raises ``ValueError`` for what the model does not have.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: the attention weights of a RAT+ model are never formed")
        x_BTC = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if x_BTC.shape[1] == 0:
            raise ValueError("there are no tokens to read")
        if self.config.residual_in_fp32 and x_BTC.dtype in (torch.bfloat16, torch.float16):
            x_BTC = x_BTC.float()
        groups = self._groups(pattern, past_key_values)
        real_BT = _real_tokens(attention_mask, x_BTC.shape[:2])
        cache = past_key_values
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = RATPlusCache(groups, x_BTC.shape[0], x_BTC.device)
        _check_positions(position_ids, real_BT, x_BTC.shape[:2], cache)
        keep = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        states = self._run(x_BTC, real_BT, groups, cache, bool(keep))
        if not (return_dict if return_dict is not None else self.config.return_dict):
            return (states[-1], cache)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(states) if keep else None,
        )

    def _groups(self, pattern: Any, cache: RATPlusCache | None) -> list[list[HeadGroup]]:
        """The head groups of every layer, under the pattern of the call or the model's own."""
        if cache is not None and not isinstance(cache, RATPlusCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; a RAT+ model makes its own RATPlusCache: leave it out"
            )
        spec = self.config.pattern if pattern is None else pattern
        groups = resolve_pattern(spec, self.config.num_hidden_layers, self.config.num_attention_heads)
        if cache is not None and cache.pattern != groups:
            raise ValueError("past_key_values was filled under another pattern; read the sequence anew")
        return groups

    def _run(
        self,
        x_BTC: Tensor,
        real_BT: Tensor | None,
        groups: list[list[HeadGroup]],
        cache: RATPlusCache | None,
        keep_states: bool,
    ) -> list[Tensor]:
        """The final hidden states, and if asked for the residual stream before each layer; with a cache chunk by chunk, else all at once."""
        length = x_BTC.shape[1]
        chunk = length if cache is None else _CHUNK
        by_chunk = []
        for start in range(0, length, chunk):
            part_BTC = x_BTC[:, start : start + chunk]
            real = None if real_BT is None else real_BT[:, start : start + chunk]
            sight = Sight.of(self.config, real, part_BTC.shape[:2], x_BTC.device, cache)
            states = []
            for layer, own in zip(self.layers, groups, strict=True):
                if keep_states:
                    states.append(part_BTC)
                part_BTC = layer(part_BTC, sight, own, cache)
            by_chunk.append([*states, self.norm(part_BTC)])
            if cache is not None:
                cache.columns, cache.lengths_B = sight.longest, sight.lengths_B
        return [torch.cat(parts, dim=1) for parts in zip(*by_chunk, strict=True)]


def _real_tokens(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Which of the new tokens exist, bool (B, T); None when all do."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0] or attention_mask.shape[1] < shape[1]:
        raise ValueError(f"attention_mask: expected (B, T) = {tuple(shape)} or more columns, found {tuple(attention_mask.shape)}")
    real_BT = attention_mask[:, attention_mask.shape[1] - shape[1] :].bool()
    return None if bool(real_BT.all()) else real_BT


def _check_positions(position_ids: Tensor | None, real_BT: Tensor | None, shape: torch.Size, cache: RATPlusCache | None) -> None:
    """Positions that a caller gives must be those the model takes, because the pattern counts them too."""
    if position_ids is None:
        return
    real_BT = torch.ones(shape, dtype=torch.bool, device=position_ids.device) if real_BT is None else real_BT
    expected_BT = real_BT.long().cumsum(dim=1) - 1 + (0 if cache is None else cache.lengths_B[:, None])
    if not torch.equal(position_ids.expand(shape)[real_BT], expected_BT[real_BT]):
        raise ValueError("position_ids: a RAT+ model counts the real tokens of attention_mask, from 0; leave position_ids out")


class RATPlusForCausalLM(RATPlusPreTrainedModel, GenerationMixin):
    """A RAT+ model with its head, which is the embedding once more."""

    def __init__(self, config: RATPlusConfig) -> None:
        super().__init__(config)
        self.model = RATPlusModel(config)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the first forward makes the cache."""
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, which is also the head."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace it."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embedding

    def set_pattern(self, pattern: Any) -> None:
        """Read the model by another pattern from now on: ``D=16,W=256,I=4``, a list with one a layer, where an entry may be a list a head.

        Raises ``ValueError`` where it does not fit the model. ``save_pretrained`` keeps it.
        """
        resolve_pattern(pattern, self.config.num_hidden_layers, self.config.num_attention_heads)
        self.config.pattern = pattern

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RATPlusCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pattern: Any = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, T, V) in fp32, and with ``labels`` (B, T; shifted here; -100 is ignored) their mean cross entropy.

        ``logits_to_keep``: only for the last so many tokens, or those of an index; 0 is all. The rest as in ``RATPlusModel``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            pattern=pattern,
            position_ids=position_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head_VC = self.model.embedding.weight  # on the first device, where layers are spread over several
        logits_BTV = functional.linear(outputs.last_hidden_state[:, kept].to(head_VC.device), head_VC)
        logits_BTV = logits_BTV.to(_wide(logits_BTV.dtype))
        loss = None if labels is None else _next_token_loss(logits_BTV, labels, num_items_in_batch)
        if not (return_dict if return_dict is not None else self.config.return_dict):
            return tuple(part for part in (loss, logits_BTV, outputs.past_key_values) if part is not None)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: RATPlusCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pattern: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``forward`` is to be called with: the tokens that the cache has not read."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "pattern": pattern,
            "logits_to_keep": 1,
        }
        if past_key_values is None:
            return inputs | ({"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds})
        columns = past_key_values.get_seq_length()
        unread = input_ids.shape[1] - columns if attention_mask is None else attention_mask.shape[1] - columns
        return inputs | {"input_ids": input_ids[:, input_ids.shape[1] - unread :], "past_key_values": past_key_values}


def _next_token_loss(logits_BTV: Tensor, labels_BT: Tensor, count: Tensor | int | None) -> Tensor:
    """Cross entropy of each next token, divided by how many there are, or by the ``count`` of a larger batch."""
    targets = labels_BT[:, 1:].to(logits_BTV.device).flatten()
    logits = logits_BTV[:, :-1].flatten(0, 1)
    if count is None:
        return functional.cross_entropy(logits, targets, ignore_index=-100)
    return functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
